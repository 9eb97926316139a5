"""Makes a saved folder load with `AutoModel*.from_pretrained(folder, trust_remote_code=True)`, also without headprune."""

from __future__ import annotations

import json
from pathlib import Path

import transformers
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.models.auto import modeling_auto

from headprune.errors import UnsupportedModel
from headprune.surgery import modeling_headprune
from headprune.surgery.layout import layout_of
from headprune.surgery.modeling_headprune import PREFIX
from headprune.surgery.one_file import one_file
from headprune.surgery.record import SECTION

FILE = Path(modeling_headprune.__file__)


def write_remote_code(model: PreTrainedModel, folder: Path) -> None:
    """Adds modeling_headprune.py and names it in the config.json that `save_pretrained` wrote to `folder`."""
    stock = stock_class(type(model))
    path = folder / "config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    config["architectures"] = [stock.__name__]
    if config.get(SECTION):
        config[SECTION]["layout"] = layout = layout_of(model, stock)
        if layout is None and config[SECTION].get("regularised"):
            raise UnsupportedModel(
                f"{stock.__name__} with dead heads differs from its class in more than can be written down (a hook, say; remove "
                "it), and would not load again. Export to stock, or save the model without them."
            )
        config["auto_map"] = auto_map(model.config, stock)
        (folder / FILE.name).write_text(one_file(modeling_headprune), encoding="utf-8")
    path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def stock_class(found: type[PreTrainedModel]) -> type[PreTrainedModel]:
    """The class of transformers that `found` is, or was made from; `found` itself where there is none."""
    for candidate in found.__mro__:
        name = candidate.__name__.removeprefix(PREFIX)
        if issubclass(candidate, PreTrainedModel) and name != "PreTrainedModel" and hasattr(transformers, name):
            stock: type[PreTrainedModel] = getattr(transformers, name)
            return stock
    return found


def auto_map(config: PreTrainedConfig, saved: type[PreTrainedModel]) -> dict[str, str]:
    """Auto class -> the class in modeling_headprune.py, for every task that transformers has for this kind of model; where it has
    several classes for one task (DeiT's with and without a teacher), the one that is `saved`."""
    found = {}
    for name in sorted(modeling_auto.__all__):
        mapping = getattr(getattr(modeling_auto, name), "_model_mapping", None)
        if not name.startswith("AutoModel") or mapping is None or type(config) not in mapping:
            continue
        classes = mapping[type(config)]
        several = list(classes) if isinstance(classes, (tuple, list)) else [classes]
        chosen = saved if saved in several else several[0]
        found[name] = f"{FILE.stem}.{PREFIX}{chosen.__name__}"
    return found
