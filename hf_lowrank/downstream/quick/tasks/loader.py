"""How the YAML files beside this one load their items: a path in them would be relative to the caller's folder."""

import json
from pathlib import Path
from typing import Any

from datasets import Dataset, DatasetDict

__all__ = ["load"]


def load(file: str, **metadata: Any) -> DatasetDict:
    """The items of one task as its `test` split; the harness also passes the task's metadata, which it ignores."""
    lines = Path(__file__).with_name(file).read_text(encoding="utf-8").split("\n")
    return DatasetDict({"test": Dataset.from_list([json.loads(line) for line in lines if line])})
