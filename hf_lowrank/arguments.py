"""The recipe's command line: a YAML file of defaults, flags that override it, and errors of one line.

`--method` is read first, and only that method's fields become flags, since several methods have an `alpha`. Types,
help texts and lists work as in `HfArgumentParser`.
"""

import argparse
import dataclasses
import logging
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

import torch
import yaml
from transformers import HfArgumentParser, TrainingArguments
from transformers.utils import is_torch_bf16_gpu_available, is_torch_tf32_available, is_torch_xla_available

from hf_lowrank.methods import METHODS, LowRankConfig, get_method
from hf_lowrank.models import SIZES
from hf_lowrank.options import DataArguments, nearest, option
from hf_lowrank.report.catalogue import CATALOGUE, LOSS

__all__ = ["Recipe", "RecipeArguments", "parse_recipe"]

logger = logging.getLogger(__name__)

# the loss is evaluated by Trainer
METRICS = (*(entry.name for entry in CATALOGUE if entry is not LOSS), "downstream")
# other keys of the YAML file that a flag removes: they would contradict it, or silently win over it
DISPLACED = {
    "dataset_name": ("dataset_path", "dataset_glob", "dataset_config_name"),
    "dataset_path": ("dataset_name", "dataset_config_name"),
    "model_size": ("model_config",),
    "model_config": ("model_size",),
    "num_train_epochs": ("max_steps",),
    "gradient_accumulation_steps": ("total_batch_size",),
    "lr_scheduler_type": ("lr_scheduler_kwargs",),
}
# lower limits of values that TrainingArguments does not check itself
LEAST = {
    "learning_rate": 0,
    "warmup_steps": 0,
    "adam_beta1": 0,
    "adam_beta2": 0,
    "weight_decay": 0,
    "max_grad_norm": 0,
    "per_device_train_batch_size": 1,
    "per_device_eval_batch_size": 1,
    "gradient_accumulation_steps": 1,
}
# secrets, and flags that say where a run is stored but not what it is: the command in the report lacks them
NOT_REPORTED = ("hub_token", "push_to_hub_token", "output_dir", "resume_from_checkpoint", "overwrite", "data_cache")


@dataclass
class RecipeArguments:
    """The recipe's own flags; those of training, data and method are classes of their own."""

    method: str = option("galore", "Pre-training method.")
    model_size: str | None = option(
        None, "nano, tiny (the default), or the study's Llama sizes 60m, 130m, 350m and 1b."
    )
    model_config: str | None = option(
        None, "Instead of a size: folder, JSON file or Hub repo of a transformers config."
    )
    total_batch_size: int | None = option(
        None, "Sequences in one optimizer step over all processes; sets the gradient accumulation."
    )
    metrics: list[str] = field(
        default_factory=lambda: ["spectral"],
        metadata={"help": f"Metrics during training: {', '.join(METRICS)}, or none."},
    )
    metrics_every: int = option(500, "Optimizer steps between two measurements.")
    metrics_sequences: int = option(
        32, "Validation sequences on which landscapes, barriers, activations and curvature are measured."
    )
    metrics_budget: float = option(0.02, "Share of the training time that all metrics together may take.")
    metrics_tasks: list[str] = field(
        default_factory=lambda: ["quick"], metadata={"help": "lm-eval tasks of --metrics downstream."}
    )
    metrics_limit: float | None = option(None, "Items of each of these tasks, or a share below 1 (default: all).")
    log_figures: bool = option(
        False, "Figures and the final table also go to trackio, W&B and TensorBoard (--report_to)."
    )
    init_from: str | None = option(
        None, "Run, checkpoint or Hub repo whose weights the run starts from, at step 0 (a warm start)."
    )
    baseline: str | None = option(None, "Run or Hub repo of the full-rank model with which activations are compared.")
    cpu_threads: int | None = option(
        None, "Threads of a process on a CPU (default: its share of the cores; accelerate launch sets one)."
    )
    data_cache: str | None = option(None, "Folder for tokenizer and rows, which runs on the same data share.")
    overwrite: bool = option(False, "Start anew where the output folder holds a run: the old run is removed.")
    license: str | None = option(None, "Licence of the weights, as the Hub names it.")

    def __post_init__(self) -> None:
        for name in self.metrics:
            if name not in (*METRICS, "none"):
                known = [*METRICS, "none"]
                raise ValueError(f"--metrics {name}{nearest(name, known)}: the metrics are {', '.join(known)}")
        if "activation" in self.metrics and self.baseline is None:
            raise ValueError("--metrics activation compares with a full-rank model: name it with --baseline")
        if not 0 <= self.metrics_budget < math.inf:
            raise ValueError(
                f"--metrics_budget {self.metrics_budget}: give a share of the training time, 0.02 for 2 %"
            )
        for name in ("metrics_every", "metrics_sequences", "total_batch_size", "cpu_threads"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"--{name} {value}: give 1 or more")
        if self.model_size is not None and self.model_size not in SIZES:
            raise ValueError(
                f"--model_size {self.model_size}{nearest(self.model_size, list(SIZES))}: the sizes are "
                f"{', '.join(SIZES)}; --model_config takes any other"
            )
        if self.model_size and self.model_config:
            raise ValueError("--model_size and --model_config exclude each other: drop one")


