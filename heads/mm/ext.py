"""Stand-in for ``mmcv._ext``, the compiled operators of mmcv, on torchvision and plain PyTorch.

mmcv imports ``mmcv._ext`` and asks it for 113 operators.  :func:`install` adds a finder that answers for this one
module when no compiled one is found, so a real extension always wins.  Operators that models of mmdet and mmseg use
are here; any other name is a function that raises ``NotImplementedError`` when called.

The environment variable ``VIZOO_MMCV_EXT`` says which one is used: ``auto``; ``torchvision``, this module even when a
compiled one exists; ``off``, never this module.

Every operator has the signature of the compiled one: results go in place into tensors that the caller allocated, in
their dtype; half precision is computed in float32.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Sequence
from importlib.machinery import ModuleSpec, SourceFileLoader
from types import ModuleType
from typing import Any

import torch
import torch.nn.functional as F
import torchvision  # also registers torch.ops.torchvision
from torch import Tensor

NAME, SWITCH, CHOICES = "mmcv._ext", "VIZOO_MMCV_EXT", ("auto", "torchvision", "off")
TINY = torch.finfo(torch.float32).tiny  # logarithms are taken of at least this

__all__ = [
    "bbox_overlaps",
    "carafe_backward",
    "carafe_forward",
    "carafe_naive_backward",
    "carafe_naive_forward",
    "deform_conv_backward_input",
    "deform_conv_backward_parameters",
    "deform_conv_forward",
    "get_compiler_version",
    "get_compiling_cuda_version",
    "masked_col2im_forward",
    "masked_im2col_forward",
    "modulated_deform_conv_backward",
    "modulated_deform_conv_forward",
    "ms_deform_attn_backward",
    "ms_deform_attn_forward",
    "nms",
    "nms_match",
    "roi_align_backward",
    "roi_align_forward",
    "roi_pool_backward",
    "roi_pool_forward",
    "sigmoid_focal_loss_backward",
    "sigmoid_focal_loss_forward",
    "softmax_focal_loss_backward",
    "softmax_focal_loss_forward",
    "softnms",
]


# finding the module


class ExtFinder:
    """Meta-path finder that knows the module ``mmcv._ext`` only."""

    @staticmethod
    def find_spec(fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None) -> Any:
        """The module's spec, or None for any other name."""
        return ModuleSpec(NAME, ExtLoader(NAME, __file__), origin=__file__) if fullname == NAME else None


class ExtLoader(SourceFileLoader):
    """Fills the module ``mmcv._ext`` with the operators of this one."""

    def exec_module(self, module: ModuleType) -> None:
        """Copy the operators."""
        vars(module).update({name: globals()[name] for name in __all__}, __getattr__=missing)


def install() -> None:
    """Add the finder to ``sys.meta_path`` as ``VIZOO_MMCV_EXT`` says; a second call changes nothing.

    Raises:
        ValueError: If the variable has another value than ``auto``, ``torchvision`` or ``off``.
    """
    choice = os.environ.get(SWITCH, "auto")
    if choice not in CHOICES:
        raise ValueError(f"got {SWITCH}={choice!r} in the environment, need one of {', '.join(CHOICES)}")
    if choice == "off" or ExtFinder in sys.meta_path:
        return
    finder: Any = ExtFinder
    if choice == "torchvision":
        sys.meta_path.insert(0, finder)
    else:
        sys.meta_path.append(finder)


def missing(name: str) -> Callable[..., Any]:
    """Module-level ``__getattr__`` of ``mmcv._ext``: an operator without equivalent, which raises when it is called."""
    if name.startswith("__"):
        raise AttributeError(f"module {NAME!r} has no attribute {name!r}")

    def unavailable(*args: Any, **kwargs: Any) -> Any:
        raise NotImplementedError(
            f"operator {name!r} of mmcv has no equivalent in torchvision or PyTorch, and the compiled extension "
            "mmcv._ext is missing: build mmcv from source as vizoo's README says in its section on mmdet and mmseg, "
            "or take a model without this operator"
        )

    unavailable.__name__ = name
    return unavailable


def _wide(*tensors: Tensor) -> list[Tensor]:
    """Contiguous tensors, half precision as float32."""
    half = (torch.float16, torch.bfloat16)
    return [(t.float() if t.dtype in half else t).contiguous() for t in tensors]


