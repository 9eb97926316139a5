"""A task for a random encoder: random tokens whose last states should be small."""

from tiny_models import hidden, tokens

from headprune.evaluation.tasks import Task, register_task


@register_task
class SmallStates(Task):
    name = "small-states-for-tests"
    headline = "norm"
    higher_is_better = False

    def __init__(self, tokenizer=None) -> None:
        self.tokenizer = None
        self.calibration = [{"input_ids": tokens(4, 8, seed)} for seed in range(6)]

    def loss(self, model, batch):
        return model(**batch).last_hidden_state[:, 0, :5].square().mean(dim=1)

    def forward(self, model, batch):
        return model(**batch)

    def evaluate(self, model, progress=None):
        return {"norm": float(self.outputs(model).norm())}

    def outputs(self, model):
        return hidden(model, input_ids=tokens(4, 8, 50))

    def latency_inputs(self):
        return {"input_ids": tokens(2, 8)}
