"""Pruning-aware training: gates on the heads are trained together with the model, then the closed ones are cut out.

    python examples/pruning_aware_training.py
    python examples/pruning_aware_training.py --model FOLDER --text texts.txt --heads 0.5 --method subset --folder runs/aware

Beside it stands one-shot pruning to the same budget, without training and with as many steps of it afterwards. With --folder a
killed run goes on from there.
"""

import argparse
from pathlib import Path

from quick_models import text_classifier, your_classifier
from rich import print
from rich.table import Table

import headprune as hp
from headprune.evaluation import Classification

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--model", type=Path, help="folder of a sequence classifier with its tokenizer")
parser.add_argument("--text", type=Path, help="a text on each line, for --model")
parser.add_argument("--heads", type=float, default=0.75, help="fraction of the heads to remove")
parser.add_argument("--method", default="hard_concrete", help="; ".join(hp.schedules.gate_methods()))
parser.add_argument("--steps", type=int, default=150)
parser.add_argument("--folder", type=Path)
args = parser.parse_args()

given = your_classifier(args.model, args.text) if args.model else text_classifier()
dense, _, train, test = given
budget, calibration, data = hp.Budget(heads=args.heads), train[:12], Classification(test)


def accuracy(model) -> float:
    return data.examples(model)["accuracy"].value


shared = {"train": train, "metric": accuracy}
rates = {"steps": args.steps, "lr": 1e-3}
aware = hp.pruning_aware(dense, calibration, budget, method=args.method, folder=args.folder, **rates, **shared)
alone = hp.one_shot(dense, calibration, budget, **shared)
trained = hp.one_shot(dense, calibration, budget, recover=hp.RecoverySettings(**rates), **shared)
print(aware)

gates = aware.history[-1].details["gates"]
for name, kept in aware.plan.items():
    values = " ".join(f"{gate:.2f}" for gate in gates[name])
    print(f"{name}: gates {values}; keeps {list(kept)} (one-shot: {list(alone.plan[name])})")
table = Table("", "accuracy", "heads")
table.add_row("dense", f"{accuracy(dense):.3f}", str(aware.plan.total_heads))
rows = {"one-shot": alone, f"one-shot, then {args.steps} steps": trained, f"pruning-aware, {args.method}": aware}
for title, result in rows.items():
    table.add_row(title, f"{result.quality:.3f}", str(result.history[-1].heads))
print(table)
