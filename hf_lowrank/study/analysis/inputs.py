"""The runs of a study and their numbers as two tidy frames, from which all analyses are made.

`runs` has one line a run: name, group, method, label, size, seed, order, role, rates_of, learning_rate, other_rate,
rank, and `why`: the reason it is left out, or nothing. Runs of one size that differ in their seed alone are a group,
named after its method. `numbers` has one line a number: run, kind, metric, space, way, peer, peer_name, step, place,
value, stderr. `place` is `end` for what speaks for the whole run, `matched` at the loss that all runs of its size
reach, and nothing for other steps. `way` is how it was measured, without the run at the other end: that is `peer`.
`layers` has the similarities of activations layer by layer.

What is comparable is decided by `hf_lowrank.report.comparability` alone.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from hf_lowrank.compare.frame import ComparedRun, collect
from hf_lowrank.compare.gather import Skipped, gather
from hf_lowrank.compare.matched import At, take
from hf_lowrank.report.comparability import PEER, Number, data_order, differences, settings_key
from hf_lowrank.report.markdown import one_line
from hf_lowrank.report.values import describe, format_count

__all__ = ["StudyData", "read_runs", "study_data"]

_LOSS = "validation_loss"
_BASELINE = "baseline"
# how a study calls its runs that are no results
_NO_RESULTS = ("tuning-", "calibration-")
_CELL = ("method", "seed", "size", "role")


@dataclass(frozen=True)
class StudyData:
    """Everything that the analyses see.

    Attributes:
        runs, numbers, layers: the frames that the module describes.
        reference: by size, the group with which the others are compared; a size without a full-rank run has none.
        notes: what readers must know of the runs, a sentence each.
    """

    runs: pd.DataFrame
    numbers: pd.DataFrame
    layers: pd.DataFrame
    reference: Mapping[str, str]
    notes: tuple[str, ...] = ()

    @property
    def sizes(self) -> list[str]:
        """In the order of the runs."""
        return list(dict.fromkeys(self.kept["size"]))

    @property
    def kept(self) -> pd.DataFrame:
        """The runs that take part."""
        return self.runs[self.runs["why"] == ""]

    def groups(self, size: str) -> list[str]:
        """The groups of a size, the reference first."""
        names = dict.fromkeys(self.kept.loc[self.kept["size"] == size, "group"])
        return sorted(names, key=lambda name: name != self.reference.get(size))

    def at(self, place: str, **values: Any) -> pd.DataFrame:
        """Numbers with a value at a place, with the columns of their runs; `values` are those of columns."""
        chosen = self.numbers[(self.numbers["place"] == place) & self.numbers["value"].notna()]
        columns = ["run", "group", "method", "label", "size", "seed", "order", "role"]
        chosen = chosen.merge(self.kept[columns], on="run")
        for name, value in values.items():
            chosen = chosen[chosen[name] == value]
        return chosen


# ---- reading ----


def read_runs(sources: Sequence[str | Path], token: str | None = None) -> tuple[StudyData, list[Skipped]]:
    """Read runs from run folders, folders of them, and Hub repositories; return them and what could not be read.

    Raises:
        ValueError: no run is left, or a study.json is damaged.
    """
    found: list[str] = []
    # of what each source says of its runs: two studies may have runs of one name
    cells: dict[str, dict[str, dict[str, Any]]] = {}
    for source in sources:
        folder = Path(source).expanduser()
        if not folder.is_dir():
            found.append(str(source))
            continue
        # a study's own folder holds more than its runs
        of_study = (folder / "study.json").is_file()
        inside = folder / "runs" if of_study and (folder / "runs").is_dir() else folder
        reports = [path.parent for path in sorted(inside.rglob("report.json"))]
        own = [each.parent if each.name == "publish" else each for each in reports]
        # a study tunes and calibrates with runs that are no results
        own = [each for each in own if not (of_study and each.name.startswith(_NO_RESULTS))]
        found += [str(each) for each in own] or [str(source)]
        cells |= dict.fromkeys(map(str, own), _cells(folder / "study.json"))
    gathered = gather(found, token=token)
    if not gathered.runs:
        reason = f": {gathered.skipped[0].source}: {gathered.skipped[0].reason}" if gathered.skipped else ""
        raise ValueError(f"no run to analyse: give run folders, a folder of runs or Hub repositories{reason}")
    given = []
    for run, source in zip(gathered.runs, gathered.sources, strict=True):
        names = [run.report.run.name, Path(source).name]
        said = cells.get(str(source), {})
        given.append(next((said[name] for name in names if name in said), {}))
    return study_data(gathered.runs, given), gathered.skipped


def _cells(path: Path) -> dict[str, dict[str, Any]]:
    """The cells of a study.json by name; none if there is no such file."""
    if not path.is_file():
        return {}
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        reference, study = record.get("reference"), record.get("study") or {}
        settings = {**(study.get("methods") or {}), **(study.get("controls") or {})}
        cells = {}
        for cell in record["cells"]:
            label = cell.get("label") or cell.get("method")
            said = dict(cell) | {"method": label, "rates_of": (settings.get(label) or {}).get("rates_of")}
            cells[str(cell["name"])] = said | ({"role": "reference"} if label and label == reference else {})
        return cells
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            f"{path}: not readable as a study's cells ({error!r}): delete it or let it write anew"
        ) from None


def study_data(given: Sequence[ComparedRun], cells: Sequence[Mapping[str, Any]] = ()) -> StudyData:
    """Return the frames of runs; `cells` are what a study.json says of each, in the same order."""
    cells = cells or [{}] * len(given)
    runs = pd.DataFrame([_facts(run, cell) for run, cell in zip(given, cells, strict=True)])
    runs.insert(0, "run", range(len(runs)))
    runs["why"] = [
        "a run of the search for rates" if role == "tuning" else _failure(run)
        for run, role in zip(given, runs["role"], strict=True)
    ]
    runs["group"] = _group_names(runs)
    reference = _references(runs)
    runs["why"] = _not_comparable(given, runs, reference)
    # one group has one number a seed
    repeated = runs["why"].eq("") & runs["seed"].notna() & runs.duplicated(["size", "group", "seed"])
    runs.loc[repeated, "why"] = "its seed is there already, and the same seed is no second sample"
    numbers, unmatched = _numbers(given, runs)
    notes = [f"{run.label}: {problem}" for run in given for problem in run.problems]
    notes += [f"{row.name} is left out: {row.why}" for row in runs[runs["why"] != ""].itertuples(index=False)]
    return StudyData(runs.drop(columns="key"), numbers, _layers(given, runs), reference, (*notes, *unmatched))


def _facts(run: ComparedRun, cell: Mapping[str, Any]) -> dict[str, Any]:
    ran = run.report.run
    said = {key: cell[key] for key in _CELL if cell.get(key) is not None}
    scale = ran.optimizer.other_lr_scale
    size = ran.model.size or f"{format_count(ran.model.parameters) or ''}".partition(" ")[0]
    rank = ran.method_config.get("r")
    return {
        "name": run.label,
        "own_name": one_line(ran.name),
        "method": one_line(ran.method),
        "label": one_line(said.get("method", ran.method)),
        "size": one_line(said.get("size", size)),
        "seed": said.get("seed", ran.seeds.seed),
        "order": data_order(run.report),
        "role": one_line(said.get("role", "")),
        "rates_of": one_line(cell.get("rates_of") or ""),
        "learning_rate": ran.learning_rate,
        "other_rate": None if ran.learning_rate is None else ran.learning_rate * (1.0 if scale is None else scale),
        "rank": rank if isinstance(rank, int) else None,
        "tokens": ran.tokens_seen,
        "key": settings_key(run.report),
    }


def _group_names(runs: pd.DataFrame) -> list[str]:
    """Name the groups of each size: by the study's label, else by method and the settings that tell them apart."""
    names: dict[tuple[Any, ...], str] = {}
    for (size, label), rows in runs[runs["why"] == ""].groupby(["size", "label"], sort=False):
        # the group of most runs has the plain name where words do not tell groups apart
        kinds = rows.assign(count=rows.groupby("key")["run"].transform("size")).drop_duplicates("key")
        told = [name for name in ("rank", "learning_rate", "other_rate") if kinds[name].nunique(dropna=False) > 1]
        taken: list[str] = []
        for row in kinds.sort_values("count", ascending=False, kind="stable").to_dict("records"):
            said = describe({name: row[name] for name in told if pd.notna(row[name])})
            name = f"{label} ({said})" if said else str(label)
            taken.append(name)
            names[size, label, row["key"]] = f"{name} #{taken.count(name)}" if taken.count(name) > 1 else name
    return [names.get((row["size"], row["label"], row["key"]), row["label"]) for row in runs.to_dict("records")]


