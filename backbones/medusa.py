"""MEDUSA: one encoder-decoder attention body whose map gates every stage of a convolutional classifier.

Paper: "MEDUSA: Multi-scale Encoder-Decoder Self-Attention Deep Neural Network Architecture for Medical Image Analysis",
H. Aboutalebi, M. Pavlova, H. Gunraj, M. J. Shafiee, A. Sabri, A. Alaref, A. Wong, Frontiers in Medicine 2022,
https://arxiv.org/abs/2110.06063.

This is a reconstruction from the paper's abstract and the published size of one network (29.2 M parameters, 29.1 G
multiply-accumulates), not the authors' network: neither its code nor its layer sizes nor its training schedule are
public, and no weights exist.

Our choices: the plain U-Net body and its width, the two convolutions of a head, the multiplication as gate, and the
training in phases.
"""

import threading
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import get_device_dtype, register_notrace_function
from timm.models import checkpoint_seq, generate_default_cfgs, register_model
from timm.models._features import feature_take_indices
from timm.models.resnet import BasicBlock, Bottleneck, ResNet
from torch import Tensor, nn

from .layers import Panel
from .layers.about import About
from .layers.build import build
from .layers.checkpoint import unwrap
from .layers.checks import check_counts, check_positions, checked, need
from .layers.convnet import run, speed_up
from .layers.panel import evaluating
from .layers.resampling import resize_smoothly

__all__ = ["MEDUSA", "medusa", "medusa_parameters"]

ABOUT = About(
    "MEDUSA",
    "no official code or weights; a reconstruction from the paper's abstract on timm's ResNet.",
    (
        (
            'H. Aboutalebi, M. Pavlova, H. Gunraj, M. J. Shafiee, A. Sabri, A. Alaref, A. Wong, "MEDUSA: '
            "Multi-scale Encoder-Decoder Self-Attention Deep Neural Network Architecture for Medical Image "
            'Analysis", Frontiers in Medicine 2022',
            "2110.06063",
        ),
    ),
    checked="The whole ``medusa_resnet50`` with two classes has 29.46 M parameters and 28.0 G multiply-accumulates for "
    "a 480x480 image; the paper says 29.2 M and 29.1 G.",
    limits=(
        "There are no weights but those of timm's backbones: train first.  No accuracy of the paper is claimed.",
        "Models changed by ``medusa(model)`` have no ``explain``: ``vizoo show`` has Grad-CAM and receptive fields of "
        "them.  They refuse gradient checkpointing that takes stages apart or runs them again, and stages that are "
        "called outside of a pass.",
    ),
    example="""
        # the attention body on another convolutional network of timm
        from vizoo.backbones.medusa import medusa

        net = medusa(timm.create_model("resnet10t", num_classes=2)).eval()
        print(net(image).shape)
        whole, local = net.medusa.attention_maps(image)  # the global map, and the gates of the stages
    """,
)


@register_notrace_function
def body_image(x: Tensor, size: int, given: Tensor | None = None) -> Tensor:
    """The body's own view of an image: gray, square, each image with mean 0 and standard deviation 1.

    Args:
        x: Images ``[B, C, height, width]``.
        size: Side of the result.
        given: What to return instead.

    Returns:
        ``[B, 1, size, size]`` in the dtype of ``x``, computed in at least float32.
    """
    if given is not None:
        return given
    gray = x.mean(1, keepdim=True, dtype=torch.promote_types(x.dtype, torch.float32))
    gray = resize_smoothly(gray, size, size)
    gray = gray - gray.mean((2, 3), keepdim=True)
    deviation = torch.linalg.vector_norm(gray, 2.0, (2, 3), True) / size  # its gradient for a constant image is 0
    return (gray / (deviation + 1e-6)).to(x.dtype)


