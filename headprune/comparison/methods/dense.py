"""The model as it is: what the others are held against, and what the same fine-tune does to it."""

from headprune.comparison.method import Compressed, Subject, comparison_method


@comparison_method("dense", label="dense", kind="the dense model", granularity="", library="headprune")
def dense(subject: Subject) -> Compressed:
    """A copy."""
    return Compressed(subject.copy())
