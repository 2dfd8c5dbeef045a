"""MEDUSA: the checks that stand for a golden case (the authors' network is not public)."""

import copy
import pickle
import threading

import pytest
import timm
import torch
import torch.nn.functional as F
from changes import check_calls, check_changed_layers, check_script_inside, check_trace, check_transforms
from panels import check_family_explains, explained
from timm.models.resnet import ResNet
from tolerance import close, op_close
from torch import nn

from vizoo.backbones import medusa as family
from vizoo.backbones.medusa import AttentionBody, body_image, medusa, medusa_parameters
from vizoo.tools.profiler import count

WIDTHS = {16: (1_942_289, 3.030), 24: (4_367_641, 6.797), 28: (5_943_869, 9.243), 32: (7_762_465, 12.065)}


def small(**kwargs):
    return timm.create_model("test_medusa", **kwargs)


def wrapped(name="resnet10t", **kwargs):
    """A model of timm after ``medusa()``."""
    return medusa(timm.create_model(name, num_classes=5, **kwargs), body_width=4, body_depth=2, body_size=16)


BOTH = {"model": lambda: small(num_classes=5), "medusa()": wrapped}
both = pytest.mark.parametrize("make", BOTH.values(), ids=BOTH)


def awake(model):
    """Give every head and norm weights that do something."""
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "attention" in name or "heads" in name or "bn" in name:
                p.add_(0.3 * torch.randn_like(p))
    return model


@pytest.mark.parametrize("width", WIDTHS)
def test_size_of_the_body(width):
    found = count(AttentionBody(width, device="meta"), torch.empty(1, 1, 256, 256, device="meta"))
    assert found.params == WIDTHS[width][0]
    assert found.macs / 1e9 == pytest.approx(WIDTHS[width][1], rel=0.01)


def test_published_size():
    """29.2 M parameters and 29.1 G are published for two classes at 480; ours are the specification's."""
    model = timm.create_model("medusa_resnet50", num_classes=2, device="meta")
    found = count(model, torch.empty(1, 3, 480, 480, device="meta"))
    assert found.params == 29_458_563
    assert found.macs / 1e9 == pytest.approx(28.1, rel=0.01)
    assert count(model, torch.empty(1, 3, 224, 224, device="meta")).macs / 1e9 == pytest.approx(13.35, rel=0.01)


def test_starts_as_the_scaled_backbone():
    model = timm.create_model("medusa_resnet18", num_classes=5).eval()
    plain = timm.create_model("resnet18", num_classes=5).eval()
    for net in (plain, model):
        for m in net.modules():
            if isinstance(m, nn.BatchNorm2d):
                nn.init.uniform_(m.weight, 0.5, 1.5)  # timm starts the last norm of a branch at zero
    assert isinstance(plain, ResNet)
    plain.load_state_dict({k: v for k, v in model.state_dict().items() if k in plain.state_dict()})
    gate = torch.tensor(2.0).sigmoid()
    x = torch.randn(2, 3, 64, 96)
    with torch.no_grad():
        out = plain.maxpool(plain.act1(plain.bn1(plain.conv1(x))))
        for layer in (plain.layer1, plain.layer2, plain.layer3, plain.layer4):
            out = layer(out) * gate
        close(model(x), plain.forward_head(out), "rerun")


@pytest.mark.parametrize("size", [(224, 224), (480, 480), (200, 312), (33, 50)], ids=str)
def test_maps(size):
    model = awake(small()).eval()
    x = torch.randn(2, 3, *size)
    with torch.no_grad():
        whole, local = model.attention_maps(x)
        features = model.forward_intermediates(x, intermediates_only=True)
    assert whole.shape == (2, 1, 32, 32)
    assert [m.shape for m in local] == [(2, 1, *f.shape[2:]) for f in features]
    for m in (whole, *local):
        assert m.min() > 0
        assert m.max() < 1
    assert local[0].std() > 0


