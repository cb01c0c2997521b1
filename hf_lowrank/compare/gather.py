"""The runs of a comparison: reports and curves from folders and from the Hub, without their weights."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow
import pyarrow.parquet as pq

from hf_lowrank.compare.charts import charts
from hf_lowrank.compare.frame import ComparedRun, collect
from hf_lowrank.compare.table import compare
from hf_lowrank.figures.tables import read_table, table_up_to
from hf_lowrank.hub.fetch import fetch
from hf_lowrank.hub.listing import Listed, fetch_listed
from hf_lowrank.report.catalogue import tables as catalogued_tables
from hf_lowrank.report.evidence import Kept
from hf_lowrank.report.io import read_report
from hf_lowrank.report.items import TEXTS
from hf_lowrank.report.markdown import one_line

__all__ = ["Gathered", "Skipped", "gather", "read_curves"]

_WANTED = ["report.json", "metrics/*.parquet"]
_LONGEST_NAME = 60  # characters of a run's name in a table
_MOST_SERIES = 2000  # metrics, each in every setting, of a stranger's report
# a parquet file of kilobytes can unpack to terabytes
_MOST_ROWS = 2_000_000
_MOST_BYTES = 512 * 2**20
_LONGEST_TEXT = 1000  # characters of a name; repeated names are stored once and unpacked in every row


@dataclass(frozen=True)
class Skipped:
    """A run that could not be compared, and why, on one line."""

    source: str
    reason: str


@dataclass
class Gathered:
    """Runs with different labels, their sources in the same order, and the runs that were left out.

    `skipped` runs were asked for by name, `passed_over` ones were listed by the Hub, `twice` were given twice.
    """

    runs: list[ComparedRun] = field(default_factory=list)
    sources: list[str] = field(default_factory=list)
    skipped: list[Skipped] = field(default_factory=list)
    passed_over: list[Skipped] = field(default_factory=list)
    twice: list[str] = field(default_factory=list)

    def index(self, name: str) -> int | None:
        """Return the index of the only run with this source, label or own name, or None."""
        for names in (self.sources, [run.label for run in self.runs], [_name(run.report) for run in self.runs]):
            if names.count(name) == 1:
                return names.index(name)
        return None


def gather(sources: Sequence[str], listed: Sequence[Listed] = (), token: str | None = None) -> Gathered:
    """Read the given runs, then the listed ones; a source that cannot be read is skipped with its reason.

    Args:
        sources: run folders, published folders, folders with a report.json, `user/name`, `user/name@revision`.
        listed: repositories that the Hub lists; one is passed over if its files raise any error.
        token: of the Hub.
    """
    gathered = Gathered()
    seen: set[str] = set()
    for source in sources:
        try:
            run, identity = _given(source, token)
        except (ValueError, OSError) as error:
            gathered.skipped.append(Skipped(source, one_line(error)))
            continue
        _keep(gathered, run, source, identity, seen)
    for repo in listed:
        try:
            folder, problems = fetch_listed(repo, token)
            run = _read(folder, repo.repo_id, problems)
            if (count := collect([run])["series"].nunique()) > _MOST_SERIES:
                raise ValueError(f"its report has {count:,} metrics, more than any real one")
            charts(compare([run]))
        # anybody can list a repository under the tag: no file in it may stop the comparison of the others
        except Exception as error:
            gathered.passed_over.append(Skipped(repo.repo_id, one_line(error) or type(error).__name__))
            continue
        _keep(gathered, run, repo.repo_id, repo.repo_id, seen)
    labels = _labels(gathered.runs, gathered.sources)
    gathered.runs = [replace(run, label=label) for run, label in zip(gathered.runs, labels, strict=True)]
    return gathered


def _given(source: str, token: str | None) -> tuple[ComparedRun, str]:
    """Return a run and an identity that shows whether it was given before."""
    path = Path(source).expanduser()
    local = path.parent if path.name == "report.json" and path.is_file() else path
    if local.is_dir():
        folder = fetch(local)
        return _read(folder, None), str(folder.resolve())
    return _read(fetch(source, token=token, allow_patterns=_WANTED), source), source.removesuffix("@main")


def _read(folder: Path, repo: str | None, problems: Sequence[str] = ()) -> ComparedRun:
    if not (folder / "report.json").is_file():
        if repo is not None:
            raise FileNotFoundError(f"{repo} has no report.json: it was not published by hf_lowrank")
        raise FileNotFoundError(f"no report.json in {folder}: `hf-lowrank measure` writes one for any Trainer's run")
    report = read_report(folder)
    tables, broken = read_curves(folder / "metrics")
    tables = {name: table_up_to(report.run.last_step(), name, table) for name, table in tables.items()}
    kept = Kept.read(folder / "metrics", check=_check_items)
    return ComparedRun(_name(report), report, tables, repo, [*problems, *broken, *kept.problems], kept)


def _keep(gathered: Gathered, run: ComparedRun, source: str, identity: str, seen: set[str]) -> None:
    if identity in seen:
        gathered.twice.append(source)
        return
    seen.add(identity)
    gathered.runs.append(run)
    gathered.sources.append(source)


def _name(report: Any) -> str:
    name = one_line(report["run"]["name"]) or "unnamed run"
    return name if len(name) <= _LONGEST_NAME else f"{name[: _LONGEST_NAME - 1]}…"


def _labels(runs: Sequence[ComparedRun], sources: Sequence[str]) -> list[str]:
    """Return different labels: a run's name, followed by the end of its source if other runs have the name too."""
    names = [run.label for run in runs]
    parts = [[part for part in one_line(source).split("/") if part not in (".", "", "publish")] for source in sources]
    labels = list(names)
    for length in range(1, max(map(len, parts), default=0) + 1):
        shared = Counter(labels)
        for index, label in enumerate(labels):
            if shared[label] > 1:
                labels[index] = f"{names[index]} ({'/'.join(parts[index][-length:])})"
    seen = Counter[str]()
    total = Counter(labels)
    for index, label in enumerate(labels):
        seen[label] += 1
        if total[label] > 1:
            labels[index] = f"{label} #{seen[label]}"
    return labels


