"""Synapses: linear maps from a layer's input to its neurons' drive, and how an error at the drive changes their weights.

No bias (the neuron has it) and no autograd: ``weight_gradient`` is the closed form of a linear map, and ``adjoint`` its
transpose, used only inside one layer's own chain of pooling and weights, never from layer to layer.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.grad import conv2d_input, conv2d_weight

from spikeprop.errors import InputError

Shape = tuple[int, ...]


class Synapse(nn.Module):
    """A linear map ``[N, *input_shape] -> [N, *output_shape]``; N is any number of rows (batch, or time times batch)."""

    weight: nn.Parameter | None
    fan_in: int = 1
    _rounded: Tensor | None = None

    def output_shape(self, input_shape: Shape) -> Shape:
        """Shape of the drive for one sample. Raises InputError if the input does not fit."""
        raise NotImplementedError

    def forward(self, x: Tensor) -> Tensor:
        raise NotImplementedError

    def product(self, x: Tensor) -> Tensor:
        """:meth:`forward` in the type that its last product was computed in (:func:`product_type`)."""
        return self(x)

    def as_multiplied(self, x: Tensor) -> Tensor:
        """The input in the type in which it meets the weights, where nothing is computed with it before that."""
        return x

    @contextmanager
    def rounded_once(self) -> Iterator[None]:
        """A stretch in which the weights stay as they are: they are brought into the type of products once for all of it."""
        if self.weight is not None:
            self._rounded = self.weight.detach().to(product_type(self.weight))
        try:
            yield
        finally:
            self._rounded = None

    def _rounded_weight(self, weight: Tensor) -> Tensor:
        """The weights in the type of products."""
        return weight.to(product_type(weight)) if self._rounded is None else self._rounded

    def adjoint(self, error: Tensor, input_shape: Shape) -> Tensor:
        """The transposed map: ``[N, *output_shape] -> [N, *input_shape]``."""
        raise NotImplementedError

    def weight_gradient(self, error: Tensor, x: Tensor, onto: Tensor | None = None) -> Tensor:
        """Sum over rows of the outer products: d(sum(error * forward(x)))/dweight, in the weight's shape.

        Added in place to what is there already, if it is given as ``onto``.
        """
        found = self._weight_gradient(error, x)
        return found if onto is None else onto.add_(found)

    def _weight_gradient(self, error: Tensor, x: Tensor) -> Tensor:
        raise NotImplementedError

    def config(self) -> dict[str, Any]:
        """The arguments that rebuild this synapse, without its weights."""
        raise NotImplementedError


def _weight(shape: Shape, gain: float, generator: torch.Generator | None) -> nn.Parameter:
    fan_in = math.prod(shape[1:])
    return nn.Parameter(torch.randn(shape, generator=generator) * (gain / math.sqrt(fan_in)), requires_grad=False)


class Dense(Synapse):
    """All to all. ``weight`` is ``[outputs, inputs]``, drawn from N(0, gain^2 / inputs)."""

    weight: nn.Parameter

    def __init__(self, inputs: int, outputs: int, *, gain: float = 1.0, generator: torch.Generator | None = None) -> None:
        super().__init__()
        self.inputs, self.outputs, self.fan_in = inputs, outputs, inputs
        self.weight = _weight((outputs, inputs), gain, generator)

    def output_shape(self, input_shape: Shape) -> Shape:
        if input_shape != (self.inputs,):
            raise InputError(
                f"Dense({self.inputs}, {self.outputs}): the input has shape {input_shape}; put Flatten() before it"
            )
        return (self.outputs,)

    def forward(self, x: Tensor) -> Tensor:
        return self.product(x).to(self.weight.dtype)

    def product(self, x: Tensor) -> Tensor:
        weight = self._rounded_weight(self.weight)
        return F.linear(x.to(weight.dtype), weight)

    def as_multiplied(self, x: Tensor) -> Tensor:
        return x.to(product_type(self.weight))

    def adjoint(self, error: Tensor, input_shape: Shape) -> Tensor:
        return error @ self.weight

    def weight_gradient(self, error: Tensor, x: Tensor, onto: Tensor | None = None) -> Tensor:
        if len(error) != 1:
            if onto is None or product_type(self.weight) != self.weight.dtype:
                return super().weight_gradient(error, x, onto)
            return onto.addmm_(error.T, x)  # without room for the product
        one, two = (row[0].to(self.weight.dtype) for row in (error, x))  # a smaller type would speed nothing up
        return torch.outer(one, two) if onto is None else onto.addr_(one, two)

    def _weight_gradient(self, error: Tensor, x: Tensor) -> Tensor:
        error, x = in_product_type(self.weight, error, x)
        return (error.T @ x).to(self.weight.dtype)

    def config(self) -> dict[str, Any]:
        return {"type": "Dense", "inputs": self.inputs, "outputs": self.outputs}


class Conv2d(Synapse):
    """Cross-correlation over ``[C, H, W]`` as ``torch.nn.Conv2d`` has it. ``weight`` is ``[out, in / groups, k, k]``."""

    weight: nn.Parameter

    def __init__(
        self,
        channels_in: int,
        channels_out: int,
        kernel_size: int,
        *,
        stride: int = 1,
        padding: int = 0,
        groups: int = 1,
        gain: float = 1.0,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        if channels_in % groups or channels_out % groups:
            raise InputError(f"Conv2d: groups = {groups} must divide the channels in ({channels_in}) and out ({channels_out})")
        self.arguments = {
            "channels_in": channels_in,
            "channels_out": channels_out,
            "kernel_size": kernel_size,
            "stride": stride,
            "padding": padding,
            "groups": groups,
        }
        self.fan_in = channels_in // groups * kernel_size**2
        self.how = (stride, padding, 1, groups)
        self.weight = _weight((channels_out, channels_in // groups, kernel_size, kernel_size), gain, generator)

    def output_shape(self, input_shape: Shape) -> Shape:
        if len(input_shape) != 3 or input_shape[0] != self.arguments["channels_in"]:
            raise InputError(f"Conv2d: the input has shape {input_shape}, expected ({self.arguments['channels_in']}, H, W)")
        size, stride, padding = (self.arguments[key] for key in ("kernel_size", "stride", "padding"))
        if min(input_shape[1:]) + 2 * padding < size:
            raise InputError(f"Conv2d: the kernel of {size} is larger than the padded input {input_shape}")
        height, width = ((extent + 2 * padding - size) // stride + 1 for extent in input_shape[1:])
        return (self.arguments["channels_out"], height, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.product(x).to(self.weight.dtype)

    def product(self, x: Tensor) -> Tensor:
        weight = self._rounded_weight(self.weight)
        return F.conv2d(x.to(weight.dtype), weight, None, *self.how)

    def as_multiplied(self, x: Tensor) -> Tensor:
        return x.to(product_type(self.weight))

    def adjoint(self, error: Tensor, input_shape: Shape) -> Tensor:
        return conv2d_input((len(error), *input_shape), self.weight, error, *self.how)

    def _weight_gradient(self, error: Tensor, x: Tensor) -> Tensor:
        error, x = in_product_type(self.weight, error, channels_last_if_one(x, error.stride(1) == 1))
        return conv2d_weight(x, self.weight.shape, error, *self.how).to(self.weight.dtype)

    def then_pooled(self, x: Tensor, size: int) -> Tensor:
        """This map and then means over ``size x size`` windows, for strides of 1: one strided convolution with a larger kernel.

        A mean over shifted outputs is what one kernel gives that is the mean of the shifted kernels; it takes 1 / size^2 of the
        places. Returned in the type of products.
        """
        kernel = self._spread(self.weight, size)
        x, kernel = in_product_type(self.weight, x, kernel)
        return F.conv2d(x, kernel, None, size, *self.how[1:])

    def weight_gradient_then_pooled(self, error: Tensor, x: Tensor, size: int) -> Tensor:
        """:meth:`weight_gradient`, of an error at the pooled outputs."""
        error, x = in_product_type(self.weight, error, channels_last_if_one(x, error.stride(1) == 1))
        extent = self.weight.shape[-1] + size - 1
        shape = (*self.weight.shape[:2], extent, extent)
        gradient = conv2d_weight(x, shape, error, size, *self.how[1:]).to(self.weight.dtype)
        return F.avg_pool2d(gradient, size, 1)

    @staticmethod
    def _spread(kernel: Tensor, size: int) -> Tensor:
        """The mean of ``size x size`` shifted copies ``[out, in, k + size - 1, k + size - 1]``."""
        return F.avg_pool2d(F.pad(kernel, (size - 1,) * 4), size, 1)

    def config(self) -> dict[str, Any]:
        return {"type": "Conv2d", **self.arguments}


def channels_last_if_one(rows: Tensor, wanted: bool = True) -> Tensor:
    """Maps ``[N, 1, H, W]`` under the strides that tell torch their (only) channel lies last, others as they are.

    A convolution works in the layout of its input, and turns its other factor over if that lies otherwise.
    """
    if not wanted or rows.shape[1] != 1:
        return rows
    return rows.as_strided(rows.shape, (rows.stride(0), 1, *rows.stride()[2:]))


def product_type(weight: Tensor) -> torch.dtype:
    """The type that products are computed in: the weight's, or bfloat16 where it is float32 and
    ``torch.set_float32_matmul_precision("medium")`` allows it.

    That is what torch itself says of "medium", done where its library for convolutions works in bfloat16 (from AVX-512 on). (On
    CPUs torch does less for matrix products. Its own switch for convolutions, ``torch.backends.mkldnn.conv.fp32_precision``,
    rounds as much and takes longer.)
    """
    if weight.dtype != torch.float32 or weight.device.type != "cpu" or not torch.backends.mkldnn.is_available():
        return weight.dtype
    try:
        medium = torch.get_float32_matmul_precision() == "medium"
    except RuntimeError:  # precision was set by torch's newer switches, which this one cannot be read beside
        return weight.dtype
    return torch.bfloat16 if medium and torch.ops.mkldnn._is_mkldnn_bf16_supported() else weight.dtype


@contextmanager
def unrounded_products() -> Iterator[None]:
    """A stretch in which :func:`product_type` is the weight's own."""
    try:
        before = torch.get_float32_matmul_precision()
    except RuntimeError:  # as above: then nothing is rounded here
        yield
        return
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def in_product_type(weight: Tensor, *factors: Tensor) -> list[Tensor]:
    """Factors of a product with that weight, or of its gradient, as they are multiplied; spikes lose nothing by it."""
    low = product_type(weight)
    return list(factors) if low == weight.dtype else [factor.to(low) for factor in factors]