def test_brightness_and_contrast_do_not_matter():
    model = small().eval()
    x = torch.randn(2, 3, 96, 64)
    with torch.no_grad():
        before, after = (model.attention_maps(t)[0] for t in (x, 3.0 * x + 0.7))
    assert (before - after).abs().max() < 1e-4


@pytest.mark.parametrize("value", [0.0, 0.5])
def test_constant_image(value):
    """A standard deviation of 0 has the gradient 0, as that of ``torch.std``; elsewhere it is the formula's."""

    def formula(x):
        gray = F.interpolate(x.mean(1, keepdim=True), size=[16, 16], mode="bilinear", antialias=True)
        return (gray - gray.mean((2, 3), keepdim=True)) / (gray.std((2, 3), correction=0, keepdim=True) + 1e-6)

    x = torch.randn(3, 3, 24, 20, dtype=torch.float64)
    x[1] = value
    x.requires_grad_()
    weight = torch.randn(3, 1, 16, 16, dtype=torch.float64)
    out, expected = body_image(x, 16), formula(x)
    op_close(out, expected.detach(), what="image")
    got, truth = (torch.autograd.grad((t * weight).sum(), x)[0] for t in (out, expected))
    for i in range(3):
        op_close(got[i], truth[i], grad=True, what=f"gradient of image {i}")
    model = awake(small()).eval()
    model(x.float()).sum().backward()
    assert torch.isfinite(x.grad).all()
    assert torch.isfinite(torch.func.grad(lambda x: model(x).sum())(torch.full((1, 3, 40, 40), 0.1))).all()


def test_own_image_for_the_body():
    model = awake(small()).eval()
    x, other = torch.randn(1, 3, 64, 64), torch.randn(1, 1, 48, 32)
    with torch.no_grad():
        assert not torch.equal(model(x), model(x, body_input=other))
        assert model.attention_maps(x, other)[0].shape == other.shape


def test_residual_gate_and_channel_maps():
    torch.manual_seed(0)
    model = small(gate="residual", head_out="channel").eval()
    x = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        (first,) = model.forward_intermediates(x, indices=[0], intermediates_only=True)
        plain = model.layer1(model.maxpool(model.act1(model.bn1(model.conv1(x)))))
        close(first, plain * (1 + torch.tensor(2.0).sigmoid()), "rerun")
        assert model.attention_maps(x)[1][1].shape[1] == 24


@pytest.mark.parametrize("wrapped", [False, True], ids=["model", "medusa()"])
@pytest.mark.parametrize("phase", ["body", "backbone", "all"])
def test_phases(phase, wrapped):
    """Only the right part learns, and frozen norms keep their statistics through ``train()``."""
    host = timm.create_model("resnet10t", num_classes=3) if wrapped else small(num_classes=3)
    model = medusa(host, body_width=4, body_depth=2, body_size=16) if wrapped else host
    prefix = "medusa." if wrapped else ""
    parameters = medusa_parameters(awake(model), phase)
    model.eval().train()
    before = copy.deepcopy(model.state_dict())
    optimizer = torch.optim.SGD(parameters, lr=0.1)
    F.cross_entropy(model(torch.randn(4, 3, 64, 64)), torch.tensor([0, 1, 2, 0])).backward()
    optimizer.step()
    changed = {k for k, v in model.state_dict().items() if not torch.equal(v, before[k])}
    body = {k for k in changed if k.startswith(f"{prefix}body.")}
    heads = {k for k in changed if k.startswith(("attention", "medusa.heads."))}
    backbone = changed - body - heads
    assert bool(body) is (phase != "backbone")
    assert bool(backbone) is (phase != "body")
    assert heads
    if phase == "all":
        missing = [n for n, p in model.named_parameters() if p.grad is None]
        assert not missing


