"""A fixed set of sequences on which losses are measured, without holding all logits of a batch.

The language-model head sees a few hundred positions at a time and the backbone a few thousand, so that the memory
beyond the model does not grow with batch or vocabulary. Shapes: n sequences of t tokens each.
"""

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

from hf_lowrank.metrics.checks import (
    check_next_token,
    check_rows,
    predicts_next_token,
    without_autocast,
    without_cache,
)
from hf_lowrank.metrics.perplexity import IGNORED, Estimate, mean_loss
from hf_lowrank.metrics.rows import collated, evaluation_settings, row_ids, rows_digest, take_rows, unpacked
from hf_lowrank.sharding import all_reduce_sum, rank_and_world

__all__ = [
    "EvaluationSet", "check_next_token", "check_rows", "evaluation_settings", "predicts_next_token", "row_ids",
    "rows_digest", "sequence_losses", "sequences_at_once", "unpacked", "without_autocast", "without_logits",
]  # fmt: skip

# logits held at once: 128 MB in float32
LOGITS = 2**25
# tokens that go through the backbone at once
TOKENS = 8192
# columns of a batch that become tensors
ARRAYS = (Tensor, np.ndarray, list)

# by model: whether its logits are its head's unchanged output
_plain_head: "WeakKeyDictionary[nn.Module, bool]" = WeakKeyDictionary()


@contextmanager
def _forward_replaced(module: nn.Module, forward: Callable[[Tensor], Tensor]) -> Iterator[None]:
    own = module.__dict__.get("forward")
    module.forward = forward
    try:
        yield
    finally:
        if own is None:
            del module.forward
        else:
            module.forward = own


def _head(model: nn.Module) -> nn.Module | None:
    get_head = getattr(model, "get_output_embeddings", None)
    head = get_head() if callable(get_head) else None
    return head if isinstance(head, nn.Module) else None


@contextmanager
def without_logits(model: nn.Module) -> Iterator[dict[str, Any]]:
    """A forward pass that stops before the language-model head; yields the options to call the model with."""
    head = _head(model)
    if head is None:
        yield without_cache(model)
        return
    with _forward_replaced(head, lambda hidden: hidden[..., :1]):
        yield without_cache(model)


def _logits_are_the_heads(model: nn.Module, head: nn.Module, inputs: Mapping[str, Tensor]) -> bool:
    """Whether the model leaves its head's output unchanged, without a cap or a scale; tested with known values."""
    if model not in _plain_head:
        few = {key: value[:1, :2] if value.ndim == 2 else value[:1] for key, value in inputs.items()}
        known = torch.tensor([[[-1000.0], [1000.0]]], device=few["input_ids"].device)
        with _forward_replaced(head, lambda hidden: known):
            try:
                passed = model(**few, **without_cache(model)).logits
            # a model that does something else with its logits computes them all at once
            except Exception:
                passed = None
        _plain_head[model] = passed is not None and torch.equal(passed.float(), known)
    return _plain_head[model]


