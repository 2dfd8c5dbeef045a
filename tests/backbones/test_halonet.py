"""HaloNet: recorded outputs, the family table, options, sizes, and timm's models with our attention."""

import pytest
import timm
import torch
from golden import image, load, weights
from panels import check_family_explains, explained
from tolerance import close, golden_close
from zoo import build

import vizoo  # noqa: F401
from vizoo.backbones import halonet
from vizoo.backbones.halonet import checkpoint_filter_fn
from vizoo.backbones.layers import HaloAttention
from vizoo.tools.profiler import count

# of the family table: parameters, GMACs at 224x224; those at the paper's sizes are recorded in models.csv
FAMILY = {
    "halo_h0": (5502248, 1.89),
    "halo_h1": (8101352, 2.39),
    "halo_h2": (9405608, 2.65),
    "halo_h3": (11842792, 3.48),
    "halo_h4": (19103464, 4.94),
    "halo_h5": (30718952, 8.24),
    "halo_h6": (43458280, 10.60),
    "halo_h7": (67434728, 16.94),
}
HYBRIDS = {  # timm's name, parameters in millions, GMACs
    "halo_26t": ("halonet26t", 12.48, 3.17),
    "halo_se33ts": ("sehalonet33ts", 13.69, 3.53),
    "halo_50ts": ("halonet50ts", 22.73, 5.27),
    "halo_eca26ts": ("eca_halonext26ts", 10.76, 2.42),
    "halo_regnetz_b": ("haloregnetz_b", 11.68, 1.95),
}
MODELS = {
    "timm_halonet26t": "halo_26t",
    "timm_halonet26t_224_zeropad": "halo_26t",
    "halonet_h0_peer": "halo_h0",
    "halonet_h6_peer_192": "halo_h6",
}
both_paths = pytest.mark.parametrize("grad", [True, False], ids=["autograd", "inference"])


def gmacs(model, size):
    return round(count(model, torch.empty(1, 3, *size, device="meta")).macs / 1e9, 2)


# recorded outputs


@pytest.mark.parametrize("name", MODELS)
def test_model(name):
    case = load(name)
    model = timm.create_model(MODELS[name]).eval()
    assert list(model.state_dict()) == list(case.keys)
    model.load_state_dict(checkpoint_filter_fn({"state_dict": weights(case.keys)}, model), strict=True)
    for grad in (True, False):
        with torch.set_grad_enabled(grad):
            golden_close(model(image(case.input_shape)), case.outputs["logits"], f"{name}, gradients {grad}")


def test_features_of_odd_size():
    """The feature net has the state dict of timm's."""
    case = load("timm_halonet26t_feats_200x264_zeropad")
    model = timm.create_model("halo_26t", features_only=True, out_indices=(1, 2, 3, 4)).eval()
    model.load_state_dict(weights(case.keys), strict=True)
    with torch.no_grad():
        features = model(image(case.input_shape))
    assert [list(f.shape) for f in features] == case.meta["full_shapes"]
    for i, (feature, s) in enumerate(zip(features, (4, 2, 1, 1), strict=True)):
        golden_close(feature[:, ::16, ::s, ::s], case.outputs[f"feat{i}"], f"level {i}")


# the family


@pytest.mark.parametrize("name", FAMILY)
def test_family_table(name):
    model = build(name, device="meta")
    assert (sum(p.numel() for p in model.parameters()), gmacs(model, (224, 224))) == FAMILY[name]


def test_heads_change_the_tables_only():
    shapes = [
        {
            k: tuple(v.shape)
            for k, v in timm.create_model("halo_h1", device="meta", num_heads=heads).state_dict().items()
        }
        for heads in ((4, 8, 8, 8), 8)
    ]
    changed = {k for k in shapes[0] if shapes[0][k] != shapes[1][k]}
    assert changed == {f"stages.0.{i}.self_attn.pos_embed.{t}_rel" for i in range(3) for t in ("height", "width")}
    assert shapes[0]["stages.0.0.self_attn.pos_embed.height_rel"] == (27, 16)


@pytest.mark.slow
def test_timms_h1_loads():
    theirs = timm.create_model("halonet_h1", zero_init_last=False).eval()
    ours = timm.create_model("halo_h1", num_heads=8).eval()
    ours.load_state_dict(theirs.state_dict(), strict=True)
    x = image((1, 3, 256, 256))
    with torch.no_grad():
        golden_close(ours(x), theirs(x))


