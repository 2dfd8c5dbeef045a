"""OAT: official outputs, decoding, scenes as images and boxes, the contract of timm where it applies."""

from __future__ import annotations

import copy
import inspect
import itertools
import pickle

import pytest
import timm
import torch
import torch.nn.functional as F
from changes import calls, check_calls, check_changed_layers, check_trace, check_transforms
from golden import image, load, weights
from panels import check_family_explains, explained
from timm.models import group_parameters, save_for_hf
from tolerance import close, golden_close, op_close
from torch import nn
from torchvision.ops import roi_align
from zoo import build, gradients, overlay

from vizoo.backbones import oat as family
from vizoo.backbones.oat import (
    CrossAttention,
    checkpoint_filter_fn,
    cut,
    next_fixations,
    pyramid_level,
    spread_fixations,
)
from vizoo.tools.profiler import count

CASES = ("oat_small", "oat_small_spp")


def official(name, **kwargs):
    """A golden case and the model of its arguments, with the official weights."""
    case = load(name)
    args = case.meta["args"]
    if args["fn"] == "learned":
        kwargs["pe_table"] = case.outputs["pe_table"]
    model = build(
        "oat_base",
        embed_dim=args["emb"],
        num_heads=args["nhead"],
        mlp_dim=args["ffn"],
        enc_depth=args["enc"],
        dec_depth=args["dec"],
        head_count=args["CA_head"],
        head_dim_scale=args["CA_dk"],
        spp=args["spp"],
        crop_size=args["crop_hw"],
        grid=(args["rows"], args["cols"]),
        pe="gauss" if args["fn"] == "learned" else args["fn"],
        pe_alpha=args["alpha"],
        **kwargs,
    )
    model.load_state_dict(checkpoint_filter_fn({"state_dict": weights(case.keys)}, model), strict=True)
    return case, model


def crops_of(case):
    """The recorded scenes, channels first."""
    return image(case.input_shape).permute(0, 1, 4, 2, 3)


# the official outputs


@pytest.mark.parametrize("grad", [True, False], ids=["autograd", "inference"])
@pytest.mark.parametrize("name", CASES)
def test_golden(name, grad):
    case, model = official(name)
    with torch.set_grad_enabled(grad):
        logits = model.forward_objects(crops_of(case), None, case.outputs["targets"], case.outputs["prefix"])
    golden_close(logits.transpose(0, 1), case.outputs["logits"], name)


def test_golden_greedy():
    case, model = official("oat_small")
    recorded = case.outputs["greedy"]
    paths = model.generate(crops_of(case), target=case.outputs["targets"], max_len=recorded.shape[1])
    assert paths == [[i for i in row if i not in (-1, 15)] for row in recorded.tolist()]


