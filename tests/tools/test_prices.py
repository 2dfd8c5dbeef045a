"""Prices of operators, by hand, on meta, fake and real tensors, forward and backward; and those that have none."""

import warnings

import pytest
import torch
import torch.nn.functional as F
from hand_counts import Call
from torch import nn
from torch.utils.flop_counter import flop_registry

from vizoo.tools.profiling.counting import count, fvcore_counts
from vizoo.tools.profiling.prices import price_of
from vizoo.tools.profiling.recording import is_view

ENGINES = ("meta", "fake", "real")


def leaf(*shape, dtype=torch.float32):
    return torch.randn(*shape, dtype=dtype, requires_grad=True)


def figures(model, *inputs, engines=ENGINES):
    """Multiply-accumulates and other FLOPs, and multiply-accumulates with the backward pass, equal on all engines."""
    found = set()
    for engine in engines:
        forward, both = (count(model, *inputs, engine=engine, backward=b) for b in (False, True))
        assert (forward.status, both.status) == ("complete", "complete"), (engine, forward.reasons, both.reasons)
        found.add((forward.macs, forward.flops_other, both.macs, both.flops_other))
    assert len(found) == 1, found
    return found.pop()[:3]


def other_flops(model, *inputs, engines=ENGINES):
    found = [count(model, *inputs, engine=engine) for engine in engines]
    assert [c.reasons for c in found] == [[]] * len(engines)
    assert len({(c.macs, c.flops_other) for c in found}) == 1
    assert found[0].macs == 0
    return found[0].flops_other


# every operator of PyTorch has a price, or a reason to have none

ON_PURPOSE = {
    "aten::_fused_ad aten::_fused_sgd aten::_amp_": "steps of optimizers are no part of a model",
    "aten::_cudnn_attention aten::_flash_attention_forward_no_dropout": "the numbers of lengths decide",
    "aten::_test_ aten::_foobar mkldnn::_get": "nobody calls them",
    "torchvision::box_iou_rotated": "how boxes meet decides",
}
# what models call: neither compilers, exporters and processes among each other, nor packages that others imported
SPACES = {"aten", "quantized", "_quantized", "onednn", "mkldnn", "mkl", "sparse", "torchvision", "flex_lib"}


def unpriced():
    """Names of all operators on tensors that can reach a mode and that nobody prices."""
    for schema in torch._C._jit_get_all_schemas():
        space, _, short = schema.name.partition("::")
        if space not in SPACES or "out" in schema.overload_name.split("_") or short.endswith("_out"):
            continue  # as the others, into memory that is given
        if not any("Tensor" in str(value.type) for value in (*schema.arguments, *schema.returns)):
            continue
        try:
            func = getattr(getattr(getattr(torch.ops, space), short), schema.overload_name or "default")
            taken_apart = torch._C._dispatch_has_kernel_for_dispatch_key(func.name(), "CompositeImplicitAutograd")
        except (AttributeError, RuntimeError):  # of TorchScript alone
            continue
        if not (taken_apart or is_view(func) or func._overloadpacket in flop_registry or price_of(func, schema.name)):
            yield schema.name


def test_every_operator_has_a_price():
    reasons = tuple(name for names in ON_PURPOSE for name in names.split())
    assert {name for name in unpriced() if not name.startswith(reasons)} == set()


# attention


@pytest.fixture(scope="module")
def flex():
    return pytest.importorskip("torch.nn.attention.flex_attention")


def flex_cases(flex):
    """Model, shapes and FLOPs of modifying and masking a score."""
    attend, weight = flex.flex_attention, nn.Embedding(2, 256)
    compiled = torch.compile(attend)
    later = flex.create_block_mask(lambda b, h, i, j: i >= j, None, None, 128, 128, device="cpu")
    table = Call(lambda m, q: attend(q, q, q, score_mod=lambda s, b, h, i, j: s + m.w.weight[h, i - j + 128]), w=weight)
    return {
        "plain": (Call(lambda q: attend(q, q, q)), 0),
        "compiled": (Call(lambda q: compiled(q, q, q)), 0),
        "mask": (Call(lambda q: attend(q, q, q, block_mask=later)), 2),  # compared, then masked; no block is left out
        "table": (table, 3),  # two places, one sum
        "soft cap": (Call(lambda q: attend(q, q, q, score_mod=lambda s, *at: 20 * torch.tanh(s / 20))), 6),
    }


