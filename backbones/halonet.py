"""HaloNet: residual networks whose 3x3 convolutions are blocked local self-attention.

Paper: "Scaling Local Self-Attention for Parameter Efficient Visual Backbones", A. Vaswani, P. Ramachandran, A.
Srinivas, N. Parmar, B. Hechtman, J. Shlens, CVPR 2021, https://arxiv.org/abs/2103.12731.

There is no official code and there are no official weights: ``halo_h0`` to ``halo_h7`` and ``halo_resnet50_det`` are a
reconstruction.  Of the block definitions tried, the one built here is the only one that meets the published parameter
counts of all eight models, to 0.1 M.  The attention is that of timm (github.com/huggingface/pytorch-image-models,
Apache-2.0), whose own models with halo attention are here too, with their weights: ``halo_26t`` is timm's
``halonet26t``, ``halo_se33ts`` its ``sehalonet33ts``, ``halo_50ts`` its ``halonet50ts``, ``halo_eca26ts`` its
``eca_halonext26ts``, ``halo_regnetz_b`` its ``haloregnetz_b``.  timm's ``halonet_h1`` is ``halo_h1`` with 8 heads in
all stages: its state dict loads into ``halo_h1(num_heads=8)``.

Our choices, which the paper leaves open: ReLU, zero keys outside the map, downsampling by every second query.

Deviations from timm: any image size is accepted, padded inside the attention.  Where a block is odd and the map too,
the averaged output is rounded up like the shortcut; timm would round down.
"""

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from timm.layers import DropPath, get_device_dtype
from timm.models import generate_default_cfgs, get_pretrained_cfg, named_apply, register_model
from timm.models._features import FeatureListNet
from timm.models.byoanet import model_cfgs
from timm.models.byobnet import ByoBlockCfg, ByobNet, ByoModelCfg, LayerFn, _init_weights, interleave_blocks
from torch import Tensor, nn

from .layers import HaloAttention, Panel
from .layers.about import NAMED_SIZES, About
from .layers.build import build
from .layers.checkpoint import unwrap
from .layers.checks import (
    ANY,
    SHARE,
    check_arguments,
    check_heads,
    check_lengths,
    check_positions,
    check_stages,
    checked,
    is_sequence,
    need,
)
from .layers.convnet import StemConv, run, speed_up
from .layers.panel import cell_at, seen_by

__all__ = ["HaloNet", "HaloResNet"]

ABOUT = About(
    "HaloNet",
    "no official code; attention and hybrids follow timm 1.0.31, github.com/huggingface/pytorch-image-models, "
    "Apache-2.0, whose weights the hybrids load.",
    (
        (
            'A. Vaswani, P. Ramachandran, A. Srinivas, N. Parmar, B. Hechtman, J. Shlens, "Scaling Local '
            'Self-Attention for Parameter Efficient Visual Backbones", CVPR 2021',
            "2103.12731",
        ),
    ),
    golden=("haloattn_*", "timm_halonet*"),
    checked="All eight parameter counts of the paper are met to 0.1 M.  ``halo_h1(num_heads=8)`` gives the outputs of "
    "timm's ``halonet_h1`` with its state dict, and every hybrid those of timm's model of the same definition.",
    limits=(
        NAMED_SIZES.format("the hybrids"),
        "``halo_h0`` to ``halo_h7`` and ``halo_resnet50_det`` have no weights.  The accuracies of ``halo_h0`` to "
        "``halo_h7`` are those of the paper's models, which nobody has released.",
    ),
    example="""
        # halo attention for images of any size in the models of timm that have it, with the same parameters
        from vizoo.backbones.layers import swap_halo

        halo = swap_halo(timm.create_model("haloregnetz_b")).eval()
        print(halo(torch.randn(1, 3, 120, 200)).shape)
    """,
)


