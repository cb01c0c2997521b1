"""What the modules for `evaluate` share: their docstrings and citations become what `evaluate` shows."""

import inspect
import re
from pathlib import Path
from typing import ClassVar

import datasets
import evaluate

__all__ = ["Measurement", "serve"]


class Measurement(evaluate.Measurement):
    """A measurement whose module's docstring describes it and whose class docstring describes input and output.

    Attributes:
        features: names and types of the inputs.
        citations: keys in `citations.bib`.
        reference_urls: where to read on.
    """

    features: ClassVar[datasets.Features]
    citations: ClassVar[tuple[str, ...]]
    reference_urls: ClassVar[tuple[str, ...]]

    def _info(self) -> evaluate.MeasurementInfo:
        entries = Path(__file__).with_name("citations.bib").read_text(encoding="utf-8").strip().split("\n\n")
        of_key = {re.split("[{,]", entry, maxsplit=2)[1]: entry for entry in entries}
        return evaluate.MeasurementInfo(
            module_type="measurement",
            description=inspect.cleandoc(inspect.getmodule(type(self)).__doc__ or ""),
            citation="\n\n".join(of_key[key] for key in self.citations) + "\n",
            inputs_description=inspect.getdoc(type(self)) or "",
            features=self.features,
            reference_urls=list(self.reference_urls),
        )


def serve(module: Path) -> None:
    """Serve a form for a module; a Space brings gradio, which nothing else here needs."""
    from evaluate.utils import launch_gradio_widget

    launch_gradio_widget(evaluate.load(str(module), module_type="measurement"))