class AvgPool2d(Synapse):
    """Mean over non-overlapping ``size x size`` windows of ``[C, H, W]``; a remainder at the edge is left out."""

    weight = None

    def __init__(self, size: int = 2) -> None:
        super().__init__()
        self.size = size

    def output_shape(self, input_shape: Shape) -> Shape:
        if len(input_shape) != 3 or min(input_shape[1:]) < self.size:
            raise InputError(
                f"AvgPool2d({self.size}): the input has shape {input_shape}, expected (C, H, W) of at least that size"
            )
        return (input_shape[0], input_shape[1] // self.size, input_shape[2] // self.size)

    def forward(self, x: Tensor) -> Tensor:
        size, (height, width) = self.size, (extent // self.size for extent in x.shape[2:])
        # As sums of whole slices, rows and then columns: on a CPU torch's own pooling takes several times as long.
        rows = functools.reduce(torch.add, x[:, :, : height * size].unflatten(2, (height, size)).unbind(3))
        return functools.reduce(torch.add, rows[..., : width * size].unflatten(3, (width, size)).unbind(4)) / size**2

    def adjoint(self, error: Tensor, input_shape: Shape) -> Tensor:
        spread = error.repeat_interleave(self.size, 2).repeat_interleave(self.size, 3) / self.size**2
        return F.pad(spread, (0, input_shape[2] - spread.shape[3], 0, input_shape[1] - spread.shape[2]))

    def config(self) -> dict[str, Any]:
        return {"type": "AvgPool2d", "size": self.size}


class Flatten(Synapse):
    """``[C, H, W] -> [C * H * W]`` in C order."""

    weight = None

    def output_shape(self, input_shape: Shape) -> Shape:
        return (math.prod(input_shape),)

    def forward(self, x: Tensor) -> Tensor:
        return x.flatten(1)

    def adjoint(self, error: Tensor, input_shape: Shape) -> Tensor:
        return error.reshape(len(error), *input_shape)

    def config(self) -> dict[str, Any]:
        return {"type": "Flatten"}


class Chain(Synapse):
    """Synapses in a row that act as one linear map, for example pooling, flattening, then weights; at most one has weights."""

    def __init__(self, *parts: Synapse) -> None:
        super().__init__()
        self.parts = nn.ModuleList(parts)
        weighted = [index for index, part in enumerate(parts) if part.weight is not None]
        if len(weighted) > 1:
            raise InputError(f"Chain: {len(weighted)} of its parts have weights; give each its own layer")
        self.weighted = weighted[0] if weighted else None
        if self.weighted is not None:
            self.fan_in = parts[self.weighted].fan_in

    def _pools(self, index: int) -> int | None:
        """The size of the windows, if part ``index`` is a convolution of stride 1 whose outputs are then averaged."""
        if index + 1 >= len(self.parts):
            return None
        part, after = self.parts[index], self.parts[index + 1]
        return after.size if isinstance(part, Conv2d) and isinstance(after, AvgPool2d) and part.how[0] == 1 else None

    @property
    def weight(self) -> nn.Parameter | None:  # type: ignore[override]
        return None if self.weighted is None else self.parts[self.weighted].weight  # type: ignore[return-value]

    def output_shape(self, input_shape: Shape) -> Shape:
        return self._shapes(input_shape)[-1]

    def _shapes(self, input_shape: Shape) -> list[Shape]:
        shapes = [input_shape]
        for part in self.parts:
            shapes.append(part.output_shape(shapes[-1]))  # type: ignore[operator]
        return shapes

    def forward(self, x: Tensor) -> Tensor:
        x = self.product(x)
        return x if self.weight is None else x.to(self.weight.dtype)

    def product(self, x: Tensor) -> Tensor:
        index = 0
        while index < len(self.parts):
            part, size = self.parts[index], self._pools(index)
            x = part.product(x) if size is None else part.then_pooled(x, size)  # type: ignore[operator]
            index += 1 if size is None else 2
            if self.weight is not None and index < len(self.parts) and index > (self.weighted or 0):
                x = x.to(self.weight.dtype)  # what follows a product is computed in full
        return x

    def as_multiplied(self, x: Tensor) -> Tensor:
        if self.weighted is None or not all(isinstance(part, Flatten) for part in self.parts[: self.weighted]):
            return x
        return self.parts[self.weighted].as_multiplied(x)  # type: ignore[operator]

    @contextmanager
    def rounded_once(self) -> Iterator[None]:
        with nullcontext() if self.weighted is None else self.parts[self.weighted].rounded_once():  # type: ignore[operator]
            yield

    def adjoint(self, error: Tensor, input_shape: Shape) -> Tensor:
        return self._pull_back(error, self._shapes(input_shape), 0)

    def _pull_back(self, error: Tensor, shapes: list[Shape], stop: int) -> Tensor:
        for index in range(len(self.parts) - 1, stop - 1, -1):
            error = self.parts[index].adjoint(error, shapes[index])  # type: ignore[operator]
        return error

    def weight_gradient(self, error: Tensor, x: Tensor, onto: Tensor | None = None) -> Tensor:
        assert self.weighted is not None
        shapes = self._shapes(tuple(x.shape[1:]))
        for part in self.parts[: self.weighted]:
            x = part(x)
        own, size = self.parts[self.weighted], self._pools(self.weighted)
        error = self._pull_back(error, shapes, self.weighted + (1 if size is None else 2))
        if size is None:
            return own.weight_gradient(error, x, onto)  # type: ignore[operator]
        found = own.weight_gradient_then_pooled(error, x, size)  # type: ignore[operator]
        return found if onto is None else onto.add_(found)

    def config(self) -> dict[str, Any]:
        return {"type": "Chain", "parts": [part.config() for part in self.parts]}  # type: ignore[operator]


def synapse_from_config(config: dict[str, Any]) -> Synapse:
    """Inverse of :meth:`Synapse.config`; the weights wait for the state dictionary."""
    arguments = dict(config)
    kind = arguments.pop("type")
    if kind == "Chain":
        return Chain(*(synapse_from_config(part) for part in arguments["parts"]))
    kinds: dict[str, type[Synapse]] = {"Dense": Dense, "Conv2d": Conv2d, "AvgPool2d": AvgPool2d, "Flatten": Flatten}
    return kinds[kind](**arguments)
