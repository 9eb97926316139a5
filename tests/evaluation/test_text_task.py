"""Your own text as a task."""

import copy
import random

import pytest
import torch
from letter_tokenizer import LETTERS, letter_tokenizer
from tiny_models import bert, llama

import headprune as hp
from headprune.errors import InvalidInput
from headprune.evaluation import compare
from headprune.evaluation.tasks import build_task, named_task


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "own.txt"
    path.write_text("".join(random.Random(0).choices(LETTERS, k=1500)))
    return path


def rows_of(batches) -> set[tuple[int, ...]]:
    return {tuple(row) for batch in batches for row in batch["input_ids"].tolist()}


def test_one_file_is_calibration_and_its_last_tenth_is_test(text):
    task = build_task("text", letter_tokenizer(), calibration=str(text), window=15, batch=4, calibration_windows=20)
    stream = torch.cat([torch.tensor([1]), torch.tensor([LETTERS.index(letter) + 2 for letter in text.read_text()])])
    tail = stream[len(stream) - 150 :]
    assert {tuple(row) for row in task.test.tolist()} == {tuple(row) for row in tail.view(-1, 15).tolist()}
    front = {tuple(row) for row in stream[: 15 * 90].view(-1, 15).tolist()}
    assert rows_of(task.calibration) <= front
    assert len(rows_of(task.calibration)) == 20
    assert rows_of(task.training()) == front
    other = build_task("text", letter_tokenizer(), calibration=str(text), window=15, calibration_windows=20, seed=1)
    assert rows_of(other.calibration) != rows_of(task.calibration)
    assert torch.equal(other.test, task.test)


def test_windows_begin_as_the_tokenizer_begins_texts(text):
    """Gemma is lost without it (perplexities of thousands), and its heads were scored so."""
    options = {"calibration": str(text), "window": 15, "calibration_windows": 20}
    plain, begun = (build_task("text", letter_tokenizer(begin), **options) for begin in (False, True))
    for rows in (*begun.calibration, {"input_ids": begun.test}, *begun.training()):
        assert rows["input_ids"].shape[1] == 15
        assert (rows["input_ids"] == 29).sum(dim=1).tolist() == [1] * len(rows["input_ids"])
        assert (rows["input_ids"][:, 0] == 29).all()
    assert torch.equal(begun.stream, plain.stream)
    assert len(begun.test) == 150 // 14
    library = build_task("standard-library-text", letter_tokenizer(begin=True), window=16, calibration_windows=3, test_windows=2)
    assert all((rows["input_ids"][:, 0] == 29).all() for rows in (*library.calibration, {"input_ids": library.test}))


def test_test_and_training_come_from_files_of_their_own(text, tmp_path):
    (tmp_path / "rows.csv").write_text("words\nabc abc abc abc\nxyz xyz xyz xyz\n")
    options = {"test": str(tmp_path / "rows.csv"), "column": "words", "window": 8}
    (tmp_path / "more.txt").write_text("a" * 100)
    task = build_task("text", letter_tokenizer(), calibration=str(text), training=str(tmp_path / "more.txt"), **options)
    spoken = letter_tokenizer().decode(task.test.sort(dim=0).values[0]).replace(" ", "")
    assert set(spoken) <= set("abcxyz</s>")
    assert {token for row in rows_of(task.training()) for token in row} == {1, 2}


def test_rows_are_documents_or_lines_of_one_text(tmp_path):
    (tmp_path / "rows.jsonl").write_text('{"text": "ab ab ab "}\n{"text": ""}\n{"text": " cd cd cd"}\n')
    options = {"calibration": str(tmp_path / "rows.jsonl"), "test": str(tmp_path / "rows.txt"), "window": 3}
    (tmp_path / "rows.txt").write_text("abcdef")
    documents = build_task("text", letter_tokenizer(), **options)
    assert len(documents.stream) == 2 * 10
    assert (documents.stream == 1).sum() == 2
    lines = build_task("text", letter_tokenizer(), rows="lines", **options)
    assert lines.stream.tolist() == [1, *letter_tokenizer()("ab ab ab \n\n\n\n cd cd cd")["input_ids"]]
    with pytest.raises(InvalidInput, match="rows=words; expected documents, or lines"):
        build_task("text", letter_tokenizer(), rows="words", **options)


