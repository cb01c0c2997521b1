"""`hf-lowrank study`: what is running and what is left, in lines."""

import signal
import sys
from pathlib import Path

from hf_lowrank.options import StudyOptions

__all__ = ["run_study_command"]


def run_study_command(sources: list[str], options: StudyOptions) -> int:
    """Run, plan or analyse; returns the exit code.

    Raises:
        ValueError: an argument makes no sense, or the study's file does not.
    """
    from hf_lowrank.study.study import analyse_study, run_study

    def say(line: str) -> None:
        # written at once: the lines come from several threads
        sys.stdout.write(f"{line}\n")
        sys.stdout.flush()

    if options.analyse:
        if not sources:
            raise ValueError("--analyse: give studies' folders, runs' folders, or Hub repos (user/name)")
        say(analyse_study([_folder(source) for source in sources], options.output or Path("analysis")))
        return 0
    if len(sources) != 1 or Path(sources[0]).is_dir():
        raise ValueError(f"{' '.join(sources) or 'nothing'}: give one study's YAML file; --analyse takes folders")
    # ends as Ctrl+C does: the jobs are ended, and go on from what they have saved with the next command
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    return 0 if run_study(Path(sources[0]), options, say) else 1


def _folder(source: str) -> Path:
    """A folder of reports; a repository's report and metrics are fetched."""
    if Path(source).is_dir():
        return Path(source)
    if source.startswith((".", "/", "~")):
        raise ValueError(f"--analyse {source} does not exist: give a folder or a Hub repo (user/name)")
    from hf_lowrank.hub.fetch import fetch

    repo_id, _, revision = source.partition("@")
    wanted = ["report.json", "study.json", "metrics/*", "runs/*/publish/report.json", "runs/*/publish/metrics/*"]
    return Path(fetch(repo_id, revision=revision or None, allow_patterns=wanted))
