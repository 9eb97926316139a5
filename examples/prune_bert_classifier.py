"""Prune a BERT classifier: score its heads, plan, cut, re-solve without training, compare, save.

    python examples/prune_bert_classifier.py                      # a small one, trained on made-up reviews in seconds
    python examples/prune_bert_classifier.py --model FOLDER --text texts.txt --heads 0.3

With --model the labels are what the model itself says of each line of the file, so that accuracy is how often the pruned model
decides as the dense one does.
"""

import argparse
import copy
from pathlib import Path

import torch
from quick_models import text_classifier, your_classifier
from rich import print

import headprune as hp
from headprune.evaluation import Classification, compare

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--model", type=Path, help="folder of a sequence classifier with its tokenizer")
parser.add_argument("--text", type=Path, help="a text on each line, for --model")
parser.add_argument("--heads", type=float, default=0.5, help="fraction of the heads to remove")
parser.add_argument("--output", type=Path, default=Path("pruned-bert"))
args = parser.parse_args()

given = your_classifier(args.model, args.text) if args.model else text_classifier()
dense, tokenizer, calibration, test = given
calibration = calibration[:12]

# Several criteria are measured in the same pass; each is a table of one number a head, higher = keep.
scores = hp.score(dense, calibration, criterion=["fisher", "least_squares"])
print(scores["fisher"])
print(f"the two criteria keep the same heads: {scores['fisher'].compare(scores['least_squares']).overlap:.0%}")

plan = hp.plan(scores["fisher"], hp.Budget(heads=args.heads))
print(plan)

# The yardstick of all surgery: a model without the heads gives what the dense model gives with their gates at 0.
pruned = copy.deepcopy(dense)
hp.prune(pruned, plan)
batch = {name: value for name, value in test[0].items() if name != "labels"}
with torch.no_grad(), hp.gated(dense, plan):
    error = (pruned(**batch).logits - dense(**batch).logits).abs().max()
print(f"cut = gated to within {error:.0e}")

# With calibration data the output projections are re-solved, so that each layer gives what it gave before.
compensated = copy.deepcopy(dense)
hp.prune(compensated, plan, calibration=calibration)
data = Classification(test)
alone = hp.evaluate(pruned, data, repeats=3)
result = compare(dense, compensated, data, repeats=10)
print(result)
accuracies = [found.quality["accuracy"] for found in (result.dense, alone, result.pruned)]
print("accuracy: dense {:.3f}, cut {:.3f}, re-solved {:.3f}".format(*accuracies))

hp.save(compensated, args.output, tokenizer=tokenizer)
print(f"saved to {args.output}: {hp.load(args.output).num_parameters():,} of {dense.num_parameters():,} parameters")
