"""Pruned models on disk: ordinary transformers folders whose config says which heads are left."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from inspect import signature
from pathlib import Path
from typing import Any, TypeVar, overload

import torch
import transformers
from torch import Tensor, nn
from transformers import AutoModel, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, MODEL_FOR_MASKED_LM_MAPPING_NAMES

from headprune.arguments import check_arguments, check_options, is_whole, one_line
from headprune.errors import CorruptCheckpoint, InvalidInput, UnsupportedModel
from headprune.head_map import HeadMap
from headprune.hub import local_folder
from headprune.model_folder import refuse_replacing, whole_model
from headprune.models import attention_sites
from headprune.models.streamed import refuse_streamed
from headprune.nn import VariableHeadAttention
from headprune.nn.given import plain_module, refuse_wrapped
from headprune.surgery import modeling_headprune
from headprune.surgery.companions import copy_companions, origin_of, refuse_companion
from headprune.surgery.config_file import built_as, load_config
from headprune.surgery.cut import cut
from headprune.surgery.load_options import CHECKED, check_load_options
from headprune.surgery.loading_report import check_report
from headprune.surgery.manifest import check_config, check_manifest, write_manifest
from headprune.surgery.plain_checkpoint import load_plain, save_plain
from headprune.surgery.record import SECTION, kept_heads, record_of
from headprune.surgery.remote_code import write_remote_code
from headprune.surgery.saved_with_code import SavedWithCode, save_with_code

Plain = TypeVar("Plain", bound=nn.Module)
SAVE_OPTIONS = set(signature(PreTrainedModel.save_pretrained).parameters) - {"self", "save_directory", "kwargs"}
SAVE_OPTIONS |= {"safe_serialization"}  # transformers 5 knows no other way
SIZE = re.compile(r"\s*\d+(\.\d+)?\s*[KMGT]B\s*", re.IGNORECASE)
# Of from_pretrained; with a folder it takes no state_dict.
OWN_OPTIONS = ("config", "local_files_only", "output_loading_info", "ignore_mismatched_sizes", "state_dict")
LANGUAGE_HEADS = {*MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values(), *MODEL_FOR_MASKED_LM_MAPPING_NAMES.values()}


def save(
    model: nn.Module,
    folder: str | os.PathLike[str],
    *,
    tokenizer: Any = None,
    processor: Any = None,
    source: str | os.PathLike[str] | None = None,
    overwrite: bool = False,
    **options: Any,
) -> Path:
    """Writes `model` to `folder`: all of it or nothing; a model of headprune's that stood there is replaced at the end.

    A transformers model becomes a folder for `load` and for `AutoModel*.from_pretrained(folder, trust_remote_code=True)`; any
    other module becomes its weights and head maps, for `load(folder, model=the unpruned module)`.

    Args:
        tokenizer, processor: objects to save beside it. Tokenizer, processor and pooling files that are not given are
            copied from `source`, by default where the model was loaded from: a folder, or the Hub's cache.
        overwrite: replace a model that headprune did not write too. Files of `folder` that are no part of a model stay.
        options: as for `save_pretrained` (max_shard_size, ...). With is_main_process=False nothing is written.

    Raises UnsupportedModel where adapters are attached, weights are quantised, or modules share some that the class does not tie,
    InvalidInput where `folder` holds other things than a model, or one that headprune did not write, HeadpruneError where the disk
    refuses.
    """
    model = plain_module(model)
    refuse_wrapped(model)
    check_arguments(save, locals())
    refuse_streamed(model, "in the folder that it was opened from", "copy that, or save what hp.load gives")
    refuse_adapters(model, "save")
    check_recorded(model)
    quantised = next((name for name, weight in model.named_parameters() if type(weight) not in (nn.Parameter, Tensor)), None)
    if quantised is not None:
        raise UnsupportedModel(
            f"{quantised} holds {type(model.get_parameter(quantised)).__name__} weights, quantised or spread over devices, which "
            "are not saved. Save the model before quantising it, and quantise what load gives: the rounding needs no data."
        )
    if isinstance(model, PreTrainedModel):
        check_save_options(options)
    for companion in (tokenizer, processor):
        refuse_companion(companion)
    folder = refuse_replacing(folder, overwrite)
    origin = origin_of(model, source)
    if isinstance(model, PreTrainedModel) and not options.get(
        "is_main_process", True
    ):  # what that one writes would be replaced by nothing
        return folder
    with whole_model(folder) as draft:
        if isinstance(model, PreTrainedModel):
            with shared_named(model):
                model.save_pretrained(draft, **options)
            if not isinstance(model, SavedWithCode):
                write_remote_code(model, draft)
        else:
            save_plain(model, draft, **options)
        for companion in (tokenizer, processor):
            if companion is not None:
                companion.save_pretrained(draft)
        if origin is not None:
            copy_companions(origin, draft)
        if isinstance(model, PreTrainedModel):
            write_manifest(draft)
    return folder


def check_save_options(options: Mapping[str, Any]) -> None:
    """InvalidInput where they are none of `save_pretrained`, or `save` cannot hand them on."""
    check_options("save", options, SAVE_OPTIONS)
    if options.get("push_to_hub"):
        raise InvalidInput("save with push_to_hub=True would upload half of the folder; call push_to_hub(name) on what load gives.")
    weights = options.get("state_dict")
    if weights is not None and not isinstance(weights, Mapping):
        raise InvalidInput(f"state_dict is {one_line(weights)}; expected a dict of tensors, as model.state_dict() gives.")
    size = options.get("max_shard_size", 1)
    if not (SIZE.fullmatch(size) if isinstance(size, str) else is_whole(size) and size > 0):
        raise InvalidInput(f"max_shard_size is {size!r:.80}; expected a number of bytes, 1 or more, or a size such as '5GB'.")
    check_arguments(PreTrainedModel.save_pretrained, options)


@contextmanager
def shared_named(model: nn.Module) -> Iterator[None]:
    """UnsupportedModel in place of transformers' refusal of weights that lie in several modules, which lists all of them."""
    try:
        yield
    except RuntimeError as error:
        names: dict[int, list[str]] = {}
        for name, weight in model.state_dict(keep_vars=True).items():
            names.setdefault(id(weight), []).append(name)
        shared = next((found for found in names.values() if len(found) > 1 and repr(found[0]) in str(error)), None)
        if "shared tensors" not in str(error) or shared is None:
            raise
        raise UnsupportedModel(
            f"{' and '.join(shared[:2])} are one, which {type(model).__name__} does not tie by itself, so that it would not load "
            "again. Give each module its own (copy.deepcopy)."
        ) from error