def test_golden_appearance():
    for name in CASES:
        case, model = official(name)
        with torch.no_grad():
            seen = model.appearance(crops_of(case).flatten(0, 1)).unflatten(0, case.input_shape[:2])
        expected = case.outputs["object_embedding"]
        golden_close(seen[..., :: seen.shape[-1] // expected.shape[-1]], expected, name)


# decoding


def scenes(b=3, n=15, height=24, width=20):
    return torch.rand(b, n, 3, height, width), torch.randint(n, (b,))


def lively(**kwargs):
    """A model whose scanpaths neither stop at once nor repeat one object."""
    torch.manual_seed(0)
    model = build("test_oat", **kwargs)
    for p in (model.head.query.weight, model.head.key.weight, model.appearance.fc.weight):
        p.data.mul_(3)
    return model


@pytest.mark.parametrize("masked", [False, True])
def test_steps_give_the_logits_of_full_decoding(masked):
    """Forward from kept keys, for several scanpaths of each scene at once."""
    model = lively()
    crops, target = scenes(2)
    mask = torch.arange(15) < torch.tensor([15, 9])[:, None] if masked else None
    target = target.clamp_max(8)
    prefix = torch.randint(9, (2, 3, 5))  # three scanpaths of each scene
    with torch.no_grad():
        scene, cache = model._prepare(crops, None, target, mask, None), {}
        start = torch.full((2, 3, 1), 17)
        steps = [model._step(scene, i, t, cache) for t, i in enumerate(torch.cat((start, prefix), 2).unbind(2))]
        for k in range(3):
            whole = model.forward_objects(crops, target=target, prefix=prefix[:, k], object_mask=mask)
            close(torch.stack([s[:, k] for s in steps], 1), whole, "rerun")


def test_sampling():
    """Seeded draws repeat, and their first fixations follow the probabilities."""
    model = lively()
    crops, target = scenes(2)

    def draw(seed):
        generator = torch.Generator().manual_seed(seed)
        return model.generate(crops, target=target, max_len=3, mode="sample", num_samples=2000, generator=generator)

    paths = draw(0)
    assert len(paths) == 4000
    assert paths == draw(0)
    assert paths != draw(1)
    assert {len(p) for p in paths} <= {1, 2, 3}
    with torch.no_grad():
        expected = model.forward_objects(crops, target=target)[:, 0, :15].softmax(-1)
    for b in range(2):
        first = torch.bincount(torch.tensor([p[0] for p in paths[2000 * b : 2000 * (b + 1)]]), minlength=15) / 2000
        assert (first - expected[b]).abs().max() < 0.05


def test_first_fixation_is_an_object():
    """Even a model that wants to stop at once looks at one object, and then stops."""
    model = build("test_oat", head_count=1)
    model.head.query.weight.data.zero_()
    model.head.key.weight.data.zero_()
    model.head.query.bias.data.fill_(1.0)
    model._mask = lambda logits, scene: torch.zeros_like(logits).index_fill(2, torch.tensor([15]), 9.0)
    assert model.generate(scenes(2)[0], max_len=5) == [[0], [0]]


def test_padding_changes_nothing():
    model = lively()
    crops, target = scenes(2)
    prefix = torch.tensor([[3, 4, 9], [7, -1, -1]])
    with torch.no_grad():
        together = model.forward_objects(crops, None, target, prefix)
        alone = model.forward_objects(crops[1:], None, target[1:], prefix[1:, :1])
        close(together[1:, :2], alone, "rerun")
        ended = torch.tensor([[7, 15, -1]])  # an end token behind the scanpath, as in the official batches
        close(model.forward_objects(crops[1:], None, target[1:], ended)[:, :2], alone, "rerun")


# what a scene is


def test_objects_may_be_permuted():
    model = lively()
    crops, target = scenes(2)
    coords = torch.rand(2, 15, 2) * torch.tensor([2.0, 4.0])
    prefix = torch.tensor([[3, 4, 9], [7, 0, 7]])
    order = torch.randperm(15)
    place = order.argsort()  # where an object has gone
    with torch.no_grad():
        expected = model.forward_objects(crops, coords, target, prefix)
        moved = model.forward_objects(crops[:, order], coords[:, order], place[target], place[prefix])
    close(moved[..., :15], expected[..., order], "rerun")
    close(moved[..., 15:], expected[..., 15:], "rerun")


def test_end_follows_the_target():
    model = lively()
    crops, _ = scenes(1)
    with torch.no_grad():
        a, b = (model.forward_objects(crops, target=torch.tensor([t])) for t in (2, 11))
    assert (a[..., 15] - b[..., 15]).abs().min() > 1e-3
    assert torch.equal(a[..., 16], b[..., 16])  # padding: the bias of the readout
    close(a[..., 16].flatten(), model.head.readout.bias.detach(), "same")


def test_object_mask():
    """A scene with padding gives what it gives without, in logits and in scanpaths."""
    model = lively()
    crops, target = scenes(2)
    target = target.clamp_max(6)
    coords = torch.rand(2, 15, 2) * torch.tensor([2.0, 4.0])
    prefix = torch.tensor([[3, 4], [5, 0]])
    mask = torch.arange(15).expand(2, -1) < 7
    with torch.no_grad():
        padded = model.forward_objects(crops, coords, target, prefix, mask)
        bare = model.forward_objects(crops[:, :7], coords[:, :7], target, prefix)
    assert (padded[..., 7:15] == -torch.inf).all()
    close(torch.cat((padded[..., :7], padded[..., 15:]), -1), bare, "rerun")
    short = model.generate(crops[:, :7], target=target, coords=coords[:, :7])
    assert model.generate(crops, target=target, coords=coords, object_mask=mask) == short


def test_image_and_boxes():
    """A grid over the image is what its boxes are; crops cut along pixel edges are the pixels."""
    model = build("test_oat", crop_size=(24, 20))
    image = torch.rand(2, 3, 3 * 24, 5 * 20)
    corners = torch.tensor([[20 * c, 24 * r, 20 * c + 20, 24 * r + 24] for r in range(3) for c in range(5)])
    crops = image.unflatten(2, (3, 24)).unflatten(4, (5, 20)).permute(0, 2, 4, 1, 3, 5).flatten(1, 2)
    target, prefix = torch.tensor([4, 9]), torch.tensor([[2], [14]])
    with torch.no_grad():
        expected = model.forward_objects(crops, None, target, prefix)
        close(model(image, None, target, prefix), expected, "rerun")
        close(model(image, corners.float().expand(2, -1, -1), target, prefix), expected, "rerun")
        assert model(image).shape == (2, 1, 17)
        close(model(image), model(image, None, torch.zeros(2, dtype=torch.long)), "same")
    table = build("test_oat", crop_size=(24, 20), pe_table=torch.randn(8, 8))  # looked up by whole numbers
    with torch.no_grad():
        boxed = table(image, corners.float().expand(2, -1, -1), target, prefix)
        close(boxed, table(image, None, target, prefix), "rerun")


def test_free_boxes_move_the_code():
    model = build("test_oat")
    image = torch.rand(1, 3, 90, 150)
    boxes = torch.tensor([[[10.0, 5, 40, 35], [100, 50, 149, 80]]])
    close(
        model._place_boxes(image, boxes),
        torch.tensor([[[20 / 30 - 0.5, 25 / 30 - 0.5], [65 / 30 - 0.5, 124.5 / 30 - 0.5]]]),
        "rerun",
    )
    with torch.no_grad():
        assert model(image, boxes).shape == (1, 1, 4)
        assert not torch.allclose(model(image, boxes), model(image, boxes + 8))


@pytest.mark.parametrize("name", ["test_litv2", "resnet10t", "test_vit"])
def test_backbone(name):
    """Features of stride 16 of any model, by RoIAlign; gradients reach backbone and image."""
    model = build("test_oat", backbone=name)
    side = 160 if name == "test_vit" else 96
    image = torch.rand(2, 3, side, side, requires_grad=True)
    prefix = torch.tensor([[2, 5], [14, -1]])
    loss = model.loss(model(image, prefix=prefix), prefix)
    loss.backward()
    assert image.grad.abs().sum() > 0
    gradients(model)
    assert len(model.generate(image, max_len=3)) == 2
    with pytest.raises(ValueError, match="needs image and boxes"):
        model.forward_objects(torch.rand(1, 15, 3, 24, 20))


# training


def test_loss_by_hand():
    logits = torch.randn(2, 4, 17)
    sequence = torch.tensor([[3, 4, 9], [7, -1, -1]])
    assert next_fixations(sequence, 15).tolist() == [[3, 4, 9, 15], [7, 15, -1, -1]]
    p = logits.log_softmax(-1)
    picked = [p[0, 0, 3], p[0, 1, 4], p[0, 2, 9], p[0, 3, 15], p[1, 0, 7], p[1, 1, 15]]
    close(build("test_oat").loss(logits, sequence), -torch.stack(picked).mean(), "rerun")


@pytest.mark.parametrize("size", ["test_oat", "oat_small"])
def test_gradients_and_checkpointing(size):
    model = build(size, drop_rate=0.0, crop_size=(24, 20), grid=(3, 5)).train()
    twin = copy.deepcopy(model)
    twin.set_grad_checkpointing()
    crops, target = scenes(2)
    prefix = torch.tensor([[3, 4, 9], [7, -1, -1]])
    for net in (model, twin):
        net.loss(net.forward_objects(crops, None, target, prefix), prefix).backward()
    expected = gradients(model)
    for key, gradient in gradients(twin).items():
        close(gradient, expected[key], "gradient", key)


class Reference(nn.Module):
    """Encoder, decoder and head in PyTorch's own layers, as the official code has them."""

    def __init__(self, dim, heads, hidden, depths, head_count):
        super().__init__()
        layer = {"d_model": dim, "nhead": heads, "dim_feedforward": hidden, "dropout": 0.0, "batch_first": True}
        self.encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(**layer), depths[0], enable_nested_tensor=False)
        self.decoder = nn.TransformerDecoder(nn.TransformerDecoderLayer(**layer), depths[1])
        self.query = nn.ModuleList(nn.Linear(dim, dim) for _ in range(head_count))
        self.key = nn.ModuleList(nn.Linear(dim, dim) for _ in range(head_count))
        self.readout = nn.Linear(head_count, 1)

    def forward(self, objects, fixations, padding):
        """Scores of tokens of objects ``[B, S, dim]`` after tokens of fixations ``[B, T, dim]``."""
        memory = self.encoder(objects)
        causal = torch.ones(fixations.shape[1], fixations.shape[1], dtype=torch.bool).triu(1)
        x = self.decoder(fixations, memory, tgt_mask=causal, tgt_key_padding_mask=padding)
        scores = [
            F.pad(q(x) @ k(memory).transpose(1, 2) / 48**0.5, (0, 1)) for q, k in zip(self.query, self.key, strict=True)
        ]
        return self.readout(torch.stack(scores, -1)).squeeze(-1)

    def take(self, model):
        """The weights of a model of ours."""
        pairs = list(zip(self.encoder.layers, model.encoder, strict=True))
        pairs += zip(self.decoder.layers, model.decoder, strict=True)
        for theirs, ours in pairs:
            found = {"self_attn.in_proj_": ours.attn.qkv, "self_attn.out_proj.": ours.attn.proj}
            found |= {f"linear{i}.": getattr(ours.mlp, f"fc{i}") for i in (1, 2)}
            found |= {f"norm{i}.": getattr(ours, f"norm{i}") for i in (1, 2, 3) if hasattr(ours, f"norm{i}")}
            state = {f"{name}{kind}": getattr(m, kind) for name, m in found.items() for kind in ("weight", "bias")}
            if hasattr(ours, "cross"):
                for kind in ("weight", "bias"):
                    joint = torch.cat([getattr(ours.cross.q, kind), getattr(ours.cross.kv, kind)])
                    state[f"multihead_attn.in_proj_{kind}"] = joint
                    state[f"multihead_attn.out_proj.{kind}"] = getattr(ours.cross.proj, kind)
            theirs.load_state_dict(state)
        for theirs, ours in ((self.query, model.head.query), (self.key, model.head.key)):
            for kind in ("weight", "bias"):
                for layer, part in zip(theirs, getattr(ours, kind).chunk(len(theirs)), strict=True):
                    getattr(layer, kind).data.copy_(part)
        self.readout.load_state_dict(model.head.readout.state_dict())
        return self


def test_first_step_is_that_of_pytorch():
    """From our own initialisation, in float64: logits, loss, and every weight after a step of gradient descent."""
    model = build("test_oat", drop_rate=0.0, dtype=torch.float64).train()
    reference = Reference(48, 2, 40, (1, 2), 2).double().take(model)
    tokens = []
    model.encoder[0].register_forward_pre_hook(lambda _, args: tokens.append(args[0]))
    model.decoder[0].register_forward_pre_hook(lambda _, args: tokens.append(args[0]))
    crops, target = scenes(2)
    prefix = torch.tensor([[3, 4, 9], [7, -1, -1]])
    logits = model.forward_objects(crops.double(), None, target, prefix)
    expected = reference(tokens[0].detach(), tokens[1].detach(), F.pad(prefix < 0, (1, 0)))
    op_close(logits, expected, what="logits")
    for net, out in ((model, logits), (reference, expected)):
        model.loss(out.double(), prefix).backward()
        with torch.no_grad():
            for p in net.parameters():
                if p.grad is not None:
                    p.sub_(p.grad)
    moved = Reference(48, 2, 40, (1, 2), 2).double().take(model)
    for (name, p), q in zip(reference.named_parameters(), moved.parameters(), strict=True):
        op_close(q, p, grad=True, what=name)


def test_starts_as_pytorch():
    """The official initialisation: xavier for matrices, zero biases where ``nn.MultiheadAttention`` has them."""
    for needs_reset in (False, True):
        model = build("test_oat")
        if needs_reset:
            for p in model.parameters():
                p.data.fill_(torch.nan)
            model.init_weights()
        found = Reference(48, 2, 40, (1, 2), 2).take(model)
        official = Reference(48, 2, 40, (1, 2), 2)
        for p in official.parameters():
            if p.dim() > 1:
                nn.init.xavier_uniform_(p)
        for (name, p), q in zip(found.named_parameters(), official.parameters(), strict=True):
            assert p.any() == q.any(), name
            spread = pytest.approx(q.std(correction=0).item(), rel=0.3)
            assert p.numel() < 20 or p.std(correction=0).item() == spread, name
            bound = q.abs().max().item()  # of a uniform distribution: a joint matrix has its own fan
            assert p.numel() < 2000 or p.abs().max().item() == pytest.approx(bound, rel=0.01), name


def test_pooling_of_ties():
    """Of equal maxima of a cell the first gets the gradient, also if it lies in the frame of zeros."""
    x = torch.randint(0, 3, (2, 3, 5, 7)).double().requires_grad_()
    for cells in (1, 2, 4):
        out = pyramid_level(x, cells)
        grad = torch.randn_like(out)
        h, w = -(-5 // cells), -(-7 // cells)
        top, left = (h * cells - 5) // 2, (w * cells - 7) // 2
        values, slope = [], torch.zeros_like(x)
        cell_grads = grad.view(2, 3, cells, cells)
        for b, c, i, j in itertools.product(range(2), range(3), range(cells), range(cells)):
            cell = [(y - top, z - left) for y in range(i * h, i * h + h) for z in range(j * w, j * w + w)]
            seen = [x[b, c, y, z].item() if 0 <= y < 5 and 0 <= z < 7 else 0.0 for y, z in cell]
            values.append(max(seen))
            y, z = cell[seen.index(max(seen))]
            if 0 <= y < 5 and 0 <= z < 7:
                slope[b, c, y, z] += cell_grads[b, c, i, j]
        close(out.detach().flatten(), torch.tensor(values, dtype=torch.float64), "same")
        op_close(torch.autograd.grad(out, x, grad)[0], slope, grad=True, what=f"{cells} cells")


# weights of queries, keys and values


def joint(state):
    """A state dict with the names of before queries of the cross attention were a layer."""
    out = {}
    for key, value in state.items():
        if ".cross.q." in key:
            out[key.replace(".q.", ".qkv.")] = torch.cat([value, state[key.replace(".q.", ".kv.")]])
        elif ".cross.kv." not in key:
            out[key] = value
    return out


@pytest.mark.parametrize("assign", [False, True])
def test_older_state_dict(assign):
    """A state dict with joint rows loads strictly, and the layers do not share memory."""
    model = lively()
    state = joint(model.state_dict())
    assert len(state) == len(model.state_dict()) - 4
    again = build("test_oat")
    again.load_state_dict(state, assign=assign)
    for key, value in model.state_dict().items():
        close(again.state_dict()[key], value, "same", key)
    assert [key for key in state if ".cross.qkv." in key], "the caller's state dict was changed"
    again.load_state_dict(again.state_dict())
    storages = [p.untyped_storage().data_ptr() for p in again.parameters()]
    assert len(set(storages)) == len(storages)
    with pytest.raises(RuntimeError, match=r"Missing key.*cross\.q\.weight"):
        again.load_state_dict({k: v for k, v in state.items() if k != "decoder.0.cross.qkv.weight"})
    with pytest.raises(RuntimeError, match="size mismatch"):
        build("test_oat", embed_dim=60).load_state_dict(state)


def test_drawn_as_one_matrix():
    """The cross attention draws what ``nn.MultiheadAttention``'s joint matrix draws, and no number more."""
    torch.manual_seed(3)
    layer = CrossAttention(48, 2, 0.0)
    layer.init_weights()
    after = torch.rand(3)
    torch.manual_seed(3)
    expected = nn.Linear(48, 144)
    nn.Linear(48, 48)
    nn.init.xavier_uniform_(expected.weight)
    assert torch.equal(after, torch.rand(3))
    close(torch.cat([layer.q.weight, layer.kv.weight]), expected.weight, "same")
    close(torch.cat([layer.q.bias, layer.kv.bias]), expected.bias, "same")
    torch.manual_seed(3)
    layer.reset_parameters()
    torch.manual_seed(3)
    close(torch.cat([layer.q.weight, layer.kv.weight]), nn.Linear(48, 144).weight, "same")


# changed, transformed and traced models

PREFIX = torch.tensor([[3, 9], [4, -1]])


def test_layers_are_called():
    """Every layer in every mode; the appearance network also sees the blank crop."""
    x = torch.rand(2, 3, 96, 128)
    found = check_calls(build("test_oat"), lambda model: model(x, prefix=PREFIX))
    assert {name for name, times in found.items() if times == 2} == {
        f"appearance.{layer}" for layer in ("conv1", "conv2", "fc")
    }
    assert set(found.values()) == {1, 2}
    found = calls(lively(), lambda model: model.generate(x, max_len=4))
    for name, times in found.items():  # what depends on the objects alone is computed once
        once = name.startswith("encoder") or name.endswith(".cross.kv") or name == "head.key"
        assert times == (1 if once else 2 if name.startswith("appearance") else 4), name


@pytest.mark.filterwarnings("ignore")
def test_changed_layers():
    x = torch.rand(2, 3, 96, 128)
    check_changed_layers(build("test_oat"), lambda model: model(x, prefix=PREFIX), x)


@pytest.mark.parametrize("backbone", [None, "resnet10t"])
@pytest.mark.filterwarnings("ignore:`torch.jit:FutureWarning")  # of PyTorch's own jvp
@pytest.mark.filterwarnings("ignore:There is a performance drop")  # of RoIAlign under vmap
def test_transforms(backbone):
    model = build("test_oat", **{} if backbone is None else {"backbone": backbone})
    check_transforms(model, lambda call, x: call(x, prefix=PREFIX[:1].expand(len(x), -1)), torch.rand(2, 3, 96, 128))


def test_cut():
    """Derivatives of every kind of RoIAlign; values and gradients are torchvision's."""
    x = torch.rand(2, 2, 9, 11, dtype=torch.float64, requires_grad=True)
    rois = torch.tensor([[0, 1.0, 2, 7.5, 8], [1, -1, 0, 5, 3], [1, 4.2, 4.4, 20, 12]], dtype=torch.float64)

    def run(x):
        return cut(x, rois, (3, 2), 0.5)

    close(run(x), roi_align(x, rois, (3, 2), 0.5, aligned=True), "same")
    assert torch.autograd.gradcheck(run, x, check_forward_ad=True, check_batched_grad=True)
    assert torch.autograd.gradgradcheck(run, x, check_fwd_over_rev=True)


@pytest.mark.filterwarnings("ignore")
def test_trace():
    check_trace(build("test_oat"), torch.rand(2, 3, 96, 128))


def test_no_scenes():
    """An empty batch of images or crops, with and without boxes, and deterministic algorithms."""
    model, empty = build("test_oat"), torch.empty(0, dtype=torch.long)
    for training in (False, True):
        model.train(training)
        out = model(torch.rand(0, 3, 96, 128), target=empty, prefix=torch.empty(0, 2, dtype=torch.long))
        assert out.shape == (0, 3, 17)
        out.sum().backward()
        assert model(torch.rand(0, 3, 96, 128), torch.rand(0, 4, 4)).shape == (0, 1, 6)
        mask = torch.ones(0, 6, dtype=torch.bool)
        assert model.forward_objects(torch.rand(0, 6, 3, 24, 20), object_mask=mask).shape == (0, 1, 8)
    for mode, samples in (("greedy", 1), ("sample", 3)):
        assert model.eval().generate(torch.rand(0, 3, 96, 128), mode=mode, num_samples=samples) == []
    backbone = build("test_oat", backbone="resnet10t")
    assert backbone(torch.rand(0, 3, 96, 128)).shape == (0, 1, 17)
    torch.use_deterministic_algorithms(True)
    try:
        model.train()(torch.rand(2, 3, 96, 128), prefix=PREFIX).sum().backward()
        assert len(model.eval().generate(torch.rand(2, 3, 96, 128))) == 2
    finally:
        torch.use_deterministic_algorithms(False)


# the contract of timm, as far as a model without classes and feature maps goes


def test_official_size():
    case = load("oat_small")
    dead = (512 + 1) * 86 + (3 + 1) * 256  # generator and LinearEmbedding, which the official model never uses
    model = build("oat_base", device="meta")
    assert sum(p.numel() for p in model.parameters()) + dead == 18_300_985
    assert {k.split(".")[0] for k in case.keys} >= {"generator", "LinearEmbedding"}
    assert count(model, torch.empty(1, 3, 800, 1280, device="meta")).uncounted == {}
    with torch.no_grad():
        assert model(torch.empty(1, 3, 800, 1280, device="meta")).shape == (1, 1, 86)


def test_contract():
    model = build("test_oat", device="meta", dtype=torch.bfloat16)
    assert (model.num_classes, model.in_chans, model.num_features, model.head_hidden_size) == (0, 3, 48, 48)
    assert all(p.device.type == "meta" and p.dtype == torch.bfloat16 for p in model.parameters())
    assert model.get_classifier() is model.head
    assert inspect.signature(model.reset_classifier).parameters["global_pool"].default is None
    model.reset_classifier(0)
    with pytest.raises(ValueError, match="num_classes=7"):
        model.reset_classifier(7)
    with pytest.raises(ValueError, match="num_classes=7"):
        build("test_oat", num_classes=7)
    with pytest.raises(TypeError, match="no_such_argument"):
        build("test_oat", no_such_argument=1)
    with pytest.raises(RuntimeError, match="No pretrained weights exist"):
        build("test_oat", pretrained=True)
    with pytest.raises(RuntimeError, match="features_only"):
        build("test_oat", features_only=True)
    model = build("test_oat")
    for coarse in (True, False):
        groups = group_parameters(model, model.group_matcher(coarse=coarse))
        assert sorted(n for g in groups.values() for n in g) == sorted(n for n, _ in model.named_parameters())
        assert len(groups) == (4 if coarse else 5)  # stem, one encoder layer, two decoder layers, head


def test_copies_and_folders(tmp_path):
    model = build("test_oat", in_chans=1, pe_sigma=1.5)
    x = torch.rand(1, 1, 96, 128)
    with torch.no_grad():
        expected = model(x)
        for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            close(twin(x), expected, "same")
        save_for_hf(model, tmp_path, safe_serialization=True)
        close(build(f"local-dir:{tmp_path}", pretrained=True)(x), expected, "same")
        again = build("test_oat", in_chans=1, pe_sigma=1.5, **overlay(model.state_dict()))
        close(again(x), expected, "same")
    assert checkpoint_filter_fn(model.state_dict(), model).keys() == model.state_dict().keys()
    assert not list(model.buffers())


def test_init_weights_after_to_empty():
    model = build("test_oat", device="meta").to_empty(device="cpu")
    for p in model.parameters():
        p.data.fill_(torch.nan)
    model.init_weights()
    fresh = dict(build("test_oat").named_parameters())
    for key, p in model.named_parameters():
        assert torch.isfinite(p).all(), key
        spread = p.std(correction=0).item()
        assert p.numel() < 20 or spread == pytest.approx(fresh[key].std(correction=0).item(), rel=0.5, abs=1e-6), key
    assert torch.isfinite(model(torch.rand(1, 3, 96, 128))).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64], ids=["bf16", "fp64"])
