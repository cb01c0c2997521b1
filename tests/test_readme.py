"""README's promises: its Python snippets run, its commands and files exist, its tables are complete."""

import os
import re
import shlex
from pathlib import Path

import pytest
import typer
from tiny_runs import arguments, dataset, llama
from transformers import HfArgumentParser, Trainer

from hf_lowrank.arguments import parse_recipe
from hf_lowrank.cli import app
from hf_lowrank.methods import METHODS

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()


def blocks(language):
    return re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL)


def test_it_starts_with_a_block_that_runs_and_one_that_tests():
    run, test = blocks("bash")[:2]
    assert "pip install -c constraints.txt -e ." in run
    assert run.splitlines()[-1] == "accelerate launch recipes/pretrain.py"
    assert test.splitlines()[-1].split()[0] == "pytest"
    assert README.index("```bash") < README.index("```python")


class TakesNoOptimizer(Trainer):
    def __init__(self, model, args, train_dataset, processing_class):
        super().__init__(model=model, args=args, train_dataset=train_dataset, processing_class=processing_class)


def test_every_python_snippet_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    args = arguments(tmp_path / "runs" / "snippets", max_steps=2)
    # a rank of 32 does not fit the smallest model, so this one is a little wider
    model = llama(hidden_size=64, intermediate_size=96)
    # the baseline that activations are compared with
    llama(hidden_size=64, intermediate_size=96, seed=1).save_pretrained(tmp_path / "runs" / "tiny-fullrank")
    names = {
        "model": model, "args": args, "train": dataset(), "valid": dataset(8, seed=1), "repo": args.output_dir,
    }  # fmt: skip
    snippets = blocks("python")
    assert len(snippets) == 4
    for snippet in snippets:
        # a trainer of TRL's stands for any that takes no optimizer, and the other snippets go on with their own
        own = {**names, "DPOTrainer": TakesNoOptimizer, "pairs": dataset(), "tokenizer": None}
        exec(compile(snippet, "README.md", "exec"), own if "DPOTrainer" in snippet else names)
    assert names["trainer"].state.global_step == 2
    assert names["report"]["run"]["method"] == "galore"
    assert names["dense"].num_parameters() == names["model"].num_parameters()


@pytest.mark.parametrize("line", [c for b in blocks("sh") for c in b.splitlines()])
def test_every_recipe_command_parses(line, monkeypatch):
    monkeypatch.chdir(ROOT)
    words = shlex.split(line, comments=True)
    if words[0] == "hf-lowrank":
        command = typer.main.get_command(app).commands[words[1]]
        context = command.make_context(words[1], words[2:])
        # what lm-eval is given goes on to the harness as it is
        assert context.params or context.args
        return
    assert words[:3] == ["accelerate", "launch", "recipes/pretrain.py"]
    assert Path(words[2]).is_file()
    recipe = parse_recipe([*words[3:], "--use_cpu", "--bf16", "false"], ROOT / "recipes" / "configs")
    assert recipe.method.method in METHODS


def test_every_method_has_its_row_and_its_paper():
    for config_cls in METHODS.values():
        row = next(line for line in README.splitlines() if f"`{config_cls.__name__}(" in line)
        assert config_cls.label.lower() in row.lower()
        paper = config_cls.paper
        if paper is not None:
            assert (f"https://arxiv.org/abs/{paper.arxiv}" if paper.arxiv else paper.url) in row


def test_every_relative_link_leads_somewhere():
    for target in re.findall(r"\]\((?!https?:)([^)#]+)\)", README):
        assert (ROOT / target).exists(), target


def test_flags_named_in_the_text_exist():
    named = set(re.findall(r"`--([a-z_-]+)", README))
    recipe = parse_recipe.__globals__
    parser = HfArgumentParser(
        [recipe["RecipeArguments"], recipe["DataArguments"], recipe["TrainingArguments"]], allow_abbrev=False
    )
    flags = {option.lstrip("-") for action in parser._actions for option in action.option_strings}
    for command in typer.main.get_command(app).commands.values():
        flags |= {option.lstrip("-") for p in command.params for option in p.opts}
    assert named <= flags


def test_no_path_of_a_machine_in_the_project():
    for folder, _, files in os.walk(ROOT):
        if any(part.startswith(".") and part != ".github" for part in Path(folder).relative_to(ROOT).parts):
            continue
        for name in files:
            path = Path(folder, name)
            if path.suffix in (".md", ".yaml", ".yml", ".toml", ".txt", ".json") and "egg-info" not in folder:
                assert str(Path.home()) + "/" not in path.read_text(), path


def test_every_recipe_is_a_row_of_the_table_of_recipes():
    rows = re.findall(r"^\| [^|]+ \| `(\w+)` \|", (ROOT / "recipes" / "README.md").read_text(), re.M)
    assert sorted(rows) == sorted(path.stem for path in (ROOT / "recipes" / "configs" / "60m").glob("*.yaml"))
