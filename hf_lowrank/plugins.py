"""Methods and families of metrics that other packages bring along.

Such a package names a module in its metadata:

    [project.entry-points."hf_lowrank.plugins"]
    toy = "toy.hf_lowrank_plugin"

Importing that module registers what it defines.
"""

import logging
from importlib.metadata import entry_points

__all__ = ["GROUP", "load_plugins"]

logger = logging.getLogger(__name__)

GROUP = "hf_lowrank.plugins"
_loaded: set[str] = set()


def load_plugins() -> None:
    """Import the modules that installed packages name as plugins, each once; every registry calls this when asked.

    A module that cannot be imported is left out with a warning: somebody else's package must not break this one.
    """
    for entry in entry_points(group=GROUP):
        if entry.value in _loaded:
            continue
        # before the import, which may ask a registry itself
        _loaded.add(entry.value)
        try:
            entry.load()
        except Exception as error:
            logger.warning("plugin %s (%s) cannot be imported and is left out: %s", entry.name, entry.value, error)
