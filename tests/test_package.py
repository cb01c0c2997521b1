"""The package as it is imported and installed: what an import costs, public names, and a wheel without a checkout."""

import ast
import json
import pickle
import pkgutil
import subprocess
import sys
from pathlib import Path

import pytest

import hf_lowrank
import hf_lowrank.metrics

ROOT = Path(__file__).parents[1]

RENDER = """
import json, pathlib, sys
import hf_lowrank
assert pathlib.Path(hf_lowrank.__file__).is_relative_to(sys.argv[1]), hf_lowrank.__file__
from hf_lowrank.hub.card import CardData, render_card
from hf_lowrank.report.io import validate_report
report = json.loads(pathlib.Path(sys.argv[2]).read_text())
validate_report(report)
card = render_card(CardData.from_report(report, figures=["loss.png"]))
assert "model-index" in card and "figures/loss.png" in card
assert (pathlib.Path(hf_lowrank.__file__).parent / "py.typed").is_file()
from hf_lowrank.run.facts import _git_commit
assert _git_commit() is None
import evaluate
from hf_lowrank.evaluation.modules import MODULES, path
for name in MODULES:
    files = {file.name for file in pathlib.Path(path(name)).iterdir() if file.is_file()}
    assert files == {f"{name}.py", "app.py", "README.md", "requirements.txt"}, files
barrier = evaluate.load(path("interpolation_barrier"), module_type="measurement")
assert barrier.compute(alphas=[0, 0.5, 1], losses=[1, 3, 1])["interpolation/consecutive/barrier"] == 2
print(len(card))
"""


HEAVY = ("torch", "transformers", "accelerate", "peft", "datasets", "pandas", "matplotlib", "huggingface_hub")


def imported(code):
    """The heavy packages, and torch's modules for sharding, that a Python process has imported after it ran code."""
    names = (*HEAVY, "torch.distributed.fsdp", "torch.distributed.tensor")
    tail = f"import json, sys; print(json.dumps([name for name in {names} if name in sys.modules]), file=sys.stderr)"
    done = subprocess.run(
        [sys.executable, "-c", f"try:\n    {code}\nfinally:\n    {tail}"], capture_output=True, text=True, cwd=ROOT
    )
    assert "Traceback" not in done.stderr.replace("SystemExit", ""), done.stderr
    return json.loads(done.stderr.splitlines()[-1])


def test_importing_the_package_imports_nothing_heavy():
    assert imported("import hf_lowrank; dir(hf_lowrank); hf_lowrank.__version__; hf_lowrank.metrics") == []


def test_the_metrics_need_torch_and_scipy_alone():
    names = [f"hf_lowrank.metrics.{module.name}" for module in pkgutil.iter_modules(hf_lowrank.metrics.__path__)]
    assert "hf_lowrank.metrics.spectra" in names
    assert imported(f"import {', '.join(names)}") == ["torch"]


@pytest.mark.parametrize(
    "words",
    ["--help", "push --help", "measure --help", "evaluate --help", "compare --help", "mesure x", "load", "push --x"],
)
def test_the_command_line_answers_without_heavy_imports(words):
    code = f"from hf_lowrank.cli import main; import sys; sys.argv = ['hf-lowrank', *{words!r}.split()]; main()"
    assert imported(code) == []


def test_public_names_stand_in_the_table_the_list_and_the_imports_for_tools():
    tree = ast.parse(Path(hf_lowrank.__file__).read_text())
    (block,) = (node for node in tree.body if isinstance(node, ast.If))
    for_tools = {alias.name: node.module for node in block.body for alias in node.names}
    assert for_tools == hf_lowrank._MODULES
    assert sorted(hf_lowrank.__all__) == sorted(for_tools)


def test_public_names_work_however_they_are_asked_for():
    everything = {}
    exec("from hf_lowrank import *", everything)
    for name in hf_lowrank.__all__:
        assert everything[name] is getattr(hf_lowrank, name)
        assert pickle.loads(pickle.dumps(everything[name])) is everything[name]
    assert set(hf_lowrank.__all__) <= set(dir(hf_lowrank))
    assert hf_lowrank.optim.GaLoreAdamW.__module__ == "hf_lowrank.methods.galore"
    # a function, whatever modules have been imported
    assert callable(hf_lowrank.prepare)
    with pytest.raises(AttributeError, match="module 'hf_lowrank' has no attribute 'GaloreConfig'"):
        _ = hf_lowrank.GaloreConfig
    with pytest.raises(ImportError):
        from hf_lowrank import GaloreConfig  # noqa: F401


@pytest.mark.slow
def test_an_installed_wheel_renders_a_card(tmp_path):
    pip = [sys.executable, "-m", "pip"]
    subprocess.run([*pip, "wheel", "-q", "--no-deps", "-w", tmp_path, ROOT], check=True)
    (wheel,) = tmp_path.glob("hf_lowrank-*.whl")
    site = tmp_path / "site"
    subprocess.run([*pip, "install", "-q", "--no-deps", "--target", site, wheel], check=True)
    report = ROOT / "tests" / "report" / "full_report.json"
    done = subprocess.run(
        [sys.executable, "-c", RENDER, site, report],
        env={"PYTHONPATH": str(site), "PATH": "/usr/bin:/bin", "HOME": str(tmp_path)},
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert int(done.stdout.split()[-1]) > 2000


@pytest.mark.slow
def test_the_example_for_any_trainer_runs(tmp_path):
    example = ROOT / "recipes" / "examples" / "metrics_for_any_trainer.py"
    command = [sys.executable, example, "--output_dir", tmp_path, "--max_steps", "4", "--every", "2"]
    done = subprocess.run([*command, "--report_to", "tensorboard"], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    for name in ("report.json", "README.md", "metrics/spectral.parquet", "figures/spectra_over_steps.png"):
        assert (tmp_path / "publish" / name).is_file(), name
    import pandas as pd

    rows = pd.read_parquet(tmp_path / "publish" / "metrics" / "spectral.parquet")
    assert set(rows["module"]) == {"attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj"}
    assert sorted(set(rows["step"])) == [0, 2, 4]
    assert rows["error"].isna().all()
