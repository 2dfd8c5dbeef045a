"""ULSAM: MobileNet-V1 and -V2 with the ultra-lightweight subspace attention module.

Paper: "ULSAM: Ultra-Lightweight Subspace Attention Module for Compact Convolutional Neural Networks", R. Saini, N. K.
Jha, B. Das, S. Mittal, C. K. Mohan, WACV 2020, https://arxiv.org/abs/2006.15102.  Official code of the module, without
licence, network or weights: github.com/Nandan91/ULSAM.  The networks are timm's MobileNets.

Names say width, place and number of subspaces: ``mobilenetv2_100_ulsam_r14_17_g4`` is MobileNet-V2 of width 1.00 with
ULSAM of 4 subspaces in place (r) of layers 14 and 17, ``mobilenetv1_100_ulsam_i12_g8`` MobileNet-V1 with one of 8
subspaces inserted (i) after layer 12.  Layer 1 is the stem, every block is a layer.

``num_splits``, ``ulsam_replace`` and ``ulsam_insert`` give every other row of the paper:

                                            params    MACs    MACs params   FLOPs  top-1
    model                                      (M)     (M)  +norms  paper   paper  paper
    mobilenetv1_100                         4.2320  568.74  578.88    4.2     569  70.65
    mobilenetv1_100_ulsam_i11_g4            4.2345  568.94  579.28    4.2   569.2  70.77
    mobilenetv1_100_ulsam_i12_g8            4.2346  568.94  579.28    4.2   569.2  70.92
    mobilenetv1_100_ulsam_i13_g4            4.2371  568.84  579.08    4.2   569.1  70.86
    mobilenetv1_100_ulsam_r11_g4            3.9657  516.66  526.59    3.9     517  70.43
    mobilenetv1_075_ulsam_r11_g4            2.4350  295.97  303.42    2.4     296  67.81
    mobilenetv1_050_ulsam_r11_g4            1.2640  136.30  141.27    1.2     136  63.25
    mobilenetv2_100                         3.5049  300.77  314.19    3.4     300  71.25
    mobilenetv2_100_ulsam_i17_g4            3.5057  300.79  314.22    3.4  300.01  71.64
    mobilenetv2_100_ulsam_r14_g4            3.3871  278.12  291.09   3.28  277.34      -
    mobilenetv2_100_ulsam_r17_g4            3.1857  285.31  298.54   3.08  284.54      -
    mobilenetv2_100_ulsam_r10_14_g4         3.3332  267.83  280.50   3.23  267.06      -
    mobilenetv2_100_ulsam_r14_17_g4         3.0679  262.66  275.44   2.96  261.88  71.52
    mobilenetv2_100_ulsam_r16_17_g4         2.8665  269.85  282.90   2.77  269.07  70.74
    mobilenetv2_100_ulsam_r13_14_16_17_g4   2.6309  224.54  236.69   2.54  223.77  69.72

The two rows without ULSAM are timm's.  MACs are those of convolutions and linear layers for one 224x224 image; "+norms"
adds batch norms as fvcore does.  The paper rounds MobileNet-V2 to 300 M and 3.4 M, and its other FLOPs differ from that
by what ours differ from timm's.  It counts 2 parameters per channel of ULSAM; the code has 5, and 3 per subspace.
Top-1 is ImageNet-1k accuracy of the authors' trainings, whose weights were not published.

Deviations: the paper says which shapes were replaced, not which of several equal layers; the later ones are taken.
"""

from collections import OrderedDict
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from timm.models import checkpoint_seq, generate_default_cfgs, register_model
from timm.models._efficientnet_builder import decode_arch_def, efficientnet_init_weights, round_channels
from timm.models.efficientnet import EfficientNet
from torch import Tensor, nn

from .layers import ULSAM, Panel
from .layers.about import About
from .layers.build import build
from .layers.checkpoint import unwrap
from .layers.checks import ANY, checked, need
from .layers.convnet import run, speed_up
from .layers.panel import seen_by, tiled
from .ops.ulsam import subspace_maps

