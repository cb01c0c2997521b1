"""Measurement modules for `evaluate`: one folder each, which is also a Hugging Face Space as it stands."""

from pathlib import Path

from hf_lowrank.options import nearest

__all__ = ["MODULES", "path"]

MODULES = ("spectra", "landscape_sharpness", "interpolation_barrier", "cka", "perplexity")


def path(name: str) -> str:
    """Folder of a module, for `evaluate.load(path("spectra"))`; nothing is downloaded.

    Raises:
        ValueError: unknown name.
    """
    if name not in MODULES:
        raise ValueError(f"unknown module '{name}'{nearest(name, list(MODULES))}: they are {', '.join(MODULES)}")
    return str(Path(__file__).parent / name)
