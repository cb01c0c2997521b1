"""What a method does to a model, in numbers: modules matched, parameters, optimizer-state bytes."""

import logging
import re
from collections import Counter
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from rich.table import Table
from torch import nn

from hf_lowrank.methods.base import LowRankConfig
from hf_lowrank.methods.targets import Target, blocks_of, is_router, linear_layers
from hf_lowrank.report.values import format_bytes

__all__ = ["Summary", "optimizer_state_bytes", "summarize", "warn_of_uncovered"]

logger = logging.getLogger(__name__)

# torch.optim's optimizers and ours keep one float32 step counter for each parameter
STEP_BYTES = 4
# a share of the blocks' parameters that a method leaves full-rank, above which it says so in a warning as well
MUCH = 0.2


@dataclass(frozen=True)
class Summary:
    """Sizes of a run before it starts.

    Attributes:
        method: the method's label.
        modules: target kind -> (count, rows, cols, rank); rank is None if the method has none. A kind of several
            shapes or ranks has an entry for each, named after it.
        parameters, parameters_trained: of the model as trained.
        parameters_dense: of the dense model it stands for.
        state_bytes: predicted bytes of the optimizer's state.
        adamw_state_bytes: the same for AdamW on the dense model.
        not_covered: matrices in the repeated blocks that are no targets and so train full-rank, where the method has
            ranks: name, with `*` for the block's number, -> parameters.
        parameters_covered, parameters_in_blocks: of the dense model, in the targets and in the repeated blocks.
    """

    method: str
    modules: dict[str, tuple[int, int, int, int | None]]
    parameters: int
    parameters_trained: int
    parameters_dense: int
    state_bytes: int
    adamw_state_bytes: int
    not_covered: dict[str, int] = field(default_factory=dict)
    parameters_covered: int = 0
    parameters_in_blocks: int = 0

    @property
    def coverage(self) -> dict[str, Any] | None:
        """Shares of the dense model's parameters, for the report; None for a method without ranks."""
        if all(rank is None for *_, rank in self.modules.values()):
            return None
        return {
            "targets": self.parameters_covered / self.parameters_dense,
            "blocks": self.parameters_in_blocks / self.parameters_dense,
            "not_covered": {name: count / self.parameters_dense for name, count in self.not_covered.items()},
        }

    def to_dict(self) -> dict[str, Any]:
        """Plain data for the report."""
        return asdict(self)

    def table(self) -> Table:
        """The table that is shown before training."""
        table = Table(title=f"{self.method}: target layers", title_justify="left", min_width=78)
        for column in ("module", "layers", "shape", "rank"):
            table.add_column(column, justify="left" if column == "module" else "right")
        for kind, (count, rows, cols, rank) in self.modules.items():
            table.add_row(kind, str(count), f"{rows} x {cols}", "-" if rank is None else str(rank))
        share = self.state_bytes / self.adamw_state_bytes if self.adamw_state_bytes else 1.0
        table.caption = (
            f"parameters trained {self.parameters_trained:,} of {self.parameters:,}, "
            f"dense model {self.parameters_dense:,}\n"
            f"optimizer state predicted {format_bytes(self.state_bytes)}, "
            f"AdamW on the dense model {format_bytes(self.adamw_state_bytes)} ({share:.0%})"
            + "".join(
                f"\nnot covered: {name}, {100 * count / self.parameters_dense:.2g} % of the parameters, full-rank"
                for name, count in self.not_covered.items()
            )
        )
        table.caption_justify = "left"
        return table


