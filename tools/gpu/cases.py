"""Operators that ``vizoo bench --suite gpu`` measures: inputs, every form of one result, and its arithmetic."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from vizoo.backbones.ops import aggregated_attention as aa
from vizoo.backbones.ops import contmix as cm
from vizoo.backbones.ops import conv_ffn as cf
from vizoo.backbones.ops import deform_merge as dm
from vizoo.backbones.ops import depthwise as dw
from vizoo.backbones.ops import depthwise3x3 as d3
from vizoo.backbones.ops import halo, hilo, ulsam
from vizoo.backbones.ops import na2d_av as na
from vizoo.backbones.ops import neighborhood as nb
from vizoo.backbones.ops import prompt_attention as pa
from vizoo.backbones.ops import reversed_attention as ra

Inputs = list[Any]  # tensors, or None for what is left out
Forms = dict[str, Callable[..., Tensor]]


class Case(NamedTuple):
    """One operator at one shape.

    Attributes:
        name: What is measured, with its shape.
        batch: Images at once.
        inputs: Draws the inputs of so many images on a device.
        images: Positions of the inputs that belong to images; the others are shared by them.
        reference: Form that defines the result.
        forms: Functions of the inputs by name.
        flops: Floating-point operations of an image, forward.
        compiled: Forms that are also measured under ``torch.compile``.
        floors: Forms that compute less, as a lower bound of the time; not compared with the reference.
    """

    name: str
    batch: int
    inputs: Callable[[int, torch.device], Inputs]
    images: frozenset[int]
    reference: Callable[..., Tensor]
    forms: Forms
    flops: int
    compiled: tuple[str, ...] = ()
    floors: frozenset[str] = frozenset()

    def names(self) -> list[str]:
        """Every form, compiled ones included."""
        return [*self.forms, *(f"{name} compiled" for name in self.compiled)]


def bind(form: Callable[..., Tensor], *last: Any, **options: Any) -> Callable[..., Tensor]:
    """A function of the inputs alone: ``form(*inputs, *last, **options)``."""
    return lambda *inputs: form(*inputs, *last, **options)


def draw(device: torch.device, *shape: int) -> Tensor:
    """Standard normal values."""
    return torch.randn(*shape, device=device)


def _sdpa(q: Tensor, k: Tensor, v: Tensor, *_: Any) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v)


def _tokens(*maps: Tensor) -> list[Tensor]:
    """Maps ``[B, H, W, h, d]`` as ``[B, h, N, d]``."""
    return [t.flatten(1, 2).transpose(1, 2) for t in maps]


def _inside(H: int, K: int, D: int, device: torch.device) -> Tensor:
    """``[H, H]``: which keys of a row of the map the window of each query holds."""
    i = torch.arange(H, device=device)
    most = (H - i % D + D - 1) // D - K
    start = torch.minimum((i // D - K // 2).clamp(min=0), most)
    step = i[None] // D - start[:, None]
    return (i[None] % D == i[:, None] % D) & (step >= 0) & (step < K)


def neighborhood(H: int, h: int, d: int, K: int, D: int = 1, bias: bool = True, batch: int = 128) -> Case:
    """Neighbourhood attention on a square map, against NATTEN, FlexAttention and SDPA with a mask."""

    def inputs(B: int, device: torch.device) -> Inputs:
        rpb = draw(device, h, 2 * K - 1, 2 * K - 1) if bias else None
        return [*(draw(device, B, H, H, h, d) for _ in range(3)), rpb]

    def by(backend: str) -> Callable[..., Tensor]:
        return lambda q, k, v, rpb: nb.neighborhood_attention(q, k, v, K, dilation=D, rpb=rpb, backend=backend)

    def reference(q: Tensor, k: Tensor, v: Tensor, rpb: Tensor | None) -> Tensor:
        return nb.reference_neighborhood_attention(q, k, v, K, dilation=D, rpb=rpb)

    @functools.cache
    def flex_kernel(device: torch.device) -> tuple[Any, Any]:
        from torch.nn.attention.flex_attention import create_block_mask, flex_attention

        axis = _inside(H, K, D, device)

        def seen(b: Any, head: Any, i: Any, j: Any) -> Any:
            return axis[i // H, j // H] & axis[i % H, j % H]

        mask = create_block_mask(seen, None, None, H * H, H * H, device=str(device))
        return torch.compile(flex_attention, dynamic=False), mask

    def flex(q: Tensor, k: Tensor, v: Tensor, rpb: Tensor | None) -> Tensor:
        kernel, mask = flex_kernel(q.device)

        def add_bias(score: Any, b: Any, head: Any, i: Any, j: Any) -> Any:
            assert rpb is not None
            row, col = (j // H - i // H) // D + K - 1, (j % H - i % H) // D + K - 1
            return score + rpb[head, row.clamp(0, 2 * K - 2), col.clamp(0, 2 * K - 2)]

        out = kernel(*_tokens(q, k, v), score_mod=add_bias if bias else None, block_mask=mask)
        return out.transpose(1, 2).reshape(v.shape)

    def dense(q: Tensor, k: Tensor, v: Tensor, rpb: Tensor | None) -> Tensor:
        axis = _inside(H, K, D, q.device)
        seen = axis[:, None, :, None] & axis[None, :, None, :]
        i = torch.arange(H, device=q.device)
        steps = ((i[None] - i[:, None]).div(D, rounding_mode="floor") + K - 1).clamp(0, 2 * K - 2)
        table: Any = q.new_zeros(()) if rpb is None else rpb[:, steps[:, None, :, None], steps[None, :, None, :]].to(q)
        mask = torch.where(seen, table, -torch.inf).reshape(1, -1, H * H, H * H)
        q, k, v = _tokens(q, k, v)
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        return out.transpose(1, 2).unflatten(1, (H, H))

    forms: Forms = {"triton": by("triton"), "torch": by("torch"), "flex": flex}
    forms["natten"] = by("natten")
    if H <= 28:
        forms["sdpa with mask"] = dense
    if H <= 14:
        forms["reference"] = reference
    name = f"neighborhood {H}x{H} h{h} d{d} k{K}{f' r{D}' * (D > 1)}{' no bias' * (not bias)}"
    flops = 4 * H * H * h * d * K * K
    return Case(name, batch, inputs, frozenset({0, 1, 2}), reference, forms, flops, ("torch",))


def aggregated(H: int, h: int, d: int, P: int, batch: int = 128) -> Case:
    """Attention to a 3x3 window and to pooled keys, in one softmax, with more weights from learnable tokens."""

    def inputs(B: int, device: torch.device) -> Inputs:
        maps = [draw(device, B, H, H, h * d), draw(device, B, H, H, 2 * h * d), draw(device, B, P, 2 * h * d)]
        shapes = (h, 1, d), (h, 1, 1), (h, 9), (h, H * H, P), (h, d, 9), (h, 1, 9)
        return [*maps, *(draw(device, *shape) for shape in shapes)]

    def by(form: Callable[..., Tensor], **options: Any) -> Callable[..., Tensor]:
        return lambda q, kv, pooled_kv, *parameters: form(q, kv, pooled_kv, h, *parameters, **options)

    reference = by(aa.reference_aggregated_attention)
    forms: Forms = {backend: by(aa.aggregated_attention, backend=backend) for backend in ("triton", "torch")}
    forms["reference"] = reference
    name, flops = f"aggregated {H}x{H} h{h} d{d} P{P}", 2 * H * H * h * d * (3 * 9 + 2 * P)
    return Case(name, batch, inputs, frozenset(range(3)), reference, forms, flops, ("reference",))


def halo_attention(H: int, h: int, d: int, block: int, halo_size: int, stride: int = 1, batch: int = 128) -> Case:
    """Halo attention on a square map, against SDPA with the relative terms written out, as timm does without it."""
    window, side = block + 2 * halo_size, block // stride
    sizes = block, halo_size, stride

    def inputs(B: int, device: torch.device) -> Inputs:
        maps = [draw(device, B, H // stride, H // stride, h, d), *(draw(device, B, H, H, h, d) for _ in range(2))]
        return [*maps, *(draw(device, 2 * window - 1, d) for _ in range(2))]

    def biased(q: Tensor, k: Tensor, v: Tensor, height_rel: Tensor, width_rel: Tensor) -> Tensor:
        n = H // block

        def windows(t: Tensor) -> Tensor:
            t = F.pad(t, [0, 0, 0, 0, *[halo_size] * 4]).unfold(1, window, block).unfold(2, window, block)
            return t.permute(0, 1, 2, 3, 5, 6, 4).reshape(-1, h, window * window, d)

        blocks = q.reshape(-1, n, side, n, side, h, d).permute(0, 1, 3, 5, 2, 4, 6).reshape(-1, h, side, side, d)
        i, j = (torch.arange(size, device=q.device) for size in (side, window))
        steps = j - i[:, None] + window - 1
        rows = torch.einsum("nhimd,ijd->nhimj", blocks, height_rel[steps].to(q.dtype))
        cols = torch.einsum("nhimd,mjd->nhimj", blocks, width_rel[steps].to(q.dtype))
        bias = (rows.unsqueeze(5) + cols.unsqueeze(4)).flatten(4).flatten(2, 3)
        out = F.scaled_dot_product_attention(blocks.flatten(2, 3), windows(k), windows(v), attn_mask=bias)
        return out.view(-1, n, n, h, side, side, d).permute(0, 1, 4, 2, 5, 3, 6).reshape(q.shape)

    reference = bind(halo.reference_halo_attention, *sizes)
    forms: Forms = {backend: bind(halo.halo_attention, *sizes, backend=backend) for backend in ("triton", "torch")}
    forms |= {"sdpa with bias": biased, "reference": reference}
    name = f"halo {H}x{H} h{h} d{d} b{block} r{halo_size}{f' s{stride}' * (stride > 1)}"
    flops = (H // stride) ** 2 * h * d * (4 * window**2 + 4 * (2 * window - 1))
    return Case(name, batch, inputs, frozenset({0, 1, 2}), reference, forms, flops, ("torch", "sdpa with bias"))


def timm_halo(H: int, dim: int, h: int, block: int, halo_size: int, batch: int = 128) -> Case:
    """The whole halo attention layer with one set of weights, ours against timm's."""

    @functools.cache
    def layers(device: torch.device, dtype: torch.dtype) -> dict[str, Any]:
        from timm.layers.halo_attn import HaloAttn

        from vizoo.backbones.layers import HaloAttention

        torch.manual_seed(0)
        made = {
            kind: kind(dim, num_heads=h, block_size=block, halo_size=halo_size) for kind in (HaloAttention, HaloAttn)
        }
        weights = {k: torch.randn_like(v) / v[0].numel() ** 0.5 for k, v in made[HaloAttn].state_dict().items()}
        for layer in made.values():
            layer.load_state_dict(weights)
            layer.to(device, dtype)
        return {"ours": made[HaloAttention], "timm": made[HaloAttn]}

    def by(name: str) -> Callable[..., Tensor]:
        return lambda x: layers(x.device, x.dtype)[name](x)

    def inputs(B: int, device: torch.device) -> Inputs:
        return [draw(device, B, dim, H, H)]

    window = block + 2 * halo_size
    flops = H * H * dim * (4 * window**2 + 4 * (2 * window - 1) + 6 * dim)
    forms: Forms = {"ours": by("ours"), "timm": by("timm")}
    name = f"halo layer {H}x{H} dim{dim} h{h} b{block} r{halo_size}"
    return Case(name, batch, inputs, frozenset({0}), forms["timm"], forms, flops, ("ours", "timm"))


