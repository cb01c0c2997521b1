"""`prepare`: put a method on a model, and give Trainer what it needs to train it."""

import functools
import json
import logging
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import nn
from transformers import Trainer, TrainerCallback, TrainingArguments

from hf_lowrank.conversion import convert_when_loading
from hf_lowrank.methods.base import LowRankConfig, ReparameterizedLinear, uses_deepspeed
from hf_lowrank.methods.first_step import before_first_step
from hf_lowrank.methods.foreign import is_adapted
from hf_lowrank.methods.fullrank import FullRankConfig
from hf_lowrank.methods.guard import guard_loading
from hf_lowrank.methods.probe import check_first_batch, own_weights, probe, unchanged_on_error, warn_unused
from hf_lowrank.methods.recorded import default_settings, layers_of, method_of, structure_hash
from hf_lowrank.methods.stacks import put_stack
from hf_lowrank.methods.summary import Summary, summarize, warn_of_uncovered
from hf_lowrank.methods.targets import Target, hidden_size, method_targets, refuse_shared, target_parameters
from hf_lowrank.methods.trainer_arguments import ADAMW
from hf_lowrank.optim.plan import IDENTITY_KEY, Plan
from hf_lowrank.running import running_trainer

__all__ = [
    "apply_method", "check_handed_on", "check_method", "identity", "method_of", "prepare",
    "resolve_ranks", "summary_of",
]  # fmt: skip

logger = logging.getLogger(__name__)


def prepare(
    model: nn.Module,
    config: LowRankConfig,
    args: TrainingArguments,
    *,
    reinit: bool = False,
    init_from: str | Path | None = None,
) -> tuple[nn.Module, dict[str, Any]]:
    """Put a low-rank method on a model, in place.

    Args:
        model: a model with repeated blocks, usually a `PreTrainedModel` made from a config.
        config: the method and its settings.
        args: the Trainer's arguments; optimizer and seed come from here. Learning rate, betas and the like are read
            when Trainer makes the optimizer.
        reinit: allow a method that cannot keep weights to replace the layers of a pretrained model.
        init_from: run, checkpoint or published folder, or Hub repo, whose weights the model starts from; training
            begins at step 0. LoRA, ReLoRA and the methods that project gradients take the dense form of any run,
            the others a run with the same method and settings.

    Returns:
        The same model, and the keyword arguments `Trainer` needs beside it: the optimizer, and for some methods
        `callbacks` (add your own with `trainer.add_callback`). Sizes are printed on the main process.

    Raises:
        ValueError: no layer matches, a rank exceeds a layer's shorter side, a pretrained model would lose its
            weights, `args.optim` names an optimizer that takes no parameter groups, all layers that a method
            projects are frozen, or DeepSpeed would shard them; `other_lr_scale` is not 1 and no target trains; the
            model uses a layer's weight in a way that the method's layer cannot serve; `init_from` has other sizes,
            or no weights that the method could start from. The model is then as it was.
            Before the first optimizer step: something else than the method would train the model.
    """
    _check_call(config, args)
    start = None if init_from is None else _warm_start(init_from, config)
    with unchanged_on_error(model):
        places = start.places(model) if start is not None and start.dense else None
        if config.group_options(1):
            _refuse_frozen(model, config)
        replaced = own_weights(method_targets(model, config)) if config.replaces_layers else {}
        apply_method(model, config, seed=args.seed, reinit=reinit)
        if start is not None and places is None:
            places = start.places(model)
        unused = probe(model, replaced)
        config.before_training(model, args)
        targets = method_targets(model, config)
        ranks = resolve_ranks(model, config, targets)
        rated = _rated_parameters(model, config, targets)
    if start is not None and places is not None:
        start.fill(places, model)
    convert_when_loading(model)
    guard_loading(model, targets)
    if args.should_log:
        Console().print((summary := summarize(model, config, targets, ranks)).table())
        warn_of_uncovered(summary, config)
        warn_unused(model, unused or [], "a few tokens that prepare tried")
    plan = _plan(model, config, targets, ranks, rated, set(unused or ()))
    trainer_kwargs, callbacks = {"optimizer_cls_and_kwargs": plan.for_trainer(args)}, config.callbacks(args)
    if callbacks or rated or config.optimizer(args) is not None:
        before_first_step(model, functools.partial(_check_optimizer, args))
    return model, {**trainer_kwargs, "callbacks": callbacks} if callbacks else trainer_kwargs


