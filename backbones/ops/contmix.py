"""ContMix: convolution with kernels made from the context, one pair for every position and group (OverLoCK, Sec. 3.3).

The affinity of a query to the 49 pooled context regions goes through a linear map to the logits of a small (``k1``)
and a large (``k2``) kernel.  Both steps are linear, so they are one product with ``M = key @ weight_proj^T``:

    logits[n] = q[n] @ M + bias + rpb[true relative offsets]    weights = softmax over each kernel's offsets
    out[n]    = sum over the window of n of weights * v

Windows are shifted at the border, not padded (see ``na2d_av``).  The first half of the channels of ``v`` and ``out``
belongs to the small kernel, the second to the large one; each half holds ``G`` groups of ``C`` channels.  With
``N = H * W`` queries and ``S = k1^2 + k2^2`` the operator costs ``2 N S C`` multiply-accumulates per group.

The Triton kernels keep logits and weights in registers, with an online softmax, and take and return the layout of the
surrounding convolutions.  Their backward pass recomputes the weights from ``q``, ``M`` and the stored log-sum, writes
weights and gradients of the logits once, and adds everything up in a fixed order: it is deterministic.
"""

from __future__ import annotations

import functools

import torch
import torch.nn.functional as F
from torch import Tensor

from ._backend import HAS_TRITON, on_device, use_triton, without_autocast
from ._cost import Cost, register_cost
from ._derivative import plain_gradients
from ._kernels import product_precision
from .na2d_av import channel_blocks, check_window, kernel_limits, na2d_av, reference_na2d_av, window_starts


def working_size(H: int, W: int, kernel_size: int) -> tuple[int, int]:
    """Size to which a map smaller than the window is resized before ContMix: the official rule.

    The short side becomes ``kernel_size`` and the long side keeps the aspect ratio, truncated in double precision in
    the official order of operations.  Where that truncation would fall below the window (the official code then
    raises), the side is ``kernel_size``.

    Args:
        H: Rows of the map.
        W: Columns of the map.
        kernel_size: Side ``K`` of the large kernel.

    Returns:
        Rows and columns, both at least ``kernel_size``; ``(H, W)`` itself when the window fits.
    """
    if kernel_size <= H and kernel_size <= W:  # min() would bind exported programs to one orientation
        return H, W
    if H < W:
        return kernel_size, max(kernel_size, int(kernel_size / H * W))
    return max(kernel_size, int(kernel_size / W * H)), kernel_size


def _check(q: Tensor, M: Tensor, bias: Tensor, rpb1: Tensor, rpb2: Tensor, v: Tensor, k1: int, k2: int) -> None:
    if q.dim() != 4 or M.dim() != 4:
        raise ValueError(
            f"got q {list(q.shape)} and M {list(M.shape)}, need [B, G * C, H, W] and [B, G, C, k1^2 + k2^2]"
        )
    B, G, C, S = M.shape[0], M.shape[1], M.shape[2], k1 * k1 + k2 * k2
    H, W = q.shape[2], q.shape[3]
    check_window(H, W, k1, "k1")
    check_window(H, W, k2, "k2")
    if q.shape[0] != B or q.shape[1] != G * C or M.shape[3] != S:
        raise ValueError(
            f"got M {list(M.shape)} for q {list(q.shape)}, k1={k1}, k2={k2}; need [B, G, C, {S}], q [B, G * C, H, W]"
        )
    if list(v.shape) != [B, 2 * G * C, H, W]:
        raise ValueError(f"got v {list(v.shape)}, need {[B, 2 * G * C, H, W]}, twice the channels of q")
    if list(bias.shape) != [S]:
        raise ValueError(f"got bias {list(bias.shape)}, need [{S}] (k1^2 + k2^2)")
    if list(rpb1.shape) != [G, 2 * k1 - 1, 2 * k1 - 1]:
        raise ValueError(f"got rpb1 {list(rpb1.shape)}, need {[G, 2 * k1 - 1, 2 * k1 - 1]} ([G, 2 k1 - 1, 2 k1 - 1])")
    if list(rpb2.shape) != [G, 2 * k2 - 1, 2 * k2 - 1]:
        raise ValueError(f"got rpb2 {list(rpb2.shape)}, need {[G, 2 * k2 - 1, 2 * k2 - 1]} ([G, 2 k2 - 1, 2 k2 - 1])")


