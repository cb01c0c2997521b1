"""What every method's config shares, and the registry that finds a method by its name.

A method is one module in this folder. It holds the config, a dataclass whose fields carry their help for the CLI, the
recipes and the docs, and beside it the method's layer (see `ReparameterizedLinear`) or its optimizer (see
`hf_lowrank.methods.projected`). The config's class attributes and hooks tell `hf_lowrank.methods.prepare` what to do
with a model.

Shapes: a target weight is W: (m, n) = (out_features, in_features); r is the rank.
"""

import dataclasses
import difflib
import hashlib
import json
import math
import os
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Self, TypeVar

import torch
from huggingface_hub import hf_hub_download
from huggingface_hub.utils import EntryNotFoundError
from torch import Tensor, nn
from transformers import Trainer, TrainerCallback, TrainingArguments
from transformers.pytorch_utils import Conv1D
from transformers.utils import PushToHubMixin

from hf_lowrank.experts import Stack
from hf_lowrank.methods.layer import ReparameterizedLinear
from hf_lowrank.plugins import load_plugins

__all__ = [
    "CONFIG_NAME", "METHODS", "LowRankConfig", "MethodCallback", "Paper", "ReparameterizedLinear", "get_method",
    "nearest", "register", "seeded_generator", "uses_deepspeed",
]  # fmt: skip

CONFIG_NAME = "lowrank_config.json"

METHODS: dict[str, type["LowRankConfig"]] = {}

C = TypeVar("C", bound=type["LowRankConfig"])


def nearest(name: str, choices: list[str]) -> str:
    """` (did you mean 'x'?)` when one of the choices is close to `name`, otherwise an empty string."""
    close = difflib.get_close_matches(name, choices, n=1)
    return f" (did you mean '{close[0]}'?)" if close else ""


def register(cls: C) -> C:
    """Class decorator that makes a config findable under its `method` name."""
    METHODS[cls.method] = cls
    return cls


def get_method(name: str) -> type["LowRankConfig"]:
    """The config class of the method `name`; `ValueError` with the nearest name when there is none.

    A method of another package is found once that package has registered it: when it is imported, or by itself where
    it is installed with an entry point (see `hf_lowrank.plugins`).
    """
    if name not in METHODS:
        load_plugins()
    if name not in METHODS:
        names = sorted(METHODS)
        raise ValueError(f"unknown method '{name}'{nearest(name, names)}; the methods are {', '.join(names)}")
    return METHODS[name]


@dataclass(frozen=True)
class Paper:
    """The paper that introduced a method.

    Attributes:
        title: of the paper.
        arxiv: its number there, `2403.03507` for example; None if it is not there.
        authors: their names, separated by commas.
        url, year: where else it is to be read, and since when, for a paper that is not on arXiv.
    """

    title: str
    arxiv: str | None
    authors: str
    url: str | None = None
    year: int | None = None


def seeded_generator(seed: int, *names: str | int) -> torch.Generator:
    """A separate generator for each layer and purpose; it does not depend on earlier draws or on the process."""
    digest = hashlib.sha256(":".join(map(str, (seed, *names))).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:7]))


class MethodCallback(TrainerCallback):
    """What a method does at certain steps of a Trainer.

    Attributes:
        config: the method's settings.
        trainer: set by `hf_lowrank.attach`: what is logged through it reaches TensorBoard, W&B and the like.
        refreshes: whether it changes what the method trains in from time to time, by a merge for example.
        refreshing: entered around every such change, to measure what it takes.
    """

    config: Any = None
    trainer: Trainer | None = None
    refreshes: bool = False
    refreshing: Callable[[], AbstractContextManager[None]] = staticmethod(nullcontext)


def uses_deepspeed(args: TrainingArguments) -> bool:
    """Whether DeepSpeed will shard the model: `args.deepspeed` says so, or `accelerate launch` does."""
    return bool(args.deepspeed or getattr(args, "deepspeed_plugin", None))


