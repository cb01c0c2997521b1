"""`init_from`: a run starts from another one's weights, exactly, or is refused before its model is changed."""

import shutil

import pytest
import torch
from tiny_runs import METHODS, arguments, dataset, llama, make_trainer, weights
from transformers import Trainer

import hf_lowrank as lr
from hf_lowrank.checkpoints import CheckpointError, check_resume, dense_state_dict, export
from hf_lowrank.methods.prepare import apply_method, structure_hash

# their layers cannot take a dense matrix over
FACTORED = [name for name, config in METHODS.items() if config.replaces_layers and not config.keeps_weights]


def keeps(name):
    return name not in FACTORED


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    """Published models of some methods, with weights that no initial values have: method -> folder."""
    root = tmp_path_factory.mktemp("sources")
    for name in ("fullrank", "lora", *FACTORED):
        model = llama(seed=3)
        apply_method(model, METHODS[name], seed=5)
        generator = torch.Generator().manual_seed(1)
        with torch.no_grad():
            for p in model.parameters():
                p += 0.1 * torch.randn(p.shape, generator=generator)
        export(model, root / name)
    return {folder.name: folder for folder in root.iterdir()}


@pytest.mark.parametrize("source", ["fullrank", "lora", "sltrain"])
@pytest.mark.parametrize("method", [name for name in METHODS if keeps(name)])
def test_a_method_that_keeps_weights_starts_from_any_dense_form(method, source, sources, tmp_path):
    expected = dense_state_dict(lr.from_pretrained(sources[source]))
    model, random_state = llama(), torch.get_rng_state()
    lr.prepare(model, METHODS[method], arguments(tmp_path), init_from=sources[source])
    assert torch.equal(torch.get_rng_state(), random_state)
    found = dense_state_dict(model)
    assert found.keys() == expected.keys()
    assert [key for key in found if not torch.equal(found[key], expected[key])] == []
    record = model.config.lowrank["init_from"]
    assert (record["method"], record["form"], record["source"]) == (source, "dense", str(sources[source]))


@pytest.mark.parametrize("method", FACTORED)
def test_a_method_that_replaces_weights_starts_from_its_own_kind(method, sources, tmp_path):
    expected = lr.from_pretrained(sources[method]).state_dict()
    # another support is drawn first, and given up
    model, _ = lr.prepare(llama(), METHODS[method], arguments(tmp_path, seed=9), init_from=str(sources[method]))
    found = model.state_dict()
    assert found.keys() == expected.keys()
    assert [key for key in found if not torch.equal(found[key], expected[key])] == []
    assert model.config.lowrank["structure"] == structure_hash(model)
    assert model.config.lowrank["init_from"]["form"] == "native"


@pytest.mark.parametrize(
    ("source", "method", "message"),
    [
        ("cola", "galore", "CoLA run, which has no dense weights for GaLore"),
        ("fullrank", "sltrain", "SLTrain with these settings cannot take over"),
        ("lora", "cola", "CoLA with these settings cannot take over"),
        ("sltrain", lr.SLTrainConfig(r=2, sparsity=0.1), "SLTrain run of other layers"),
        ("fullrank", "larger", "lm_head.weight is 64 x 16 there and 64 x 24 here"),
        ("fullrank", "deeper", r"model.layers.2.\S+ is missing there and \S+( x \d+)? here"),
    ],
)
def test_what_cannot_start_is_refused_and_the_model_is_as_it_was(source, method, message, sources, tmp_path):
    sizes = {"larger": dict(hidden_size=24), "deeper": dict(num_hidden_layers=3)}.get(str(method), {})
    config = method if not isinstance(method, str) else METHODS.get(method, lr.FullRankConfig())
    model = llama(**sizes)
    before, described = weights(model), model.config.to_dict()
    with pytest.raises(CheckpointError, match=message):
        lr.prepare(model, config, arguments(tmp_path), init_from=sources[source])
    assert model.config.to_dict() == described
    assert all(torch.equal(value, before[key]) for key, value in weights(model).items())


def test_a_source_that_is_not_there(tmp_path):
    with pytest.raises(OSError, match="nowhere"):
        lr.prepare(llama(), METHODS["galore"], arguments(tmp_path), init_from=tmp_path / "nowhere")


def test_a_run_says_what_it_started_from_and_resumes(tmp_path):
    first = make_trainer(METHODS["fullrank"], arguments(tmp_path / "first", max_steps=3))
    lr.attach(first)
    first.train()

    def second(folder, **given):
        args = arguments(tmp_path / folder, max_steps=4, save_strategy="steps", save_steps=2)
        model, kwargs = lr.prepare(llama(seed=1), METHODS["relora"], args, init_from=tmp_path / "first")
        trainer = Trainer(model, args, train_dataset=dataset(32), eval_dataset=dataset(8, seed=1), **kwargs)
        lr.attach(trainer)
        trainer.train(**given)
        return trainer

    whole = weights(second("second").model)
    report = lr.load_report(tmp_path / "second")
    assert report.run.init_from.model_dump() == {
        "source": str(tmp_path / "first"), "method": "fullrank", "step": 3, "form": "dense",
    }  # fmt: skip
    card = (tmp_path / "second" / "publish" / "README.md").read_text()
    assert "Started from" in card
    assert "(fullrank after 3 steps)" in card
    resumed = second("second", resume_from_checkpoint=str(tmp_path / "second" / "checkpoint-2")).model
    assert [key for key, value in weights(resumed).items() if not torch.equal(value, whole[key])] == []
    # going on needs neither init_from nor what it names
    shutil.rmtree(tmp_path / "first")
    model, _ = lr.prepare(llama(), METHODS["relora"], arguments(tmp_path / "third"))
    check_resume(tmp_path / "second" / "checkpoint-2", model)
    assert model.config.lowrank["init_from"]["step"] == 3
    args = arguments(tmp_path / "second", max_steps=4)
    trainer = make_trainer(METHODS["relora"], args)
    lr.attach(trainer)
    trainer.train(resume_from_checkpoint=str(tmp_path / "second" / "checkpoint-2"))
    assert lr.load_report(tmp_path / "second").run.init_from.step == 3
