"""What a measurement leaves beside its numbers: the report brought up to date, figures, and the card."""

import json
import logging
from collections.abc import Mapping
from datetime import UTC, datetime
from functools import partial
from math import prod
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from safetensors import SafetensorError, safe_open

from hf_lowrank.downstream.results import evaluation_entries, read_evaluations
from hf_lowrank.families import Measurement, families
from hf_lowrank.families.records import metrics_folder, read_measurement, read_records
from hf_lowrank.figures import draw_figures
from hf_lowrank.hub.card import update_card
from hf_lowrank.measure.source import RunSource
from hf_lowrank.methods import get_method
from hf_lowrank.model_config import base_architecture, loading_class
from hf_lowrank.report.baseline import baseline_of, differences_to_baseline
from hf_lowrank.report.files import atomic_path
from hf_lowrank.report.io import read_report, up_to, write_report
from hf_lowrank.report.model import SCHEMA_VERSION, Report

__all__ = ["write_run", "write_tables_across_runs"]

logger = logging.getLogger(__name__)


def write_run(run: RunSource, figures: bool = True, baseline: RunSource | None = None) -> Path:
    """Bring report.json, figures and card of a run up to date with its metrics; return the folder `publish`.

    A run without a report, of a plain Trainer, gets one with what its checkpoints tell. What is known of the baseline
    goes into the report; without one, what an earlier measurement found stays. Figures show metrics: if none was
    measured they need not be drawn again.
    """
    publish, folder = run.output / "publish", metrics_folder(run.output)
    report = run.report or _report_of_checkpoints(run)
    last_step = None if run.report is None else run.report.run.last_step()
    numbers = {"metrics": _metrics(run, folder), "evaluations": _evaluations(report, folder)}
    report = {**report, **{part: up_to(last_step, entries) for part, entries in numbers.items()}}
    known = None if baseline is None or baseline is run else _report_now(baseline)
    if known is not None and baseline is not None:
        report["baseline"] = baseline_of(known)
        report["baseline"]["differences"] = differences_to_baseline(report, run.kept(), baseline.kept())
    # found since the run was opened, or by an earlier command whose results lie elsewhere than the run
    elif (held := _report_now(run)) is not None and "baseline" in held:
        report["baseline"] = held["baseline"]
    if run.report is None:
        curve = _training_curve(run)
        if curve is not None:
            with atomic_path(folder / "training.parquet") as path:
                curve.to_parquet(path, index=False)
    write_report(report, publish / "report.json")
    if figures:
        draw_figures(publish)
    update_card(publish)
    return publish


def _report_now(run: RunSource) -> Report | None:
    """The report of a run with what was measured since it was opened; None if it has none."""
    try:
        return read_report(run.output)
    except FileNotFoundError:
        return run.report


def _metrics(run: RunSource, folder: Path) -> list[dict[str, Any]]:
    """The run's records; what the report of a run that lies elsewhere has, and was not measured here, stays."""
    found = read_records(folder)
    if run.report is None or run.output == run.root:
        return found
    measured = {record["name"] for record in found}
    return [entry for entry in run.report["metrics"] if entry["name"] not in measured] + found


def _evaluations(report: Mapping[str, Any], folder: Path) -> list[dict[str, Any]]:
    """The results on downstream tasks: the file's, and those of the report if there is no file."""
    rows = read_evaluations(folder)
    return list(report["evaluations"]) if rows is None else evaluation_entries(rows)


def _trainer_state(run: RunSource) -> dict[str, Any]:
    try:
        return dict(json.loads((run.checkpoints[-1].folder / "trainer_state.json").read_text()))
    except (OSError, ValueError):
        return {}


def _training_curve(run: RunSource) -> pd.DataFrame | None:
    """The log history as a table of loss and learning rate; None if there is none."""
    history = pd.DataFrame(_trainer_state(run).get("log_history") or [])
    if "step" not in history:
        return None
    columns = ["step", "epoch", "loss", "eval_loss", "learning_rate", "grad_norm"]
    return history.reindex(columns=columns).groupby("step", as_index=False).first()


