"""What projected optimizers share; each optimizer stands beside its config, in the module of its method.

Those that are public here work on their own, without `hf_lowrank.prepare`.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from hf_lowrank.methods.apollo import ApolloAdamW
    from hf_lowrank.methods.fira import FiraAdamW
    from hf_lowrank.methods.frugal import FrugalAdamW
    from hf_lowrank.methods.galore import GaLoreAdamW

__all__ = ["ApolloAdamW", "FiraAdamW", "FrugalAdamW", "GaLoreAdamW"]


def __getattr__(name: str) -> Any:
    # imported when asked for, since the methods import this package
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module("hf_lowrank.methods"), name)
