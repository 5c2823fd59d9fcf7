"""The batches that the trainings draw: noisy classes, and bars on noise."""

from __future__ import annotations

import torch

__all__ = ["Blobs", "Images"]


class Blobs:
    """Classes as noisy prototypes, seen through a fixed nonlinear map."""

    def __init__(self, dim=16, classes=5, noise=0.6, seed=0):
        self.g = torch.Generator().manual_seed(seed)
        self.centres = torch.randn(classes, 6, generator=self.g)
        self.a = torch.randn(6, dim, generator=self.g)
        self.noise, self.classes = noise, classes

    def batch(self, n=64):
        y = torch.randint(0, self.classes, (n,), generator=self.g)
        z = self.centres[y] * 1.5 + self.noise * torch.randn(n, 6, generator=self.g)
        return torch.sin(z @ self.a * 0.5) + 0.3 * (z @ self.a), y


class Images:
    """Bars of four orientations and shifts on noise."""

    def __init__(self, size=10, seed=1, noise=0.3):
        self.g = torch.Generator().manual_seed(seed)
        self.size, self.noise = size, noise

    def batch(self, n=32):
        s = self.size
        y = torch.randint(0, 4, (n,), generator=self.g)
        x = self.noise * torch.randn(n, 1, s, s, generator=self.g)
        at = torch.randint(2, s - 2, (n,), generator=self.g)
        i = torch.arange(s)
        for k in range(n):
            if y[k] == 0:
                x[k, 0, at[k]] += 1
            elif y[k] == 1:
                x[k, 0, :, at[k]] += 1
            elif y[k] == 2:
                x[k, 0, i, (i + at[k]) % s] += 1
            else:
                x[k, 0, i, (at[k] - i) % s] += 1
        return x, y