def test_other_dtypes(dtype):
    model = build("test_oat")
    x = torch.rand(1, 3, 96, 128)
    with torch.no_grad():
        expected = model(x)
        out = model.to(dtype)(x.to(dtype), prefix=torch.tensor([[1, 2]]))
        assert out.dtype == dtype
        assert (out[:, :1].float() - expected).abs().max() < (0.1 if dtype == torch.bfloat16 else 1e-5)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert torch.isfinite(build("test_oat")(x)).all()


def test_export():
    """One program for any number of scenes, objects and fixations."""
    model = build("test_oat")
    boxes = torch.tensor([[0.0, 0, 30, 40], [50, 20, 90, 70], [60, 40, 128, 96], [9, 9, 40, 60], [1, 50, 90, 95]])

    def inputs(b, n, t):
        image, target = torch.rand(b, 3, 96, 128), torch.arange(b)
        return image, boxes[:n].expand(b, -1, -1).contiguous(), target, torch.randint(-1, n, (b, t))

    B, N, T = (torch.export.Dim(name) for name in "BNT")
    sizes = ({0: B}, {0: B, 1: N}, {0: B}, {0: B, 1: T})
    with torch.no_grad():
        program = torch.export.export(model, inputs(2, 3, 2), dynamic_shapes=sizes, strict=False).module()
        args = inputs(3, 5, 4)
        close(program(*args), model(*args), "graph")
        for args in (inputs(1, 3, 2), (torch.rand(2, 3, 96, 128),)):
            close(torch.export.export(model, args, strict=False).module()(*args), model(*args), "graph")


