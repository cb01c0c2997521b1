"""Which checkpoints are complete, strict loading, and the dense form."""

import json
import logging
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_runs import METHODS, VOCABULARY, arguments, gpt2, llama, make_trainer, weights
from torch import nn
from transformers.models.auto.modeling_auto import AutoModelForCausalLM

import hf_lowrank as lr
from hf_lowrank.checkpoints import (
    check_checkpoint,
    check_resume,
    export,
    last_checkpoint,
    list_checkpoints,
    load_model,
)
from hf_lowrank.methods import SLTrainLinear

FILES = ["model.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json"]
# the number is the share of the bytes that is kept, negative where it is a number of bytes at the end
CUTS = {"to nothing": 0.0, "to half": 0.5, "by a byte": -1}


def cut(path, share):
    content = path.read_bytes()
    path.write_bytes(content[: int(share * len(content))] if share >= 0 else content[:share])


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) and a[key].dtype == b[key].dtype for key in a)


def ids():
    return torch.randint(0, VOCABULARY, (3, 12), generator=torch.Generator().manual_seed(0))


@torch.no_grad()
def logits(model):
    return model.eval()(ids()).logits


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A run with checkpoints at steps 1 to 3 and a model in its root, as Trainer leaves it."""
    folder = tmp_path_factory.mktemp("finished")
    trainer = make_trainer(lr.GaLoreConfig(r=4), arguments(folder, max_steps=3, save_strategy="steps", save_steps=1))
    trainer.train()
    return folder


@pytest.fixture
def run(finished, tmp_path):
    return shutil.copytree(finished, tmp_path / "run")


@pytest.fixture
def checkpoint(run):
    return run / "checkpoint-3"


def trained(config, model, seed=1):
    """A prepared model whose factors are all away from zero, as after training."""
    model, _ = lr.prepare(model, config, arguments("unused", seed=seed))
    generator = torch.Generator().manual_seed(7)
    for parameter in model.parameters():
        parameter.data += 0.05 * torch.randn(parameter.shape, generator=generator).to(parameter.dtype)
    return model


# Complete or not


def test_a_complete_checkpoint(run):
    for folder in list_checkpoints(run):
        check_checkpoint(folder)
    assert last_checkpoint(run) == str(run / "checkpoint-3")
    assert last_checkpoint(str(run)) == str(run / "checkpoint-3")


@pytest.mark.parametrize("name", FILES)
def test_a_missing_file_is_named(name, checkpoint):
    (checkpoint / name).unlink()
    with pytest.raises(lr.CheckpointError, match=f"checkpoint-3 is incomplete: {name} is missing"):
        check_checkpoint(checkpoint)


@pytest.mark.parametrize("how", CUTS)
@pytest.mark.parametrize("name", [*FILES, "config.json"])
def test_a_file_cut_short_is_named(name, how, checkpoint):
    if (name, how) in {("trainer_state.json", "by a byte"), ("config.json", "by a byte")}:
        cut(checkpoint / name, -3)
    else:
        cut(checkpoint / name, CUTS[how])
    with pytest.raises(lr.CheckpointError, match=f"checkpoint-3 is cut short: {name} "):
        check_checkpoint(checkpoint)


@pytest.mark.parametrize("length", [1, 7, 8, 9, 100])
def test_weights_cut_within_their_header(length, checkpoint):
    path = checkpoint / "model.safetensors"
    path.write_bytes(path.read_bytes()[:length])
    with pytest.raises(lr.CheckpointError, match=r"cut short: model\.safetensors"):
        check_checkpoint(checkpoint)


@pytest.mark.parametrize("name", ["trainer_state.json", "config.json"])
@pytest.mark.parametrize("content", ["null", "[1]", '"text"', "\x00"])
def test_json_that_is_no_object(name, content, checkpoint):
    (checkpoint / name).write_text(content)
    with pytest.raises(lr.CheckpointError, match=name):
        check_checkpoint(checkpoint)


def test_the_state_of_another_step(checkpoint):
    shutil.copy(checkpoint.with_name("checkpoint-2") / "trainer_state.json", checkpoint)
    with pytest.raises(lr.CheckpointError, match=r"is damaged: trainer_state\.json is of step 2"):
        check_checkpoint(checkpoint)


def test_what_is_no_checkpoint_folder(run):
    shutil.copytree(run / "checkpoint-3", run / "best")
    for other in (run / "best", run / "checkpoint-9", run, run / "checkpoint-3" / "config.json"):
        with pytest.raises(lr.CheckpointError, match="is no checkpoint: give a folder named checkpoint-<step>"):
            check_checkpoint(other)


def test_a_link_to_a_checkpoint(run, monkeypatch):
    (run / "newest").symlink_to(run / "checkpoint-3")
    check_checkpoint(run / "newest")
    monkeypatch.chdir(run / "checkpoint-2")
    check_checkpoint(".")


def test_the_newest_complete_one_is_taken_with_a_warning(run, caplog):
    cut(run / "checkpoint-3" / "optimizer.pt", 0.5)
    with caplog.at_level(logging.WARNING, logger="hf_lowrank"):
        assert last_checkpoint(run) == str(run / "checkpoint-2")
    assert [record.getMessage() for record in caplog.records] == [
        f"{run / 'checkpoint-3'} is cut short: optimizer.pt ends too early: skipped"
    ]
    (run / "checkpoint-2" / "trainer_state.json").unlink()
    assert last_checkpoint(run) == str(run / "checkpoint-1")
    (run / "checkpoint-1" / "model.safetensors").unlink()
    assert last_checkpoint(run) is None


def test_training_goes_on_from_the_newest_complete_one(run):
    cut(run / "checkpoint-3" / "rng_state.pth", 0.5)
    trainer = make_trainer(lr.GaLoreConfig(r=4), arguments(run, max_steps=3, save_strategy="steps", save_steps=1))
    trainer.train(resume_from_checkpoint=last_checkpoint(run))
    # Trainer wrote the damaged one again
    assert last_checkpoint(run) == str(run / "checkpoint-3")
    assert [entry["step"] for entry in trainer.state.log_history if "loss" in entry] == [1, 2, 3]


def test_folders_that_hold_no_checkpoint(tmp_path):
    assert last_checkpoint(tmp_path) is None
    assert last_checkpoint(tmp_path / "nowhere") is None
    for name in ("checkpoint-abc", "checkpoint-", "checkpoint-3-old", "checkpoint-1.5", "tmp-checkpoint-4"):
        (tmp_path / name).mkdir()
    (tmp_path / "checkpoint-7").write_text("a file")
    assert list_checkpoints(tmp_path) == []
    assert last_checkpoint(tmp_path) is None


def test_checkpoints_are_ordered_by_number(tmp_path):
    for step in (10, 9, 100, 2):
        (tmp_path / f"checkpoint-{step}").mkdir()
    assert [path.name for path in list_checkpoints(tmp_path)] == [f"checkpoint-{step}" for step in (2, 9, 10, 100)]


# Sharded weights


@pytest.fixture
def sharded(checkpoint):
    model = load_model(checkpoint)
    # transformers would leave it beside the shards, and prefer it
    (checkpoint / "model.safetensors").unlink()
    model.save_pretrained(checkpoint, max_shard_size="8KB")
    return checkpoint


def test_shards_are_complete_and_loaded(sharded, finished):
    assert len(list(sharded.glob("model-*.safetensors"))) > 2
    check_checkpoint(sharded)
    assert same(weights(load_model(sharded)), weights(load_model(finished / "checkpoint-3")))


@pytest.mark.parametrize("damage", ["missing", "cut"])
def test_one_damaged_shard_is_named(damage, sharded):
    shard = sorted(sharded.glob("model-*.safetensors"))[1]
    if damage == "missing":
        shard.unlink()
    else:
        cut(shard, 0.5)
    for check in (check_checkpoint, load_model):
        with pytest.raises(lr.CheckpointError, match=shard.name):
            check(sharded)


@pytest.mark.parametrize(
    ("weight_map", "message"),
    [
        ({"a": "../model-00001.safetensors"}, "names files outside of its folder"),
        ({"a": "/etc/passwd"}, "names files outside of its folder"),
        ({}, "names no file"),
        (None, "names no file"),
    ],
)
def test_an_index_that_points_elsewhere(weight_map, message, sharded):
    (sharded / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    for check in (check_checkpoint, load_model):
        with pytest.raises(lr.CheckpointError, match=message):
            check(sharded)


def test_an_index_left_by_an_earlier_save_is_ignored_as_transformers_does(sharded):
    model = load_model(sharded)
    nn.init.normal_(model.lm_head.weight)
    model.save_pretrained(sharded)
    assert (sharded / "model.safetensors.index.json").is_file()
    check_checkpoint(sharded)
    assert same(weights(load_model(sharded)), weights(model))


# Strict loading


def test_a_runs_checkpoint_and_its_published_folder_load_as_trained(tmp_path):
    config = METHODS["sltrain"]
    trainer = make_trainer(config, arguments(tmp_path, max_steps=2, save_strategy="steps", save_steps=2))
    trainer.train()
    export(trainer.model, tmp_path / "publish")
    expected = weights(trainer.model)
    for folder in (tmp_path / "checkpoint-2", tmp_path / "publish", tmp_path / "publish" / "native"):
        model = load_model(folder)
        assert same(weights(model), expected), folder
        assert not model.training
        assert model.config.lowrank == trainer.model.config.lowrank
    assert same(weights(lr.from_pretrained(tmp_path)), expected)
    shutil.rmtree(tmp_path / "publish")
    assert same(weights(lr.from_pretrained(tmp_path)), expected)
    # and it can be trained on
    lr.prepare(model, config, arguments(tmp_path))


def edit(folder, change):
    """Rewrite a folder's weights after `change` has had them."""
    path = folder / "model.safetensors"
    state = load_file(path)
    change(state)
    save_file(state, path, metadata={"format": "pt"})


