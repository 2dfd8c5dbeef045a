"""DependencyViT: pruning against a token-by-token loop, changed layers, programs, recorded masks."""

import collections
import copy
import inspect
import math

import pytest
import timm
import torch
from golden import image
from panels import check_family_explains, explained
from timm.layers import set_reentrant_ckpt, use_reentrant_ckpt
from timm.models.vision_transformer import VisionTransformer
from tolerance import close, op_close
from torch import nn
from torch.autograd import forward_ad
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import apply_activation_checkpointing
from torch.nn.utils import prune
from zoo import build, spread

from vizoo.backbones import dependencyvit as family
from vizoo.backbones.dependencyvit import (
    Block,
    DependencyViT,
    Messages,
    TokenPruning,
    WeightedMap,
    checkpoint_filter_fn,
)
from vizoo.backbones.layers import dependency_tree, saliency, subtrees

PATHS = {"fused": True, "plain": False}
KINDS = ["test_dependencyvit", "test_dependencyvit_lite"]


def test_gates_start_open_and_their_biases_are_optional():
    fc2 = build("test_dependencyvit").blocks[1].attn.message_controller.fc2
    assert fc2.bias.item() == 4
    bare = build("test_dependencyvit", gate_bias=False).blocks[0].attn.message_controller
    assert bare.fc1.bias is None
    assert bare.fc2.bias is None
    assert build("test_dependencyvit", gate_init=1.5).blocks[0].attn.message_controller.fc2.bias.item() == 1.5


# pruning