def check_recorded(model: nn.Module) -> None:
    """InvalidInput where a part of the model was cut by itself, so that the model does not say how. A VariableHeadAttention of a
    plain module says so itself."""
    recorded = tuple(f"{name}." for name in record_of(model).get("sites", ()))
    if record_of(model).get("regularised"):
        return
    for name, module in model.named_modules():
        if isinstance(module, VariableHeadAttention) and not isinstance(model, PreTrainedModel):
            continue
        if isinstance(module.__dict__.get("head_map"), HeadMap) and not f"{name}.".startswith(recorded):
            raise InvalidInput(
                f"{name} was cut in a part of the model, which the whole model knows nothing of. Cut by way of the whole "
                f"{type(model).__name__}, or save the part."
            )


@overload
def load(
    folder: str | os.PathLike[str], *, model: None = None, base: bool = False, verify: bool = True, **options: Any
) -> PreTrainedModel: ...


@overload
def load(folder: str | os.PathLike[str], *, model: Plain, verify: bool = True, **options: Any) -> Plain: ...


def load(
    folder: str | os.PathLike[str], *, model: nn.Module | None = None, base: bool = False, verify: bool = True, **options: Any
) -> nn.Module:
    """A model from `folder`, pruned by headprune or not, in eval mode. A name on the Hub ("owner/name", "owner/name@revision") goes
    too: it is looked for in the Hub's cache, and fetched unless HF_HUB_OFFLINE is set.

    Args:
        model: for a folder that holds a module which is not of transformers: the unpruned module, whose heads are cut and
            whose weights are replaced, in place.
        base: without the head of a language model, as AutoModel loads it: embedders are often saved under one.
        verify: compare the files with the digests that `save` wrote.
        options: as for `from_pretrained` (dtype, device_map, attn_implementation, ...). Where groups are ragged the attention
            is "headprune" unless you name another.

    Raises InvalidInput where the folder is no model or an option does not go with it, HeadpruneError where the memory is too small,
    UnsupportedModel where it is of a type with its own code, CorruptCheckpoint, naming the file, where it is not what was saved, or
    its weights do not fit its config or lack some of a layer. What a task adds to the base model (a classifier, a pooler) may be
    missing, and is warned of.
    """
    check_arguments(load, locals())
    folder = local_folder(folder)
    if model is not None:
        check_options("load with model=", {**options, **({"base": base} if base else {})}, ("verify",))
        return load_plain(folder, model, verify=verify)
    check_load_options(options)
    taken = next((name for name in OWN_OPTIONS if name in options), None)
    if taken is not None:
        raise InvalidInput(f"load sets {taken} itself; leave it out. The config is the folder's own, and its weights must fit it.")
    config = load_config(folder)
    section = getattr(config, SECTION, None)
    kept = kept_heads(section)
    if verify:
        check_manifest(folder)
    model_class = class_of(config, base)
    built: Any = pruned_class(model_class, section)  # what from_pretrained returns depends on output_loading_info
    with built_as(model_class, folder, sorted(set(options) - CHECKED)):
        try:
            found, report = built.from_pretrained(
                folder, config=config, local_files_only=True, output_loading_info=True, ignore_mismatched_sizes=True, **options
            )
        except TypeError as error:
            if "unexpected keyword argument" not in str(error):
                raise
            raise InvalidInput(f"load: {error}; expected options of from_pretrained (dtype, device_map, ...).") from None
    check_report(found, report, folder, modeling_headprune.renamed(found, kept), base)
    found.name_or_path = os.path.abspath(folder)  # its tokenizer is looked for there when it is saved, maybe from another folder
    if options.get("attn_implementation") not in (None, found.config._attn_implementation):
        found.set_attn_implementation(options["attn_implementation"])  # the cut chose what runs ragged groups best
    if section:
        save_with_code(found, model_class)
    loaded: PreTrainedModel = found
    return loaded


