"""Prompts put into transformers: the official outputs, the fused form against the plain one, hosts, tuning."""

import contextlib
import copy

import pytest
import timm
import torch
import torch.nn.functional as F
from golden import image, load, weights
from sklearn import datasets
from timm.models.vision_transformer import ParallelScalingBlock, ResPostBlock, VisionTransformer
from tolerance import close, golden_close, op_close
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from zoo import build

from vizoo.backbones.layers import (
    PROMPTS,
    convert_tcpa,
    freeze_backbone,
    has_prompts,
    load_tcpa_state_dict,
    tcpa,
    tcpa_parameters,
    tcpa_state_dict,
    vpt,
)
from vizoo.backbones.ops.backend import HAS_TRITON, kernels_on
from vizoo.backbones.ops.prompt_attention import prompt_attention, reference_prompt_attention

needs_triton = pytest.mark.skipif(not HAS_TRITON, reason="needs triton, which is not installed")


CASES = ["tcpa_vfpt_tiny", "tcpa_vfpt_tiny_rtcpa_iprompt", "tcpa_vpt_tiny"]


VIT = {"img_size": 64, "patch_size": 16, "embed_dim": 32, "depth": 3, "num_heads": 4, "num_classes": 5}


PLAIN = {"fused": True, "plain": False}


def small(seed=0, host="tcpa", settings=None, **kwargs):
    """A prompted transformer in evaluation mode."""
    torch.manual_seed(seed)
    model = VisionTransformer(**{**VIT, **kwargs}).eval()
    return {"tcpa": tcpa, "vpt": vpt}[host](model, **(settings or {}))


# official outputs


@contextlib.contextmanager
def forms(form):
    """Context in which models run by kernels, if that is the form; yields the names of our operators that run."""
    ran = set()

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            if function.namespace == "vizoo":
                ran.add(function._schema.name.removeprefix("vizoo::"))
            return function(*args, **(kwargs or {}))

    with kernels_on("cpu" if form == "kernels" else "none"), Watch():
        yield ran


@pytest.mark.parametrize("form", ["plain", "fused", pytest.param("kernels", marks=needs_triton)])
@pytest.mark.parametrize("name", CASES)
def test_golden(name, form):
    """Logits, tokens, matching loss of every block and every choice."""
    case = load(name)
    meta = case.meta
    model = tcpa(
        VisionTransformer(**meta["vit"]).eval(),
        host=meta["host"],
        cls_pool=meta["pool_size_cls"],
        image_pool=meta["pool_size_image"],
        cls_topk=meta["topk_cls"],
        image_topk=meta["topk_image"],
        cls_len=meta["len_prompts_cls"],
        image_len=meta["len_prompts_image"],
        role_only=not meta["T_TCPA"],
        pixel_prompt=meta["IPrompt"],
        fused=form != "plain",
    )
    model.load_state_dict(convert_tcpa(weights(case.keys)))
    chosen = []
    for block in model.blocks:
        block.tcpa.register_forward_hook(lambda _, __, out: chosen.append(out[1]))
    x = image(case.input_shape)
    with torch.no_grad(), forms(form) as ran:
        golden_close(model.forward_features(x), case.outputs["tokens"], "tokens")
        if meta["T_TCPA"]:
            losses = torch.stack([block.tcpa.memory.match_loss for block in model.blocks])
            golden_close(losses, case.outputs["match_loss"], "matching loss")
            close(model.match_loss, losses.sum(), "rerun")
            mask, n = torch.stack(chosen), case.outputs["mask_cls"].shape[-1]
            assert torch.equal(mask[:, :, 0, :n].float(), case.outputs["mask_cls"])
            assert torch.equal(mask[:, :, 1:, n:].float(), case.outputs["mask_image"])
            assert not mask[:, :, 0, n:].any()
            assert not mask[:, :, 1:, :n].any()
        else:
            assert model.match_loss is None
        golden_close(model(x), case.outputs["logits"], "logits")
    assert ("prompt_attention" in ran) is (form != "plain")
    assert ("prompt_match" in ran) is (form == "kernels" and meta["T_TCPA"])


def test_golden_match():
    """The matching alone."""
    case = load("tcpa_match")
    state, topk = weights(case.keys), case.meta["args"]["topk"]
    layer = small().blocks[0].tcpa
    for i, keys in enumerate(state["keys"]):
        chosen, distance = layer.nearest(image(case.input_shape).unsqueeze(0), keys, topk)
        index = case.outputs[f"index{i}"].long()
        assert torch.equal(chosen[0], torch.zeros_like(chosen[0]).scatter(1, index, 1.0))
        golden_close(distance.reshape(1), case.outputs[f"dist{i}"], "distance")


