"""Configs: PEFT's shape, JSON round trip, and errors that name the field."""

import dataclasses
import json

import pytest

from hf_lowrank import FullRankConfig, GaLoreConfig, LowRankConfig, SLTrainConfig
from hf_lowrank.methods import METHODS, get_method

CONFIGS = [
    FullRankConfig(),
    FullRankConfig(target_modules="all-linear"),
    GaLoreConfig(r=16, update_proj_gap=50, scale=0.5, proj_type="full", target_modules=["q_proj", "v_proj"]),
    SLTrainConfig(r=8, alpha=16, sparsity=0.05, target_modules=r".*mlp\..*"),
]


@pytest.mark.parametrize("config", CONFIGS, ids=lambda c: c.method)
def test_round_trip_through_json_and_a_folder(config, tmp_path):
    assert LowRankConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config
    config.save_pretrained(tmp_path)
    assert (tmp_path / "lowrank_config.json").is_file()
    assert LowRankConfig.from_pretrained(tmp_path) == config
    assert type(config).from_pretrained(tmp_path) == config


@pytest.mark.parametrize("config_cls", METHODS.values(), ids=lambda c: c.method)
def test_every_field_carries_its_help_and_has_a_default(config_cls):
    assert config_cls() == config_cls()
    for field in dataclasses.fields(config_cls):
        assert len(field.metadata["help"]) > 20, field.name
    assert "target_modules" in {field.name for field in dataclasses.fields(config_cls)}


def test_the_contracts_defaults():
    assert dataclasses.asdict(GaLoreConfig()).items() >= {
        "r": None, "update_proj_gap": 200, "scale": 0.25, "proj_type": "std", "target_modules": None,
    }.items()  # fmt: skip
    assert dataclasses.asdict(SLTrainConfig()) == {
        "r": None, "alpha": 32, "sparsity": 0.03, "target_modules": None, "other_lr_scale": 1.0,
    }  # fmt: skip
    assert GaLoreConfig(128).r == 128


def test_unknown_method_and_field_suggest_the_nearest_name():
    with pytest.raises(ValueError, match="did you mean 'galore'"):
        get_method("galor")
    with pytest.raises(ValueError, match="no field 'rr'"):
        LowRankConfig.from_dict({"method": "galore", "rr": 3})
    with pytest.raises(ValueError, match="names no method"):
        LowRankConfig.from_dict({"r": 3})


def test_a_config_of_another_method_is_refused(tmp_path):
    GaLoreConfig(r=4).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="'galore'"):
        SLTrainConfig.from_pretrained(tmp_path)


def test_missing_and_broken_files(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"lowrank_config\.json"):
        LowRankConfig.from_pretrained(tmp_path)
    (tmp_path / "lowrank_config.json").write_text("{")
    with pytest.raises(ValueError, match="not valid JSON"):
        LowRankConfig.from_pretrained(tmp_path)


@pytest.mark.parametrize("r", [0, -1, 2.5, True, "8"])
def test_a_rank_that_is_no_rank(r):
    with pytest.raises(ValueError, match="r="):
        GaLoreConfig(r=r)
    with pytest.raises(ValueError, match="r="):
        SLTrainConfig(r=r)


@pytest.mark.parametrize(
    "fields", [{"update_proj_gap": 0}, {"scale": -1.0}, {"proj_type": "up"}, {"refresh": "x"}, {"target_modules": 3}]
)
def test_galore_names_the_field_that_is_wrong(fields):
    (name,) = fields
    with pytest.raises(ValueError, match=name):
        GaLoreConfig(**fields)
