"""Corpora: from a name or a path to training and validation documents.

A *document* is one text (a file, a JSONL record, a Hub example). A *share* is the training or the validation part of
the documents.
"""

import bz2
import gzip
import hashlib
import logging
import lzma
import os
import platform
import re
import sysconfig
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from itertools import chain
from pathlib import Path
from typing import Any, TypeAlias

import datasets
from datasets import Dataset, Features, IterableDataset, Value

from hf_lowrank.options import DataArguments, DataError

__all__ = ["Documents", "embedded_files", "explained", "load_documents"]

logger = logging.getLogger(__name__)

# By suffix, behind which there may be one of _COMPRESSIONS: the builder of `datasets`, and its options.
_READERS: dict[str, tuple[str, dict[str, str]]] = {
    **dict.fromkeys((".json", ".jsonl", ".ndjson"), ("json", {})),
    ".parquet": ("parquet", {}),
    ".csv": ("csv", {}),
    ".tsv": ("csv", {"sep": "\t"}),
}
_COMPRESSIONS: dict[str, Any] = {".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open, ".zst": open}
_TEXT_SUFFIXES = (".txt", ".text", ".md", ".rst", ".py")
_NOT_STDLIB_SOURCES = {"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__"}
_TEXT = Features({"text": Value("large_string")})  # 64-bit offsets, for more than 2 GB
Documents: TypeAlias = Dataset | IterableDataset
# The splits, and the beginning of a description: name, config, revision_or_hash.
_Corpus: TypeAlias = tuple[Mapping[str, Documents], dict[str, str | None]]


def load_documents(arguments: DataArguments) -> tuple[Documents, Dataset, dict[str, str | None]]:
    """Training documents, validation documents, each with the text column alone, and the source's description.

    Raises `DataError` if the source cannot be read or a share has no documents.
    """
    splits, source = _open_corpus(arguments)
    return *_shares(splits, f"data set '{source['name']}'", arguments), dict(source)


def embedded_files() -> tuple[Path, list[Path]]:
    """The standard library's folder and its source files, without tests and files generated for this machine."""
    root = Path(sysconfig.get_paths()["stdlib"])
    files = []
    for folder, subfolders, names in os.walk(root):
        # Not walked at all: site-packages alone can hold a hundred times more files than the library.
        subfolders[:] = [n for n in subfolders if n not in _NOT_STDLIB_SOURCES and not n.startswith("config-")]
        files += [Path(folder, n) for n in names if n.endswith(".py") and not n.startswith("_sysconfigdata")]
    return root, files


def _open_corpus(arguments: DataArguments) -> _Corpus:
    if arguments.dataset_name:
        return _open_hub(arguments.dataset_name, arguments)
    if not arguments.dataset_path:
        root, sources = embedded_files()
        return _open_files("python-stdlib", platform.python_version(), root, sources, arguments, skip=True)
    path = Path(arguments.dataset_path).expanduser()
    if not path.exists():
        raise DataError(f"dataset_path '{path}' does not exist (from {Path.cwd()}): correct it, or drop it")
    if path.is_file() and arguments.dataset_glob is not None:
        raise DataError(f"dataset_glob {arguments.dataset_glob!r} is for folders, '{path}' is a file: drop it")
    if path.is_file():
        return _open_file(path, arguments.validation_fraction)
    saved = any((path / mark).exists() for mark in ("dataset_dict.json", "state.json", "dataset_info.json"))
    if saved and arguments.dataset_glob is None:
        return _open_saved(path)
    pattern = arguments.dataset_glob or "*.txt"
    with explained(f"dataset_glob {pattern!r} is no pattern for file names", "give '*.txt', say"):
        files = [file for file in path.rglob(pattern) if file.is_file()]
    if not files:
        way_out = "give another, or the folder as dataset_name if laid out like a Hub data set"
        raise DataError(f"dataset_path '{path}' has no file that matches dataset_glob {pattern!r}: {way_out}")
    return _open_files(path.resolve().name, None, path, files, arguments, skip=arguments.skip_undecodable)


def _open_files(
    name: str, config: str | None, root: Path, files: list[Path], arguments: DataArguments, skip: bool
) -> _Corpus:
    """The documents of a folder's files, each read by what it is: records by their suffix, anything else as text."""
    files.sort(key=lambda file: file.relative_to(root).as_posix())
    groups: dict[str, list[Path]] = {}
    for file in files:
        groups.setdefault(kind if (kind := _kind_of(file)) in _READERS else "", []).append(file)
    parts = []
    for kind, group in groups.items():
        what = f"data set '{name}' ({len(group)} files of {kind})"
        parts.append(_read_records(group, kind, what) if kind else _read_texts(group, root, skip))
        if len(groups) > 1:
            parts[-1] = _with_text(parts[-1], what, arguments.text_column).cast(
                Features({arguments.text_column: _TEXT["text"]})
            )
    source = {"name": name, "config": config, "revision_or_hash": _files_hash(root, files)}
    return {"train": parts[0] if len(parts) == 1 else datasets.concatenate_datasets(parts)}, source


def _kind_of(file: Path) -> str:
    """The suffix that says what a file holds."""
    return Path(file.stem).suffix if file.suffix in _COMPRESSIONS else file.suffix


def _read_records(files: list[Path], kind: str, what: str) -> Dataset:
    builder, options = _READERS[kind]
    files = [file for file in files if file.stat().st_size > 0]
    if not files:
        raise DataError(f"{what} is empty: give files with documents")
    with explained(f"{what} cannot be read as {builder}", "repair or convert it"):
        return datasets.load_dataset(builder, data_files=[str(file) for file in files], split="train", **options)


def _text(file: Path) -> str:
    """A file's text without its byte order mark; `UnicodeError` if it is none."""
    with _COMPRESSIONS.get(file.suffix, open)(file, "rt", encoding="utf-8-sig") as stream:
        text: str = stream.read()
    if "\0" in text:
        raise UnicodeError("it has NUL characters, as UTF-16 read as UTF-8 has")
    return text


def _read_texts(files: list[Path], root: Path, skip: bool) -> Dataset:
    texts, left_out = [], []
    for file in files:
        try:
            texts.append(_text(file))
        # another encoding, or a compressed file that is cut short
        except (UnicodeError, EOFError, OSError, lzma.LZMAError, zlib.error):
            left_out.append(file.relative_to(root).as_posix())
    if left_out:
        named = ", ".join(left_out[:3]) + (", ..." if len(left_out) > 3 else "")
        trouble = f"{len(left_out)} of {len(files)} files are not UTF-8 text ({named})"
        if not skip:
            raise DataError(f"{trouble}: convert them, or set skip_undecodable to train on the others")
        logger.warning("%s and are left out", trouble)
    return Dataset.from_dict({"text": texts}, _TEXT)


def _open_file(path: Path, validation_fraction: float) -> _Corpus:
    kind = _kind_of(path)
    if kind in _TEXT_SUFFIXES:
        with explained(f"dataset_path '{path}' is not UTF-8 text", "convert it"):
            pieces = list(_pieces(_text(path), validation_fraction))
        train = Dataset.from_dict({"text": pieces}, _TEXT)
    elif kind in _READERS:
        train = _read_records([path], kind, f"dataset_path '{path}'")
    else:
        way_out = f"give {', '.join([*_READERS, *_TEXT_SUFFIXES])}, or its folder with dataset_glob '*{path.suffix}'"
        raise DataError(
            f"dataset_path '{path}' has the unknown file type '{path.suffix}': {way_out} to read it as text"
        )
    return {"train": train}, {"name": path.name, "config": None, "revision_or_hash": _files_hash(path, [path])}


def _pieces(text: str, validation_fraction: float) -> Iterator[str]:
    """Cut a text file into documents of about 8 kB at blank lines, or at line ends if it has no blank lines.

    Single lines or paragraphs would be too short: a row would be a jumble of beginnings. Pieces of this size give a
    row its context, and a random sample of them resembles the whole file. The pieces of a small file are smaller, so
    that `validation_fraction` of it is at least one piece.
    """
    size = min(8192, int(len(text) * validation_fraction))
    gap = r"\n\s*\n" if re.search(r"\n\s*\n", text.strip()) else r"\n"
    start = 0
    for match in re.finditer(gap, text):
        if match.end() - start >= size:
            yield text[start : match.end()]
            start = match.end()
    yield text[start:]


def _open_saved(path: Path) -> _Corpus:
    with explained(f"dataset_path '{path}' is not a whole saved Dataset or DatasetDict", "save it again"):
        saved = datasets.load_from_disk(str(path))
        parts = saved if isinstance(saved, datasets.DatasetDict) else {"train": saved}
        files = {split: [file["filename"] for file in part.cache_files] for split, part in parts.items()}
        # Read again through a builder, because `map` writes its cache beside the files of a Dataset, and a user's
        # folder may be read-only.
        splits = datasets.load_dataset("arrow", data_files=files)
    content_hash = _files_hash(path, sorted(Path(file) for file in chain.from_iterable(files.values())))
    return splits, {"name": path.resolve().name, "config": None, "revision_or_hash": content_hash}


def _open_hub(name: str, arguments: DataArguments) -> _Corpus:
    with explained(f"dataset_name {name!r} cannot be loaded", "check it and the network, or use dataset_path"):
        builder = datasets.load_dataset_builder(name, arguments.dataset_config_name)
        if arguments.streaming:
            splits = builder.as_streaming_dataset()
        else:
            builder.download_and_prepare()
            splits = builder.as_dataset()
    source = {"name": name, "config": arguments.dataset_config_name, "revision_or_hash": None}
    if (folder := Path(name).resolve()).is_dir():
        files = sorted(Path(file) for file in chain.from_iterable((builder.config.data_files or {}).values()))
        source |= {"name": folder.name, "revision_or_hash": _files_hash(folder, files)}
    elif re.fullmatch("[0-9a-f]{40}", builder.hash or ""):
        source["revision_or_hash"] = builder.hash  # the commit; offline it comes from the names of the cache's folders
    return splits, source


def _shares(splits: Mapping[str, Documents], name: str, arguments: DataArguments) -> tuple[Documents, Dataset]:
    """Training and validation documents with the text column alone; blank documents are dropped."""
    column = arguments.text_column
    if "train" not in splits:
        raise DataError(f"{name} has no split 'train' but {list(splits)}: rename one or take another data set")
    train = _with_text(splits["train"], name, column)
    # A fixed number, so that the training documents do not depend on how much is evaluated.
    taken = max(1000, arguments.max_eval_sequences or 0)
    if held := next((split for split in ("validation", "test") if split in splits), None):
        given = _with_text(splits[held], name, column)
        return train, given if isinstance(given, Dataset) else Dataset.from_list(_take(given, taken, name))
    if isinstance(train, IterableDataset):
        way_out = "set streaming to false to hold out validation_fraction of them"
        validation = Dataset.from_list(_take(train, taken, name))
    elif len(train) > 1:
        way_out = "give a corpus of different documents"
        held_out = max(1, round(arguments.validation_fraction * len(train)))
        train, validation = train.train_test_split(held_out, seed=arguments.split_seed).values()
    else:
        raise DataError(f"{name} has one document and none is left for validation: give two or more")
    # Removed by content and not by `skip`: workers and processes would each skip in their own part of a stream, and
    # copies would stay. An ordered dict, because the fingerprint of a cached step must not depend on a set's order.
    digests = dict.fromkeys(sorted(hashlib.sha256(text.encode()).digest() for text in validation[column]))
    train = train.filter(lambda t: hashlib.sha256(t.encode()).digest() not in digests, input_columns=[column])
    if not _take(train, 1, name):
        raise DataError(f"{name} has no training documents left, all are held out or copies of those: {way_out}")
    return train, validation


def _with_text(documents: Documents, name: str, column: str) -> Documents:
    first = _take(documents, 1, name)
    if not first:
        raise DataError(f"{name} is empty: give one with documents")
    if column not in first[0]:
        raise DataError(f"{name} has no column {column!r} but {sorted(first[0])}: set text_column to one of them")
    trouble = f"column {column!r} of {name} holds {{}}: set text_column to one that holds text alone"
    kind = (documents.features or {}).get(column, _TEXT["text"])
    if not isinstance(kind, Value) or kind.dtype not in ("string", "large_string", "null"):
        raise DataError(trouble.format(f"no text, or more than that, as {kind}"))

    def has_text(text: Any) -> bool:
        if not isinstance(text, str | None):
            raise DataError(trouble.format(f"no text in some rows but {text!r:.40}"))
        return bool(text and text.strip())

    documents = documents.select_columns([column]).filter(has_text, input_columns=[column])
    if not _take(documents, 1, name):
        raise DataError(f"{name} is empty, all its documents are blank: give one with text")
    return documents


def _take(documents: Documents, count: int, name: str) -> list[dict[str, Any]]:
    with explained(f"{name} cannot be read", "repair it, or try again if it is remote"):
        return list(documents.take(count))  # this opens and parses a stream


def _files_hash(root: Path, files: list[Path]) -> str:
    digest = hashlib.sha256()
    for file in files:
        with file.open("rb") as stream:
            content = hashlib.file_digest(stream, "sha256").digest()
        digest.update(os.fsencode(Path(os.path.relpath(file, root)).as_posix()) + b"\0" + content)
    return digest.hexdigest()


@contextmanager
def explained(trouble: str, way_out: str) -> Iterator[None]:
    """Turn any error of a library into one line; datasets, httpx and pyarrow share no class but `Exception`."""
    try:
        yield
    except DataError:
        raise
    except Exception as error:
        cause: BaseException = error
        while cause.__cause__ is not None:  # `datasets` wraps the cause in errors without information
            cause = cause.__cause__
        reason = " ".join(f"{type(cause).__name__}: {cause}".split())[:200]
        raise DataError(f"{trouble} ({reason}): {way_out}") from error
