"""Weights of an earlier measurement on disk, so that they cost no memory and outlive a resume."""

import logging
import re
from functools import cached_property
from pathlib import Path

from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from hf_lowrank.report.files import atomic_path
from hf_lowrank.sharding import rank_and_world

__all__ = ["Snapshot"]

logger = logging.getLogger(__name__)


class Snapshot:
    """Tensors of one step under a name, read one at a time.

    Every process that writes has a file of its own. All files that can be seen from here are read, so that a run in a
    shared folder can be resumed with another number of processes.

    Args:
        folder: is created when something is saved.
        name: of the snapshot.
    """

    def __init__(self, folder: Path, name: str) -> None:
        self.folder, self.name = folder, name

    @property
    def path(self) -> Path:
        """This process's file."""
        rank, world = rank_and_world()
        return self.folder / (self.name + ("" if rank == 0 else f"-{rank}-of-{world}") + ".safetensors")

    def _files(self) -> list[Path]:
        pattern = rf"{re.escape(self.name)}(-\d+-of-\d+)?\.safetensors"
        paths = (path for path in self.folder.glob("*.safetensors") if re.fullmatch(pattern, path.name))
        # this process's own file last: where each holds a part of the same tensor, its own part counts
        return sorted(paths, key=lambda path: (path == self.path, path))

    @cached_property
    def _index(self) -> dict[int, dict[str, Path]]:
        """Step -> name -> file."""
        index: dict[int, dict[str, Path]] = {}
        for path in self._files():
            try:
                with safe_open(path, "pt") as file:
                    index.setdefault(int(file.metadata()["step"]), {}).update(dict.fromkeys(file.keys(), path))
            # a kill in mid-write leaves a file that only safetensors' own errors describe
            except Exception as error:
                logger.warning("%s cannot be read (%s): nothing is compared with it", path, error)
        return index

    def holds(self, step: int | None) -> bool:
        """Whether tensors of this step are there."""
        return step is not None and step in self._index

    def get(self, step: int, name: str) -> Tensor | None:
        """A tensor of a step; None if it is not there."""
        path = self._index.get(step, {}).get(name)
        if path is None:
            return None
        with safe_open(path, "pt") as file:
            return file.get_tensor(name)

    def names(self, step: int) -> list[str]:
        """The names of a step's tensors."""
        return list(self._index.get(step, {}))

    def remove(self) -> None:
        """Remove every process's file."""
        for path in self._files():
            path.unlink(missing_ok=True)

    def save(self, tensors: dict[str, Tensor], step: int) -> None:
        """Replace this process's file."""
        with atomic_path(self.path) as path:
            save_file(tensors, path, metadata={"step": str(step)})
        self.__dict__.pop("_index", None)
