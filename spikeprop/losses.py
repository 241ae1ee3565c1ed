"""Local losses: how the responses of the input rows relate to those of the context rows, in closed form.

A loss sees one layer's phi (``learn_on`` of the membrane) and nothing else: ``h [k, B, n]`` for the input rows and
``t [k, C, n]`` for the context rows, over k time steps that do not influence each other. It returns the loss per step ``[k]``,
averaged over the batch, and its derivatives by h and t.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from spikeprop.errors import InputError

Gradients = tuple[Tensor, Tensor, Tensor]
SMALLEST_DEVIATION = 1e-4  # of phi from its mean (root mean square), below which a row is noise and has no direction


class LocalLoss:
    """Base of the losses.

    Attributes:
        smallest_batch: the number of rows below which nothing could be learned.
        by_row: whether input rows meet in their mean only: with that given, each row adds its own part to loss and derivatives.
    """

    smallest_batch = 1
    by_row = False

    def __call__(self, h: Tensor, t: Tensor, labels: Tensor, mean: Tensor | None) -> Gradients:
        """``labels [k, B]`` names each row's context.

        ``mean``, ``[n]`` or one per step ``[k, 1, n]``, if given, centres h in place of the batch's own mean, as a constant.
        """
        raise NotImplementedError


def inverse_norm(rows: Tensor) -> Tensor:
    """What makes unit vectors of rows, ``[..., rows, 1]``; 0 for rows without a direction."""
    norm = torch.linalg.vector_norm(rows, dim=-1, keepdim=True)
    return norm.reciprocal().masked_fill_(norm < smallest_norm(rows.shape[-1]), 0.0)


def smallest_norm(size: int) -> float:
    """Of a row of that many numbers that has a direction."""
    return SMALLEST_DEVIATION * size**0.5


def through_norm(gradient: Tensor, rows: Tensor, inverse: Tensor, along: Tensor) -> Tensor:
    """Derivative by the rows, given that by the unit vectors times the inverse norm: what points along a row does not turn it.

    ``along [..., rows, 1]``: the product of the unit vector and the derivative by it.
    """
    return torch.addcmul(gradient, rows, along * inverse.square(), value=-1.0)


def centre(rows: Tensor, mean: Tensor | None) -> Tensor:
    """Rows minus their own mean, or minus a given one."""
    return rows - (rows.mean(-2, keepdim=True) if mean is None else mean)


def through_centre(gradient: Tensor, mean: Tensor | None) -> Tensor:
    """Derivative by the rows, given that by the centred ones; a given mean is a constant."""
    return gradient.sub_(gradient.mean(-2, keepdim=True)) if mean is None else gradient


@dataclass(frozen=True)
class SimilarityCrossEntropy(LocalLoss):
    """cross_entropy(similarity(h, t) / temperature, label): each row is pulled to its own target and pushed from the others.

    h and t are each centred, per step, over their own rows (h over a running mean where the batch has one row: its own mean
    would erase it); the similarity is the cosine, or the plain dot product divided by n.
    """

    temperature: float = 0.07
    similarity: Literal["cosine", "dot"] = "cosine"
    by_row = True

    def __call__(self, h: Tensor, t: Tensor, labels: Tensor, mean: Tensor | None) -> Gradients:
        h, t = centre(h, mean), centre(t, None)
        if self.similarity == "cosine":
            h_scale, t_scale = inverse_norm(h), inverse_norm(t)
        else:
            h_scale = t_scale = h.new_full((1, 1, 1), h.shape[-1] ** -0.5)
        scale = h_scale * t_scale.mT  # on the small matrices: the large ones are passed over as rarely as can be
        similarity = h @ t.mT * scale
        logits = similarity / self.temperature
        log_likelihood = logits - logits.logsumexp(-1, keepdim=True)
        loss = -log_likelihood.gather(-1, labels.unsqueeze(-1)).mean((1, 2))
        delta = (log_likelihood.exp() - F.one_hot(labels, t.shape[1])) / (h.shape[1] * self.temperature)
        dh, dt = (delta * scale) @ t, (delta * scale).mT @ h
        if self.similarity == "cosine":
            along = delta * similarity
            dh = through_norm(dh, h, h_scale, along.sum(-1, keepdim=True))
            dt = through_norm(dt, t, t_scale, along.sum(-2).unsqueeze(-1))
        return loss, through_centre(dh, mean), through_centre(dt, None)


@dataclass(frozen=True)
class Pairwise(LocalLoss):
    """Every pair of rows, input and context alike: equal labels attract, different ones repel (a softmax over the cosines).

    For row i with positives P(i): -mean_{j in P(i)} log softmax_{j != i}(cos(r_i, r_j) / temperature), averaged over the rows
    that have a positive. Needs a batch of at least two.
    """

    temperature: float = 0.1
    smallest_batch = 2

    def __call__(self, h: Tensor, t: Tensor, labels: Tensor, mean: Tensor | None) -> Gradients:
        if h.shape[1] < self.smallest_batch:
            raise InputError(
                f"Pairwise: a batch of {h.shape[1]} has no pairs; use a batch of at least {self.smallest_batch}, "
                "or SimilarityCrossEntropy(), which learns from one sample at a time"
            )
        batch, contexts = h.shape[1], t.shape[1]
        rows = torch.cat([centre(h, None), centre(t, None)], 1)
        inverse = inverse_norm(rows)
        scale = inverse * inverse.mT
        own = torch.arange(contexts, device=labels.device).expand(len(labels), contexts)
        names = torch.cat([labels, own], 1)
        itself = torch.eye(batch + contexts, dtype=torch.bool, device=h.device)
        similarity = rows @ rows.mT * scale
        logits = (similarity / self.temperature).masked_fill(itself, -torch.inf)
        positive = (names.unsqueeze(2) == names.unsqueeze(1)) & ~itself
        count = positive.sum(2, keepdim=True)
        wanted = positive / count.clamp(min=1)
        active = (count > 0) / (count > 0).sum(1, keepdim=True).clamp(min=1)
        log_likelihood = logits.log_softmax(-1).masked_fill(itself, 0.0)
        loss = -(wanted * log_likelihood * active).sum((1, 2))
        delta = (logits.softmax(-1) - wanted) * active / self.temperature
        delta = delta + delta.mT
        drows = through_norm((delta * scale) @ rows, rows, inverse, (delta * similarity).sum(-1, keepdim=True))
        return loss, through_centre(drows[:, :batch], None), through_centre(drows[:, batch:], None)


@dataclass(frozen=True)
class Hebbian(LocalLoss):
    """Hebb's product: a row's presynaptic trace times its target's response, with a decay that bounds the weights.

    The signal at a row is -(its target's centred response) + decay h, at a context -(the mean centred response of its rows)
    + decay t; the partner is taken as it is, no derivative passes through it. This is the gradient of
    -<h, t> + decay/2 (|h|^2 + |t|^2) with each partner held constant.
    """

    decay: float = 0.1

    def __call__(self, h: Tensor, t: Tensor, labels: Tensor, mean: Tensor | None) -> Gradients:
        h, t = centre(h, mean), centre(t, None)
        features, batch = h.shape[-1], h.shape[1]
        wanted = F.one_hot(labels, t.shape[1]).to(h.dtype)
        target = wanted @ t
        rows = wanted.mT @ h / wanted.sum(1).clamp(min=1).unsqueeze(-1)
        present = (wanted.sum(1) > 0).unsqueeze(-1)  # a class without a row in the batch has no partner to follow
        loss = -((h * target).sum(-1).mean(1) / features)
        dh = (self.decay * h - target) / (batch * features)
        dt = torch.where(present, self.decay * t - rows, 0.0) / (t.shape[1] * features)
        return loss, through_centre(dh, mean), through_centre(dt, None)
