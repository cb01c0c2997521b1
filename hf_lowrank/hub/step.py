"""What would have been published of a run when one of its checkpoints was saved."""

from __future__ import annotations

import json
import logging
import shutil
from pathlib import Path

import pandas as pd
from transformers import AutoTokenizer

from hf_lowrank.checkpoints import CheckpointError, export, load_model
from hf_lowrank.figures import draw_figures
from hf_lowrank.report import read_report, write_report

__all__ = ["write_model", "write_step"]

logger = logging.getLogger(__name__)


def write_step(publish: Path, checkpoint: Path, folder: Path) -> None:
    """Write the model of a checkpoint, and report, metrics and figures up to its step, to `folder`; no card.

    Args:
        publish: the run's publish folder.
        checkpoint: one of the run's folders `checkpoint-<n>`.
        folder: is empty.

    Raises:
        CheckpointError: the checkpoint is not complete.
    """
    try:
        state = json.loads((checkpoint / "trainer_state.json").read_text())
        step = int(state["global_step"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{checkpoint} is incomplete: trainer_state.json cannot be read ({error})") from error
    write_model(checkpoint, folder)
    report = read_report(publish)
    facts = {
        "steps": step,
        "checkpoint_of": {"steps": report.run.steps} if step < report.run.steps else report.run.checkpoint_of,
        "tokens_seen": state.get("num_input_tokens_seen") or None,
        "flops": state.get("total_flos") or None,
        # the clock was not read at the checkpoint
        "wall_time_seconds": None,
    }
    kept = {
        part: [entry for entry in report[part] if entry.step is None or entry.step <= step]
        for part in ("metrics", "evaluations")
    }
    write_report({**report, **kept, "run": {**report.run, **facts}}, folder / "report.json")
    if (publish / "metrics").is_dir():
        shutil.copytree(publish / "metrics", folder / "metrics")
        _cut(folder / "metrics", step)
    draw_figures(folder)


def write_model(checkpoint: Path, folder: Path) -> None:
    """Write the model of a checkpoint, with its tokenizer, to `folder` as it is published.

    Raises:
        CheckpointError: the checkpoint is not complete.
    """
    model = load_model(checkpoint)
    try:
        tokenizer = AutoTokenizer.from_pretrained(checkpoint) if list(checkpoint.glob("tokenizer*")) else None
    # whatever transformers and tokenizers make of damaged files
    except Exception as error:
        raise CheckpointError(f"{checkpoint} is damaged: its tokenizer cannot be read ({error})") from error
    export(model, folder, tokenizer)


def _cut(metrics: Path, step: int) -> None:
    """Drop what was measured after `step` from the files of a metrics folder, and files in which nothing is left."""
    for path in sorted(metrics.iterdir()):
        try:
            left = _cut_rows(path, step) if path.suffix == ".parquet" else _cut_entries(path, step)
        # damaged: the numbers of the report are there all the same
        except Exception as error:
            logger.warning("%s cannot be read and is left out of step %d: %s", path.name, step, error)
            left = 0
        if not left:
            path.unlink()


def _cut_entries(path: Path, step: int) -> int:
    entries = [e for e in json.loads(path.read_text()) if e["step"] is None or e["step"] <= step]
    path.write_text(json.dumps(entries, indent=1) + "\n")
    return len(entries)


def _cut_rows(path: Path, step: int) -> int:
    rows = pd.read_parquet(path)
    if "step" in rows:
        rows = rows[rows["step"].isna() | (rows["step"] <= step)]
        rows.to_parquet(path, index=False)
    return len(rows)