@pytest.mark.parametrize("kind", ["plain", "compiled", "mask", "table", "soft cap"])
def test_flex_attention(flex, kind):
    model, each = flex_cases(flex)[kind]
    q, scores = leaf(1, 2, 128, 16), 2 * 128 * 128
    engines = ("auto", "fake", "real") if kind == "mask" else ("auto", *ENGINES)  # the mask is where the CPU is
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        macs, other, both = figures(model, q, engines=engines)
    assert macs == scores * (16 + 16) == 1_048_576
    assert other == q.numel() + (5 + each) * scores
    assert both == macs + scores * (3 * 16 + 2 * 16)


def test_flex_attention_with_groups_and_sums(flex):
    q, k, v = leaf(2, 6, 10, 8), leaf(2, 2, 14, 8), leaf(2, 2, 14, 5)
    model = Call(lambda q, k, v: flex.flex_attention(q, k, v, enable_gqa=True, return_lse=True))
    macs, _, both = figures(model, q, k, v)
    assert macs == 2 * 6 * 10 * 14 * (8 + 5)
    assert both == macs + 2 * 6 * 10 * 14 * (3 * 8 + 2 * 5)


@pytest.mark.parametrize("reentrant", [False, True])
def test_flex_attention_in_a_checkpoint(flex, reentrant):
    from torch.utils.checkpoint import checkpoint

    model = Call(lambda q: checkpoint(lambda x: flex.flex_attention(x, x, x), q, use_reentrant=reentrant))
    scores = 2 * 16 * 16
    for engine in ENGINES:
        found = count(model, leaf(1, 2, 16, 4), backward=True, engine=engine)
        assert (found.macs, found.status) == (scores * (2 * 8 + 20), "complete")


def test_flex_attention_of_a_meta_model(flex):
    """And what modifies the scores is followed back to the layer that made it."""

    def attend(m, q):
        table = m.make(torch.ones(256, 4, device=q.device)).T
        out = flex.flex_attention(q, q, q, score_mod=lambda s, b, h, i, j: s + table[h, i - j + 128])
        return m.out(out)

    model = Call(attend, make=nn.Linear(4, 2), out=nn.Linear(16, 4)).to("meta")
    q = torch.empty(1, 2, 128, 16, device="meta", requires_grad=True)
    forward, both = count(model, q), count(model, q, backward=True)
    layers = 256 * 4 * 2 + 256 * 16 * 4
    assert (forward.macs, both.macs) == (1_048_576 + layers, 3_670_016 + 3 * layers - 2048)  # ones need no gradient
    assert (forward.modules["make"].macs, forward.modules["out"].macs) == (2048, 16384)
    assert (forward.status, both.status) == ("complete", "complete")


def test_flex_attention_is_left_as_it_was(flex):
    import torch._dynamo

    before = {name: getattr(flex, name) for name in vars(flex)}
    compiled = torch._dynamo.utils.counters["frames"].copy()
    q = torch.randn(1, 2, 8, 4)
    real = count(Call(lambda q: flex.flex_attention(q, q, q)), q, engine="real")
    assert real.engine == "cpu"
    assert {name: getattr(flex, name) for name in vars(flex)} == before
    assert torch._dynamo.utils.counters["frames"] == compiled
    with pytest.raises(ValueError, match="only supported on"):
        flex.flex_attention(*[q.to("meta")] * 3)


def test_real_flex_attention_has_its_numbers(flex):
    """What follows it may ask for them."""
    q = torch.randn(1, 1, 4, 4)
    expected = F.scaled_dot_product_attention(q, q, q)
    close = lambda out: (out - expected).abs().max().item() < 1e-5  # noqa: E731
    model = Call(lambda q: q @ q if close(flex.flex_attention(q, q, q)) else q)
    assert count(model, q, engine="real").macs == 4 * 4 * (4 + 4) + 64


# higher-order operators


def test_loops_are_counted_inside():
    from torch._higher_order_ops.map import map as each
    from torch._higher_order_ops.scan import scan

    x = leaf(4, 8, 8)
    assert figures(Call(lambda x: each(lambda a: a @ a, x)), x) == (4 * 512, 0, 12 * 512)
    model = Call(lambda x: scan(lambda carry, a: (carry @ a, carry + 1), x[0].clone(), x, dim=0)[0])
    macs, _, both = figures(model, x)
    assert macs in (4 * 512, 5 * 512)  # some releases take a step more, to see the shapes
    assert both == macs + 8 * 512


