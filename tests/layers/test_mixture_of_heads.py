"""Gates of heads: the definition token by token, the load-balance value, and timm's transformers with gates."""

import copy
import gc
import itertools
import pickle
import weakref

import pytest
import timm
import torch
from changes import check_calls, check_changed_layers, check_trace, check_transforms
from golden import image, load, weights
from timm.models.beit import Beit
from timm.models.eva import Eva
from timm.models.swin_transformer import SwinTransformer
from timm.models.swin_transformer_v2 import SwinTransformerV2
from timm.models.vision_transformer import VisionTransformer
from timm.models.vision_transformer_relpos import VisionTransformerRelPos
from timm.models.vision_transformer_sam import VisionTransformerSAM
from tolerance import close, golden_close, op_close
from torch import nn
from torch.func import functional_call

from vizoo.backbones.layers import MixtureOfHeads, load_balance, moh
from vizoo.backbones.layers.mixture_of_heads import GATED
from vizoo.tools.training.task import extra_loss

HEADS = {  # num_heads, shared, routed
    "one shared": (4, 1, 2),
    "several shared": (8, 3, 4),
    "none shared": (8, 0, 3),
    "all shared": (4, 4, 0),
    "none dropped": (5, 2, 3),
}
all_heads = pytest.mark.parametrize("heads", HEADS.values(), ids=HEADS)


def layer(heads, dim=12):
    """A layer whose logits are a few units apart."""
    made = MixtureOfHeads(dim, *heads)
    with torch.no_grad():
        for p in made.parameters():
            p.normal_()
    return made


def by_definition(gate, x):
    """Gates and the load-balance value, one token at a time."""
    h, s, r = gate.num_heads, gate.shared, gate.routed
    gates, shares, loads = [], [], []
    for token in x.flatten(0, -2):
        found = [0.0] * h
        weight = [1.0, 1.0]
        if s and r:
            weight = [2 * w for w in (gate.wg_0.weight @ token).softmax(0)]
        share = (gate.wg_1.weight @ token).softmax(0) if s > 1 else [1.0] * s
        for i in range(s):
            found[i] = weight[0] * s * share[i]
        if r:
            p = (gate.wg.weight @ token).softmax(0)
            kept = sorted(range(h - s), key=lambda e: -p[e].item())[:r]
            total = sum(p[e] for e in kept)
            for e in kept:
                found[s + e] = weight[1] * r * p[e] / total
            shares.append(p)
            loads.append([float(e in kept) for e in range(h - s)])
        gates.append(torch.stack([torch.as_tensor(g, dtype=x.dtype) for g in found]))
    if not r:
        return torch.stack(gates).unflatten(0, x.shape[:-1]), None
    mean = torch.stack(shares).mean(0) * torch.tensor(loads, dtype=x.dtype).mean(0)
    return torch.stack(gates).unflatten(0, x.shape[:-1]), (h - s) ** 2 * mean.mean()


@all_heads
def test_definition(heads):
    """Gates, by one product and by calls, the sum of each token's, and the load-balance value."""
    gate, x = layer(heads).double(), torch.randn(2, 3, 5, 12, dtype=torch.float64)
    (_, s, r), watched = heads, copy.deepcopy(gate).eval()
    for child in watched.children():
        child.register_forward_hook(lambda *_: None)
    with torch.no_grad():
        gates, balance = by_definition(gate, x)
        assert load_balance(gate) is None
        op_close(gate(x), gates)
        assert (load_balance(gate) is None) is (balance is None)
        if balance is not None:
            op_close(load_balance(gate), balance)
        op_close(gate.eval()(x), gates)
        op_close(gate(x[0, 0, 0]), gates[0, 0, 0])
        op_close(watched(x), gates)
        w = 2 * gate.wg_0(x).softmax(-1) if s and r else torch.ones(2, dtype=x.dtype)
        op_close(gate(x).sum(-1), (s * w[..., 0] + r * w[..., 1]).expand(x.shape[:-1]))
        assert ((gate(x) > 0).sum(-1) == s + r).all()


