"""Reports of schema version 1, in which an entry's `settings` held everything and a card knew the methods by name.

This is the only place that knows the names of version 1's settings.
"""

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

_METHODS: dict[str, dict[str, Any]] = {
    "fullrank": {"method_label": "full-rank training", "method_paper": None},
    "galore": {
        "method_label": "GaLore",
        "method_paper": {
            "title": "GaLore: Memory-Efficient LLM Training by Gradient Low-Rank Projection",
            "arxiv": "2403.03507",
            "authors": "Jiawei Zhao, Zhenyu Zhang, Beidi Chen, Zhangyang Wang, Anima Anandkumar, Yuandong Tian",
        },
    },
    "fira": {
        "method_label": "Fira",
        "method_paper": {
            "title": "Fira: Can We Achieve Full-rank Training of LLMs Under Low-rank Constraint?",
            "arxiv": "2410.01623",
            "authors": "Xi Chen, Kaituo Feng, Changsheng Li, Xunhao Lai, Xiangyu Yue, Ye Yuan, Guoren Wang",
        },
    },
    "apollo": {
        "method_label": "APOLLO",
        "method_paper": {
            "title": "APOLLO: SGD-like Memory, AdamW-level Performance",
            "arxiv": "2412.05270",
            "authors": "Hanqing Zhu, Zhenyu Zhang, Wenyan Cong, Xi Liu, Sem Park, Vikas Chandra, Bo Long, "
            "David Z. Pan, Zhangyang Wang, Jinwon Lee",
        },
    },
    "cola": {
        "method_label": "CoLA",
        "method_paper": {
            "title": "CoLA: Compute-Efficient Pre-Training of LLMs via Low-Rank Activation",
            "arxiv": "2502.10940",
            "authors": "Ziyue Liu, Ruijie Zhang, Zhengyang Wang, Mingsong Yan, Zi Yang, Paul D. Hovland, "
            "Bogdan Nicolae, Franck Cappello, Sui Tang, Zheng Zhang",
        },
    },
    "sltrain": {
        "method_label": "SLTrain",
        "method_paper": {
            "title": "SLTrain: a sparse plus low-rank approach for parameter and memory efficient pretraining",
            "arxiv": "2406.02214",
            "authors": "Andi Han, Jiaxiang Li, Wei Huang, Mingyi Hong, Akiko Takeda, Pratik Jawanpuria, Bamdev Mishra",
        },
    },
    "lora": {
        "method_label": "LoRA",
        "method_paper": {
            "title": "LoRA: Low-Rank Adaptation of Large Language Models",
            "arxiv": "2106.09685",
            "authors": "Edward J. Hu, Yelong Shen, Phillip Wallis, Zeyuan Allen-Zhu, Yuanzhi Li, Shean Wang, "
            "Lu Wang, Weizhu Chen",
        },
    },
    "relora": {
        "method_label": "ReLoRA",
        "method_paper": {
            "title": "ReLoRA: High-Rank Training Through Low-Rank Updates",
            "arxiv": "2307.05695",
            "authors": "Vladislav Lialin, Namrata Shivagunde, Sherin Muckatira, Anna Rumshisky",
        },
    },
}


def upgrade(report: Any) -> None:
    """Bring a report of version 1 up to date in place, as plain data that need not be valid.

    An entry without `reference` and `about` is of version 1 whatever the report says of itself: it may come from a
    file of metrics that an older run has written.
    """
    if not isinstance(report, dict):
        return
    if report.get("schema_version") == 1 and report["schema_version"] is not True:
        report["schema_version"] = 2
    run, baseline = report.get("run"), report.get("baseline")
    for part in (run, baseline):
        method = part.get("method") if isinstance(part, dict) else None
        if isinstance(part, dict) and isinstance(method, str) and method in _METHODS and "method_label" not in part:
            told = {**_METHODS[method], "dense_form": method != "cola"}
            part.update(told if part is run else {"method_label": told["method_label"]})
    for holder in (report, baseline):
        for kind in ("metrics", "evaluations"):
            entries = holder.get(kind) if isinstance(holder, dict) else None
            for entry in entries if isinstance(entries, list) else ():
                if isinstance(entry, dict):
                    upgrade_entry(entry)


def upgrade_entry(entry: dict[str, Any]) -> None:
    """Move what does not define a number out of its settings, in place, where an entry is of version 1."""
    settings = entry.get("settings")
    if not isinstance(settings, dict) or entry.get("reference") or entry.get("about"):
        return
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
