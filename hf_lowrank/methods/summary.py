"""What a method does to a model, in numbers: modules matched, parameters, optimizer-state bytes."""

from collections import Counter
from dataclasses import asdict, dataclass
from typing import Any

import torch
from rich.table import Table
from torch import nn
from transformers.pytorch_utils import Conv1D

from hf_lowrank.methods.base import LowRankConfig
from hf_lowrank.methods.targets import Target
from hf_lowrank.report.values import format_bytes

__all__ = ["Summary", "optimizer_state_bytes", "summarize"]

# torch.optim's optimizers and ours keep one float32 step counter for each parameter
STEP_BYTES = 4


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
    """

    method: str
    modules: dict[str, tuple[int, int, int, int | None]]
    parameters: int
    parameters_trained: int
    parameters_dense: int
    state_bytes: int
    adamw_state_bytes: int

    def to_dict(self) -> dict[str, Any]:
        """Plain data for the report."""
        return asdict(self)

    def table(self) -> Table:
        """The table that is shown before training."""
        table = Table(title=f"{self.method}: target layers", title_justify="left")
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
    inside = {id(p) for target in targets for p in target.module.parameters()}
    trained = [p for p in parameters.values() if p.requires_grad]
    # one weight of AdamW keeps two moments in the parameter's dtype
    other_bytes = sum(2 * p.numel() * p.element_size() for p in trained if id(p) not in inside)
    state_bytes, dense_bytes, dense_count, dense_tensors = other_bytes, other_bytes, 0, len(trained)
    # a kind may have several shapes, as in the layers of an encoder and a decoder
    alike: Counter[tuple[str, int, int, int | None]] = Counter()
    for target in targets:
        rank = ranks.get(target.name)
        own = list(target.module.parameters())
        bias = getattr(target.module, "bias", None)
        extra = bias.numel() if isinstance(bias, torch.Tensor) else 0
        # a frozen parameter has no state, but a frozen weight whose adapters train counts as one that trains
        weight_trains = any(p.requires_grad for p in own if p is not bias)
        bias_trains = isinstance(bias, torch.Tensor) and bias.requires_grad
        bias_state = 2 * bias.numel() * bias.element_size() * bias_trains if isinstance(bias, torch.Tensor) else 0
        # adapters are kept in fp32 beside a weight in half precision
        size = own[0].element_size()
        trained_size = max((p.element_size() for p in own if p.requires_grad and p is not bias), default=size)
        # Conv1D stores the weight transposed, and the optimizer sees it as stored
        stored = (target.cols, target.rows) if isinstance(target.module, Conv1D) else (target.rows, target.cols)
        state_bytes += trained_size * config.state_elements(*stored, rank or 0) * weight_trains + bias_state
        dense_bytes += size * 2 * target.rows * target.cols * weight_trains + bias_state
        dense_count += target.rows * target.cols + extra
        dense_tensors += weight_trains + bias_trains - sum(p.requires_grad for p in own)
        alike[target.kind, target.rows, target.cols, rank] += 1
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
    )


def optimizer_state_bytes(optimizer: torch.optim.Optimizer) -> int:
    """Bytes of all tensors in an optimizer's state; a sharded tensor counts as a whole, over all processes."""
    values = [value for state in optimizer.state.values() for value in state.values()]
    return sum(value.numel() * value.element_size() for value in values if isinstance(value, torch.Tensor))
