"""Tokenizer and packing: from documents (`hf_lowrank.corpora`) to the rows that a Trainer takes.

A *row* is the `sequence_length` token ids that the model sees. `datasets` does everything between
documents and rows, so that caching, streaming, sharding and resuming a stream work as its users know them.
"""

import hashlib
import json
import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from importlib.metadata import version
from itertools import chain
from pathlib import Path
from typing import Any

import datasets
import numpy as np
from datasets import Dataset, Features, IterableDataset, List, Value
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

import hf_lowrank
from hf_lowrank.corpora import Documents, embedded_files, explained, load_documents
from hf_lowrank.options import DataArguments, DataError

__all__ = [
    "Data", "DataArguments", "DataError", "embedded_files", "load_data", "load_documents", "load_validation",
    "tokenizer_hash",
]  # fmt: skip

_END_OF_TEXT = "<|endoftext|>"
# A few thousand merges need less text than this; more would only cost minutes at every start.
_TOKENIZER_CHARACTERS = 20_000_000
# Documents are packed in batches of this size; tokens that do not fill a row at the end of a batch are dropped. That
# bounds the memory and gives the same rows whether the data set is streamed or not.
_PACKED_TOGETHER = 10_000
_IDS = List(Value("int32"))
# file of a tokenizer that was trained here, in the cache
_BACKEND = "tokenizer.json"


@dataclass
class Data:
    """Rows for a Trainer with `transformers.default_data_collator`, and a description of where they come from.

    The columns are `input_ids` and `labels`, and without packing `attention_mask`, each `sequence_length` long.
    `description` is ready for JSON; `load_data` lists its keys.
    """

    train: Dataset | IterableDataset
    validation: Dataset
    tokenizer: PreTrainedTokenizerBase
    description: dict[str, Any]


def load_data(arguments: DataArguments, cache: str | Path | None = None) -> Data:
    """Read the corpus, hold out validation documents, get the tokenizer and make the rows.

    Where the source has no validation split, `split_seed` draws `validation_fraction` of the documents; a stream,
    whose length is unknown, gives its first 1000 documents. Verbatim copies of held-out documents are removed from
    training. A stream keeps its stored order. Every call and every process gets the same rows.

    `description` has the keys name, config, revision_or_hash, tokenizer_name, tokenizer_hash, sequence_length,
    packing, train_sequences (None for a stream), validation_sequences, validation_tokens (without padding) and
    split_seed. The description is published, so local sources are named without their folder. A local source is hashed
    by its files' bytes (about a second per GB); a Hub data set is identified by its commit.

    Args:
        arguments: what to read.
        cache: folder in which tokenizer and rows are kept for later calls with the same text, settings and version of
            this package. A stream is not kept.

    Raises `DataError` if source or tokenizer cannot be read, or a share does not fill one row.
    """
    train, validation, source = load_documents(arguments)
    cached = cache is not None and isinstance(train, Dataset)
    named = _named_tokenizer(arguments) if arguments.tokenizer_name else None
    entry = _entry(Path(str(cache)), arguments, source, named) if cached else None
    if entry is not None and entry.is_dir():
        tokenizer, train_rows, rows = _read_entry(entry, named)
    else:
        tokenizer = named or _trained_tokenizer(train, arguments)
        train_rows = _rows(train, tokenizer, arguments, "training")
        rows = _validation_rows(validation, tokenizer, arguments)
        if entry is not None:
            _write_entry(entry, tokenizer, train_rows, rows)
    tokenizer_name = arguments.tokenizer_name or f"byte-level-bpe-{arguments.vocab_size}"
    packed_tokens = len(rows) * arguments.sequence_length
    description = {
        **source,
        "source": _kind(arguments),
        "tokenizer_name": Path(tokenizer_name).resolve().name if Path(tokenizer_name).exists() else tokenizer_name,
        "tokenizer_hash": tokenizer_hash(tokenizer),
        "sequence_length": arguments.sequence_length,
        "packing": arguments.packing,
        "train_sequences": len(train_rows) if isinstance(train_rows, Dataset) else None,
        "validation_sequences": len(rows),
        "validation_tokens": packed_tokens if arguments.packing else sum(map(sum, rows["attention_mask"])),
        "split_seed": arguments.split_seed,
    }
    return Data(train_rows, rows, tokenizer, description)


def _entry(
    cache: Path, arguments: DataArguments, source: dict[str, str | None], named: PreTrainedTokenizerBase | None
) -> Path:
    """The folder that holds, or will hold, the rows of a text cut in one way."""
    versions = [hf_lowrank.__version__, hashlib.sha256(Path(__file__).read_bytes()).hexdigest()]
    versions += [version(name) for name in ("datasets", "tokenizers", "transformers")]
    key = [versions, asdict(arguments), source, None if named is None else tokenizer_hash(named)]
    return cache / hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:16]


def _write_entry(entry: Path, tokenizer: PreTrainedTokenizerBase, train: Dataset, validation: Dataset) -> None:
    entry.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{entry.name}.", dir=entry.parent))
    if tokenizer.is_fast:
        tokenizer.backend_tokenizer.save(str(temporary / _BACKEND))
    train.save_to_disk(str(temporary / "train"))
    validation.save_to_disk(str(temporary / "validation"))
    # others may share the folder, and mkdtemp's is its maker's alone
    temporary.chmod(entry.parent.stat().st_mode & 0o777)
    try:
        temporary.rename(entry)
    except OSError:
        shutil.rmtree(temporary)
        if not entry.is_dir():
            raise
        # another process was faster


