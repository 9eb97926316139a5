"""Commands that cut, convert and show models, and that nothing is half-written."""

import json
import resource
from pathlib import Path

import pytest
from command_line import only_error
from letter_tokenizer import letter_tokenizer
from tiny_decoders import decoder
from tiny_models import bert, llama
from transformers import BertModel, SiglipVisionConfig, SiglipVisionModel

from headprune.model_folder import is_ours
from headprune.planning import PruningPlan
from headprune.scoring import score
from headprune.surgery import cut, diff, load, save


def test_plan_prune_and_inspect_on_a_folder(call, tmp_path):
    save(bert(), "dense")
    score(bert(), criterion="magnitude_l1").save("scores.json")
    code, out, err = call("plan", "scores.json", "--heads", "0.5")
    assert code == 0, err
    assert "4 of 8 query heads go" in out
    code, out, err = call("prune", "./dense", "plan.json", "-o", "pruned")
    assert code == 0, err
    kept = PruningPlan.load("plan.json")
    assert {name: tuple(site["kept"]) for name, site in load("pruned").config.headprune["sites"].items()} == kept.keep
    code, out, err = call("inspect", "./pruned")
    assert code == 0, err
    assert "encoder.layer.1.attention" in "".join(out.split())
    assert "".join("■" if head in kept["encoder.layer.1.attention"] else "·" for head in range(4)) in out
    code, out, err = call("inspect", "./pruned", "--json")
    assert {row["attention"]: tuple(row["kept"]) for row in json.loads(out)["attentions"]} == kept.keep


def test_the_tokenizer_s_files_stay_as_they_were_written(call):
    save(llama(), "dense", tokenizer=letter_tokenizer())
    written = Path("dense/tokenizer_config.json")
    old = json.loads(written.read_text()) | {"tokenizer_class": "PreTrainedTokenizerFast"}  # as transformers 4 writes, and reads
    written.write_text(json.dumps(old))
    PruningPlan.from_keep(llama(), {"model.layers.0.self_attn": [0]}).save("plan.json")
    for command in (["prune", "./dense", "plan.json", "-o", "./pruned"], ["export", "./pruned", "--to", "stock", "-o", "stock"]):
        code, _, err = call(*command)
        assert code == 0, err
    assert Path("stock/tokenizer_config.json").read_text() == written.read_text()


def test_the_model_that_is_read_is_not_written_over(call):
    bert().save_pretrained("dense")
    PruningPlan.from_keep(bert(), {"encoder.layer.0.attention": [0]}).save("plan.json")
    for command in (
        ["prune", "./dense", "plan.json"],
        ["prune", "./dense", "plan.json", "--streamed"],
        ["export", "dense", "--to", "stock"],
    ):
        code, _, err = call(*command, "-o", "dense/../dense")
        assert code == 2
        assert "is the model that is read; give another folder" in only_error(err)
    assert load("dense").num_parameters() == bert().num_parameters()


@pytest.mark.parametrize(
    "command",
    [["prune", "./dense", "plan.json"], ["prune", "./dense", "plan.json", "--streamed"], ["export", "./dense", "--to", "stock"]],
    ids=["prune", "streamed", "export"],
)
def test_a_model_that_headprune_did_not_write_is_replaced_on_request_alone(call, command, monkeypatch):
    save(bert(), "dense")
    llama().save_pretrained("theirs")
    before = Path("theirs/model.safetensors").read_bytes()
    PruningPlan.from_keep(bert(), {"encoder.layer.0.attention": [0]}).save("plan.json")
    with monkeypatch.context() as patch:
        patch.setattr("headprune.sources.open_model", lambda *_: pytest.fail("a model was opened before the folder was refused"))
        code, _, err = call(*command, "-o", "theirs")
    assert code == 2
    assert "theirs holds a model that headprune did not write" in only_error(err)
    assert "--overwrite" in only_error(err)
    assert Path("theirs/model.safetensors").read_bytes() == before
    for _ in range(2):  # the second time it is headprune's
        code, _, err = call(*command, "-o", "theirs", *([] if is_ours(Path("theirs")) else ["--overwrite"]))
        assert code == 0, err
    assert load("theirs").config.model_type == "bert"


@pytest.mark.parametrize("target", ["gguf", "onnx"])
def test_a_file_is_replaced_by_an_export_on_request_alone(target, call):
    pytest.importorskip(target)
    save(decoder("llama", num_hidden_layers=1), "model")
    output = Path(f"out.{target}")
    output.write_bytes(b"mine")
    command = ("export", "./model", "--to", target, "-o", str(output))
    code, _, err = call(*command)
    assert code == 2
    assert f"{output} is there already; give another name, or --overwrite" in only_error(err)
    assert output.read_bytes() == b"mine"
    code, _, err = call(*command, "--overwrite")
    assert code == 0, err
    assert output.read_bytes() != b"mine"


