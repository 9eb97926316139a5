"""Your own texts and images as tasks."""

import json

import pytest
import torch
import torch.nn.functional as F
from letter_tokenizer import letter_tokenizer
from PIL import Image
from tiny_encoders import VISION
from tiny_models import bert
from transformers import AutoImageProcessor, BertConfig, BertForSequenceClassification, Wav2Vec2FeatureExtractor

import headprune as hp
from headprune.errors import InvalidInput
from headprune.evaluation.tasks import build_task
from headprune.sources import default_task, tokenizer_of


def classifier(**options) -> BertForSequenceClassification:
    torch.manual_seed(0)
    config = BertConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, vocab_size=61, initializer_range=0.2,
        hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, **options,
    )  # fmt: skip
    return BertForSequenceClassification(config).eval()


def tokenizer():
    found = letter_tokenizer()
    found.pad_token = "[UNK]"
    return found


@pytest.fixture
def rows(tmp_path):
    words = [f"{'abcdefgh'[number % 8]}{'xyz'[number % 3]} tail" for number in range(40)]
    path = tmp_path / "rows.jsonl"
    rows = [{"text": word, "label": ("no", "yes")[number % 2], "number": number % 2} for number, word in enumerate(words)]
    path.write_text("\n".join(map(json.dumps, rows)))
    return path


@pytest.mark.parametrize(
    ("known", "settled"),
    [
        ({"ENTAILMENT": 2, "NEUTRAL": 1, "CONTRADICTION": 0}, {"0": 2, "1": 1, "2": 0}),
        ({"LABEL_0": 0, "LABEL_1": 1, "LABEL_2": 2}, {"0": 0, "1": 1, "2": 2}),
        ({"yes": 0, "maybe": 1, "contradiction": 2}, {"0": 0, "1": 1, "2": 2}),
    ],
)
def test_numbers_with_names_in_the_data_are_those_of_the_models_names(known, settled, tmp_path):
    """MNLI counts from entailment, most models of it from contradiction."""
    datasets = pytest.importorskip("datasets")
    names = ["entailment", "neutral", "contradiction"]
    features = datasets.Features({"text": datasets.Value("string"), "label": datasets.ClassLabel(names=names)})
    rows = {"text": [f"{letter} tail" for letter in "abcdefghijkl" * 3], "label": [number % 3 for number in range(36)]}
    datasets.Dataset.from_dict(rows, features=features).to_parquet(tmp_path / "rows.parquet")
    task = build_task("text-classification", tokenizer(), calibration=str(tmp_path / "rows.parquet"))
    task.check_model(classifier(num_labels=3, label2id=known, id2label={number: name for name, number in known.items()}))
    assert task.numbers == settled


def test_names_of_classes_are_the_models_numbers(rows):
    task = build_task("text-classification", tokenizer(), calibration=str(rows), batch=8)
    model = classifier(id2label={0: "yes", 1: "no"}, label2id={"yes": 0, "no": 1})
    task.check_model(model)
    truth = {row["text"]: int(row["label"] == "no") for row in map(json.loads, rows.read_text().splitlines())}
    for batch in (*task.calibration, *task.test, *task.training()):
        words = [text.replace(" ", "") for text in task.tokenizer.batch_decode(batch["input_ids"], skip_special_tokens=True)]
        expected = [truth[next(text for text in truth if text.replace(" ", "") == word)] for word in words]
        assert batch["labels"].tolist() == expected
    assert sum(len(batch["labels"]) for batch in task.test) == 4
    assert sum(len(batch["labels"]) for batch in task.training()) == 36
    with pytest.raises(InvalidInput, match="other numbers of classes"):
        task.check_model(classifier(id2label={0: "no", 1: "yes"}, label2id={"no": 0, "yes": 1}))


def test_numbers_count_as_they_are_and_names_in_their_order_where_the_model_has_none(rows):
    for label in ("number", "label"):
        task = build_task("text-classification", tokenizer(), calibration=str(rows), label=label)
        task.check_model(classifier())
        assert task.numbers == ({"0": 0, "1": 1} if label == "number" else {"no": 0, "yes": 1})


