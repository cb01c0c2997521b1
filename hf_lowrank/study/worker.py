"""What an array job of SLURM runs: one job of the study, which is submitted again if it is cut off."""

from pathlib import Path

from submitit.helpers import Checkpointable, DelayedSubmission

from hf_lowrank.study.jobs import Job, State, run_job, stop_children
from hf_lowrank.study.launch import QUIET

__all__ = ["Worker"]


class Worker(Checkpointable):
    """Runs a job of the study in the folder, which is all the state there is."""

    def __call__(self, folder: str, job: Job) -> State:
        return run_job(Path(folder), job, QUIET)

    def checkpoint(self, folder: str, job: Job) -> DelayedSubmission:
        """End the process, which would outlive this one, and submit the same job again."""
        stop_children()
        return DelayedSubmission(Worker(), folder, job)
