"""Embedders that were saved as language models, and what sentence-transformers says of them."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_embedder import QUERY, saved_embedder, saved_pairs, write_json
from tiny_models import bert, llama
from transformers import AutoModel, AutoTokenizer, Llama4ForCausalLM, Llama4TextConfig, T5Config, T5EncoderModel

import headprune as hp
from headprune.errors import CorruptCheckpoint, InvalidInput
from headprune.evaluation.retrieval import embed
from headprune.evaluation.tasks import build_task, named_task
from headprune.models.shards import open_shards
from headprune.sources import default_task


@pytest.fixture
def embedder(tmp_path):
    return saved_embedder(tmp_path / "embedder")


@pytest.fixture
def pairs(tmp_path):
    return saved_pairs(tmp_path / "pairs.csv")


def task_of(folder, pairs, **options):
    return build_task("retrieval", AutoTokenizer.from_pretrained(folder), calibration=str(pairs), batch=8, **options)


def test_a_folder_of_a_language_model_opens_without_its_head(embedder):
    model, streamed = hp.load(embedder, base=True), hp.open_streamed(embedder, base=True)
    assert type(model).__name__ == type(streamed).__name__ == "Qwen3Model"
    states = AutoModel.from_pretrained(embedder).eval()(torch.tensor([[3, 4, 5]])).last_hidden_state
    for found in (model, streamed):
        torch.testing.assert_close(found(torch.tensor([[3, 4, 5]])).last_hidden_state, states)
    assert type(hp.load(embedder)).__name__ == "Qwen3ForCausalLM"


def test_a_folder_that_is_pruned_in_its_files_leaves_the_head_out(embedder, tmp_path):
    dense, keep = hp.load(embedder, base=True), {"layers.0.self_attn": [0, 2, 3]}
    assert "lm_head.weight" in open_shards(embedder)
    hp.prune_folder(embedder, hp.PruningPlan.from_keep(dense, keep), tmp_path / "pruned")
    assert "lm_head.weight" not in open_shards(tmp_path / "pruned")
    pruned, ids = hp.load(tmp_path / "pruned"), torch.tensor([[3, 4, 5]])
    with hp.gated(dense, keep):
        torch.testing.assert_close(pruned(ids).last_hidden_state, dense(ids).last_hidden_state)


def test_a_pruned_attention_that_the_files_lack_is_told_without_the_head_too(tmp_path):
    model = llama()
    hp.cut(model, {"model.layers.0.self_attn": [0, 1]}, verify=False)
    hp.save(model, tmp_path)
    weights, lost = load_file(tmp_path / "model.safetensors"), "model.layers.0.self_attn.q_proj.weight"
    weights.pop(lost)
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    for base in (False, True):
        with pytest.raises(CorruptCheckpoint, match=r"lacks weights that its config promises: .*layers\.0\.self_attn\.q_proj"):
            hp.load(tmp_path, base=base, verify=False)


def test_what_sentence_transformers_saved_is_no_language_model_by_default(embedder):
    assert default_task(str(embedder)) == "docstring-retrieval"
    (embedder / "modules.json").unlink()
    assert default_task(str(embedder)) == "standard-library-text"


def test_an_encoder_of_a_t5_is_an_embedder_too(tmp_path):
    """sentence-t5's config says that it is an encoder-decoder."""
    config = T5Config(d_model=16, d_kv=4, d_ff=16, num_layers=1, num_heads=4, vocab_size=40)
    T5EncoderModel(config).save_pretrained(tmp_path)
    written = json.loads((tmp_path / "config.json").read_text())
    write_json(tmp_path / "config.json", {**written, "is_encoder_decoder": True})
    assert default_task(str(tmp_path)) == "docstring-retrieval"


def test_a_language_model_whose_layers_are_not_called_by_its_prefix_keeps_its_head(tmp_path):
    """Llama 4's text model: base_model_prefix is "language_model", its layers are model.layers."""
    config = Llama4TextConfig(
        hidden_size=32, intermediate_size=32, intermediate_size_mlp=32, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, vocab_size=50, num_local_experts=2, pad_token_id=0,
    )  # fmt: skip
    Llama4ForCausalLM(config).save_pretrained(tmp_path / "llama4")
    model = hp.load(tmp_path / "llama4")
    plan = hp.PruningPlan.from_keep(model, {"model.layers.0.self_attn": [0, 1, 3]})
    hp.prune_folder(tmp_path / "llama4", plan, tmp_path / "pruned", verify=False)
    assert type(hp.load(tmp_path / "pruned")).__name__ == "Llama4ForCausalLM"


def test_a_module_of_ones_own_has_no_base(tmp_path):
    with pytest.raises(InvalidInput, match="unknown option of load with model= 'base'"):
        hp.load(tmp_path, model=torch.nn.Linear(2, 2), base=True)