def _plan(
    model: nn.Module,
    config: LowRankConfig,
    targets: list[Target],
    ranks: dict[str, int],
    rated: frozenset[str],
    unused: set[str],
) -> Plan:
    """How the optimizer groups the parameters, for what `prepare` has found."""
    options = {name: config.group_options(ranks.get(t.name, 0)) for t in targets for name in t.trained_names}
    return Plan(
        model,
        {name: group for name, group in options.items() if group},
        identity(model, config),
        functools.partial(_optimizer, config),
        any_model=not (config.replaces_layers or config.group_options(1) or rated),
        targets=rated,
        other_lr_scale=config.other_lr_scale,
        after_first_backward=functools.partial(check_first_batch, unused),
        defaults=default_settings(config.method),
    )


def _warm_start(source: str | Path, config: LowRankConfig) -> Any:
    # what loads models knows all methods
    from hf_lowrank.warm_start import WarmStart

    return WarmStart(source, config)


def _check_call(config: LowRankConfig, args: TrainingArguments) -> None:
    """Refuse settings and arguments before the model is changed."""
    if not isinstance(config, LowRankConfig):
        raise ValueError(f"{config!r} is no method config: give one of hf_lowrank's, GaLoreConfig(r=128) for example")
    if uses_deepspeed(args) and config.group_options(1):
        raise ValueError(
            f"DeepSpeed's ZeRO hands the optimizer flat shards, and {config.label} needs matrices or whole rows of "
            "them; train with DDP (recipes/accelerate/ddp.yaml) or FSDP2 (recipes/accelerate/fsdp2.yaml)"
        )
    config.check_arguments(args)
    _optimizer(config, args)
    if config.optimizer(args) is not None and args.optim not in ADAMW:
        logger.warning("optim=%s is not used: %s brings its own AdamW", args.optim, config.label)


def apply_method(model: nn.Module, config: LowRankConfig, seed: int, *, reinit: bool = False) -> None:
    """Change the model's layers as the method asks, and record the method in the model's config.

    A model that carries the same method already (loaded as trained) stays as it is.

    Raises:
        ValueError: as for `prepare`.
    """
    targets = method_targets(model, config)
    ranks = resolve_ranks(model, config, targets)
    present = [t for t in targets if isinstance(t.module, ReparameterizedLinear)]
    adapted = [target.name for target in targets if is_adapted(target.module)]
    if adapted and ranks:
        raise ValueError(
            f"{adapted[0]} has adapters of PEFT's ({len(adapted)} such layers in all), under which {config.label} "
            "cannot train: merge them first (merge_and_unload), or train the model without a method"
        )
    if present:
        present_method = method_of(model)
        same = present_method is not None and layers_of(present_method) == layers_of(config)
        if not config.replaces_layers or len(present) < len(targets) or not same:
            raise ValueError(
                f"the model's layers are {type(present[0].module).__name__} already, so {config.label} with these "
                "settings cannot be put on it: give the config it was made with, or start from its to_dense form"
            )
        # the layers are the same: only fields that do not change the result may differ
        model_config: Any = model.config
        changeable = (*config.runtime_fields, "other_lr_scale")
        model_config.lowrank = model_config.lowrank | {name: getattr(config, name) for name in changeable}
        return
    if ranks:
        refuse_shared(model, targets, config.label)
    if config.replaces_layers:
        pretrained = any(getattr(p, "_is_hf_initialized", False) for t in targets for p in t.module.parameters())
        if pretrained and not reinit and not config.keeps_weights:
            raise ValueError(
                f"{config.label} replaces the layers of a pretrained model and cannot keep their weights: pass "
                "reinit=True to train them from scratch, or make the model from its config"
            )
        frozen = [target.name for target in targets if not target.trains]
        if frozen and not config.keeps_weights:
            raise ValueError(
                f"layer {frozen[0]} is frozen ({len(frozen)} in all) and {config.label} trains what it replaces: "
                "unfreeze it, or leave it out with target_modules"
            )
        _replace(model, config, targets, ranks, seed)
    model_config = getattr(model, "config", None)
    if model_config is not None:
        model_config.lowrank = {**config.to_dict(), "form": "native", "structure": structure_hash(model)}


