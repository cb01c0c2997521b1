"""CoLA (arXiv 2502.10940): each target is a low-rank auto-encoder, y = B act(A x).

CoLA-M (the paper's memory-efficient form) is the same model: in training each block keeps its input and its A x, and
the backward pass computes the rest again.

Shapes: A: (r, n), B: (m, r), x: (..., n), h = A x: (..., r), y: (..., m).
"""

import functools
import itertools
import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import torch
import torch.nn.functional as F  # noqa: N812
import transformers
from jinja2 import Environment, PackageLoader, StrictUndefined
from torch import Tensor, nn
from torch.utils.checkpoint import CheckpointPolicy, create_selective_checkpoint_contexts
from transformers import PreTrainedConfig, PreTrainedModel, TrainingArguments
from transformers.activations import ACT2CLS, ACT2FN
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from hf_lowrank.methods.base import LowRankConfig, Paper, ReparameterizedLinear, nearest, register

__all__ = ["CoLAConfig", "CoLALinear"]

MODELING_FILE = "modeling_cola.py"

# every class a block's own activation can be; torch.nn keeps attention and the softmaxes in the same module
ACTIVATIONS: tuple[Any, ...] = (
    *(entry[0] if isinstance(entry, tuple) else entry for entry in ACT2CLS.values()),
    *(getattr(nn, name) for name in nn.modules.activation.__all__ if "Attention" not in name and "oftm" not in name),
)


@torch.library.custom_op("hf_lowrank::down_project", mutates_args=())
def down_project(x: Tensor, A: Tensor) -> Tensor:
    """h = A x: (..., r), as an operation of its own, so that a checkpointing policy knows it among other products."""
    return F.linear(x, A)


@down_project.register_fake
def _(x: Tensor, A: Tensor) -> Tensor:
    return x.new_empty(*x.shape[:-1], A.shape[0])


