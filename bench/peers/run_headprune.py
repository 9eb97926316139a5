"""headprune by the repository's recipe: heads ranked and merely cut, as peers do, or the plan searched and outputs re-solved."""

from child import Request, embedded, main

import headprune as hp
from headprune.recipe import load_recipe


def score(model, request: Request):
    model.set_attn_implementation("sdpa")
    recipe = load_recipe(request.options["recipe"])
    loss = lambda model, batch: request.loss(model, batch)  # noqa: E731
    return hp.score(model, request.calibration[: recipe.score.batches], recipe.score.criterion, loss_fn=loss)


def cut(model, scored, request: Request):
    budget = hp.Budget(heads=request.heads)
    recipe = load_recipe(request.options["recipe"])
    if not request.options["compensate"]:
        hp.prune(model, hp.plan(scored, budget))
        return model
    read = embedded if request.kind == "encoder" else None  # what the task reads of the model, as in the recipe
    plan = hp.search_plan(model, scored, budget, request.calibration, trials=recipe.plan.trials, forward=read).plan
    hp.prune(model, plan, request.calibration, feed_forward=recipe.prune.feed_forward)
    return model


main(score, cut, lambda model, folder: hp.save(model, folder), lambda folder, model: hp.load(folder))
