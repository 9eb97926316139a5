"""Rewinding gives exactly the early weights, sliced as the model was cut."""

import copy

import pytest
import torch
import transformers
from pruned_pairs import pruned_bert, pruned_classifier, pruned_llama, text_batches
from safetensors.torch import save_file
from tiny_decoders import decoder
from tiny_models import bert, llama

import headprune as hp
from headprune.errors import InvalidInput

KEEP = {"model.layers.0.self_attn": [0, 2, 3, 7], "model.layers.1.self_attn": [1, 4, 5]}


def by_hand(early, name, tensor):
    """The slice of `early` that belongs to the heads of KEEP; heads of 8 features, two query heads a key/value head."""
    found = early.state_dict()[name]
    for site, heads in KEEP.items():
        if name.startswith(site):
            kv_heads = sorted({head // 2 for head in heads})
            chosen = kv_heads if "k_proj" in name or "v_proj" in name else heads
            features = torch.cat([torch.arange(8 * head, 8 * head + 8) for head in chosen])
            return found[:, features] if "o_proj" in name else found[features]
    return found


def wider():
    return decoder("llama", num_attention_heads=8, num_key_value_heads=4, head_dim=8, intermediate_size=64, attention_bias=False)


def written(path):
    path.write_text("{")
    return path


def save_folder(model, folder):
    model.save_pretrained(folder)
    return folder


SOURCES = {
    "module": lambda early, folder: early,
    "state_dict": lambda early, folder: early.state_dict(),
    "folder": lambda early, folder: save_folder(early, folder / "early"),
    "file": lambda early, folder: torch.save(early.state_dict(), folder / "early.pt") or folder / "early.pt",
}


@pytest.mark.parametrize("source", SOURCES)
def test_rewound_weights_are_the_early_ones_sliced(source, tmp_path):
    early = llama(seed=5)
    _, model = pruned_llama()
    hp.recovery.rewind_weights(model, SOURCES[source](early, tmp_path))
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, by_hand(early, name, tensor)), name
    assert early.model.layers[0].self_attn.q_proj.weight.shape == (64, 32)


@pytest.mark.parametrize("source", ["module", "folder"])
def test_a_model_that_was_loaded_is_rewound_too(source, tmp_path):
    early = bert(seed=5)
    _, pruned = pruned_bert()
    model = hp.load(hp.save(pruned, tmp_path / "pruned"))
    expected = copy.deepcopy(early)
    hp.cut(expected, {"encoder.layer.0.attention": [0, 2, 3], "encoder.layer.1.attention": [1]})
    hp.recovery.rewind_weights(model, SOURCES[source](early, tmp_path))
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, expected.state_dict()[name]), name


def test_tied_embeddings_are_rewound_once(tmp_path):
    early, (_, model) = llama(seed=5, tie_word_embeddings=True), pruned_llama(tie_word_embeddings=True)
    for source in (early.state_dict(), save_folder(early, tmp_path / "early")):
        hp.recovery.rewind_weights(model, source)
        assert model.lm_head.weight is model.model.embed_tokens.weight
        assert torch.equal(model.lm_head.weight, early.lm_head.weight)


def test_a_checkpoint_cut_in_the_same_way_is_taken_as_it_is(tmp_path):
    _, early = pruned_llama(seed=5)
    folder = hp.save(early, tmp_path / "early")
    for source in (folder, early.state_dict(), early):
        _, model = pruned_llama()
        hp.recovery.rewind_weights(model, source)
        assert all(torch.equal(tensor, early.state_dict()[name]) for name, tensor in model.state_dict().items())


def test_a_plain_module_is_rewound_by_its_early_self():
    early = pruned_classifier()[0]
    torch.manual_seed(9)
    for parameter in early.parameters():
        parameter.data.normal_()
    _, model, *_ = pruned_classifier()
    hp.recovery.rewind_weights(model, early)
    packed = early.encoder.layers[0].self_attn.in_proj_weight
    rows = torch.cat([torch.arange(0, 4), torch.arange(12, 16)])
    assert torch.equal(model.encoder.layers[0].self_attn.q_proj.weight, packed[rows])
    assert torch.equal(model.encoder.layers[0].self_attn.v_proj.weight, packed[32 + rows])
    assert torch.equal(model.head.weight, early.head.weight)


