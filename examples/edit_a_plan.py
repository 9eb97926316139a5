"""Edit a plan by hand: it is a JSON file that names the heads to keep, checked before anything is cut.

    python examples/edit_a_plan.py
    python examples/edit_a_plan.py --model FOLDER --text calibration.txt

The same from the command line: headprune plan scores.json, an editor, headprune prune FOLDER plan.json; or click heads in the page
of `headprune report` and download the plan from there.
"""

import argparse
import json
from pathlib import Path

from quick_models import language_model, your_language_model
from rich import print

import headprune as hp
from headprune.evaluation import Perplexity

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--model", type=Path, help="folder of a causal language model with its tokenizer")
parser.add_argument("--text", type=Path, help="text for --model: the first half calibrates, the second measures")
args = parser.parse_args()
given = your_language_model(args.model, args.text) if args.model else language_model()
model, tokenizer, batches, text = given
test = Perplexity(text, tokenizer, window=batches[0]["input_ids"].shape[1])

scores = hp.score(model, batches[:12], criterion="fisher")
hp.plan(scores, hp.Budget(heads=0.5)).save("plan.json")
before = hp.PruningPlan.load("plan.json")
print(before)

# In the first layer that loses heads, the best head that was to go stays, and the worst that was to stay goes.
name = next(name for name in before if before.head_map(name) != before.shapes[name].head_map and before[name])
gone = [head for head in range(len(scores[name])) if head not in before[name]]
better, worse = max(gone, key=lambda head: scores[name][head]), min(before[name], key=lambda head: scores[name][head])
document = json.loads(Path("plan.json").read_text())
document["sites"][name]["keep"] = sorted({*before[name], better} - {worse})
Path("plan.json").write_text(json.dumps(document))
after = hp.PruningPlan.load("plan.json")
print(f"{name}: keeps {list(after[name])} in place of {list(before[name])}")
for title, plan in (("as planned", before), ("as edited", after)):
    with hp.gated(model, plan):
        print(f"perplexity {title}: {test.examples(model)['perplexity'].value:.4f}")

# What cannot be is said at once, and nothing is changed.
document["sites"][name]["keep"] = [0, 99]
Path("wrong.json").write_text(json.dumps(document))
for attempt in (lambda: hp.PruningPlan.load("wrong.json"), lambda: hp.PruningPlan.from_keep(model, {f"{name}s": [0]})):
    try:
        attempt()
    except hp.InvalidPlan as error:
        print(f"refused: {error}")

# A plan can also be written from nothing; attentions that are not named keep all their heads.
by_hand = hp.PruningPlan.from_keep(model, {name: [0, 1]})
print(str(hp.prune(model, by_hand, dry_run=True)))
print(str(hp.prune(model, after, calibration=batches[:12])))
print(f"perplexity pruned and re-solved: {test.examples(model)['perplexity'].value:.4f}")
