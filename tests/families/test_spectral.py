"""The spectral callback on stock Trainers: its numbers, where they go, what it leaves alone, and resuming."""

import gc
import json
import logging
import math
import shutil

import pandas as pd
import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tiny_runs import METHODS, Kill, arguments, dataset, gpt2, llama, make_trainer, weights
from transformers import Trainer, TrainerCallback

import hf_lowrank as lr
from hf_lowrank.methods.targets import dense_weights
from hf_lowrank.metrics.spectra import singular_vectors, spectral_metrics, subspace_overlap

MODELS = {"gpt2": gpt2, "llama": llama}
UPDATED = ("effective_rank_score", "stable_rank", "effective_rank", "spectral_gap", "spectral_norm")


@pytest.fixture(scope="module", autouse=True)
def _quick():
    """Without figures, which take seconds and are tested elsewhere; see test_report.py for the garbage."""
    gc.freeze()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("hf_lowrank.run.report.draw_figures", lambda publish: [])
        yield


class Keep(TrainerCallback):
    """Copies of the blocks' matrices as (m, n) at every step."""

    def __init__(self):
        self.at = {}

    def on_train_begin(self, args, state, control, model, **kwargs):
        # GPT-2's layers keep their weights transposed
        turn = (lambda W: W.T) if model.config.model_type == "gpt2" else (lambda W: W)
        self.at[state.global_step] = {
            key.removesuffix(".weight"): turn(tensor.detach().clone())
            for key, tensor in model.named_parameters()
            if tensor.ndim == 2 and (".h." in key or ".layers." in key)
        }

    on_step_end = on_train_begin


class Logs(TrainerCallback):
    """What a reporter is given."""

    def __init__(self):
        self.seen = []

    def on_log(self, args, state, control, logs, **kwargs):
        self.seen.append((state.global_step, dict(logs)))


def stock(model, args, *callbacks, attach=False, **kwargs):
    """A Trainer that knows nothing of this package, with callbacks."""
    trainer = Trainer(model=model, args=args, train_dataset=dataset(), **kwargs)
    if attach:
        lr.attach(trainer, *callbacks)
    else:
        for callback in callbacks:
            trainer.add_callback(callback)
    return trainer


def rows(folder):
    return pd.read_parquet(folder / "publish" / "metrics" / "spectral.parquet")


def records(folder):
    return json.loads((folder / "publish" / "metrics" / "spectral.json").read_text())


def values(folder, name):
    """Step -> value of one metric."""
    return {record["step"]: record["value"] for record in records(folder) if record["name"] == name}


def updates(folder):
    """Steps that have rows about updates."""
    table = rows(folder)
    if "spectral/update/norm" not in table:
        return []
    return sorted(set(table["step"][table["spectral/update/norm"].notna()]))


@pytest.fixture(scope="module", params=["gpt2 bare", "gpt2 attached", "llama bare", "llama attached"])
def run(request, tmp_path_factory):
    """Seven steps of a stock Trainer, measured at 0, 3, 6 and 7: (folder, trainer, weights by step)."""
    folder = tmp_path_factory.mktemp("run")
    name, how = request.param.split()
    keep = Keep()
    trainer = stock(
        MODELS[name](), arguments(folder, max_steps=7), lr.SpectralCallback(every=3), keep, attach=how == "attached"
    )
    trainer.train()
    return folder, trainer, keep.at


def relative(new, old):
    return ((new.double() - old.double()).norm() / old.double().norm()).item()


# The numbers


def test_there_is_a_row_for_every_matrix_and_measured_step(run):
    folder, _, at = run
    table = rows(folder)
    names = list(at[0])
    assert list(zip(table["step"], table["name"], strict=True)) == [(s, n) for s in (0, 3, 6, 7) for n in names]
    assert set(table["space"]) == {"dense"}
    assert table["error"].isna().all()
    for row in table.to_dict("records"):
        assert (row["rows"], row["cols"]) == tuple(at[0][row["name"]].shape)
        assert row["name"].endswith(f".{row['layer']}.{row['module']}")


