"""Answers in your own texts as a task."""

import copy
import json
import random

import pytest
import torch
import torch.nn.functional as F
from letter_tokenizer import letter_tokenizer
from tiny_models import bert
from tokenizers.processors import TemplateProcessing
from transformers import BertConfig, BertForQuestionAnswering

import headprune as hp
from headprune.errors import InvalidInput
from headprune.evaluation.tasks import build_task
from headprune.evaluation.tasks.question_answering import scores_of
from headprune.sources import default_task

LAST, FIRST = 1, 29


def pairing_tokenizer():
    """[CLS] question </s> context </s>, a token a letter."""
    found = letter_tokenizer()
    found.add_special_tokens({"cls_token": "[CLS]", "pad_token": "[PAD]"})
    found.model_input_names = ["input_ids", "token_type_ids", "attention_mask"]
    found._tokenizer.post_processor = TemplateProcessing(
        single="[CLS] $A </s>", pair="[CLS] $A </s> $B:1 </s>:1", special_tokens=[("[CLS]", FIRST), ("</s>", LAST)]
    )
    return found


def pointer() -> BertForQuestionAnswering:
    torch.manual_seed(0)
    config = BertConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, vocab_size=61, initializer_range=0.2,
        max_position_embeddings=64, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    return BertForQuestionAnswering(config).eval()


def made(number: int, drawn: random.Random) -> dict:
    """The word between q and z is the answer; every fifth text has none."""
    context = "".join(drawn.choices("abcdef", k=drawn.randint(4, 20))) + " "
    word = "".join(drawn.choices("ghij", k=drawn.randint(1, 4)))
    start = len(context)
    answers = {"text": [word], "answer_start": [start]} if number % 5 else {"text": [], "answer_start": []}
    whole = context + (word if number % 5 else "") + " " + "".join(drawn.choices("abcdef", k=drawn.randint(2, 9)))
    return {"id": number, "question": drawn.choice(["what", "who is"]), "context": whole, "answers": answers}


@pytest.fixture
def rows(tmp_path):
    drawn = random.Random(0)
    path = tmp_path / "squad.jsonl"
    path.write_text("\n".join(json.dumps(made(number, drawn)) for number in range(60)))
    return path


OPTIONS = {"batch": 7, "max_tokens": 26, "stride": 4}


def test_no_context_is_learnt_from_and_tested_on(tmp_path):
    drawn = random.Random(0)
    contexts = [made(number, drawn) for number in range(20)]
    path = tmp_path / "squad.jsonl"
    path.write_text("\n".join(json.dumps({**row, "question": "what" * times}) for row in contexts for times in range(1, 4)))
    task = build_task("question-answering", pairing_tokenizer(), calibration=str(path), **(OPTIONS | {"max_tokens": 40}))
    tested = {one.context for one in task.asked}
    assert len(task.asked) == 3 * len(tested) == 6
    assert len(task.training_rows) == 54
    assert not tested & {one.context for one in task.training_rows}


def test_answers_are_pointed_at_in_the_windows_that_hold_them(rows):
    task = build_task("question-answering", pairing_tokenizer(), calibration=str(rows), calibration_rows=30, **OPTIONS)
    by_context = {row["context"]: row for row in map(json.loads, rows.read_text().splitlines())}
    windows = task.windows(task.training_rows)
    assert len(task.training_rows) == 54
    assert len(task.asked) == 6
    assert len(windows) > 60  # some contexts need two
    seen = set()
    for window in windows:
        row = by_context[task.training_rows[window.of].context]
        first, last = window.answer
        assert window.inputs["input_ids"][0] == FIRST
        assert len(window.inputs["input_ids"]) <= 26
        if (first, last) != (0, 0):
            begin, end = window.places[first][0], window.places[last][1]
            assert [row["context"][begin:end]] == row["answers"]["text"]
            assert begin == row["answers"]["answer_start"][0]
            seen.add(row["id"])
    assert seen == {row["id"] for row in by_context.values() if row["answers"]["text"]} & {
        by_context[one.context]["id"] for one in task.training_rows
    }
    assert sum(len(batch["input_ids"]) for batch in task.training()) == len(windows)


def test_the_loss_is_of_where_the_answer_begins_and_ends(rows):
    task, model = build_task("question-answering", pairing_tokenizer(), calibration=str(rows), **OPTIONS), pointer()
    task.check_model(model)
    for batch in task.calibration[:3]:
        found = task.loss(model, batch).detach()
        for row in range(len(found)):
            length = int(batch["attention_mask"][row].sum())
            one = {name: batch[name][row : row + 1, :length] for name in ("input_ids", "token_type_ids")}
            with torch.no_grad():
                output = model(**one)
            wanted = [batch[name][row : row + 1] for name in ("start_positions", "end_positions")]
            each = [F.cross_entropy(logits, target) for logits, target in zip((output.start_logits, output.end_logits), wanted)]
            assert float(found[row]) == pytest.approx(float(sum(each)) / 2, rel=1e-4)


