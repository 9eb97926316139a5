"""Words of your own texts, classified, as a task."""

import copy
import json
import random
from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from letter_tokenizer import letter_tokenizer
from tiny_encoders import ENCODERS
from tiny_models import bert
from transformers import BertConfig, BertForSequenceClassification, BertForTokenClassification

import headprune as hp
from headprune.errors import InvalidInput
from headprune.evaluation.tasks import build_task
from headprune.evaluation.tasks.token_classification import f1_of_spans, spans
from headprune.sources import default_task

TAGS = ["O", "B-ab", "I-ab", "B-cd"]


def padding_tokenizer():
    found = letter_tokenizer()
    found.pad_token = "[UNK]"
    return found


def tagger(**options) -> BertForTokenClassification:
    torch.manual_seed(0)
    config = BertConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, vocab_size=61, initializer_range=0.2,
        max_position_embeddings=40, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, id2label=dict(enumerate(TAGS)),
        label2id={name: number for number, name in enumerate(TAGS)}, **options,
    )  # fmt: skip
    return BertForTokenClassification(config).eval()


def sentence(drawn: random.Random) -> dict:
    """A word of a's and b's begins a span or goes on with it, one of c's and d's is a span; each word has one to three letters."""
    words, tags = [], []
    for _ in range(drawn.randint(1, 8)):
        kind = drawn.choice(["ab", "cd", "ef"])
        words.append("".join(drawn.choices(kind, k=drawn.randint(1, 3))))
        before = tags[-1] if tags else "O"
        tags.append({"ab": "I-ab" if before.endswith("ab") else "B-ab", "cd": "B-cd", "ef": "O"}[kind])
    return {"tokens": words, "tags": tags, "numbers": [TAGS.index(tag) for tag in tags]}


@pytest.fixture
def rows(tmp_path):
    drawn = random.Random(0)
    path = tmp_path / "names.jsonl"
    path.write_text("\n".join(json.dumps(sentence(drawn)) for _ in range(60)))
    return path


def test_numbers_of_tags_with_names_in_the_data_are_those_of_the_models_names(rows, tmp_path, monkeypatch):
    """CoNLL's data count from B-PER, dslim/bert-base-NER from B-MISC."""
    datasets = pytest.importorskip("datasets")
    names, sentences = TAGS[::-1], [json.loads(line) for line in rows.read_text().splitlines()]
    features = datasets.Features({
        "tokens": datasets.Sequence(datasets.Value("string")), "tags": datasets.Sequence(datasets.ClassLabel(names=names)),
    })  # fmt: skip
    told = [{"tokens": one["tokens"], "tags": [names.index(tag) for tag in one["tags"]]} for one in sentences]
    found = datasets.Dataset.from_list(told, features=features)
    monkeypatch.setattr(datasets, "load_dataset", lambda name, configuration, *, split: found)
    by_names = build_task("token-classification", padding_tokenizer(), calibration=str(rows))
    by_numbers = build_task("token-classification", padding_tokenizer(), calibration="owner/names:train")
    model = tagger()
    for task in (by_names, by_numbers):
        task.check_model(model)
    assert by_numbers.evaluate(model) == by_names.evaluate(model)
    assert all(torch.equal(one["labels"], other["labels"]) for one, other in zip(by_numbers.test, by_names.test))


@pytest.mark.parametrize("tags", ["tags", "numbers"])
def test_the_first_token_of_a_word_has_its_tag(rows, tags):
    task, model = build_task("token-classification", padding_tokenizer(), calibration=str(rows), tags=tags, batch=7), tagger()
    task.check_model(model)
    expected = sorted(row["numbers"] for row in map(json.loads, rows.read_text().splitlines()))
    found = []
    for batch in (*task.training(), *task.test):
        for ids, labels in zip(batch["input_ids"].tolist(), batch["labels"].tolist()):
            starts = [place for place, label in enumerate(labels) if label != -100]
            found.append([labels[place] for place in starts])
            assert starts[0] == 0
            assert all(0 < after - before <= 3 for before, after in pairwise(starts))
            assert all(label == -100 for token, label in zip(ids, labels) if token == 0)
    assert sorted(found) == expected
    task.check_model(model)  # once more changes nothing
    assert {int(label) for batch in task.calibration for label in batch["labels"].unique()} <= {-100, 0, 1, 2, 3}
    other = tagger_of([*TAGS[1:], "O"]) if tags == "tags" else tagger_of(TAGS, shift=1)
    with pytest.raises(InvalidInput, match="other numbers of classes"):
        task.check_model(other)


def tagger_of(names, shift: int = 0):
    model = tagger()
    model.config.id2label = dict(enumerate(names))
    model.config.label2id = {name: number for number, name in enumerate(names)}
    if shift:
        model.config.label2id = {str(number): (number + shift) % 4 for number in range(4)}
    return model


