"""Convolutional blocks of timm with fewer passes over the map, for inference on a CPU.

A norm, an activation and a residual after a convolution each read and write the map again, which takes longer than the
convolution itself where that is small or depthwise.  :func:`run` folds the norm into the weights, lets oneDNN add the
residual as it writes, keeps maps channels-last, and works on a few images at a time where maps would leave the cache.
ReLU stays a pass of its own, in place: that of oneDNN turns NaN into 0.
"""

import itertools
import math
from collections.abc import Iterable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import BatchNormAct2d, ConvNormAct, DropPath, register_notrace_module
from timm.models import _efficientnet_blocks, byobnet, resnet
from torch import Tensor, nn

from ..ops.backend import use_onednn
from ..ops.convolution import output_sides
from .layout import to_channels_last, to_fast_layout
from .plain import convolves, fold, folds, is_plain, is_watched, tensors

__all__ = ["StemConv", "has_few_positions", "infers", "output_shape", "run", "speed_up"]

_CHUNK_BYTES = 8 << 20  # largest map inside a block that is worked on at once; past it page faults dominate
_FEW_POSITIONS = 16  # weights for each element of the output, past which convolutions are faster channels-first
_FOLDING = 1 << 15  # elements of a map over which a norm takes as long as the small operators that fold one
_IN_PLACE = (nn.ReLU, nn.ReLU6)
_ACTIVATIONS = (*_IN_PLACE, nn.SiLU)
_IDLE = (nn.Identity, DropPath, nn.Dropout)


def infers(x: Tensor) -> bool:
    """Whether :func:`run` takes the fast form for a map ``[B, C, H, W]``."""
    return not isinstance(x, torch.fx.Proxy) and x.dim() == 4 and use_onednn(x, x)


def run(x: Tensor, *modules: nn.Module | None, add: Tensor | None = None, act: nn.Module | None = None) -> Tensor:
    """``act(modules(x) + add)``, the modules one after the other.

    Args:
        x: Map ``[B, C, H, W]``.
        modules: What to run, in order; None is left out.
        add: Map in the shape of the result; None adds nothing.
        act: Activation after that; None for none.

    Returns:
        The result, up to rounding.
    """
    if not infers(x):
        for module in modules:
            x = x if module is None else module(x)
        x = x if add is None else x + add
        return x if act is None else act(x)
    todo, after = _flat(modules), _flat((act,))
    if add is None:
        todo, after = todo + after, []
    groups = [list(group) for _, group in itertools.groupby(todo, lambda entry: entry[0] != "other")]
    for i, group in enumerate(groups):
        end = (add, after) if i == len(groups) - 1 else (None, [])
        size = _images(group, x) if x.shape[0] > 1 else 1
        if size == x.shape[0]:
            x = _run(group, x, *end)
            continue
        adds: Any = [None] * x.shape[0] if end[0] is None else end[0].split(size)
        x = torch.cat([_run(group, part, other, end[1]) for part, other in zip(x.split(size), adds, strict=False)])
    return x


Todo = list[tuple[str, Any]]  # modules, each with what it is to :func:`run`


def _flat(modules: Iterable[nn.Module | None]) -> Todo:
    """Modules without those that return their input, and with the children of sequences in their place."""
    out: Todo = []
    for module in modules:
        kind = type(module)
        if module is None or (
            kind in _IDLE and (kind is nn.Identity or not module.training) and is_plain(module, kind)
        ):
            continue
        if kind in _SEQUENCES and not is_watched(module):
            out += _flat(module._modules.values())  # children() would leave out a module that is there twice
        elif kind in (nn.Conv2d, StemConv) and convolves(module, kind):
            out.append(("conv", module))
        elif kind in (nn.BatchNorm2d, BatchNormAct2d) and _folds(module):
            out.append(("norm", module))
        elif kind in _ACTIVATIONS and is_plain(module, kind):
            out.append(("act", module))
        elif kind is nn.MaxPool2d and isinstance(module.stride, int) and not is_watched(module):
            out.append(("pool", module))
        else:
            out.append(("other", module))
    return out


