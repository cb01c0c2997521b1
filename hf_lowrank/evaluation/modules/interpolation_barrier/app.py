"""The Space of this module: a form to try it in."""

from pathlib import Path

from hf_lowrank.evaluation.measurement import serve


def main() -> None:
    """Serve the form."""
    serve(Path(__file__).with_name("interpolation_barrier.py"))


if __name__ == "__main__":
    main()
