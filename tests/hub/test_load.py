"""What others make of a published run: the snippets of its card as they stand, plain transformers, and offline.

Every case is trained and published once; two processes load them all, one without hf_lowrank, one without network.
"""

import copy
import functools
import json
import re
import shutil
import subprocess
import sys
from types import SimpleNamespace

import huggingface_hub
import pytest
import torch
from huggingface_hub import ModelCard, constants
from safetensors.torch import load_file
from tiny_runs import METHODS, VOCABULARY, arguments, gpt2, llama, make_trainer
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast, default_data_collator
from typer.testing import CliRunner

import hf_lowrank as lr
import hf_lowrank.run.report
from hf_lowrank.checkpoints import export, load_model
from hf_lowrank.cli import app, fail
from hf_lowrank.hub.fetch import FetchError
from hf_lowrank.methods import METHODS as REGISTERED
from hf_lowrank.model_config import base_architecture
from hf_lowrank.models import build_model
from hf_lowrank.report.io import read_report, write_report

IDS = torch.arange(24).reshape(2, 12) * 5 % VOCABULARY
DATA = {
    "source": "embedded", "name": "python-stdlib", "config": None, "revision_or_hash": "sha256:0",
    "tokenizer_name": "words", "tokenizer_hash": "sha256:1", "sequence_length": 16, "packing": True, "split_seed": 0,
    "train_sequences": 32, "validation_sequences": 8, "validation_tokens": 128,
}  # fmt: skip

# case -> method, model, whether the weights are published in shards
CASES = {
    "fullrank": ("fullrank", llama, True),
    "fira": ("fira", llama, False),
    "apollo": ("apollo", gpt2, False),
    "sltrain": ("sltrain", llama, True),
    "lora": ("lora", gpt2, False),
    "relora": ("relora", llama, False),
    "cola": ("cola", llama, False),
    "cola-gpt2": ("cola", gpt2, True),
}
COLA = [case for case in CASES if case.startswith("cola")]
NATIVE = ["sltrain", "lora", "relora"]

WITHOUT_HF_LOWRANK = """
import json, sys
sys.modules["hf_lowrank"] = None
import torch
from transformers import AutoModelForCausalLM

ids = torch.tensor(json.loads(sys.argv[2]))
found = {}
for repo, snippet in json.loads(sys.argv[3]).items():
    names = {}
    exec(snippet, names)
    model = names["model"].eval()
    try:
        AutoModelForCausalLM.from_pretrained(repo, subfolder="native")
        refusal = None
    except (ValueError, OSError) as error:
        refusal = str(error)
    with torch.no_grad():
        logits = model(ids).logits
        first = model(ids[:, :7], use_cache=True)
        second = model(ids[:, 7:], past_key_values=first.past_key_values).logits
    greedy = {"do_sample": False, "max_new_tokens": 8, "eos_token_id": None}
    texts = [model.generate(ids, use_cache=cache, **greedy) for cache in (True, False)]
    found[repo] = {
        "logits": logits, "cached": torch.cat([first.logits, second], dim=1), "texts": texts, "refusal": refusal,
        "class": type(model).__name__, "generated": "inputs" in names,
    }
torch.save(found, sys.argv[1])
"""

OFFLINE = """
import json, sys
import torch
import hf_lowrank as lr

ids = torch.tensor(json.loads(sys.argv[2]))
found = {}
for repo, snippets in json.loads(sys.argv[3]).items():
    names = {}
    exec("\\n".join(snippets), names)
    with torch.no_grad():
        found[repo] = {"logits": names["model"].eval()(ids).logits, "steps": names["report"]["run"]["steps"]}
for load in (lr.from_pretrained, lr.load_report):
    try:
        load("user/never-seen")
    except OSError as error:
        found[load.__name__] = str(error)
torch.save(found, sys.argv[1])
"""


def words():
    """A tokenizer whose vocabulary is that of the tiny models."""
    vocabulary = {"<unk>": 0, "def": 1, **{f"w{i}": i for i in range(2, VOCABULARY)}}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    names = ["input_ids", "attention_mask"]
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", pad_token="<unk>", model_input_names=names
    )


def snippets_of(card):
    return re.findall(r"^```python\n(.*?)^```$", card, re.DOTALL | re.MULTILINE)


@torch.no_grad()
def logits_of(model):
    return model.eval()(IDS).logits