def _window_steps(L: int, kernel_size: int, device: torch.device) -> Tensor:
    """First relative offset, plus ``K - 1``, in the window of each position on an axis: ``[L]``, 0 to ``K - 1``."""
    return window_starts(L, kernel_size, device) - torch.arange(L, device=device) + kernel_size - 1


def _gather_rpb(rpb: Tensor, H: int, W: int, kernel_size: int) -> Tensor:
    """Relative position bias of every query and offset: ``[G, 2K-1, 2K-1]`` -> ``[G, H*W, K*K]``.

    The index is key position minus query position plus ``K - 1``, with the window that is shifted at the border.
    """
    G, K = rpb.shape[0], kernel_size
    offset = torch.arange(K, device=rpb.device)
    rows = _window_steps(H, K, rpb.device).unsqueeze(1) + offset  # [H, K]
    cols = _window_steps(W, K, rpb.device).unsqueeze(1) + offset  # [W, K]
    index = rows.reshape(H, 1, K, 1) * (2 * K - 1) + cols.reshape(1, W, 1, K)
    return rpb.reshape(G, -1).index_select(1, index.reshape(-1)).reshape(G, H * W, K * K)


def _expand_rpb(rpb: Tensor, H: int, W: int, kernel_size: int) -> Tensor:
    """:func:`_gather_rpb` by copies of whole windows of the table, of which there are ``K * K``."""
    G, K = rpb.shape[0], kernel_size
    windows = rpb.unfold(1, K, 1).unfold(2, K, 1).reshape(G, K * K, K * K)
    index = _window_steps(H, K, rpb.device).unsqueeze(1) * K + _window_steps(W, K, rpb.device)  # [H, W]
    return windows.index_select(1, index.reshape(-1))


def _logit_dtype(q: Tensor) -> torch.dtype:
    return torch.float64 if q.dtype == torch.float64 else torch.float32


def _gather_form(q: Tensor, M: Tensor, bias: Tensor, rpb1: Tensor, rpb2: Tensor, v: Tensor, k1: int, k2: int) -> Tensor:
    B, H, W = q.shape[0], q.shape[2], q.shape[3]
    G, C = M.shape[1], M.shape[2]
    dtype = _logit_dtype(q)
    queries = q.reshape(B, G, C, H * W).transpose(2, 3).to(dtype)
    logits = queries @ M.to(dtype) + bias.to(dtype)  # [B, G, N, k1^2 + k2^2]
    values = v.reshape(B, 2, G, C, H, W).permute(1, 0, 2, 4, 5, 3)  # [2, B, G, H, W, C]
    small = logits[..., : k1 * k1] + _gather_rpb(rpb1.to(dtype), H, W, k1)
    large = logits[..., k1 * k1 :] + _gather_rpb(rpb2.to(dtype), H, W, k2)
    out1 = reference_na2d_av(small.softmax(-1).reshape(B, G, H, W, k1 * k1), values[0], k1)
    out2 = reference_na2d_av(large.softmax(-1).reshape(B, G, H, W, k2 * k2), values[1], k2)
    return torch.stack([out1, out2], dim=1).permute(0, 1, 2, 5, 3, 4).reshape(v.shape)