def _report_of_checkpoints(run: RunSource) -> dict[str, Any]:
    """A report that knows the model and the trainer's state, and says of everything else that it is not known."""
    state = _trainer_state(run)
    unknown = {"name": None, "betas": None, "eps": None, "weight_decay": None, "max_grad_norm": None}
    settings, rates = run.settings(), _peak_rates(run, state)
    one_rate = 1.0 if len(set(rates)) == 1 else None
    parameters, has_dense_form = _parameters(run), get_method(run.method).has_dense_form
    facts = {
        "generated_from": "checkpoints",
        "name": run.name,
        "method": run.method,
        **get_method(run.method).facts(),
        "method_config": settings,
        "model": {
            "architecture": base_architecture(run.config) or "unknown",
            "size": None,
            "parameters": parameters,
            "parameters_trained": parameters,
            "config_hash": None,
            "loaded_by": loading_class(next(iter(run.config.get("architectures") or []), None), has_dense_form),
        },
        "optimizer_state_bytes": {"predicted": None, "measured": None, "adamw": None},
        "peak_memory_bytes": {"value": None, "kind": None},
        "tokens_seen": state.get("num_input_tokens_seen") or None,
        "flops": state.get("total_flos") or None,
        "steps": run.checkpoints[-1].step,
        "max_steps": state.get("max_steps"),
        "seeds": {"seed": None, "data_seed": None},
        # Trainer logs the rate of the first group
        "learning_rate": rates[0] if rates else None,
        "lr_schedule": {"type": None, "warmup_steps": None},
        "optimizer": unknown | {"other_lr_scale": settings.get("other_lr_scale", one_rate)},
        "batch": dict.fromkeys(("per_device", "gradient_accumulation", "world_size", "global_sequences")),
        "precision": run.config.get("dtype"),
        "world_size": None,
        "versions": {"transformers": run.config.get("transformers_version")},
        "git_commit": None,
        "hardware": None,
        "wall_time_seconds": None,
        "command": None,
        "license": None,
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
    }
    return {"schema_version": SCHEMA_VERSION, "run": facts, "data": None, "metrics": [], "evaluations": []}


def _peak_rates(run: RunSource, state: dict[str, Any]) -> list[float]:
    """The groups' rates that the schedule was made with; if it was not saved, the highest that was logged."""
    try:
        schedule = torch.load(run.checkpoints[-1].folder / "scheduler.pt", map_location="cpu", weights_only=True)
        return [float(rate) for rate in schedule["base_lrs"]]
    # absent, damaged, or of another kind
    except Exception:
        logged = [entry["learning_rate"] for entry in state.get("log_history") or [] if "learning_rate" in entry]
        return [max(logged)] if logged else []


def _parameters(run: RunSource) -> int:
    """Numbers in the weights of the newest checkpoint that can be read, tied ones once."""
    for checkpoint in reversed(run.checkpoints):
        try:
            return sum(_numbers(path) for path in checkpoint.weights)
        except (OSError, ValueError, SafetensorError):
            continue
    return 0


def _numbers(path: Path) -> int:
    with safe_open(path, "pt") as file:
        slices = [file.get_slice(name) for name in file.keys()]  # noqa: SIM118
        return sum(prod(s.get_shape()) for s in slices if s.get_dtype().startswith(("F", "BF")))


def write_tables_across_runs(among: list[RunSource], into: list[RunSource]) -> None:
    """Write the tables that families make of the runs `among` to each of `into`, and draw them."""

    def measured_of(run: Any, name: str) -> Measurement:
        return read_measurement(metrics_folder(run.output), name) or Measurement()

    tables: dict[str, list[dict[str, Any]]] = {}
    for family in families().values():
        tables |= family.across_runs(among, partial(measured_of, name=family.entry.file))
    for run in into if tables else []:
        for name, rows in tables.items():
            with atomic_path(metrics_folder(run.output) / f"{name}.parquet") as path:
                pd.DataFrame(rows).to_parquet(path, index=False)
        draw_figures(run.output / "publish")
        update_card(run.output / "publish")
