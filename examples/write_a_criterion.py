"""Write a criterion: one function of what was observed. It then works everywhere, from `hp.score` to recipes and the command line.

    python examples/write_a_criterion.py
    python examples/write_a_criterion.py --model FOLDER --text calibration.txt

To have it in every `headprune` command, put it into a module of your package and name that in the entry point group
"headprune.criteria".
"""

import argparse
from pathlib import Path

import torch
from quick_models import language_model, your_language_model
from rich import print
from rich.table import Table
from torch import Tensor

import headprune as hp
from headprune.evaluation import Perplexity
from headprune.scoring import SiteObservations


# needs: what is to be measured (hp.Need lists it all); everything that several criteria need is measured in one pass.
@hp.criterion("worst_tenth", needs={hp.Need.GATE_GRADIENT}, source="this example", cost="one backward pass")
def worst_tenth(observed: SiteObservations) -> Tensor:
    """How much a head matters to the tenth of the samples that it matters most to.

    gate_gradient is [samples, query_heads]: dL/dgate of each sample. The score is [query_heads], fp32, higher = keep.
    """
    gradients = observed.gate_gradient.abs()
    return gradients.topk(max(1, len(gradients) // 10), dim=0).values.mean(dim=0)


# A criterion of the whole model sees all attentions at once and gives the scores of each by its name.
@hp.criterion(
    "mean_rank", needs={hp.Need.GATE_GRADIENT, hp.Need.ATTENTION}, source="this example", cost="one backward pass", whole_model=True
)
def mean_rank(observed: hp.Observations) -> dict[str, Tensor]:
    """The mean of a head's two ranks in the model: by its gradient, and by the size of what it gives out."""
    by_gradient = torch.cat([site.gate_gradient.square().mean(dim=0) for site in observed.values()])
    by_output = torch.cat([site.output_norm.mean(dim=0) for site in observed.values()])
    ranks = sum(values.argsort().argsort().float() for values in (by_gradient, by_output)) / 2
    heads = [site.shape.head_map.query_heads for site in observed.values()]
    return dict(zip(observed, ranks.split(heads), strict=True))


parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--model", type=Path, help="folder of a causal language model with its tokenizer")
parser.add_argument("--text", type=Path, help="text for --model: the first half calibrates, the second measures")
parser.add_argument("--heads", type=float, default=0.5, help="fraction of the query heads to remove")
args = parser.parse_args()

given = your_language_model(args.model, args.text) if args.model else language_model()
model, tokenizer, batches, text = given
test = Perplexity(text, tokenizer, window=batches[0]["input_ids"].shape[1])

names = ["worst_tenth", "mean_rank", "fisher", "random"]
scores = hp.score(model, batches[:12], criterion=names)
table = Table("criterion", "same heads kept as by fisher", "perplexity without the others", title="gated, nothing re-solved")
table.add_row("(all heads)", "", f"{test.examples(model)['perplexity'].value:.3f}")
for name in names:
    plan = hp.plan(scores[name], hp.Budget(heads=args.heads))
    same = scores[name].compare(scores["fisher"], keep=1 - args.heads).overlap
    with hp.gated(model, plan):  # quicker than to cut, and the same
        perplexity = test.examples(model)["perplexity"].value
    table.add_row(name, f"{same:.0%}", f"{perplexity:.3f}")
print(scores["worst_tenth"])
print(table)
