"""The tokenizer inside a gguf file: byte-level BPE (GPT-2, Llama 3, Qwen) and SentencePiece-like BPE (Llama 2, Mistral)."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from transformers import AutoTokenizer, PreTrainedModel

from headprune.errors import InvalidInput, UnsupportedModel

if TYPE_CHECKING:
    from gguf import GGUFWriter

# A piece of the pre-tokenizer's regular expression -> llama.cpp's name of it.
PRE_TOKENIZERS = {r"\p{N}{1,3}": "llama-bpe", r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}": "qwen2"}


def write_vocabulary(writer: GGUFWriter, model: PreTrainedModel, options: dict[str, Any]) -> list[str]:
    """Adds the tokens of the given tokenizer, or of the source folder's; without one the file takes token numbers alone.

    Raises UnsupportedModel where the tokenizer is of a kind that is not known here: llama.cpp would split text otherwise.
    """
    tokenizer, source = options.get("tokenizer"), options.get("source")
    written = ("tokenizer_config.json", "tokenizer.json")
    if tokenizer is None and source is not None and any((source / name).is_file() for name in written):
        tokenizer = AutoTokenizer.from_pretrained(source, local_files_only=True)
    if tokenizer is None:
        writer.add_tokenizer_model("none")
        return ["no tokenizer: the file takes token numbers alone"]
    with tempfile.TemporaryDirectory() as folder:
        tokenizer.save_pretrained(folder)
        return write_tokens(writer, Path(folder), tokenizer, model.config.vocab_size, options.get("pre_tokenizer"))


def write_tokens(writer: GGUFWriter, folder: Path, tokenizer: Any, size: int, pre_tokenizer: str | None) -> list[str]:
    from gguf import SpecialVocab

    path = folder / "tokenizer.json"
    content = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {"model": {"type": type(tokenizer).__name__}}
    kind = content["model"]
    if kind.get("type") != "BPE":
        raise UnsupportedModel(
            f"a {kind.get('type')} tokenizer cannot be written to gguf here; known: byte-level and SentencePiece-like BPE."
        )
    if len(tokenizer) > size:
        raise InvalidInput(f"the tokenizer has {len(tokenizer)} tokens, the model {size}; they do not belong together.")
    if kind.get("byte_fallback"):
        write_sentencepiece_like(writer, folder, size)
        name = "llama"
    else:
        name = pre_tokenizer or pre_tokenizer_of(content)
        write_byte_level(writer, content, size, name)
    special = SpecialVocab(folder, load_merges=not kind.get("byte_fallback"), n_vocab=size)
    special.add_to_gguf(writer, quiet=True)
    return [f"tokenizer: {name}, {len(tokenizer):,} tokens"]


def pre_tokenizer_of(content: dict[str, Any]) -> str:
    text = json.dumps(content.get("pre_tokenizer") or {}, ensure_ascii=False).replace("\\\\", "\\")
    found = next((name for piece, name in PRE_TOKENIZERS.items() if piece in text), None)
    if found is None and '"ByteLevel"' in text and '"Split"' not in text:
        found = "gpt-2"
    if found is None:
        raise UnsupportedModel(
            "the tokenizer splits text in a way that is not recognised here. Give the option pre_tokenizer, llama.cpp's name of it "
            "(llama_vocab_pre_type in its source)."
        )
    return found


def write_byte_level(writer: GGUFWriter, content: dict[str, Any], size: int, name: str) -> None:
    from gguf import TokenType

    tokens = {number: (text, TokenType.NORMAL) for text, number in content["model"]["vocab"].items()}
    for added in content.get("added_tokens", ()):
        kind = TokenType.CONTROL if added["special"] else TokenType.USER_DEFINED
        tokens[added["id"]] = (added["content"], kind)
    rows = [tokens.get(number, (f"[PAD{number}]", TokenType.UNUSED)) for number in range(size)]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(name)
    writer.add_token_list([text for text, _ in rows])
    writer.add_token_types([kind for _, kind in rows])


def write_sentencepiece_like(writer: GGUFWriter, folder: Path, size: int) -> None:
    from gguf import LlamaHfVocab, TokenType

    rows = [(text, score, kind) for text, score, kind in LlamaHfVocab(folder).all_tokens()]
    rows += [(f"[PAD{number}]".encode(), -1000.0, TokenType.UNUSED) for number in range(len(rows), size)]
    writer.add_tokenizer_model("llama")
    writer.add_tokenizer_pre("default")
    writer.add_token_list([text for text, _, _ in rows])
    writer.add_token_scores([score for _, score, _ in rows])
    writer.add_token_types([kind for _, _, kind in rows])
