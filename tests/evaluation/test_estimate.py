"""Costs from a config alone are those of the model itself."""

import io

import pytest
import torch
import transformers
from rich.console import Console
from streamed_models import SHARED_LAYERS, SHARING
from tiny_decoders import decoder
from tiny_encoders import VISION
from torch.utils.flop_counter import FlopCounterMode

import headprune as hp
from headprune.errors import InvalidInput
from headprune.evaluation.cost import model_flops
from headprune.evaluation.estimate import Memory
from headprune.evaluation.memory import peak_bytes
from headprune.evaluation.sequence_flops import Lengths, chosen_experts, sequence_flops
from headprune.kv_sharing import gives_keys

MIDDLE = {
    "vocab_size": 2000, "hidden_size": 256, "intermediate_size": 896, "num_hidden_layers": 6, "num_attention_heads": 8,
    "num_key_value_heads": 2,
}  # fmt: skip


@pytest.fixture
def folder(tmp_path):
    """A folder with a config and nothing else."""

    def write(family: str, **options):
        config = decoder(family, **options).config
        config.architectures = [type(decoder(family, **options)).__name__]
        config.save_pretrained(tmp_path)
        return tmp_path

    return write


@pytest.mark.parametrize("family", ["llama", "qwen3_moe", "gpt2", "deepseek_v3"])
def test_counts_are_those_of_the_model(family, folder):
    found, model = hp.estimate(folder(family), hp.Budget(heads=0.5)), decoder(family)
    sites = hp.attention_sites(model)
    assert found.dense.parameters == sum(parameter.numel() for parameter in model.parameters())
    assert found.dense.query_heads == sum(site.head_map.query_heads for site in sites)
    assert found.pruned.query_heads <= found.dense.query_heads // 2
    plan = hp.plan(hp.score(model, (), "random"), hp.Budget(heads=0.5), allocation="uniform")
    hp.cut(model, plan)
    assert found.pruned.parameters == sum(parameter.numel() for parameter in model.parameters())


@pytest.mark.parametrize("family", SHARING)
def test_keys_that_later_layers_read_are_kept_beside_the_states(family, folder):
    found = hp.estimate(folder(family, **SHARED_LAYERS), hp.Budget(heads=0.5), tokens=100, batch=1, length=10)
    givers = [site for site in hp.attention_sites(decoder(family, **SHARED_LAYERS)) if gives_keys(site.module)]
    keys = sum(site.head_map.kv_heads * site.head_dim for site in givers)
    assert len(givers) == 2
    assert found.state_bytes == 100 * 4 * (8 * 32 + 4 * keys)  # in front of each layer, and behind; two tensors and gradients


@pytest.mark.parametrize(
    ("config", "length"),
    [
        (transformers.BertConfig(max_position_embeddings=128), 128),
        (transformers.RobertaConfig(max_position_embeddings=130, pad_token_id=1), 128),
        (transformers.GPTNeoXConfig(max_position_embeddings=8192), 2048),
        (transformers.ViTConfig(image_size=96, patch_size=16), 37),
    ],
)
def test_sequences_are_no_longer_than_the_model_takes(config, length, tmp_path):
    config.update({"num_hidden_layers": 1, "hidden_size": 64, "num_attention_heads": 4, "intermediate_size": 64, "vocab_size": 99})
    config.save_pretrained(tmp_path)
    found = hp.estimate(tmp_path, hp.Budget(heads=0.5), device="h100")
    assert found.length == length
    assert found.dense == hp.estimate(tmp_path, hp.Budget(heads=0.5), device="h100", length=length).dense
    assert hp.estimate(tmp_path, hp.Budget(heads=0.5), device="h100", length=9).length == 9