class HaloBlock(nn.Module):
    """Bottleneck block with halo attention: 1x1 convolution, attention, 1x1 convolution, shortcut.

    The width of the attention's output is its own, not that of the first convolution.

    Args:
        in_chs: Input channels.
        out_chs: Output channels.
        layers: What timm's network builds its layers with; ``self_attn`` gets input channels and stride.
        stride: 1 or 2.
        bottle_ratio: Input channels of the attention over output channels.
        drop_path_rate: Stochastic depth rate.
        device: Device of the parameters.
        dtype: Dtype of the parameters.
        **_: What timm's network passes to every block and this one has no use for.
    """

    def __init__(
        self,
        in_chs: int,
        out_chs: int,
        layers: LayerFn,
        stride: int = 1,
        bottle_ratio: float = 1.0,
        drop_path_rate: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        **_: Any,
    ):
        super().__init__()
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        mid_chs = round(out_chs * bottle_ratio)
        conv: Any = layers.conv_norm_act
        self.shortcut = nn.Identity()
        if in_chs != out_chs or stride != 1:
            self.shortcut = conv(in_chs, out_chs, 1, stride=stride, apply_act=False, **dd)
        self.conv1_1x1 = conv(in_chs, mid_chs, 1, **dd)
        self.self_attn: Any = layers.self_attn(mid_chs, stride=stride, **dd)  # type: ignore[misc]
        self.post_attn = layers.norm_act(self.self_attn.dim_out, **dd)
        self.conv3_1x1 = conv(self.self_attn.dim_out, out_chs, 1, apply_act=False, **dd)
        self.drop_path = DropPath(drop_path_rate) if drop_path_rate > 0 else nn.Identity()
        self.act = layers.act(inplace=True)

    def init_weights(self, zero_init_last: bool = False) -> None:
        """Initialise the attention and, if asked to, make the block an identity."""
        if zero_init_last:
            nn.init.zeros_(self.conv3_1x1.bn.weight)
        self.self_attn.reset_parameters()

    def forward(self, x: Tensor) -> Tensor:
        """Map ``[B, in_chs, H, W]`` to ``[B, out_chs, ceil(H / stride), ceil(W / stride)]``."""
        shortcut = self.shortcut(x)
        if not torch.jit.is_scripting():
            layers = self.conv1_1x1, self.self_attn, self.post_attn, self.conv3_1x1, self.drop_path
            return run(x, *layers, add=shortcut, act=self.act)
        x = self.conv1_1x1(x)
        x = self.self_attn(x)
        x = self.post_attn(x)
        x = self.conv3_1x1(x)
        return self.act(self.drop_path(x) + shortcut)


