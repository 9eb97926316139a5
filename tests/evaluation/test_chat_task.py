"""Your own conversations as a task."""

import copy
import json
import logging
import random

import pytest
import torch
import torch.nn.functional as F
from letter_tokenizer import LETTERS, letter_tokenizer
from tiny_models import bert, llama

import headprune as hp
from headprune.errors import InvalidInput
from headprune.evaluation.tasks import build_task

# z before what a user says, y before an answer, x behind both.
TEMPLATE = (
    "{% for turn in messages %}{{ ('y' if turn.role == 'assistant' else 'z') + turn.content }}x{% endfor %}"
    "{% if add_generation_prompt %}y{% endif %}"
)


def chat_tokenizer(template: str | None = TEMPLATE):
    found = letter_tokenizer()
    found.chat_template = template
    return found


def turns(*said: str) -> list[dict[str, str]]:
    return [{"role": ("user", "assistant")[number % 2], "content": words} for number, words in enumerate(said)]


@pytest.fixture
def rows(tmp_path):
    drawn = random.Random(0)
    words = lambda: "".join(drawn.choices("abcdefgh", k=drawn.randint(2, 9)))  # noqa: E731
    found = [{"messages": turns(*(words() for _ in range(2 + number % 4))), "q": words(), "a": words()} for number in range(40)]
    path = tmp_path / "chats.jsonl"
    path.write_text("\n".join(map(json.dumps, found)))
    return path


def text_of(tokens) -> str:
    return "".join(LETTERS[token - 2] if token >= 2 else "." for token in tokens)


def asked(batches) -> set[tuple[str, str]]:
    """(what stands before the answer, the answer), as text."""
    found = set()
    for batch in batches:
        for ids, mask, labels in zip(*(batch[name].tolist() for name in ("input_ids", "attention_mask", "labels"))):
            length, start = sum(mask), next(place for place, label in enumerate(labels) if label != -100)
            assert labels[start:length] == ids[start:length]
            assert all(label == -100 for label in labels[length:])
            found.add((text_of(ids[:start]), text_of(ids[start:length])))
    return found