@pytest.mark.parametrize("stages", [(), (0, 1), (3,), (0, 1, 2, 3)], ids=str)
def test_convolutional_stages(stages):
    model = timm.create_model("test_halonet", conv_stages=stages).eval()
    with_attention = {n.split(".")[1] for n, m in model.named_modules() if isinstance(m, HaloAttention)}
    assert with_attention == {str(i) for i in range(4) if i not in stages}
    for i in stages:
        conv = model.stages[i][0].conv2_kxk.conv
        assert (conv.in_channels, conv.out_channels, conv.kernel_size) == (16 * 2**i, 16 * 2**i, (3, 3))
    assert len(model.no_weight_decay()) == 2 * sum(isinstance(m, HaloAttention) for m in model.modules())
    assert model(image((1, 3, 64, 96))).shape == (1, 1000)


def test_options_arrive():
    model = timm.create_model(
        "test_halonet", act_layer="silu", pad_mode="mask", rel_index="pixel", embed_dim=32, block_size=6, halo_size=2
    )
    layers = [m for m in model.modules() if isinstance(m, HaloAttention)]
    assert {(m.pad_mode, m.rel_index, m.block_size, m.halo_size) for m in layers} == {("mask", "pixel", 6, 2)}
    assert not [m for m in model.modules() if isinstance(m, torch.nn.ReLU)]
    assert model.stem.conv1.conv.out_channels == 32
    assert layers[0].q.weight.shape == (64, 64, 1, 1)  # of the second stage


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_heads": (2, 2)}, r"num_heads=\(2, 2\)"),
        ({"num_heads": 3}, "num_heads=3"),
        ({"conv_stages": (4,)}, r"conv_stages=\(4,\)"),
        ({"embed_dim": 16, "rb": 1.25}, "rb=1.25"),
        ({"pad_mode": "reflect"}, "pad_mode='reflect'"),
    ],
)
def test_model_refuses(arguments, message):
    with pytest.raises(ValueError, match=message):
        timm.create_model("test_halonet", device="meta", **arguments)


