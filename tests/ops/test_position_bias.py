"""The position bias that compiled inference keeps; its values in eager mode are tested with the attentions."""

import pytest
import torch
from graphs import compiled
from tolerance import close

from vizoo.backbones.layers import AggregatedAttention, LengthScaledAttention
from vizoo.backbones.ops import backend
from vizoo.backbones.ops import position_bias as family

pytestmark = pytest.mark.skipif(bool(backend.onednn_missing()), reason=f"no oneDNN path: {backend.onednn_missing()}")

MAPS = [(8, 6, 4, 3), (7, 5, 3, 2), (1, 9, 1, 4), (3, 4, 3, 4)]


@pytest.fixture(autouse=True)
def kept(monkeypatch):
    """A cache of this test's own."""
    monkeypatch.setattr(family, "_KEPT", family.BiasCache())
    return family._KEPT


def layer(dtype=torch.float32, **kwargs):
    out = AggregatedAttention(24, 4, pretrain_map=(5, 7), **kwargs).to(dtype).eval()
    for p in out.parameters():
        torch.nn.init.normal_(p, 0, 0.3)
    return out


def call(layer, *sizes):
    fc1, fc2 = layer.cpb_fc1, layer.cpb_fc2
    return torch.ops.vizoo.position_bias(fc1.weight, fc1.bias, fc2.weight, fc2.bias, *sizes, *layer.pretrain_map)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("sizes", MAPS, ids=str)
def test_operator(sizes, dtype, kept):
    """The network's values, kept and anew; a result that is written over leaves what is kept alone."""
    module = layer(dtype)
    with torch.no_grad():
        want = module._position_bias(torch.zeros(1, *sizes[:2], 24, dtype=dtype), *sizes[2:])
        for _ in range(3):
            found = call(module, *sizes)
            close(found, want, "same")
            assert found.dtype == torch.float32
            assert found.transpose(1, 2).is_contiguous()
            found.fill_(9)
    assert len(kept._entries) == 1
    fc1, fc2 = module.cpb_fc1, module.cpb_fc2
    arguments = fc1.weight.detach(), None, fc2.weight.detach(), fc2.bias.detach(), *sizes, 5, 7
    torch.library.opcheck(torch.ops.vizoo.position_bias.default, arguments)
    kept.limit = 0
    with torch.no_grad():
        close(call(module, *sizes), want, "same")
    del module, fc1, fc2, arguments
    assert not kept._entries


def test_compiled_inference():
    """One operator, whose values follow the weights; none of ours where somebody watches, or a gradient is recorded."""
    module, x = layer(), torch.randn(2, 6, 5, 24)
    whole = LengthScaledAttention(24, 4, pretrain_map=(5, 7)).eval()
    with torch.no_grad():
        for attention in (module, whole):
            names, out = compiled(attention, x)
            assert "vizoo.position_bias" in names
            close(out, attention(x), "layout")
        program = torch.compile(module, backend="aot_eager")
        program(x)
        for change in (lambda: module.cpb_fc2.weight.data.mul_(1.5), lambda: setattr(module, "pretrain_map", (9, 9))):
            change()
            close(program(x), module(x), "layout")
        resized = layer(bias_map=(4, 4))
        names, out = compiled(resized, x)
        assert "vizoo.position_bias" not in names
        close(out, resized(x), "layout")
        module.cpb_fc1.register_forward_hook(lambda module, args, out: out * 1.5)
        names, out = compiled(module, x)
        assert "vizoo.position_bias" not in names
        close(out, module(x), "layout")
    assert "vizoo.position_bias" not in compiled(layer(), x)[0]
