"""Your own recordings as a task."""

import copy
import random
import wave

import numpy as np
import pytest
import torch
from letter_tokenizer import letter_tokenizer
from tiny_encoders import ENCODERS, SEQ2SEQ
from tiny_models import llama
from transformers import (
    AutoTokenizer,
    Speech2TextConfig,
    Speech2TextFeatureExtractor,
    Speech2TextForConditionalGeneration,
    WhisperFeatureExtractor,
)

import headprune as hp
from headprune.errors import InvalidInput
from headprune.evaluation.tasks import build_task
from headprune.evaluation.tasks.speech_recognition import samples_of
from headprune.sources import default_task

RATE = 160  # a second of it is what the tiny model hears: 20 frames


def record(path, values, rate: int = RATE, channels: int = 1, width: int = 2) -> None:
    with wave.open(str(path), "wb") as file:
        file.setnchannels(channels)
        file.setsampwidth(width)
        file.setframerate(rate)
        file.writeframes(np.ascontiguousarray(values).tobytes())


@pytest.fixture
def folder(tmp_path):
    """A model with its tokenizer and feature extractor, and rows.csv with recordings beside it."""
    SEQ2SEQ["whisper"].make().save_pretrained(tmp_path / "whisper")
    tokenizer = letter_tokenizer()
    tokenizer.pad_token = "[UNK]"
    tokenizer.save_pretrained(tmp_path / "whisper")
    WhisperFeatureExtractor(feature_size=8, sampling_rate=RATE, hop_length=8, chunk_length=1, n_fft=16).save_pretrained(
        tmp_path / "whisper"
    )
    (tmp_path / "sound").mkdir()
    drawn, lines = random.Random(0), ["audio,text"]
    for number in range(30):
        record(tmp_path / "sound" / f"{number}.wav", np.random.default_rng(number).integers(-9000, 9000, 150).astype(np.int16))
        lines.append(f"sound/{number}.wav,{''.join(drawn.choices('abcdef', k=drawn.randint(1, 9)))}")
    (tmp_path / "rows.csv").write_text("\n".join(lines))
    return tmp_path


def speech_to_text() -> Speech2TextForConditionalGeneration:
    sizes = {"encoder_attention_heads": 4, "decoder_attention_heads": 4, "encoder_layers": 2, "decoder_layers": 2, "d_model": 32}
    widths = {"encoder_ffn_dim": 48, "decoder_ffn_dim": 48, "conv_channels": 32, "input_feat_per_channel": 8, "vocab_size": 61}
    return Speech2TextForConditionalGeneration(Speech2TextConfig(**sizes, **widths)).eval()


def task_of(folder, **options):
    tokenizer = AutoTokenizer.from_pretrained(folder / "whisper")
    return build_task("speech-recognition", tokenizer, calibration=str(folder / "rows.csv"), batch=4, **options)


def test_recordings_are_heard_and_their_texts_asked_for(folder):
    task, model = task_of(folder), hp.load(folder / "whisper")
    task.check_model(model)
    rows = dict(line.split(",") for line in (folder / "rows.csv").read_text().splitlines()[1:])
    assert sum(len(batch["labels"]) for batch in task.test) == 3
    path, text = task.training_rows[0]
    batch = task.training()[0]
    assert rows[f"sound/{path.name}"] == text
    extractor = WhisperFeatureExtractor.from_pretrained(folder / "whisper")
    with wave.open(str(path)) as file:
        values = np.frombuffer(file.readframes(10**6), np.int16) / 2**15
    expected = extractor(values.astype(np.float32), sampling_rate=RATE, return_tensors="pt")["input_features"]
    assert torch.equal(batch["input_features"][:1], expected)
    target = batch["labels"][0][batch["labels"][0] != -100]
    assert target.tolist() == task.tokenizer(text)["input_ids"]
    with torch.no_grad():
        output = model(input_features=expected, labels=target[None])
        assert float(task.loss(model, batch)[0]) == pytest.approx(float(output.loss), rel=1e-4)


def test_costs_are_of_the_forward_pass_without_a_loss(folder):
    task, model = task_of(folder), hp.load(folder / "whisper")
    task.check_model(model)
    with torch.no_grad():
        timed, whole = model(**task.latency_inputs()), task.forward(model, task.test[0])
    assert timed.loss is None
    assert timed.logits.shape == whole.logits.shape


