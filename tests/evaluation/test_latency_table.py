import pytest
import torch
from tiny_models import bert, llama, tokens

from headprune.evaluation import measure_latency_table
from headprune.evaluation.latency_table import cut_copy, even_order
from headprune.models import attention_sites
from headprune.planning import Budget, LatencyTable, plan
from headprune.planning.latency_table import key_of
from headprune.scoring import SiteShape, score
from headprune.surgery import prune


@pytest.mark.parametrize("make", [llama, bert])
def test_every_number_of_heads_has_a_time_and_the_model_stays_as_it_was(make, tmp_path):
    model = make().train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    table = measure_latency_table(model, {"input_ids": tokens()}, repeats=1, cache=tmp_path)
    shape = SiteShape.of(attention_sites(model)[0])
    assert len(table.attention[key_of(shape)]) == shape.head_map.query_heads + 1
    assert all(time > 0 for time in table.attention[key_of(shape)])
    assert (table.batch, table.length) == (3, 9)
    assert model.training
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    (file,) = tmp_path.iterdir()
    assert LatencyTable.load(file) == table == measure_latency_table(model, {"input_ids": tokens()}, cache=tmp_path)


def test_a_table_makes_a_plan_that_can_be_carried_out():
    model = llama()
    table = measure_latency_table(model, {"input_ids": tokens(1, 64)}, repeats=1)
    steady = LatencyTable(**{**vars(table), "attention": {key: (1, *range(100, 900, 100)) for key in table.attention}, "rest": 0})
    chosen = plan(score(model, criterion="random"), Budget(latency=0.25, table=steady))
    assert chosen.removed_heads == 4
    prune(model, chosen)


def test_groups_shrink_evenly_in_the_copies_that_are_timed():
    site = attention_sites(llama())[0]
    assert even_order(site) == [0, 2, 4, 6, 1, 3, 5, 7]
    found = attention_sites(torch.nn.ModuleDict({"attention": cut_copy(site, even_order(site)[:5])}))[0]
    assert found.head_map.group_sizes == (2, 1, 1, 1)


def test_torchs_own_attention_is_timed_as_what_takes_its_place():
    layer = torch.nn.TransformerEncoderLayer(16, 4, 32, batch_first=True)
    table = measure_latency_table(layer, {"src": torch.randn(2, 6, 16)}, repeats=1)
    assert (table.batch, table.length, [len(times) for times in table.attention.values()]) == (2, 6, [5])
    assert type(layer.self_attn) is torch.nn.MultiheadAttention
