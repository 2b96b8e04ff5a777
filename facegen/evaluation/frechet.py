"""How far apart two sets of pictures are as wholes: FID (Heusel et al. 2017) and KID (Bińkowski et al. 2018).

Both compare features (N, D) of single pictures; which net gives them is the caller's choice. Numbers of two nets, or of
two sizes of sets, cannot be compared with one another: what two disjoint sets of true pictures give is the measure.
"""

from __future__ import annotations

import torch
from torch import Tensor


def fid(found: Tensor, wanted: Tensor) -> float:
    """Fréchet distance of the normal distributions fitted to two sets, at least 0; small sets give too much."""
    a, b = (one.double() for one in (found, wanted))
    apart = (a.mean(0) - b.mean(0)).square().sum()
    root = root_of(_covariance(a))
    both = torch.linalg.eigvalsh(root @ _covariance(b) @ root).clamp(min=0).sqrt().sum()
    return max(0.0, float(apart + _covariance(a).trace() + _covariance(b).trace() - 2 * both))


def kid(found: Tensor, wanted: Tensor) -> float:
    """Unbiased squared maximum mean discrepancy under (x·y / D + 1)³: about 0, even less, for sets of one kind."""
    a, b = (one.double() for one in (found, wanted))
    return float(_kernel(a, a, True) + _kernel(b, b, True) - 2 * _kernel(a, b, False))


def _covariance(x: Tensor) -> Tensor:
    return torch.cov(x.T, correction=1)


def root_of(matrix: Tensor) -> Tensor:
    """The square root of a symmetric matrix without negative eigenvalues."""
    values, vectors = torch.linalg.eigh(matrix)
    return (vectors * values.clamp(min=0).sqrt()) @ vectors.T


def _kernel(a: Tensor, b: Tensor, same: bool) -> Tensor:
    """The mean over all pairs; of one set with itself without those of a picture with itself."""
    values = (a @ b.T / a.shape[1] + 1) ** 3
    if not same:
        return values.mean()
    return (values.sum() - values.diagonal().sum()) / (len(a) * (len(a) - 1))