__all__ = ["MobileNetULSAM"]

ABOUT = About(
    "ULSAM",
    "github.com/Nandan91/ULSAM, commit 9a07d68, no licence, no weights: written from the paper.  The networks are "
    "timm's MobileNets (github.com/huggingface/pytorch-image-models, Apache-2.0).",
    (
        (
            'R. Saini, N. K. Jha, B. Das, S. Mittal, C. K. Mohan, "ULSAM: Ultra-Lightweight Subspace Attention '
            'Module for Compact Convolutional Neural Networks", WACV 2020',
            "2006.15102",
        ),
    ),
    checked="Parameters and multiply-accumulates of the paper's tables follow from the counts of every model here: the "
    "docstring of the file has both beside each other.",
    limits=("No weights were published; the accuracies are those of the authors' trainings.",),
    example="""
        # ULSAM follows or replaces blocks of any convolutional network, and is an attn_layer of timm's
        from vizoo.backbones.layers import ULSAM, add_ulsam

        net = timm.create_model("mobilenetv3_small_100")
        add_ulsam(net, {"blocks.4": {"num_splits": 4}, "blocks.3.1": {"mode": "replace"}})
        resnet = timm.create_model("resnet18", block_args={"attn_layer": ULSAM})
    """,
)

_V1 = ("dsa_r1_k3_s1_c64", "dsa_r2_k3_s2_c128", "dsa_r2_k3_s2_c256", "dsa_r6_k3_s2_c512", "dsa_r2_k3_s2_c1024")
_V2 = (
    "ds_r1_k3_s1_c16",
    "ir_r2_k3_s2_e6_c24",
    "ir_r3_k3_s2_e6_c32",
    "ir_r4_k3_s2_e6_c64",
    "ir_r3_k3_s1_e6_c96",
    "ir_r3_k3_s2_e6_c160",
    "ir_r1_k3_s1_e6_c320",
)


def _decode(stages: Sequence[str]) -> list[list[dict[str, Any]]]:
    """Arguments of the blocks of each stage."""
    try:
        found = decode_arch_def([[stage] for stage in stages])
        blocks = [block for stage in found for block in stage]
        ok = all(found) and all(b["block_type"] in ("ds", "dsa", "ir") and b["out_chs"] > 0 for b in blocks)
        ok = ok and all(b["stride"] in (1, 2) for b in blocks)
    except (AssertionError, IndexError, KeyError, ValueError):
        ok = False
    need(ok, "blocks in timm's notation, such as 'ir_r2_k3_s2_e6_c24'", stages=stages)
    return found