@register_notrace_function
def resize_map(x: Tensor, height: int, width: int) -> Tensor:
    """Resize the global map ``[B, 1, H, W]`` to a stage, in at least float32."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))  # antialiasing knows no half precision on a CPU
    return resize_smoothly(wide, height, width).to(x.dtype)


def _double_conv(in_chans: int, dim: int, **dd: Any) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(in_chans, dim, 3, padding=1, bias=False, **dd),
        nn.BatchNorm2d(dim, **dd),
        nn.ReLU(),
        nn.Conv2d(dim, dim, 3, padding=1, bias=False, **dd),
        nn.BatchNorm2d(dim, **dd),
        nn.ReLU(),
    )


class AttentionBody(nn.Module):
    """The shared attention network, a plain U-Net from a gray image to one map.  It is a segmenter on its own.

    Args:
        width: Channels of the first level; each deeper level has twice as many.
        depth: Number of poolings.
        device: Device of the parameters.
        dtype: Dtype of the parameters.
    """

    def __init__(
        self,
        width: int = 28,
        depth: int = 4,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        widths = [width * 2**i for i in range(depth + 1)]
        self.down = nn.ModuleList(_double_conv(a, b, **dd) for a, b in zip([1, *widths], widths, strict=False))
        self.pool = nn.MaxPool2d(2)
        self.up = nn.ModuleList(nn.ConvTranspose2d(2 * w, w, 2, stride=2, **dd) for w in reversed(widths[:-1]))
        self.merge = nn.ModuleList(_double_conv(2 * w, w, **dd) for w in reversed(widths[:-1]))
        self.out = nn.Conv2d(width, 1, 1, **dd)

    def forward(self, x: Tensor, logits: bool = False) -> Tensor:
        """Gray images ``[B, 1, H, W]`` to the map ``[B, 1, H, W]``, before the sigmoid with ``logits``."""
        skips: list[Tensor] = []
        for i, block in enumerate(self.down):
            x = x if i == 0 else self.pool(x)
            x = block(x) if torch.jit.is_scripting() else run(x, block)
            skips.append(x)
        x = skips.pop()
        for up, merge in zip(self.up, self.merge):  # noqa: B905 - TorchScript knows no strict
            x = torch.cat([up(x), skips.pop()], dim=1)
            x = merge(x) if torch.jit.is_scripting() else run(x, merge)
        x = self.out(x)
        return x if logits else x.sigmoid()


class AttentionHead(nn.Module):
    """Refines the global map at one scale and gates that stage with it.

    The last convolution starts with weight 0 and bias 2: every gate is 0.88, so pretrained features pass almost
    unchanged.

    Args:
        dim: Channels of the stage.
        head_dim: Hidden channels.
        head_out: ``"spatial"`` for one map, ``"channel"`` for a map for each channel of the stage.
        gate: ``"mul"`` multiplies by the map, ``"residual"`` by one plus the map.
        device: Device of the parameters.
        dtype: Dtype of the parameters.
    """

    residual: torch.jit.Final[bool]

    def __init__(
        self,
        dim: int,
        head_dim: int = 32,
        head_out: str = "spatial",
        gate: str = "mul",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        self.residual = gate == "residual"
        self.conv1 = nn.Conv2d(1, head_dim, 3, padding=1, bias=False, **dd)
        self.bn1 = nn.BatchNorm2d(head_dim, **dd)
        self.conv2 = nn.Conv2d(head_dim, 1 if head_out == "spatial" else dim, 3, padding=1, **dd)

    def init_weights(self) -> None:
        """A gate of 0.88 everywhere."""
        nn.init.zeros_(self.conv2.weight)
        nn.init.constant_(self.conv2.bias, 2.0)  # type: ignore[arg-type]

    def attention(self, global_map: Tensor, height: int, width: int) -> Tensor:
        """The local map ``[B, 1 or dim, height, width]`` in (0, 1)."""
        local = resize_map(global_map, height, width)
        x = self.bn1(self.conv1(local)) if torch.jit.is_scripting() else run(local, self.conv1, self.bn1)
        return self.conv2(F.relu(x)).sigmoid()

    def forward(self, x: Tensor, global_map: Tensor) -> Tensor:
        """Gate a stage's output ``[B, dim, H, W]`` by the global map ``[B, 1, S, S]``."""
        local = self.attention(global_map, x.shape[2], x.shape[3])
        return x * (1 + local) if self.residual else x * local


def _check(body_size: int, body_depth: int) -> None:
    need(body_size % 2**body_depth == 0, f"a multiple of 2**body_depth={2**body_depth}", body_size=body_size)


