"""NiNformer: recorded official outputs, other grids and windows, options, the loader."""

import pytest
import timm
import torch
from golden import image, load, names, weights
from panels import check_family_explains, explained
from tolerance import close, golden_close, op_close
from torch import nn

from vizoo.backbones import ninformer as family
from vizoo.backbones.ninformer import TokenMixing, _grid_of, checkpoint_filter_fn, gated, resize_token_weights

ARGS = {"ninformer_cifar_default": {}, "ninformer_small": {"embed_dim": 64, "depth": 2}}


def official(name):
    case = load(name)
    model = timm.create_model("ninformer_cifar", **ARGS[name]).eval()
    model.load_state_dict(checkpoint_filter_fn({"state_dict": weights(case.keys)}, model), strict=True)
    return case, model


@pytest.mark.parametrize("grad", [True, False], ids=["autograd", "inference"])
@pytest.mark.parametrize("name", names("ninformer_"))
def test_recorded_outputs(name, grad):
    case, model = official(name)
    gates = []
    block, method = model.blocks[0], type(model.blocks[0]).gate
    block.gate = lambda x: gates.append(method(block, x)) or gates[-1]
    with torch.set_grad_enabled(grad):
        tokens = model.forward_features(image(case.input_shape))
        golden_close(tokens.flatten(1, 2)[:, ::4, ::4], case.outputs["tokens"], "tokens")
        golden_close(gates[0].flatten(1, 2)[:, ::4, ::4], case.outputs["gate0"], "gate")
        golden_close(model.forward_head(tokens), case.outputs["logits"], "logits")


def token_weights(h=3, w=4, f=5):
    torch.manual_seed(0)
    return torch.randn(f, h * w), torch.randn(h * w, f), torch.randn(h * w)


@pytest.mark.parametrize("grid", [(6, 8), (5, 2), (1, 1), (3, 7)], ids=str)
def test_resized_weights_keep_row_sums(grid):
    """So a map that is constant over the tokens has the same hidden activations at every grid."""
    w1, w2, b2 = token_weights()
    a1, a2, c2 = resize_token_weights(w1, w2, b2, (3, 4), *grid)
    n = grid[0] * grid[1]
    assert (a1.shape, a2.shape, c2.shape) == ((5, n), (n, 5), (n,))
    close(a1.sum(1), w1.sum(1), "rerun")
    constant = resize_token_weights(w1, torch.ones(12, 5), torch.full((12,), 3.0), (3, 4), *grid)
    close(constant[1], torch.ones(n, 5), "rerun")  # no factor on the second layer
    close(constant[2], torch.full((n,), 3.0), "rerun")


def test_unchanged_grid_is_the_same_tensors():
    tensors = token_weights()
    assert all(a is b for a, b in zip(resize_token_weights(*tensors, (3, 4), 3, 4), tensors, strict=True))


def test_first_weights_are_resized_bicubically():
    w1, w2, b2 = token_weights()
    found = resize_token_weights(w1, w2, b2, (3, 4), 6, 6)[0]
    maps = nn.functional.interpolate(w1.reshape(5, 1, 3, 4), size=(6, 6), mode="bicubic", antialias=True).flatten(1)
    maps = maps * 12 / 36
    close(found - found.mean(1, keepdim=True), maps - maps.mean(1, keepdim=True), "rerun")


@pytest.mark.parametrize(
    ("size", "window", "windowed"),
    [
        ((7, 9), None, True),
        ((7, 5), None, False),
        ((4, 5), None, False),
        ((2, 3), True, True),
        ((9, 9), False, False),
    ],
    ids=str,
)
def test_other_maps(size, window, windowed):
    """By windows of the grid, zero-padded and cropped, or by resized weights."""
    torch.manual_seed(0)
    mixing = TokenMixing((3, 4), 5, window=window).double()
    x = torch.randn(2, *size, 6, dtype=torch.float64)
    fc1, fc2 = mixing.mlp.fc1, mixing.mlp.fc2

    def mix(x, w1, b1, w2, b2):
        x = x.flatten(1, 2).transpose(1, 2)
        return nn.functional.linear(nn.functional.gelu(nn.functional.linear(x, w1, b1)), w2, b2).transpose(1, 2)

    if windowed:
        expected = torch.zeros(2, 12, 12, 6, dtype=torch.float64)
        padded = torch.zeros_like(expected)
        padded[:, : size[0], : size[1]] = x
        for y in range(0, 12, 3):
            for n in range(0, 12, 4):
                part = padded[:, y : y + 3, n : n + 4]
                out = mix(part, fc1.weight, fc1.bias, fc2.weight, fc2.bias)
                expected[:, y : y + 3, n : n + 4] = out.reshape(part.shape)
        expected = expected[:, : size[0], : size[1]]
    else:
        w1, w2, b2 = resize_token_weights(fc1.weight, fc2.weight, fc2.bias, (3, 4), *size)
        expected = mix(x, w1, fc1.bias, w2, b2).reshape(x.shape)
    op_close(mixing(x), expected.detach())


