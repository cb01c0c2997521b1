"""The Trainer that is at work on a model, for what hangs on the model or its optimizer and is handed no Trainer."""

import inspect

from torch import nn
from transformers import Trainer

__all__ = ["running_trainer"]


def running_trainer(model: nn.Module) -> Trainer | None:
    """The Trainer of a model among the callers of this function, wherever it stands among them; None for a loop of
    the user's own.
    """
    frame = inspect.currentframe()
    while frame is not None:
        caller = frame.f_locals.get("self")
        trained = caller.model if isinstance(caller, Trainer) else None
        if trained is not None and any(module is model for module in trained.modules()):
            return caller
        frame = frame.f_back
    return None
