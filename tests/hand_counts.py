"""Multiply-accumulates of a model by formulas from the definitions, at the functions of Python that it calls.

Nothing here is shared with the profiler: no dispatch, no cost function, no formula of PyTorch.  A function that has no
formula counts nothing, with whatever it calls.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map_only

TIMM = """
beit_base_patch16_224 cait_xxs24_224 coat_tiny convit_tiny convmixer_768_32 cpubone_nano crossvit_tiny_240
cs3darknet_focus_s csatv2 cspnext_tiny davit_tiny deepseek_vit_412m deit_tiny_patch16_224 densenet121 dla46x_c dpn48b
edgenext_xx_small efficientformer_l1 efficientformerv2_s0 efficientvim_m1 efficientvit_b0 efficientvit_m0
ese_vovnet19b_slim_dw fasternet_t0 fastvit_t8 focalnet_tiny_srf gcvit_xxtiny gemma4_vit_167m ghostnet_050
gmlp_ti16_224 halonet_h1 hardcorenas_b hgnetv2_b0 hiera_tiny_224 hrnet_w18_small iformer_t inception_next_atto
inception_resnet_v2 inception_v3 inception_v4 lcnetv2_small legacy_seresnet18 legacy_xception levit_128s lowformer_b0
mobilenetv3_small_050 mobilenetv5_base mobilevit_xxs mvitv2_tiny naflexvit_base_patch16_parfac_gap nasnetalarge
nest_tiny nextvit_small pit_ti_224 pnasnet5large poolformerv2_s12 pvt_v2_b0 qwen3_vit_88m rdnet_tiny regnetx_002
repghostnet_050 repvit_m1 res2next50 resnest14d resnetv2_18 rexnet_100 sam2_hiera_tiny samvit_base_patch16_224
selecsls42 sequencer2d_s shvit_s1 skresnet18 starnet_s050 swiftformer_xs swin_tiny_patch4_window7_224
swinv2_cr_tiny_224 swinv2_tiny_window8_256 test_byobnet test_coatnet test_convnext test_efficientnet test_mambaout
test_nfnet test_resnet test_vit test_vit_relpos tiny_vit_5m_224 tnt_s_legacy_patch16_224 tresnet_m twins_svt_small
vgg11 visformer_tiny vit_tiny_patch16_dinov3_qkvb vit_tiny_r_s16_p8_224 vitamin_small_224 volo_d1_224 xception41p
xcit_nano_12_p8_224
"""
"""The smallest model that counts in every module of timm."""


class Call(nn.Module):
    """A function as a module; with children it is handed the module first."""

    def __init__(self, fn: Callable[..., Any], **children: nn.Module) -> None:
        super().__init__()
        self.fn = fn
        for name, child in children.items():
            self.add_module(name, child)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.fn(*([self] if len(self._modules) else []), *args, **kwargs)


def _out(out: Any) -> int:
    return next(t for t in tree_leaves(out) if isinstance(t, Tensor)).numel()


def _linear(out: Any, /, input: Tensor, weight: Tensor, bias: Any = None) -> int:
    return input.numel() * (weight.numel() // input.shape[-1])


def _conv(out: Any, /, input: Tensor, weight: Tensor, *args: Any, **kwargs: Any) -> int:
    """Each output element is a sum over the input channels of its group and the taps: the weight but for its rows."""
    return _out(out) * weight[0].numel()


def _conv_transpose(out: Any, /, input: Tensor, weight: Tensor, *args: Any, **kwargs: Any) -> int:
    """Each input element goes, multiplied, to every tap of the output channels of its group."""
    return input.numel() * weight[0].numel()


def _matmul(out: Any, /, a: Tensor, b: Tensor, *args: Any, **kwargs: Any) -> int:
    return _out(out) * a.shape[-1]


def _rmatmul(out: Any, /, b: Tensor, a: Tensor) -> int:
    return _out(out) * a.shape[-1]


def _add_matmul(out: Any, /, x: Tensor, a: Tensor, b: Tensor, *args: Any, **kwargs: Any) -> int:
    return _out(out) * a.shape[-1]


def _inner(out: Any, /, a: Tensor, b: Tensor) -> int:
    return _out(out) * a.shape[-1]


def _tensordot(out: Any, /, a: Tensor, b: Tensor, dims: Any = 2, **kwargs: Any) -> int:
    summed = a.shape[a.dim() - dims :] if isinstance(dims, int) else [a.shape[d] for d in dims[0]]
    return _out(out) * math.prod(summed)


def _einsum(out: Any, /, equation: Any, *operands: Any) -> int:
    """Products of two operands: each number of all labels' ranges, where a label of both is summed over.

    A label of one operand alone that is summed over is summed before anything is multiplied, and without a label to
    sum over the products are elementwise ones, no contraction.  Further operands follow from left to right.
    """
    operands = tuple(operands[0]) if len(operands) == 1 and isinstance(operands[0], (list, tuple)) else operands
    left, _, kept = equation.replace(" ", "").partition("->")
    if "->" not in equation:
        letters = Counter(left.replace(",", "").replace("...", ""))
        kept = "..." * ("..." in left) + "".join(sorted(c for c, n in letters.items() if n == 1))
    terms, sizes = [], {}
    for term, t in zip(left.split(","), operands, strict=True):
        named = _labels(term, t.dim())
        terms.append(set(named))
        for label, n in zip(named, t.shape, strict=True):
            sizes[label] = max(n, sizes.get(label, 1))
    every = set().union(*terms)
    wanted = {label for label in every if label.startswith(".")} | set(kept.replace("...", ""))
    total, held = 0, terms[0]
    for i, term in enumerate(terms[1:], 1):
        later = wanted.union(*terms[i + 1 :])
        summed = (held & term) - later
        alone = (held ^ term) - later
        total += math.prod(sizes[label] for label in (held | term) - alone) if summed else 0
        held = (held | term) - alone - summed
    return total


def _labels(term: str, dims: int) -> list[str]:
    """Labels of an operand; those of an ellipsis count from its end."""
    before, dots, after = term.partition("...")
    rest = dims - len(before) - len(after) if dots else 0
    return [*before, *(f".{n}" for n in range(rest, 0, -1)), *after]


def _attention(out: Any, /, query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> int:
    return query[..., 0].numel() * key.shape[-2] * (query.shape[-1] + value.shape[-1])


def _multi_head(out: Any, /, query: Tensor, key: Tensor, value: Tensor, embed_dim: int, *args: Any, **kw: Any) -> int:
    """Four projections, then all scores and the weighted sums of ``embed_dim`` channels over all heads."""
    bias_k, added_zeros = args[3], args[5]  # after heads and the input projection
    batch = query.shape[1] if query.dim() == 3 else 1
    queries, keys = query.shape[0], key.shape[0]
    seen = keys + (bias_k is not None) + bool(added_zeros)
    projected = 2 * queries * embed_dim + keys * (key.shape[-1] + value.shape[-1])
    return batch * embed_dim * (projected + 2 * queries * seen)


def _recurrent(out: Any, /, input: Tensor, *args: Any, **kwargs: Any) -> int:
    """Each step of each sequence goes through every matrix once; a packed sequence has its steps in one dimension."""
    packed = isinstance(args[0], Tensor) and args[0].dim() == 1
    weights = next(a for a in args if isinstance(a, (list, tuple)) and a[0].dim() == 2)
    steps = input.shape[0] if packed else input.shape[0] * input.shape[1]
    return steps * sum(w.numel() for w in weights if w.dim() == 2)


def _cell(out: Any, /, input: Tensor, hidden: Any, w_ih: Tensor, w_hh: Tensor, *args: Any) -> int:
    return (input.numel() // input.shape[-1]) * (w_ih.numel() + w_hh.numel())


def _cdist(out: Any, /, x1: Tensor, x2: Tensor, *args: Any, **kwargs: Any) -> int:
    return _out(out) * x1.shape[-1]


def _deformable(out: Any, /, input: Tensor, weight: Tensor, *args: Any) -> int:
    return _out(out) * weight[0].numel()


def _neighborhood(out: Any, /, q: Tensor, k: Tensor, v: Tensor, rpb: Any, add_k: Any, *args: Any) -> int:
    """Each query of each head has the keys of one window, at borders too, and those that are added for all."""
    window = math.prod(args[2])
    return q[..., 0].numel() * (window + (0 if add_k is None else add_k.shape[1])) * (q.shape[-1] + v.shape[-1])


def _halo(out: Any, /, q: Tensor, k: Tensor, v: Tensor, up: Any, left: Any, *args: Any) -> int:
    """Each query of each padded block has ``w * w`` keys and one product with each row of two tables of ``2 w - 1``."""
    B, H, W, heads, d = k.shape
    block, halo, stride = args[:3]
    w, side = block + 2 * halo, block // stride
    queries = B * heads * math.ceil(H / block) * math.ceil(W / block) * side**2
    return queries * (w**2 * (d + v.shape[-1]) + 2 * (2 * w - 1) * d)


def _aggregated(out: Any, /, q: Tensor, kv: Tensor, pooled_kv: Tensor, *args: Any) -> int:
    """Each query of each head has all taps and pooled keys twice, and more weights for the taps."""
    taps = args[2].shape[-1]
    return q.numel() * (2 * (taps + pooled_kv.shape[1]) + taps)


def _weighted_sum(out: Any, /, attn: Tensor, value: Tensor, kernel_size: int, *args: Any) -> int:
    return value.numel() * kernel_size**2


FORMULAS: dict[Any, Callable[..., int]] = {
    F.linear: _linear,
    **dict.fromkeys((F.conv1d, F.conv2d, F.conv3d), _conv),
    **dict.fromkeys((F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d), _conv_transpose),
    **dict.fromkeys((torch.matmul, torch.mm, torch.bmm, torch.mv, torch.dot, torch.vdot), _matmul),
    **dict.fromkeys((Tensor.matmul, Tensor.__matmul__, Tensor.mm, Tensor.bmm, Tensor.mv, Tensor.dot), _matmul),
    Tensor.__rmatmul__: _rmatmul,
    **dict.fromkeys((torch.addmm, torch.baddbmm, torch.addmv, Tensor.addmm, Tensor.baddbmm), _add_matmul),
    **dict.fromkeys((torch.inner, Tensor.inner), _inner),
    torch.tensordot: _tensordot,
    torch.einsum: _einsum,
    F.scaled_dot_product_attention: _attention,
    F.multi_head_attention_forward: _multi_head,
    **{getattr(torch, name): _recurrent for name in ("lstm", "gru", "rnn_tanh", "rnn_relu")},
    **{getattr(torch, f"{name}_cell"): _cell for name in ("lstm", "gru", "rnn_tanh", "rnn_relu")},
    torch.cdist: _cdist,
}
OPERATORS: dict[str, Callable[..., int]] = {
    "torchvision::deform_conv2d": _deformable,
    "vizoo::neighborhood_attention": _neighborhood,
    "vizoo::halo_attention": _halo,
    "vizoo::aggregated_attention": _aggregated,
    "vizoo::na2d_av": _weighted_sum,
}


class _Hand(TorchFunctionMode):
    def __init__(self) -> None:
        super().__init__()
        self.macs: Counter[str] = Counter()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        formula = FORMULAS.get(func)
        name = getattr(func, "__name__", str(func))
        if formula is None and isinstance(func, (torch._ops.OpOverload, torch._ops.OpOverloadPacket)):
            name = getattr(func, "_overloadpacket", func)._qualified_op_name
            formula = OPERATORS.get(name)
        if formula is not None:
            self.macs[name] += formula(out, *args, **(kwargs or {}))
        return out


def hand_count(model: nn.Module, *args: Any, **kwargs: Any) -> Counter[str]:
    """Multiply-accumulates of one call of a model without gradients, by the name of the function that makes them.

    Args:
        model: The module, in evaluation mode; it is not copied.
        *args: Its inputs.
        **kwargs: Its keyword inputs.

    Returns:
        The counts; ``total()`` adds them up.
    """
    args, kwargs = tree_map_only(Tensor, Tensor.detach, (args, kwargs))
    found = _Hand()
    with torch.no_grad(), found:
        model(*args, **kwargs)
    return found.macs
