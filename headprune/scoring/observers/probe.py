"""Observes how heads copy from the context, on token sequences that are generated here: no data is read.

Random tokens carry no meaning, so a head that attends to the right earlier place on them looks things up in its context.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from headprune.errors import InvalidInput
from headprune.models.site import AttentionSite
from headprune.models.watching import through_headprune, watching
from headprune.ops.call import AttentionCall
from headprune.ops.rows import Rows, rows_of
from headprune.ops.stats import HeadStats
from headprune.ops.watch import Watcher
from headprune.scoring.observations import Need
from headprune.scoring.observer import Observer, Setting, observes
from headprune.scoring.observers.watched_attention import refusing_unwatched
from headprune.scoring.passes import in_eval_mode

SEQUENCES, REPEATED, HAYSTACK, NEEDLE = 4, 48, 256, 8
FUTURE = 1e-6  # attention on later tokens above which a head is not causal


@observes(Need.PROBE)
class Probe(Observer):
    """Repeated random sequences (Olsson et al. 2022) and needles in random haystacks (after Wu et al. 2024), for decoders.

    Raises InvalidInput for a model that reads no token ids, is an encoder-decoder, attends to later tokens, or computes its
    attention by itself.
    """

    runs = "nothing"

    def __init__(self, setting: Setting) -> None:
        super().__init__(setting)
        self._found: dict[str, dict[str, Tensor]] | None = None
        self._seen: set[str] = set()

    def found(self) -> dict[str, dict[str, Tensor]]:
        if self._found is None:
            with in_eval_mode(self.setting.model), torch.no_grad(), through_headprune(self.setting.model):
                self._found = self._probe()
        return self._found

    def reached(self) -> set[str]:
        self.found()
        return set(self._seen)

    def _probe(self) -> dict[str, dict[str, Tensor]]:
        ids, longest = ordinary_tokens(self.setting.model)
        repeated, length = repeated_sequences(ids, longest)
        haystacks, needles, width = needles_in_haystacks(ids, longest)
        sums = {
            site.name: {name: torch.zeros(site.head_map.query_heads, device="cpu") for name in
                        ("probe_induction", "probe_previous", "probe_retrieval")}
            for site in self.setting.sites
        }  # fmt: skip

        def copying(site: AttentionSite, rows: Rows) -> None:
            refuse_future(site, rows)
            found, last = sums[site.name], repeated.shape[1]
            second = slice(last - length, last - 1)  # the last token's successor is not known yet
            found["probe_induction"] += mass_at(rows, second, 1 - length) / SEQUENCES
            found["probe_previous"] += mass_at(rows, slice(1, last), -1) / SEQUENCES

        def looking_up(site: AttentionSite, rows: Rows) -> None:
            cue = slice(haystacks.shape[1] - width, haystacks.shape[1] - 1)
            wanted = needles[rows.sample] + 1 + torch.arange(width - 1, device=rows.probs.device)
            probs = rows.probs[:, cue]
            hits = (probs.argmax(dim=2) == wanted) + 0 * probs.sum(dim=2)  # NaN where the attention is
            sums[site.name]["probe_retrieval"] += hits.mean(dim=1).float().cpu() / SEQUENCES

        for sequences, look in ((repeated, copying), (haystacks, looking_up)):
            with self._looking(look):
                self.setting.model(input_ids=sequences)
        return sums

    @contextmanager
    def _looking(self, look: Callable[[AttentionSite, Rows], None]) -> Iterator[None]:
        def watcher(site: AttentionSite) -> Watcher:
            def seen(call: AttentionCall, _stats: HeadStats | None) -> None:
                self._seen.add(site.name)
                for sample in range(call.batch):
                    look(site, rows_of(call, sample, slice(0, call.query_len)))

            return Watcher(seen)

        with watching(self.setting.sites, watcher), refusing_unwatched(self.setting.sites, self._seen):
            yield


def ordinary_tokens(model: nn.Module) -> tuple[Tensor, int]:
    """(ids that are not special, in random order, [ids]; the longest sequence that the model takes)."""
    try:
        embeddings: Any = model
        table: Tensor | None = embeddings.get_input_embeddings().weight
    except (AttributeError, NotImplementedError):
        table = None
    config = getattr(model, "config", None)
    if table is None or table.dim() != 2 or getattr(config, "is_encoder_decoder", False):
        raise InvalidInput(
            f"{type(model).__name__} is no decoder that reads token ids, so it cannot be probed with generated sequences; choose "
            "a criterion that reads your data."
        )
    special = torch.tensor(sorted(special_ids(config)), dtype=torch.long, device="cpu")
    generator = torch.Generator().manual_seed(0)
    ids = torch.randperm(len(table), generator=generator, device="cpu")
    return ids[~torch.isin(ids, special)].to(table.device), getattr(config, "max_position_embeddings", None) or 2048


def special_ids(config: Any) -> set[int]:
    found: set[int] = set()
    for name in ("pad_token_id", "bos_token_id", "eos_token_id"):
        value = getattr(config, name, None)
        found |= set(value) if isinstance(value, (list, tuple)) else set() if value is None else {value}
    return found


def repeated_sequences(ids: Tensor, longest: int) -> tuple[Tensor, int]:
    """([SEQUENCES, 2 * length]: different tokens, then the same again; length)."""
    length = min(REPEATED, len(ids), longest // 2)
    once = torch.stack([ids.roll(-row * length)[:length] for row in range(SEQUENCES)])
    return torch.cat([once, once], dim=1), length


def needles_in_haystacks(ids: Tensor, longest: int) -> tuple[Tensor, list[int], int]:
    """(sequences that end in their needle's second occurrence; where each first starts; the needle's width).

    The needle's tokens occur in no other place; its first token, the second time, is the cue.
    """
    width = min(NEEDLE, len(ids) // 2)
    needle, hay = ids[:width], ids[width:]
    length = min(HAYSTACK, longest - 2 * width)
    generator = torch.Generator().manual_seed(1)
    places = [1 + (length - 2) * (2 * row + 1) // (2 * SEQUENCES) for row in range(SEQUENCES)]
    rows = []
    for place in places:
        straw = hay[torch.randint(len(hay), (length,), generator=generator, device="cpu").to(hay.device)]
        rows.append(torch.cat([straw[:place], needle, straw[place:], needle]))
    return torch.stack(rows), places, width


def mass_at(rows: Rows, queries: slice, ahead: int) -> Tensor:
    """[query_heads], on the CPU: mean probability, over these rows, of the key `ahead` positions from the query."""
    return (rows.probs[:, queries] * (rows.ahead[queries] == ahead)).sum(dim=2).mean(dim=1).float().cpu()


def refuse_future(site: AttentionSite, rows: Rows) -> None:
    if (rows.probs * (rows.ahead > 0)).sum(dim=2).amax() > FUTURE:
        raise InvalidInput(
            f"{site.name} attends to later tokens; induction and retrieval are measured on decoders. Choose a criterion that "
            "reads your data."
        )