@pytest.mark.parametrize("size", [(224, 224), (256, 256), (384, 384), (208, 336), (32, 48), (16, 16)], ids=str)
def test_lite_counts(size):
    """16 % of the original tokens go after the attention of blocks 2, 5, 8 and 11."""
    model = build("dependencyvit_lite_tiny", device="meta")
    counts = []
    for block in model.blocks:
        block.mlp.register_forward_pre_hook(lambda _, inputs: counts.append(inputs[0].shape[1]))
    assert model(torch.empty(2, 3, *size, device="meta")).shape == (2, 1000)
    N = size[0] * size[1] // 256
    kept = [max(1, N * (100 - 16 * k) // 100) for k in range(5)]
    assert counts == [kept[0], *(kept[1],) * 3, *(kept[2],) * 3, *(kept[3],) * 3, *(kept[4],) * 2]
    if size == (224, 224):
        assert kept == [196, 164, 133, 101, 70]


def test_pruning_keeps_the_order_and_takes_the_message_along():
    x, dense = torch.arange(10.0).reshape(1, 10, 1), torch.zeros(1, 2, 5, 1)
    score = torch.tensor([[3.0, 1.0, 2.0, 2.0, 5.0, 0.0, 2.0, 9.0, 2.0, 4.0]])
    log_message = -torch.arange(10.0).reshape(1, 10)
    x, log_message, index, dense = TokenPruning(0.4)(x, score, log_message, None, dense)
    assert index.tolist() == [[0, 2, 3, 4, 7, 9]]  # of the four 2s the two first
    assert x.flatten().tolist() == index[0].tolist()
    assert log_message.tolist() == [[-i for i in index[0]]]
    assert dense.flatten().tolist() == list(range(10))
    # again, from the original count; the map keeps what the pruned ones were
    x, log_message, index, dense = TokenPruning(0.8)(x + 100, -x[..., 0], log_message, index, dense)
    assert index.tolist() == [[0, 2]]
    assert x.flatten().tolist() == [100, 102]
    assert dense.flatten().tolist() == [100, 1, 102, 103, 104, 5, 6, 107, 8, 109]
    assert TokenPruning(0.99)(x, x[..., 0], log_message, None, dense[:, :1, :2])[2].tolist() == [[1]]


def by_token(model, x):
    """The Lite model written down for one image, with a dictionary of tokens and the definition of the operator.

    Returns:
        The maps after every block, the last tokens by position, and their messages.
    """
    H, W = x.shape[2] // 16, x.shape[3] // 16
    start = model._embed(x)[0].flatten(0, 1)
    alive, states = list(range(H * W)), dict(enumerate(start))
    message = dict.fromkeys(alive, 1.0)
    maps, pruned = [], 0
    for number, block in enumerate(model.blocks, 1):
        a, normed = block.attn, block.norm1(torch.stack([states[i] for i in alive]))
        gate = torch.sigmoid(a.message_controller.fc2(a.message_controller.act(a.message_controller.fc1(normed))))
        message = {i: message[i] * float(g) for i, g in zip(alive, gate[:, 0], strict=True)}
        M = torch.tensor([message[i] for i in alive], dtype=x.dtype)
        P = (a.head_selector(normed) / a.tau).softmax(1)
        d = normed.shape[1] // a.num_heads
        collected, received = [], 0
        for h, (q, k, v) in enumerate(zip(*(t.split(d, 1) for t in a.qkv(normed).chunk(3, 1)), strict=True)):
            R = ((q @ k.T / d**0.5).softmax(1) * (P[:, h] * M)[:, None]).T
            collected.append(R @ v)
            received = received + R.sum(1)
        sent = block.ls1(a.proj(torch.cat(collected, 1)))
        states.update({i: states[i] + s for i, s in zip(alive, sent, strict=True)})
        if number in model.prune_at:
            pruned += 1
            score = dict(zip(alive, (M if model.by == "message" else received).tolist(), strict=True))
            count = math.floor(H * W * (1 - 0.16 * pruned) + 1e-9)
            alive = sorted(sorted(alive, key=lambda i: (-score[i], i))[:count])
        fed = block.ls2(block.mlp(block.norm2(torch.stack([states[i] for i in alive]))))
        states.update({i: states[i] + f for i, f in zip(alive, fed, strict=True)})
        maps.append(torch.stack([states[i] for i in range(H * W)]).T.reshape(-1, H, W))
    last = model.norm(torch.stack([states[i] for i in alive]))
    return maps, dict(zip(alive, last, strict=True)), {i: message[i] for i in alive}


@pytest.fixture(scope="module", params=["message", "received"])
def lite(request):
    model = spread(build("test_dependencyvit_lite", prune_score=request.param, gate_init=0.0)).double()
    model.prune_at, model.by = (1, 3), request.param
    return model


@torch.no_grad()
def test_lite_is_the_loop_over_tokens(lite):
    x = image((2, 3, 80, 128)).double()
    final, features = lite.forward_intermediates(x)
    logits, weighted = lite(x), lite.forward_features(x)
    op_close(final, weighted)
    for b in range(2):
        maps, last, message = by_token(lite, x[b : b + 1])
        assert len(last) == math.floor(40 * (1 - 0.32) + 1e-9)
        for feature, expected in zip(features, maps, strict=True):
            op_close(feature[b], expected)
        total = sum(message.values())
        pooled = sum(message[i] / total * last[i] for i in last)
        op_close(lite.forward_head(weighted, pre_logits=True)[b], pooled)
        op_close(logits[b], lite.head.fc(pooled))
        gone = [i for i in range(40) if i not in last]
        assert not weighted[b].flatten(0, 1)[gone].any()
        i = min(last)
        op_close(weighted[b].flatten(0, 1)[i], last[i] * message[i] * 40 / total)


def test_message_pools():
    x, log_message = torch.randn(2, 5, 7).double(), -torch.rand(2, 5).double()
    index = torch.tensor([[0, 1, 3, 4, 5], [0, 1, 2, 3, 7]])
    M, dense = log_message.exp().unsqueeze(-1), torch.randn(2, 2, 4, 7).double()
    expected = {"message": (M * x).sum(1) / M.sum(1), "message_mean": (M * x).mean(1), "avg": x.mean(1)}
    for pool, wanted in expected.items():
        op_close(WeightedMap(pool)(x, log_message, index, dense).mean((1, 2)), wanted)
        whole = WeightedMap(pool)(x[:, :4], log_message[:, :4], None, dense[:, :1])
        assert whole.shape == (2, 1, 4, 7)


def test_layer_scale_of_the_default_hides_the_blocks():
    assert build("dependencyvit_tiny", device="meta").blocks[0].ls1.gamma.shape == (192,)
    small = DependencyViT(img_size=32, embed_dim=24, depth=1, num_heads=2)
    assert small.blocks[0].ls2.gamma.tolist() == pytest.approx([1e-6] * 24)
    assert isinstance(build("test_dependencyvit", init_values=0).blocks[0].ls1, nn.Identity)


def test_checkpoint_of_another_image_and_patch_size():
    model = build("test_dependencyvit")
    other = build("test_dependencyvit", img_size=(64, 48), patch_size=8)
    other.load_state_dict(checkpoint_filter_fn({"state_dict": model.state_dict()}, other))
    assert other.pos_embed.shape == (1, 8, 6, 40)
    model.set_input_size((64, 48), 8)
    close(model(image((1, 3, 64, 48))), other(image((1, 3, 64, 48))), "rerun")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"prune_blocks": (0, 2)}, r"got prune_blocks=\(0, 2\), need rising numbers from 1 to depth=4"),
        ({"prune_blocks": (3, 2)}, "need rising numbers"),
        ({"prune_blocks": (1, 2), "prune_ratio": 0.5}, "got prune_ratio=0.5, need a number above 0 and below 1/2"),
        ({"prune_blocks": (1,), "prune_score": "rows"}, "got prune_score='rows', need 'message' or 'received'"),
        ({"message_pool": "sum"}, "got message_pool='sum', need 'message', 'message_mean' or 'avg'"),
        ({"num_heads": 3}, "got embed_dim=40 and num_heads=3"),
        ({"tau": 0.0}, "got tau=0.0"),
    ],
)
def test_rejects(arguments, message):
    with pytest.raises(ValueError, match=message):
        timm.create_model("test_dependencyvit", **arguments)


