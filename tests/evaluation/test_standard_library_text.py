import math

import pytest
import torch
from tiny_library import use_tiny_library
from tiny_models import bert
from transformers import LlamaConfig, LlamaForCausalLM

from headprune.demo.stdlib_lm import byte_level_bpe
from headprune.errors import InvalidInput
from headprune.evaluation import compare
from headprune.evaluation.cost import attention_flops
from headprune.evaluation.tasks import build_task
from headprune.evaluation.tasks.standard_library import standard_library_text
from headprune.evaluation.tasks.standard_library_text import stream_of
from headprune.models import attention_sites
from headprune.surgery import cut

OPTIONS = {"window": 16, "batch": 4, "calibration_windows": 12, "test_windows": 10}


@pytest.fixture
def tokenizer(monkeypatch, tmp_path):
    use_tiny_library(monkeypatch, tmp_path)
    return byte_level_bpe(standard_library_text().training, 300)


@pytest.fixture
def task(tokenizer):
    return build_task("standard-library-text", tokenizer, **OPTIONS)


def decoder(window=32):
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=300, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=8, num_key_value_heads=4,
        head_dim=8, initializer_range=0.2, max_position_embeddings=window, pad_token_id=1, bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


def test_perplexity_is_exp_of_the_mean_over_tokens(task):
    model = decoder()
    losses, right = [], []
    for row in task.test:
        with torch.no_grad():
            predicted = model(input_ids=row[None]).logits[0].double().log_softmax(dim=-1)
        losses += [-float(predicted[position, row[position + 1]]) for position in range(len(row) - 1)]
        right += [int(predicted[position].argmax()) == int(row[position + 1]) for position in range(len(row) - 1)]
    found = task.evaluate(model)
    assert len(losses) == 10 * 15
    assert found["perplexity"] == pytest.approx(math.exp(sum(losses) / len(losses)), rel=1e-5)
    assert found["accuracy"] == sum(right) / len(right)


def test_the_loss_of_a_sample_is_what_transformers_gives_for_its_window(task):
    model, batch = decoder(), task.calibration[1]
    losses = task.loss(model, batch).detach()
    assert losses.shape == (4,)
    for row, loss in zip(batch["input_ids"], losses):
        assert float(loss) == pytest.approx(float(model(input_ids=row[None], labels=row[None]).loss.detach()), rel=1e-5)


def test_windows_do_not_overlap_and_come_from_their_own_part(task, tokenizer):
    parts = standard_library_text()
    for documents, windows in (
        (parts.test, task.test),
        (parts.calibration, torch.cat([batch["input_ids"] for batch in task.calibration])),
    ):
        stream = stream_of(tokenizer, documents)
        rows = {tuple(row.tolist()): start for start, row in enumerate(stream[: len(stream) // 16 * 16].view(-1, 16))}
        assert len({rows[tuple(row.tolist())] for row in windows}) == len(windows)


def test_every_document_starts_with_the_end_of_text_token(tokenizer):
    documents = standard_library_text().test
    stream = stream_of(tokenizer, documents)
    assert int((stream == tokenizer.eos_token_id).sum()) == len(documents)
    assert tokenizer.decode(stream, skip_special_tokens=True) == "".join(document.text for document in documents)


def test_the_task_is_the_same_every_time(task, tokenizer):
    again = build_task("standard-library-text", tokenizer, **OPTIONS)
    assert again.digest == task.digest
    assert torch.equal(again.test, task.test)
    assert all(torch.equal(a["input_ids"], b["input_ids"]) for a, b in zip(again.calibration, task.calibration))


def test_another_seed_draws_other_calibration_windows_and_the_same_test_windows(task, tokenizer):
    other = build_task("standard-library-text", tokenizer, seed=1, **OPTIONS)
    assert torch.equal(other.test, task.test)
    assert not torch.equal(other.calibration[0]["input_ids"], task.calibration[0]["input_ids"])


@pytest.mark.parametrize(
    ("options", "names"),
    [
        ({"window": 1}, "window=1"),
        ({"calibration_windows": 0}, "calibration set .* is empty"),
        ({"test_windows": 0}, "test set is empty"),
        ({"windows": 3}, "windows"),
    ],
)
def test_a_bad_option_is_named(tokenizer, options, names):
    with pytest.raises(InvalidInput, match=names):
        build_task("standard-library-text", tokenizer, **{**OPTIONS, **options})


def test_a_model_of_another_kind_is_refused(task):
    with pytest.raises(InvalidInput, match="BertModel"):
        task.check_model(bert())
    with pytest.raises(InvalidInput, match="takes at most 8; give window=8"):
        task.check_model(decoder(window=8))
    task.check_model(decoder(window=16))


def test_the_table_says_that_lower_perplexity_is_better(task):
    dense, pruned = decoder(), decoder()
    cut(pruned, {"model.layers.0.self_attn": [0, 1, 2, 6], "model.layers.1.self_attn": [3]})
    found = compare(dense, pruned, task, repeats=1)
    assert not found.higher_is_better
    assert list(found.__rich__().columns[0].cells)[:2] == ["perplexity (lower is better)", "accuracy"]
    assert found.ratio("kv_cache_bytes_per_token") == 4 / 8


def test_attention_flops_of_grouped_heads_are_those_that_torch_counts():
    from torch.utils.flop_counter import FlopCounterMode

    model = decoder()
    model.set_attn_implementation("eager")
    site = attention_sites(model)[0]
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        states = torch.randn(1, 10, 32)
        site.module(states, position_embeddings=model.model.rotary_emb(states, torch.arange(10)[None]), attention_mask=None)
    assert attention_flops([site], 10) == counter.get_total_flops()