@pytest.mark.parametrize(
    "config",
    [
        transformers.BartConfig(
            d_model=64, encoder_layers=2, decoder_layers=1, encoder_attention_heads=4, decoder_attention_heads=4
        ),
        transformers.SiglipConfig(
            text_config={"num_hidden_layers": 1, "hidden_size": 64, "num_attention_heads": 4, "projection_size": 32},
            vision_config={"num_hidden_layers": 2, "hidden_size": 32, "num_attention_heads": 4, "image_size": 32},
        ),
    ],
)
def test_models_of_several_stacks_are_not_streamed(config, tmp_path):
    config.save_pretrained(tmp_path)
    found = hp.estimate(tmp_path, hp.Budget(heads=0.5), device="h100", length=16)
    model = transformers.AutoModel.from_config(config)
    assert found.dense.parameters == sum(parameter.numel() for parameter in model.parameters())
    assert found.resident_bytes > found.dense.weight_bytes
    assert found.streamed_bytes is found.state_bytes is found.read_bytes is None
    shown = io.StringIO()
    Console(file=shown, width=120).print(found.scoring())
    assert "streamed" in shown.getvalue()
    assert "not at all: its attentions lie in several stacks of layers" in shown.getvalue()


def test_whole_groups_shrink_the_cache(folder):
    found = hp.estimate(folder("llama"), hp.Budget(kv_cache=0.5), granularity="kv_group")
    assert found.pruned.cache_bytes_per_token == found.dense.cache_bytes_per_token // 2


def test_flops_count_every_product_of_a_dense_model(folder):
    length, options = 16, {"attention_bias": False}
    found, model = hp.estimate(folder("llama", **options), hp.Budget(heads=0.5), length=length), decoder("llama", **options)
    with FlopCounterMode(display=False) as counted, torch.no_grad():
        model.set_attn_implementation("eager")
        model(input_ids=torch.ones(1, length, dtype=torch.long))
    assert found.dense.flops_per_token == pytest.approx(counted.get_total_flops() / length, rel=0.02)


EXPERTS = {"num_local_experts": 8, "num_experts_per_tok": 2}
MIXTURES = {
    "gpt_oss": EXPERTS,  # with biases
    "mixtral": EXPERTS,
    "dbrx": {"ffn_config": {"hidden_size": 32, "ffn_hidden_size": 48, "moe_num_experts": 8, "moe_top_k": 2}},
    "gemma4": {"enable_moe_block": True, "num_experts": 8, "top_k_experts": 2, "moe_intermediate_size": 16},
}


@pytest.mark.parametrize("family", MIXTURES)
def test_flops_hold_the_experts_that_a_token_goes_through(family, folder):
    options = {**MIXTURES[family], "sliding_window": 16}
    found = hp.estimate(folder(family, **options), hp.Budget(heads=0.5), length=16)
    ran = model_flops(decoder(family, **options), {"input_ids": torch.ones(1, 16, dtype=torch.long)})
    assert found.dense.flops_per_token == ran // 16


def test_an_attention_that_lost_all_heads_costs_nothing_whatever_weights_are_left_in_it():
    model = decoder("deepseek_v3")
    hp.cut(model, {"model.layers.0.self_attn": [], "model.layers.1.self_attn": [0, 2]})
    ran = model_flops(model, {"input_ids": torch.ones(1, 16, dtype=torch.long)})
    assert sequence_flops(model, hp.attention_sites(model), Lengths(16, 16), {}) == ran


def test_experts_that_are_modules_each_count_as_often_as_a_token_goes_through_one(tmp_path):
    options = {"d_model": 32, "d_kv": 8, "d_ff": 48, "num_heads": 4, "num_layers": 2, "vocab_size": 61, "expert_capacity": 64}
    sparse = {"num_sparse_encoder_layers": 1, "num_sparse_decoder_layers": 1, "num_experts": 8, "decoder_start_token_id": 0}
    name, config = "SwitchTransformersForConditionalGeneration", transformers.SwitchTransformersConfig(**options, **sparse)
    found = hp.estimate(saved(config, name, tmp_path), hp.Budget(heads=0.5), device="h100", length=16)
    assert found.dense.flops_per_token * 16 == pytest.approx(counted(config, name, input_ids=16, decoder_input_ids=16), rel=1e-4)


def test_the_experts_of_a_token_are_told_by_the_text_of_a_model_that_sees_too_and_by_layers_where_these_differ():
    nested = transformers.Qwen3VLMoeConfig(text_config={"num_experts_per_tok": 6})
    assert chosen_experts(nested) == 6
    assert chosen_experts(transformers.HunYuanMoEV1Config(moe_topk=[8, 8, 2])) == 6
    assert chosen_experts(transformers.LlamaConfig()) == 1


