"""What CONTRIBUTING.md asks for when a method or a metric is added, and the one-way order of the packages."""

import ast
from pathlib import Path

import pytest
from tiny_runs import METHODS as TRAINED

import hf_lowrank
from hf_lowrank.arguments import METRICS
from hf_lowrank.families import Family
from hf_lowrank.families.callback import MetricCallback
from hf_lowrank.methods import METHODS
from hf_lowrank.methods.base import LowRankConfig

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "hf_lowrank"
SIZES = ("tiny", "60m", "130m", "350m", "1b")

# package -> the parts of hf_lowrank it may import beside itself
MAY_IMPORT = {
    "metrics": {"sharding"},
    "optim": {"sharding"},
    "methods": {"conversion", "optim", "plugins", "report", "sharding"},
    "report": {"plugins"},
    "figures": {"report"},
    "hub": {"report", "figures", "checkpoints", "methods"},
    "families": {
        *("metrics", "methods", "plugins", "report", "hub", "checkpoints", "conversion", "sharding"),
    },
    "run": {
        *("downstream", "figures", "families", "metrics", "methods", "report", "hub", "checkpoints", "conversion"),
    },
    "downstream": {
        *("metrics", "families", "measure", "methods", "report", "hub", "checkpoints", "data"),
        *("machine", "sharding", "options"),
    },
    "downstream/quick": {"data", "report"},
    "evaluation": {"metrics"},
    "compare": {"report", "figures", "hub"},
    "measure": {
        *("families", "metrics", "methods", "figures", "report", "hub", "checkpoints", "data"),
        *("machine", "model_config", "downstream", "options"),
    },
    "evaluation/modules": {"methods"},
    "evaluation/modules/*": {"metrics", "families"},
}


def metric_callbacks(cls=MetricCallback):
    """The package's callbacks that measure something."""
    for child in cls.__subclasses__():
        yield from metric_callbacks(child)
        if hasattr(child, "name") and child.__module__.startswith("hf_lowrank."):
            yield child


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


@pytest.mark.parametrize("name", METHODS)
def test_a_method_is_complete(name):
    config_cls = METHODS[name]
    assert config_cls.__name__ in hf_lowrank.__all__
    assert (PACKAGE / "methods" / f"{name}.py").is_file()
    for size in SIZES:
        assert (ROOT / "recipes" / "configs" / size / f"{name}.yaml").is_file(), size
    assert any(type(config) is config_cls for config in TRAINED.values())
    # the state a run keeps is predicted by the method itself unless it is the baseline's
    assert name == "fullrank" or config_cls.state_elements is not LowRankConfig.state_elements


@pytest.mark.parametrize("callback", list(metric_callbacks()), ids=lambda cls: cls.name)
def test_a_metric_is_complete(callback):
    assert callback.name in METRICS
    assert callback.__name__ in hf_lowrank.__all__
    assert callback.__name__ in (ROOT / "recipes" / "pretrain.py").read_text()
    measuring = callback if callback.family is None else callback.family
    assert measuring.measure not in (MetricCallback.measure, Family.measure)


def test_public_names_are_documented():
    for name in hf_lowrank.__all__:
        assert (getattr(hf_lowrank, name).__doc__ or "").strip(), name
