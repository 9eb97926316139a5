import pytest
from tiny_encoders import SEQ2SEQ
from tiny_models import bert, hidden, llama, padded

from headprune.models import attention_sites
from headprune.models.feed_forward import feed_forwards


@pytest.mark.parametrize(
    ("make", "ends", "streams"),
    [
        (bert, "encoder.layer.{}.output.dense", "encoder.layer.{}.intermediate"),
        (llama, "model.layers.{}.mlp.down_proj", "model.layers.{}.post_attention_layernorm"),
    ],
)
def test_the_end_of_the_feed_forward_is_found_with_its_stream(make, ends, streams):
    model, inputs = make(), padded()
    found = feed_forwards(model, attention_sites(model), lambda: hidden(model, **inputs))
    names = {module: name for name, module in model.named_modules()}
    assert [one.name for one in found.values()] == [ends.format(0), ends.format(1)]
    assert [names[one.stream] for one in found.values()] == [streams.format(0), streams.format(1)]
    assert list(found) == [site.name for site in attention_sites(model)]
    assert not any(module._forward_pre_hooks or module._forward_hooks for module in model.modules())


def test_behind_a_decoders_self_attention_comes_its_cross_attention():
    model = SEQ2SEQ["bart"].make()
    found = feed_forwards(model, attention_sites(model), lambda: model(**SEQ2SEQ["bart"].batch("right")))
    assert {site: one.name for site, one in found.items()} == {
        **{f"model.encoder.layers.{layer}.self_attn": f"model.encoder.layers.{layer}.fc2" for layer in range(2)},
        **{f"model.decoder.layers.{layer}.encoder_attn": f"model.decoder.layers.{layer}.fc2" for layer in range(2)},
    }


def test_no_end_is_found_where_the_sum_is_another():
    """Mixtures of experts, and a feed-forward whose output is halved before it meets the stream."""
    model, inputs = llama(), padded()
    model.model.layers[0].mlp.register_forward_hook(lambda _module, _args, output: 0.5 * output)
    found = feed_forwards(model, attention_sites(model), lambda: hidden(model, **inputs))
    assert list(found) == ["model.layers.1.self_attn"]


def test_layers_whose_parts_stand_in_modules_of_their_own():
    model = SEQ2SEQ["t5"].make()
    found = feed_forwards(model, attention_sites(model), lambda: model(**SEQ2SEQ["t5"].batch("right")))
    ends = {site: one.name for site, one in found.items()}
    assert ends == {
        **{
            f"encoder.block.{layer}.layer.0.SelfAttention": f"encoder.block.{layer}.layer.1.DenseReluDense.wo" for layer in range(3)
        },
        **{
            f"decoder.block.{layer}.layer.1.EncDecAttention": f"decoder.block.{layer}.layer.2.DenseReluDense.wo"
            for layer in range(3)
        },
    }
