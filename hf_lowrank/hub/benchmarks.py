"""Results on the Hub's registered benchmarks, as the `.eval_results/*.yaml` files that its leaderboards collect.

A benchmark is a data set whose owner registered it with an `eval.yaml`; the Hub refuses files that name another. Of
the study's tasks GSM8K is the only one that is registered; everything else stays in the card's model-index.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import EvalResultEntry, eval_result_entries_to_yaml

from hf_lowrank.report.files import atomic_path
from hf_lowrank.report.tables import evaluation_rows

__all__ = ["write_benchmarks"]

FOLDER = ".eval_results"
# (task of lm-evaluation-harness, metric) -> (data set, its task, file)
BENCHMARKS = {
    ("gsm8k", "exact_match,strict-match"): ("openai/gsm8k", "gsm8k", "gsm8k.yaml"),
    ("gsm8k", "exact_match,flexible-extract"): ("openai/gsm8k", "gsm8k", "gsm8k_flexible_extract.yaml"),
}


def write_benchmarks(publish: Path, report: Mapping[str, Any]) -> list[Path]:
    """Write what `report` holds on registered benchmarks into `publish/.eval_results`; return the files.

    Only whole benchmarks count: a result with a limit is left out. Files of an earlier report are removed.
    """
    found = {}
    for row in evaluation_rows(report):
        known = BENCHMARKS.get((row["task"], row["metric"]))
        if known is None or row["value"] is None or row["limit"] is not None:
            continue
        dataset, task, file = known
        shots = None if row["num_fewshot"] is None else f"{row['num_fewshot']}-shot"
        parts = ["lm-evaluation-harness", shots, row["metric"].partition(",")[2]]
        # the leaderboards list percentages
        value, notes = round(100 * row["value"], 4), ", ".join(part for part in parts if part)
        found[file] = EvalResultEntry(
            dataset_id=dataset, task_id=task, value=value, date=report["run"]["date"], notes=notes
        )
    folder = publish / FOLDER
    for *_, file in BENCHMARKS.values():
        if file not in found:
            (folder / file).unlink(missing_ok=True)
    for file, entry in found.items():
        with atomic_path(folder / file) as path:
            rows = eval_result_entries_to_yaml([entry])
            path.write_text(yaml.safe_dump(rows, sort_keys=False, allow_unicode=True), encoding="utf-8")
    return [folder / file for file in found]
