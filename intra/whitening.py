"""Mean and whitening matrix of pooled vectors: of a store, for S_0's whitened scoring; of a sample, for a frozen encoder.

With the covariance C = V diag(e) V^T (float64, over all pooled vectors), matrix = V diag(max(e, FLOOR * max(e)))^-1/2 V^T, and a
vector x is whitened as (x - mean) @ matrix. The floor keeps directions that hold almost no variance, and so mostly noise, from
being blown up. Without it, S_0 by raw products found the first hop rarely on small backbones.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

FLOOR = 1e-3  # of the largest eigenvalue


class Moments:
    """Count, mean and scatter matrix of vectors, merged block by block in float64 (Chan et al. 1979)."""

    def __init__(self, size: int) -> None:
        self.count = 0
        self.mean = torch.zeros(size, dtype=torch.float64)
        self.scatter = torch.zeros(size, size, dtype=torch.float64)

    def add(self, vectors: Tensor) -> None:
        """vectors: Tensor[n, d]."""
        block = vectors.double()
        if len(block):
            mean = block.mean(0)
            centred = block - mean
            self._merge(len(block), mean, centred.T @ centred)

    def merge(self, other: Moments) -> None:
        """Adds what another has counted."""
        if other.count:
            self._merge(other.count, other.mean, other.scatter)

    def _merge(self, count: int, mean: Tensor, scatter: Tensor) -> None:
        shift = mean - self.mean
        total = self.count + count
        self.scatter += scatter + torch.outer(shift, shift) * (self.count * count / total)
        self.mean += shift * (count / total)
        self.count = total

    def covariance(self) -> Tensor:
        return self.scatter / max(1, self.count)


def moments(blocks: Iterable[Tensor], size: int) -> Moments:
    """The moments of all vectors of the blocks (Tensor[..., d] each), in their order."""
    total = Moments(size)
    for block in blocks:
        total.add(block.reshape(-1, size))
    return total


def whitening(covariance: Tensor) -> Tensor:
    """The symmetric whitening matrix of a covariance, Tensor[d, d] float64, eigenvalues floored at FLOOR x the largest.

    A pool whose vectors are all equal has no direction to tell apart: its matrix is zero.
    """
    values, vectors = torch.linalg.eigh((covariance + covariance.T) / 2)
    largest = float(values[-1])
    if not largest > 0:
        return torch.zeros_like(covariance)
    scale = values.clamp(min=FLOOR * largest).rsqrt()
    return (vectors * scale) @ vectors.T
