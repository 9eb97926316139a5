"""Prunes a model on disk: no more of it is in memory than the attentions of one layer."""

from __future__ import annotations

import json
import logging
import os
import shutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from headprune.arguments import check_arguments
from headprune.errors import HeadpruneError, InvalidInput, UnsupportedModel
from headprune.files import clear_disk_errors, path_of, read_json, write_json, write_text
from headprune.hub import local_folder
from headprune.model_folder import refuse_replacing, replace_model
from headprune.models import attention_sites, gated
from headprune.models.batches import several
from headprune.models.placement import refuse_absent
from headprune.models.shards import INDEX, SINGLE, Shards, Stored, open_shards
from headprune.models.site import AttentionSite
from headprune.models.streamed import reader_of
from headprune.models.tiny_inputs import tiny_inputs, without_padding
from headprune.planning.pruning_plan import PruningPlan, check_plan
from headprune.scoring.batch_identity import checksum
from headprune.scoring.layer_states import CLAIM, take_over
from headprune.surgery.checkpoint import names_base, skeleton
from headprune.surgery.companions import copy_companions
from headprune.surgery.compensate import Resolved, refuse_uncompensated
from headprune.surgery.config_file import load_config, refuse_adapters
from headprune.surgery.cut import cut
from headprune.surgery.cutting import Cutting, changed_shapes
from headprune.surgery.manifest import file_digest, write_manifest
from headprune.surgery.normal_equations import get_solver
from headprune.surgery.open_streamed import open_streamed
from headprune.surgery.per_layer_config import validated_quietly
from headprune.surgery.prune import PruneReport
from headprune.surgery.rehearse import TOLERANCE
from headprune.surgery.remote_code import write_remote_code
from headprune.surgery.savings import Savings
from headprune.surgery.shard_writer import write_shard
from headprune.surgery.streamed_compensation import resolve_streamed

log = logging.getLogger("headprune")
DRAFT_KIND = "folder_being_pruned"
DIGESTS, DIGESTS_KIND = "digests.json", "digests_of_a_folder_being_pruned"
AT_ONCE = 2  # files


