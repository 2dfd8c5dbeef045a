"""Triton kernels of depthwise 3x3 convolution with what comes after it: see ``depthwise3x3.py`` for the formulas.

One kernel does a convolution and sums the products of its neighbourhoods with a second map.  Without GELU it goes over
neighbourhoods of ``g = dy``, and that is the backward pass.  With GELU it goes over those of ``x``, so that the
convolution is the argument of GELU, which nobody stored; it writes ``g``, over which the forward kernel gives ``dx``.
Everything is summed in float32, in a fixed order.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from ._kernels import all_registers, empty_map, memory_format, power_of_two
from .backend import HAS_TRITON, on_device

PROGRAMS = 1024  # that a launch is not to go below for the sake of longer ones: eight for every multiprocessor

if HAS_TRITON:
    import triton
    import triton.language as tl

    from ._kernels import index_type

    _COUNTS = ("B", "H", "W", "parts", "span", "images")  # 1 or a multiple of 16 is no reason to compile

    @triton.jit
    def _normal_cdf(x):
        """Distribution function of the normal distribution, by ``2^p(|x|)`` for its tail: exact to 5e-8."""
        a = tl.abs(x)
        p = -2.275866758326803e-06 * a + 3.2967952205564206e-05
        p = p * a - 0.00015727846113850743
        p = p * a - 0.00020247976469776668
        p = p * a + 0.00714278298910131
        p = p * a - 0.05254643698376596
        p = p * a - 0.45919305689387024
        p = p * a - 1.151106941266309
        tail = tl.exp2(p * a - 0.9999999590151746)
        return tl.where(x > 0, 1 - tail, tail)

    @triton.jit
    def _gelu_slope(x):
        density = tl.exp2(x * x * -0.7213475204444817 - 1.3257480647361595)  # -log2(e) / 2, -log2(2 pi) / 2
        return _normal_cdf(x) + x * density

    @triton.jit
    def _place(parts, span, LAST: tl.constexpr, CHANNELS: tl.constexpr, COLS: tl.constexpr):
        """Channels, columns and first row of a program; what is contiguous in memory is the last axis of its tiles."""
        c = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
        x = tl.program_id(0) // parts * COLS + tl.arange(0, COLS)
        first = tl.program_id(0) % parts * span
        if LAST:
            return c[None, :], x[:, None], first
        else:
            return c[:, None], x[None, :], first

    @triton.jit
    def _weights(weight_ptr, c, C, FLIP: tl.constexpr, RESIDUAL: tl.constexpr):
        """The nine weights of every channel in float32, in which the middle one can take the residual too."""
        w = ()
        for k in tl.static_range(9):
            tap = tl.load(weight_ptr + (c * 9 + (8 - k if FLIP else k)), mask=c < C, other=0.0).to(tl.float32)
            w += (tap + 1.0 if RESIDUAL and k == 4 else tap,)  # type: ignore[assignment]
        return w

    @triton.jit
    def _bias(bias_ptr, c, C, BIAS: tl.constexpr):
        if BIAS:
            return tl.load(bias_ptr + c, mask=c < C, other=0.0).to(tl.float32)
        else:
            return tl.zeros(c.shape, tl.float32)

    @triton.jit
    def _on_map(y, r: tl.constexpr, H, ROWS: tl.constexpr, WHOLE: tl.constexpr):
        """Whether row ``r`` of a group is one of the map, as far as that depends on the group."""
        if r < 0:
            return y > 0
        elif r == 0 or (r < ROWS and WHOLE):
            return True
        else:
            return y + r < H

    @triton.jit
    def _neighbourhoods(
        base, stride_y, stride_x, y, x, own, H, W, ROWS: tl.constexpr, WHOLE: tl.constexpr, INDEX: tl.constexpr
    ):
        """The three columns around each one of ``ROWS`` rows, and of one row before and after: zero outside the map.

        All of them are asked for before the first is used, so that they are on their way at the same time.
        """
        left, right = own & (x > 0), own & (x + 1 < W)
        tiles = ()
        p = base + tl.cast(y - 1, INDEX) * stride_y
        for r in tl.static_range(ROWS + 2):
            if r > 0:
                p += stride_y
            on_map = _on_map(y, r - 1, H, ROWS, WHOLE)
            tiles += (  # type: ignore[assignment]
                tl.load(p - stride_x, mask=left & on_map, other=0.0),
                tl.load(p, mask=own & on_map, other=0.0),
                tl.load(p + stride_x, mask=right & on_map, other=0.0),
            )
        return tiles

    @triton.jit
    def _convolution(tiles, w, bias, r: tl.constexpr):
        """Of the ``r``-th row of :func:`_neighbourhoods`."""
        acc = w[0] * tiles[3 * r] + bias
        for k in tl.static_range(1, 9):
            acc += w[k] * tiles[3 * r + k]
        return acc

    @triton.jit(do_not_specialize=_COUNTS)
    def _depthwise_fwd_kernel(
        x_ptr,
        weight_ptr,
        bias_ptr,
        y_ptr,
        B,
        C,
        H,
        W,
        parts,
        span,
        images,
        x_stride_b,
        x_stride_c,
        x_stride_y,
        x_stride_x,
        y_stride_b,
        y_stride_c,
        y_stride_y,
        y_stride_x,
        LAST: tl.constexpr,
        BIAS: tl.constexpr,
        RESIDUAL: tl.constexpr,
        GELU: tl.constexpr,
        FLIP: tl.constexpr,
        INDEX: tl.constexpr,
        ROWS: tl.constexpr,
        WHOLE: tl.constexpr,
        CHANNELS: tl.constexpr,
        COLS: tl.constexpr,
    ):
        c, x, first = _place(parts, span, LAST, CHANNELS, COLS)
        x_place = c.to(INDEX) * x_stride_c + x.to(INDEX) * x_stride_x
        y_place = c.to(INDEX) * y_stride_c + x.to(INDEX) * y_stride_x
        own = (c < C) & (x < W)
        w, bias = _weights(weight_ptr, c, C, FLIP, RESIDUAL), _bias(bias_ptr, c, C, BIAS)
        first_image = tl.program_id(2) * images
        for b in range(first_image, min(first_image + images, B)):
            image = tl.cast(b, tl.int64)
            x_base = x_ptr + image * x_stride_b + x_place
            y_base = y_ptr + image * y_stride_b + y_place
            for y in range(first, min(first + span, H), ROWS):
                tiles = _neighbourhoods(x_base, x_stride_y, x_stride_x, y, x, own, H, W, ROWS, WHOLE, INDEX)
                p = y_base + tl.cast(y, INDEX) * y_stride_y
                for r in tl.static_range(ROWS):
                    out = _convolution(tiles, w, bias, r)
                    if GELU:
                        out *= _normal_cdf(out)
                    if r > 0:
                        p += y_stride_y
                    tl.store(p, out.to(y_ptr.dtype.element_ty), mask=own & _on_map(y, r, H, ROWS, WHOLE))

    @triton.jit(do_not_specialize=_COUNTS)
    def _depthwise_bwd_kernel(
        map_ptr,
        other_ptr,
        weight_ptr,
        bias_ptr,
        out_ptr,
        dweight_ptr,
        dbias_ptr,
        B,
        C,
        H,
        W,
        parts,
        span,
        images,
        map_stride_b,
        map_stride_c,
        map_stride_y,
        map_stride_x,
        other_stride_b,
        other_stride_c,
        other_stride_y,
        other_stride_x,
        out_stride_b,
        out_stride_c,
        out_stride_y,
        out_stride_x,
        LAST: tl.constexpr,
        BIAS: tl.constexpr,
        RESIDUAL: tl.constexpr,
        GELU: tl.constexpr,
        INDEX: tl.constexpr,
        ROWS: tl.constexpr,
        WHOLE: tl.constexpr,
        CHANNELS: tl.constexpr,
        COLS: tl.constexpr,
    ):
        """Convolution of ``map``, and this program's share of the sums of its neighbourhoods times another map.

        Without GELU they are ``dy`` and ``x``, and the result ``dx``; with it ``x`` and ``dy``, and the result ``g``.
        """
        c, x, first = _place(parts, span, LAST, CHANNELS, COLS)
        map_place = c.to(INDEX) * map_stride_c + x.to(INDEX) * map_stride_x
        other_place = c.to(INDEX) * other_stride_c + x.to(INDEX) * other_stride_x
        out_place = c.to(INDEX) * out_stride_c + x.to(INDEX) * out_stride_x
        own = (c < C) & (x < W)
        w, bias = _weights(weight_ptr, c, C, not GELU, RESIDUAL), _bias(bias_ptr, c, C, BIAS)
        zero = tl.zeros((map_place.shape[0], map_place.shape[1]), tl.float32)
        dbias, dweight = zero, (zero, zero, zero, zero, zero, zero, zero, zero, zero)
        first_image = tl.program_id(2) * images
        for b in range(first_image, min(first_image + images, B)):
            image = tl.cast(b, tl.int64)
            map_base = map_ptr + image * map_stride_b + map_place
            other_base = other_ptr + image * other_stride_b + other_place
            out_base = out_ptr + image * out_stride_b + out_place
            for y in range(first, min(first + span, H), ROWS):
                tiles = _neighbourhoods(map_base, map_stride_y, map_stride_x, y, x, own, H, W, ROWS, WHOLE, INDEX)
                others = ()
                p = other_base + tl.cast(y, INDEX) * other_stride_y
                for r in tl.static_range(ROWS):
                    if r > 0:
                        p += other_stride_y
                    tile = tl.load(p, mask=own & _on_map(y, r, H, ROWS, WHOLE), other=0.0)
                    others += (tile,)  # type: ignore[assignment]
                p = out_base + tl.cast(y, INDEX) * out_stride_y
                for r in tl.static_range(ROWS):
                    out = _convolution(tiles, w, bias, r)
                    other = others[r].to(tl.float32)  # type: ignore[var-annotated]
                    if GELU:
                        other *= _gelu_slope(out)
                        out = other
                        dbias += other
                    else:
                        dbias += tiles[3 * r + 4]
                    sums = ()
                    for k in tl.static_range(9):
                        sums += (dweight[k] + other * tiles[3 * r + k],)
                    dweight = sums
                    if r > 0:
                        p += out_stride_y
                    tl.store(p, out.to(out_ptr.dtype.element_ty), mask=own & _on_map(y, r, H, ROWS, WHOLE))
        share = tl.program_id(2) * tl.num_programs(0) + tl.program_id(0)
        AXIS: tl.constexpr = 0 if LAST else 1
        for k in tl.static_range(9):
            p = dweight_ptr + share.to(tl.int64) * C * 9 + c * 9 + (k if GELU else 8 - k)
            tl.store(p, tl.sum(dweight[k], AXIS, keep_dims=True), mask=c < C)
        tl.store(dbias_ptr + share.to(tl.int64) * C + c, tl.sum(dbias, AXIS, keep_dims=True), mask=c < C)


class Tile(NamedTuple):
    """Rows, channels and columns that a program works on at once, its warps, and how many such groups of rows it has.

    The more groups, the less it weighs that a program reads the weights and writes sums of their gradients.
    """

    rows: int
    channels: int
    cols: int
    warps: int
    groups: int


def _choice(backward: bool, last: bool, half: bool, vectors: bool, H: int, W: int) -> Tile:
    """By the machine code for 9.0, not by measured times; other capabilities take the same until measured there.

    Eight bytes a thread forward, four backward, is what weights, sums and rows on their way leave registers for: more
    channels spill, fewer issue more instructions; half as many where strides forbid ``vectors``, as each channel then
    has a register.  Seven rows divide the maps of 224 pixels, eight most others.
    """
    rows = min((7, 8), key=lambda n: -(-H // n) * n)
    groups = 16 if backward else 4
    if last:
        return Tile(rows, 64 if half else 32, 8, (8 if backward and half else 4) * (1 if vectors else 2), groups)
    cols = power_of_two(W) if W > 8 else 8
    if W > 32:
        cols = min((64, 32), key=lambda n: -(-W // n) * n)
    return Tile(rows, 128 // cols, cols, 4, groups)


def _ordered(x: Tensor, last: bool) -> Tensor:
    """With channels, or columns, next to each other in memory."""
    if x.stride(1 if last else 3) == 1:
        return x
    return x.contiguous(memory_format=torch.channels_last if last else torch.contiguous_format)


def _parameters(weight: Tensor, bias: Tensor | None) -> dict[str, Any]:
    weight = weight.contiguous()
    return {
        "weight_ptr": weight,
        "bias_ptr": weight if bias is None else bias.contiguous(),
        "BIAS": bias is not None,
    }


def _launch(backward: bool, **maps: Tensor) -> tuple[tuple[int, int, int], dict[str, Any]]:
    """Programs on each axis of a launch over maps of one shape, and arguments, of both kernels."""
    x = next(iter(maps.values()))
    B, C, H, W = x.shape
    strides = {
        f"{name}_stride_{axis}": s for name, t in maps.items() for axis, s in zip("bcyx", t.stride(), strict=True)
    }
    last, vectors = (
        memory_format(x) == torch.channels_last,
        all(s == 1 or s % 16 == 0 for s in strides.values()),
    )  # as Triton specialises
    tile = _choice(backward, last, x.element_size() == 2, vectors, H, W)
    groups, columns, blocks = -(-H // tile.rows), -(-W // tile.cols), -(-C // tile.channels)
    programs = columns * blocks * B  # if each has one image
    images = min(-(-tile.groups // groups), max(1, programs // PROGRAMS))
    span = -(-groups // max(1, PROGRAMS // programs))  # groups of a program: all rows, or a part for small batches
    parts = -(-groups // span)
    arguments = {
        "B": B,
        "C": C,
        "H": H,
        "W": W,
        "parts": parts,
        "span": span * tile.rows,
        "images": images,
        "LAST": last,
        "INDEX": index_type(*maps.values()),
        "ROWS": tile.rows,
        "WHOLE": H % tile.rows == 0,
        "CHANNELS": tile.channels,
        "COLS": tile.cols,
        "num_warps": tile.warps,
        **strides,
        **{f"{name}_ptr": t for name, t in maps.items()},
    }
    return (columns * parts, blocks, -(-B // images)), arguments


def kernel_forward(
    x: Tensor, weight: Tensor, bias: Tensor | None, residual: bool, gelu: bool, flip: bool = False
) -> Tensor:
    """Convolution with what comes after it, or with ``flip`` that with the kernels turned around."""
    x = _ordered(x, memory_format(x) == torch.channels_last)
    y = empty_map(x)
    if y.numel() > 0:
        grid, arguments = _launch(False, x=x, y=y)
        with on_device(x):
            _depthwise_fwd_kernel[grid](
                **arguments, **_parameters(weight, bias), RESIDUAL=residual, GELU=gelu, FLIP=flip
            )
    return y


def kernel_backward(
    dy: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, residual: bool, gelu: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of map, weight and bias."""
    last = memory_format(x) == torch.channels_last
    x, dy = _ordered(x, last), _ordered(dy, last)
    out = empty_map(x)
    if out.numel() == 0:
        return out, torch.zeros_like(weight), weight.new_zeros(weight.shape[0])
    neighbours, other = (x, dy) if gelu else (dy, x)
    grid, arguments = _launch(True, map=neighbours, other=other, out=out)
    shares = grid[0] * grid[2]
    dweight = torch.empty(shares, *weight.shape, dtype=torch.float32, device=x.device)
    dbias = torch.empty(shares, weight.shape[0], dtype=torch.float32, device=x.device)
    with on_device(x):
        _depthwise_bwd_kernel[grid](
            **arguments,
            **_parameters(weight, bias if gelu else None),
            dweight_ptr=dweight,
            dbias_ptr=dbias,
            RESIDUAL=residual,
            GELU=gelu,
            # ptxas spills here, but not in the short kernel for whole groups of rows without GELU
            **(all_registers(arguments["num_warps"]) if not last and (gelu or not arguments["WHOLE"]) else {}),
        )
    if gelu:
        out = kernel_forward(out, weight, None, residual, gelu=False, flip=True)
    return out, dweight.sum(0).to(weight.dtype), dbias.sum(0).to(weight.dtype)
