"""Speed and memory of the methods beside the official packages, in one run.

    python recipes/benchmarks/methods.py                          # everything, at the 60M and 350M shapes
    python recipes/benchmarks/methods.py --sizes 60m --parts step refresh --output benchmark.json

Contenders take turns in every round, so that whatever else the machine does meets them alike; what counts are the
ratios of their medians. Official packages (`galore-torch`, `fira`, `apollo-torch`) take part where they are installed.

Parts: `step` an optimizer step between refreshes, `refresh` finding the projectors, `layers` forward and backward of a
layer at 8192 tokens, `state` bytes of optimizer state against the formula, `memory` the peak of a training step.
"""

import argparse
import contextlib
import gc
import importlib
import io
import json
import logging
import platform
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import nn
from transformers import TrainingArguments

import hf_lowrank as lr
from hf_lowrank.methods import METHODS, ProjectedConfig
from hf_lowrank.methods.prepare import summary_of
from hf_lowrank.methods.summary import optimizer_state_bytes
from hf_lowrank.models import SIZES, build_model, model_config
from hf_lowrank.optim.projector import refresh_projector, side

RANKS = {"tiny": 32, "60m": 128, "130m": 192, "350m": 256, "1b": 512}
PARTS = ("step", "refresh", "layers", "state", "memory")
TOKENS = 8192
Times = dict[str, list[float]]


def shapes_of(size: str, layers: int) -> list[tuple[int, int]]:
    """(m, n) of the target matrices of `layers` blocks."""
    hidden, mlp, _, _ = SIZES[size]
    return [*[(hidden, hidden)] * 4, (mlp, hidden), (mlp, hidden), (hidden, mlp)] * layers


def official(package: str, name: str) -> Any:
    """A class of an official package, None where it is not installed."""
    try:
        return getattr(importlib.import_module(package), name)
    except ImportError:
        return None