def _references(runs: pd.DataFrame) -> dict[str, str]:
    """By size the group with which the others are compared.

    It is the one whose role says so, else a full-rank group: one with rates that no other method has, if there is one,
    of these the one of most seeds, of these the first.
    """
    found = {}
    for size, rows in runs[runs["why"] == ""].groupby("size", sort=False):
        named = rows[rows["role"].isin(("reference", _BASELINE))]
        plain = rows[(rows["method"] == "fullrank") & (rows["role"] != "control")]
        others = rows[rows["method"] != "fullrank"]
        theirs = set(zip(others["learning_rate"], others["other_rate"], strict=True))
        own = plain[[pair not in theirs for pair in zip(plain["learning_rate"], plain["other_rate"], strict=True)]]
        chosen = next((each for each in (named, own, plain) if len(each)), None)
        if chosen is not None:
            found[str(size)] = str(chosen.groupby("group", sort=False)["run"].size().idxmax())
    return found


def _not_comparable(given: Sequence[ComparedRun], runs: pd.DataFrame, reference: Mapping[str, str]) -> list[str]:
    """Why each run takes no part: what is said already, or in what it does not compare with the others of its size."""
    why = runs["why"].tolist()
    for size, rows in runs[runs["why"] == ""].groupby("size", sort=False):
        members = rows["run"].tolist()
        of_reference = [place for place, name in enumerate(rows["group"]) if name == reference.get(str(size))]
        for each in differences([given[index].report for index in members], next(iter(of_reference), None)):
            for index, odd, words in zip(members, each.odd, each.words, strict=True):
                if odd and each.level == "conflict":
                    why[index] = why[index] or f"not comparable in {each.fact.title.lower()} ({words})"
    return why


