"""How sure each head is of where it looks."""

from torch import Tensor

from headprune.errors import InvalidInput
from headprune.scoring.criterion import criterion
from headprune.scoring.observations import Need, SiteObservations

SOURCE = "Voita et al. 2019, Analyzing Multi-Head Self-Attention, sec. 4"


@criterion("confidence", needs={Need.ATTENTION}, source=SOURCE, cost="one forward pass")
def confidence(observed: SiteObservations) -> Tensor:
    """Mean of the largest attention probability, over tokens, then sequences; every token may be the one attended to."""
    return observed.max_prob.mean(dim=0)


@criterion("confidence_ordinary", needs={Need.ATTENTION_PATTERN}, source=SOURCE, cost="one slow forward pass, with token_kinds")
def confidence_ordinary(observed: SiteObservations) -> Tensor:
    """Mean of the largest attention probability of a token that is not special: resting on a separator is no confidence."""
    if observed.ordinary_max_prob is None:
        raise InvalidInput("confidence_ordinary must know the special tokens; give token_kinds=tokenizer.")
    return observed.ordinary_max_prob.mean(dim=0)
