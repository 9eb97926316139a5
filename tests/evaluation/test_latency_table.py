import pytest
import torch
from tiny_models import bert, llama, tokens
from transformers import T5Config, T5ForConditionalGeneration, ViTConfig, ViTModel

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


def test_a_kept_table_is_of_the_whole_model_and_of_how_its_attentions_run(tmp_path):
    """What is left of the pass counts too: a wider feed-forward, a larger vocabulary."""
    models = [llama(), llama(attn_implementation="eager"), llama()]
    models[2].lm_head = torch.nn.Linear(32, 99)
    for kept, model in enumerate(models, 1):
        measure_latency_table(model, {"input_ids": tokens()}, repeats=1, cache=tmp_path)
        assert len(list(tmp_path.iterdir())) == kept


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


def t5_table(decoder_tokens: int) -> tuple[T5ForConditionalGeneration, LatencyTable]:
    torch.manual_seed(0)
    sizes = {"d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4, "vocab_size": 99}
    model = T5ForConditionalGeneration(T5Config(**sizes)).eval()
    inputs = {"input_ids": tokens(2, 24), "decoder_input_ids": tokens(2, decoder_tokens)}
    return model, measure_latency_table(model, inputs, repeats=1)


def test_attentions_of_one_geometry_that_run_other_lengths_are_timed_by_themselves(tmp_path):
    model, table = t5_table(5)
    sites = attention_sites(model)
    assert len({key_of(SiteShape.of(site)) for site in sites}) == 1
    assert table.sites == tuple(site.name for site in sites)
    assert len(table.attention) == 3  # the encoder's, the decoder's own, and the decoder's over the encoder
    assert {name.partition(".")[0] for name in table.lengths} == {"decoder"}
    table.save(tmp_path / "latency.json")
    assert LatencyTable.load(tmp_path / "latency.json") == table
    times = dict.fromkeys(table.attention, (0, 1, 2, 3, 4)) | {key_of(SiteShape.of(sites[0])): (0, 100, 200, 300, 400)}
    steady = LatencyTable(**{**vars(table), "attention": times, "rest": 0})
    chosen = plan(score(model, criterion="random"), Budget(latency=0.4, table=steady))
    encoder = [len(heads) for name, heads in chosen.items() if name.startswith("encoder")]
    assert sum(encoder) <= 4  # of 8: those of the decoder save next to nothing


def test_attentions_that_run_one_length_share_their_time():
    _, table = t5_table(24)
    assert len(table.attention) == 2


def test_a_table_of_other_inputs_or_another_model_is_measured_anew(tmp_path):
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "patch_size": 4}
    for layers, pixels in ((2, 8), (2, 16), (3, 16)):
        model = ViTModel(ViTConfig(**sizes, num_hidden_layers=layers, image_size=pixels)).eval()
        table = measure_latency_table(model, {"pixel_values": torch.randn(2, 3, pixels, pixels)}, repeats=1, cache=tmp_path)
        assert table.length == (pixels // 4) ** 2 + 1
    assert len(list(tmp_path.iterdir())) == 3