def test_set_input_size_is_the_resized_pass():
    """Once and for all gives what every pass would give, and a checkpoint of the first loads into the second."""
    torch.manual_seed(0)
    dynamic = timm.create_model("test_ninformer", dynamic_img_size=True, window=False).eval()
    fixed = timm.create_model("test_ninformer").eval()
    fixed.load_state_dict(dynamic.state_dict())
    fixed.set_input_size((128, 64))
    loaded = timm.create_model("test_ninformer", img_size=(128, 64)).eval()
    loaded.load_state_dict(checkpoint_filter_fn(dynamic.state_dict(), loaded))
    x = image((2, 3, 128, 64))
    with torch.no_grad():
        close(fixed(x), dynamic(x), "rerun")
        close(loaded(x), dynamic(x), "rerun")
    assert fixed.blocks[0].token_mixing.mlp.fc1.in_features == 32
    fixed.train()(x).sum().backward()
    assert fixed.blocks[0].token_mixing.mlp.fc1.weight.grad.shape == (80, 32)
    fixed.set_input_size(patch_size=32)
    assert fixed(x).shape == (2, 1000)
    with pytest.raises(ValueError, match=r"got img_size=\(8, 8\) and patch_size=.*, need images of at least one patch"):
        fixed.set_input_size(8)


@pytest.mark.parametrize("size", [(33, 50), (200, 312), (96, 97)], ids=str)
def test_any_size(size):
    model = timm.create_model("test_ninformer", dynamic_img_size=True).eval()
    with torch.no_grad():
        final, features = model.forward_intermediates(image((1, 3, *size)))
    assert final.shape == (1, -(-size[0] // 16), -(-size[1] // 16), 40)
    assert torch.isfinite(final).all()
    assert [f.shape[2:] for f in features] == [final.shape[1:3]] * 3


def test_wrong_size_is_an_error():
    with pytest.raises(AssertionError, match=r"Input height \(64\) doesn't match model \(96\)"):
        timm.create_model("test_ninformer")(image((1, 3, 64, 96)))


def test_grids_of_checkpoints():
    assert _grid_of(196, (7, 7)) == (14, 14)
    assert _grid_of(32, (8, 4)) == (8, 4)
    assert _grid_of(72, (14, 7)) == (12, 6)
    assert _grid_of(72, (7, 14)) == (6, 12)
    assert _grid_of(7, (3, 3)) in ((7, 1), (1, 7))


def test_gate_is_wide_under_autocast():
    """The product of two half tensors beyond the range of float16."""
    u = torch.full((2, 3), 600.0, dtype=torch.float16)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert gated(u, u).dtype == torch.float32
        assert torch.isfinite(gated(u, u)).all()
    assert gated(u, u).dtype == torch.float16


def test_options():
    model = timm.create_model(
        "test_ninformer", final_norm=True, init_values=1e-4, weight_init="vit", drop_path_rate=0.1
    )
    assert "norm.weight" in model.state_dict()
    assert model.blocks[1].ls1.gamma.unique().tolist() == pytest.approx([1e-4])
    assert model.blocks[0].proj.weight.std().item() == pytest.approx(0.02, rel=0.1)
    assert model.blocks[0].proj.bias.abs().max() == 0
    x = image((2, 3, 96, 96))
    model.train()(x).sum().backward()
    with pytest.raises(ValueError, match="got weight_init='xavier', need 'reset' or 'vit'"):
        timm.create_model("test_ninformer", weight_init="xavier")


def test_dropout_only_trains():
    model = timm.create_model("test_ninformer", proj_drop_rate=0.5)
    x = image((1, 3, 96, 96))
    assert not torch.equal(model.train()(x), model(x))
    model.eval()
    close(model(x), model(x), "same")


def test_dropout_without_gradients():
    """Training mode drops, whether or not a gradient is recorded."""
    mlp = TokenMixing((3, 4), 64, drop=0.5).train().mlp
    x = torch.randn(4, 6, 12)
    for recorded in (True, False):
        with torch.set_grad_enabled(recorded):
            assert 0.4 < (mlp.hidden(x) == 0).float().mean() < 0.6


# explain


def test_explain_gates_reproduce_the_product():
    """What a block adds over the projection of its normed tokens is the gate, whose mean over the channels is shown."""
    model = timm.create_model("test_ninformer", dynamic_img_size=True, proj_drop_rate=0.5).eval()
    block, kept = model.blocks[1], []
    x = torch.randn(1, 3, 70, 100)
    handle = block.ls1.register_forward_hook(lambda _, args, out: kept.append(args[0]))
    with torch.no_grad():
        product = (model(x), kept[0])[1]
        normed = block.norm(model.blocks[0](model.patch_embed(x)))
        gate = block.gate(normed)
        op_close(gated(block.proj(normed), gate)[0], product[0].double())
    handle.remove()
    panels = explained(model, x, blocks=(1, -1, 0))
    close(panels[0].heat, gate[0].mean(-1), "rerun")
    assert [p.title[:15] for p in panels] == [f"Gate of block {i}" for i in (1, 2, 0)]
    rows, columns = gate.shape[1:3]
    patch = model.patch_embed.patch_size
    assert panels[0].area == (0, 0, rows * patch[0] / 70, columns * patch[1] / 100)
    assert panels[0].limits[0] == -panels[0].limits[1]


def test_explain_shows_first_middle_and_last():
    model = timm.create_model("test_ninformer", depth=5, in_chans=1).bfloat16()
    panels = explained(model, torch.randn(1, 1, *model.patch_embed.img_size).bfloat16())
    assert [p.title for p in panels] == [f"Gate of block {i} of 0 to 4" for i in (0, 2, 4)]
    model = timm.create_model("test_ninformer", depth=1)
    assert len(explained(model, torch.randn(1, 3, *model.patch_embed.img_size))) == 1


@pytest.mark.parametrize("blocks", [(3,), (0, 0), (), 1])
def test_explain_refuses(blocks):
    model = timm.create_model("test_ninformer", depth=3)
    with pytest.raises(ValueError, match="got blocks="):
        model.explain(torch.zeros(1, 3, *model.patch_embed.img_size), blocks=blocks)


def test_every_model_explains():
    check_family_explains(family)