def _copy_gradients(
    function: Callable[..., Tensor], inputs: Sequence[Tensor], grad: Tensor, into: Sequence[Tensor]
) -> None:
    """Differentiate ``function(*inputs)`` and copy its gradients."""
    with torch.enable_grad():
        leaves = [t.detach().requires_grad_() for t in inputs]
        found = torch.autograd.grad(function(*leaves), leaves, grad)
    for target, gradient in zip(into, found, strict=True):
        target.copy_(gradient)


def get_compiler_version() -> str:
    """For mmcv's environment report."""
    return "none: vizoo.heads.mm.ext on torchvision"


def get_compiling_cuda_version() -> str:
    """For mmcv's environment report."""
    return f"none: torchvision {torchvision.__version__}"


# boxes


def nms(boxes: Tensor, scores: Tensor, iou_threshold: float, offset: int) -> Tensor:
    """Indices of the boxes that no better one overlaps by more than the threshold, best first.

    Args:
        boxes: ``[N, 4]`` as x1, y1, x2, y2.
        scores: ``[N]``.
        iou_threshold: Overlap that is still kept.
        offset: 1 if a box is ``x2 - x1 + 1`` wide.

    Returns:
        Indices ``[K]``, int64.
    """
    boxes, scores = _wide(boxes, scores)
    if offset:
        boxes = torch.cat([boxes[:, :2], boxes[:, 2:] + offset], dim=1)
    return torchvision.ops.nms(boxes, scores.to(boxes.dtype), iou_threshold)


def _overlap(box: Tensor, others: Tensor, offset: int = 0) -> Tensor:
    """Intersection over union of one box ``[4]`` with others ``[N, 4]``."""
    size = (torch.minimum(box[2:], others[:, 2:]) - torch.maximum(box[:2], others[:, :2]) + offset).clamp(min=0)
    intersection = size.prod(dim=1)
    areas = (others[:, 2:] - others[:, :2] + offset).prod(dim=1)
    return intersection / ((box[2:] - box[:2] + offset).prod() + areas - intersection)


def softnms(
    boxes: Tensor,
    scores: Tensor,
    dets: Tensor,
    iou_threshold: float,
    sigma: float,
    min_score: float,
    method: int,
    offset: int,
) -> Tensor:
    """Soft non-maximum suppression (Bodla et al., ICCV 2017): overlapping boxes lose score instead of being dropped.

    Args:
        boxes: ``[N, 4]``.
        scores: ``[N]``.
        dets: ``[N, 5]``, of which the first ``K`` rows are set to boxes and decayed scores.
        iou_threshold: Overlap from which methods 0 and 1 decay.
        sigma: Width of method 2.
        min_score: Boxes are dropped below this score.
        method: 0 hard, 1 linear, 2 Gaussian.
        offset: 1 if a box is ``x2 - x1 + 1`` wide.

    Returns:
        Indices ``[K]``, int64.
    """
    boxes, scores = _wide(boxes, scores)
    scores, left = scores.clone(), torch.arange(len(boxes))
    kept: list[Tensor] = []
    while len(left):
        best = scores[left].argmax()
        index = left[best]
        dets[len(kept), :4], dets[len(kept), 4] = boxes[index], scores[index]
        kept.append(index)
        left = torch.cat([left[:best], left[best + 1 :]])
        iou = _overlap(boxes[index], boxes[left], offset)
        if method == 2:
            weight = torch.exp(-iou * iou / sigma)
        else:
            weight = torch.where(iou >= iou_threshold, 1 - iou if method == 1 else torch.zeros_like(iou), 1.0)
        scores[left] *= weight
        left = left[scores[left] >= min_score]
    return torch.stack(kept) if kept else left


def nms_match(dets: Tensor, iou_threshold: float) -> list[list[int]]:
    """Groups of boxes: one that is kept, then those that overlap it by the threshold or more, best first.

    Args:
        dets: ``[N, 5]``, boxes and scores.
        iou_threshold: Overlap from which a box joins a group.

    Returns:
        Indices of each group.
    """
    (dets,) = _wide(dets)
    left, groups = dets[:, 4].argsort(descending=True, stable=True), []
    while len(left):
        others = left[1:]
        same = _overlap(dets[left[0], :4], dets[others, :4]) >= iou_threshold
        groups.append([int(left[0]), *others[same].tolist()])
        left = others[~same]
    return groups