class Oracle(BertForQuestionAnswering):
    """Points at the letters g to j, of which answers are, else at the first token."""

    def forward(self, input_ids, attention_mask=None, token_type_ids=None):
        letters = ((input_ids >= 2 + 6) & (input_ids < 2 + 10) & (token_type_ids == 1)).float()
        start = letters * (1 - F.pad(letters, (1, 0))[:, :-1])
        end = letters * (1 - F.pad(letters, (0, 1))[:, 1:])
        first = F.one_hot(torch.zeros(len(input_ids), dtype=torch.long), input_ids.shape[1])
        output = super().forward(input_ids, attention_mask=attention_mask, token_type_ids=token_type_ids)
        whole = 1 + 0.1 * letters.sum(dim=1, keepdim=True)  # rather all of an answer than the part that another window holds
        output.start_logits, output.end_logits = (9 * (whole * side + 0.5 * first) for side in (start, end))
        return output


@pytest.mark.parametrize("side", ["right", "left"])
def test_a_model_that_knows_gets_all_of_it_right(rows, tmp_path, side):
    drawn = random.Random(1)
    (tmp_path / "test.jsonl").write_text("\n".join(json.dumps(made(number, drawn)) for number in range(20)))
    tokenizer = pairing_tokenizer()
    tokenizer.padding_side = side
    task = build_task("question-answering", tokenizer, calibration=str(rows), test=str(tmp_path / "test.jsonl"), **OPTIONS)
    assert all(task.loss(pointer(), batch).isfinite().all() for batch in task.calibration)
    assert sum(not one.answers for one in task.asked) == 4
    assert len(task.test_windows) > 20
    assert task.evaluate(Oracle(pointer().config).eval()) == {"f1": 1.0, "exact_match": 1.0}
    blind = task.evaluate(pointer())
    assert 0 <= blind["exact_match"] <= blind["f1"] < 1


def nested(rows: list[dict], version: int) -> dict:
    """As SQuAD's own files: two paragraphs an article."""

    def asked(row: dict) -> dict:
        answers = [{"text": text, "answer_start": start} for text, start in zip(*row["answers"].values())]
        return {"question": row["question"], "id": str(row["id"]), "answers": answers} | (
            {"is_impossible": not answers, "plausible_answers": [{"text": "a", "answer_start": 0}]} if version == 2 else {}
        )

    paragraphs = [{"context": row["context"], "qas": [asked(row), asked(row)]} for row in rows]
    return {
        "version": str(version),
        "data": [{"title": "a", "paragraphs": paragraphs[at : at + 2]} for at in range(0, len(rows), 2)],
    }


@pytest.mark.parametrize("version", [1, 2])
def test_squads_own_files_are_read(rows, tmp_path, version):
    found = [json.loads(line) for line in rows.read_text().splitlines()]
    found = [row for row in found if version == 2 or row["answers"]["text"]]
    (tmp_path / "flat.jsonl").write_text("\n".join(json.dumps(row) for row in found for _ in range(2)))
    (tmp_path / "squad.json").write_text(json.dumps(nested(found, version)))
    task = build_task("question-answering", pairing_tokenizer(), calibration=str(rows), **OPTIONS)
    assert task.questions(str(tmp_path / "squad.json")) == task.questions(str(tmp_path / "flat.jsonl"))
    whole = build_task("question-answering", pairing_tokenizer(), calibration=str(tmp_path / "squad.json"), **OPTIONS)
    assert len(whole.training_rows) + len(whole.asked) == 2 * len(found)


def test_mistakes_in_squads_own_files_are_told_where_they_stand(rows, tmp_path):
    def refused(change, said):
        content = nested([json.loads(line) for line in rows.read_text().splitlines()], 1)
        change(content["data"][1])
        (tmp_path / "squad.json").write_text(json.dumps(content))
        with pytest.raises(InvalidInput, match=said):
            build_task("question-answering", pairing_tokenizer(), calibration=str(tmp_path / "squad.json"), **OPTIONS)

    (tmp_path / "empty.json").write_text('{"data": [{"paragraphs": []}]}')
    with pytest.raises(InvalidInput, match=r"empty\.json holds no questions"):
        build_task("question-answering", pairing_tokenizer(), calibration=str(tmp_path / "empty.json"), **OPTIONS)
    refused(lambda article: article.update(paragraphs=3), "row 2: 'paragraphs' is 3; expected a list of objects")
    refused(lambda article: article["paragraphs"][1].pop("qas"), "row 2, paragraphs 2: no 'qas', only context")
    refused(lambda article: article["paragraphs"][0].update(qas=["a"]), "row 2, paragraphs 1, qas 1: 'a' is no object")
    refused(
        lambda article: article["paragraphs"][0]["qas"][1].pop("answers"), "row 2, paragraphs 1, qas 2: no 'answers', only question"
    )
    refused(
        lambda article: article["paragraphs"][0]["qas"][1].update(answers=[{"text": "a"}]),
        "paragraphs 1, qas 2: .*as many texts as",
    )


