"""The measurement modules of `evaluate`: as it loads them, offline, from any folder."""

import ast
import doctest
import importlib.util
import io
import json
import math
import shutil
import sys
import tomllib
import uuid
from pathlib import Path
from types import ModuleType

import evaluate
import numpy as np
import pytest
import torch
import yaml
from evaluate.utils.gradio import infer_gradio_input_types, json_to_string_type, parse_readme

from hf_lowrank.evaluation.modules import MODULES, path
from hf_lowrank.metrics.activations import linear_cka
from hf_lowrank.metrics.interpolation import barrier
from hf_lowrank.metrics.landscape import LossCurve, expected_sharpness, mean_curve, variance_over_directions
from hf_lowrank.metrics.spectra import spectral_metrics

ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path, monkeypatch):
    """Another working directory, and no network: evaluate reads its own switch and the Hub's."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(evaluate.config, "HF_EVALUATE_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)


@pytest.fixture(scope="module")
def modules():
    """Every module, loaded as a user does."""
    return {name: evaluate.load(path(name), module_type="measurement", keep_in_memory=True) for name in MODULES}


# ---- what evaluate and a Space expect ----


@pytest.mark.parametrize("name", MODULES)
def test_the_documented_examples_run(name, modules):
    module = modules[name]
    examples = doctest.DocTestParser().get_doctest(module.inputs_description, {}, name, None, None)
    assert len(examples.examples) >= 4
    out = io.StringIO()
    result = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS).run(examples, out=out.write)
    assert result.failed == 0, out.getvalue()


@pytest.mark.parametrize("name", MODULES)
def test_a_module_says_what_it_is(name, modules):
    module = modules[name]
    assert (module.name, module.module_type) == (name, "measurement")
    assert "2605.13652" in module.citation
    assert module.citation.count("@") >= 2
    assert module.description in module.compute.__doc__ or module.inputs_description in module.compute.__doc__
    for part in ("Args:", "Returns:", "Raises:", "Examples:"):
        assert part in module.inputs_description
    for feature in module.features:
        assert f"{feature}:" in module.inputs_description


@pytest.mark.parametrize("name", MODULES)
def test_a_folder_is_a_space(name):
    folder = Path(path(name))
    assert {file.name for file in folder.iterdir() if file.is_file()} == {
        f"{name}.py", "app.py", "README.md", "requirements.txt",
    }  # fmt: skip
    front = yaml.safe_load((folder / "README.md").read_text(encoding="utf-8").split("---\n")[1])
    assert front["sdk"] == "gradio"
    assert front["app_file"] == "app.py"
    assert front["tags"] == ["evaluate", "measurement"]
    assert front["title"]
    assert front["description"].endswith(".")
    # evaluate's form calls gr.inputs, which gradio 4 has no more
    assert front["sdk_version"].startswith("3.")
    wanted = [line for line in (folder / "requirements.txt").read_text().splitlines() if not line.startswith("#")]
    assert wanted == ["hf_lowrank", "evaluate", "fastapi<0.113"]
    assert parse_readme(folder / "README.md").lstrip().startswith("# Measurement card")


@pytest.mark.parametrize("name", MODULES)
def test_one_import_a_line(name):
    # evaluate's parser takes `import a, b` for one library named "a,"
    imports = [n for n in ast.parse(Path(path(name), f"{name}.py").read_text()).body if isinstance(n, ast.Import)]
    assert imports
    assert all(len(node.names) == 1 for node in imports)


@pytest.mark.parametrize("name", MODULES)
def test_a_copied_folder_serves_its_form(name, tmp_path, monkeypatch):
    """The Space's app, as far as gradio: the stand-in takes what evaluate hands to it and fills in the form."""
    space = tmp_path / "app"
    shutil.copytree(path(name), space)
    forms = []

    class Interface:
        def __init__(self, fn, **kwargs):
            forms.append((fn, kwargs))

        def launch(self):
            pass

    gradio = ModuleType("gradio")
    gradio.Interface = Interface
    gradio.inputs = gradio.outputs = ModuleType("parts")
    gradio.inputs.Dataframe = gradio.inputs.Textbox = lambda **kwargs: kwargs
    monkeypatch.setitem(sys.modules, "gradio", gradio)
    spec = importlib.util.spec_from_file_location("app", space / "app.py")
    app = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(app)
    assert forms == [], "nothing is served by importing it"
    app.main()
    ((compute, kwargs),) = forms
    import pandas as pd

    module = evaluate.load(str(space / f"{name}.py"))
    types = json_to_string_type(infer_gradio_input_types(module.features.values()))
    numbers = all(kind == "number" for kind in types)
    cells = {"spectra": ["[[1, 0], [0, 2]]"], "cka": ["[1]", "[2]", "[4]"]}
    curves = ["[-1, 0, 1]", "[-1, 0, 1]"]
    column = [0.0, 0.5, 1.0] if numbers else cells.get(name, curves)
    table = pd.DataFrame(dict.fromkeys(kwargs["inputs"]["headers"], column))
    if name == "perplexity":
        table["tokens"] = [1, 1, 1]
    results = compute(table)
    assert results
    assert all(isinstance(value, float) for value in results.values())


