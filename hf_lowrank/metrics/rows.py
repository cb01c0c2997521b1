"""Rows of a data set as tensors: picked, collated, unpacked, and told apart by their tokens."""

import hashlib
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from hf_lowrank.metrics.perplexity import IGNORED

__all__ = ["collated", "evaluation_settings", "row_ids", "rows_digest", "take_rows", "unpacked"]


def rows_digest(batches: Sequence[tuple[Tensor, Tensor]]) -> str:
    """SHA-256 (hex) of sequences; it does not depend on how they are batched and padded.

    Args:
        batches: ids and labels, each (n, t); a row counts up to its last predicted token.
    """
    digest, rows = hashlib.sha256(), list(_row_bytes(batches))
    for part in range(2):
        for row in rows:
            digest.update(row[part])
    return digest.hexdigest()


def row_ids(batches: Sequence[tuple[Tensor, Tensor]]) -> tuple[str, ...]:
    """An id for every sequence that depends on its tokens alone; the n-th copy of one ends in `:n`.

    Arguments as for `rows_digest`.
    """
    digests = [hashlib.sha256(ids + labels).hexdigest()[:12] for ids, labels in _row_bytes(batches)]
    copies = Counter[str]()
    for i, digest in enumerate(digests):
        copies[digest] += 1
        if copies[digest] > 1:
            digests[i] = f"{digest}:{copies[digest]}"
    return tuple(digests)


def _row_bytes(batches: Sequence[tuple[Tensor, Tensor]]) -> Iterator[tuple[bytes, bytes]]:
    """Ids and labels of each row as int64, up to its last predicted token."""
    for ids, labels in batches:
        # the column after each row's last predicted token; 0 for a row without one
        ends = ((labels != IGNORED) * torch.arange(1, labels.shape[1] + 1)).amax(1).tolist()
        for row, targets, end in zip(*(t.to(torch.int64).numpy() for t in (ids, labels)), ends, strict=True):
            yield row[:end].tobytes(), targets[:end].tobytes()


def evaluation_settings(batches: Sequence[tuple[Tensor, Tensor]]) -> dict[str, Any]:
    """The settings of a number that is measured on these sequences; arguments as for `rows_digest`."""
    return {
        "sequences": sum(len(ids) for ids, _ in batches),
        "tokens": sum(int((labels[:, 1:] != IGNORED).sum()) for _, labels in batches),
        "evaluation_hash": rows_digest(batches)[:16],
    }


def take_rows(dataset: Any, sequences: int | None) -> list[Any]:
    """Rows spread evenly over a data set, all for None; of one without length and index, the first rows.

    Raises:
        ValueError: a number below 1, several splits, or no data set.
    """
    if isinstance(dataset, Mapping):
        raise ValueError(f"evaluation data of several splits ({', '.join(map(str, dataset))}): give one of them")
    if sequences is not None and sequences < 1:
        raise ValueError(f"sequences={sequences}: give 1 or more, or None for all")
    streamed = isinstance(dataset, torch.utils.data.IterableDataset)
    if hasattr(dataset, "__len__") and hasattr(dataset, "__getitem__") and not streamed:
        count = min(len(dataset), sequences or len(dataset))
        return [dataset[int(i)] for i in np.linspace(0, len(dataset) - 1, count).round()] if count else []
    if not isinstance(dataset, Iterable):
        raise ValueError(f"a {type(dataset).__name__} is no data set: give rows with input_ids")
    rows = []
    for row in dataset:
        rows.append(row)
        if sequences is not None and len(rows) == sequences:
            break
    return rows


def unpacked(batch: Mapping[str, Any]) -> Mapping[str, Any]:
    """A padding-free batch as rows of one sequence each, padded and masked; any other batch as it is.

    Collators such as `DataCollatorWithFlattening` join sequences into one row; where each begins is seen from
    `cu_seq_lens_q`, or from positions that do not go on.
    """
    ids, bounds, positions = batch["input_ids"], batch.get("cu_seq_lens_q"), batch.get("position_ids")
    if bounds is not None:
        starts = bounds[:-1]
    elif positions is not None and positions.shape == ids.shape and "attention_mask" not in batch:
        starts = F.pad(positions.diff() != 1, (1, 0), value=True).flatten().nonzero().flatten()
    else:
        return batch
    if bounds is None and len(starts) == len(ids):
        return batch
    columns = {key: batch[key].flatten().tensor_split(starts[1:].cpu().long()) for key in ("input_ids", "labels")}
    rows = [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]
    # padding at the end counts as sequences of a single token, of which nothing is predicted
    return collated([row for row in rows if len(row["input_ids"]) > 1] or rows)


def collated(rows: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
    """One tensor a column; shorter rows are padded on the right and masked."""
    longest = max(len(row["input_ids"]) for row in rows)
    columns: dict[str, list[Tensor]] = {}
    for row in rows:
        length = len(row["input_ids"])
        if "labels" in row and np.shape(row["labels"]) != (length,):
            raise ValueError(f"labels {row['labels']!r} are none of the next token: give rows of a language model")
        values = {
            "input_ids": (row["input_ids"], 0),
            "labels": (row["labels"] if "labels" in row else row["input_ids"], IGNORED),
            "attention_mask": (row["attention_mask"] if "attention_mask" in row else [1] * length, 0),
        }
        for key, (value, fill) in values.items():
            tensor = value if isinstance(value, Tensor) else torch.tensor(value)
            columns.setdefault(key, []).append(F.pad(tensor, (0, longest - length), value=fill))
    stacked = {key: torch.stack(parts) for key, parts in columns.items()}
    if bool((stacked["attention_mask"] == 1).all()):
        # without padding, a mask would only keep some attention kernels from their fastest path
        del stacked["attention_mask"]
    else:
        stacked["labels"][stacked["attention_mask"] == 0] = IGNORED
    return stacked
