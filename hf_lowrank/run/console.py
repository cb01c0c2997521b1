"""What a training run shows: one line a log while it trains, one table at its end, and the commands that come next."""

import shlex
import shutil
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text
from transformers import (
    PrinterCallback,
    ProgressCallback,
    Trainer,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)
from transformers.trainer import DEFAULT_PROGRESS_CALLBACK

from hf_lowrank.report.catalogue import entry_of, headline_metric
from hf_lowrank.report.io import ReportError, read_report
from hf_lowrank.report.markdown import one_line, slug
from hf_lowrank.report.model import Report
from hf_lowrank.report.tables import fact_rows, headline_rows
from hf_lowrank.report.values import format_bytes, format_duration, format_value
from hf_lowrank.run.speed import SpeedCallback

__all__ = ["ConsoleCallback", "print_summary", "use_console"]

# columns where the output is no terminal: a log file, a notebook
WIDTH = 80
# what Trainer says of a validation beside its results
_UNSHOWN = ("runtime", "_per_second", "_stderr", "_time")

# facts of the last table, by key
_COSTS = ("peak_memory", "tokens_seen", "wall_time", "tokens_per_second", "optimizer_time", "refresh_time")
# folders beside a run that are looked at, and runs among them that it is compared with
_MOST_BESIDE, _MOST_COMPARED = 100, 5


def use_console(trainer: Trainer, speed: SpeedCallback) -> None:
    """Put `ConsoleCallback` in the place of the callbacks by which Trainer prints its logs."""
    printing = (PrinterCallback, ProgressCallback, DEFAULT_PROGRESS_CALLBACK)
    handler = trainer.callback_handler
    # somebody's own subclass of them stays
    handler.callbacks = [callback for callback in handler.callbacks if type(callback) not in printing]
    trainer.add_callback(ConsoleCallback(speed))


class ConsoleCallback(ProgressCallback):
    """Prints one line for each log, instead of a dictionary; a terminal has Trainer's progress bar below.

    Args:
        speed: of the Trainer.
    """

    def __init__(self, speed: SpeedCallback) -> None:
        super().__init__()
        self.speed = speed

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._first_step = state.global_step
        self._began = time.monotonic()
        self.current_step = 0
        if sys.stderr.isatty() and not args.disable_tqdm:
            super().on_train_begin(args, state, control, **kwargs)

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        if self.training_bar is not None:
            super().on_step_end(*args, **kwargs)

    def on_prediction_step(self, *args: Any, **kwargs: Any) -> None:
        if self.training_bar is not None:
            super().on_prediction_step(*args, **kwargs)

    def on_train_end(self, *args: Any, **kwargs: Any) -> None:
        if self.training_bar is not None:
            super().on_train_end(*args, **kwargs)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        # the end has a table of its own
        if not state.is_world_process_zero or not logs or "train_runtime" in logs:
            return
        place = f"step {state.global_step}/{state.max_steps}" if state.max_steps > 0 else f"step {state.global_step}"
        parts = self._training(logs, state) if "loss" in logs else log_words(logs)
        if parts:
            self._say(fitting([f"{place} ", *parts], _width()))

    def _training(self, logs: Mapping[str, Any], state: TrainerState) -> list[str]:
        parts = [f"loss {logs['loss']:.4g}"]
        parts += [f"rate {logs['learning_rate']:.3g}"] if "learning_rate" in logs else []
        speed, done = self.speed.recent(), state.global_step - self._first_step
        parts += [f"{speed:,.0f} tokens/s"] if speed is not None else []
        if done > 0 and state.max_steps > state.global_step:
            seconds = (time.monotonic() - self._began) / done * (state.max_steps - state.global_step)
            parts.append(f"{format_duration(seconds)} left")
        return apart(parts)

    def _say(self, line: str) -> None:
        encoding = getattr(sys.stdout, "encoding", None) or "utf-8"
        line = line.encode(encoding, "replace").decode(encoding)
        if self.training_bar is not None:
            self.training_bar.write(line)
        else:
            print(line, flush=True)


def log_words(logs: Mapping[str, Any]) -> list[str]:
    """Return in words what a validation or a metric has logged; nothing for what is neither."""
    return _validation(logs) if any(name.startswith("eval_") for name in logs) else _measured(logs)


def _validation(logs: Mapping[str, Any]) -> list[str]:
    """Return a validation's results, `validation loss 6.195`, `perplexity 490.3 ± 29.3`, or those of tasks."""
    results = {name.removeprefix("eval_"): value for name, value in logs.items() if name.startswith("eval_")}
    shown = {name: value for name, value in results.items() if not name.endswith(_UNSHOWN)}
    texts = [
        f"{name} {format_value(value, results.get(f'{name}_stderr'))}"
        for name, value in shown.items()
        if isinstance(value, int | float)
    ]
    # the harness's tasks are named task/metric
    what = "tasks" if all("/" in name for name in shown) else "validation"
    return apart([f"{what} {texts[0]}", *texts[1:]]) if texts else []


