"""Named groups of tasks with the settings that belong to them."""

from dataclasses import dataclass

__all__ = ["SUITES", "Suite"]


@dataclass(frozen=True)
class Suite:
    """Tasks that are evaluated together.

    Attributes:
        tasks: tasks and groups, as the harness spells them.
        num_fewshot: examples in the prompt; None for each task's own number.
        seeds: None for the harness's own.
        bootstrap_iterations: None for the harness's own.
    """

    tasks: tuple[str, ...]
    num_fewshot: int | None = None
    seeds: tuple[int, ...] | None = None
    bootstrap_iterations: int | None = None


SUITES = {
    # arXiv 2605.13652 and its code: 0-shot, seeds 42 to 46, 1000 bootstrap iterations
    "study": Suite(
        (
            *("piqa", "copa", "mrpc", "rte", "mnli", "arc_easy", "blimp", "sst2", "qqp", "qnli", "boolq", "multirc"),
            *("cola", "wsc", "truthfulqa_mc1", "truthfulqa_mc2", "toxigen", "gsm8k", "ifeval"),
            "leaderboard_instruction_following",
        ),
        num_fewshot=0,
        seeds=(42, 43, 44, 45, 46),
        bootstrap_iterations=1000,
    ),
    # needs no network: text of the embedded corpus that no model trained on it has seen
    "quick": Suite(("hf_lowrank_quick",)),
}
