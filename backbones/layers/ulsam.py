"""Ultra-lightweight subspace attention as a module, and into any convolutional network (ULSAM, Sec. 3)."""

import difflib
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import get_device_dtype, is_exporting, register_notrace_module, use_fused_attn
from torch import Tensor, nn

from ..ops.backend import on_kernel_device, trains_by_onednn
from ..ops.ulsam import reference_subspace_attention, subspace_attention, subspace_maps, ulsam_logits
from .checks import ANY, check_multiple, checked
from .contmix import as_written
from .panel import evaluating
from .plain import fold, folds, has_bias, pointwise, tensors

__all__ = ["ULSAM", "add_ulsam"]


@register_notrace_module  # picks its path by the device of its input
class ULSAM(nn.Module):
    """Every group of channels gets one softmax map over all positions: ``out = x + attention * x`` (Sec. 3).

    The logits of a group are a depthwise 1x1 convolution, norm, ReLU and 3x3 maximum of its channels, their weighted
    sum, norm and ReLU.  All groups are computed at once; values, gradients and running statistics are those of a loop
    over the groups with a small network each, and the state dict of the official loop loads as it is.

    The module serves as ``attn_layer`` of timm's models that take a class there:
    ``timm.create_model("resnet50", block_args={"attn_layer": ULSAM})``.

    Args:
        dim: Channels, a multiple of ``num_splits``.
        num_splits: Groups of channels ``g`` with a map of their own.
        bn_momentum: Momentum of the norms as PyTorch means it.  0.9 is the official value and keeps little but the last
            batch; it may have been meant as a decay of 0.9, which is 0.1 here, the choice for small batches.
        device: Device of the parameters.
        dtype: Dtype of the parameters.

    Raises:
        ValueError: If an argument is outside its range.
    """

    fused: torch.jit.Final[bool]

    @checked(num_splits=ANY)
    def __init__(
        self,
        dim: int,
        num_splits: int = 4,
        bn_momentum: float = 0.9,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        check_multiple(dim=dim, num_splits=num_splits)
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        self.num_splits = num_splits
        self.fused = use_fused_attn()
        self.conv_dws = nn.Conv2d(dim, dim, 1, groups=dim, **dd)
        self.bn_dws = nn.BatchNorm2d(dim, momentum=bn_momentum, **dd)
        self.conv_point = nn.Conv2d(dim, num_splits, 1, groups=num_splits, **dd)
        self.bn_point = nn.BatchNorm2d(num_splits, momentum=bn_momentum, **dd)

    def _logits(self, x: Tensor) -> Tensor:
        if not torch.jit.is_scripting():  # noqa: SIM102 - TorchScript compiles every operand of `and`
            if self.fused and not (as_written(x) or is_exporting()) and self._reads():
                if self._folds(x):
                    return ulsam_logits(x, *self._fold())
                weight, bias = tensors(self.conv_point)
                return self.bn_point(ulsam_logits(self.bn_dws(self._scaled(x)), weight.flatten(1), bias))
        peaks = F.max_pool2d(F.relu(self.bn_dws(self.conv_dws(x))), 3, stride=1, padding=1)
        return self.bn_point(self.conv_point(peaks))

    @torch.jit.unused
    def _reads(self) -> bool:
        """Whether the operator may sum with the weights of the second convolution."""
        return pointwise(self.conv_point, self.num_splits) and has_bias(self.conv_point)

    @torch.jit.unused
    def _scaled(self, x: Tensor) -> Tensor:
        """What ``conv_dws`` gives; in training on a CPU PyTorch may run one convolution for every channel."""
        if trains_by_onednn(x) and pointwise(self.conv_dws, x.shape[1]) and has_bias(self.conv_dws):
            weight, bias = tensors(self.conv_dws)
            return torch.addcmul(bias.reshape(-1, 1, 1), x, weight.reshape(-1, 1, 1))
        return self.conv_dws(x)

    @torch.jit.unused
    def _folds(self, x: Tensor) -> bool:
        """Whether all four layers are one affine map, for inference on a CPU.

        A GPU takes longer to start the twenty small operators that fold them than to run the layers.
        """
        if torch.is_grad_enabled() or on_kernel_device(x) or not (folds(self.bn_dws) and folds(self.bn_point)):
            return False
        return pointwise(self.conv_dws, self.bn_dws.num_features) and has_bias(self.conv_dws)

    @torch.jit.unused
    def _fold(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Weight, bias, scale and shift of the logits with the norms' running statistics, in float32 at least."""

        def affine(conv: nn.Conv2d, norm: nn.BatchNorm2d) -> tuple[Tensor, Tensor]:
            weight, bias = tensors(conv)
            dtype = torch.promote_types(weight.dtype, torch.float32)
            scale, shift = fold(norm, dtype)
            return weight.to(dtype).flatten(1) * scale.unsqueeze(1), bias.to(dtype) * scale + shift

        scale, shift = affine(self.conv_dws, self.bn_dws)
        return *affine(self.conv_point, self.bn_point), scale.flatten(), shift

    def attention(self, x: Tensor) -> Tensor:
        """Maps ``[B, num_splits, H, W]`` of ``x`` ``[B, dim, H, W]``, each with sum 1."""
        return subspace_maps(self._logits(x), x.dtype)

    def forward(self, x: Tensor) -> Tensor:
        """Map ``[B, dim, H, W]`` to the same shape."""
        logits = self._logits(x)
        if not torch.jit.is_scripting():  # noqa: SIM102 - TorchScript compiles every operand of `and`
            if self.fused and not (as_written(x) or is_exporting()):
                return subspace_attention(x, logits)
        return reference_subspace_attention(x, logits)

    def official_state_dict(self) -> dict[str, Tensor]:
        """The state dict in the names and order of the official loop over subspaces."""
        state = {}
        for n in range(self.num_splits):
            for key, value in self.state_dict().items():
                state[f"subspaces.{n}.{key}"] = value.chunk(self.num_splits)[n] if value.dim() else value
        return state

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        """Stack the tensors of the official subspaces first."""
        official = [k for k in state_dict if k.startswith(f"{prefix}subspaces.")]
        found = {k[len(prefix) :].split(".")[1] for k in official}
        if official and found != {str(n) for n in range(self.num_splits)}:
            raise ValueError(f"got a state dict with {len(found)} subspaces, need num_splits={self.num_splits}")
        for key in self.state_dict() if official else ():
            names = [f"{prefix}subspaces.{n}.{key}" for n in range(self.num_splits)]
            if all(k in state_dict for k in names):
                parts = [state_dict.pop(k) for k in names]
                state_dict[prefix + key] = torch.cat(parts) if parts[0].dim() else parts[0]
        super()._load_from_state_dict(state_dict, prefix, *args)


def add_ulsam(model: nn.Module, positions: Mapping[str, Mapping[str, Any]], example: Tensor | None = None) -> nn.Module:
    """Put ULSAM after, or in place of, named submodules of a convolutional network.

    One pass in evaluation mode finds the channels.  Everything is checked before anything is changed.

    Args:
        model: Network; it is changed.
        positions: For the name of each submodule, which must map one ``[B, C, H, W]`` to another, the options ``mode``,
            ``"insert"`` (default) to follow it or ``"replace"`` where its input and output have one shape,
            ``num_splits`` and ``bn_momentum``.
        example: Input of that pass; None means zeros of the size in the model's ``pretrained_cfg``, else 224x224.

    Returns:
        ``model``.

    Raises:
        ValueError: If a name, an option or the shape at a position does not allow it.
    """
    modules = dict(model.named_modules())
    for name, options in positions.items():
        if not name or name not in modules:
            similar = difflib.get_close_matches(name, list(modules), n=3) or list(modules)[1:4]
            raise ValueError(f"got position {name!r}, need a submodule of the model, such as {', '.join(similar)}")
        unknown = options.keys() - {"mode", "num_splits", "bn_momentum"}
        if unknown:
            raise ValueError(f"got option {min(unknown)!r} at {name!r}, need mode, num_splits or bn_momentum")
        if options.get("mode", "insert") not in ("insert", "replace"):
            raise ValueError(f"got mode={options['mode']!r} at {name!r}, need 'insert' or 'replace'")
    shapes = _shapes(model, {name: modules[name] for name in positions}, example)
    layers: dict[str, nn.Module] = {}
    for name, options in positions.items():
        before, after = shapes[name]
        replace = options.get("mode") == "replace"
        if replace and before != after:
            raise ValueError(f"got mode='replace' at {name!r}, which maps {before} to {after}; need equal shapes")
        arguments = {k: v for k, v in options.items() if k != "mode"}
        try:
            layer = ULSAM(after[1], **arguments, **get_device_dtype(model)).train(model.training)
        except ValueError as e:
            raise ValueError(f"at {name!r}: {e}") from None
        layers[name] = layer if replace else nn.Sequential(modules[name], layer)
    for name, new in layers.items():
        parent, _, leaf = name.rpartition(".")
        setattr(modules[parent], leaf, new)
    return model


def _shapes(model: nn.Module, watched: dict[str, nn.Module], example: Tensor | None) -> dict[str, tuple[Any, Any]]:
    """Shapes of input and output of submodules in one pass that leaves the model as it was."""
    if example is None:
        size = getattr(model, "pretrained_cfg", {}).get("input_size") or (3, 224, 224)
        example = torch.zeros(1, *size, **get_device_dtype(model))
    calls: dict[str, list[tuple[Any, Any]]] = {name: [] for name in watched}

    def watch(name: str) -> Any:
        def hook(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            inputs = [list(t.shape) if isinstance(t, Tensor) else None for t in (*args, *kwargs.values())]
            calls[name].append((inputs, list(output.shape) if isinstance(output, Tensor) else None))

        return hook

    handles = [m.register_forward_hook(watch(name), with_kwargs=True) for name, m in watched.items()]
    try:
        with evaluating(model):
            model(example)
    finally:
        for handle in handles:
            handle.remove()
    for name, found in calls.items():
        if len(found) != 1:
            raise ValueError(f"got position {name!r}, which is called {len(found)} times; need one call")
        before, after = found[0]
        if len(before) != 1 or any(shape is None or len(shape) != 4 for shape in (*before, after)):
            raise ValueError(f"got position {name!r}, which maps {before} to {after}; need one [B, C, H, W] to another")
    return {name: (found[0][0][0], found[0][1]) for name, found in calls.items()}
