"""Encoder-decoders of speech on one's own recordings."""

from __future__ import annotations

import wave
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import AutoFeatureExtractor

from headprune.errors import InvalidInput
from headprune.evaluation.data import placed
from headprune.evaluation.embedder import mapping_of
from headprune.evaluation.padding import refuse_without_padding
from headprune.evaluation.tasks.rows import in_batches, parts_of, place_of, read_rows, refuse_counts
from headprune.evaluation.tasks.target_tokens import Batch, TargetTokens, without_the_loss
from headprune.evaluation.tasks.task import register_task
from headprune.models.tokens import IGNORED_LABEL, decoder_of

INPUT = "input_features"
WIDTHS = {1: np.uint8, 2: np.int16, 4: np.int32}  # bytes of a sample


@register_task
class SpeechRecognition(TargetTokens):
    """Your own recordings and what is said in them, for Whisper and its like: calibration=FILE, and test=FILE or a tenth of it.

    calibration: a .jsonl, .json, .csv or .tsv file with the columns `audio`, the path of a .wav file (from the folder of the file
    of rows, where it is relative) at the model's sampling rate and of no more seconds than it hears (Whisper's 30), and `text`.
    Several channels are averaged. test: the same; by default a tenth of calibration's rows, which then count for nothing else.
    training: the same, for recovery; by default the rows of calibration. seed: which rows are drawn for calibration. Tokens are
    asked for with the true ones before them, special ones too.
    """

    name = "speech-recognition"
    more = "test=FILE (and test_rows, where you gave it)"

    def __init__(
        self,
        tokenizer: Any,
        calibration: str,
        test: str | None = None,
        training: str | None = None,
        audio: str = "audio",
        text: str = "text",
        calibration_rows: int = 128,
        test_rows: int | None = 500,
        batch: int = 8,
        max_tokens: int = 256,
        seed: int = 0,
    ) -> None:
        refuse_counts(calibration_rows=calibration_rows, test_rows=test_rows, max_tokens=max_tokens, batch=batch)
        refuse_without_padding(tokenizer, f"task {self.name}")
        self.tokenizer, self.batch, self.max_tokens = tokenizer, batch, max_tokens
        try:
            self.extractor: Any = AutoFeatureExtractor.from_pretrained(tokenizer.name_or_path, local_files_only=True)
        except (OSError, ValueError) as error:
            reason = " ".join(str(error).split())[:200]
            raise InvalidInput(f"task {self.name} needs the feature extractor of sound in the model's folder: {reason}.") from None
        self.start = mapping_of(tokenizer, "config.json").get("decoder_start_token_id")

        def rows(file: str) -> list[tuple[Path, str]]:
            folder = place_of(file).parent
            return [(folder / str(row[audio]), str(row[text])) for row in read_rows(file, [audio, text])]

        parts = parts_of(rows, calibration, test, training, calibration_count=calibration_rows, test_count=test_rows, seed=seed)
        self.calibration, self.test = self.batches(parts.calibration), self.batches(parts.test)
        self.training_rows = parts.training

    def batches(self, rows: list[tuple[Path, str]]) -> list[Batch]:
        return [self.encoded(some) for some in in_batches(rows, self.batch)]

    def encoded(self, rows: Sequence[tuple[Path, str]]) -> Batch:
        rate = self.extractor.sampling_rate
        sounds = [samples_of(path, rate) for path, _ in rows]
        most = getattr(self.extractor, "n_samples", None)  # of Whisper, which would cut off what is beyond
        long = next(((path, len(sound)) for (path, _), sound in zip(rows, sounds) if most is not None and len(sound) > most), None)
        if long is not None:
            raise InvalidInput(
                f"{long[0]} has {long[1] / rate:.1f} seconds, and the model hears {most / rate:g}: the rest of the text would be "
                "asked for all the same. Cut it into pieces, each with its own text, or leave the row out."
            )
        padding = True if most is None else "max_length"
        heard = self.extractor(sounds, sampling_rate=rate, padding=padding, return_tensors="pt")
        said = self.tokenizer(
            [text for _, text in rows], padding=True, truncation=True, max_length=self.max_tokens, return_tensors="pt",
            return_attention_mask=True,
        )  # fmt: skip
        labels = said["input_ids"].masked_fill(said["attention_mask"] == 0, IGNORED_LABEL)
        if self.start is not None and bool((labels[:, 0] == self.start).all()):
            labels = labels[:, 1:]  # the model puts it first by itself
        return {**heard, "labels": labels}

    def training(self) -> list[Batch]:
        return self.batches(self.training_rows)

    def check_model(self, model: nn.Module) -> None:
        hears = getattr(model, "main_input_name", None) == INPUT
        if decoder_of(model) is None or not hears or not getattr(model, "can_generate", bool)():
            name = type(model).__name__
            raise InvalidInput(f"task {self.name} needs an encoder-decoder of speech with its head, as Whisper; {name} is none.")
        limit = getattr(getattr(model, "config", None), "max_target_positions", None)
        read = (*self.calibration, *self.test, *self.training_beyond(limit, self.max_tokens))
        longest = max(batch["labels"].shape[1] for batch in read)
        if limit is not None and longest > limit:
            raise InvalidInput(
                f"a text has {longest} tokens, {type(model).__name__} takes at most {limit}; give max_tokens={limit}."
            )
        for batch in (*self.calibration, *self.test):
            batch[INPUT] = as_read(model, batch[INPUT])

    def forward(self, model: nn.Module, batch: Batch) -> Any:
        """The labels go in too: the model itself makes what its decoder reads from them."""
        return model(**placed(model, {**batch, INPUT: as_read(model, batch[INPUT])}), use_cache=False)

    def readout(self, model: nn.Module, batch: Batch) -> Tensor:
        return self.asked(model, batch)[0]

    def asked(self, model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
        return self.forward(model, batch).logits, batch["labels"]

    def latency_inputs(self) -> Batch:
        return without_the_loss(self.test[0], self.tokenizer.pad_token_id)


def as_read(model: nn.Module, features: Tensor) -> Tensor:
    """In the dtype of the model, whose convolutions take no other."""
    return features.to(next((weight.dtype for weight in model.parameters() if weight.is_floating_point()), torch.float32))


def samples_of(path: Path, rate: int) -> Any:
    """The samples of a .wav file [samples], fp32 in -1 to 1. Raises InvalidInput where it is none, or at another rate."""
    try:
        with wave.open(str(path), "rb") as file:
            found, channels, width = file.getframerate(), file.getnchannels(), file.getsampwidth()
            content = file.readframes(file.getnframes())
    except FileNotFoundError:
        raise InvalidInput(
            f"{path} does not exist; expected a recording, by its path from the folder of the file of rows."
        ) from None
    except (OSError, EOFError, wave.Error) as error:
        raise InvalidInput(f"{path} cannot be read as .wav: {error}. Convert it (ffmpeg -i IN -ar {rate} OUT.wav).") from None
    if found != rate or width not in WIDTHS:
        raise InvalidInput(
            f"{path} has {found} samples a second of {width} bytes; expected {rate}, of 1, 2 or 4. Convert it "
            f"(ffmpeg -i IN -ar {rate} OUT.wav)."
        )
    values = np.frombuffer(content, WIDTHS[width]).astype(np.float32).reshape(-1, channels).mean(axis=1)
    middle = 128.0 if width == 1 else 0.0  # samples of one byte have no sign
    return (values - middle) / float(2 ** (8 * width - 1))
