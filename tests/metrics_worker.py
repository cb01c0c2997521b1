"""What every process of a torchrun launch does in the tests of shared measurements; one launch runs all cases.

Usage: torchrun --nproc_per_node N metrics_worker.py FOLDER. FOLDER/metrics-<world>.json gets, for every case, the
largest relative difference of a number to the one that a process alone measures on the whole model.
"""

import copy
import json
import math
import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from sharded_worker import SIZES, mesh
from tiny_runs import METHODS, arguments, dataset, llama, make_trainer, weights
from torch.distributed.fsdp import fully_shard
from transformers import TrainerControl, TrainerState

import hf_lowrank as lr
from hf_lowrank.evaluation.perplexity import perplexity_metrics
from hf_lowrank.families import (
    Activation,
    Context,
    Curvature,
    CurvatureSettings,
    InterpolationSettings,
    Landscape,
    LandscapeSettings,
    Loss,
    Peer,
    Spectral,
)
from hf_lowrank.families.interpolation import loss_path_records
from hf_lowrank.metrics.sequences import EvaluationSet
from hf_lowrank.sharding import is_sharded

SETTINGS = LandscapeSettings(directions=2, points=3, svd_1_points=3, svd_k=(2,), svd_k_points=3, trajectory=0)
NORMALIZED = [LandscapeSettings(directions=1, points=3, svd_k=(), normalize=n) for n in ("filter", "layer", "unit")]
KINDS = ("fullrank", "sltrain", "cola", "lora")


def fresh(kind, dtype=torch.float64, seed=0):
    torch.manual_seed(0)
    args = arguments(os.environ["SCRATCH"], log_level="error")
    model, _ = lr.prepare(llama(seed=seed, **SIZES).to(dtype), METHODS[kind], args)
    return model.eval()


def sharded(model):
    model = copy.deepcopy(model)
    for layer in model.model.layers:
        fully_shard(layer, mesh=mesh())
    fully_shard(model, mesh=mesh())
    return model


def values(measurement):
    found = {f"{r.name} {r.space} {sorted(r.settings.items())}": (r.value, r.stderr) for r in measurement.records}
    assert len(found) == len(measurement.records)
    return found


def difference(mine, expected):
    """Largest relative difference of values and standard errors; infinite where one has what the other has not."""
    a, b = values(mine), values(expected)
    if a.keys() != b.keys() or len(mine.rows) != len(expected.rows):
        return math.inf
    worst = 0.0
    for key in a:
        for x, y in zip(a[key], b[key], strict=True):
            if (x is None) != (y is None):
                return math.inf
            # a variance over directions may be far below the losses it is made of
            worst = max(worst, 0.0 if x is None else abs(x - y) / max(abs(y), 1e-6))
    for x, y in ((r.samples, e.samples) for r, e in zip(mine.records, expected.records, strict=True)):
        if (x is None) != (y is None) or (x is not None and (x.units, x.sums.shape) != (y.units, y.sums.shape)):
            return math.inf
        if x is not None:
            worst = max(worst, float(abs(x.sums - y.sums).max() / max(abs(y.sums).max(), 1e-6)))
    return worst


def states(kind):
    return [
        {k: v.clone() for k, v in fresh(kind, seed=0).state_dict().items()},
        {k: v * 1.1 if v.is_floating_point() else v for k, v in fresh(kind, seed=0).state_dict().items()},
    ]


def local_states(model, whole):
    """The parts of whole state dicts that this process holds."""
    from torch.distributed.tensor import DTensor, distribute_tensor

    own = model.state_dict()
    return [
        {
            k: distribute_tensor(v, own[k].device_mesh, own[k].placements) if isinstance(own[k], DTensor) else v
            for k, v in state.items()
        }
        for state in whole
    ]


def measurements(model, evaluation, kind):
    """Every family, on a model that may be sharded, with sequences that may be shared."""
    baseline = fresh("fullrank", seed=3)
    ends = states(kind)
    ends = local_states(model, ends) if is_sharded(model) else ends
    before = {name: 1.01 * w for name, w in _dense(kind).items()}
    found = {
        "loss": Loss().measure(Context(model, 0, None, evaluation)),
        "landscape": Landscape().measure(Context(model, 0, SETTINGS, evaluation)),
        "activation": Activation().measure(
            Context(model, 0, None, evaluation, baseline=Peer("baseline", None, lambda: baseline))
        ),
        "interpolation": loss_path_records(
            Context(model, 0, InterpolationSettings(points=3), evaluation), model, tuple(ends), "consecutive", None,
            {}, {"other": "", "other_step": 0},
        ),
        "spectral": Spectral().measure(
            Context(model, 1, space="dense", previous=Peer("", 0, tensor=before.get), shared=evaluation.shared)
        ),
    }  # fmt: skip
    for settings in NORMALIZED:
        found[f"landscape {settings.normalize}"] = Landscape().measure(Context(model, 0, settings, evaluation))
    if not is_sharded(model):
        found["curvature"] = Curvature().measure(Context(model, 0, CurvatureSettings(3, 2, 4), evaluation))
    return found


def _dense(kind):
    from hf_lowrank.methods.targets import dense_weights

    return {t.name: w.clone() for t, w in dense_weights(fresh(kind))}


