"""Toy: a tiny residual network with an auxiliary classifier, the family that the tests add to the zoo.

Paper: "A Toy", A. Nobody, nowhere, https://arxiv.org/abs/0000.00000.  Official code: tests/toy/official.py.

Deviations: none.
"""

import re
from collections.abc import Callable
from typing import Any

import torch
from timm.layers import ClassifierHead, DropPath, calculate_drop_path_rates, get_device_dtype
from timm.models import checkpoint_seq, generate_default_cfgs, register_model
from timm.models._features import feature_take_indices
from torch import Tensor, nn

from .layers import Panel
from .layers.about import About
from .layers.build import build
from .layers.checkpoint import unwrap
from .layers.checks import checked
from .layers.panel import seen_by, tiled

__all__ = ["Toy"]

ABOUT = About("Toy", "tests/toy/official.py, Apache-2.0; no weights.", (('A. Nobody, "A Toy", nowhere', "0000.00000"),))
AUX_WEIGHT = 0.3  # of the auxiliary classifier in the loss


class Block(nn.Module):
    """Two convolutions and a shortcut.

    Args:
        dim: Channels of the input.
        out_dim: Channels of the output; more of them halve the sides of the map.
        drop_path: Stochastic depth rate.
        device: Device of the parameters.
        dtype: Dtype of the parameters.
    """

    def __init__(self, dim: int, out_dim: int, drop_path: float = 0.0, **dd: Any):
        super().__init__()
        stride = 1 if dim == out_dim else 2
        self.conv1 = nn.Conv2d(dim, out_dim, 3, stride, 1, bias=False, **dd)
        self.bn1 = nn.BatchNorm2d(out_dim, **dd)
        self.conv2 = nn.Conv2d(out_dim, out_dim, 3, 1, 1, bias=False, **dd)
        self.bn2 = nn.BatchNorm2d(out_dim, **dd)
        self.drop_path = DropPath(drop_path) if drop_path else nn.Identity()
        self.shortcut = nn.Sequential()
        if stride == 2:
            self.shortcut = nn.Sequential(
                nn.Conv2d(dim, out_dim, 1, 2, bias=False, **dd), nn.BatchNorm2d(out_dim, **dd)
            )

    def forward(self, x: Tensor) -> Tensor:
        """``[B, dim, H, W]`` to ``[B, out_dim, H / stride, W / stride]``."""
        out = self.bn2(self.conv2(self.bn1(self.conv1(x)).relu()))
        return (self.drop_path(out) + self.shortcut(x)).relu()