def test_loss_and_quality_are_those_of_the_model(rows):
    (test := rows.with_name("test.jsonl")).write_text(rows.read_text())
    task = build_task("text-classification", tokenizer(), calibration=str(rows), test=str(test), text="text", pair="text", batch=8)
    model, batch = classifier(), task.calibration[1]
    with pytest.raises(InvalidInput, match="check_model"):
        task.loss(model, batch)
    task.check_model(model)
    with torch.no_grad():
        logits = [model(**{name: value for name, value in some.items() if name != "labels"}).logits for some in task.test]
        expected = F.cross_entropy(model(**{**batch, "labels": None}).logits, batch["labels"], reduction="none")
        assert torch.allclose(task.loss(model, batch), expected)
    labels = torch.cat([some["labels"] for some in task.test])
    assert task.evaluate(model)["accuracy"] == pytest.approx(float((torch.cat(logits).argmax(dim=1) == labels).double().mean()))
    plan = hp.plan(hp.score(model, task.calibration, "fisher", loss_fn=task.loss), hp.Budget(heads=0.5))
    hp.prune(model, plan, task.calibration, forward=task.forward)
    assert sum(site.head_map.query_heads for site in hp.attention_sites(model)) == 4


def test_labels_that_the_model_does_not_have_are_refused(rows):
    task = build_task("text-classification", tokenizer(), calibration=str(rows))
    with pytest.raises(InvalidInput, match="the label 'no' is none of the model's classes, good, bad"):
        task.check_model(classifier(id2label={0: "good", 1: "bad"}, label2id={"good": 0, "bad": 1}))
    with pytest.raises(InvalidInput, match="needs a model with a classification head; BertModel has none"):
        task.check_model(bert())
    rows.write_text(rows.read_text().replace('"number": 1', '"number": 2'))
    with pytest.raises(InvalidInput, match="labels go up to 2, and the model has 2 classes"):
        build_task("text-classification", tokenizer(), calibration=str(rows), label="number").check_model(classifier())
    rows.write_text(rows.read_text().replace('"number": 0', '"number": "nought"'))
    task = build_task("text-classification", tokenizer(), calibration=str(rows), label="number")
    with pytest.raises(InvalidInput, match="the label 'nought' is none of the model's classes, good, bad"):
        task.check_model(classifier(id2label={0: "good", 1: "bad"}, label2id={"good": 0, "bad": 1}))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_labels": 1}, "this BertForSequenceClassification gives one number"),
        ({"num_labels": 3, "problem_type": "multi_label_classification"}, "tells several at once"),
        ({"num_labels": 3}, r"the data has 2 labels \(no, yes\), .* has 3 classes without names\. Name them in config\.label2id"),
        ({"max_position_embeddings": 4}, "a text has 7 tokens, and .* takes at most 4; give max_tokens=4"),
    ],
)
def test_models_that_do_not_fit_the_labels_or_texts_are_told(rows, options, message):
    with pytest.raises(InvalidInput, match=message):
        build_task("text-classification", tokenizer(), calibration=str(rows)).check_model(classifier(**options))


def test_a_text_to_train_on_that_is_too_long_is_told(rows, tmp_path):
    (tmp_path / "long.jsonl").write_text(json.dumps({"text": "a" * 30, "label": "no"}))
    task = build_task("text-classification", tokenizer(), calibration=str(rows), training=str(tmp_path / "long.jsonl"))
    with pytest.raises(InvalidInput, match=r"a text has 30 tokens, and .* takes at most 20; give max_tokens=20"):
        task.check_model(classifier(max_position_embeddings=20))


def test_whole_numbers_may_be_written_with_a_point_and_a_guess_is_said(rows, caplog):
    rows.write_text(rows.read_text().replace('"number": 1', '"number": 1.0').replace('"number": 0', '"number": 0.0'))
    task = build_task("text-classification", tokenizer(), calibration=str(rows), label="number")
    task.check_model(classifier())
    assert task.numbers == {"0.0": 0, "1.0": 1}
    assert not caplog.records
    build_task("text-classification", tokenizer(), calibration=str(rows)).check_model(classifier())
    assert "labels are taken in alphabetical order: no = 0, yes = 1" in caplog.text