def published(case, root, patch):
    """Train, publish, and load a case; what is to be compared."""
    method, make, sharded = CASES[case]
    args = arguments(root / case, max_steps=2, push_to_hub=True, hub_model_id=f"user/{case}", hub_strategy="end")
    trainer = make_trainer(
        METHODS[method], args, model=make(), processing_class=words(), data_collator=default_data_collator
    )
    lr.attach(trainer, run=lr.RunInfo(data=DATA, license="apache-2.0"))
    save = PreTrainedModel.save_pretrained
    if sharded:
        patch.setattr(
            PreTrainedModel, "save_pretrained", lambda self, *a, **k: save(self, *a, **k, max_shard_size="6KB")
        )
    trainer.train()
    patch.setattr(PreTrainedModel, "save_pretrained", save)
    card = (root / case / "publish" / "README.md").read_text()
    snippets, names = snippets_of(card), {}
    for snippet in snippets[1:]:
        exec(snippet, names)
    return SimpleNamespace(
        publish=root / case / "publish", model=trainer.model, logits=logits_of(trainer.model), card=card,
        snippets=snippets, native=names["model"], dense=names.get("dense"), report=names["report"],
    )  # fmt: skip


@pytest.fixture(scope="module")
def shared(_serving_hub, tmp_path_factory):
    """Case -> what was trained, and what the snippets of its card made of it here and in the other processes."""
    root, hub = tmp_path_factory.mktemp("published"), _serving_hub
    hub.reset(home=root / "hf_home")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_TOKEN", hub.token)
        for name in ("HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE"):
            patch.setattr(constants, name, str(hub.home / "hub"))
        patch.setattr(hf_lowrank.run.report, "draw_figures", lambda publish: [])
        cases = {case: published(case, root, patch) for case in CASES}
        for case, found in cases.items():
            found.validated = ModelCard.load(f"user/{case}")
            # before 2.0 the client asks huggingface.co whatever HF_ENDPOINT says
            if int(huggingface_hub.__version__.partition(".")[0]) >= 2:
                found.validated.validate()

    def run(code, file, argument, **environment):
        argv = [sys.executable, "-c", code, str(root / file), json.dumps(IDS.tolist()), json.dumps(argument)]
        env = hub.environment() | environment
        done = subprocess.run(argv, env=env, cwd=root, capture_output=True, text=True, stdin=subprocess.DEVNULL)
        assert done.returncode == 0, done.stderr[-3000:]
        assert "custom code" not in done.stdout + done.stderr, "nothing asks whether to run it"
        return torch.load(root / file, weights_only=True)

    plain = run(WITHOUT_HF_LOWRANK, "plain.pt", {f"user/{case}": found.snippets[0] for case, found in cases.items()})
    hub.requests.clear()
    everything = {f"user/{case}": found.snippets for case, found in cases.items()}
    offline = run(OFFLINE, "offline.pt", everything, HF_HUB_OFFLINE="1")
    assert hub.requests == []
    for case, found in cases.items():
        found.plain, found.offline = plain[f"user/{case}"], offline[f"user/{case}"]
    return SimpleNamespace(cases=cases, offline=offline, root=root)


@pytest.mark.parametrize("case", CASES)
def test_the_first_snippet_gives_the_trained_model_without_hf_lowrank(case, shared):
    found = shared.cases[case]
    assert (found.plain["logits"] - found.logits).abs().max() < 1e-4
    assert found.plain["class"] == ("CoLA" if case in COLA else "") + type(found.model).__name__
    assert found.plain["generated"], "the tokenizer is loaded and text generated"
    # with the cache of keys and values as without
    assert (found.plain["cached"] - found.plain["logits"]).abs().max() < 1e-5
    with_cache, without = found.plain["texts"]
    assert torch.equal(with_cache, without)
    assert with_cache.shape == (2, IDS.shape[1] + 8)


@pytest.mark.parametrize("case", CASES)
def test_the_other_snippets_give_model_dense_form_and_report(case, shared):
    found = shared.cases[case]
    assert torch.equal(logits_of(found.native), found.logits)
    assert (found.dense is None) == (case in COLA)
    if found.dense is not None:
        assert (logits_of(found.dense) - found.logits).abs().max() < 1e-4
        assert type(found.dense) is type(found.model)
    assert found.report == read_report(found.publish)
    assert found.report["run"]["method"] == CASES[case][0]


@pytest.mark.parametrize("case", CASES)
def test_what_was_fetched_works_offline(case, shared):
    found = shared.cases[case]
    assert torch.equal(found.offline["logits"], found.logits)
    assert found.offline["steps"] == 2


def test_offline_the_error_names_the_repo_and_the_way_out(shared):
    for name in ("from_pretrained", "load_report"):
        assert re.search(r"user/never-seen .* HF_HUB_OFFLINE=1 is set: go online once", shared.offline[name])


