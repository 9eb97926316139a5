"""Head pruning: the heads of the plan, re-solved or merely cut."""

from torch import nn

from headprune.comparison.method import Compressed, Subject, comparison_method
from headprune.models import attention_sites
from headprune.surgery import prune

RAGGED = "groups of query heads differ in size: they run through headprune's attention, or are made even by export"


@comparison_method("heads", label="heads, re-solved", kind="head pruning", granularity="query heads", library="headprune")
def heads(subject: Subject) -> Compressed:
    """Cuts the plan's heads and re-solves what reads them on the calibration batches."""
    model = subject.copy()
    prune(model, subject.plan, subject.calibration, forward=subject.task.forward, feed_forward=subject.feed_forward)
    return Compressed(model, note_of(subject, model))


@comparison_method("heads-plain", label="heads, cut only", kind="head pruning", granularity="query heads", library="headprune")
def heads_plain(subject: Subject) -> Compressed:
    """Cuts the same heads; the other weights stay as they were."""
    model = subject.copy()
    prune(model, subject.plan)
    return Compressed(model, note_of(subject, model))


def note_of(subject: Subject, model: nn.Module) -> str:
    sites = attention_sites(model)
    kept = sum(site.head_map.query_heads for site in sites)
    ragged = any(len(set(site.head_map.group_sizes)) > 1 for site in sites)
    scores = f" by {subject.plan.criterion}" if getattr(subject.plan, "criterion", None) else ""
    return f"{kept} of {kept + subject.plan.removed_heads} heads stay{scores}{f'; {RAGGED}' if ragged else ''}"
