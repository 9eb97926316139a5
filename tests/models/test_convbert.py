"""ConvBERT: each head attends and convolves, by kernels that the queries of all heads make."""

import copy

import pytest
import torch
import transformers
from tiny_encoders import ENCODERS

import headprune as hp
from headprune.surgery.verify import cut_error

FAMILY = ENCODERS["convbert"]


def logits(model) -> torch.Tensor:
    batch = {name: value for name, value in FAMILY.batch("right").items() if name != "labels"}
    with torch.no_grad():
        return model(**batch).logits * batch["attention_mask"][..., None]


def plan_for(model, heads) -> dict[str, list[int]]:
    return dict(zip((site.name for site in hp.attention_sites(model)), heads, strict=True))


def test_a_head_is_both_halves_of_its_output_and_its_query_stays():
    model = FAMILY.make()
    site = hp.attention_sites(model)[0]
    before = sum(parameter.numel() for parameter in model.parameters())
    assert (site.head_map.query_heads, site.head_dim) == (4, 4)
    assert site.output.features[1].tolist() == [4, 5, 6, 7, 20, 21, 22, 23]
    per_head = site.parameters_per_head(False) + site.parameters_per_head(True)
    hp.cut(model, {site.name: [0, 2, 3]})
    attention = site.dispatcher
    rows = {name: layer.weight.shape[0] for name, layer in attention.named_children() if isinstance(layer, torch.nn.Linear)}
    assert rows == {"query": 16, "key": 12, "value": 12, "conv_out_layer": 12, "conv_kernel_layer": 9}
    assert before - sum(parameter.numel() for parameter in model.parameters()) == per_head


@pytest.mark.parametrize("heads", [[[0, 3], [2]], [[], [1, 2]], [[1], []]])
@pytest.mark.parametrize("size", [1, 9])
def test_cutting_equals_gating_for_any_kernel(size, heads):
    torch.manual_seed(0)
    config = copy.deepcopy(FAMILY.make().config)
    config.conv_kernel_size = size
    model = transformers.ConvBertForTokenClassification(config).eval()
    dense, keep = copy.deepcopy(model), plan_for(model, heads)
    with hp.gated(model, keep):
        expected = logits(model)
    hp.cut(model, keep)
    assert torch.allclose(logits(model), expected, atol=1e-5)
    assert cut_error(dense, model, keep, logits) <= 1e-5
    batch = FAMILY.batch("right")
    weights = model(**batch, output_attentions=True).attentions
    assert [found.shape[1] for found in weights] == [len(kept) for kept in heads]


@pytest.mark.parametrize("criterion", ["magnitude_l2", "taylor_weight", "wanda", "least_squares"])
def test_criteria(criterion):
    model = FAMILY.make()
    scores = hp.score(model, [FAMILY.batch("left")], criterion=criterion)
    assert all(torch.isfinite(scores[site.name]).all() and scores[site.name].any() for site in hp.attention_sites(model))


def test_compensation_brings_it_nearer_to_the_dense_model():
    dense = FAMILY.make()
    ids = torch.randint(1, 40, (40, 10), generator=torch.Generator().manual_seed(0))
    plan = hp.PruningPlan.from_keep(dense, plan_for(dense, [[0, 1, 3], [2, 3]]))
    plain, solved = copy.deepcopy(dense), copy.deepcopy(dense)
    hp.cut(plain, plan)
    hp.prune(solved, plan, calibration=[{"input_ids": ids, "attention_mask": torch.ones_like(ids)}])
    off = [float((logits(model) - logits(dense)).square().mean()) for model in (plain, solved)]
    assert off[1] < off[0]