def reversed_(h: int, N: int, d: int, batch: int = 128) -> Case:
    """Reversed attention; plain attention on the same tensors is its floor."""

    def inputs(B: int, device: torch.device) -> Inputs:
        return [*(draw(device, B, N, h, d).transpose(1, 2) for _ in range(3)), torch.rand(B, h, N, device=device)]

    reference = ra.reference_reversed_attention
    forms: Forms = {backend: bind(ra.reversed_attention, backend=backend) for backend in ("triton", "sdpa")}
    forms |= {"reference": reference, "plain sdpa": _sdpa}
    every, floors = frozenset(range(4)), frozenset({"plain sdpa"})
    name = f"reversed N{N} h{h} d{d}"
    return Case(name, batch, inputs, every, reference, forms, 4 * h * N * N * d, ("reference",), floors)


def contmix(G: int, C: int, H: int, k1: int, k2: int, last: bool = False, batch: int = 128) -> Case:
    """ContMix of OverLoCK, in either memory format."""

    def inputs(B: int, device: torch.device) -> Inputs:
        def image(channels: int) -> Tensor:
            t = draw(device, B, channels, H, H)
            return t.contiguous(memory_format=torch.channels_last) if last else t

        tables = [draw(device, G, 2 * k - 1, 2 * k - 1) for k in (k1, k2)]
        S = k1 * k1 + k2 * k2
        return [image(G * C), draw(device, B, G, C, S), draw(device, S), *tables, image(2 * G * C)]

    reference = bind(cm.reference_contmix, k1, k2)
    forms: Forms = {backend: bind(cm.contmix, k1, k2, backend=backend) for backend in ("triton", "torch")}
    forms["reference"] = reference
    name = f"contmix {H}x{H} g{G} c{C} k{k1}+{k2}{' channels_last' * last}"
    flops = 4 * G * H * H * (k1 * k1 + k2 * k2) * C
    return Case(name, batch, inputs, frozenset({0, 1, 5}), reference, forms, flops, ("torch",))


