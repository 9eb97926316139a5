"""Quantised weights, and activations, of the whole dense model, through torchao."""

from headprune.comparison.method import Compressed, Refused, Subject, comparison_method
from headprune.errors import InvalidInput
from headprune.evaluation.cost import weight_bytes
from headprune.recovery import quantise
from headprune.recovery.quantise import FORMS

KERNELS = "products of {form} weights with floating-point activations"


@comparison_method(
    "int8", label="int8", kind="quantisation", granularity="bits of a weight", library="torchao",
    kernels=KERNELS.format(form="int8"),
)  # fmt: skip
def int8(subject: Subject) -> Compressed:
    """One scale for each row of a linear layer."""
    return quantised(subject, "int8")


@comparison_method(
    "int4", label="int4", kind="quantisation", granularity="bits of a weight", library="torchao",
    kernels=KERNELS.format(form="int4"),
)  # fmt: skip
def int4(subject: Subject) -> Compressed:
    """One scale for each 32 inputs of a row."""
    return quantised(subject, "int4")


@comparison_method(
    "w8a8", label="int8, activations too", kind="quantisation", granularity="bits of a weight", library="torchao",
    kernels="products of int8 weights with int8 activations",
)  # fmt: skip
def w8a8(subject: Subject) -> Compressed:
    """One scale for each row of a linear layer, one for each token, found as it comes."""
    return quantised(subject, "w8a8")


def quantised(subject: Subject, form: str) -> Compressed:
    model = subject.copy()
    try:
        done = quantise(model, form)
    except InvalidInput as error:
        raise Refused(str(error)) from None
    if not done.layers:
        why = next(iter(done.left.values()), "it has none")
        raise Refused(f"none of its linear layers can be rounded to {form}: {why}")
    note = f"{FORMS[form]} in {len(done.layers)} linear layers; nothing is removed, whatever the fraction"
    return Compressed(
        model,
        note,
        compact="as torchao holds it in memory (on a CPU int4 takes a byte)",
        compact_bytes=weight_bytes(model),
        form=form,
    )
