"""What the fused forward pass tells about each head's attention pattern."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class HeadStats:
    """Per (sample, head) statistics of one attention, each fp32 [batch, query_heads].

    Means run over the query rows that attend to at least one key and are not excluded by `query_mask`; where no row
    counts, and for heads gated to exactly 0, every field is 0 (`max_logit`: -inf).

    entropy: of a row's probabilities, -sum_j p_j ln p_j, in nats. max_prob: the largest of a row. max_logit: the largest score
    that enters the softmax, over all rows and keys. first_mass: the probability of the sample's first valid key. distance:
    sum_j p_j |position of the query - j|, in tokens. output_norm: L2 norm of the head's (gated) output.
    """

    entropy: Tensor
    max_prob: Tensor
    max_logit: Tensor
    first_mass: Tensor
    distance: Tensor
    output_norm: Tensor

    @classmethod
    def from_packed(cls, packed: Tensor) -> HeadStats:
        """`packed` [6, batch, query_heads], in the order of the fields."""
        return cls(*packed.unbind(0))
