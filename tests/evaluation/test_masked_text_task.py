"""Masked tokens of your own text as a task."""

import copy
import random

import pytest
import torch
import torch.nn.functional as F
from letter_tokenizer import LETTERS, letter_tokenizer
from tiny_models import bert
from tokenizers.processors import TemplateProcessing
from transformers import BertConfig, BertForMaskedLM

import headprune as hp
from headprune.errors import InvalidInput
from headprune.evaluation.tasks import build_task
from headprune.sources import default_task

FIRST, LAST, MASK = 29, 1, 30


def masking_tokenizer():
    """[CLS] text </s>, and a mask token."""
    found = letter_tokenizer()
    found.add_special_tokens({"cls_token": "[CLS]", "mask_token": "[MASK]"})
    found._tokenizer.post_processor = TemplateProcessing(single="[CLS] $A </s>", special_tokens=[("[CLS]", FIRST), ("</s>", LAST)])
    assert (found.cls_token_id, found.mask_token_id) == (FIRST, MASK)
    return found


def masked_lm() -> BertForMaskedLM:
    torch.manual_seed(0)
    config = BertConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, vocab_size=61, initializer_range=0.2,
        max_position_embeddings=64, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    return BertForMaskedLM(config).eval()


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "own.txt"
    path.write_text("".join(random.Random(0).choices(LETTERS, k=1500)))
    return path


def whole(batches) -> torch.Tensor:
    """The windows as they were before tokens were masked."""
    return torch.cat([torch.where(batch["labels"] == -100, batch["input_ids"], batch["labels"]) for batch in batches])


def test_windows_stand_between_special_tokens_and_some_of_their_tokens_are_masked(text):
    task = build_task("masked-text", masking_tokenizer(), calibration=str(text), window=17, batch=4, masked=0.2)
    stream = torch.tensor([LAST, *(LETTERS.index(letter) + 2 for letter in text.read_text())])
    front, tail = stream[: 15 * 90].view(-1, 15).tolist(), stream[len(stream) - 150 :].view(-1, 15).tolist()
    for batches, windows in ((task.calibration, front), (task.training(), front), (task.test, tail)):
        found = whole(batches)
        assert set(found[:, 0].tolist()) == {FIRST}
        assert set(found[:, -1].tolist()) == {LAST}
        assert sorted(found[:, 1:-1].tolist()) == sorted(windows)
        for batch in batches:
            masked = batch["input_ids"] == MASK
            assert torch.equal(masked, batch["labels"] != -100)
            assert masked.sum(dim=1).tolist() == [3] * len(masked)
    again = build_task("masked-text", masking_tokenizer(), calibration=str(text), window=17, batch=4, masked=0.2, seed=1)
    assert torch.equal(again.test[0]["input_ids"], task.test[0]["input_ids"])
    assert not torch.equal(again.calibration[0]["input_ids"], task.calibration[0]["input_ids"])


def test_perplexity_is_of_the_masked_tokens(text):
    task = build_task("masked-text", masking_tokenizer(), calibration=str(text), window=16, batch=3)
    model = masked_lm()
    task.check_model(model)
    losses, hits = [], []
    with torch.no_grad():
        for batch in task.test:
            logits = model(input_ids=batch["input_ids"]).logits
            assert float(task.loss(model, batch).mean()) == pytest.approx(
                float(F.cross_entropy(logits.flatten(0, 1), batch["labels"].flatten())), rel=1e-5
            )
            for row, place in (batch["labels"] != -100).nonzero().tolist():
                wanted = batch["labels"][row, place]
                losses.append(float(-logits[row, place].double().log_softmax(dim=-1)[wanted]))
                hits.append(float(logits[row, place].argmax() == wanted))
    found = task.evaluate(model)
    assert found["perplexity"] == pytest.approx(torch.tensor(losses).mean().exp().item(), rel=1e-5)
    assert found["accuracy"] == pytest.approx(sum(hits) / len(hits))


def test_an_encoder_goes_the_whole_way_on_it(text, tmp_path):
    task = build_task("masked-text", masking_tokenizer(), calibration=str(text), window=32, batch=4)
    dense = masked_lm()
    model = copy.deepcopy(dense)
    scores = hp.score(model, task.calibration, ["fisher", "entropy"], loss_fn=task.loss)["fisher"]
    hp.prune(model, hp.plan(scores, hp.Budget(heads=0.5)), task.calibration, forward=task.forward)
    recovered = hp.recover(model, task.training(), loss_fn=task.loss, teacher=dense, distil=hp.Distillation(task=1.0), steps=2)
    assert recovered.steps == 2
    hp.save(model, tmp_path / "pruned", tokenizer=task.tokenizer)
    loaded = hp.load(tmp_path / "pruned")
    task.check_model(loaded)
    torch.testing.assert_close(task.outputs(loaded), task.outputs(model))
    assert sum(site.head_map.query_heads for site in hp.attention_sites(loaded)) == 4
    compared = hp.evaluate(loaded, task, repeats=1)
    assert compared.quality["perplexity"] == pytest.approx(task.evaluate(model)["perplexity"], rel=1e-5)


def test_a_text_to_train_on_is_refused_where_it_is_none(text, tmp_path):
    options = {"calibration": str(text), "window": 32}
    (tmp_path / "short.txt").write_text("abc")
    task = build_task("masked-text", masking_tokenizer(), training=str(tmp_path / "short.txt"), **options)
    with pytest.raises(InvalidInput, match=r"short\.txt has 4 tokens; expected at least one window of 30"):
        task.training()
    with pytest.raises(InvalidInput, match=r"none\.txt does not exist"):
        build_task("masked-text", masking_tokenizer(), training=str(tmp_path / "none.txt"), **options)


def test_mistakes_are_told(text, tmp_path):
    tokenizer, options = masking_tokenizer(), {"calibration": str(text)}
    with pytest.raises(InvalidInput, match="has no mask token"):
        build_task("masked-text", letter_tokenizer(), **options)
    for wrong, said in (
        ({"masked": 1.5}, "masked=1.5"), ({"batch": 0}, "batch=0"), ({"window": 3}, "window=3; expected at least 2"),
        ({"window": 200}, "test 150; expected at least one window of 200"), ({"test_windows": 0}, "test_windows=0"),
    ):  # fmt: skip
        with pytest.raises(InvalidInput, match=said):
            build_task("masked-text", tokenizer, **options, **wrong)
    task = build_task("masked-text", tokenizer, **options, window=65)
    with pytest.raises(InvalidInput, match="BertModel has none"):
        task.check_model(bert())
    with pytest.raises(InvalidInput, match="a window has 65 tokens, and BertForMaskedLM takes at most 64; give window=64"):
        task.check_model(masked_lm())
    masked_lm().save_pretrained(tmp_path / "bert")
    with pytest.raises(InvalidInput, match="name yours, for example masked-text,"):
        default_task(str(tmp_path / "bert"))
