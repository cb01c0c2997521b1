"""What every process of a launch does in the tests of sharded training; one launch runs all cases.

Usage: torchrun --nproc_per_node N sharded_worker.py FOLDER PART (the tests fork it: launcher.py). FOLDER gets
<part>-<world>.json of the first process: case -> largest relative difference to one process that shards nothing.
"""

import copy
import json
import os
import sys
from pathlib import Path
from unittest.mock import patch

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import torch.nn.functional as F  # noqa: N812
from tiny_runs import METHODS, VOCABULARY, arguments, llama, make_trainer, optimizers
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Shard, distribute_tensor
from torch.nn.parallel import DistributedDataParallel
from toy_models import OwnProducts, toy_model

import hf_lowrank as lr
from hf_lowrank.checkpoints import export, gather_model
from hf_lowrank.methods.prepare import apply_method
from hf_lowrank.methods.targets import dense_weights
from hf_lowrank.optim import ApolloAdamW, FiraAdamW, FrugalAdamW, GaLoreAdamW, projector
from hf_lowrank.optim.projector import PROJ_TYPES, REFRESHES

STEPS, MATRIX_STEPS, SEQUENCES, LENGTH = 12, 14, 12, 8
# 27 rows of the MLP are shared unevenly by 2 and 4 processes; k_proj's and v_proj's 6 rows leave a fourth without any
SIZES = dict(hidden_size=24, intermediate_size=27, num_key_value_heads=1, attention_dropout=0.0)
# one row, fewer rows than processes, uneven rows; stacks, which are dealt out by matrices
SHAPES = [(1, 7), (2, 9), (5, 8), (8, 5), (6, 6), (5, 4, 8), (3, 8, 5)]

MATRIX_CASES = {
    **{
        f"GaLoreAdamW {proj_type} {refresh}": (GaLoreAdamW, {"proj_type": proj_type, "refresh": refresh})
        for proj_type in PROJ_TYPES
        for refresh in REFRESHES
    },
    **{
        f"{cls.__name__} {proj_type}": (cls, {"proj_type": proj_type})
        for cls in optimizers()
        for proj_type in ("std", "reverse_std", "full")
        if "proj_type" in cls.options and cls is not GaLoreAdamW
    },
    **{cls.__name__: (cls, {}) for cls in optimizers() if "proj_type" not in cls.options},
    "GaLoreAdamW sampled": (GaLoreAdamW, {"projection": "sampled", "rotate_moments": True}),
    "GaLoreAdamW dct": (GaLoreAdamW, {"projection": "dct", "proj_type": "full", "rotate_moments": True}),
    "GaLoreAdamW adaptive": (GaLoreAdamW, {"adaptive_gap": True, "update_proj_gap": 1}),
    "FiraAdamW random": (FiraAdamW, {"projection": "random", "stagger_refreshes": True}),
    "FrugalAdamW coordinates": (FrugalAdamW, {"projection": "coordinates"}),
    "FiraAdamW alpha 1": (FiraAdamW, {"alpha": 1.0}),
    "ApolloAdamW tensor": (ApolloAdamW, {"scale_type": "tensor", "scale": 128.0}),
}


def mesh(*sizes):
    sizes = sizes or (dist.get_world_size(),)
    return init_device_mesh("cpu", sizes, mesh_dim_names=("replicate", "shard")[-len(sizes) :])


def whole(tensor):
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def difference(mine, reference):
    """Largest relative difference over tensors, by norms; nothing where the first process alone has a reference."""
    assert reference is None or mine.keys() == reference.keys()
    worst = 0.0
    for key in sorted(mine):
        value = whole(mine[key])
        if reference is not None:
            worst = max(worst, ((value - reference[key]).norm() / reference[key].norm().clamp_min(1e-30)).item())
    return worst


def floating(state):
    return {k: v.detach() for k, v in state.items() if torch.is_tensor(v) and v.is_floating_point()}


def alone(compute):
    """What the first process computes without the others, who need not do it again; None for them."""
    return compute() if dist.get_rank() == 0 else None


class Matrices(torch.nn.Module):
    """A bag of parameters; fully_shard shards their rows."""

    def __init__(self):
        super().__init__()
        generator = torch.Generator().manual_seed(3)
        for i, shape in enumerate([*SHAPES, (4, 3), (7,)]):
            value = torch.randn(shape, generator=generator, dtype=torch.float64)
            self.register_parameter(f"p{i}", torch.nn.Parameter(value))


def matrix_optimizer(model, optimizer_cls, options):
    named = dict(model.named_parameters())
    projected = [named[f"p{i}"] for i in range(len(SHAPES))]
    by_rank = [{"params": projected[:2], "r": 1}, {"params": projected[2:], "r": 3}]
    groups = [{**group, "update_proj_gap": 6, **options} for group in by_rank]
    rest = [p for i, p in enumerate(named.values()) if i >= len(SHAPES)]
    return optimizer_cls([*groups, {"params": rest}], lr=1e-2, weight_decay=0.1)


