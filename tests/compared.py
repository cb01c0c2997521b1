"""Small runs to compare: reports that keep to the schema, with curves where a test wants them on disk."""

import copy
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from hf_lowrank.compare.frame import ComparedRun
from hf_lowrank.compare.table import Comparison
from hf_lowrank.report.io import metric_entry, validate_report, write_report

FULL = json.loads((Path(__file__).parent / "report" / "full_report.json").read_text())
LOSS = "validation_loss"
ON = {"evaluation_hash": "e1", "sequences": 32, "tokens": 8160}


def report(name: str, method: str = "galore", seed: int = 1, loss: float = 4.0, **run: Any) -> dict[str, Any]:
    """A run of 300 steps, measured at two of them; `run` replaces facts of the run."""
    made = copy.deepcopy(FULL)
    made["run"] |= {"name": name, "method": method, "method_config": {"r": 32}, **run}
    made["run"]["seeds"] = {"seed": seed, "data_seed": None}
    made["metrics"] = [
        metric_entry(metric, value, stderr=stderr, step=step, settings=settings, space=space)
        for step, more in ((150, 1.0), (300, 0.0))
        for metric, value, stderr, settings, space in (
            ("validation_loss", loss + more, 0.1, ON, None),
            ("landscape/random/sharpness", 0.01 * loss, 0.001, ON, "dense"),
            ("spectral/weight/stable_rank", 3 * loss + more, None, {"matrices": 28}, "dense"),
            ("spectral/update/stable_rank", loss, None, {"since": step - 150}, "dense"),
        )
    ]
    made["evaluations"] = [task("brackets", 0.5 + 0.01 * loss)]
    return made


def task(name: str, value: float | None, **more: Any) -> dict[str, Any]:
    fields = {"stderr": 0.02, "num_fewshot": 0, "limit": None, "step": 300, "task_version": 1.0}
    return {"task": name, "metric": "acc", "value": value, **fields, **more}


def runs(*reports: dict[str, Any]) -> list[ComparedRun]:
    return [compared(made["run"]["name"], made) for made in reports]


def compared(label: str, made: dict[str, Any], *tables: Any, **more: Any) -> ComparedRun:
    return ComparedRun(label, validate_report(made), *tables, **more)


def write_run(folder: Path, made: dict[str, Any], curves: bool = True) -> Path:
    """A run's folder as training and measuring leave it, without weights."""
    publish = folder / "publish"
    write_report(made, publish / "report.json")
    if curves:
        (publish / "metrics").mkdir()
        loss = made["metrics"][-4]["value"]
        steps = np.arange(10, 301, 10)
        pd.DataFrame({"step": steps, "loss": loss + 5 / steps, "eval_loss": loss}).to_parquet(
            publish / "metrics" / "training.parquet"
        )
        rows = [
            {
                "step": 300,
                "space": "dense",
                "subject": "random",
                "direction": d,
                "x": x,
                "loss": loss + (d + 1) * x * x,
            }
            for d in range(3)
            for x in (-0.1, 0.0, 0.1)
        ]
        pd.DataFrame(rows).to_parquet(publish / "metrics" / "landscape.parquet")
    return folder


# ---- what a comparison shows ----


def column(comparison: Comparison, name: str, distinct: str | None = None) -> int:
    """The only column of that name, or the one told apart by `distinct`."""
    found = [i for i, c in enumerate(comparison.columns) if c.name == name and distinct in (None, c.distinct)]
    assert len(found) == 1, [comparison.columns[i] for i in found]
    return found[0]


def cell(comparison: Comparison, row: int, at: int) -> pd.Series:
    return comparison.cells.loc[(row, at)]


def values(comparison: Comparison, at: int) -> list[float | None]:
    return comparison.pivot(lambda cell: None if math.isnan(cell.value) else cell.value)[at].tolist()


def said(comparison: Comparison, level: str = "conflict") -> str:
    return "\n".join(notice.line for notice in comparison.notices if notice.level == level)