@pytest.fixture
def images(tmp_path):
    for number in range(30):
        folder = tmp_path / "images" / f"class{number % 5}"
        folder.mkdir(parents=True, exist_ok=True)
        Image.new("L" if number % 2 else "RGB", (20 + number, 18), number * 8).save(folder / f"{number}.png")
    return tmp_path / "images"


def test_a_folder_of_images_is_a_task(images, tmp_path):
    model = VISION["vit"].make()
    model.save_pretrained(tmp_path / "vit")
    (tmp_path / "vit" / "preprocessor_config.json").write_text(
        json.dumps({"image_processor_type": "ViTImageProcessor", "size": {"height": 16, "width": 16}})
    )
    processor = tokenizer_of(tmp_path / "vit")
    task = build_task("image-classification", processor, calibration=str(images), batch=4, calibration_images=10)
    task.check_model(model)
    assert [batch["pixel_values"].shape for batch in task.calibration] == [(4, 3, 16, 16), (4, 3, 16, 16), (2, 3, 16, 16)]
    grey = {}  # of an image, in steps of 8: its number
    for batch in task.test:
        for pixels, label in zip(batch["pixel_values"], batch["labels"]):
            grey[round(float(pixels[0, 0, 0] * 0.5 + 0.5) * 255 / 8)] = int(label)
    assert len(grey) == 3
    assert all(number % 5 == label for number, label in grey.items())
    plan = hp.plan(hp.score(model, task.calibration, "fisher", loss_fn=task.loss), hp.Budget(heads=0.5))
    hp.prune(model, plan, task.calibration, forward=task.forward)
    hp.save(model, tmp_path / "pruned", tokenizer=task.tokenizer)
    assert AutoImageProcessor.from_pretrained(tmp_path / "pruned").size == processor.size
    assert 0 <= task.evaluate(hp.load(tmp_path / "pruned"))["accuracy"] <= 1


def test_folders_without_images_and_broken_images_are_named(images, tmp_path):
    (tmp_path / "none").mkdir()
    with pytest.raises(InvalidInput, match=r"none holds no FOLDER/IMAGE"):
        build_task("image-classification", object(), calibration=str(tmp_path / "none"))
    for path in images.glob("class1/*"):
        path.write_text("no image")
    with pytest.raises(InvalidInput, match=r"class1/\d+\.png cannot be read as an image"):
        build_task("image-classification", object(), calibration=str(images))


def test_what_a_model_of_another_kind_came_with_is_told(images, rows, tmp_path):
    processor = AutoImageProcessor.from_pretrained(image_processor(tmp_path))
    with pytest.raises(InvalidInput, match="image-classification is for models of images and needs an image processor"):
        build_task("image-classification", tokenizer(), calibration=str(images))
    for made in (processor, Wav2Vec2FeatureExtractor()):
        with pytest.raises(InvalidInput, match="is for models of text and needs a tokenizer; this model came with"):
            build_task("text-classification", made, calibration=str(rows))
    with pytest.raises(InvalidInput, match="needs an image processor, and the model folder has none"):
        build_task("image-classification", None, calibration=str(images))


def test_a_folder_with_both_gives_what_the_model_reads(tmp_path):
    tokenizer().save_pretrained(image_processor(tmp_path))
    assert "ImageProcessor" in type(tokenizer_of(tmp_path, images=True)).__name__
    assert tokenizer_of(tmp_path).is_fast
    (tmp_path / "sound").mkdir()
    Wav2Vec2FeatureExtractor().save_pretrained(tmp_path / "sound")
    assert isinstance(tokenizer_of(tmp_path / "sound"), Wav2Vec2FeatureExtractor)


def image_processor(folder):
    content = {"image_processor_type": "ViTImageProcessor", "size": {"height": 16, "width": 16}}
    (folder / "preprocessor_config.json").write_text(json.dumps(content))
    return folder


def test_models_that_no_task_of_ours_fits_are_told_which_to_name(tmp_path):
    VISION["vit"].make().save_pretrained(tmp_path / "vit")
    classifier().save_pretrained(tmp_path / "bert")
    with pytest.raises(InvalidInput, match=r"image-classification,calibration=FOLDER"):
        default_task(str(tmp_path / "vit"))
    with pytest.raises(InvalidInput, match=r"text-classification,calibration=train\.jsonl"):
        default_task(str(tmp_path / "bert"))