def synchronize() -> None:
    """Wait for the GPU, so that a clock shows what was computed."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def in_turns(contenders: dict[str, Callable[[], Any]], rounds: int) -> Times:
    """Seconds of each contender in each round; one round before is not counted."""
    times: Times = {name: [] for name in contenders}
    for index in range(rounds + 1):
        for name, run in contenders.items():
            synchronize()
            start = time.perf_counter()
            run()
            synchronize()
            if index > 0:
                times[name].append(time.perf_counter() - start)
    return times


def medians(times: Times) -> dict[str, float]:
    """Median seconds of each contender."""
    return {name: statistics.median(values) for name, values in times.items()}


# Optimizer steps


def optimizers(size: str, params: Callable[[], list[nn.Parameter]]) -> dict[str, torch.optim.Optimizer]:
    """Ours and the official ones, each on parameters of its own; no refresh falls into the steps that are timed."""
    r, gap = RANKS[size], 10**6
    common = {"update_proj_gap": gap, "proj_type": "std"}
    made: dict[str, torch.optim.Optimizer] = {"AdamW": torch.optim.AdamW(params(), lr=1e-3)}
    for cls in METHODS.values():
        if issubclass(cls, ProjectedConfig):
            options = cls(r=r, update_proj_gap=gap).group_options(r)
            made[cls.label] = cls.optimizer_cls([{"params": params(), **options}], lr=1e-3)
    if (cls := official("galore_torch", "GaLoreAdamW")) is not None:
        made["galore-torch"] = cls(
            [{"params": params(), "rank": r, "scale": 0.25, **common}], lr=1e-3, no_deprecation_warning=True
        )
    if (cls := official("fira", "FiraAdamW")) is not None:
        made["fira"] = cls(
            [{"params": params(), "rank": r, "alpha": 0.25, **common}], lr=1e-3, no_deprecation_warning=True
        )
    if (cls := official("apollo_torch", "APOLLOAdamW")) is not None:
        options = {"rank": r, "scale": 1.0, "scale_type": "channel", "proj": "random", **common}
        made["apollo-torch"] = cls([{"params": params(), **options}], lr=1e-3)
    return made


def benchmark_step(size: str, options: argparse.Namespace) -> dict[str, Any]:
    """An optimizer step between refreshes, beside the two matrix products that GaLore cannot do without."""
    shapes, r, device = shapes_of(size, options.layers), RANKS[size], options.device
    generator = torch.Generator(device).manual_seed(0)
    gradients = [1e-3 * torch.randn(s, generator=generator, device=device) for s in shapes]

    def params() -> list[nn.Parameter]:
        made = [nn.Parameter(torch.randn(s, generator=generator, device=device)) for s in shapes]
        for p, g in zip(made, gradients, strict=True):
            p.grad = g
        return made

    contenders: dict[str, Callable[[], Any]] = {name: made.step for name, made in optimizers(size, params).items()}
    weights = params()
    projectors = [torch.randn((r, n) if m >= n else (m, r), generator=generator, device=device) for m, n in shapes]

    @torch.no_grad()
    def products() -> None:
        for W, G, P in zip(weights, gradients, projectors, strict=True):
            if W.shape[0] >= W.shape[1]:
                W.addmm_(torch.mm(G, P.T), P, alpha=-1e-9)
            else:
                W.addmm_(P, torch.mm(P.T, G), alpha=-1e-9)

    contenders["products alone"] = products
    found = medians(in_turns(contenders, options.rounds))
    pairs = {
        "GaLore / galore-torch": ("GaLore", "galore-torch"),
        "GaLore / products alone": ("GaLore", "products alone"),
        "Fira / fira": ("Fira", "fira"),
        "APOLLO / apollo-torch": ("APOLLO", "apollo-torch"),
        "GaLore / AdamW": ("GaLore", "AdamW"),
    }
    return {"seconds": found, "ratios": ratios(found, pairs), "matrices": len(shapes), "r": r}


def ratios(found: dict[str, float], pairs: dict[str, tuple[str, str]]) -> dict[str, float]:
    """Quotients of medians, for the pairs that were both measured."""
    return {name: found[a] / found[b] for name, (a, b) in pairs.items() if a in found and b in found}


# Projector refreshes


def benchmark_refresh(size: str, options: argparse.Namespace) -> dict[str, Any]:
    """Projectors of all matrices by the full SVD of the official packages, by Gram matrix, by subspace iteration."""
    shapes, r = shapes_of(size, options.refresh_layers), RANKS[size]
    generator = torch.Generator(options.device).manual_seed(0)
    before, now = [], []
    for m, n in shapes:
        # spectra that fall as gradients' do, and a later gradient that has turned a little
        left = torch.randn(m, min(m, n), generator=generator, device=options.device)
        fall = torch.arange(1, min(m, n) + 1, device=options.device) ** -1.0
        G = (left * fall) @ torch.randn(min(m, n), n, generator=generator, device=options.device)
        before.append(G)
        now.append(G + 0.1 * G.std() * torch.randn(m, n, generator=generator, device=options.device))
    sides = [side(shape, "std") for shape in shapes]
    known = [refresh_projector(G, r, w, "gram", None) for G, w in zip(before, sides, strict=True)]

    def run(method: str) -> Callable[[], None]:
        def refresh() -> None:
            for G, where, previous in zip(now, sides, known, strict=True):
                refresh_projector(G, r, where, method, previous)

        return refresh

    def full_svd() -> None:
        for G in now:
            torch.linalg.svd(G, full_matrices=False)

    contenders = {"full SVD": full_svd, "gram": run("gram"), "subspace": run("subspace")}
    found = medians(in_turns(contenders, options.refresh_rounds))
    pairs = {"gram / full SVD": ("gram", "full SVD"), "subspace / full SVD": ("subspace", "full SVD")}
    return {"seconds": found, "ratios": ratios(found, pairs), "matrices": len(shapes), "r": r}


def amortised(step: dict[str, Any], refresh: dict[str, Any], gap: int = 200) -> dict[str, float]:
    """Seconds a step with its share of a refresh every `gap` steps, scaled to the same number of matrices."""
    share = step["matrices"] / refresh["matrices"] / gap
    official_step = step["seconds"].get("galore-torch")
    found = {name: step["seconds"]["GaLore"] + share * refresh["seconds"][name] for name in ("gram", "subspace")}
    if official_step is not None:
        found["galore-torch"] = official_step + share * refresh["seconds"]["full SVD"]
    return found


# Layers


def benchmark_layers(size: str, options: argparse.Namespace) -> dict[str, Any]:
    """Forward and backward of one layer of each shape at 8192 tokens, by kind of layer."""
    r, found, quotients = SIZES[size][0] // 4, {}, {}
    for m, n in dict.fromkeys(shapes_of(size, 1)):
        x = torch.randn(TOKENS, n, device=options.device, requires_grad=True)
        dy = torch.randn(TOKENS, m, device=options.device)
        dense = nn.Linear(n, m, bias=False)
        layers: dict[str, nn.Module] = {"dense": dense}
        for cls in METHODS.values():
            # those that keep the weights have the dense layer in them
            if cls.replaces_layers and not cls.keeps_weights:
                layers[cls.label] = cls().replace_layer(dense, r, torch.Generator().manual_seed(0))
        contenders = {}
        for name, layer in layers.items():
            layer.to(options.device)
            contenders[name] = lambda layer=layer, x=x, dy=dy: torch.autograd.grad(
                layer(x), [x, *layer.parameters()], dy
            )
        seconds = medians(in_turns(contenders, options.rounds))
        found.update({f"{name} {m} x {n}": value for name, value in seconds.items()})
        pairs = {f"{name} / dense, {m} x {n}": (name, "dense") for name in layers if name != "dense"}
        quotients.update(ratios(seconds, pairs))
    return {"seconds": found, "ratios": quotients, "tokens": TOKENS, "r": r}


# Bytes


def configs(size: str) -> dict[str, lr.LowRankConfig]:
    """The methods at the size's rank, a quarter of the hidden size."""
    r = SIZES[size][0] // 4
    return {
        "full-rank": lr.FullRankConfig(),
        **{cls.label: cls(r=r) for cls in METHODS.values() if "r" in {field.name for field in fields(cls)}},
        "APOLLO-Mini": lr.ApolloConfig(r=1, scale=128, scale_type="tensor"),
    }


