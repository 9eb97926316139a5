"""What every pass over calibration data is made of, whether the model is in memory or read from disk layer by layer."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import Tensor, nn

from headprune.errors import InvalidInput
from headprune.models.batches import why_infinite
from headprune.models.quantised import kept_differentiable
from headprune.models.uncompiled import uncompiled
from headprune.nn.given import out_of_inference_mode
from headprune.nn.linear import through_onednn
from headprune.scoring.observations import Observations, SiteObservations
from headprune.scoring.observer import Observer, Setting
from headprune.scoring.site_shape import SiteShape


def run_batch(setting: Setting, batch: Any, observers: Sequence[Observer], backward: bool) -> Tensor | None:
    """One batch for all observers. The loss, detached, where one is computed; whether it is finite is not looked at."""
    loss: Tensor | None = None
    with ExitStack() as whole:
        for observer in observers:
            whole.enter_context(observer.watching_batch(batch))
        with ExitStack() as forward:
            for observer in observers:
                forward.enter_context(observer.watching_forward(batch))
            if backward:
                loss = setting.loss(batch)
            elif any(observer.runs == "forward" for observer in observers):
                setting.run(batch)
        if loss is not None:
            differentiate(loss)
    found = None if loss is None else loss.detach()
    for observer in observers:
        observer.after_batch(batch, found)
    return found


def differentiate(loss: Tensor) -> None:
    if not loss.requires_grad:
        raise InvalidInput(
            "the loss does not depend on any attention head; is it computed under torch.no_grad(), or a layer checkpointed with "
            "use_reentrant=True, through which no gradient goes where weights are frozen?"
        )
    loss.sum().backward()


def refuse_infinite(finite: bool, batch: Any) -> None:
    if not finite:
        raise InvalidInput(f"the loss is NaN or infinite on a calibration batch; {why_infinite(batch)}.")


def snapshot(setting: Setting, observers: Sequence[Observer], seen: Sequence[int]) -> Observations:
    """What the observers have found so far."""
    fields: dict[str, dict[str, Tensor]] = {site.name: {} for site in setting.sites}
    for observer in observers:
        for name, found in observer.found().items():
            fields[name].update(found)
    reached = set.intersection(*(observer.reached() for observer in observers)) if observers else set(fields)
    sites = {
        site.name: SiteObservations(site.name, SiteShape.of(site), site.name in reached, **fields[site.name])
        for site in setting.sites
    }
    sites |= {site.name: SiteObservations(site.name, SiteShape.of(site), reached=False) for site in setting.headless}
    return Observations(sites, tuple(seen))


def same_keys(keys: set[str] | None, batch: Any, index: int) -> set[str]:
    """The keys that all batches share; InvalidInput where this one has others."""
    found = set(batch) if isinstance(batch, Mapping) else set()
    if keys is not None and found != keys:
        raise InvalidInput(
            f"batch {index} has the keys {sorted(found)}, the ones before it {sorted(keys)}; every batch must have the same."
        )
    return found


@contextmanager
def in_eval_mode(model: nn.Module) -> Iterator[None]:
    training = [module for module in model.modules() if module.training]
    if training:
        model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


@contextmanager
def pass_of(model: nn.Module) -> Iterator[None]:
    """Inside the block `model` runs over data: in eval mode, its linear layers as this processor computes them fastest, its
    compiled parts as Python, its tensors ordinary ones also within torch.inference_mode().

    Raises InvalidInput where its weights are not ordinary ones.
    """
    refuse_inference_tensors(model)
    with in_eval_mode(model), through_onednn(model), uncompiled(model), kept_differentiable(model), out_of_inference_mode():
        yield


def refuse_inference_tensors(model: nn.Module) -> None:
    if any(parameter.is_inference() for parameter in model.parameters()):
        raise InvalidInput(
            f"{type(model).__name__} was made under torch.inference_mode(), so that its weights can neither be changed nor "
            "differentiated; make or load it outside of that."
        )


def refuse_without_weights(model: nn.Module) -> None:
    """InvalidInput where weights are on the meta device and no hook of accelerate's fetches them."""
    if any(hasattr(module, "_hf_hook") for module in model.modules()):
        return
    name = next((name for name, parameter in model.named_parameters() if parameter.is_meta), None)
    if name is not None:
        raise InvalidInput(
            f"{name} is on the meta device, without a value; load the weights first (load_state_dict(..., assign=True), say), or "
            "open a folder with hp.open_streamed."
        )


@contextmanager
def frozen(model: nn.Module) -> Iterator[None]:
    """No parameter asks for a gradient inside the block."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    try:
        for parameter in trained:
            parameter.requires_grad_(False)
        yield
    finally:
        for parameter in trained:
            parameter.requires_grad_(True)
