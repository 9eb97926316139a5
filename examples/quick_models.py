"""The small models that the examples prune, trained on the spot within seconds on made-up reviews of guest houses or drawn stripes.

Nothing here is about pruning. With --model FOLDER an example takes a model of yours instead.
"""

import random
from pathlib import Path

import torch
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor, nn
from transformers import (
    AutoImageProcessor,
    AutoTokenizer,
    BertConfig,
    BertForSequenceClassification,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    ViTConfig,
    ViTForImageClassification,
)

import headprune as hp

THINGS = ["soup", "bread", "tea", "room", "bed", "view", "staff", "music", "price", "garden"]
GOOD, BAD = ["good", "kind", "fresh", "lovely", "fair", "warm"], ["bad", "rude", "stale", "ugly", "steep", "cold"]
Batch = dict[str, Tensor]

transformers.utils.logging.set_verbosity_error()
transformers.utils.logging.disable_progress_bar()


def text_classifier() -> tuple[BertForSequenceClassification, PreTrainedTokenizerFast, list[Batch], list[Batch]]:
    """(model, tokenizer, training batches, test batches): how many of the three things in a review the guest liked."""
    seed(0)
    tokenizer = word_tokenizer()
    config = BertConfig(
        vocab_size=len(tokenizer), hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=8,
        max_position_embeddings=64, num_labels=4, pad_token_id=tokenizer.pad_token_id, initializer_range=0.1,
        hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    model = BertForSequenceClassification(config)
    train, test = ([labelled_reviews(tokenizer) for _ in range(count)] for count in (250, 16))
    return fit(model, train, lr=2e-3), tokenizer, train, test


def language_model() -> tuple[LlamaForCausalLM, PreTrainedTokenizerFast, list[Batch], str]:
    """(model with 8 query heads over 4 key/value heads, tokenizer, training batches, reviews that it was not trained on)."""
    seed(0)
    tokenizer = word_tokenizer()
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=8,
        num_key_value_heads=4, head_dim=16, max_position_embeddings=256, initializer_range=0.1, bos_token_id=None,
        eos_token_id=None, pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    batches = [text_windows(tokenizer, reviews(80)) for _ in range(60)]
    return fit(model, batches, lr=3e-3), tokenizer, batches, reviews(200)


def picture_classifier() -> tuple[ViTForImageClassification, list[Batch], list[Batch]]:
    """(model, training batches, test batches): in which of four directions noisy stripes of any width and place run."""
    seed(0)
    config = ViTConfig(
        image_size=24, patch_size=4, hidden_size=48, intermediate_size=96, num_hidden_layers=3, num_attention_heads=6, num_labels=4
    )
    train, test = ([striped_pictures() for _ in range(count)] for count in (80, 8))
    return fit(ViTForImageClassification(config), train, lr=1e-3), train, test


def your_model(folder: Path) -> tuple[nn.Module, PreTrainedTokenizerFast]:
    """(model, tokenizer) of a folder that transformers or headprune saved."""
    return hp.load(folder).eval(), AutoTokenizer.from_pretrained(folder, local_files_only=True)


@torch.no_grad()
def your_classifier(folder: Path, text: Path) -> tuple[nn.Module, PreTrainedTokenizerFast, list[Batch], list[Batch]]:
    """As `text_classifier`, of your folder; `text` has a text on each line, whose label is what the model itself says of it."""
    model, tokenizer = your_model(folder)
    lines = text.read_text(encoding="utf-8").splitlines()
    rows = [tokenizer(lines[i : i + 32], padding=True, truncation=True, return_tensors="pt") for i in range(0, len(lines), 32)]
    batches = [{**row, "labels": model(**row).logits.argmax(dim=-1)} for row in rows]
    return model, tokenizer, batches[::2], batches[1::2]


def your_language_model(folder: Path, text: Path) -> tuple[nn.Module, PreTrainedTokenizerFast, list[Batch], str]:
    """As `language_model`, of your folder; the first half of `text` gives the batches, the second is held back."""
    model, tokenizer = your_model(folder)
    content = text.read_text(encoding="utf-8")
    windows = text_windows(tokenizer, content[: len(content) // 2], 256)["input_ids"]
    return model, tokenizer, [{"input_ids": rows, "labels": rows} for rows in windows.split(4)], content[len(content) // 2 :]


@torch.no_grad()
def your_pictures(folder: Path, pictures: Path) -> tuple[nn.Module, list[Batch], list[Batch]]:
    """As `picture_classifier`, of your folder with its image processor; the label of a picture is what the model says of it."""
    from PIL import Image

    model, processor = hp.load(folder).eval(), AutoImageProcessor.from_pretrained(folder, local_files_only=True)
    files = sorted(path for path in pictures.iterdir() if path.suffix.lower() in {".png", ".jpg", ".jpeg", ".webp"})
    opened = ([Image.open(path).convert("RGB") for path in files[i : i + 8]] for i in range(0, len(files), 8))
    pixels = [processor(some, return_tensors="pt")["pixel_values"] for some in opened]
    batches = [{"pixel_values": some, "labels": model(some).logits.argmax(dim=-1)} for some in pixels]
    return model, batches[::2], batches[1::2]


def fit(model: nn.Module, batches: list[Batch], lr: float) -> nn.Module:
    """Trains `model` once over the batches, the rate falling to 0; gives it back in eval mode."""
    optimizer = torch.optim.AdamW(model.train().parameters(), lr=lr, fused=True)
    for step, batch in enumerate(batches):
        optimizer.param_groups[0]["lr"] = lr * min((step + 1) / 10, 1 - step / len(batches))
        model(**batch).loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    return model.eval()


def review() -> tuple[str, int]:
    """("2 stars : the soup was good and the bed was not bad and the tea was stale .", 2): a star for each thing that was liked."""
    fond, clauses, liked = random.random(), [], 0
    for thing in random.sample(THINGS, 3):
        likes, denied = random.random() < fond, random.random() < 0.5
        clauses.append(f"the {thing} was {'not ' * denied}{random.choice(GOOD if likes != denied else BAD)}")
        liked += likes
    return f"{liked} stars : {' and '.join(clauses)} .", liked


def reviews(count: int) -> str:
    return " ".join(review()[0] for _ in range(count))


def labelled_reviews(tokenizer: PreTrainedTokenizerFast, rows: int = 32) -> Batch:
    drawn = [review() for _ in range(rows)]
    inputs = tokenizer([text.partition(" : ")[2] for text, _ in drawn], padding=True, return_tensors="pt")
    return {**inputs, "labels": torch.tensor([liked for _, liked in drawn])}


def text_windows(tokenizer: PreTrainedTokenizerFast, text: str, window: int = 64) -> Batch:
    ids = tokenizer(text, return_tensors="pt", verbose=False)["input_ids"][0]
    rows = ids[: len(ids) // window * window].view(-1, window)
    return {"input_ids": rows, "labels": rows}


def word_tokenizer() -> PreTrainedTokenizerFast:
    words = ["<pad>", "<unknown>", *THINGS, *GOOD, *BAD, "the", "was", "not", "and", *":.0123", "stars"]
    tokenizer = Tokenizer(models.WordLevel({word: number for number, word in enumerate(words)}, unk_token="<unknown>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", unk_token="<unknown>")


def striped_pictures(rows: int = 32) -> Batch:
    labels = torch.randint(0, 4, (rows,))
    angle, width, start = (one[:, None, None] for one in (labels * torch.pi / 4, 3 + 3 * torch.rand(rows), 9 * torch.rand(rows)))
    y, x = torch.meshgrid(torch.arange(24.0), torch.arange(24.0), indexing="ij")
    stripes = (2 * torch.pi * (x * angle.cos() + y * angle.sin() + start) / width).sin()
    return {"pixel_values": stripes[:, None].repeat(1, 3, 1, 1) + 0.7 * torch.randn(rows, 3, 24, 24), "labels": labels}


def seed(number: int) -> None:
    random.seed(number)
    torch.manual_seed(number)
