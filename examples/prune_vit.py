"""Prune a vision transformer to a budget of FLOPs: heads per layer are chosen by trying plans on the calibration pictures.

    python examples/prune_vit.py                     # a small one, trained on drawn stripes in seconds
    python examples/prune_vit.py --model FOLDER --pictures FOLDER/OF/PNGS --flops 0.3

With --model the pictures need no labels: what the dense model says of each counts as right. Models of timm work alike, with batches
of {"x": pictures} and a loss_fn.
"""

import argparse
import copy
from pathlib import Path

from quick_models import picture_classifier, your_pictures
from rich import print

import headprune as hp
from headprune.evaluation import ImageClassification, compare

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--model", type=Path, help="folder of an image classifier with its image processor")
parser.add_argument("--pictures", type=Path, help="a folder of pictures, for --model")
parser.add_argument("--flops", type=float, default=0.75, help="fraction of the attentions' FLOPs to remove")
parser.add_argument("--output", type=Path, default=Path("pruned-vit"))
args = parser.parse_args()

dense, calibration, test = your_pictures(args.model, args.pictures) if args.model else picture_classifier()
calibration = calibration[:10]

length = (dense.config.image_size // dense.config.patch_size) ** 2 + 1  # patches and the class token
budget = hp.Budget(flops=args.flops, sequence_length=length)
scores = hp.score(dense, calibration, criterion="fisher")
by_scores = hp.plan(scores, budget)
searched = hp.search_plan(dense, scores, budget, calibration, trials=5)
print(searched.plan)

results = {}
for name, plan in (("by scores alone", by_scores), ("of 5 plans tried", searched.plan)):
    pruned = copy.deepcopy(dense)
    hp.prune(pruned, plan, calibration=calibration)
    results[name] = compare(dense, pruned, ImageClassification(test, top=()), repeats=5)
print(results["of 5 plans tried"])
for name, result in results.items():
    print(f"accuracy: dense {result.dense.quality['accuracy']:.3f}, {name} {result.pruned.quality['accuracy']:.3f}")
print(f"attention FLOPs: {result.ratio('attention_flops'):.2f} of the dense model's")

hp.save(pruned, args.output)
print(hp.diff(dense, hp.load(args.output)))
