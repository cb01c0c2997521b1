"""What an evaluation tells whoever looks on."""

from dataclasses import dataclass

__all__ = ["Failure", "Watcher"]


@dataclass(frozen=True)
class Failure:
    """A task that could not be evaluated; run and step are None where it was for all of them."""

    run: str | None
    step: int | None
    task: str
    reason: str


class Watcher:
    """What is told how far an evaluation is; this one says nothing."""

    def total(self, calls: int) -> None:
        """How many calls of the harness are to be done."""

    def call(self, label: str, done: bool) -> None:
        """A call begins, or is left out because it was done before."""

    def forward(self) -> None:
        """A forward pass begins."""

    def failed(self, failure: Failure) -> None:
        """A task could not be evaluated."""

    def note(self, text: str) -> None:
        """Something that whoever reads the numbers should know."""