def test_the_loss_is_of_words_and_the_metrics_of_spans_and_words(rows):
    task, model = build_task("token-classification", padding_tokenizer(), calibration=str(rows), batch=4), tagger()
    with pytest.raises(InvalidInput, match=r"call task\.check_model"):
        task.loss(model, task.calibration[0])
    task.check_model(model)
    right = words = told = true = both = 0
    for batch in task.test:
        found = task.loss(model, batch).detach()
        for row in range(len(found)):
            length = int(batch["attention_mask"][row].sum())
            with torch.no_grad():
                logits = model(input_ids=batch["input_ids"][row : row + 1, :length]).logits[0]
            labels = batch["labels"][row, :length]
            assert float(found[row]) == pytest.approx(float(F.cross_entropy(logits, labels)), rel=1e-4)
            there = labels != -100
            guessed, wanted = logits.argmax(dim=-1)[there].tolist(), labels[there].tolist()
            right, words = right + sum(map(int.__eq__, guessed, wanted)), words + len(wanted)
            mine, theirs = (spans([TAGS[number] for number in numbers]) for numbers in (guessed, wanted))
            told, true, both = told + len(mine), true + len(theirs), both + len(mine & theirs)
    quality = task.evaluate(model)
    assert quality["accuracy"] == pytest.approx(right / words)
    assert quality["f1"] == pytest.approx(2 * both / (told + true))


def test_a_tagger_that_gives_nan_is_right_nowhere(rows):
    task, model = build_task("token-classification", padding_tokenizer(), calibration=str(rows), batch=4), tagger()
    task.check_model(model)
    torch.nn.init.constant_(model.classifier.bias, float("nan"))
    assert {name: metric.value for name, metric in task.examples(model).items()} == {"f1": 0, "accuracy": 0}


def test_spans_are_those_of_conlleval():
    assert spans(["B-x", "I-x", "O", "B-x", "B-x"]) == {(0, 2, "x"), (3, 4, "x"), (4, 5, "x")}
    assert spans(["I-x", "I-y", "I-y", "B-y"]) == {(0, 1, "x"), (1, 3, "y"), (3, 4, "y")}
    assert spans(["NOUN", "O", "PRON-REL", "NOUN", "NOUN"]) == {(0, 1, "NOUN"), (2, 3, "PRON-REL"), (3, 4, "NOUN"), (4, 5, "NOUN")}
    assert spans(["O", "O"]) == spans([]) == set()
    assert f1_of_spans(torch.tensor([[1.0, 2.0, 1.0], [1.0, 1.0, 2.0]])) == pytest.approx(2 / 3)
    assert f1_of_spans(torch.zeros(2, 3)) == 1.0


def test_a_model_goes_the_whole_way_on_it(rows, tmp_path):
    task, dense = build_task("token-classification", padding_tokenizer(), calibration=str(rows), batch=8), tagger()
    task.check_model(dense)
    model = copy.deepcopy(dense)
    scores = hp.score(model, task.calibration, ["fisher", "entropy"], loss_fn=task.loss)["fisher"]
    hp.prune(model, hp.plan(scores, hp.Budget(heads=0.5)), task.calibration, forward=task.forward)
    hp.recover(model, task.training(), loss_fn=task.loss, steps=2)
    hp.save(model, tmp_path / "pruned", tokenizer=task.tokenizer)
    loaded = hp.load(tmp_path / "pruned")
    torch.testing.assert_close(task.outputs(loaded), task.outputs(model))
    assert hp.evaluate(loaded, task, repeats=1).quality == task.evaluate(model)


def test_mistakes_are_told(rows, tmp_path):
    tokenizer = padding_tokenizer()
    for row, said in (
        ({"tokens": ["a", "b"], "tags": ["O"]}, "2 tokens and 1 tags"), ({"tokens": "a b", "tags": ["O"]}, "no list of tokens"),
        ({"tokens": [], "tags": []}, "0 tokens"),
    ):  # fmt: skip
        (tmp_path / "wrong.jsonl").write_text(json.dumps(row) + "\n" + json.dumps(row))
        with pytest.raises(InvalidInput, match=f"row 1: .*{said}"):
            build_task("token-classification", tokenizer, calibration=str(tmp_path / "wrong.jsonl"))
    task = build_task("token-classification", tokenizer, calibration=str(rows))
    for model in (bert(), BertForSequenceClassification(BertConfig(vocab_size=61, hidden_size=32, num_attention_heads=4))):
        with pytest.raises(InvalidInput, match=f"needs a model with such a head; {type(model).__name__} has none"):
            task.check_model(model)
    with pytest.raises(InvalidInput, match="the label 'B-ab' is none of the model's classes"):
        task.check_model(tagger_of(["O", "PER", "LOC", "ORG"]))
    (tmp_path / "texts.jsonl").write_text("\n".join(json.dumps({"text": "ab", "label": name}) for name in TAGS))
    with pytest.raises(InvalidInput, match="classifies words; take the task token-classification"):
        build_task("text-classification", tokenizer, calibration=str(tmp_path / "texts.jsonl")).check_model(tagger())
    ENCODERS["bert"].make().save_pretrained(tmp_path / "bert")
    with pytest.raises(InvalidInput, match="name yours, for example token-classification,"):
        default_task(str(tmp_path / "bert"))