@all_heads
def test_gradients(heads):
    """Of gates and load-balance value, by every parameter and the tokens; other heads have the same choice."""
    gate, x = layer(heads).double(), torch.randn(2, 5, 12, dtype=torch.float64, requires_grad=True)
    down, found = torch.randn(2, 5, heads[0], dtype=torch.float64), []
    leaves = [x, *gate.parameters()]
    for run in (lambda: (gate(x), gate.aux_loss), lambda: by_definition(gate, x)):
        gates, balance = run()
        loss = (gates * down).sum() + (0 if balance is None else 7 * balance)
        found.append(torch.autograd.grad(loss, leaves))
    for actual, expected in zip(*found, strict=True):
        assert expected.any()
        op_close(actual, expected, grad=True)


def test_balanced_heads_have_the_value_of_those_kept():
    """Every token prefers its own two of six heads, all of them alike: E^2 * mean(1 / E * 2 / E) = 2."""
    gate, x = MixtureOfHeads(6, 7, 1, 2), torch.eye(6) + torch.eye(6).roll(1, 0)
    with torch.no_grad():
        gate.wg.weight.copy_(torch.eye(6))
    gate(x)
    close(gate.aux_loss, torch.tensor(2.0), "rerun")
    with torch.no_grad():
        gate.wg.weight.copy_(torch.linspace(20, 0, 6)[:, None] / 2)  # all prefer the first
    gate(x)
    assert gate.aux_loss > 5


def test_a_token_alone():
    """Its gates do not depend on the others."""
    gate, x = layer((8, 3, 4)), torch.randn(3, 7, 12)
    for mode, grad in itertools.product((True, False), repeat=2):
        gate.train(mode)
        with torch.set_grad_enabled(grad):
            close(gate(x)[1:2, 2:3], gate(x[1:2, 2:3]), "rerun")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
def test_half_precision(dtype):
    """Only the logits are rounded, of half weights and under autocast: softmaxes are those of float32."""
    gate, x = layer((8, 3, 4)), torch.randn(3, 7, 12)

    class Logits(nn.Linear):
        def forward(self, x):
            with torch.autocast("cpu", dtype):
                return super().forward(x).float()

    rounded = copy.deepcopy(gate)
    for child in rounded.children():
        child.__class__ = Logits
    for mode in (True, False):
        gate.train(mode)
        with torch.set_grad_enabled(mode):
            expected = rounded.train(mode)(x)
            with torch.autocast("cpu", dtype):
                out = gate(x)
                assert out.dtype == torch.float32
                close(out, expected, "same")
                assert gate(x.to(dtype)).dtype == dtype
            half = copy.deepcopy(gate).to(dtype)
            close(half(x.to(dtype)), expected.to(dtype), "same")
    close(gate.aux_loss, rounded.aux_loss, "same")
    assert gate.aux_loss.dtype == torch.float32


def test_copies_and_repeated_steps():
    """A step does not stand in the way of a copy, and its value goes with the next."""
    gate, x = layer((8, 3, 4)), torch.randn(2, 5, 12)
    gate(x)
    for twin in (copy.deepcopy(gate), pickle.loads(pickle.dumps(gate))):
        assert twin.aux_loss is None
        assert twin.state_dict().keys() == gate.state_dict().keys() == {"wg.weight", "wg_0.weight", "wg_1.weight"}
    old = weakref.ref(gate.aux_loss)
    gate.eval()(x)
    assert gate.aux_loss is old()
    gate.train()(x)
    assert old() is None


@pytest.mark.parametrize("heads", [(8, 3, 4), (4, 1, 2)], ids=["several shared", "one shared"])
def test_programs(heads):
    """TorchScript, compiled, exported and traced; the value of training too, where a program keeps it."""
    gate, x = layer(heads), torch.randn(2, 5, 12)
    expected = gate(x)
    for program in (torch.jit.script(gate), torch.compile(gate, fullgraph=True, backend="eager")):
        gate.aux_loss = None
        close(program(x), expected, "graph")
        value = program.aux_loss
        close(value, by_definition(gate, x)[1], "graph")
        value.backward()
    value = gate.aux_loss
    close(torch.export.export(gate, (x,)).module()(x), expected, "graph")
    assert gate.aux_loss is value
    check_trace(gate.eval(), x)
    with torch.no_grad():
        close(torch.jit.script(gate)(x), expected, "graph")
        close(torch.export.export(gate, (x,)).module()(x), expected, "graph")


