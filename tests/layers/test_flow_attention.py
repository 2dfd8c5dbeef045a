"""FlowAttention and FlowCrossAttention: recorded official outputs, masks, what they weigh, other networks."""

import re

import pytest
import timm
import torch
from changes import check_calls, check_changed_layers, check_transforms
from golden import image, load, weights
from tolerance import close, golden_close, op_close

from vizoo.backbones.layers import FlowAttention, FlowCrossAttention
from vizoo.tools.profiler import count


@pytest.mark.parametrize("grad", [True, False], ids=["autograd", "inference"])
@pytest.mark.parametrize("name", ["flow_attn_196_h12", "flow_attn_35_h4"])
def test_recorded_self_attention(name, grad):
    case = load(name)
    layer = FlowAttention(**case.meta["args"])
    layer.load_state_dict(weights(case.keys))
    seed = int(re.search(r"seed=(\d+)", case.meta["input"])[1])
    with torch.set_grad_enabled(grad):
        golden_close(layer(image(case.input_shape, seed)), case.outputs["out"], name)


@pytest.mark.filterwarnings("ignore:`torch.jit:FutureWarning")
@pytest.mark.parametrize("name", ["flow_cross", "flow_causal"])
def test_recorded_general_form(name):
    """The official names are ours."""
    case = load(name)
    args, seed = case.meta["args"], case.meta["seed"]
    layer = FlowCrossAttention(
        args["d_input"], args["n_heads"], hidden_dim=args["d_model"], out_dim=args["d_output"], proj_drop=0.05
    ).eval()
    layer.load_state_dict(weights(case.keys))
    queries = keys = image((2, case.meta["L"], args["d_input"]), seed)
    if name == "flow_cross":
        keys = image((2, case.meta["S"], args["d_input"]), seed + 1)
    causal = name == "flow_causal"
    golden_close(layer(queries, keys, is_causal=causal), case.outputs["out"], name)
    with torch.no_grad():
        golden_close(layer(queries, keys, keys, causal), case.outputs["out"], f"{name} inference")
        golden_close(torch.jit.script(layer)(queries, keys, is_causal=causal), case.outputs["out"], f"{name} scripted")


def test_constants_are_told_apart():
    """The two official forms differ where products with a sum are small: for few tokens of small features."""
    layer = FlowAttention(8, 2).double()
    torch.nn.init.constant_(layer.qkv.bias, -6.0)
    x = torch.randn(1, 2, 8, dtype=torch.float64)
    first = layer(x)
    layer.eps_outer = False
    assert 1e-4 < (layer(x) - first).norm() / first.norm() < 0.1


def test_takes_tokens_and_maps():
    layer = FlowAttention(8, 2)
    x = torch.randn(2, 3, 5, 8)
    close(layer(x).flatten(1, 2), layer(x.flatten(1, 2)), "same")
    close(layer(x, is_causal=True).flatten(1, 2), layer(x.flatten(1, 2), is_causal=True), "same")
    with pytest.raises(ValueError, match="no mask of pairs: got attn_mask"):
        layer(x, attn_mask=torch.ones(15, 15))


def test_causal_and_padded_tokens():
    """What comes later changes nothing, and neither does padding."""
    layer = FlowAttention(8, 2).double()
    x = torch.randn(2, 9, 8, dtype=torch.float64)
    with torch.no_grad():
        op_close(layer(x, is_causal=True)[:, :5], layer(x[:, :5], is_causal=True))
        padding = torch.arange(9).expand(2, -1) >= 5
        for causal in (False, True):
            out = layer(x, is_causal=causal, key_padding_mask=padding)
            op_close(out[:, :5], layer(x[:, :5], is_causal=causal))
            op_close(out[:, 5:], layer.proj.bias.expand(2, 4, 8))


