"""ContMix block and the parts it shares with the rest of OverLoCK (Sec. 3.3), channels first."""

from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import (
    DropPath,
    LayerNorm2d,
    register_notrace_function,
    register_notrace_module,
    trunc_normal_,
)
from torch import Tensor, nn

from ..ops.backend import (
    fuses_gelu,
    on_kernel_device,
    plain_only,
    trains_by_onednn,
    use_compiled_onednn,
    use_onednn,
    without_autocast,
)
from ..ops.contmix import contmix, contmix_from_logits, contmix_kernels, working_size
from ..ops.depthwise import depthwise_conv, has_long_rows
from ..ops.depthwise3x3 import depthwise3x3
from ..ops.response_norm import response_factor, response_ffn, response_norm, trains_response_norm
from .checks import Range, check_multiple, checked, need, scaled
from .convnet import has_few_positions, output_shape
from .layout import to_channels_last
from .plain import (
    convolves,
    depthwise,
    fold,
    folds,
    has_bias,
    is_plain,
    is_watched,
    keeps_size,
    pointwise,
    project,
    tensors,
)
from .resampling import RegionPool, region_mean, resize

__all__ = ["ContMixBlock"]

BRANCHES = {  # large kernel: (kernel, dilation) of the parallel branches
    5: ((3, 1), (3, 2)),
    7: ((5, 1), (3, 1), (3, 2), (3, 3)),
    9: ((5, 1), (7, 1), (5, 2), (3, 3), (3, 4)),
    11: ((5, 1), (7, 1), (5, 2), (3, 3), (3, 4), (3, 5)),
    13: ((5, 1), (7, 1), (7, 2), (3, 3), (3, 4), (3, 5)),
    15: ((5, 1), (7, 1), (7, 2), (3, 3), (3, 5), (3, 7)),
    17: ((5, 1), (7, 1), (9, 2), (3, 4), (3, 5), (3, 7)),
    19: ((5, 1), (7, 1), (9, 1), (9, 2), (3, 4), (3, 5), (3, 7)),
}
REGIONS = 7  # side of the pooled grid of context regions
_ACTIVATIONS = (nn.GELU, nn.SiLU)  # that oneDNN knows
_CHUNK_BYTES = 6 << 20  # largest hidden map worked on at once


def as_written(x: Tensor) -> bool:
    """Whether to compute in the order of the official code: on the meta device and in traces.

    Profilers count there, and published counts are those of that order.  Results are equal up to rounding.
    """
    if not torch.jit.is_scripting():  # noqa: SIM102 - TorchScript compiles every operand of `and`
        if on_kernel_device(x):  # the meta device is one while kernels are compiled without a GPU
            return torch.jit.is_tracing()
    return x.is_meta or torch.jit.is_tracing()


def _infers(x: Tensor) -> bool:
    """Whether a float32 or half map on a CPU has no derivative to pass on."""
    if x.device.type != "cpu" or x.dtype == torch.float64:
        return False
    if not torch.jit.is_scripting():
        return not torch.is_grad_enabled() and not plain_only()
    return not x.requires_grad


def _merges(x: Tensor) -> bool:
    """Whether parallel convolutions run as one: in inference by oneDNN and on a GPU, where they are bound by memory."""
    if on_kernel_device(x):
        return not torch.is_grad_enabled() and not plain_only()
    return use_onednn(x, x)


