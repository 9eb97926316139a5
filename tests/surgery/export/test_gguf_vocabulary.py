"""The tokenizer in a gguf file, read back by gguf's own reader; rotary scaling against transformers' own."""

import numpy as np
import pytest
import torch
from letter_tokenizer import letter_tokenizer
from tiny_models import VOCABULARY, llama
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from headprune.errors import InvalidInput, UnsupportedModel
from headprune.surgery import save
from headprune.surgery.export import export

gguf = pytest.importorskip("gguf")
LLAMA3 = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
QWEN2 = LLAMA3.replace(r"\p{N}{1,3}", r"\p{N}")
ROPE = {"rope_theta": 10000.0, "factor": 8.0}
LLAMA3_ROPE = {
    **ROPE, "rope_type": "llama3", "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 64,
}  # fmt: skip


def byte_level(split: str | None = None) -> PreTrainedTokenizerFast:
    """A byte-level BPE of the letters a to h, with one merge, an end of text and a token of the user's."""
    vocabulary = {letter: number for number, letter in enumerate([*"abcdefgh", "ab"])}
    made = Tokenizer(models.BPE(vocabulary, [("a", "b")]))
    bytes_alone = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=split is None)
    pieces = [] if split is None else [pre_tokenizers.Split(Regex(split), "isolated")]
    made.pre_tokenizer = pre_tokenizers.Sequence([*pieces, bytes_alone]) if pieces else bytes_alone
    found = PreTrainedTokenizerFast(tokenizer_object=made, eos_token="</s>")
    found.add_tokens(["<mine>"])
    return found


def sentencepiece_like() -> PreTrainedTokenizerFast:
    """As Llama 2's: BPE over text with ▁ for blanks, bytes for what it does not know."""
    pieces = ["<unk>", "</s>", *(f"<0x{byte:02X}>" for byte in range(8)), "▁", "a", "b", "ab"]
    made = Tokenizer(models.BPE({p: n for n, p in enumerate(pieces)}, [("a", "b")], unk_token="<unk>", byte_fallback=True))
    made.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    made.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    return PreTrainedTokenizerFast(tokenizer_object=made, eos_token="</s>", unk_token="<unk>")


def fields(path) -> dict:
    return {name: field.contents() for name, field in gguf.GGUFReader(path).fields.items()}


@pytest.mark.parametrize(("split", "name"), [(None, "gpt-2"), (LLAMA3, "llama-bpe"), (QWEN2, "qwen2")])
def test_a_byte_level_vocabulary_keeps_its_numbers_merges_and_kinds(tmp_path, split, name):
    tokenizer, path = byte_level(split), tmp_path / "model.gguf"
    done = export(llama(), "gguf", path, tokenizer=tokenizer)
    found = fields(path)
    assert f"tokenizer: {name}, {len(tokenizer)} tokens" in done.notes
    assert (found["tokenizer.ggml.model"], found["tokenizer.ggml.pre"]) == ("gpt2", name)
    names, kinds = found["tokenizer.ggml.tokens"], found["tokenizer.ggml.token_type"]
    assert len(names) == len(kinds) == VOCABULARY
    assert names[: len(tokenizer)] == tokenizer.convert_ids_to_tokens(range(len(tokenizer)))
    of = gguf.TokenType
    assert [kinds[names.index(one)] for one in ("ab", "</s>", "<mine>")] == [of.NORMAL, of.CONTROL, of.USER_DEFINED]
    assert set(kinds[len(tokenizer) :]) == {of.UNUSED}
    assert found["tokenizer.ggml.merges"] == ["a b"]
    assert found["tokenizer.ggml.eos_token_id"] == tokenizer.eos_token_id