def na2d_av(G: int, C: int, H: int, K: int, batch: int = 128) -> Case:
    """Weighted sum over windows."""

    def inputs(B: int, device: torch.device) -> Inputs:
        return [draw(device, B, G, H, H, K * K).softmax(-1), draw(device, B, G, H, H, C)]

    reference = bind(na.reference_na2d_av, K)
    forms: Forms = {backend: bind(na.na2d_av, K, backend) for backend in ("triton", "torch")}
    forms["reference"] = reference
    flops = 2 * G * H * H * K * K * C
    return Case(f"na2d_av {H}x{H} g{G} c{C} k{K}", batch, inputs, frozenset({0, 1}), reference, forms, flops)


def ulsam_logits(C: int, g: int, H: int, last: bool = False, batch: int = 128) -> Case:
    """Logits of ULSAM, in either memory format."""

    def inputs(B: int, device: torch.device) -> Inputs:
        x = draw(device, B, C, H, H)
        shared = [draw(device, g, C // g), draw(device, g), draw(device, C), draw(device, C)]
        return [x.contiguous(memory_format=torch.channels_last) if last else x, *shared]

    reference = ulsam.reference_ulsam_logits
    forms: Forms = {"triton": bind(ulsam.ulsam_logits, backend="triton"), "reference": reference}
    name = f"ulsam {H}x{H} c{C} g{g}{' channels_last' * last}"
    return Case(name, batch, inputs, frozenset({0}), reference, forms, 13 * C * H * H, ("reference",))


def subspace_attention(C: int, g: int, H: int, last: bool = False, batch: int = 128) -> Case:
    """What ULSAM does to the map with its logits, in either memory format."""

    def inputs(B: int, device: torch.device) -> Inputs:
        x = draw(device, B, C, H, H)
        return [x.contiguous(memory_format=torch.channels_last) if last else x, draw(device, B, g, H, H)]

    reference = ulsam.reference_subspace_attention
    forms: Forms = {"triton": bind(ulsam.subspace_attention, backend="triton"), "reference": reference}
    name = f"subspace attention {H}x{H} c{C} g{g}{' channels_last' * last}"
    return Case(name, batch, inputs, frozenset({0, 1}), reference, forms, 2 * C * H * H, ("reference",))


def hifi(H: int, h: int, d: int, window: int, batch: int = 128) -> Case:
    """HiLo's attention in windows; a large map has more windows than SDPA's grids once held."""

    def inputs(B: int, device: torch.device) -> Inputs:
        return [draw(device, B, H, H, 3 * h * d)]

    reference = bind(hilo.reference_hifi_attention, h, window)
    forms: Forms = {name: bind(hilo.hifi_attention, h, window, backend=name) for name in ("triton", "torch")}
    forms["reference"] = reference
    name, flops = f"hifi {H}x{H} h{h} d{d} w{window}", 4 * H * H * window**2 * h * d
    return Case(name, batch, inputs, frozenset({0}), reference, forms, flops, ("reference",))


def lofi(H: int, h: int, d: int, window: int, batch: int = 128) -> Case:
    """HiLo's attention to averages of windows."""

    def inputs(B: int, device: torch.device) -> Inputs:
        return [draw(device, B, H, H, h * d), draw(device, B, H // window, H // window, 2 * h * d)]

    reference = bind(hilo.reference_lofi_attention, h)
    forms: Forms = {"sdpa": bind(hilo.lofi_attention, h), "reference": reference}
    name, flops = f"lofi {H}x{H} h{h} d{d} w{window}", 4 * H * H * (H // window) ** 2 * h * d
    return Case(name, batch, inputs, frozenset({0, 1}), reference, forms, flops)


def deform_merge(H: int, C: int, out: int, batch: int = 128) -> Case:
    """Deformable patch merging, against torchvision's operator."""

    def inputs(B: int, device: torch.device) -> Inputs:
        maps = [draw(device, B, H, H, C), draw(device, B, H // 2, H // 2, 8)]
        return [*maps, draw(device, out, C, 2, 2), draw(device, out)]

    def theirs(x: Tensor, offset: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        from torchvision.ops import deform_conv2d

        x, offset = (t.permute(0, 3, 1, 2).contiguous() for t in (x, offset))
        return deform_conv2d(x, offset, weight, bias, stride=2).permute(0, 2, 3, 1)

    reference = dm.reference_deform_merge
    forms: Forms = {"ours": dm.deform_merge, "reference": reference, "torchvision": theirs}
    flops = 8 * (H // 2) ** 2 * C * out
    return Case(f"deform_merge {H}x{H} c{C}", batch, inputs, frozenset({0, 1}), reference, forms, flops, ("ours",))


def conv_ffn(H: int, C: int, M: int, batch: int = 128) -> Case:
    """ConvFFN of LITv2."""

    def inputs(B: int, device: torch.device) -> Inputs:
        first, last = draw(device, M, C) * C**-0.5, draw(device, C, M) * M**-0.5
        middle = draw(device, M, 1, 3, 3) / 3
        return [draw(device, B, H, H, C), first, draw(device, M), middle, draw(device, M), last, draw(device, C)]

    reference = cf.reference_conv_ffn
    forms: Forms = {"ours": cf.conv_ffn}
    return Case(f"conv_ffn {H}x{H} c{C}", batch, inputs, frozenset({0}), reference, forms, 4 * H * H * C * M, ("ours",))


def depthwise(C: int, H: int, K: int, last: bool = False, batch: int = 128) -> Case:
    """Depthwise convolution with a large kernel in either memory format; PyTorch's own in the other one too."""

    def inputs(B: int, device: torch.device) -> Inputs:
        x = draw(device, B, C, H, H)
        return [x.contiguous(memory_format=torch.channels_last) if last else x, draw(device, C, 1, K, K) / K]

    def copied(x: Tensor, weight: Tensor) -> Tensor:
        first, other = torch.contiguous_format, torch.channels_last
        ours, theirs = (other, first) if last else (first, other)
        x, weight = x.contiguous(memory_format=theirs), weight.contiguous(memory_format=theirs)
        return dw.reference_depthwise_conv(x, weight).contiguous(memory_format=ours)

    reference = dw.reference_depthwise_conv
    forms: Forms = {"triton": bind(dw.depthwise_conv, backend="triton"), "reference": reference}
    forms["other layout with copies"] = copied
    name = f"depthwise {H}x{H} c{C} k{K}{' channels_last' * last}"
    return Case(name, batch, inputs, frozenset({0}), reference, forms, 2 * C * H * H * K * K)


def depthwise3x3(C: int, H: int, gelu: bool, last: bool = True, batch: int = 128) -> Case:
    """Depthwise 3x3 convolution with a GELU behind it, or added to its input."""

    def inputs(B: int, device: torch.device) -> Inputs:
        x = draw(device, B, C, H, H)
        x = x.contiguous(memory_format=torch.channels_last) if last else x
        return [x, draw(device, C, 1, 3, 3) / 3, draw(device, C)]

    sizes = not gelu, gelu
    reference = bind(d3.reference_depthwise3x3, *sizes)
    forms: Forms = {"triton": bind(d3.depthwise3x3, *sizes, backend="triton"), "reference": reference}
    name = f"depthwise3x3 {H}x{H} c{C} {'gelu' if gelu else 'residual'}{' channels_last' * last}"
    return Case(name, batch, inputs, frozenset({0}), reference, forms, 18 * C * H * H, ("reference",))


def prompts(N: int, P: int, h: int, d: int, batch: int = 128) -> Case:
    """Attention to prompts; plain attention to the tokens alone is its floor."""

    def inputs(B: int, device: torch.device) -> Inputs:
        tokens = [draw(device, B, h, N, d) for _ in range(3)]
        chosen = torch.rand(B, N, P, device=device) < 0.3
        chosen[..., 0] = False
        return [*tokens, *(draw(device, 1, h, P, d) for _ in range(2)), chosen]

    reference = bind(pa.reference_prompt_attention, d**-0.5)
    forms: Forms = {backend: bind(pa.prompt_attention, d**-0.5, backend=backend) for backend in ("triton", "torch")}
    forms |= {"reference": reference, "plain sdpa": _sdpa}
    name, flops = f"prompt attention N{N} P{P} h{h} d{d}", 4 * h * N * (N + P) * d
    images, floors = frozenset({0, 1, 2, 5}), frozenset({"plain sdpa"})
    return Case(name, batch, inputs, images, reference, forms, flops, ("reference",), floors)


def cases(dry: bool) -> Iterator[Case]:
    """The operators at shapes of the zoo's models at 224 pixels, or one tiny shape each."""
    if dry:
        yield neighborhood(5, 1, 16, 3, batch=2)
        yield aggregated(5, 1, 16, 4, batch=2)
        yield halo_attention(4, 1, 16, 4, 1, 2, batch=2)
        yield timm_halo(8, 16, 2, 4, 1, batch=2)
        yield reversed_(1, 9, 16, batch=2)
        yield contmix(1, 4, 5, 3, 5, batch=2)
        yield na2d_av(1, 4, 4, 3, batch=2)
        yield ulsam_logits(8, 2, 5, batch=2)
        yield subspace_attention(8, 2, 5, batch=2)
        yield hifi(4, 2, 8, 2, batch=2)
        yield lofi(4, 2, 8, 2, batch=2)
        yield deform_merge(4, 8, 8, batch=2)
        yield conv_ffn(4, 8, 16, batch=2)
        yield depthwise(2, 5, 5, batch=2)
        yield depthwise3x3(8, 5, True, batch=2)
        yield prompts(5, 4, 2, 16, batch=2)
        return
    yield neighborhood(56, 2, 32, 7)
    yield halo_attention(64, 4, 16, 8, 3)
    yield reversed_(12, 196, 32)
    yield contmix(8, 16, 14, 5, 13, last=True)
    yield depthwise(64, 56, 17, last=True)
    yield prompts(197, 36, 12, 64)
    yield ulsam_logits(512, 4, 14)
    yield neighborhood(28, 4, 32, 7)
    yield neighborhood(14, 8, 32, 7)
    yield neighborhood(7, 16, 32, 7)
    yield neighborhood(56, 2, 32, 7, 8)
    yield neighborhood(28, 4, 32, 7, bias=False)
    yield halo_attention(16, 8, 32, 8, 3)
    yield halo_attention(8, 8, 64, 8, 3)
    yield halo_attention(24, 8, 32, 12, 2)
    yield halo_attention(32, 8, 32, 8, 3, 2)
    yield timm_halo(64, 64, 4, 8, 3)
    yield reversed_(12, 784, 32, batch=32)
    yield contmix(8, 16, 14, 5, 13)
    yield contmix(16, 16, 7, 5, 7, last=True)
    yield contmix(8, 16, 32, 5, 13, batch=16)
    yield na2d_av(8, 16, 14, 13)
    yield ulsam_logits(512, 4, 14, last=True)
    yield hifi(56, 2, 32, 2)
    yield hifi(28, 6, 32, 2)
    yield hifi(14, 2, 32, 2)
    yield lofi(14, 10, 32, 2)
    yield deform_merge(56, 96, 192)
    yield conv_ffn(56, 96, 384)
    yield depthwise(256, 14, 13, last=True)
    yield depthwise(64, 56, 17)
    yield depthwise3x3(384, 56, True)
    yield depthwise3x3(384, 14, False)
    yield subspace_attention(512, 4, 14)
    yield aggregated(56, 3, 24, 49)
    yield aggregated(14, 12, 24, 49)