def bbox_overlaps(boxes1: Tensor, boxes2: Tensor, ious: Tensor, mode: int, aligned: bool, offset: int) -> None:
    """Intersection over union (``mode`` 0) or over the first box (1).

    Args:
        boxes1: ``[N, 4]``.
        boxes2: ``[M, 4]``.
        ious: Result ``[N, M]``, or ``[N]`` if ``aligned``.
        mode: 0 or 1.
        aligned: Compare row by row.
        offset: 1 if a box is ``x2 - x1 + 1`` wide.
    """
    a, b = _wide(boxes1, boxes2)
    a = a if aligned else a[:, None]
    intersection = (torch.minimum(a[..., 2:], b[..., 2:]) - torch.maximum(a[..., :2], b[..., :2]) + offset).clamp(min=0)
    overlap = intersection.prod(dim=-1)
    base = (a[..., 2:] - a[..., :2] + offset).prod(dim=-1)
    if mode == 0:
        base = base + (b[..., 2:] - b[..., :2] + offset).prod(dim=-1) - overlap
    ious.copy_(overlap / base.clamp(min=TINY))


# regions of interest


def roi_align_forward(
    input: Tensor,
    rois: Tensor,
    output: Tensor,
    argmax_y: Tensor,
    argmax_x: Tensor,
    aligned_height: int,
    aligned_width: int,
    spatial_scale: float,
    sampling_ratio: int,
    pool_mode: int,
    aligned: bool,
) -> None:
    """RoIAlign (He et al., ICCV 2017) of ``[N, C, H, W]`` at ``[K, 5]`` (image, x1, y1, x2, y2) into ``output``."""
    if pool_mode == 0:
        raise NotImplementedError("pool_mode='max' of RoIAlign needs the compiled mmcv._ext; use pool_mode='avg'")
    x, boxes = _wide(input, rois)
    size = (aligned_height, aligned_width)
    output.copy_(torchvision.ops.roi_align(x, boxes.to(x.dtype), size, spatial_scale, sampling_ratio, aligned))


def roi_align_backward(
    grad_output: Tensor,
    rois: Tensor,
    argmax_y: Tensor,
    argmax_x: Tensor,
    grad_input: Tensor,
    aligned_height: int,
    aligned_width: int,
    spatial_scale: float,
    sampling_ratio: int,
    pool_mode: int,
    aligned: bool,
) -> None:
    """Gradient of :func:`roi_align_forward` into ``grad_input [N, C, H, W]``."""
    grad, boxes = _wide(grad_output, rois)
    grad_input.copy_(
        torch.ops.torchvision._roi_align_backward(
            grad,
            boxes.to(grad.dtype),
            spatial_scale,
            aligned_height,
            aligned_width,
            *grad_input.shape,
            sampling_ratio,
            aligned,
        )
    )


def roi_pool_forward(
    input: Tensor,
    rois: Tensor,
    output: Tensor,
    argmax: Tensor,
    pooled_height: int,
    pooled_width: int,
    spatial_scale: float,
) -> None:
    """RoIPool (Girshick, ICCV 2015); ``argmax`` is int32 as ``output`` in shape."""
    x, boxes = _wide(input, rois)
    found = torch.ops.torchvision.roi_pool(x, boxes.to(x.dtype), spatial_scale, pooled_height, pooled_width)
    output.copy_(found[0])
    argmax.copy_(found[1])


def roi_pool_backward(
    grad_output: Tensor,
    rois: Tensor,
    argmax: Tensor,
    grad_input: Tensor,
    pooled_height: int,
    pooled_width: int,
    spatial_scale: float,
) -> None:
    """Gradient of :func:`roi_pool_forward` into ``grad_input [N, C, H, W]``."""
    grad, boxes = _wide(grad_output, rois)
    grad_input.copy_(
        torch.ops.torchvision._roi_pool_backward(
            grad, boxes.to(grad.dtype), argmax, spatial_scale, pooled_height, pooled_width, *grad_input.shape
        )
    )


# deformable convolution