class HaloResNet(ByobNet):
    """timm's configurable network, for any configuration whose attention is :class:`HaloAttention`.

    Args:
        cfg: timm's configuration.
        num_classes: Classes; 0 for no classifier.
        in_chans: Channels of the image.
        global_pool: ``avg``, ``max``, ``avgmax``, ``catavgmax``, or ``''`` for an unpooled map.
        drop_rate: Dropout before the classifier.
        drop_path_rate: Stochastic depth rate of the last block, rising linearly from 0.
        zero_init_last: Start the last norm of every block at zero.
        device: Device of the parameters.
        dtype: Dtype of the parameters.
        output_stride: 8, 16 or 32; below 32 the last stages are dilated.
        **kwargs: Other arguments of timm's network, or fields of ``cfg`` to replace.

    Raises:
        ValueError: If an argument is outside its range.
    """

    @checked()
    def __init__(
        self,
        cfg: ByoModelCfg,
        num_classes: int = 1000,
        in_chans: int = 3,
        global_pool: str = "avg",
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        zero_init_last: bool = True,
        output_stride: int = 32,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        **kwargs: Any,
    ):
        for declared in (ByobNet, ByoModelCfg):
            check_arguments(declared, kwargs)
        try:
            super().__init__(
                cfg,
                num_classes=num_classes,
                in_chans=in_chans,
                global_pool=global_pool,
                drop_rate=drop_rate,
                drop_path_rate=drop_path_rate,
                zero_init_last=zero_init_last,
                output_stride=output_stride,
                device=device,
                dtype=dtype,
                **kwargs,
            )
        except AssertionError as e:
            need(False, f"what timm's ByobNet takes{f': {e}' if str(e) else ''}", **kwargs)
        self.zero_init_last = zero_init_last
        speed_up(self)
        first: nn.Module = next(m for m in self.stem.modules() if isinstance(m, nn.Conv2d))
        first.__class__ = StemConv

    @torch.jit.ignore
    def init_weights(self, needs_reset: bool = True) -> None:
        """Initialise as timm: normal weights, and blocks that are identities unless ``zero_init_last`` is off.

        Args:
            needs_reset: First give every layer its own default, as after ``to_empty()``.
        """
        for module in self.modules():
            if needs_reset and module is not self and hasattr(module, "reset_parameters"):
                module.reset_parameters()  # type: ignore[operator]
        named_apply(partial(_init_weights, zero_init_last=self.zero_init_last), self)

    @torch.jit.ignore
    def no_weight_decay(self) -> set[str]:
        """Parameters that weight decay leaves out: the tables of relative positions."""
        return {name for name, _ in self.named_parameters() if ".pos_embed." in name}

    @checked()
    def reset_classifier(self, num_classes: int, global_pool: str | None = None, reset_other: bool = False) -> None:
        """Replace the classifier.

        Args:
            num_classes: Classes; 0 removes it.
            global_pool: Pooling as in the constructor; None keeps the current one.
            reset_other: Without effect: the head has no other layers.
        """
        self.head.reset(num_classes, global_pool, in_features=self.num_features, **get_device_dtype(self))
        self.num_classes = num_classes
        self.head_hidden_size = self.head.num_features
        if global_pool is not None:
            self.global_pool = global_pool

    @torch.jit.ignore
    @checked(point=SHARE, blocks=ANY)
    def explain(
        self, image: Tensor, point: tuple[float, float] = (0.5, 0.5), blocks: Sequence[int] | None = None
    ) -> list[Panel]:
        """The block of queries that holds a point, its window of keys, and the attention of the point's query to them.

        Args:
            image: ``[1, in_chans, H, W]``, normalised.
            point: Row and column as fractions of the image.
            blocks: Residual blocks with halo attention, counted from 0 over all stages; None for the last of each.

        Returns:
            For each of the blocks a panel, the mean of its heads.  Off the map the window has keys too, of zeros, but
            with ``pad_mode="mask"``.

        Raises:
            ValueError: If a setting is out of range, or there is no halo attention.
        """
        layers = [(name, m) for name, m in self.named_modules() if isinstance(m, HaloAttention)]
        if not layers:
            raise ValueError("got a model without halo attention, need one with it")
        if blocks is not None:
            check_positions(len(layers), blocks=blocks)
        last = {name.split(".")[1]: i for i, (name, _) in enumerate(layers)}
        chosen = [layers[i] for i in (last.values() if blocks is None else blocks)]
        panels = []
        for (name, layer), ((x,), _) in zip(chosen, seen_by(self, image, [layer for _, layer in chosen]), strict=True):
            stage, block = (int(part) + 1 for part in name.split(".")[1:3])
            after = next(info["reduction"] for info in self.feature_info if info["stage"] >= stage)
            sides = after / layer.stride / image.shape[2], after / layer.stride / image.shape[3]
            panels.append(_window_panel(f"Stage {stage - 1}, block {block - 1}", layer, x, sides, point))
        return panels


