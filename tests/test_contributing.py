"""What CONTRIBUTING.md asks for when a method or a metric is added, and the one-way order of the packages.

`forgotten_of_method` and `forgotten_of_family` name the steps that were forgotten. They read the files of a tree, so
that a test can undo one step after the other in a copy and see that each is named. That a method and a family from
another package work everywhere is tested in test_toy_method.py and families/test_outside.py.
"""

import ast
import dataclasses
import re
import shutil
from pathlib import Path

import pytest

import hf_lowrank
from hf_lowrank.families import Family, MetricCallback, families
from hf_lowrank.methods import METHODS
from hf_lowrank.methods.base import LowRankConfig
from hf_lowrank.report.catalogue import CATALOGUE

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "hf_lowrank"
SIZES = ("nano", "tiny", "60m", "130m", "350m", "1b")

# package -> the parts of hf_lowrank it may import beside itself
MAY_IMPORT = {
    "metrics": {"experts", "sharding"},
    "optim": {"sharding"},
    "report": {"plugins"},
    "figures": {"report"},
    # prepare loads what init_from names with the loader that knows all methods
    "methods": {
        *("conversion", "experts", "options", "optim", "plugins", "report", "running", "sharding", "warm_start"),
    },
    "hub": {"checkpoints", "figures", "methods", "model_config", "report"},
    "families": {"checkpoints", "conversion", "hub", "methods", "metrics", "plugins", "report", "sharding"},
    "run": {
        *("checkpoints", "conversion", "downstream", "families", "figures", "hub", "methods", "metrics"),
        *("model_config", "optim", "report"),
    },
    "measure": {
        *("checkpoints", "data", "downstream", "families", "figures", "hub", "machine", "methods", "metrics"),
        *("model_config", "options", "report"),
    },
    "downstream": {
        *("checkpoints", "data", "families", "hub", "machine", "measure", "methods", "metrics", "options", "report"),
        "sharding",
    },
    "downstream/quick": {"data", "report"},
    "compare": {"figures", "hub", "report"},
    "study": {"arguments", "checkpoints", "families", "options", "report"},
    "study/analysis": {"compare", "figures", "report"},
    "evaluation": {"metrics"},
    "evaluation/modules": {"options"},
    "evaluation/modules/*": {"evaluation", "families", "metrics"},
}


def imported(path):
    tree = ast.parse(path.read_text())
    # what tools alone read is never imported
    tree.body = [node for node in tree.body if not (isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node))]
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("hf_lowrank."):
            yield node.module.split(".")[1]
        elif isinstance(node, ast.Import):
            yield from (alias.name.split(".")[1] for alias in node.names if alias.name.startswith("hf_lowrank."))


@pytest.mark.parametrize("package", MAY_IMPORT)
def test_imports_go_one_way(package):
    for path in PACKAGE.glob(f"{package}/*.py"):
        outside = set(imported(path)) - {package.partition("/")[0]}
        assert outside <= MAY_IMPORT[package], f"{path.name} imports {outside - MAY_IMPORT[package]}"


@pytest.mark.parametrize("package", ["metrics", "report"])
def test_metrics_and_reports_know_no_trainer(package):
    for path in (PACKAGE / package).glob("*.py"):
        assert "Trainer" not in {
            node.id for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Name)
        }


# The steps of CONTRIBUTING.md


def text(root, path):
    return (root / path).read_text() if (root / path).is_file() else ""


def is_public(root, name, subpackage):
    """Whether a name stands in its subpackage and in the three lists of the package's `__init__`."""
    listed = len(re.findall(rf"\b{name}\b", text(root, "hf_lowrank/__init__.py")))
    return listed == 3 and name in text(root, f"hf_lowrank/{subpackage}/__init__.py")


def forgotten_of_method(config_cls, root=ROOT):
    """The steps of "Adding a method" that a config class lacks."""
    name, class_name, baseline = config_cls.method, config_cls.__name__, config_cls is METHODS["fullrank"]
    fields = [field for field in dataclasses.fields(config_cls) if "help" not in field.metadata]
    described = config_cls.label and not fields and (config_cls.paper or baseline)
    predicted = config_cls.state_elements is not LowRankConfig.state_elements or baseline
    tests = [f"tests/{folder}/test_{name}.py" for folder in ("methods", "optim")]
    done = {
        "module": (root / f"hf_lowrank/methods/{name}.py").is_file() and described and predicted,
        "exports": is_public(root, class_name, "methods"),
        "recipes": all((root / f"recipes/configs/{size}/{name}.yaml").is_file() for size in SIZES),
        "README": f"`{class_name}(" in text(root, "README.md"),
        "table of tests": f"lr.{class_name}(" in text(root, "tests/tiny_runs.py"),
        "tests": baseline or any((root / path).is_file() for path in tests),
    }
    return [step for step, is_done in done.items() if not is_done]


