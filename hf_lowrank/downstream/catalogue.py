"""Which tasks there are: names, wildcards, tags and groups of the harness, our own folder and the user's.

The harness's own folder holds more than ten thousand task files, which take seconds to read: they are read when a name
is not found without them.
"""

import fnmatch
import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import datasets
from datasets.exceptions import DatasetNotFoundError
from huggingface_hub import constants
from huggingface_hub.errors import LocalEntryNotFoundError, OfflineModeIsEnabled
from lm_eval.api.group import Group
from lm_eval.api.task import Task
from lm_eval.tasks import TaskManager
from lm_eval.tasks._index import Entry, Kind
from lm_eval.tasks._yaml_loader import load_yaml

from hf_lowrank.downstream.quick.generate import TASKS
from hf_lowrank.methods.base import nearest

__all__ = [
    "Loaded", "TaskError", "find_tasks", "leaves", "load_tasks", "offline", "short", "task_digest",
]  # fmt: skip

# what a task is made of beside its YAML file; logs and the like may lie there too
_DEFINING = {".py", ".json", ".jsonl", ".csv", ".tsv", ".txt", ".parquet", ".arrow", ".gz", ".zst"}
# an error's text in one line of a terminal or a log
_SHOWN = 300


class TaskError(ValueError):
    """A task that cannot be evaluated; the message names it and the way out.

    Attributes:
        unreachable: whether it is the network that is missing.
    """

    unreachable = False


@dataclass(frozen=True)
class Loaded:
    """A task or group with its data.

    Attributes:
        name: as it was asked for.
        tasks: the tasks in it, by name; itself for a task.
        groups: the group and the groups in it.
    """

    name: str
    tasks: dict[str, Task]
    groups: tuple[Group, ...]


def find_tasks(words: Sequence[str], include: Sequence[Path] = ()) -> tuple[TaskManager, list[str]]:
    """The tasks and groups that names stand for, in their order and without those that a group among them holds.

    Args:
        words: names of tasks, groups and tags, with `*` and `?` as in the harness.
        include: folders of tasks beside the harness's and ours; what is found there comes first.

    Raises:
        ValueError: a name is not known, also one that a group lists, or a folder is not there.
    """
    for folder in include:
        if not folder.is_dir():
            raise ValueError(
                f"--include-path {folder}: there is no such folder; give one with the YAML files of tasks"
            )
    folders = tuple(dict.fromkeys((TASKS, *include)))
    manager = _manager(folders, False)
    if any(set(word) & set("*?[") for word in words) or not all(_is_whole(manager, word) for word in words):
        manager = _manager(folders, True)
    found: dict[str, None] = {}
    for word in words:
        names = sorted(fnmatch.filter(manager.all_tasks, word))
        if not names:
            raise ValueError(f"no task '{word}'{nearest(word, manager.all_tasks)}{_unread(include)}")
        for name in names:
            entry = manager.task_index[name]
            found |= dict.fromkeys(sorted(entry.tags) if entry.kind is Kind.TAG else [name])
    _check_members(manager, found)
    held = {inner for name in found for inner in _entries(manager, name) if inner != name}
    return manager, [name for name in found if name not in held]


@cache
def _manager(folders: tuple[Path, ...], defaults: bool) -> TaskManager:
    return TaskManager(include_path=[str(folder) for folder in folders], include_defaults=defaults)


def _is_whole(manager: TaskManager, name: str) -> bool:
    """Whether a name and everything it refers to is known without the harness's own folder."""
    return name in manager.task_index and None not in _entries(manager, name).values()


def _unread(include: Sequence[Path]) -> str:
    """Names a file of the user's folders that the harness passes over in silence since it cannot read it."""
    for path in (path for folder in include for path in sorted(folder.glob("**/*.yaml"))):
        try:
            load_yaml(path, resolve_func=False)
        # whatever YAML and the harness find wrong with it
        except Exception as error:
            return f"; {path} cannot be read: {short(error)}"
    return ": hf-lowrank lm-eval ls tasks lists all, --include-path adds a folder of your own"


def _entries(manager: TaskManager, name: str) -> dict[str, Entry | None]:
    """A task, or a group and everything in it, by name; None for what is not in the index."""
    found: dict[str, Entry | None] = {}
    waiting = [name]
    while waiting:
        name = waiting.pop(0)
        if name in found:
            continue
        entry = found[name] = manager.task_index.get(name)
        if entry is not None and entry.kind is Kind.TAG:
            waiting += sorted(entry.tags)
        elif entry is not None and entry.kind is Kind.GROUP:
            waiting += _members((entry.cfg or {}).get("task"))
    return found