def test_changed_and_transformed():
    gate, x = layer((8, 3, 4)), torch.randn(2, 5, 12)
    check_calls(gate, lambda m: m(x))
    check_changed_layers(gate.eval(), lambda m: m(x), x)
    check_transforms(layer((4, 1, 2)).eval(), lambda call, x: call(x), torch.randn(2, 5, 12))


def test_functional_call_has_the_value_of_its_parameters():
    gate, x = layer((8, 3, 4)), torch.randn(2, 5, 12)
    parameters = {name: p.detach() * 2 for name, p in gate.named_parameters()}

    def value(parameters):
        functional_call(gate, parameters, (x,))
        return load_balance(gate)

    doubled = copy.deepcopy(gate)
    doubled.load_state_dict(parameters)
    doubled(x)
    wanted = torch.autograd.grad(doubled.aux_loss, doubled.wg.weight)[0]
    close(torch.func.grad(value)(parameters)["wg.weight"], wanted, "gradient")


@pytest.mark.parametrize(
    ("heads", "message"),
    [
        ((4, 1, 0), "got num_heads=4 and shared=1 and routed=0, need shared to be num_heads, at least 2, where routed"),
        ((1, 1, 0), "need shared to be num_heads, at least 2"),
        ((4, 2, 3), "got num_heads=4 and shared=2 and routed=3, need routed from 0 to num_heads - shared"),
        ((4, 4, 1), "need routed from 0 to num_heads - shared"),
        ((4, -1, 2), "got shared=-1, need a whole number of at least 0"),
        ((4, 1, 1.5), "got routed=1.5, need a whole number of at least 0"),
        ((0, 0, 0), "got num_heads=0, need a whole number of at least 1"),
    ],
)
def test_refused_numbers(heads, message):
    with pytest.raises(ValueError, match=message):
        MixtureOfHeads(12, *heads)


@pytest.mark.parametrize(
    ("name", "seed"), [("aggregated_s2_r1", 0), ("aggregated_s1_r2", 1), ("global_s3_r4", 3), ("global_s0_r3", 4)]
)
def test_official_load_balance(name, seed):
    """The value that the official attention records, of its weights by their own names."""
    case = load(f"moh_{name}")
    args = case.meta["args"]
    gate = MixtureOfHeads(args["dim"], args["num_heads"], args["shared_head"], args["routed_head"])
    gate.load_state_dict({k: v for k, v in weights(case.keys).items() if k.startswith("wg")})
    gate(image(case.input_shape, seed))
    golden_close(gate.aux_loss.reshape(1), case.outputs["aux"], "load balance")


# transformers with gates

VIT = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 4, "num_classes": 5}
SWIN = {**VIT, "patch_size": 2, "window_size": 4, "embed_dim": 16, "depths": (2, 1), "num_heads": (2, 4)}
del SWIN["depth"]
HOSTS = {
    "vit": (VisionTransformer, VIT),
    "norms and registers": (VisionTransformer, {**VIT, "qk_norm": True, "scale_attn_norm": True, "reg_tokens": 2}),
    "beit": (Beit, {**VIT, "use_rel_pos_bias": True, "init_values": 0.1}),
    "eva": (Eva, {**VIT, "use_rot_pos_emb": True, "scale_attn_inner": True}),
    "eva, separate queries": (Eva, {**VIT, "use_rot_pos_emb": True, "qkv_fused": False}),
    "rope": (Eva, {**VIT, "use_rot_pos_emb": True, "attn_type": "rope"}),
    "swin": (SwinTransformer, SWIN),
    "swin v2": (SwinTransformerV2, SWIN),
    "relative positions": (VisionTransformerRelPos, VIT),
    "sam": (VisionTransformerSAM, {**VIT, "use_rel_pos": True, "window_size": 3}),
}