def _folds(norm: Any) -> bool:
    """Whether a norm, with its activation if it has one, can be part of the convolution before it."""
    if type(norm) is nn.BatchNorm2d:
        return folds(norm)
    known = is_plain(norm.act, nn.Identity, *_ACTIVATIONS)
    return known and folds(norm, BatchNormAct2d) and not _flat((norm.drop,))


def _run(todo: Todo, x: Tensor, add: Tensor | None, after: Todo) -> Tensor:
    i = 0
    while i < len(todo):
        kind, conv = todo[i]
        i += 1
        if kind != "conv":
            x = conv(x)
            continue
        (weight, bias), shape, act = tensors(conv), output_shape(conv, x.shape), None
        if weight.dtype != x.dtype or conv.in_channels != x.shape[1] or min(shape) < 1:  # the layer says what is wrong
            x = conv(x)
            continue
        if i < len(todo) and todo[i][0] == "norm":
            norm, out = todo[i][1], math.prod(shape)
            # a norm costs a pass over the map, or, folded into the weights, one over them and small operators
            if weight.numel() + _FOLDING > out:
                x = conv(x.contiguous() if has_few_positions(conv, shape) else x)
                continue
            scale, shift = fold(norm, None if x.dtype == torch.float32 else torch.float32)
            if bias is not None:
                shift = torch.addcmul(shift, bias.to(shift.dtype), scale)
            weight, bias = (weight * scale.view(-1, 1, 1, 1)).to(x.dtype), shift.to(x.dtype)
            if type(norm) is BatchNormAct2d and type(norm.act) is not nn.Identity:
                act = norm.act
            i += 1
        if act is None and i < len(todo) and todo[i][0] == "act":
            act = todo[i][1]
            i += 1
        geometry = conv.padding, conv.stride, conv.dilation, conv.groups
        if i == len(todo) and act is None and add is not None and add.dtype == x.dtype and add.shape == shape:
            maps = to_channels_last(x), to_channels_last(add)
            x = torch.ops.mkldnn._convolution_pointwise.binary(
                *maps, weight, bias, *geometry, "add", 1.0, None, [], None
            )
            add = None
            continue
        name = "swish" if isinstance(act, nn.SiLU) else "none"
        x = torch.ops.mkldnn._convolution_pointwise(to_channels_last(x), weight, bias, *geometry, name, [], "")
        if isinstance(act, _IN_PLACE):
            if i < len(todo) and todo[i][0] == "pool":  # of the maxima it is the same, and smaller
                x = todo[i][1](x)
                i += 1
            x = _activate(act, x)
    if add is not None:
        x = x + add
    for kind, module in after:
        x = _activate(module, x) if kind == "act" else module(x)
    return x


def _activate(act: nn.Module, x: Tensor) -> Tensor:
    """A known activation, in the memory of a map that nobody else has."""
    if isinstance(act, nn.ReLU):
        return x.relu_()
    return F.hardtanh_(x, 0.0, 6.0) if isinstance(act, nn.ReLU6) else F.silu(x, inplace=True)


def has_few_positions(conv: nn.Conv2d, shape: Sequence[int]) -> bool:
    """Whether a convolution has so many weights for an output in a shape that it is faster channels-first.

    PyTorch gives weights the layout of the map, in training forward, backward and in the gradient.
    """
    weights = conv.in_channels // conv.groups * conv.out_channels * math.prod(conv.kernel_size)
    return conv.kernel_size != (1, 1) and weights > _FEW_POSITIONS * math.prod(shape)


def output_shape(conv: nn.Conv2d, shape: Sequence[int]) -> tuple[int, ...]:
    """Shape of what a convolution makes of a map."""
    padding: Any = conv.padding
    sides = output_sides(shape[2:], conv.kernel_size, conv.stride, padding, conv.dilation)
    return shape[0], conv.out_channels, *sides