def test_the_path_of_a_module_that_is_none():
    with pytest.raises(ValueError, match=r"unknown module 'spectre' \(did you mean 'spectra'\?\)"):
        path("spectre")


def test_the_modules_are_in_the_package_data():
    data = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["package-data"]["hf_lowrank"]
    packaged = {file for pattern in data for file in (ROOT / "hf_lowrank").glob(pattern)}
    for name in MODULES:
        files = {file for file in Path(path(name)).iterdir() if file.is_file()}
        assert len(files) == 4
        assert files <= packaged


# ---- the numbers are the pure functions' ----


def equal(results, expected):
    return all(results[name] == value or (math.isnan(value) and math.isnan(results[name])) for name, value in expected)


@pytest.mark.parametrize(
    "form", [np.asarray, torch.nn.Parameter, lambda w: w.tolist()], ids=["numpy", "torch", "list"]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_spectra_of_a_matrix_are_those_of_the_pure_function(dtype, form, modules):
    low_rank = torch.randn(12, 2, dtype=dtype) @ torch.randn(2, 9, dtype=dtype)
    for weight in (torch.randn(12, 9, dtype=dtype), low_rank):
        results = modules["spectra"].compute(data=[form(weight.clone())])
        expected = spectral_metrics(weight).to_dict()
        assert equal(results, [(f"spectral/weight/{key}", value) for key, value in expected.items()])
        assert all(type(value) is float for value in results.values())
    assert results["spectral/weight/numerical_rank"] == 2


def test_spectra_of_several_matrices_and_their_updates(modules):
    before = [torch.randn(8, 6, dtype=torch.float64), torch.randn(5, 9, dtype=torch.float64)]
    after = [before[0] + torch.eye(8, 6, dtype=torch.float64), before[1] * 1.5]
    results = modules["spectra"].compute(data=after, previous=before, per_matrix=True)
    rows = results.pop("matrices")
    ranks = [spectral_metrics(weight).stable_rank for weight in after]
    assert [row["spectral/weight/stable_rank"] for row in rows] == ranks
    assert results["spectral/weight/stable_rank"] == pytest.approx(np.mean(ranks), rel=1e-12)
    norms = [6.0, *((w**2).sum().item() for w in (0.5 * before[1], *before))]
    assert results["spectral/update/relative_norm"] == pytest.approx(
        math.sqrt((norms[0] + norms[1]) / (norms[2] + norms[3])), rel=1e-12
    )
    assert rows[1]["spectral/update/relative_norm"] == pytest.approx(0.5, rel=1e-12)
    assert rows[0]["spectral/update/effective_rank_score"] == pytest.approx(1.0, rel=1e-6)
    assert not any(key.startswith("spectral/update") for key in modules["spectra"].compute(data=after))


def test_the_precision_of_weights_can_be_named(modules):
    # the second value is above float64's tolerance and below float32's, which half precision has too
    weight = [[1.0, 0.0], [0.0, 2.0**-23]]
    ranks = [modules["spectra"].compute(data=[weight], dtype=d) for d in (None, "float64", "bfloat16")]
    assert [found["spectral/weight/numerical_rank"] for found in ranks] == [1, 2, 1]
    weight = torch.eye(256).tolist()
    assert modules["spectra"].compute(data=[weight], dtype="bfloat16")["spectral/weight/numerical_rank"] == 256
    with pytest.raises(ValueError, match="dtype='int8': give float64, float32"):
        modules["spectra"].compute(data=[weight], dtype="int8")


def test_sharpness_is_that_of_the_pure_functions(modules):
    generator = np.random.default_rng(0)
    grid = np.linspace(-0.3, 0.3, 7)
    curves = [LossCurve(grid, generator.random(7)) for _ in range(5)]
    module = modules["landscape_sharpness"]
    for curve in curves:
        module.add(x=curve.x, losses=curve.loss)
    results = module.compute()
    each = [expected_sharpness(curve) for curve in curves]
    assert results["landscape/random/sharpness"] == pytest.approx(expected_sharpness(mean_curve(curves)), rel=1e-12)
    assert results["landscape/random/sharpness_stderr"] == pytest.approx(np.std(each, ddof=1) / 5**0.5, rel=1e-12)
    assert results["landscape/random/variance"] == variance_over_directions(curves)
    assert results["landscape/random/variance_stderr"] > 0
    assert results["landscape/random/center_to_min"] == mean_curve(curves).center_to_min
    named = module.compute(x=[grid], losses=[curves[0].loss], subject="svd_1")
    assert named["landscape/svd_1/sharpness"] == each[0]
    assert not any(key.endswith("stderr") for key in named)


def test_a_barrier_is_that_of_the_pure_function(modules):
    alphas, losses = np.linspace(-0.25, 1.25, 31), np.random.default_rng(1).random(31)
    results = modules["interpolation_barrier"].compute(alphas=alphas, losses=losses, subject="cross_method")
    found = barrier(alphas, losses)
    assert results == {
        "interpolation/cross_method/barrier": found.value,
        "interpolation/cross_method/barrier_chord": found.chord,
        "interpolation/cross_method/barrier_alpha": found.alpha,
    }


def test_cka_is_that_of_the_pure_function(modules):
    generator = torch.Generator().manual_seed(0)
    x, y = (torch.randn(60, width, generator=generator, dtype=torch.float64) for width in (7, 5))
    y[:, :3] += x[:, :3]
    results = modules["cka"].compute(x=x, y=y, debiased=True)
    for name, debiased in (("cka", False), ("cka_debiased", True)):
        assert results[f"activation/{name}"] == pytest.approx(linear_cka(x, y, debiased), rel=1e-12)
        left_out = [linear_cka(x[kept], y[kept], debiased) for kept in blocks_left_out(60, 8)]
        spread = math.sqrt(7 / 8 * sum((value - np.mean(left_out)) ** 2 for value in left_out))
        assert results[f"activation/{name}_stderr"] == pytest.approx(spread, rel=1e-9)
    # 2 positions have a CKA but no standard error, and a constant has neither
    assert list(modules["cka"].compute(x=x[:2], y=y[:2])) == ["activation/cka"]
    assert math.isnan(modules["cka"].compute(x=torch.ones(9, 2), y=y[:9])["activation/cka"])


def blocks_left_out(count, groups):
    for block in np.array_split(np.arange(count), groups):
        yield np.setdiff1d(np.arange(count), block)


def test_perplexity_is_weighted_by_tokens(modules):
    losses, tokens = [10.0, 3.0, 8.0], [4, 1, 5]
    results = modules["perplexity"].compute(losses=losses, tokens=tokens)
    mean = 2.1
    residual = np.array(losses) - mean * np.array(tokens)
    stderr = math.sqrt(3 / 2 * (residual**2).sum()) / 10
    assert results["loss"] == pytest.approx(mean, rel=1e-12)
    assert results["loss_stderr"] == pytest.approx(stderr, rel=1e-12)
    assert results["perplexity"] == pytest.approx(math.exp(mean), rel=1e-12)
    assert results["perplexity_stderr"] == pytest.approx(math.exp(mean) * stderr, rel=1e-12)
    assert results["tokens"] == 10
    assert set(modules["perplexity"].compute(losses=[10.0], tokens=[4])) == {"loss", "perplexity", "tokens"}


def test_results_can_be_saved(modules, tmp_path):
    results = modules["perplexity"].compute(losses=[10.0, 3.0], tokens=[4, 1])
    saved = evaluate.save(tmp_path / "found.json", **results)
    assert json.loads(saved.read_text())["perplexity"] == results["perplexity"]


# ---- what is refused ----

NAN, GRID = float("nan"), [-1.0, 0.0, 1.0]
REFUSED = {
    "no matrix": ("spectra", {"data": []}, "there is no matrix to measure"),
    "vectors": ("spectra", {"data": [1.0, 2.0]}, "don't match the expected format"),
    "one matrix bare": ("spectra", {"data": np.eye(3)}, "don't match the expected format"),
    "empty matrix": ("spectra", {"data": [[[1.0]], []]}, "matrix 1: a weight of shape .*non-empty"),
    "nan in a matrix": ("spectra", {"data": [[[1.0, NAN]]]}, "matrix 0: .*NaN or infinity"),
    "missing entry": ("spectra", {"data": [[[1.0, None]]]}, "matrix 0: .*NaN or infinity"),
    "ragged matrix": ("spectra", {"data": [[[1.0, 2.0], [3.0]]]}, "rows of one length"),
    "other earlier ones": ("spectra", {"data": [np.eye(2)], "previous": []}, "1 matrices and 0 earlier ones"),
    "other shape before": ("spectra", {"data": [np.eye(2)], "previous": [np.eye(3)]}, "needs the same shape"),
    "no curve": ("landscape_sharpness", {"x": [], "losses": []}, "0 curves"),
    "short curve": ("landscape_sharpness", {"x": [GRID], "losses": [[1.0]]}, "one loss a point"),
    "fewer curves": ("landscape_sharpness", {"x": [GRID], "losses": [GRID, GRID]}, "Mismatch in the number"),
    "two grids": ("landscape_sharpness", {"x": [GRID, [-2.0, 0.0, 2.0]], "losses": [GRID] * 2}, "on the same grid"),
    "one-sided grid": ("landscape_sharpness", {"x": [[0.0, 1.0, 2.0]], "losses": [GRID]}, "not symmetric"),
    "no ends": ("interpolation_barrier", {"alphas": [0.2, 0.4], "losses": [1.0, 2.0]}, "0 and 1 once"),
    "a loss missing": ("interpolation_barrier", {"alphas": [0, 0.5, 1], "losses": [1, 2]}, "Mismatch in the number"),
    "positions differ": ("cka", {"x": np.eye(3), "y": np.eye(2)}, "Mismatch in the number"),
    "ragged activations": ("cka", {"x": [[1.0, 2.0], [1.0]], "y": np.eye(2)}, "x: 2 rows of 2 lengths"),
    "no position": ("cka", {"x": [], "y": []}, "x: 0 rows"),
    "one position": ("cka", {"x": [[1.0]], "y": [[1.0]]}, "1 positions: CKA needs 2"),
    "few positions": ("cka", {"x": np.eye(3), "y": np.eye(3), "debiased": True}, "3 positions"),
    "no token": ("perplexity", {"losses": [0.0], "tokens": [0]}, "predicts no token"),
    "counts missing": ("perplexity", {"losses": [1.0, 2.0], "tokens": [1]}, "Mismatch in the number"),
}


GOOD = {
    "spectra": {"data": [[[2.0]]]},
    "landscape_sharpness": {"x": [GRID], "losses": [[2.0, 1.0, 2.0]]},
    "interpolation_barrier": {"alphas": [0.0, 0.5, 1.0], "losses": [1.0, 2.0, 1.0]},
    "cka": {"x": [[1.0], [2.0]], "y": [[2.0], [4.0]]},
    "perplexity": {"losses": [2.0], "tokens": [2]},
}


@pytest.mark.parametrize("in_memory", [True, False], ids=["in memory", "on disk"])
@pytest.mark.parametrize("case", REFUSED)
def test_bad_input_is_refused(case, in_memory):
    name, inputs, message = REFUSED[case]
    module = evaluate.load(path(name), keep_in_memory=in_memory, experiment_id=uuid.uuid4().hex)
    with pytest.raises(ValueError, match=message):
        module.compute(**inputs)
    # and leaves nothing behind
    fresh = evaluate.load(path(name), keep_in_memory=True)
    assert module.compute(**GOOD[name]) == fresh.compute(**GOOD[name])