NORM = "model.layers.1.input_layernorm.weight"
DAMAGES = {
    "missing": (lambda state: state.pop(NORM), f"lacks {NORM} \\(1 in all\\)"),
    "unexpected": (lambda state: state.update({"extra.weight": torch.zeros(2)}), "has the unknown extra.weight"),
    "shape": (lambda state: state.update({NORM: torch.zeros(17)}), f"has another shape for {NORM}"),
}


@pytest.mark.parametrize("method", ["fullrank", "sltrain"])
@pytest.mark.parametrize("damage", DAMAGES)
def test_weights_that_do_not_fit_are_refused(damage, method, tmp_path):
    trained(METHODS[method], llama()).save_pretrained(tmp_path)
    change, message = DAMAGES[damage]
    edit(tmp_path, change)
    for dense in (False, True):
        with pytest.raises(lr.CheckpointError, match=message):
            load_model(tmp_path, dense=dense)


def test_factors_never_enter_a_dense_model_nor_the_other_way_round(tmp_path):
    trained(METHODS["sltrain"], llama()).save_pretrained(tmp_path / "native")
    llama().save_pretrained(tmp_path / "dense")
    shutil.copy(tmp_path / "native" / "model.safetensors", tmp_path / "factors.safetensors")
    shutil.copy(tmp_path / "dense" / "model.safetensors", tmp_path / "native" / "model.safetensors")
    shutil.move(tmp_path / "factors.safetensors", tmp_path / "dense" / "model.safetensors")
    for folder in ("native", "dense"):
        with pytest.raises(lr.CheckpointError, match="its weights do not fit the model and the method in"):
            load_model(tmp_path / folder)