def contmix_from_logits(logits: Tensor, rpb1: Tensor, rpb2: Tensor, v: Tensor, k1: int, k2: int) -> Tensor:
    """The second half of ContMix: relative position bias, softmax and weighted sums (OverLoCK, Sec. 3.3).

    Args:
        logits: Logits of both kernels for every query ``[B, G, H * W, k1^2 + k2^2]``.
        rpb1: Relative position bias of the small kernel ``[G, 2 k1 - 1, 2 k1 - 1]``.
        rpb2: The same of the large kernel ``[G, 2 k2 - 1, 2 k2 - 1]``.
        v: Values ``[B, 2 * G * C, H, W]``, channels laid out as ``[2 (small, large), G, C]``.
        k1: Side of the small window.
        k2: Side of the large window.

    Returns:
        ``[B, 2 * G * C, H, W]`` in the channel order and dtype of ``v``.
    """
    B, G, H, W = logits.shape[0], logits.shape[1], v.shape[2], v.shape[3]
    logits = logits.to(_logit_dtype(logits))
    values = v.reshape(B, 2, G, -1, H, W).permute(1, 0, 2, 4, 5, 3)  # [2, B, G, H, W, C]
    small = logits[..., : k1 * k1] + _gather_rpb(rpb1.to(logits.dtype), H, W, k1)
    large = logits[..., k1 * k1 :] + _gather_rpb(rpb2.to(logits.dtype), H, W, k2)
    weights1 = small.softmax(-1).reshape(B, G, H, W, k1 * k1)
    weights2 = large.softmax(-1).reshape(B, G, H, W, k2 * k2)
    out1 = na2d_av(weights1.to(v.dtype), values[0], k1, "torch")
    out2 = na2d_av(weights2.to(v.dtype), values[1], k2, "torch")
    return torch.stack([out1, out2], dim=1).permute(0, 1, 2, 5, 3, 4).reshape(v.shape)


def reference_contmix(
    q: Tensor, M: Tensor, bias: Tensor, rpb1: Tensor, rpb2: Tensor, v: Tensor, k1: int, k2: int
) -> Tensor:
    """Softmax weights from query and context, and their sum over two windows per query (OverLoCK, Sec. 3.3).

    Logits and softmax are computed in float32, or in float64 when ``q`` is float64.

    Args:
        q: Queries ``[B, G * C, H, W]``, channels laid out as ``[G, C]``.
        M: Context of every group ``[B, G, C, k1^2 + k2^2]``: pooled keys times the kernel projection, times the scale.
        bias: Bias of the kernel projection ``[k1^2 + k2^2]``.
        rpb1: Relative position bias of the small kernel ``[G, 2 k1 - 1, 2 k1 - 1]``.
        rpb2: The same of the large kernel ``[G, 2 k2 - 1, 2 k2 - 1]``.
        v: Values ``[B, 2 * G * C, H, W]``, channels laid out as ``[2 (small, large), G, C]``.
        k1: Side of the small window: odd, at least 3 and at most ``H`` and ``W``.
        k2: Side of the large window, likewise; ``working_size`` says how a smaller map is enlarged first.

    Returns:
        ``[B, 2 * G * C, H, W]`` in the channel order and dtype of ``v``.

    Raises:
        ValueError: If a window does not fit the map, or the shapes do not fit each other.
    """
    _check(q, M, bias, rpb1, rpb2, v, k1, k2)
    if not torch.jit.is_scripting():
        with without_autocast(q):
            return _gather_form(q, M, bias, rpb1, rpb2, v, k1, k2)
    return _gather_form(q, M, bias, rpb1, rpb2, v, k1, k2)


def _matmul_half(queries: Tensor, M: Tensor, bias: Tensor, rpb: Tensor, values: Tensor, kernel_size: int) -> Tensor:
    """One kernel size: queries ``[B, G, N, C]``, ``M`` ``[B, G, C, K*K]``, values ``[B, G, C, H, W]`` -> the last."""
    B, G, C, H, W = values.shape
    table = _expand_rpb(rpb.to(queries.dtype), H, W, kernel_size) + bias.to(queries.dtype)  # [G, N, K*K]
    weights = (queries @ M).add_(table).softmax(-1).to(values.dtype)
    weights = weights.reshape(B, G, H, W, kernel_size * kernel_size)
    return na2d_av(weights, values.permute(0, 1, 3, 4, 2), kernel_size, "torch").permute(0, 1, 4, 2, 3)


