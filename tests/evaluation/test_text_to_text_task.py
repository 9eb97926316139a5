"""Your own pairs of source and target as a task."""

import copy
import json
import random

import pytest
import torch
from letter_tokenizer import letter_tokenizer
from tiny_encoders import SEQ2SEQ
from tiny_models import bert, llama

import headprune as hp
from headprune.errors import InvalidInput
from headprune.evaluation.tasks import build_task
from headprune.sources import default_task
from headprune.surgery.verify import cut_error


def padding_tokenizer():
    found = letter_tokenizer()
    found.pad_token = "[UNK]"
    return found


@pytest.fixture
def pairs(tmp_path):
    drawn = random.Random(0)
    words = ["".join(drawn.choices("abcdefgh", k=drawn.randint(1, 9))) for _ in range(60)]
    path = tmp_path / "pairs.jsonl"
    path.write_text("\n".join(json.dumps({"source": word, "target": word[::-1], "long": word * 9}) for word in words))
    return path


def spoken(task, row) -> str:
    return "".join(task.tokenizer.convert_ids_to_tokens([token for token in row if token >= 2]))


def test_a_tenth_is_for_the_test_and_targets_end_where_they_end(pairs):
    task = build_task("text-to-text", padding_tokenizer(), calibration=str(pairs), prefix="xy", batch=7, calibration_rows=20)
    rows = {row["source"]: row["target"] for row in map(json.loads, pairs.read_text().splitlines())}
    seen = []
    for batches, size in ((task.calibration, 20), (task.test, 6), (task.training(), 54)):
        found = [
            (spoken(task, source), spoken(task, target))
            for batch in batches
            for source, target in zip(batch["input_ids"].tolist(), batch["labels"].tolist())
        ]
        assert len(found) == size
        assert all(source.startswith("xy") and rows[source[2:]] == target for source, target in found)
        seen.append({source for source, _ in found})
    calibration, test, training = seen
    assert calibration <= training
    assert not test & training


def test_translations_are_read_by_their_languages(pairs, tmp_path):
    rows = [json.loads(line) for line in pairs.read_text().splitlines()]
    several = [{"id": number, "translation": {"de": row["target"], "en": row["source"]}} for number, row in enumerate(rows)]
    own = build_task("text-to-text", padding_tokenizer(), calibration=str(pairs))
    path = tmp_path / "several.jsonl"

    def of(content: list, **options: str):
        path.write_text("\n".join(map(json.dumps, content)))
        return build_task("text-to-text", padding_tokenizer(), calibration=str(path), **options)

    for options in ({"source": "en", "target": "de"}, {"source": "en"}, {"target": "de"}):
        found = of(several, **options)
        assert all(torch.equal(one[name], other[name]) for one, other in zip(own.test, found.test) for name in one)
    assert spoken(own, of(several, target="en").test[0]["labels"][0].tolist()) == spoken(own, own.test[0]["input_ids"][0].tolist())
    flat = [{**row, **other} for row, other in zip(rows, several)]
    assert torch.equal(of(flat).test[0]["labels"], own.test[0]["labels"])
    more = [{"translation": {**row["translation"], "fr": "a"}} for row in several]
    assert torch.equal(of(more, source="en", target="de").test[0]["labels"], own.test[0]["labels"])
    for content, options in ((several, {}), (several, {"source": "fr", "target": "de"}), (more, {"source": "en"})):
        there = "de, en, fr" if content is more else "de, en"
        with pytest.raises(InvalidInput, match=f"row 1: the languages of 'translation' are {there}; name the one that is read"):
            of(content, **options)
    with pytest.raises(InvalidInput, match="row 2 has no value for 'de'"):
        of([several[0], {"translation": {"de": None, "en": "a"}}], source="en")
    with pytest.raises(InvalidInput, match="row 1: 'translation' is 'ab'; expected an object with a text for each language"):
        of([{"translation": "ab"}] * 2, source="en", target="de")


@pytest.mark.parametrize("name", ["t5", "bart"])
def test_costs_are_of_the_forward_pass_without_a_loss(pairs, name):
    task, model = build_task("text-to-text", padding_tokenizer(), calibration=str(pairs), batch=4), SEQ2SEQ[name].make()
    inputs = task.latency_inputs()
    with torch.no_grad():
        timed, whole = model(**inputs), task.forward(model, task.test[0])
    assert timed.loss is None
    assert timed.logits.shape == whole.logits.shape
    assert inputs["decoder_input_ids"][:, 1:].tolist() == [
        [max(token, 0) for token in row] for row in task.test[0]["labels"][:, :-1].tolist()
    ]


