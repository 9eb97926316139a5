"""What `print(model)` says of an attention in a pruned model: heads=7/12 kv=3/4 groups=3+2+2."""

from __future__ import annotations

from functools import partial

from torch import nn

from headprune.head_map import HeadMap


def show_head_map(module: nn.Module, now: HeadMap, original: HeadMap | None) -> None:
    """Makes `module` print its heads, through its `extra_repr`, unless its class already says something there.

    The text stands on the instance, so that the class stays the stock one; copies, pickles and torch.save keep it.
    """
    if type(module).extra_repr is nn.Module.extra_repr:
        module.__dict__["extra_repr"] = partial(str, described(now, original))


def described(now: HeadMap, original: HeadMap | None = None) -> str:
    """`now`, with the counts of `original` behind a slash where it is known: heads=7/12 kv=3/4 groups=3+2+2."""

    def count(what: str) -> str:
        return str(getattr(now, what)) if original is None else f"{getattr(now, what)}/{getattr(original, what)}"

    known = (now,) if original is None else (now, original)
    parts = [f"heads={count('query_heads')}"]
    if any(head_map.query_heads != head_map.kv_heads for head_map in known):
        parts.append(f"kv={count('kv_heads')}")
    if not now.is_uniform:
        parts.append(f"groups={'+'.join(map(str, now.group_sizes))}")
    return " ".join(parts)
