"""Layer-wise learning rates for any timm backbone in mmdet and mmseg."""

from __future__ import annotations

from typing import Any

from mmengine.optim import DefaultOptimWrapperConstructor
from mmengine.registry import OPTIM_WRAPPER_CONSTRUCTORS
from torch import nn

from .backbone import VizooBackbone

__all__ = ["TimmLayerDecay"]


@OPTIM_WRAPPER_CONSTRUCTORS.register_module(force=True)
class TimmLayerDecay(DefaultOptimWrapperConstructor):
    """Learning rates that fall with the depth of the layer (BEiT, ICLR 2022, Sec. 3.2), in any :class:`VizooBackbone`.

    Layer ``l`` of ``L``, counted from the stem as by timm's ``group_matcher``, gets ``layer_decay_rate ** (L + 1 - l)``
    times the base rate; necks and heads get the base rate.  One-dimensional parameters and those of the model's
    ``no_weight_decay()`` get no weight decay.

    Args:
        optim_wrapper_cfg: As in mmengine.
        paramwise_cfg: ``layer_decay_rate``, above 0 to 1, and mmengine's own keys; ``custom_keys`` multiply the rate
            of the layer.

    Raises:
        ValueError: If ``layer_decay_rate`` is missing or out of range.
    """

    def __init__(self, optim_wrapper_cfg: dict[str, Any], paramwise_cfg: dict[str, Any] | None = None) -> None:
        rest = dict(paramwise_cfg or {})
        rate = rest.pop("layer_decay_rate", None)
        if not isinstance(rate, (int, float)) or not 0 < rate <= 1:
            raise ValueError(f"got paramwise_cfg.layer_decay_rate={rate!r}, need a number above 0 and up to 1")
        super().__init__(optim_wrapper_cfg, {"bypass_duplicate": False, **rest})
        self.layer_decay_rate = float(rate)

    def add_params(
        self, params: list[dict[str, Any]], module: nn.Module, prefix: str = "", is_dcn_module: Any = None
    ) -> None:
        """Add the parameters of ``module``; at the root, scale their rates and join groups with equal settings."""
        super().add_params(params, module, prefix=prefix, is_dcn_module=is_dcn_module)
        if prefix:
            return
        scales, undecayed = self._backbone_settings(module)
        groups: dict[Any, dict[str, Any]] = {}
        for group in params:
            (parameter,) = group.pop("params")
            if parameter.ndim <= 1 or id(parameter) in undecayed:
                group.setdefault("weight_decay", 0.0)
            scale = scales.get(id(parameter), 1.0)
            group["lr"] = scale * group.get("lr", self.optimizer_cfg["lr"])
            group["lr_scale"] = scale  # for information: mmengine's schedulers start from each group's lr
            settings = repr(sorted(group.items()))
            groups.setdefault(settings, {"params": [], **group})["params"].append(parameter)
        params[:] = groups.values()

    def _backbone_settings(self, model: nn.Module) -> tuple[dict[int, float], set[int]]:
        """Scale of every backbone parameter's rate, and the parameters without decay, by identity."""
        backbones = [m for m in model.modules() if isinstance(m, VizooBackbone)]
        if not backbones:
            raise ValueError("TimmLayerDecay needs a backbone of type VizooBackbone in the model")
        scales: dict[int, float] = {}
        undecayed: set[int] = set()
        for backbone in backbones:
            parameters = dict(backbone.body.named_parameters())
            layers = backbone.layers()
            top = max(layers.values()) + 1
            scales.update({id(parameters[n]): self.layer_decay_rate ** (top - layer) for n, layer in layers.items()})
            undecayed.update(id(parameters[n]) for n in backbone.no_weight_decay())
        return scales, undecayed
