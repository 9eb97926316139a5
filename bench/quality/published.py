"""Published one-shot methods as we re-implement them, and ours as the repository's recipes have it."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from quality.methods import (
    WEIGHTS,
    Method,
    Plan,
    Planned,
    Setting,
    even_plan,
    global_plan,
    methods,
    plain_cut,
    random_scores,
    recipe_of,
    register,
    resolved_cut,
    scored_by,
)
from torch import nn

import headprune as hp
from headprune.models import attention_sites
from headprune.planning.mask_search import fisher_mask_search
from headprune.run_values import plan_of
from headprune.scoring import Need, Observations, score_observations


def ranked(
    name: str, label: str, form: str, criterion: str, plan: Plan = global_plan, normalize: str = "none", **more: Any
) -> None:
    """A method that is a criterion and an allocation, without compensation."""
    register(Method(name, label, f"{form}, no compensation", plan=plan, cut=plain_cut, **scored_by(criterion, normalize), **more))


register(Method("random", "random", "global, no compensation", random_scores, global_plan, plain_cut, lambda model: WEIGHTS))
ranked("magnitude", "magnitude (L2)", "Li 2017 by head, global", "magnitude_l2", seeded=False)
ranked("michel", "Michel: gate gradient", "Michel 2019: L2 norm by layer, global", "gate_gradient", normalize="layer_l2")
ranked("fisher", "Fisher", "diagonal Fisher of the gates, global", "fisher")
ranked("wanda-sp", "Wanda-sp", "Wanda by head as in An 2024: the same fraction of every layer", "wanda", even_plan("query_head"))
ranked(
    "llm-pruner", "LLM-Pruner's Taylor, re-implemented",
    "Ma 2023: first order, element-wise, summed over query, key, value and output; whole key/value groups; the same fraction of "
    "every layer", "taylor_element", even_plan("kv_group"),
)  # fmt: skip


def as_observed(setting: Setting, observed: Observations) -> Observations:
    return observed


def mask_search(setting: Setting, observed: Observations, fraction: float) -> Planned:
    return Planned(fisher_mask_search(observed, hp.Budget(heads=fraction)))


def mask_tuned(setting: Setting, observed: Observations, planned: Planned, model: nn.Module) -> nn.Module:
    calibration, forward = setting.task.calibration, setting.task.forward
    hp.prune(model, planned.keep, calibration, forward=forward, compensation="mask_tuning")
    return model


register(
    Method(
        "kwon", "Kwon's full method", "Kwon 2022: Fisher mask search, rearrangement by the block Fisher, mask tuning",
        as_observed, mask_search, mask_tuned, lambda model: frozenset({Need.GATE_GRADIENT}),
    )
)  # fmt: skip


def fluctuating(setting: Setting, observed: Observations, fraction: float) -> Planned:
    return global_plan(setting, score_observations(observed, "fluctuation"), fraction)


@torch.no_grad()
def with_mean_in_bias(setting: Setting, observed: Observations, planned: Planned, model: nn.Module) -> nn.Module:
    """b += sum over removed heads of W_h E[O_h], the mean of the dense model; a projection without a bias gets one."""
    for site in attention_sites(model):
        gone = sorted(set(range(site.head_map.query_heads)) - set(planned.keep[site.name]))
        if not gone:
            continue
        module, seen = site.output.module, observed[site.name]
        mean = (seen.input_sum / seen.tokens).view(site.head_map.query_heads, -1)[gone].flatten()
        shift = (module.weight[:, site.columns(tuple(gone))].double() @ mean).to(module.weight)
        if module.bias is None:
            module.bias = nn.Parameter(torch.zeros_like(shift))
        module.bias += shift
    hp.prune(model, hp.PruningPlan.from_keep(model, planned.keep))
    return model


register(
    Method(
        "flap", "FLAP", "An 2024: fluctuation standardised within the layer, global; the removed heads' mean goes into the bias",
        as_observed, fluctuating, with_mean_in_bias, lambda model: frozenset({Need.GRAM}),
    )
)  # fmt: skip


def our_scores(setting: Setting, observed: Observations) -> hp.HeadScores:
    wanted, task = recipe_of(setting.name).score, setting.task
    batches = task.calibration[: wanted.batches]
    return hp.score(setting.model, batches, wanted.criterion, normalize=wanted.normalize, loss_fn=task.loss)


def our_plan(setting: Setting, scores: hp.HeadScores, fraction: float) -> Planned:
    recipe = recipe_of(setting.name, fraction)
    return Planned(plan_of(recipe, setting.model, setting.task, scores))


def our_cut(setting: Setting, scores: hp.HeadScores, planned: Planned, model: nn.Module) -> nn.Module:
    task, wanted = setting.task, recipe_of(setting.name).prune
    calibration = task.calibration if wanted.compensate else None
    hp.prune(model, planned.keep, calibration, forward=task.forward, feed_forward=wanted.feed_forward)
    return model


def cut_with_feed_forwards(setting: Setting, scores: hp.HeadScores, planned: Planned, model: nn.Module) -> nn.Module:
    hp.prune(model, planned.keep, setting.task.calibration, forward=setting.task.forward, feed_forward=True)
    return model


def our_settings(model: str) -> dict[str, Any]:
    return recipe_of(model).model_dump(include={"score", "plan", "prune"})


def settings_with_feed_forwards(model: str) -> dict[str, Any]:
    found = our_settings(model)
    return found | {"prune": found["prune"] | {"feed_forward": True}}


OURS = register(
    Method(
        "ours", "ours", "recipes/<model>.yaml: scores, plan and compensation",
        our_scores, our_plan, our_cut, settings=our_settings,
    )
)  # fmt: skip
register(
    replace(
        OURS, name="ours+ff", label="ours, feed-forwards re-solved too", form="the same, whatever the recipe says of them",
        cut=cut_with_feed_forwards, settings=settings_with_feed_forwards,
    )
)  # fmt: skip


def with_our_compensation() -> None:
    """A plain criterion and our re-solve, to tell the choice of heads from the compensation."""
    for name in ("random", "magnitude", "michel", "fisher", "wanda-sp", "llm-pruner"):
        plain = methods()[name]
        form = plain.form.replace("no compensation", "our compensation")
        register(
            replace(plain, name=f"{name}+ours", label=f"{plain.label} + our compensation", form=form, cut=resolved_cut, seeded=True)
        )


with_our_compensation()
