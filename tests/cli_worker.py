"""A command of `hf-lowrank` in a folder, for launches of several processes (launcher.py).

Usage: cli_worker.py FOLDER ENVIRONMENT WORD...; ENVIRONMENT is JSON.
"""

import json
import os
import sys

import lm_eval.evaluator  # noqa: F401

from hf_lowrank.cli import main as command


def main():
    folder, environment, *words = sys.argv[1:]
    os.chdir(folder)
    os.environ.update(json.loads(environment))
    sys.argv = ["hf-lowrank", *words]
    command()
