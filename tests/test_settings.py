"""What a folder of work was started with is told alike in every process."""

from pathlib import Path

from headprune.settings import described


def test_sets_are_told_in_one_order_and_paths_by_their_names():
    names = [f"model.layers.{number}.self_attn" for number in range(5)]
    assert described({"protect": set(names)}) == described({"protect": frozenset(reversed(names))}) == {"protect": names}
    assert described({3: {2, 1}}) == {"3": [1, 2]}
    assert described(Path("early") / "model") == str(Path("early") / "model")
