"""A projected method that another package brings along, for the tests: its optimizer, its config, nothing else.

Importing toy_plugin.py registers it, and the entry point of `install` names that module.
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

from torch import Tensor

from hf_lowrank.methods import Paper, ProjectedConfig
from hf_lowrank.optim.adam import step_size
from hf_lowrank.optim.projected import Matrix, ProjectedAdamW, apply_back_projection


class ToyAdamW(ProjectedAdamW):
    """GaLore whose update grows over the first steps; the number of updates is kept in the state."""

    options: ClassVar[dict[str, Any]] = {
        "update_proj_gap": 200,
        "strength": 0.5,
        "proj_type": "std",
        "refresh": "gram",
    }
    factor: ClassVar[str] = "strength"

    def add_state(self, state: dict[str, Any], W: Tensor, index: int, place: int) -> None:
        state["updates"] = W.new_zeros(())

    def update(self, matrices: list[Matrix], N: list[Tensor], group: dict[str, Any]) -> None:
        decay = 1 - group["lr"] * group["weight_decay"]
        for x, direction in zip(matrices, N, strict=True):
            x.state["updates"] += 1
            grown = min(x.state["updates"].item() / 5, 1.0)
            alpha = -step_size(group["lr"], group["betas"], x.t) * group["strength"] * grown * decay
            apply_back_projection(x.W, direction, x.projector, x.where, alpha, decay)


@dataclass
class ToyConfig(ProjectedConfig):
    """The toy's config: a projected config and one field of its own."""

    method: ClassVar[str] = "toy"
    label: ClassVar[str] = "Toy projection"
    paper: ClassVar[Paper | None] = Paper("A Toy Projection of Gradients", "2501.00001", "Ada Toy, Bob Toy")
    optimizer_cls: ClassVar[type[ProjectedAdamW]] = ToyAdamW

    strength: float = field(default=0.5, metadata={"help": "Factor on the update once it has grown."})


def install(folder: Path) -> str:
    """Write the metadata of a package with this module as a plugin; the folders that PYTHONPATH needs for it."""
    metadata = folder / "toy_lowrank-1.0.dist-info"
    metadata.mkdir(parents=True)
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: toy-lowrank\nVersion: 1.0\n")
    (metadata / "entry_points.txt").write_text("[hf_lowrank.plugins]\ntoy = toy_plugin\n")
    return f"{folder}:{Path(__file__).parent}"
