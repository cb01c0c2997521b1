"""Load what was published: models and reports, from a folder or a Hub repo."""

from pathlib import Path

from transformers import PreTrainedModel

from hf_lowrank.checkpoints import last_checkpoint, load_model
from hf_lowrank.hub.fetch import fetch
from hf_lowrank.report.io import read_report
from hf_lowrank.report.model import Report

__all__ = ["from_pretrained", "load_report"]


def from_pretrained(
    source: str | Path, *, revision: str | None = None, dense: bool = False, token: str | bool | None = None
) -> PreTrainedModel:
    """Load a model trained here, trainable as trained, or as the plain dense model.

    Args:
        source: a run, publish or checkpoint folder, or a Hub repo id (also `repo@revision`).
        revision: branch, tag (`step-1000`) or commit of a Hub repo.
        dense: plain transformers layers that compute the same function.
        token: Hub token, as everywhere in huggingface_hub.

    Returns:
        The model in eval mode on the CPU; as trained it is bit-identical to what was saved.

    Raises:
        FileNotFoundError, OSError: the source is not there or cannot be reached.
        hf_lowrank.CheckpointError: what is there does not fit the method it names.
    """
    folder = fetch(source, revision=revision, token=token)
    if not (folder / "config.json").is_file():
        newest = last_checkpoint(folder)
        folder = Path(newest) if newest else folder
    return load_model(folder, dense=dense)


def load_report(source: str | Path, *, revision: str | None = None, token: str | bool | None = None) -> Report:
    """Read and check a run's report.json (its types: `hf_lowrank.report.model`).

    The report has attributes, `report.run.steps`, and is a mapping too, `report["run"]["steps"]`;
    `report.model_dump()` is a dictionary.

    Args:
        source, revision, token: as for `from_pretrained`.

    Raises:
        FileNotFoundError, OSError: the source is not there, cannot be reached, or holds no report.
        ReportError: the report does not follow the schema, or follows a newer one.
    """
    return read_report(fetch(source, revision=revision, token=token, allow_patterns=["report.json"]))