def _read_entry(
    entry: Path, named: PreTrainedTokenizerBase | None
) -> tuple[PreTrainedTokenizerBase, Dataset, Dataset]:
    with explained(f"the cached data in {entry} cannot be read", "remove that folder"):
        tokenizer = named or _wrapped(Tokenizer.from_file(str(entry / _BACKEND)))
        train, validation = (datasets.load_from_disk(str(entry / share)) for share in ("train", "validation"))
        return tokenizer, train, validation


def load_validation(arguments: DataArguments) -> tuple[Dataset, dict[str, Any]]:
    """Only the validation rows of `load_data`, made with an existing tokenizer, and the source's description.

    Raises `DataError` as `load_data` does, and if no `tokenizer_name` is given.
    """
    if arguments.tokenizer_name is None:
        raise DataError("tokenizer_name None: name the tokenizer that the model was trained with")
    _, validation, source = load_documents(arguments)
    return _validation_rows(validation, _named_tokenizer(arguments), arguments), source


def _validation_rows(documents: Dataset, tokenizer: PreTrainedTokenizerBase, arguments: DataArguments) -> Dataset:
    rows = _rows(documents, tokenizer, arguments, "validation")
    # spread over all held-out documents: the first rows would come from the first few documents
    kept = min(len(rows), arguments.max_eval_sequences or len(rows))
    return rows.select(np.linspace(0, len(rows) - 1, kept).round().astype(int))


def tokenizer_hash(tokenizer: PreTrainedTokenizerBase) -> str:
    """SHA-256 (hex) of the backend's JSON or a slow tokenizer's sorted vocabulary; saving and loading keep it."""
    if tokenizer.is_fast:
        content = json.loads(tokenizer.backend_tokenizer.to_str())
        content["truncation"] = content["padding"] = None  # state of the last call
    else:
        content = sorted(tokenizer.get_vocab().items())
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _kind(arguments: DataArguments) -> str:
    """Where the name can be looked up: `hub`, `local` or `embedded`."""
    if arguments.dataset_name and not Path(arguments.dataset_name).is_dir():
        return "hub"
    return "local" if arguments.dataset_name or arguments.dataset_path else "embedded"


def _named_tokenizer(arguments: DataArguments) -> PreTrainedTokenizerBase:
    name = arguments.tokenizer_name
    with explained(f"tokenizer_name {name!r} cannot be loaded", "check it and the network, or drop it"):
        # a published folder may contain modelling code, which a tokenizer does not need
        tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=False)
    if tokenizer.eos_token is None:
        raise DataError(f"tokenizer {name!r} has no end-of-text token: set eos_token and save it, or take another")
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    return tokenizer


def _trained_tokenizer(train: Documents, arguments: DataArguments) -> PreTrainedTokenizerFast:
    """A byte-level BPE of up to `vocab_size` entries, trained on the training documents."""

    def texts() -> Iterator[str]:
        left = _TOKENIZER_CHARACTERS
        for document in train:
            yield document[arguments.text_column][:left]
            left -= len(document[arguments.text_column])
            if left <= 0:
                return

    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=arguments.vocab_size, special_tokens=[_END_OF_TEXT], initial_alphabet=alphabet, show_progress=False
    )
    backend.train_from_iterator(texts(), trainer)
    return _wrapped(backend)


def _wrapped(backend: Tokenizer) -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        model_input_names=["input_ids", "attention_mask"],  # decoders take no token_type_ids
        **dict.fromkeys(["bos_token", "eos_token", "pad_token"], _END_OF_TEXT),
    )


def _rows(documents: Documents, tokenizer: PreTrainedTokenizerBase, arguments: DataArguments, share: str) -> Any:
    # Nested functions, here and above: `datasets` fingerprints them by their code, but module-level functions by name,
    # so that a new version of this package would get the old version's cached rows.
    column, length = arguments.text_column, arguments.sequence_length

    def pad(batch: dict[str, Any]) -> dict[str, Any]:
        rows = tokenizer(batch[column], truncation=True, padding="max_length", max_length=length, padding_side="right")
        ids, mask = rows["input_ids"], rows["attention_mask"]
        return {"input_ids": ids, "labels": np.where(mask, ids, -100).tolist(), "attention_mask": mask}

    def tokenize(batch: dict[str, Any]) -> dict[str, Any]:
        ids = tokenizer(batch[column], add_special_tokens=False, return_attention_mask=False, verbose=False)
        return {"input_ids": [[*document, tokenizer.eos_token_id] for document in ids["input_ids"]]}

    def pack(batch: dict[str, Any]) -> dict[str, Any]:
        tokens = np.fromiter(chain.from_iterable(batch["input_ids"]), dtype=np.int32)
        blocks = tokens[: len(tokens) // length * length].reshape(-1, length).tolist()
        return {"input_ids": blocks, "labels": blocks}

    if not arguments.packing:
        features = Features(dict.fromkeys(["input_ids", "labels", "attention_mask"], _IDS))
        return documents.map(pad, batched=True, remove_columns=[column], features=features)
    tokens = documents.map(tokenize, batched=True, remove_columns=[column], features=Features({"input_ids": _IDS}))
    available = 0
    for document in tokens:
        available += len(document["input_ids"])
        if available >= length:
            features = Features({"input_ids": _IDS, "labels": _IDS})
            return tokens.map(pack, batched=True, batch_size=_PACKED_TOGETHER, features=features)
    raise DataError(f"the {share} share has {available} tokens, sequence_length is {length}: shorten it or add text")