def test_weight_metrics_are_those_of_the_weights(run):
    folder, trainer, at = run
    for step in (0, 3, 6, 7):
        for row in rows(folder)[lambda t, step=step: t["step"] == step].to_dict("records"):
            for key, value in spectral_metrics(at[step][row["name"]]).to_dict().items():
                assert row[f"spectral/weight/{key}"] == pytest.approx(value, rel=1e-9, nan_ok=True), key
    # the last row is of the model as it is now
    for target, weight in dense_weights(trainer.model):
        assert torch.equal(weight, at[7][target.name])


def test_update_metrics_are_those_of_the_difference(run):
    folder, _, at = run
    for now, before in ((3, 0), (6, 3), (7, 6)):
        for row in rows(folder)[lambda t, now=now: t["step"] == now].to_dict("records"):
            for subject, since in (("update", before), ("update_from_init", 0)):
                new, old = at[now][row["name"]], at[since][row["name"]]
                assert row[f"spectral/{subject}/relative_norm"] == pytest.approx(relative(new, old), rel=1e-6)
                expected = spectral_metrics(new.double() - old.double()).to_dict()
                for key in UPDATED:
                    assert row[f"spectral/{subject}/{key}"] == pytest.approx(expected[key], rel=1e-4), key


def test_overlap_is_that_of_two_updates_top_subspaces(run):
    folder, _, at = run
    table = rows(folder)
    assert table[table["step"] < 6]["spectral/update/overlap_left"].isna().all()
    for before, middle, now in ((0, 3, 6), (3, 6, 7)):
        for row in table[table["step"] == now].to_dict("records"):
            first = at[middle][row["name"]].double() - at[before][row["name"]].double()
            second = at[now][row["name"]].double() - at[middle][row["name"]].double()
            for side, a, b in zip(
                ("left", "right"), singular_vectors(second, 8), singular_vectors(first, 8), strict=True
            ):
                overlap = row[f"spectral/update/overlap_{side}"]
                assert overlap == pytest.approx(subspace_overlap(a, b), abs=1e-4)
                assert 0 < overlap <= 1 + 1e-9


def test_relative_norm_is_that_of_all_matrices_together_and_its_mean_stands_beside_it(run):
    folder, _, at = run
    for now, before in ((3, 0), (6, 3), (7, 6)):
        differences = torch.cat([(at[now][k].double() - at[before][k].double()).flatten() for k in at[0]])
        old = torch.cat([at[before][k].double().flatten() for k in at[0]])
        assert values(folder, "spectral/update/relative_norm")[now] == pytest.approx(
            (differences.norm() / old.norm()).item(), rel=1e-6
        )
        mean = sum(relative(at[now][k], at[before][k]) for k in at[0]) / len(at[0])
        assert values(folder, "spectral/update/relative_norm_mean")[now] == pytest.approx(mean, rel=1e-6)
    together, plain = (
        next(r for r in records(folder) if r["step"] == 7 and r["name"] == f"spectral/update/{name}")
        for name in ("relative_norm", "relative_norm_mean")
    )
    assert together["settings"]["average"] == "all matrices together"
    assert plain["settings"]["average"] == "mean over matrices"
    assert together["reference"]["since"] == plain["reference"]["since"] == 6
    assert together["space"] == "dense"
    assert together["stderr"] is None


def test_the_other_records_are_plain_means_over_the_matrices(run):
    folder, _, at = run
    table = rows(folder)
    for record in records(folder):
        if record["name"].endswith("relative_norm_mean") or record["name"].endswith("/relative_norm"):
            continue
        column = table[table["step"] == record["step"]][record["name"]]
        assert record["value"] == pytest.approx(column.mean(), rel=1e-12), record["name"]
        assert record["about"]["matrices"] == record["about"]["total"] == len(at[0])
    reported = {record["name"] for record in records(folder)}
    assert {
        "spectral/weight/effective_rank_score", "spectral/weight/stable_rank", "spectral/weight/spectral_gap",
        "spectral/update/relative_norm", "spectral/update/effective_rank_score", "spectral/update/stable_rank",
    } <= reported  # fmt: skip