def _replace(model: nn.Module, config: LowRankConfig, targets: list[Target], r: dict[str, int], seed: int) -> None:
    """Put the method's layers in the place of the targets."""
    for t, stack in [(t, t.stack) for t in targets if t.stack is not None]:
        own, key = t.own_parameters, t.weight_name.rpartition(".")[2]
        layer = config.replace_stack(own[key], stack, r[t.name], key, t.name, seed)
        put_stack(t.module, layer, t.name)
    if layers := {t.name: r[t.name] for t in targets if t.stack is None}:
        config.replace_layers(model, layers, seed)


def resolve_ranks(model: nn.Module, config: LowRankConfig, targets: list[Target]) -> dict[str, int]:
    """Target name -> rank; empty for a method without ranks.

    An explicit `r` must fit every target. The default, a quarter of the hidden size, is cut to the shorter side of a
    layer that is smaller still (grouped-query attention has such), since nobody chose it for that layer.

    Raises:
        ValueError: `r` exceeds a layer's shorter side, or there is no default since the model tells no hidden size.
    """
    if not hasattr(config, "r"):
        return {}
    if config.r is None:
        size = hidden_size(model)
        if size is None:
            raise ValueError(f"{type(config).__name__}(r=None): the model's config has no hidden_size, so give r")
        return {t.name: min(max(size // 4, 1), t.rows, t.cols) for t in targets}
    for target in targets:
        if config.r > min(target.rows, target.cols):
            raise ValueError(
                f"r={config.r} is above min(m, n) = {min(target.rows, target.cols)} of layer {target.name} "
                f"({target.rows} x {target.cols}): lower r, or leave the layer out with target_modules"
            )
    return {target.name: config.r for target in targets}


def identity(model: nn.Module, config: LowRankConfig) -> dict[str, Any]:
    """What two runs must have in common for one to resume from the other's checkpoint."""
    values = {**config.identity(), "structure": structure_hash(model)}
    if hasattr(config, "r"):
        targets = method_targets(model, config)
        values["r"] = sorted(set(resolve_ranks(model, config, targets).values()))
    return values


def summary_of(model: nn.Module, config: LowRankConfig) -> Summary:
    """The sizes that `prepare` showed, from the prepared model alone."""
    targets = method_targets(model, config)
    return summarize(model, config, targets, resolve_ranks(model, config, targets))


def check_handed_on(
    model: nn.Module,
    optimizer_cls: type | None,
    callbacks: Iterable[TrainerCallback] | None,
    args: TrainingArguments,
) -> None:
    """Compare the optimizer's class and the callbacks (None: not known) with the method in a model's config.

    Raises:
        ValueError: they are others than the method's. The message names the method, what would run, and the way out.
    """
    config = _trained_method(model)
    own = None if config is None else config.optimizer(args)
    if config is None:
        return
    if own is not None and optimizer_cls is not None and not issubclass(optimizer_cls, own[0]):
        raise ValueError(_method_not_run(config, f"{optimizer_cls.__name__} would train it"))
    if callbacks is None:
        return
    for expected in config.callbacks(args):
        present = [callback for callback in callbacks if isinstance(callback, type(expected))]
        if not any(callback.config == expected.config for callback in present):
            what = "has other settings" if present else "is missing"
            raise ValueError(_method_not_run(config, f"the Trainer's {type(expected).__name__} {what}"))


def check_method(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    callbacks: Iterable[TrainerCallback] | None,
    args: TrainingArguments,
) -> None:
    """Compare what trains a model with the method in its config, when training starts; callbacks as there.

    The dense form of a finished run is recorded as full-rank from here on.

    Raises:
        ValueError: something else trains it, as for `check_handed_on`.
    """
    config = _trained_method(model)
    if config is None:
        if method_of(model) is not None:
            apply_method(model, FullRankConfig(), args.seed)
        return
    check_handed_on(model, type(optimizer), callbacks, args)
    groups = {id(p): group for group in optimizer.param_groups for p in group["params"]}
    for group in optimizer.param_groups:
        if IDENTITY_KEY in group and (marked := json.loads(group[IDENTITY_KEY])["method"]) != config.method:
            raise ValueError(_method_not_run(config, f"the optimizer is that of '{marked}'"))
        if config.other_lr_scale != 1 and IDENTITY_KEY not in group:
            raise ValueError(
                _method_not_run(config, f"the optimizer knows nothing of other_lr_scale={config.other_lr_scale:g}")
            )
    ranks = resolve_ranks(model, config, targets := method_targets(model, config))
    for name, target in [(t.name, t) for t in targets if ranks or config.group_options(0)]:
        if config.replaces_layers and not isinstance(target.module, ReparameterizedLinear):
            raise ValueError(_method_not_run(config, f"{name} is a plain {type(target.module).__name__}"))
        options = config.group_options(ranks.get(name, 0))
        trained = [model.get_parameter(own) for own in target.trained_names] if options else []
        for group in (groups.get(id(p), {}) for p in trained if p.requires_grad):
            for key, value in options.items():
                if group.get(key) != value:
                    raise ValueError(_method_not_run(config, f"{name} would be trained with {key}={group.get(key)!r}"))


def _check_optimizer(args: TrainingArguments, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """`check_method` before an optimizer's first step; a loop of the user's own has no callbacks to compare."""
    trainer = running_trainer(model)
    callbacks = None if trainer is None else trainer.callback_handler.callbacks
    check_method(model, optimizer, callbacks, args if trainer is None else trainer.args)


def _trained_method(model: nn.Module) -> LowRankConfig | None:
    """The method that trains a model from now on; None if its config has only that of a finished run, or none."""
    config = method_of(model)
    record: Any = getattr(model, "config", None)
    finished = config is not None and config.replaces_layers and record.lowrank.get("form") == "dense"
    return None if finished else config


def _method_not_run(config: LowRankConfig, reason: str) -> str:
    """The message for a model that something else than its method would train."""
    return (
        f"the model's config says {config.label}, but {reason}: hand on what prepare returned, "
        "Trainer(..., **trainer_kwargs), and leave create_optimizer as it is; for a Trainer that takes no "
        "optimizer_cls_and_kwargs lr.attach does it; to train the model full-rank, prepare it with FullRankConfig()"
    )


def _refuse_frozen(model: nn.Module, config: LowRankConfig) -> None:
    targets = method_targets(model, config)
    # PEFT freezes what it adapts, and apply_method refuses that by its name
    if not any(target.trains or is_adapted(target.module) for target in targets):
        raise ValueError(
            f"all {len(targets)} target layers are frozen, {targets[0].name} for one, so that {config.label} would "
            "train nothing: unfreeze them, or name others with target_modules"
        )


def _rated_parameters(model: nn.Module, config: LowRankConfig, targets: list[Target]) -> frozenset[str]:
    """Names of the targets' parameters without biases, if `other_lr_scale` gives the others a rate of their own.

    Raises:
        ValueError: none of them trains, so that the others' rate would refer to nothing.
    """
    if config.other_lr_scale == 1:
        return frozenset()
    rated = set(target_parameters(model, targets).values())
    if not any(p.requires_grad for name, p in model.named_parameters() if name in rated):
        raise ValueError(
            f"other_lr_scale={config.other_lr_scale:g}: all {len(targets)} target layers are frozen, so that it is "
            "the ratio to no rate: leave it at 1 and give learning_rate alone, or unfreeze a target"
        )
    return frozenset(rated)


def _optimizer(config: LowRankConfig, args: TrainingArguments) -> tuple[type[torch.optim.Optimizer], dict[str, Any]]:
    """The method's own optimizer, or the one that `args.optim` names."""
    own = config.optimizer(args)
    if own is not None:
        return own
    way_out = f"optim='{args.optim}' makes its own parameter groups: use an optimizer such as adamw_torch"
    try:
        optimizer_cls, kwargs = Trainer.get_optimizer_cls_and_kwargs(args)
    except ValueError as error:
        raise ValueError(f"{way_out} ({error})") from error
    if not (isinstance(optimizer_cls, type) and issubclass(optimizer_cls, torch.optim.Optimizer)):
        raise ValueError(way_out)
    return optimizer_cls, kwargs