def test_a_first_token_that_the_model_puts_there_itself_is_left_out(folder):
    model = hp.load(folder / "whisper")
    first = {task_of(folder).tokenizer("a")["input_ids"][0]}
    assert first == {2}
    (folder / "rows.csv").write_text("audio,text\n" + "".join(f"sound/{number}.wav,abc\n" for number in range(4)))
    model.config.decoder_start_token_id = 2
    model.save_pretrained(folder / "whisper")
    assert {tuple(row) for batch in task_of(folder).calibration for row in batch["labels"].tolist()} == {(3, 4)}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_model_goes_the_whole_way_on_it(folder, dtype):
    task, dense = task_of(folder), hp.load(folder / "whisper").to(dtype)
    task.check_model(dense)
    model = copy.deepcopy(dense)
    scores = hp.score(model, task.calibration, ["fisher", "entropy"], loss_fn=task.loss)["fisher"]
    hp.prune(model, hp.plan(scores, hp.Budget(heads=0.5)), task.calibration, forward=task.forward)
    hp.recover(model, task.training(), loss_fn=task.loss, teacher=dense, steps=2)
    hp.save(model, folder / "pruned", tokenizer=task.tokenizer)
    loaded = hp.load(folder / "pruned")
    torch.testing.assert_close(task.outputs(loaded), task.outputs(model))
    assert hp.evaluate(loaded, task, repeats=1).quality["perplexity"] == pytest.approx(task.evaluate(model)["perplexity"], rel=1e-4)


def test_recordings_of_several_lengths_are_padded_for_a_model_that_hears_any(folder):
    for number in range(30):
        record(
            folder / "sound" / f"{number}.wav", np.random.default_rng(number).integers(-9000, 9000, 999 + number).astype(np.int16)
        )
    extractor = Speech2TextFeatureExtractor(feature_size=8, num_mel_bins=8, sampling_rate=RATE)
    extractor.save_pretrained(folder / "whisper")
    task, model = task_of(folder), speech_to_text()
    task.check_model(model)
    assert {"input_features", "attention_mask", "labels"} == task.test[0].keys()
    scores = hp.score(model, task.calibration, "fisher", loss_fn=task.loss)
    hp.prune(model, hp.plan(scores, hp.Budget(heads=0.5)), task.calibration, forward=task.forward)
    assert task.evaluate(model)["perplexity"] > 1


def test_samples_of_every_width_and_channels(tmp_path):
    record(tmp_path / "a.wav", np.array([0, 128, 255], np.uint8), width=1)
    assert samples_of(tmp_path / "a.wav", RATE).tolist() == [-1.0, 0.0, 127 / 128]
    record(tmp_path / "b.wav", np.array([[1000, 3000], [-4000, 0]], np.int16), channels=2)
    assert samples_of(tmp_path / "b.wav", RATE).tolist() == [2000 / 2**15, -2000 / 2**15]
    record(tmp_path / "c.wav", np.array([2**30], np.int32), width=4)
    assert samples_of(tmp_path / "c.wav", RATE).tolist() == [0.5]


def test_mistakes_are_told(folder):
    record(folder / "sound" / "0.wav", np.zeros(9, np.int16), rate=80)
    with pytest.raises(InvalidInput, match=r"0\.wav has 80 samples a second of 2 bytes; expected 160"):
        task_of(folder)
    record(folder / "sound" / "0.wav", np.zeros(RATE + 40, np.int16))
    with pytest.raises(InvalidInput, match=r"0\.wav has 1\.2 seconds, and the model hears 1: the rest of the text would be asked"):
        task_of(folder)
    (folder / "sound" / "0.wav").write_text("no sound")
    with pytest.raises(InvalidInput, match=r"0\.wav cannot be read as \.wav"):
        task_of(folder)
    (folder / "sound" / "0.wav").unlink()
    with pytest.raises(InvalidInput, match=r"0\.wav does not exist"):
        task_of(folder)
    (folder / "rows.csv").write_text("audio,text\n" + "".join(f"sound/{number}.wav,{'b' * 40}\n" for number in range(1, 9)))
    task = task_of(folder)
    with pytest.raises(InvalidInput, match="a text has 40 tokens, WhisperForConditionalGeneration takes at most 32"):
        task.check_model(hp.load(folder / "whisper"))
    with pytest.raises(InvalidInput, match="as Whisper; LlamaForCausalLM is none"):
        task.check_model(llama())
    (folder / "whisper" / "preprocessor_config.json").unlink()
    with pytest.raises(InvalidInput, match="needs the feature extractor of sound"):
        task_of(folder)
    with pytest.raises(InvalidInput, match="name yours, for example speech-recognition,"):
        default_task(str(folder / "whisper"))
    ENCODERS["wav2vec2_conformer"].make().save_pretrained(folder / "listener")
    with pytest.raises(InvalidInput, match="is for a Wav2Vec2ConformerForSequenceClassification; write one"):
        default_task(str(folder / "listener"))