def _measured(logs: Mapping[str, Any]) -> list[str]:
    """Return what a family has measured: its headline metrics by number or name, or else the first of its numbers."""
    values = {name: value for name, value in logs.items() if "/" in name and isinstance(value, int | float)}
    if not values:
        return []
    families = {name: entry_of(name) for name in values}
    entry = next(iter(families.values()))
    title = entry.name if entry is not None else next(iter(values)).partition("/")[0]
    texts = []
    for name, value in values.items():
        metric = headline_metric(name)
        if metric is not None:
            texts.append((metric.id is None, f"{metric.id or name.rpartition('/')[2]} {value:.3g}"))
    if not texts:
        texts = [(True, f"{name.partition('/')[2]} {value:.3g}") for name, value in values.items()]
    return [f"{title} ", *(text for _, text in sorted(texts, key=_number))]


def _number(text: tuple[bool, str]) -> tuple[bool, int]:
    """Place of a headline metric, `H10 0.23`, among others; those without a number keep their order behind them."""
    unnumbered, words = text
    return unnumbered, 0 if unnumbered else int(words.split()[0][1:])


def apart(parts: list[str]) -> list[str]:
    """Return parts of several words, of which a line shows the ends by a second blank."""
    return [f"{part} " for part in parts]


def fitting(parts: list[str], width: int) -> str:
    """Return as many parts as one line of `width` columns holds."""
    while len(line := " ".join(parts)) > width and len(parts) > 1:
        parts = parts[:-1]
    return line[:width].rstrip()


def _width() -> int:
    return shutil.get_terminal_size((WIDTH, 24)).columns if sys.stdout.isatty() else WIDTH


def print_summary(report: Report, publish: Path) -> None:
    """Print what a run came to, where it lies, and the commands that come next."""
    console = Console()
    console.print(summary_table(report))
    places = {"card": publish / "README.md", "figures": publish / "figures"}
    lines = [f"{name:<8} {_shown(path)}" for name, path in places.items() if path.exists()]
    lines += ["next:", *(f"  {command}" for command in next_commands(report, publish.parent))]
    # never broken: a path or a command can be copied
    console.print(Text("\n".join(lines)), soft_wrap=True)


def summary_table(report: Report) -> Table:
    """Return the loss, the headline metrics and the cost of a run as one table for 80 columns."""
    run = report.run
    steps = f"step {run.steps:,}" + (f", the best of {run.steps_done:,}" if run.best_of is not None else "")
    title = f"{one_line(run.name)}: {one_line(run.method_label or run.method)}, {steps}"
    table = Table(title=Text(title, style="bold"), title_justify="left", show_header=False, box=None)
    table.add_column()
    table.add_column(overflow="fold")
    table.add_column(justify="right", no_wrap=True)
    rows = headline_rows(report)
    several = {row.metric.name for row in rows if sum(other.metric == row.metric for other in rows) > 1}
    for row in rows:
        if row.entry.value is None:
            continue
        other = row.entry.settings.get("other", row.entry.reference.get("other"))
        told_apart = [str(each) for each in (row.entry.space, other) if each] if row.metric.name in several else []
        label = f"{row.metric.label} ({', '.join(told_apart)})" if told_apart else row.metric.label
        table.add_row(row.metric.id or "", Text(one_line(label)), row.text)
    state, adamw = run.optimizer_state_bytes.best, run.optimizer_state_bytes.adamw
    share = f" ({state / adamw:.0%})" if state is not None and adamw else ""
    facts = {fact.key: fact for fact in fact_rows(report)}
    costs = [(f"Optimizer state (AdamW's: {format_bytes(adamw) or 'unknown'})", f"{format_bytes(state)}{share}")]
    costs += [(facts[key].label, facts[key].text) for key in _COSTS if key in facts]
    table.add_row()
    for label, text in costs:
        table.add_row("", label, text)
    return table


def next_commands(report: Report, run: Path) -> list[str]:
    """Return commands to copy: compare the run with those beside it, publish it, measure what is missing."""
    others = [folder for folder in sorted(run.resolve().parent.glob("*/")) if folder != run.resolve()]
    others = [folder for folder in others[:_MOST_BESIDE] if _is_like(report, folder)][:_MOST_COMPARED]
    return [
        shlex.join(["hf-lowrank", "compare", *map(_shown, (run, *others)), "--output", "comparison"]),
        shlex.join(["hf-lowrank", "push", _shown(run), "--repo-id", slug(report.run.name)]),
        shlex.join(["hf-lowrank", "measure", _shown(run)]),
    ]


def _is_like(report: Report, folder: Path) -> bool:
    """Whether a folder holds a run of the same model."""
    try:
        other = read_report(folder)
    except (ReportError, OSError):
        return False
    return report.run.model.config_hash is not None and other.run.model.config_hash == report.run.model.config_hash


def _shown(path: Path) -> str:
    """Return a path from here where it lies below."""
    path, here = path.resolve(), Path.cwd()
    return str(path.relative_to(here)) if path.is_relative_to(here) and path != here else str(path)