class Toy(nn.Module):
    """A stem and four blocks.

    Args:
        num_classes: Classes; 0 for no classifier.
        in_chans: Channels of the image.
        global_pool: Pooling.
        embed_dim: Channels of the stem and the first block.
        aux_head: Classify the second stage too; in training the output is ``{"main": logits, "aux": logits}`` then.
        drop_rate: Dropout before the classifier.
        drop_path_rate: Stochastic depth rate of the last block.
        device: Device of the parameters.
        dtype: Dtype of the parameters.
    """

    @checked()
    def __init__(
        self,
        num_classes: int = 10,
        in_chans: int = 3,
        global_pool: str = "avg",
        embed_dim: int = 8,
        aux_head: bool = False,
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        dims = [embed_dim * i for i in (1, 2, 3, 4)]
        self.num_classes, self.in_chans, self.num_features = num_classes, in_chans, dims[3]
        self.drop_rate, self.global_pool = drop_rate, global_pool
        self.grad_checkpointing = False
        self.stem = nn.Sequential(
            nn.Conv2d(in_chans, embed_dim, 7, 2, 3, bias=False, **dd),
            nn.BatchNorm2d(embed_dim, **dd),
            nn.ReLU(),
            nn.MaxPool2d(3, 2, 1),
        )
        rates = calculate_drop_path_rates(drop_path_rate, 4)
        pairs = zip([embed_dim, *dims], dims, rates, strict=False)
        self.stages = nn.Sequential(*(Block(dim, out_dim, rate, **dd) for dim, out_dim, rate in pairs))
        self.feature_info = [
            {"num_chs": dim, "reduction": 4 * 2**i, "module": f"stages.{i}"} for i, dim in enumerate(dims)
        ]
        self.head = ClassifierHead(dims[3], num_classes, pool_type=global_pool, drop_rate=drop_rate, **dd)
        self.head_hidden_size = self.head.num_features
        self.aux_head = nn.Linear(dims[1], num_classes, **dd) if aux_head else None
        self.init_weights(needs_reset=False)

    @torch.jit.ignore
    def init_weights(self, needs_reset: bool = True) -> None:
        """Kaiming initialisation; first PyTorch's default with ``needs_reset``."""
        for module in self.modules():
            if needs_reset and module is not self and hasattr(module, "reset_parameters"):
                module.reset_parameters()
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    @torch.jit.ignore
    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Regular expressions that order the parameters by depth."""
        return {"stem": r"^stem", "blocks": r"^stages\.(\d+)"}

    @torch.jit.ignore
    @checked()
    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute the blocks in the backward pass."""
        self.grad_checkpointing = enable

    @torch.jit.ignore
    def get_classifier(self) -> nn.Module:
        """The last linear layer."""
        return self.head.fc

    @checked()
    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Replace the classifiers."""
        dd: dict[str, Any] = get_device_dtype(self)
        self.num_classes, self.global_pool = num_classes, self.global_pool if global_pool is None else global_pool
        pool = {"pool_type": self.global_pool, "drop_rate": self.drop_rate}
        self.head = ClassifierHead(self.num_features, num_classes, **pool, **dd).train(self.training)
        self.head_hidden_size = self.head.num_features
        if self.aux_head is not None:
            self.aux_head = nn.Linear(self.aux_head.in_features, num_classes, **dd) if num_classes else None

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | list[int] | None = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
    ) -> list[Tensor] | tuple[Tensor, list[Tensor]]:
        """Outputs of the stages, as for timm's models."""
        assert output_fmt == "NCHW", "Output format must be NCHW."
        take_indices, max_index = feature_take_indices(len(self.stages), indices)
        features: list[Tensor] = []
        x = self.stem(x)
        for i, stage in enumerate(self.stages):
            if not stop_early or i <= max_index:
                x = stage(x)
                if i in take_indices:
                    features.append(x)
        if intermediates_only:
            return features
        return x, features

    def prune_intermediate_layers(
        self, indices: int | list[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """Remove what the features of ``indices`` do not need."""
        take_indices, max_index = feature_take_indices(len(self.stages), indices)
        self.num_features = self.feature_info[max_index]["num_chs"]
        if prune_head or max_index < len(self.stages) - 1:
            self.reset_classifier(0, "")
        self.stages = self.stages[: max_index + 1]
        return take_indices

    def forward_features(self, x: Tensor) -> Tensor:
        """Images ``[B, in_chans, height, width]`` to the last map."""
        x = self.stem(x)
        if self.grad_checkpointing and not torch.jit.is_scripting():
            return checkpoint_seq(self.stages, x)
        return self.stages(x)

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """The last map to logits, or to the pooled features with ``pre_logits``."""
        return self.head(x, pre_logits=True) if pre_logits else self.head(x)

    @torch.jit.ignore
    def _forward_aux(self, x: Tensor) -> Any:
        final, (level,) = self.forward_intermediates(x, [1])
        return {"main": self.forward_head(final), "aux": self.aux_head(level.mean((2, 3)))}  # type: ignore[misc]

    def forward(self, x: Tensor) -> Tensor:
        """Images ``[B, in_chans, height, width]`` to logits ``[B, num_classes]``, or to both with ``aux_head``."""
        if not torch.jit.is_scripting():  # noqa: SIM102 - TorchScript decides this condition before it compiles
            if self.training and self.aux_head is not None:
                return self._forward_aux(x)
        return self.forward_head(self.forward_features(x))

    @torch.jit.ignore
    def extra_loss(self, out: Any, criterion: Callable[[Tensor], Tensor]) -> Tensor | None:
        """What the auxiliary classifier adds to the loss."""
        return AUX_WEIGHT * criterion(out["aux"]) if isinstance(out, dict) else None

    @torch.jit.ignore
    def training_phase(self, epoch: int, epochs: int) -> float:
        """The last stage alone in the first epoch; all, at half the learning rate, afterwards."""
        for name, parameter in self.named_parameters():
            parameter.requires_grad_(epoch > 0 or name.startswith(("stages.3", "head", "aux_head")))
        return 1.0 if epoch == 0 else 0.5

    @torch.jit.ignore
    def explain(self, image: Tensor, stage: int = 4) -> list[Panel]:
        """The size of a stage's output.

        Args:
            image: ``[1, in_chans, H, W]``, normalised.
            stage: From 1 to 4.
        """
        ((_, out),) = seen_by(self, image, [self.stages[stage - 1]])
        heat, stride = out[0].float().norm(dim=0), self.feature_info[stage - 1]["reduction"]
        return [Panel(title=f"size of stage {stage}", heat=heat, area=tiled(image, heat, (stride, stride)))]


def checkpoint_filter_fn(state_dict: dict[str, Any], model: nn.Module) -> dict[str, Tensor]:
    """Official checkpoints in our names, or our own, for ``model``."""
    names = (
        (r"\.([ab])\.0\.", lambda m: f".conv{'ab'.index(m[1]) + 1}."),
        (r"\.([ab])\.1\.", lambda m: f".bn{'ab'.index(m[1]) + 1}."),
        (r"\.skip\.", ".shortcut."),
        (r"^classifier\.", "head.fc."),
        (r"^second\.", "aux_head."),
    )
    out = {}
    for key, value in unwrap(state_dict).items():
        for pattern, name in names:
            key = re.sub(pattern, name, key)  # type: ignore[arg-type]
        out[key] = value
    return {k: v for k, v in out.items() if not k.startswith("aux_head.") or k in model.state_dict()}


def _cfg(**kwargs: Any) -> dict[str, Any]:
    return {
        "num_classes": 10,
        "input_size": (3, 64, 64),
        "pool_size": (2, 2),
        "crop_pct": 1.0,
        "interpolation": "bicubic",
        "mean": (0.5, 0.5, 0.5),
        "std": (0.5, 0.5, 0.5),
        "first_conv": "stem.0",
        "classifier": "head.fc",
        **kwargs,
    }


default_cfgs = generate_default_cfgs({"test_toy.untrained": _cfg()})


def _create_toy(variant: str, pretrained: bool = False, **kwargs: Any) -> Toy:
    return build(Toy, variant, pretrained, checkpoint_filter_fn, **kwargs)


@register_model
def test_toy(pretrained: bool = False, **kwargs: Any) -> Toy:
    """Tiny model for tests."""
    return _create_toy("test_toy", pretrained, **kwargs)