def test_at_the_start_there_is_no_update(run):
    folder, _, _ = run
    assert updates(folder) == [3, 6, 7]
    assert not any("update" in record["name"] for record in records(folder) if record["step"] == 0)


def test_the_log_history_holds_every_record(run):
    folder, trainer, _ = run
    logged = [entry for entry in trainer.state.log_history if "spectral/weight/stable_rank" in entry]
    assert [entry["step"] for entry in logged] == [0, 3, 6, 7]
    for entry in logged:
        measured = {r["name"]: r["value"] for r in records(folder) if r["step"] == entry["step"]}
        assert {key: value for key, value in entry.items() if key.startswith("spectral/")} == measured
    # the losses of the same steps are logged all the same
    assert [entry["step"] for entry in trainer.state.log_history if "loss" in entry] == [1, 2, 3, 4, 5, 6, 7]


# Where they go


def test_bare_says_once_who_does_not_see_its_numbers(tmp_path, caplog):
    reporter = Logs()
    trainer = stock(gpt2(), arguments(tmp_path, max_steps=2), lr.SpectralCallback(every=1), callbacks=[reporter])
    with caplog.at_level(logging.WARNING, logger="hf_lowrank"):
        trainer.train()
    (message,) = [record.getMessage() for record in caplog.records]
    assert "hf_lowrank.attach(trainer, ...)" in message
    assert str(tmp_path / "publish" / "metrics") in message
    assert not any("spectral" in key for _, logs in reporter.seen for key in logs)
    assert sorted(values(tmp_path, "spectral/weight/stable_rank")) == [0, 1, 2]


def test_attached_every_reporter_sees_its_numbers(tmp_path, caplog):
    before, args = Logs(), arguments(tmp_path, max_steps=4, report_to="tensorboard")
    with caplog.at_level(logging.WARNING, logger="hf_lowrank"):
        trainer = stock(gpt2(), args, lr.SpectralCallback(every=2), attach=True, callbacks=[before])
        after = Logs()
        trainer.add_callback(after)
        trainer.train()
    assert "attach" not in caplog.text
    expected = values(tmp_path, "spectral/update/stable_rank")
    for reporter in (before, after):
        seen = {
            step: logs["spectral/update/stable_rank"]
            for step, logs in reporter.seen
            if "spectral/update/stable_rank" in logs
        }
        assert seen == expected
    (events,) = tmp_path.glob("runs/*/events*")
    accumulator = EventAccumulator(str(events))
    accumulator.Reload()
    tags = accumulator.Tags()["scalars"]
    assert {f"train/{record['name']}" for record in records(tmp_path)} <= set(tags)
    # Trainer's rewriting turns every key into train/<key>
    points = {event.step: event.value for event in accumulator.Scalars("train/spectral/weight/stable_rank")}
    assert points == pytest.approx(values(tmp_path, "spectral/weight/stable_rank"), rel=1e-6)
    assert [event.step for event in accumulator.Scalars("train/loss")] == [1, 2, 3, 4]


# What it leaves alone


@pytest.mark.parametrize("attach", [False, True], ids=["bare", "attached"])
def test_training_is_bit_identical_with_and_without(attach, tmp_path):
    def train(folder, *callbacks):
        trainer = stock(
            gpt2(), arguments(folder, logging_steps=2), *callbacks, attach=attach and bool(callbacks)
        )  # fmt: skip
        assert trainer.model.config.resid_pdrop > 0
        trainer.train()
        logged = [
            (entry["step"], entry["loss"], entry["grad_norm"], entry["learning_rate"])
            for entry in trainer.state.log_history
            if "loss" in entry
        ]
        return weights(trainer.model), logged

    plain, expected = train(tmp_path / "plain")
    measured, logged = train(tmp_path / "measured", lr.SpectralCallback(every=1))
    assert logged == expected
    assert [entry[0] for entry in logged] == [2, 4, 6]
    for key, tensor in plain.items():
        assert torch.equal(measured[key], tensor), key