def step_matrices(model, optimizer, steps, broken=()):
    """Steps on gradients that are the same for every world size; in `broken` steps one entry of one is NaN."""
    for step in steps:
        generator = torch.Generator().manual_seed(100 + step)
        for i, p in enumerate(model.parameters()):
            grad = torch.randn(p.shape, generator=generator, dtype=torch.float64)
            if step in broken and i == step % len(SHAPES):
                grad.view(-1)[-1] = float("nan")
            if isinstance(p, DTensor):
                # every process draws the whole gradient: nothing is to be sent
                grad = distribute_tensor(grad, p.device_mesh, p.placements, src_data_rank=None)
            p.grad = grad
        optimizer.step()


# sharded in pairs, replicated over two of them (HSDP)
HYBRID_CASES = [
    *("GaLoreAdamW std gram", "GaLoreAdamW full svd", "ApolloAdamW tensor"),
    *(f"{cls.__name__} std" for cls in optimizers() if f"{cls.__name__} std" in MATRIX_CASES),
    *(cls.__name__ for cls in optimizers() if cls.__name__ in MATRIX_CASES),
]


def by_rows(p):
    """Shards the rows of a stack's matrices."""
    return Shard(1) if p.ndim == 3 else None


def matrices(folder):
    results = {}
    cases = [(case, broken, (), None) for case in MATRIX_CASES for broken in ((), (6, 8, 12, 13))]
    cases += [(case, (6, 12, 13), (), by_rows) for case in HYBRID_CASES]
    if dist.get_world_size() == 4:
        cases += [(case, (), (2, 2), None) for case in HYBRID_CASES]
    for case, broken, sizes, placement in cases:
        optimizer_cls, options = MATRIX_CASES[case]

        def stepped(model, optimizer_cls=optimizer_cls, options=options, broken=broken):
            optimizer = matrix_optimizer(model, optimizer_cls, options)
            step_matrices(model, optimizer, range(MATRIX_STEPS), broken)
            found = dict(model.named_parameters())
            for name, p in model.named_parameters():
                found |= {f"{name} {k}": v for k, v in optimizer.state[p].items() if torch.is_tensor(v)}
            return found

        sharded = Matrices()
        fully_shard(sharded, mesh=mesh(*sizes), shard_placement_fn=placement)
        name = case + ", NaN in some steps" * bool(broken) + ", HSDP" * bool(sizes)
        name += ", stacks by rows" * bool(placement)
        mine, expected = stepped(sharded), alone(lambda stepped=stepped: stepped(Matrices()))
        results[name] = difference(mine, expected)
    return results


def batches():
    generator = torch.Generator().manual_seed(5)
    return [torch.randint(0, VOCABULARY, (SEQUENCES, LENGTH), generator=generator) for _ in range(STEPS)]


def shard(model):
    for layer in model.base_model.layers:
        fully_shard(layer, mesh=mesh())
    fully_shard(model, mesh=mesh())


def make(method, dtype, sharded, order="after", model=None):
    """A prepared model and its optimizer, which is made before or after sharding."""
    torch.manual_seed(0)
    model = llama(**SIZES) if model is None else model
    args = arguments(os.environ["SCRATCH"], log_level="error", weight_decay=0.1, learning_rate=2e-3)
    model, kwargs = lr.prepare(model.to(dtype), METHODS[method], args)
    optimizer_cls, options = kwargs["optimizer_cls_and_kwargs"]
    options = {**options, "weight_decay": 0.1}
    if not sharded:
        return model, optimizer_cls(model.parameters(), **options)
    if order == "after":
        shard(model)
        return model, optimizer_cls([p for p in model.parameters() if p.requires_grad], **options)
    optimizer = optimizer_cls([p for p in model.parameters() if p.requires_grad], **options)
    # what accelerate does when it shards a model whose optimizer is there already
    names = {id(p): name for name, p in model.named_parameters()}
    shard(model)
    new = dict(model.named_parameters())
    for group in optimizer.param_groups:
        group["params"] = [new[names[id(p)]] for p in group["params"]]
    return model, optimizer


def train(model, optimizer, steps, share):
    for ids in [batches()[step] for step in steps]:
        part = ids[share]
        model(input_ids=part, labels=part).loss.backward()
        optimizer.step()
        optimizer.zero_grad()


def my_share():
    each = SEQUENCES // dist.get_world_size()
    return slice(dist.get_rank() * each, (dist.get_rank() + 1) * each)


