"""What from_pretrained reports of weights that are missing or do not fit: it fills both with random ones, and tells at most so."""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Iterable, Mapping
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from headprune.errors import CorruptCheckpoint

log = logging.getLogger("headprune")
NUMBERED = re.compile(r"\.\d+\.")  # in one of many layers
SHOWN = 3  # names in one message


def check_report(
    model: PreTrainedModel, report: Mapping[str, Any], folder: str | os.PathLike[str], cut_ones: Iterable[str], base: bool = False
) -> None:
    """CorruptCheckpoint where `report` has weights of other shapes than the config's, or `folder` lacks some of a layer, of an
    embedding, or of an attention out of `cut_ones`. What a task adds to the base model (a pooler, a classifier) may be missing in
    stock folders, and is warned of unless `base` was asked for."""
    wrong = sorted(report["mismatched_keys"])
    if wrong:
        name, have, expected = wrong[0]
        raise CorruptCheckpoint(
            f"{folder} does not load as {type(model).__name__}: its config asks for {name} {list(expected)}, the weights hold "
            f"{list(have)}{f', and {len(wrong) - 1} more differ' if len(wrong) > 1 else ''}."
        )
    missing, parameters = sorted(report["missing_keys"]), dict(model.named_parameters())
    inside = tuple(f"{name}." for name in cut_ones)
    lacking = [name for name in missing if name.startswith(inside) or (name in parameters and is_needed(name, model))]
    if lacking:
        raise CorruptCheckpoint(f"{folder} lacks weights that its config promises: {listed(lacking)}.")
    random = [name for name in missing if name in parameters]
    if random and not base:
        log.warning("%s lacks %s, which are random until they are trained", folder, listed(random))


def is_needed(name: str, model: PreTrainedModel) -> bool:
    """Whether the parameter is of a layer or an embedding of the base model, without which it is another one."""
    module, prefix = model.get_submodule(name.rpartition(".")[0]), f"{model.base_model_prefix}."
    in_base = model.base_model is model or name.startswith(prefix)
    return in_base and (NUMBERED.search(f".{name}") is not None or isinstance(module, nn.Embedding))


def listed(names: list[str]) -> str:
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return f"{', '.join(names[:SHOWN])}{more}"