def test_a_metric_that_raises_is_reported_and_switched_off(tmp_path, caplog):
    class Broken(lr.SpectralCallback):
        def measure(self, model, args, state):
            if state.global_step == 2:
                raise RuntimeError("the disk is full")
            return super().measure(model, args, state)

    callback = Broken(every=1)
    trainer = stock(gpt2(), arguments(tmp_path, max_steps=4), callback, attach=True)
    with caplog.at_level(logging.WARNING, logger="hf_lowrank"):
        result = trainer.train()
    assert result.global_step == 4
    assert "spectral failed at step 2 and is switched off: RuntimeError: the disk is full" in caplog.text
    assert caplog.text.count("switched off") == 1
    assert callback.failed == "RuntimeError: the disk is full"
    assert sorted(values(tmp_path, "spectral/weight/stable_rank")) == [0, 1]
    assert {m["step"] for m in lr.load_report(tmp_path)["metrics"]} == {0, 1}
    # the next run starts with a clean slate
    trainer.args.max_steps = 1
    trainer.train()
    assert callback.failed is None
    assert sorted(values(tmp_path, "spectral/weight/stable_rank")) == [0, 1]


def test_layers_that_are_not_there_are_a_reason_to_be_switched_off(tmp_path, caplog):
    trainer = stock(gpt2(), arguments(tmp_path, max_steps=1), lr.SpectralCallback(target_modules=["q_proj"]))
    with caplog.at_level(logging.WARNING, logger="hf_lowrank"):
        trainer.train()
    assert "switched off: ValueError: no layer matches target_modules=['q_proj']" in caplog.text
    assert not (tmp_path / "publish").exists()


def test_only_the_layers_asked_for(tmp_path):
    stock(gpt2(), arguments(tmp_path, max_steps=1), lr.SpectralCallback(target_modules=["mlp.c_fc"])).train()
    assert set(rows(tmp_path)["module"]) == {"mlp.c_fc"}


def test_nan_in_one_matrix_costs_that_row_alone(tmp_path, caplog):
    model = gpt2()
    model.transformer.h[1].mlp.c_fc.weight.data[0, 0] = math.nan
    trainer = stock(model, arguments(tmp_path, max_steps=2), lr.SpectralCallback(every=1))
    with caplog.at_level(logging.WARNING, logger="hf_lowrank"):
        trainer.train()
    assert "switched off" not in caplog.text
    table = rows(tmp_path)
    start = table[table["step"] == 0].set_index("name")
    (failed,) = start.index[start["error"].notna()]
    assert failed == "transformer.h.1.mlp.c_fc"
    assert "NaN or infinity" in start.loc[failed, "error"]
    assert start["spectral/weight/stable_rank"].notna().sum() == 7
    (record,) = [r for r in records(tmp_path) if (r["step"], r["name"]) == (0, "spectral/weight/stable_rank")]
    assert (record["about"]["matrices"], record["about"]["total"]) == (7, 8)
    assert record["value"] == pytest.approx(start["spectral/weight/stable_rank"].mean())
    # by now every weight is NaN, and the run has ended all the same
    assert table[table["step"] == 2]["error"].notna().all()
    assert trainer.state.global_step == 2


