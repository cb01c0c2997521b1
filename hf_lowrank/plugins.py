"""Methods and families of metrics that other packages bring along.

Such a package names a module in its metadata:

    [project.entry-points."hf_lowrank.plugins"]
    toy = "toy.hf_lowrank_plugin"

Importing that module registers what it defines.
"""

import logging
import sys
from importlib.metadata import entry_points

__all__ = ["GROUP", "load_plugins"]

logger = logging.getLogger(__name__)

GROUP = "hf_lowrank.plugins"
_loaded: set[str] = set()
# where Python looked for packages last time: reading their metadata again and again would take long
_searched: list[str] = []


def load_plugins() -> None:
    """Import the modules that installed packages name as plugins, each once; every registry calls this when asked.

    A module that cannot be imported is left out with a warning: somebody else's package must not break this one.
    """
    if _searched == sys.path:
        return
    _searched[:] = sys.path
    for entry in entry_points(group=GROUP):
        if entry.value in _loaded:
            continue
        # before the import, which may ask a registry itself
        _loaded.add(entry.value)
        try:
            entry.load()
        except Exception as error:
            logger.warning("plugin %s (%s) cannot be imported and is left out: %s", entry.name, entry.value, error)
