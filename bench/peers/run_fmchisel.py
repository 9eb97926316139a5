"""FMCHISEL's OSSCAR (Meng et al. 2024): whole key/value groups, as many in every layer; what stays is re-solved."""

import tempfile

from child import Request, main
from datasets import Dataset
from fmchisel.pruning.osscar.base import OSSCARModifier
from fmchisel.pruning.osscar.utils import helpers
from llmcompressor import oneshot
from transformers import PreTrainedTokenizerFast


def score(model, request: Request):
    """Zeroes what goes in the output projections, and re-solves what stays."""
    rows = [row.tolist() for batch in request.calibration for row in batch["input_ids"]]
    data = Dataset.from_dict({"input_ids": rows, "attention_mask": [[1] * len(row) for row in rows]})
    drop = round(request.heads * model.config.num_key_value_heads)
    recipe = OSSCARModifier(num_drop_mlp_neuron=0, num_drop_attn_group=drop)
    tokenizer = PreTrainedTokenizerFast.from_pretrained(request.model)
    length = len(rows[0])
    oneshot(model=model, processor=tokenizer, dataset=data, recipe=recipe, num_calibration_samples=len(rows), max_seq_length=length)
    return drop


def cut(model, scored, request: Request):
    """Its packing replaces a folder's zeroed model by the smaller one."""
    with tempfile.TemporaryDirectory() as parent:
        folder = f"{parent}/model"
        model.save_pretrained(folder)
        helpers.pack(folder, 0, scored)
        return type(model).from_pretrained(folder, attn_implementation="eager")


main(score, cut)