@pytest.mark.parametrize("name", ["t5", "bart"])
def test_perplexity_is_of_all_tokens_of_the_targets(pairs, name):
    task, model = build_task("text-to-text", padding_tokenizer(), calibration=str(pairs), batch=4), SEQ2SEQ[name].make()
    task.check_model(model)
    losses, hits = [], []
    for batch in task.test:
        found = task.loss(model, batch).detach()
        for row in range(len(found)):
            source = batch["input_ids"][row][batch["attention_mask"][row].bool()]
            target = batch["labels"][row][batch["labels"][row] != -100]
            with torch.no_grad():
                output = model(input_ids=source[None], labels=target[None])
            assert float(found[row]) == pytest.approx(float(output.loss), rel=1e-4)
            losses += (-output.logits[0].double().log_softmax(dim=-1)[torch.arange(len(target)), target]).tolist()
            hits += (output.logits[0].argmax(dim=-1) == target).tolist()
    quality = task.evaluate(model)
    assert quality["perplexity"] == pytest.approx(torch.tensor(losses).mean().exp().item(), rel=1e-4)
    assert quality["accuracy"] == pytest.approx(sum(hits) / len(hits))


@pytest.mark.parametrize("name", ["t5", "bart"])
def test_an_encoder_decoder_goes_the_whole_way_on_it(pairs, name, tmp_path):
    task, dense = build_task("text-to-text", padding_tokenizer(), calibration=str(pairs), batch=8), SEQ2SEQ[name].make()
    model = copy.deepcopy(dense)
    scores = hp.score(model, task.calibration, ["fisher", "wanda"], loss_fn=task.loss)["fisher"]
    found = hp.search_plan(model, scores, hp.Budget(heads=0.5), task.calibration, trials=2, forward=task.readout)
    done = hp.prune(model, found.plan, task.calibration, forward=task.forward, feed_forward=True)
    ends = [part.site for part in done.resolved if part.site not in found.plan]
    assert cut_error(dense, model, found.plan, task.outputs, ends) < 1e-4
    hp.recover(model, task.training(), loss_fn=task.loss, teacher=dense, steps=2)
    hp.save(model, tmp_path / "pruned", tokenizer=task.tokenizer)
    loaded = hp.load(tmp_path / "pruned")
    torch.testing.assert_close(task.outputs(loaded), task.outputs(model))
    compared = hp.evaluate(loaded, task, repeats=1)
    assert compared.quality["perplexity"] == pytest.approx(task.evaluate(model)["perplexity"], rel=1e-5)


def test_mistakes_are_told(pairs):
    tokenizer = padding_tokenizer()
    with pytest.raises(InvalidInput, match="no 'english', only source, target"):
        build_task("text-to-text", tokenizer, calibration=str(pairs), source="english")
    with pytest.raises(InvalidInput, match="batch=0"):
        build_task("text-to-text", tokenizer, calibration=str(pairs), batch=0)
    task = build_task("text-to-text", tokenizer, calibration=str(pairs))
    for model in (llama(), bert()):
        with pytest.raises(InvalidInput, match=f"as T5 or BART; {type(model).__name__} is none"):
            task.check_model(model)
    bart = SEQ2SEQ["bart"].make()
    limit = bart.config.max_position_embeddings
    assert limit < 81
    for column in ("source", "target"):
        long = build_task("text-to-text", tokenizer, calibration=str(pairs), **{column: "long"})
        with pytest.raises(InvalidInput, match=f"takes at most {limit}; give max_tokens={limit}"):
            long.check_model(bart)
    (pairs.parent / "long.jsonl").write_text(json.dumps({"source": "a", "target": "b" * 90}))
    long = build_task("text-to-text", tokenizer, calibration=str(pairs), training=str(pairs.parent / "long.jsonl"))
    with pytest.raises(InvalidInput, match=f"takes at most {limit}; give max_tokens={limit}"):
        long.check_model(bart)


def test_perplexity_of_a_text_is_not_for_encoder_decoders(pairs, tmp_path):
    """BART without targets would repeat what it reads."""
    (pairs.parent / "own.txt").write_text("abc " * 60)
    for name in ("t5", "bart"):
        model = SEQ2SEQ[name].make()
        with pytest.raises(InvalidInput, match="is an encoder-decoder, for which there is the task text-to-text"):
            build_task("text", padding_tokenizer(), calibration=str(pairs.parent / "own.txt"), window=8).check_model(model)
        model.save_pretrained(tmp_path / name)
        with pytest.raises(InvalidInput, match="name yours, for example text-to-text,"):
            default_task(str(tmp_path / name))
