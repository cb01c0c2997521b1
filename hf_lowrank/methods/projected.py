"""What projected methods share: the model stays as it is, and the optimizer keeps its moments in a projection.

Such a method is one module: its optimizer, a `ProjectedAdamW` with the update rule, and below it its config, a
`ProjectedConfig` with the method's own fields. Each field is handed to the optimizer's groups under its own name.
"""

import dataclasses
from dataclasses import KW_ONLY, dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers import TrainingArguments

from hf_lowrank.methods.base import LowRankConfig
from hf_lowrank.optim.projected import ProjectedAdamW
from hf_lowrank.optim.projector import PROJ_TYPES, PROJECTIONS, REFRESHES

__all__ = ["ProjectedConfig", "SubspaceConfig", "proj_type_field", "projection_field", "refresh_field"]


def proj_type_field() -> Any:
    """The field `proj_type` of a method that lets the user choose the projected side."""
    text = f"Side of the stored weight that is projected: {PROJ_TYPES[0]} (the shorter), {', '.join(PROJ_TYPES[1:])}."
    return field(default=PROJ_TYPES[0], metadata={"help": text})


def refresh_field() -> Any:
    """The field `refresh` of a method that projects onto a singular subspace."""
    text = f"How the singular subspace is found: {REFRESHES[0]} (eigh of the small Gram matrix), "
    return field(default=REFRESHES[0], metadata={"help": text + f"{', '.join(REFRESHES[1:])}."})


def projection_field(*more: str) -> Any:
    """The field `projection`.

    Args:
        more: choices beside those of all methods.
    """
    text = "Subspace of the projection: svd (top singular vectors), random, sampled (singular vectors drawn by their "
    text += "values), dct (vectors of the cosine transform)"
    return field(default=PROJECTIONS[0], kw_only=True, metadata={"help": ", ".join([text, *more]) + "."})


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
        kwargs: dict[str, Any] = {"lr": args.learning_rate, "betas": (args.adam_beta1, args.adam_beta2)}
        if "projection" in self.optimizer_cls.options:
            kwargs["seed"] = args.seed
            if (after := getattr(self, "random_after", None)) is not None:
                if args.max_steps < 1:
                    raise ValueError(
                        f"random_after={after!r} is a share of training, whose length is not "
                        "known from the number of epochs: give max_steps"
                    )
                kwargs["total_steps"] = args.max_steps
        return self.optimizer_cls, kwargs

    def state_elements(self, m: int, n: int, r: int) -> int:
        # the optimizer itself makes the state of a weight that takes no memory
        weight = nn.Parameter(torch.empty(m, n, device="meta"))
        optimizer = self.optimizer_cls([{"params": [weight], **self.group_options(r)}])
        optimizer.init_state()
        state = optimizer.state[weight]
        return sum(value.numel() for key, value in state.items() if isinstance(value, Tensor) and key != "step")


@dataclass
class SubspaceConfig(ProjectedConfig):
    """Base of the configs that let the user choose the subspace, and when it is found anew (`optim.subspace`)."""

    # behind the methods' own fields, which come by position as well
    _: KW_ONLY
    projection: str = projection_field()
    random_after: float | None = field(
        default=None,
        metadata={"help": "Share of training (max_steps) after which projections are random (GoLore); None: never."},
    )
    adaptive_gap: bool = field(
        default=False,
        metadata={"help": "Double a matrix's gap while its first singular vector keeps its direction (Q-GaLore)."},
    )
    rotate_moments: bool = field(
        default=False,
        metadata={
            "help": "Carry the first moment over into the new subspace at a refresh, instead of keeping its numbers."
        },
    )
    stagger_refreshes: bool = field(
        default=False,
        metadata={
            "help": "Spread the refreshes after the first over the steps of a gap, instead of refreshing all "
            "matrices in one."
        },
    )