def test_errors():
    model = build("test_oat")
    x, crops = torch.rand(1, 3, 96, 128), torch.rand(1, 15, 3, 24, 20)
    for match, call in (
        ("target from 15 to 15", lambda: model(x, target=torch.tensor([15]))),
        ("target of shape", lambda: model(x, target=torch.tensor([1, 2]))),
        ("target of shape", lambda: model(x, target=torch.tensor([1.0]))),
        ("prefix from 1 to 16", lambda: model(x, prefix=torch.tensor([[1, 16]]))),
        ("prefix of shape", lambda: model(x, prefix=torch.tensor([1]))),
        ("boxes of shape", lambda: model(x, torch.rand(4, 4))),
        ("coords of shape", lambda: model(x, coords=torch.rand(1, 3, 2))),
        ("object_mask of shape", lambda: model(x, object_mask=torch.ones(1, 15))),
        ("image of shape", lambda: model(x[0])),
        ("crops of shape", lambda: model.forward_objects(x)),
        ("crops and boxes", lambda: model.generate(crops, torch.rand(1, 15, 4))),
        ("need at least 19x19", lambda: model.forward_objects(crops[..., :18, :])),
        ("need crop_size", lambda: build("test_oat", spp=0, crop_size=(30, 29)).forward_objects(crops)),
        ("mode='beam'", lambda: model.generate(x, mode="beam")),
        ("num_samples=2", lambda: model.generate(x, num_samples=2)),
        ("max_len=0", lambda: model.generate(x, max_len=0)),
        ("logits of", lambda: model.loss(torch.rand(1, 2, 17), torch.tensor([[1, 2]]))),
        ("embed_dim=50", lambda: build("test_oat", embed_dim=50, num_heads=4)),
        ("head_count=0", lambda: build("test_oat", head_count=0)),
        ("spp=5", lambda: build("test_oat", spp=5)),
        ("crop_size=\\(9, 40\\)", lambda: build("test_oat", crop_size=(9, 40))),
        ("grid=\\(0, 4\\)", lambda: build("test_oat", grid=(0, 4))),
        ("pe='learned'", lambda: build("test_oat", pe="learned")),
        ("pe_table of shape \\[4, 8\\]", lambda: build("test_oat", pe_table=torch.rand(4, 8))),
    ):
        with pytest.raises(ValueError, match=match):
            call()
    assert "oat_base" in timm.list_models("oat_*")