def prepared(size: str, config: lr.LowRankConfig, device: str) -> tuple[nn.Module, torch.optim.Optimizer]:
    """A model of the size (with 2 of its blocks) and the method's optimizer."""
    shape = model_config(size, 32000, 256, None)
    shape.num_hidden_layers = 2
    with tempfile.TemporaryDirectory() as folder:
        args = TrainingArguments(folder, report_to="none", use_cpu=device == "cpu", log_level="error", max_steps=10**4)
        # the tables of sizes are not what is asked for here
        with contextlib.redirect_stdout(io.StringIO()):
            model, kwargs = lr.prepare(build_model(shape, 0).to(device), config, args)
    optimizer_cls, values = kwargs["optimizer_cls_and_kwargs"]
    return model, optimizer_cls([p for p in model.parameters() if p.requires_grad], **values)


def training_step(model: nn.Module, optimizer: torch.optim.Optimizer, device: str) -> None:
    """One step on 64 tokens: few, so that weights, gradients and state are what counts."""
    ids = torch.randint(0, 32000, (1, 64), generator=torch.Generator().manual_seed(0)).to(device)
    model(input_ids=ids, labels=ids).loss.backward()
    optimizer.step()
    optimizer.zero_grad()


def benchmark_state(size: str, options: argparse.Namespace) -> dict[str, Any]:
    """Bytes of optimizer state, measured and by the formula."""
    found = {}
    for name, config in configs(size).items():
        model, optimizer = prepared(size, config, options.device)
        training_step(model, optimizer, options.device)
        predicted = summary_of(model, config)
        found[name] = {
            "measured": optimizer_state_bytes(optimizer),
            "predicted": predicted.state_bytes,
            "AdamW on the dense model": predicted.adamw_state_bytes,
        }
    return {"bytes": found, "blocks": 2}


