"""What methods ask of Trainer's arguments."""

from typing import Any

__all__ = ["ADAMW", "plain"]

# the values of `optim` for which Trainer makes torch's AdamW
ADAMW = ("adamw_torch", "adamw_torch_fused")


def plain(value: Any) -> str:
    """An argument as it is written on the command line, for transformers makes enums of some."""
    return str(getattr(value, "value", value))
