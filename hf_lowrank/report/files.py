"""Writing a file so that a reader finds the old one or the new one, never half of one."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

__all__ = ["atomic_path"]


@contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """Yield a temporary path beside `path` that replaces it when the block ends without an error.

    The parent folder is made. If the block fails, the temporary file is removed and `path` stays as it was. A process
    that is killed inside the block leaves a file named `.<name>.<pid>.tmp`.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    # opened by the caller and not by tempfile, whose files only their owner may read
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
