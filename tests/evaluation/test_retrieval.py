import pytest
import torch
from tiny_models import bert

from headprune.errors import InvalidInput
from headprune.evaluation import Retrieval
from headprune.evaluation.retrieval import pooled, ranks


class Words:
    """Hashes words to tokens."""

    def __call__(self, texts, padding, truncation, max_length, return_tensors):
        rows = [[1 + sum(map(ord, word)) % 60 for word in text.split()][:max_length] for text in texts]
        width = max(map(len, rows))
        ids = torch.tensor([row + [0] * (width - len(row)) for row in rows])
        return {"input_ids": ids, "attention_mask": (ids > 0).long()}


DOCUMENTS = [
    f"{first} {second} {third}"
    for first in ("a red", "one", "that")
    for second in ("cat", "tall tree")
    for third in ("sat", "ran off")
]


def test_a_document_finds_itself_and_padding_does_not_matter():
    found = Retrieval(DOCUMENTS, DOCUMENTS, Words(), batch=5).evaluate(bert())
    assert found == {"mrr": 1.0, "accuracy@1": 1.0, "accuracy@10": 1.0}


def test_ranks_are_those_of_the_relevant_documents():
    model, relevant = bert(), [3, 3, 0]
    queries = ["a cat", "tall", "ran off one"]
    data = Retrieval(queries, DOCUMENTS, Words(), relevant=relevant)
    with torch.no_grad():
        embedded = {}
        for text in (*queries, *DOCUMENTS):
            states = model(**Words()([text], True, True, 99, "pt")).last_hidden_state.mean(dim=1)
            embedded[text] = states[0] / states.norm()
    reciprocal = []
    for query, own in zip(queries, relevant):
        order = sorted(range(len(DOCUMENTS)), key=lambda number: -float(embedded[query] @ embedded[DOCUMENTS[number]]))
        reciprocal.append(1 / (1 + order.index(own)))
    assert data.evaluate(model)["mrr"] == pytest.approx(sum(reciprocal) / 3)


def test_a_query_without_a_document_is_refused():
    for relevant in ([0, 12], [0]):
        with pytest.raises(InvalidInput, match="every query needs one document"):
            Retrieval(["a", "b"], DOCUMENTS, Words(), relevant=relevant)
    with pytest.raises(InvalidInput, match="0 queries"):
        Retrieval([], DOCUMENTS, Words())


def test_tokens_are_pooled_as_asked_whatever_side_is_padded():
    states = torch.arange(10.0).view(2, 5, 1)  # of each text the states are its first number and those after it
    mask = torch.tensor([[1, 1, 1, 0, 0], [0, 0, 0, 1, 1]])
    found = {pooling: pooled(states, mask, pooling).flatten().tolist() for pooling in ("mean", "cls", "first", "last")}
    assert found == {"mean": [1.0, 8.5], "cls": [0.0, 8.0], "first": [0.0, 8.0], "last": [2.0, 9.0]}


def test_a_query_that_gives_nan_ranks_its_document_last_and_one_of_equal_documents_does_not_lose_a_place():
    documents = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.0, 1.0]])
    queries = torch.tensor([[0.0, 1.0], [1.0, 0.5], [float("nan"), 0.0]])
    assert ranks(queries, documents, torch.tensor([1, 2, 0])).tolist() == [1, 2, 3]
