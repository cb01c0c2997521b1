"""Figures and the final table in Trainer's trackers: in trackio and TensorBoard themselves; W&B has a stand-in."""

import logging
import sys
from types import SimpleNamespace

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tiny_runs import METHODS, arguments, make_trainer
from transformers.integrations import TrackioCallback, WandbCallback

import hf_lowrank as lr

FIGURES = ["figures/loss", "figures/spectra_over_depth", "figures/spectra_over_steps"]


def tracked(folder, on, **changes):
    trainer = make_trainer(METHODS["galore"], arguments(folder, max_steps=4, **changes))
    lr.attach(trainer, lr.SpectralCallback(every=2), log_figures=on)
    return trainer


@pytest.fixture(scope="module")
def both(tmp_path_factory):
    """One run that reports to trackio and TensorBoard: (what trackio kept, the folder of TensorBoard's events)."""
    folder = tmp_path_factory.mktemp("tracked")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRACKIO_DIR", str(folder / "trackio"))
        patch.setenv("TENSORBOARD_LOGGING_DIR", str(folder / "events"))
        import trackio

        names = {"project": "tiny", "run_name": "galore"}
        tracked(folder / "run", True, report_to=["trackio", "tensorboard"], **names).train()
        (run,) = trackio.Api().runs("tiny")
        yield trackio.SQLiteStorage.get_logs("tiny", run.name), folder / "events"


def test_trackio_has_numbers_figures_and_the_table_in_one_run(both):
    logs, _ = both
    assert any("train/loss" in entry for entry in logs)
    (end,) = [entry for entry in logs if "tables/headline" in entry]
    assert sorted(name for name in end if name.startswith("figures/")) == FIGURES
    for name in FIGURES:
        assert end[name]["_type"] == "trackio.image"
    assert end["tables/headline"]["_type"] == "trackio.table"


def test_tensorboard_has_the_same(both):
    _, folder = both
    events = EventAccumulator(str(folder), size_guidance={"images": 0})
    events.Reload()
    assert sorted(events.Tags()["images"]) == FIGURES
    assert events.Images("figures/loss")[0].width > 400
    (table,) = events.Tensors("tables/headline/text_summary")
    text = table.tensor_proto.string_val[0].decode()
    assert text.startswith("| id | metric | value | stderr | weights | step |")
    assert "| H9 | Stable rank of W |" in text


def test_without_the_switch_trackers_get_numbers_alone(tmp_path, monkeypatch):
    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "events"))
    monkeypatch.setattr("hf_lowrank.run.report.draw_figures", lambda publish: [])
    tracked(tmp_path / "run", False, report_to="tensorboard").train()
    events = EventAccumulator(str(tmp_path / "events"))
    events.Reload()
    assert events.Tags()["images"] == []
    assert "train/loss" in events.Tags()["scalars"]


@pytest.mark.parametrize("broken", [False, True])
def test_wandb_gets_pictures_and_table_and_may_fail(broken, tmp_path, monkeypatch, caplog):
    logged = []
    module = SimpleNamespace(
        Image=lambda path: ("image", path.rpartition("/")[2]),
        Table=lambda columns, data: ("table", columns, len(data)),
        log=(lambda values: 1 / 0) if broken else logged.append,
    )
    monkeypatch.setitem(sys.modules, "wandb", module)
    trainer = tracked(tmp_path, True)
    # without W&B its callback cannot be made: this one only follows the Trainer
    hooks = ("__init__", "on_train_begin", "on_train_end", "on_log", "on_save")
    nothing = {name: lambda self, *args, **kwargs: None for name in hooks}
    trainer.add_callback(type("Stub", (WandbCallback,), {**nothing, "_initialized": True})())
    with caplog.at_level(logging.WARNING, logger="hf_lowrank"):
        trainer.train()
    if broken:
        assert "Stub got no figures: ZeroDivisionError" in caplog.text
        assert lr.load_report(tmp_path).run.steps == 4
    else:
        (values,) = logged
        assert values["figures/loss"] == ("image", "loss.png")
        assert values["tables/headline"][1] == ["id", "metric", "value", "stderr", "weights", "step"]
        assert values["train/global_step"] == 4


class Tracker(TrackioCallback):
    """Writes down what it is called for, and whether the report is there."""

    def __init__(self, report):
        self.report, self.seen = report, []

    def on_train_begin(self, *args, **kwargs):
        self.seen.append("begin")

    def on_log(self, args, state, control, logs=None, **kwargs):
        self.seen.append("numbers" if any(name.startswith("spectral/") for name in logs) else "log")

    def on_train_end(self, *args, **kwargs):
        self.seen.append(f"end, report: {self.report.is_file()}")


def test_trackers_open_before_the_first_numbers_and_close_after_the_report(tmp_path):
    trainer = make_trainer(METHODS["fullrank"], arguments(tmp_path, max_steps=2))
    tracker = Tracker(tmp_path / "publish" / "report.json")
    trainer.add_callback(tracker)
    lr.attach(trainer, lr.SpectralCallback(every=2))
    trainer.train()
    assert tracker.seen[:2] == ["begin", "numbers"]
    assert tracker.seen[-1] == "end, report: True"
    assert sum(event.startswith("end") for event in tracker.seen) == 1
