"""A card's metadata: what the Hub filters models by, and the results as `model-index` and for the leaderboards.

A leaderboard belongs to a benchmark, a data set whose owner registered it with an `eval.yaml`. It collects the files
`.eval_results/*.yaml`, and the Hub refuses files that name another data set. Of the study's tasks only GSM8K is
registered; everything else stays in the model-index.
"""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import EvalResult, EvalResultEntry, eval_result_entries_to_yaml
from huggingface_hub.utils import HFValidationError, validate_repo_id

from hf_lowrank.report.files import atomic_path
from hf_lowrank.report.markdown import one_line, slug
from hf_lowrank.report.model import Data, EvaluationEntry, MetricEntry, Report, Run, details
from hf_lowrank.report.tables import HeadlineRow, evaluation_rows, measured_with
from hf_lowrank.report.values import describe

__all__ = ["card_metadata", "evaluation_results", "headline_results", "write_benchmarks"]

# the Hub refuses other values of `license`: they go to `license_name` under `license: other`
_HUB_LICENSES = frozenset(
    [
        *("apache-2.0", "mit", "openrail", "bsd", "bsd-2-clause", "bsd-3-clause", "isc", "unlicense", "mpl-2.0"),
        *("cc0-1.0", "cc-by-4.0", "cc-by-sa-4.0", "cc-by-nc-4.0", "cc-by-nc-sa-4.0"),
        *("gpl-2.0", "gpl-3.0", "lgpl-3.0", "agpl-3.0", "other", "unknown"),
    ]
)
# (task of lm-evaluation-harness, metric) -> (data set, its task, file in .eval_results)
_BENCHMARKS = {
    ("gsm8k", "exact_match,strict-match"): ("openai/gsm8k", "gsm8k", "gsm8k.yaml"),
    ("gsm8k", "exact_match,flexible-extract"): ("openai/gsm8k", "gsm8k", "gsm8k_flexible_extract.yaml"),
}


def card_metadata(run: Run, data: Data | None) -> dict[str, Any]:
    """Return the arguments of `ModelCardData` that do not depend on results."""
    metadata: dict[str, Any] = {}
    # the Hub would say how to load weights that are not there
    if run.weights_published is not False:
        metadata["library_name"] = "hf_lowrank" if run.model.loaded_by is None else "transformers"
        if run.model.loaded_by == "AutoModelForCausalLM":
            metadata["pipeline_tag"] = "text-generation"
    metadata |= {
        "tags": ["hf-lowrank", f"lowrank-method:{slug(run.method)}", slug(run.model.architecture)],
    }
    if run.license:
        name = slug(run.license)
        metadata["license"] = name if name in _HUB_LICENSES else "other"
        if name not in _HUB_LICENSES:
            metadata["license_name"] = name
    if data is not None and _is_on_hub(data):
        metadata["datasets"] = [data.name]
    return metadata


def _is_on_hub(data: Data) -> bool:
    """Say whether the data's name is one of the Hub's: told by `source`, or else by looking like owner/name."""
    try:
        validate_repo_id(data.name)
    except HFValidationError:
        return False
    if data.source is None:
        return re.fullmatch(r"[^/]+/[^/]+", data.name) is not None and not Path(data.name).suffix
    return data.source == "hub"


def headline_results(headline: Sequence[HeadlineRow], data: Data | None) -> list[EvalResult]:
    """Return one result a row that has a number, each under a data-set configuration of its own."""
    on_hub = data is not None and _is_on_hub(data)
    name = "not recorded" if data is None else one_line(data.name)
    results = []
    for metric, entry in ((row.metric, row.entry) for row in headline):
        setting = [
            None if data is None else data.config,
            metric.name,
            None if entry.space is None else f"{entry.space} weights",
            None if entry.step is None else f"step {entry.step}",
            describe(details(entry)),
        ]
        result = _result(
            entry,
            setting,
            dataset_type=name if on_hub else slug(name),
            dataset_name=name,
            dataset_revision=data.revision_or_hash if on_hub and data is not None else None,
            metric_type=metric.name,
            metric_name=metric.label if metric.id is None else f"{metric.id}: {metric.label}",
        )
        results.append(result)
    return [result for result in results if result.metric_value is not None]


def evaluation_results(evaluations: Sequence[EvaluationEntry]) -> list[EvalResult]:
    """Return one result a downstream number; each setting of a task is a data-set configuration of its own."""
    results: dict[tuple[str, str], EvalResult] = {}
    for entry in evaluations:
        task, metric = one_line(entry.task), one_line(entry.metric)
        setting = [
            task,
            None if entry.num_fewshot is None else f"{entry.num_fewshot}-shot",
            None if entry.limit is None else f"limit {entry.limit:g}",
            None if entry.step is None else f"step {entry.step}",
            None if entry.task_version is None else f"version {entry.task_version}",
            measured_with(entry),
        ]
        result = _result(
            entry, setting, dataset_type=slug(task), dataset_name=task, metric_type=metric, metric_name=metric
        )
        if entry.value is not None:
            results[metric, str(result.dataset_config)] = result
    return list(results.values())


def _result(entry: MetricEntry | EvaluationEntry, setting: Sequence[str | None], **named: Any) -> EvalResult:
    """Return a number as a result whose data-set configuration holds its setting.

    huggingface_hub joins results that differ in nothing but `dataset_args`, their source or their metric
    (huggingface_hub issue 4975, still in 2.4.0); the configuration is what keeps them apart.
    """
    return EvalResult(
        task_type="text-generation",
        task_name="Text Generation",
        dataset_config=one_line("; ".join(part for part in setting if part)),
        metric_value=entry.value,
        metric_args=None if entry.stderr is None else {"stderr": entry.stderr},
        **named,
    )


def write_benchmarks(publish: Path, report: Report) -> None:
    """Write what `report` holds on registered benchmarks into `publish/.eval_results`.

    Only whole benchmarks count: a result with a limit is left out. Files of an earlier report are removed.
    """
    folder = publish / ".eval_results"
    for *_, file in _BENCHMARKS.values():
        (folder / file).unlink(missing_ok=True)
    for entry in evaluation_rows(report):
        benchmark = _BENCHMARKS.get((entry.task, entry.metric))
        if benchmark is None or entry.value is None or entry.limit is not None:
            continue
        dataset, task, file = benchmark
        shots = None if entry.num_fewshot is None else f"{entry.num_fewshot}-shot"
        notes = ["lm-evaluation-harness", shots, entry.metric.partition(",")[2]]
        result = EvalResultEntry(
            dataset_id=dataset,
            task_id=task,
            # the leaderboards list percentages
            value=round(100 * entry.value, 4),
            date=report.run.date,
            notes=", ".join(note for note in notes if note),
        )
        with atomic_path(folder / file) as path:
            rows = eval_result_entries_to_yaml([result])
            path.write_text(yaml.safe_dump(rows, sort_keys=False, allow_unicode=True), encoding="utf-8")