def _images(todo: Todo, x: Tensor) -> int:
    """How many images to work on at once, so that the maps between the first and the last module stay in the cache."""
    shape, largest = tuple(x.shape), 0
    if todo[0][0] == "other":  # it may tell images apart, or somebody counts its calls
        return x.shape[0]
    for i, (kind, module) in enumerate(todo):
        largest = max(largest, math.prod(shape)) if i else 0
        if kind == "conv":
            shape = output_shape(module, shape)
        elif kind == "pool":
            shape = (*shape[:2], *(n // module.stride for n in shape[2:]))
    parts = max(1, math.ceil(largest * x.element_size() / _CHUNK_BYTES))
    return math.ceil(x.shape[0] / parts)


@register_notrace_module  # a leaf like any convolution
class StemConv(nn.Conv2d):
    """First convolution: it decides the memory format of all maps."""

    def forward(self, x: Tensor) -> Tensor:
        """Image ``[B, in_chans, height, width]`` to a map."""
        return self._conv_forward(to_fast_layout(x), self.weight, self.bias)


class DepthwiseSeparableConv(_efficientnet_blocks.DepthwiseSeparableConv):
    """timm's block of MobileNet-V1, without space to depth."""

    def forward(self, x: Tensor) -> Tensor:
        """Map ``[B, in_chs, H, W]`` to the block's output."""
        shortcut = x
        if not torch.jit.is_scripting():
            first = self.conv_dw, self.bn1, self.aa, self.se, self.conv_pw, self.bn2
            if self.has_skip:
                return run(x, *first, self.drop_path, add=shortcut)
            return run(x, *first)
        x = self.aa(self.bn1(self.conv_dw(x)))  # type: ignore[misc]
        x = self.bn2(self.conv_pw(self.se(x)))
        return self.drop_path(x) + shortcut if self.has_skip else x


class InvertedResidual(_efficientnet_blocks.InvertedResidual):
    """timm's block of MobileNet-V2, without space to depth."""

    def forward(self, x: Tensor) -> Tensor:
        """Map ``[B, in_chs, H, W]`` to the block's output."""
        shortcut = x
        if not torch.jit.is_scripting():
            first = self.conv_pw, self.bn1, self.conv_dw, self.bn2, self.aa, self.se, self.conv_pwl, self.bn3
            if self.has_skip:
                return run(x, *first, self.drop_path, add=shortcut)
            return run(x, *first)
        x = self.bn1(self.conv_pw(x))
        x = self.se(self.aa(self.bn2(self.conv_dw(x))))  # type: ignore[misc]
        x = self.bn3(self.conv_pwl(x))
        return self.drop_path(x) + shortcut if self.has_skip else x


class NormedConv(ConvNormAct):
    """timm's convolution with norm and activation, without anti-aliasing."""

    def forward(self, x: Tensor) -> Tensor:
        """Map ``[B, in_chs, H, W]`` to the activated output."""
        if not torch.jit.is_scripting():
            return run(x, self.conv, self.bn)
        return self.bn(self.conv(x))


class Stem(byobnet.Stem):
    """timm's convolutions and pooling before the first stage."""

    def forward(self, x: Tensor) -> Tensor:
        """Image ``[B, in_chs, height, width]`` to the first map."""
        if not torch.jit.is_scripting():
            return run(x, *self)
        for module in self:
            x = module(x)
        return x


class BottleneckBlock(byobnet.BottleneckBlock):
    """timm's configurable bottleneck block."""

    def forward(self, x: Tensor) -> Tensor:
        """Map ``[B, in_chs, H, W]`` to the block's output."""
        shortcut = x if self.shortcut is None else self.shortcut(x)
        if not torch.jit.is_scripting():
            layers = self.conv1_1x1, self.conv2_kxk, self.conv2b_kxk, self.attn, self.conv3_1x1, self.attn_last
            add = None if self.shortcut is None else shortcut
            return run(x, *layers, self.drop_path, add=add, act=self.act)
        x = self.attn(self.conv2b_kxk(self.conv2_kxk(self.conv1_1x1(x))))
        x = self.drop_path(self.attn_last(self.conv3_1x1(x)))
        return self.act(x if self.shortcut is None else x + shortcut)


class SelfAttnBlock(byobnet.SelfAttnBlock):
    """timm's configurable bottleneck block with self-attention."""

    def forward(self, x: Tensor) -> Tensor:
        """Map ``[B, in_chs, H, W]`` to the block's output."""
        shortcut = x if self.shortcut is None else self.shortcut(x)
        if not torch.jit.is_scripting():
            layers = self.conv1_1x1, self.conv2_kxk, self.self_attn, self.post_attn, self.conv3_1x1
            add = None if self.shortcut is None else shortcut
            return run(x, *layers, self.drop_path, add=add, act=self.act)
        x = self.post_attn(self.self_attn(self.conv2_kxk(self.conv1_1x1(x))))
        x = self.drop_path(self.conv3_1x1(x))
        return self.act(x if self.shortcut is None else x + shortcut)


class BasicBlock(resnet.BasicBlock):
    """timm's block of a ResNet-18."""

    def forward(self, x: Tensor) -> Tensor:
        """Map ``[B, inplanes, H, W]`` to the block's output."""
        if not torch.jit.is_scripting():
            layers = self.conv1, self.bn1, self.drop_block, self.act1, self.aa, self.conv2, self.bn2, self.se
            return run(x, *layers, self.drop_path, add=run(x, self.downsample), act=self.act2)
        shortcut = x if self.downsample is None else self.downsample(x)
        x = self.aa(self.act1(self.drop_block(self.bn1(self.conv1(x)))))  # type: ignore[misc]
        x = self.bn2(self.conv2(x))
        if self.se is not None:
            x = self.se(x)
        if self.drop_path is not None:
            x = self.drop_path(x)
        return self.act2(x + shortcut)


class Bottleneck(resnet.Bottleneck):
    """timm's block of a ResNet-50."""

    def forward(self, x: Tensor) -> Tensor:
        """Map ``[B, inplanes, H, W]`` to the block's output."""
        if not torch.jit.is_scripting():
            first = self.conv1, self.bn1, self.act1, self.conv2, self.bn2, self.drop_block, self.act2, self.aa
            layers = *first, self.conv3, self.bn3, self.se
            return run(x, *layers, self.drop_path, add=run(x, self.downsample), act=self.act3)
        shortcut = x if self.downsample is None else self.downsample(x)
        x = self.act1(self.bn1(self.conv1(x)))
        x = self.aa(self.act2(self.drop_block(self.bn2(self.conv2(x)))))  # type: ignore[misc]
        x = self.bn3(self.conv3(x))
        if self.se is not None:
            x = self.se(x)
        if self.drop_path is not None:
            x = self.drop_path(x)
        return self.act3(x + shortcut)


_FAST: dict[type[nn.Module], type[nn.Module]] = {
    module.__bases__[0]: module
    for module in (
        NormedConv,
        DepthwiseSeparableConv,
        InvertedResidual,
        BottleneckBlock,
        SelfAttnBlock,
        Stem,
        BasicBlock,
        Bottleneck,
    )
}
_SEQUENCES = (nn.Sequential, ConvNormAct, NormedConv, byobnet.DownsampleAvg)  # whose children run in order


def speed_up(model: nn.Module) -> None:
    """Let the blocks of timm in a model that :func:`run` knows call it: they get a subclass of their class."""
    for module in model.modules():
        # anti-aliasing of the one and space to depth of the other are left to timm
        unknown = getattr(module, "aa" if type(module) is ConvNormAct else "conv_s2d", None)
        if type(module) in _FAST and unknown is None:
            module.__class__ = _FAST[type(module)]