def prune_folder(
    source: str | os.PathLike[str],
    plan: PruningPlan,
    target: str | os.PathLike[str],
    calibration: Iterable[Any] | None = None,
    *,
    device: torch.device | str = "cpu",
    forward: Callable[[nn.Module, Any], Any] | None = None,
    token_mask: Callable[[Any], Tensor | None] | None = None,
    compensation: str = "least_squares",
    feed_forward: bool = False,
    verify: bool = True,
    overwrite: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> PruneReport:
    """Writes the model of `source` without the heads that `plan` lets go to `target`, a folder as `hp.save` writes it.

    Weight files are written two at a time; a killed run keeps those whose digests were recorded, all but the last. They are not
    forced to the disk: where the machine itself goes down soon after, `hp.load` says which are off. Peak memory: the projections of
    the attentions of one or two layers. With `calibration` the output projections are re-solved first, layer by layer
    (`headprune.surgery.streamed_compensation`); that holds two layers, and a killed run goes on behind the last whole layer.
    Half-done work lies in hidden folders beside `target`.

    Args:
        device: where the layers run, for compensation and the check.
        forward, token_mask, compensation, feed_forward: as in `hp.prune`.
        verify: run a few tokens through the new folder and compare with the old one, the heads gated.
        overwrite: as in `hp.save`.
        progress: called with (layers and files done, layers and files).

    Raises InvalidPlan where the plan is for another model, CorruptCheckpoint naming a weight file that is missing or cut short,
    UnsupportedModel where the weights of an attention lie in the files in another form than in memory. `source` is only read,
    and `target` appears when it is complete.
    """
    check_arguments(prune_folder, locals())
    refuse_absent(device)
    source, target = local_folder(source), path_of(target)
    if source.resolve().is_relative_to(target.resolve()):
        raise InvalidInput(f"{target} {'holds' if source.resolve() != target.resolve() else 'is'} the source; give another folder.")
    refuse_replacing(target, overwrite)
    get_solver(compensation)
    refuse_uncompensated(calibration, feed_forward)
    refuse_adapters(source)
    base = names_base(source, plan)
    shards, model = open_shards(source), skeleton(source, base)
    check_plan(plan, model)
    sites = {site.name: site for site in attention_sites(model)}
    kept = {name: heads for name, heads in plan.items() if len(heads) < sites[name].head_map.query_heads}
    for name in kept:
        refuse_unsuited(sites[name])
    savings, before = Savings.of(model, sites, kept), model.state_dict()
    cut(model, kept, verify=False)
    cutting = Cutting(source, shards, kept, changed_shapes(before, model.state_dict()), base)
    steps = Steps(progress, len(shards.files))
    draft, work = (target.with_name(f".{target.name}.{name}") for name in ("part", "work"))
    batches = None if calibration is None else list(several(calibration, "calibration"))
    resolved: list[Resolved] = []
    if batches is not None and kept:
        resolved, cutting.solved = resolve_streamed(
            reader_of(open_streamed(source, device=device, base=base)),
            plan,
            batches,
            work,
            forward=forward,
            token_mask=token_mask,
            method=compensation,
            feed_forward=feed_forward,
            progress=steps.layers,
        )
    with clear_disk_errors(target):
        take_up(draft, shards, plan, None if batches is None else (compensation, feed_forward, batches))
        digests = write_shards(draft, cutting, steps)
        finish(draft, cutting, model, digests)
    if verify:
        check_folder(source, draft, kept, cutting.solved, device, base)
    with clear_disk_errors(target):
        (draft / DIGESTS).unlink()
        (draft / CLAIM).unlink()  # last: a draft without it is nobody's
        replace_model(draft, target)
        shutil.rmtree(work, ignore_errors=True)
    return PruneReport(savings, tuple(resolved), done=True)


def write_shards(draft: Path, cutting: Cutting, steps: Steps) -> dict[str, str]:
    """File -> its digest. A file of an earlier try stays where it has the digest that was recorded for it: after a machine went
    down its bytes may not be those that were written."""
    earlier = recorded_digests(draft / DIGESTS)

    def written(file: str) -> str:
        path = draft / file
        if not (file in earlier and path.exists() and file_digest(path) == earlier[file]):
            write_shard(path, cutting.entries(file), cutting.shards.metadata[file])
            return file_digest(path)
        return earlier[file]

    recorded: dict[str, str] = {}
    with ThreadPoolExecutor(AT_ONCE) as writers:
        made = {file: writers.submit(written, file) for file in cutting.shards.files}
        try:
            for done, (file, digest) in enumerate(made.items(), 1):
                recorded[file] = digest.result()
                write_json(draft / DIGESTS, DIGESTS_KIND, {"digests": earlier | recorded})
                steps.files(done)
        except BaseException:
            writers.shutdown(cancel_futures=True)
            raise
    return recorded


def recorded_digests(path: Path) -> dict[str, str]:
    """What an earlier try recorded. Raises InvalidInput where the file was damaged."""
    if not path.exists():
        return {}
    try:
        return dict(read_json(path, DIGESTS_KIND)["digests"])
    except (InvalidInput, KeyError, TypeError, ValueError) as error:
        raise InvalidInput(
            f"{path} is damaged ({error}). Remove it to go on: the weight files that an earlier try has written are then written "
            "again; what it has re-solved stays."
        ) from None


def refuse_unsuited(site: AttentionSite) -> None:
    """UnsupportedModel where an attention cannot be cut in the files alone."""
    if site.head_modules:
        raise UnsupportedModel(f"{site.name} numbers modules by head, and so their files; load the model whole to prune it.")
    if not site.has_layers:
        raise UnsupportedModel(
            f"{site.name} ({type(site.module).__name__}) holds its heads in no linear layers; load the model whole to prune it."
        )
    if not site.proven:
        raise UnsupportedModel(
            f"{site.name} is not a known attention, and must be tried in memory; load the model whole to prune it."
        )


class Steps:
    """Progress over layers, where there are such, and files."""

    def __init__(self, progress: Callable[[int, int], None] | None, files: int) -> None:
        self.progress, self.total_files, self.total_layers = progress, files, 0

    def layers(self, done: int, layers: int) -> None:
        self.total_layers = layers
        self._tell(done)

    def files(self, done: int) -> None:
        self._tell(self.total_layers + done)

    def _tell(self, done: int) -> None:
        if self.progress:
            self.progress(done, self.total_layers + self.total_files)


@torch.no_grad()
def check_folder(
    source: Path,
    draft: Path,
    kept: Mapping[str, Sequence[int]],
    solved: Mapping[str, Stored],
    device: torch.device | str,
    base: bool = False,
) -> None:
    """HeadpruneError unless `draft` gives, in fp32, what `source` gives with the removed heads gated and the solved weights in
    place, which the files of `draft` have rounded to their own dtype."""
    stored: Any = load_config(source).dtype or open_shards(source).dtype
    try:
        gated_model, pruned = (open_streamed(folder, device=device, dtype=torch.float32, base=base) for folder in (source, draft))
    except UnsupportedModel as error:
        log.warning("the pruned folder was not checked by a forward pass: %s", error)
        return
    inputs = tiny_inputs(gated_model)
    if inputs is None:
        log.warning("the pruned folder was not checked by a forward pass: nothing is known to run %s on", type(pruned).__name__)
        return
    placed = {name: value.to(device) for name, value in inputs.items()}
    reader_of(gated_model).instead = dict(solved)
    with gated(gated_model, kept):
        expected = without_padding(gated_model(**placed)[0].double(), placed)
    off = float((without_padding(pruned(**placed)[0].double(), placed) - expected).norm() / expected.norm())
    if not off <= (max(TOLERANCE, 16 * torch.finfo(stored).eps) if solved else TOLERANCE):
        shutil.rmtree(draft)
        raise HeadpruneError(
            f"the pruned folder failed its own check: its outputs are {off:.1e} off (relative) those of {source} with the same "
            f"heads gated. Nothing was written; please report the model's class, {type(pruned).__name__}."
        )


def take_up(draft: Path, shards: Shards, plan: PruningPlan, compensated: tuple[str, bool, Sequence[Any]] | None) -> None:
    """Makes `draft`, or goes on with what a killed run left there for the same files, plan and compensation (its method, whether of
    feed-forwards too, and the batches; what forward and token_mask do cannot be told apart)."""
    method, feed_forward, batches = compensated or (None, False, ())
    now = {
        "source": str(shards.folder.resolve()), "keep": {name: list(heads) for name, heads in plan.items()},
        "files": shards.sizes(), "compensation": method, "feed_forward": feed_forward,
        "batches": [checksum(batch) for batch in batches],
    }  # fmt: skip
    take_over(draft, DRAFT_KIND, now)


def finish(draft: Path, cutting: Cutting, model: PreTrainedModel, digests: Mapping[str, str]) -> None:
    """What a folder has beside its weights."""
    shards = cutting.shards
    with validated_quietly():
        model.config.save_pretrained(draft)
    write_remote_code(model, draft)
    copy_companions(shards.folder, draft)
    if shards.files != [SINGLE]:
        entries = {entry.name: (file, entry.nbytes) for file in shards.files for entry in cutting.entries(file)}
        total = sum(nbytes for _, nbytes in entries.values())
        index = {"metadata": {"total_size": total}, "weight_map": {name: file for name, (file, _) in entries.items()}}
        write_text(draft / INDEX, json.dumps(index, indent=2, sort_keys=True) + "\n")
    write_manifest(draft, digests)
