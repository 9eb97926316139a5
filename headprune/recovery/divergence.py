"""The losses of distillation, each a function of plain tensors."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor


def softened_divergence(student: Tensor, teacher: Tensor, temperature: float = 1.0) -> Tensor:
    """temperature^2 KL(softmax(teacher / temperature) || softmax(student / temperature)) of each row, fp32 (Hinton et al. 2015).

    student, teacher: logits [..., classes] -> [...].
    """
    expected = F.log_softmax(teacher.float() / temperature, dim=-1)
    found = F.log_softmax(student.float() / temperature, dim=-1)
    return temperature**2 * F.kl_div(found, expected, reduction="none", log_target=True).sum(dim=-1)


def label_divergence(student: Tensor, teacher: Tensor, temperature: float = 1.0) -> Tensor:
    """As `softened_divergence`, of labels that are true or false each by itself, with the probability sigmoid(logit): two classes,
    whose logits are the label's and 0. student, teacher: logits [..., labels] -> [...], the mean over labels, as of their own loss.
    """
    mine, theirs = (torch.stack([logits, torch.zeros_like(logits)], dim=-1) for logits in (student, teacher))
    return softened_divergence(mine, theirs, temperature).mean(dim=-1)


def number_difference(student: Tensor, teacher: Tensor, temperature: float = 1.0) -> Tensor:
    """(student - teacher)^2, fp32, whatever the temperature. student, teacher [..., numbers] -> [...], the mean over numbers."""
    return (student.float() - teacher.float()).square().mean(dim=-1)


def squared_difference(student: Tensor, teacher: Tensor, valid: Tensor, relative: bool = False) -> Tensor:
    """Mean over valid tokens and features of (student - teacher)^2, a scalar, fp32.

    student, teacher [batch, tokens, features], valid bool [batch, tokens]. relative: over the mean of teacher^2, so that
    layers of any scale weigh the same.
    """
    student, teacher = student.float()[valid], teacher.float()[valid]
    found = F.mse_loss(student, teacher)
    return found / teacher.square().mean().clamp(min=torch.finfo(torch.float32).tiny) if relative else found


def relation_divergence(student: Tensor, teacher: Tensor, valid: Tensor, heads: int | None = None) -> Tensor:
    """KL between the two models' relations softmax(A A^T / sqrt(d)) of one kind (queries, keys or values): the mean over
    relation heads and valid tokens, fp32 (Wang et al. 2021, MiniLMv2).

    student, teacher: [batch, tokens, features], of which each model may have another number; both are split into `heads`
    relation heads of d features, so that attention heads need not agree in number. valid: bool [batch, tokens].
    """
    heads = common_heads(student.shape[-1], teacher.shape[-1]) if heads is None else heads
    expected, found = relations(teacher, valid, heads), relations(student, valid, heads)
    rows = F.kl_div(found, expected, reduction="none", log_target=True).masked_fill(~valid[:, None, None, :], 0.0).sum(dim=-1)
    return rows.masked_fill(~valid[:, None, :], 0.0).sum() / (heads * valid.sum().clamp(min=1))


def relations(states: Tensor, valid: Tensor, heads: int) -> Tensor:
    """log softmax(A A^T / sqrt(d)), [batch, heads, tokens, tokens]; keys that are padding have no weight."""
    split = states.float().unflatten(-1, (heads, -1)).transpose(1, 2)
    products = split @ split.transpose(2, 3) / math.sqrt(split.shape[-1])
    return F.log_softmax(products.masked_fill(~valid[:, None, None, :], torch.finfo(torch.float32).min), dim=-1)


def common_heads(student_features: int, teacher_features: int, most: int = 12) -> int:
    """The largest number up to `most` that divides both."""
    shared = math.gcd(student_features, teacher_features)
    return max(number for number in range(1, most + 1) if shared % number == 0)


def cosine_distance(student: Tensor, teacher: Tensor) -> Tensor:
    """Mean of 1 - cos over rows, a scalar, fp32. student, teacher [rows, features]."""
    return (1 - F.cosine_similarity(student.float(), teacher.float(), dim=-1)).mean()


def similarity_divergence(student: Tensor, teacher: Tensor, scale: float = 20.0) -> Tensor:
    """KL between each row's similarities to all other rows, softmax(scale cos), the mean over rows, fp32.

    student, teacher: embeddings [rows, features]; widths may differ. As in self-distillation of sentence encoders (SEED, Fang
    et al. 2021): which texts are near which is what retrieval reads.
    """
    return softened_divergence(similarities(student, scale), similarities(teacher, scale)).mean()


def similarities(embeddings: Tensor, scale: float) -> Tensor:
    rows = F.normalize(embeddings.float(), dim=-1)
    itself = torch.eye(len(rows), dtype=torch.bool, device=rows.device)
    return (scale * rows @ rows.T).masked_fill(itself, torch.finfo(torch.float32).min / 2)


def top_divergence(student: Tensor, indices: Tensor, log_probabilities: Tensor, temperature: float) -> Tensor:
    """As `softened_divergence`, where of the teacher only the largest classes are known and the others count as one.

    student: logits [..., classes]. indices int64 and log_probabilities [..., k]: the teacher's k likeliest classes and
    log softmax(teacher / temperature) of them. With k = classes it is the same value.
    """
    found = F.log_softmax(student.float() / temperature, dim=-1)
    chosen, expected = found.gather(-1, indices), log_probabilities.float()
    total = (expected.exp() * (expected - chosen)).sum(dim=-1)
    if indices.shape[-1] < student.shape[-1]:
        rest = 1 - expected.exp().sum(dim=-1)
        others = found.scatter(-1, indices, float("-inf")).logsumexp(dim=-1)
        total = total + torch.where(rest > 1e-6, rest * (rest.clamp(min=1e-6).log() - others), 0.0)
    return temperature**2 * total
