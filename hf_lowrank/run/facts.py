"""What a Trainer run was, as the plain data that the report's schema asks for."""

import hashlib
import importlib.metadata
import json
import platform
import resource
import subprocess
import sys
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import PreTrainedModel, Trainer, TrainingArguments

from hf_lowrank.families.best import BestModel
from hf_lowrank.methods import FullRankConfig, LowRankConfig
from hf_lowrank.methods.base import ReparameterizedLinear
from hf_lowrank.methods.prepare import method_of, summary_of
from hf_lowrank.methods.summary import Summary, optimizer_state_bytes, summarize
from hf_lowrank.methods.trainer_arguments import plain
from hf_lowrank.model_config import loading_class
from hf_lowrank.optim.plan import IDENTITY_KEY
from hf_lowrank.report.secrets import without_secrets

__all__ = ["RunInfo", "peak_memory", "run_facts"]

PACKAGES = ("hf_lowrank", "torch", "transformers", "accelerate", "peft", "datasets", "huggingface_hub", "tokenizers")


@dataclass(frozen=True)
class RunInfo:
    """What Trainer does not know about a run; everything may be left out.

    Attributes:
        name: of the run; default: the output folder's.
        data: description of the data, as `hf_lowrank.data` gives it (report.json's `data`).
        model_size: name of the size, `60m` for example.
        command: what was typed, word by word; flags that carry a token or a password are left out.
        license: of the weights, as the Hub names it.
    """

    name: str | None = None
    data: dict[str, Any] | None = None
    model_size: str | None = None
    command: list[str] | None = None
    license: str | None = None


