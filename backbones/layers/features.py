"""Feature extraction wrapper of the zoo."""

from timm.models._features import FeatureGetterNet

__all__ = ["FeatureGetter"]


class FeatureGetter(FeatureGetterNet):
    """timm's ``getter`` wrapper, always NCHW, that can also checkpoint gradients like timm's other wrappers."""

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute the backbone's blocks in the backward pass instead of storing their activations."""
        self.model.set_grad_checkpointing(enable)  # type: ignore[operator]
