"""What the engine that will run a model asks of its head counts: a plan that keeps to it leaves an export nothing to mend."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from headprune.errors import InvalidInput, unknown_name
from headprune.head_map import HeadMap
from headprune.scoring.scores import HeadScores
from headprune.scoring.site_shape import SiteShape


@dataclass(frozen=True)
class Engine:
    """even_groups: in each layer all key/value heads serve equally many query heads. alike: layers that were alike stay so.

    divides_hidden: the hidden size is a multiple of the query heads, as many configs of transformers demand. kv_multiple: key/value
    heads, too, come in multiples of `multiple_of`. first_layer, every_layer: where at least one head stays.
    """

    name: str
    summary: str
    even_groups: bool = False
    alike: bool = False
    divides_hidden: bool = False
    kv_multiple: bool = False
    first_layer: bool = False
    every_layer: bool = False

    @property
    def allocation(self) -> str:
        """The default."""
        return "uniform" if self.alike else "global"

    def floors(self, sites: Sequence[str]) -> dict[str, int]:
        """Query heads that a site keeps, whatever min_heads says."""
        return dict.fromkeys(sites if self.every_layer else sites[:1] if self.first_layer else (), 1)

    def allows(self, shape: SiteShape, left: HeadMap, multiple_of: int) -> bool:
        """Whether a site of `shape` that lost heads may have those that are `left`."""
        query_heads, kv_heads = left.query_heads, left.kv_heads
        # Fewer key/value heads than devices are copied to several of them.
        spread = kv_heads % multiple_of == 0 or (kv_heads and multiple_of % kv_heads == 0)
        if query_heads % multiple_of or (self.kv_multiple and not spread):
            return False
        # A model that does not divide its hidden size itself is of a class that does not ask for it.
        asked = self.divides_hidden and query_heads and shape.hidden_size % shape.head_map.query_heads == 0
        return not asked or shape.hidden_size % query_heads == 0


_engines: dict[str, Engine] = {}


def register_engine(engine: Engine) -> Engine:
    """Makes `engine` a target of `hp.plan`."""
    _engines[engine.name] = engine
    return engine


def engines() -> dict[str, Engine]:
    """Every target of `hp.plan` by name."""
    return dict(_engines)


def get_engine(name: str) -> Engine:
    if name not in _engines:
        raise unknown_name("target", name, _engines)
    return _engines[name]


register_engine(Engine("headprune", "headprune's kernels in transformers, and ONNX: any heads"))
register_engine(Engine("llama.cpp", "gguf: equal groups, a head in layer 0", even_groups=True, first_layer=True))
register_engine(Engine("vllm", "equal groups, a head in every layer", even_groups=True, kv_multiple=True, every_layer=True))
register_engine(
    Engine("stock", "the same counts in all layers", even_groups=True, alike=True, divides_hidden=True, every_layer=True)
)


def refuse_conflicts(engine: Engine, scores: HeadScores, allocation: str, min_heads: int) -> None:
    """InvalidInput where what is asked for contradicts what `engine` can run."""
    if engine.every_layer and min_heads == 0:
        raise InvalidInput(f"target {engine.name} needs a head in every layer, and min_heads=0 lets whole ones go; give 1 or more.")
    if engine.alike and allocation != "uniform":
        raise InvalidInput(
            f"target {engine.name} needs the same counts in all layers, and allocation={allocation!r} makes them differ; give "
            "'uniform' or none, or target='vllm' or 'llama.cpp'."
        )
    refuse_uneven(engine, scores)


def refuse_uneven(engine: Engine, scores: HeadScores) -> None:
    """InvalidInput where the model, as it is, is none that `engine` can run."""
    way_out = "Plan from the model before it was pruned, or without a target: export then fills up heads, and says the cost."
    first: dict[tuple[int, ...], str] = {}
    needed = engine.floors(list(scores.shapes))
    for name, shape in scores.shapes.items():
        if name in needed and not shape.head_map.query_heads:
            raise InvalidInput(f"target {engine.name} needs a head at {name}, which has lost all of them already. {way_out}")
        if engine.even_groups and not shape.head_map.is_uniform:
            raise InvalidInput(f"target {engine.name} needs groups of one size, and {name} has {shape.head_map} already. {way_out}")
        other = first.setdefault((shape.hidden_size, shape.head_dim, shape.value_dim), name)
        there = scores.shapes[other].head_map
        if engine.alike and (there.kv_of_query, there.kv_heads) != (shape.head_map.kv_of_query, shape.head_map.kv_heads):
            raise InvalidInput(
                f"target {engine.name} needs the same counts in all layers, and {other} has {there} already, {name} "
                f"{shape.head_map}. {way_out}"
            )