class MobileNetULSAM(EfficientNet):
    """timm's MobileNet with ULSAM after, or in place of, some of its layers.

    Layers are numbered as in the paper: 1 is the stem, then one number for each block.  An inserted ULSAM is called
    ``ulsam<i>`` beside block ``<i>`` of its stage, so all other names are those of timm's MobileNet.

    Args:
        stages: Blocks of each stage in timm's notation; the default is MobileNet-V2.
        width: Factor of all channels but those of the head.
        head_width: Channels of the convolution before the pooling, which MobileNet-V2 has; 0 for none.
        ulsam_replace: Layers replaced by ULSAM, whose input and output have equal shapes.
        ulsam_insert: Layers followed by ULSAM.
        num_splits: Subspaces ``g`` of every ULSAM.
        ulsam_bn_momentum: Momentum of the norms in ULSAM; see :class:`ULSAM`.
        in_chans: Channels of the image.
        num_classes: Classes; 0 for no classifier.
        global_pool: ``avg``, ``max``, ``avgmax``, ``catavgmax``, or ``''`` for an unpooled map.
        output_stride: 8, 16 or 32; below 32 the last stages are dilated.
        drop_rate: Dropout before the classifier.
        drop_path_rate: Stochastic depth rate of the last block, rising linearly from 0; MobileNet-V1 has no skip
            connections that it could act on.
        device: Device of the parameters.
        dtype: Dtype of the parameters.

    Raises:
        ValueError: If an argument is outside its range, a layer does not exist or cannot be replaced, or its channels
            do not split.
    """

    @checked()
    def __init__(
        self,
        stages: Sequence[str] = _V2,
        width: float = 1.0,
        head_width: int = 1280,
        ulsam_replace: Sequence[int] = (),
        ulsam_insert: Sequence[int] = (),
        num_splits: int = 4,
        ulsam_bn_momentum: float = 0.9,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "avg",
        output_stride: int = 32,
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        block_args = _decode(stages)
        blocks = sum(len(stage) for stage in block_args)
        super().__init__(
            block_args,
            num_classes=num_classes,
            num_features=head_width,
            in_chans=in_chans,
            output_stride=output_stride,
            act_layer=nn.ReLU6,
            round_chs_fn=partial(round_channels, multiplier=width),
            drop_rate=drop_rate,
            drop_path_rate=drop_path_rate * blocks / max(1, blocks - 1),  # timm's builder ends one step below the rate
            global_pool=global_pool,
            **dd,
        )
        speed_up(self)
        self._place(ulsam_replace, ulsam_insert, num_splits=num_splits, bn_momentum=ulsam_bn_momentum, **dd)

    def _place(self, replace: Sequence[int], insert: Sequence[int], **kwargs: Any) -> None:
        stage: Any
        layer, dim, dims, replaceable = 1, self.conv_stem.out_channels, {}, []
        for stage in self.blocks:
            for block in stage:
                layer += 1
                in_dim, dim = dim, block.feature_info("bottleneck")["num_chs"]
                dims[layer] = dim
                if in_dim == dim and block.conv_dw.stride == (1, 1):
                    replaceable.append(layer)
        known = f"layers with one shape in and out: {replaceable}"
        need(set(replace) <= set(replaceable), known, ulsam_replace=tuple(replace))
        need(set(insert) <= set(dims), f"layers from 2 to {layer}", ulsam_insert=tuple(insert))
        layer = 1
        for s, stage in enumerate(self.blocks):
            children: OrderedDict[str, nn.Module] = OrderedDict()
            for i, block in enumerate(stage):
                layer += 1
                children[str(i)] = ULSAM(dims[layer], **kwargs) if layer in replace else block
                if layer in insert:
                    children[f"ulsam{i}"] = ULSAM(dims[layer], **kwargs)
            self.blocks[s] = nn.Sequential(children)
        for module in self.modules():
            if isinstance(module, ULSAM):
                efficientnet_init_weights(module)

    @torch.jit.ignore
    def init_weights(self, needs_reset: bool = True) -> None:
        """Initialise as timm does MobileNet.

        Args:
            needs_reset: First give every layer PyTorch's default, as after ``to_empty()``.
        """
        for module in self.modules():
            if needs_reset and hasattr(module, "reset_parameters"):
                module.reset_parameters()  # type: ignore[operator]
        efficientnet_init_weights(self)

    @torch.jit.ignore
    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Regular expressions that order the parameters by depth, for layer-wise learning rates."""
        return {
            "stem": r"^conv_stem|bn1",
            "blocks": [
                (r"^blocks\.(\d+)" if coarse else r"^blocks\.(\d+)\.(?:ulsam)?(\d+)", None),
                (r"^conv_head|bn2", (99999,)),
            ],
        }

    def forward_features(self, x: Tensor) -> Tensor:
        """Images ``[B, in_chans, height, width]`` to the last map."""
        x = self.bn1(self.conv_stem(x)) if torch.jit.is_scripting() else run(x, self.conv_stem, self.bn1)
        if self.grad_checkpointing and not torch.jit.is_scripting():
            x = checkpoint_seq(self.blocks, x, flatten=True)
        else:
            x = self.blocks(x)
        return self.bn2(self.conv_head(x)) if torch.jit.is_scripting() else run(x, self.conv_head, self.bn2)

    @checked()
    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Replace the classifier.

        Args:
            num_classes: Classes; 0 removes it.
            global_pool: Pooling as in the constructor; None keeps the current one.
        """
        super().reset_classifier(num_classes, global_pool)

    @torch.jit.ignore
    @checked(layer=ANY)
    def explain(self, image: Tensor, layer: int | None = None, count: int = 6) -> list[Panel]:
        """The attention maps of the subspaces of a ULSAM (Eq. 2 and 3).

        Args:
            image: ``[1, in_chans, height, width]``, normalised.
            layer: Layer that is, or is followed by, the ULSAM, numbered as in the constructor; None for the first.
            count: Maps to show at most.

        Returns:
            A map for each subspace, whose sum over the positions is 1.

        Raises:
            ValueError: If there is no ULSAM at the layer.
        """
        known = self._ulsams()
        numbers = list(dict.fromkeys(number for number, _, _ in known))
        layer = next(iter(numbers), None) if layer is None else layer
        need(layer in numbers, f"a layer with ULSAM: {', '.join(map(str, numbers)) or 'there is none'}", layer=layer)
        chosen = [(stride, module) for number, stride, module in known if number == layer]
        # a norm that is watched is not folded into the operator (layers/plain.py): it is called, and gives the logits
        seen = seen_by(self, image, [module.bn_point for _, module in chosen])
        panels = []
        for (stride, module), (_, logits) in zip(chosen, seen, strict=True):
            for i, heat in enumerate(subspace_maps(logits[:1].float(), torch.float32)[0]):
                title = f"Attention of subspace {i + 1} of {module.num_splits}, layer {layer}"
                area, limits = tiled(image, heat, (stride, stride)), (0.0, float(heat.max()))
                panels.append(Panel(title=title, heat=heat, area=area, bar="attention", limits=limits))
        return panels[:count]

    def _ulsams(self) -> list[tuple[int, int, ULSAM]]:
        """Layer, stride in pixels and module of each ULSAM."""
        stage: Any
        found, layer, stride = [], 1, self.conv_stem.stride[0]
        for stage in self.blocks:
            for name, block in stage.named_children():
                layer += not name.startswith("ulsam")
                if isinstance(block, ULSAM):
                    found.append((layer, stride, block))
                else:
                    stride *= block.conv_dw.stride[0]
        return found


def checkpoint_filter_fn(state_dict: dict[str, Any], model: nn.Module) -> dict[str, Tensor]:
    """Our checkpoints, and those of timm's plain MobileNets, whose other weights then start beside a fresh ULSAM.

    Args:
        state_dict: Checkpoint or state dict; one with ULSAM is returned as it is.
        model: The model to load.

    Returns:
        A state dict for ``model``.
    """
    state_dict = unwrap(state_dict)
    prefixes = tuple(f"{name}." for name, module in model.named_modules() if isinstance(module, ULSAM))
    if any(k.startswith(prefixes) and ".conv_dws." in k for k in state_dict):
        return state_dict
    fresh = {k: v for k, v in model.state_dict().items() if k.startswith(prefixes)}
    return {**{k: v for k, v in state_dict.items() if not k.startswith(prefixes)}, **fresh}


def _cfg(**kwargs: Any) -> dict[str, Any]:
    return {
        "num_classes": 1000,
        "input_size": (3, 224, 224),
        "pool_size": (7, 7),
        "crop_pct": 0.875,
        "interpolation": "bicubic",
        "mean": (0.485, 0.456, 0.406),
        "std": (0.229, 0.224, 0.225),
        "first_conv": "conv_stem",
        "classifier": "classifier",
        "origin_url": "https://github.com/Nandan91/ULSAM",
        "paper_name": "ULSAM: Ultra-Lightweight Subspace Attention Module for Compact Convolutional Neural Networks",
        "paper_ids": "arXiv:2006.15102",
        **kwargs,
    }


_TINY = _cfg(input_size=(3, 96, 96), pool_size=(3, 3), crop_pct=1.0)
default_cfgs = generate_default_cfgs(
    {
        "test_ulsam.untrained": _TINY,
        "test_ulsam_v1.untrained": _TINY,
        "mobilenetv1_100_ulsam_i11_g4.untrained": _cfg(),
        "mobilenetv1_100_ulsam_i12_g8.untrained": _cfg(),
        "mobilenetv1_100_ulsam_i13_g4.untrained": _cfg(),
        "mobilenetv1_100_ulsam_r11_g4.untrained": _cfg(),
        "mobilenetv1_075_ulsam_r11_g4.untrained": _cfg(),
        "mobilenetv1_050_ulsam_r11_g4.untrained": _cfg(),
        "mobilenetv2_100_ulsam_i17_g4.untrained": _cfg(),
        "mobilenetv2_100_ulsam_r14_g4.untrained": _cfg(),
        "mobilenetv2_100_ulsam_r17_g4.untrained": _cfg(),
        "mobilenetv2_100_ulsam_r10_14_g4.untrained": _cfg(),
        "mobilenetv2_100_ulsam_r14_17_g4.untrained": _cfg(),
        "mobilenetv2_100_ulsam_r16_17_g4.untrained": _cfg(),
        "mobilenetv2_100_ulsam_r13_14_16_17_g4.untrained": _cfg(),
    }
)


def _create_ulsam(variant: str, pretrained: bool = False, **kwargs: Any) -> MobileNetULSAM:
    return build(
        MobileNetULSAM,
        variant,
        pretrained,
        checkpoint_filter_fn,
        taps=(0, 1, 2, 3, 4),
        dilates=True,
        **kwargs,
    )


def _create_v1(variant: str, pretrained: bool = False, **kwargs: Any) -> MobileNetULSAM:
    return _create_ulsam(variant, pretrained, **{"stages": _V1, "head_width": 0, **kwargs})


@register_model
def test_ulsam(pretrained: bool = False, **kwargs: Any) -> MobileNetULSAM:
    """Tiny MobileNet-V2 with ULSAM in place of a block and after one, for tests."""
    model_args = {
        "stages": (
            "ds_r1_k3_s1_c16",
            "ir_r1_k3_s2_e2_c24",
            "ir_r2_k3_s2_e2_c40",
            "ir_r3_k3_s2_e2_c64",
            "ir_r1_k3_s2_e2_c80",
        ),
        "width": 0.5,
        "head_width": 96,
        "ulsam_replace": (7,),
        "ulsam_insert": (5, 9),
    }
    return _create_ulsam("test_ulsam", pretrained, **{**model_args, **kwargs})


@register_model
def test_ulsam_v1(pretrained: bool = False, **kwargs: Any) -> MobileNetULSAM:
    """Tiny MobileNet-V1 with ULSAM in place of a block and after one, for tests."""
    model_args = {
        "stages": ("dsa_r1_k3_s1_c16", "dsa_r1_k3_s2_c24", "dsa_r2_k3_s2_c40", "dsa_r2_k3_s2_c64", "dsa_r1_k3_s2_c80"),
        "width": 0.5,
        "ulsam_replace": (5,),
        "ulsam_insert": (6,),
        "num_splits": 2,
    }
    return _create_v1("test_ulsam_v1", pretrained, **{**model_args, **kwargs})


@register_model
def mobilenetv1_100_ulsam_i11_g4(pretrained: bool = False, **kwargs: Any) -> MobileNetULSAM:
    """MobileNet-V1 with ULSAM after layer 11, g = 4."""
    return _create_v1("mobilenetv1_100_ulsam_i11_g4", pretrained, **{"ulsam_insert": (11,), **kwargs})


@register_model
def mobilenetv1_100_ulsam_i12_g8(pretrained: bool = False, **kwargs: Any) -> MobileNetULSAM:
    """MobileNet-V1 with ULSAM after layer 12, g = 8."""
    return _create_v1("mobilenetv1_100_ulsam_i12_g8", pretrained, **{"ulsam_insert": (12,), "num_splits": 8, **kwargs})


@register_model
def mobilenetv1_100_ulsam_i13_g4(pretrained: bool = False, **kwargs: Any) -> MobileNetULSAM:
    """MobileNet-V1 with ULSAM after layer 13, g = 4."""
    return _create_v1("mobilenetv1_100_ulsam_i13_g4", pretrained, **{"ulsam_insert": (13,), **kwargs})


@register_model
def mobilenetv1_100_ulsam_r11_g4(pretrained: bool = False, **kwargs: Any) -> MobileNetULSAM:
    """MobileNet-V1 with ULSAM in place of layer 11, g = 4."""
    return _create_v1("mobilenetv1_100_ulsam_r11_g4", pretrained, **{"ulsam_replace": (11,), **kwargs})


@register_model
def mobilenetv1_075_ulsam_r11_g4(pretrained: bool = False, **kwargs: Any) -> MobileNetULSAM:
    """MobileNet-V1 0.75 with ULSAM in place of layer 11, g = 4."""
    return _create_v1("mobilenetv1_075_ulsam_r11_g4", pretrained, **{"width": 0.75, "ulsam_replace": (11,), **kwargs})


@register_model
def mobilenetv1_050_ulsam_r11_g4(pretrained: bool = False, **kwargs: Any) -> MobileNetULSAM:
    """MobileNet-V1 0.5 with ULSAM in place of layer 11, g = 4."""
    return _create_v1("mobilenetv1_050_ulsam_r11_g4", pretrained, **{"width": 0.5, "ulsam_replace": (11,), **kwargs})


@register_model
def mobilenetv2_100_ulsam_i17_g4(pretrained: bool = False, **kwargs: Any) -> MobileNetULSAM:
    """MobileNet-V2 with ULSAM after layer 17, g = 4."""
    return _create_ulsam("mobilenetv2_100_ulsam_i17_g4", pretrained, **{"ulsam_insert": (17,), **kwargs})


@register_model
def mobilenetv2_100_ulsam_r14_g4(pretrained: bool = False, **kwargs: Any) -> MobileNetULSAM:
    """MobileNet-V2 with ULSAM in place of layer 14, g = 4."""
    return _create_ulsam("mobilenetv2_100_ulsam_r14_g4", pretrained, **{"ulsam_replace": (14,), **kwargs})


@register_model
def mobilenetv2_100_ulsam_r17_g4(pretrained: bool = False, **kwargs: Any) -> MobileNetULSAM:
    """MobileNet-V2 with ULSAM in place of layer 17, g = 4."""
    return _create_ulsam("mobilenetv2_100_ulsam_r17_g4", pretrained, **{"ulsam_replace": (17,), **kwargs})


@register_model
def mobilenetv2_100_ulsam_r10_14_g4(pretrained: bool = False, **kwargs: Any) -> MobileNetULSAM:
    """MobileNet-V2 with ULSAM in place of layers 10 and 14, g = 4."""
    return _create_ulsam("mobilenetv2_100_ulsam_r10_14_g4", pretrained, **{"ulsam_replace": (10, 14), **kwargs})


@register_model
def mobilenetv2_100_ulsam_r14_17_g4(pretrained: bool = False, **kwargs: Any) -> MobileNetULSAM:
    """MobileNet-V2 with ULSAM in place of layers 14 and 17, g = 4."""
    return _create_ulsam("mobilenetv2_100_ulsam_r14_17_g4", pretrained, **{"ulsam_replace": (14, 17), **kwargs})


@register_model
def mobilenetv2_100_ulsam_r16_17_g4(pretrained: bool = False, **kwargs: Any) -> MobileNetULSAM:
    """MobileNet-V2 with ULSAM in place of layers 16 and 17, g = 4."""
    return _create_ulsam("mobilenetv2_100_ulsam_r16_17_g4", pretrained, **{"ulsam_replace": (16, 17), **kwargs})


@register_model
def mobilenetv2_100_ulsam_r13_14_16_17_g4(pretrained: bool = False, **kwargs: Any) -> MobileNetULSAM:
    """MobileNet-V2 with ULSAM in place of layers 13, 14, 16 and 17, g = 4."""
    return _create_ulsam(
        "mobilenetv2_100_ulsam_r13_14_16_17_g4", pretrained, **{"ulsam_replace": (13, 14, 16, 17), **kwargs}
    )
