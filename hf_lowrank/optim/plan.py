"""A plan gives the optimizer that Trainer makes its parameter groups, and refuses the state of another run.

Trainer groups the parameters by weight decay, hands them to the optimizer class without names, and does so before the
model is wrapped or sharded. A `Plan` therefore refers to the model: when the optimizer is made, it looks up each
parameter's name and splits the groups it is given.
"""

import json
import weakref
from typing import Any

import torch
from torch import nn

__all__ = ["Plan", "with_plan"]

IDENTITY_KEY = "lowrank"


class Plan:
    """Which parameters of a model get which group options.

    Args:
        model: the prepared model; only a weak reference is kept, since a plan lives as long as its Trainer.
        options: parameter name -> group options; parameters that are not named keep their group as it is.
        identity: method and settings, ready for JSON; a state is loaded only if it was made with the same.
    """

    def __init__(self, model: nn.Module, options: dict[str, dict[str, Any]], identity: dict[str, Any]) -> None:
        self._model = weakref.ref(model)
        self.options = options
        self.identity = identity

    def regroup(self, params: Any) -> list[dict[str, Any]]:
        """Split groups by the plan's options; every group is marked with the run's identity.

        Raises:
            ValueError: a parameter with options is not among `params`, because the Trainer has another model.
        """
        names = self._names()
        groups = list(params)
        if groups and not isinstance(groups[0], dict):
            groups = [{"params": groups}]
        regrouped: list[dict[str, Any]] = []
        planned: set[str] = set()
        for group in groups:
            split: dict[str, dict[str, Any]] = {}
            for p in group["params"]:
                options = self.options.get(names.get(id(p), ""), {})
                if options:
                    planned.add(names[id(p)])
                key = json.dumps(options, sort_keys=True)
                split.setdefault(key, {**group, **options, "params": []})["params"].append(p)
            regrouped += split.values()
        missing = self.options.keys() - planned
        if missing and any("_fsdp_wrapped_module" in name for name in names.values()):
            raise ValueError("FSDP 1 flattens the weights that are projected: use FSDP 2 (fsdp_version 2) or DDP")
        if missing:
            raise ValueError(
                f"{len(missing)} of the {len(self.options)} target weights, {min(missing)} for one, are not among the "
                "optimizer's parameters: give the Trainer the model that prepare returned, and no model_init"
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


def with_plan(optimizer_cls: type[torch.optim.Optimizer]) -> type[torch.optim.Optimizer]:
    """Subclass of an optimizer that takes one more argument, `plan`, and follows it.

    It must be a class: to a factory function Trainer would pass the model instead of the parameters.
    """

    class Planned(optimizer_cls):  # type: ignore[misc, valid-type]
        def __init__(self, params: Any, *args: Any, plan: Plan, **kwargs: Any) -> None:
            super().__init__(plan.regroup(params), *args, **kwargs)
            # a projected optimizer names parameters in its messages
            self.names = plan.names_of(self.param_groups)
            self.register_load_state_dict_pre_hook(plan.check_state)

    Planned.__name__ = Planned.__qualname__ = optimizer_cls.__name__
    Planned.__doc__ = optimizer_cls.__doc__
    return Planned