def test_frozen_matrices_have_an_update_of_zero(tmp_path):
    model = gpt2()
    model.transformer.h[0].requires_grad_(False)
    stock(model, arguments(tmp_path, max_steps=2, warmup_steps=0), lr.SpectralCallback(every=1)).train()
    table = rows(tmp_path)
    last = table[table["step"] == 2]
    assert last["error"].isna().all()
    assert (last[last["layer"] == 0]["spectral/update/relative_norm"] == 0).all()
    assert (last[last["layer"] == 1]["spectral/update/relative_norm"] > 0).all()
    assert last[last["layer"] == 0]["spectral/update/stable_rank"].isna().all()
    found = {r["name"]: r["about"]["matrices"] for r in records(tmp_path) if r["step"] == 2}
    assert found["spectral/update/relative_norm_mean"] == 8
    assert found["spectral/update/stable_rank"] == found["spectral/update/overlap_left"] == 4


def test_nothing_moves_at_a_learning_rate_of_zero(tmp_path):
    stock(llama(), arguments(tmp_path, max_steps=1, learning_rate=0.0), lr.SpectralCallback(every=1)).train()
    assert values(tmp_path, "spectral/update/relative_norm") == {1: 0.0}
    # a spectrum of nothing: there, and without a value
    assert values(tmp_path, "spectral/update/stable_rank") == {1: None}


# When it measures


def test_every_longer_than_the_run_measures_start_and_end(tmp_path):
    stock(gpt2(), arguments(tmp_path, max_steps=2), lr.SpectralCallback(every=500)).train()
    assert sorted(values(tmp_path, "spectral/weight/stable_rank")) == [0, 2]
    assert updates(tmp_path) == [2]


@pytest.mark.parametrize("every", [0, -1, 2.5, None, "5"])
def test_every_is_a_number_of_steps(every):
    with pytest.raises(ValueError, match="every=.*: give a whole number of optimizer steps, 1 or more"):
        lr.SpectralCallback(every=every)


def test_steps_are_optimizer_steps(tmp_path):
    args = arguments(tmp_path, max_steps=2, gradient_accumulation_steps=2, per_device_train_batch_size=2)
    stock(gpt2(), args, lr.SpectralCallback(every=1)).train()
    assert sorted(values(tmp_path, "spectral/weight/stable_rank")) == [0, 1, 2]


def test_two_runs_in_one_process(tmp_path):
    callback = lr.SpectralCallback(every=2)
    first = stock(gpt2(), arguments(tmp_path / "first", max_steps=4), callback)
    first.train()
    expected = rows(tmp_path / "first")
    second = stock(gpt2(), arguments(tmp_path / "second", max_steps=4), callback)
    second.train()
    pd.testing.assert_frame_equal(rows(tmp_path / "second"), expected)
    pd.testing.assert_frame_equal(rows(tmp_path / "first"), expected)


def test_a_fresh_run_in_an_old_folder_starts_with_empty_files(tmp_path):
    stock(gpt2(), arguments(tmp_path, max_steps=4), lr.SpectralCallback(every=1)).train()
    stock(llama(), arguments(tmp_path, max_steps=2), lr.SpectralCallback(every=2)).train()
    assert sorted(values(tmp_path, "spectral/weight/stable_rank")) == [0, 2]
    assert set(rows(tmp_path)["step"]) == {0, 2}
    assert all(name.startswith("model.layers.") for name in rows(tmp_path)["name"])
    assert updates(tmp_path) == [2]


def test_sltrain_is_measured_as_the_matrix_it_multiplies_with(tmp_path):
    trainer = make_trainer(METHODS["sltrain"], arguments(tmp_path, max_steps=2))
    start = {target.name: weight.clone() for target, weight in dense_weights(trainer.model)}
    trainer.add_callback(lr.SpectralCallback(every=2))
    trainer.train()
    table = rows(tmp_path)
    for target, weight in dense_weights(trainer.model):
        (row,) = table[(table["step"] == 2) & (table["name"] == target.name)].to_dict("records")
        assert (row["rows"], row["cols"], row["space"]) == (target.rows, target.cols, "dense")
        assert row["spectral/weight/stable_rank"] == pytest.approx(spectral_metrics(weight).stable_rank)
        assert row["spectral/update/relative_norm"] == pytest.approx(relative(weight, start[target.name]), rel=1e-6)