def refuse_adapters(model: nn.Module, doing: str) -> None:
    """UnsupportedModel where peft has attached adapters, naming what is then not done."""
    if hasattr(model, "peft_config") or getattr(model, "_hf_peft_config_loaded", False):
        raise UnsupportedModel(
            f"{type(model).__name__} has adapters attached, whose weights are not the model's. Call merge_and_unload() and {doing} "
            "what it returns, or save the adapters by themselves with save_pretrained."
        )


def skeleton(folder: str | os.PathLike[str], base: bool = False) -> PreTrainedModel:
    """The model of `folder` without its weights (on the meta device): sites, head maps and sizes at no cost. Raises
    what `load` does of the config."""
    folder = local_folder(folder, weights=False)
    config = load_config(folder)
    check_config(folder)
    model_class = class_of(config, base)
    built: Any = pruned_class(model_class, getattr(config, SECTION, None))
    with torch.device("meta"), built_as(model_class, folder):
        made: Any = built(config)
    model: PreTrainedModel = made.to("meta", config.dtype or torch.float32)  # XLNet's weights are made on the CPU nevertheless
    return model


def class_of(config: transformers.PreTrainedConfig, base: bool = False) -> type[PreTrainedModel]:
    """The class that the config names, else the base model of its type. base: that too where the config names a language model."""
    for name in config.architectures or ():
        name = name.removeprefix(modeling_headprune.PREFIX)
        named: Any = getattr(transformers, name, None)
        if not (isinstance(named, type) and issubclass(named, PreTrainedModel)):
            continue
        if not (base and name in LANGUAGE_HEADS and not getattr(config, "is_encoder_decoder", False)):
            return named
    mapping: Any = AutoModel._model_mapping
    try:
        known: type[PreTrainedModel] = mapping[type(config)]
    except KeyError:
        raise UnsupportedModel(f"no transformers class is known for a {type(config).__name__}.") from None
    return known


def names_base(folder: str | os.PathLike[str], names: Iterable[str]) -> bool:
    """Whether the attentions `names` are called as in the base model of `folder`, which was saved under the head of another."""
    folder, names = local_folder(folder, weights=False), set(names)
    config = load_config(folder)
    if not names or class_of(config, base=True) is class_of(config):
        return False
    return names <= {site.name for site in attention_sites(skeleton(folder, base=True))}


def pruned_class(model_class: type[PreTrainedModel], section: dict[str, Any] | None) -> type[PreTrainedModel]:
    """`model_class` whose instances are built with only the heads that `section` keeps, so that sliced weights load."""
    if not section:
        return model_class
    # The same name, so that a further save names a class that transformers has.
    name, module = model_class.__name__, model_class.__module__
    if section.get("regularised"):
        return modeling_headprune.pruned_class(name, model_class, module)
    kept = kept_heads(section)

    def __init__(self: Any, config: Any, *args: Any, **options: Any) -> None:
        saved = getattr(config, SECTION)
        delattr(config, SECTION)  # what is built first is the whole original
        with modeling_headprune.whole(config):
            model_class.__init__(self, config, *args, **options)
        try:
            cut(self, modeling_headprune.renamed(self, kept), proven=True)
        except ValueError as error:  # InvalidInput too
            raise CorruptCheckpoint(f"the headprune section of the config does not fit: {error}") from None
        setattr(config, SECTION, saved)

    return type(name, (model_class,), {"__init__": __init__, "__module__": module})
