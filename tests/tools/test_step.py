"""A training step: what it does, what it leaves, its phases under a simulated clock, its memory by hand."""

import pytest
import torch
from torch import nn

from vizoo.tools.common import Failure
from vizoo.tools.profiling import step as module
from vizoo.tools.profiling import timing
from vizoo.tools.profiling.memory import nbytes
from vizoo.tools.profiling.step import TrainingStep, detection_targets, step_memory, step_times, training

HOW = timing.Conditions(min_time=0, max_time=0)


class Heads(nn.Module):
    """Returns a dictionary with something that has no gradient, as some models do."""

    def __init__(self):
        super().__init__()
        self.body, self.norm, self.head = nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Linear(8, 3)

    def forward(self, x):
        y = self.norm(self.body(x))
        return {"logits": self.head(y), "features": [y], "index": torch.arange(3), "fixed": x * 2}


def test_a_step_is_that_of_adamw_on_the_mean_of_squares():
    torch.manual_seed(0)
    model, x = Heads(), torch.randn(5, 6)
    twin = Heads()
    twin.load_state_dict(model.state_dict())
    told = []
    TrainingStep(model, model, [x], HOW)(told.append)
    out = twin(x)
    (out["logits"].square().mean() + out["features"][0].square().mean()).backward()
    torch.optim.AdamW(twin.parameters(), lr=module.LEARNING_RATE).step()
    assert told == ["forward", "backward", "optimizer"]
    for a, b in zip(model.parameters(), twin.parameters(), strict=True):
        assert torch.equal(a, b)
        assert a.grad is None


def test_the_model_comes_back():
    """Weights, statistics, gradients and modes, also after an error; inside inference mode and autocast."""
    model, x = Heads().eval(), torch.randn(5, 6)
    model.head.train()
    model.body.weight.grad = kept = torch.ones(8, 6)
    before = {name: t.clone() for name, t in model.state_dict().items()}

    def fail():
        with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16), training(model):
            assert all(m.training for m in model.modules())
            assert not torch.is_autocast_enabled("cpu")
            TrainingStep(model, model, [x], HOW)()
            assert not torch.equal(model.norm.running_mean, before["norm.running_mean"])
            assert not torch.equal(model.body.weight, before["body.weight"])
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())
    assert model.body.weight.grad is kept
    assert [m.training for m in (model, model.norm, model.head)] == [False, False, True]


