"""The registry: criteria of other packages, of whole models, and what every criterion says of itself."""

import importlib
import logging
import sys

import pytest
import torch
from tiny_models import bert, llama, tokens

from headprune import scoring
from headprune.errors import InvalidInput

registry = sys.modules["headprune.scoring.criterion"]  # the package gives the name to the decorator


@pytest.fixture
def other_package(tmp_path, monkeypatch):
    """An installed package with a criterion and one that cannot be imported."""
    (tmp_path / "other_heads.py").write_text(
        "import torch, headprune.scoring as scoring\n"
        "@scoring.criterion('other', needs=(), source='another package', cost='no data')\n"
        "def other(observed):\n    return torch.ones(observed.shape.head_map.query_heads)\n"
    )
    info = tmp_path / "other_heads-1.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: other-heads\nVersion: 1\n")
    (info / "entry_points.txt").write_text("[headprune.criteria]\nother = other_heads\nbroken = no_such_module_of_heads\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(registry, "_criteria", dict(registry._criteria))
    registry.load_entry_points.cache_clear()
    importlib.invalidate_caches()
    yield
    registry.load_entry_points.cache_clear()


def test_criteria_of_other_packages_are_found_and_broken_ones_named(other_package, caplog):
    with caplog.at_level(logging.WARNING, "headprune"):
        scores = scoring.score(llama(), criterion="other")
    assert all((found == 1).all() for found in scores.values())
    assert "no_such_module_of_heads" in caplog.text
    assert "other" in scoring.criteria()


def test_a_criterion_of_the_whole_model_sees_all_sites_at_once(monkeypatch):
    monkeypatch.setattr(registry, "_criteria", dict(registry._criteria))

    @scoring.criterion("share", needs={scoring.Need.WEIGHTS}, source="this test", cost="no data", whole_model=True)
    def share(observed):
        """Share of the model's squared weights."""
        squares = {name: site.weight_l2.square().sum(dim=0) for name, site in observed.items()}
        return {name: found / sum(one.sum() for one in squares.values()) for name, found in squares.items()}

    scores = scoring.score(llama(), criterion="share")
    assert float(torch.cat(list(scores.values())).sum()) == pytest.approx(1.0)


@pytest.mark.parametrize("name", sorted(scoring.criteria()))
def test_every_criterion_names_its_needs_cost_and_source_and_says_what_it_is(name):
    found = scoring.criteria()[name]
    assert found.cost
    assert found.source
    assert found.summary.endswith((".", ":"))
    assert all(isinstance(need, scoring.Need) for need in found.needs)


OF_WEIGHTS = {"magnitude_output", "random"}  # which never meet the value projection that is spoilt below
NOT_ON_ENCODERS = {"movement", "confidence_ordinary", "induction", "previous_token", "retrieval"}


@pytest.mark.parametrize("name", sorted(scoring.criteria().keys() - OF_WEIGHTS - NOT_ON_ENCODERS))
def test_no_criterion_scores_heads_behind_nan(name):
    """A head that nothing is told of would pass for one of attention as focused as can be."""
    model = bert()
    model.encoder.layer[0].attention.self.value.weight.data[0, 0] = float("nan")
    loss_fn = lambda model, batch: model(**batch).last_hidden_state.square().mean(dim=(1, 2))  # noqa: E731
    with pytest.raises(InvalidInput, match="NaN"):
        scoring.score(model, [{"input_ids": tokens(4, 9)}], name, loss_fn=loss_fn)