def _git_commit() -> str | None:
    """Commit of this package's own checkout; None for an installed copy, whatever repository surrounds it."""
    folder = Path(__file__).parent
    git = ["git", "-C", str(folder)]
    try:
        subprocess.run([*git, "ls-files", "--error-unmatch", Path(__file__).name], check=True, capture_output=True)
        done = subprocess.run([*git, "rev-parse", "HEAD"], check=True, capture_output=True, text=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.strip()


def peak_memory() -> dict[str, Any]:
    """Peak bytes of this process so far: allocated on the GPU, or resident if there is none."""
    if torch.cuda.is_available():
        return {"value": torch.cuda.max_memory_allocated(), "kind": "cuda_allocated"}
    # Linux counts in KiB, macOS in bytes
    unit = 1 if sys.platform == "darwin" else 1024
    return {"value": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit, "kind": "process_rss"}


def _versions() -> dict[str, str | None]:
    versions: dict[str, str | None] = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = None
    return versions


def _hardware() -> str:
    if torch.cuda.is_available():
        return f"{torch.cuda.device_count()} x {torch.cuda.get_device_name()}"
    return f"{platform.machine()} CPU, {torch.get_num_threads()} threads"


def _sizes(model: Any, method: LowRankConfig) -> Summary:
    try:
        return summary_of(model, method)
    except ValueError:
        # somebody else's model need not have repeated blocks: nothing in it is a target then
        return summarize(model, method, [], {})


def _model_facts(model: Any, info: RunInfo, trained: int, total: int) -> dict[str, Any]:
    config = getattr(model, "config", None)
    values = {} if config is None else config.to_dict()
    # the same architecture has the same hash whatever method and library version it is trained with
    own = {k: v for k, v in values.items() if k not in ("lowrank", "transformers_version", "_name_or_path")}
    digest = hashlib.sha256(json.dumps(own, sort_keys=True, default=str).encode()).hexdigest()
    return {
        "architecture": getattr(config, "model_type", None) or type(model).__name__,
        "size": info.model_size,
        "parameters": total,
        "parameters_trained": trained,
        "config_hash": None if config is None else digest,
        "loaded_by": _loaded_by(model),
    }


def _other_lr_scale(groups: list[dict[str, Any]]) -> float | None:
    """The rate outside of the targets over the targets', as the groups have it; None for groups of another making."""
    marks = {group.get(IDENTITY_KEY) for group in groups}
    if len(marks) == 1 and (mark := marks.pop()) is not None:
        return float(json.loads(mark)["other_lr_scale"])
    return 1.0 if len({float(group.get("initial_lr", group["lr"])) for group in groups}) == 1 else None


def _optimizer_facts(trainer: Trainer) -> dict[str, Any]:
    groups = [] if trainer.optimizer is None else trainer.optimizer.param_groups
    first = groups[0] if groups else {}
    inner = getattr(trainer.optimizer, "optimizer", trainer.optimizer)
    eps = first.get("eps")
    return {
        "name": None if inner is None else type(inner).__name__,
        "betas": list(first["betas"]) if "betas" in first else None,
        # Adafactor has two of them
        "eps": eps if isinstance(eps, int | float) else None,
        "weight_decay": max((group.get("weight_decay", 0.0) for group in groups), default=None),
        "max_grad_norm": trainer.args.max_grad_norm,
        "other_lr_scale": _other_lr_scale(groups),
    }


def _is_predicted(optimizer: Any, method: LowRankConfig, args: TrainingArguments) -> bool:
    """Whether an optimizer keeps the state that a method's summary has the size of."""
    own = method.optimizer(args)
    if not isinstance(optimizer, torch.optim.Adam if own is None else own[0]):
        return False
    # a third moment
    return not any(group.get("amsgrad") for group in optimizer.param_groups)


def _tokens(model: Any, seen: int | None) -> int | None:
    """What Trainer has counted, where that is tokens: of a model of images it counts the pixels."""
    return seen or None if getattr(model, "main_input_name", "input_ids") == "input_ids" else None


def _best_facts(model: Any, best: BestModel | None, steps: int) -> dict[str, Any]:
    """What a run with the best model has in the place of the facts of the last one, after so many steps."""
    if best is None:
        return {}
    chosen = {"steps": steps, "metric": best.metric, "value": best.value}
    tokens = _tokens(model, best.tokens_seen)
    return {"steps": best.step, "tokens_seen": tokens, "flops": best.flops, "best_of": chosen}


def _start_facts(model: Any) -> dict[str, Any]:
    recorded = (getattr(getattr(model, "config", None), "lowrank", None) or {}).get("init_from")
    return {} if recorded is None else {"init_from": recorded}


def _loaded_by(model: Any) -> str | None:
    """The class of transformers that loads what is published of a model; None if none does."""
    name = next((c.__name__ for c in type(model).__mro__ if getattr(transformers, c.__name__, None) is c), None)
    dense = all(m.has_dense_form for m in model.modules() if isinstance(m, ReparameterizedLinear))
    return loading_class(name, dense)


def _schedule_and_batch(trainer: Trainer) -> dict[str, Any]:
    args = trainer.args
    accumulation, world = args.gradient_accumulation_steps, args.world_size
    # auto_find_batch_size may have lowered what args asks for
    process_batch = trainer._train_batch_size
    return {
        "lr_schedule": {
            "type": plain(args.lr_scheduler_type),
            "warmup_steps": args.get_warmup_steps(trainer.state.max_steps),
            **(args.lr_scheduler_kwargs if isinstance(args.lr_scheduler_kwargs, dict) else {}),
        },
        "batch": {
            "per_device": process_batch // max(1, args.n_gpu),
            "gradient_accumulation": accumulation,
            "world_size": world,
            "global_sequences": process_batch * accumulation * world,
        },
    }


def run_facts(
    trainer: Trainer, info: RunInfo, wall_time_seconds: float, best: BestModel | None = None
) -> dict[str, Any]:
    """The report's `run` for the state a Trainer is in.

    Args:
        trainer: any Trainer, during or after training.
        info: what Trainer does not know.
        wall_time_seconds: time spent training, earlier parts of a resumed run included.
        best: the model that the Trainer has, where that is not the last step's.
    """
    args, state = trainer.args, trainer.state
    model = trainer.accelerator.unwrap_model(trainer.model)
    method = method_of(model) or FullRankConfig()
    summary, optimizer = _sizes(model, method), _optimizer_facts(trainer)
    precision = "bf16 autocast" if args.bf16 else "fp16 autocast" if args.fp16 else str(next(model.parameters()).dtype)
    inner = getattr(trainer.optimizer, "optimizer", trainer.optimizer)
    return {
        "name": info.name or Path(str(args.output_dir)).resolve().name,
        "method": method.method,
        **method.facts(),
        "method_config": method.to_dict(),
        **_start_facts(model),
        "coverage": summary.coverage,
        "weights_published": isinstance(model, PreTrainedModel),
        "model": _model_facts(model, info, summary.parameters_trained, summary.parameters),
        "optimizer_state_bytes": {
            "predicted": summary.state_bytes if _is_predicted(inner, method, args) else None,
            "measured": None if inner is None else optimizer_state_bytes(inner),
            "adamw": summary.adamw_state_bytes,
        },
        "peak_memory_bytes": peak_memory(),
        "tokens_seen": _tokens(model, state.num_input_tokens_seen),
        "flops": state.total_flos or None,
        "steps": state.global_step,
        "max_steps": state.max_steps,
        "seeds": {"seed": args.seed, "data_seed": args.data_seed},
        "learning_rate": args.learning_rate,
        **_schedule_and_batch(trainer),
        "optimizer": optimizer,
        "precision": precision.removeprefix("torch."),
        "world_size": args.world_size,
        "versions": _versions(),
        "git_commit": _git_commit(),
        "hardware": _hardware(),
        "wall_time_seconds": wall_time_seconds,
        "command": None if info.command is None else without_secrets(info.command),
        "license": info.license,
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        **_best_facts(model, best, state.global_step),
    }
