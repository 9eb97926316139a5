"""Small random models of each family; weights large enough that every head matters."""

import torch
from torch import nn
from transformers import BertConfig, BertModel, LlamaConfig, LlamaForCausalLM

VOCABULARY = 61


def llama(layers: int = 2, query_heads: int = 8, kv_heads: int = 4, seed: int = 0, **options) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    config = LlamaConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=layers, num_attention_heads=query_heads,
        num_key_value_heads=kv_heads, head_dim=8, vocab_size=VOCABULARY, initializer_range=0.2, pad_token_id=0,
        max_position_embeddings=128, **options,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


def bert(layers: int = 2, heads: int = 4, seed: int = 0, **options) -> BertModel:
    torch.manual_seed(seed)
    config = BertConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=layers, num_attention_heads=heads, vocab_size=VOCABULARY,
        initializer_range=0.2, **{"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0, **options},
    )  # fmt: skip
    return BertModel(config).eval()


def repeated(make, layers: int, times: int):
    """A llama or bert that runs its layers one after the other, and so again, with the same weights in every round."""
    model = make(layers)
    stack = model.model.layers if make is llama else model.encoder.layer
    stack.extend(list(stack) * (times - 1))
    model.config.num_hidden_layers, model.config.use_cache = layers * times, False
    return model


def tokens(batch: int = 3, length: int = 9, seed: int = 1) -> torch.Tensor:
    return torch.randint(1, VOCABULARY, (batch, length), generator=torch.Generator().manual_seed(seed))


def padded(batch: int = 3, length: int = 9, side: str = "left") -> dict[str, torch.Tensor]:
    """input_ids and an attention_mask with 0, 1, 2, ... padded positions."""
    ids, mask = tokens(batch, length), torch.ones(batch, length, dtype=torch.long)
    for row in range(batch):
        where = slice(0, row) if side == "left" else slice(length - row, length)
        mask[row, where] = 0
    return {"input_ids": ids * mask, "attention_mask": mask}


def hidden(model, **inputs) -> torch.Tensor:
    """The model's last output, [batch, tokens, features], with padded rows set to 0."""
    with torch.no_grad():
        output = model(**inputs)
    found = output.logits if hasattr(output, "logits") else output.last_hidden_state
    mask = inputs.get("attention_mask")
    return found if mask is None else found * mask[..., None]


class PoolingByAttention(nn.Module):
    """Called an attention itself, and not of transformers."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.MultiheadAttention(16, 4, batch_first=True)

    def forward(self, states):
        return self.inner(states, states, states, need_weights=False)[0].mean(dim=1)
