"""The benchmarks run and say what they claim to measure; how fast things are is not tested."""

import importlib.util
import json
import math
import subprocess
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[1] / "recipes" / "benchmarks"


def run(name, monkeypatch, *argv):
    spec = importlib.util.spec_from_file_location(name, BENCHMARKS / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setattr(sys, "argv", [name, *map(str, argv)])
    monkeypatch.setattr(module, "TOKENS", 64, raising=False)
    module.main()


@pytest.fixture
def quiet():
    """The benchmark switches warnings off for its own process."""
    import logging

    yield
    logging.disable(logging.NOTSET)


@pytest.mark.usefixtures("quiet")
def test_metrics(monkeypatch, tmp_path):
    output = tmp_path / "metrics.json"
    few = ["--rounds", 1, "--sequences", 1, "--points", 3, "--parts", "spectra", "landscape"]
    run("metrics", monkeypatch, "--sizes", "tiny", "--device", "cpu", "--output", output, *few)
    result = json.loads(output.read_text())["tiny"]
    assert result["spectra"]["largest_error"] < 1e-4
    assert result["spectra"]["matrices"] == 14
    for part in ("spectra", "landscape"):
        assert all(value > 0 for value in result[part]["ratios"].values())


@pytest.mark.slow
def test_memory_of_metrics(tmp_path):
    output = tmp_path / "metrics.json"
    few = ["--rounds", "1", "--batch", "64", "--parts", "logits", "trajectory", "cka", "--device", "cpu"]
    command = [sys.executable, BENCHMARKS / "metrics.py", "--sizes", "tiny", "--output", output]
    subprocess.run([*command, *few], check=True)
    result = json.loads(output.read_text())["tiny"]
    # 64 x 256 tokens at vocabulary 32000: the whole batch's logits would be 2 GB
    assert result["logits"]["bytes"]["its logits alone"] == 64 * 256 * 32000 * 4
    assert 0 < result["logits"]["bytes"]["a loss"] < 0.5 * 2**30
    assert result["cka"]["ratios"]["eight times the positions"] < 1.5
    assert result["trajectory"]["bytes"]["trajectory PCA"] > 0


@pytest.mark.slow
@pytest.mark.usefixtures("quiet")
def test_methods(monkeypatch, tmp_path, capsys):
    output = tmp_path / "methods.json"
    few = ["--rounds", 1, "--refresh_rounds", 1, "--layers", 1]
    run("methods", monkeypatch, "--sizes", "tiny", "--device", "cpu", "--output", output, *few)
    result = json.loads(output.read_text())["tiny"]
    assert set(result) == {"step", "refresh", "layers", "state", "memory", "amortised over 200 steps"}
    # the official packages are in the test extra
    assert {"GaLore / galore-torch", "Fira / fira", "APOLLO / apollo-torch"} <= set(result["step"]["ratios"])
    for part in result.values():
        for numbers in (part.get("seconds", {}), part.get("ratios", {})):
            assert all(math.isfinite(value) and value > 0 for value in numbers.values())
    for name, found in result["state"]["bytes"].items():
        assert found["measured"] == found["predicted"], name
    peaks = result["memory"]["bytes"]
    assert all(peaks[name] < peaks["full-rank"] for name in ("GaLore", "Fira", "APOLLO", "APOLLO-Mini"))
    shown = capsys.readouterr().out
    assert "products alone" in shown
    assert "tiny, memory" in shown


@pytest.mark.slow
def test_imports(monkeypatch, tmp_path, capsys):
    run("imports", monkeypatch, "--rounds", 1, "--output", tmp_path / "imports.json")
    medians = json.loads((tmp_path / "imports.json").read_text())["median"]
    assert all(seconds > 0 for seconds in medians.values())
    assert "importtime" not in capsys.readouterr().err


def test_rates_are_tuned_and_the_seeds_trained_however_often_it_is_cut_off(monkeypatch, tmp_path, capsys):
    spec = importlib.util.spec_from_file_location("rates", BENCHMARKS / "rates.py")
    rates = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "rates", rates)
    spec.loader.exec_module(rates)
    assert set(rates.STARTS) == {path.stem for path in (BENCHMARKS.parent / "configs" / "tiny").glob("*.yaml")}
    output, started = tmp_path / "rates.jsonl", []

    def train(run, folder, flags):
        started.append(run)
        if len(started) % 4 == 0:
            # a kill may leave half a line
            with output.open("a") as file:
                file.write('{"recipe": "full')
            raise KeyboardInterrupt
        if run.recipe == "fullrank" and run.learning_rate > 5e-3:
            return None, None, 60.0
        others = run.learning_rate * run.other_lr_scale
        distance = math.log(run.learning_rate / 3e-3) ** 2 + math.log(others / 1e-2) ** 2
        return 4 + distance + run.seed / 10 + (run.recipe == "galore") * run.seed / 100, 0.01, 60.0

    monkeypatch.setattr(rates, "train", train)
    command = ["rates", "--output", str(output), "--runs", str(tmp_path), "--methods", "fullrank", "galore"]
    monkeypatch.setattr(sys, "argv", command)
    for _ in range(20):
        try:
            rates.main()
            break
        except KeyboardInterrupt:
            pass
    records = [json.loads(line) for line in output.read_text().splitlines()]
    finished = [rates.Run(**{key: r[key] for key in rates.Run.__dataclass_fields__}) for r in records]
    assert len(set(finished)) == len(finished) == len(started) - len(started) // 4
    seeds = [(run.recipe, run.seed, run.learning_rate) for run in finished if run.seed != rates.TUNING_SEED]
    assert seeds == [
        (recipe, seed, 0.003 if recipe == "fullrank" else 0.00333)
        for recipe in ("fullrank", "galore")
        for seed in (1, 2, 3)
    ]
    # one run diverged, which is no end of the search
    assert [r["learning_rate"] for r in records if r["validation_loss"] is None] == [0.009]
    shown = capsys.readouterr().out
    assert rates.RULE in shown
    full, galore = (line for line in shown.splitlines() if line.startswith(("| fullrank", "| galore")))
    assert full.startswith("| fullrank | 0.001 / 0.01 | 0.003 | 3.33 | 6 | 9 |")
    assert full.endswith("| 4.200 ± 0.058 | 0.000 ± 0.000 |")
    # the seeds' differences are 0.01, 0.02 and 0.03, and the distance of the grid's nearest point
    assert galore.endswith("± 0.006 |")