@dataclass
class LowRankConfig(PushToHubMixin):
    """Base of the methods' configs: a dataclass with PEFT's saving and loading.

    `other_lr_scale` gives what is no target (embeddings, norms, head, all biases) a rate of its own: it trains at
    other_lr_scale times Trainer's `learning_rate`, at every step of the schedule; decoupled weight decay, which the
    rate multiplies, scales with it. The targets' weights, or the factors in their place, train at `learning_rate`,
    which is also the rate that Trainer logs. A factor of a method's own on its update (`scale`, `alpha`) is no part
    of the rate: GaLore with scale 0.25 at a rate of 1e-2 moves its targets like a rate of 2.5e-3 and everything else
    at 1e-2, as full-rank AdamW does at a rate of 2.5e-3 with other_lr_scale 4.

    Raises:
        ValueError: from the constructor, when a field's value makes no sense; the message names the field.
    """

    method: ClassVar[str]
    # how cards, tables and messages call the method
    label: ClassVar[str]
    paper: ClassVar[Paper | None] = None
    # whether the method puts its own layers in the targets' place
    replaces_layers: ClassVar[bool] = False
    # whether those layers start from the weights of the layers they replace
    keeps_weights: ClassVar[bool] = False
    # whether the method trains a stack of experts' matrices (E, m, n) as it does the matrices of layers
    takes_stacks: ClassVar[bool] = False
    # whether plain linear layers can compute what the method's layers compute
    has_dense_form: ClassVar[bool] = True
    # fields that change how a run is computed but not its result: a resumed run may change them
    runtime_fields: ClassVar[tuple[str, ...]] = ()

    target_modules: list[str] | str | None = field(
        default=None,
        kw_only=True,
        metadata={
            "help": "Layers to change: names or suffixes, a regular expression, or 'all-linear'. "
            "Default: every Linear, Conv1D and stack of experts inside the repeated decoder blocks, but routers."
        },
    )
    other_lr_scale: float = field(
        default=1.0,
        kw_only=True,
        metadata={"help": "Learning rate of what is no target (embeddings, norms, head, biases) over the targets'."},
    )

    def __post_init__(self) -> None:
        targets = self.target_modules
        listed = isinstance(targets, list | tuple | set) and all(isinstance(name, str) for name in targets)
        if targets is not None and not isinstance(targets, str) and not listed:
            raise ValueError(f"target_modules={targets!r}: give a list of names, a regular expression or 'all-linear'")
        if isinstance(targets, tuple | set):
            self.target_modules = sorted(targets)
        scale: Any = self.other_lr_scale
        if isinstance(scale, bool) or not isinstance(scale, int | float) or not 0 < scale < math.inf:
            raise ValueError(
                f"other_lr_scale={scale!r}: the rate of what is no target over the targets' is a positive number, "
                "1 for one rate"
            )
        self.other_lr_scale = float(scale)
        rank = getattr(self, "r", None)
        if rank is not None and (not isinstance(rank, int) or isinstance(rank, bool) or rank < 1):
            raise ValueError(f"r={rank!r}: the rank is a whole number of 1 or more, or None for hidden_size / 4")

    # Hooks: what a method does to a model

    def check_arguments(self, args: TrainingArguments) -> None:
        """`ValueError` where the Trainer's arguments contradict the method; called before the model is changed."""

    def replace_layers(self, model: nn.Module, ranks: dict[str, int], seed: int) -> None:
        """Put the method's layers in the place of the targets, given by name with their ranks.

        Each layer draws from a generator of its own, so that a layer's values do not depend on the others.
        """
        for name, r in ranks.items():
            layer = self.replace_layer(model.get_submodule(name), r, seeded_generator(seed, name))
            layer.name = name
            model.set_submodule(name, layer)

    def replace_layer(self, linear: nn.Module, r: int, generator: torch.Generator) -> ReparameterizedLinear:
        """The layer that takes the place of `linear` (`Linear` or `Conv1D`), with its bias, device and dtype."""
        weight, bias = linear.weight, linear.bias
        assert isinstance(weight, Tensor)
        transposed = isinstance(linear, Conv1D)
        n, m = weight.shape if transposed else weight.shape[::-1]
        layer = self.new_layer(n, m, r, bias=bias is not None, fan_in_fan_out=transposed, generator=generator)
        layer.to(device=weight.device, dtype=weight.dtype)
        if isinstance(bias, Tensor):
            layer.get_parameter("bias").data.copy_(bias.data)
        return layer

    def new_layer(self, in_features: int, out_features: int, r: int, **kwargs: Any) -> ReparameterizedLinear:
        """A layer of the method with initial values; where `replaces_layers`.

        Args:
            in_features, out_features, r: sizes of the layer.
            **kwargs: `bias`, `fan_in_fan_out` and `generator`, as `ReparameterizedLinear` and `torch.nn` name them.
        """
        raise NotImplementedError(f"{self.label} leaves the layers as they are")

    def replace_stack(self, weight: nn.Parameter, stack: Stack, r: int, key: str, name: str, seed: int) -> Any:
        """The `hf_lowrank.methods.stacks.ReparameterizedStack` that takes a stack's place; where `takes_stacks`.

        Args:
            weight, stack, r: the parameter as it is stored, its layout, and the rank of every matrix.
            key, name, seed: its name in its module, the target's; each matrix draws what a layer `name[i]` would.
        """
        layers = [
            self.new_layer(stack.cols, stack.rows, r, generator=seeded_generator(seed, f"{name}[{i}]"))
            for i in range(stack.count)
        ]
        return self.new_stack(stack, key, layers).to(device=weight.device, dtype=weight.dtype)

    def new_stack(self, stack: Stack, key: str, layers: list[Any]) -> Any:
        """One module of the layers of a stack's matrices, a `hf_lowrank.methods.stacks.StackOfLayers`."""
        raise NotImplementedError(f"{self.label} takes no stacks of experts")

    def before_training(self, model: nn.Module, args: TrainingArguments) -> None:
        """Set what a model needs for training alone, once its layers are the method's."""

    def callbacks(self, args: TrainingArguments) -> list[MethodCallback]:
        """Callbacks the method needs in the Trainer."""
        return []

    def group_options(self, r: int) -> dict[str, Any]:
        """Keys that mark an optimizer group of targets of rank r; empty if the targets are nothing special."""
        return {}

    def optimizer(self, args: TrainingArguments) -> tuple[type[torch.optim.Optimizer], dict[str, Any]] | None:
        """The method's optimizer class and its arguments, or None to leave the choice to `args.optim`."""
        return None

    def state_elements(self, m: int, n: int, r: int) -> int:
        """Numbers the optimizer keeps for one target (m, n) of rank r, step counters aside."""
        return 2 * m * n

    def publish_code(self, model: nn.Module, folder: Path) -> None:
        """Add the code that plain transformers needs to load weights as trained; for methods without a dense form.

        Raises:
            ValueError: no such code can be written for the model.
        """

    @classmethod
    def facts(cls) -> dict[str, Any]:
        """What a report says about the method itself, whatever its settings."""
        paper = None if cls.paper is None else dataclasses.asdict(cls.paper)
        return {"method_label": cls.label, "method_paper": paper, "dense_form": cls.has_dense_form}

    # Saving and loading

    def identity(self) -> dict[str, Any]:
        """What a resumed run must have in common with the run it resumes: `to_dict` without the `runtime_fields`."""
        return {key: value for key, value in self.to_dict().items() if key not in self.runtime_fields}

    def to_dict(self) -> dict[str, Any]:
        """The method's name and its fields, ready for JSON."""
        return {"method": self.method, **dataclasses.asdict(self)}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Self:
        """Inverse of `to_dict`; the base class returns the config of whatever method is named."""
        values = dict(values)
        name = values.pop("method", getattr(cls, "method", None))
        if name is None:
            raise ValueError(f"the config names no method; 'method' is one of {', '.join(sorted(METHODS))}")
        try:
            chosen = get_method(name)
        except ValueError as error:
            raise ValueError(f"{error}; where another package defines it, install or import that package") from None
        if not issubclass(chosen, cls):
            raise ValueError(
                f"the config is for '{name}', not for {cls.__name__}: use LowRankConfig to load any method"
            )
        names = [f.name for f in dataclasses.fields(chosen)]
        for key in values:
            if key not in names:
                raise ValueError(
                    f"{chosen.__name__} has no field '{key}'{nearest(key, names)}; it has {', '.join(names)}"
                )
        return chosen(**values)

    def save_pretrained(
        self, save_directory: str | os.PathLike[str], push_to_hub: bool = False, **kwargs: Any
    ) -> None:
        """Write `lowrank_config.json` into a folder; `push_to_hub=True` uploads it as transformers' configs do."""
        folder = Path(save_directory)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / CONFIG_NAME).write_text(json.dumps(self.to_dict(), indent=2, sort_keys=True) + "\n")
        if push_to_hub:
            self.push_to_hub(kwargs.pop("repo_id", folder.name), **kwargs)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | os.PathLike[str], **kwargs: Any) -> Self:
        """Read a config from a folder or a Hub repo.

        Args:
            pretrained_model_name_or_path: folder that holds `lowrank_config.json`, or a repo id.
            **kwargs: passed to `huggingface_hub.hf_hub_download` (revision, token, subfolder, ...).

        Raises:
            FileNotFoundError: the folder or repo holds no such file.
            ValueError: the file is no config of a registered method.
        """
        source = Path(pretrained_model_name_or_path)
        if source.is_dir():
            path = source / kwargs.get("subfolder", "") / CONFIG_NAME
        else:
            try:
                path = Path(hf_hub_download(str(pretrained_model_name_or_path), CONFIG_NAME, **kwargs))
            except EntryNotFoundError:
                path = source / CONFIG_NAME
        if not path.is_file():
            raise FileNotFoundError(f"{pretrained_model_name_or_path} holds no {CONFIG_NAME}: it was not saved here")
        try:
            return cls.from_dict(json.loads(path.read_text()))
        except json.JSONDecodeError as error:
            raise ValueError(f"{path} is not valid JSON ({error}): save the config again") from error
