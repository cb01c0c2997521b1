"""A plan gives the optimizer that Trainer makes its parameter groups, and refuses the state of another run.

Trainer groups the parameters by weight decay, hands them to the optimizer class without names, and does so before the
model is wrapped or sharded. A `Plan` therefore refers to the model: when the optimizer is made, it looks up each
parameter's name and splits the groups it is given. A `model_init` makes a model for each training: the optimizer
follows the plan of the model whose parameters it gets.
"""

import json
import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

__all__ = ["IDENTITY_KEY", "Plan", "plan_of", "with_plan"]

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
    """

    def __init__(
        self,
        model: nn.Module,
        options: dict[str, dict[str, Any]],
        identity: dict[str, Any],
        optimizer: Callable[[Any], tuple[type[torch.optim.Optimizer], dict[str, Any]]] | None = None,
        any_model: bool = False,
    ) -> None:
        self._model = weakref.ref(model)
        self.options = options
        self.identity = identity
        self.optimizer = optimizer
        self.any_model = any_model
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

    def regroup(self, params: Any) -> list[dict[str, Any]]:
        """Split groups by the plan's options; every group is marked with the run's identity.

        Raises:
            ValueError: a parameter with options is not among `params`, or it was frozen after `prepare`.
        """
        names = self._names()
        groups = as_groups(params)
        regrouped: list[dict[str, Any]] = []
        planned: set[str] = set()
        for group in groups:
            split: dict[str, dict[str, Any]] = {}
            for p in group["params"]:
                options = self.options.get(names.get(id(p), ""), {})
                planned.add(names.get(id(p), ""))
                key = json.dumps(options, sort_keys=True)
                split.setdefault(key, {**group, **options, "params": []})["params"].append(p)
            regrouped += split.values()
        missing = self.options.keys() - planned - self._frozen
        if missing and any("_fsdp_wrapped_module" in name for name in names.values()):
            raise ValueError("FSDP 1 flattens the weights that are projected: use FSDP 2 (fsdp_version 2) or DDP")
        if missing:
            model = self._model()
            parameters = {} if model is None else dict(model.named_parameters())
            frozen = [name for name in sorted(missing) if name in parameters and not parameters[name].requires_grad]
            if frozen:
                raise ValueError(
                    f"{frozen[0]} was frozen after prepare ({len(frozen)} target weights in all): freeze layers "
                    "before prepare, which leaves them out, or leave them out with target_modules"
                )
            raise ValueError(
                f"{len(missing)} of the {len(self.options)} target weights, {min(missing)} for one, are not among the "
                "optimizer's parameters: give the Trainer the model that prepare returned"
            )
        mark = json.dumps(self.identity, sort_keys=True)
        return [{**group, IDENTITY_KEY: mark} for group in regrouped]

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

    def check_state(self, optimizer: torch.optim.Optimizer, state_dict: dict[str, Any]) -> None:
        """Raise `ValueError` for a state that was made by another method or with other settings."""
        marks = {group.get(IDENTITY_KEY) for group in state_dict["param_groups"]}
        # a plain Trainer's checkpoint carries no mark, and is full-rank
        saved = json.loads(marks.pop() or '{"method": "fullrank"}') if marks else {}
        mine = self.identity
        if saved.get("method") == mine["method"] == "fullrank":
            return
        keys = ["method"] if saved.get("method") != mine["method"] else sorted(saved.keys() | mine.keys())
        changed = [f"{key} is {saved.get(key)!r} there and {mine.get(key)!r} here" for key in keys]
        changed = [text for key, text in zip(keys, changed, strict=True) if saved.get(key) != mine.get(key)]
        if changed:
            raise ValueError(
                f"the checkpoint's optimizer state belongs to another run ({'; '.join(changed)}): resume with the "
                "settings it was made with, or start anew in another output folder"
            )


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
            super().__init__(plan.regroup(groups), **{**settings, **kwargs})
            # a projected optimizer names parameters in its messages
            self.names = plan.names_of(self.param_groups)
            self.register_load_state_dict_pre_hook(plan.check_state)

    Planned.__name__ = Planned.__qualname__ = optimizer_cls.__name__
    Planned.__doc__ = optimizer_cls.__doc__
    return Planned