@pytest.mark.parametrize("name", ["resnet10t", "convnext_atto", "test_efficientnet", "regnetx_002"])
def test_any_cnn(name):
    """Features and logits of a wrapped model are the gated ones, copies and checkpoints included."""
    plain = timm.create_model(name, num_classes=4).eval()
    model = medusa(copy.deepcopy(plain), body_width=4, body_depth=2, body_size=16).eval()
    missing, unexpected = model.load_state_dict(plain.state_dict(), strict=False)
    assert not unexpected
    assert all(k.startswith("medusa.") for k in missing)
    x = torch.randn(1, 3, 96, 64)
    with torch.no_grad():
        first = model.forward_intermediates(x, indices=[1], intermediates_only=True)[0]
        assert not torch.allclose(first, plain.forward_intermediates(x, indices=[1], intermediates_only=True)[0])
        twin = copy.deepcopy(awake(model))
        expected = twin(x)
        for p in model.medusa.parameters():
            p.zero_()
        assert torch.equal(twin(x), expected)
    assert twin.medusa is not model.medusa
    with torch.no_grad():
        whole, local = twin.medusa.attention_maps(x)
        assert whole.shape == (1, 1, 16, 16)
        assert [m.shape[2:] for m in local] == [
            f.shape[2:] for f in plain.forward_intermediates(x, intermediates_only=True)[-len(local) :]
        ]
        assert torch.equal(whole, twin.medusa.body(body_image(x, 16)))


# changed, transformed and traced models


@both
def test_layers_are_called(make):
    found = check_calls(awake(make()), lambda model: model(torch.ones(2, 3, 64, 64)))
    assert set(found.values()) == {1}


@both
@pytest.mark.filterwarnings("ignore")
def test_changed_layers(make):
    x = torch.randn(2, 3, 64, 64)
    check_changed_layers(awake(make()).eval(), lambda model: model(x), x)


@both
@pytest.mark.filterwarnings("ignore:`torch.jit:FutureWarning")  # of PyTorch's own jvp
def test_transforms(make):
    check_transforms(awake(make()).eval(), lambda call, x: call(x), torch.randn(2, 3, 64, 48))


@both
@pytest.mark.filterwarnings("ignore")
def test_trace(make):
    check_trace(awake(make()).eval(), torch.randn(2, 3, 64, 64))


@both
def test_copies(make):
    """Copies and pickles after a pass with gradients."""
    model, x = awake(make()).eval(), torch.randn(1, 3, 64, 64)
    expected = model(x)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        close(twin(x), expected, "same")


@both
def test_no_images(make):
    """An empty batch, and deterministic algorithms."""
    model, x = make().eval(), torch.randn(2, 3, 64, 64)
    assert model(x[:0]).shape == (0, 5)
    model(x[:0]).sum().backward()
    assert [f.shape[0] for f in model.forward_intermediates(x[:0], intermediates_only=True)][-1] == 0
    torch.use_deterministic_algorithms(True)
    try:
        model.train()(x).sum().backward()
    finally:
        torch.use_deterministic_algorithms(False)


@both
@pytest.mark.parametrize("without", ["statistics", "weights"])
def test_norms_of_test_time_adaptation(make, without):
    """Norms that lost their running statistics use those of the batch in evaluation; others lost weight and bias."""
    model, x = awake(make()), torch.randn(4, 3, 64, 64)
    changed = copy.deepcopy(model).eval()
    for net in (model, changed):
        for m in net.modules():
            if isinstance(m, nn.BatchNorm2d) and without == "weights":
                nn.init.ones_(m.weight)
                nn.init.zeros_(m.bias)
                if net is changed:
                    m.affine, m.weight, m.bias = False, None, None
            elif isinstance(m, nn.BatchNorm2d) and net is changed:
                m.track_running_stats, m.running_mean, m.running_var = False, None, None
    model.train(without == "statistics")
    close(changed(x), model(x), "same")


@pytest.mark.filterwarnings("ignore")
def test_script_inside():
    model, x = awake(small(scriptable=True)).eval(), torch.randn(2, 3, 64, 64)
    check_script_inside(model, x)


# passes through the hooks of medusa()


class Once:
    """A hook that runs something, but not within itself."""

    def __init__(self, action):
        self.action, self.running = action, False

    def __call__(self, *_):
        if not self.running:
            self.running = True
            self.action()
            self.running = False