def test_recovery_starts_from_the_rewound_weights():
    early = llama(seed=5)
    _, model = pruned_llama()
    hp.recover(model, text_batches(), steps=1, lr=0.0, rewind=early)
    assert all(torch.equal(tensor, by_hand(early, name, tensor)) for name, tensor in model.state_dict().items())


def test_a_folder_with_another_recovery_refuses_before_weights_are_rewound(tmp_path):
    early, options = llama(seed=5), {"lr": 0.0, "output_dir": tmp_path / "run"}
    finished = hp.recover(pruned_llama()[1], text_batches(), steps=1, rewind=early, **options)
    _, model = pruned_llama()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(InvalidInput, match="with other settings"):
        hp.recover(model, text_batches(), steps=2, rewind=early, **options)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert hp.recover(model, text_batches(), steps=1, rewind=early, **options) == finished
    assert all(torch.equal(tensor, by_hand(early, name, tensor)) for name, tensor in model.state_dict().items())


def test_rate_rewinding_repeats_the_last_rates_from_the_present_weights():
    rates = []
    original = lambda step: 0.01 / (1 + step)  # noqa: E731

    class Rates(transformers.TrainerCallback):
        def on_step_begin(self, args, state, control, lr_scheduler=None, **_):
            rates.append(lr_scheduler.get_last_lr()[0])

    _, model = pruned_llama()
    rewind = hp.recovery.RateRewind(original, first=40, last=45)
    assert hp.recover(model, text_batches(), rewind=rewind, callbacks=[Rates()]).steps == 5
    assert rates == [original(step) for step in range(40, 45)]


def wrong_file(folder):
    save_file({"weight": torch.zeros(2)}, folder / "other.safetensors")
    return folder / "other.safetensors"


def other_cut(folder):
    model = llama()
    hp.cut(model, {"model.layers.0.self_attn": [0, 1]})
    return model


@pytest.mark.parametrize(
    ("source", "message"),
    [
        (lambda folder: llama(query_heads=4), "had .* before pruning|is .* there once it is sliced"),
        (lambda folder: llama(layers=3), "does not fit"),
        (lambda folder: llama(layers=3).state_dict(), "is in one of them only"),
        (lambda folder: save_folder(llama(layers=1), folder / "m"), "does not fit"),
        (other_cut, "pruned to other heads"),
        (wrong_file, "does not fit"),
        (lambda folder: folder / "nothing", "does not exist"),
        (lambda folder: written(folder / "broken.safetensors"), r"broken\.safetensors cannot be read: "),
        (lambda folder: written(folder / "config.json").parent, "the rewind checkpoint .* does not load: .* is no model folder"),
        (lambda folder: decoder("llama", hidden_size=64, num_attention_heads=8).state_dict(), "does not fit .*: .*size mismatch"),
        (lambda folder: save_folder(wider(), folder / "m"), r"mlp.* is \[64, 32\] there .*, \[48, 32\] here\. Give an earlier"),
    ],
)
def test_a_checkpoint_that_does_not_fit_is_refused_and_changes_nothing(source, message, tmp_path):
    _, model = pruned_llama()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(InvalidInput, match=message):
        hp.recovery.rewind_weights(model, source(tmp_path))
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_rates_are_repeated_over_some_steps():
    with pytest.raises(InvalidInput, match="first=3, last=3: expected 0 <= first < last"):
        hp.recovery.RateRewind(lambda step: 1e-4, 3, 3)


def test_a_plain_state_dict_of_another_shape_asks_for_the_module():
    dense, model, *_ = pruned_classifier()
    with pytest.raises(InvalidInput, match="give rewind=the unpruned module"):
        hp.recovery.rewind_weights(model, dense.state_dict())
