"""`hf-lowrank lm-eval`: the harness's own command line, which knows our model type and our tasks."""

import sys
import traceback
from pathlib import Path

import lm_eval.tasks
from lm_eval.__main__ import cli_evaluate

# registers hf-lowrank
import hf_lowrank.downstream.model  # noqa: F401
from hf_lowrank.downstream.quick.generate import TASKS
from hf_lowrank.hub.fetch import FetchError

__all__ = ["run_lm_eval"]


class _TaskManager(lm_eval.tasks.TaskManager):
    """The harness's, which finds our tasks too; a user's --include_path comes before them."""

    def __init__(self, *args, include_path=None, **kwargs):  # type: ignore[no-untyped-def]
        given = include_path if isinstance(include_path, list | tuple) else [include_path] if include_path else []
        ours = [] if any(Path(folder).resolve() == TASKS for folder in given) else [str(TASKS)]
        super().__init__(*args, include_path=[*ours, *given], **kwargs)


def run_lm_eval(arguments: list[str]) -> int:
    """Hand over to the harness; returns its exit code.

    Args:
        arguments: as the harness takes them, `run`, `ls` and `validate` or the flags alone.
    """
    # the harness has no place to register a folder of tasks, and its --include_path holds one
    lm_eval.tasks.TaskManager = _TaskManager
    sys.argv = ["lm-eval", *arguments]
    try:
        cli_evaluate()
    except SystemExit as stop:
        if stop.code is None or isinstance(stop.code, int):
            return stop.code or 0
        print(stop.code, file=sys.stderr)
        return 1
    # of ours: a run that is not there
    except FetchError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    # whatever it is, it is shown as the harness shows it
    except Exception:
        traceback.print_exc()
        return 1
    return 0