class Stage(nn.Sequential):
    """Blocks of a stage, recomputed in the backward pass on demand."""

    grad_checkpointing: bool

    def __init__(self, *blocks: nn.Module):
        super().__init__(*blocks)
        self.grad_checkpointing = False

    def forward(self, x: Tensor) -> Tensor:
        """Map ``[B, C, H, W]`` to the stage's output."""
        if self.grad_checkpointing and not torch.jit.is_scripting():
            return checkpoint_seq(list(self.children()), x)
        for block in self:
            x = block(x)
        return x


class MEDUSA(ResNet):
    """A ResNet whose four stages are gated by one attention body (Sec. 3).

    The body sees a small gray copy of the image, or an image of its own, and draws one global map; a head at every
    scale refines the map and multiplies the stage's output by it before the next stage.

    Args:
        block: Residual block of the backbone.
        layers: Blocks of the four stages.
        channels: Base channels of the four stages.
        num_classes: Classes; 0 for no classifier.
        in_chans: Channels of the image.
        global_pool: ``avg``, ``max``, ``avgmax``, ``catavgmax`` or ``''``.
        drop_rate: Dropout before the classifier.
        drop_path_rate: Stochastic depth rate of the last block, rising linearly from 0.
        zero_init_last: Start every residual branch at zero.
        body_width: Channels of the body's first level.
        body_depth: Poolings of the body.
        body_size: Side of the body's input, a multiple of ``2 ** body_depth``.
        head_dim: Hidden channels of the attention heads.
        head_out: ``"spatial"`` or ``"channel"``, see :class:`AttentionHead`.
        gate: ``"mul"`` or ``"residual"``, likewise.
        training_rounds: How often backbone and body are trained in turn, see :meth:`training_phase`; None for 2, or
            what the epochs have room for.
        device: Device of the parameters.
        dtype: Dtype of the parameters.

    Raises:
        ValueError: If an argument is outside its range.
    """

    @checked()
    def __init__(
        self,
        block: type[nn.Module] = Bottleneck,
        layers: Sequence[int] = (3, 4, 6, 3),
        channels: Sequence[int] = (64, 128, 256, 512),
        num_classes: int = 1000,
        in_chans: int = 3,
        global_pool: str = "avg",
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        zero_init_last: bool = True,
        body_width: int = 28,
        body_depth: int = 4,
        body_size: int = 256,
        head_dim: int = 32,
        head_out: str = "spatial",
        gate: str = "mul",
        training_rounds: int | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        _check(body_size, body_depth)
        check_counts(4, layers=layers, channels=channels)
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        super().__init__(
            block,  # type: ignore[arg-type]
            tuple(layers),  # type: ignore[arg-type]
            num_classes=num_classes,
            in_chans=in_chans,
            global_pool=global_pool,
            channels=tuple(channels),
            drop_rate=drop_rate,
            drop_path_rate=drop_path_rate,
            zero_init_last=zero_init_last,
            **dd,
        )
        speed_up(self)
        self.body_size = body_size
        self.training_rounds = training_rounds
        self.phase = "all"
        self.last_level = 3
        self.body = AttentionBody(body_width, body_depth, **dd)
        self.feature_info: list[dict[str, Any]] = self.feature_info[1:]  # the stem is not gated
        for i, info in enumerate(self.feature_info, start=1):
            setattr(self, f"layer{i}", Stage(*getattr(self, f"layer{i}").children()))
            setattr(self, f"attention{i}", AttentionHead(info["num_chs"], head_dim, head_out, gate, **dd))
            info["module"] = f"attention{i}"
        self._init_attention()

    def _init_attention(self) -> None:
        for module in self.modules():
            if isinstance(module, AttentionBody):
                module.out.reset_parameters()
            if isinstance(module, (AttentionBody, AttentionHead)):
                for conv in module.modules():
                    if isinstance(conv, nn.Conv2d) and conv.kernel_size == (3, 3):
                        nn.init.kaiming_normal_(conv.weight, mode="fan_out", nonlinearity="relu")
                if isinstance(module, AttentionHead):
                    module.init_weights()

    @torch.jit.ignore
    def init_weights(self, needs_reset: bool = True, zero_init_last: bool = True) -> None:
        """Initialise as timm's ResNet; heads start with a gate of 0.88.

        Args:
            needs_reset: First give every layer PyTorch's default, as after ``to_empty()``.
            zero_init_last: Start every residual branch at zero.
        """
        for module in self.modules():
            if needs_reset and module is not self and hasattr(module, "reset_parameters"):
                module.reset_parameters()  # type: ignore[operator]
        super().init_weights(zero_init_last=zero_init_last)
        self._init_attention()

    @torch.jit.ignore
    @checked()
    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute the blocks in the backward pass instead of storing their activations."""
        for module in self.modules():
            if isinstance(module, Stage):
                module.grad_checkpointing = enable

    def train(self, mode: bool = True) -> "MEDUSA":
        """Set the mode; the part that :func:`medusa_parameters` froze stays in evaluation mode."""
        super().train(mode)
        for part in _frozen(self):
            part.eval()
        return self

    @torch.jit.ignore
    def training_phase(self, epoch: int, epochs: int) -> float:
        """Choose what an epoch trains: backbone and body in turn, in the end all at a tenth of the learning rate.

        Args:
            epoch: From 0.
            epochs: Of the training, in ``2 * training_rounds + 1`` equal parts.

        Returns:
            Factor of the learning rate.

        Raises:
            ValueError: If there are fewer epochs than parts.
        """
        most = (epochs - 1) // 2
        rounds = min(2, most) if self.training_rounds is None else self.training_rounds
        need(rounds <= most or not rounds, f"at most {most} for {epochs} epochs", training_rounds=rounds)
        parts = 2 * rounds + 1
        part = epoch * parts // epochs
        phase = "all" if part == parts - 1 else ("backbone", "body")[part % 2]
        if rounds:  # else what somebody froze stays frozen
            medusa_parameters(self, phase)
        return 0.1 if rounds and phase == "all" else 1.0

    @torch.jit.ignore
    def explain(self, image: Tensor) -> list[Panel]:
        """The global map and the map of every scale.

        Args:
            image: ``[1, in_chans, H, W]``, normalised.

        Returns:
            A panel for each map; of maps for each channel the mean.
        """
        with evaluating(self):
            whole, local = self.attention_maps(image)
        titles = ["Global map of the attention body"]
        titles += [f"Gate of scale {i}, {m.shape[2]}x{m.shape[3]}" for i, m in enumerate(local, start=1)]
        maps = zip(titles, (whole, *local), strict=True)
        return [Panel(title=title, heat=m[0].float().mean(0), bar="attention") for title, m in maps]

    @checked()
    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Replace the classifier.

        Args:
            num_classes: Classes; 0 removes it.
            global_pool: Pooling as in the constructor; None keeps the current one.
        """
        super().reset_classifier(num_classes, global_pool)

    @torch.jit.ignore
    def attention_maps(self, x: Tensor, body_input: Tensor | None = None) -> tuple[Tensor, list[Tensor]]:
        """The global map and the map of every stage.

        Args:
            x: Images ``[B, in_chans, height, width]``.
            body_input: Gray images ``[B, 1, S, S]`` for the body; None makes them from ``x``.

        Returns:
            ``(global, [local, ...])`` of shapes ``[B, 1, S, S]`` and ``[B, 1 or C, H / r, W / r]``, all in (0, 1).
        """
        global_map = self.body(body_image(x, self.body_size, body_input))
        maps = []
        for i, info in enumerate(self.feature_info[: self.last_level + 1], start=1):
            height, width = (-(-n // info["reduction"]) for n in x.shape[2:])
            maps.append(getattr(self, f"attention{i}").attention(global_map, height, width))
        return global_map, maps

    def _pyramid(self, x: Tensor, global_map: Tensor, last: int) -> list[Tensor]:
        """Gated outputs of the stages up to a level."""
        if torch.jit.is_scripting():
            x = self.maxpool(self.act1(self.bn1(self.conv1(x))))
        else:
            x = run(x, self.conv1, self.bn1, self.act1, self.maxpool)
        x = self.attention1(self.layer1(x), global_map)  # type: ignore[operator]
        levels = [x]
        if last >= 1:  # noqa: SIM102 - TorchScript decides the inner conditions before it compiles
            if self.layer2 is not None:
                x = self.attention2(self.layer2(x), global_map)  # type: ignore[operator]
                levels.append(x)
        if last >= 2:  # noqa: SIM102
            if self.layer3 is not None:
                x = self.attention3(self.layer3(x), global_map)  # type: ignore[operator]
                levels.append(x)
        if last >= 3:  # noqa: SIM102
            if self.layer4 is not None:
                x = self.attention4(self.layer4(x), global_map)  # type: ignore[operator]
                levels.append(x)
        return levels

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | list[int] | None = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
    ) -> list[Tensor] | tuple[Tensor, list[Tensor]]:
        """Gated outputs of the stages.

        Args:
            x: Images ``[B, in_chans, height, width]``.
            indices: Stages to return; an int means the last ones, None all.
            norm: Without effect, there is no final norm.
            stop_early: Run no stage after the last one asked for.
            output_fmt: ``NCHW``.
            intermediates_only: Return the features only.

        Returns:
            The features, or ``(final, features)`` with ``final`` as of :meth:`forward_features`.
        """
        assert output_fmt == "NCHW", "Output format must be NCHW."
        take_indices, max_index = feature_take_indices(self.last_level + 1, indices)
        global_map = self.body(body_image(x, self.body_size))
        levels = self._pyramid(x, global_map, max_index if stop_early else self.last_level)
        features: list[Tensor] = []
        for i, level in enumerate(levels):
            if i in take_indices:
                features.append(level)
        if intermediates_only:
            return features
        return levels[-1], features

    def prune_intermediate_layers(
        self, indices: int | list[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """Remove what the features of ``indices`` do not need.

        Args:
            indices: Stages to keep the features of, as in :meth:`forward_intermediates`.
            prune_norm: Without effect, there is no final norm.
            prune_head: Remove the classifier.

        Returns:
            The stages as positive numbers.
        """
        take_indices, max_index = feature_take_indices(self.last_level + 1, indices)
        prune_end = max_index < self.last_level
        self.last_level = max_index
        for i in range(max_index + 2, 5):
            setattr(self, f"layer{i}", None)
            setattr(self, f"attention{i}", None)
        if prune_end:
            self.num_features = self.head_hidden_size = self.feature_info[max_index]["num_chs"]
        if prune_head or prune_end:
            self.reset_classifier(0, "")
        return take_indices

    def forward_features(self, x: Tensor, body_input: Tensor | None = None) -> Tensor:
        """Images ``[B, in_chans, height, width]`` to the last gated map ``[B, num_features, H, W]``."""
        global_map = self.body(body_image(x, self.body_size, body_input))
        return self._pyramid(x, global_map, self.last_level)[-1]

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Map ``[B, num_features, H, W]`` to logits, or to the pooled features with ``pre_logits``."""
        x = self.global_pool(x)
        if self.drop_rate > 0.0:
            x = F.dropout(x, p=float(self.drop_rate), training=self.training)
        return x if pre_logits else self.fc(x)

    def forward(self, x: Tensor, body_input: Tensor | None = None) -> Tensor:
        """Classify images.

        Args:
            x: Images ``[B, in_chans, height, width]``.
            body_input: Gray images ``[B, 1, S, S]`` for the body, ``S`` a multiple of ``2 ** body_depth``; None makes
                them from ``x``.

        Returns:
            Logits ``[B, num_classes]``.
        """
        x = self.forward_features(x, body_input)
        return self.forward_head(x)


class _Pass:
    """One pass of an image through a host.

    Args:
        gates: Gates of the host, or of the copy of it that runs in this thread.
        whole: Whether the host itself was called, and not only its layers.
    """

    def __init__(self, gates: "Gates", whole: bool):
        self.gates, self.whole = gates, whole
        self.global_map: Tensor | None = None
        self.gated: list[str] = []


class _Passes(threading.local):
    """The passes under way in a thread, the innermost last; neither copied nor saved with the model."""

    def __init__(self) -> None:
        self.stack: list[_Pass] = []

    def __reduce__(self) -> tuple[type, tuple[()]]:
        return _Passes, ()


class Gates(nn.Module):
    """Body and heads beside a classifier whose stages they gate through hooks; made by :func:`medusa`."""

    def __init__(self, host: nn.Module, body: AttentionBody, heads: nn.ModuleDict, body_size: int):
        super().__init__()
        self.body = body
        self.heads = heads
        self.body_size = body_size
        self.phase = "all"
        self._host = [host]  # in a list: a parent is not a submodule
        self._passes = _Passes()

    def begin(self, host: nn.Module, args: Any) -> None:
        """Before the host."""
        self._passes.stack.append(_Pass(host.medusa, whole=True))  # type: ignore[arg-type]

    def look(self, module: nn.Module, args: tuple[Tensor, ...]) -> None:
        """Before the first convolution: draw the global map of the image."""
        if getattr(self._host[0], "grad_checkpointing", False):
            name = type(self._host[0]).__name__
            raise RuntimeError(f"gradient checkpointing of {name} passes its gated stages by; switch it off")
        stack = self._passes.stack
        if not stack or stack[-1].global_map is not None:  # somebody runs the layers one by one
            if stack and not stack[-1].whole:
                stack.pop()
            stack.append(_Pass(stack[-1].gates if stack else self, whole=False))
        gates = stack[-1].gates
        stack[-1].global_map = gates.body(body_image(args[0], gates.body_size))

    def gate(self, name: str, x: Tensor) -> Tensor:
        """After a stage: gate its output ``[B, C, H, W]``."""
        stack, names = self._passes.stack, list(self.heads)
        while stack and not stack[-1].whole and stack[-1].gated != names[: names.index(name)]:
            stack.pop()  # it ended before its last stage
        if not stack or stack[-1].global_map is None:
            raise RuntimeError(
                f"stage {name} was called outside a pass, which starts with the first convolution and calls each stage "
                "once; gradient checkpointing of whole stages calls them again"
            )
        current = stack[-1]
        current.gated.append(name)
        x = current.gates.heads[name](x, current.global_map)
        if not current.whole and name == names[-1]:
            stack.pop()
        return x

    def end(self, host: nn.Module, args: Any, out: Tensor | None) -> None:
        """After the host, also after an error in it, when there is no output."""
        stack = self._passes.stack
        while not stack.pop().whole:
            pass

    def attention_maps(self, x: Tensor) -> tuple[Tensor, list[Tensor]]:
        """The global map and the map of every gated stage for images, as :meth:`MEDUSA.attention_maps`.

        Args:
            x: Images ``[B, in_chans, height, width]``; the whole model runs.

        Returns:
            ``(global, [local, ...])``.
        """
        seen: dict[nn.Module, tuple[Tensor, int, int]] = {}

        def keep(head: nn.Module, args: tuple[Tensor, ...]) -> None:
            seen[head] = (args[1], args[0].shape[2], args[0].shape[3])

        handles = [head.register_forward_pre_hook(keep) for head in self.heads.values()]
        try:
            self._host[0](x)
        finally:
            for handle in handles:
                handle.remove()
        maps = [head.attention(*seen[head]) for head in self.heads.values()]  # type: ignore[operator]
        return next(iter(seen.values()))[0], maps

    def train(self, mode: bool = True) -> "Gates":
        """Set the mode; the part that :func:`medusa_parameters` froze stays in evaluation mode."""
        super().train(mode)
        for part in _frozen(self._host[0]):
            part.eval()
        return self


class _Gate:
    """Hook after a stage; a class, not a closure, so that a copied model has hooks of its own."""

    def __init__(self, gates: Gates, name: str):
        self.gates, self.name = gates, name

    def __call__(self, module: nn.Module, args: Any, out: Tensor) -> Tensor:
        return self.gates.gate(self.name, out)


@checked()
def medusa(
    model: nn.Module,
    *,
    stages: Sequence[int] | None = None,
    body_width: int = 28,
    body_depth: int = 4,
    body_size: int = 256,
    head_dim: int = 32,
    head_out: str = "spatial",
    gate: str = "mul",
) -> nn.Module:
    """Gate the stages of a timm CNN, in place, by one attention body.

    The model keeps its names, so its checkpoints load with only ``medusa.*`` missing, and its features are the gated
    ones; ``model.medusa.attention_maps(x)`` gives the maps.  Hooks do the work: unlike the registered ``medusa_*``
    models the result cannot be scripted, and gradient checkpointing that takes stages apart or runs them again is
    refused.

    Args:
        model: A timm model with ``feature_info`` whose stages give maps ``[B, C, H, W]``.
        stages: Positions in ``feature_info`` to gate; None means all of stride 4 and more.
        body_width: As in :class:`MEDUSA`, like all that follow.
        body_depth: Poolings of the body.
        body_size: Side of the body's input.
        head_dim: Hidden channels of the heads.
        head_out: ``"spatial"`` or ``"channel"``.
        gate: ``"mul"`` or ``"residual"``.

    Returns:
        ``model``.

    Raises:
        ValueError: If an argument is outside its range, or the model has no such stages or gives other than maps.
    """
    _check(body_size, body_depth)
    if hasattr(model, "medusa"):
        raise ValueError("got a model that medusa() has already changed")
    infos = list(getattr(model, "feature_info", ()))
    first = (getattr(model, "pretrained_cfg", None) or {}).get("first_conv")
    if not infos or not isinstance(first, str):
        raise ValueError(f"got {type(model).__name__} without feature_info or one first_conv, need a timm CNN")
    if stages is None:
        stages = [i for i, info in enumerate(infos) if info["reduction"] >= 4]
    check_positions(len(infos), stages=stages)
    dd = get_device_dtype(model)
    chosen = {infos[i]["module"]: infos[i] for i in sorted(i % len(infos) for i in stages)}
    found = _outputs(model, list(chosen), dd)
    for name, info in chosen.items():
        if name not in found or found[name].dim() != 4 or found[name].shape[1] != info["num_chs"]:
            raise ValueError(f"got a model whose stage {name} gives no [B, {info['num_chs']}, H, W] map")
    heads = nn.ModuleDict(
        {
            name.replace(".", "_"): AttentionHead(info["num_chs"], head_dim, head_out, gate, **dd)
            for name, info in chosen.items()
        }
    )
    gates = Gates(model, AttentionBody(body_width, body_depth, **dd), heads, body_size)
    for head in heads.values():
        head.init_weights()  # type: ignore[operator]
    model.medusa = gates.train(model.training)
    model.register_forward_pre_hook(gates.begin)
    model.register_forward_hook(gates.end, always_call=True)
    model.get_submodule(first).register_forward_pre_hook(gates.look)
    for name in chosen:
        model.get_submodule(name).register_forward_hook(_Gate(gates, name.replace(".", "_")))
    return model


def _outputs(model: nn.Module, names: list[str], dd: dict[str, Any]) -> dict[str, Tensor]:
    """What the named modules give for one image."""
    found: dict[str, Tensor] = {}

    def keep(name: str) -> Any:
        return lambda module, args, out: found.update({name: out})

    handles = [model.get_submodule(name).register_forward_hook(keep(name)) for name in names]
    try:
        with evaluating(model):
            model(torch.zeros(1, *model.pretrained_cfg["input_size"], **dd))  # type: ignore[index]
    finally:
        for handle in handles:
            handle.remove()
    return found


def _is_attention(name: str) -> bool:
    return name.split(".")[0].startswith(("body", "attention", "medusa"))


def _frozen(model: nn.Module) -> list[nn.Module]:
    """The parts that the model's phase does not train."""
    gates = getattr(model, "medusa", model)
    phase = getattr(gates, "phase", "all")  # not there yet while the model is being built
    if phase == "backbone":
        return [gates.body]  # type: ignore[list-item]
    if phase == "body":
        return [module for name, module in model.named_children() if not _is_attention(name)]
    return []


@checked(phase=("body", "backbone", "all"))
def medusa_parameters(model: nn.Module, phase: str) -> list[nn.Parameter]:
    """Choose what learns: the rest is frozen and stays in evaluation mode, whatever ``train()`` says.

    Args:
        model: A ``medusa_*`` model, or one that :func:`medusa` changed.
        phase: ``"backbone"`` trains backbone, classifier and heads, ``"body"`` trains body and heads, ``"all"``
            everything.

    Returns:
        The parameters for the optimizer.

    Raises:
        ValueError: If the model is none of MEDUSA's or the phase is unknown.
    """
    gates = getattr(model, "medusa", model)
    if not isinstance(gates, (MEDUSA, Gates)):
        raise ValueError(f"got {type(model).__name__}, need a medusa_* model or one changed by medusa()")
    gates.phase = phase
    in_body = "medusa.body." if gates is not model else "body."
    for name, parameter in model.named_parameters():
        if name.startswith(in_body):
            parameter.requires_grad_(phase != "backbone")
        elif not _is_attention(name):
            parameter.requires_grad_(phase != "body")
        else:
            parameter.requires_grad_(True)
    model.train(model.training)
    return [p for p in model.parameters() if p.requires_grad]


def checkpoint_filter_fn(state_dict: dict[str, Any], model: nn.Module) -> dict[str, Tensor]:
    """Weights of a plain timm ResNet, or our own, for ``model``.

    Args:
        state_dict: Checkpoint or state dict.
        model: The model to load; without body and heads in the checkpoint the model's own stay.

    Returns:
        A state dict for ``model``.
    """
    state_dict = unwrap(state_dict)
    if not any(_is_attention(k) for k in state_dict):
        state_dict = {**state_dict, **{k: v for k, v in model.state_dict().items() if _is_attention(k)}}
    return state_dict


def _cfg(**kwargs: Any) -> dict[str, Any]:
    return {
        "num_classes": 1000,
        "input_size": (3, 480, 480),
        "pool_size": (15, 15),
        "crop_pct": 1.0,
        "interpolation": "bicubic",
        "mean": (0.485, 0.456, 0.406),
        "std": (0.229, 0.224, 0.225),
        "first_conv": "conv1",
        "classifier": "fc",
        "license": "apache-2.0",
        "paper_name": "MEDUSA: Multi-scale Encoder-Decoder Self-Attention Deep Neural Network Architecture for Medical "
        "Image Analysis",
        "paper_ids": "arXiv:2110.06063",
        "notes": (
            "reconstruction from the abstract; the weights are those of timm's backbone, body and heads are new",
        ),
        **kwargs,
    }


default_cfgs = generate_default_cfgs(
    {
        "medusa_resnet18.backbone_a1_in1k": _cfg(hf_hub_id="timm/resnet18.a1_in1k"),
        "medusa_resnet18_w16.backbone_a1_in1k": _cfg(hf_hub_id="timm/resnet18.a1_in1k"),
        "medusa_resnet34.backbone_a1_in1k": _cfg(hf_hub_id="timm/resnet34.a1_in1k"),
        "medusa_resnet50.backbone_a1_in1k": _cfg(hf_hub_id="timm/resnet50.a1_in1k"),
        "medusa_resnet101.backbone_a1h_in1k": _cfg(hf_hub_id="timm/resnet101.a1h_in1k"),
        "test_medusa.untrained": _cfg(input_size=(3, 96, 96), pool_size=(3, 3)),
    }
)


def _create_medusa(variant: str, pretrained: bool = False, **kwargs: Any) -> MEDUSA:
    return build(MEDUSA, variant, pretrained, checkpoint_filter_fn, **kwargs)


@register_model
def test_medusa(pretrained: bool = False, **kwargs: Any) -> MEDUSA:
    """Tiny MEDUSA for tests."""
    model_args = {
        "block": BasicBlock,
        "layers": (1, 1, 1, 1),
        "channels": (16, 24, 32, 40),
        "body_width": 8,
        "body_depth": 2,
        "body_size": 32,
    }
    return _create_medusa("test_medusa", pretrained, **{**model_args, **kwargs})


@register_model
def medusa_resnet18(pretrained: bool = False, **kwargs: Any) -> MEDUSA:
    """MEDUSA on ResNet-18."""
    return _create_medusa("medusa_resnet18", pretrained, **{"block": BasicBlock, "layers": (2, 2, 2, 2), **kwargs})


@register_model
def medusa_resnet18_w16(pretrained: bool = False, **kwargs: Any) -> MEDUSA:
    """MEDUSA on ResNet-18 with a narrow body."""
    model_args = {"block": BasicBlock, "layers": (2, 2, 2, 2), "body_width": 16}
    return _create_medusa("medusa_resnet18_w16", pretrained, **{**model_args, **kwargs})


@register_model
def medusa_resnet34(pretrained: bool = False, **kwargs: Any) -> MEDUSA:
    """MEDUSA on ResNet-34."""
    return _create_medusa("medusa_resnet34", pretrained, **{"block": BasicBlock, "layers": (3, 4, 6, 3), **kwargs})


@register_model
def medusa_resnet50(pretrained: bool = False, **kwargs: Any) -> MEDUSA:
    """MEDUSA on ResNet-50, the backbone that fits the published size."""
    return _create_medusa("medusa_resnet50", pretrained, **kwargs)


@register_model
def medusa_resnet101(pretrained: bool = False, **kwargs: Any) -> MEDUSA:
    """MEDUSA on ResNet-101."""
    return _create_medusa("medusa_resnet101", pretrained, **{"layers": (3, 4, 23, 3), **kwargs})