def _failure(run: ComparedRun) -> str:
    report = run.report
    if report.run.stopped_early:
        return f"stopped at step {report.run.steps_done:,} of {report.run.max_steps:,}"
    losses = [entry for entry in report.metrics if entry.name == _LOSS and entry.step is not None]
    losses = sorted(losses, key=lambda entry: entry.step or 0)
    if losses and losses[-1].value is None:
        return "diverged: its last validation loss is not finite"
    start = next((entry for entry in losses if entry.value is not None), None)
    if start is not None and start is not losses[-1] and (losses[-1].value or 0.0) > (start.value or 0.0):
        return f"diverged: its validation loss rose from {start.value:.4g} to {losses[-1].value:.4g}"
    return ""


# ---- numbers ----


def _numbers(given: Sequence[ComparedRun], runs: pd.DataFrame) -> tuple[pd.DataFrame, list[str]]:
    points = collect(given)
    lines = _tidy(points, runs, ["end" if column >= 0 else "" for column in points["column"]])
    notes = []
    for size, rows in runs[runs["why"] == ""].groupby("size", sort=False):
        taken, refused = _matched([given[index] for index in rows["run"]])
        notes += [f"{size}: {reason}" for reason in refused]
        if taken:
            points = collect(list(taken.values()))
            places = [rows["run"].iloc[list(taken)[at]] for at in points["run"]]
            points = points.assign(run=places)[(points["column"] >= 0) & (points["kind"] != "cost")]
            lines += _tidy(points, runs, ["matched"] * len(points))
    columns = ["run", "kind", "metric", "space", "way", "peer", "peer_name", "step", "place", "value", "stderr"]
    frame = pd.DataFrame(lines, columns=columns)
    return frame[frame["run"].isin(runs.loc[runs["why"] == "", "run"])].reset_index(drop=True), notes