def _inside(
    offset: Tensor,
    kernel: tuple[int, int],
    stride: tuple[int, int],
    padding: tuple[int, int],
    dilation: tuple[int, int],
    size: tuple[int, int],
) -> Tensor:
    """Where the samples of ``offset [N, 2 * G * kh * kw, oh, ow]`` lie inside the padded frame, in its shape.

    mmcv gives samples at -1 or further out no gradient.  torchvision gives those at exactly -1 a one-sided one, and
    with zero-initialised offsets every border pixel of a padded convolution lies there on the first step.
    """
    n, _, oh, ow = offset.shape
    positions = offset.unflatten(1, (-1, *kernel, 2))  # [N, G, kh, kw, (y, x), oh, ow]
    inside = torch.ones_like(positions[:, :, :, :, 0], dtype=torch.bool)
    for axis, outputs in enumerate((oh, ow)):
        start = torch.arange(outputs, device=offset.device) * stride[axis] - padding[axis]
        tap = torch.arange(kernel[axis], device=offset.device) * dilation[axis]
        base = tap[:, None] + start  # [kh, oh] or [kw, ow]
        base = base[:, None, :, None] if axis == 0 else base[:, None, :]
        position = base + positions[:, :, :, :, axis]
        inside &= (position > -1) & (position < size[axis])
    return inside.unsqueeze(4).expand_as(positions).reshape(offset.shape)


def _first(larger: Tensor, size: Sequence[int]) -> Tensor:
    """Offsets or masks ``[N, C, H, W]`` for an output of ``size``: the first values of each sample, in memory order.

    DyHead passes those of a finer level; the compiled operator then reads them so, and trained weights expect it.
    """
    if larger.shape[2:] == size:
        return larger
    n, c = larger.shape[:2]
    return larger.flatten(1)[:, : c * size[0] * size[1]].reshape(n, c, *size)


def _fill_first(target: Tensor, values: Tensor) -> None:
    """Copy a gradient of :func:`_first`; what was not read has none."""
    whole = values.new_zeros(len(target), target[0].numel())
    whole[:, : values[0].numel()] = values.flatten(1)
    target.copy_(whole.view(target.shape))