def test_golden_vfpt():
    case = load("vfpt_tiny")
    model = vpt(VisionTransformer(**case.meta["vit"]).eval(), num_prompts=case.meta["p_len"], fourier=True)
    model.load_state_dict(convert_tcpa(weights(case.keys)))
    with torch.no_grad():
        golden_close(model(image(case.input_shape)), case.outputs["logits"], "logits")


# the two forms


HOSTS = {
    "class token": {},
    "registers": {"reg_tokens": 2, "qk_norm": True, "init_values": 0.5, "pre_norm": True},
    "no class token": {"class_token": False, "global_pool": "avg"},
    "scaled, post-norm": {"block_fn": ResPostBlock, "scale_attn_norm": True, "init_values": 0.5},
    "attention pooling": {"class_token": False, "global_pool": "map"},
}


SETTINGS = {
    "official": {},
    "long": {"cls_pool": 4, "image_pool": 3, "cls_topk": 1, "image_topk": 2, "cls_len": 3, "image_len": 2},
    "role only": {"host": "vpt", "cls_pool": 3, "image_pool": 2, "role_only": True},
    "everything chosen": {"cls_pool": 2, "image_pool": 3},
}


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
@pytest.mark.parametrize("kwargs", HOSTS.values(), ids=HOSTS)
def test_fused(kwargs, settings):
    """Logits, matching loss and every gradient of the two forms agree, on an image that is not square."""
    kwargs = {**kwargs, "img_size": (48, 80)}
    models = [small(settings={**settings, "fused": fused}, **kwargs).double() for fused in (True, False)]
    models[1].load_state_dict(models[0].state_dict())
    x, found = torch.randn(2, 3, 48, 80, dtype=torch.float64), []
    for model in models:
        logits = model(x)
        loss = logits.square().sum()
        if model.match_loss is not None:
            loss = loss + model.match_loss
        loss.backward()
        found.append((logits.detach(), model.match_loss, {n: p.grad for n, p in model.named_parameters()}))
    (a, a_loss, a_grads), (b, b_loss, b_grads) = found
    op_close(a, b, what="logits")
    assert (a_loss is None) is (b_loss is None) is bool(settings.get("role_only"))
    for key, gradient in b_grads.items():
        assert gradient is not None, key
        if gradient.abs().max() > 1e-9:  # of a key bias it is rounding: softmax does not see it
            op_close(a_grads[key], gradient, grad=True, what=key)


@needs_triton
@pytest.mark.parametrize("name", ["test_vit_tcpa", "test_vit_gap_tcpa"])
def test_training_step_by_kernels(name):
    """Logits, matching loss and every gradient are those of the fused form, with prompts of each image."""
    model, found = build(name, tcpa_prompt_drop=0.1, embed_dim=32, num_heads=2, depth=2).train(), []
    for form in ("fused", "kernels"):
        model = copy.deepcopy(model)
        model.zero_grad()
        torch.manual_seed(1)
        with forms(form) as ran:
            logits = model(torch.linspace(-1, 1, 2 * 3 * 96 * 96).sin().reshape(2, 3, 96, 96))
            (logits.square().sum() + model.match_loss).backward()
        found.append((logits, model.match_loss, {n: p.grad for n, p in model.named_parameters()}))
    assert ran == {"prompt_attention", "prompt_attention_backward"}
    (logits, loss, gradients), (a_logits, a_loss, a_gradients) = found
    close(a_logits, logits, "rerun")
    close(a_loss, loss, "rerun")
    for key, gradient in gradients.items():
        close(a_gradients[key], gradient, "gradient", key)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=["fp32", "bf16", "fp16"])
