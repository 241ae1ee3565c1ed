"""Prediction from class responses: the nearest of all, or a tree that looks at few of them.

A class response is what the last layer does when only the class's target signal enters. A sample belongs to the class whose
response its own activity resembles most: the cosine of the sample's mean activity, centred on the running mean the layer
learned with, and the response, centred on the mean of all responses. Nothing here depends on the other samples of a batch.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from spikeprop.network import Network


class Prediction(NamedTuple):
    """Classes ``[B]`` and the comparisons each sample took ``[B]``."""

    classes: Tensor
    comparisons: Tensor


def class_responses(network: Network, num_steps: int) -> Tensor:
    """Mean activity of the last layer under each class's target signal alone: ``[classes, n]`` over ``num_steps`` steps."""
    assert network.target is not None
    drive = network.target(torch.eye(network.outputs).to(network.readout.weight))
    drive = (drive + network.layers[0].synapse(network.input_mean.unsqueeze(0))).expand(num_steps, *drive.shape)
    state = network.initial_state(network.outputs)
    for index, layer in enumerate(network.layers):
        drive = layer.drive(drive) if index > 0 else drive
        drive = layer.run(state[index], drive, network.fold_bias(index))[0].spikes
    return drive.mean(0).flatten(1)


def directions(network: Network, activity: Tensor, responses: Tensor) -> tuple[Tensor, Tensor]:
    """Unit vectors of samples ``[B, n]`` and class responses ``[classes, n]``, each centred as the module says."""
    samples = F.normalize(activity.flatten(1) - network.layers[-1].rate.flatten(), dim=1)
    return samples, F.normalize(responses - responses.mean(0), dim=1)


def nearest(samples: Tensor, responses: Tensor) -> Prediction:
    """The class of the largest cosine among all of them."""
    return Prediction((samples @ responses.T).argmax(1), torch.full((len(samples),), len(responses), device=samples.device))


@dataclass
class Node:
    """A set of classes and the mean of their responses; a leaf holds one class."""

    classes: list[int]
    centre: Tensor
    children: list[Node] = field(default_factory=list)


def build_tree(responses: Tensor, classes: list[int] | None = None) -> Node:
    """Split the classes in two along the main direction of their responses, again and again, until each stands alone."""
    classes = list(range(len(responses))) if classes is None else classes
    chosen = responses[classes]
    node = Node(classes, F.normalize(chosen.mean(0), dim=0))
    if len(classes) > 1:
        spread = chosen - chosen.mean(0)
        along = spread @ torch.linalg.svd(spread, full_matrices=False).Vh[0]
        order = along.argsort().tolist()
        gaps = [float(along[order[i]] - along[order[i - 1]]) for i in range(1, len(order))]
        # The widest gap in the middle half: balanced enough to stay shallow, and no family of classes is cut through.
        low = (len(order) - 1) // 4
        cut = 1 + max(range(low, len(gaps) - low), key=lambda index: gaps[index])
        node.children = [build_tree(responses, [classes[i] for i in part]) for part in (order[:cut], order[cut:])]
    return node


def search_tree(samples: Tensor, root: Node, margin: float = 0.1) -> Prediction:
    """Descend from the root, at each node into the child whose centre is more similar; into both where they are close.

    Args:
        samples: unit vectors ``[B, n]``.
        margin: children whose cosines differ by less are both searched; 0 is a plain descent, 2 visits the whole tree.

    Returns:
        The best leaf reached, and how many centres each sample was compared with.
    """
    best = torch.full((len(samples),), -torch.inf, dtype=samples.dtype, device=samples.device)
    classes = torch.zeros(len(samples), dtype=torch.long, device=samples.device)
    comparisons = torch.zeros(len(samples), dtype=torch.long, device=samples.device)

    def visit(node: Node, rows: Tensor, similarity: Tensor) -> None:
        if len(node.classes) == 1:
            better = similarity > best[rows]
            best[rows[better]] = similarity[better]
            classes[rows[better]] = node.classes[0]
            return
        left, right = (samples[rows] @ child.centre for child in node.children)
        comparisons[rows] += 2
        for child, own, other in ((node.children[0], left, right), (node.children[1], right, left)):
            chosen = own >= other - margin
            if chosen.any():
                visit(child, rows[chosen], own[chosen])

    visit(root, torch.arange(len(samples), device=samples.device), best.clone())
    return Prediction(classes, comparisons)