def host(name="vit", **kwargs):
    """A transformer whose every part matters, in evaluation mode."""
    cls, settings = HOSTS[name]
    model = cls(**{**settings, **kwargs}).eval()
    with torch.no_grad():
        for p in model.parameters():
            nn.init.normal_(p, std=0.3) if p.dim() < 2 else nn.init.xavier_normal_(p)
    return model


def attentions(model):
    return [m for m in model.modules() if type(m) in (*GATED, *GATED.values())]


def opened(model):
    """The model with gates that differ."""
    with torch.no_grad():
        for gate in model.modules():
            if isinstance(gate, MixtureOfHeads):
                for p in gate.parameters():
                    p.normal_()
    return model


@pytest.mark.parametrize("name", HOSTS)
def test_host(name):
    """Bit-equal at first where no head is dropped, then each gate weighs its own head; everything is trained."""
    model, x = host(name), torch.randn(2, 3, 32, 32)
    counts = [attn.num_heads for attn in attentions(model)]
    with torch.no_grad():
        expected = model(x)
        all_shared = moh(copy.deepcopy(model), counts, 0)
        close(all_shared(x), expected, "same")
        gated = moh(copy.deepcopy(model), 1, [h - 1 for h in counts])
        close(gated(x), expected, "same")
    assert all(type(m) is GATED[type(old)] for m, old in zip(attentions(gated), attentions(model), strict=True))
    gated.train()
    (gated(x).square().sum() + gated.extra_loss()).backward()
    assert all(p.grad is not None for key, p in gated.named_parameters() if ".gates." in key)

    with torch.no_grad():  # a gate of 0 for the second head is what values of 0 are
        for attn, old in zip(attentions(all_shared), attentions(model), strict=True):
            attn.gates.register_forward_hook(lambda _, __, out: out * (torch.arange(out.shape[-1]) != 1))
            value = old.v_proj.weight if getattr(old, "qkv", None) is None else old.qkv.weight.chunk(3)[2]
            bias = getattr(old, "v_bias", None)
            if bias is None:
                bias = old.v_proj.bias if getattr(old, "qkv", None) is None else old.qkv.bias.chunk(3)[2]
            for part in (value, bias):
                part.unflatten(0, (old.num_heads, -1))[1] = 0
        out = model(x)
        assert not torch.allclose(out, expected)
        close(all_shared(x), out, "rerun")