@dataclass
class Recipe:
    """A recipe's whole command line, parsed.

    Attributes:
        recipe, data, method, training: the four parts.
        source: the YAML file that the defaults came from, None without one.
        command: the arguments as typed, without secrets and paths.
        notes: what this machine cannot do of what the YAML file asks for, and what happens instead.
    """

    recipe: RecipeArguments
    data: DataArguments
    method: LowRankConfig
    training: TrainingArguments
    source: Path | None
    command: list[str]
    notes: list[str] = field(default_factory=list)


class _Parser(HfArgumentParser):
    """Raises an error in one line; argparse would print hundreds of lines of usage before it."""

    def error(self, message: str) -> NoReturn:
        raise ValueError(message)


def _method_flags(config_cls: type[LowRankConfig]) -> type:
    """The method's fields as a dataclass for the parser, which does not support `list[str] | str`."""
    flags = []
    for f in dataclasses.fields(config_cls):
        kind: Any = list[str] | None if f.name == "target_modules" else f.type
        flags.append((f.name, kind, field(default=f.default, metadata=dict(f.metadata))))
    return dataclasses.make_dataclass(f"{config_cls.__name__}Flags", flags)


def _method_config(config_cls: type[LowRankConfig], flags: Any) -> LowRankConfig:
    values = dict(vars(flags))
    targets = values["target_modules"]
    if targets is not None and len(targets) == 1:
        # a single word is a regular expression or all-linear, unless it is a plain name
        values["target_modules"] = targets if re.fullmatch(r"[\w.]+", targets[0]) else targets[0]
    return config_cls(**values)