@pytest.mark.parametrize("case", CASES)
def test_plain_transformers_refuses_what_is_there_as_trained(case, shared):
    found = shared.cases[case]
    native = found.publish / "native"
    assert native.is_dir() == (case in NATIVE)
    assert found.plain["refusal"] is not None, "without native/ there is nothing, with it nothing to be half-loaded"
    if case in NATIVE:
        base = found.model.config.model_type
        assert f"model type `{case}_{base}`" in found.plain["refusal"]
        assert base_architecture(json.loads((native / "config.json").read_text())) == base
        with pytest.raises(OSError, match=r"load-it-with-hf_lowrank\.safetensors"):
            type(found.model).from_pretrained(native)
        loaded = load_model(native)
        assert not hasattr(loaded.config, "transformers_weights")
        assert loaded.config.model_type == base
        assert loaded.config.lowrank == found.model.config.lowrank
        assert torch.equal(logits_of(loaded), found.logits)


@pytest.mark.parametrize("case", CASES)
def test_the_card_is_valid_and_its_metadata_come_back(case, shared):
    found = shared.cases[case]
    data = found.validated.data.to_dict()
    assert str(found.validated) == found.card
    assert data["tags"][:2] == ["hf-lowrank", f"lowrank-method:{CASES[case][0]}"]
    assert found.model.config.model_type in data["tags"]
    assert data["library_name"] == "transformers"
    assert data["license"] == "apache-2.0"
    results = {result.metric_type: result for result in found.validated.data.eval_results}
    expected = {entry["name"]: entry["value"] for entry in found.report["metrics"]}
    assert results["perplexity"].metric_value == pytest.approx(expected["perplexity"])
    assert results["perplexity"].dataset_config != results["validation_loss"].dataset_config


@pytest.mark.parametrize("case", [case for case in CASES if CASES[case][2]])
def test_shards_are_published_with_their_index(case, shared):
    publish = shared.cases[case].publish
    folders = [publish, publish / "native"] if case in NATIVE else [publish]
    for folder in folders:
        index = json.loads((folder / "model.safetensors.index.json").read_text())
        assert len(set(index["weight_map"].values())) > 1
        assert not (folder / "model.safetensors").exists()


# ---- every method in every format ----


@pytest.mark.parametrize("method", sorted(REGISTERED))
@pytest.mark.parametrize("make", [llama, gpt2])
@pytest.mark.parametrize(("dtype", "shards"), [(torch.float32, "6KB"), (torch.bfloat16, "1GB")])
def test_every_save_format_gives_the_same_logits(method, make, dtype, shards, tmp_path, monkeypatch):
    model, _ = lr.prepare(build_model(make().config, 0, dtype=dtype), METHODS[method], arguments("unused"))
    generator = torch.Generator().manual_seed(7)
    for parameter in model.parameters():
        parameter.data += 0.05 * torch.randn(parameter.shape, generator=generator).to(dtype)
    save = PreTrainedModel.save_pretrained
    monkeypatch.setattr(PreTrainedModel, "save_pretrained", functools.partialmethod(save, max_shard_size=shards))
    export(model, tmp_path)
    assert (tmp_path / "model.safetensors").exists() == (shards == "1GB")
    expected = logits_of(model)
    assert torch.equal(logits_of(lr.from_pretrained(tmp_path)), expected)
    rounded = dtype == torch.bfloat16 and method != "cola"
    exact = logits_of(copy.deepcopy(model).double())
    # a dense matrix is rounded to bf16 once more than its factors: it is about as far from float64 as they are
    error = (expected.double() - exact).abs().max()
    plain = AutoModelForCausalLM.from_pretrained(tmp_path, trust_remote_code=method == "cola")
    for loaded in [plain] if method == "cola" else [plain, lr.from_pretrained(tmp_path, dense=True)]:
        assert loaded.dtype == dtype
        logits = logits_of(loaded).double()
        if rounded:
            assert (logits - exact).abs().max() < max(2 * error, 0.01)
        else:
            assert (logits - expected.double()).abs().max() < 1e-4


# ---- what comes from elsewhere ----


@pytest.fixture
def folder(shared, tmp_path):
    """A copy of a published folder that a test may change."""
    return shutil.copytree(shared.cases["fira"].publish, tmp_path / "publish")


def rewrite(path, **changes):
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def test_a_repos_code_is_not_run_by_from_pretrained(shared, hub):
    found = shared.cases["cola"]
    files = {p.relative_to(found.publish).as_posix(): p.read_bytes() for p in found.publish.rglob("*") if p.is_file()}
    hub.plant("user/cola", files | {"modeling_cola.py": b"raise SystemExit('the code ran')"})
    assert torch.equal(logits_of(lr.from_pretrained("user/cola")), found.logits)
    assert not list(hub.home.rglob("transformers_modules"))


