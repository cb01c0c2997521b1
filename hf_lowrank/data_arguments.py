"""What to train on: the options that recipes and commands share, and the error for data that cannot be had."""

from dataclasses import dataclass, field
from typing import Any

__all__ = ["DataArguments", "DataError"]


class DataError(ValueError):
    """The data a user asked for cannot be had; the message is one line with the thing, the value and the way out."""


def _option(default: Any, text: str) -> Any:
    return field(default=default, metadata={"help": text})


@dataclass
class DataArguments:
    """What to train on and how it is cut into rows, for `HfArgumentParser`; the defaults need no download.

    Raises `DataError` for a value that cannot work, and for two that exclude each other.
    """

    dataset_name: str | None = _option(None, "Hub data set, or a local folder laid out like one.")
    dataset_config_name: str | None = _option(None, "Configuration of dataset_name.")
    dataset_path: str | None = _option(None, "Text, JSON(L) or parquet file, save_to_disk or text-file folder.")
    dataset_glob: str | None = _option(None, "Files to take from the folder, at any depth (default: *.txt).")
    text_column: str = _option("text", "Column that holds the text.")
    streaming: bool = _option(True, "Stream dataset_name instead of downloading it.")
    tokenizer_name: str | None = _option(None, "Hub name or folder (default: trained on the training share).")
    vocab_size: int = _option(4096, "Vocabulary of the tokenizer that is trained here.")
    sequence_length: int = _option(256, "Tokens in a row.")
    packing: bool = _option(True, "Join documents and cut rows without gaps; false: one a row, cut or padded.")
    validation_fraction: float = _option(0.02, "Share of the documents held out if there is no validation split.")
    max_eval_sequences: int | None = _option(None, "Keep only so many validation rows, evenly spread (default: all).")
    split_seed: int = _option(0, "Seed of the split into training and validation.")

    def __post_init__(self) -> None:
        name, path = self.dataset_name, self.dataset_path
        if name and path:
            raise DataError(f"dataset_name {name!r} and dataset_path {path!r} exclude each other: drop one")
        if self.dataset_config_name and not name:
            raise DataError(f"dataset_config_name {self.dataset_config_name!r} needs dataset_name: give both or none")
        if self.dataset_glob is not None and not path:
            raise DataError(f"dataset_glob {self.dataset_glob!r} needs the folder it is for: give dataset_path")
        if not 0 < self.validation_fraction <= 0.5:
            raise DataError(f"validation_fraction {self.validation_fraction} is outside (0, 0.5]: take 0.02, say")
        lowest = {"sequence_length": 2, "vocab_size": 512, "max_eval_sequences": 1, "split_seed": 0}
        for option, least in lowest.items():
            if (value := getattr(self, option)) is not None and value < least:
                raise DataError(f"{option} {value} is too small: take {least} or more")