@pytest.mark.parametrize("name", ["test_halonet", "test_halonet_hybrid"])
@pytest.mark.parametrize("size", [(32, 32), (33, 200), (193, 65)], ids=str)
def test_any_size(name, size):
    model = timm.create_model(name).eval()
    x = image((2, 3, *size)).requires_grad_()
    final, features = model.forward_intermediates(x)
    h, w = size
    for feature in features:
        h, w = -(-h // 2), -(-w // 2)
        assert feature.shape[2:] == (h, w)
    final.square().mean().backward()
    assert torch.isfinite(x.grad).all()
    assert (x.grad != 0).any()


@pytest.mark.parametrize("name", ["test_halonet", "test_halonet_hybrid"])
def test_paths_agree(name):
    """Fast and plain attention, in inference and in training."""
    timm.layers.set_fused_attn(False)
    try:
        plain = timm.create_model(name).eval()
    finally:
        timm.layers.set_fused_attn(True)
    fused = timm.create_model(name).eval()
    fused.load_state_dict(plain.state_dict())
    x = image((2, 3, 75, 101))
    with torch.no_grad():
        close(fused(x), plain(x), "layout", "inference")
    gradients = []
    for model in (plain, fused):
        model.zero_grad()
        model(x).square().mean().backward()
        gradients.append({n: p.grad for n, p in model.named_parameters()})
    for key, expected in gradients[0].items():
        close(gradients[1][key], expected, "gradient", key)


@pytest.mark.parametrize("block_size", [8, 32])
def test_detection_backbone(block_size):
    model = timm.create_model("halo_resnet50_det", block_size=block_size, features_only=True, out_indices=(1, 2, 3, 4))
    layers = {n: m for n, m in model.named_modules() if isinstance(m, HaloAttention)}
    assert list(layers) == [f"stages_3.{i}.self_attn" for i in range(3)]
    assert {(m.block_size, m.halo_size) for m in layers.values()} == {(block_size, 3)}
    assert model.feature_info.channels() == [256, 512, 1024, 2048]
    with torch.no_grad():
        features = model.eval()(image((1, 3, 96, 160)))
    assert [tuple(f.shape[2:]) for f in features] == [(24, 40), (12, 20), (6, 10), (3, 5)]


# timm's models


@pytest.mark.parametrize("name", HYBRIDS)
def test_hybrids_are_timms(name):
    theirs, params, macs = HYBRIDS[name]
    model, peer = (build(n, device="meta") for n in (name, theirs))
    state, expected = ({k: v.shape for k, v in m.state_dict().items()} for m in (model, peer))
    assert list(state.items()) == list(expected.items())
    cfg, peer_cfg = model.pretrained_cfg, peer.pretrained_cfg
    for key in ("hf_hub_id", "url", "input_size", "crop_pct", "interpolation", "mean", "std", "first_conv", "license"):
        assert cfg[key] == peer_cfg[key], key
    assert cfg["hf_hub_id"] == f"timm/{theirs}.{cfg['tag']}"
    assert round(sum(p.numel() for p in model.parameters()) / 1e6, 2) == params
    assert gmacs(model, cfg["input_size"][1:]) == macs


@pytest.mark.slow
@pytest.mark.parametrize("name", ["halo_se33ts", "halo_50ts", "halo_eca26ts", "halo_regnetz_b"])
def test_hybrids_compute_as_timms(name):
    peer = timm.create_model(HYBRIDS[name][0], zero_init_last=False).eval()
    model = timm.create_model(name).eval()
    model.load_state_dict(peer.state_dict(), strict=True)
    x = image((1, *model.pretrained_cfg["input_size"]))
    with torch.no_grad():
        golden_close(model(x), peer(x), name)


# what it sees


def test_explain_windows():
    """Blocks and windows of a 48x80 image, in pixels, by hand: blocks of 4, a halo of 1 position."""
    model = timm.create_model("test_halonet")
    x = image((1, 3, 48, 80))
    pixels = torch.tensor([48, 80, 48, 80])

    def seen(point, **settings):
        panels = explained(model, x, point=point, **settings)
        return [
            (p.title, (p.boxes * pixels).round().int().tolist(), (p.points * pixels[:2]).round().int().tolist())
            for p in panels
        ]

    words = "window 6x6 of a block 4x4"
    corner = seen((0.0, 0.0))
    assert corner == [
        (f"Stage 1, block 0: {words}", [[0, 0, 16, 16], [-4, -4, 20, 20]], [[2, 2]]),  # on the map of the first stage
        (f"Stage 2, block 1: {words}", [[0, 0, 64, 64], [-16, -16, 80, 80]], [[8, 8]]),
        (f"Stage 3, block 0: {words}", [[0, 0, 64, 64], [-16, -16, 80, 80]], [[8, 8]]),
    ]
    middle = seen((0.5, 0.5))
    assert middle[0][1:] == ([[16, 32, 32, 48], [12, 28, 36, 52]], [[26, 42]])  # every second position has a query
    last = seen((1.0, 1.0), blocks=(1, -1))
    assert last[0] == (f"Stage 2, block 0: {words}", [[32, 64, 64, 96], [24, 56, 72, 104]], [[36, 68]])
    assert last[1][1:] == ([[0, 64, 64, 128], [-16, 48, 80, 144]], [[40, 72]])


@pytest.mark.parametrize("size", [(33, 70), (32, 32)], ids=str)
@pytest.mark.parametrize(
    ("name", "kwargs"),
    [("test_halonet_hybrid", {}), ("test_halonet", {"in_chans": 1, "pad_mode": "mask", "dtype": torch.bfloat16})],
)
def test_explain_any_model(name, kwargs, size):
    model = timm.create_model(name, **kwargs)
    x = image((1, kwargs.get("in_chans", 3), *size)).to(kwargs.get("dtype", torch.float32))
    for panel in explained(model, x, point=(0.9, 0.1)):
        total = panel.heat.sum()
        close(total, torch.ones_like(total), "rerun")
        assert (panel.boxes[0, :2] <= panel.points[0]).all()
        assert (panel.points[0] < panel.boxes[0, 2:]).all()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"point": (0.5, 1.5)}, r"got point=\(0.5, 1.5\), need 2 numbers from 0 to 1"),
        ({"blocks": (4,)}, r"got blocks=\(4,\), need different numbers from -4 to 3"),
        ({"blocks": "all"}, "got blocks='all'"),
    ],
)
def test_explain_refuses(settings, message):
    with pytest.raises(ValueError, match=message):
        timm.create_model("test_halonet").explain(image((1, 3, 32, 32)), **settings)


def test_explain_needs_attention():
    model = timm.create_model("test_halonet", conv_stages=(0, 1, 2, 3))
    with pytest.raises(ValueError, match="without halo attention"):
        model.explain(image((1, 3, 32, 32)))


def test_explain_of_every_name():
    check_family_explains(halonet)