def peak_of(size: str, config: lr.LowRankConfig, device: str) -> int:
    """Peak bytes allocated from the model's making to the end of its second step; the first one refreshes."""
    gc.collect()
    if device != "cpu":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        model, optimizer = prepared(size, config, device)
        for _ in range(2):
            training_step(model, optimizer, device)
        return torch.cuda.max_memory_allocated()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profiler:
        model, optimizer = prepared(size, config, device)
        for _ in range(2):
            training_step(model, optimizer, device)
    with tempfile.TemporaryDirectory() as folder:
        trace = Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(trace))
        events = json.loads(trace.read_text())["traceEvents"]
    changes = sorted(
        ((event["ts"], event["args"]["Bytes"]) for event in events if event.get("name") == "[memory]"),
        key=lambda change: change[0],
    )
    peak = allocated = 0
    for _, change in changes:
        allocated += change
        peak = max(peak, allocated)
    return peak


def benchmark_memory(size: str, options: argparse.Namespace) -> dict[str, Any]:
    """Peak bytes of a training step, with the projector's refresh in it."""
    found = {name: peak_of(size, config, options.device) for name, config in configs(size).items()}
    return {
        "bytes": found,
        "ratios": {f"{name} / full-rank": peak / found["full-rank"] for name, peak in found.items()},
        "blocks": 2,
        "tokens": 64,
    }


# Output


def show(size: str, part: str, result: dict[str, Any]) -> None:
    """Print a part's numbers."""
    table = Table(title=f"{size}, {part}", title_justify="left")
    table.add_column("")
    table.add_column("median", justify="right")
    for name, seconds in result.get("seconds", {}).items():
        table.add_row(name, f"{seconds * 1e3:.1f} ms")
    for name, value in result.get("bytes", {}).items():
        parts = value.items() if isinstance(value, dict) else [("peak", value)]
        table.add_row(name, ", ".join(f"{key} {count / 2**20:.2f} MiB" for key, count in parts))
    for name, value in result.get("ratios", {}).items():
        table.add_row(name, f"{value:.2f} x")
    Console(width=140).print(table)


def main() -> None:
    """Run the parts that were asked for, print tables, write JSON."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--sizes", nargs="+", choices=list(RANKS), default=["60m", "350m"])
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--rounds", type=int, default=15, help="rounds of steps and layers")
    parser.add_argument("--refresh_rounds", type=int, default=3, help="rounds of refreshes")
    parser.add_argument("--layers", type=int, default=8, help="blocks whose matrices are stepped")
    parser.add_argument("--refresh_layers", type=int, default=1, help="blocks whose matrices are refreshed")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--output", type=Path, default=None, help="JSON file")
    options = parser.parse_args()
    logging.disable(logging.WARNING)
    device = torch.cuda.get_device_name() if options.device != "cpu" else platform.machine()
    result: dict[str, Any] = {
        "device": device, "threads": torch.get_num_threads(), "torch": torch.__version__, "rounds": options.rounds,
    }  # fmt: skip
    functions = {
        "step": benchmark_step, "refresh": benchmark_refresh, "layers": benchmark_layers, "state": benchmark_state,
        "memory": benchmark_memory,
    }  # fmt: skip
    for size in options.sizes:
        result[size] = {}
        for part in options.parts:
            result[size][part] = functions[part](size, options)
            show(size, part, result[size][part])
            gc.collect()
        if {"step", "refresh"} <= set(options.parts):
            found = amortised(result[size]["step"], result[size]["refresh"])
            result[size]["amortised over 200 steps"] = {"seconds": found}
            show(size, "GaLore's step with its share of a refresh every 200", {"seconds": found})
        if options.output is not None:
            options.output.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
