"""A study of simulated runs with known answers: reports as a run and `hf-lowrank measure` publish them."""

import copy
from typing import Any

import numpy as np
import pandas as pd
from compared import FULL, ON

from hf_lowrank.compare.frame import ComparedRun
from hf_lowrank.report.io import metric_entry, validate_report

STEPS = (100, 200, 300)
LAYERS = 4
RANDOM = {**ON, "directions": 8, "radius": 0.003}
# group -> method, learning rate, rank, and what is planted: loss, sharpness along random and top directions
GROUPS: dict[str, tuple[str, float, int | None, tuple[float, float, float]]] = {
    "fullrank": ("fullrank", 1e-3, None, (0.0, 0.0, 0.0)),
    "galore": ("galore", 1e-2, 32, (0.3, -0.004, 0.05)),
    "sltrain": ("sltrain", 3e-3, 32, (0.0, -0.004, 0.05)),
    "fullrank-galore-rates": ("fullrank", 1e-2, None, (0.1, 0.0, 0.0)),
}


class Simulated:
    """A study's runs; every number is `base + planted + seed's effect + noise`.

    Args:
        sizes, seeds: of the study.
        groups: as `GROUPS`.
        apart: how much higher barriers between methods are than between seeds.
        drift: how much more a method's CKA falls with depth than another seed's.
        helps: how much the random directions' sharpness moves the scores, in its standard deviations.
    """

    def __init__(
        self,
        sizes: tuple[str, ...] = ("small",),
        seeds: tuple[int, ...] = (1, 2, 3, 4),
        groups: dict[str, Any] = GROUPS,
        *,
        apart: float = 0.0,
        drift: float = 0.0,
        helps: float = 0.0,
        seed: int = 0,
    ) -> None:
        self.rng = np.random.default_rng(seed)
        self.cells = [
            {"name": f"{group}-{size}-s{s}", "method": group, "seed": s, "size": size, "role": _role(group)}
            for size in sizes
            for group in groups
            for s in seeds
        ]
        self.groups, self.apart, self.drift, self.helps = groups, apart, drift, helps
        self.of_seed = {s: float(self.rng.normal(0, 0.3)) for s in seeds}
        self.of_run = {cell["name"]: float(self.rng.normal(0, 0.05)) for cell in self.cells}
        self.reports = {cell["name"]: self._report(cell) for cell in self.cells}
        self.tables = {cell["name"]: self._tables(cell) for cell in self.cells}

    def runs(self) -> list[ComparedRun]:
        """All runs, as a comparison reads them."""
        return [
            ComparedRun(name, validate_report(report), self.tables.get(name, {}))
            for name, report in self.reports.items()
        ]

    def _report(self, cell: dict[str, Any]) -> dict[str, Any]:
        name, group, seed = cell["name"], cell["method"], cell["seed"]
        method, rate, rank, (loss, random, top) = self.groups[group]
        made = copy.deepcopy(FULL)
        made["run"] |= {
            "name": name,
            "method": method,
            "method_config": {} if rank is None else {"r": rank},
            "learning_rate": rate,
        }
        made["run"]["seeds"] = {"seed": seed, "data_seed": None}
        made["run"]["model"] = {**made["run"]["model"], "size": cell["size"]}
        made["evaluations"], made["baseline"] = [], None
        metrics = []
        for step in STEPS:
            end = 4.0 + loss + self.of_seed[seed] + self._noise(0.02)
            sharp = 0.01 + random + self._noise(0.0005)
            numbers = [
                ("validation_loss", end + 2.0 * (STEPS[-1] - step) / 200, ON, None),
                ("landscape/random/sharpness", sharp, {**RANDOM, "normalize": "none"}, "dense"),
                # normalised, the two kinds of method change places
                (
                    "landscape/random/sharpness",
                    0.02 - 2 * random + self._noise(0.0005),
                    {**RANDOM, "normalize": "filter"},
                    "dense",
                ),
                ("landscape/svd_1/sharpness", 0.2 + top + self._noise(0.002), ON, "dense"),
                ("spectral/weight/stable_rank", 12 + self._noise(0.3), {"average": "mean"}, "dense"),
                ("curvature/trace", 900 + self._noise(20.0), ON, "dense"),
            ]
            metrics += [
                metric_entry(metric, value, stderr=None, step=step, settings=settings, space=space)
                for metric, value, settings, space in numbers
            ]
        made["metrics"] = metrics + self._barriers(cell)
        right = 0.5 - 0.1 * (end - 4) + 0.02 * self.helps * (sharp - 0.01) / 0.002 + self._noise(0.005)
        for task in ("brackets", "quotes"):
            fields = {"stderr": 0.02, "num_fewshot": 0, "limit": None, "step": STEPS[-1], "task_version": 1.0}
            value = right + self._noise(0.005)
            made["evaluations"].append({"task": task, "metric": "acc", "value": value, **fields})
        return made

    def _barriers(self, cell: dict[str, Any]) -> list[dict[str, Any]]:
        """To the runs that come before it: other methods of its seed, other seeds of its method."""
        entries = []
        for other in self.cells[: self.cells.index(cell)]:
            if other["size"] != cell["size"] or (other["seed"] != cell["seed"]) == (other["method"] != cell["method"]):
                continue
            subject = "cross_seed" if other["method"] == cell["method"] else "cross_method"
            about = {"other_method": self.groups[other["method"]][0], "other_seed": other["seed"]}
            for aligned in ("", "_aligned"):
                value = 0.5 + self.of_run[cell["name"]] + self.of_run[other["name"]] + self._noise(0.02)
                value += self.apart if subject == "cross_method" else 0.0
                for key, more in (("barrier", 0.1), ("barrier_chord", 0.0)):
                    entries.append(
                        metric_entry(
                            f"interpolation/{subject}{aligned}/{key}", value + more, stderr=0.01, step=STEPS[-1],
                            settings={**ON, "other": other["name"]}, space="dense",
                            reference={"other_step": STEPS[-1]}, about=about,
                        )
                    )  # fmt: skip
        return entries

    def _tables(self, cell: dict[str, Any]) -> dict[str, pd.DataFrame]:
        """Similarities to full-rank of the same seed; of full-rank itself, to the other seeds."""
        rows = []
        for other in self.cells:
            same = other["seed"] == cell["seed"]
            if (
                other["method"] != "fullrank"
                or other["size"] != cell["size"]
                or same == (cell["method"] == "fullrank")
            ):
                continue
            slope = 0.2 + (0 if cell["method"] == "fullrank" else self.drift)
            slope += 0.2 * (self.of_run[cell["name"]] + self.of_run[other["name"]])
            for step in STEPS:
                for layer in range(LAYERS + 1):
                    cka = 0.95 - slope * layer / LAYERS + self._noise(0.005)
                    rows.append({"step": step, "layer": layer, "baseline": other["name"], "baseline_step": step,
                                 "activation/cka": cka, "activation/cka_stderr": 0.01})  # fmt: skip
        return {"activation": pd.DataFrame(rows)} if rows else {}

    def _noise(self, spread: float) -> float:
        return float(self.rng.normal(0, spread))


def _role(group: str) -> str:
    return "reference" if group == "fullrank" else "control" if group.startswith("fullrank") else "method"