@pytest.mark.parametrize(
    ("dtype", "amp", "scaled"), [("fp16", True, True), ("bf16", True, False), ("fp32", False, False)]
)
def test_the_loss_is_scaled_where_it_has_to_be(dtype, amp, scaled):
    model, x = nn.Linear(6, 4), torch.randn(2, 6)
    seen = []
    model.register_forward_hook(lambda m, given, out: seen.append(out.dtype))
    step = TrainingStep(model, model, [x], HOW._replace(dtype=dtype, amp=dtype != "fp32"))
    step()
    assert step.scaler.is_enabled() == scaled
    assert seen == [{"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}[dtype]]


def test_what_cannot_be_trained():
    frozen = nn.Linear(2, 2).requires_grad_(False)
    with pytest.raises(Failure, match="no parameter of the model requires a gradient"):
        TrainingStep(frozen, frozen, [], HOW)
    layer = nn.Linear(2, 2)
    with pytest.raises(Failure, match="returns nothing that needs a gradient"):
        TrainingStep(layer, lambda x: layer(x).argmax(), [torch.zeros(1, 2)], HOW)()

    class Exported(nn.Module):
        def train(self, mode=True):
            raise NotImplementedError("Calling train() is not supported yet.")

    with pytest.raises(Failure, match="an exported program cannot be trained"), training(Exported()):
        pass


def test_phases_are_timed_apart(monkeypatch):
    """1 s forward, 2 s backward, 4 s in the optimizer; the calls that warm up take longer and are left out."""
    now, calls = 0.0, 0

    class Step:
        how = HOW

        def __call__(self, tell):
            nonlocal now, calls
            calls += 1
            for i, phase in enumerate(module.PHASES):
                now += 2**i * (10 if calls < 3 else 1)
                tell(phase)

    monkeypatch.setattr(module, "time_mark", lambda device: now)
    measured = timing.measure
    monkeypatch.setattr(module, "measure", lambda *args, **kw: measured(*args, **kw, warmup=2, clock=lambda: now))
    found = step_times(Step(), 14, lambda share: None)
    assert found.parts == {"forward": 1, "backward": 2, "optimizer": 4}
    assert found.samples == [[7, 7, 7]]
    assert found.details["images_per_s"] == 2
    assert (found.kind, found.unit, found.batch) == ("train", "s", 14)


def test_the_memory_of_a_step_by_hand():
    """The peak is in the optimizer or on the way back; the parts add up to it, and the totals are those of shapes."""
    model = nn.Sequential(nn.Linear(256, 512), nn.ReLU(), nn.Linear(512, 16))
    n, weights = 64, 4 * sum(p.numel() for p in model.parameters())
    with training(model):
        found = step_memory(TrainingStep(model, model, [torch.randn(n, 256)], HOW), model, n, False)
    parts, details = found.parts, found.details
    assert parts["weights"] == weights
    assert parts["input"] == 4 * n * 256
    assert parts["optimizer"] == 2 * weights + 4 * 4  # two moments, and the step of each of four parameters
    assert details["gradients"] == pytest.approx(weights, abs=256)
    assert details["kept"] == pytest.approx(4 * n * (512 + 16), abs=512)  # ReLU keeps what it returned; and the output
    assert sum(parts.values()) == found.median
    assert parts["gradients"] == pytest.approx(weights, abs=256)
    assert details["phase"] in ("backward", "optimizer")
    assert min(parts.values()) >= 0
    assert (found.kind, found.unit, found.quality) == ("train_memory", "bytes", [])


def test_what_cannot_be_told_apart():
    model = nn.Linear(4, 4)
    with training(model):
        found = step_memory(TrainingStep(model, model, [torch.zeros(1, 4)], HOW), model, 1, True)
    assert set(found.parts) == {"weights", "input", "optimizer", "activations"}
    assert sum(found.parts.values()) == found.median
    assert found.quality == ["activations, gradients and workspace cannot be told apart here"]


class Heads2:
    def __init__(self, mask, points):
        self.mask, self.points = mask, points
        if points:
            self.keypoint_predictor = nn.Module()
            self.keypoint_predictor.kps_score_lowres = nn.ConvTranspose2d(4, points, 4)

    def has_mask(self):
        return self.mask

    def has_keypoint(self):
        return self.points > 0


class Detector(nn.Module):
    __module__ = "torchvision.models.detection.some"

    def __init__(self, mask=False, points=0):
        super().__init__()
        self.roi_heads = Heads2(mask, points)


@pytest.mark.parametrize(("mask", "points"), [(False, 0), (True, 0), (False, 17)])
def test_detectors_get_boxes(mask, points):
    """Inside the image and with some area, for every image of the batch; other models get no further input."""
    [targets] = detection_targets(Detector(mask, points), [torch.zeros(3, 3, 40, 30)])
    assert len(targets) == 3
    for target in targets:
        boxes = target["boxes"]
        assert (boxes >= 0).all()
        assert (boxes <= torch.tensor([30, 40, 30, 40])).all()
        assert (boxes[:, 2:] - boxes[:, :2] >= module.SMALLEST - 1e-4).all()
        assert target["labels"].tolist() == [1] * len(boxes)
        assert ("masks" in target) == mask
        assert "keypoints" not in target or target["keypoints"].shape == (len(boxes), 17, 3)
    assert ("keypoints" in targets[0]) == (points > 0)
    assert not torch.equal(targets[0]["boxes"], targets[1]["boxes"])
    assert detection_targets(nn.Linear(2, 2), [torch.zeros(1, 2)]) == []
    assert nbytes(targets) > 0