def test_another_support_is_refused_by_its_hash(tmp_path):
    trained(METHODS["sltrain"], llama()).save_pretrained(tmp_path)
    name = "model.layers.1.mlp.up_proj.sparse_support"

    def move_one(state):
        support = state[name]
        free = next(i for i in range(24 * 16) if i not in support)
        state[name] = torch.cat([support[1:], torch.tensor([free], dtype=support.dtype)]).sort().values

    edit(tmp_path, move_one)
    for dense in (False, True):
        with pytest.raises(lr.CheckpointError, match="is damaged: the sparse support does not match its hash"):
            load_model(tmp_path, dense=dense)


def test_the_dense_form_alone_is_no_trainable_form(tmp_path):
    model = trained(METHODS["sltrain"], llama())
    export(model, tmp_path)
    shutil.rmtree(tmp_path / "native")
    with pytest.raises(lr.CheckpointError, match="holds the dense form only: load it with dense=True"):
        load_model(tmp_path)
    assert torch.allclose(logits(load_model(tmp_path, dense=True)), logits(model), atol=1e-4)


def test_folders_without_a_model(tmp_path):
    with pytest.raises(lr.CheckpointError, match=r"holds no config\.json"):
        load_model(tmp_path)
    llama().config.save_pretrained(tmp_path)
    with pytest.raises(lr.CheckpointError, match=r"incomplete: model\.safetensors is missing"):
        load_model(tmp_path)


