import pytest
import torch
from tiny_models import VOCABULARY, padded, tokens
from transformers import BertConfig, BertForSequenceClassification, ViTConfig, ViTForImageClassification

from headprune.errors import InvalidInput
from headprune.evaluation import Classification, ImageClassification, Regression, evaluate


def classifier(labels: int):
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "initializer_range": 0.4}
    return BertForSequenceClassification(BertConfig(**sizes, vocab_size=VOCABULARY, num_labels=labels)).eval()


def vit():
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "initializer_range": 0.4}
    return ViTForImageClassification(ViTConfig(**sizes, image_size=16, patch_size=4, num_labels=7)).eval()


def inputs_of(batch):
    return {name: value for name, value in batch.items() if name != "labels"}


@pytest.fixture
def batches():
    torch.manual_seed(1)
    return [{"input_ids": tokens(5, 9, seed), "labels": torch.randint(3, (5,))} for seed in range(3)] + [
        {**padded(3, 9, "right"), "labels": torch.tensor([0, 1, 2])}
    ]


def test_accuracy_counts_every_example_once(batches):
    model = classifier(3)
    with torch.no_grad():
        predicted = [model(**inputs_of(batch)).logits.argmax(-1) for batch in batches]
    right = sum(int((found == batch["labels"]).sum()) for found, batch in zip(predicted, batches))
    found = Classification(batches, top=(2, 3)).evaluate(model)
    assert found["accuracy"] == pytest.approx(right / 18)
    assert found["accuracy"] <= found["accuracy@2"] <= found["accuracy@3"] == 1.0
    assert -1 <= found["matthews"] <= 1


def test_a_model_that_gives_nan_is_right_nowhere(batches):
    """Though the index of the highest of them is 0, which is a class."""
    model = classifier(3)
    torch.nn.init.constant_(model.classifier.bias, float("nan"))
    found = Classification([{**batch, "labels": torch.zeros_like(batch["labels"])} for batch in batches], top=(2,)).evaluate(model)
    assert found["accuracy"] == found["accuracy@2"] == found["f1"] == 0


def test_a_regression_head_is_correlated_with_its_labels(batches):
    model = classifier(1)
    numbers = [{**batch, "labels": batch["labels"].float()} for batch in batches]
    with torch.no_grad():
        outputs = torch.cat([model(**inputs_of(one)).logits[:, 0] for one in numbers])
    labels = torch.cat([one["labels"] for one in numbers])
    found = Regression(numbers).evaluate(model)
    assert found["pearson"] == pytest.approx(float(torch.corrcoef(torch.stack([outputs, labels]))[0, 1]), abs=1e-5)
    assert found["mse"] == pytest.approx(float((outputs - labels).square().mean()), rel=1e-5)


def test_images_are_classified_and_their_patches_counted():
    torch.manual_seed(2)
    batches = [{"pixel_values": torch.randn(4, 3, 16, 16), "labels": torch.randint(7, (4,))} for _ in range(2)]
    found = evaluate(vit(), ImageClassification(batches), repeats=1)
    assert found.sequence_length == 17
    assert found.quality["accuracy"] <= found.quality["accuracy@5"] <= 1
    assert found.generation_ms_per_token is None


def test_bad_batches_are_refused(batches):
    with pytest.raises(InvalidInput, match="at least one batch"):
        Classification([])
    with pytest.raises(InvalidInput, match="batch 0 has no 'labels', only input_ids"):
        Classification([{"input_ids": tokens()}])
    with pytest.raises(InvalidInput, match="the model has 2 classes"):
        Classification(batches).evaluate(classifier(2))
    with pytest.raises(InvalidInput, match="head with one output"):
        Regression(batches).evaluate(classifier(3))
    with pytest.raises(InvalidInput, match="without logits"):
        Classification(batches).evaluate(classifier(3).bert)