def test_passes_do_not_mix():
    """Errors, passes inside passes, early ends and layers called one by one: each stage reads the map of its image."""
    model = awake(wrapped()).eval()
    x, other = torch.randn(2, 1, 3, 64, 64)
    with torch.no_grad():
        expected, maps = model(x), model.forward_intermediates(x, intermediates_only=True)
        for inside in (
            lambda: model(other),
            lambda: model.forward_features(other),
            lambda: model.forward_intermediates(other, indices=[1], stop_early=True),
            lambda: model.medusa.attention_maps(other),
        ):
            handle = model.layer2.register_forward_hook(Once(inside))
            close(model(x), expected, "same", "a pass in a pass")
            handle.remove()

        def fail(*_):
            raise KeyError("stop")

        for fails in (model.layer3, model.conv1, model):
            handle = fails.register_forward_pre_hook(fail)
            with pytest.raises(KeyError, match="stop"):
                model(other)
            handle.remove()
            assert not model.medusa._passes.stack
            close(model(x), expected, "same", "after an error")
        model.forward_intermediates(other, indices=[1], stop_early=True)
        close(model(x), expected, "same", "after an early end")
        for _ in range(3):
            model.forward_intermediates(other, indices=[1], stop_early=True)
        assert len(model.medusa._passes.stack) == 1
        found = model.maxpool(model.act1(model.bn1(model.conv1(x))))
        for layer, feature in zip((model.layer1, model.layer2, model.layer3, model.layer4), maps[1:], strict=True):
            found = layer(found)
            close(found, feature, "same", "layer by layer")
        assert not model.medusa._passes.stack
        with pytest.raises(RuntimeError, match="stage layer1 was called outside a pass"):
            model.layer1(torch.rand(1, 64, 16, 16))


def test_parallel_copies():
    """Copies as ``DataParallel`` makes them, which share the hooks, use their own body and heads."""
    model, x = awake(wrapped()).eval(), torch.randn(2, 1, 3, 64, 64)

    def replicate(scale):
        """As ``torch.nn.parallel.replicate``, whose copies would have the same weights."""
        copies = {m: m._replicate_for_data_parallel() for m in model.modules()}
        for module, twin in copies.items():
            for key, child in module._modules.items():
                twin._modules[key] = None if child is None else copies[child]
            for key, p in module._parameters.items():
                setattr(twin, key, None if p is None else p.detach() * scale)
        return copies[model]

    def run(net, image, out):
        with torch.no_grad():
            out.append(net(image))

    found, threads = [[], []], []
    for i, scale in enumerate((1.0, 0.9)):
        threads.append(threading.Thread(target=run, args=(replicate(scale), x[i], found[i])))
        threads[-1].start()
    for i, scale in enumerate((1.0, 0.9)):
        threads[i].join()
        alone = copy.deepcopy(model)
        for p in alone.parameters():
            p.data.mul_(scale)
        close(found[i][0], alone(x[i]).detach(), "same", f"copy {i}")


@pytest.mark.parametrize("name", ["resnet10t", "test_efficientnet", "gernet_s"])
def test_checkpointing_of_stages_is_refused(name):
    """It runs blocks without their stages, or stages without the image: gates would be lost without a word."""
    model = wrapped(name).train()
    model.set_grad_checkpointing()
    with pytest.raises(RuntimeError, match="gradient checkpointing of"):
        model(torch.randn(2, 3, 64, 64))
    model.set_grad_checkpointing(False)
    model(torch.randn(2, 3, 64, 64)).sum().backward()


def test_checkpointing_inside_stages():
    torch.manual_seed(0)
    model, x = awake(wrapped("convnext_atto")).train(), torch.randn(2, 3, 64, 64)
    twin = copy.deepcopy(model)
    twin.set_grad_checkpointing()
    for net in (model, twin):
        net(x).square().sum().backward()
    for (name, p), q in zip(model.named_parameters(), twin.parameters(), strict=True):
        close(q.grad, p.grad, "gradient", name)


