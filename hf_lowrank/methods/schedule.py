"""Restarts in a Trainer's learning-rate schedule, for methods that start their moments or adapters anew."""

from collections.abc import Callable
from typing import Any

from accelerate.scheduler import AcceleratedScheduler
from torch.optim.lr_scheduler import LambdaLR
from transformers import TrainingArguments

from hf_lowrank.methods.trainer_arguments import plain

__all__ = ["check_restarts", "restart_schedule", "with_restarts"]

# schedules that are no function of the step alone
ADAPTIVE_SCHEDULES = ("reduce_lr_on_plateau", "greedy")


def check_restarts(label: str, args: TrainingArguments) -> None:
    """`ValueError` for arguments with which a method's restarts cannot be put into the schedule."""
    if args.lr_scheduler_type in ADAPTIVE_SCHEDULES:
        raise ValueError(
            f"lr_scheduler_type='{plain(args.lr_scheduler_type)}' takes no restarts: {label} needs a schedule "
            "that is a function of the step, 'cosine_with_min_lr' for example"
        )
    if args.fp16:
        raise ValueError(
            "fp16=True: where the gradient scaler skips a step the schedule stands still, so that the restarts of "
            f"the learning rate would drift away from those of {label}; use bf16=True"
        )


def with_restarts(base: Callable[[int], float], reset_every: int, warmup: int) -> Callable[[int], float]:
    """A schedule's factor with a linear warm-up after each restart.

    From step k * reset_every on, the factor climbs from 0 to where `base` stands `warmup` steps later. The official
    code's `cosine_restarts` climbs to another point of the cosine and jumps from there, and has no such warm-up as
    long as the first one lasts.
    """

    # a plain function: LambdaLR would save the attributes of any other callable
    def factor(step: int) -> float:
        since = step % reset_every
        if step < reset_every or since >= warmup:
            return base(step)
        return base(step - since + warmup) * since / warmup

    factor.restarts = True  # type: ignore[attr-defined]
    return factor


def restart_schedule(scheduler: Any, every: int, warmup: int, label: str, args: TrainingArguments) -> None:
    """Put `with_restarts` into the schedule that Trainer has made or restored, once.

    Raises:
        ValueError: it is no `LambdaLR`.
    """
    while isinstance(scheduler, AcceleratedScheduler):
        scheduler = scheduler.scheduler
    if not isinstance(scheduler, LambdaLR):
        raise ValueError(
            f"lr_scheduler_type='{plain(args.lr_scheduler_type)}' or the Trainer's optimizers= gives a "
            f"{type(scheduler).__name__}, which takes no restarts: {label} needs a LambdaLR, "
            "lr_scheduler_type='cosine_with_min_lr' for example"
        )
    # a schedule given to the Trainer serves every call of train()
    scheduler.lr_lambdas = [
        base if hasattr(base, "restarts") else with_restarts(base, every, warmup) for base in scheduler.lr_lambdas
    ]
