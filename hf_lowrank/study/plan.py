"""From a study's file to its runs: every method at every size with every seed, at given or tuned learning rates."""

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import yaml

from hf_lowrank.study.search import RULE, Grid, Point, Search, search
from hf_lowrank.study.spec import Study

__all__ = ["Cell", "Pair", "Plan", "check_cells", "make_plan", "plan_record", "recipe_words", "tuning_cell"]

# settings of a run in the order of the recipe's flags
Overrides = dict[str, Any]
# a tuned method -> the final losses of the points that are known
Losses = Mapping[str, Mapping[Point, float]]


@dataclass(frozen=True)
class Cell:
    """A run of the study.

    Attributes:
        name: of its folder in runs/.
        method: the recipe's name.
        label: the method's name in the study.
        overrides: flags of the recipe, but for those that follow from the other fields.
        saved: steps of its checkpoints.
    """

    name: str
    method: str
    label: str
    size: str
    seed: int
    role: Literal["tuning", "run", "control"]
    steps: int
    saved: tuple[int, ...]
    overrides: Overrides = field(default_factory=dict, hash=False)


@dataclass(frozen=True)
class Pair:
    """Runs between whose last checkpoints barriers are measured, each with each.

    Attributes:
        kind: whether they differ in the method or in the seed.
    """

    name: str
    kind: Literal["methods", "seeds"]
    size: str
    runs: tuple[str, ...]


@dataclass(frozen=True)
class Plan:
    """The runs of a study.

    Attributes:
        cells: seed by seed, size by size, the reference first. A method whose search has not ended has the runs
            that it will have, without their rates.
        waiting: methods whose rates are not known yet, and those that take theirs.
        searches: state of each search, by method.
        grids: of the searches.
        points: how many points of each search are known.
    """

    study: Study
    cells: tuple[Cell, ...]
    pairs: tuple[Pair, ...]
    waiting: frozenset[str]
    searches: dict[str, Search]
    grids: dict[str, Grid]
    points: dict[str, int]

    def cell(self, name: str) -> Cell:
        """A run by its name."""
        return next(cell for cell in self.cells if cell.name == name)

    def baseline(self, cell: Cell) -> Cell | None:
        """The run that a run is compared with: the reference's of the same size and seed.

        The reference itself is compared with its own run of the seed before. The earlier runs' baselines stay what
        they are when the study gets more seeds.
        """
        seed: int | None = cell.seed
        if cell.label == self.study.reference:
            seeds = self.study.method(cell.label).seeds or self.study.seeds
            at = seeds.index(cell.seed)
            seed = seeds[at - 1] if at else None
        wanted = (self.study.reference, cell.size, seed)
        return next((c for c in self.cells if (c.label, c.size, c.seed) == wanted), None)


def make_plan(study: Study, recipes: Path, losses: Losses | None = None) -> Plan:
    """The runs of a study, given what is known of its searches.

    Args:
        recipes: folder that holds configs/.
        losses: of the points that are known; one that is not finite diverged.
    """
    tuning, losses = study.tuning, losses or {}
    starts = {} if tuning is None else tuning.starts
    grids = {label: Grid(start[0], start[1], tuning.ratio) for label, start in starts.items() if tuning is not None}
    searches = {label: search(losses.get(label, {}), tuning.limit) for label in grids if tuning is not None}
    cells, waiting = [], set()
    seeds = list(dict.fromkeys(seed for label in study.labels for seed in study.method(label).seeds or study.seeds))
    for seed in seeds:
        for size in study.sizes:
            for label in study.labels:
                if seed not in (study.method(label).seeds or study.seeds):
                    continue
                rates = _rates(study, recipes, label, size, grids, searches)
                if rates is None:
                    waiting.add(label)
                cells.append(_cell(study, label, size, seed, rates or {}))
    points = {label: len(losses.get(label, {})) for label in grids}
    return Plan(study, tuple(cells), tuple(_pairs(study, cells)), frozenset(waiting), searches, grids, points)


def _cell(study: Study, label: str, size: str, seed: int, rates: Overrides) -> Cell:
    method = study.method(label)
    settings = {**study.settings, **method.settings, **method.sizes.get(size, {}), **rates}
    role: Any = "control" if label in study.controls else "run"
    steps, saved = study.steps_at(size), tuple(study.saved_steps(size))
    return Cell(f"{size}-{label}-s{seed}", study.recipe(label), label, size, seed, role, steps, saved, settings)


def tuning_cell(plan: Plan, label: str, point: Point) -> Cell:
    """The run of a point of a search; it keeps one checkpoint, to go on from."""
    study = plan.study
    assert study.tuning is not None
    size, seed = study.tuning.size, study.tuning.seed
    rate, scale = plan.grids[label].settings(point)
    cell = _cell(study, label, size, seed, {"learning_rate": rate, "other_lr_scale": scale})
    name = f"tuning-{size}-{label}-{point[0]}_{point[1]}"
    return Cell(
        name, cell.method, label, size, seed, "tuning", cell.steps, cell.saved,
        {**cell.overrides, "save_total_limit": 1},
    )  # fmt: skip