def test_a_sentencepiece_like_vocabulary_has_scores_and_bytes(tmp_path):
    tokenizer, path = sentencepiece_like(), tmp_path / "model.gguf"
    export(llama(), "gguf", path, tokenizer=tokenizer)
    found = fields(path)
    assert (found["tokenizer.ggml.model"], found["tokenizer.ggml.pre"]) == ("llama", "default")
    names, kinds = found["tokenizer.ggml.tokens"], found["tokenizer.ggml.token_type"]
    assert names[: len(tokenizer)] == tokenizer.convert_ids_to_tokens(range(len(tokenizer)))
    assert [kinds[names.index(one)] for one in ("<0x03>", "ab")] == [gguf.TokenType.BYTE, gguf.TokenType.NORMAL]
    assert len(found["tokenizer.ggml.scores"]) == len(names) == VOCABULARY
    assert "tokenizer.ggml.merges" not in found


def test_the_tokenizer_of_the_source_folder_is_taken_and_without_one_the_file_takes_numbers(tmp_path):
    save(llama(), tmp_path / "model", tokenizer=byte_level())
    export(llama(), "gguf", tmp_path / "with.gguf", source=tmp_path / "model")
    assert fields(tmp_path / "with.gguf")["tokenizer.ggml.model"] == "gpt2"
    done = export(llama(), "gguf", tmp_path / "without.gguf")
    assert "no tokenizer: the file takes token numbers alone" in done.notes
    assert fields(tmp_path / "without.gguf")["tokenizer.ggml.model"] == "none"


def test_a_tokenizer_that_llama_cpp_would_not_repeat_is_refused_and_nothing_written(tmp_path):
    with pytest.raises(UnsupportedModel, match="a WordLevel tokenizer cannot be written"):
        export(llama(), "gguf", tmp_path / "model.gguf", tokenizer=letter_tokenizer())
    with pytest.raises(UnsupportedModel, match="splits text in a way that is not recognised"):
        export(llama(), "gguf", tmp_path / "model.gguf", tokenizer=byte_level(r"\d"))
    large = byte_level()
    large.add_tokens([f"<{number}>" for number in range(VOCABULARY)])
    with pytest.raises(InvalidInput, match=f"tokens, the model {VOCABULARY}; they do not belong together"):
        export(llama(), "gguf", tmp_path / "model.gguf", tokenizer=large)
    assert list(tmp_path.iterdir()) == []
    export(llama(), "gguf", tmp_path / "model.gguf", tokenizer=byte_level(r"\d"), pre_tokenizer="refact")
    assert fields(tmp_path / "model.gguf")["tokenizer.ggml.pre"] == "refact"


def test_llama_3s_scaling_of_positions_is_transformers_own(tmp_path):
    model = llama(rope_parameters=LLAMA3_ROPE)
    export(model, "gguf", tmp_path / "model.gguf")
    (factors,) = (one.data for one in gguf.GGUFReader(tmp_path / "model.gguf").tensors if one.name == "rope_freqs.weight")
    scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](model.config, torch.device("cpu"))
    plain = 1.0 / LLAMA3_ROPE["rope_theta"] ** (np.arange(0, 8, 2) / 8)
    assert np.allclose(plain / factors, scaled.numpy(), rtol=1e-5)
    assert len(set(factors.tolist())) > 2  # some frequencies are kept, some divided by all of the factor, some lie between


def test_linear_scaling_is_written_and_what_is_not_known_is_refused(tmp_path):
    export(llama(rope_parameters={**ROPE, "rope_type": "linear"}), "gguf", tmp_path / "model.gguf")
    found = fields(tmp_path / "model.gguf")
    scaling = {name.partition(".rope.")[2]: value for name, value in found.items() if ".rope.scaling." in name}
    assert scaling == {"scaling.type": "linear", "scaling.factor": 8.0}
    with pytest.raises(UnsupportedModel, match="rope of type 'dynamic' cannot be written"):
        export(llama(rope_parameters={**ROPE, "rope_type": "dynamic"}), "gguf", tmp_path / "other.gguf")
    assert not (tmp_path / "other.gguf").exists()
