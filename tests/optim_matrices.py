"""Parameters and gradients of mixed shapes, for the optimizers' tests."""

import torch

SHAPES = [(24, 40), (32, 32), (40, 24)]
# after the matrices what is not projected: a matrix and a vector
ALL_SHAPES = [*SHAPES, (50, 8), (16,)]


def parameters(shapes=ALL_SHAPES, dtype=torch.float32):
    generator = torch.Generator().manual_seed(7)
    return [torch.nn.Parameter(torch.randn(s, generator=generator).to(dtype)) for s in shapes]


def gradients(shapes=ALL_SHAPES, steps=20, seed=0, dtype=torch.float32, scale=1e-2):
    generator = torch.Generator().manual_seed(seed)
    return [[scale * torch.randn(s, generator=generator).to(dtype) for s in shapes] for _ in range(steps)]


def take_steps(optimizer, params, grads):
    for step in grads:
        for p, g in zip(params, step, strict=True):
            p.grad = None if g is None else g.clone()
        optimizer.step()


def relative_error(a, b):
    return ((a - b).norm() / b.norm()).item()
