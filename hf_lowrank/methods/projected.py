"""What projected methods share: the model stays as it is, and the optimizer keeps its moments in a projection.

Such a method is one module: its optimizer, a `ProjectedAdamW` with the update rule, and below it its config, a
`ProjectedConfig` with the method's own fields. Each field is handed to the optimizer's groups under its own name.
"""

import dataclasses
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers import TrainingArguments

from hf_lowrank.methods.base import LowRankConfig
from hf_lowrank.optim.projected import ProjectedAdamW
from hf_lowrank.optim.projector import PROJ_TYPES, REFRESHES

__all__ = ["ProjectedConfig", "proj_type_field", "refresh_field"]


def proj_type_field() -> Any:
    """The field `proj_type` of a method that lets the user choose the projected side."""
    text = f"Side of the stored weight that is projected: {PROJ_TYPES[0]} (the shorter), {', '.join(PROJ_TYPES[1:])}."
    return field(default=PROJ_TYPES[0], metadata={"help": text})


def refresh_field() -> Any:
    """The field `refresh` of a method that projects onto a singular subspace."""
    text = f"How the singular subspace is found: {REFRESHES[0]} (eigh of the small Gram matrix), "
    return field(default=REFRESHES[0], metadata={"help": text + f"{', '.join(REFRESHES[1:])}."})


@dataclass
class ProjectedConfig(LowRankConfig):
    """Base of the configs of projected methods.

    Attributes:
        optimizer_cls: the method's optimizer.
    """

    takes_stacks: ClassVar[bool] = True
    optimizer_cls: ClassVar[type[ProjectedAdamW]]

    r: int | None = field(default=None, metadata={"help": "Rank of the projection; default hidden_size / 4."})
    update_proj_gap: int = field(default=200, metadata={"help": "Optimizer steps between two new projections."})

    def __post_init__(self) -> None:
        super().__post_init__()
        self.optimizer_cls.check_options(self.group_options(self.r or 1))

    def group_options(self, r: int) -> dict[str, Any]:
        shared_by_all_methods = {f.name for f in dataclasses.fields(LowRankConfig)}
        names = [f.name for f in dataclasses.fields(self) if f.name not in shared_by_all_methods]
        return {**{name: getattr(self, name) for name in names}, "r": r}

    def optimizer(self, args: TrainingArguments) -> tuple[type[torch.optim.Optimizer], dict[str, Any]]:
        # eps is the method's own: adam_epsilon belongs to an Adam that adds it after the bias correction
        return self.optimizer_cls, {"lr": args.learning_rate, "betas": (args.adam_beta1, args.adam_beta2)}

    def state_elements(self, m: int, n: int, r: int) -> int:
        # the optimizer itself makes the state of a weight that takes no memory
        weight = nn.Parameter(torch.empty(m, n, device="meta"))
        optimizer = self.optimizer_cls([{"params": [weight], **self.group_options(r)}])
        optimizer.init_state()
        state = optimizer.state[weight]
        return sum(value.numel() for key, value in state.items() if isinstance(value, Tensor) and key != "step")