def _deform_backward(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    offset: Tensor,
    mask: Tensor | None,
    stride: tuple[int, int],
    padding: tuple[int, int],
    dilation: tuple[int, int],
    group: int,
    deformable_group: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of input, weight, offset, mask and bias."""
    grad, x, weight, offset = _wide(grad, x, weight, offset)
    modulation = x.new_zeros(len(x), 1) if mask is None else _wide(mask)[0]
    bias = x.new_zeros(len(weight))
    numbers = (*stride, *padding, *dilation, group, deformable_group, mask is not None)
    found = torch.ops.torchvision._deform_conv2d_backward(grad, x, weight, offset, modulation, bias, *numbers)
    kernel = (weight.shape[2], weight.shape[3])
    inside = _inside(offset, kernel, stride, padding, dilation, (x.shape[2], x.shape[3]))
    return found[0], found[1], found[2] * inside, found[3], found[4]


def deform_conv_forward(
    input: Tensor,
    weight: Tensor,
    offset: Tensor,
    output: Tensor,
    columns: Tensor,
    ones: Tensor,
    kW: int,
    kH: int,
    dW: int,
    dH: int,
    padW: int,
    padH: int,
    dilationW: int,
    dilationH: int,
    group: int,
    deformable_group: int,
    im2col_step: int,
) -> None:
    """Deformable convolution (Dai et al., ICCV 2017) into ``output``; ``d`` is the stride."""
    x, w, o = _wide(input, weight, offset)
    found = torchvision.ops.deform_conv2d(
        x, o, w, stride=(dH, dW), padding=(padH, padW), dilation=(dilationH, dilationW)
    )
    output.copy_(found.view_as(output))


def deform_conv_backward_input(
    input: Tensor,
    offset: Tensor,
    gradOutput: Tensor,
    gradInput: Tensor,
    gradOffset: Tensor,
    weight: Tensor,
    columns: Tensor,
    kW: int,
    kH: int,
    dW: int,
    dH: int,
    padW: int,
    padH: int,
    dilationW: int,
    dilationH: int,
    group: int,
    deformable_group: int,
    im2col_step: int,
) -> None:
    """Gradients of :func:`deform_conv_forward` by input and offset."""
    geometry = ((dH, dW), (padH, padW), (dilationH, dilationW), group, deformable_group)
    grad_input, _, grad_offset, _, _ = _deform_backward(gradOutput, input, weight, offset, None, *geometry)
    gradInput.copy_(grad_input)
    gradOffset.copy_(grad_offset)


def deform_conv_backward_parameters(
    input: Tensor,
    offset: Tensor,
    gradOutput: Tensor,
    gradWeight: Tensor,
    columns: Tensor,
    ones: Tensor,
    kW: int,
    kH: int,
    dW: int,
    dH: int,
    padW: int,
    padH: int,
    dilationW: int,
    dilationH: int,
    group: int,
    deformable_group: int,
    scale: float,
    im2col_step: int,
) -> None:
    """Add ``scale`` times the gradient of :func:`deform_conv_forward` by the weight to ``gradWeight``."""
    geometry = ((dH, dW), (padH, padW), (dilationH, dilationW), group, deformable_group)
    _, grad_weight, _, _, _ = _deform_backward(gradOutput, input, gradWeight, offset, None, *geometry)
    gradWeight.add_(grad_weight.to(gradWeight.dtype), alpha=scale)


def modulated_deform_conv_forward(
    input: Tensor,
    weight: Tensor,
    bias: Tensor,
    ones: Tensor,
    offset: Tensor,
    mask: Tensor,
    output: Tensor,
    columns: Tensor,
    kernel_h: int,
    kernel_w: int,
    stride_h: int,
    stride_w: int,
    pad_h: int,
    pad_w: int,
    dilation_h: int,
    dilation_w: int,
    group: int,
    deformable_group: int,
    with_bias: bool,
) -> None:
    """Modulated deformable convolution (Zhu et al., CVPR 2019) into ``output``."""
    x, w, o, m = _wide(input, weight, _first(offset, output.shape[2:]), _first(mask, output.shape[2:]))
    found = torchvision.ops.deform_conv2d(
        x,
        o,
        w,
        _wide(bias)[0] if with_bias else None,
        stride=(stride_h, stride_w),
        padding=(pad_h, pad_w),
        dilation=(dilation_h, dilation_w),
        mask=m,
    )
    output.copy_(found.view_as(output))


def modulated_deform_conv_backward(
    input: Tensor,
    weight: Tensor,
    bias: Tensor,
    ones: Tensor,
    offset: Tensor,
    mask: Tensor,
    columns: Tensor,
    grad_input: Tensor,
    grad_weight: Tensor,
    grad_bias: Tensor,
    grad_offset: Tensor,
    grad_mask: Tensor,
    grad_output: Tensor,
    kernel_h: int,
    kernel_w: int,
    stride_h: int,
    stride_w: int,
    pad_h: int,
    pad_w: int,
    dilation_h: int,
    dilation_w: int,
    group: int,
    deformable_group: int,
    with_bias: bool,
) -> None:
    """All gradients of :func:`modulated_deform_conv_forward`."""
    geometry = ((stride_h, stride_w), (pad_h, pad_w), (dilation_h, dilation_w), group, deformable_group)
    size = grad_output.shape[2:]
    found = _deform_backward(grad_output, input, weight, _first(offset, size), _first(mask, size), *geometry)
    grad_input.copy_(found[0])
    grad_weight.copy_(found[1])
    _fill_first(grad_offset, found[2])
    _fill_first(grad_mask, found[3])
    if with_bias:
        grad_bias.copy_(found[4])


# focal losses


def _class_weights(target: Tensor, weight: Tensor, num_classes: int) -> Tensor:
    """Weight ``[N]`` of each row: that of its class, 1 for background or without weights."""
    foreground = (target >= 0) & (target < num_classes)
    if weight.numel() == 0:
        return torch.ones_like(target, dtype=torch.float32)
    return torch.where(foreground, weight[target.clamp(0, num_classes - 1)].float(), 1.0)


def sigmoid_focal_loss_forward(
    input: Tensor, target: Tensor, weight: Tensor, output: Tensor, gamma: float, alpha: float
) -> None:
    """Focal loss (Lin et al., ICCV 2017) of logits ``[N, C]``; a label outside ``0..C-1`` is background."""
    (x,) = _wide(input)
    p = x.sigmoid()
    positive = target[:, None] == torch.arange(x.shape[1], device=x.device)
    loss = torch.where(
        positive,
        -alpha * (1 - p) ** gamma * p.clamp(min=TINY).log(),
        -(1 - alpha) * p**gamma * (1 - p).clamp(min=TINY).log(),
    )
    output.copy_(loss * _class_weights(target, weight, x.shape[1]).to(x.dtype)[:, None])


def sigmoid_focal_loss_backward(
    input: Tensor, target: Tensor, weight: Tensor, grad_input: Tensor, gamma: float, alpha: float
) -> None:
    """Derivative of :func:`sigmoid_focal_loss_forward` by its logits; the caller multiplies by the outer gradient."""
    (x,) = _wide(input)
    p = x.sigmoid()
    positive = target[:, None] == torch.arange(x.shape[1], device=x.device)
    log_p, log_q = p.clamp(min=TINY).log(), (1 - p).clamp(min=TINY).log()
    grad = torch.where(
        positive,
        -alpha * (1 - p) ** gamma * (1 - p - gamma * p * log_p),
        -(1 - alpha) * p**gamma * (gamma * (1 - p) * log_q - p),
    )
    grad_input.copy_(grad * _class_weights(target, weight, x.shape[1]).to(x.dtype)[:, None])


def _of_target(softmax: Tensor, target: Tensor) -> Tensor:
    """Probability ``[N]`` of each row's class, at least TINY."""
    return softmax.gather(1, target.clamp(min=0)[:, None])[:, 0].clamp(min=TINY)


def softmax_focal_loss_forward(
    softmax: Tensor, target: Tensor, weight: Tensor, output: Tensor, gamma: float, alpha: float
) -> None:
    """Focal loss of probabilities ``[N, C]`` into ``output [N]``; rows with a negative label get 0."""
    (probabilities,) = _wide(softmax)
    p = _of_target(probabilities, target)
    loss = -alpha * (1 - p) ** gamma * p.log() * _class_weights(target, weight, softmax.shape[1]).to(p.dtype)
    output.copy_(torch.where(target >= 0, loss, 0.0))


def softmax_focal_loss_backward(
    softmax: Tensor, target: Tensor, weight: Tensor, buff: Tensor, grad_input: Tensor, gamma: float, alpha: float
) -> None:
    """Derivative of :func:`softmax_focal_loss_forward` by the logits."""
    (probabilities,) = _wide(softmax)
    p = _of_target(probabilities, target)
    slope = alpha * (-((1 - p) ** gamma) + gamma * (1 - p) ** (gamma - 1) * p * p.log())
    slope = torch.where(target >= 0, slope * _class_weights(target, weight, softmax.shape[1]).to(p.dtype), 0.0)
    buff.copy_(slope)
    own = target[:, None] == torch.arange(softmax.shape[1], device=softmax.device)
    grad_input.copy_(slope[:, None] * (own.to(p.dtype) - probabilities))


# attention


def ms_deform_attn_forward(
    value: Tensor,
    spatial_shapes: Tensor,
    level_start_index: Tensor,
    sampling_locations: Tensor,
    attention_weights: Tensor,
    im2col_step: int,
) -> Tensor:
    """Deformable attention (Zhu et al., ICLR 2021) by mmcv's own PyTorch function.

    Args:
        value: ``[B, keys, heads, channels]``.
        spatial_shapes: Height and width of each level ``[L, 2]``.
        level_start_index: Unused.
        sampling_locations: ``[B, Q, heads, L, points, 2]``, 0 to 1.
        attention_weights: ``[B, Q, heads, L, points]``.
        im2col_step: Unused.

    Returns:
        ``[B, Q, heads * channels]``.
    """
    from mmcv.ops.multi_scale_deform_attn import multi_scale_deformable_attn_pytorch

    wide = _wide(value, sampling_locations, attention_weights)
    found: Tensor = multi_scale_deformable_attn_pytorch(wide[0], spatial_shapes, wide[1], wide[2])
    return found.to(value.dtype)


def ms_deform_attn_backward(
    value: Tensor,
    spatial_shapes: Tensor,
    level_start_index: Tensor,
    sampling_locations: Tensor,
    attention_weights: Tensor,
    grad_output: Tensor,
    grad_value: Tensor,
    grad_sampling_loc: Tensor,
    grad_attn_weight: Tensor,
    im2col_step: int,
) -> None:
    """Gradients of :func:`ms_deform_attn_forward`, which is run again."""

    def attention(value: Tensor, locations: Tensor, weights: Tensor) -> Tensor:
        return ms_deform_attn_forward(value, spatial_shapes, level_start_index, locations, weights, im2col_step)

    *inputs, grad = _wide(value, sampling_locations, attention_weights, grad_output)
    _copy_gradients(attention, inputs, grad, (grad_value, grad_sampling_loc, grad_attn_weight))


# guided anchoring and CARAFE


def masked_im2col_forward(
    im: Tensor,
    mask_h_idx: Tensor,
    mask_w_idx: Tensor,
    col: Tensor,
    kernel_h: int,
    kernel_w: int,
    pad_h: int,
    pad_w: int,
) -> None:
    """Columns ``[C * kh * kw, P]`` of the windows whose output positions are given, of one image ``[1, C, H, W]``."""
    (x,) = _wide(im)
    padded = F.pad(x[0], (pad_w, pad_w, pad_h, pad_h))
    windows = padded.unfold(1, kernel_h, 1).unfold(2, kernel_w, 1)  # [C, oh, ow, kh, kw]
    col.copy_(windows[:, mask_h_idx, mask_w_idx].permute(0, 2, 3, 1).reshape(col.shape))


def masked_col2im_forward(
    col: Tensor, mask_h_idx: Tensor, mask_w_idx: Tensor, im: Tensor, height: int, width: int, channels: int
) -> None:
    """Put columns ``[C, P]`` at their positions in ``im [1, C, H, W]``."""
    im[0, :, mask_h_idx, mask_w_idx] = col.to(im.dtype)


def _carafe(features: Tensor, masks: Tensor, kernel_size: int, group_size: int, scale_factor: int) -> Tensor:
    """Weighted sums of the ``k x k`` windows of ``[N, C, H, W]`` by ``masks [N, G * k * k, sH, sW]``."""
    n, c, h, w = features.shape
    k, g, s = kernel_size, group_size, scale_factor
    windows = F.unfold(features, k, padding=k // 2).view(n, g, c // g, k * k, h, 1, w, 1)
    weights = masks.view(n, g, 1, k * k, h, s, w, s)
    return (windows * weights).sum(dim=3).reshape(n, c, h * s, w * s)


def carafe_naive_forward(
    features: Tensor, masks: Tensor, output: Tensor, kernel_size: int, group_size: int, scale_factor: int
) -> None:
    """Content-aware upsampling (Wang et al., ICCV 2019) into ``output [N, C, sH, sW]``."""
    x, weights = _wide(features, masks)
    output.copy_(_carafe(x, weights, kernel_size, group_size, scale_factor))


def carafe_naive_backward(
    grad_output: Tensor,
    features: Tensor,
    masks: Tensor,
    grad_input: Tensor,
    grad_masks: Tensor,
    kernel_size: int,
    group_size: int,
    scale_factor: int,
) -> None:
    """Gradients of :func:`carafe_naive_forward`."""
    grad, *inputs = _wide(grad_output, features, masks)

    def upsample(features: Tensor, masks: Tensor) -> Tensor:
        return _carafe(features, masks, kernel_size, group_size, scale_factor)

    _copy_gradients(upsample, inputs, grad, (grad_input, grad_masks))


def carafe_forward(
    features: Tensor,
    masks: Tensor,
    rfeatures: Tensor,
    routput: Tensor,
    rmasks: Tensor,
    output: Tensor,
    kernel_size: int,
    group_size: int,
    scale_factor: int,
) -> None:
    """As :func:`carafe_naive_forward`; ``rfeatures`` keeps the features for the backward pass."""
    rfeatures.copy_(features)
    carafe_naive_forward(features, masks, output, kernel_size, group_size, scale_factor)


def carafe_backward(
    grad_output: Tensor,
    rfeatures: Tensor,
    masks: Tensor,
    rgrad_output: Tensor,
    rgrad_input_hs: Tensor,
    rgrad_input: Tensor,
    rgrad_masks: Tensor,
    grad_input: Tensor,
    grad_masks: Tensor,
    kernel_size: int,
    group_size: int,
    scale_factor: int,
) -> None:
    """Gradients of :func:`carafe_forward`."""
    carafe_naive_backward(grad_output, rfeatures, masks, grad_input, grad_masks, kernel_size, group_size, scale_factor)
