"""A plan gives the optimizer that Trainer makes its parameter groups, and refuses the state of another run.

Trainer groups the parameters by weight decay, hands them to the optimizer class without names, and does so before the
model is wrapped or sharded. A `Plan` therefore refers to the model: when the optimizer is made, it looks up each
parameter's name and splits the groups it is given. A `model_init` makes a model for each training: the optimizer
follows the plan of the model whose parameters it gets.
"""

import json
import weakref
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn

__all__ = ["IDENTITY_KEY", "Plan", "changed_settings", "plan_of", "with_plan"]

IDENTITY_KEY = "lowrank"

# the plan of each prepared model that is alive
_PLANS: "weakref.WeakKeyDictionary[nn.Module, Plan]" = weakref.WeakKeyDictionary()


def plan_of(model: nn.Module) -> "Plan | None":
    """The plan that `prepare` made for a model."""
    return _PLANS.get(model)


class Plan:
    """Which parameters of a model get which group options.

    Args:
        model: the prepared model; only a weak reference is kept, since a plan lives as long as its Trainer.
        options: parameter name -> group options; parameters that are not named keep their group as it is.
        identity: method and settings, ready for JSON; a state is loaded only if it was made with the same.
        optimizer: Trainer's arguments -> the optimizer's class and its arguments, as `args` stand then.
        any_model: whether the optimizer may get the parameters of a model that was not prepared.
        targets: names of the parameters that train at the learning rate itself; empty if all do.
        other_lr_scale: what the rate is multiplied with for all other parameters.
        after_first_backward: called with model and Trainer's arguments before the optimizer's first step.
        defaults: what the settings were before they existed, for states from then.
    """

    def __init__(
        self,
        model: nn.Module,
        options: dict[str, dict[str, Any]],
        identity: dict[str, Any],
        optimizer: Callable[[Any], tuple[type[torch.optim.Optimizer], dict[str, Any]]] | None = None,
        any_model: bool = False,
        targets: frozenset[str] = frozenset(),
        other_lr_scale: float = 1.0,
        after_first_backward: Callable[[nn.Module, Any], None] | None = None,
        defaults: Mapping[str, Any] | None = None,
    ) -> None:
        self._model = weakref.ref(model)
        self.options = options
        self.identity = identity
        self.optimizer = optimizer
        self.any_model = any_model
        self.targets, self.other_lr_scale = targets, other_lr_scale
        self.after_first_backward = after_first_backward
        self.defaults = defaults or {}
        # Trainer leaves these out of the optimizer
        self._frozen = {name for name, p in model.named_parameters() if not p.requires_grad}
        _PLANS[model] = self

    def for_trainer(self, args: Any) -> tuple[type[torch.optim.Optimizer], dict[str, Any]]:
        """Trainer's `optimizer_cls_and_kwargs`; learning rate and the like are read when the optimizer is made."""
        assert self.optimizer is not None
        return with_plan(self.optimizer(args)[0]), {"plan": self, "args": args}

    def of_parameters(self, groups: list[dict[str, Any]]) -> "Plan":
        """The plan of the model that the parameters belong to.

        Raises:
            ValueError: they belong to no prepared model, or to one that was prepared for another method.
        """
        given = {id(p) for group in groups for p in group["params"]}
        for model, plan in _PLANS.items():
            if any(id(p) in given for p in model.parameters()):
                if plan.identity["method"] != self.identity["method"]:
                    raise ValueError(
                        f"the model was prepared for '{plan.identity['method']}', and the Trainer has what prepare "
                        f"returned for '{self.identity['method']}': hand on what prepare returned with this model"
                    )
                return plan
        if self.any_model:
            return self
        raise ValueError(
            f"the optimizer's parameters are of a model that was not prepared, which '{self.identity['method']}' "
            "would leave as it is: give the Trainer the model that prepare returned; a model_init must return such a "
            "model, and a copy is prepared again"
        )

    def regroup(self, params: Any, lr: float | None = None) -> list[dict[str, Any]]:
        """Split groups by the plan's options and rates; every group is marked with the run's identity.

        If the targets have a rate of their own, their groups come first: Trainer logs the rate of the first group.

        Args:
            params: parameters or groups, as for any `torch.optim.Optimizer`.
            lr: the rate of a group that has none of its own.

        Raises:
            ValueError: a parameter with options or a rate is not among `params`, or it was frozen after `prepare`.
        """
        names = self._names()
        groups = as_groups(params)
        first: list[dict[str, Any]] = []
        rest: list[dict[str, Any]] = []
        planned: set[str] = set()
        for group in groups:
            split: dict[str, dict[str, Any]] = {}
            for p in group["params"]:
                name = names.get(id(p), "")
                options = self.options.get(name, {})
                other = bool(self.targets) and name not in self.targets
                planned.add(name)
                key = json.dumps([other, options], sort_keys=True)
                if key not in split:
                    split[key] = {**group, **options, **(self._other_rate(group, lr) if other else {}), "params": []}
                    (rest if other else first).append(split[key])
                split[key]["params"].append(p)
        self._refuse_missing((self.options.keys() | self.targets) - planned - self._frozen, names)
        mark = json.dumps(self.identity, sort_keys=True)
        return [{**group, IDENTITY_KEY: mark} for group in first + rest]

    def _other_rate(self, group: dict[str, Any], lr: float | None) -> dict[str, float]:
        rate = group.get("lr", lr)
        if rate is None:
            raise ValueError(
                f"other_lr_scale={self.other_lr_scale:g} needs a learning rate, and the optimizer is made without "
                "one: give learning_rate"
            )
        return {"lr": self.other_lr_scale * rate}

    def _refuse_missing(self, missing: set[str], names: dict[int, str]) -> None:
        if not missing:
            return
        if any("_fsdp_wrapped_module" in name for name in names.values()):
            what = "are projected" if self.options else "have a rate of their own (other_lr_scale)"
            raise ValueError(f"FSDP 1 flattens the weights that {what}: use FSDP 2 (fsdp_version 2) or DDP")
        model = self._model()
        parameters = {} if model is None else dict(model.named_parameters())
        frozen = [name for name in sorted(missing) if name in parameters and not parameters[name].requires_grad]
        if frozen:
            raise ValueError(
                f"{frozen[0]} was frozen after prepare ({len(frozen)} target weights in all): freeze layers "
                "before prepare, which leaves them out, or leave them out with target_modules"
            )
        raise ValueError(
            f"{len(missing)} of the {len(self.options.keys() | self.targets)} target weights, {min(missing)} for one, "
            "are not among the optimizer's parameters: give the Trainer the model that prepare returned"
        )

    def _names(self) -> dict[int, str]:
        """id of a parameter -> its name."""
        model = self._model()
        return {} if model is None else {id(p): name for name, p in model.named_parameters()}

    def names_of(self, groups: list[dict[str, Any]]) -> dict[tuple[int, int], str]:
        """(group, place in it) -> parameter name."""
        names = self._names()
        return {
            (index, place): names[id(p)]
            for index, group in enumerate(groups)
            for place, p in enumerate(group["params"])
            if id(p) in names
        }

    def check_gradients(self, args: Any) -> None:
        """Call `after_first_backward` if the model is still there."""
        model = self._model()
        if self.after_first_backward is not None and model is not None:
            self.after_first_backward(model, args)

    @staticmethod
    def replicas(args: Any) -> bool:
        """Whether Trainer's arguments stand for a run whose processes train copies of one model (DDP).

        That is so if accelerate was set up for several processes without sharding, as every Trainer does. A loop
        without an `Accelerator` may leave processes out, which the others would wait for in vain.
        """
        from accelerate.state import AcceleratorState

        # an AcceleratorState that nobody has made makes itself
        made = bool(AcceleratorState._shared_state)
        distributed = args.parallel_mode.value == "distributed"
        return made and distributed and AcceleratorState().distributed_type.value.startswith("MULTI_")

    def check_state(self, optimizer: torch.optim.Optimizer, state_dict: dict[str, Any]) -> None:
        """Raise `ValueError` for a state that was made by another method or with other settings."""
        marks = {group.get(IDENTITY_KEY) for group in state_dict["param_groups"]}
        # a plain Trainer's checkpoint carries no mark
        saved = json.loads(marks.pop() or "{}") if marks else {}
        changed = changed_settings(saved, self.identity, self.defaults)
        if changed:
            raise ValueError(
                f"the checkpoint's optimizer state belongs to another run ({'; '.join(changed)}): resume with the "
                "settings it was made with, or start anew in another output folder"
            )