@torch.no_grad()
def _window_panel(
    name: str, layer: HaloAttention, x: Tensor, sides: tuple[float, float], point: tuple[float, float]
) -> Panel:
    """What a query of a map ``[1, dim, H, W]``, whose positions have these sides as fractions of the image, sees."""
    b, r, s = layer.block_size, layer.halo_size, layer.query_stride
    place = [i // s * s for i in cell_at(point, x.shape[2:], sides)]
    weights = layer.weights_at(x, place[0] // s, place[1] // s)[0].mean(0)
    top, left = (i // b * b for i in place)
    edges = torch.tensor([[top, left, top + b, left + b], [top - r, left - r, top + b + r, left + b + r]])
    boxes = edges * torch.tensor([*sides, *sides])
    w = b + 2 * r
    return Panel(
        title=f"{name}: window {w}x{w} of a block {b}x{b}",
        heat=weights,
        area=(*boxes[1].tolist(),),
        boxes=boxes,
        points=(torch.tensor([place]) + 0.5) * torch.tensor(sides),
        bar="attention",
    )


class HaloNet(HaloResNet):
    """HaloNet: four stages of bottleneck blocks with halo attention at strides 4, 8, 16 and 32.

    Stage ``i`` has base width ``m = embed_dim * 2^i``: ``m`` channels of queries and keys, ``rv * m`` of values and
    ``rb * m`` at the output of a block.  The first block of the last three stages halves the map.

    Args:
        in_chans: Channels of the image.
        num_classes: Classes; 0 for no classifier.
        global_pool: ``avg``, ``max``, ``avgmax``, ``catavgmax``, or ``''`` for an unpooled map.
        embed_dim: Channels of the stem and base width of the first stage, doubled in each next one.
        depths: Blocks of each stage.
        num_heads: Attention heads of each stage; one number for all of them.
        block_size: Side ``b`` of a block of queries.
        halo_size: Pixels ``h`` by which the window of a block exceeds it on every side.
        rv: Channels of the values over the base width.
        rb: Output channels of a block over the base width.
        final_dim: Channels of the convolution before the pooling; 0 for none.
        conv_stages: Stages with 3x3 convolutions in place of the attention, counted from 0.  With ``(0, 1)`` the
            paper reports nearly the accuracy of H7 in about half the training time.
        act_layer: Activation, by timm's name.
        pad_mode: ``"zero"``: off-map keys are zero vectors that take part in the softmax; ``"mask"``: they do not.
        rel_index: Distance of neighbouring queries in the tables of relative positions when a block halves the map:
            1 (``"array"``) or 2 (``"pixel"``).
        drop_rate: Dropout before the classifier.
        drop_path_rate: Stochastic depth rate of the last block, rising linearly from 0.
        zero_init_last: Start the last norm of every block at zero.
        device: Device of the parameters.
        dtype: Dtype of the parameters.

    Raises:
        ValueError: If an argument is outside its range, or the numbers do not fit each other.
    """

    @checked()
    def __init__(
        self,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "avg",
        embed_dim: int = 64,
        depths: Sequence[int] = (3, 3, 10, 3),
        num_heads: int | Sequence[int] = (4, 8, 8, 8),
        block_size: int = 8,
        halo_size: int = 3,
        rv: float = 1.0,
        rb: float = 1.0,
        final_dim: int = 0,
        conv_stages: Sequence[int] = (),
        act_layer: str = "relu",
        pad_mode: str = "zero",
        rel_index: str = "array",
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        zero_init_last: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        stages = len(depths)
        heads: Any = num_heads if is_sequence(num_heads) else (num_heads,) * stages
        widths = [embed_dim * 2**i for i in range(stages)]
        values = [round(rv * width) for width in widths]
        check_lengths(depths=depths, num_heads=heads)
        check_stages(stages, conv_stages=conv_stages)
        need(rb * embed_dim % 8 == 0, "a product that is a multiple of 8", embed_dim=embed_dim, rb=rb)
        check_heads(widths, heads, embed_dim=embed_dim, num_heads=num_heads)
        need(min(values) > 0, "a ratio that leaves at least one channel", embed_dim=embed_dim, rv=rv)
        check_heads(values, heads, embed_dim=embed_dim, rv=rv, num_heads=num_heads)
        blocks = []
        for i, (depth, width) in enumerate(zip(depths, widths, strict=True)):
            attention: Any = HaloAttention
            arguments = {
                "dim_out": values[i],
                "dim_head": width // heads[i],
                "num_heads": heads[i],
                "block_size": block_size,
                "halo_size": halo_size,
                "pad_mode": pad_mode,
                "rel_index": rel_index,
            }
            block: Any = "bottle" if i in conv_stages else partial(HaloBlock)
            blocks.append(
                ByoBlockCfg(
                    type=block,
                    d=depth,
                    c=round(rb * width),
                    s=2 if i else 1,
                    gs=0,
                    br=1 / rb,
                    self_attn_layer=attention,
                    self_attn_kwargs=arguments,
                )
            )
        cfg = ByoModelCfg(
            blocks=tuple(blocks),
            stem_type="7x7",
            stem_chs=embed_dim,
            num_features=final_dim,
            act_layer=act_layer,
        )
        super().__init__(
            cfg,
            num_classes=num_classes,
            in_chans=in_chans,
            global_pool=global_pool,
            drop_rate=drop_rate,
            drop_path_rate=drop_path_rate,
            zero_init_last=zero_init_last,
            device=device,
            dtype=dtype,
        )


def checkpoint_filter_fn(state_dict: dict[str, Any], model: nn.Module) -> dict[str, Tensor]:
    """State dict out of a checkpoint; names are timm's, so none changes.

    Args:
        state_dict: Checkpoint or state dict.
        model: The model to load.

    Returns:
        A state dict for ``model``.
    """
    return unwrap(state_dict, dense=True)


def _our_attention(cfg: ByoModelCfg) -> ByoModelCfg:
    """A configuration of timm with :class:`HaloAttention` for its ``halo`` layers."""

    def swapped(part: Any) -> Any:
        return replace(part, self_attn_layer=HaloAttention) if part.self_attn_layer == "halo" else part

    stages = (tuple(map(swapped, s)) if isinstance(s, Sequence) else swapped(s) for s in cfg.blocks)
    return swapped(replace(cfg, blocks=tuple(stages)))


def _cfg(side: int = 256, **kwargs: Any) -> dict[str, Any]:
    return {
        "num_classes": 1000,
        "input_size": (3, side, side),
        "pool_size": (-(-side // 32),) * 2,
        "crop_pct": 0.95,
        "interpolation": "bicubic",
        "mean": (0.485, 0.456, 0.406),
        "std": (0.229, 0.224, 0.225),
        "first_conv": "stem.conv1.conv",
        "classifier": "head.fc",
        "license": "apache-2.0",
        "paper_name": "Scaling Local Self-Attention for Parameter Efficient Visual Backbones",
        "paper_ids": "arXiv:2103.12731",
        **kwargs,
    }


def _timm_cfg(tag: str) -> dict[str, Any]:
    """Configuration of timm's weights, without the limit on the image size."""
    theirs: Any = get_pretrained_cfg(tag)
    kept = {k: v for k, v in theirs.to_dict().items() if k not in ("architecture", "tag", "min_input_size")}
    return _cfg(**{"origin_url": "https://github.com/huggingface/pytorch-image-models", **kept})


default_cfgs = generate_default_cfgs(
    {
        "halo_h0.untrained": _cfg(256),
        "halo_h1.untrained": _cfg(256),
        "halo_h2.untrained": _cfg(256),
        "halo_h3.untrained": _cfg(320),
        "halo_h4.untrained": _cfg(384),
        "halo_h5.untrained": _cfg(448),
        "halo_h6.untrained": _cfg(512),
        "halo_h7.untrained": _cfg(600),
        "halo_resnet50_det.untrained": _cfg(1024),
        "halo_26t.a1h_in1k": _timm_cfg("halonet26t.a1h_in1k"),
        "halo_se33ts.ra2_in1k": _timm_cfg("sehalonet33ts.ra2_in1k"),
        "halo_50ts.a1h_in1k": _timm_cfg("halonet50ts.a1h_in1k"),
        "halo_eca26ts.c1_in1k": _timm_cfg("eca_halonext26ts.c1_in1k"),
        "halo_regnetz_b.ra3_in1k": _timm_cfg("haloregnetz_b.ra3_in1k"),
        "test_halonet.untrained": _cfg(96),
        "test_halonet_hybrid.untrained": _cfg(96),
    }
)


def _create(model_cls: type[HaloResNet], variant: str, pretrained: bool, **kwargs: Any) -> HaloResNet:
    return build(
        model_cls,
        variant,
        pretrained,
        checkpoint_filter_fn,
        taps=(0, 1, 2, 3, 4),
        wrapper=FeatureListNet,
        flatten_sequential=True,
        dilates=model_cls is HaloResNet,
        **kwargs,
    )


def _create_halonet(variant: str, pretrained: bool = False, **kwargs: Any) -> HaloResNet:
    return _create(HaloNet, variant, pretrained, **kwargs)


def _create_hybrid(variant: str, cfg: ByoModelCfg, pretrained: bool = False, **kwargs: Any) -> HaloResNet:
    return _create(HaloResNet, variant, pretrained, model_cfg=_our_attention(cfg), **kwargs)


@register_model
def test_halonet(pretrained: bool = False, **kwargs: Any) -> HaloResNet:
    """Tiny HaloNet for tests: convolutions first, wide values, partial blocks, a final convolution, no identities."""
    model_args = {
        "embed_dim": 16,
        "depths": (1, 1, 2, 1),
        "num_heads": (2, 2, 4, 4),
        "block_size": 4,
        "halo_size": 1,
        "rv": 2.0,
        "rb": 2.5,
        "final_dim": 192,
        "conv_stages": (0,),
        "zero_init_last": False,
    }
    return _create_halonet("test_halonet", pretrained, **{**model_args, **kwargs})


@register_model
def test_halonet_hybrid(pretrained: bool = False, **kwargs: Any) -> HaloResNet:
    """Tiny hybrid for tests: odd blocks, squeeze-excitation, blocks of a ResNet and a RegNetZ, none an identity."""
    inverted = {"bottle_in": True, "linear_out": True}
    cfg = ByoModelCfg(
        blocks=(
            ByoBlockCfg(type="bottle", d=1, c=32, s=1, gs=0, br=0.5),
            ByoBlockCfg(type="bottle", d=1, c=64, s=2, gs=16, br=2, block_kwargs=inverted),
            interleave_blocks(types=("bottle", "self_attn"), d=2, c=128, s=2, gs=0, br=0.5),
            ByoBlockCfg(type="self_attn", d=1, c=144, s=2, gs=0, br=1, block_kwargs=inverted),
        ),
        stem_chs=16,
        stem_type="tiered",
        act_layer="silu",
        attn_layer="se",
        self_attn_layer="halo",
        self_attn_kwargs={"block_size": 5, "halo_size": 1, "num_heads": 4, "qk_ratio": 0.5},
    )
    return _create_hybrid("test_halonet_hybrid", cfg, pretrained, **{"zero_init_last": False, **kwargs})


@register_model
def halo_h0(pretrained: bool = False, **kwargs: Any) -> HaloResNet:
    """HaloNet-H0, 50 layers."""
    model_args = {"depths": (3, 3, 7, 3), "rb": 0.5}
    return _create_halonet("halo_h0", pretrained, **{**model_args, **kwargs})


@register_model
def halo_h1(pretrained: bool = False, **kwargs: Any) -> HaloResNet:
    """HaloNet-H1, 59 layers."""
    return _create_halonet("halo_h1", pretrained, **kwargs)


@register_model
def halo_h2(pretrained: bool = False, **kwargs: Any) -> HaloResNet:
    """HaloNet-H2, 62 layers."""
    model_args = {"depths": (3, 3, 11, 3), "rb": 1.25}
    return _create_halonet("halo_h2", pretrained, **{**model_args, **kwargs})


@register_model
def halo_h3(pretrained: bool = False, **kwargs: Any) -> HaloResNet:
    """HaloNet-H3, 65 layers."""
    model_args = {"depths": (3, 3, 12, 3), "block_size": 10, "rb": 1.5, "final_dim": 1024}
    return _create_halonet("halo_h3", pretrained, **{**model_args, **kwargs})


@register_model
def halo_h4(pretrained: bool = False, **kwargs: Any) -> HaloResNet:
    """HaloNet-H4, 65 layers."""
    model_args = {"depths": (3, 3, 12, 3), "block_size": 12, "halo_size": 2, "rb": 3.0, "final_dim": 1280}
    return _create_halonet("halo_h4", pretrained, **{**model_args, **kwargs})


@register_model
def halo_h5(pretrained: bool = False, **kwargs: Any) -> HaloResNet:
    """HaloNet-H5, 98 layers."""
    model_args = {"depths": (3, 3, 23, 3), "block_size": 14, "halo_size": 2, "rv": 2.5, "rb": 2.0, "final_dim": 1536}
    return _create_halonet("halo_h5", pretrained, **{**model_args, **kwargs})


@register_model
def halo_h6(pretrained: bool = False, **kwargs: Any) -> HaloResNet:
    """HaloNet-H6, 101 layers."""
    model_args = {"depths": (3, 3, 24, 3), "halo_size": 4, "rv": 3.0, "rb": 2.75, "final_dim": 1536}
    return _create_halonet("halo_h6", pretrained, **{**model_args, **kwargs})


@register_model
def halo_h7(pretrained: bool = False, **kwargs: Any) -> HaloResNet:
    """HaloNet-H7, 107 layers."""
    model_args = {"depths": (3, 3, 26, 3), "block_size": 10, "rv": 4.0, "rb": 3.5, "final_dim": 2048}
    return _create_halonet("halo_h7", pretrained, **{**model_args, **kwargs})


@register_model
def halo_resnet50_det(pretrained: bool = False, block_size: int = 8, **kwargs: Any) -> HaloResNet:
    """ResNet-50 with squeeze-excitation, and halo attention in the last stage, for detection at 1024x1024.

    ``block_size=32`` makes the attention of the last two blocks global at that size.  Only the tables depend on it.
    """
    convs = partial(ByoBlockCfg, type="bottle", gs=0, br=0.25)
    cfg = ByoModelCfg(
        blocks=(
            convs(d=3, c=256, s=1),
            convs(d=4, c=512, s=2),
            convs(d=6, c=1024, s=2),
            ByoBlockCfg(type="self_attn", d=3, c=2048, s=2, gs=0, br=0.25),
        ),
        stem_type="7x7",
        stem_chs=64,
        attn_layer="se",
        self_attn_layer="halo",
        self_attn_kwargs={"block_size": block_size, "halo_size": 3, "num_heads": 8},
    )
    return _create_hybrid("halo_resnet50_det", cfg, pretrained, **kwargs)


@register_model
def halo_26t(pretrained: bool = False, **kwargs: Any) -> HaloResNet:
    """ResNet-26 with halo attention in the last two stages: timm's ``halonet26t``."""
    return _create_hybrid("halo_26t", model_cfgs["halonet26t"], pretrained, **kwargs)


@register_model
def halo_se33ts(pretrained: bool = False, **kwargs: Any) -> HaloResNet:
    """ResNet-33 with squeeze-excitation, SiLU, halo attention in the last three stages: timm's ``sehalonet33ts``."""
    return _create_hybrid("halo_se33ts", model_cfgs["sehalonet33ts"], pretrained, **kwargs)


@register_model
def halo_50ts(pretrained: bool = False, **kwargs: Any) -> HaloResNet:
    """ResNet-50 with SiLU and halo attention in the last three stages: timm's ``halonet50ts``."""
    return _create_hybrid("halo_50ts", model_cfgs["halonet50ts"], pretrained, **kwargs)


@register_model
def halo_eca26ts(pretrained: bool = False, **kwargs: Any) -> HaloResNet:
    """ResNeXt-26 with ECA, SiLU, and halo attention in the last two stages: timm's ``eca_halonext26ts``."""
    return _create_hybrid("halo_eca26ts", model_cfgs["eca_halonext26ts"], pretrained, **kwargs)


@register_model
def halo_regnetz_b(pretrained: bool = False, **kwargs: Any) -> HaloResNet:
    """RegNetZ-B with halo attention in the last two stages: timm's ``haloregnetz_b``."""
    return _create_hybrid("halo_regnetz_b", model_cfgs["haloregnetz_b"], pretrained, **kwargs)
