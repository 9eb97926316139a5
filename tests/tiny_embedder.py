"""A folder as Qwen3-Embedding's, and pairs of texts for it."""

import csv
import json
from pathlib import Path

from letter_tokenizer import letter_tokenizer
from tiny_decoders import decoder

QUERY = "find: a, b"


def saved_embedder(folder: Path) -> Path:
    """A causal decoder under its head, and how sentence-transformers pools and prompts its texts."""
    decoder("qwen3").save_pretrained(folder)
    tokenizer = letter_tokenizer()
    tokenizer.pad_token = "[UNK]"
    tokenizer.save_pretrained(folder)
    (folder / "1_Pooling").mkdir()
    write_json(folder / "1_Pooling" / "config.json", {"pooling_mode_mean_tokens": False, "pooling_mode_lasttoken": True})
    write_json(
        folder / "modules.json", [{"idx": 1, "name": "1", "path": "1_Pooling", "type": "sentence_transformers.models.Pooling"}]
    )
    write_json(folder / "config_sentence_transformers.json", {"prompts": {"query": QUERY, "document": ""}})
    return folder


def saved_pairs(path: Path) -> Path:
    with path.open("w", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(["query", "document"])
        rows.writerows((f"{letter} ask", f"{letter} say" * (1 + place % 3)) for place, letter in enumerate("abcdefghijklmnopqrst"))
    return path


def write_json(path: Path, content: object) -> None:
    path.write_text(json.dumps(content))
