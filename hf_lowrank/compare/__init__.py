"""Comparing runs: gathering them from folders and the Hub, and `hf-lowrank compare`."""

from hf_lowrank.compare.gather import Gathered, Skipped, gather

__all__ = ["Gathered", "Skipped", "gather"]