def test_host_in_use():
    """Gates are saved and copied, checkpointed, compiled, exported and traced with their model, and stay in its use."""
    model, x = opened(moh(host(depth=3), 1, 2)), torch.randn(2, 3, 32, 32)
    assert "blocks.2.attn.gates.wg_0.weight" in model.state_dict()
    twin = moh(host(depth=3), shared=[1] * 3, routed=torch.tensor([2] * 3))
    twin.load_state_dict(model.state_dict())
    model.train()
    expected = model(x)
    wanted = torch.autograd.grad(expected.square().sum() + model.extra_loss(), list(model.parameters()))
    for same in (twin.train(), copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert same.extra_loss() is None
        same.set_grad_checkpointing()
        out = same(x)
        close(out, expected, "rerun")
        close(load_balance(same), load_balance(model), "rerun")
        found = torch.autograd.grad(out.square().sum() + same.extra_loss(), list(same.parameters()))
        for actual, gradient in zip(found, wanted, strict=True):
            close(actual, gradient, "gradient")
    compiled = torch.compile(copy.deepcopy(model), fullgraph=True, backend="eager")
    close(compiled(x), expected, "graph")
    close(compiled.extra_loss(), model.extra_loss(), "graph")
    model.eval()
    with torch.no_grad():
        expected = model(x)
        close(torch.export.export(model, (x,)).module()(x), expected, "graph")
        features = model.forward_intermediates(x, intermediates_only=True)
        close(twin.eval()(x), expected, "same")
    assert len(features) == 3
    check_trace(model, x)
    model.reset_classifier(7)
    assert model(x).shape == (2, 7)


def test_checkpointing_keeps_the_first_pass():
    """The pass inside of backward has the value of the loss already, and its graph would hold what it recomputes."""
    model = moh(host(), 1, 2).train()
    model.set_grad_checkpointing()
    model(torch.randn(2, 3, 32, 32)).sum()
    first = [attn.gates.aux_loss for attn in attentions(model)]
    (model.head.weight.sum() + model.extra_loss()).backward()
    assert all(attn.gates.aux_loss is old for attn, old in zip(attentions(model), first, strict=True))


def test_features_of_a_host():
    """A wrapper of timm for features, given gates."""
    plain = timm.create_model("test_vit", features_only=True).eval()
    x = torch.randn(1, 3, 160, 160)
    with torch.no_grad():
        for actual, expected in zip(moh(copy.deepcopy(plain), 2, 0)(x), plain(x), strict=True):
            close(actual, expected, "same")


def test_extra_loss():
    """What ``vizoo train`` asks for, and no model that outlives its last name."""
    model, x = moh(host(), [2, 4], [1, 0], aux_weight=0.5).train(), torch.randn(2, 3, 32, 32)
    assert extra_loss(model, None, torch.sum) is None
    model(x)
    close(extra_loss(model, None, torch.sum), 0.5 * model.blocks[0].attn.gates.aux_loss, "same")
    gc.disable()
    old = weakref.ref(model)
    del model
    gc.enable()
    assert old() is None
    assert not hasattr(moh(host(), 4, 0, aux_weight=0), "extra_loss")


def test_masks():
    """A mask and the causal order reach timm's attention."""
    attn, x = host().blocks[0].attn, torch.randn(2, 5, 32)
    gated, mask = moh(nn.Sequential(copy.deepcopy(attn)), 4, 0)[0], torch.rand(2, 1, 5, 5) > 0.3
    for attn.fused_attn in (True, False):
        gated.fused_attn = attn.fused_attn
        for arguments in ({"attn_mask": mask | torch.eye(5, dtype=torch.bool)}, {"is_causal": True}):
            close(gated(x, **arguments), attn(x, **arguments), "same")
            assert not torch.allclose(gated(x, **arguments), attn(x))


def test_changed_host():
    """Layers of the attention and of its gates that are pruned, quantised or adapted take part."""
    model, x = opened(moh(host(), 1, 2)), torch.randn(2, 3, 32, 32)
    check_changed_layers(model, lambda m: m(x), x)


def test_refused_hosts():
    with pytest.raises(
        ValueError, match=r"got model=ResNet without an attention .* need one of timm.layers.attention.At"
    ):
        moh(timm.create_model("test_resnet"), 1, 1)
    with pytest.raises(ValueError, match="model has gates already"):
        moh(moh(host(), 4, 0), 4, 0)
    model = host()
    for message, *arguments in (
        ("got num_heads=4 and shared=1 and routed=4, need routed from 0 to num_heads - shared", 1, 4),
        ("got num_heads=4 and shared=3 and routed=0, need shared to be num_heads", [4, 3], 0),
        (r"got routed=\[1, 1, 1\], need a number, or 2, one for each attention", 1, [1] * 3),
        ("got shared='1', need a whole number of at least 0 or a list of whole numbers of at least 0", "1", 1),
        ("got aux_weight=-0.5, need a number of at least 0", 1, 1, -0.5),
    ):
        with pytest.raises(ValueError, match=message):
            moh(model, *arguments[:2], **dict(zip(["aux_weight"], arguments[2:], strict=False)))
        assert not [m for m in model.modules() if isinstance(m, MixtureOfHeads)]
    model.extra_loss = lambda: None
    with pytest.raises(ValueError, match=r"got aux_weight=0.01 for a model with an extra_loss of its own, need 0"):
        moh(model, 1, 1)
    assert moh(model, 1, 1, aux_weight=0) is model