def _matched(runs: Sequence[ComparedRun]) -> tuple[dict[int, ComparedRun], list[str]]:
    """Take runs at the worst of their final losses; those that never get there are named."""
    try:
        return dict(enumerate(take(runs, At("matched"))[0])), []
    except ValueError as error:
        whole = str(error)
    finals = [max((e for e in run.report.metrics if e.name == _LOSS and e.step is not None and e.value is not None),
                  key=lambda e: e.step or 0, default=None) for run in runs]  # fmt: skip
    values = [entry.value for entry in finals if entry is not None and entry.value is not None]
    if not values:
        return {}, ["nothing is taken at matched loss: no run has a validation loss by step"]
    loss = max(values)
    found: dict[int, ComparedRun] = {}
    refused = []
    reference = runs[[entry is not None and entry.value == loss for entry in finals].index(True)]
    for index, run in enumerate(runs):
        try:
            found[index] = take([run, reference], At("loss", loss))[0][0]
        except ValueError as error:
            refused.append(one_line(str(error).removeprefix(f"--at loss={loss:.10g}: ")))
    if len(found) < 2:
        return {}, [f"nothing is taken at matched loss: {one_line(whole.removeprefix('--at matched: '))}"]
    return found, [f"at matched loss ({loss:.4g}) a run is left out: {reason}" for reason in refused]


def _tidy(points: pd.DataFrame, runs: pd.DataFrame, places: Sequence[str]) -> list[dict[str, Any]]:
    lines = []
    peers: dict[tuple[str, int], int] = {}
    fields = zip(
        points["run"], points["number"], points["step"], points["value"], points["stderr"], places, strict=True
    )
    for run, number, step, value, stderr, place in fields:
        settings, peer_name = _without_peer(number)
        if peer_name and (peer_name, int(run)) not in peers:
            peers[peer_name, int(run)] = _peer(peer_name, int(run), runs)
        lines.append(
            {
                "run": int(run),
                "kind": number.kind,
                "metric": number.name,
                "space": number.space or "",
                "way": settings if number.comparable else f"unknown text of run {run}",
                "peer": peers.get((peer_name, int(run)), -1),
                "peer_name": peer_name,
                "step": step,
                "place": place,
                "value": value,
                "stderr": stderr,
            }
        )
    return lines


def _without_peer(number: Number) -> tuple[str, str]:
    """How a number was measured, without the run at its other end; and that run's name."""
    named = next((key for key in (PEER, _BASELINE) if key in number.settings), "")
    settings = {key: value for key, value in number.settings.items() if key != named and value not in (None, [], {})}
    if not named:
        settings |= {key: value for key, value in number.reference.items() if value is not None}
    return json.dumps(settings, sort_keys=True), one_line(number.settings[named]) if named else ""


def _peer(name: str, run: int, runs: pd.DataFrame) -> int:
    """The run of this name or folder, of the same size if several have it; -1 if there is none or it is not clear."""
    last = [part for part in name.split("/") if part not in ("", "publish")][-1:]
    for wanted in (name, *last):
        named = runs[(runs["own_name"] == wanted) | (runs["name"] == wanted)]
        same = named[named["size"] == runs["size"].iloc[run]]
        for rows in (named, same):
            if len(rows) == 1:
                return int(rows["run"].iloc[0])
    return -1


def _layers(given: Sequence[ComparedRun], runs: pd.DataFrame) -> pd.DataFrame:
    """Similarities of activations by run, peer, step and layer."""
    parts = []
    for index, run in enumerate(given):
        table = run.tables.get("activation")
        if table is None or table.empty or runs["why"].iloc[index]:
            continue
        peers = {name: _peer(one_line(name), index, runs) for name in table["baseline"].unique()}
        named = [name for name in table if name.startswith("activation/") and not name.endswith("_stderr")]
        parts.append(table[["step", "layer", *named]].assign(run=index, peer=table["baseline"].map(peers)))
    if not parts:
        return pd.DataFrame(columns=["run", "peer", "step", "layer"])
    return pd.concat(parts, ignore_index=True)
