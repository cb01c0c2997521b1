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