def test_a_model_that_gives_no_numbers_is_wrong_everywhere(rows, tmp_path):
    """Also where the right answer is that there is none, which is what NaN would look like."""
    drawn = random.Random(1)
    (tmp_path / "test.jsonl").write_text("\n".join(json.dumps(made(number, drawn)) for number in range(20)))
    task = build_task(
        "question-answering", pairing_tokenizer(), calibration=str(rows), test=str(tmp_path / "test.jsonl"), **OPTIONS
    )
    assert any(not one.answers for one in task.asked)
    model = pointer()
    torch.nn.init.constant_(model.qa_outputs.weight, float("nan"))
    assert task.evaluate(model) == {"f1": 0.0, "exact_match": 0.0}


def test_words_are_compared_as_squad_compares_them():
    assert scores_of("The Eiffel Tower.", ["eiffel tower"]) == (1.0, 1.0)
    assert scores_of("Paris, France", ["Lyon", "Paris"]) == (0.0, pytest.approx(2 / 3))
    assert scores_of("", []) == (1.0, 1.0)
    assert scores_of("Paris", []) == (0.0, 0.0)
    assert scores_of("", ["Paris"]) == (0.0, 0.0)


def test_a_model_goes_the_whole_way_on_it(rows, tmp_path):
    task, dense = build_task("question-answering", pairing_tokenizer(), calibration=str(rows), **OPTIONS), pointer()
    model = copy.deepcopy(dense)
    scores = hp.score(model, task.calibration, ["fisher", "entropy"], loss_fn=task.loss)["fisher"]
    found = hp.search_plan(model, scores, hp.Budget(heads=0.5), task.calibration, trials=2, forward=task.readout)
    hp.prune(model, found.plan, task.calibration, forward=task.forward)
    hp.recover(model, task.training(), loss_fn=task.loss, steps=2)
    hp.save(model, tmp_path / "pruned", tokenizer=task.tokenizer)
    loaded = hp.load(tmp_path / "pruned")
    torch.testing.assert_close(task.outputs(loaded), task.outputs(model))
    compared = hp.evaluate(loaded, task, repeats=1)
    assert compared.quality == task.evaluate(model)
    assert compared.test_examples == 6


def test_mistakes_are_told(rows, tmp_path):
    tokenizer = pairing_tokenizer()
    for answers, said in (
        ("paris", "is 'paris'; expected as many texts as beginnings"), ({"text": ["b"], "answer_start": []}, "as many texts"),
        ({"text": ["b"], "answer_start": [1.0]}, "as many texts as beginnings .whole numbers."),
        ({"text": [7], "answer_start": [1]}, "as many texts"),
        ({"text": ["x"], "answer_start": [0]}, "'x' does not stand in the context at character 0"),
    ):  # fmt: skip
        row = {"question": "what", "context": "abc", "answers": answers}
        (tmp_path / "wrong.jsonl").write_text(json.dumps(row) + "\n" + json.dumps(row))
        with pytest.raises(InvalidInput, match=f"row 1: .*{said}"):
            build_task("question-answering", tokenizer, calibration=str(tmp_path / "wrong.jsonl"))
    with pytest.raises(
        InvalidInput, match=r"the question '(what|who is)' has . tokens, windows share stride=20; expected fewer than max_tokens=26"
    ):
        build_task("question-answering", tokenizer, calibration=str(rows), max_tokens=26, stride=20)
    without = pairing_tokenizer()
    without.pad_token = None
    with pytest.raises(InvalidInput, match=r"task question-answering puts .* the tokenizer has no padding token"):
        build_task("question-answering", without, calibration=str(rows), **OPTIONS)
    task = build_task("question-answering", tokenizer, calibration=str(rows), **OPTIONS)
    with pytest.raises(InvalidInput, match="needs a model with such a head; BertModel has none"):
        task.check_model(bert())
    model = pointer()
    model.config.max_position_embeddings = 12
    with pytest.raises(InvalidInput, match="takes at most 12; give max_tokens=12"):
        task.check_model(model)
    (tmp_path / "long.jsonl").write_text(
        json.dumps(made(1, random.Random(0)) | {"context": "a" * 50, "answers": {"text": [], "answer_start": []}})
    )
    options = {**OPTIONS, "max_tokens": 60}
    task = build_task("question-answering", tokenizer, calibration=str(rows), training=str(tmp_path / "long.jsonl"), **options)
    model.config.max_position_embeddings = 50
    with pytest.raises(InvalidInput, match="takes at most 50; give max_tokens=50"):
        task.check_model(model)
    model.save_pretrained(tmp_path / "bert")
    with pytest.raises(InvalidInput, match="name yours, for example question-answering,"):
        default_task(str(tmp_path / "bert"))
