"""What each process of a launch does in the test of ReLoRA over merges; one launch runs all cases.

Usage: torchrun --nproc_per_node 2 relora_worker.py FOLDER (the test forks it: launcher.py).
"""

import json
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from tiny_runs import arguments, gpt2, llama
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from transformers import TrainerControl, TrainerState

import hf_lowrank as lr

STEPS, SEQUENCES, LENGTH = 7, 4, 8
# 27 rows of the MLP and the 3 of A, which two processes cannot share evenly
UNEVEN = dict(hidden_size=24, intermediate_size=27, num_key_value_heads=1, attention_dropout=0.0)

# case -> (model, rank, pruning, whether the root alone is sharded)
CASES = {
    "random": ("llama", 3, "random", False),
    "magnitude": ("llama", 3, "magnitude", False),
    "reset": ("llama", 3, "reset", False),
    "a shard without rows": ("llama", 1, "random", False),
    "conv1d": ("gpt2", 3, "random", False),
    "gathered by an evaluation": ("llama", 3, "random", True),
}


def whole(tensor):
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def make(kind):
    model = llama(**UNEVEN) if kind == "llama" else gpt2()
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    return model.double()


def train(case, scratch, sharded):
    """Weights, moments and the log after some steps with a restart after every two."""
    kind, r, pruning, root_alone = CASES[case]
    config = lr.ReLoRAConfig(r=r, reset_every=2, restart_warmup_steps=1, pruning=pruning, pruning_ratio=0.7)
    args = arguments(scratch, log_level="error", disable_tqdm=True)
    model, trainer_kwargs = lr.prepare(make(kind), config, args)
    (callback,) = trainer_kwargs["callbacks"]
    mine = slice(None)
    if sharded:
        mesh = init_device_mesh("cpu", (dist.get_world_size(),))
        blocks = model.model.layers if kind == "llama" else model.transformer.h
        for block in [] if root_alone else blocks:
            fully_shard(block, mesh=mesh)
        fully_shard(model, mesh=mesh)
        each = SEQUENCES // dist.get_world_size()
        mine = slice(dist.get_rank() * each, (dist.get_rank() + 1) * each)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    state, generator = TrainerState(max_steps=STEPS), torch.Generator().manual_seed(5)
    for step in range(STEPS):
        ids = torch.randint(0, 64, (SEQUENCES, LENGTH), generator=generator)[mine]
        if root_alone:
            with torch.no_grad():
                model(input_ids=ids)
        state.global_step = step
        callback.on_step_begin(args, state, TrainerControl(), model=model, optimizer=optimizer)
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    for module in model.modules():
        if hasattr(module, "reshard"):
            module.reshard()
    tensors = {name: whole(p.detach()) for name, p in model.named_parameters()}
    for name, p in model.named_parameters():
        tensors |= {f"{name} {key}": whole(value) for key, value in optimizer.state.get(p, {}).items()}
    dense = {name: whole(module.dense_weight()) for name, module in model.named_modules() if hasattr(module, "lora_A")}
    return tensors, dense, state.log_history


def difference(mine, reference):
    """Largest difference over tensors, relative to their norms."""
    assert mine.keys() == reference.keys()
    return max(((mine[k] - v).norm() / v.norm().clamp_min(1e-30)).item() for k, v in reference.items())


def main():
    folder = Path(sys.argv[1])
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    results = {}
    for case in CASES:
        tensors, dense, log = train(case, folder, sharded=False)
        their_tensors, their_dense, their_log = train(case, folder, sharded=True)
        logged = [{k: v for k, v in entry.items() if k != "relora/merged_norm"} for entry in log]
        results[case] = {
            "weights and moments": difference(their_tensors, tensors),
            "dense form": difference(their_dense, dense),
            "norms": max(
                abs(a["relora/merged_norm"] / b["relora/merged_norm"] - 1) for a, b in zip(their_log, log, strict=True)
            ),
            "log": [{k: v for k, v in entry.items() if k != "relora/merged_norm"} for entry in their_log] == logged,
            "restarts": len(log),
        }
    if dist.get_rank() == 0:
        (folder / "results.json").write_text(json.dumps(results))
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
