"""What a run shows: one short line a log, one table at the end, commands to copy; and how fast it trained."""

import json
import re
import shlex
import shutil
import sys
from collections import deque
from functools import partial

import pytest
import torch
from tiny_runs import METHODS, arguments, make_trainer
from transformers import PrinterCallback, ProgressCallback, trainer_callback

import hf_lowrank as lr
from hf_lowrank.evaluation.perplexity import perplexity_metrics
from hf_lowrank.optim.spans import Spans
from hf_lowrank.report.io import read_report
from hf_lowrank.run.console import ConsoleCallback, fitting, log_words, next_commands

SPECTRA = ("H8", "H9", "H10", "H11", "H12", "H13")


def shown_run(folder, config, console=True, **changes):
    args = arguments(folder, max_steps=4, eval_strategy="steps", eval_steps=2, **changes)
    trainer = make_trainer(config, args, **perplexity_metrics())
    lr.attach(trainer, lr.SpectralCallback(every=2), console=console)
    trainer.train()
    return trainer


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A run of GaLore whose output goes to a file: (trainer, folder, what it printed)."""
    folder = tmp_path_factory.mktemp("console") / "galore"
    log = folder.with_suffix(".log")
    with log.open("w", encoding="utf-8") as out, pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "stdout", out)
        patch.delenv("COLUMNS", raising=False)
        trainer = shown_run(folder, METHODS["galore"], disable_tqdm=False)
    return trainer, folder, log.read_text(encoding="utf-8")


def test_every_log_is_one_line_of_80_columns(finished):
    _, folder, out = finished
    assert "{" not in out
    lines = out.splitlines()
    assert max(len(line) for line in lines if str(folder) not in line) <= 80
    (loss,) = [line for line in lines if line.startswith("step 2/4  loss")]
    assert re.fullmatch(r"step 2/4  loss \S+  rate \S+  [\d,]+ tokens/s  \d.* left", loss)
    assert re.fullmatch(
        r"step 2/4  validation loss \S+  perplexity \S+ ± \S+", next(line for line in lines if "validation" in line)
    )
    spectra = [line for line in lines if line.startswith("step 4/4  spectral")]
    assert re.findall(r"H\d+", spectra[0]) == list(SPECTRA)
    assert len(spectra) == 1


def test_the_end_is_one_table_and_commands_to_copy(finished):
    _, folder, out = finished
    end = out[out.index("galore: GaLore, step 4") :]
    report = read_report(folder)
    loss = next(m for m in report.metrics if m.name == "validation_loss")
    assert re.search(rf"Validation loss +{loss.value:.2f}\d* ± ", end)
    for text in ("Validation perplexity", *SPECTRA, "Optimizer state (AdamW's: ", "Peak memory", "Wall time"):
        assert text in end, text
    paths = dict(re.findall(r"^(card|figures) +(\S+)$", end, re.MULTILINE))
    assert paths == {"card": str(folder / "publish" / "README.md"), "figures": str(folder / "publish" / "figures")}
    commands = [shlex.split(line) for line in end.partition("next:\n")[2].splitlines()]
    assert [command[:3] for command in commands] == [
        ["hf-lowrank", name, str(folder)] for name in ("compare", "push", "measure")
    ]


def test_the_comparison_to_copy_is_with_runs_of_the_same_model(finished, tmp_path):
    _, folder, _ = finished
    report = read_report(folder)
    for name in ("mine", "alike", "other", "no report"):
        shutil.copytree(folder / "publish", tmp_path / name / "publish")
    other = json.loads((tmp_path / "other" / "publish" / "report.json").read_text())
    other["run"]["model"]["config_hash"] = "another"
    (tmp_path / "other" / "publish" / "report.json").write_text(json.dumps(other))
    (tmp_path / "no report" / "publish" / "report.json").write_text("{}")
    compare = next_commands(report, tmp_path / "mine")[0]
    assert shlex.split(compare)[2:-2] == [str(tmp_path / "mine"), str(tmp_path / "alike")]


def test_callbacks_of_a_users_trainer_stay_unless_asked(tmp_path):
    for console in (False, True):
        trainer = make_trainer(METHODS["fullrank"], arguments(tmp_path, disable_tqdm=not console))
        printing = {type(c) for c in trainer.callback_handler.callbacks} & {PrinterCallback, ProgressCallback}
        lr.attach(trainer, console=console)
        left = [c for c in trainer.callback_handler.callbacks if isinstance(c, PrinterCallback | ProgressCallback)]
        assert len(printing) == 1
        assert {type(c) for c in left} == ({ConsoleCallback} if console else printing)


def test_a_terminal_has_a_bar_below_the_lines(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    # whatever TQDM_DISABLE says
    monkeypatch.setattr(trainer_callback, "tqdm", partial(trainer_callback.tqdm, disable=False))
    monkeypatch.setattr("hf_lowrank.run.report.draw_figures", lambda publish: [])
    shown_run(tmp_path, METHODS["fullrank"], disable_tqdm=False)
    out, err = capsys.readouterr()
    assert "4/4" in err
    assert "step 4/4  loss" in out
    assert "{" not in out


@pytest.mark.parametrize(
    ("logs", "line"),
    [
        ({"eval_loss": 6.195, "eval_runtime": 9.3, "eval_samples_per_second": 2.0}, "validation loss 6.195"),
        (
            {"eval_en_loss": 2.0, "eval_en_perplexity": 7.4, "eval_en_perplexity_stderr": 0.1},
            "validation en_loss 2.000  en_perplexity 7.40 ± 0.10",
        ),
        ({"eval_brackets/acc": 0.5, "eval_brackets/acc_stderr": 0.02}, "tasks brackets/acc 0.500 ± 0.020"),
        ({"spectral/weight/stable_rank": 22.04, "spectral/weight/rank": 3, "epoch": 1.0}, "spectral  H9 22"),
        ({"curvature/trace": -1020.0, "epoch": 1.0}, "curvature  trace -1.02e+03"),
        (
            {"relora/restarts": 2, "relora/merged_norm": 0.51234},
            "relora  restarts 2 merged_norm 0.512",
        ),
        ({"reward": 1.0}, ""),
    ],
)
def test_a_measurement_in_words(logs, line):
    assert " ".join(log_words(logs)).rstrip() == line


def test_a_line_never_outgrows_its_width():
    for width in (8, 20, 79, 80):
        assert len(fitting(["step 1/2", *(f"H{i} 0.123" for i in range(20))], width)) <= width


# Speed


@pytest.mark.parametrize(("method", "refreshes"), [("galore", True), ("fullrank", False), ("relora", True)])
def test_the_report_holds_the_speed(method, refreshes, finished, tmp_path, monkeypatch):
    if method == "galore":
        folder = finished[1]
    else:
        folder = tmp_path
        monkeypatch.setattr("hf_lowrank.run.report.draw_figures", lambda publish: [])
        shown_run(folder, METHODS[method], console=False)
    run = read_report(folder).run
    assert run.speed.tokens_per_second > run.tokens_seen / run.wall_time_seconds, "validation and metrics do not count"
    assert 0 < run.speed.optimizer_seconds_per_step < run.wall_time_seconds
    assert (run.speed.refresh_seconds_per_step is not None) == refreshes
    if refreshes:
        assert run.speed.refresh_seconds_per_step > 0


class Event:
    """A CUDA event whose time comes when the test says so; nothing may wait for it."""

    passed = 0

    def __init__(self, made, enable_timing):
        assert enable_timing
        self.place = len(made)
        made.append(self)

    def record(self):
        pass

    def query(self):
        return self.place < Event.passed

    def elapsed_time(self, end):
        return 1000.0 * (end.place - self.place)

    def synchronize(self):
        raise AssertionError("a step must not wait for the device")


def test_spans_on_a_gpu_wait_for_nothing(monkeypatch):
    made = []
    monkeypatch.setattr(torch.cuda, "Event", lambda enable_timing: Event(made, enable_timing))
    monkeypatch.setattr(Event, "passed", 0)
    spans = Spans(torch.device("cuda"))
    outer = spans.now()
    with spans.span("inner"):
        pass
    spans.add("outer", outer, amount=5)
    assert not spans.amounts
    Event.passed = 3
    spans.collect()
    assert (spans.seconds, spans.amounts) == ({"inner": 1.0}, {"inner": 1})
    Event.passed = 4
    spans.collect()
    assert (spans.seconds["outer"], spans.amounts["outer"]) == (3.0, 5)
    assert spans._pending == deque()


def test_a_printing_callback_of_ones_own_stays(tmp_path):
    class Mine(ProgressCallback):
        pass

    trainer = make_trainer(METHODS["fullrank"], arguments(tmp_path))
    mine = Mine()
    trainer.add_callback(mine)
    lr.attach(trainer, console=True)
    kinds = [type(callback) for callback in trainer.callback_handler.callbacks]
    assert mine in trainer.callback_handler.callbacks
    assert ConsoleCallback in kinds
    assert not {PrinterCallback, ProgressCallback} & set(kinds)


def test_a_summary_that_cannot_be_printed_is_no_end(tmp_path, monkeypatch, caplog):
    def fails(*args):
        raise UnicodeEncodeError("ascii", "±", 0, 1, "no such sign")

    monkeypatch.setattr("hf_lowrank.run.report.print_summary", fails)
    trainer = make_trainer(METHODS["fullrank"], arguments(tmp_path, max_steps=1))
    lr.attach(trainer)
    trainer.train()
    assert "the summary of the run could not be printed" in caplog.text
    assert (tmp_path / "publish" / "report.json").is_file()