def test_pooling_and_prompt_are_those_of_the_folder(embedder, pairs):
    task = task_of(embedder, pairs)
    assert (task.pooling, task.test[0].query[: len(QUERY)]) == ("last", QUERY)
    assert not any(pair.document.startswith(QUERY) for pair in (*task.test, *task.training_pairs))
    own = task_of(embedder, pairs, pooling="mean", prompt="", document_prompt="doc ")
    assert (own.pooling, own.test[0].query[1:], own.test[0].document[:4]) == ("mean", " ask", "doc ")
    write_json(embedder / "1_Pooling" / "config.json", {"pooling_mode": "cls"})
    write_json(embedder / "config_sentence_transformers.json", {"prompts": {"passage": "p "}})
    newer = task_of(embedder, pairs)
    assert (newer.pooling, newer.test[0].query[1:], newer.test[0].document[:2]) == ("cls", " ask", "p ")


@pytest.mark.parametrize(
    "written", [{"pooling_mode_max_tokens": True}, {"pooling_mode_mean_tokens": True, "pooling_mode_cls_token": True}]
)
def test_a_pooling_that_we_do_not_have_is_told(embedder, pairs, written):
    write_json(embedder / "1_Pooling" / "config.json", written)
    with pytest.raises(InvalidInput, match=r"1_Pooling/config\.json pools by .*Give pooling=mean, cls or last"):
        task_of(embedder, pairs)
    assert task_of(embedder, pairs, pooling="last").pooling == "last"


def test_a_damaged_file_is_named(embedder, pairs):
    for wrong, said in (("{", "is not JSON"), ('{"pooling_mode": 3}', "pooling_mode is 3; expected a name")):
        (embedder / "1_Pooling" / "config.json").write_text(wrong)
        with pytest.raises(CorruptCheckpoint, match=rf"1_Pooling/config\.json:? {said}"):
            task_of(embedder, pairs)
    (embedder / "1_Pooling" / "config.json").unlink()
    for wrong in (["find: "], {"query": 1}):
        write_json(embedder / "config_sentence_transformers.json", {"prompts": wrong})
        with pytest.raises(CorruptCheckpoint, match="expected texts by name"):
            task_of(embedder, pairs)


def test_what_is_applied_to_embeddings_elsewhere_alone_is_told(embedder, pairs, caplog):
    task_of(embedder, pairs)
    assert not caplog.records
    modules = [f"sentence_transformers.models.{kind}" for kind in ("Transformer", "Pooling", "Dense", "Normalize")]
    write_json(embedder / "modules.json", [{"type": kind} for kind in modules])
    write_json(embedder / "1_Pooling" / "config.json", {"pooling_mode_mean_tokens": True, "include_prompt": False})
    task_of(embedder, pairs)
    (record,) = caplog.records
    assert "sentence-transformers also applies Dense, pooling without the prompt's tokens, which" in record.message


def test_a_causal_decoder_is_pooled_by_its_last_token_and_an_encoder_by_the_mean(embedder, pairs):
    (embedder / "1_Pooling" / "config.json").unlink()
    task = task_of(embedder, pairs)
    for model, pooling in ((llama().base_model, "last"), (bert(), "mean")):
        batch = task.calibration[0]
        torch.testing.assert_close(task.embed(model, batch), embed(model, batch, pooling))


@pytest.mark.parametrize("heads", [None, [0, 2, 3]])
def test_the_last_token_is_the_same_however_a_batch_is_padded(embedder, pairs, heads):
    model = hp.load(embedder, base=True)
    if heads:
        hp.prune(model, hp.PruningPlan.from_keep(model, {"layers.0.self_attn": heads}))
    texts, found, scores = ["a", "abc abc", "x y z x y z"], {}, {}
    for side in ("left", "right"):
        task = task_of(embedder, pairs)
        task.tokenizer.padding_side = side
        assert task.encoded(texts)["attention_mask"][0, 0] == (side == "right")
        found[side] = torch.cat([task.embed(model, task.encoded([text])) for text in texts])
        torch.testing.assert_close(task.embed(model, task.encoded(texts)), found[side], atol=1e-5, rtol=1e-4)
        scores[side] = hp.score(model, [task.encoded(texts + texts[::-1])], loss_fn=task.loss)
    for name in scores["left"]:
        torch.testing.assert_close(scores["left"][name], scores["right"][name], rtol=1e-3, atol=1e-8)


def test_an_option_in_quotes_may_hold_a_comma_and_a_colon():
    assert named_task("retrieval,prompt=query: ")[1] == {"prompt": "query: "}
    assert named_task('retrieval,prompt="find: a, b",batch=8')[1] == {"prompt": "find: a, b", "batch": 8}
    with pytest.raises(InvalidInput, match=r"'b' is no option; .* double quotes around a value with a comma"):
        named_task("retrieval,prompt=a,b")
    with pytest.raises(InvalidInput, match="a double quote is open"):
        named_task('retrieval,prompt="a,batch=8')