def changed_settings(
    saved: dict[str, Any], mine: dict[str, Any], defaults: Mapping[str, Any], ignored: tuple[str, ...] = ()
) -> list[str]:
    """The settings in which a checkpoint's method differs from a run's, each in words.

    Args:
        saved: what the checkpoint records; a plain Trainer's records nothing, and is full-rank at one rate.
        mine: the run's.
        defaults: of the run's method, for settings that its checkpoints of an older version lack.
        ignored: settings that may differ.
    """
    there, here = ({"method": "fullrank", "other_lr_scale": 1.0, **values} for values in (saved, mine))
    if there["method"] == here["method"]:
        there = {**{key: value for key, value in defaults.items() if key in here}, **there}
    keys = [key for key in ("method", "other_lr_scale") if there[key] != here[key]][:1]
    # full-rank training at one rate is the same whatever the targets are
    if not keys and (here["method"] != "fullrank" or here["other_lr_scale"] != 1):
        keys = sorted((there.keys() | here.keys()) - set(ignored))
    return [
        f"{key} is {there.get(key)!r} there, {here.get(key)!r} here" for key in keys if there.get(key) != here.get(key)
    ]


def as_groups(params: Any) -> list[dict[str, Any]]:
    """Parameters as an optimizer's groups, each with a list that can be read twice."""
    groups = list(params)
    if groups and not isinstance(groups[0], dict):
        groups = [{"params": groups}]
    return [{**group, "params": list(group["params"])} for group in groups]