def _check_members(manager: TaskManager, names: Iterable[str]) -> None:
    """Refuse a group that lists a name of nothing, of which the harness makes a task without data."""
    for group in dict.fromkeys(inner for name in names for inner in _entries(manager, name)):
        entry = manager.task_index.get(group)
        listed = (entry.cfg or {}).get("task") if entry is not None and entry.kind is Kind.GROUP else None
        for member in listed if isinstance(listed, list) else []:
            if isinstance(member, str) and member not in manager.task_index:
                raise ValueError(f"group '{group}': no task '{member}'{nearest(member, manager.all_tasks)}")


def _members(listed: Any) -> list[str]:
    """Names in a group's list, whose items are names, tasks with changes, or groups defined in place."""
    names = []
    for item in listed if isinstance(listed, list) else [listed]:
        if isinstance(item, dict) and isinstance(item.get("task"), list):
            names += _members(item["task"])
        elif isinstance(item, dict):
            names.append(str(item.get("task") or item.get("group")))
        elif item is not None:
            names.append(str(item))
    return names


def leaves(manager: TaskManager, name: str) -> list[str]:
    """The tasks in a group, or the task itself; what a group defines in place is known only once it is loaded."""
    entries = _entries(manager, name)
    return [n for n, entry in entries.items() if entry is not None and entry.kind in (Kind.TASK, Kind.PY_TASK)]


def task_digest(manager: TaskManager, name: str) -> str:
    """SHA-256 (hex) of everything on this disk that defines a task or group: settings, code, local data.

    Nothing is loaded for it, so that what is done can be told without the network.
    """
    entries = _entries(manager, name)
    configs = {n: None if entry is None else entry.cfg for n, entry in entries.items()}
    digest = hashlib.sha256(json.dumps(configs, sort_keys=True, default=str).encode())
    folders = {Path(entry.yaml_path).parent for entry in entries.values() if entry is not None and entry.yaml_path}
    beside = {p for folder in folders for p in folder.iterdir() if p.is_file() and p.suffix in _DEFINING}
    named = {p for config in configs.values() for p in _data_files((config or {}).get("dataset_kwargs"))}
    for path in sorted(beside | named):
        digest.update(path.name.encode())
        digest.update(_file_digest(path, path.stat().st_mtime_ns))
    return digest.hexdigest()


@cache
def _file_digest(path: Path, changed: int) -> bytes:
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").digest()


def _data_files(value: Any) -> Iterator[Path]:
    """The local files that a task's data set is made of."""
    if isinstance(value, dict):
        for item in value.values():
            yield from _data_files(item)
    elif isinstance(value, list):
        for item in value:
            yield from _data_files(item)
    # `os.path` takes an address of any length, which `Path` refuses
    elif isinstance(value, str) and os.path.isfile(value):
        yield Path(value)


def load_tasks(manager: TaskManager, name: str) -> Loaded:
    """A task or group with its data.

    Raises:
        TaskError: it cannot be loaded, because its data cannot be reached for example.
    """
    try:
        found = manager.load([name])
    # other people's code, data and servers
    except Exception as error:
        failure = TaskError(_explained(manager, name, error))
        failure.unreachable = _is_unreachable(error)
        raise failure from error
    return Loaded(name, dict(found["tasks"]), tuple(found.get("groups", {}).values()))


def _explained(manager: TaskManager, name: str, error: Exception) -> str:
    configs = [dict(entry.cfg or {}) for entry in _entries(manager, name).values() if entry is not None]
    data = sorted({str(config["dataset_path"]) for config in configs if config.get("dataset_path")})
    named = ", ".join(data[:3]) + (", ..." if len(data) > 3 else "") if data else "that it is made of"
    if _is_unreachable(error):
        return (
            f"{name} needs the data set {named}, which is not in this machine's cache and cannot be fetched: give the "
            "same command once where there is a network, or take tasks that need none (--tasks quick)"
        )
    if any(isinstance(e, DatasetNotFoundError) for e in _chain(error)):
        return (
            f"{name} needs the data set {named}, which is not there or not for everyone: ask for it on its page and "
            "log in with `hf auth login`"
        )
    return f"{name} cannot be loaded (data set {named}): {short(error)}"


def _is_unreachable(error: BaseException) -> bool:
    kinds = (ConnectionError, OfflineModeIsEnabled, LocalEntryNotFoundError)
    return any(isinstance(e, kinds) for e in _chain(error))


@contextmanager
def offline() -> Iterator[None]:
    """From the cache alone: the client tries a Hub out of reach for half a minute, for every data set anew."""
    before = constants.HF_HUB_OFFLINE, datasets.config.HF_HUB_OFFLINE
    constants.HF_HUB_OFFLINE = datasets.config.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE, datasets.config.HF_HUB_OFFLINE = before


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def short(error: BaseException) -> str:
    """What an error is and says, on one line."""
    text = " ".join(f"{type(error).__name__}: {error}".rstrip(": ").split())
    return text if len(text) <= _SHOWN else f"{text[: _SHOWN - 3]}..."