def test_errors():
    model = timm.create_model("resnet10t")
    with pytest.raises(ValueError, match="body_size=100"):
        medusa(model, body_size=100)
    with pytest.raises(ValueError, match="stages=\\(9,\\)"):
        medusa(model, stages=(9,))
    with pytest.raises(ValueError, match="gate='add'"):
        small(gate="add")
    with pytest.raises(ValueError, match="head_out='all'"):
        small(head_out="all")
    with pytest.raises(ValueError, match="phase='head'"):
        medusa_parameters(small(), "head")
    with pytest.raises(ValueError, match="need a medusa"):
        medusa_parameters(model, "all")
    with pytest.raises(ValueError, match="no \\[B, "):
        medusa(timm.create_model("test_vit"))
    assert not hasattr(model, "medusa")
    with pytest.raises(ValueError, match="already"):
        medusa(medusa(model))


def blobs(n, side, generator):
    """Two bright ellipses in noise; class 1 has a small blob inside one of them."""
    rows, cols = torch.meshgrid(torch.arange(side), torch.arange(side), indexing="ij")
    images = 0.3 * torch.randn(n, side, side, generator=generator)
    labels = torch.arange(n) % 2
    for i in range(n):
        centres = []
        for c in (0.28, 0.72):
            cy, cx = (side * (v + 0.04 * torch.randn(1, generator=generator).item()) for v in (0.5, c))
            images[i] += 1.0 * ((((rows - cy) / (0.34 * side)) ** 2 + ((cols - cx) / (0.16 * side)) ** 2) < 1)
            centres.append((cy, cx))
        if labels[i]:
            cy, cx = centres[int(torch.randint(2, (1,), generator=generator))]
            dy = 0.15 * side * (2 * torch.rand(1, generator=generator).item() - 1)
            images[i] += 1.2 * ((rows - cy - dy) ** 2 + (cols - cx) ** 2 < (0.07 * side) ** 2)
    return images[:, None].repeat(1, 3, 1, 1), labels


@pytest.mark.slow
def test_finds_a_blob_in_an_ellipse():
    generator = torch.Generator().manual_seed(0)
    torch.manual_seed(0)
    model = small(num_classes=2)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.05)
    for _ in range(100):
        x, y = blobs(32, 32, generator)
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
    x, y = blobs(128, 32, generator)
    with torch.no_grad():
        accuracy = (model.eval()(x).argmax(1) == y).float().mean()
    assert accuracy > 0.8


# explain and training


@pytest.mark.parametrize("kwargs", [{}, {"head_out": "channel", "in_chans": 1}], ids=str)
def test_explain_shows_every_map(kwargs):
    model = small(**kwargs)
    medusa_parameters(model, "backbone")  # one part stays in evaluation mode
    x = torch.randn(1, model.conv1.in_channels, 70, 100)
    panels = explained(model, x)
    with torch.no_grad():
        whole, local = model.eval().attention_maps(x)
    for panel, values in zip(panels, (whole, *local), strict=True):
        close(panel.heat, values[0].mean(0), "rerun")
    check_family_explains(family)


def test_phases_take_turns():
    """Five parts of the epochs; the last one trains all at a tenth of the rate."""
    model = small()
    found = []
    for epoch in range(10):
        factor = model.training_phase(epoch, 10)
        found.append((model.phase, factor))
    expected = [("backbone", 1.0), ("body", 1.0), ("backbone", 1.0), ("body", 1.0), ("all", 0.1)]
    assert found == [phase for phase in expected for _ in range(2)]
    assert [small().training_phase(epoch, 2) for epoch in range(2)] == [1.0, 1.0]  # no room for turns
    model = small(training_rounds=0)
    model.body.requires_grad_(False)
    assert model.training_phase(0, 100) == 1.0
    assert not model.body.out.weight.requires_grad
    with pytest.raises(ValueError, match="got training_rounds=3, need at most 2 for 6 epochs"):
        small(training_rounds=3).training_phase(0, 6)
