"""ReLoRA (arXiv 2307.05695): LoRA whose adapters are merged into W at regular steps and restarted.

Shapes: W: (m, n), A: (r, n), B: (m, r).
"""

import logging
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FullyShardedDataParallel
from transformers import TrainerControl, TrainerState, TrainingArguments

from hf_lowrank.methods.base import MethodCallback, Paper, register, seeded_generator, uses_deepspeed
from hf_lowrank.methods.lora import LoRAConfig, LoRAExperts, LoRALinear, add_product, own_rows
from hf_lowrank.methods.schedule import check_restarts, restart_schedule
from hf_lowrank.methods.trainer_arguments import ADAMW, plain
from hf_lowrank.optim.sharding import RowShards
from hf_lowrank.sharding import local, reshard, whole

__all__ = ["PRUNING", "ReLoRACallback", "ReLoRAConfig", "fold", "prune"]

logger = logging.getLogger(__name__)

PRUNING = ("random", "magnitude", "reset")
# what AdamW keeps of a parameter beside its step
MOMENTS = ("exp_avg", "exp_avg_sq")


@torch.no_grad()
def fold(layer: LoRALinear | LoRAExperts, generator: torch.Generator) -> Tensor:
    """W += (alpha / r) B A, then A drawn anew and B zero, in place (Section 3 of the paper).

    The sum is made in fp32 or better and rounded once to the dtype of W, so the function changes by that rounding.

    Args:
        layer: whole, or sharded by rows; then every process calls this for the same layers in the same order.
        generator: source of the new A.

    Returns:
        The squared Frobenius norm of what was added to W, before rounding.
    """
    A, B = whole(layer.A), whole(layer.B)
    stored, weight = layer.base_weight, local(layer.base_weight)
    left, right = (A.mT, B.mT) if layer.fan_in_fan_out else (B, A)
    shards = RowShards.of(stored, f"{layer.name}.weight")
    if shards.by_matrix:
        right = right[list(shards.matrices(len(right)))]
    weight.copy_(add_product(weight, own_rows(left, stored, f"{layer.name}.weight"), right, layer.factor))
    dtype = torch.promote_types(A.dtype, torch.float32)
    A, B = A.to(dtype), B.to(dtype)
    # ||B A||^2 is the trace of (B^T B)(A A^T), which needs no matrix of W's size
    squared = layer.factor**2 * ((B.mT @ B) * (A @ A.mT)).sum()
    layer.draw(generator)
    return squared


@torch.no_grad()
def prune(state: dict[str, Any], kind: str, ratio: float, generator: torch.Generator) -> int:
    """Zero entries of a parameter's first and second Adam moment, the same ones in both; the step counter stays.

    The official code draws a mask for each moment. An entry that keeps its first moment and loses the second would
    then be updated by its old momentum over a denominator of about eps: hundreds of times too far.

    Args:
        state: holds `exp_avg` and `exp_avg_sq`; sharded by rows, every process calls this in the same order.
        kind: `random` (round(ratio * entries) of them, uniformly), `magnitude` (as many, the smallest |exp_avg|) or
            `reset` (all); of a stack, so many of each matrix.
        ratio: share to zero; `reset` does not look at it.
        generator: source of the choice.

    Returns:
        Number of entries zeroed in each of the two, over all processes.
    """
    first = state["exp_avg"]
    matrices, entries = first.shape[:-2].numel(), first.shape[-2:].numel()
    count = entries if kind == "reset" else round(ratio * entries)
    mask = torch.zeros(matrices, entries, dtype=torch.bool)
    if kind == "magnitude":
        # stable, so that ties fall alike on every process
        order = torch.argsort(whole(first).abs().view(matrices, entries), stable=True)
        mask.scatter_(1, order[:, :count].cpu(), True)
    else:
        for row in mask:
            row[torch.randperm(entries, generator=generator)[:count]] = True
    for key in MOMENTS:
        moment = local(state[key])
        moment.masked_fill_(own_rows(mask.view(first.shape), state[key], key).to(moment.device), 0)
    return count * matrices


