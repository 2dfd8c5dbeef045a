"""TransNeXt and MoH-ViT: official outputs, reproduced through ``checkpoint_filter_fn``, and the mixture of heads."""

import re

import pytest
import timm
import timm.optim
import torch
from golden import image, load, weights
from panels import check_family_explains, explained
from sklearn import datasets
from tolerance import close, golden_close

from vizoo.backbones import transnext
from vizoo.backbones.layers import MixtureOfHeads
from vizoo.backbones.transnext import TransNeXt, checkpoint_filter_fn


def official(case, **kwargs):
    """The model of a case, with the official weights, in evaluation mode."""
    args = case.meta["args"]
    if "embed_dims" in args:
        same = {k: args[k] for k in ("embed_dims", "num_heads", "depths", "sr_ratios", "mlp_ratios", "window_size")}
        heads = {f"{kind}_heads": args[f"{kind}_head"] for kind in ("shared", "routed") if f"{kind}_head" in args}
        sizes = {"pretrain_size": args.get("pretrain_size", args["img_size"])}
        if args.get("is_extrapolation") is False:
            sizes["bias_size"] = args["img_size"]
        model = TransNeXt(num_classes=args.get("num_classes", 0), **same, **heads, **sizes, **kwargs)
    else:
        model = timm.create_model(args.get("name", "moh_vit_small_80"), **kwargs)
    model.load_state_dict(checkpoint_filter_fn({"model": weights(case.keys)}, model), strict=True)
    return model.eval()


def routed(model):
    return [m for m in model.modules() if isinstance(m, MixtureOfHeads) and m.routed]


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("grad", [True, False], ids=["autograd", "inference"])
def test_moh_mini(fused, grad):
    case = load("moh_mini_64")
    timm.layers.set_fused_attn(fused)
    try:
        model = official(case)
    finally:
        timm.layers.set_fused_attn(True)
    x = image(case.input_shape)
    with torch.set_grad_enabled(grad):
        final, features = model.forward_intermediates(x)
        golden_close(model.forward_head(final), case.outputs["logits"], "logits")
        for i, feature in enumerate(features):
            golden_close(feature.flatten(2).transpose(1, 2), case.outputs[f"feat{i}"], f"feat{i}")
        assert model.aux_loss() is None
        golden_close(model.train()(x), case.outputs["logits"], "logits in training")
    golden_close(torch.stack([m.aux_loss for m in routed(model)]), case.outputs["aux"], "aux")
    golden_close(model.aux_loss()[None], case.outputs["aux"].mean()[None], "mean")
    close(model.extra_loss(), 0.01 * model.aux_loss(), "same")


@pytest.mark.parametrize("name", ["moh_vit_small_80", "transnext_micro"])
def test_official_models(name):
    case = load(name)
    model = official(case)
    x = image(case.input_shape)
    with torch.no_grad():
        for what in ("first pass", "with the biases of the first"):
            golden_close(model(x), case.outputs["logits"], what)
        if "aux" in case.outputs:
            model.train()(x)
            golden_close(torch.stack([m.aux_loss for m in routed(model)]), case.outputs["aux"], "aux")


@pytest.mark.parametrize(("kind", "seed"), [("extra", 0), ("interp", 1)])
def test_dense(kind, seed, tmp_path):
    """Both forms of the position bias, from the file of a detector."""
    case = load(f"transnext_dense_{kind}_96x160")
    model = official(case)
    with torch.no_grad():
        features = model.forward_intermediates(image(case.input_shape, seed), intermediates_only=True)
    for i, feature in enumerate(features):
        golden_close(feature, case.outputs[f"feat{i}"], f"feat{i}")
    detector = {f"backbone.{k}": v for k, v in weights(case.keys).items()} | {"neck.conv.weight": torch.zeros(1)}
    loaded = checkpoint_filter_fn({"meta": {}, "state_dict": detector}, model)
    assert loaded.keys() == model.state_dict().keys()


def test_tags_of_dense_checkpoints():
    """They choose the size that their position bias is made for, which can be given otherwise."""
    model = timm.create_model("transnext_tiny.maskrcnn_1x_coco", features_only=True).model
    assert [stage.blocks[0].attn.bias_map for stage in model.stages] == [(200, 200), (100, 100), (50, 50), (25, 25)]
    model = timm.create_model("transnext_tiny.upernet_ade20k", bias_size=64)
    assert [stage.blocks[0].attn.bias_map for stage in model.stages] == [(16, 16), (8, 8), (4, 4), (2, 2)]