# explain


def scene(objects=7, **kwargs):
    """A model, an image and boxes, some beyond its edges."""
    model = build("test_oat", **kwargs)
    corner = torch.rand(1, objects, 2) * torch.tensor([120.0, 90.0]) - 10
    boxes = torch.cat((corner, corner + 12 + 20 * torch.rand(1, objects, 2)), 2)
    return model, torch.rand(1, model.in_chans, 96, 128), boxes


def fixated(panel, boxes, size):
    """The scanpath of a panel: of each point the object whose middle line it lies on, as often as its name says."""
    middle = (boxes[:, 1] + boxes[:, 3]) / 2, (boxes[:, 0] + boxes[:, 2]) / 2
    path = []
    for (row, column), name in zip((panel.points * torch.tensor(size)).tolist(), panel.names, strict=True):
        first, _, last = name.partition("-")
        assert int(first) == len(path) + 1
        item = int(((row - middle[0]) ** 2 + (column - middle[1]) ** 2).argmin())
        path += [item] * (int(last or first) - len(path))
    return path


@pytest.mark.parametrize("boxed", [False, True], ids=["grid", "boxes"])
def test_explain_is_the_greedy_scanpath(boxed):
    torch.manual_seed(1)
    model, x, boxes = scene()
    target = torch.tensor([3])
    given = {"boxes": boxes} if boxed else {}
    (path,) = model.generate(x, target=target, max_len=9, **given)
    assert len(set(path)) > 1
    scanpath, first = explained(model, x, target=3, max_len=9, **given)
    objects = boxes[0] if boxed else model._grid_boxes(x)[0]
    assert fixated(scanpath, objects, (96, 128)) == path
    close(scanpath.lines, torch.stack((scanpath.points[:-1], scanpath.points[1:]), 1), "same")
    left, top, right, bottom = objects[3].tolist()
    close(scanpath.boxes, torch.tensor([[top / 96, left / 128, bottom / 96, right / 128]]), "rerun")
    chance = model(x, target=target, **given)[0, 0, :-2].softmax(0).detach()
    assert int(chance.argmax()) == path[0]
    if boxed:
        expected = torch.zeros(96, 128)
        for (x1, y1, x2, y2), p in zip(boxes[0].round().int().tolist(), chance.tolist(), strict=True):
            for row, column in itertools.product(range(max(y1, 0), min(y2, 96)), range(max(x1, 0), min(x2, 128))):
                expected[row, column] = max(expected[row, column], p)
        assert len(first.boxes) == 7
        close(first.boxes[:1], scanpath.boxes, "same")  # the one that stands out
    else:
        expected = chance.view(3, 5)
    close(first.heat, expected, "rerun")