def summarize(model: nn.Module, config: LowRankConfig, targets: list[Target], ranks: dict[str, int]) -> Summary:
    """Sizes of a prepared model.

    Args:
        model: the model as it will be trained.
        config: its method.
        targets: its target layers, as they are now.
        ranks: target name -> rank, empty for a method without ranks.
    """
    parameters = {id(p): p for p in model.parameters()}
    inside = {id(p) for target in targets for p in target.own_parameters.values()}
    trained = [p for p in parameters.values() if p.requires_grad]
    # one weight of AdamW keeps two moments in the parameter's dtype
    other_bytes = sum(2 * p.numel() * p.element_size() for p in trained if id(p) not in inside)
    state_bytes, dense_bytes, dense_count, dense_tensors = other_bytes, other_bytes, 0, len(trained)
    not_covered, in_blocks = _beside(model, inside)
    # a kind may have several shapes, as in the layers of an encoder and a decoder
    alike: Counter[tuple[str, int, int, int | None]] = Counter()
    for target in targets:
        rank = ranks.get(target.name)
        own, count = list(target.own_parameters.values()), 1 if target.stack is None else target.stack.count
        bias = getattr(target.module, "bias", None)
        extra = bias.numel() if isinstance(bias, torch.Tensor) else 0
        # a frozen parameter has no state, but a frozen weight whose adapters train counts as one that trains
        weight_trains = any(p.requires_grad for p in own if p is not bias)
        bias_trains = isinstance(bias, torch.Tensor) and bias.requires_grad
        bias_state = 2 * bias.numel() * bias.element_size() * bias_trains if isinstance(bias, torch.Tensor) else 0
        # adapters are kept in fp32 beside a weight in half precision
        size = own[0].element_size()
        trained_size = max((p.element_size() for p in own if p.requires_grad and p is not bias), default=size)
        kept = config.state_elements(*target.stored_shape, rank or 0) * count * weight_trains
        state_bytes += trained_size * kept + bias_state
        if config.group_options(1) and weight_trains:
            # every matrix of a stack is stepped for itself
            state_bytes += STEP_BYTES * (count - 1)
        dense_bytes += size * 2 * target.rows * target.cols * count * weight_trains + bias_state
        covered = target.rows * target.cols * count + extra
        dense_count += covered
        in_blocks += covered * (target.layer is not None)
        dense_tensors += weight_trains + bias_trains - sum(p.requires_grad for p in own)
        alike[target.kind, target.rows, target.cols, rank] += count
    shapes = Counter(kind for kind, *_ in alike)
    modules = {}
    for (kind, rows, cols, rank), count in alike.items():
        name = kind if shapes[kind] == 1 else f"{kind} ({rows} x {cols})"
        modules[name] = (count, rows, cols, rank)
    dense_parameters = sum(p.numel() for key, p in parameters.items() if key not in inside) + dense_count
    return Summary(
        method=config.label,
        modules=modules,
        parameters=sum(p.numel() for p in parameters.values()),
        parameters_trained=sum(p.numel() for p in trained),
        parameters_dense=dense_parameters,
        state_bytes=state_bytes + STEP_BYTES * len(trained),
        adamw_state_bytes=dense_bytes + STEP_BYTES * dense_tensors,
        not_covered=not_covered if ranks else {},
        parameters_covered=dense_count,
        parameters_in_blocks=in_blocks,
    )


def warn_of_uncovered(summary: Summary, config: LowRankConfig) -> None:
    """Say so where a method leaves much of the blocks as they are, unless the user has named the layers."""
    share = sum(summary.not_covered.values()) / max(summary.parameters_in_blocks, 1)
    if config.target_modules in (None, "all-linear") and share > MUCH:
        logger.warning(
            "%s does not cover %.0f %% of the parameters in the blocks, which train full-rank: %s",
            config.label,
            100 * share,
            ", ".join(summary.not_covered),
        )


def _beside(model: nn.Module, inside: set[int]) -> tuple[dict[str, int], int]:
    """The blocks' matrices outside of the targets that train, by name; and the number of all parameters there."""
    routers = {layer.weight_name for layer in linear_layers(model) if is_router(layer)}
    matrices: Counter[str] = Counter()
    blocks, beside = tuple(f"{block}." for block in blocks_of(model)), 0
    for name, p in model.named_parameters():
        if id(p) in inside or not name.startswith(blocks):
            continue
        beside += p.numel()
        if p.ndim > 1 and p.requires_grad and not name.endswith("bias"):
            place = re.sub(r"\.\d+(?=\.|$)", ".*", name.removesuffix(".weight"))
            router = name in routers or "router" in type(model.get_submodule(name.rpartition(".")[0])).__name__.lower()
            matrices[f"{place} (router)" if router else place if p.ndim == 2 else f"{place} ({p.ndim}-D)"] += p.numel()
    return dict(matrices.most_common()), beside


def optimizer_state_bytes(optimizer: torch.optim.Optimizer) -> int:
    """Bytes of all tensors in an optimizer's state; a sharded tensor counts as a whole, over all processes."""
    values = [value for state in optimizer.state.values() for value in state.values()]
    return sum(value.numel() * value.element_size() for value in values if isinstance(value, torch.Tensor))