@pytest.mark.parametrize(
    ("to", "output", "told"),
    [
        ("onnx", "a.gguf", "ends in .onnx, or a folder"),
        ("gguf", "a.ONNX", "ends in .gguf, or a folder"),
        ("stock", "a.gguf", "a folder"),
    ],
)
def test_a_name_of_another_target_s_file_is_refused_before_the_model_is_opened(call, to, output, told, monkeypatch):
    monkeypatch.setattr("headprune.sources.open_model", lambda *_: pytest.fail("a model was opened before the name was refused"))
    code, _, err = call("export", "minilm", "--to", to, "-o", output)
    assert code == 2
    assert only_error(err).startswith(f"error: {output} ends in {Path(output).suffix}, and an export to {to} writes no such file")
    assert told in only_error(err)


def test_diff_says_what_is_gone_and_what_that_saves(call):
    model = llama()
    save(model, "dense")
    cut(model, {"model.layers.0.self_attn": [0, 1, 3], "model.layers.1.self_attn": [6, 7]})
    save(model, "pruned")
    code, out, err = call("diff", "./dense", "./pruned", "--json")
    assert code == 0, err
    found = json.loads(out)
    assert found == diff(llama(), model).to_json() | {"attentions": found["attentions"]}
    assert found["parameters"] == {"before": sum(p.numel() for p in llama().parameters()), "after": model.num_parameters()}
    assert found["cache_bytes_per_token"] == {"before": 2 * 4 * 16 * 4, "after": (2 + 1) * 16 * 4}
    assert found["attentions"]["model.layers.0.self_attn"] == {
        "before": {"query_heads": 8, "kv_heads": 4, "group_sizes": [2, 2, 2, 2]},
        "after": {"query_heads": 3, "kv_heads": 2, "group_sizes": [2, 1]},
        "removed": [2, 4, 5, 6, 7],
    }
    code, out, _ = call("diff", "./dense", "./pruned")
    assert "2, 4-7" in out
    code, _, err = call("diff", "./pruned", "./dense")
    assert code == 2
    assert "was not made from the first" in only_error(err)


def test_a_pruned_folder_is_exported_to_the_stock_class(call):
    pruned = bert()
    cut(pruned, {"encoder.layer.0.attention": [1], "encoder.layer.1.attention": [0, 2, 3]})
    save(pruned, "pruned")
    code, out, err = call("export", "./pruned", "--to", "stock", "-o", "stock")
    assert code == 0, err
    assert "dead heads" in out
    assert BertModel.from_pretrained("stock").config.num_attention_heads == 4  # BERT divides its hidden size by them
    code, _, err = call("export", "./pruned", "--to", "stock", "-o", "other", "--option", "dtype=f16")
    assert code == 2
    assert "unknown export option 'dtype'" in err
    code, _, err = call("export", "./pruned", "--to", "stock", "-o", "other", "--option", "dtype")
    assert code == 2
    assert "expected name=value" in err
    code, _, err = call("export", "./pruned", "--to", "stock", "-o", "other", "--option", "overwrite=1")
    assert code == 2
    assert "--option overwrite: expected an option of the target" in err
    code, _, err = call("export", "./pruned", "--to", "tensorrt", "-o", "other")
    assert code == 2
    assert "unknown export target" in err


def test_a_disk_that_is_full_while_saving_is_one_line_and_leaves_nothing(call, tmp_path):
    save(bert(), "dense")
    score(bert(), criterion="random").save("scores.json")
    call("plan", "scores.json", "--heads", "0.5")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, limits[1]))
    try:
        code, _, err = call("prune", "./dense", "plan.json", "-o", "out/pruned")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert code == 2
    assert "cannot write out/pruned" in only_error(err)
    assert not (tmp_path / "out").exists()


def test_a_model_that_pools_by_torchs_own_attention_is_inspected(call, tmp_path):
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    SiglipVisionModel(SiglipVisionConfig(**sizes, image_size=16, patch_size=4)).save_pretrained(tmp_path / "siglip")
    for command in (("inspect",), ("diff", "./siglip")):
        code, out, err = call(command[0], "./siglip", *command[1:], "--json")
        assert code == 0, err
        assert json.loads(out)
    code, out, err = call("estimate", "./siglip", "--heads", "0.5", "--device", "h100")
    assert code == 0, err
    assert "its attentions lie in several stacks" in " ".join(out.split())
    code, out, _ = call("inspect", "./siglip", "--json")
    assert [row["attention"] for row in json.loads(out)["attentions"]][-1] == "head.attention"