def test_explain_searches_for_the_object_at_the_point():
    model, x, _ = scene(in_chans=1)
    model, x = model.bfloat16(), x.bfloat16()
    for point, target in {(0.5, 0.5): 7, (0.0, 0.0): 0, (0.99, 0.75): 13, (0.34, 0.21): 6}.items():
        scanpath, _ = explained(model, x, point=point, max_len=3)
        assert (
            scanpath.title
            == f"Greedy scanpath, first 3 fixations; in search of object {target}, the one at the point (box)"
        )
    scanpath, _ = explained(model, x, target=2)
    assert "in search of object 2 (box)" in scanpath.title


def test_explain_takes_boxes_as_a_command_line_gives_them():
    model, x = timm.create_model("test_oat"), torch.rand(1, 3, 96, 128)
    boxes = [[0, 0, 30, 30], [40, 20, 90, 80], [10, 50, 60, 90]]
    found, expected = (explained(model, x, boxes=b, target=1) for b in (boxes, torch.tensor(boxes)[None].float()))
    for a, b in zip(found, expected, strict=True):
        assert a.title == b.title
        assert torch.equal(a.boxes, b.boxes)
    assert torch.equal(found[1].heat, expected[1].heat)
    with pytest.raises(ValueError, match=r"got boxes of shape \[1, 1, 3\]"):
        model.explain(x, boxes=[[0, 0, 30]])