def test_cross_attention_with_padding_and_other_values():
    layer = FlowCrossAttention(8, 2, source_dim=6, hidden_dim=12, out_dim=4, eps_outer=True).double()
    queries, keys, values = (torch.randn(2, n, c, dtype=torch.float64) for n, c in ((3, 8), (7, 6), (7, 6)))
    padding = torch.arange(7).expand(2, -1) >= 5
    with torch.no_grad():
        expected = layer(queries, keys[:, :5], values[:, :5])
        assert expected.shape == (2, 3, 4)
        op_close(layer(queries, keys, values, key_padding_mask=padding), expected)
        short = layer(queries[:, :2], keys, values)
        late = torch.tensor([[False, False, True]] * 2)
        op_close(layer(queries, keys, values, query_padding_mask=late)[:, :2], short)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_autocast_is_near_float64(dtype):
    """At 3,136 tokens, whose sums float16 cannot hold; what is rounded are the two layers' inputs and outputs."""
    layer = FlowAttention(24, 3)
    x = torch.randn(1, 3136, 24)
    with torch.autocast("cpu", dtype=dtype), torch.no_grad():
        out = layer(x)
    assert out.dtype == dtype
    with torch.no_grad():
        op_close(out, layer.double()(x.double()))


def test_shown_weights_are_what_the_pass_uses():
    layer = FlowAttention(12, 3).double()
    x = torch.randn(2, 3, 5, 12, dtype=torch.float64)
    with torch.no_grad():
        value = layer.qkv(x).flatten(1, 2)[..., 24:].unflatten(2, (3, 4)).transpose(1, 2)
        rows = torch.stack([layer.weights_at(x, i) for i in range(15)], 2)
        out = layer.proj((rows @ value).transpose(1, 2).flatten(2))
        op_close(layer(x).flatten(1, 2), out)
        _, allocation, competition = layer.flows(x)
    assert allocation.shape == competition.shape == (2, 3, 15)
    op_close(competition.mean(-1), torch.ones(2, 3, dtype=torch.float64))


@pytest.mark.parametrize("causal", [False, True])
def test_replaces_the_attention_of_timm_models(causal):
    """Class tokens take part like any other."""
    model = timm.create_model("test_vit", num_classes=4)
    for block in model.blocks:
        block.attn = FlowAttention(64, block.attn.num_heads)
    x = torch.randn(2, 3, 160, 160)
    features = model.forward_features(x, is_causal=causal)
    assert features.shape == (2, 101, 64)
    model.forward_head(features).square().mean().backward()
    assert all(p.grad is not None for b in model.blocks for p in b.attn.parameters())


def test_counted_cost_is_linear():
    """Of all tokens the attention costs twice as much as of half of them; softmax attention more."""
    macs = [count(FlowAttention(64, 4), torch.zeros(1, n, 64)).macs for n in (100, 200)]
    assert macs == [n * (4 * 64 * 64 + 2 * 64 * 16) for n in (100, 200)]
    soft = [count(timm.layers.Attention(64, 4), torch.zeros(1, n, 64)).macs for n in (100, 200)]
    assert soft[1] > 2.5 * soft[0]


def test_layers_of_cross_attention_are_called():
    """Hooks, pruning, quantisation, adapters, and transforms of torch.func."""
    layer = FlowCrossAttention(8, 2).eval()
    x = torch.randn(2, 5, 8)
    check_calls(layer, lambda m: m(x, x.flip(1)))
    check_changed_layers(layer, lambda m: m(x, x.flip(1)), x)
    check_transforms(layer, lambda call, x: call(x, x.flip(1), is_causal=True), x)


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: FlowAttention(10, 3), "dim=10 and num_heads=3"),
        (lambda: FlowCrossAttention(10, 3), "dim=10 and num_heads=3"),
        (lambda: FlowCrossAttention(9, 3, hidden_dim=10), "hidden_dim=10 and num_heads=3"),
    ],
)
def test_rejects(build, message):
    with pytest.raises(ValueError, match=message):
        build()