def with_plan(optimizer_cls: type[torch.optim.Optimizer]) -> type[torch.optim.Optimizer]:
    """Subclass of an optimizer that takes `plan` and Trainer's `args`, and follows both.

    Further keyword arguments replace those that follow from `args`. It must be a class: to a factory function Trainer
    would pass the model instead of the parameters.
    """

    class Planned(optimizer_cls):  # type: ignore[misc, valid-type]
        def __init__(self, params: Any, *, plan: Plan, args: Any, **kwargs: Any) -> None:
            groups = as_groups(params)
            plan = plan.of_parameters(groups)
            assert plan.optimizer is not None
            chosen, settings = plan.optimizer(args)
            if chosen is not optimizer_cls:
                raise ValueError(
                    f"args.optim is {args.optim!r} now, which makes a {chosen.__name__} and no "
                    f"{optimizer_cls.__name__}: set it before prepare"
                )
            settings = {**settings, **kwargs}
            super().__init__(plan.regroup(groups, settings.get("lr")), **settings)
            # a projected optimizer names parameters in its messages
            self.names = plan.names_of(self.param_groups)
            self.register_load_state_dict_pre_hook(plan.check_state)
            self._started = False

            def before_step(*_: Any) -> None:
                if not self._started:
                    self._started = True
                    self.replicas = plan.replicas(args)
                    plan.check_gradients(args)

            self.register_step_pre_hook(before_step)

    Planned.__name__ = Planned.__qualname__ = optimizer_cls.__name__
    Planned.__doc__ = optimizer_cls.__doc__
    return Planned
