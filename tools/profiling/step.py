"""One training step of a model: what its forward pass, backward pass and optimizer take, and what memory it needs."""

from __future__ import annotations

import contextlib
import statistics
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from vizoo.tools.common import Failure
from vizoo.tools.profiling.memory import GRADIENT, KEPT, Memory, Tape, blocks_at_peak, nbytes, peak_memory, weights_of
from vizoo.tools.profiling.recording import tensors_in
from vizoo.tools.profiling.timing import Conditions, Measurement, measure, seconds_between, time_mark

PHASES = ("forward", "backward", "optimizer")
LEARNING_RATE = 1e-5  # small, for the speed of a step does not depend on it, and numbers stay what they are
BOXES, SMALLEST = 4, 2  # objects of an image, and their least side in pixels


class TrainingStep:
    """A step of AdamW on the mean of squares of all floating outputs.

    Args:
        model: A module in training mode.
        run: What runs it: itself, or compiled.
        inputs: Its inputs, with the batch.
        how: The conditions; under autocast the backward pass is outside of it, and fp16 has its loss scaled.

    Raises:
        Failure: If nothing of it is trained.
    """

    def __init__(self, model: nn.Module, run: Callable[..., Any], inputs: Sequence[Any], how: Conditions) -> None:
        self.params = [p for p in model.parameters() if p.requires_grad]
        if not self.params:
            raise Failure("train: no parameter of the model requires a gradient")
        self.run, self.how = run, how
        self.inputs = [*inputs, *detection_targets(model, inputs)]
        self.optimizer = torch.optim.AdamW(self.params, lr=LEARNING_RATE)
        scaled = how.amp and how.dtype == "fp16"
        self.scaler = torch.amp.GradScaler(how.device.type, enabled=scaled)

    def __call__(self, tell: Callable[[str], None] = lambda phase: None) -> None:
        """Make a step.

        Args:
            tell: Called with each of :data:`PHASES` when it ends.
        """
        with torch.autocast(self.how.device.type, self.how.kind if self.how.amp else None, self.how.amp):
            loss = self._loss(self.run(*self.inputs))
            torch.clear_autocast_cache()
        tell("forward")
        self.scaler.scale(loss).backward()
        del loss
        tell("backward")
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        tell("optimizer")

    @staticmethod
    def _loss(out: Any) -> Tensor:
        parts = [t.float().square().mean() for t in tensors_in(out) if t.requires_grad]
        if not parts:
            raise Failure("train: the model returns nothing that needs a gradient")
        return torch.stack(parts).sum()

    @property
    def state(self) -> list[Any]:
        """What the optimizer keeps, after a step."""
        return [list(values.values()) for values in self.optimizer.state.values()]


def detection_targets(model: nn.Module, inputs: Sequence[Any]) -> list[Any]:
    """Targets of random boxes for a detector of torchvision, which asks for them in training; none for other models.

    Args:
        model: The model.
        inputs: Its inputs, the images first.

    Returns:
        No further input, or one.
    """
    if len(inputs) != 1 or not any(
        c.__module__.startswith("torchvision.models.detection.") for c in type(model).__mro__
    ):
        return []
    heads: Any = getattr(model, "roi_heads", None)
    keypoints = heads is not None and heads.has_keypoint()
    found, generator = [], torch.Generator().manual_seed(0)
    for image in inputs[0]:
        h, w = image.shape[-2:]
        corner = torch.rand(BOXES, 2, generator=generator) * torch.tensor([w - SMALLEST, h - SMALLEST])
        rest = torch.tensor([w, h]) - corner - SMALLEST
        boxes = torch.cat([corner, corner + SMALLEST + rest * torch.rand(BOXES, 2, generator=generator)], 1)
        target = {"boxes": boxes, "labels": torch.ones(BOXES, dtype=torch.int64)}
        if heads is not None and heads.has_mask():
            target["masks"] = torch.ones(BOXES, h, w, dtype=torch.uint8)
        if keypoints:
            n = heads.keypoint_predictor.kps_score_lowres.out_channels
            middle = (boxes[:, :2] + boxes[:, 2:])[:, None] / 2
            target["keypoints"] = torch.cat([middle, torch.ones(BOXES, 1, 1)], 2).repeat(1, n, 1)
        found.append({name: t.to(image.device) for name, t in target.items()})
    return [found]


