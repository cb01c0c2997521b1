"""CPU seconds that imports and the command line's short answers take, beside `import torch`, in one run.

    python recipes/benchmarks/imports.py
    python recipes/benchmarks/imports.py --rounds 3 --output imports.json

Each contender runs in processes of its own, and they take turns in every round, so that whatever else the machine does
meets them alike. User and system time of the process are counted, not the time it waits. What an import costs beyond
`import torch` is counted inside a process that has imported torch, since the difference of two processes is mostly
noise. The last lines show which modules cost most in `python -X importtime`.
"""

import argparse
import json
import resource
import statistics
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table

CLI = "import sys; from hf_lowrank.cli import main; sys.argv = ['hf-lowrank', *{!r}.split()]; main()"
TORCH = "import torch"
CONTENDERS = {
    "python": "pass",
    TORCH: TORCH,
    "import hf_lowrank": "import hf_lowrank",
    "import hf_lowrank.metrics.spectra": "import hf_lowrank.metrics.spectra",
    "import hf_lowrank.metrics.curvature": "import hf_lowrank.metrics.curvature",
    "import hf_lowrank.metrics.alignment": "import hf_lowrank.metrics.alignment",
    "hf-lowrank --help": CLI.format("--help"),
    "hf-lowrank measure --help": CLI.format("measure --help"),
    "hf-lowrank evaluate --help": CLI.format("evaluate --help"),
    "hf-lowrank mesure (a typo)": CLI.format("mesure runs/a"),
    "hf-lowrank measure --onyl (a typo)": CLI.format("measure runs/a --onyl loss"),
    "hf-lowrank measure (no run)": CLI.format("measure"),
}


def cpu_seconds(code: str) -> float:
    """User and system time of a Python process that runs the code."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    # 2 is the answer to a typo
    if done.returncode not in (0, 2) or "Traceback" in done.stderr:
        raise RuntimeError(f"{code}: {done.stderr}")
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def beyond_torch(code: str) -> float:
    """CPU seconds of the code in a process that has imported torch."""
    timed = f"import time, torch; start = time.process_time(); {code}; print(time.process_time() - start)"
    return float(subprocess.run([sys.executable, "-c", timed], capture_output=True, text=True, check=True).stdout)


def slowest_modules(code: str, count: int) -> list[tuple[str, float]]:
    """The modules whose own code takes longest to import, with its seconds."""
    done = subprocess.run([sys.executable, "-X", "importtime", "-c", code], capture_output=True, text=True)
    rows = [line.removeprefix("import time:").split("|") for line in done.stderr.splitlines() if "|" in line]
    times = [(name.strip(), int(own) / 1e6) for own, _, name in rows if own.strip().isdigit()]
    return sorted(times, key=lambda item: -item[1])[:count]


def main(argv: Sequence[str] | None = None) -> None:
    """Measure, print, and store what `--output` asks for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--modules", type=int, default=8, help="entries of -X importtime")
    parser.add_argument("--output", type=Path, help="JSON file with all times")
    args = parser.parse_args(argv)
    console = Console()
    times: dict[str, list[float]] = {name: [] for name in CONTENDERS}
    beyond: dict[str, list[float]] = {name: [] for name in CONTENDERS if name.startswith("import hf_lowrank")}
    # the first round fills the caches of files and bytecode and is not counted
    for number in range(args.rounds + 1):
        for name, code in CONTENDERS.items():
            seconds = cpu_seconds(code)
            if number:
                times[name].append(seconds)
                if name in beyond:
                    beyond[name].append(beyond_torch(code))
    medians = {name: statistics.median(values) for name, values in times.items()}
    table = Table(title=f"CPU seconds, median of {args.rounds}", title_justify="left")
    for column in ("", "seconds", "range", f"beyond {TORCH}"):
        table.add_column(column, justify="left" if column == "" else "right")
    for name, values in times.items():
        added = f"{statistics.median(beyond[name]):.2f}" if name in beyond else ""
        table.add_row(name, f"{medians[name]:.2f}", f"{min(values):.2f} to {max(values):.2f}", added)
    console.print(table)
    for name in ("import hf_lowrank", "hf-lowrank measure --help"):
        modules = slowest_modules(CONTENDERS[name], args.modules)
        console.print(f"{name}: " + ", ".join(f"{module} {seconds:.3f} s" for module, seconds in modules))
    if args.output is not None:
        args.output.write_text(
            json.dumps({"seconds": times, "beyond_torch": beyond, "median": medians}, indent=1) + "\n"
        )


if __name__ == "__main__":
    main()