def test_a_branch_in_training():
    """It is the one that was taken."""
    model = Call(lambda x: torch.cond(x.sum() > 0, lambda a: a @ a, lambda a: a + 1, (x,)))
    taken = count(model, torch.ones(8, 8, requires_grad=True), backward=True)
    assert (taken.macs, taken.status) == (3 * 512, "partial")
    assert count(model, -torch.ones(8, 8, requires_grad=True), backward=True).macs == 0


# recurrent layers

RNN = {"LSTM": (nn.LSTM, 4, 28), "GRU": (nn.GRU, 3, 19), "RNN": (nn.RNN, 1, 5)}


@pytest.mark.parametrize(("layer", "gates", "unit"), RNN.values(), ids=RNN)
@pytest.mark.parametrize("bias", [True, False])
def test_recurrent_layer(layer, gates, unit, bias):
    """Ten steps of two sequences; all products but the first of the states have gradients of both factors."""
    macs, other, both = figures(layer(8, 16, bias=bias), torch.randn(10, 2, 8))
    into, states = 20 * gates * 16 * 8, 20 * gates * 16 * 16
    assert macs == into + states
    assert other == 20 * 16 * (unit + 2 * gates * bias)
    assert both == macs + into + states + 18 * gates * 16 * 16  # the input needs no gradient
    assert fvcore_counts(layer(8, 16, bias=bias), torch.randn(10, 2, 8))[""] == macs
    if layer is nn.LSTM:
        assert (macs, both) == (30_720, 79_872)


def test_deep_recurrent_layer():
    """Both directions, two layers, projections; the input and the first states need gradients, or not."""
    x, layer = leaf(3, 10, 8), nn.LSTM(8, 16, num_layers=2, bidirectional=True, proj_size=5, batch_first=True)
    steps = 30
    into, states, out = [steps * 2 * 64 * n for n in (8, 10)], 2 * steps * 2 * 64 * 5, 2 * steps * 2 * 5 * 16
    macs, _, both = figures(layer, x)
    assert macs == sum(into) + states + out
    assert both == 3 * macs - 2 * 3 * 2 * 64 * 5
    assert count(layer, x.detach(), backward=True).macs == both - into[0]
    first = torch.zeros(4, 3, 5, requires_grad=True), torch.zeros(4, 3, 16)
    assert count(layer, x, first, backward=True).macs == 3 * macs


def test_frozen_recurrent_layer():
    layer = nn.GRU(8, 16, num_layers=2)
    for p in layer.parameters():
        p.requires_grad_(p is layer.weight_ih_l1)
    x = torch.randn(10, 2, 8)
    below, above = 20 * 48 * (8 + 16), 20 * 48 * (16 + 16)
    assert figures(layer, x)[::2] == (below + above, below + above + 20 * 48 * 16 + 18 * 48 * 16)