# Resuming: checkpoints at 4 and 8, measured every 2 steps

SAVING = dict(max_steps=8, save_strategy="steps", save_steps=4)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A run that nothing happened to."""
    folder = tmp_path_factory.mktemp("whole")
    stock(gpt2(), arguments(folder, **SAVING), lr.SpectralCallback(every=2)).train()
    return folder


@pytest.fixture(scope="module")
def _killed(tmp_path_factory):
    folder = tmp_path_factory.mktemp("killed")
    trainer = stock(gpt2(), arguments(folder, **SAVING), lr.SpectralCallback(every=2), Kill(5))
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    return folder


@pytest.fixture
def killed(_killed, tmp_path):
    """A run killed in its sixth step, with a checkpoint of step 4."""
    return shutil.copytree(_killed, tmp_path / "run")


def resume(folder, callback=None, attach=False, **changes):
    args = arguments(folder, **{**SAVING, **changes})
    trainer = stock(gpt2(), args, callback or lr.SpectralCallback(every=2), attach=attach)
    trainer.train(resume_from_checkpoint=str(folder / "checkpoint-4"))
    return trainer


@pytest.mark.parametrize("restored", [False, True], ids=["", "restore_callback_states"])
def test_a_killed_run_goes_on_as_if_nothing_had_happened(restored, killed, whole):
    trainer = resume(killed, restore_callback_states_from_checkpoint=restored)
    assert sum(isinstance(c, lr.SpectralCallback) for c in trainer.callback_handler.callbacks) == 1
    pd.testing.assert_frame_equal(rows(killed), rows(whole), check_dtype=False)
    assert records(killed) == records(whole)


def test_attached_and_with_restored_callbacks(killed, whole):
    trainer = resume(killed, attach=True, restore_callback_states_from_checkpoint=True)
    assert records(killed) == records(whole)
    logged = [e["step"] for e in trainer.state.log_history if "spectral/weight/stable_rank" in e]
    assert logged == [0, 2, 4, 6, 8]
    assert sum(m["name"] == "spectral/weight/stable_rank" for m in lr.load_report(killed)["metrics"]) == 5


def test_what_was_measured_beyond_the_checkpoint_is_dropped(whole, tmp_path):
    folder = shutil.copytree(whole, tmp_path / "run")
    # a shorter continuation: the old rows of 6 must not stay beside the new ones of 5, nor those of 8
    resume(folder, lr.SpectralCallback(every=5), max_steps=5)
    table = rows(folder)
    assert sorted(table["step"]) == sorted([0, 2, 4, 5] * 8)
    assert sorted(values(folder, "spectral/weight/stable_rank")) == [0, 2, 4, 5]
    # the snapshot at hand is of step 8, from another history
    assert updates(folder) == [2, 4]
    assert table[table["step"] == 5]["spectral/update_from_init/norm"].notna().all()


def test_a_finished_run_resumed_has_no_update_row_until_its_second_measurement(whole, tmp_path):
    folder = shutil.copytree(whole, tmp_path / "run")
    resume(folder)
    assert updates(folder) == [2, 4, 8]
    assert len(rows(folder)) == 5 * 8
    pd.testing.assert_series_equal(
        rows(folder)["spectral/weight/stable_rank"], rows(whole)["spectral/weight/stable_rank"]
    )
    assert values(folder, "spectral/update_from_init/stable_rank") == values(
        whole, "spectral/update_from_init/stable_rank"
    )


@pytest.mark.parametrize("damage", ["gone", "cut", "empty", "no snapshot"])
def test_updates_are_left_out_where_the_snapshots_are_not_at_hand(damage, killed, caplog):
    for path in (killed / "spectral_snapshots").iterdir():
        if damage == "gone":
            path.unlink()
        elif damage == "no snapshot":
            shutil.copy(killed / "checkpoint-4" / "model.safetensors", path)
        else:
            content = path.read_bytes()
            path.write_bytes(content[: len(content) // 2] if damage == "cut" else b"")
    with caplog.at_level(logging.WARNING, logger="hf_lowrank"):
        resume(killed)
    assert ("cannot be read" in caplog.text) == (damage != "gone")
    assert "switched off" not in caplog.text
    table = rows(killed)
    assert updates(killed) == [2, 4, 8]
    assert table[table["step"] > 4]["spectral/update_from_init/norm"].isna().all()
    assert table["spectral/weight/stable_rank"].notna().all()
    assert sorted(values(killed, "spectral/weight/stable_rank")) == [0, 2, 4, 6, 8]


@pytest.mark.parametrize("name", ["spectral.parquet", "spectral.json"])
def test_damaged_earlier_measurements_cost_themselves_alone(name, killed, caplog):
    (killed / "publish" / "metrics" / name).write_bytes(b'[{"step"')
    with caplog.at_level(logging.WARNING, logger="hf_lowrank"):
        trainer = resume(killed)
    assert "earlier measurements cannot be read and are dropped" in caplog.text
    assert trainer.state.global_step == 8
    assert sorted(set(rows(killed)["step"])) == sorted(values(killed, "spectral/weight/stable_rank")) == [6, 8]
    assert updates(killed) == [8]


def test_newly_added_to_a_plain_trainers_checkpoint(tmp_path):
    stock(gpt2(), arguments(tmp_path, **SAVING)).train()
    assert not (tmp_path / "publish").exists()
    resume(tmp_path)
    assert sorted(set(rows(tmp_path)["step"])) == [6, 8]
    assert updates(tmp_path) == [8]
    assert not any("update_from_init" in record["name"] for record in records(tmp_path))


def test_a_finished_run_resumed_at_its_end_stays_as_it_is(whole, tmp_path):
    folder = shutil.copytree(whole, tmp_path / "run")
    trainer = stock(gpt2(), arguments(folder, **SAVING), lr.SpectralCallback(every=2))
    trainer.train(resume_from_checkpoint=str(folder / "checkpoint-8"))
    pd.testing.assert_frame_equal(rows(folder), rows(whole))
    assert records(folder) == records(whole)


def test_what_no_matrix_stands_for_is_marked_linearised(tmp_path):
    config = lr.CoLAConfig(r=4, target_modules=["mlp.up_proj", "mlp.down_proj"])
    trainer = make_trainer(config, arguments(tmp_path, max_steps=2))
    lr.attach(trainer, lr.SpectralCallback(every=2))
    trainer.train()
    table = rows(tmp_path)
    low_rank = table["module"].isin(["mlp.up_proj", "mlp.down_proj"])
    assert set(table["space"][low_rank]) == {"linearised"}
    assert set(table["space"][~low_rank]) == {"dense"}
    # the row of a product is that of B A
    layer = trainer.model.model.layers[1].mlp.up_proj
    row = table[(table["name"] == "model.layers.1.mlp.up_proj") & (table["step"] == 2)].iloc[0]
    expected = spectral_metrics((layer.B @ layer.A).detach())
    assert row["spectral/weight/stable_rank"] == pytest.approx(expected.stable_rank, rel=1e-5)
    # means do not mix the two, and the log shows the dense one
    found = [r for r in records(tmp_path) if r["name"] == "spectral/weight/stable_rank" and r["step"] == 2]
    assert {r["space"]: r["about"]["total"] for r in found} == {"linearised": 4, "dense": 10}
    for record in found:
        subset = table[(table["space"] == record["space"]) & (table["step"] == 2)]
        assert record["value"] == pytest.approx(subset["spectral/weight/stable_rank"].mean())
    logged = [e for e in trainer.state.log_history if "spectral/weight/stable_rank" in e][-1]
    dense = next(r["value"] for r in found if r["space"] == "dense")
    assert logged["spectral/weight/stable_rank"] == dense
    report = lr.load_report(tmp_path)
    assert "linearised" in {metric["space"] for metric in report["metrics"]}