def _rates(
    study: Study, recipes: Path, label: str, size: str, grids: dict[str, Grid], searches: dict[str, Search]
) -> Overrides | None:
    """The learning rates of a method where they are not its settings or its recipe's; None while they are searched."""
    source = study.method(label).rates_of or label
    if source in searches and size in study.tuned_sizes():
        state = searches[source]
        if state.coming or not math.isfinite(state.loss):
            return None
        return dict(zip(("learning_rate", "other_lr_scale"), grids[source].settings(state.best), strict=True))
    if source == label:
        return {}
    method = study.method(source)
    recipe = _recipe(recipes, size, study.recipe(source))
    settings = {**recipe, **study.settings, **method.settings, **method.sizes.get(size, {})}
    if "learning_rate" not in settings:
        raise ValueError(f"rates_of of {label}: neither {source}'s settings nor its recipe has a learning_rate")
    return {"learning_rate": float(settings["learning_rate"]), "other_lr_scale": settings.get("other_lr_scale", 1.0)}


def recipe_file(recipes: Path, size: str, recipe: str) -> Path:
    """The YAML file of a recipe; `ValueError` if there is none."""
    path = recipes / "configs" / size / f"{recipe}.yaml"
    if not path.is_file():
        known = sorted(file.stem for file in path.parent.glob("*.yaml"))
        if known:
            raise ValueError(f"{recipe}: no recipe of the size {size}; there are {', '.join(known)}")
        sizes = sorted(folder.name for folder in (recipes / "configs").glob("*"))
        raise ValueError(f"sizes: {recipes / 'configs'} has no {size}, but {', '.join(sizes) or 'nothing'}")
    return path


def _recipe(recipes: Path, size: str, recipe: str) -> dict[str, Any]:
    return dict(yaml.safe_load(recipe_file(recipes, size, recipe).read_text(encoding="utf-8")))


def _pairs(study: Study, cells: list[Cell]) -> list[Pair]:
    """Where barriers between runs are measured."""
    barriers, pairs = study.barriers, []
    if barriers is None:
        return []
    sizes = barriers.sizes or study.sizes
    for size in sizes:
        here = [cell for cell in cells if cell.size == size]
        for seed in dict.fromkeys(cell.seed for cell in here):
            among = tuple(cell.name for cell in here if cell.seed == seed and cell.label in barriers.methods)
            pairs.append(Pair(f"pair-{size}-methods-s{seed}", "methods", size, among))
        for label in barriers.seeds:
            among = tuple(cell.name for cell in here if cell.label == label)
            pairs.append(Pair(f"pair-{size}-seeds-{label}", "seeds", size, among))
    return [pair for pair in pairs if len(pair.runs) > 1]


def recipe_words(cell: Cell, recipes: Path) -> list[str]:
    """A run's YAML file and flags, without those that say where it lies."""
    every = cell.saved[0]
    values = {
        **cell.overrides, "max_steps": cell.steps, "seed": cell.seed, "data_seed": cell.seed,
        "save_strategy": "steps", "save_steps": every, "eval_strategy": "steps", "eval_steps": every,
        "metrics": "none",
    }  # fmt: skip
    words = [str(recipe_file(recipes, cell.size, cell.method))]
    for key, value in values.items():
        listed = value if isinstance(value, list) else [value]
        words += [f"--{key}", *(_word(item) for item in listed)]
    return words


def _word(value: Any) -> str:
    return json.dumps(value) if isinstance(value, dict | bool) else str(value)


def check_cells(plan: Plan, recipes: Path, tokens: Callable[[Cell, list[str]], int]) -> dict[str, int]:
    """Tokens of each run, by its name.

    Args:
        tokens: reads a recipe's command line strictly, and gives the tokens of an optimizer step.

    Raises:
        ValueError: a setting is unknown or makes no sense; the message names the run.
    """
    by_settings: dict[str, int] = {}
    counted = {}
    for cell in plan.cells:
        # a seed changes nothing that could be wrong
        key = f"{cell.size}/{cell.label}"
        if key not in by_settings:
            try:
                by_settings[key] = tokens(cell, recipe_words(cell, recipes))
            except ValueError as error:
                raise ValueError(f"{cell.label} at the size {cell.size}: {error}") from error
        counted[cell.name] = cell.steps * by_settings[key]
    return counted


def plan_record(plan: Plan) -> dict[str, Any]:
    """What study.json holds."""
    study, tuning = plan.study, plan.study.tuning
    cells = [
        {**asdict(cell), "saved": list(cell.saved), **_baseline_of(plan, cell)}
        for cell in plan.cells
        if cell.label not in plan.waiting
    ]
    cells += [{**asdict(pair), "role": "pair", "runs": list(pair.runs)} for pair in plan.pairs]
    record: dict[str, Any] = {"title": study.title, "reference": study.reference, "cells": cells}
    if tuning is not None:
        searches = {}
        for label, state in plan.searches.items():
            rate, scale = plan.grids[label].settings(state.best)
            searches[label] = {
                "start": tuning.starts[label], "learning_rate": rate, "other_lr_scale": scale,
                "validation_loss": state.loss if math.isfinite(state.loss) else None,
                "points": plan.points[label], "ended": not state.coming, "bracketed": state.bracketed,
            }  # fmt: skip
        record["tuning"] = {
            "rule": RULE, "size": tuning.size, "seed": tuning.seed, "ratio": tuning.ratio, "searches": searches,
        }  # fmt: skip
    record["study"] = study.model_dump()
    return record


def _baseline_of(plan: Plan, cell: Cell) -> dict[str, str | None]:
    baseline = plan.baseline(cell)
    return {"baseline": None if baseline is None else baseline.name}
