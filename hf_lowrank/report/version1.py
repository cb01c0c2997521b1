"""Reports of schema version 1, in which an entry's `settings` held everything and a card knew the methods by name.

This is the only place that knows the names of version 1's settings; `version1_methods.json` beside it keeps what was
known of the methods then.
"""

import json
from importlib import resources
from typing import Any

__all__ = ["upgrade", "upgrade_entry"]

# what varies with the model or the run at hand and not with how a number was measured
_ABOUT = frozenset(
    (
        *("matrices", "total", "layers", "stderr", "explained", "checkpoints", "note", "error"),
        *("form", "dtype", "requests", "truncated_requests", "chance", "higher_is_better"),
        *("bootstrap_iterations", "filter", "other_method", "other_seed"),
    )
)
_REFERENCE = frozenset(("since", "other_step", "baseline_step"))
_CONSECUTIVE = "interpolation/consecutive/"


def upgrade(report: Any) -> None:
    """Bring a report of version 1 up to date in place, as plain data that need not be valid.

    An entry without `reference` and `about` is of version 1 whatever the report says of itself: it may come from a
    file of metrics that an older run has written.
    """
    if not isinstance(report, dict):
        return
    run, baseline = report.get("run"), report.get("baseline")
    if report.get("schema_version") == 1 and report["schema_version"] is not True:
        report["schema_version"] = 2
        methods = json.loads(resources.files("hf_lowrank.report").joinpath("version1_methods.json").read_text("utf-8"))
        for part, keys in ((run, ("method_label", "method_paper", "dense_form")), (baseline, ("method_label",))):
            if isinstance(part, dict):
                method = methods.get(str(part.get("method")), {})
                part.update({key: method[key] for key in keys if key in method})
    for holder in (report, baseline):
        for kind in ("metrics", "evaluations"):
            entries = holder.get(kind) if isinstance(holder, dict) else None
            for entry in entries if isinstance(entries, list) else ():
                if isinstance(entry, dict):
                    upgrade_entry(entry)


def upgrade_entry(entry: dict[str, Any]) -> dict[str, Any]:
    """Return an entry after moving, in place, what does not define its number out of the settings of version 1."""
    settings = entry.get("settings")
    if not isinstance(settings, dict) or "reference" in entry or "about" in entry:
        return entry
    # the neighbouring checkpoint has another name at every step
    consecutive = str(entry.get("name")).startswith(_CONSECUTIVE)
    reference = _REFERENCE | {"other"} if consecutive else _REFERENCE
    entry["settings"] = {key: value for key, value in settings.items() if key not in _ABOUT | reference}
    entry["about"] = {key: value for key, value in settings.items() if key in _ABOUT}
    # every number on text has told which since version 2: null says that it is not known
    if "sequences" in settings and "tokens" in settings:
        entry["settings"].setdefault("evaluation_hash", None)
    if "task" not in entry:
        entry["reference"] = {key: value for key, value in settings.items() if key in reference}
    return entry