def _read_yaml(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise ValueError(f"'{path}': there is no such file; give a YAML file with recipe settings, or only flags")
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is no valid YAML: {' '.join(str(error).split())}") from error
    if values is None:
        return {}
    if not isinstance(values, dict) or not all(isinstance(key, str) for key in values):
        raise ValueError(f"{path}: a recipe is a mapping of names to values, 'method: galore' for example")
    return values


def _default_of(action: argparse.Action, value: Any) -> Any:
    """A YAML value as a default, as a string where possible: argparse converts and checks only strings.

    Raises:
        ValueError: a list or mapping stands where one value is expected, or nothing where there is a default.
    """
    if value is None and action.default is None:
        return None
    if isinstance(value, dict) and action.dest in TrainingArguments._VALID_DICT_FIELDS:
        return value
    words = value if isinstance(value, list) and action.nargs == "+" else [value]
    if not all(isinstance(word, str | bool | int | float) for word in words):
        raise ValueError(f"{action.dest}: {value!r} is {'no value' if value is None else 'no single value'}")
    return [str(word) for word in words] if action.nargs == "+" else str(value)


def _flag_names(argv: Sequence[str]) -> set[str]:
    return {word[2:].partition("=")[0].replace("-", "_") for word in argv if word.startswith("--")}


def _drop_unsupported(values: dict[str, Any], typed: set[str], source: Path | None) -> list[str]:
    """Take out of a YAML file's values the precisions that this machine does not have; returns a line for each.

    A flag is no default of somebody else's: what it asks for in vain stays an error of transformers'.
    """
    on_cpu = "use_cpu" in typed or _is_on(values.get("use_cpu"))
    # autocast to bf16 works on a CPU, and is what somebody who names the CPU asks for
    has_bf16 = on_cpu or is_torch_bf16_gpu_available() or is_torch_xla_available()
    has_fp16 = not on_cpu and torch.accelerator.is_available()
    supported = {"bf16": has_bf16, "bf16_full_eval": has_bf16, "fp16": has_fp16, "tf32": is_torch_tf32_available()}
    notes = []
    for key, works in supported.items():
        if _is_on(values.get(key)) and not works and not typed & {key, f"no_{key}"}:
            del values[key]
            notes.append(f"{source} asks for {key}, which needs a GPU that has it: float32 instead")
    return notes


def _is_on(value: Any) -> bool:
    return str(value).lower() in ("true", "yes", "t", "y", "1")


def _first_pass(argv: Sequence[str]) -> argparse.Namespace:
    parser = _Parser([], add_help=False, allow_abbrev=False)
    parser.add_argument("--method")
    parser.add_argument("--model_size", "--model-size")
    return parser.parse_known_args(argv)[0]


def _reported(argv: Sequence[str]) -> list[str]:
    """The command line without the flags of NOT_REPORTED and their values."""
    kept, skip = [], False
    for word in argv:
        if word.startswith("--"):
            skip = word[2:].partition("=")[0].replace("-", "_") in NOT_REPORTED
        if not skip:
            kept.append(word)
    return kept


def parse_recipe(argv: Sequence[str], configs: Path) -> Recipe:
    """Read a recipe's command line.

    Args:
        argv: arguments without the program's name; a YAML file may come first, its keys are the flags' names.
        configs: folder of `<size>/<method>.yaml` files, which hold the defaults when no YAML file is given.

    Raises:
        ValueError: a method, flag or key is unknown (the nearest name is suggested), a value has the wrong type or is
            out of range, or the file is missing or not YAML. The message is one line.
    """
    command, argv = _reported(argv), list(argv)
    first = _first_pass(argv)
    if argv and not argv[0].startswith("-"):
        source: Path | None = Path(argv.pop(0))
        values = _read_yaml(Path(str(source)))
    else:
        get_method(first.method or RecipeArguments.method)
        source = configs / (first.model_size or "tiny") / f"{first.method or RecipeArguments.method}.yaml"
        source = source if source.is_file() else None
        values = {} if source is None else _read_yaml(source)
    typed = _flag_names(argv)
    if typed & {"hub_token", "push_to_hub_token"}:
        logger.warning(
            "--hub_token: everybody on this machine can read a command line; use `hf auth login` or HF_TOKEN"
        )
    for key in {key for flag in typed for key in DISPLACED.get(flag, ())} - typed:
        values.pop(key, None)
    notes = _drop_unsupported(values, typed, source)
    config_cls = get_method(str(first.method or values.get("method", RecipeArguments.method)))
    parts: list[Any] = [RecipeArguments, DataArguments, _method_flags(config_cls), TrainingArguments]
    parser = _Parser(parts, allow_abbrev=False)
    # of two actions the second is the `--no_...` form
    known = {action.dest: action for action in reversed(parser._actions) if action.dest != "help"}
    size = first.model_size or values.get("model_size") or "tiny"
    parser.set_defaults(output_dir=f"runs/{size}-{config_cls.method}")
    for key, value in values.items():
        if key not in known:
            more = nearest(key, list(known)) + _other_method(key, config_cls)
            raise ValueError(f"{source}: unknown key '{key}'{more}")
        try:
            parser.set_defaults(**{key: _default_of(known[key], value)})
        except ValueError as error:
            raise ValueError(f"{source}: {error}") from None
    *parsed, rest = parser.parse_args_into_dataclasses(argv, return_remaining_strings=True)
    for word in rest:
        name = word.lstrip("-").partition("=")[0].replace("-", "_")
        if word.startswith("-"):
            raise ValueError(f"unknown flag '{word}'{nearest(name, list(known))}{_other_method(name, config_cls)}")
        raise ValueError(f"'{word}' belongs to no flag: a YAML file comes first, and a value follows its flag")
    recipe, data, flags, training = parsed
    _check_training(training)
    return Recipe(recipe, data, _method_config(config_cls, flags), training, source, command, notes)


def _check_training(args: TrainingArguments) -> None:
    """Raise `ValueError` for numbers with which training would fail later, or would silently do something else."""
    for name, least in LEAST.items():
        value = getattr(args, name)
        if not (math.isfinite(value) and value >= least):
            raise ValueError(f"--{name} {value}: give a number of {least} or more")
    for name in ("adam_beta1", "adam_beta2"):
        if getattr(args, name) >= 1:
            raise ValueError(f"--{name} {getattr(args, name)}: give a number below 1")
    if args.max_steps < 1 and args.max_steps != -1:
        raise ValueError(f"--max_steps {args.max_steps}: give 1 or more, or -1 to go by --num_train_epochs")
    if args.max_steps == -1 and not args.num_train_epochs > 0:
        raise ValueError(f"--num_train_epochs {args.num_train_epochs}: give a number above 0, or --max_steps")


def _other_method(name: str, config_cls: type[LowRankConfig]) -> str:
    """A hint for an unknown name that is a field of another method."""
    others = [cls.method for cls in METHODS.values() if name in {f.name for f in dataclasses.fields(cls)}]
    return f": it is a setting of {', '.join(others)}, not of {config_cls.method}" if others else ""