@pytest.mark.parametrize("key", ["attn_implementation", "_attn_implementation", "experts_implementation"])
def test_a_kernel_that_a_config_names_is_not_fetched(key, shared, folder, hub):
    # transformers would download the kernel's repo and run what is in it
    rewrite(folder / "config.json", **{key: "somebody/kernel"})
    assert torch.equal(logits_of(lr.from_pretrained(folder)), shared.cases["fira"].logits)
    assert hub.requests == []


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"lowrank": "fira"}, "lowrank in config.json is no object"),
        ({"lowrank": [1]}, "lowrank in config.json is no object"),
        ({"lowrank": {"method": "galor"}}, "did you mean 'galore'"),
        ({"lowrank": {"method": "cola", "published": 3}}, "does not say what its code builds on"),
        ({"model_type": "no_such", "auto_map": {"AutoConfig": "x.Y"}}, "model type 'no_such' .* is unknown"),
        ({"model_type": ["llama"]}, "is unknown to the transformers"),
        ({"hidden_size": "sixteen"}, "makes no llama model|no model can be made from config.json"),
        ({"hidden_size": -4}, "no model can be made from config.json"),
        ({"architectures": [3]}, "no model can be made from config.json"),
        ({"hidden_size": 32}, "its weights do not fit"),
    ],
)
def test_a_config_that_makes_no_sense_is_one_error(changes, message, folder):
    rewrite(folder / "config.json", **changes)
    with pytest.raises(ValueError, match=message):
        lr.from_pretrained(folder)


def test_a_pickle_is_no_model(folder):
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    with pytest.raises(lr.CheckpointError, match=r"holds pytorch_model.bin and no safetensors"):
        lr.from_pretrained(folder)


def test_a_terminal_obeys_nothing_that_a_report_says(folder, capsys):
    escape = "\x1b[2J\x1b]0;owned\x07\u202e"
    report = read_report(folder)
    report["run"] |= {"name": f"[red]run[/red]{escape}", "hardware": {"gpu": f"[link=x]{escape}"}}
    report["metrics"].append(report["metrics"][-1] | {"settings": {"note": escape}})
    entry = {"task": f"[bold]{escape}", "metric": f"acc{escape}", "value": 0.5, "stderr": 0.1}
    rest = dict.fromkeys(("num_fewshot", "limit", "step", "task_version"))
    report["evaluations"] = [entry | rest]
    write_report(report, folder / "report.json")
    done = CliRunner().invoke(app, ["load", str(folder)], catch_exceptions=False, env={"COLUMNS": "200"})
    assert done.exit_code == 0
    assert not [character for character in escape if character in done.stdout and not character.isprintable()]
    for shown in ("[red]run[/red]", "gpu=[link=x]", "[bold]", "every weight accounted for"):
        assert shown in done.stdout
    with pytest.raises(SystemExit):
        fail(ValueError(f"file {escape} is bad"))
    assert "\x1b" not in capsys.readouterr().err


def test_a_report_that_is_not_valid_is_not_shown(folder):
    rewrite(folder / "report.json", metrics=[{"name": "loss"}])
    done = CliRunner().invoke(app, ["load", str(folder)])
    assert done.exit_code == 1
    assert "metrics[0].value is missing" in str(done.exception)
    assert done.stdout == ""


def test_results_on_a_registered_benchmark_are_published_as_the_hub_wants_them(folder, hub):
    report = read_report(folder)
    result = {"task": "gsm8k", "metric": "exact_match,strict-match", "value": 0.0125, "stderr": 0.003}
    rest = {"num_fewshot": 5, "limit": None, "step": 2, "task_version": "3.0", "settings": {"seeds": [42]}}
    write_report(report | {"evaluations": [result | rest]}, folder / "report.json")
    lr.push(folder, "user/evaluated")
    assert ".eval_results/gsm8k.yaml" in hub.repo("user/evaluated").files()
    write_report(report, folder / "report.json")
    lr.push(folder, "user/evaluated")
    assert ".eval_results/gsm8k.yaml" not in hub.repo("user/evaluated").files()


def test_a_repo_without_a_report_says_so(hub, shared):
    hub.plant("user/plain", {"config.json": b"{}"})
    with pytest.raises(FileNotFoundError, match="no report"):
        lr.load_report("user/plain")
    with pytest.raises(FetchError, match="user/none at revision 'main': no such repository"):
        lr.load_report("user/none")