@pytest.mark.parametrize("size", [(29, 29), (24, 40), (8, 131), (1, 1)])
def test_any_size(size):
    """Where the official code fails: a map that is smaller than the pooling has one pooled token."""
    model = timm.create_model("test_moh_vit").eval()
    x = torch.randn(2, 3, *size)
    with torch.no_grad():
        features = model.forward_intermediates(x, intermediates_only=True)
        assert model(x).isfinite().all()
    for i, feature in enumerate(features):
        assert feature.shape[2:] == tuple(-(-n // 2 ** (i + 2)) for n in size)


def test_bias_size_of_the_image_changes_nothing():
    """On a square image of that size, a multiple of 32, both forms of the bias are one."""
    torch.manual_seed(0)
    model = timm.create_model("test_transnext", bias_size=96).eval()
    other = timm.create_model("test_transnext").eval()
    other.load_state_dict(model.state_dict())
    x = torch.randn(1, 3, 96, 96)
    with torch.no_grad():
        close(other(x), model(x), "same")
        assert not torch.equal(other(x[..., :64]), model(x[..., :64]))


def test_sample_alone():
    """Logits of a sample do not depend on the others; the load-balance value does."""
    torch.manual_seed(0)
    model = timm.create_model("test_moh_vit").eval()
    x = torch.randn(3, 3, 64, 96)
    with torch.no_grad():
        close(model(x[1:2]), model(x)[1:2], "rerun")
        values = [model.train()(part) is not None and model.aux_loss() for part in (x, x[1:2])]
    assert values[0] != values[1]


def test_aux_loss_trains_the_gates():
    """With checkpointing as without: the same value, and the same gradients of the gates that route heads."""
    torch.manual_seed(0)
    model = timm.create_model("test_moh_vit").train()
    x, found = torch.randn(2, 3, 64, 64), []
    for checkpointing in (False, True):
        model.set_grad_checkpointing(checkpointing)
        model(x)
        loss = model.extra_loss()
        gates = [m.wg.weight for m in routed(model)]
        found.append([loss, *torch.autograd.grad(loss, gates)])
        assert all(g.abs().max() > 0 for g in found[-1])
    for plain, again in zip(*found, strict=True):
        close(again, plain, "gradient")
    assert timm.create_model("test_transnext").train()(x) is not None
    assert timm.create_model("test_transnext").extra_loss() is None


def test_no_weight_decay():
    """As the official optimizer: one-dimensional ones, and those of four names; gates and learnable tokens decay."""
    model = timm.create_model("test_moh_vit")
    groups = timm.optim.create_optimizer_v2(model, "adamw", weight_decay=0.05).param_groups
    names = {p: name for name, p in model.named_parameters()}
    kept = {names[p] for group in groups if not group["weight_decay"] for p in group["params"]}
    special = ("query_embedding", "relative_pos_bias_local", "cpb", "temperature")
    assert kept == {n for p, n in names.items() if p.dim() <= 1 or any(part in n for part in special)}
    assert not any("gates" in n or n.endswith("learnable_tokens") for n in kept)


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"pretrain_size": 32}, "got pretrain_size=32, need a whole number of at least 64"),
        ({"window_size": 4}, "got window_size=4, need an odd number"),
        ({"window_size": (3, None, 3, None)}, "need a number for each stage with sr_ratios > 1"),
        ({"shared_heads": (2, 2, 2, 2)}, "got shared_heads=(2, 2, 2, 2) and routed_heads=None, need both or none"),
        ({"shared_heads": (1, 1), "routed_heads": (1, 1)}, "need 4 numbers, one for each stage"),
        ({"shared_heads": (1, 2, 3, 4), "routed_heads": (0, 0, 0, 0)}, "shared to be num_heads, at least 2"),
        ({"num_heads": (7, 2, 3, 4)}, "need heads that divide the channels of their stages, 20, 40, 60, 80"),
        ({"mlp_ratios": (0.01, 4, 4, 4)}, "need a ratio that leaves one of 20 channels"),
    ],
    ids=str,
)
def test_refuses(kwargs, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        timm.create_model("test_transnext", **kwargs)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["test_transnext", "test_moh_vit"])
def test_learns_digits(name):
    """Trained on 1,500 digits, at least 95 % of the 297 others are recognised."""
    torch.manual_seed(0)
    data, order = datasets.load_digits(), torch.randperm(1797)
    x = torch.nn.functional.interpolate(torch.from_numpy(data.images).float()[:, None] / 16, scale_factor=3)[order]
    y = torch.from_numpy(data.target)[order]
    model = timm.create_model(name, in_chans=1, num_classes=10)
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=0.05)
    epochs, batch = 4, 50
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 6e-3, total_steps=epochs * 1500 // batch)
    for _ in range(epochs):
        for rows in torch.randperm(1500).split(batch):
            loss = torch.nn.functional.cross_entropy(model(x[rows]), y[rows])
            more = model.extra_loss()
            (loss if more is None else loss + more).backward()
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
    with torch.no_grad():
        right = (model.eval()(x[1500:]).argmax(1) == y[1500:]).float().mean()
    assert right >= 0.95


# explain


def test_explain_transnext():
    """A panel for the last block of each stage, recomputed, and one for its routed heads."""
    model = timm.create_model("test_moh_vit")
    x = torch.randn(1, 3, 70, 100)
    panels = explained(model, x, point=(0.0, 1.0))
    assert [p.title.partition(":")[0] for p in panels] == [
        "Stage 0, block 0",
        *["Stage 1, block 0"] * 2,
        *["Stage 2, block 1"] * 2,
        *["Stage 3, block 0"] * 2,
    ]
    with torch.no_grad():
        block = model.stages[3].blocks[0]
        seen = model.stages[:3](model.patch_embed(x)).permute(0, 3, 1, 2)
        seen = block.norm1(model.stages[3].downsample(seen))
        close(panels[5].heat, block.attn.weights_at(seen, 0, 3)[0].mean(0), "rerun")
        assert torch.equal(panels[6].parts, block.attn.gates(seen)[0, ..., 3:].argmax(-1))
    close(panels[5].heat.sum(), torch.tensor(1.0), "rerun")
    first = panels[0]
    assert first.heat.shape == (2, 3)
    assert first.area == (0, 0, 72 / 70, 1)
    close(first.boxes, torch.tensor([[-4 / 70, 92 / 100, 8 / 70, 104 / 100]]), "rerun")
    share = int(first.title.rpartition(" ")[2].rstrip("%")) / 100
    assert abs(1 - share - first.heat.sum()) < 0.006
    assert [p.title for p in model.eval().explain(x, point=(0.0, 1.0), blocks=[-2])] == [p.title for p in panels[3:5]]
    with pytest.raises(ValueError, match=re.escape("got blocks=[5], need different numbers from -5 to 4")):
        model.explain(x, blocks=[5])


def test_every_transnext_explains():
    check_family_explains(transnext)
