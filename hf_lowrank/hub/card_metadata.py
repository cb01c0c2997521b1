"""A card's metadata: what the Hub filters models by, and the results as `model-index`."""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult
from huggingface_hub.utils import HFValidationError, validate_repo_id

from hf_lowrank.report.markdown import one_line, slug
from hf_lowrank.report.tables import HeadlineRow, describe, evaluation_settings

__all__ = ["card_metadata", "evaluation_results", "headline_results"]

# the Hub refuses other values of `license`: they go to `license_name` under `license: other`
_HUB_LICENSES = frozenset(
    [
        *("apache-2.0", "mit", "openrail", "bsd", "bsd-2-clause", "bsd-3-clause", "isc", "unlicense", "mpl-2.0"),
        *("cc0-1.0", "cc-by-4.0", "cc-by-sa-4.0", "cc-by-nc-4.0", "cc-by-nc-sa-4.0"),
        *("gpl-2.0", "gpl-3.0", "lgpl-3.0", "agpl-3.0", "other", "unknown"),
    ]
)


def card_metadata(run: Mapping[str, Any], data: Mapping[str, Any] | None) -> dict[str, Any]:
    """Return the arguments of `ModelCardData` that do not depend on results."""
    metadata: dict[str, Any] = {
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["hf-lowrank", f"lowrank-method:{slug(run['method'])}", slug(run["model"]["architecture"])],
    }
    if run["license"]:
        name = slug(run["license"])
        metadata["license"] = name if name in _HUB_LICENSES else "other"
        if name not in _HUB_LICENSES:
            metadata["license_name"] = name
    if _is_on_hub(data):
        assert data is not None
        metadata["datasets"] = [data["name"]]
    return metadata


def _is_on_hub(data: Mapping[str, Any] | None) -> bool:
    """Say whether the data's name is one of the Hub's: told by `source`, or else by looking like owner/name."""
    if data is None or data.get("source") not in ("hub", None):
        return False
    try:
        validate_repo_id(data["name"])
    except HFValidationError:
        return False
    if data.get("source") == "hub":
        return True
    return re.fullmatch(r"[^/]+/[^/]+", data["name"]) is not None and not Path(data["name"]).suffix


def headline_results(headline: Sequence[HeadlineRow], data: Mapping[str, Any] | None) -> list[EvalResult]:
    """Return one result a row that has a number, each under a data-set configuration of its own.

    huggingface_hub joins results that differ in nothing but `dataset_args`, their source or their metric
    (huggingface_hub issue 4975, still in 2.4.0); the configuration is what keeps them apart.
    """
    on_hub = _is_on_hub(data)
    name = "not recorded" if data is None else one_line(data["name"])
    config = None if data is None else data["config"]
    results = []
    for row in headline:
        if row.value is None:
            continue
        space = None if row.space is None else f"{row.space} weights"
        setting = [config, row.name, space, None if row.step is None else f"step {row.step}", describe(row.settings)]
        results.append(
            EvalResult(
                task_type="text-generation",
                task_name="Text Generation",
                dataset_type=name if on_hub else slug(name),
                dataset_name=name,
                dataset_config=one_line("; ".join(part for part in setting if part)),
                dataset_revision=data["revision_or_hash"] if on_hub and data is not None else None,
                metric_type=row.name,
                metric_name=row.label if row.id is None else f"{row.id}: {row.label}",
                metric_value=row.value,
                metric_args=None if row.stderr is None else {"stderr": row.stderr},
            )
        )
    return results


def evaluation_results(evaluations: Sequence[Mapping[str, Any]]) -> list[EvalResult]:
    """Return one result a downstream number; each setting of a task is a data-set configuration of its own."""
    results: dict[tuple[str, str, str], EvalResult] = {}
    for row in evaluations:
        if row["value"] is None:
            continue
        setting = [
            None if row["num_fewshot"] is None else f"{row['num_fewshot']}-shot",
            None if row["limit"] is None else f"limit {row['limit']:g}",
            None if row["step"] is None else f"step {row['step']}",
            None if row["task_version"] is None else f"version {row['task_version']}",
            describe(evaluation_settings(row)),
        ]
        task, metric = one_line(row["task"]), one_line(row["metric"])
        config = one_line("; ".join([task, *(part for part in setting if part)]))
        results[task, metric, config] = EvalResult(
            task_type="text-generation",
            task_name="Text Generation",
            dataset_type=slug(task),
            dataset_name=task,
            dataset_config=config,
            metric_type=metric,
            metric_name=metric,
            metric_value=row["value"],
            metric_args=None if row["stderr"] is None else {"stderr": row["stderr"]},
        )
    return list(results.values())