class ReLoRACallback(MethodCallback):
    """Folds the adapters, prunes their moments and puts the restarts into the learning-rate schedule.

    It keeps nothing from step to step: what happens at a restart follows from the seed, the layers' names and the
    step, so that a resumed run does what the run never stopped would have done.

    Args:
        config: the method's settings.
    """

    refreshes = True

    def __init__(self, config: "ReLoRAConfig") -> None:
        self.config = config
        self._moments_checked = False

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Trainer has made or restored optimizer and schedule by now.

        Raises:
            ValueError: the model has no adapters, FSDP 1 has flattened them, or the schedule is no `LambdaLR`.
        """
        self._moments_checked = False
        if not adapters(kwargs["model"]):
            raise ValueError("the model has no LoRA layers: give the Trainer the model that prepare returned")
        if any(isinstance(module, FullyShardedDataParallel) for module in kwargs["model"].modules()):
            raise ValueError("FSDP 1 flattens the weights that ReLoRA merges: use FSDP 2 (fsdp_version 2) or DDP")
        every = self.config.reset_every
        restart_schedule(kwargs["lr_scheduler"], every, self.config.restart_warmup_steps, "ReLoRA", args)
        if state.max_steps <= every and state.is_world_process_zero:
            logger.warning("reset_every=%d: no restart within the %d steps of training", every, state.max_steps)

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        due = state.global_step % self.config.reset_every == 0
        # the optimizer has a state after one step, and should be refused then, not after reset_every
        if state.global_step == 0 or (self._moments_checked and not due):
            return
        reshard(kwargs["model"])
        layers, optimizer = adapters(kwargs["model"]), kwargs["optimizer"]
        moments = {name: _moments(p, name, optimizer) for name, p in _parameters(layers)}
        self._moments_checked = True
        if due:
            with self.refreshing():
                self._restart(layers, moments, args.seed, state)

    def _restart(
        self, layers: list[LoRALinear | LoRAExperts], moments: dict[str, Any], seed: int, state: TrainerState
    ) -> None:
        config, index = self.config, state.global_step // self.config.reset_every
        entries = sum(p.numel() for _, p in _parameters(layers))
        squared = [fold(layer, seeded_generator(seed, layer.name, index)) for layer in layers]
        pruned = 0
        for name, held in moments.items():
            if held:
                pruned += prune(held, config.pruning, config.pruning_ratio, seeded_generator(seed, name, index))
        values = {
            "relora/restarts": index,
            "relora/pruned_share": pruned / entries,
            "relora/merged_norm": torch.stack(squared).sum().sqrt().item(),
        }
        if self.trainer is not None:
            self.trainer.log(dict(values))
        else:
            state.log_history.append({**values, "epoch": state.epoch, "step": state.global_step})
        if state.is_world_process_zero:
            logger.info(
                "ReLoRA restart %d after step %d: merged updates of norm %.4g, zeroed %.2f %% of the moments",
                index, state.global_step, values["relora/merged_norm"], 100 * values["relora/pruned_share"],
            )  # fmt: skip


def adapters(model: nn.Module) -> list[LoRALinear | LoRAExperts]:
    """The LoRA layers of a model, in the order of its modules."""
    return [module for module in model.modules() if isinstance(module, LoRALinear | LoRAExperts)]


def _parameters(layers: list[LoRALinear | LoRAExperts]) -> list[tuple[str, Tensor]]:
    """Names that no wrapper changes, and the adapters' parameters."""
    return [(f"{layer.name}.{side}", getattr(layer, side)) for layer in layers for side in ("A", "B")]


def _moments(p: Tensor, name: str, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """The state of an adapter's parameter; empty if the optimizer has made no step with it."""
    held = optimizer.state.get(p, {})
    if held and not all(key in held for key in MOMENTS):
        raise ValueError(
            f"the optimizer keeps {', '.join(map(str, held))} for {name} where ReLoRA prunes {' and '.join(MOMENTS)}: "
            "use optim='adamw_torch'"
        )
    return held


@register
@dataclass
class ReLoRAConfig(LoRAConfig):
    """ReLoRA: every `reset_every` optimizer steps the adapters are merged into W and restarted.

    This happens at the start of step k * reset_every + 1: a checkpoint of step k * reset_every holds the adapters.

    Different from the official code: A is Kaiming-uniform from the start, where that code begins with A and B both
    zero, so that no adapter learns before the first restart; and both moments lose the same entries (see `prune`).
    """

    method: ClassVar[str] = "relora"
    label: ClassVar[str] = "ReLoRA"
    paper: ClassVar[Paper | None] = Paper(
        title="ReLoRA: High-Rank Training Through Low-Rank Updates",
        arxiv="2307.05695",
        authors="Vladislav Lialin, Namrata Shivagunde, Sherin Muckatira, Anna Rumshisky",
    )

    reset_every: int = field(default=1000, metadata={"help": "Optimizer steps between two restarts."})
    restart_warmup_steps: int = field(
        default=100, metadata={"help": "Steps over which the learning rate climbs again after a restart."}
    )
    pruning: str = field(
        default="random",
        metadata={"help": "Adam moments zeroed at a restart: random entries, magnitude (the least), reset (all)."},
    )
    pruning_ratio: float = field(
        default=0.99, metadata={"help": "Share of the moments' entries that random and magnitude zero."}
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, least in (("reset_every", 1), ("restart_warmup_steps", 0)):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < least:
                raise ValueError(f"{name}={value!r}: give a whole number of optimizer steps, {least} or more")
        if self.restart_warmup_steps >= self.reset_every:
            raise ValueError(
                f"restart_warmup_steps={self.restart_warmup_steps}: the warm-up after a restart must end before the "
                f"next one, so give less than reset_every={self.reset_every}"
            )
        if self.pruning not in PRUNING:
            raise ValueError(f"pruning={self.pruning!r}: choose one of {', '.join(PRUNING)}")
        if not 0 <= self.pruning_ratio <= 1:
            raise ValueError(f"pruning_ratio={self.pruning_ratio!r}: a share lies in [0, 1], the paper has 0.99")

    def check_arguments(self, args: TrainingArguments) -> None:
        if args.optim not in ADAMW:
            raise ValueError(
                f"optim='{plain(args.optim)}': ReLoRA prunes AdamW's moments at a restart; use {' or '.join(ADAMW)}"
            )
        if uses_deepspeed(args):
            raise ValueError(
                "DeepSpeed's ZeRO keeps the moments in flat shards, which ReLoRA cannot prune; "
                "train with DDP (recipes/accelerate/ddp.yaml) or FSDP 2 (recipes/accelerate/fsdp2.yaml)"
            )
        check_restarts("ReLoRA", args)

    def callbacks(self, args: TrainingArguments) -> list[MethodCallback]:
        return [ReLoRACallback(self)]
