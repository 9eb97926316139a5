"""Unstructured magnitude pruning (Han et al. 2015) through torch.nn.utils.prune."""

from torch.nn.utils import prune

from headprune.comparison.masks import WEIGHT
from headprune.comparison.method import Compressed, Refused, Subject, comparison_method
from headprune.comparison.sizes import bitmask_bits
from headprune.models.site import Foreign
from headprune.recovery.methods import linear_layers


@comparison_method(
    "unstructured", label="weights", kind="sparsity", granularity="weights", library="torch",
    kernels="sparse matrix products for any pattern",
)  # fmt: skip
def unstructured(subject: Subject) -> Compressed:
    """Zeroes the smallest weights of all linear layers together, as many as head pruning removes."""
    model = subject.copy()
    modules: dict[str, Foreign] = {name: model.get_submodule(name) for name in linear_layers(model)}
    total = sum(module.weight.numel() for module in modules.values())
    if subject.removed >= total:
        raise Refused(f"{subject.removed:,} weights are to go; the linear layers have {total:,}")
    prune.global_unstructured(
        [(module, WEIGHT) for module in modules.values()], pruning_method=prune.L1Unstructured, amount=subject.removed
    )
    masks = {name: module.weight_mask.bool() for name, module in modules.items()}
    for module in modules.values():
        prune.remove(module, WEIGHT)
    note = f"one ranking by magnitude over {len(modules)} linear layers, {subject.removed / total:.1%} of their weights"
    return Compressed(
        model, note, masks, bitmask_bits, "computed: a bit for each weight of the linear layers and the values that stay"
    )
