"""Write the task family `hf_lowrank_quick` from the held-out files of the embedded corpus.

    python -m hf_lowrank.downstream.quick.generate FOLDER [--split-seed 0]

makes a folder for the harness's `--include_path`: a YAML and a JSONL file for each task, the group, the loader and
`source.json`, which says what Python, files and split the items come from. The one in the package is made of the
Python that it names. `task_folder` finds or makes the one that is right for a run.
"""

import argparse
import hashlib
import json
import sys
from collections.abc import Iterable, Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any

from huggingface_hub import constants

from hf_lowrank.data import DataArguments, DataError, embedded_files, load_documents
from hf_lowrank.downstream.quick.document import Document
from hf_lowrank.downstream.quick.items import KINDS, make_items
from hf_lowrank.report.files import atomic_path

__all__ = ["GROUP", "TASKS", "generate", "main", "task_folder", "write_folder"]

GROUP = "hf_lowrank_quick"
TASKS = Path(__file__).with_name("tasks")  # the folder in the package

# Raised whenever other items come out of the same sources.
_VERSION = 1
# Raised whenever the files around the same items change.
_FORM = 2
_ITEMS = 400
_SEED = 0
_TASK = """\
# Written by python -m hf_lowrank.downstream.quick.generate; README.md describes the tasks.
task: hf_lowrank_{name}
task_alias: {name}
custom_dataset: !function loader.load
dataset_kwargs:
  file: {name}.jsonl
test_split: test
output_type: multiple_choice
doc_to_text: context
doc_to_choice: choices
doc_to_target: answer
target_delimiter: ""
num_fewshot: 0
metric_list:
  - metric: acc
    aggregation: mean
    higher_is_better: true
metadata:
  version: {version}
  title: {title}
  chance: {chance}
{more}"""
_GROUP = """\
# Written by python -m hf_lowrank.downstream.quick.generate; README.md describes the tasks.
group: {group}
task:
{tasks}
aggregate_metric_list:
  - metric: acc
    aggregation: mean
    weight_by_size: true
metadata:
  version: {version}
  chance: {chance}
"""


def generate(held_out: Mapping[str, str], training: Iterable[str], count: int = _ITEMS) -> dict[str, list[dict]]:
    """The items of every task, up to `count` each, from the held-out files (text by name).

    What two consecutive lines of a training document have too is left out. Which items come out depends on the
    arguments alone. `make_items` describes an item.
    """
    copied: set[tuple[str, str]] = set()
    for text in training:
        lines = [stripped for line in text.split("\n") if (stripped := line.strip())]
        copied.update(pairwise(lines))
    documents = [Document(file, text) for file, text in sorted(held_out.items())]
    return {name: make_items(kind, documents, copied, count, _SEED) for name, kind in KINDS.items()}


def write_folder(folder: Path, tasks: Mapping[str, list[dict]], source: Mapping[str, Any]) -> None:
    """Write what the harness needs, each file whole or not at all and `source.json` last.

    source: must have the `corpus_hash`, which becomes part of the tasks' version, as other items are another task.
    """
    version = f"{_VERSION}+{source['corpus_hash'][:8]}"
    for name, items in tasks.items():
        chance = 1 / KINDS[name].answers
        # items that share their answers are drawn together
        more = "  group_by: group\n" if any(_share_answers(*pair) for pair in pairwise(items)) else ""
        content = _TASK.format(name=name, version=version, title=KINDS[name].title, chance=chance, more=more)
        _write(folder / f"{name}.yaml", content)
        _write(folder / f"{name}.jsonl", "".join(json.dumps(item) + "\n" for item in items))
    sizes = {name: len(items) for name, items in tasks.items()}
    chance = sum(size / KINDS[name].answers for name, size in sizes.items()) / max(1, sum(sizes.values()))
    members = "\n".join(f"  - hf_lowrank_{name}" for name in tasks)
    _write(
        folder / f"{GROUP}.yaml", _GROUP.format(group=GROUP, tasks=members, version=version, chance=round(chance, 4))
    )
    if folder.resolve() != TASKS.resolve():
        _write(folder / "loader.py", (TASKS / "loader.py").read_text(encoding="utf-8"))
    _write(folder / "source.json", json.dumps({"version": version, **source, "items": sizes}, indent=1) + "\n")


