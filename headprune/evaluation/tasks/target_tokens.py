"""Tasks that ask for some tokens of each sample: masked ones, those of a translation, of an answer."""

from __future__ import annotations

from abc import abstractmethod

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from headprune.evaluation.data import Progress
from headprune.evaluation.metric import Metric, perplexity, ranked_first
from headprune.evaluation.perplexity import share
from headprune.evaluation.predicted import negative_log_likelihood
from headprune.evaluation.tasks.task import Task
from headprune.models.tokens import IGNORED_LABEL

Batch = dict[str, Tensor]


class TargetTokens(Task):
    """Perplexity is exp of the mean negative log-likelihood over all target tokens of the test data, accuracy the share of them
    that the model ranks first; both are of the tokenizer's tokens. The loss of a sample is the mean over its targets."""

    headline = "perplexity"
    higher_is_better = False
    calibration: list[Batch]
    test: list[Batch]

    @abstractmethod
    def asked(self, model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
        """(logits [samples, tokens, vocabulary], the tokens that they are to predict [samples, tokens], -100 where none)."""

    def predicted(self, model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
        """(negative log-likelihood in fp32, whether ranked first, whether it is a target) of each token, [samples, tokens]."""
        logits, labels = self.asked(model, batch)
        labels = labels.to(logits.device)
        targets = labels != IGNORED_LABEL
        found, wanted = logits[targets], labels[targets]
        losses = negative_log_likelihood(found, wanted)
        nothing = losses.new_zeros(labels.shape)
        return (
            nothing.masked_scatter(targets, losses),
            nothing.masked_scatter(targets, (ranked_first(found) == wanted).float()),
            targets,
        )

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        losses, _, targets = self.predicted(model, batch)
        return losses.sum(dim=1) / targets.sum(dim=1).clamp(min=1)

    @torch.inference_mode()
    def examples(self, model: nn.Module, progress: Progress | None = None) -> dict[str, Metric]:
        """An example is a sample."""
        losses, right = [], []
        for done, batch in enumerate(self.test, 1):
            found, hits, targets = (value.double().sum(dim=1).cpu() for value in self.predicted(model, batch))
            losses.append(torch.stack([found, targets], dim=1))
            right.append(torch.stack([hits, targets], dim=1))
            if progress:
                progress(done, len(self.test))
        return {"perplexity": Metric(torch.cat(losses), perplexity), "accuracy": Metric(torch.cat(right), share)}

    @torch.inference_mode()
    def outputs(self, model: nn.Module) -> Tensor:
        return self.asked(model, self.test[0])[0][:2].float()


def without_the_loss(batch: Batch, filler: int) -> Batch:
    """What an encoder-decoder reads of `batch`, without the labels, from which it would compute a loss: its decoder gets them as it
    would shift them itself, behind `filler` (many begin with another token, which costs the same)."""
    labels = batch["labels"]
    read = F.pad(labels[:, :-1], (1, 0), value=filler)
    inputs = {name: value for name, value in batch.items() if name != "labels"}
    return {**inputs, "decoder_input_ids": read.masked_fill(read == IGNORED_LABEL, filler)}
