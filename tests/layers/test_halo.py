"""HaloAttention: recorded outputs of timm's layer, the definition, and timm's models with ours."""

import itertools

import pytest
import timm
import torch
import torch.nn.functional as F
from golden import image, load, names, weights
from timm.layers.halo_attn import HaloAttn
from tolerance import close, golden_close, op_close

from vizoo.backbones.layers import HaloAttention, swap_halo


@pytest.mark.parametrize("grad", [True, False], ids=["autograd", "inference"])
@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("name", names("haloattn_"))
def test_attention(name, fused, grad):
    case = load(name)
    layer = HaloAttention(**case.meta["kwargs"])
    layer.fused_attn = fused
    layer.load_state_dict(weights(case.keys), strict=True)
    with torch.set_grad_enabled(grad):
        out = layer(image(case.input_shape))
    expected = case.outputs["out"]  # of wide outputs some channels
    golden_close(out[:, :: out.shape[1] // expected.shape[1]], expected, name)


# the attention by its definition


def by_definition(layer, x):
    """One query and one key at a time; ``x`` is ``[C, H, W]``."""
    q, kv = (F.conv2d(x[None], proj.weight, proj.bias)[0] for proj in (layer.q, layer.kv))
    h, d, b, r = layer.num_heads, layer.dim_head, layer.block_size, layer.halo_size
    (_, H, W), w, s = x.shape, b + 2 * r, layer.query_stride
    q, kv = q.unflatten(0, (h, d)), kv.unflatten(0, (h, -1))
    dv, step = kv.shape[1] - d, s if layer.rel_index == "pixel" else 1
    out = x.new_zeros(h, dv, -(-H // s), -(-W // s))
    for g, row, col in itertools.product(range(h), range(0, H, s), range(0, W, s)):
        query, logits, values = q[g, :, row, col], [], []
        for j, n in itertools.product(range(w), range(w)):
            y, z = row // b * b - r + j, col // b * b - r + n
            inside = 0 <= y < H and 0 <= z < W
            if not inside and layer.pad_mode == "mask":
                continue
            pair = kv[g, :, y, z] if inside else x.new_zeros(d + dv)
            height = layer.pos_embed.height_rel[j - row % b // s * step + w - 1]
            width = layer.pos_embed.width_rel[n - col % b // s * step + w - 1]
            relative = query @ (height + width) * (d**-0.5 if layer.scale_pos_embed else 1)
            logits.append(query @ pair[:d] * d**-0.5 + relative)
            values.append(pair[d:])
        out[g, :, row // s, col // s] = torch.stack(logits).softmax(0) @ torch.stack(values)
    return layer.pool(out.flatten(0, 1)[None])


@pytest.mark.parametrize(
    "options",
    [
        {"pad_mode": "mask"},
        {"pad_mode": "mask", "stride": 2},
        {"stride": 2, "rel_index": "pixel", "scale_pos_embed": True},
        {"stride": 2, "avg_down": True, "qkv_bias": True},
        {"stride": 2, "block_size": 3, "dim_out": 12, "qk_ratio": 2.0, "pad_mode": "mask"},
        {"block_size": 2, "halo_size": 0, "dim_head": 3},
    ],
    ids=str,
)
@pytest.mark.parametrize("fused", [True, False])
def test_attention_by_definition(options, fused):
    layer = HaloAttention(8, **{"num_heads": 2, "block_size": 4, "halo_size": 1, **options}, dtype=torch.float64)
    layer.fused_attn = fused
    x = torch.randn(2, 8, 5, 7, dtype=torch.float64)
    with torch.no_grad():
        op_close(layer(x), torch.cat([by_definition(layer, one) for one in x]))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_attention_in_half_precision(dtype):
    exact = HaloAttention(32, 48, num_heads=4, dim_head=8, dtype=torch.float64)
    half = HaloAttention(32, 48, num_heads=4, dim_head=8, dtype=dtype)
    half.load_state_dict(exact.state_dict())
    exact.load_state_dict(half.state_dict())
    x = torch.randn(2, 32, 18, 11, dtype=dtype)
    with torch.no_grad():
        op_close(half(x), exact(x.double()), grad=True)  # two roundings: of the projections and of the output


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_heads": 3}, "num_heads=3"),
        ({"stride": 3}, "stride=3"),
        ({"block_size": 0}, "block_size=0"),
        ({"halo_size": -1}, "halo_size=-1"),
        ({"pad_mode": "reflect"}, "pad_mode='reflect'"),
        ({"rel_index": "none"}, "rel_index='none'"),
    ],
)
def test_attention_refuses(arguments, message):
    with pytest.raises(ValueError, match=message):
        HaloAttention(8, **arguments)


def test_training_keeps_no_windows():
    """Saved for the backward pass: the input, its projections and the parameters; timm keeps windows and scores."""

    def saved(layer):
        storages = {}

        def pack(t):
            storages[t.untyped_storage().data_ptr()] = t  # holds it, so that no address is used twice
            return t

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            out = layer(x)
        return sum(t.untyped_storage().nbytes() for t in storages.values()), out

    theirs = HaloAttn(64, num_heads=4)
    x = image((1, 64, 32, 32)).requires_grad_()
    ours = swap_halo(theirs)
    parameters = sum(p.nbytes for p in ours.parameters())
    assert saved(ours)[0] <= parameters + 5 * x.nbytes  # x in both formats, q, k and v
    assert saved(theirs)[0] >= 5 * saved(ours)[0]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["haloregnetz_b", "lamhalobotnet50ts_256", "halo2botnet50ts_256", "halonet_h1"])
def test_swap(name):
    """Same parameters under the same names, same outputs."""
    model = timm.create_model(name, zero_init_last=False).eval()
    x = image((1, *model.pretrained_cfg["input_size"]))
    with torch.no_grad():
        expected = model(x)
        parameters = dict(model.named_parameters())
        assert swap_halo(model) is model
        assert not [m for m in model.modules() if isinstance(m, HaloAttn)]
        assert [m for m in model.modules() if isinstance(m, HaloAttention)]
        found = dict(model.named_parameters())
        assert list(found) == list(parameters)
        assert all(found[k] is parameters[k] for k in found)
        golden_close(model(x), expected)
        if not model.pretrained_cfg["fixed_input_size"]:
            assert model(image((1, 3, 120, 165))).shape == (1, 1000)


@pytest.mark.parametrize("options", [{}, {"stride": 2}, {"stride": 2, "avg_down": True}], ids=str)
def test_swap_layer(options):
    """Outputs and all gradients, on maps of whole blocks and on others, for which timm's input is padded with zeros."""
    options = {"dim_out": 48, "num_heads": 4, "dim_head": 5, "block_size": 4, **options}
    theirs = HaloAttn(16, scale_pos_embed=True, **options).eval()
    ours = swap_halo(theirs)
    assert isinstance(ours, HaloAttention)
    assert not ours.training
    parameters = dict(theirs.named_parameters())
    assert {n: id(p) for n, p in ours.named_parameters()} == {n: id(p) for n, p in parameters.items()}
    stride = options.get("stride", 1)
    for h, w in ((8, 12), (6, 10)):
        x = image((2, 16, h, w)).requires_grad_()
        expected = theirs(F.pad(x, [0, -w % 4, 0, -h % 4]))
        found = ours(x)
        expected = expected[:, :, : found.shape[2], : found.shape[3]]
        assert found.shape[2:] == (h // stride, w // stride)
        golden_close(found, expected)
        grad = torch.randn_like(expected)
        wanted = [x, *parameters.values()]
        gradients = (torch.autograd.grad(y, wanted, grad) for y in (found, expected))
        for key, a, b in zip(["input", *parameters], *gradients, strict=True):
            close(a, b, "gradient", key)


def test_swap_keeps_biases():
    theirs = HaloAttn(16, 48, num_heads=4, block_size=4, qkv_bias=True)
    for parameter in theirs.parameters():
        torch.nn.init.normal_(parameter)
    x = image((2, 16, 8, 12))
    with torch.no_grad():
        golden_close(swap_halo(theirs)(x), theirs(x))


# what pictures show


def window_values(layer, x):
    """Values of the window of every block: ``[rows of blocks, columns, h, w, w, dv]``; zeros off the map."""
    b, r, h = layer.block_size, layer.halo_size, layer.num_heads
    v = F.conv2d(x, layer.kv.weight, layer.kv.bias).unflatten(1, (h, -1))[0, :, layer.dim_head :]
    v = F.pad(v, [r, r + -x.shape[3] % b, r, r + -x.shape[2] % b])
    return v.unfold(2, b + 2 * r, b).unfold(3, b + 2 * r, b).permute(2, 3, 0, 4, 5, 1)


@pytest.mark.parametrize(
    "options",
    [
        {"pad_mode": "mask"},
        {"stride": 2, "rel_index": "pixel", "scale_pos_embed": True},
        {"stride": 2, "avg_down": True, "qkv_bias": True},
        {"stride": 2, "block_size": 3, "dim_out": 12, "qk_ratio": 2.0, "pad_mode": "mask"},
        {"block_size": 2, "halo_size": 0, "dim_head": 3},
        {"dtype": torch.bfloat16},
    ],
    ids=str,
)
@pytest.mark.parametrize("size", [(5, 7), (4, 8), (1, 3)], ids=str)
def test_weights_are_the_attention(options, size):
    """At every query, on whole and partial blocks: weights times values give the layer's output."""
    options = {"num_heads": 2, "block_size": 4, "halo_size": 1, "dtype": torch.float64, **options}
    layer = HaloAttention(8, **options)
    x = torch.randn(1, 8, *size, dtype=options["dtype"])
    layer.pool = torch.nn.Identity()
    with torch.no_grad():
        out, values = layer(x), window_values(layer, x)
        found = torch.zeros_like(out, dtype=torch.float64)
        for row, col in itertools.product(*map(range, out.shape[2:])):
            block = [i * layer.query_stride // layer.block_size for i in (row, col)]
            weights = layer.weights_at(x, row, col)[0]
            close(weights.sum((1, 2)), torch.ones_like(weights[:, 0, 0]), "rerun")
            found[0, :, row, col] = (weights.unsqueeze(3) * values[block[0], block[1]]).sum((1, 2)).flatten()
    op_close(out, found)
