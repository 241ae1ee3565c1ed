"""The fast path of :class:`spikeprop.SigProp`: a layer's neurons and its local loss in one compiled pass (numba).

Chosen by what is computed, never by the user: float32 on a CPU, LIF neurons, class targets, and the losses and readings that
:mod:`spikeprop.kernels` has. Everything else, and a machine without numba, takes the plain path, which is the definition: the
spikes are the same bit for bit, the errors but for float32 rounding. One thread each. Where products are computed in bfloat16
(:func:`spikeprop.synapse.product_type`) their factors are written so at once.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from spikeprop import compiled
from spikeprop.losses import LocalLoss, SimilarityCrossEntropy, smallest_norm
from spikeprop.network import Layer, is_constant
from spikeprop.neuron import LIF, NeuronState, State
from spikeprop.surrogate import ATan, LearnOn, Membrane
from spikeprop.synapse import product_type
from spikeprop.traces import Factored

FLOATS: Any = {"dtype": torch.float32, "device": "cpu"}  # whatever torch's defaults are


class Local(NamedTuple):
    """What k steps of a layer give its own learning, in shapes of ``[k, R, *features]`` unless said otherwise.

    The loss may read some of the steps only: error, loss and phi are of these.
    """

    state: State
    spikes: Tensor
    error: Tensor | Factored  # dL/dU
    loss: Tensor  # summed over the steps
    phi: Tensor  # what the loss read, summed over the steps and the input rows [m]
    activity: Tensor  # spikes summed over the steps and the input rows [*features]
    counts: Tensor | None  # spikes of the input rows summed over the steps [B, *features], if asked for
    error_sum: Tensor | None = None  # the error summed over rows [k, *features], where it was summed already


def laid_out(x: Tensor, layer: Layer) -> Tensor:
    """The input of a convolutional layer ``[k, R, C, H, W]`` with its channels last in memory, as this module works on maps.

    A convolution answers in the layout of its input; to turn its output over would take longer than to compute it.
    """
    if len(layer.output_shape) != 3 or x.dim() != 5 or not compiled.suits(layer.bias):
        return x
    if x.shape[2] == 1:  # the same memory under other strides
        return x.as_strided(x.shape, (*x.stride()[:2], 1, *x.stride()[3:]))
    seen = x[:1] if is_constant(x) else x
    return seen.movedim(2, -1).contiguous().movedim(-1, 2).expand_as(x)


def fits(layer: Layer, learn_on: LearnOn, loss: LocalLoss) -> bool:
    """Whether :func:`learn` can take the place of the plain path."""
    return (
        compiled.suits(layer.bias)
        and type(layer.neuron) is LIF
        and layer.recurrent is None
        and type(learn_on) in (ATan, Membrane)
        and type(loss) is SimilarityCrossEntropy
    )


def factors(layer: Layer, learn_on: LearnOn, loss: LocalLoss, batch: int, contexts: int) -> bool:
    """Whether the error at the input rows has a low rank, that of the contexts, so that gradients come from a few rows.

    Not from more than a quarter as many: with 100 contexts for 128 rows it takes longer.
    """
    linear = isinstance(learn_on, Membrane) and learn_on.clip is None and len(layer.output_shape) == 1
    return linear and isinstance(loss, SimilarityCrossEntropy) and loss.similarity == "dot" and 4 * contexts <= batch


def learn(
    layer: Layer,
    learn_on: LearnOn,
    loss: LocalLoss,
    regions: Tensor | None,
    state: State,
    drive: Tensor,
    contexts: Tensor | None,
    bias: Tensor,
    labels: Tensor,
    mean: Tensor | None,
    at: list[int],
    *,
    count: bool,
    rounded: bool,
    factored: bool = False,
) -> Local:
    """k steps of a layer for which :func:`fits` holds.

    Args:
        layer, learn_on, loss, mean, at: as the plain path has them.
        regions: see :func:`spikeprop.rules.sigprop.region_means`.
        state: of R rows, the B input rows first.
        drive: ``[k, R, *features]``, or ``[k, B, *features]`` beside the ``contexts [C, *features]``, whose drive is always the
            same; in float32 or bfloat16.
        bias: with the centring folded in.
        labels: ``[k, B]``.
        count: whether each row's spikes are counted.
        rounded: whether the error only goes into products; it then comes in their type (:func:`product_type`).
        factored: whether the error comes as a :class:`~spikeprop.traces.Factored` one; where :func:`factors` says so.
    """
    assert isinstance(loss, SimilarityCrossEntropy)
    steps, batch = labels.shape
    if contexts is not None and is_constant(drive):
        drive, contexts = torch.cat([drive[0], contexts]).expand(steps, -1, *layer.output_shape), None
    neuron, constant = layer.neuron, is_constant(drive)
    numbers = torch.stack([_flat(part, layer) for part in (bias, neuron.alpha, neuron.beta, neuron.threshold)])
    has_current = bool((numbers[1] > 0.0).any())
    with torch.inference_mode(False):  # the state outlives the learning: it must be ordinary tensors
        moving = [_copy(part) if moves else part[:0] for part, moves in zip(state, (has_current, True), strict=True)]
        nothing = torch.zeros((), **FLOATS).expand(state.current.shape)  # of a synapse without memory: no number per neuron
    present = _put_channels_last(drive[:1] if constant else drive, 2)
    given = torch.zeros(0, layer.rate.numel(), **FLOATS) if contexts is None else _put_channels_last(contexts, 1).flatten(1)
    narrow = product_type(layer.bias) == torch.bfloat16
    shape = torch.Size([present.shape[1] + len(given), *present.shape[2:]])
    before = torch.empty(shape, **FLOATS)
    spikes, narrow_spikes = _room(narrow, steps, shape, 0)
    own = torch.Size([shape[0] - batch, *shape[1:]]) if factored else shape
    error, narrow_error = _room(narrow and rounded and not factored, len(at), own, 1)
    ranks = (len(at), batch, own[0]) if factored else (1, 0, shape[0] - batch)
    weights = torch.empty(ranks, **FLOATS)
    responses = torch.empty(ranks[0], ranks[2] if factored else 0, layer.rate.numel(), **FLOATS)

    channels = layer.output_shape[0]
    places, shares = torch.zeros(0, 0, dtype=torch.int64, device="cpu"), torch.zeros(0, 0, **FLOATS)
    size = layer.rate.numel()
    if regions is not None:
        shares, places = regions.topk(int((regions > 0).sum(1).max()), 1)
        size = channels * regions.shape[1]
    phi, activity = torch.zeros(size, **FLOATS), torch.zeros(layer.rate.numel(), **FLOATS)
    counts, error_sum = (torch.zeros(kept, layer.rate.numel(), **FLOATS) for kept in (batch if count else 0, len(at)))
    unit = layer.neuron.unit
    kernels = compiled.loops()
    total = kernels.learn(
        *compiled.by_width(present.flatten(2)),
        given.numpy(),
        torch.tensor(compiled.places(at, steps), device="cpu").numpy(),
        numbers.numpy(),
        (kernels.ZERO, kernels.SUBTRACT, kernels.NONE)[("zero", "subtract", "none").index(neuron.reset_mechanism)],
        has_current,
        *(part.flatten(1).numpy() for part in moving),
        _reading(learn_on, unit),
        places.numpy(),
        shares.numpy(),
        labels.contiguous().numpy(),
        (torch.zeros(0, **FLOATS) if mean is None else _by_place(mean, channels)).numpy(),
        (compiled.float32(loss.temperature), loss.similarity == "cosine", compiled.float32(smallest_norm(size))),
        before.flatten(1).numpy(),
        *(part.flatten(2).numpy() for part in (spikes, error)),
        *(part.flatten(2).view(torch.uint16).numpy() for part in (narrow_spikes, narrow_error)),
        *(part.numpy() for part in (phi, activity, counts, error_sum, weights, responses)),
    )
    current = _seen_channels_first(moving[0], 1) if has_current else nothing
    return Local(
        NeuronState(current, _seen_channels_first(moving[1], 1)),
        _seen_channels_first(narrow_spikes if narrow else spikes, 2),
        Factored(weights, responses, error)
        if factored
        else _seen_channels_first(narrow_error if narrow and rounded else error, 2),
        layer.bias.new_tensor(total),
        phi.view(-1, channels).T.reshape(-1),
        _seen_channels_first(activity.view(*layer.output_shape[1:], channels), 0),
        _seen_channels_first(counts.view(batch, *layer.output_shape[1:], channels), 1) if count else None,
        _seen_channels_first(error_sum.view(len(at), *layer.output_shape[1:], channels), 1),
    )


def _room(narrow: bool, steps: int, shape: torch.Size, scratch: int) -> tuple[Tensor, Tensor]:
    """What the kernel writes in float32, and in bfloat16: all steps or none; in float32 then so many rows of one."""
    bits = torch.empty(steps if narrow else 0, *shape, dtype=torch.bfloat16, device="cpu")
    return torch.empty((1, scratch, *shape[1:]) if narrow else (steps, *shape), **FLOATS), bits


def _reading(learn_on: LearnOn, unit: float) -> tuple[Any, int, Any]:
    kernels = compiled.loops()
    if isinstance(learn_on, ATan):
        return compiled.float32(unit), kernels.ATAN, compiled.float32(learn_on.width)
    assert isinstance(learn_on, Membrane)
    if learn_on.clip is None:
        return compiled.float32(unit), kernels.RAW, compiled.float32(0.0)
    return compiled.float32(unit), kernels.CLIPPED, compiled.float32(learn_on.clip)


def _flat(value: float | Tensor, layer: Layer) -> Tensor:
    """A number per neuron, channels last."""
    if not isinstance(value, Tensor):
        return torch.full((layer.rate.numel(),), value, **FLOATS)
    return _put_channels_last(value.expand(layer.output_shape), 0).reshape(-1)


def _by_place(mean: Tensor, channels: int) -> Tensor:
    """``[C * M]`` to ``[M * C]``."""
    return mean.view(channels, -1).T.contiguous().view(-1)


def _put_channels_last(x: Tensor, axis: int) -> Tensor:
    """The features, from ``axis`` on, with their channels last, contiguous; no copy where they lie so already."""
    return x.movedim(axis, -1).contiguous()


def _copy(part: Tensor) -> Tensor:
    """Of a state ``[R, *features]``, channels last."""
    last = part.movedim(1, -1)
    return torch.empty(last.shape, **FLOATS).copy_(last)


def _seen_channels_first(x: Tensor, axis: int) -> Tensor:
    """The inverse, as a view."""
    return x.movedim(-1, axis)
