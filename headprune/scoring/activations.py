"""What follows from the Gram matrix of an output projection's inputs: covariance, and its blocks by head."""

from __future__ import annotations

import torch
from torch import Tensor

from headprune.scoring.observations import SiteObservations

CONSTANT = 1e-12  # of its mean square: a smaller variance is fp32's rounding of a feature that does not vary


def input_covariance(observed: SiteObservations) -> Tensor:
    """[features, features], fp64: covariance of the projection's inputs over valid tokens; 0 for a constant feature."""
    mean, gram = observed.input_sum / observed.tokens, observed.input_gram / observed.tokens
    found = gram - torch.outer(mean, mean)
    constant = found.diagonal() <= CONSTANT * gram.diagonal()
    return found.masked_fill(constant[:, None] | constant, 0.0)


def by_head(features: Tensor, observed: SiteObservations) -> Tensor:
    """[features] -> [query_heads, value_dim]."""
    return features.view(observed.shape.head_map.query_heads, -1)


def diagonal_blocks(matrix: Tensor, width: int) -> Tensor:
    """[n * width, n * width] -> [n, width, width]."""
    count = len(matrix) // width
    return matrix.view(count, width, count, width).diagonal(dim1=0, dim2=2).permute(2, 0, 1)


def head_similarity(observed: SiteObservations) -> Tensor:
    """[query_heads, query_heads], fp64: linear CKA between the outputs of every two heads over valid tokens.

    ||O_i^T O_j||_F^2 / (||O_i^T O_i||_F ||O_j^T O_j||_F) with centred O (Kornblith et al. 2019, eq. 4); 0 for a constant head.
    """
    heads, width = observed.shape.head_map.query_heads, observed.shape.value_dim
    cross = input_covariance(observed).view(heads, width, heads, width).square().sum(dim=(1, 3))
    scale = cross.diagonal().sqrt()
    return cross / torch.outer(scale, scale).clamp(min=torch.finfo(torch.float64).tiny)
