"""Publishing a run: its final state, and the checkpoints that it kept."""

from __future__ import annotations

import json
import logging
import shutil
import tempfile
from pathlib import Path

import pandas as pd
from huggingface_hub import CommitInfo
from transformers import AutoTokenizer

from hf_lowrank.checkpoints import CheckpointError, export, list_checkpoints, load_model
from hf_lowrank.figures import draw_figures
from hf_lowrank.hub.card import update_card, write_card
from hf_lowrank.hub.commit import (
    Hub,
    OverwriteError,
    PushError,
    check_names,
    commit_folder,
    publish_folder,
    push_folder,
)
from hf_lowrank.hub.fetch import download
from hf_lowrank.hub.ownership import run_of
from hf_lowrank.report.io import read_records, read_report, up_to, write_report

__all__ = ["OverwriteError", "PushError", "push", "push_folder"]

logger = logging.getLogger(__name__)


def push(
    run: str | Path,
    repo_id: str,
    *,
    revision: str | None = None,
    private: bool | None = None,
    token: str | bool | None = None,
    commit_message: str | None = None,
    tag: str | None = None,
    overwrite: bool = False,
    checkpoints: bool = False,
) -> CommitInfo:
    """Publish a run on the Hub in one commit, its card written anew for this repository.

    Args:
        run: A run's folder, or its `publish/` folder itself. Nothing outside `publish/` is sent.
        repo_id: `user/name`, or `name` in the user's own namespace.
        tag: A tag to put on the published state. By default `step-<n>`, n being the report's step, or
            `<branch>-step-<n>` where `step-<n>` is already another branch's.
        checkpoints: Publish every `checkpoint-<n>` of the run's folder as well, each under its tag `step-<n>`, unless
            that tag is there: the model as it was, its report, figures and card up to that step. The branch stays as
            it is. A checkpoint that is damaged is left out with a warning. A tag of another run stays without
            `overwrite`; on a branch the checkpoint then gets the tag `<branch>-step-<n>`.
        revision, private, token, commit_message, overwrite: As for `push_folder`.

    Raises:
        CheckpointError: There is no model beside the report, and the checkpoint of its step is damaged.
        ReportError: The run's report is missing a field, is not JSON, or is newer than this version.
        As `push_folder` otherwise.
    """
    folder = publish_folder(Path(run).expanduser())
    check_names(repo_id, revision, tag)
    report = read_report(folder)
    steps = report.run.steps
    published = _add_model(folder, steps)
    if report.run.weights_published not in (None if published else False, published):
        write_report({**report, "run": {**report.run, "weights_published": published}}, folder / "report.json")
    hub = Hub(repo_id, token)
    if "/" not in repo_id:
        # the card names the repository in full
        repo_id = f"{hub.asked('the account cannot be read', hub.api.whoami)['name']}/{repo_id}"
        hub = Hub(repo_id, token)
    update_card(folder, repo_id=repo_id)
    commit = commit_folder(folder, hub, revision, private, commit_message, tag, f"step-{steps}", overwrite)
    if checkpoints:
        _push_checkpoints(folder, hub, revision or "main", overwrite)
    return commit


def _add_model(publish: Path, steps: int) -> bool:
    """Put the model of the report's step beside a report that `measure` has written without one, if it is there."""
    if (publish / "config.json").is_file():
        return True
    checkpoint = publish.parent / f"checkpoint-{steps}"
    # the checkpoint of a model outside transformers has weights and no config.json
    if (checkpoint / "config.json").is_file():
        _write_model(checkpoint, publish)
        return True
    logger.warning(
        "%s holds no model (config.json, weights), and there is no %s: the report is published alone",
        publish,
        checkpoint,
    )
    return False


def _push_checkpoints(publish: Path, hub: Hub, branch: str, overwrite: bool) -> None:
    """Tag every kept checkpoint; each is pushed to a branch that is removed afterwards, the tag keeps its commit."""
    repo_id = hub.asked("the repository cannot be read", hub.api.model_info, hub.repo_id).id
    refs = hub.asked("the tags cannot be read", hub.api.list_repo_refs, repo_id)
    there = {ref.name for ref in refs.tags}
    mine = run_of(publish / "report.json")
    for checkpoint in list_checkpoints(publish.parent):
        tag = f"step-{checkpoint.name.rpartition('-')[2]}"
        aside = f"pushing-{branch}-{tag}"
        if tag in there and branch != "main" and not _is_of(hub, repo_id, tag, mine):
            tag = f"{branch}-{tag}"
        if tag in there and _is_of(hub, repo_id, tag, mine):
            # an interrupted push left it
            if aside in {ref.name for ref in refs.branches}:
                hub.asked(f"the branch {aside} cannot be removed", _remove_branch, hub, repo_id, aside)
            continue
        if tag in there and not overwrite:
            logger.warning("%s in %s is another run's and stays: `--yes` replaces it", tag, repo_id)
            continue
        with tempfile.TemporaryDirectory(prefix=".pushing-", dir=publish.parent) as copy:
            try:
                _write_step(publish, checkpoint, Path(copy))
            except CheckpointError as error:
                logger.warning("%s is not published: %s", tag, error)
                continue
            write_card(copy, repo_id=repo_id)
            commit_folder(Path(copy), Hub(repo_id, hub.token), aside, None, tag, tag, None, overwrite)
            hub.asked(f"the branch {aside} cannot be removed", _remove_branch, hub, repo_id, aside)


