"""Speed and memory of the metrics beside the plain way to get the same numbers, in one run.

    python recipes/benchmarks/metrics.py                                   # everything, at the 60M and 350M shapes
    python recipes/benchmarks/metrics.py --sizes 60m --parts spectra landscape --output metrics.json

Contenders take turns in every round, so that whatever else the machine does meets them alike; what counts are the
ratios of their medians. Memory is what a fresh process needs beyond its model.

Parts: `spectra` all spectral metrics beside `torch.linalg.svdvals` in a loop, with the largest error above 1e-5 s_1;
`landscape` a loss curve beside its bare forward passes; `logits` the memory of a loss over 128 x 256 tokens;
`trajectory` principal components of ten checkpoints beside loading and copying them; `cka` memory at two sizes.
"""

import argparse
import json
import logging
import multiprocessing
import platform
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from hf_lowrank.machine import keep_freed_memory
from hf_lowrank.metrics.activations import StreamingCKA
from hf_lowrank.metrics.landscape import loss_curve, random_direction, symmetric_grid
from hf_lowrank.metrics.sequences import EvaluationSet
from hf_lowrank.metrics.spectra import singular_values, spectra
from hf_lowrank.metrics.trajectory import trajectory_pca
from hf_lowrank.models import SIZES, build_model, model_config

PARTS = ("spectra", "landscape", "logits", "trajectory", "cka")
# blocks whose matrices are decomposed: all of the 60M model's
LAYERS = {"60m": 8}
VOCABULARY, LENGTH, CHECKPOINTS = 32000, 256, 10
Times = dict[str, list[float]]


def shapes_of(size: str) -> list[tuple[int, int]]:
    """(m, n) of the target matrices of some blocks."""
    hidden, mlp, _, layers = SIZES[size]
    return [*[(hidden, hidden)] * 4, (mlp, hidden), (mlp, hidden), (hidden, mlp)] * min(LAYERS.get(size, 2), layers)


def in_turns(contenders: dict[str, Callable[[], Any]], rounds: int) -> dict[str, float]:
    """Median seconds of each contender; one round before is not counted."""
    times: Times = {name: [] for name in contenders}
    for index in range(rounds + 1):
        for name, run in contenders.items():
            start = time.perf_counter()
            run()
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            if index > 0:
                times[name].append(time.perf_counter() - start)
    return {name: statistics.median(values) for name, values in times.items()}


def rows(sequences: int, vocabulary: int, length: int) -> dict[str, Tensor]:
    """Random token ids, which cost what real ones cost."""
    ids = torch.randint(0, vocabulary, (sequences, length), generator=torch.Generator().manual_seed(0))
    return {"input_ids": ids, "labels": ids}


def model_of(size: str, device: str) -> nn.Module:
    """A Llama of a study's size with its first weights."""
    return build_model(model_config(size, VOCABULARY, LENGTH, 0), seed=0).to(device).eval()


def benchmark_spectra(size: str, options: argparse.Namespace) -> dict[str, Any]:
    """Every spectral metric of the target matrices, beside their singular values alone."""
    generator = torch.Generator().manual_seed(0)
    # trained weights have a decaying spectrum: noise with a few strong directions
    weights = []
    for m, n in shapes_of(size):
        strong = torch.randn(m, 16, generator=generator) @ torch.randn(16, n, generator=generator)
        weights.append((0.02 * torch.randn(m, n, generator=generator) + 0.01 * strong).to(options.device))
    found = in_turns(
        {
            "spectra": lambda: list(spectra(list(enumerate(weights)))),
            "svdvals in a loop": lambda: [torch.linalg.svdvals(W) for W in weights],
        },
        options.rounds,
    )
    worst = 0.0
    for W in weights[:7]:
        exact, mine = torch.linalg.svdvals(W.double().cpu()), singular_values(W).cpu()
        above = exact > 1e-5 * exact[0]
        worst = max(worst, ((mine - exact).abs() / exact)[above].max().item())
    ratio = found["spectra"] / found["svdvals in a loop"]
    return {"seconds": found, "ratios": {"spectra / svdvals": ratio}, "matrices": len(weights), "largest_error": worst}


def benchmark_landscape(size: str, options: argparse.Namespace) -> dict[str, Any]:
    """One loss curve, its direction included, beside as many forward passes of the model as it is."""
    model = model_of(size, options.device)
    evaluation = EvaluationSet(rows(options.sequences, VOCABULARY, LENGTH), batch_size=options.sequences)
    grid = symmetric_grid(0.003, options.points)
    found = in_turns(
        {
            "landscape": lambda: loss_curve(model, evaluation, random_direction(model, 0), grid),
            "its forward passes": lambda: [evaluation(model) for _ in grid],
        },
        options.rounds,
    )
    ratio = found["landscape"] / found["its forward passes"]
    return {
        "seconds": found, "ratios": {"landscape / forward passes": ratio}, "points": options.points,
        "tokens": options.sequences * LENGTH,
    }  # fmt: skip


def peak_beyond(work: Callable[[], Any], device: str) -> int:
    """Bytes that some work needs at its peak, beyond what is there before it."""
    if device != "cpu":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        work()
        return torch.cuda.max_memory_allocated() - before
    # Linux: 5 sets the peak of the resident set back to what is resident now
    Path("/proc/self/clear_refs").write_text("5")
    before = _resident("VmRSS")
    work()
    return _resident("VmHWM") - before


