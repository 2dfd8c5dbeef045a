"""Feature extraction wrapper of the zoo."""

import torch
from timm.models._features import FeatureGetterNet
from torch import Tensor

__all__ = ["FeatureGetter"]


class FeatureGetter(FeatureGetterNet):
    """timm's ``getter`` wrapper, always NCHW, that can also checkpoint gradients like timm's other wrappers."""

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute the backbone's blocks in the backward pass instead of storing their activations."""
        self.model.set_grad_checkpointing(enable)  # type: ignore[operator]

    def forward(self, x: Tensor) -> list[Tensor]:
        """Images ``[B, in_chans, height, width]`` to one map ``[B, channels, H, W]`` for each level."""
        features = self.model.forward_intermediates(  # type: ignore[operator]
            x,
            indices=self.out_indices,
            norm=self.norm,
            output_fmt=self.output_fmt,
            intermediates_only=True,
        )
        if torch.jit.is_scripting():
            assert isinstance(features, list)  # TorchScript sees the tuple that the method might have returned too
        return features