def read_curves(metrics: Path) -> tuple[dict[str, pd.DataFrame], list[str]]:
    """Return the tables in a `metrics` folder, and what is wrong with those that cannot be used.

    A run is compared without a table that is broken, of another form or unreasonably large.
    """
    tables, problems = {}, []
    for name, form in catalogued_tables().items():
        path = metrics / f"{name}.parquet"
        if not path.is_file():
            continue
        try:
            _check_size(path)
            tables[name] = read_table(path, form)
        # pyarrow raises errors of its own as well for files that are damaged or made up
        except (ValueError, OSError, pyarrow.ArrowException, OverflowError, MemoryError) as error:
            reason = " ".join(str(error).replace(str(path), path.name).split())
            problems.append(f"its curves in {path.name} are left out: {reason[:200]}")
    return tables, problems


def _check_items(path: Path) -> None:
    # what items were asked and answered is not read, and may be long
    _check_size(path, unread=TEXTS)


def _check_size(path: Path, unread: Sequence[str] = ()) -> None:
    """Raise `ValueError` if a file would not fit into memory or is no table of metrics."""
    with pq.ParquetFile(path) as file:
        if file.metadata.num_rows > _MOST_ROWS:
            raise ValueError(f"{file.metadata.num_rows:,} rows, more than {_MOST_ROWS:,}")
        groups = [file.metadata.row_group(index) for index in range(file.metadata.num_row_groups)]
        size = sum(group.total_byte_size for group in groups)
        if size > _MOST_BYTES:
            raise ValueError(f"{size:,} bytes unpacked, more than {_MOST_BYTES:,}")
        schema = [column for column in file.schema_arrow if column.name not in unread]
    texts = [column.name for column in schema if _is_text(column.type)]
    for column in schema:
        if pyarrow.types.is_nested(column.type) or pyarrow.types.is_binary(column.type):
            raise ValueError(f"column {column.name[:80]} holds {str(column.type)[:80]} and neither numbers nor names")
    with pq.ParquetFile(path, read_dictionary=texts) as file:
        for chunk in (chunk for name in texts for chunk in file.read(columns=[name]).column(0).chunks):
            if any(len(str(value)) > _LONGEST_TEXT for value in chunk.dictionary.to_pylist()):
                raise ValueError(f"a name is longer than {_LONGEST_TEXT:,} characters")


def _is_text(kind: pyarrow.DataType) -> bool:
    plain = kind.value_type if pyarrow.types.is_dictionary(kind) else kind
    return bool(pyarrow.types.is_string(plain) or pyarrow.types.is_large_string(plain))