def test_the_last_answer_is_asked_for(rows):
    task = build_task("chat", chat_tokenizer(), calibration=str(rows), batch=3, calibration_rows=10)
    expected = set()
    for row in map(json.loads, rows.read_text().splitlines()):
        said = [turn["content"] for turn in row["messages"]][: len(row["messages"]) // 2 * 2]
        before = "".join("zy"[number % 2] + words + "x" for number, words in enumerate(said[:-1])) + "y"
        expected.add((before, said[-1] + "x"))
    assert len(asked(task.calibration)) == 10
    assert asked(task.calibration) <= asked(task.training())
    assert asked(task.training()) | asked(task.test) == expected
    assert len(asked(task.test)) == 4
    before, _ = min(asked(task.test[:1]), key=lambda pair: task.prompt()["input_ids"].shape[1] != len(pair[0]))
    assert text_of(task.prompt()["input_ids"][0].tolist()) == before


@pytest.mark.parametrize("template", [TEMPLATE, None])
def test_prompts_and_answers_may_stand_in_columns(rows, template):
    task = build_task("chat", chat_tokenizer(template), calibration=str(rows), prompt="q", answer="a")
    expected = {(row["q"], row["a"]) for row in map(json.loads, rows.read_text().splitlines())}
    written = {(f"z{q}xy", f"{a}x") if template else (q, f"{a}.") for q, a in expected}
    assert asked(task.training()) | asked(task.test) == written


def kept_in(path, rows: list) -> str:
    path.write_text("\n".join(map(json.dumps, rows)))
    return str(path)


def shared(messages: list) -> list:
    return [{"from": {"user": "human", "assistant": "gpt"}[turn["role"]], "value": turn["content"]} for turn in messages]


OTHER_FORMS = [
    lambda messages: {"conversations": shared(messages)},
    lambda messages: {"conversations": messages},
    lambda messages: {"messages": shared(messages), "prompt": "a", "completion": "b"},
    lambda messages: {"prompt": messages[:-1], "completion": messages[-1:]},
]


@pytest.mark.parametrize("form", OTHER_FORMS)
def test_conversations_in_other_forms_are_the_same_data(rows, tmp_path, form):
    """ShareGPT's turns and TRL's prompts of several turns."""
    own = build_task("chat", chat_tokenizer(), calibration=str(rows))
    found = kept_in(tmp_path / "other.jsonl", [form(row["messages"]) for row in map(json.loads, rows.read_text().splitlines())])
    other = build_task("chat", chat_tokenizer(), calibration=found)
    assert asked(other.calibration) == asked(own.calibration)
    assert asked(other.test) == asked(own.test)


@pytest.mark.parametrize("template", [TEMPLATE, None])
def test_instructions_and_prompts_are_found_by_their_names(tmp_path, template):
    """Alpaca's input, where there is one, stands behind the instruction."""
    alpaca = [{"instruction": "ab", "input": "cd", "output": "e"}, {"instruction": "f", "input": "", "output": "g"},
              {"instruction": "h", "output": "a"}, {"instruction": "b", "input": None, "output": "c"}]  # fmt: skip
    pairs = [("ab\n\ncd", "e"), ("f", "g"), ("h", "a"), ("b", "c")]
    for content, options, expected in (
        (alpaca, {}, pairs), ([{"prompt": q, "completion": a} for q, a in pairs], {}, pairs),
        (alpaca, {"prompt": "instruction", "answer": "output"}, [(row["instruction"], row["output"]) for row in alpaca]),
    ):  # fmt: skip
        task = build_task("chat", chat_tokenizer(template), calibration=kept_in(tmp_path / "rows.jsonl", content), **options)
        written = {(f"z{q}xy", f"{a}x") if template else (q, f"{a}.") for q, a in expected}
        shown = {(before.replace("\n\n", ".."), answer) for before, answer in written}
        assert asked(task.training()) | asked(task.test) == shown


def test_perplexity_is_of_the_answers(rows):
    task, model = build_task("chat", chat_tokenizer(), calibration=str(rows), batch=4), llama()
    task.check_model(model)
    losses, hits = [], []
    for batch in task.test:
        found = task.loss(model, batch).detach()
        for row in range(len(found)):
            length = int(batch["attention_mask"][row].sum())
            with torch.no_grad():
                logits = model(batch["input_ids"][row : row + 1, :length]).logits[0, :-1].double()
            labels = batch["labels"][row, 1:length]
            each = F.cross_entropy(logits, labels, reduction="none", ignore_index=-100)[labels != -100]
            assert float(found[row]) == pytest.approx(float(each.mean()), rel=1e-4)
            losses.append(each)
            hits.append((logits.argmax(dim=-1) == labels)[labels != -100])
    quality = task.evaluate(model)
    assert quality["perplexity"] == pytest.approx(float(torch.cat(losses).mean().exp()), rel=1e-4)
    assert quality["accuracy"] == pytest.approx(float(torch.cat(hits).double().mean()))


def test_a_model_goes_the_whole_way_on_it(rows, tmp_path):
    task, dense = build_task("chat", chat_tokenizer(), calibration=str(rows), batch=4), llama()
    model = copy.deepcopy(dense)
    scores = hp.score(model, task.calibration, ["fisher", "entropy"], loss_fn=task.loss)["fisher"]
    hp.prune(model, hp.plan(scores, hp.Budget(heads=0.5)), task.calibration, forward=task.forward)
    hp.recover(model, task.training(), loss_fn=task.loss, teacher=dense, steps=2)
    hp.save(model, tmp_path / "pruned", tokenizer=task.tokenizer)
    loaded = hp.load(tmp_path / "pruned")
    torch.testing.assert_close(task.outputs(loaded), task.outputs(model))
    compared = hp.evaluate(loaded, task, repeats=1)
    assert compared.quality["perplexity"] == pytest.approx(task.evaluate(model)["perplexity"], rel=1e-5)


def test_answers_behind_the_last_token_are_left_out(rows, caplog):
    with caplog.at_level(logging.WARNING, logger="headprune"):
        task = build_task("chat", chat_tokenizer(), calibration=str(rows), max_tokens=16)
    assert "conversations left out: their last answer begins behind max_tokens=16" in caplog.text
    assert max(batch["input_ids"].shape[1] for batch in task.calibration) <= 16
    assert all((batch["labels"] != -100).any(dim=1).all() for batch in (*task.calibration, *task.test))
    with pytest.raises(InvalidInput, match="begins within max_tokens=3; give more"):
        build_task("chat", chat_tokenizer(), calibration=str(rows), max_tokens=3)


def test_what_a_model_is_trained_on_may_not_be_longer_than_it_takes_either(rows, tmp_path):
    (tmp_path / "long.jsonl").write_text(json.dumps({"messages": turns("a" * 40, "b")}))
    task = build_task("chat", chat_tokenizer(), calibration=str(rows), training=str(tmp_path / "long.jsonl"))
    model = llama()
    model.config.max_position_embeddings = 40
    with pytest.raises(InvalidInput, match="takes at most 40; give max_tokens=40"):
        task.check_model(model)
    task = build_task("chat", chat_tokenizer(), calibration=str(rows), training=str(tmp_path / "long.jsonl"), max_tokens=40)
    with pytest.raises(InvalidInput, match="no answer of the training data begins within max_tokens=40"):
        task.training()


def test_mistakes_are_told(rows, tmp_path):
    tokenizer, options = chat_tokenizer(), {"calibration": str(rows)}
    with pytest.raises(InvalidInput, match="has no chat template"):
        build_task("chat", chat_tokenizer(None), **options)
    for form in OTHER_FORMS:
        wrong = kept_in(tmp_path / "other.jsonl", [form(turns("a", "b"))] * 2)
        with pytest.raises(InvalidInput, match=r"has no chat template to write (messages|conversations|prompt) with"):
            build_task("chat", chat_tokenizer(None), calibration=wrong)
    wrong = kept_in(tmp_path / "other.jsonl", [{"prompt": "a", "completion": turns("b")}] * 2)
    with pytest.raises(InvalidInput, match=r"row 1: \['a', \[.* is no list of turns"):
        build_task("chat", tokenizer, calibration=wrong)
    wrong = kept_in(tmp_path / "other.jsonl", [{"question": "a", "reply": "b"}] * 2)
    with pytest.raises(InvalidInput, match="row 1: no 'messages', only question, reply"):
        build_task("chat", tokenizer, calibration=wrong)
    with pytest.raises(InvalidInput, match="expected both columns, or neither"):
        build_task("chat", tokenizer, **options, prompt="q")
    with pytest.raises(InvalidInput, match="row 1: no 'turns', only messages, q, a"):
        build_task("chat", tokenizer, **options, messages="turns")
    with pytest.raises(InvalidInput, match="does not begin with what the model is asked"):
        build_task(
            "chat", chat_tokenizer("{% for turn in messages %}{{ loop.revindex0 * 'z' + turn.content }}{% endfor %}"), **options
        )
    refusing = chat_tokenizer("{% if messages[0].role != 'system' %}{{ raise_exception('no system here') }}{% endif %}")
    with pytest.raises(InvalidInput, match=r"refuses the conversation \[\{'role': 'user', .*no system here\. Write it as"):
        build_task("chat", refusing, **options)
    for messages, said in (("hello", "'hello' is no list of turns"), ([{"role": "user"}], "is no list of turns"),
                           (turns("a"), "no turn after the first has the role 'assistant'"), ([], "no turn after")):  # fmt: skip
        (tmp_path / "wrong.jsonl").write_text("\n".join(json.dumps({"messages": said}) for said in (turns("a", "b"), messages)))
        with pytest.raises(InvalidInput, match=f"row 2: .*{said}"):
            build_task("chat", tokenizer, calibration=str(tmp_path / "wrong.jsonl"))
    task = build_task("chat", tokenizer, **options)
    with pytest.raises(InvalidInput, match="task chat needs a causal language model; BertModel is none"):
        task.check_model(bert())
    model = llama()
    model.config.max_position_embeddings = 8
    with pytest.raises(InvalidInput, match="tokens, and LlamaForCausalLM takes at most 8; give max_tokens=8"):
        task.check_model(model)