@pytest.mark.parametrize("kind", RNN)
def test_recurrent_layer_equals_its_operators(kind):
    """As one operator it has the products that autograd's plain operators have."""
    layer, x = RNN[kind][0](8, 16, num_layers=2, bidirectional=True), torch.randn(10, 2, 8)
    whole = count(layer, x, backward=True)

    class Steps(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = layer

        def forward(self, x):
            with torch._C.DisableTorchFunction():  # so that nothing sees the layer as a whole
                return self.layer(x)

    steps = count(Steps(), x, backward=True, engine="meta")
    assert steps.macs == whole.macs
    assert steps.kernels > 20 * whole.kernels


@pytest.mark.parametrize(("layer", "gates", "unit"), RNN.values(), ids=RNN)
def test_packed_sequences(layer, gates, unit):
    """17 steps of 20; their lengths are no numbers of the input."""

    def run(m, x):
        packed = nn.utils.rnn.pack_padded_sequence(x, [10, 7])
        return nn.utils.rnn.pad_packed_sequence(m.layer(packed)[0])[0]

    macs, other, both = figures(Call(run, layer=layer(8, 16)), torch.randn(10, 2, 8), engines=("auto", "meta", "real"))
    assert (macs, other) == (17 * gates * 16 * 24, 17 * 16 * (unit + 2 * gates))
    assert both == 2 * macs + 15 * gates * 16 * 16

    def unsorted(m, x):
        packed = nn.utils.rnn.pack_padded_sequence(x, [7, 10], enforce_sorted=False)
        return nn.utils.rnn.pad_packed_sequence(m.layer(packed)[0])[0]

    found = count(Call(unsorted, layer=layer(8, 16)), torch.randn(10, 2, 8))
    assert (found.macs, found.reasons) == (macs, [])


CELLS = {"LSTMCell": (nn.LSTMCell, 4, 28), "GRUCell": (nn.GRUCell, 3, 19), "RNNCell": (nn.RNNCell, 1, 5)}


@pytest.mark.parametrize(("cell", "gates", "unit"), CELLS.values(), ids=CELLS)
def test_recurrent_cell(cell, gates, unit):
    macs, other, both = figures(cell(8, 16), torch.randn(4, 8))
    assert (macs, other, both) == (4 * gates * 16 * 24, 4 * 16 * (unit + 2 * gates), 2 * macs)


def test_fused_recurrent_operators():
    """Those of devices, called by name."""
    x, h, c = torch.randn(10, 2, 8), torch.zeros(1, 2, 16), torch.zeros(1, 2, 16)
    w, u, b = torch.randn(64, 8), torch.randn(64, 16), torch.randn(64)

    def cudnn(x, h, c):
        return torch._cudnn_rnn(x, [w, u, b, b], 4, None, h, c, 2, 16, 0, 1, False, 0.0, False, False, [], None)

    if torch.backends.mkldnn.is_available():
        onednn = Call(
            lambda x, h, c: torch.ops.aten.mkldnn_rnn_layer(
                x, w, u, b, b, h, c, False, [], 2, 16, 1, True, False, False, False
            )
        )
        found = count(onednn, x, h, c, engine="real")
        assert (found.macs, found.flops_other, found.status) == (30_720, 11_520, "complete")
    for name, gates, each in (("lstm", 4, 28), ("gru", 3, 19)):
        into, states = torch.empty(4, gates * 16, device="meta"), torch.empty(4, gates * 16, device="meta")
        bias, hidden = torch.empty(gates * 16, device="meta"), torch.empty(4, 16, device="meta")
        fused = getattr(torch.ops.aten, f"_thnn_fused_{name}_cell").default
        price = price_of(fused, f"aten::_thnn_fused_{name}_cell")
        shapes = [t.shape for t in (into, states, hidden, bias, bias)]
        assert price(*shapes, out=hidden.shape).other == 4 * 16 * (each + 2 * gates)
        assert price(*shapes[:3], out=hidden.shape).other == 4 * 16 * each
    shapes = (x.shape, [w.shape, u.shape, b.shape, b.shape], 4, None, h.shape, c.shape, 2, 16, 0, 1, False, 0.0)
    price = price_of(torch.ops.aten._cudnn_rnn.default, "aten::_cudnn_rnn")
    assert price(*shapes, False, False, [], None, out=(10, 2, 16))[:2] == (30_720, 11_520)


@pytest.mark.slow
def test_backward_of_a_recurrent_model():
    import timm

    model, x = timm.create_model("sequencer2d_s"), torch.randn(1, 3, 224, 224)
    macs, _, both = figures(model.eval(), x)
    assert 2.9 < both / macs < 3


# complex numbers


def cleaf(*shape):
    return leaf(*shape, dtype=torch.complex64)


COMPLEX = {  # real multiply-accumulates: forward, and with the backward pass
    "mm": (Call(torch.mm), [(3, 4), (4, 5)], 4 * 60, 12 * 60),
    "matmul": (Call(torch.matmul), [(2, 3, 4), (4, 5)], 4 * 120, 12 * 120),
    "bmm": (Call(torch.bmm), [(2, 3, 4), (2, 4, 5)], 4 * 120, 12 * 120),
    "addmm": (Call(torch.addmm), [(3, 5), (3, 4), (4, 5)], 4 * 60, 12 * 60),
    "baddbmm": (Call(torch.baddbmm), [(2, 3, 5), (2, 3, 4), (2, 4, 5)], 4 * 120, 12 * 120),
    "einsum": (Call(lambda a, b: torch.einsum("ij,kj->ik", a, b)), [(3, 4), (5, 4)], 4 * 60, 12 * 60),
    "linear": (nn.Linear(4, 6, dtype=torch.complex64), [(3, 4)], 4 * 72, 12 * 72),
    "dot": (Call(torch.dot), [(7,), (7,)], 4 * 7, 4 * 7),  # its gradients are no contractions
    "vdot": (Call(torch.vdot), [(7,), (7,)], 4 * 7, 4 * 7),
    "conv": (nn.Conv2d(3, 4, 3, dtype=torch.complex64), [(1, 3, 6, 6)], 3 * 1728, 9 * 1728),  # as three real ones
}


@pytest.mark.parametrize(("model", "shapes", "macs", "both"), COMPLEX.values(), ids=COMPLEX)
def test_complex_products(model, shapes, macs, both):
    found = figures(model, *(cleaf(*shape) for shape in shapes))
    assert found[::2] == (macs, both)


def test_complex_numbers_elsewhere():
    """Twice the real ones, three times in products; modules hold them as well."""
    x = cleaf(3, 4).detach()
    assert other_flops(Call(lambda x: x + x), x) == 2 * 12
    assert other_flops(Call(lambda x: x * x), x) == 6 * 12
    assert other_flops(Call(lambda x: torch.fft.fft(x)), x) == 5 * 12 * 2
    assert other_flops(Call(torch.linalg.inv), cleaf(5, 5).detach()) == 4 * 2 * 125
    assert other_flops(Call(torch.linalg.eigvals), torch.randn(5, 5)) == 10 * 125
    found = count(nn.Sequential(nn.Linear(4, 6, dtype=torch.complex64)), x)
    assert (found.modules["0"].macs, found.flops_other) == (4 * 72, 2 * 18)


# sparse tensors


@pytest.mark.filterwarnings("ignore:Sparse CSR tensor support")
def test_sparse_products():
    """Stored numbers times columns; without numbers as if all were stored, which the count says."""
    a, x = torch.zeros(6, 6), leaf(6, 4)
    a[0, 1] = a[2, 3] = a[5, 5] = 1.0
    for sparse in (a.to_sparse(), a.to_sparse_csr()):
        for model in (Call(torch.matmul), Call(torch.sparse.mm)):
            found = count(model, sparse, x)
            assert (found.macs, found.status, found.engine) == (3 * 4, "complete", "cpu")
            assert count(model, sparse, x, backward=True).macs == 2 * 3 * 4
            dense = count(model, sparse, x, engine="fake")
            assert dense.macs == 6 * 6 * 4
            assert dense.statuses["macs"] == "partial"
            assert "reads sparse tensors: counted as dense" in dense.reasons[0]


# quantised layers


@pytest.fixture
def quantization():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if "x86" not in torch.backends.quantized.supported_engines:
            pytest.skip("needs a PyTorch with quantised operators for x86")
        yield torch.ao.quantization


@pytest.mark.parametrize("engine", ["auto", *ENGINES])
def test_dynamic_quantization(quantization, engine):
    """Recurrent layers cost what the plain ones cost."""
    linear = quantization.quantize_dynamic(nn.Sequential(nn.Linear(8, 6), nn.ReLU()), {nn.Linear})
    found = count(linear, torch.randn(4, 8), engine=engine)
    assert (found.macs, found.flops_other, found.status) == (4 * 48, 3 * 24, "complete")
    assert found.modules["0"].macs == 4 * 48
    x = torch.randn(10, 2, 8)
    plain = {layer: nn.Sequential(layer(8, 16, num_layers=2, bidirectional=True)) for layer in (nn.LSTM, nn.GRU)}
    plain |= {cell: nn.Sequential(cell(8, 16)) for cell in (nn.LSTMCell, nn.GRUCell, nn.RNNCell)}
    for layer, model in plain.items():
        given = x[0] if "Cell" in layer.__name__ else x
        expected, found = (
            count(model, given),
            count(quantization.quantize_dynamic(model, {layer}), given, engine=engine),
        )
        assert (found.macs, found.flops_other, found.acts) == (expected.macs, expected.flops_other, expected.acts)
        assert found.status == "complete"


@pytest.mark.parametrize("engine", ENGINES)
def test_dynamic_quantization_to_half_precision(quantization, engine):
    """Packed weights are no copies: to copy them among tensors without numbers ends the process."""
    model = quantization.quantize_dynamic(nn.Sequential(nn.Linear(8, 6)), {nn.Linear}, torch.float16)
    assert count(model, torch.randn(4, 8), engine=engine).macs == 4 * 48


def test_weights_that_wrap_others():
    """Their parts are constants of the model, and its bytes."""
    from torchao.quantization import Int8WeightOnlyConfig, quantize_

    model, x = nn.Sequential(nn.Linear(64, 32, bias=False)).bfloat16(), torch.randn(2, 64).bfloat16()
    quantize_(model, Int8WeightOnlyConfig())
    for engine in ENGINES:
        found = count(model, x, engine=engine)
        assert (found.macs, found.status) == (2 * 64 * 32, "complete")
        assert found.state_bytes["int8"] == 64 * 32 + 32  # and a zero point for each row


def test_static_quantization(quantization):
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.enter, self.leave = quantization.QuantStub(), quantization.DeQuantStub()
            self.conv, self.back, self.fc = nn.Conv2d(4, 8, 3, groups=2), nn.ConvTranspose2d(8, 4, 3), nn.Linear(4, 5)

        def forward(self, x):
            return self.leave(self.fc(self.back(self.conv(self.enter(x))).mean((2, 3))))

    model, x = Model().eval(), torch.randn(1, 4, 8, 8)
    model.qconfig = quantization.get_default_qconfig("x86")
    model.back.qconfig = quantization.default_qconfig
    quantization.prepare(model, inplace=True)
    model(x)
    quantization.convert(model, inplace=True)
    found = count(model, x)
    assert found.status == "complete"
    assert [found.modules[name].macs for name in ("conv", "back", "fc")] == [36 * 8 * 2 * 9, 36 * 8 * 4 * 9, 20]
    assert found.modules["conv"].other == 2 * 36 * 8
    assert found.modules["enter"].other == 2 * x.numel()


def test_products_of_small_numbers():
    a, b = (torch.randint(-8, 8, shape, dtype=torch.int8) for shape in ((32, 16), (16, 32)))
    for engine in ENGINES:
        assert count(Call(torch._int_mm), a, b, engine=engine).macs == 32 * 16 * 32
        found = count(Call(torch._weight_int8pack_mm), torch.randn(4, 32), b, torch.rand(16), engine=engine)
        assert (found.macs, found.flops_other) == (4 * 32 * 16, 2 * 4 * 16)


# rarer products

PRODUCTS = {  # other arguments, forward, backward
    "bilinear": (nn.Bilinear(3, 4, 5), [(7, 3), (7, 4)], 7 * 5 * (3 * 4 + 4), None),
    "addbmm": (Call(torch.addbmm), [(3, 5), (2, 3, 4), (2, 4, 5)], 120, 360),
    "addr": (Call(torch.addr), [(3, 5), (3,), (5,)], 15, 45),
    "addmm in place": (Call(lambda x, a, b: x.clone().addmm_(a, b)), [(3, 5), (3, 4), (4, 5)], 60, 180),
    "baddbmm in place": (Call(lambda x, a, b: x.clone().baddbmm_(a, b)), [(2, 3, 5), (2, 3, 4), (2, 4, 5)], 120, 360),
    "pdist": (Call(F.pdist), [(6, 4)], 15 * 4, 3 * 15 * 4),
    "cdist": (Call(lambda a, b: torch.cdist(a, b, p=1)), [(6, 4), (5, 4)], 120, 360),
    "conv_tbc": (Call(lambda x, w, b: torch.conv_tbc(x, w, b, 1)), [(7, 2, 3), (3, 3, 5), (5,)], 7 * 2 * 45, None),
}


@pytest.mark.parametrize(("model", "shapes", "macs", "both"), PRODUCTS.values(), ids=PRODUCTS)
def test_rarer_products(model, shapes, macs, both):
    inputs = [leaf(*shape) for shape in shapes]
    found = figures(model, *inputs)
    assert found[0] == macs
    if isinstance(model, nn.Bilinear):
        assert fvcore_counts(model, *inputs)[""] == macs
    assert found[2] == both or (both is None and 2 * macs < found[2] <= 4 * macs)


@pytest.mark.skipif(not hasattr(torch, "_grouped_mm"), reason="this PyTorch has no grouped product")
def test_grouped_products():
    """Rows in groups, matrices in groups, and what is summed over in groups."""
    rows, weights = leaf(16, 8, dtype=torch.bfloat16), leaf(2, 8, 16, dtype=torch.bfloat16)
    ends = torch.tensor([8, 16], dtype=torch.int32)
    assert figures(Call(lambda a, b, e: torch._grouped_mm(a, b, offs=e)), rows, weights, ends)[::2] == (2048, 3 * 2048)
    each = leaf(2, 24, 8, dtype=torch.bfloat16)
    assert figures(Call(torch._grouped_mm), each, weights)[::2] == (2 * 24 * 8 * 16, 3 * 2 * 24 * 8 * 16)


@pytest.mark.skipif(not hasattr(F, "linear_cross_entropy"), reason="this PyTorch has no such loss")
def test_linear_layer_with_its_loss():
    """Its forward pass computes the gradients beside."""
    options = nn.LinearCrossEntropyOptions(batch_chunk_size=8)
    model = Call(lambda x, w, y: F.linear_cross_entropy(x, w, y, options=options))
    assert figures(model, leaf(40, 16), leaf(30, 16), torch.randint(0, 30, (40,)))[::2] == (19_200, 57_600)


# no products

LINALG = {  # FLOPs of one 6 x 6 matrix, or of 8 x 6
    "cholesky": (lambda a: torch.linalg.cholesky_ex(a)[0], (6, 6), 6**3 / 3),
    "lu": (lambda a: torch.linalg.lu_factor(a)[0], (6, 6), 2 * 6**3 / 3),
    "lu of 8 x 6": (lambda a: torch.linalg.lu(a)[1], (8, 6), 2 * 8 * 36 - 14 * 36 + 2 * 6**3 / 3),
    "det": (torch.linalg.det, (6, 6), 2 * 6**3 / 3),
    "inverse": (torch.linalg.inv, (6, 6), 2 * 6**3),
    "qr": (lambda a: torch.linalg.qr(a)[0], (8, 6), 2 * (2 * 8 * 36 - 2 * 6**3 / 3)),
    "svd": (lambda a: torch.linalg.svd(a, full_matrices=False)[0], (8, 6), 14 * 8 * 36 + 8 * 6**3),
    "svdvals": (torch.linalg.svdvals, (8, 6), 4 * 8 * 36 - 4 * 6**3 / 3),
    "eigh": (lambda a: torch.linalg.eigh(a)[1], (6, 6), 9 * 6**3),
    "eigvalsh": (torch.linalg.eigvalsh, (6, 6), 4 * 6**3 / 3),
    "eig": (lambda a: torch.linalg.eig(a)[0], (6, 6), 25 * 6**3),
    "matrix_exp": (torch.linalg.matrix_exp, (6, 6), 10 * 6**3),
}


@pytest.mark.parametrize(("fn", "shape", "flops"), LINALG.values(), ids=LINALG)
def test_linear_algebra(fn, shape, flops):
    assert other_flops(Call(fn), torch.randn(2, *shape)) == 2 * round(flops)
    assert count(Call(fn), leaf(2, *shape), backward=True, engine="meta").uncounted == {}


def test_solutions():
    a, b = torch.randn(6, 6), torch.randn(6, 3)
    assert other_flops(Call(lambda a: torch.linalg.qr(a, mode="r")[1]), a) == 4 * 6**3 / 3
    assert other_flops(Call(torch.linalg.solve), a, b) == 2 * 6**3 / 3 + 2 * 36 * 3
    assert other_flops(Call(lambda a, b: torch.linalg.solve_triangular(a, b, upper=True)), a, b) == 36 * 3
    assert other_flops(Call(torch.cholesky_solve), b, a) == 2 * 36 * 3


ELEMENTS = {  # FLOPs for [5, 4]
    "unsafe_split": (lambda x: torch.unsafe_split(x, 2)[0], 0),
    "weight norm": (lambda x: torch._weight_norm(x, x[:, :1], 0), 3 * 20),
    "renorm": (lambda x: torch.renorm(x, 2, 0, 1.0), 2 * 20),
    "histc": (lambda x: torch.histc(x, 10), 20),
    "index_reduce": (lambda x: x.clone().index_reduce_(0, torch.zeros_like(x[:, 0], dtype=torch.long), x, "mean"), 0),
    "logcumsumexp": (lambda x: torch.logcumsumexp(x, 0), 20),
    "loss": (lambda x: F.mse_loss(x, x), 3 * 20),
    "foreach": (lambda x: torch._foreach_mul([x, x], 2.0)[0], 2 * 20),
}


@pytest.mark.parametrize(("fn", "flops"), ELEMENTS.values(), ids=ELEMENTS)
def test_elements(fn, flops):
    assert other_flops(Call(fn), torch.rand(5, 4)) == flops
    assert count(Call(fn), leaf(5, 4), backward=True, engine="fake").uncounted == {}