def methods(folder):
    """Every method sharded against one process; and a checkpoint in mid-run for another world size."""
    results = {}
    for method in METHODS:
        for dtype in (torch.float64, torch.float32):

            def trained_alone(method=method, dtype=dtype):
                plain, optimizer = make(method, dtype, sharded=False)
                train(plain, optimizer, range(STEPS), slice(None))
                return floating(plain.state_dict())

            expected = alone(trained_alone)
            for order in ("before", "after"):
                model, optimizer = make(method, dtype, sharded=True, order=order)
                train(model, optimizer, range(STEPS // 2), my_share())
                if dtype is torch.float64 and order == "after":
                    save(model, optimizer, folder / method)
                train(model, optimizer, range(STEPS // 2, STEPS), my_share())
                name = f"{method}, {str(dtype).removeprefix('torch.')}, optimizer made {order} sharding"
                results[name] = difference(floating(model.state_dict()), expected)
            if dtype is torch.float64 and dist.get_rank() == 0:
                torch.save(expected, folder / f"{method}.pt")
    return results


def publish(folder):
    """What is published of a sharded model against what is published of a whole one."""
    results = {}
    for method in METHODS:
        plain, reference = make(method, torch.float32, sharded=False)
        train(plain, reference, range(2), slice(None))
        model, optimizer = make(method, torch.float32, sharded=True)
        train(model, optimizer, range(2), my_share())
        mine = {target.name: weight.clone() for target, weight in dense_weights(model)}
        results[f"{method}, dense weights"] = difference(mine, {t.name: w for t, w in dense_weights(plain)})
        whole_model = gather_model(model, keep=dist.get_rank() == 0)
        if whole_model is not None:
            export(whole_model, folder / method / "publish")
            loaded = lr.from_pretrained(folder / method / "publish").state_dict()
            expected = floating(plain.state_dict())
            results[f"{method}, published"] = difference(floating(loaded), expected)
    return results


def resume(folder):
    """Go on at this world size from what another one saved."""
    results = {}
    for method in METHODS:
        expected = torch.load(folder / f"{method}.pt", weights_only=True)
        model, optimizer = make(method, torch.float64, sharded=dist.get_world_size() > 1)
        load(model, optimizer, folder / method)
        train(model, optimizer, range(STEPS // 2, STEPS), my_share())
        results[method] = difference(floating(model.state_dict()), expected)
    return results


def ddp(folder):
    """Every method through Trainer; one process is launched first and leaves what the others are compared with."""
    results = {}
    for method in METHODS:
        for dtype in (torch.float64, torch.float32):
            args = arguments(
                folder / "scratch",
                max_steps=STEPS,
                per_device_train_batch_size=4 // dist.get_world_size(),
                ddp_backend="gloo",
                log_level="error",
            )
            trainer = make_trainer(METHODS[method], args, model=llama(**SIZES).to(dtype))
            refreshed = [0]
            with patch.object(projector, "refresh_projector", counting(refreshed, projector.refresh_projector)):
                trainer.train()
            found = floating(trainer.model.state_dict())
            name = f"{method}, {str(dtype).removeprefix('torch.')}"
            if dist.get_world_size() == 1:
                torch.save(found, folder / f"ddp {name}.pt")
            results[name] = difference(found, torch.load(folder / f"ddp {name}.pt", weights_only=True))
            results[name] = max(results[name], apart(trainer.optimizer))
            if refreshed[0] and dtype is torch.float64:
                shares = [None] * dist.get_world_size()
                dist.all_gather_object(shares, refreshed[0])
                results[f"{method}, share of the refreshes"] = max(shares) / sum(shares)
    return {**results, **{f"dealt refreshes, {case}": error for case, error in dealt().items()}}


def dealt():
    """Refreshes that are dealt to processes, or would be if these had the same gradients, against each one's own."""
    results = {}
    for case in ("the same gradients", "other gradients", "not all gradients"):
        models, optimizers = [Matrices(), Matrices()], []
        for model, replicas in zip(models, (True, False), strict=True):
            optimizers.append(matrix_optimizer(model, GaLoreAdamW, {}))
            optimizers[-1].replicas = replicas
        for step in range(MATRIX_STEPS):
            generator = torch.Generator().manual_seed(step + 1000 * dist.get_rank() * (case == "other gradients"))
            for i, pair in enumerate(zip(*(model.parameters() for model in models), strict=True)):
                grad = torch.randn(pair[0].shape, generator=generator, dtype=torch.float64)
                lacking = case == "not all gradients" and i == dist.get_rank() and step > 5
                for p in pair:
                    p.grad = None if lacking else grad.clone()
            for optimizer in optimizers:
                optimizer.step()
        differ = torch.tensor(difference(*(dict(model.named_parameters()) for model in models)))
        dist.all_reduce(differ, op=dist.ReduceOp.MAX)
        results[case] = differ.item()
    return results


def counting(calls, function):
    """The function, whose calls are counted."""

    def counted(*args, **kwargs):
        calls[0] += 1
        return function(*args, **kwargs)

    return counted


def apart(optimizer):
    """1.0 unless all processes have the same state of the optimizer, to the bit."""
    state = [v for values in optimizer.state.values() for v in values.values()]
    mine = [v.tolist() if torch.is_tensor(v) else v for v in state]
    everywhere = [None] * dist.get_world_size()
    dist.all_gather_object(everywhere, mine)
    return float(any(other != everywhere[0] for other in everywhere))


def save(model, optimizer, folder):
    weights, state = get_state_dict(model, optimizer)
    dcp.save({"model": weights, "optimizer": state}, checkpoint_id=str(folder))


def load(model, optimizer, folder):
    weights, state = get_state_dict(model, optimizer)
    saved = {"model": weights, "optimizer": state}
    dcp.load(saved, checkpoint_id=str(folder))
    set_state_dict(model, optimizer, model_state_dict=saved["model"], optim_state_dict=saved["optimizer"])


def converted(folder):
    """Architectures with other names on disk, and experts: resumed with DDP and FSDP2, and published from shards."""
    results = {}
    for model_type, method in (
        ("mixtral", "sltrain"),
        ("gpt_neox", "galore"),
        ("gpt_oss", "apollo"),
        ("olmoe", "fira"),
    ):

        def trained(name, model_type=model_type, method=method, **given):
            args = arguments(
                folder / f"{model_type}-{name}",
                max_steps=4,
                save_strategy="steps",
                save_steps=2,
                ddp_backend="gloo",
                log_level="error",
            )
            trainer = make_trainer(METHODS[method], args, model=toy_model(model_type))
            trainer.train(**given)
            return floating(trainer.model.state_dict())

        expected = trained("whole")
        checkpoint = str(folder / f"{model_type}-whole" / "checkpoint-2")
        results[f"{model_type}, DDP"] = difference(trained("resumed", resume_from_checkpoint=checkpoint), expected)

        model, optimizer = make(method, torch.float32, True, model=toy_model(model_type))
        train(model, optimizer, range(2), my_share())
        save(model, optimizer, folder / f"{model_type}-shards")
        train(model, optimizer, range(2, 4), my_share())
        expected = {k: whole(v).clone() for k, v in floating(model.state_dict()).items()}
        resumed, its_optimizer = make(method, torch.float32, True, model=toy_model(model_type, seed=1))
        load(resumed, its_optimizer, folder / f"{model_type}-shards")
        train(resumed, its_optimizer, range(2, 4), my_share())
        results[f"{model_type}, FSDP2"] = difference(floating(resumed.state_dict()), expected)
        gathered = gather_model(resumed, keep=dist.get_rank() == 0)
        if gathered is not None:
            export(gathered, folder / f"{model_type}-publish")
            loaded = lr.from_pretrained(folder / f"{model_type}-publish").state_dict()
            results[f"{model_type}, published"] = difference(floating(loaded), expected)
    return results


def uncalled(folder):
    """Gradients of two processes against one's, where a model reads the weight of a layer that it does not call."""
    results = {}
    ids = torch.arange(32).view(4, 8)
    for method in ("lora", "sltrain"):
        model = OwnProducts(lambda mlp, x, y: F.linear(y, mlp.mix.weight, mlp.mix.bias)).train()
        apply_method(model, METHODS[method], seed=1)
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():
            # nothing is zero, so that whatever reaches the loss has a gradient
            for p in model.parameters():
                p += 0.1 * torch.randn(p.shape, generator=generator)
        alone = copy.deepcopy(model)
        alone(input_ids=ids, labels=ids).loss.backward()
        expected = {n: p.grad for n, p in alone.named_parameters() if p.requires_grad}
        for how in ("DDP", "DDP with unused parameters", "FSDP2"):
            own = copy.deepcopy(model)
            if how == "FSDP2":
                shard(own)
            wrapped = own if how == "FSDP2" else DistributedDataParallel(own, find_unused_parameters="unused" in how)
            mine = ids[2 * dist.get_rank() :][:2]
            wrapped(input_ids=mine, labels=mine).loss.backward()
            gradients = {n: whole(p.grad) for n, p in own.named_parameters() if p.requires_grad}
            assert gradients.keys() == expected.keys()
            results[f"{method}, {how}"] = max((gradients[n] - expected[n]).abs().max().item() for n in expected)
    return results


def main():
    folder, part = Path(sys.argv[1]), sys.argv[2]
    os.environ["SCRATCH"] = str(folder)
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    parts = (matrices, methods, resume, ddp, publish, converted, uncalled)
    results = {function.__name__: function for function in parts}[part](folder)
    if dist.get_rank() == 0:
        (folder / f"{part}-{dist.get_world_size()}.json").write_text(json.dumps(results, indent=1))
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
