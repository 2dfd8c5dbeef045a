"""HiLo: recorded official outputs, maps and tokens of any size, other networks."""

import pytest
import timm
import torch
from golden import image, load, weights
from tolerance import close, golden_close, op_close

from vizoo.backbones.layers import HiLo

HILO = [(path, case) for path in ("litv2_hilo_14x14", "litv2_hilo_pad") for case in load(path)[1]["cases"]]


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize(("path", "case"), HILO)
def test_hilo(path, case, fused):
    keys, meta, shape, outputs = load(path)
    args = dict(meta["cases"][case])
    size = (args.pop("H"), args.pop("W"))
    layer = HiLo(**args)
    layer.fused_attn = fused
    state = weights(keys)
    layer.load_state_dict({k.removeprefix(f"{case}."): v for k, v in state.items() if k.startswith(f"{case}.")})
    x = image(shape)[:, : size[0] * size[1]].contiguous().requires_grad_()
    out = layer(x, size)
    golden_close(out, outputs[case], case)
    with torch.no_grad():
        golden_close(layer(x, size), outputs[case], f"{case} inference")
    if f"{case}_dx" in outputs:
        (dx,) = torch.autograd.grad(out, x, image(out.shape, seed=1))
        golden_close(dx, outputs[f"{case}_dx"], f"{case} input gradient")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"dim": 10, "num_heads": 3}, "num_heads=3"),
        ({"dim": 8, "window_size": 0}, "window_size=0"),
        ({"dim": 8, "alpha": 1.5}, "alpha=1.5"),
    ],
)
def test_hilo_rejects(arguments, message):
    with pytest.raises(ValueError, match=message):
        HiLo(**arguments)


def test_hilo_head_split_truncates():
    splits = {(12, 0.7): 8, (12, 0.9): 10, (16, 0.9): 14, (12, 0.2): 2, (12, 0.05): 0, (12, 1.0): 12}
    for (heads, alpha), low in splits.items():
        layer = HiLo(heads * 4, heads, alpha=alpha)
        assert (layer.l_heads, layer.h_heads) == (low, heads - low)
    assert HiLo(12, 3, window_size=1, alpha=0.0).l_heads == 3  # a window of 1 is plain attention


@pytest.mark.parametrize("alpha", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("size", [(1, 1), (2, 3), (3, 8)])
def test_hilo_on_maps_smaller_than_the_window(alpha, size):
    torch.manual_seed(0)
    layer = HiLo(8, 2, window_size=4, alpha=alpha).double()
    x = torch.randn(2, *size, 8, dtype=torch.float64, requires_grad=True)
    out = layer(x)
    H, W = (-(-n // 4) * 4 for n in size)
    padded = torch.zeros(2, H, W, 8, dtype=torch.float64)
    padded[:, : size[0], : size[1]] = x.detach()
    op_close(out.detach(), layer(padded)[:, : size[0], : size[1]].detach())
    (dx,) = torch.autograd.grad(out.sum(), x)
    assert torch.isfinite(dx).all()


def test_hilo_takes_tokens_and_maps():
    torch.manual_seed(0)
    layer = HiLo(8, 2)
    x = torch.randn(2, 3, 5, 8)
    op_close(layer(x.flatten(1, 2), (3, 5)).double(), layer(x).flatten(1, 2).double())
    square = torch.randn(1, 16, 8)
    op_close(layer(square).double(), layer(square, [4, 4]).double())
    with pytest.raises(ValueError, match="got 15 tokens for a 3x3 map"):
        layer(x.flatten(1, 2))
    with pytest.raises(ValueError, match="no attention mask"):
        layer(square, attn_mask=torch.zeros(16, 16))


@pytest.mark.parametrize("name", ["test_vit", "pvt_v2_b0"])
def test_hilo_replaces_the_attention_of_timm_models(name):
    kwargs = {"class_token": False, "global_pool": "avg"} if name == "test_vit" else {}
    model = timm.create_model(name, num_classes=4, **kwargs)
    for module in model.modules():
        if hasattr(module, "attn") and hasattr(module, "mlp"):
            dim = module.norm1.normalized_shape[0]
            module.attn = HiLo(dim, module.attn.num_heads, qkv_bias=True)
    size = model.pretrained_cfg["input_size"][-1]
    out = model(torch.randn(2, 3, size, size))
    out.square().mean().backward()
    assert out.shape == (2, 4)
    assert all(p.grad is not None for m in model.modules() if isinstance(m, HiLo) for p in m.parameters())


@pytest.mark.parametrize("kept", ["h", "l"])
def test_hilo_parts_are_those_of_its_heads(kept):
    """What the other heads' last layer gives does not matter, and together they are the output."""
    layer = HiLo(24, 4, alpha=0.25)
    x = torch.randn(1, 5, 7, 24)
    with torch.no_grad():
        parts = layer.parts(layer(x))
        assert torch.equal(torch.cat(parts, -1), layer(x))
        assert [part.shape[-1] for part in parts] == [18, 6]
        for p in (layer.l_proj if kept == "h" else layer.h_proj).parameters():
            p.zero_()
        high, low = layer.parts(layer(x))
    close(*((high, parts[0]) if kept == "h" else (low, parts[1])), "rerun")
    assert not (low if kept == "h" else high).any()
