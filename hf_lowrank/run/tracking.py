"""Figures and the final table of a run in Trainer's trackers: trackio, Weights & Biases and TensorBoard."""

import importlib
import logging
from pathlib import Path
from typing import Any

import numpy as np
from transformers import Trainer, TrainerCallback
from transformers.integrations import TensorBoardCallback, TrackioCallback, WandbCallback

from hf_lowrank.report.markdown import escape
from hf_lowrank.report.model import Report
from hf_lowrank.report.tables import headline_rows

__all__ = ["close_trackers_last", "log_figures"]

logger = logging.getLogger(__name__)

# trackers whose module logs pictures and tables beside numbers, and in the same words
_MODULES: dict[type[TrainerCallback], str] = {TrackioCallback: "trackio", WandbCallback: "wandb"}
_TRACKERS = (*_MODULES, TensorBoardCallback)
_COLUMNS = ("id", "metric", "value", "stderr", "weights", "step")


def close_trackers_last(trainer: Trainer) -> None:
    """Move trackers behind all other callbacks: what is measured and drawn at the end comes before they close.

    Called when training has begun: they open before the others, whose first numbers they log.
    """
    handler = trainer.callback_handler
    # another list, since Trainer goes through the one that is there
    handler.callbacks = sorted(handler.callbacks, key=lambda callback: isinstance(callback, _TRACKERS))


def log_figures(trainer: Trainer, report: Report, publish: Path) -> None:
    """Log every figure in `publish/figures` and the table of headline metrics to each tracker of a Trainer.

    Figures are named `figures/<name>`, the table `tables/headline`. Called on the main process, before the trackers
    close. A tracker that fails is logged and costs nothing but its pictures.
    """
    figures = {f"figures/{path.stem}": path for path in sorted((publish / "figures").glob("*.png"))}
    rows = [
        [
            row.metric.id or "",
            row.metric.label,
            row.entry.value,
            row.entry.stderr,
            row.entry.space or "",
            row.entry.step,
        ]
        for row in headline_rows(report)
    ]
    for callback in trainer.callback_handler.callbacks:
        try:
            if isinstance(callback, TensorBoardCallback):
                _to_tensorboard(callback.tb_writer, figures, rows, report.run.steps)
            elif isinstance(callback, tuple(_MODULES)) and getattr(callback, "_initialized", False):
                module = next(name for kind, name in _MODULES.items() if isinstance(callback, kind))
                _to_module(importlib.import_module(module), figures, rows, report.run.steps)
        # somebody else's server, disk or version
        except Exception as error:
            logger.warning("%s got no figures: %s: %s", type(callback).__name__, type(error).__name__, error)


def _to_module(module: Any, figures: dict[str, Path], rows: list[list[Any]], step: int) -> None:
    logged = {name: module.Image(str(path)) for name, path in figures.items()}
    if rows:
        logged["tables/headline"] = module.Table(columns=list(_COLUMNS), data=rows)
    if logged:
        module.log({**logged, "train/global_step": step})


def _to_tensorboard(writer: Any, figures: dict[str, Path], rows: list[list[Any]], step: int) -> None:
    from PIL import Image

    if writer is None:
        return
    for name, path in figures.items():
        with Image.open(path) as image:
            writer.add_image(name, np.asarray(image.convert("RGB")), step, dataformats="HWC")
    if rows:
        lines = [_COLUMNS, ["---"] * len(_COLUMNS), *rows]
        cells = [["" if cell is None else escape(cell) for cell in line] for line in lines]
        writer.add_text("tables/headline", "\n".join(f"| {' | '.join(line)} |" for line in cells), step)
    writer.flush()