def _is_of(hub: Hub, repo_id: str, tag: str, mine: tuple[str, str, str] | None) -> bool:
    """Tell whether a tag points at something that this run has published."""
    folder = download(repo_id, tag, hub.token, ["report.json"])
    return mine is not None and run_of(folder / "report.json") == mine if (folder / "report.json").is_file() else False


def _remove_branch(hub: Hub, repo_id: str, branch: str) -> None:
    # the answer to an earlier try may have been lost
    if branch in {ref.name for ref in hub.api.list_repo_refs(repo_id).branches}:
        hub.api.delete_branch(repo_id, branch=branch)


def _write_step(publish: Path, checkpoint: Path, folder: Path) -> None:
    """Write the model of a checkpoint, and report, metrics and figures up to its step, to `folder`; no card.

    Args:
        publish: the run's publish folder.
        checkpoint: one of the run's folders `checkpoint-<n>`.
        folder: is empty.

    Raises:
        CheckpointError: the checkpoint is not complete.
    """
    try:
        state = json.loads((checkpoint / "trainer_state.json").read_text())
        step = int(state["global_step"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{checkpoint} is incomplete: trainer_state.json cannot be read ({error})") from error
    _write_model(checkpoint, folder)
    report = read_report(publish)
    best, done = report.run.best_of, report.run.steps_done
    facts = {
        "steps": step,
        "checkpoint_of": {"steps": done} if step < done else report.run.checkpoint_of,
        "best_of": best if step == report.run.steps else None,
        "tokens_seen": state.get("num_input_tokens_seen") or None,
        "flops": state.get("total_flos") or None,
        # nobody read the clock at the checkpoint
        "wall_time_seconds": None,
    }
    if (publish / "metrics").is_dir():
        shutil.copytree(publish / "metrics", folder / "metrics")
        _cut(folder / "metrics", step)
    # the report of the best step lacks what was measured later
    metrics = report.metrics if step <= report.run.steps else read_records(folder / "metrics")
    kept = {"metrics": up_to(step, metrics), "evaluations": up_to(step, report.evaluations)}
    write_report({**report, **kept, "run": {**report.run, **facts}}, folder / "report.json")
    draw_figures(folder)


def _write_model(checkpoint: Path, folder: Path) -> None:
    """Write the model of a checkpoint, with its tokenizer, to `folder` as it is published.

    Raises:
        CheckpointError: the checkpoint is not complete.
    """
    model = load_model(checkpoint)
    try:
        tokenizer = AutoTokenizer.from_pretrained(checkpoint) if list(checkpoint.glob("tokenizer*")) else None
    # transformers and tokenizers raise whatever they like for damaged files
    except Exception as error:
        raise CheckpointError(f"{checkpoint} is damaged: its tokenizer cannot be read ({error})") from error
    export(model, folder, tokenizer)


def _cut(metrics: Path, step: int) -> None:
    """Drop what was measured after `step` from a metrics folder, and files in which nothing is left."""
    for path in sorted(metrics.iterdir()):
        try:
            left = _cut_rows(path, step) if path.suffix == ".parquet" else _cut_entries(path, step)
        # damaged; the report still has its numbers
        except Exception as error:
            logger.warning("%s cannot be read and is left out of step %d: %s", path.name, step, error)
            left = 0
        if not left:
            path.unlink()


def _cut_entries(path: Path, step: int) -> int:
    entries = [e for e in json.loads(path.read_text()) if e["step"] is None or e["step"] <= step]
    path.write_text(json.dumps(entries, indent=1) + "\n")
    return len(entries)


def _cut_rows(path: Path, step: int) -> int:
    rows = pd.read_parquet(path)
    if "step" in rows:
        rows = rows[rows["step"].isna() | (rows["step"] <= step)]
        rows.to_parquet(path, index=False)
    return len(rows)