def _token_losses(logits: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(logits.float(), targets, ignore_index=IGNORED, reduction="none")


def _head_losses(model: nn.Module, head: nn.Module, inputs: dict[str, Tensor], targets: Tensor) -> Tensor:
    """Loss of each position (b, t); the head is applied to as many positions at a time as LOGITS allows."""
    apply = head.forward
    flat = targets.flatten()

    def losses(hidden: Tensor) -> Tensor:
        states = hidden.reshape(-1, hidden.shape[-1])
        count = max(1, LOGITS // apply(states[:1]).shape[-1])
        pairs = zip(states.split(count), flat.split(count), strict=True)
        return torch.cat([_token_losses(apply(some), labels) for some, labels in pairs]).view(*hidden.shape[:-1], 1)

    with _forward_replaced(head, losses):
        token_losses: Tensor = model(**inputs, **without_cache(model)).logits
    return token_losses.squeeze(-1)


@torch.no_grad()
def sequences_at_once(model: nn.Module, batch: Mapping[str, Tensor]) -> int:
    """How many sequences of this length go through the model in one forward pass."""
    inputs, head = {key: value for key, value in batch.items() if key != "labels"}, _head(model)
    chunked = head is not None and _logits_are_the_heads(model, head, inputs)
    width = 1 if chunked else int(getattr(getattr(model, "config", None), "vocab_size", 0) or 2**15)
    return max(1, min(TOKENS, LOGITS // width) // batch["input_ids"].shape[1])


@torch.no_grad()
def sequence_losses(model: nn.Module, batch: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Summed loss and number of predicted tokens of each sequence.

    Args:
        model: causal language model; put it into eval mode first.
        batch: `input_ids` and `labels` (n, t), -100 if nothing is predicted, and the model's other inputs.

    Returns:
        (n,) float64 nats and (n,) counts.
    """
    inputs = {key: value for key, value in batch.items() if key != "labels"}
    targets = F.pad(batch["labels"][:, 1:], (0, 1), value=IGNORED)
    (n, t), rows, head = targets.shape, sequences_at_once(model, batch), _head(model)
    losses = []
    for i in range(0, n, rows):
        part = {key: value[i : i + rows] for key, value in inputs.items()}
        if head is not None and _plain_head.get(model):
            token_losses = _head_losses(model, head, part, targets[i : i + rows])
        else:
            logits = model(**part, **without_cache(model)).logits
            token_losses = _token_losses(logits.flatten(0, 1), targets[i : i + rows].flatten()).view(-1, t)
        # an ignored label has a loss of exactly 0
        losses.append(token_losses.double().sum(1))
    return torch.cat(losses), (targets != IGNORED).sum(1)


class EvaluationSet:
    """Sequences in a fixed order on which losses are measured; called with a model, the token-weighted mean loss.

    Args:
        rows: `input_ids`, `labels` and the model's other inputs, each (n, t), on the CPU.
        batch_size: sequences in one forward pass.
        shared: all processes of the group take part in each evaluation, and each computes its share of the batches.

    Raises:
        ValueError: no sequence, no predicted token, or tensors of different lengths.
    """

    def __init__(self, rows: Mapping[str, Tensor], batch_size: int = 16, shared: bool = False) -> None:
        lengths = {key: len(value) for key, value in rows.items()}
        if "input_ids" not in rows or "labels" not in rows or len(set(lengths.values())) != 1:
            raise ValueError(f"evaluation rows {lengths}: give input_ids and labels, the same number of each")
        if rows["labels"].shape != rows["input_ids"].shape:
            shape = tuple(rows["labels"].shape)
            raise ValueError(f"labels of shape {shape} are none of the next token: give rows of a language model")
        if lengths["input_ids"] == 0 or not (rows["labels"][:, 1:] != IGNORED).any():
            raise ValueError(
                f"the evaluation set predicts no token ({lengths['input_ids']} sequences): every label is -100 or "
                "every sequence has one token"
            )
        if batch_size < 1:
            raise ValueError(f"batch_size={batch_size}: give 1 or more")
        self.rows = dict(rows)
        self.batch_size = min(batch_size, lengths["input_ids"])
        self.shared = shared

    @classmethod
    def from_dataset(
        cls,
        dataset: Any,
        sequences: int | None = None,
        batch_size: int = 16,
        collator: Callable[[list[Any]], Mapping[str, Any]] | None = None,
        shared: bool = False,
    ) -> "EvaluationSet":
        """Take sequences spread evenly over a data set.

        Args:
            dataset: rows with `input_ids`, and optionally `labels` and `attention_mask`. Of an iterable without length
                and index, the first rows are taken.
            sequences: how many; None for all. A smaller data set gives all that it has.
            batch_size, shared: as for the class.
            collator: makes a batch from a list of rows, like a Trainer's.

        Raises:
            ValueError: the data set is empty, has no token ids, or predicts nothing.
        """
        rows = take_rows(dataset, sequences)
        if not rows:
            raise ValueError("the evaluation data set is empty: give one with sequences")
        if collator is None and "input_ids" not in rows[0]:
            raise ValueError(
                f"the evaluation rows have {', '.join(sorted(map(str, rows[0])))} and no input_ids: tokenize them"
            )
        batch = collator(rows) if collator is not None else collated(rows)
        batch = unpacked(batch) if "input_ids" in batch else batch
        tensors = {key: torch.as_tensor(value) for key, value in batch.items() if isinstance(value, ARRAYS)}
        if "labels" not in tensors and "input_ids" in tensors:
            labels = tensors["input_ids"].clone()
            if "attention_mask" in tensors:
                labels[tensors["attention_mask"] == 0] = IGNORED
            tensors["labels"] = labels
        return cls(tensors, batch_size, shared)

    def __len__(self) -> int:
        return len(self.rows["input_ids"])

    def first(self, sequences: int) -> "EvaluationSet":
        """A set of only the first sequences."""
        rows = {key: value[:sequences] for key, value in self.rows.items()}
        return EvaluationSet(rows, self.batch_size, self.shared)

    @property
    def tokens(self) -> int:
        """Number of predicted tokens."""
        return int((self.rows["labels"][:, 1:] != IGNORED).sum())

    def digest(self) -> str:
        """SHA-256 (hex) of ids and labels, the same on every machine."""
        return rows_digest([(self.rows["input_ids"], self.rows["labels"])])

    def units(self) -> tuple[str, ...]:
        """An id for every sequence; see `row_ids`."""
        return row_ids([(self.rows["input_ids"], self.rows["labels"])])

    def settings(self) -> dict[str, Any]:
        """The settings of a number that is measured on this set."""
        return evaluation_settings([(self.rows["input_ids"], self.rows["labels"])])

    def mine(self, at_most: int | None = None) -> Iterator[Tensor]:
        """Indices of this process's batches. Every process gets the same number of batches; some may be empty."""
        rank, world = rank_and_world() if self.shared else (0, 1)
        # fewer sequences than one batch for each process are dealt out as well
        size = min(self.batch_size, math.ceil(len(self) / world), at_most or len(self))
        batches = list(torch.arange(len(self)).split(size))
        for i in range(math.ceil(len(batches) / world)):
            at = i * world + rank
            yield batches[at] if at < len(batches) else torch.arange(0)

    def batch(self, indices: Tensor, device: torch.device) -> dict[str, Tensor]:
        """The sequences at `indices` on a device."""
        return {key: value[indices].to(device) for key, value in self.rows.items()}

    def losses(self, model: nn.Module) -> tuple[Tensor, Tensor]:
        """Summed loss and number of predicted tokens of every sequence: (n,) float64 and (n,), on the CPU.

        Where the set is shared, every process gets the same, and an error in one process is raised in all.
        """
        losses, tokens = torch.zeros(len(self), dtype=torch.float64), torch.zeros(len(self), dtype=torch.float64)
        check_next_token(model, self.rows)
        device, failure = next(model.parameters()).device, None
        with without_autocast(model):
            # one forward pass a batch, so that every process makes the same number of them
            for indices in self.mine(sequences_at_once(model, self.batch(torch.arange(1), device))):
                # sharded weights need every process in a pass: one without a batch runs a sequence that does not count
                chosen = indices if len(indices) else torch.arange(1)
                try:
                    summed, count = sequence_losses(model, self.batch(chosen, device))
                # leaving the loop would let the other processes wait in the next collective
                except Exception as error:
                    if not self.shared:
                        raise
                    failure = error
                    continue
                if len(indices):
                    losses[indices], tokens[indices] = summed.cpu(), count.double().cpu()
        if self.shared:
            failures = torch.full_like(losses, float(failure is not None))
            losses, tokens, failures = all_reduce_sum(torch.stack([losses, tokens, failures]))
            if failures[0] > 0:
                raise failure or RuntimeError("the loss could not be measured on another process: see its log")
        return losses, tokens

    def differentiable(self, model: nn.Module) -> Tensor:
        """This process's share of the mean loss, a scalar with its graph, which holds all logits.

        The shares of all processes add up to the token-weighted mean loss in nats.
        """
        check_next_token(model, self.rows)
        device, total = next(model.parameters()).device, self.tokens
        losses = []
        with without_autocast(model):
            for indices in self.mine():
                # the share of a process without a batch is 0, but has a graph like the others
                batch = self.batch(indices if len(indices) else torch.arange(1), device)
                inputs = {key: value for key, value in batch.items() if key != "labels"}
                logits = model(**inputs, **without_cache(model)).logits[:, :-1].flatten(0, 1)
                loss = _token_losses(logits, batch["labels"][:, 1:].flatten()).sum() / total
                losses.append(loss if len(indices) else 0 * loss)
        return torch.stack(losses).sum()

    def parts(self, most: int) -> list[tuple[str, int, Tensor]]:
        """Groups of neighbouring sequences, `most` or one for each: id, number of predicted tokens, and indices."""
        units, tokens = self.units(), (self.rows["labels"][:, 1:] != IGNORED).sum(1)
        cuts = torch.arange(len(self)).tensor_split(min(most, len(self)))
        return [("+".join(units[i] for i in cut), int(tokens[cut].sum()), cut) for cut in cuts]

    def differentiable_shares(self, model: nn.Module, most: int) -> list[Tensor]:
        """The share of each of `parts(most)` in the mean loss, scalars each with a graph of its own.

        Where the set is shared, the parts are dealt to the processes, and those of others are 0 without a graph.
        """
        rank, world = rank_and_world() if self.shared else (0, 1)
        shares = []
        for i, (_, tokens, indices) in enumerate(self.parts(most)):
            share = torch.zeros((), device=next(model.parameters()).device)
            if i % world == rank and tokens > 0:
                part = EvaluationSet({key: value[indices] for key, value in self.rows.items()}, self.batch_size)
                share = part.differentiable(model) * (tokens / self.tokens)
            shares.append(share)
        return shares

    def estimate(self, model: nn.Module) -> Estimate:
        """Token-weighted mean loss in nats and its standard error over sequences."""
        return mean_loss(*self.losses(model))

    def __call__(self, model: nn.Module) -> float:
        return self.estimate(model).value
