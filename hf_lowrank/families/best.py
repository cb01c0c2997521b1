"""The model that Trainer has at the end of a run: that of the last step, or of the best one."""

import copy
import json
import re
from dataclasses import dataclass
from pathlib import Path

from transformers import TrainerState, TrainingArguments

from hf_lowrank.sharding import all_gather_object

__all__ = ["BestModel", "best_model", "state_at"]

# how the names of the files begin from which Trainer loads weights
WEIGHTS = ("model", "pytorch_model", "adapter_model")


@dataclass(frozen=True)
class BestModel:
    """The model that Trainer has loaded at the end of a run (`load_best_model_at_end`).

    Attributes:
        step: its optimizer step.
        metric, value: what decided, and its value at this step if that was logged.
        tokens_seen, flops: what it was trained with, None if its checkpoint does not tell.
    """

    step: int
    metric: str
    value: float | None
    tokens_seen: int | None
    flops: float | None


def best_model(args: TrainingArguments, state: TrainerState) -> BestModel | None:
    """The best model, once Trainer has loaded it; None where it has that of the last step.

    Every process calls this. Trainer goes on with the last model where the best checkpoint's files are gone.
    """
    # by now the main process alone may see the files
    return all_gather_object(_best_model(args, state))[0]


def _best_model(args: TrainingArguments, state: TrainerState) -> BestModel | None:
    folder = Path(state.best_model_checkpoint or "")
    named = re.fullmatch(r"checkpoint-(\d+)", folder.name)
    if not args.load_best_model_at_end or named is None or not folder.is_dir():
        return None
    if not any(path.name.startswith(WEIGHTS) for path in folder.iterdir()):
        return None
    step = int(named[1])
    metric = f"eval_{(args.metric_for_best_model or 'loss').removeprefix('eval_')}"
    logged = [entry[metric] for entry in state.log_history if entry.get("step") == step and metric in entry]
    try:
        then = json.loads((folder / "trainer_state.json").read_text())
    except (OSError, ValueError):
        then = {}
    return BestModel(
        step=step,
        metric=metric,
        value=float(logged[-1]) if logged else None,
        tokens_seen=then.get("num_input_tokens_seen") or None,
        flops=then.get("total_flos") or None,
    )


def state_at(state: TrainerState, step: int) -> TrainerState:
    """The Trainer's state with another step, for what is measured of the model of that step."""
    earlier = copy.copy(state)
    earlier.global_step = step
    return earlier
