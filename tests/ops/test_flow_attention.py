"""Flow-Attention: a loop written from its definition, the flow's conservation, padding, chunks, precision, cost."""

import itertools
import math

import pytest
import torch
from tolerance import close, op_close
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from vizoo.backbones.ops.flow_attention import EPS, flow_attention, flows, reference_flow_attention

CASES = [(1, 2, 1, 1, 3, 3), (2, 3, 13, 13, 4, 5), (1, 2, 5, 17, 8, 8), (2, 1, 11, 3, 2, 4)]  # B, h, n, m, d, D
FORMS = [(False, False), (False, True), (True, False), (True, True)]  # causal, eps_outer
forms = pytest.mark.parametrize(("causal", "eps_outer"), FORMS, ids=["general", "images", "causal", "causal-outer"])


def inputs(B, h, n, m, d, D):
    generator = torch.Generator().manual_seed(42)
    shapes = (B, h, n, d), (B, h, m, d), (B, h, m, D)
    return [torch.randn(*s, generator=generator, dtype=torch.float64) for s in shapes]


def fitting(causal):
    return [case for case in CASES if not causal or case[2] == case[3]]


def loop(q, k, v, causal, eps_outer):
    """Token by token and head by head, every causal sum from its first token on."""
    B, h, n, _ = q.shape
    m, outer = k.shape[2], EPS if eps_outer else 0.0
    out = torch.zeros(B, h, n, v.shape[3], dtype=torch.float64)

    def product(x, vectors):
        return float((x + EPS) @ (sum(vectors) + EPS)) + outer

    def seen(i, vectors):
        return vectors[: i + 1] if causal else vectors

    def number(i):
        return i + 1 if causal else 1

    for b, head in itertools.product(range(B), range(h)):
        p, r, value = list(q[b, head].sigmoid()), list(k[b, head].sigmoid()), v[b, head]
        incoming = [number(i) / product(p[i], seen(i, r)) for i in range(n)]
        outgoing = [number(j) / product(r[j], seen(j, p)) for j in range(m)]
        given = [x * flow for x, flow in zip(p, incoming, strict=True)]
        taken = [x * flow for x, flow in zip(r, outgoing, strict=True)]
        weight = [math.exp(min(1.0, max(-1.0, product(r[j], seen(j, given)) / number(j)))) for j in range(m)]
        for i in range(n):
            conserved = product(p[i], seen(i, taken)) / number(i) * (1 if causal else n / m)
            scale = incoming[i] / number(i) / (1 + math.exp(-conserved))
            for j in range(i + 1 if causal else m):
                competition = weight[j] / sum(seen(j, weight)) * (number(j) if causal else m)
                out[b, head, i] += scale * float(p[i] @ r[j]) * competition * value[j]
    return out


@forms
def test_reference_is_the_definition(causal, eps_outer):
    for case in fitting(causal):
        tensors = inputs(*case)
        op_close(reference_flow_attention(*tensors, causal, eps_outer), loop(*tensors, causal, eps_outer))