@pytest.mark.parametrize("family", ["swin", "vit", "pvt_v2", "levit", "videomae"])
def test_a_picture_costs_what_its_stages_cost(family, tmp_path):
    """Swin's run a quarter of the tokens each, within windows: with all of them everywhere the estimate was 38 times Swin-T's."""
    made = VISION[family]
    model = made.make("eager")
    model.save_pretrained(tmp_path)
    found = hp.estimate(tmp_path, hp.Budget(heads=0.5), device="h100")
    batch = {"pixel_values": torch.zeros(1, *made.batch("left")["pixel_values"].shape[1:])}
    assert found.dense.flops_per_token == model_flops(model, batch) // found.length
    hp.cut(model, hp.plan(hp.score(model, (), "random"), hp.Budget(heads=0.5), allocation="uniform"))
    assert found.pruned.flops_per_token == model_flops(model, batch) // found.length


SMALL = {"vocab_size": 99, "max_position_embeddings": 64}
ALBERT = {"hidden_size": 64, "num_attention_heads": 4, "intermediate_size": 96, "embedding_size": 32, **SMALL}
BART = {
    "d_model": 64, "encoder_layers": 2, "decoder_layers": 1, "encoder_attention_heads": 4, "decoder_attention_heads": 4,
    "encoder_ffn_dim": 96, "decoder_ffn_dim": 96, **SMALL,
}  # fmt: skip
SHARED = {
    "one": transformers.AlbertConfig(num_hidden_layers=6, **ALBERT),
    "two groups of two": transformers.AlbertConfig(num_hidden_layers=8, num_hidden_groups=2, inner_group_num=2, **ALBERT),
}


def saved(config, name: str, folder):
    config.architectures = [name]
    config.save_pretrained(folder)
    return folder


def counted(config, name: str, **inputs) -> int:
    config._attn_implementation = "eager"
    model = getattr(transformers, name)(config).eval()
    with FlopCounterMode(display=False) as found, torch.no_grad():
        model(**{key: torch.ones(1, length, dtype=torch.long) for key, length in inputs.items()})
    return found.get_total_flops()


@pytest.mark.parametrize("config", SHARED.values(), ids=SHARED)
def test_what_layers_share_costs_flops_and_states_in_each_and_parameters_once(config, tmp_path):
    found = hp.estimate(saved(config, "AlbertForMaskedLM", tmp_path), hp.Budget(heads=0.5), device="h100", length=16)
    model = transformers.AlbertForMaskedLM(config)
    assert found.dense.parameters == sum(parameter.numel() for parameter in model.parameters())
    assert found.dense.flops_per_token * 16 == pytest.approx(counted(config, "AlbertForMaskedLM", input_ids=16), rel=1e-3)
    assert found.flops == 3 * found.tokens * found.dense.flops_per_token
    assert found.streamed_bytes is None
    once = transformers.AlbertConfig(**{**config.to_dict(), "num_hidden_layers": config.num_hidden_groups})
    once = hp.estimate(saved(once, "AlbertForMaskedLM", tmp_path), hp.Budget(heads=0.5), device="h100", length=16)
    assert found.dense.parameters == once.dense.parameters
    times = config.num_hidden_layers // config.num_hidden_groups
    assert found.resident_bytes - once.resident_bytes == (times - 1) * config.num_hidden_groups * 4 * 16 * 64 * 4


@pytest.mark.parametrize(
    ("name", "config"),
    [
        ("BartForConditionalGeneration", transformers.BartConfig(**BART)),
        (
            "T5ForConditionalGeneration",
            transformers.T5Config(d_model=64, d_kv=16, d_ff=96, num_layers=2, num_heads=4, vocab_size=99),
        ),
    ],
)
def test_an_encoder_decoder_runs_two_lengths_and_cross_attention_both(name, config, tmp_path):
    folder = saved(config, name, tmp_path)
    found = hp.estimate(folder, hp.Budget(heads=0.5), device="h100", length=40, decoder_length=8)
    expected = counted(config, name, input_ids=40, decoder_input_ids=8)
    assert found.dense.flops_per_token * 40 == pytest.approx(expected, rel=1e-4)
    assert found.decoder_length == 8
    assert "FLOPs per token (of 40, 8 in the decoder)" in printed(found)
    alike = hp.estimate(folder, hp.Budget(heads=0.5), device="h100", length=40)
    assert alike.decoder_length == 40
    assert alike.resident_bytes > found.resident_bytes


