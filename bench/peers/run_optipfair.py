"""OptiPFair: what it exports for attention heads."""

from child import Request, main
from optipfair.pruning.future_extensions.attention import prune_attention_heads


def score(model, request: Request):
    return None


def cut(model, scored, request: Request):
    return prune_attention_heads(model, prune_percentage=100 * request.heads)


main(score, cut)
