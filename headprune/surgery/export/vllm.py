"""vllm: a folder for vLLM's Transformers backend (`vllm serve FOLDER --trust-remote-code`): equal groups in each layer, said in
transformers' `per_layer_config`, and code that builds the layers of such counts without headprune."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from headprune.errors import UnsupportedModel
from headprune.surgery.checkpoint import load
from headprune.surgery.export.regularise import regularise
from headprune.surgery.export.same_output import same_output, small_output
from headprune.surgery.export.target import refuse_other_weights, refuse_unknown, target
from headprune.surgery.modeling_headprune import PREFIX, differs_by_itself
from headprune.surgery.record import SECTION
from headprune.surgery.remote_code import write_remote_code


@target("vllm", "vLLM's Transformers backend, with --trust-remote-code")
def write_vllm(model: PreTrainedModel, folder: Path, options: dict[str, Any]) -> list[str]:
    refuse_unknown(options)
    refuse_other_weights(model)
    if not model._can_set_attn_implementation():
        raise UnsupportedModel(f"{type(model).__name__} does not dispatch its attention, as vLLM needs it. Export to stock.")
    expected = small_output(model)
    changed = regularise(model)
    if getattr(model.config, SECTION, None) and (not model.config.is_heterogeneous or differs_by_itself(model.config)):
        raise UnsupportedModel(f"the layers of {type(model).__name__} cannot be told apart in per_layer_config. Export to stock.")
    model.save_pretrained(folder)
    write_remote_code(model, folder)
    path = folder / "config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    if "auto_map" in config:
        # A name that vLLM has no model of its own for, so that it takes the class in the folder.
        config["architectures"] = [f"{PREFIX}{name}" for name in config["architectures"]]
        path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    return [str(changed), same_output(expected, small_output(load(folder)), "the folder, in transformers,")]
