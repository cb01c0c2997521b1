"""The package as it is installed: a wheel renders a card, holds schema and modules, and needs no checkout."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

RENDER = """
import json, pathlib, sys
import hf_lowrank
assert pathlib.Path(hf_lowrank.__file__).is_relative_to(sys.argv[1]), hf_lowrank.__file__
from hf_lowrank.hub.card import CardData, render_card
from hf_lowrank.report import validate_report
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