def test_an_architecture_that_is_no_model_class(tmp_path):
    model = llama()
    model.save_pretrained(tmp_path)
    values = json.loads((tmp_path / "config.json").read_text())
    for name in ("Trainer", "os", "NoSuchClass"):
        (tmp_path / "config.json").write_text(json.dumps({**values, "architectures": [name]}))
        assert same(weights(load_model(tmp_path)), weights(model))


@pytest.mark.parametrize("method", ["galore", "sltrain"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_tied_embeddings_and_the_dtype_are_kept(method, dtype, tmp_path):
    model = trained(METHODS[method], gpt2().to(dtype))
    model.save_pretrained(tmp_path)
    assert "lm_head.weight" not in load_file(tmp_path / "model.safetensors")
    loaded = load_model(tmp_path)
    assert same(weights(loaded), weights(model))
    assert loaded.lm_head.weight.data_ptr() == loaded.transformer.wte.weight.data_ptr()
    assert loaded.dtype == load_model(tmp_path, dense=True).dtype == dtype


# The dense form


@pytest.mark.parametrize("make", [llama, gpt2], ids=["Linear", "Conv1D"])
def test_the_dense_form_computes_the_same(make, tmp_path):
    model = trained(METHODS["sltrain"], make())
    before, expected = weights(model), logits(model)
    dense = lr.to_dense(model)
    export(model, tmp_path)
    # the original is as it was, and shares nothing with its dense form
    for parameter in dense.parameters():
        parameter.data.zero_()
    assert same(weights(model), before)
    assert model.config.lowrank["form"] == "native"
    assert not any(isinstance(module, SLTrainLinear) for module in dense.modules())
    assert dense.config.lowrank["form"] == "dense"
    plain = AutoModelForCausalLM.from_pretrained(tmp_path)
    for other in (plain, load_model(tmp_path, dense=True), load_model(tmp_path / "native", dense=True)):
        assert type(other) is type(dense)
        assert (logits(other) - expected).abs().max() < 1e-4
    assert expected.abs().max() > 0.1


@pytest.mark.parametrize("method", [name for name, config in METHODS.items() if not config.replaces_layers])
def test_a_method_that_keeps_the_layers_is_its_own_dense_form(method, tmp_path):
    model = trained(METHODS[method], llama())
    export(model, tmp_path)
    assert not (tmp_path / "native").exists()
    assert same(weights(lr.to_dense(model)), weights(model))
    assert same(weights(load_model(tmp_path)), weights(model))
    assert same(weights(load_model(tmp_path, dense=True)), weights(model))


def test_the_dense_form_keeps_the_mode(tmp_path):
    model = trained(METHODS["sltrain"], llama())
    assert lr.to_dense(model.train()).training
    assert not lr.to_dense(model.eval()).training


def test_loading_and_exporting_draw_no_random_numbers(tmp_path):
    # a push in mid-training exports; a draw there would change what a resumed run trains
    model = trained(METHODS["sltrain"], llama())
    state = torch.get_rng_state()
    export(model, tmp_path)
    load_model(tmp_path)
    lr.to_dense(model)
    assert torch.equal(torch.get_rng_state(), state)


def test_a_folder_of_another_method_is_published_anew(tmp_path):
    export(trained(METHODS["sltrain"], llama()), tmp_path)
    model = trained(METHODS["galore"], llama())
    export(model, tmp_path)
    assert same(weights(load_model(tmp_path)), weights(model))
    assert lr.LowRankConfig.from_pretrained(tmp_path) == METHODS["galore"]
    plain = llama()
    export(plain, tmp_path)
    assert same(weights(load_model(tmp_path)), weights(plain))
    assert {path.name for path in tmp_path.iterdir()} == {"config.json", "generation_config.json", "model.safetensors"}


# No dense form

LOAD = """
import json, sys, torch
from transformers import AutoModelForCausalLM, AutoTokenizer

ids = torch.tensor(json.loads(sys.argv[1]))
for folder in sys.argv[2:]:
    try:
        AutoModelForCausalLM.from_pretrained(folder)
        refusal = None
    except ValueError as error:
        refusal = str(error)
    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True).eval()
    # saved anew by plain transformers it stays loadable
    model.save_pretrained(folder + "-again")
    with torch.no_grad():
        print(json.dumps([type(model).__name__, refusal, model(ids).logits.tolist()]))
assert "hf_lowrank" not in sys.modules
"""

COLA = {
    "llama": (llama, lr.CoLAConfig(r=4)),
    "llama-only-lr-act": (llama, lr.CoLAConfig(r=4, only_lr_act=True, activation="gelu")),
    "llama-some-targets": (llama, lr.CoLAConfig(r=3, target_modules=["up_proj", "layers.1.self_attn.v_proj"])),
    "gpt2": (gpt2, lr.CoLAConfig(r=4, recompute=True)),
    "gpt2-only-lr-act": (gpt2, lr.CoLAConfig(only_lr_act=True)),
}


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    """Exported CoLA models: name -> (model, folder, what a process without hf_lowrank makes of the folder)."""
    home = tmp_path_factory.mktemp("published")
    models = {name: trained(config, make()).eval() for name, (make, config) in COLA.items()}
    for name, model in models.items():
        export(model, home / name)
    command = [sys.executable, "-c", LOAD, json.dumps(ids().tolist()), *(str(home / name) for name in models)]
    env = {**os.environ, "HF_HOME": str(home / "hf"), "HF_HUB_OFFLINE": "1", "PYTHONPATH": ""}
    done = subprocess.run(command, capture_output=True, text=True, env=env, cwd=home, stdin=subprocess.DEVNULL)
    assert done.returncode == 0, done.stderr
    lines = [line[line.index('["CoLA') :] for line in done.stdout.splitlines() if '["CoLA' in line]
    found = (json.loads(line) for line in lines)
    return {name: (models[name], home / name, result) for name, result in zip(models, found, strict=True)}


@pytest.mark.parametrize("name", COLA)
def test_what_has_no_dense_form_is_published_with_code_for_plain_transformers(name, published):
    model, folder, (cls, refusal, found) = published[name]
    assert cls == f"CoLA{type(model).__name__}"
    assert (torch.tensor(found) - logits(model)).abs().max() < 1e-6
    # never half-loaded: without trust_remote_code it is refused
    assert "contains custom code" in refusal
    files = {path.name for path in folder.iterdir()}
    assert {"modeling_cola.py", "model.safetensors", "config.json", "lowrank_config.json"} <= files
    assert "native" not in files


@pytest.mark.parametrize("name", COLA)
def test_published_cola_loads_as_trained_and_runs_no_code(name, published, tmp_path):
    model, folder, _ = published[name]
    for source in (folder, Path(f"{folder}-again")):
        copy = shutil.copytree(source, tmp_path / source.name)
        (copy / "modeling_cola.py").write_text("raise SystemExit('the code ran')")
        loaded = load_model(copy)
        assert type(loaded) is type(model)
        assert same(weights(loaded), weights(model))
        assert torch.equal(logits(loaded), logits(model))
        assert loaded.config.lowrank == model.config.lowrank
    assert loaded.config.model_type == model.config.model_type
    # and it can be trained on
    lr.prepare(loaded, COLA[name][1], arguments(tmp_path))


def test_no_dense_form_is_said_in_one_line(published):
    model, folder, _ = published["llama"]
    for refused in (lambda: lr.to_dense(model), lambda: lr.from_pretrained(folder, dense=True)):
        with pytest.raises(lr.CheckpointError, match="has no dense form, .*: take it as trained") as caught:
            refused()
        assert "\n" not in str(caught.value)


def test_another_method_leaves_no_code_behind(published, tmp_path):
    folder = shutil.copytree(published["llama"][1], tmp_path / "publish")
    export(trained(METHODS["sltrain"], llama()), folder)
    assert not (folder / "modeling_cola.py").exists()
    assert "auto_map" not in json.loads((folder / "config.json").read_text())
    AutoModelForCausalLM.from_pretrained(folder)


@pytest.mark.parametrize("change", [{"model_type": "no_such"}, {"model_type": None}, None])
def test_a_config_that_does_not_name_the_plain_model(change, published, tmp_path):
    folder = shutil.copytree(published["llama"][1], tmp_path / "publish")
    values = json.loads((folder / "config.json").read_text())
    values["lowrank"]["published"] = change and {**values["lowrank"]["published"], **change}
    (folder / "config.json").write_text(json.dumps(values))
    with pytest.raises(lr.CheckpointError, match="is damaged: config.json does not say what its code builds on"):
        load_model(folder)


def test_a_class_that_transformers_does_not_have_is_published_without_code(tmp_path, caplog):
    class Own(type(llama())):
        pass

    model = trained(lr.CoLAConfig(r=4), llama())
    model.__class__ = Own
    with caplog.at_level(logging.WARNING, logger="hf_lowrank"):
        export(model, tmp_path)
    assert "Own is no class of transformers" in caplog.text
    assert not (tmp_path / "modeling_cola.py").exists()
    assert same(weights(load_model(tmp_path)), weights(model))


@pytest.mark.parametrize("name", ["Llama\nimport os", "os.system", "", "Trainer", "NoSuchModel"])
def test_only_a_class_of_transformers_is_written_into_the_code(name, tmp_path):
    model = trained(lr.CoLAConfig(r=4), llama())
    (tmp_path / "config.json").write_text(json.dumps({**model.config.to_dict(), "architectures": [name]}, default=str))
    with pytest.raises(ValueError, match="is no class of transformers"):
        METHODS["cola"].publish_code(model, tmp_path)
    assert not (tmp_path / "modeling_cola.py").exists()


# Resuming


def test_a_checkpoint_of_before_a_setting_existed_goes_on_at_its_default(tmp_path):
    added = ("projection", "random_after", "adaptive_gap", "rotate_moments", "stagger_refreshes")

    def trainer(**changes):
        config = lr.GaLoreConfig(r=4, update_proj_gap=2, **changes)
        return make_trainer(config, arguments(tmp_path, max_steps=4, save_strategy="steps", save_steps=2))

    (whole := trainer()).train()
    checkpoint = tmp_path / "checkpoint-2"
    values = json.loads((checkpoint / "config.json").read_text())
    values["lowrank"] = {key: value for key, value in values["lowrank"].items() if key not in added}
    (checkpoint / "config.json").write_text(json.dumps(values))
    state = torch.load(checkpoint / "optimizer.pt", weights_only=True)
    for group in state["param_groups"]:
        mark = json.loads(group["lowrank"])
        group["lowrank"] = json.dumps({key: mark[key] for key in mark if key not in added})
        for key in added:
            group.pop(key, None)
    torch.save(state, checkpoint / "optimizer.pt")
    (resumed := trainer()).train(resume_from_checkpoint=str(checkpoint))
    assert same(weights(resumed.model), weights(whole.model))
    with pytest.raises(ValueError, match="rotate_moments is False there, True here"):
        trainer(rotate_moments=True).train(resume_from_checkpoint=str(checkpoint))
    with pytest.raises(lr.CheckpointError, match="rotate_moments is False there, True here"):
        check_resume(checkpoint, trained(lr.GaLoreConfig(r=4, update_proj_gap=2, rotate_moments=True), llama()))


def test_check_resume(checkpoint):
    config = lr.GaLoreConfig(r=4)
    check_resume(checkpoint, trained(config, llama()))
    with pytest.raises(lr.CheckpointError, match="belongs to another run \\(r is 4 there, 3 here\\)"):
        check_resume(checkpoint, trained(lr.GaLoreConfig(r=3), llama()))
    with pytest.raises(lr.CheckpointError, match="'galore' there, 'fullrank' here"):
        check_resume(checkpoint, llama())
    (checkpoint / "config.json").unlink()
    with pytest.raises(lr.CheckpointError, match=r"incomplete: config\.json is missing"):
        check_resume(checkpoint, llama())


def test_check_resume_knows_another_support(tmp_path):
    trained(METHODS["sltrain"], llama()).save_pretrained(tmp_path / "checkpoint-1")
    check_resume(tmp_path / "checkpoint-1", trained(METHODS["sltrain"], llama()))
    with pytest.raises(lr.CheckpointError, match="structure is"):
        check_resume(tmp_path / "checkpoint-1", trained(METHODS["sltrain"], llama(), seed=2))


def test_a_checkpoint_that_fsdp_saved_whole_is_complete(run, checkpoint):
    # accelerate's names with FULL_STATE_DICT
    (checkpoint / "optimizer.pt").rename(checkpoint / "optimizer.bin")
    shutil.copy(checkpoint / "optimizer.bin", checkpoint / "pytorch_model_fsdp.bin")
    lr.check_checkpoint(checkpoint)
    assert lr.last_checkpoint(run) == str(checkpoint)
    for name in ("pytorch_model_fsdp.bin", "optimizer.bin"):
        cut(checkpoint / name, 0.5)
        with pytest.raises(lr.CheckpointError, match=f"{name} ends too early"):
            lr.check_checkpoint(checkpoint)
        shutil.copy(run / "checkpoint-2" / "optimizer.pt", checkpoint / name)