def _share_answers(item: Mapping[str, Any], following: Mapping[str, Any]) -> bool:
    return bool(item["choices"] == following["choices"])


def task_folder(data: Mapping[str, Any] | None = None) -> Path:
    """The folder for `include_path` whose items a model has not been trained on.

    data: the `data` block of the run's report; None for a model that was trained elsewhere. The package's folder is
    right for whatever was not trained on the embedded corpus, and for what was trained on the same files with the same
    split. For the embedded corpus of the running Python or another `split_seed`, items are made once and kept under
    `HF_HOME`.

    Raises `DataError` if the model was trained on another Python's standard library, whose held-out files are not
    here.
    """
    if data is None or data.get("source") != "embedded":
        return TASKS
    corpus_hash, split_seed = data["revision_or_hash"], data["split_seed"]
    kept = Path(constants.HF_HOME) / "hf_lowrank" / "tasks" / f"{_VERSION}.{_FORM}-{corpus_hash[:16]}-{split_seed}"
    for folder in (TASKS, kept):
        if _made_from(folder) == (f"{_VERSION}+{corpus_hash[:8]}", corpus_hash, split_seed):
            return folder
    held_out, training, source = _embedded(split_seed)
    if source["corpus_hash"] != corpus_hash:
        raise DataError(
            f"the run was trained on the standard library of Python {data.get('config')} (hash {corpus_hash[:8]}), "
            f"this Python {source['python']} has other files (hash {source['corpus_hash'][:8]}): evaluate it with "
            f"that Python, or name the package's items, some of which it may have seen: --include-path {TASKS}"
        )
    write_folder(kept, _enough(generate(held_out, training)), source)
    return kept


def main(argv: list[str] | None = None) -> int:
    """The command line: write the folder, print a line for each task."""
    parser = argparse.ArgumentParser(
        prog="python -m hf_lowrank.downstream.quick.generate", description="Write the tasks."
    )
    parser.add_argument("folder", type=Path, help="Folder to write, for lm-eval's --include_path.")
    parser.add_argument("--split-seed", type=int, default=0, help="split_seed of the runs to evaluate (default: 0).")
    arguments = parser.parse_args(argv)
    try:
        held_out, training, source = _embedded(arguments.split_seed)
        tasks = _enough(generate(held_out, training))
        write_folder(arguments.folder, tasks, source)
    except (DataError, OSError) as error:
        print(error, file=sys.stderr)
        return 2
    for name, items in tasks.items():
        print(f"hf_lowrank_{name:12} {len(items):4} items of {KINDS[name].answers} choices")
    return 0


def _embedded(split_seed: int) -> tuple[dict[str, str], Iterable[str], dict[str, Any]]:
    """The held-out files by name, the training documents, and what `source.json` says of them."""
    train, validation, source = load_documents(DataArguments(split_seed=split_seed))
    texts = set(validation["text"])
    root, files = embedded_files()
    held_out: dict[str, str] = {}
    for file in sorted(files):
        text = file.read_text(encoding="utf-8", errors="replace")
        if text in texts:
            texts.remove(text)  # of several files with one content, the first
            held_out[file.relative_to(root).as_posix()] = text
    return (
        held_out,
        train["text"],
        {
            "corpus": source["name"],
            "python": source["config"],
            "corpus_hash": source["revision_or_hash"],
            "split_seed": split_seed,
            "files": {name: hashlib.sha256(text.encode()).hexdigest() for name, text in held_out.items()},
        },
    )


def _enough(tasks: dict[str, list[dict]]) -> dict[str, list[dict]]:
    for name, items in tasks.items():
        if len(items) < _ITEMS // 4:
            raise DataError(f"the held-out files give {len(items)} items for task {name!r}: take another split_seed")
    return tasks


def _made_from(folder: Path) -> tuple[str, str, int] | None:
    try:
        source = json.loads((folder / "source.json").read_text(encoding="utf-8"))
        return source["version"], source["corpus_hash"], source["split_seed"]
    except (OSError, ValueError, KeyError, TypeError):
        return None  # not there, or not written by this command: it will be


def _write(path: Path, content: str) -> None:
    with atomic_path(path) as temporary:
        temporary.write_bytes(content.encode())


if __name__ == "__main__":
    sys.exit(main())
