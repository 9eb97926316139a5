"""The folder of a small run with everything that a report can show: a decoder with grouped heads, half of them gone."""

from pathlib import Path

from tiny_models import llama, tokens

from headprune.evaluation import Comparison, Evaluation
from headprune.evaluation.cost import attention_flops, kv_cache_bytes_per_token
from headprune.files import write_json, write_text
from headprune.models import attention_sites
from headprune.planning import Budget, PruningPlan, plan, sensitivity
from headprune.scoring import HeadScores, observe, portrait_needs, portraits, score_observations
from headprune.sweep import Point, Sweep

MACHINE = "a made-up processor, 2 threads"
LENGTH = 12
CRITERIA = ("fisher", "magnitude_l1")


def batches():
    return [{"input_ids": tokens(4, 10, seed), "labels": tokens(4, 10, seed)} for seed in range(3)]


def evaluation(model, quality: float, latency: float) -> Evaluation:
    sites = attention_sites(model)
    return Evaluation(
        {"perplexity": quality}, sum(one.numel() for one in model.parameters()), attention_flops(sites, LENGTH), LENGTH,
        kv_cache_bytes_per_token(sites), latency, 1.1 * latency, 1e3 / latency, 1000,
        machine=MACHINE,
    )  # fmt: skip


def pruned(chosen: PruningPlan):
    from headprune.surgery import cut

    model = llama()
    cut(model, chosen)
    return model


def write_run(folder: Path) -> tuple[dict[str, HeadScores], PruningPlan]:
    """Fills `folder`; the qualities and latencies in it are made up, the counts and scores are of real models."""
    model = llama()
    observed = observe(model, batches(), {"gate_gradient", "weights"} | portrait_needs(model))
    scores = {name: score_observations(observed, name) for name in CRITERIA}
    chosen = plan(scores["fisher"], Budget(heads=0.5))
    write_text(folder / "recipe.yaml", "model: llama\ntask: {name: made-up}\nplan: {allocation: global, min_heads: 1}\n")
    scores["fisher"].save(folder / "scores.json")
    scores["magnitude_l1"].save(folder / "scores-magnitude_l1.json")
    portraits(observed).save(folder / "portraits.json")
    chosen.save(folder / "plan.json")
    sensitivity(model, batches(), scores["fisher"]).save(folder / "sensitivity.json")
    comparison = Comparison(
        "made-up", "perplexity", evaluation(model, 10.0, 20.0), evaluation(pruned(chosen), 12.0, 15.0), higher_is_better=False
    )
    checks = {"cut_equals_gated": 1e-6, "reload": 0.0}
    write_json(folder / "checks.json", "run_checks", {"checks": checks})
    write_json(folder / "result.json", "run_result", {"checks": checks, "comparison": comparison.to_json()})
    quarter = plan(scores["fisher"], Budget(heads=0.25))
    points = [
        Point({"heads": share}, {name: len(heads) for name, heads in found.items()}, evaluation(one, *measured))
        for share, found, one, measured in [
            (0.0, plan(scores["fisher"], Budget(heads=0.0)), model, (10.0, 21.0)), (0.25, quarter, pruned(quarter), (10.5, 18.0)),
        ]
    ]  # fmt: skip
    Sweep("made-up", "perplexity", False, "fisher", tuple(points)).save(folder / "sweep.json")
    write_text(folder / "log.txt", "one line with <b>markup</b> & </script>\n")
    return scores, chosen