def test_fused_dtypes(dtype):
    """The attention itself against float64, with gradients."""
    batch, heads, n, p, dim = 2, 3, 7, 5, 8
    shapes = [(batch, heads, n, dim)] * 3 + [(1, heads, p, dim)] * 2
    inputs = [torch.randn(shape).to(dtype) for shape in shapes]
    chosen = torch.rand(batch, n, p).argsort(-1) < 2
    weight = torch.randn(batch, heads, n, dim).to(dtype)

    def run(function, kind):
        leaves = [t.to(kind).requires_grad_() for t in inputs]
        out = function(*leaves, chosen, dim**-0.5)
        return [out.detach(), *torch.autograd.grad(out, leaves, weight.to(kind))]

    truth, plain = run(reference_prompt_attention, torch.float64), run(reference_prompt_attention, dtype)
    for i, (got, want, same) in enumerate(zip(run(prompt_attention, dtype), truth, plain, strict=True)):
        op_close(got, want, same, grad=i > 0, what=["out", "q", "k", "v", "kp", "vp"][i])


def test_reference_by_the_loop():
    """The plain form against the definition, one query at a time."""
    q, k, v, kp, vp = (torch.randn(1, 2, n, 4, dtype=torch.float64) for n in (3, 3, 3, 5, 5))
    chosen = torch.rand(1, 3, 5) < 0.5
    out = reference_prompt_attention(q, k, v, kp, vp, chosen, 0.5)
    for h in range(2):
        for i in range(3):
            weights_ = torch.cat([k[0, h], kp[0, h]]) @ q[0, h, i] * 0.5
            weights_ = weights_.exp() / weights_.exp().sum()
            total = sum(weights_[j] * v[0, h, j] for j in range(3))
            total = total + sum(weights_[3 + j] * vp[0, h, j] for j in range(5) if chosen[0, i, j])
            op_close(out[0, h, i], total, what=f"head {h}, query {i}")


def official_match(x, keys, topk):
    """Matching as the official code has it: the chosen prompts and the mean of ``1 - cosine`` over them."""
    cosine = F.normalize(x, dim=-1) @ F.normalize(keys, dim=-1).t()
    value, index = cosine.topk(topk, dim=-1)
    return torch.zeros_like(cosine).scatter(-1, index, 1.0), (1 - value).mean()


def test_match_of_ties_and_zeros():
    """Equal keys, keys of one direction, zero keys, zero tokens: choice, loss and both gradients are the official."""
    keys = torch.eye(6, dtype=torch.float64)[[0, 1, 1, 0, 2, 3, 5, 4]]  # cosines without rounding
    keys[3] *= 2
    keys[5] = 0
    layer = small().double().blocks[0].tcpa
    x = torch.randint(-2, 3, (2, 7, 6)).double()
    x[0, 2] = x[1] = 0
    for topk in (1, 3, 8):
        leaves = [x.clone().requires_grad_(), keys.clone().requires_grad_()]
        (chosen, loss), (truth, expected) = layer.nearest(*leaves, topk), official_match(*leaves, topk)
        assert torch.equal(chosen, truth)
        op_close(loss.detach(), expected.detach(), what="loss")
        found, wanted = torch.autograd.grad(loss, leaves), torch.autograd.grad(expected, leaves)
        for name, a, t in zip(("tokens", "keys"), found, wanted, strict=True):
            assert torch.isfinite(a).all()
            zero = (leaves[name == "keys"] == 0).all(-1)  # divided by 1e-12: a scale of their own
            for rows in (zero, ~zero):
                if t[rows].any():
                    op_close(a[rows], t[rows], grad=True, what=f"{name}, top {topk}")
                else:
                    assert not a[rows].any()


