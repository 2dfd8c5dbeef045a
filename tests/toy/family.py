"""Toy: a tiny residual network with an auxiliary classifier, the family that the tests add to the zoo.

Paper: "A Toy", A. Nobody, nowhere, https://arxiv.org/abs/0000.00000.  Official code: tests/toy/official.py.
"""

import re
from collections.abc import Callable
from typing import Any

import torch
from timm.models import generate_default_cfgs, register_model
from timm.models.resnet import BasicBlock, ResNet
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


class Toy(ResNet):
    """A ResNet of four blocks.

    Args:
        num_classes: Classes; 0 for no classifier.
        in_chans: Channels of the image.
        global_pool: Pooling.
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
        aux_head: bool = False,
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        arguments: dict[str, Any] = {"block": BasicBlock, "layers": (1, 1, 1, 1), "channels": (8, 16, 24, 32)}
        arguments |= {"stem_width": 8, "drop_rate": drop_rate, "drop_path_rate": drop_path_rate}
        super().__init__(num_classes=num_classes, in_chans=in_chans, global_pool=global_pool, **arguments, **dd)
        self.aux_head = nn.Linear(16, num_classes, **dd) if aux_head else None

    def forward(self, x: Tensor) -> Any:
        """Images ``[B, in_chans, height, width]`` to logits ``[B, num_classes]``, or to both in training."""
        if torch.jit.is_scripting() or not self.training or self.aux_head is None:
            return self.forward_head(self.forward_features(x))
        final, (level,) = self.forward_intermediates(x, [2])
        return {"main": self.forward_head(final), "aux": self.aux_head(level.mean((2, 3)))}

    @torch.jit.ignore
    def extra_loss(self, out: Any, criterion: Callable[[Tensor], Tensor]) -> Tensor | None:
        """What the auxiliary classifier adds to the loss."""
        return AUX_WEIGHT * criterion(out["aux"]) if isinstance(out, dict) else None

    @torch.jit.ignore
    def training_phase(self, epoch: int, epochs: int) -> float:
        """The last stage alone in the first epoch; all, at half the learning rate, afterwards."""
        for name, parameter in self.named_parameters():
            parameter.requires_grad_(epoch > 0 or name.startswith(("layer4", "fc", "aux_head")))
        return 1.0 if epoch == 0 else 0.5

    @torch.jit.ignore
    def explain(self, image: Tensor, stage: int = 4) -> list[Panel]:
        """The size of a stage's output.

        Args:
            image: ``[1, in_chans, H, W]``, normalised.
            stage: From 1 to 4.
        """
        ((_, out),) = seen_by(self, image, [self.get_submodule(f"layer{stage}")])
        heat, stride = out[0].float().norm(dim=0), self.feature_info[stage]["reduction"]
        return [Panel(title=f"size of stage {stage}", heat=heat, area=tiled(image, heat, (stride, stride)))]


def checkpoint_filter_fn(state_dict: dict[str, Any], model: nn.Module) -> dict[str, Tensor]:
    """Official checkpoints in our names, or our own, for ``model``."""
    names = (
        (r"^stem\.0\.", "conv1."),
        (r"^stem\.1\.", "bn1."),
        (r"^stages\.(\d)\.", lambda m: f"layer{int(m[1]) + 1}.0."),
        (r"\.([ab])\.0\.", lambda m: f".conv{'ab'.index(m[1]) + 1}."),
        (r"\.([ab])\.1\.", lambda m: f".bn{'ab'.index(m[1]) + 1}."),
        (r"\.skip\.", ".downsample."),
        (r"^classifier\.", "fc."),
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
        "first_conv": "conv1",
        "classifier": "fc",
        **kwargs,
    }


default_cfgs = generate_default_cfgs({"test_toy.untrained": _cfg()})


def _create_toy(variant: str, pretrained: bool = False, **kwargs: Any) -> Toy:
    return build(Toy, variant, pretrained, checkpoint_filter_fn, **kwargs)


@register_model
def test_toy(pretrained: bool = False, **kwargs: Any) -> Toy:
    """Tiny model for tests."""
    return _create_toy("test_toy", pretrained, **kwargs)
