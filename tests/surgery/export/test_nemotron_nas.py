"""nemotron-nas folders: read by a plain implementation of the architecture, which knows config.json and tensors alone."""

import json

import pytest
import torch
from safetensors.torch import load_file
from tiny_decoders import decoder
from tiny_models import llama, tokens
from torch.nn.functional import linear, rms_norm, scaled_dot_product_attention, silu
from transformers import AutoConfig

from headprune.errors import UnsupportedModel
from headprune.surgery import cut
from headprune.surgery.export import export

WHOLE_GROUPS = {0: [0, 1, 4, 5], 1: [], 2: [6, 7]}
RAGGED = {0: [0, 1, 2, 5], 1: [3], 2: []}


def rotated(x: torch.Tensor, theta: float) -> torch.Tensor:
    """x [heads, tokens, head_dim]; features i and i + head_dim/2 turn together."""
    half = x.shape[-1] // 2
    angles = torch.arange(x.shape[1])[:, None] * theta ** -(torch.arange(half) / half)
    first, second = x[..., :half], x[..., half:]
    return torch.cat([first * angles.cos() - second * angles.sin(), second * angles.cos() + first * angles.sin()], dim=-1)


def heads(x: torch.Tensor, tensors: dict, name: str, count: int) -> torch.Tensor:
    """[count, tokens, head_dim]; the shape of the projection must be what the config says."""
    projected = linear(x, tensors[f"{name}.weight"], tensors.get(f"{name}.bias"))
    return projected.unflatten(-1, (count, -1)).transpose(0, 1)


def attention(x: torch.Tensor, tensors: dict, prefix: str, config: dict, group: int) -> torch.Tensor:
    query_heads = config["num_attention_heads"]
    q, k, v = (
        heads(x, tensors, f"{prefix}.{letter}_proj", query_heads if letter == "q" else query_heads // group) for letter in "qkv"
    )
    assert q.shape[-1] == k.shape[-1] == config["head_dim"]
    q, k = (rotated(each, config["rope_theta"]) for each in (q, k))
    out = scaled_dot_product_attention(q, k.repeat_interleave(group, 0), v.repeat_interleave(group, 0), is_causal=True)
    return linear(out.transpose(0, 1).flatten(1), tensors[f"{prefix}.o_proj.weight"], tensors.get(f"{prefix}.o_proj.bias"))


def logits(folder, ids: torch.Tensor) -> torch.Tensor:
    """[tokens, vocabulary] for ids [tokens]; every tensor of the file must have been used."""
    config = json.loads((folder / "config.json").read_text())
    tensors = load_file(folder / "model.safetensors")
    used = {"model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"} & set(tensors)
    x = tensors["model.embed_tokens.weight"][ids]

    def normed(x: torch.Tensor, name: str) -> torch.Tensor:
        return rms_norm(x, x.shape[-1:], tensors[f"{name}.weight"], config["rms_norm_eps"])

    for index, block in enumerate(config["block_configs"]):
        prefix = f"model.layers.{index}"
        used |= {name for name in tensors if name.startswith(f"{prefix}.") and (not block["attention"]["no_op"] or "mlp" in name)}
        used |= {f"{prefix}.post_attention_layernorm.weight"}
        if not block["attention"]["no_op"]:
            group = block["attention"]["n_heads_in_group"]
            x = x + attention(normed(x, f"{prefix}.input_layernorm"), tensors, f"{prefix}.self_attn", config, group)
        inner = normed(x, f"{prefix}.post_attention_layernorm")
        gate, up, down = (tensors[f"{prefix}.mlp.{name}_proj.weight"] for name in ("gate", "up", "down"))
        assert len(gate) == block["ffn"].get("intermediate_size", int(2 * block["ffn"].get("ffn_mult", 0) * x.shape[-1] / 3))
        x = x + linear(silu(linear(inner, gate)) * linear(inner, up), down)
    assert used == set(tensors)
    head = tensors.get("lm_head.weight", tensors["model.embed_tokens.weight"])
    return linear(normed(x, "model.norm"), head)


def pruned(keep: dict, family: str = "llama", **options):
    options = {"num_hidden_layers": 3, "num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 8, **options}
    model = decoder(family, **options)
    cut(model, {f"model.layers.{layer}.self_attn": kept for layer, kept in keep.items()})
    return model


@pytest.mark.parametrize("keep", [WHOLE_GROUPS, RAGGED, {0: [], 1: [5]}], ids=["whole groups", "ragged", "no first attention"])
@pytest.mark.parametrize(
    "options",
    [{}, {"intermediate_size": 256}, {"family": "qwen2"}, {"family": "mistral", "sliding_window": None},
     {"tie_word_embeddings": True, "attention_bias": False}],
    ids=["biases", "ffn_mult", "qwen2", "mistral", "tied"],
)  # fmt: skip
def test_the_folder_is_the_model(keep, options, tmp_path):
    model = pruned(keep, **options)
    export(model, "nemotron-nas", tmp_path / "out")
    ids = tokens(1, 9)
    with torch.no_grad():
        expected = model(input_ids=ids).logits[0]
    assert torch.allclose(logits(tmp_path / "out", ids[0]), expected, atol=1e-5 * float(expected.abs().max()))


def test_layers_are_blocks_and_whole_groups_cost_no_cache(tmp_path):
    report = export(pruned(WHOLE_GROUPS, attention_bias=False), "nemotron-nas", tmp_path / "out")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert [block["attention"]["n_heads_in_group"] for block in config["block_configs"]] == [2, None, 4]
    assert [block["attention"]["no_op"] for block in config["block_configs"]] == [False, True, False]
    assert (config["num_attention_heads"], config["num_key_value_heads"]) == (4, None)
    assert "+0 cache values" in str(report)
    assert "key/value heads: 2, none, 1" in str(report)
    assert [path.name for path in (tmp_path / "out").glob("*.py")] == ["configuration_nemotron_nas.py"]


def test_the_config_loads_as_objects_and_saves_the_same(tmp_path):
    export(pruned(WHOLE_GROUPS, attention_bias=False, intermediate_size=256), "nemotron-nas", tmp_path / "out")
    found = AutoConfig.from_pretrained(tmp_path / "out", trust_remote_code=True)
    assert found.block_configs[2].attention.n_heads_in_group == 4
    assert found.block_configs[1].attention.no_op is True
    assert int(2 * found.block_configs[0].ffn.ffn_mult * found.hidden_size / 3) == 256
    found.save_pretrained(tmp_path / "again")
    before, after = (json.loads((tmp_path / place / "config.json").read_text()) for place in ("out", "again"))
    assert after["block_configs"] == before["block_configs"]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: decoder("gpt2"), "nemotron-nas holds llama, mistral, qwen2"),
        (lambda: decoder("qwen3"), "not Qwen3ForCausalLM"),
        (lambda: llama().model, "not LlamaModel"),
        (lambda: decoder("mistral"), "has one of 4 tokens"),
    ],
)
def test_what_it_cannot_hold_is_refused(make, message, tmp_path):
    with pytest.raises(UnsupportedModel, match=message):
        export(make(), "nemotron-nas", tmp_path / "out")
    assert list(tmp_path.iterdir()) == []