# blocks as modules


@pytest.mark.parametrize("name", KINDS)
def test_hooks_get_the_tokens(name):
    """What a hook of Grad-CAM gets of a block is one tensor with a gradient, on the Lite model of the tokens left."""
    model, kept = spread(build(name)), []
    model.blocks[1].register_forward_hook(lambda _, inputs, out: out.retain_grad() or kept.append(out))
    passed = []
    model.blocks[2].register_full_backward_hook(lambda _, inputs, outputs: passed.append((inputs[0], outputs[0])))
    model(image((2, 3, 96, 64)))[:, 3].sum().backward()
    (tokens,) = kept
    assert tokens.shape == (2, 20 if "lite" in name else 24, 40)
    assert tokens.grad.abs().sum(2).gt(0).all()
    # of the messages, too, and those do not go through the tokens
    torch.testing.assert_close(passed[0][0], tokens.grad, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("name", KINDS)
def test_blocks_can_be_run_again(name):
    """A block overwrites nothing that it reads: wrapped for activation checkpointing by others, it learns the same."""
    model, x = spread(build(name, num_classes=5, gate_init=0.0)).train(), image((2, 3, 96, 64))
    twin = copy.deepcopy(model)
    apply_activation_checkpointing(twin, check_fn=lambda module: isinstance(module, Block))
    for net in (model, twin):
        net(x).square().sum().backward()
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        close(q.grad, p.grad, "gradient")


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_keeps_the_gradient_of_the_messages(reentrant):
    model, x = spread(build("test_dependencyvit_lite", num_classes=5, gate_init=0.0)).train(), image((2, 3, 96, 64))
    twin = copy.deepcopy(model)
    twin.set_grad_checkpointing()
    before = use_reentrant_ckpt()
    set_reentrant_ckpt(reentrant)
    try:
        for net in (model, twin):
            net(x.clone().requires_grad_()).square().sum().backward()
    finally:
        set_reentrant_ckpt(before)
    for (key, p), q in zip(model.named_parameters(), twin.parameters(), strict=True):
        assert p.grad.any(), key
        close(q.grad, p.grad, "gradient", key)


def test_messages_follow_the_tokens_to_another_device():
    """accelerate moves the inputs of a block that have a method ``to``."""
    state = Messages(torch.zeros(2, 3), torch.zeros(2, 3, dtype=torch.int64), torch.zeros(2, 2, 2, 4))
    moved = state.to("meta", non_blocking=True)
    assert moved is state
    assert {t.device.type for t in (state.log_message, state.index, state.dense)} == {"meta"}
    first = Messages(None, None, torch.zeros(2, 2, 2, 4)).to("meta")
    assert first.dense.device.type == "meta"
    assert first.log_message is first.index is None


@pytest.mark.parametrize("grad", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("name", KINDS)
def test_each_block_compiles(name, grad):
    torch._dynamo.reset()
    model, x = build(name, num_classes=5, depth=3), image((2, 3, 96, 64))  # pruned, not pruned, pruned again
    twin = copy.deepcopy(model)
    for block in twin.blocks:
        block.compile(backend="aot_eager", fullgraph=True)
    with torch.set_grad_enabled(grad):
        out, expected = twin(x), model(x)
        close(out, expected, "layout")
    if grad:
        out.square().sum().backward()
        expected.square().sum().backward()
        for p, q in zip(model.parameters(), twin.parameters(), strict=True):
            close(q.grad, p.grad, "gradient")


# layers that people change


def calls(model):
    """A counter of the calls of every leaf with parameters, in passes to come."""
    counter = collections.Counter()
    for key, layer in model.named_modules():
        if any(True for _ in layer.parameters()) and not any(True for _ in layer.children()):
            counter[key] = 0
            layer.register_forward_hook(lambda *_, key=key: counter.update([key]))
    return counter


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("score", ["message", "received"])
@pytest.mark.parametrize("name", KINDS)
def test_every_layer_is_called_once(name, score, dtype):
    model, x = build(name, prune_score=score, dtype=dtype), image((2, 3, 96, 64)).to(dtype)
    counter = calls(model)
    assert len(counter) > 40
    for passes, (training, grad) in enumerate(((True, True), (False, True), (False, False)), 1):
        with torch.set_grad_enabled(grad):
            model.train(training)(x)
        assert set(counter.values()) == {passes}, counter


@pytest.mark.parametrize("name", KINDS)
def test_adapters_pruning_and_weight_norm(name):
    """What is done to a layer is seen by the model, with and without gradients."""
    model, x = build(name, num_classes=5, init_values=1.0), image((2, 3, 96, 64))
    linear = [key for key, layer in model.named_modules() if isinstance(layer, nn.Linear)]
    pruned, normed, expected, scaled = (copy.deepcopy(model) for _ in range(4))
    for key in linear:
        prune.l1_unstructured(pruned.get_submodule(key), "weight", 0.5)
        with pytest.warns(FutureWarning, match="weight_norm"):
            nn.utils.weight_norm(normed.get_submodule(key))
        with torch.no_grad():
            expected.get_submodule(key).weight.copy_(pruned.get_submodule(key).weight)
            scaled.get_submodule(key).weight.mul_(1.5)
            normed.get_submodule(key).weight_g.mul_(1.5)
    for grad in (True, False):
        with torch.set_grad_enabled(grad):
            close(pruned(x), expected(x), "same")
            close(normed(x), scaled(x), "rerun")
    peft = pytest.importorskip("peft")
    targets = [key for key in linear if key.startswith("blocks.")]
    adapted = peft.get_peft_model(model, peft.LoraConfig(target_modules=targets, r=2, init_lora_weights=False))
    adapted(x).square().sum().backward()
    trained = {k: p.grad for k, p in adapted.named_parameters() if p.requires_grad}
    assert len(trained) == 2 * len(targets)
    assert all(g.any() for g in trained.values())
    with torch.no_grad():
        out = adapted.eval()(x)
        close(adapted.merge_and_unload()(x), out, "rerun")


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore:torch.quantize_per_tensor:UserWarning")
def test_dynamic_quantization():
    """Its layers take float32, compute in int8, and are called."""
    model, x = build("test_dependencyvit", init_values=1.0), image((2, 3, 96, 64))
    quantized = torch.ao.quantization.quantize_dynamic(copy.deepcopy(model), {nn.Linear}, dtype=torch.qint8)
    assert type(quantized.blocks[0].attn.message_controller.fc1) is torch.ao.nn.quantized.dynamic.Linear
    with torch.no_grad():
        out, expected = quantized(x), model(x)
    assert 0 < (out - expected).norm() / expected.norm() < 0.1


@pytest.mark.parametrize("name", KINDS)
def test_deterministic_algorithms(name):
    model, x, found = build(name, num_classes=5), image((2, 3, 80, 64)), []
    torch.use_deterministic_algorithms(True)
    try:
        for training in (False, True, True):
            model.zero_grad()
            out = model.train(training)(x)
            out.square().sum().backward()
            found.append(torch.cat([out.detach().flatten(), *(p.grad.flatten() for p in model.parameters())]))
    finally:
        torch.use_deterministic_algorithms(False)
    assert torch.equal(found[1], found[2])


@pytest.mark.parametrize("name", KINDS)
def test_no_images(name):
    model, x = build(name), torch.zeros(0, 3, 96, 64)
    for training in (True, False):
        out = model.train(training)(x)
        assert out.shape == (0, 1000)
        out.sum().backward()
        with torch.no_grad():
            assert model(x).shape == (0, 1000)
            final, features = model.forward_intermediates(x)
        assert final.shape == (0, 6, 4, 40)
        assert [f.shape for f in features] == [(0, 40, 6, 4)] * 4


def test_intermediates_as_of_timms_plain_transformer():
    """Arguments in timm's order, and without prefix tokens nothing to return for them."""
    wanted = inspect.signature(VisionTransformer.forward_intermediates).parameters
    offered = inspect.signature(DependencyViT.forward_intermediates).parameters
    assert [(k, p.default) for k, p in offered.items()] == [(k, wanted[k].default) for k in offered]
    assert list(offered) == list(wanted)[: len(offered)]
    model, x = build("test_dependencyvit_lite"), image((1, 3, 96, 64))
    with torch.no_grad():
        final, features = model.forward_intermediates(x)
        for flag in (False, True):
            only = model.forward_intermediates(x, [1, 3], flag, intermediates_only=True)
            for actual, expected in zip(only, features[1::2], strict=True):
                close(actual, expected, "same")
        found = model.forward_intermediates(x, output_dict=True)
        assert found.keys() == {"image_intermediates", "image_features"}
        close(found["image_features"], final, "same")
        assert len(found["image_intermediates"]) == 4
        only = model.forward_intermediates(x, output_dict=True, intermediates_only=True)
        assert only.keys() == {"image_intermediates"}


# half precision


def chosen(model, x):
    """Positions that are left in the end."""
    left = []
    last = [block.prune for block in model.blocks if block.prune is not None][-1]
    with torch.no_grad(), last.register_forward_hook(lambda _, inputs, out: left.append(out[2])):
        model(x)
    return left[0]


@pytest.mark.parametrize("mixed", [False, True], ids=["half", "autocast"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
def test_half_precision_chooses_the_same_tokens(dtype, mixed):
    """99 % of the tokens left are those that float32 leaves; gates in half precision leave 81 % (bf16) or 97 % (fp16)
    of them."""
    model, x = build("test_dependencyvit_lite"), image((8, 3, 224, 224))
    half = model if mixed else copy.deepcopy(model).to(dtype)
    wide = model if mixed else copy.deepcopy(half).float()
    expected = chosen(wide, x if mixed else x.to(dtype).float())
    with torch.autocast("cpu", dtype=dtype, enabled=mixed):
        found = chosen(half, x if mixed else x.to(dtype))
    common = sum(len(set(a).intersection(b)) for a, b in zip(found.tolist(), expected.tolist(), strict=True))
    assert found.shape == expected.shape == (8, 133)
    assert common / expected.numel() >= 0.99


# programs and transforms


SIZES = [(2, 3, 96, 128), (1, 3, 96, 96), (3, 3, 64, 160), (2, 3, 101, 135), (2, 3, 224, 224), (1, 3, 32, 32)]


@pytest.mark.parametrize("name", KINDS)
def test_exports_any_size(name):
    """One program for every batch, height and width: positions are resampled and tokens counted in it."""
    model = spread(build(name, num_classes=5, gate_init=0.0))
    nn.init.normal_(model.pos_embed)
    sizes = {i: torch.export.Dim(n, min=low, max=512) for i, n, low in ((0, "b", 1), (2, "h", 32), (3, "w", 32))}
    with torch.no_grad():
        program = torch.export.export(model, (image(SIZES[0]),), dynamic_shapes=(sizes,), strict=False)
        assert "vizoo" not in str(program.graph)
        program = program.module()
        for size in SIZES:
            close(program(image(size)), model(image(size)), "graph", str(size))
        # at a fixed size nothing is resampled
        fixed = torch.export.export(model, (image((1, 3, 96, 96)),), strict=False)
        assert "bicubic" not in str(fixed.graph)


def test_counts_are_those_of_the_decimal_shares():
    """Whole numbers round as the decimal numbers that were meant."""
    for share in (0.16, 0.32, 0.48, 0.64, 0.1, 0.3, 1 / 3, 2 / 3, 0.999):
        pruning = TokenPruning(share)
        for N in range(1, 2000, 7):
            assert N * pruning.parts // pruning.whole == math.floor(N * (1 - share) + 1e-9), (share, N)


@pytest.mark.filterwarnings("ignore:`torch.jit:FutureWarning")  # PyTorch scripts its own decompositions for jvp
@pytest.mark.parametrize("score", ["message", "received"])
@pytest.mark.parametrize("name", KINDS)
def test_transforms(name, score):
    """Gradients per sample, directional and second derivatives, also of the models that sort and gather."""
    model = spread(build(name, num_classes=3, gate_init=0.0, prune_score=score)).double()
    x, labels, v = image((3, 3, 64, 80)).double(), torch.tensor([0, 2, 1]), image((3, 3, 64, 80), 1).double()
    parameters = {k: p.detach() for k, p in model.named_parameters()}

    def loss(parameters, x, label):
        out = torch.func.functional_call(model, parameters, (x[None],))
        return nn.functional.cross_entropy(out, label[None])

    each = torch.func.vmap(torch.func.grad(loss), (None, 0, 0))(parameters, x, labels)
    for i in range(3):
        model.zero_grad()
        nn.functional.cross_entropy(model(x[i : i + 1]), labels[i : i + 1]).backward()
        for key, p in model.named_parameters():
            op_close(each[key][i], p.grad, grad=True, what=key)

    with torch.no_grad():
        difference = (model(x + 1e-6 * v) - model(x - 1e-6 * v)) / 2e-6
    _, tangent = torch.func.jvp(model, (x,), (v,))
    torch.testing.assert_close(tangent, difference, rtol=1e-5, atol=1e-8)
    for grad in (True, False):
        with torch.set_grad_enabled(grad), forward_ad.dual_level():
            dual = forward_ad.unpack_dual(model(forward_ad.make_dual(x, v)))
            op_close(dual.tangent, tangent)
    jacobian = torch.func.jacrev(model)(x[:1])[0, :, 0]
    op_close((jacobian * v[0]).sum((1, 2, 3)), tangent[0])

    def slope(x):
        x = x.clone().requires_grad_()
        (g,) = torch.autograd.grad(model(x).square().sum(), x, create_graph=True)
        return x, g

    at, g = slope(x)
    (curvature,) = torch.autograd.grad((g * v).sum(), at)
    difference = (slope(x + 1e-5 * v)[1] - slope(x - 1e-5 * v)[1]).detach() / 2e-5
    torch.testing.assert_close(curvature, difference, rtol=1e-5, atol=1e-7)


# what is recorded


@torch.no_grad()
def test_recorded_masks(lite):
    """Columns sum to the messages where a token is alive, and are zero where it is gone, in every layer."""
    x = image((2, 3, 64, 96)).double()
    plain = lite(x)
    lite.set_record_dependency()
    torch.testing.assert_close(lite(x), plain, rtol=0, atol=0)
    found = lite.get_dependency()
    assert found.masks.shape == (2, 4, 24, 24)
    assert found.size == (4, 6)
    kept = [24, 20, 20, 16]  # senders of each layer: those of the block before
    assert (found.masks.sum(2) > 0).sum(2).tolist() == [kept, kept]
    assert sorted(found.reached[0].tolist()) == [1] * 4 + [3] * 4 + [4] * 16
    last = found.reached - 1
    sent = found.masks.sum(2).gather(1, last[:, None])[:, 0]
    assert (sent - found.message).abs().max() <= 1e-6
    for b in range(2):
        assert not found.masks[b, 3][found.reached[b] < 4].any()
    for layers, picked in ((2, [2, 3]), ([0, -1], [0, 3]), ([1], [1])):
        torch.testing.assert_close(lite.get_dependency(layers).masks, found.masks[:, picked], rtol=0, atol=0)
    for layers in ([4], [-5], [], 0, 5):
        with pytest.raises(ValueError, match="need 1 to 4, or a list of numbers from -4 to 3"):
            lite.get_dependency(layers)
    lite.set_record_dependency(False)
    lite(x)
    with pytest.raises(ValueError, match=r"call set_record_dependency\(True\), then run the model"):
        lite.get_dependency()


@torch.no_grad()
def test_columns_sum_to_the_message_in_float32():
    model = spread(build("test_dependencyvit", gate_init=0.0))
    model.set_record_dependency()
    model(image((3, 3, 96, 64)))
    found = model.get_dependency()
    assert (found.masks[:, -1].sum(1) - found.message).abs().max() <= 1e-6
    assert found.message.std() > 1e-3


# explain


@pytest.mark.parametrize("method", ["greedy", "edmonds"])
def test_explain_shows_what_the_model_recorded(method):
    model = timm.create_model("test_dependencyvit_lite", num_classes=7)
    model.blocks[0].attn.record = True  # as somebody else set it
    x = torch.randn(1, 3, 64, 96)
    tree_panel, parts_panel, saliency_panel = explained(model, x, method=method, layers=3, parts=3, min_size=2)
    assert [block.attn.record for block in model.blocks] == [True, False, False, False]
    model.set_record_dependency()
    with torch.no_grad():
        model(x)
        found = model.get_dependency(3)
    tree = dependency_tree(found, method)
    assert torch.equal(parts_panel.parts, subtrees(found, tree, 3, 2)[0])
    received, foreground = saliency(found)
    close(saliency_panel.heat, received[0], "rerun")
    assert torch.equal(saliency_panel.outline, foreground[0])
    parents = tree.parents[0]
    children = (parents >= 0).nonzero()[:, 0]

    def place(token):
        return torch.stack([(token // 6 + 0.5) / 4, (token % 6 + 0.5) / 6], -1)

    close(tree_panel.lines, torch.stack([place(children), place(parents[children])], 1), "same")
    close(tree_panel.points, place((parents < 0).nonzero()[:, 0]), "same")
    close(tree_panel.strength, found.masks[0].mean(0)[parents[children], children], "rerun")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"layers": 5}, "got layers=5, need 1 to 4"),
        ({"layers": 0}, "got layers=0"),
        ({"parts": 0}, "got parts=0"),
        ({"min_size": 0}, "got min_size=0"),
        ({"method": "best"}, "got method='best'"),
    ],
    ids=str,
)
def test_explain_refuses(settings, message):
    with pytest.raises(ValueError, match=message):
        timm.create_model("test_dependencyvit").explain(torch.zeros(1, 3, 96, 96), **settings)


def test_explain_takes_any_model_of_the_family():
    model = timm.create_model("test_dependencyvit", in_chans=1).bfloat16()
    assert len(explained(model, torch.randn(1, 1, 96, 80).bfloat16())) == 3
    with pytest.raises(ValueError, match="need at most 4,096 tokens"):
        model.explain(torch.zeros(1, 1, 1056, 1056))
    check_family_explains(family)