def run(f, tensors, dtype):
    """Output and gradients, of tensors rounded to ``dtype``."""
    tensors = [t.to(dtype).requires_grad_() for t in tensors]
    out = f(*tensors)
    grad = torch.randn(out.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    return out.detach(), *torch.autograd.grad(out, tensors, grad.to(out.dtype))


@forms
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_against_the_reference(causal, eps_outer, dtype):
    """Output and every gradient, in chunks of every kind; inputs of half precision are computed with in float32."""
    for case, chunk in itertools.product(fitting(causal), (1, 4, 64) if causal else (64,)):
        rounded = [t.to(dtype).double() for t in inputs(*case)]
        truth = run(lambda *t: reference_flow_attention(*t, causal, eps_outer), rounded, torch.float64)
        found = run(lambda *t: flow_attention(*t, causal, eps_outer, chunk=chunk), rounded, dtype)  # noqa: B023
        assert found[0].dtype == dtype
        # a single source gives all there is: queries and keys change no more than the constants there
        for i, what in enumerate(("out", "dq", "dk", "dv")):
            if case[3] > 1 or what in ("out", "dv"):
                op_close(found[i], truth[i], grad=i > 0, what=f"{case} {chunk} {what}")


@forms
def test_gradcheck(causal, eps_outer):
    """First and second derivatives, where no source sits on the clamp, at which there is none."""
    q, k, v = inputs(1, 1, 4, 4, 2, 2)

    def free(q, k, v):
        return flow_attention(q, k, v, causal, eps_outer, chunk=3)

    tensors = [t.requires_grad_() for t in (0.1 * q, 0.1 * k, v)]
    assert torch.autograd.gradcheck(free, tensors)
    assert torch.autograd.gradgradcheck(free, tensors)


def test_flow_is_conserved():
    """Every sink takes in 1, every source gives out 1, and what competes is 1 on average, up to the constants."""
    q, k, _ = inputs(2, 3, 31, 47, 8, 8)
    p, r = q.sigmoid(), k.sigmoid()
    incoming, allocation, competition = flows(q, k)
    outgoing = flows(k, q)[0]  # sinks and sources change roles
    pairs = p @ r.transpose(-2, -1)
    by_sinks, by_sources = pairs * incoming[..., None], pairs * outgoing[..., None, :]
    for total in (by_sinks.sum(3), by_sources.sum(2), by_sinks.sum(2).mean(-1) * 47 / 31, competition.mean(-1)):
        close(total, torch.ones_like(total), "rerun")
    close(allocation, (by_sources.sum(3) * 31 / 47).sigmoid(), "rerun")
    close(competition, by_sinks.sum(2).clamp(max=1).softmax(-1) * 47, "rerun")


@pytest.mark.parametrize("eps_outer", [False, True])
def test_half_of_the_sources_sit_on_the_clamp(eps_outer):
    """Conservation makes 1 the mean of what is clamped at 1; those above it get no gradient through competition."""
    q, k, _ = inputs(1, 2, 400, 400, 8, 8)
    competition = flows(q, k, eps_outer=eps_outer)[2]
    clamped = (competition > competition.amax(-1, keepdim=True) * (1 - 1e-12)).double().mean()
    assert 0.4 < clamped < 0.6


def test_order_of_the_tokens_does_not_matter():
    q, k, v = inputs(2, 3, 13, 13, 4, 5)
    sinks, sources = torch.randperm(13), torch.randperm(13)
    found = flow_attention(q[:, :, sinks], k[:, :, sources], v[:, :, sources])
    op_close(found, flow_attention(q, k, v)[:, :, sinks])


def test_causal_form_sees_no_later_token():
    """Also across chunks, where a later token is multiplied before it is cut off."""
    q, k, v = (t.requires_grad_() for t in inputs(1, 2, 9, 9, 4, 4))
    out = flow_attention(q, k, v, causal=True, chunk=4)
    for grad in torch.autograd.grad(out[:, :, :6].square().sum(), (q, k, v)):
        assert not grad[:, :, 6:].any()
        assert grad[:, :, :6].any()
    op_close(out[:, :, :6].detach(), flow_attention(*(t.detach()[:, :, :6] for t in (q, k, v)), causal=True))


@forms
def test_padding_takes_no_part(causal, eps_outer):
    """Real tokens get what they get alone, wherever padding stands and whatever its values are; padding gets 0."""
    q, k, v = inputs(2, 3, 13, 13, 4, 5)
    real = torch.tensor([[0, 1, 1, 0, 0, 1, 1, 1, 0, 1, 0, 0, 0], [1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 0]]).bool()
    wild = v.masked_fill(~real[:, None, :, None], math.inf)
    tensors = [t.clone().requires_grad_() for t in (q, k, wild)]
    out = flow_attention(*tensors, causal, eps_outer, ~real, ~real, chunk=4)
    for b in range(2):
        alone = [t[b : b + 1, :, real[b]] for t in (q, k, v)]
        op_close(out[b : b + 1, :, real[b]].detach(), flow_attention(*alone, causal, eps_outer))
        assert not out[b, :, ~real[b]].any()
    for grad in torch.autograd.grad(out.square().sum(), tensors):
        assert grad.isfinite().all()


def test_padding_of_sources_alone():
    q, k, v = inputs(2, 3, 7, 13, 4, 5)
    mask = torch.arange(13).expand(2, -1) >= torch.tensor([[9], [13]])
    out = flow_attention(q, k, v, key_padding_mask=mask)
    op_close(out[:1], flow_attention(q[:1], k[:1, :, :9], v[:1, :, :9]))
    op_close(out[1:], flow_attention(q[1:], k[1:], v[1:]))


@pytest.mark.parametrize("causal", [False, True])
def test_nothing_but_padding_is_zero(causal):
    q, k, v = (t.requires_grad_() for t in inputs(1, 2, 5, 5, 3, 3))
    everything = torch.ones(1, 5, dtype=torch.bool)
    out = flow_attention(q, k, v, causal, False, everything, everything)
    assert not out.any()
    assert all(grad.isfinite().all() for grad in torch.autograd.grad(out.sum(), (q, k, v)))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_many_tokens_in_half_precision(dtype):
    """Sums over 3,136 tokens, which float16 would hold in steps of 0.5, are those of float32, autocast or not."""
    tensors = [t.to(dtype) for t in inputs(1, 2, 3136, 3136, 8, 8)]
    truth = flow_attention(*(t.double() for t in tensors), eps_outer=True)
    with torch.autocast("cpu", dtype=dtype):
        op_close(flow_attention(*tensors, eps_outer=True), truth)
        found = flow_attention(*(t.float() for t in tensors), eps_outer=True)
    op_close(found, truth)
    assert found.dtype == torch.float32


class Largest(TorchDispatchMode):
    """Elements of the largest tensor that an operator returns."""

    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if isinstance(out, torch.Tensor):
            self.elements = max(self.elements, out.numel())
        return out


@pytest.mark.parametrize("causal", [False, True])
def test_cost_and_memory_are_linear(causal):
    """Twice the tokens cost twice as much, and nothing is as large as the sums at every token, or as all pairs."""
    found = {}
    for n in (512, 1024):
        tensors = [torch.empty(1, 2, n, 32, device="meta") for _ in range(3)]
        with FlopCounterMode(display=False) as counter, Largest() as largest:
            flow_attention(*tensors, causal)
        found[n] = counter.get_total_flops() / 2, largest.elements
    assert found[1024] == tuple(2 * x for x in found[512])
    pairs = 2 * 1024 * 64 * 64 if causal else 0  # of each chunk with itself, twice, instead of with the tokens before
    assert found[1024][0] == 2 * 2 * 1024 * 32 * 32 + pairs
    assert found[1024][1] <= 2 * 1024 * 64


@pytest.mark.filterwarnings("ignore:`torch.jit:FutureWarning")
@pytest.mark.parametrize("causal", [False, True])
def test_script_and_export(causal):
    q, k, v = inputs(2, 3, 13, 13, 4, 5)
    mask = torch.zeros(2, 13, dtype=torch.bool)
    mask[:, 9:] = True
    expected = flow_attention(q, k, v, causal, False, mask, mask)
    op_close(torch.jit.script(flow_attention)(q, k, v, causal, False, mask, mask), expected)

    class Layer(torch.nn.Module):
        def forward(self, q, k, v):
            return flow_attention(q, k, v, causal)

    free = {2: torch.export.Dim.DYNAMIC}
    program = torch.export.export(Layer(), tuple(inputs(2, 3, 70, 70, 4, 5)), dynamic_shapes=(free,) * 3).module()
    for tokens in (131, 192):  # a causal program has several chunks
        longer = inputs(2, 3, tokens, tokens, 4, 5)
        op_close(program(*longer), flow_attention(*longer, causal))


@pytest.mark.parametrize(
    ("shapes", "arguments", "message"),
    [
        (((1, 2, 3), (1, 2, 3), (1, 2, 3)), {}, r"q \[1, 2, 3\].*need \[B, h, n, d\]"),
        (((1, 2, 3, 4), (1, 2, 3, 5), (1, 2, 3, 4)), {}, r"k \[1, 2, 3, 5\]"),
        (((1, 2, 3, 4), (1, 2, 3, 4), (1, 2, 4, 4)), {}, r"v \[1, 2, 4, 4\]"),
        (((1, 2, 0, 4), (1, 2, 3, 4), (1, 2, 3, 4)), {}, "at least one token"),
        (((1, 2, 3, 4), (1, 2, 4, 4), (1, 2, 4, 4)), {"causal": True}, "causal=True for 3 queries and 4 keys"),
        (((1, 2, 3, 4),) * 3, {"key_padding_mask": torch.ones(1, 3)}, r"key_padding_mask \[1, 3\] of torch.float32"),
        (
            ((1, 2, 3, 4),) * 3,
            {"query_padding_mask": torch.ones(1, 4).bool()},
            r"query_padding_mask \[1, 4\] of torch.bool, need bool \[1, 3\]",
        ),
        (((1, 2, 3, 4),) * 3, {"chunk": 0}, "chunk=0, need a whole number of at least 1"),
    ],
)
def test_rejects(shapes, arguments, message):
    with pytest.raises(ValueError, match=message):
        flow_attention(*(torch.zeros(s) for s in shapes), **arguments)
