"""What is asked of an optimizer before its first step on a prepared model.

`prepare` is handed neither the Trainer nor the optimizer. PyTorch calls a global hook before every step of every
optimizer, which is where the two meet, whoever has made the optimizer and whatever it is wrapped in.
"""

import weakref
from collections.abc import Callable
from typing import Any

from torch import nn
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_pre_hook
from torch.utils.hooks import RemovableHandle

__all__ = ["before_first_step"]

Check = Callable[[nn.Module, Optimizer], None]

# the models that no optimizer has trained yet
_UNCHECKED: "weakref.WeakKeyDictionary[nn.Module, Check]" = weakref.WeakKeyDictionary()
_hook: RemovableHandle | None = None


def before_first_step(model: nn.Module, check: Check) -> None:
    """Call `check(model, optimizer)` before the first step of an optimizer that holds parameters of a model.

    Where it raises, the step is not made, and it is called again before the next one. The model is not kept alive, and
    nothing is stored on it, so that it can be pickled. Once no model is left to check, the hook is removed.
    """
    global _hook
    _UNCHECKED[model] = check
    if _hook is None:
        _hook = register_optimizer_step_pre_hook(_check)


def _check(optimizer: Optimizer, *_: Any) -> None:
    # a wrapper steps the optimizer inside it, which comes here as well
    if any(isinstance(value, Optimizer) for value in vars(optimizer).values()):
        return
    trained = {id(p) for group in optimizer.param_groups for p in group["params"]}
    for model, check in list(_UNCHECKED.items()):
        if any(id(p) in trained for p in model.parameters()):
            check(model, optimizer)
            del _UNCHECKED[model]
    if not _UNCHECKED:
        # not here, where PyTorch walks through the hooks
        optimizer.register_step_post_hook(_remove)


def _remove(*_: Any) -> None:
    global _hook
    if _hook is not None and not _UNCHECKED:
        _hook.remove()
        _hook = None
