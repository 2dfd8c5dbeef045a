"""Probes: how much a frozen backbone knows, measured with a small classifier on its features.

k-NN with the weights of "Unsupervised Feature Learning via Non-Parametric Instance Discrimination", Z. Wu et al., CVPR
2018, https://arxiv.org/abs/1805.01978, as in DINO; logistic regression; and attentive pooling as in "Scalable
Pre-training of Large Autoregressive Image Models", A. El-Nouby et al., ICML 2024, https://arxiv.org/abs/2401.08541.
The first two are estimators of scikit-learn on the features of :func:`extract_features`, the third is a module to
train.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple

import numpy as np
import torch
from timm.layers import AttentionPoolLatent
from torch import Tensor, nn

from vizoo.backbones.layers.checks import COUNT, checked, need

__all__ = ["AttentiveProbe", "Features", "extract_features", "knn_probe", "linear_probe"]


class Features(NamedTuple):
    """Features ``[N, C]`` and labels ``[N]`` of N images."""

    x: np.ndarray
    y: np.ndarray


def extract_features(
    model: nn.Module, batches: Iterable[tuple[Tensor, Tensor]], device: torch.device | str | None = None
) -> Features:
    """What the classifier of a model would see, for every image.

    Args:
        model: Any classifier of timm; left in evaluation mode, without gradients.
        batches: Images ``[B, 3, H, W]``, prepared as the model wants them but not augmented, and labels ``[B]``.
        device: Where to compute; None for where the model is.

    Returns:
        Features before the classifier, in float32, and labels.

    Raises:
        ValueError: If there is no image.
    """
    place = next(model.parameters()).device if device is None else torch.device(device)
    model.to(place).eval()
    xs, ys = [], []
    with torch.inference_mode():
        for images, labels in batches:
            pooled = model.forward_head(model.forward_features(images.to(place)), pre_logits=True)  # type: ignore[operator]
            xs.append(pooled.flatten(1).float().cpu().numpy())
            ys.append(labels.cpu().numpy())
    if not xs:
        raise ValueError("got batches without an image, need at least one")
    return Features(np.concatenate(xs), np.concatenate(ys))


@checked()
def linear_probe(C: float = 1.0, max_iter: int = 1000) -> Any:
    """Logistic regression on standardised features.

    Args:
        C: Inverse strength of the regularisation, above 0.
        max_iter: Steps of L-BFGS.

    Returns:
        A pipeline of scikit-learn: ``probe.fit(*train).score(*held_out)``.

    Raises:
        ValueError: If an argument is out of range.
    """
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    return make_pipeline(StandardScaler(), LogisticRegression(C=C, max_iter=max_iter))


@checked()
def knn_probe(k: int = 20, temperature: float = 0.07) -> Any:
    """Vote of the nearest training images by cosine, each with the weight ``exp(cosine / temperature)``.

    Args:
        k: Voters, at most the training images.
        temperature: Above 0.

    Returns:
        ``sklearn.neighbors.KNeighborsClassifier``: ``probe.fit(*train).score(*held_out)``.

    Raises:
        ValueError: If an argument is out of range.
    """
    from sklearn.neighbors import KNeighborsClassifier

    def weights(distances: np.ndarray) -> np.ndarray:
        """Of ``1 - cosine``; the factor that all voters share is left out."""
        found: np.ndarray = np.exp((distances.min(1, keepdims=True) - distances) / temperature)
        return found

    return KNeighborsClassifier(k, weights=weights, metric="cosine")


class AttentiveProbe(nn.Module):
    """A learned query that attends to the features of a frozen backbone, and a linear classifier.

    Args:
        model: Any classifier of timm with ``forward_features``; frozen, and always in evaluation mode.
        num_classes: Classes.
        num_heads: Heads of the attention, a divisor of the model's ``num_features``.
        mlp_ratio: Hidden units of the pooling's feed-forward network, over its channels.

    Raises:
        ValueError: If an argument is out of range, or ``num_heads`` does not divide the channels.
    """

    @checked(num_classes=COUNT)
    def __init__(self, model: nn.Module, num_classes: int, num_heads: int = 8, mlp_ratio: float = 4.0) -> None:
        super().__init__()
        dim: int = model.num_features  # type: ignore[assignment]
        need(dim % num_heads == 0, f"a divisor of the {dim} channels", num_heads=num_heads)
        self.model = model.requires_grad_(False)
        self.norm = nn.LayerNorm(dim)
        self.pool = AttentionPoolLatent(dim, num_heads=num_heads, mlp_ratio=mlp_ratio, norm_layer=nn.LayerNorm)
        self.head = nn.Linear(dim, num_classes)
        self.train(self.training)

    def train(self, mode: bool = True) -> AttentiveProbe:
        """Training mode of everything but the backbone."""
        super().train(mode)
        self.model.eval()
        return self

    def tokens(self, x: Tensor) -> Tensor:
        """Images to features of the frozen backbone ``[B, N, C]``."""
        with torch.no_grad():
            features: Tensor = self.model.forward_features(x)  # type: ignore[operator]
        if features.dim() == 3:
            return features
        last = str(getattr(self.model, "output_fmt", "NCHW")).endswith("NHWC")
        return features.flatten(1, 2) if last else features.flatten(2).transpose(1, 2)

    def forward(self, x: Tensor) -> Tensor:
        """Images ``[B, 3, H, W]`` to logits ``[B, num_classes]``."""
        out: Tensor = self.head(self.pool(self.norm(self.tokens(x))))
        return out