def test_an_encoder_decoder_takes_as_many_frames_and_words_as_it_has_positions_for(tmp_path, caplog):
    config = transformers.WhisperConfig(
        d_model=64,
        encoder_layers=1,
        decoder_layers=1,
        encoder_attention_heads=4,
        decoder_attention_heads=4,
        max_target_positions=100,
    )
    folder = saved(config, "WhisperForConditionalGeneration", tmp_path)
    found = hp.estimate(folder, hp.Budget(heads=0.5), device="h100")
    assert (found.length, found.decoder_length) == (1500, 100)
    assert caplog.messages == []
    hp.estimate(folder, hp.Budget(heads=0.5), device="h100", length=1600, decoder_length=101)
    assert caplog.messages == [
        "length is 1,600, and WhisperForConditionalGeneration has positions for 1,500 tokens",
        "decoder_length is 101, and WhisperForConditionalGeneration has positions for 100 tokens",
    ]


def test_a_decoder_length_is_for_encoder_decoders(folder):
    with pytest.raises(InvalidInput, match="decoder_length is 8, and LlamaForCausalLM has no decoder of its own"):
        hp.estimate(folder("llama"), hp.Budget(heads=0.5), decoder_length=8)


def test_an_encoder_has_no_cache(tmp_path):
    config = transformers.BertConfig(hidden_size=64, num_attention_heads=4, num_hidden_layers=1, intermediate_size=96, **SMALL)
    found = hp.estimate(saved(config, "BertForMaskedLM", tmp_path), hp.Budget(heads=0.5), device="h100")
    assert found.dense.cache_bytes_per_token is found.to_json()["pruned"]["cache_bytes_per_token"] is None
    row = next(line for line in printed(found).splitlines() if "cache bytes per token" in line)
    assert row.count("–") == 2


def test_only_the_decoder_of_an_encoder_decoder_fills_the_cache(tmp_path):
    found = hp.estimate(
        saved(transformers.BartConfig(**BART), "BartForConditionalGeneration", tmp_path), hp.Budget(heads=0.5), device="h100"
    )
    assert found.dense.cache_bytes_per_token == 2 * 2 * 64 * 4  # its own attention and that to the encoder


def printed(found) -> str:
    shown = io.StringIO()
    Console(file=shown, width=120).print(found)
    return shown.getvalue()


@pytest.mark.parametrize("options", [MIDDLE, {**MIDDLE, "num_hidden_layers": 2, "vocab_size": 32000}])
def test_memory_is_not_underestimated_by_much_nor_overestimated_by_half(options, tmp_path):
    model = decoder("llama", **options)
    model.save_pretrained(tmp_path / "model")
    ids = torch.randint(1, options["vocab_size"], (4, 256))
    batch, estimated = {"input_ids": ids, "labels": ids}, Memory.of(model, ids.numel(), torch.float32)
    weights = sum(parameter.nbytes for parameter in model.parameters())
    score = {"criterion": "fisher", "loss_fn": hp.causal_losses}
    resident = weights + peak_bytes(lambda: hp.score(model, [batch], checkpointing=True, **score))
    streamed = peak_bytes(lambda: hp.score(hp.open_streamed(tmp_path / "model"), [batch], checkpoint=tmp_path / "work", **score))
    assert 0.95 * resident <= estimated.resident <= 1.5 * resident
    assert 0.95 * streamed <= estimated.streamed <= 1.5 * streamed


def test_an_unknown_device_is_refused(folder):
    with pytest.raises(InvalidInput, match="h200"):
        hp.estimate(folder("llama"), hp.Budget(heads=0.5), device="h2000")