GPU = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=GPU)])
def test_a_model_goes_the_whole_way_on_it(text, device, tmp_path):
    task = build_task("text", letter_tokenizer(), calibration=str(text), window=32, batch=4)
    dense = llama().to(device)
    task.check_model(dense)
    model = copy.deepcopy(dense)
    scores = hp.score(model, task.calibration, ["fisher", "entropy", "wanda"], loss_fn=task.loss)["fisher"]
    found = hp.search_plan(model, scores, hp.Budget(heads=0.5), task.calibration, trials=2, forward=task.readout)
    hp.prune(model, found.plan, task.calibration, forward=task.forward, feed_forward=True)
    assert sum(site.head_map.query_heads for site in hp.attention_sites(model)) == 8
    hp.recover(model, task.training(), loss_fn=task.loss, teacher=dense, steps=2)
    hp.save(model, tmp_path / "pruned", tokenizer=task.tokenizer)
    loaded = hp.load(tmp_path / "pruned").to(device)
    torch.testing.assert_close(task.outputs(loaded), task.outputs(model))
    compared = compare(dense, loaded, task, repeats=1)
    assert compared.pruned.quality["perplexity"] == pytest.approx(task.evaluate(model)["perplexity"], rel=1e-5)


def test_a_text_to_train_on_is_refused_where_it_is_none(text, tmp_path):
    options = {"calibration": str(text), "window": 32}
    (tmp_path / "short.txt").write_text("abc")
    task = build_task("text", letter_tokenizer(), training=str(tmp_path / "short.txt"), **options)
    with pytest.raises(InvalidInput, match=r"short\.txt has 4 tokens; expected at least one window of 32"):
        task.training()
    with pytest.raises(InvalidInput, match=r"none\.txt does not exist"):
        build_task("text", letter_tokenizer(), training=str(tmp_path / "none.txt"), **options)


def test_mistakes_are_told(text):
    tokenizer = letter_tokenizer()
    with pytest.raises(InvalidInput, match="calibration has 1351 tokens and test 150; expected at least one window of 512 each"):
        build_task("text", tokenizer, calibration=str(text))
    with pytest.raises(InvalidInput, match="missing a required argument: 'calibration'; it takes calibration, test, training"):
        build_task("text", tokenizer)
    with pytest.raises(InvalidInput, match=r"unexpected keyword argument 'windows'; it takes .*window"):
        build_task("text", tokenizer, calibration=str(text), windows=4)
    with pytest.raises(InvalidInput, match="window is 'many'; expected a whole number"):
        build_task("text", tokenizer, calibration=str(text), window="many")
    with pytest.raises(InvalidInput, match=r"window=1, batch=4: expected at least 2 tokens"):
        build_task("text", tokenizer, calibration=str(text), window=1)
    with pytest.raises(InvalidInput, match="BertModel"):
        build_task("text", tokenizer, calibration=str(text), window=15).check_model(bert())


def test_the_command_line_names_tasks_with_options():
    assert named_task("text") == ("text", {})
    found = named_task("text,calibration=own.txt,window=32,test=null")
    assert found == ("text", {"calibration": "own.txt", "window": 32, "test": None})
    assert named_task("text-to-text,prefix=summarize: ") == ("text-to-text", {"prefix": "summarize: "})
    with pytest.raises(InvalidInput, match=r"'own\.txt' is no option; expected text,option=value"):
        named_task("text,own.txt")
    with pytest.raises(InvalidInput, match="is not a YAML value"):
        named_task("text,window=[1")
    with pytest.raises(InvalidInput, match="window is given twice"):
        named_task("text,window=3,calibration=own.txt,window=4")
    with pytest.raises(InvalidInput, match="unknown task 'texts'"):
        named_task("texts,window=3")
