"""The Space of this module: a form to try it in."""

from pathlib import Path

import evaluate
from evaluate.utils import launch_gradio_widget


def main() -> None:
    """Serve the form; a Space brings gradio, which nothing else here needs."""
    launch_gradio_widget(evaluate.load(str(Path(__file__).with_name("perplexity.py")), module_type="measurement"))


if __name__ == "__main__":
    main()