def _keep_factors(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _down_project_backward(ctx: Any, dh: Tensor) -> tuple[Tensor | None, Tensor | None]:
    x, A = ctx.saved_tensors
    dx = dh @ A if ctx.needs_input_grad[0] else None
    dA = dh.reshape(-1, A.shape[0]).T @ x.reshape(-1, A.shape[1]) if ctx.needs_input_grad[1] else None
    return dx, dA


down_project.register_autograd(_down_project_backward, setup_context=_keep_factors)


def _keep_low_rank(ctx: Any, op: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    """Of all that a block computes, keep the low-rank activations A x (the paper's CoLA-M)."""
    kept = op is torch.ops.hf_lowrank.down_project.default
    return CheckpointPolicy.MUST_SAVE if kept else CheckpointPolicy.PREFER_RECOMPUTE


class CoLALinear(ReparameterizedLinear):
    """y = B act(A x) (+ bias), the paper's low-rank auto-encoder in the place of W x.

    A and B are N(0, s^2) with s = r^(-1/4) (m + n)^(-1/4), so that an entry of B A has variance 1 / (m + n).

    Args:
        in_features, out_features: n and m.
        r: width of the low-rank activation.
        activation: name of `act` among transformers' `ACT2FN`.
        bias: whether a bias (m,) is added.
        fan_in_fan_out: see `ReparameterizedLinear`.
        generator: source of the initial values.

    Attributes:
        recompute: A x is computed by `down_project`, for CoLA-M's checkpointing; the numbers are the same.
    """

    has_dense_form: ClassVar[bool] = False

    def __init__(
        self,
        in_features: int,
        out_features: int,
        r: int,
        activation: str = "silu",
        bias: bool = False,
        fan_in_fan_out: bool = False,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        self.in_features, self.out_features, self.r = in_features, out_features, r
        self.fan_in_fan_out = fan_in_fan_out
        self.recompute = False
        std = (r * (in_features + out_features)) ** -0.25
        self.A = nn.Parameter(torch.empty(r, in_features).normal_(0, std, generator=generator))
        self.B = nn.Parameter(torch.empty(out_features, r).normal_(0, std, generator=generator))
        self.bias = nn.Parameter(torch.zeros(out_features)) if bias else None
        self.activation = ACT2FN[activation]

    def forward(self, x: Tensor) -> Tensor:
        """y: (..., m) from x: (..., n)."""
        if self.recompute:
            A: Tensor = self.A
            # autocast knows torch's own products only
            if torch.is_autocast_enabled(x.device.type):
                dtype = torch.get_autocast_dtype(x.device.type)
                x, A = x.to(dtype), A.to(dtype)
            h: Tensor = down_project(x, A)
        else:
            h = F.linear(x, self.A)
        return F.linear(self.activation(h), self.B, self.bias)

    @torch.no_grad()
    def dense_weight(self) -> Tensor:
        with torch.autocast(self.A.device.type, enabled=False):
            return torch.mm(self.B, self.A)

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, r={self.r}"


@register
@dataclass
class CoLAConfig(LowRankConfig):
    """CoLA with the official code's initial values; `only_lr_act` is off, as in the study up to 130M."""

    method: ClassVar[str] = "cola"
    label: ClassVar[str] = "CoLA"
    paper: ClassVar[Paper | None] = Paper(
        title="CoLA: Compute-Efficient Pre-Training of LLMs via Low-Rank Activation",
        arxiv="2502.10940",
        authors="Ziyue Liu, Ruijie Zhang, Zhengyang Wang, Mingsong Yan, Zi Yang, Paul D. Hovland, Bogdan Nicolae, "
        "Franck Cappello, Sui Tang, Zheng Zhang",
    )
    replaces_layers: ClassVar[bool] = True
    has_dense_form: ClassVar[bool] = False
    runtime_fields: ClassVar[tuple[str, ...]] = ("recompute",)

    r: int | None = field(
        default=None, metadata={"help": "Width of the low-rank activation; default hidden_size / 4."}
    )
    activation: str = field(
        default="silu",
        metadata={"help": "Activation between the factors, by its name in transformers: silu, gelu, ..."},
    )
    only_lr_act: bool = field(
        default=False, metadata={"help": "Drop the MLP's own activation, so that only the low-rank ones are left."}
    )
    recompute: bool = field(
        default=False,
        metadata={"help": "CoLA-M: keep the low-rank activations alone and compute the others again going backward."},
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.activation not in ACT2FN:
            names = sorted(ACT2FN)
            raise ValueError(
                f"activation={self.activation!r} is unknown{nearest(str(self.activation), names)}; transformers has "
                f"{', '.join(names)}"
            )
        for name in ("only_lr_act", "recompute"):
            if not isinstance(getattr(self, name), bool):
                raise ValueError(f"{name}={getattr(self, name)!r}: give true or false")

    def check_arguments(self, args: TrainingArguments) -> None:
        if self.recompute and args.gradient_checkpointing:
            raise ValueError(
                "recompute=True (CoLA-M) and gradient_checkpointing=True both recompute the blocks: drop "
                "gradient_checkpointing, CoLA-M keeps little more; or set recompute=False"
            )

    def replace_layers(self, model: nn.Module, ranks: dict[str, int], seed: int) -> None:
        # looked up before anything is changed, because it is an error if there is none
        dropped = _own_activations(model, ranks) if self.only_lr_act else []
        super().replace_layers(model, ranks, seed)
        for name in dropped:
            model.set_submodule(name, nn.Identity())

    def new_layer(self, in_features: int, out_features: int, r: int, **kwargs: Any) -> CoLALinear:
        return CoLALinear(in_features, out_features, r, activation=self.activation, **kwargs)

    def before_training(self, model: nn.Module, args: TrainingArguments) -> None:
        """Switch on CoLA-M's checkpointing; `ValueError` for a model that has no checkpointing of its blocks."""
        if not self.recompute:
            return
        if not getattr(model, "supports_gradient_checkpointing", False):
            raise ValueError(
                f"recompute=True (CoLA-M) needs the gradient checkpointing of transformers' models, which "
                f"{type(model).__name__} does not have: set recompute=False"
            )
        for module in model.modules():
            if isinstance(module, CoLALinear):
                module.recompute = True
        context_fn = functools.partial(create_selective_checkpoint_contexts, _keep_low_rank)
        # transformers has renamed the method, and warns about the older name if it has both
        enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
        assert callable(enable)
        enable({"use_reentrant": False, "context_fn": context_fn})
        # only reentrant checkpointing needs this hook, and the model could not be pickled with it
        if callable(disable := getattr(model, "disable_input_require_grads", None)):
            disable()

    def state_elements(self, m: int, n: int, r: int) -> int:
        # PReLU and xIELU have parameters of their own
        return 2 * (r * (m + n) + sum(p.numel() for p in ACT2FN[self.activation].parameters()))

    def publish_code(self, model: nn.Module, folder: Path) -> None:
        """Add `modeling_cola.py` to a folder of published weights, and say in its config.json what is in them.

        The config names a model type of its own, which transformers does not know: without `trust_remote_code=True`
        it refuses the folder, where under the plain model's type it would start from random layers with a warning.

        Raises:
            ValueError: transformers does not have the model's class or its config's, so the file cannot name it.
        """
        path = folder / "config.json"
        values = json.loads(path.read_text())
        architecture, config_class = values["architectures"][0], type(model.config).__name__
        (folder / MODELING_FILE).write_text(_modeling_code(architecture, config_class))
        auto = "AutoModelForCausalLM" if architecture in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values() else "AutoModel"
        module = MODELING_FILE.removesuffix(".py")
        targets = {name: layer.r for name, layer in model.named_modules() if isinstance(layer, CoLALinear)}
        published = {
            "model_type": values["model_type"],
            "architectures": [architecture],
            "targets": targets,
            "dropped_activations": [n for n, module in _beside(model, targets) if isinstance(module, nn.Identity)],
        }
        values |= {
            "model_type": f"cola_{values['model_type']}",
            "architectures": [f"CoLA{architecture}"],
            "auto_map": {"AutoConfig": f"{module}.CoLA{config_class}", auto: f"{module}.CoLA{architecture}"},
            "lowrank": {**values["lowrank"], "published": published},
        }
        path.write_text(json.dumps(values, indent=2, sort_keys=True) + "\n")


def _beside(model: nn.Module, targets: Iterable[str]) -> Iterator[tuple[str, nn.Module]]:
    """The modules, by name, that share their parent with one of the targets inside the repeated blocks."""
    for parent in dict.fromkeys(name.rpartition(".")[0] for name in targets):
        ancestors = itertools.accumulate(parent.split("."), "{}.{}".format)
        if any(isinstance(model.get_submodule(name), nn.ModuleList) for name in ancestors):
            children = model.get_submodule(parent).named_children()
            yield from ((f"{parent}.{name}", child) for name, child in children)


def _own_activations(model: nn.Module, targets: Iterable[str]) -> list[str]:
    """Names of the activations beside the targets; `ValueError` if there is none."""
    activations = [name for name, module in _beside(model, targets) if isinstance(module, ACTIVATIONS)]
    if not activations:
        raise ValueError(
            f"only_lr_act=True drops the MLP's activation, and {type(model).__name__} has none beside the target "
            "layers: set only_lr_act=False, or take the MLP's layers in with target_modules"
        )
    return activations


def _modeling_code(architecture: str, config_class: str) -> str:
    """Source of the file that `trust_remote_code` runs, for a model class of transformers and its config class."""
    for name, base in ((architecture, PreTrainedModel), (config_class, PreTrainedConfig)):
        cls = getattr(transformers, name, None) if name.isidentifier() else None
        if not (isinstance(cls, type) and issubclass(cls, base)):
            raise ValueError(f"{name} is no class of transformers, so {MODELING_FILE} cannot build on it")
    loader = PackageLoader("hf_lowrank.methods", "templates")
    environment = Environment(loader=loader, undefined=StrictUndefined, keep_trailing_newline=True)
    template = environment.get_template(f"{MODELING_FILE}.jinja")
    return template.render(architecture=architecture, config_class=config_class)
