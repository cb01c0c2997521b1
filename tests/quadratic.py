"""A model whose loss is a known quadratic form, for the closed forms of curvature and landscapes."""

import torch
from torch import nn


class Quadratic(nn.Module):
    """theta is spread over a matrix and a vector; loss 1/2 theta^T H theta + g^T theta."""

    def __init__(self, rows=3, cols=4, extra=5, seed=0, dtype=torch.float64):
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.size = rows * cols + extra
        self.matrix = nn.Parameter(torch.randn(rows, cols, generator=generator, dtype=dtype))
        self.vector = nn.Parameter(torch.randn(extra, generator=generator, dtype=dtype))
        A = torch.randn(self.size, self.size, generator=generator, dtype=dtype)
        self.H, self.g = A + A.T, torch.randn(self.size, generator=generator, dtype=dtype)

    def theta(self):
        return torch.cat([self.matrix.flatten(), self.vector])

    def loss(self):
        theta = self.theta()
        return theta @ self.H @ theta / 2 + self.g @ theta


def loss(model):
    """Scalar tensor."""
    return model.loss()
