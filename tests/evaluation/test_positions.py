import pytest
from tiny_models import llama
from torch import nn
from transformers import BertConfig, BertModel, RobertaConfig, RobertaModel

from headprune.evaluation.positions import position_limit

SHAPE = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": 30}


@pytest.mark.parametrize(("config", "kind", "limit"), [(BertConfig, BertModel, 20), (RobertaConfig, RobertaModel, 18)])
def test_positions_are_counted_from_behind_that_of_padding_where_the_model_does(config, kind, limit):
    model = kind(config(**SHAPE, max_position_embeddings=20, pad_token_id=1))
    assert position_limit(model) == limit


def test_models_that_do_not_say_have_no_limit():
    assert position_limit(nn.Linear(2, 2)) is None
    assert position_limit(llama()) == llama().config.max_position_embeddings