def forgotten_of_family(family_cls, callback_cls, root=ROOT):
    """The steps of "Adding a metric" that a family lacks; the loss has no callback, since the report measures it."""
    entry, name = family_cls.entry, family_cls.entry.name
    module = text(root, f"hf_lowrank/families/{name}.py")
    pure = re.findall(r"from hf_lowrank\.metrics\.(\w+) import", module)
    drawn = text(root, f"hf_lowrank/figures/{name}.py")
    callback = None if callback_cls is None else callback_cls.__name__
    done = {
        "pure functions": bool(pure) and all((root / f"hf_lowrank/metrics/{part}.py").is_file() for part in pure),
        "family": f"class {family_cls.__name__}(" in module and family_cls.measure is not Family.measure,
        "catalogue": f'"{name}"' in text(root, "hf_lowrank/report/catalogue.py")
        and all(metric.label and metric.axis for metric in entry.metrics),
        "pictures": all(f"def {Path(picture.file).stem}(" in drawn for picture in entry.pictures),
        "exports": callback is None or is_public(root, callback, "families"),
        "recipe": callback is None or f"lr.{callback}(" in text(root, "recipes/pretrain.py"),
        "tests": any((root / f"tests/metrics/test_{part}.py").is_file() for part in pure),
        "several processes": callback is None or f"lr.{callback}(" in text(root, "tests/metrics_worker.py"),
    }
    return [step for step, is_done in done.items() if not is_done]


def callback_of(family_cls, cls=MetricCallback):
    """The package's callback of a family."""
    for child in cls.__subclasses__():
        if child.__dict__.get("family") is family_cls and child.__module__.startswith("hf_lowrank."):
            return child
        if (deeper := callback_of(family_cls, child)) is not None:
            return deeper
    return None


def our_families():
    return {entry.name: type(families()[entry.name]) for entry in CATALOGUE}


@pytest.mark.parametrize("name", [name for name, cls in METHODS.items() if cls.__module__.startswith("hf_lowrank.")])
def test_a_method_is_complete(name):
    assert forgotten_of_method(METHODS[name]) == []


@pytest.mark.parametrize("name", our_families())
def test_a_metric_is_complete(name):
    family_cls = our_families()[name]
    callback = callback_of(family_cls)
    assert callback is not None or name == "loss"
    assert forgotten_of_family(family_cls, callback) == []


@pytest.fixture
def tree(tmp_path):
    """A copy of what the steps touch."""
    for folder in ("recipes/configs", "hf_lowrank/methods", "hf_lowrank/families", "hf_lowrank/figures"):
        shutil.copytree(ROOT / folder, tmp_path / folder, ignore=shutil.ignore_patterns("__pycache__"))
    for folder in ("hf_lowrank/metrics", "tests/metrics", "tests/optim", "tests/methods"):
        shutil.copytree(ROOT / folder, tmp_path / folder, ignore=shutil.ignore_patterns("__pycache__"))
    (tmp_path / "hf_lowrank/report").mkdir()
    for path in (
        *("README.md", "hf_lowrank/__init__.py", "hf_lowrank/report/catalogue.py", "recipes/pretrain.py"),
        *("tests/tiny_runs.py", "tests/metrics_worker.py"),
    ):
        shutil.copy(ROOT / path, tmp_path / path)
    return tmp_path


@pytest.mark.parametrize(
    ("step", "path", "word"),
    [
        ("module", "hf_lowrank/methods/galore.py", None),
        ("exports", "hf_lowrank/methods/__init__.py", "GaLoreConfig"),
        ("exports", "hf_lowrank/__init__.py", '"GaLoreConfig",'),
        ("recipes", "recipes/configs/350m/galore.yaml", None),
        ("README", "README.md", "`GaLoreConfig("),
        ("table of tests", "tests/tiny_runs.py", "lr.GaLoreConfig("),
        ("tests", "tests/optim/test_galore.py", None),
    ],
)
def test_a_forgotten_step_of_a_method_is_named(tree, step, path, word):
    assert forgotten_of_method(METHODS["galore"], tree) == []
    undo(tree / path, word)
    assert forgotten_of_method(METHODS["galore"], tree) == [step]


@pytest.mark.parametrize(
    ("step", "path", "word"),
    [
        ("pure functions", "hf_lowrank/metrics/curvature.py", None),
        ("family", "hf_lowrank/families/curvature.py", "class Curvature("),
        ("catalogue", "hf_lowrank/report/catalogue.py", '"curvature"'),
        ("pictures", "hf_lowrank/figures/curvature.py", None),
        ("exports", "hf_lowrank/families/__init__.py", "CurvatureCallback"),
        ("exports", "hf_lowrank/__init__.py", '"CurvatureCallback",'),
        ("recipe", "recipes/pretrain.py", "lr.CurvatureCallback("),
        ("tests", "tests/metrics/test_curvature.py", None),
        ("several processes", "tests/metrics_worker.py", "lr.CurvatureCallback("),
    ],
)
def test_a_forgotten_step_of_a_metric_is_named(tree, step, path, word):
    curvature = our_families()["curvature"]
    assert forgotten_of_family(curvature, callback_of(curvature), tree) == []
    undo(tree / path, word)
    assert forgotten_of_family(curvature, callback_of(curvature), tree) == [step]


def undo(path, word):
    if word is None:
        path.unlink()
    else:
        assert word in path.read_text()
        path.write_text(path.read_text().replace(word, ""))


def test_public_names_are_documented():
    for name in hf_lowrank.__all__:
        assert (getattr(hf_lowrank, name).__doc__ or "").strip(), name
