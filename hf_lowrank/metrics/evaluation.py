"""The former name of `hf_lowrank.metrics.sequences`, kept for code that imports it."""

from hf_lowrank.metrics.sequences import *  # noqa: F403