@register_notrace_module  # picks its path by the device of its input
class ResDWConv(nn.Conv2d):
    """Depthwise convolution added to its input; the arguments are those of a convolution."""

    def forward(self, x: Tensor) -> Tensor:
        """Map ``[B, C, H, W]`` to the same shape."""
        if not torch.jit.is_scripting():
            runs = use_onednn(x, self.weight) or (torch.is_grad_enabled() and trains_by_onednn(x))
            if runs and x.dtype == self.weight.dtype == torch.float32 and keeps_size(self):
                return self._conv_forward(x, self.residual_weight(), self.bias)
            if depthwise(self, 3, types=(ResDWConv,)):
                return depthwise3x3(x, self.weight, self.bias, residual=True)
        return x + self._conv_forward(x, self.weight, self.bias)

    def residual_weight(self) -> Tensor:
        """Kernel that adds the input itself: one pass over the map less, but only float32 keeps small weights exact.

        In training it is another one less, over the gradient.
        """
        one = self.weight.new_zeros(self.weight.shape[2:])
        one[one.shape[0] // 2, one.shape[1] // 2] = 1
        return self.weight + one


def residual_conv(dim: int, **dd: Any) -> ResDWConv:
    """The 3x3 one of OverLoCK for ``dim`` channels; ``dd`` are device and dtype."""
    return ResDWConv(dim, dim, 3, padding=1, groups=dim, **dd)


@register_notrace_module  # picks its form by the device of its input
class LayerScale(nn.Module):
    """Scale and bias for every channel.

    Args:
        dim: Channels.
        init_value: Initial scale.
        device: Device of the parameters.
        dtype: Dtype of the parameters.
    """

    def __init__(
        self,
        dim: int,
        init_value: float = 1.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        self.init_value = init_value
        self.weight = nn.Parameter(torch.empty(dim, 1, 1, 1, device=device, dtype=dtype))  # as the official 1x1 kernel
        self.bias = nn.Parameter(torch.empty(dim, device=device, dtype=dtype))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Initial scale, no bias."""
        nn.init.constant_(self.weight, self.init_value)
        nn.init.zeros_(self.bias)

    def forward(self, x: Tensor) -> Tensor:
        """Map ``[B, C, H, W]`` to the same shape."""
        if as_written(x):
            return F.conv2d(x, self.weight, self.bias, groups=self.weight.shape[0])
        weight, bias = self.weight.reshape(1, -1, 1, 1), self.bias.reshape(1, -1, 1, 1)
        return torch.addcmul(bias.to(x.dtype), x, weight.to(x.dtype))  # the cast keeps autocast in half precision


@register_notrace_module  # picks the dtype of the norm
class GlobalResponseNorm(nn.Module):
    """Scale every channel by its norm over the map, relative to the mean norm of all channels.

    The residual is inside the factor: ``(gamma * n + 1) * x + beta``.

    Args:
        dim: Channels.
        device: Device of the parameters.
        dtype: Dtype of the parameters.
    """

    def __init__(self, dim: int, device: torch.device | str | None = None, dtype: torch.dtype | None = None):
        super().__init__()
        self.gamma = nn.Parameter(torch.empty(1, dim, 1, 1, device=device, dtype=dtype))
        self.beta = nn.Parameter(torch.empty(1, dim, 1, 1, device=device, dtype=dtype))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Identity."""
        nn.init.zeros_(self.gamma)
        nn.init.zeros_(self.beta)

    def forward(self, x: Tensor) -> Tensor:
        """Map ``[B, C, H, W]`` to the same shape."""
        if not torch.jit.is_scripting():  # noqa: SIM102 - TorchScript compiles every operand of `and`
            if trains_response_norm(x, self.gamma):
                return response_norm(x, self.gamma, self.beta)
        dtype = torch.promote_types(x.dtype, torch.float32)  # the norm of a large map overflows float16
        if _infers(x):  # up to 10 times faster on channels-last maps, but without a gradient at zero
            wide = x.to(dtype) if x.dtype == torch.float16 else x  # sums of bfloat16 are float32 inside
            norm = wide.square().sum(dim=(2, 3), keepdim=True).sqrt()
        elif torch.jit.is_scripting():
            norm = torch.linalg.vector_norm(x.to(dtype), dim=(2, 3), keepdim=True)
        else:
            with without_autocast(x):  # which would copy the map to float32
                norm = torch.linalg.vector_norm(x, dim=(2, 3), keepdim=True, dtype=dtype)
        factor = response_factor(self.gamma, norm)
        return torch.addcmul(self.beta.to(x.dtype), x, factor.to(x.dtype))


@register_notrace_module  # picks its path by the device of its input
class FusedSequential(nn.Sequential):
    """Sequence that a CPU runs with fewer passes over the map, for inference in dtypes that oneDNN knows.

    Norms are folded into the convolution before them, activations applied as its output is written, and images worked
    on a few at a time where the widest map would leave the cache.  Modules with hooks run by themselves.
    """

    def forward(self, x: Tensor) -> Tensor:
        """Map ``[B, C, H, W]`` as the modules do one after the other."""
        if not torch.jit.is_scripting():
            if use_onednn(x, x):
                out = [run_fused(list(self), chunk) for chunk in x.split(self._images(x))]
                return out[0] if len(out) == 1 else torch.cat(out)
            if torch.compiler.is_compiling():
                return self._compiled(x)
        for module in self:
            if torch.jit.is_scripting():
                x = module(x)
            elif _has_few_positions(module, x):
                x = to_channels_last(module(x.contiguous()))
            else:
                x = project(module, x)
        return x

    @torch.jit.unused
    def _compiled(self, x: Tensor) -> Tensor:
        """For ``torch.compile``, from which an operator hides the feed-forward network that the sequence may end in."""
        modules: list[Any] = list(self)
        ffn = modules[-5:] if _is_ffn(modules[-5:], x) else []
        for module in modules[: len(modules) - len(ffn)]:
            x = project(module, x)
        if not ffn:
            return x
        fc1, _, conv, norm, fc2 = ffn
        w1, b1, _, bd, w2, b2 = tensors(fc1, conv, fc2)
        middle = conv.residual_weight(), bd, norm.gamma, norm.beta
        x = response_ffn(x.permute(0, 2, 3, 1), w1.flatten(1), b1, *middle, w2.flatten(1), b2)
        return x.permute(0, 3, 1, 2)

    @torch.jit.unused
    def _images(self, x: Tensor) -> int:
        """How many images to work on at once: all, unless the modules treat each by itself and nobody counts them."""
        modules: list[Any] = list(self)
        width = max((m.out_channels for m in modules if pointwise(m)), default=0)
        size = _CHUNK_BYTES // (x.shape[2] * x.shape[3] * width * x.element_size() + 1) + 1
        return size if size < x.shape[0] and all(map(_by_image, self.modules())) else x.shape[0]


def _has_few_positions(conv: Any, x: Tensor) -> bool:
    """Whether a convolution trains faster on a CPU channels-first, by the rule of inference."""
    if not torch.is_grad_enabled() or torch.compiler.is_compiling() or not trains_by_onednn(x):
        return False
    return convolves(conv) and conv.groups == 1 and has_few_positions(conv, output_shape(conv, x.shape))


def _is_ffn(modules: list[Any], x: Tensor) -> bool:
    """Whether modules are plain and the feed-forward network that is an operator, for a map in compiled inference."""
    if len(modules) < 5 or not is_plain(modules[1], nn.GELU) or modules[1].approximate != "none":
        return False
    fc1, _, conv, norm, fc2 = modules
    return (
        pointwise(fc1)
        and pointwise(fc2)
        and fc1.stride == fc2.stride == (1, 1)
        and is_plain(norm, GlobalResponseNorm)
        and depthwise(conv, 3, types=(ResDWConv,))
        and x.dtype == torch.float32  # in which the residual may be part of the kernel
        and use_compiled_onednn(x, tensors(fc1)[0])
    )


def _by_image(module: nn.Module) -> bool:
    return folds(module) or (type(module) in _BY_IMAGE and not is_watched(module))


def _activation(module: Any) -> tuple[str, str]:
    """An activation's name and algorithm in oneDNN."""
    return ("gelu", module.approximate) if isinstance(module, nn.GELU) else ("swish", "")


def run_fused(modules: list[Any], x: Tensor) -> Tensor:
    """Run modules on a map, each convolution together with the norm and activation after it.

    Args:
        modules: What to run, in order; those that are not plain run by themselves.
        x: Map ``[B, C, H, W]`` on a CPU, outside autograd.

    Returns:
        What the modules give one after the other, up to rounding.  Norms of bfloat16 are folded in float32.
    """
    i = 0
    while i < len(modules):
        conv = modules[i]
        i += 1
        if not _fusible(conv, x.dtype):
            x = conv(x)
            continue
        if isinstance(conv, DilatedReparamBlock):
            weight, bias, conv = *conv.kernel(), conv.lk_origin
        else:
            weight, bias = tensors(conv)
            weight = conv.residual_weight() if isinstance(conv, ResDWConv) else weight
        # a norm costs a pass over the map, or over the weights if it is folded into them
        if i < len(modules) and folds(modules[i]) and weight.numel() < x.numel():
            scale, shift = fold(modules[i], torch.float32)
            i += 1
            bias = shift if bias is None else torch.addcmul(shift, bias.to(shift.dtype), scale)
            weight = weight * scale.reshape(-1, 1, 1, 1)
        weight, bias = weight.to(x.dtype), None if bias is None else bias.to(x.dtype)
        activation, algorithm, apart = "none", "", None
        if i < len(modules) and is_plain(modules[i], *_ACTIVATIONS):
            activation, algorithm = _activation(modules[i])
            if activation == "gelu" and not fuses_gelu(x):
                activation, apart = "none", algorithm
            i += 1
        if pointwise(conv) and conv.stride == (1, 1):
            x, w = x.permute(0, 2, 3, 1), weight.flatten(1)
            x = torch.ops.mkldnn._linear_pointwise(x, w, bias, activation, [], algorithm).permute(0, 3, 1, 2)
        elif activation == "none" and has_long_rows(x, weight.shape[2]) and depthwise(conv, weight.shape[2]):
            x = torch.ops.vizoo.depthwise_conv(x, weight, bias, 1, False)
        else:
            geometry = conv.padding, conv.stride, conv.dilation, conv.groups
            x = torch.ops.mkldnn._convolution_pointwise(x, weight, bias, *geometry, activation, [], algorithm)
        x = x if apart is None else torch.ops.aten.gelu_(x, approximate=apart)
    return x


def _fusible(module: nn.Module, dtype: torch.dtype) -> bool:
    if isinstance(module, DilatedReparamBlock):
        return is_plain(module, DilatedReparamBlock) and module.mergeable()
    if isinstance(module, ResDWConv):  # which adds its input by itself where its weight would not be exact
        return dtype == torch.float32 and is_plain(module, ResDWConv) and keeps_size(module)
    return convolves(module)


class SqueezeExcite(nn.Module):
    """Gate every channel by what the pooled map says.

    Args:
        dim: Channels; the hidden layer has an eighth of them, at least 16.
        device: Device of the parameters.
        dtype: Dtype of the parameters.
    """

    def __init__(self, dim: int, device: torch.device | str | None = None, dtype: torch.dtype | None = None):
        super().__init__()
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        hidden_dim = max(16, dim // 8)
        self.proj = FusedSequential(
            nn.AdaptiveAvgPool2d(1),
            nn.Conv2d(dim, hidden_dim, 1, **dd),
            nn.GELU(),
            nn.Conv2d(hidden_dim, dim, 1, **dd),
            nn.Sigmoid(),
        )

    def forward(self, x: Tensor) -> Tensor:
        """Map ``[B, C, H, W]`` to the same shape."""
        return x * self.proj(x)


def merge_branches(
    kernel_size: int, branches: list[tuple[Tensor, Tensor, Tensor, Tensor, Tensor, float]]
) -> tuple[Tensor, Tensor]:
    """One depthwise kernel and bias that equal normed parallel depthwise convolutions.

    Args:
        kernel_size: Side of the large kernel.
        branches: ``(kernel, gamma, beta, mean, variance, eps)`` of the large kernel, then of each of ``BRANCHES``.

    Returns:
        ``(kernel, bias)`` of shapes ``[C, 1, K, K]`` and ``[C]``, in float32 or in float64 if the kernels are.
    """
    kernels, gammas, betas, means, variances, epsilons = (list(column) for column in zip(*branches, strict=True))
    dtype = torch.promote_types(kernels[0].dtype, torch.float32)
    # a GPU is kept waiting by many small kernels, so that the norms of all branches are one tensor [branches, C]
    gamma, beta, mean, variance = (torch.stack(norms).to(dtype) for norms in (gammas, betas, means, variances))
    scale = gamma / torch.stack(torch._foreach_add(list(variance), epsilons)).sqrt()
    bias = (beta - mean * scale).sum(0)
    weight = kernels[0].to(dtype) * scale[0].reshape(-1, 1, 1, 1)
    for kernel, factor, (size, dilation) in zip(kernels[1:], scale[1:], BRANCHES[kernel_size], strict=True):
        pad = (kernel_size - dilation * (size - 1) - 1) // 2
        taps = slice(pad, kernel_size - pad, dilation)
        weight[:, :, taps, taps].addcmul_(kernel.to(dtype), factor.reshape(-1, 1, 1, 1))
    return weight, bias


def convolve(conv: Any, x: Tensor) -> Tensor:
    """``conv(x)``, by our operator where a plain depthwise convolution runs on a GPU, or trains on a CPU.

    Also in compiled inference, which does not see which convolutions are faster as it.
    """
    if is_plain(conv, nn.Conv2d) and depthwise(conv, conv.kernel_size[0], conv.dilation[0]):
        weight, bias = tensors(conv)
        if on_kernel_device(x) or (torch.is_grad_enabled() and trains_by_onednn(x)):
            return depthwise_conv(x, weight, bias, conv.dilation[0])
        if use_compiled_onednn(x, weight) and conv.dilation[0] == 1 and has_long_rows(x, conv.kernel_size[0]):
            return torch.ops.vizoo.depthwise_conv(x, weight, bias, 1, False)
    return project(conv, x)


@register_notrace_module  # picks its path by the device of its input
class DilatedReparamBlock(nn.Module):
    """Depthwise large kernel with parallel dilated kernels, each normed; or the one kernel that equals them.

    The order of the modules is convolution and norm of the large kernel, then of each branch.

    Args:
        dim: Channels.
        kernel_size: Side of the large kernel, a key of ``BRANCHES``.
        deploy: Build the merged form, one convolution with bias.
        device: Device of the parameters.
        dtype: Dtype of the parameters.

    Raises:
        ValueError: If ``kernel_size`` has no branches defined.
    """

    def __init__(
        self,
        dim: int,
        kernel_size: int,
        deploy: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        need(kernel_size in BRANCHES, f"one of {', '.join(map(str, BRANCHES))}", kernel_size=kernel_size)
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        self.lk_origin = nn.Conv2d(dim, dim, kernel_size, padding=kernel_size // 2, groups=dim, bias=deploy, **dd)
        if not deploy:
            self.origin_bn = nn.BatchNorm2d(dim, **dd)
            for k, r in BRANCHES[kernel_size]:
                conv = nn.Conv2d(dim, dim, k, padding=(r * (k - 1) + 1) // 2, dilation=r, groups=dim, bias=False, **dd)
                self.add_module(f"dil_conv_k{k}_{r}", conv)
                self.add_module(f"dil_bn_k{k}_{r}", nn.BatchNorm2d(dim, **dd))

    def mergeable(self) -> bool:
        """Whether the merged kernel gives what the modules give: all are plain, and every norm evaluates."""
        modules: list[Any] = list(self.children())
        convs, norms = modules[::2], modules[1::2]
        size = convs[0].kernel_size[0] if is_plain(convs[0], nn.Conv2d) else 0
        kernels = ((size, 1), *BRANCHES.get(size, ())) if norms else ((size, 1),)
        return (
            len(convs) == len(kernels)
            and all(depthwise(conv, *kernel) for conv, kernel in zip(convs, kernels, strict=True))
            and all(has_bias(conv) != bool(norms) for conv in convs)
            and all(map(folds, norms))
            and len({t.dtype for t in tensors(*convs) if t is not None}) == 1
        )

    def kernel(self) -> tuple[Tensor, Tensor]:
        """Kernel and bias that equal the branches with the norms' running statistics."""
        modules: list[Any] = list(self.children())
        if len(modules) == 1:
            weight, bias = tensors(modules[0])
            return weight, bias
        branches = [
            (tensors(conv)[0], *tensors(bn), bn.running_mean, bn.running_var, bn.eps)
            for conv, bn in zip(modules[::2], modules[1::2], strict=True)
        ]
        return merge_branches(modules[0].kernel_size[0], branches)

    @torch.no_grad()
    def reparameterize(self) -> None:
        """Replace the branches by the one kernel that equals them with the norms' running statistics."""
        old: Any = self.lk_origin
        if len(self._modules) == 1:
            return
        weight, bias = self.kernel()
        conv = nn.Conv2d(
            old.in_channels,
            old.out_channels,
            old.kernel_size,
            padding=old.padding,
            groups=old.groups,
            device=old.weight.device,
            dtype=old.weight.dtype,
        )
        for parameter, value in zip(conv.parameters(), (weight, bias), strict=True):
            parameter.copy_(value)
        for name in list(self._modules):
            delattr(self, name)
        self.lk_origin = conv.train(self.training).requires_grad_(old.weight.requires_grad)

    def forward(self, x: Tensor) -> Tensor:
        """Map ``[B, C, H, W]`` to the same shape."""
        if not torch.jit.is_scripting():  # noqa: SIM102 - TorchScript compiles every operand of `and`
            if _merges(x) and self.mergeable():
                weight, bias = self.kernel()
                weight, bias = weight.to(x.dtype), bias.to(x.dtype)
                return depthwise_conv(x, weight, bias)
        out, branch = x, x
        for i, module in enumerate(self.children()):
            if i % 2 == 1:
                branch = module(branch)
            elif torch.jit.is_scripting():
                branch = module(x)
            else:
                branch = convolve(module, x)
            if i <= 1:
                out = branch
            elif i % 2 == 1:
                out = out + branch
        return out


@register_notrace_function
def enlarge(x: Tensor, kernel_size: int) -> Tensor:
    """Resize a map that is smaller than the window to the working size."""
    H, W = x.shape[2], x.shape[3]
    if kernel_size <= H and kernel_size <= W:  # min() would bind exported programs to one orientation
        return x
    h, w = working_size(H, W, kernel_size)
    return resize(x, h, w)


@register_notrace_function
def shrink(x: Tensor, like: Tensor) -> Tensor:
    """Pool a map of working size back to the size of ``like``."""
    H, W = like.shape[2], like.shape[3]
    if x.shape[2] == H and x.shape[3] == W:
        return x
    return region_mean(x, H, W)


@register_notrace_function
def affinity(q: Tensor, k: Tensor, groups: int, scale: float) -> Tensor:
    """Affinity of every query to every context region, a map for each image and group.

    Args:
        q: Queries ``[B, C / 2, H, W]``.
        k: Context regions ``[B, C / 2, 7, 7]``.
        groups: Groups of channels.
        scale: Scale of the queries.

    Returns:
        ``[B * groups, 49, H, W]``.
    """
    B, C, R = k.shape[0], k.shape[1] // groups, k.shape[2] * k.shape[3]
    H, W = q.shape[2], q.shape[3]
    keys = k.reshape(B * groups, C, R) * scale
    return (keys.transpose(1, 2) @ q.reshape(B * groups, C, H * W)).reshape(B * groups, R, H, W)


@register_notrace_function
def mix_by_logits(logits: Tensor, v: Tensor, rpb1: Tensor, rpb2: Tensor, k1: int, k2: int) -> Tensor:
    """Weighted sums over two windows whose weights come from the projection of the :func:`affinity`.

    Args:
        logits: ``[B * groups, k1^2 + k2^2, H, W]``.
        v: Values ``[B, C, H, W]``.
        rpb1: Relative position bias of the small kernel ``[groups, 2 k1 - 1, 2 k1 - 1]``.
        rpb2: The same of the large kernel.
        k1: Side of the small window.
        k2: Side of the large window.

    Returns:
        ``[B, C, H, W]``.
    """
    logits = logits.reshape(v.shape[0], rpb1.shape[0], logits.shape[1], v.shape[2] * v.shape[3]).transpose(2, 3)
    return contmix_from_logits(logits, rpb1, rpb2, v, k1, k2)


@register_notrace_function
def mix(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    rpb1: Tensor,
    rpb2: Tensor,
    scale: float,
    k1: int,
    k2: int,
) -> Tensor:
    """:func:`mix_by_logits` of a plain projection, which is joined to the context regions: both are linear.

    Args:
        q: Queries ``[B, C / 2, H, W]``.
        k: Context regions ``[B, C / 2, 7, 7]``.
        v: Values ``[B, C, H, W]``.
        weight: Projection from regions to kernel offsets ``[k1^2 + k2^2, 49, 1, 1]``.
        bias: Its bias, or None.
        rpb1: Relative position bias of the small kernel ``[groups, 2 k1 - 1, 2 k1 - 1]``.
        rpb2: The same of the large kernel.
        scale: Scale of the queries.
        k1: Side of the small window.
        k2: Side of the large window.

    Returns:
        ``[B, C, H, W]``.
    """
    B, G, R = k.shape[0], rpb1.shape[0], k.shape[2] * k.shape[3]
    if as_written(q):
        logits = F.conv2d(affinity(q, k, G, scale), weight, bias)
        return mix_by_logits(logits, v, rpb1, rpb2, k1, k2)
    keys = k.reshape(B, G, k.shape[1] // G, R) * scale
    bias = weight.new_zeros(weight.shape[0]) if bias is None else bias
    return contmix(q, keys @ weight.reshape(-1, R).t(), bias, rpb1, rpb2, v, k1, k2)


class DynamicBlock(nn.Module):
    """What a block with ContMix is made of; subclasses say where query, context and value come from.

    Args:
        dim: Channels of query and value.
        ctx_dim: Channels of the context.
        out_dim: Channels of the block.
        kernel_size: Side of the large kernel.
        smk_size: Side of the small kernel.
        num_heads: Half the number of channel groups.
        mlp_ratio: Hidden channels of the feed-forward network over ``dim``.
        ls_init_value: Initial layer scale; None for no layer scale.
        res_scale: Put the layer scale on the skip path, not on the branch.
        drop_path: Stochastic depth rate of both branches.
        deploy: Build the merged form of the large-kernel convolution.
        device: Device of the parameters.
        dtype: Dtype of the parameters.

    Raises:
        ValueError: If an argument is outside its range.
    """

    res_scale: torch.jit.Final[bool]

    @checked(smk_size=Range(3))
    def __init__(
        self,
        dim: int,
        ctx_dim: int,
        out_dim: int,
        kernel_size: int,
        smk_size: int,
        num_heads: int,
        mlp_ratio: float,
        ls_init_value: float | None,
        res_scale: bool,
        drop_path: float,
        deploy: bool,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        check_multiple(4, dim=dim, num_heads=num_heads)
        fits = smk_size % 2 == 1 and smk_size <= kernel_size
        need(fits, f"an odd number from 3 to kernel_size={kernel_size}", smk_size=smk_size)
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        hidden_dim = scaled(dim, mlp_ratio=mlp_ratio)
        groups = 2 * num_heads
        self.kernel_size = kernel_size
        self.smk_size = smk_size
        self.scale = float((dim // groups) ** -0.5)
        self.res_scale = res_scale
        self.rpb1 = nn.Parameter(torch.empty(groups, 2 * smk_size - 1, 2 * smk_size - 1, **dd))
        self.rpb2 = nn.Parameter(torch.empty(groups, 2 * kernel_size - 1, 2 * kernel_size - 1, **dd))
        self.dwconv1 = residual_conv(out_dim, **dd)
        self.norm1 = LayerNorm2d(out_dim, **dd)
        self.weight_query = FusedSequential(
            nn.Conv2d(dim, dim // 2, 1, bias=False, **dd), nn.BatchNorm2d(dim // 2, **dd)
        )
        self.weight_key = FusedSequential(
            RegionPool(REGIONS),
            nn.Conv2d(ctx_dim, dim // 2, 1, bias=False, **dd),
            nn.BatchNorm2d(dim // 2, **dd),
        )
        self.weight_proj = nn.Conv2d(REGIONS**2, kernel_size**2 + smk_size**2, 1, **dd)
        self.lepe = FusedSequential(
            DilatedReparamBlock(dim, kernel_size, deploy=deploy, **dd), nn.BatchNorm2d(dim, **dd)
        )
        self.se_layer = SqueezeExcite(dim, **dd)
        self.gate = FusedSequential(nn.Conv2d(dim, dim, 1, bias=False, **dd), nn.BatchNorm2d(dim, **dd), nn.SiLU())
        self.proj = FusedSequential(nn.BatchNorm2d(dim, **dd), nn.Conv2d(dim, out_dim, 1, **dd))
        self.dwconv2 = residual_conv(out_dim, **dd)
        self.norm2 = LayerNorm2d(out_dim, **dd)
        self.mlp = FusedSequential(
            nn.Conv2d(out_dim, hidden_dim, 1, **dd),
            nn.GELU(),
            residual_conv(hidden_dim, **dd),
            GlobalResponseNorm(hidden_dim, **dd),
            nn.Conv2d(hidden_dim, out_dim, 1, **dd),
        )
        self.ls1 = nn.Identity() if ls_init_value is None else LayerScale(out_dim, ls_init_value, **dd)
        self.ls2 = nn.Identity() if ls_init_value is None else LayerScale(out_dim, ls_init_value, **dd)
        self.drop_path = DropPath(drop_path) if drop_path > 0 else nn.Identity()

    def contmix(self, query: Tensor, context: Tensor, value: Tensor) -> Tensor:
        """ContMix on maps ``[B, C, H, W]`` of at least ``kernel_size``, with ``dim``, ``ctx_dim``, ``dim`` channels."""
        q, k = self.weight_query(query), self.weight_key(context)
        k1, k2 = self.smk_size, self.kernel_size
        if not torch.jit.is_scripting():  # noqa: SIM102 - TorchScript compiles every operand of `and`
            if pointwise(self.weight_proj):
                return mix(q, k, value, *tensors(self.weight_proj), self.rpb1, self.rpb2, self.scale, k1, k2)
        logits = self.weight_proj(affinity(q, k, self.rpb1.shape[0], self.scale))
        return mix_by_logits(logits, value, self.rpb1, self.rpb2, k1, k2)

    def kernels_at(self, q: Tensor, k: Tensor, row: int, col: int) -> tuple[Tensor, Tensor]:
        """Both kernels of one position.

        Args:
            q: What ``weight_query`` gives ``[B, dim / 2, H, W]``.
            k: What ``weight_key`` gives ``[B, dim / 2, 7, 7]``.
            row: Row of the position.
            col: Its column.

        Returns:
            The small kernel ``[B, groups, k1, k1]`` and the large one ``[B, groups, k2, k2]``, in float32 at least.
        """
        (H, W), k1, k2, groups = q.shape[2:], self.smk_size, self.kernel_size, self.rpb1.shape[0]
        logits = self.weight_proj(affinity(q, k, groups, self.scale)).unflatten(0, (-1, groups))
        both = contmix_kernels(logits.flatten(3).transpose(2, 3), self.rpb1, self.rpb2, H, W, k1, k2)
        small, large = (kernels[:, :, row, col] for kernels in both)
        return small.unflatten(-1, (k1, k1)), large.unflatten(-1, (k2, k2))

    def finish(self, skip: Tensor, x: Tensor, gate: Tensor, lepe: Tensor) -> Tensor:
        """Gate the mixed map, add it to ``skip`` and apply the feed-forward network."""
        x = self.proj(gate * self.se_layer(x + lepe))
        if self.res_scale:
            x = self.dwconv2(self.ls1(skip) + self.drop_path(x))
            return self.ls2(x) + self.drop_path(self.mlp(self.norm2(x)))
        x = self.dwconv2(skip + self.drop_path(self.ls1(x)))
        return x + self.drop_path(self.ls2(self.mlp(self.norm2(x))))


class ContMixBlock(DynamicBlock):
    """Context-mixing block for any network: ContMix with its own context, and a feed-forward network (Sec. 3.3).

    Every position gets two convolution kernels per channel group, made from its affinity to 49 regions of the map.  The
    cost is linear in the number of positions.  A map smaller than the large kernel is worked on at a larger size.

    Args:
        dim: Channels, a multiple of ``4 * num_heads``.
        kernel_size: Side of the large kernel: 5, 7, 9, 11, 13, 15, 17 or 19.
        smk_size: Side of the small kernel, odd, from 3 to ``kernel_size``.
        num_heads: Half the number of channel groups with kernels of their own.
        mlp_ratio: Hidden channels of the feed-forward network over ``dim``.
        res_scale: Put the layer scale on the skip path, not on the branch.
        ls_init_value: Initial layer scale; None for no layer scale.
        drop_path: Stochastic depth rate of both branches.
        deploy: Build the merged form of the large-kernel convolution.
        device: Device of the parameters.
        dtype: Dtype of the parameters.

    Raises:
        ValueError: If an argument is outside its range.
    """

    @checked(smk_size=Range(3))
    def __init__(
        self,
        dim: int = 64,
        kernel_size: int = 7,
        smk_size: int = 5,
        num_heads: int = 2,
        mlp_ratio: float = 4.0,
        res_scale: bool = False,
        ls_init_value: float | None = None,
        drop_path: float = 0.0,
        deploy: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        super().__init__(
            dim,
            dim,
            dim,
            kernel_size=kernel_size,
            smk_size=smk_size,
            num_heads=num_heads,
            mlp_ratio=mlp_ratio,
            ls_init_value=ls_init_value,
            res_scale=res_scale,
            drop_path=drop_path,
            deploy=deploy,
            **dd,
        )
        self.weight_value = FusedSequential(nn.Conv2d(dim, dim, 1, bias=False, **dd), nn.BatchNorm2d(dim, **dd))
        self.fusion_proj = FusedSequential(nn.Conv2d(dim, dim, 1, bias=False, **dd), nn.BatchNorm2d(dim, **dd))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Truncated normal relative position biases."""
        trunc_normal_(self.rpb1, std=0.02)
        trunc_normal_(self.rpb2, std=0.02)

    def reparameterize(self) -> None:
        """Merge the branches of the large-kernel convolution for inference."""
        self.lepe[0].reparameterize()  # type: ignore[operator]

    def forward(self, x: Tensor) -> Tensor:
        """Map ``[B, C, H, W]`` to the same shape."""
        skip = self.dwconv1(x)
        x = self.norm1(skip)
        gate, lepe = self.gate(x), self.lepe(x)
        large = enlarge(x, self.kernel_size)
        large = self.contmix(large, large, self.weight_value(large))
        return self.finish(skip, self.fusion_proj(shrink(large, x)), gate, lepe)


_BY_IMAGE = (
    nn.AdaptiveAvgPool2d,
    nn.Conv2d,
    nn.GELU,
    nn.Sigmoid,
    nn.SiLU,
    LayerNorm2d,
    DilatedReparamBlock,
    FusedSequential,
    GlobalResponseNorm,
    RegionPool,
    ResDWConv,
    SqueezeExcite,
)
"""Modules that treat every image by itself."""