@contextlib.contextmanager
def training(model: nn.Module) -> Iterator[None]:
    """Training mode with a way back, outside of inference mode and autocast; afterwards the model is what it was."""
    modes = {m: m.training for m in model.modules()}
    try:
        model.train()
    except NotImplementedError:
        raise Failure("train: an exported program cannot be trained") from None
    saved = [(t, t.detach().to("cpu", copy=True)) for t in weights_of(model)]
    gradients = [(p, p.grad) for p in model.parameters()]
    for p, _ in gradients:
        p.grad = None
    device = next((t.device.type for t, _ in saved), "cpu")
    try:
        with torch.inference_mode(False), torch.enable_grad(), torch.autocast(device, enabled=False):
            yield
    finally:
        with torch.no_grad():
            for t, before in saved:
                t.copy_(before)
        for p, grad in gradients:
            p.grad = grad
        for module, mode in modes.items():
            module.training = mode


def step_times(step: TrainingStep, batch: int, tick: Callable[[float], None]) -> Measurement:
    """Seconds of a training step, and of its phases: those on a GPU between events in its queue.

    Args:
        step: The step.
        batch: Images of it.
        tick: As of :func:`vizoo.tools.profiling.timing.measure`.

    Returns:
        The samples; parts are the medians of the phases.
    """
    how, marks = step.how, []

    def run() -> None:
        marks.append([time_mark(how.device)])
        step(lambda phase: marks[-1].append(time_mark(how.device)))

    around = torch.cuda.device(how.device) if how.device.type == "cuda" else contextlib.nullcontext()
    with around:
        stats = measure(run, how.device, min_time=how.min_time, max_time=how.max_time, tick=tick)
    timed = marks[stats.warmup : stats.warmup + stats.n]
    parts = {phase: statistics.median(seconds_between(m[i], m[i + 1]) for m in timed) for i, phase in enumerate(PHASES)}
    details = {**stats.details, "images_per_s": batch / stats.median, "optimizer": "AdamW"}
    quality = stats.warnings
    return Measurement("train", "s", batch, [stats.samples], parts, quality, details)


def step_memory(step: TrainingStep, model: nn.Module, batch: int, compiled: bool) -> Measurement:
    """Peak memory of a training step, and what it consists of at that time.

    Args:
        step: The step, uncompiled on a CPU.
        model: The model that it trains.
        batch: Images of it.
        compiled: Whether the step is compiled, so that nobody sees into it.

    Returns:
        Bytes; parts add up to the peak: ``weights``, buffers among them, ``input``, ``optimizer``, and of what is
        there at the peak ``gradients`` of the weights, ``activations`` that the forward pass left for the way back,
        and ``workspace``, which is the rest.  Details tell ``kept``, all that the forward pass left, all
        ``gradients``, and in which ``phase`` the peak is.
    """
    device = step.how.device
    step()  # the optimizer makes its state in the first
    memory = peak_memory(step, model, [step.inputs, step.state], device)
    parts: dict[str, float] = {
        "weights": nbytes(weights_of(model)),
        "input": nbytes(step.inputs),
        "optimizer": nbytes(step.state),
    }
    details: dict[str, Any] = {"how": memory.how, "reserved": memory.reserved, "optimizer": "AdamW"}
    told = _at_peak(step, memory) if memory.how != "resident set" and not compiled else None
    if told is None:
        parts["activations"] = memory.activations
        quality = ["activations, gradients and workspace cannot be told apart here"]
        return Measurement("train_memory", "bytes", batch, [[memory.peak]], parts, quality, details)
    return Measurement("train_memory", "bytes", batch, [[memory.peak]], parts | told[0], [], details | told[1])


def _at_peak(step: TrainingStep, memory: Memory) -> tuple[dict[str, float], dict[str, Any]] | None:
    """Parts of what grew, and details."""

    def run(tape: Tape) -> None:
        def tell(phase: str) -> None:
            if phase == "forward":
                tape.note(KEPT)
            elif phase == "backward":
                tape.note(GRADIENT, [p.grad for p in step.params if p.grad is not None])

        step(tell)

    peak = blocks_at_peak(run, step.how.device)
    if peak is None:
        return None
    gradients = sum(b.size for b in peak.blocks if GRADIENT in b.notes)
    kept = sum(b.size for b in peak.blocks if KEPT in b.notes and GRADIENT not in b.notes)
    rest = max(0, memory.activations - gradients - kept)
    kept = memory.activations - gradients - rest
    parts: dict[str, float] = {"gradients": gradients, "activations": kept, "workspace": rest}
    phase = PHASES[(KEPT in peak.after) + (GRADIENT in peak.after)]
    return parts, {"kept": peak.totals.get(KEPT, 0), "gradients": peak.totals.get(GRADIENT, 0), "phase": phase}
