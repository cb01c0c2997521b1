"""GaLore's AdamW as plainly as it can be written: one matrix, no fusing, the full SVD. Used by tests alone."""

import math

import torch


class ReferenceGaLore:
    """Algorithm 2 of arXiv 2403.03507 with the official package's order of operations."""

    def __init__(self, W, r=None, gap=200, scale=0.25, proj_type="std", lr=1e-2, betas=(0.9, 0.999), eps=1e-6, wd=0.0):
        self.W, self.r, self.gap, self.scale, self.proj_type = W.clone(), r, gap, scale, proj_type
        self.lr, self.betas, self.eps, self.wd = lr, betas, eps, wd
        self.t, self.M, self.V = 0, 0.0, 0.0

    def step(self, G):
        left, right = torch.eye(len(G), dtype=G.dtype), torch.eye(G.shape[1], dtype=G.dtype)
        if self.r is not None:
            if self.t % self.gap == 0:
                self.U, _, self.Vh = torch.linalg.svd(G, full_matrices=False)
            tall = G.shape[0] >= G.shape[1]
            sides = {"std": "right" if tall else "left", "reverse_std": "left" if tall else "right"}
            where = sides.get(self.proj_type, self.proj_type)
            if where in ("left", "full"):
                left = self.U[:, : self.r]
            if where in ("right", "full"):
                right = self.Vh[: self.r].T
        R = left.T @ G @ right
        self.t += 1
        b1, b2 = self.betas
        self.M = b1 * self.M + (1 - b1) * R
        self.V = b2 * self.V + (1 - b2) * R**2
        N = self.M / (self.V.sqrt() + self.eps)
        alpha = self.lr * math.sqrt(1 - b2**self.t) / (1 - b1**self.t)
        scale = 1.0 if self.r is None else self.scale
        self.W = self.W - alpha * scale * (left @ N @ right.T)
        self.W = self.W - self.lr * self.wd * self.W