def functions():
    """The measuring functions: replicated and sharded, with fewer sequences than processes and with more."""
    results = {}
    for kind in KINDS:
        for sequences in (1, 5):
            rows = EvaluationSet.from_dataset(dataset(sequences, seed=1)).rows
            # once, by the first process, whose results are kept
            expected = measurements(fresh(kind), EvaluationSet(rows, 2), kind) if dist.get_rank() == 0 else None
            for how in ("replicated", "sharded"):
                model = fresh(kind) if how == "replicated" else sharded(fresh(kind))
                before = {k: v.clone() for k, v in weights(model).items()}
                found = measurements(model, EvaluationSet(rows, 2, shared=True), kind)
                if expected is not None:
                    results |= {f"{kind}, {how}, {sequences}, {f}": difference(found[f], expected[f]) for f in found}
                same = all(torch.equal(_local(v), _local(before[k])) for k, v in model.state_dict().items())
                results[f"{kind}, {how}, {sequences}, weights as before"] = 0.0 if same else math.inf
    return results


def _local(tensor):
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


def callbacks(valid, baseline):
    few = {"sequences": 4, "budget": None}
    return [
        lr.SpectralCallback(every=2, budget=None),
        lr.LandscapeCallback(
            valid, every=2, directions=2, points=3, svd_1_points=3, svd_k=(2,), svd_k_points=3, space="both", **few
        ),
        lr.InterpolationCallback(valid, points=3, **few),
        lr.ActivationCallback(valid, baseline, every=2, **few),
        lr.CurvatureCallback(valid, every=2, samples=2, iterations=3, **{**few, "sequences": 3}),
    ]


def drive(folder, model):
    """What a Trainer calls at two saves, on a model that this process may hold a part of."""
    args = arguments(folder, log_level="error", per_device_eval_batch_size=2)
    state, control = TrainerState(), TrainerControl()
    state.is_world_process_zero = dist.get_rank() == 0
    made = callbacks(dataset(6, seed=1), fresh("fullrank", seed=3))
    for callback in made:
        callback.on_train_begin(args, state, control, model=model)
    for step in (2, 4):
        with torch.no_grad():
            for p in model.parameters():
                _local(p).mul_(1.01)
        state.global_step = step
        for callback in made:
            callback.on_step_end(args, state, control, model=model)
        for callback in made:
            callback.on_save(args, state, control, model=model)
    for callback in made:
        callback.on_train_end(args, state, control, model=model)
    return made


def driven(folder):
    """Callbacks on a sharded model against the same callbacks on a whole one."""
    results = {}
    for kind in ("fullrank", "sltrain", "cola"):
        expected = drive(folder / f"{kind} replicated", fresh(kind))
        found = drive(folder / f"{kind} sharded", sharded(fresh(kind)))
        for mine, theirs in zip(found, expected, strict=True):
            name = f"callback {theirs.name}, {kind}"
            results[f"{name}: {mine.failed or theirs.failed}"] = float(mine.failed != theirs.failed)
            if dist.get_rank() == 0:
                a, b = ([(r.name, r.step, r.space, r.value) for r in c.records] for c in (mine, theirs))
                same = [x[:3] for x in a] == [y[:3] for y in b]
                gaps = [
                    abs(x[3] - y[3]) / max(abs(y[3]), 1e-6) for x, y in zip(a, b, strict=False) if x[3] is not None
                ]
                results[f"{name}, {len(a)} records"] = max(gaps, default=0.0) if same and a else math.inf
    return results


def trained(folder):
    """All callbacks attached to a Trainer, with and without them; one process is launched before the others."""
    results, world = {}, dist.get_world_size()
    models = {}
    for measured in (False, True):
        # another TrainingArguments resets what accelerate knows of the processes: first things first
        made = callbacks(dataset(6, seed=1), fresh("fullrank", seed=3))
        args = arguments(
            folder / f"trained {world} {measured}", max_steps=4, per_device_train_batch_size=4 // world,
            per_device_eval_batch_size=2, ddp_backend="gloo", log_level="error", save_strategy="steps", save_steps=2,
        )  # fmt: skip
        kwargs = perplexity_metrics() if measured else {}
        trainer = make_trainer(METHODS["sltrain"], args, model=llama(**SIZES).to(torch.float64), **kwargs)
        if measured:
            lr.attach(trainer, *made)
        trainer.train()
        models[measured] = weights(trainer.model)
    # 7 sequences on 2 processes: one is dealt out twice and must count once
    evaluated = trainer.evaluate(dataset(7, seed=2))
    same = all(torch.equal(models[True][k], v) for k, v in models[False].items())
    results["trained with callbacks as without"] = 0.0 if same else math.inf
    results[f"failures: {[c.failed for c in made]}"] = float(any(c.failed for c in made))
    if dist.get_rank() == 0:
        found = {f"{r.name} {r.step} {r.space}": r.value for c in made for r in c.records}
        found |= {key: value for key, value in evaluated.items() if key.startswith("eval_perplexity")}
        path = folder / "trained.json"
        if world == 1:
            path.write_text(json.dumps(found))
        expected = json.loads(path.read_text())
        assert found.keys() == expected.keys()
        for key, value in found.items():
            results[key] = abs(value - expected[key]) / max(abs(expected[key]), 1e-6)
    return results


def main():
    folder = Path(sys.argv[1])
    os.environ["SCRATCH"] = str(folder)
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    results = trained(folder)
    if dist.get_world_size() > 1:
        results |= functions() | driven(folder)
    if dist.get_rank() == 0:
        (folder / f"metrics-{dist.get_world_size()}.json").write_text(json.dumps(results, indent=1))
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