def test_explain_a_scanpath_that_ends():
    model, x, boxes = scene()
    ends = iter([[4, 4, 2, 4]])
    model.generate = lambda *args: [next(ends)]
    scanpath, _ = explained(model, x, boxes=boxes)
    assert scanpath.title.startswith("Greedy scanpath, 4 fixations;")
    assert scanpath.names == ["1-2", "3", "4"]
    assert len(scanpath.lines) == 2
    assert not torch.equal(scanpath.points[0], scanpath.points[2])


def test_fixations_of_one_object_are_spread_inside_its_box():
    boxes = torch.tensor([[10.0, 20.0, 40.0, 80.0], [0.0, 0.0, 10.0, 10.0]])
    points = spread_fixations(boxes, [0, 1, *[0] * 8])
    close(points[1], torch.tensor([5.0, 5.0]), "same")
    own = points[[0, *range(2, 10)]]
    assert len(own.unique(dim=0)) == 9
    assert ((own > boxes[0, :2]) & (own < boxes[0, 2:])).all()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"target": 15}, "got target from 15 to 15, need 0 to 14"),
        ({"target": -1}, "got target=-1, need a whole number of at least 0"),
        ({"max_len": 0}, "got max_len=0, need a whole number of at least 1"),
        ({"point": (0.5, 2.0)}, "got point="),
        ({"boxes": torch.zeros(7, 3)}, "got boxes of shape"),
        ({"boxes": "all"}, "got boxes='all', need a Tensor or a list of lists"),
    ],
    ids=["target", "negative", "length", "point", "shape", "words"],
)
def test_explain_refuses(settings, message):
    with pytest.raises(ValueError, match=message):
        build("test_oat").explain(torch.zeros(1, 3, 96, 128), **settings)


def test_every_model_explains():
    check_family_explains(family)