def _matmul_form(q: Tensor, M: Tensor, bias: Tensor, rpb1: Tensor, rpb2: Tensor, v: Tensor, k1: int, k2: int) -> Tensor:
    B, H, W = q.shape[0], q.shape[2], q.shape[3]
    G, C, dtype = M.shape[1], M.shape[2], _logit_dtype(q)
    queries = q.reshape(B, G, C, H * W).transpose(2, 3).to(dtype)
    M1, M2 = M.to(dtype).split([k1 * k1, k2 * k2], dim=3)
    bias1, bias2 = bias.split([k1 * k1, k2 * k2])
    v1, v2 = v.reshape(B, 2, G, C, H, W).unbind(1)
    small = _matmul_half(queries, M1, bias1, rpb1, v1, k1)
    large = _matmul_half(queries, M2, bias2, rpb2, v2, k2)
    return torch.stack([small, large], dim=1).reshape(v.shape)


if HAS_TRITON:
    import triton
    import triton.language as tl

    from ._kernels import index_type
    from .na2d_av import load_window, window_bwd_value_kernel, window_configs, window_start

    @triton.jit
    def _logits(
        q,
        m_ptr,
        bias_ptr,
        rpb_ptr,
        o,
        m_n,
        up,
        left,
        S,
        first,
        K: tl.constexpr,
        C: tl.constexpr,
        CP: tl.constexpr,
        PRECISION: tl.constexpr,
    ):
        """Context ``[BLOCK_O, CP]`` and logits ``[BLOCK_O, BLOCK_N]`` of the offsets ``o``: -inf past the last one."""
        m_o = o < K * K
        c = tl.arange(0, CP)
        p_m = m_ptr + c[None, :] * S + first + o[:, None]
        m = tl.load(p_m, mask=m_o[:, None] & (c < C)[None, :], other=0.0)
        row = up[None, :] + (o // K)[:, None] + K - 1
        col = left[None, :] + (o % K)[:, None] + K - 1
        rpb = tl.load(rpb_ptr + row * (2 * K - 1) + col, mask=m_o[:, None] & m_n[None, :], other=0.0)
        bias = tl.load(bias_ptr + first + o, mask=m_o, other=0.0)
        s = tl.dot(m, q, input_precision=PRECISION) + (rpb + bias[:, None]).to(tl.float32)
        return m, tl.where(m_o[:, None], s, float("-inf"))

    @triton.autotune(configs=window_configs(), key=["K", "C"])
    @triton.jit
    def _contmix_fwd_kernel(
        q_ptr,
        m_ptr,
        bias_ptr,
        rpb_ptr,
        v_ptr,
        out_ptr,
        lse_ptr,
        G,
        H,
        W,
        S,
        half,
        first,
        stride_qb,
        stride_qc,
        stride_qn,
        stride_vb,
        stride_vc,
        stride_vn,
        K: tl.constexpr,
        C: tl.constexpr,
        CP: tl.constexpr,
        PRECISION: tl.constexpr,
        INDEX: tl.constexpr,
        BLOCK_O: tl.constexpr,
        BLOCK_N: tl.constexpr,
    ):
        N = H * W
        tiles = tl.cdiv(N, BLOCK_N)
        pid = tl.program_id(0)
        b, g = (pid // tiles // G).to(tl.int64), pid // tiles % G
        n = (pid % tiles) * BLOCK_N + tl.arange(0, BLOCK_N)
        m_n = n < N
        y, x = n // W, n % W
        si, sj = window_start(y, H, K), window_start(x, W, K)
        c = tl.arange(0, CP)
        m_cn = (c < C)[:, None] & m_n[None, :]
        q = tl.load(
            q_ptr + b * stride_qb + ((g * C + c).to(INDEX)[:, None] * stride_qc + n.to(INDEX)[None, :] * stride_qn),
            mask=m_cn,
            other=0.0,
        )
        group = b * stride_vb + ((half * G + g) * C).to(INDEX) * stride_vc
        own = group + (c.to(INDEX)[:, None] * stride_vc + n.to(INDEX)[None, :] * stride_vn)
        context = m_ptr + (b * G + g) * C * S
        table = rpb_ptr + g * ((2 * K - 1) * (2 * K - 1))
        peak = tl.full((BLOCK_N,), float("-inf"), tl.float32)
        total = tl.zeros((BLOCK_N,), tl.float32)
        acc = tl.zeros((CP, BLOCK_N), tl.float32)
        for start in range(0, K * K, BLOCK_O):
            o = start + tl.arange(0, BLOCK_O)
            _, s = _logits(q, context, bias_ptr, table, o, m_n, si - y, sj - x, S, first, K, C, CP, PRECISION)
            higher = tl.maximum(peak, tl.max(s, 0))
            shrink = tl.exp(peak - higher)
            p = tl.exp(s - higher[None, :])
            pixel = (si[None, :] + (o // K)[:, None]) * W + sj[None, :] + (o % K)[:, None]
            w = load_window(v_ptr + group, pixel, o < K * K, m_n, stride_vc, stride_vn, C, CP, INDEX)
            total = total * shrink + tl.sum(p, 0)
            acc = acc * shrink[None, :] + tl.sum(p[:, None, :] * w, 0)
            peak = higher
        tl.store(out_ptr + own, (acc / total[None, :]).to(out_ptr.dtype.element_ty), mask=m_cn)
        tl.store(lse_ptr + ((b * 2 + half) * G + g) * N + n, peak + tl.log(total), mask=m_n)

    @triton.autotune(configs=window_configs(), key=["K", "C"])
    @triton.jit
    def _contmix_bwd_logits_kernel(
        q_ptr,
        m_ptr,
        bias_ptr,
        rpb_ptr,
        v_ptr,
        lse_ptr,
        dout_ptr,
        p_ptr,
        ds_ptr,
        dq_ptr,
        G,
        H,
        W,
        S,
        half,
        first,
        stride_qb,
        stride_qc,
        stride_qn,
        stride_vb,
        stride_vc,
        stride_vn,
        K: tl.constexpr,
        C: tl.constexpr,
        CP: tl.constexpr,
        PRECISION: tl.constexpr,
        INDEX: tl.constexpr,
        BLOCK_O: tl.constexpr,
        BLOCK_N: tl.constexpr,
    ):
        """Weights and gradient of the logits ``[B, G, S, N]``, and this kernel size's share of ``dq``."""
        N = H * W
        tiles = tl.cdiv(N, BLOCK_N)
        pid = tl.program_id(0)
        b, g = (pid // tiles // G).to(tl.int64), pid // tiles % G
        n = (pid % tiles) * BLOCK_N + tl.arange(0, BLOCK_N)
        m_n = n < N
        y, x = n // W, n % W
        si, sj = window_start(y, H, K), window_start(x, W, K)
        c = tl.arange(0, CP)
        m_cn = (c < C)[:, None] & m_n[None, :]
        q = tl.load(
            q_ptr + b * stride_qb + ((g * C + c).to(INDEX)[:, None] * stride_qc + n.to(INDEX)[None, :] * stride_qn),
            mask=m_cn,
            other=0.0,
        )
        group = b * stride_vb + ((half * G + g) * C).to(INDEX) * stride_vc
        own = group + (c.to(INDEX)[:, None] * stride_vc + n.to(INDEX)[None, :] * stride_vn)
        dout = tl.load(dout_ptr + own, mask=m_cn, other=0.0).to(tl.float32)
        lse = tl.load(lse_ptr + ((b * 2 + half) * G + g) * N + n, mask=m_n, other=0.0)
        context = m_ptr + (b * G + g) * C * S
        table = rpb_ptr + g * ((2 * K - 1) * (2 * K - 1))
        weights = ((b * G + g) * S + first) * N
        p_ptr += weights
        ds_ptr += weights
        # the mean gradient comes from the float32 weights, since the stored output of a half precision run is rounded
        delta = tl.zeros((BLOCK_N,), tl.float32)
        for start in range(0, K * K, BLOCK_O):
            o = start + tl.arange(0, BLOCK_O)
            m_o = o < K * K
            _, s = _logits(q, context, bias_ptr, table, o, m_n, si - y, sj - x, S, first, K, C, CP, PRECISION)
            p = tl.exp(s - lse[None, :])
            pixel = (si[None, :] + (o // K)[:, None]) * W + sj[None, :] + (o % K)[:, None]
            w = load_window(v_ptr + group, pixel, m_o, m_n, stride_vc, stride_vn, C, CP, INDEX)
            dp = tl.sum(dout[None, :, :] * w, 1)
            delta += tl.sum(p * dp, 0)
            p_dp = ds_ptr + (o.to(INDEX)[:, None] * N + n[None, :])
            tl.store(p_dp, dp, mask=m_o[:, None] & m_n[None, :])
        tl.debug_barrier()  # another thread of the block may read back what this one wrote
        dq = tl.zeros((CP, BLOCK_N), tl.float32)
        for start in range(0, K * K, BLOCK_O):
            o = start + tl.arange(0, BLOCK_O)
            m_on = (o < K * K)[:, None] & m_n[None, :]
            m, s = _logits(q, context, bias_ptr, table, o, m_n, si - y, sj - x, S, first, K, C, CP, PRECISION)
            p = tl.exp(s - lse[None, :])
            place = o.to(INDEX)[:, None] * N + n[None, :]
            ds = p * (tl.load(ds_ptr + place, mask=m_on, other=0.0) - delta[None, :])
            # float32: a float16 product of small gradients would vanish
            dq = tl.dot(tl.trans(m).to(tl.float32), ds, dq, input_precision=PRECISION)
            tl.store(p_ptr + place, p.to(p_ptr.dtype.element_ty), mask=m_on)
            tl.store(ds_ptr + place, ds, mask=m_on)
        p_dq = dq_ptr + (((b * 2 + half) * G + g) * C + c)[:, None] * N + n[None, :]
        tl.store(p_dq, dq, mask=m_cn)


def _memory_format(t: Tensor) -> torch.memory_format:
    """The dense layout to give to ``t``: positions are one axis with one stride in both."""
    if not t.is_contiguous() and t.is_contiguous(memory_format=torch.channels_last):
        return torch.channels_last
    return torch.contiguous_format


def _skew_sum(t: Tensor, L: int, kernel_size: int) -> Tensor:
    """Adjoint of the relative index on one axis, by sums in a fixed order: ``[..., K, L]`` -> ``[..., 2K - 1]``.

    Entry ``(p, i)`` goes to ``p + step(i)``; the step falls from ``K - 1`` at the first position to 0 at the last, and
    is ``(K - 1) / 2`` at every position in between.
    """
    K, half = kernel_size, (kernel_size - 1) // 2
    inner = t[..., half : L - half].sum(-1, keepdim=True)
    steps = torch.cat([t[..., :half], inner, t[..., L - half :]], dim=-1).flip(-1).transpose(-1, -2)  # [..., step, p]
    skewed = F.pad(steps, [0, K]).flatten(-2)[..., :-K]  # row ``step`` moves right by ``step``
    return skewed.unflatten(-1, (K, 2 * K - 1)).sum(-2)


def _rpb_gradient(ds: Tensor, H: int, W: int, kernel_size: int) -> Tensor:
    """Gradient of the table from that of the logits, summed over the batch: ``[G, K*K, N]`` -> ``[G, 2K-1, 2K-1]``."""
    t = ds.reshape(ds.shape[0], kernel_size, kernel_size, H, W)
    t = _skew_sum(t.transpose(2, 3), W, kernel_size)  # [G, p, H, 2K - 1]
    return _skew_sum(t.permute(0, 3, 1, 2), H, kernel_size).transpose(1, 2)


def _launch(kernel, q: Tensor, v: Tensor, M: Tensor, k1: int, k2: int, rpb: tuple[Tensor, Tensor], **pointers) -> None:
    """Run a kernel for the small, then for the large window; ``q`` and ``v`` are dense."""
    B, G, C, S = M.shape
    H, W = q.shape[2], q.shape[3]
    CP, BLOCK_O = channel_blocks(C)
    with on_device(q):
        for half, (K, table) in enumerate(zip((k1, k2), rpb, strict=True)):
            kernel[lambda meta: (B * G * triton.cdiv(H * W, meta["BLOCK_N"]),)](
                q_ptr=q,
                v_ptr=v,
                m_ptr=M,
                rpb_ptr=table,
                **pointers,
                G=G,
                H=H,
                W=W,
                S=S,
                half=half,
                first=half * k1 * k1,
                stride_qb=q.stride(0),
                stride_qc=q.stride(1),
                stride_qn=q.stride(3),
                stride_vb=v.stride(0),
                stride_vc=v.stride(1),
                stride_vn=v.stride(3),
                K=K,
                C=C,
                CP=CP,
                PRECISION=product_precision(q.device),
                INDEX=index_type(q, v, *pointers.values()),
                BLOCK_O=BLOCK_O,
            )


@torch.library.custom_op("vizoo::contmix", mutates_args=())
def _contmix(
    q: Tensor, M: Tensor, bias: Tensor, rpb1: Tensor, rpb2: Tensor, v: Tensor, k1: int, k2: int
) -> tuple[Tensor, Tensor]:
    B, G = M.shape[0], M.shape[1]
    q, v = q.contiguous(memory_format=_memory_format(q)), v.contiguous(memory_format=_memory_format(v))
    out = torch.empty_like(v)
    lse = torch.empty(B, 2, G, q.shape[2] * q.shape[3], dtype=torch.float32, device=q.device)
    rpb = rpb1.contiguous(), rpb2.contiguous()
    _launch(
        _contmix_fwd_kernel,
        q,
        v,
        M.contiguous(),
        k1,
        k2,
        rpb,
        bias_ptr=bias.contiguous(),
        out_ptr=out,
        lse_ptr=lse,
    )
    return out, lse


@_contmix.register_fake
def _(q, M, bias, rpb1, rpb2, v, k1, k2):
    lse = q.new_empty(M.shape[0], 2, M.shape[1], q.shape[2] * q.shape[3], dtype=torch.float32)
    return torch.empty_like(v, memory_format=_memory_format(v)), lse


@torch.library.custom_op("vizoo::contmix_backward", mutates_args=())
def _contmix_backward(
    dout: Tensor,
    q: Tensor,
    M: Tensor,
    bias: Tensor,
    rpb1: Tensor,
    rpb2: Tensor,
    v: Tensor,
    lse: Tensor,
    k1: int,
    k2: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    B, G, C, S = M.shape
    H, W = q.shape[2], q.shape[3]
    N = H * W
    q, M = q.contiguous(memory_format=_memory_format(q)), M.contiguous()
    v = v.contiguous(memory_format=_memory_format(v))
    dout = dout.contiguous(memory_format=_memory_format(v))
    weights = torch.empty(B, G, S, N, dtype=v.dtype, device=v.device)
    ds = torch.empty(B, G, S, N, dtype=torch.float32, device=v.device)
    dq = torch.empty(B, 2, G, C, N, dtype=torch.float32, device=v.device)
    dv = torch.empty_like(v)
    _launch(
        _contmix_bwd_logits_kernel,
        q,
        v,
        M,
        k1,
        k2,
        (rpb1.contiguous(), rpb2.contiguous()),
        bias_ptr=bias.contiguous(),
        lse_ptr=lse,
        dout_ptr=dout,
        p_ptr=weights,
        ds_ptr=ds,
        dq_ptr=dq,
    )
    with on_device(v):
        for half, K in enumerate((k1, k2)):
            window_bwd_value_kernel[lambda meta: (B * G * triton.cdiv(N, meta["BLOCK_N"]),)](
                dout[:, half * G * C :],
                weights[:, :, half * k1 * k1 :],
                dv[:, half * G * C :],
                G=G,
                H=H,
                W=W,
                stride_pb=G * S * N,
                stride_pg=S * N,
                stride_po=N,
                stride_pn=1,
                stride_vb=v.stride(0),
                stride_vg=C * v.stride(1),
                stride_vc=v.stride(1),
                stride_vn=v.stride(3),
                K=K,
                C=C,
                CP=channel_blocks(C)[0],
                INDEX=index_type(v, weights),
            )
    with without_autocast(q):
        dM = q.reshape(B, G, C, N).float() @ ds.transpose(2, 3)
    per_table = ds.sum(0)  # [G, S, N]
    return (
        dq.sum(1).reshape(q.shape).to(q.dtype),
        dM.to(M.dtype),
        per_table.sum((0, 2)).to(bias.dtype),
        _rpb_gradient(per_table[:, : k1 * k1], H, W, k1).to(rpb1.dtype).contiguous(),
        _rpb_gradient(per_table[:, k1 * k1 :], H, W, k2).to(rpb2.dtype).contiguous(),
        dv,
    )


@_contmix_backward.register_fake
def _(dout, q, M, bias, rpb1, rpb2, v, lse, k1, k2):
    plain = (torch.empty_like(t, memory_format=torch.contiguous_format) for t in (q, M, bias, rpb1, rpb2))
    return *plain, torch.empty_like(v, memory_format=_memory_format(v))


def _save(ctx, inputs, output) -> None:
    *tensors, ctx.k1, ctx.k2 = inputs
    ctx.save_for_backward(*tensors, output[1])
    ctx.mark_non_differentiable(output[1])


def _differentiate(ctx, dout, _):
    if torch.is_grad_enabled():
        *tensors, _ = ctx.saved_tensors
        form = functools.partial(_matmul_form, k1=ctx.k1, k2=ctx.k2)
        return *plain_gradients(form, tensors, dout, ctx.needs_input_grad[:6]), None, None
    return *_contmix_backward(dout, *ctx.saved_tensors, ctx.k1, ctx.k2), None, None


_contmix.register_autograd(_differentiate, setup_context=_save)


@register_cost("vizoo::contmix", torch.ops.vizoo.contmix)
def _(q, M, bias, rpb1, rpb2, v, k1, k2, out=None) -> Cost:
    B, G, C, S = M
    return Cost(macs=2 * B * G * q[2] * q[3] * S * C, other=5 * B * G * q[2] * q[3] * S)


@register_cost("vizoo::contmix_backward", torch.ops.vizoo.contmix_backward)
def _(dout, q, M, *rest, out=None) -> Cost:
    B, G, C, S = M  # the gradients' products; the recomputed logits are not counted, so that no path counts more
    return Cost(macs=4 * B * G * q[2] * q[3] * S * C, other=5 * B * G * q[2] * q[3] * S)


def contmix(
    q: Tensor,
    M: Tensor,
    bias: Tensor,
    rpb1: Tensor,
    rpb2: Tensor,
    v: Tensor,
    k1: int,
    k2: int,
    backend: str = "auto",
) -> Tensor:
    """:func:`reference_contmix` by matrix products or fused Triton kernels: same result and errors.

    Args:
        q: Queries ``[B, G * C, H, W]``, channels laid out as ``[G, C]``.
        M: Context of every group ``[B, G, C, k1^2 + k2^2]``, with the scale.
        bias: Bias of the kernel projection ``[k1^2 + k2^2]``.
        rpb1: Relative position bias of the small kernel ``[G, 2 k1 - 1, 2 k1 - 1]``.
        rpb2: The same of the large kernel ``[G, 2 k2 - 1, 2 k2 - 1]``.
        v: Values ``[B, 2 * G * C, H, W]``, channels laid out as ``[2 (small, large), G, C]``.
        k1: Side of the small window.
        k2: Side of the large window.
        backend: ``"torch"``, ``"triton"`` (no float64, ``C <= 64``), or ``"auto"``: Triton where it can run.

    Returns:
        ``[B, 2 * G * C, H, W]`` in the channel order and dtype of ``v``.

    Raises:
        ValueError: If a window does not fit the map, the shapes do not fit each other, or ``backend`` cannot run.
    """
    _check(q, M, bias, rpb1, rpb2, v, k1, k2)
    if not torch.jit.is_scripting():
        if use_triton(backend, v, kernel_limits(q, M.shape[2]) or kernel_limits(v, M.shape[2])):
            common = torch.promote_types(q.dtype, M.dtype)
            tables = (t.float() for t in (bias, rpb1, rpb2))
            return _contmix(q.to(common), M.to(common), *tables, v, k1, k2)[0]
        with without_autocast(q):
            return _matmul_form(q, M, bias, rpb1, rpb2, v, k1, k2)
    return _matmul_form(q, M, bias, rpb1, rpb2, v, k1, k2)
