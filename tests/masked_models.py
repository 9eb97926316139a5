"""Models and losses that take head masks in different ways; each case is (model, loss_fn or None, batch)."""

import torch
import torch.nn.functional as F
from tiny_models import VOCABULARY, bert, llama, padded, tokens
from torch import nn
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    BertConfig,
    BertForSequenceClassification,
    SwinConfig,
    SwinForImageClassification,
    T5Config,
    T5ForConditionalGeneration,
)

from headprune.nn import VariableHeadAttention, replace_multihead_attention
from headprune.planning import PruningPlan
from headprune.surgery import cut


def bert_with(head, **options):
    torch.manual_seed(0)
    config = BertConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, vocab_size=VOCABULARY,
        initializer_range=0.2, **options,
    )  # fmt: skip
    return head(config).eval()


def bart():
    torch.manual_seed(0)
    config = BartConfig(
        d_model=32, encoder_layers=2, decoder_layers=2, encoder_attention_heads=4, decoder_attention_heads=4, encoder_ffn_dim=48,
        decoder_ffn_dim=48, vocab_size=VOCABULARY, max_position_embeddings=64, init_std=0.2,
    )  # fmt: skip
    return BartForConditionalGeneration(config).eval()


def classes(count: int) -> torch.Tensor:
    return torch.randint(0, count, (3,), generator=torch.Generator().manual_seed(3))


def ragged_llama():
    model = llama(layers=3)
    cut(model, PruningPlan.from_keep(model, {"model.layers.1.self_attn": [0, 2, 3, 5, 6, 7]}))
    model.set_attn_implementation("headprune")
    return model, None, {**padded(), "labels": tokens()}


def classifier():
    return bert_with(BertForSequenceClassification, num_labels=5), None, {**padded(), "labels": classes(5)}


def encoder_decoder():
    return bart(), None, {**padded(side="right"), "labels": tokens(3, 7, 5)}


def t5():
    """The first layer's position bias goes to all others beside the hidden states."""
    torch.manual_seed(0)
    config = T5Config(
        vocab_size=VOCABULARY, d_model=32, d_kv=8, num_heads=4, d_ff=48, num_layers=2, decoder_start_token_id=0,
        initializer_factor=3.0,
    )  # fmt: skip
    return T5ForConditionalGeneration(config).eval(), None, {**padded(side="right"), "labels": tokens(3, 7, 5)}


def swin():
    """Attention sees windows: several rows for each sample."""
    torch.manual_seed(0)
    config = SwinConfig(
        image_size=16, patch_size=2, embed_dim=8, depths=[2, 1], num_heads=[2, 4], window_size=4, initializer_range=0.5
    )
    model = SwinForImageClassification(config).eval()
    return model, None, {"pixel_values": torch.randn(3, 3, 16, 16), "labels": torch.tensor([0, 1, 1])}


def squares(model: nn.Module, batch: torch.Tensor) -> torch.Tensor:
    return model(batch)[..., :5].pow(3).flatten(1).mean(dim=1)


def torch_encoder():
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(16, 4, 24, dropout=0.0, batch_first=True)
    return replace_multihead_attention(nn.TransformerEncoder(layer, 3).eval()), squares, torch.randn(3, 5, 16)


def sequence_first():
    """The batch is the second dimension."""
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(16, 4, 24, dropout=0.0)
    model = replace_multihead_attention(nn.TransformerEncoder(layer, 3, enable_nested_tensor=False).eval())
    return model, lambda model, batch: model(batch)[..., :5].pow(3).mean(dim=(0, 2)), torch.randn(5, 3, 16)


class Layers(nn.Module):
    """Attention layers with a residual; `passed` is called between them."""

    def __init__(self, layers: int = 3, shared: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        made = [VariableHeadAttention(16, 4, batch_first=True) for _ in range(1 if shared else layers)]
        self.layers, self.rounds = nn.ModuleList(made), layers if shared else 1

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        for _ in range(self.rounds):
            for layer in self.layers:
                states = self.passed(states + layer(states, states, states, need_weights=False)[0])
        return states

    def passed(self, states: torch.Tensor) -> torch.Tensor:
        return states


class Remembering(nn.Module):
    """An attention that leaves its output in a list of its model, outside of all modules' results."""

    def __init__(self, inner: nn.Module, left: list) -> None:
        super().__init__()
        self.inner, self.left = inner, left

    def forward(self, *states: torch.Tensor, **options) -> tuple:
        output = self.inner(*states, **options)
        self.left.append(output[0])
        return output


class SideChannel(Layers):
    """Adds at the end what all layers left: a pass that skips the first ones does not have that of theirs."""

    def __init__(self) -> None:
        super().__init__()
        self.left = []
        self.layers = nn.ModuleList(Remembering(layer, self.left) for layer in self.layers)

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        self.left.clear()
        return super().forward(states) + sum(self.left)


class BatchCoupled(Layers):
    """Samples see each other."""

    def passed(self, states: torch.Tensor) -> torch.Tensor:
        return states - 0.5 * states.mean(dim=0, keepdim=True)


def on_states(model: nn.Module):
    return model.eval(), squares, torch.randn(3, 5, 16, generator=torch.Generator().manual_seed(1))


def contrastive(model: nn.Module, batch: dict) -> torch.Tensor:
    """Couples the samples of a batch: 2 losses for 4 rows."""
    queries, documents = F.normalize(model(**batch).last_hidden_state.mean(dim=1), dim=-1).chunk(2)
    return F.cross_entropy(5 * queries @ documents.T, torch.arange(len(queries)), reduction="none")


def mean_loss(model: nn.Module, batch: dict) -> torch.Tensor:
    return F.cross_entropy(model(input_ids=batch["input_ids"]).logits[:, 0], batch["input_ids"][:, 1])


# How a model's masks are expected to run: "replayed" from the first site that changes, "folded" into whole passes, or "singly".
CASES = {
    "ragged llama": (ragged_llama, "replayed"),
    "classifier": (classifier, "replayed"),
    "encoder-decoder": (encoder_decoder, "replayed"),
    "t5": (t5, "replayed"),
    "swin": (swin, "replayed"),
    "torch encoder": (torch_encoder, "replayed"),
    "sequence first": (sequence_first, "replayed"),
    "shared weights": (lambda: on_states(Layers(shared=True)), "replayed"),
    "coupled loss": (lambda: (bert(), contrastive, {"input_ids": tokens(4, 6)}), "replayed"),
    "mean loss": (lambda: (llama(), mean_loss, {"input_ids": tokens(4, 6)}), "replayed"),
    "one sample": (lambda: (llama(), None, {"input_ids": tokens(1, 6), "labels": tokens(1, 6)}), "replayed"),
    "side channel": (lambda: on_states(SideChannel()), "folded"),
    "coupled samples": (lambda: on_states(BatchCoupled()), "singly"),
    "loss of the model's own mean": (
        lambda: (llama(), lambda model, batch: model(**batch).loss, {"input_ids": tokens(), "labels": tokens()}), "singly",
    ),
    "two calls": (lambda: (llama(), lambda m, b: mean_loss(m, b) + mean_loss(m, b), {"input_ids": tokens(4, 6)}), "singly"),
}  # fmt: skip