def _resident(key: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(key)) * 1024


def _logits(size: str, device: str, sequences: int) -> int:
    model = model_of(size, device)
    evaluation = EvaluationSet(rows(sequences, VOCABULARY, LENGTH), batch_size=sequences)
    # libraries allocate once what they keep
    EvaluationSet(rows(1, VOCABULARY, LENGTH))(model)
    return peak_beyond(lambda: evaluation(model), device)


def _cka(width: int, positions: int) -> int:
    def work() -> None:
        generator, sums = torch.Generator().manual_seed(0), StreamingCKA()
        for _ in range(positions // 1024):
            sums.update(*(torch.randn(1024, width, generator=generator) for _ in range(2)))
        sums.value(debiased=True)

    return peak_beyond(work, "cpu")


def _trajectory(folders: list[Path]) -> int:
    return peak_beyond(lambda: trajectory_pca(folders, k=2), "cpu")


def alone(function: Callable[..., int], *arguments: Any) -> int:
    """What a function returns in a fresh process."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(function, arguments)


def benchmark_logits(size: str, options: argparse.Namespace) -> dict[str, Any]:
    """Memory of the loss of one batch, beside what its logits alone would take."""
    peak = alone(_logits, size, options.device, options.batch)
    logits = options.batch * LENGTH * VOCABULARY * 4
    return {
        "bytes": {"a loss": peak, "its logits alone": logits}, "ratios": {"loss / logits": peak / logits},
        "tokens": options.batch * LENGTH,
    }  # fmt: skip


def benchmark_trajectory(size: str, options: argparse.Namespace) -> dict[str, Any]:
    """Two principal components of ten checkpoints, beside loading and copying these."""
    with tempfile.TemporaryDirectory() as root:
        files, generator = [], torch.Generator().manual_seed(0)
        state = {name: p.detach().clone() for name, p in model_of(size, "cpu").named_parameters()}
        whole = sum(p.numel() * p.element_size() for p in state.values())
        for t in range(CHECKPOINTS):
            for p in state.values():
                p += 1e-3 * torch.randn(p.shape, generator=generator)
            files.append(Path(root, f"{t}.safetensors"))
            save_file(state, files[-1])
        del state
        found = in_turns(
            {
                "trajectory PCA": lambda: trajectory_pca(files, k=2),
                "loading and copying": lambda: [[v.clone() for v in load_file(path).values()] for path in files],
            },
            # seconds in all, and files' pages make it noisier than the others
            max(options.rounds, 9),
        )
        peak = alone(_trajectory, files)
    ratio = found["trajectory PCA"] / found["loading and copying"]
    return {
        "seconds": found,
        "bytes": {"trajectory PCA": peak, "two checkpoints": 2 * whole},
        "ratios": {"PCA / loading and copying": ratio, "memory / two checkpoints": peak / (2 * whole)},
    }


def benchmark_cka(size: str, options: argparse.Namespace) -> dict[str, Any]:
    """Memory of CKA over some positions and over eight times as many."""
    width, few = SIZES[size][0], 8 * 1024
    found = {f"{n:,} positions": alone(_cka, width, n) for n in (few, 8 * few)}
    more, less = found[f"{8 * few:,} positions"], found[f"{few:,} positions"]
    return {"bytes": found, "ratios": {"eight times the positions": more / less}}


def show(size: str, part: str, result: dict[str, Any]) -> None:
    """Print a part's table."""
    table = Table(title=f"{size}, {part}", title_justify="left")
    table.add_column("")
    table.add_column("median", justify="right")
    for name, seconds in result.get("seconds", {}).items():
        table.add_row(name, f"{seconds * 1e3:.1f} ms")
    for name, count in result.get("bytes", {}).items():
        table.add_row(name, f"{count / 2**20:.1f} MiB")
    for name, value in result.get("ratios", {}).items():
        table.add_row(name, f"{value:.2f} x")
    if "largest_error" in result:
        table.add_row("largest relative error above 1e-5 of the largest", f"{result['largest_error']:.1e}")
    Console(width=140).print(table)


def main() -> None:
    """Run the parts that were asked for, print tables, write JSON."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--sizes", nargs="+", choices=list(SIZES), default=["60m", "350m"])
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--points", type=int, default=13, help="of the landscape's grid")
    parser.add_argument("--sequences", type=int, default=8, help="that a landscape is measured on")
    parser.add_argument("--batch", type=int, default=128, help="sequences of the loss whose memory is measured")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--output", type=Path, default=None, help="JSON file")
    options = parser.parse_args()
    # as the recipes and `hf-lowrank measure` do: otherwise glibc's moods with freed memory are what is compared
    keep_freed_memory()
    logging.disable(logging.WARNING)
    device = torch.cuda.get_device_name() if options.device != "cpu" else platform.machine()
    result: dict[str, Any] = {
        "device": device, "threads": torch.get_num_threads(), "torch": torch.__version__, "rounds": options.rounds,
    }  # fmt: skip
    functions = {
        "spectra": benchmark_spectra, "landscape": benchmark_landscape, "logits": benchmark_logits,
        "trajectory": benchmark_trajectory, "cka": benchmark_cka,
    }  # fmt: skip
    for size in options.sizes:
        result[size] = {}
        for part in options.parts:
            result[size][part] = functions[part](size, options)
            show(size, part, result[size][part])
        if options.output is not None:
            options.output.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