@pytest.mark.parametrize("fused", PLAIN.values(), ids=PLAIN)
def test_first_step_with_ties(fused):
    """A model with equal keys and zero tokens, whose choice by index is that of the official code: all gradients."""

    def run(model, x):
        logits = model(x)
        (logits.square().sum() + model.match_loss).backward()
        return logits.detach(), {n: p.grad for n, p in model.named_parameters()}

    model = small(settings={"fused": fused, "prompt_drop": 0.0, "image_topk": 3, "cls_topk": 3}).double().train()
    with torch.no_grad():
        model.patch_embed.proj.weight.zero_()  # every patch is its position, the first of them zero
        model.patch_embed.proj.bias.zero_()
        model.pos_embed[:, 1:3].zero_()
        for block in model.blocks:
            for keys in (block.tcpa.image_keys, block.tcpa.cls_keys):
                keys.copy_(torch.eye(keys.shape[1])[torch.arange(len(keys)) // 2])  # pairs, cosines without rounding
    twin = copy.deepcopy(model)
    for block in twin.blocks:
        block.tcpa.nearest = official_match
    x = torch.randn(2, 3, 64, 64, dtype=torch.float64)
    (logits, found), (expected, truth) = run(model, x), run(twin, x)
    op_close(logits, expected, what="logits")
    for key, gradient in truth.items():
        if gradient.abs().max() > 1e-9:
            op_close(found[key], gradient, grad=True, what=key)
        else:
            assert found[key].abs().max() <= 1e-9, key


def test_random_match():
    """The random phase chooses k prompts for each token, other ones each time, in training only."""
    model = small(settings={"prompt_drop": 0.0})
    layer, x = model.blocks[0].tcpa, torch.randn(2, 17, 32)
    nearest = layer(x)[1]
    model.random_match = True
    assert torch.equal(layer(x)[1], nearest)
    model.train()
    first, second = layer(x)[1], layer(x)[1]
    assert not torch.equal(first, second)
    assert (first.sum(-1) == 10).all()
    assert not first[:, 0, 18:].any()
    assert not first[:, 1:, :18].any()
    model.random_match = False
    assert torch.equal(layer(x)[1], nearest)


def test_prompt_dropout():
    """Every sample draws its own mask, and evaluation none."""
    layer = small(settings={"host": "vpt", "prompt_drop": 0.5}).train().blocks[0].tcpa
    out = layer.prompts(2)
    assert out.shape == (2, 36, 32)
    assert ((out == 0).any(-1)).any()
    assert not torch.equal(out[0], out[1])
    assert layer.eval().prompts(2).shape == (1, 36, 32)


def test_nothing_is_kept():
    """A change that bumps no version, such as that of an averaged teacher, is seen by the next pass."""
    model, x = small(), torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        before = model(x)
        for p in (model.blocks[1].tcpa.image_prompts, model.blocks[1].attn.qkv.weight):
            p.data.mul_(-2.0)
            after = model(x)
            assert not torch.allclose(after, before)
            close(copy.deepcopy(model)(x), after, "same")
            before = after


def test_attention_transforms():
    """The attention alone, for every argument: jvp, second derivatives, and its two forms."""
    shapes = [(2, 2, 5, 4)] * 3 + [(1, 2, 3, 4)] * 2
    inputs = tuple(torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in shapes)
    chosen = torch.rand(2, 5, 3).argsort(-1) < 2

    def run(*args):
        return prompt_attention(*args, chosen, 0.4)

    assert torch.autograd.gradcheck(run, inputs, check_forward_ad=True)
    assert torch.autograd.gradgradcheck(run, inputs)
    q, k, v, kp, vp = (t.detach() for t in inputs)

    def one(q, k, v, chosen):
        return prompt_attention(q[None], k[None], v[None], kp, vp, chosen[None], 0.4)[0]

    op_close(torch.vmap(one)(q, k, v, chosen), run(q, k, v, kp, vp))


@pytest.mark.parametrize("deep", [True, False], ids=["deep", "shallow"])
def test_vpt(deep):
    """VPT by its definition: prompts after the class token, replaced before every block or passed through all."""
    model = small(host="vpt", settings={"num_prompts": 4, "deep": deep})
    x = torch.randn(2, 3, 64, 64)
    bare = VisionTransformer(**VIT).eval()
    bare.load_state_dict({k: v for k, v in model.state_dict().items() if ".vpt." not in k})
    tokens = bare.norm_pre(bare._pos_embed(bare.patch_embed(x)))
    for i, block in enumerate(bare.blocks):
        if i == 0 or deep:
            prompts = model.blocks[i].vpt.prompts.expand(2, -1, -1)
            tokens = torch.cat([tokens[:, :1], prompts, tokens[:, 5 if i else 1 :]], 1)
        tokens = block(tokens)
    close(model(x), bare.head(bare.norm(tokens)[:, 0]), "rerun")
    if not deep:
        with pytest.raises(NotImplementedError, match="VPT-shallow"):
            model.forward_intermediates(x)
    else:
        assert model.forward_intermediates(x)[1][0].shape == (2, 32, 4, 4)


@pytest.mark.parametrize("host", ["tcpa", "vpt"])
def test_tuning(host):
    """Only prompts, keys and head change, the backbone stays in evaluation mode, and the loss falls."""
    model = freeze_backbone(small(host=host, drop_path_rate=0.5, proj_drop_rate=0.5, drop_rate=0.1)).train()
    names = {n for n, p in model.named_parameters() if p.requires_grad}
    assert {id(p) for p in tcpa_parameters(model)} == {id(p) for p in model.parameters() if p.requires_grad}
    assert (
        names
        == {n for n in model.state_dict() if f".{host}." in n or n.startswith("head.")}
        == set(tcpa_state_dict(model))
    )
    assert model.training
    assert model.head_drop.training
    assert not model.blocks[0].drop_path1.training
    before = {k: v.clone() for k, v in model.state_dict().items()}
    y = torch.arange(10) % 5
    x = torch.randn(5, 3, 64, 64)[y] + 0.3 * torch.randn(10, 3, 64, 64)
    optimizer = torch.optim.AdamW(tcpa_parameters(model), lr=0.05)
    losses = []
    for _ in range(30):
        loss = nn.functional.cross_entropy(model(x), y)
        losses.append(loss.item())
        if host == "tcpa":
            loss = loss + 0.01 * model.match_loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert losses[-1] < 0.7 * losses[0]
    changed = {k for k, v in model.state_dict().items() if not torch.equal(v, before[k])}
    assert changed == names
    other = small(seed=0, host=host, drop_path_rate=0.5, proj_drop_rate=0.5, drop_rate=0.1)
    load_tcpa_state_dict(other, tcpa_state_dict(model))
    with torch.no_grad():
        close(other(x), model.eval()(x), "same")
    with pytest.raises(ValueError, match="missing"):
        load_tcpa_state_dict(other, {})


def test_dynamic_size_and_gate():
    """Any grid, patch dropout, and a gated attention."""
    model = small(dynamic_img_size=True, patch_drop_rate=0.5)
    assert model(torch.randn(2, 3, 96, 48)).shape == (2, 5)
    assert model.train()(torch.randn(2, 3, 96, 48)).shape == (2, 5)
    bare = VisionTransformer(**VIT).eval()
    for block in bare.blocks:
        block.attn.gate = nn.Linear(32, 32)
    gated = tcpa(copy.deepcopy(bare))
    closed = tcpa(copy.deepcopy(bare))
    for block in closed.blocks:
        nn.init.constant_(block.attn.gate.bias, -1e3)
        nn.init.zeros_(block.attn.proj.bias)
        block.tcpa.image_prompts.data.zero_()
    x = torch.randn(1, 3, 64, 64)
    assert not torch.allclose(gated(x), closed(x))


BAD = {
    "match weight": ({"match_weight": -0.1}, ValueError, "match_weight=-0.1"),
    "random epochs": ({"random_epochs": -1}, ValueError, "random_epochs=-1"),
    "host": ({"host": "vp"}, ValueError, "host='vp'"),
    "pool": ({"image_pool": 0}, ValueError, "image_pool=0"),
    "topk": ({"cls_pool": 4, "cls_topk": 5}, ValueError, "cls_topk=5"),
    "drop": ({"prompt_drop": 1.0}, ValueError, "prompt_drop=1"),
}


@pytest.mark.parametrize(("settings", "error", "match"), BAD.values(), ids=BAD)
def test_refused_settings(settings, error, match):
    with pytest.raises(error, match=match):
        small(settings=settings)


def test_refused_models():
    with pytest.raises(NotImplementedError, match="ParallelScalingBlock"):
        small(block_fn=ParallelScalingBlock)
    with pytest.raises(NotImplementedError, match="DiffAttention"):
        small(attn_layer="diff")
    with pytest.raises(NotImplementedError, match="ConvNeXt"):
        tcpa(timm.create_model("test_convnext"))
    with pytest.raises(ValueError, match="prompts already"):
        vpt(small())
    with pytest.raises(ValueError, match="without prompts"):
        tcpa_parameters(VisionTransformer(**VIT))
    with pytest.raises(NotImplementedError, match="attn_mask"):
        small()(torch.randn(1, 3, 64, 64), is_causal=True)


def test_digits():
    """A frozen transformer that knows the digits 0 to 4 learns 5 to 9 by prompts and head alone."""
    data = datasets.load_digits()
    x = torch.from_numpy(data.images).float().unsqueeze(1) / 8 - 1
    y = torch.from_numpy(data.target).long()

    def fit(model, parameters, classes, steps, lr):
        optimizer = torch.optim.AdamW(parameters, lr=lr)
        for step in range(steps):
            model.train().random_match = step < steps // 10
            batch = torch.tensor([i for i in torch.randint(len(x), (64,)).tolist() if y[i] in classes])
            loss = nn.functional.cross_entropy(model(x[batch]), y[batch] % 5)
            if getattr(model, "match_loss", None) is not None:
                loss = loss + 0.01 * model.match_loss
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()

    bare = VisionTransformer(**{**VIT, "img_size": 8, "patch_size": 2, "in_chans": 1, "depth": 2})
    fit(bare, bare.parameters(), range(5), 200, 3e-3)
    for host in (tcpa, vpt, None):
        model = copy.deepcopy(bare)
        model.reset_classifier(5)
        if host is not None:
            settings = {"cls_pool": 6, "image_pool": 6, "cls_topk": 3, "image_topk": 3} if host is tcpa else {}
            freeze_backbone(host(model, **settings))
        tuned = tcpa_parameters(model) if host else list(model.head.parameters())
        before = {k: v.clone() for k, v in model.state_dict().items()}
        fit(model, tuned, range(5, 10), 80, 0.02)
        kept = {k for k, v in model.state_dict().items() if torch.equal(v, before[k])}
        assert kept == {k for k in before if k in bare.state_dict() and not k.startswith("head.")}
        with torch.no_grad():
            right = (model.eval()(x[y >= 5]).argmax(1) == y[y >= 5] - 5).float().mean()
        assert right > 0.4, f"{host}: {right:.3f} where chance is 0.2"


# hooks


def test_extra_loss():
    model = small(settings={"match_weight": 0.5})
    assert model.extra_loss() is None  # no pass yet
    model.train()(image((2, 3, 64, 64)))
    close(model.extra_loss(), 0.5 * model.match_loss, "same")
    model.extra_loss().backward()
    assert model.blocks[0].tcpa.image_keys.grad.abs().sum() > 0
    plain = small()
    plain(image((2, 3, 64, 64)))
    close(plain.extra_loss(), 0.01 * plain.match_loss, "same")
    for other in (small(settings={"role_only": True}), small(host="vpt")):
        other(image((2, 3, 64, 64)))
        assert other.extra_loss() is None


@pytest.mark.parametrize(("settings", "random"), [({}, 10), ({"random_epochs": 2}, 2), ({"random_epochs": 0}, 0)])
def test_training_phase(settings, random):
    model = small(settings=settings)
    for epoch in (0, 1, 2, 9, 10, 99, 0):
        assert model.training_phase(epoch, 100) is None
        assert model.random_match is (epoch < random)
        assert all(block.tcpa.random_match is (epoch < random) for block in model.blocks)
    other = small(host="vpt")
    other.training_phase(0, 100)
    assert not other.random_match


def test_settings_of_training_change_no_output():
    x = image((1, 3, 96, 96))
    models = [
        build("test_vit_tcpa", **settings) for settings in ({}, {"tcpa_match_weight": 2, "tcpa_random_epochs": 0})
    ]
    models[1].load_state_dict(models[0].state_dict(), strict=True)
    with torch.no_grad():
        close(models[1](x), models[0](x), "same")
    assert (models[1].match_weight, models[1].random_epochs) == (2.0, 0)
    assert (models[0].match_weight, models[0].random_epochs) == (0.01, 10)


def test_kinds_of_prompts():
    for kind, give in PROMPTS.items():
        model = VisionTransformer(**VIT)
        assert not has_prompts(model)
        assert has_prompts(give(model))
        assert [k for k in PROMPTS if has_prompts(model, k)] == [kind]
    assert has_prompts(build("test_vit_gap_tcpa"), "tcpa")
    assert not has_prompts(nn.Linear(1, 1), "tcpa")


# pictures


def by_hand(model, x, blocks):
    """Position of the nearest key of each patch, by the definition."""
    inputs, found = {}, []
    handles = [
        model.blocks[i].register_forward_pre_hook(lambda _, args, i=i: inputs.update({i: args[0]})) for i in blocks
    ]
    with torch.no_grad():
        model(x)
    for handle in handles:
        handle.remove()
    for i in blocks:
        patches = inputs[i][0, model.num_prefix_tokens :].double()
        keys = model.blocks[i].tcpa.image_keys.detach().double()
        found.append(torch.stack([F.cosine_similarity(keys, token[None]).argmax() for token in patches]))
    return found


@pytest.mark.parametrize("kwargs", HOSTS.values(), ids=HOSTS)
def test_explain_nearest(kwargs):
    model = small(**{**kwargs, "img_size": (48, 80), "depth": 5})
    freeze_backbone(model).train()
    model.random_match = True
    modes = {name: module.training for name, module in model.named_modules()}
    x = image((1, 3, 48, 80))
    panels = model.explain(x)
    assert {name: module.training for name, module in model.named_modules()} == modes
    assert model.random_match
    assert not any(module._forward_hooks for module in model.modules())
    expected = by_hand(model.eval(), x, (0, 2, 4))
    for i, panel, labels in zip((0, 2, 4), panels, expected, strict=True):
        assert torch.equal(panel.parts, labels.view(3, 5))
        assert panel.title == f"block {i}: nearest of 18 image prompts, {len(labels.unique())} in use"
        assert not panel.parts.requires_grad
    assert len(set(map(tuple, torch.stack(expected).tolist()))) > 1
    (last, first) = model.explain(x, layers=(-1, 0))
    assert torch.equal(last.parts, panels[2].parts)
    assert last.title == panels[2].title
    assert torch.equal(first.parts, panels[0].parts)


@pytest.mark.parametrize("kwargs", HOSTS.values(), ids=HOSTS)
@pytest.mark.parametrize(
    ("host", "settings"),
    [("tcpa", {"role_only": True, "image_len": 2}), ("vpt", {}), ("vpt", {"deep": False})],
    ids=["role only", "deep", "shallow"],
)
def test_explain_share(host, settings, kwargs):
    """Attention of patches to prompts, from the probabilities of a loop over patches and heads."""
    model = small(host=host, settings=settings, **{**kwargs, "img_size": (48, 80)})
    inputs = {}
    for i, block in enumerate(model.blocks):
        block.attn.register_forward_pre_hook(lambda _, args, i=i: inputs.update({i: args}))
    panels = model.explain(image((1, 3, 48, 80)))
    prefix = model.num_prefix_tokens
    for i, panel in enumerate(panels):
        attn = model.blocks[i].attn
        tokens = torch.cat([t.expand(1, -1, -1) for t in inputs[i][:2]], 1)[0]
        images = range(tokens.shape[0] - (10 if host == "vpt" else 36), tokens.shape[0])
        q, k, _ = attn.qkv(tokens).view(len(tokens), 3, 4, 8).unbind(1)
        for token in (0, 7, 14):
            read = 0.0
            for head in range(4):
                scores = attn.k_norm(k[:, head]) @ attn.q_norm(q[prefix + token, head]) * attn.scale
                read += scores.softmax(0)[images].sum() / 4
            close(panel.heat.flatten()[token], read.detach(), "rerun")
        assert panel.title == f"block {i}: attention of patches that reads prompts"
        assert panel.area == (0.0, 0.0, 1.0, 1.0)
        assert 0 < panel.heat.min() < panel.heat.max() < 1


def test_explain_images_that_patches_do_not_tile():
    x = image((1, 3, 40, 72))
    padded = small(dynamic_img_size=True, dynamic_img_pad=True)
    (panel,) = padded.explain(x, layers=[1])
    whole = small(dynamic_img_size=True).explain(F.pad(x, (0, 8, 0, 8)), layers=[1])[0].parts
    assert torch.equal(panel.parts, whole.repeat_interleave(16, 0).repeat_interleave(16, 1)[:40, :72])
    (panel,) = small(img_size=(40, 72)).explain(x, layers=[1])
    whole = small(img_size=(32, 64)).explain(x[:, :, :32, :64], layers=[1])[0].parts
    assert torch.equal(panel.parts[:32, :64], whole.repeat_interleave(16, 0).repeat_interleave(16, 1))
    assert (panel.parts[32:] == -1).all()
    assert (panel.parts[:, 64:] == -1).all()
    (panel,) = small(host="vpt", dynamic_img_size=True, dynamic_img_pad=True).explain(x, layers=[1])
    assert panel.heat.shape == (3, 5)
    assert panel.area == (0.0, 0.0, 48 / 40, 80 / 72)


@pytest.mark.parametrize("layers", [[], [3], [-4], [0, 0], [0, -3], [0.5], 1, "01"])
def test_explain_refuses_layers(layers):
    with pytest.raises(ValueError, match=r"got layers=.*, need different numbers from -3 to 2"):
        small().explain(image((1, 3, 64, 64)), layers=layers)


@pytest.mark.parametrize("shape", [(2, 3, 64, 64), (3, 64, 64)])
def test_explain_refuses_batches(shape):
    with pytest.raises(ValueError, match=r"got shape=.*, need one image \[1, channels, height, width\]"):
        small().explain(image(shape))
