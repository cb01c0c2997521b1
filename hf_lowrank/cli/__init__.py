"""The command `hf-lowrank`: its commands, the flags that they take, and what they print."""

from hf_lowrank.cli.commands import app, fail, main

__all__ = ["app", "fail", "main"]
