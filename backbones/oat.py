"""OAT: a transformer over the objects of a scene that predicts which of them a person looks at, and in which order.

Paper: "OAT: Object-Level Attention Transformer for Gaze Scanpath Prediction", Y. Fang, J. Yu, H. Zhang,
R. van der Lans, B. Shi, ECCV 2024, https://arxiv.org/abs/2407.13335.
Official code: https://github.com/HKUST-NISL/oat_eccv24, commit 0c48c3e, without a licence: nothing of it is here, and
its outputs are reproduced.  No trained weights exist.

Index space of a scene with N objects: 0..N-1 objects, N end (its score is that of the target token), N+1 padding (a
class with the constant score 0), N+2 start (decoder input only).

Our choices: crops by RoIAlign from the image, boxes anywhere, object masks, features of a backbone in place of the crop
network, decoding from kept keys, and the place code in closed form in place of a fitted table.  A blank object (start,
end, padding) is an all-ones crop, with a backbone an all-ones feature.
"""

import itertools
from collections.abc import Sequence
from typing import Any, NamedTuple

import timm
import torch
import torch.nn.functional as F
from timm.models import generate_default_cfgs, register_model
from timm.models._features import FeatureListNet
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from torchvision.ops import roi_align

from .layers import Panel, to_fast_layout
from .layers.about import About
from .layers.build import build
from .layers.checkpoint import unwrap
from .layers.checks import NATURAL, SHARE, check_model_name, check_multiple, checked, need
from .layers.convnet import run, speed_up
from .layers.panel import evaluating
from .layers.place_code import PLACE_CODES, PlaceCode, step_code
from .layers.plain import fuses, is_plain, is_watched, tensors
from .ops.attention import attention
from .ops.backend import is_transforming, plain_only
from .ops.object_maps import crop_maps, object_maps

__all__ = ["OAT", "convert_oat"]

ABOUT = About(
    "OAT",
    "github.com/HKUST-NISL/oat_eccv24, commit 0c48c3e, no licence given: nothing of it is included; the model is "
    "written from a description and reproduces recorded outputs.  No weights exist.",
    (
        (
            'Y. Fang, J. Yu, H. Zhang, R. van der Lans, B. Shi, "OAT: Object-Level Attention Transformer for Gaze '
            'Scanpath Prediction", ECCV 2024',
            "2407.13335",
        ),
    ),
    limits=(
        "There are no weights: train first.  The paper's tables were not repeated.",
        "An OAT has no classes of its own (``num_classes`` is 0), no ``features_only`` and no TorchScript: it predicts "
        "the objects of a scene.",
    ),
    example="""
        # a scanpath over 3 rows of 5 objects in search of object 7; boxes= places objects anywhere
        oat = timm.create_model("oat_small", grid=(3, 5), crop_size=(32, 24)).eval()
        scene, target = torch.rand(1, 3, 300, 500), torch.tensor([7])
        print(oat(scene, target=target, prefix=torch.tensor([[0, 1]])).shape)  # [1, 3, 17]: 15 objects, end, padding
        generator = torch.Generator().manual_seed(0)
        print(oat.generate(scene, target=target, mode="sample", num_samples=2, generator=generator))
    """,
)

Kept = tuple[Tensor, Tensor]  # keys and values [B, heads, L, d]
_POOL = 5  # side of the pooling between the convolutions
SMALLEST_CROP = 19  # side that leaves one value after both convolutions and the pooling between them
SMALLEST_POOLED = 29  # and after the last pooling of a model without spp


class CropNet(nn.Module):
    """Two convolutions over the crop of an object (official ``cnn_embedding``).

    Args:
        dim: Outputs.
        in_chans: Channels of a crop.
        crop_size: Height and width that every crop has when ``spp`` is 0.
        spp: Levels of spatial pyramid pooling, which takes crops of any size; 0 for one max pooling.
        device: Device of the parameters.
        dtype: Dtype of the parameters.
    """

    def __init__(
        self,
        dim: int,
        in_chans: int,
        crop_size: tuple[int, int],
        spp: int,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        self.crop_size, self.spp = crop_size, spp
        self.conv1 = nn.Conv2d(in_chans, 16, 5, **dd)
        self.conv2 = nn.Conv2d(16, 32, 3, **dd)
        sides = [((side - 4) // 5 - 2) // 3 for side in crop_size]
        self.fc = nn.Linear(32 * sum(4**level for level in range(spp)) if spp else 32 * sides[0] * sides[1], dim, **dd)

    def forward(self, x: Tensor) -> Tensor:
        """Crops ``[B, in_chans, h, w]`` to ``[B, dim]``."""
        size = tuple(x.shape[2:])
        if self.spp == 0 and size != self.crop_size:
            raise ValueError(f"got crops of {size[0]}x{size[1]}, need crop_size={self.crop_size}, or a model with spp")
        if min(size) < SMALLEST_CROP:
            raise ValueError(f"got crops of {size[0]}x{size[1]}, need at least {SMALLEST_CROP}x{SMALLEST_CROP}")
        if self.fits(x):
            return self._embed(crop_maps(x, *tensors(self.conv1, self.conv2), _POOL))
        x = F.relu(F.max_pool2d(self.conv1(to_fast_layout(x)), _POOL))  # as after a ReLU, with 25 times fewer values
        return self._embed(F.relu(self.conv2(x)))

    def fits(self, x: Tensor) -> bool:
        """Whether operators of ours may do the work of both convolutions, for crops or images."""
        convs = self.conv1, self.conv2
        return fuses(x, *convs, types=(nn.Conv2d,)) and all(
            (c.stride, c.padding, c.dilation, c.groups) == ((1, 1), (0, 0), (1, 1), 1) for c in convs
        )

    def look(self, image: Tensor, boxes: Tensor) -> Tensor:
        """Objects of images ``[B, in_chans, H, W]`` that fit, by boxes ``[B, N, 4]``, to ``[B, N, dim]``."""
        maps = object_maps(image, boxes, self.crop_size, *tensors(self.conv1, self.conv2), _POOL)
        return self._embed(maps).unflatten(0, boxes.shape[:2])

    def _embed(self, x: Tensor) -> Tensor:
        levels = [pyramid_level(x, 2**i) for i in range(self.spp)] or [F.max_pool2d(x, 3).flatten(1)]
        return self.fc(torch.cat(levels, 1))


def pyramid_level(x: Tensor, cells: int) -> Tensor:
    """Max pooling of ``[B, C, H, W]`` to a grid of ``cells`` x ``cells``, zeros around it, to ``[B, C * cells^2]``."""
    height, width = (-(-side // cells) for side in x.shape[2:])
    down, right = height * cells - x.shape[2], width * cells - x.shape[3]
    x = F.pad(x, (right // 2, right - right // 2, down // 2, down - down // 2))
    return F.max_pool2d(x, (height, width)).flatten(1)


class Attention(nn.Module):
    """Multi-head self-attention with the weights of ``nn.MultiheadAttention``; keys and values may be kept.

    Args:
        dim: Width.
        num_heads: Heads.
        drop: Dropout of the attention weights.
        device: Device of the parameters.
        dtype: Dtype of the parameters.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        drop: float,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        self.num_heads, self.drop = num_heads, drop
        self.qkv = nn.Linear(dim, 3 * dim, **dd)
        self.proj = nn.Linear(dim, dim, **dd)

    def forward(self, x: Tensor, mask: Tensor | None, before: Kept | None = None) -> tuple[Tensor, Kept]:
        """Attend from tokens to themselves and to those before them.

        Args:
            x: Tokens ``[B, T, dim]``.
            mask: ``[B or 1, 1, T or 1, L]``, True for one of the L tokens that is seen; None for all.
            before: Keys and values ``[B, heads, L - T, d]`` of earlier tokens.

        Returns:
            ``[B, T, dim]``, and keys and values ``[B, heads, L, d]``.
        """
        q, k, v = split_heads(self.qkv(x), 3, self.num_heads)
        if before is not None:
            k, v = torch.cat((before[0], k), 2), torch.cat((before[1], v), 2)
        out = attention(q, k, v, mask, self.drop if self.training else 0.0)
        return self.proj(out.transpose(1, 2).flatten(2)), (k, v)


class CrossAttention(nn.Module):
    """Multi-head attention to other tokens; keys and values may be kept.

    ``nn.MultiheadAttention`` has one matrix for queries, keys and values.  Here queries are a layer of their own, since
    their input is another; both are drawn, and loaded from a state dict with ``qkv``, as rows of one matrix.

    Args:
        dim: Width.
        num_heads: Heads.
        drop: Dropout of the attention weights.
        device: Device of the parameters.
        dtype: Dtype of the parameters.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        drop: float,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        self.num_heads, self.drop = num_heads, drop
        joint = nn.Linear(dim, 3 * dim, **dd)
        self.q, self.kv = _rows(joint, 0, dim), _rows(joint, dim, 3 * dim)
        self.proj = nn.Linear(dim, dim, **dd)

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """PyTorch's default of one layer for queries, keys and values."""
        weight = self.kv.weight
        joint = nn.Linear(weight.shape[1], 3 * weight.shape[1], device=weight.device, dtype=weight.dtype)
        for kind in ("weight", "bias"):
            self._copy(kind, joint.get_parameter(kind))

    @torch.no_grad()
    def init_weights(self) -> None:
        """Xavier of one matrix for queries, keys and values."""
        joint = torch.cat((self.q.weight, self.kv.weight))
        self._copy("weight", nn.init.xavier_uniform_(joint))

    def _copy(self, kind: str, joint: Tensor) -> None:
        layers = (self.q.get_parameter(kind), self.kv.get_parameter(kind))
        for p, rows in zip(layers, joint.split([len(p) for p in layers]), strict=True):
            p.copy_(rows)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        for kind in ("weight", "bias"):  # names of the official code, and ours before queries had a layer
            joint = state_dict.pop(f"{prefix}qkv.{kind}", None)
            if joint is not None:
                rows = len(joint) // 3
                state_dict[f"{prefix}q.{kind}"] = joint[:rows].clone()  # assign=True would share its memory
                state_dict[f"{prefix}kv.{kind}"] = joint[rows:].clone()
        super()._load_from_state_dict(state_dict, prefix, *args)

    def forward(self, x: Tensor, memory: Tensor, mask: Tensor | None, kept: Kept | None = None) -> tuple[Tensor, Kept]:
        """Attend from tokens to others.

        Args:
            x: Tokens ``[B, T, dim]``.
            memory: The others ``[B, S, dim]``.
            mask: ``[B or 1, 1, T or 1, S]``, True for one that is seen; None for all.
            kept: Keys and values that an earlier call returned for the same ``memory``.

        Returns:
            ``[B, T, dim]``, and keys and values ``[B, heads, S, d]`` of ``memory``.
        """
        (q,) = split_heads(self.q(x), 1, self.num_heads)
        if kept is None:
            k, v = split_heads(self.kv(memory), 2, self.num_heads)
            kept = (k, v)
        out = attention(q, *kept, mask, self.drop if self.training else 0.0)
        return self.proj(out.transpose(1, 2).flatten(2)), kept


def _rows(layer: nn.Linear, start: int, stop: int) -> nn.Linear:
    """A linear layer for some outputs of another."""
    out = nn.Linear(layer.in_features, stop - start, device="meta")
    out.weight, out.bias = (nn.Parameter(t.detach()[start:stop].clone()) for t in tensors(layer))
    return out


def split_heads(x: Tensor, parts: int, heads: int) -> tuple[Tensor, ...]:
    """``[B, L, parts * heads * d]`` to tensors ``[B, heads, L, d]``."""
    return x.unflatten(-1, (parts, heads, x.shape[-1] // (parts * heads))).permute(2, 0, 3, 1, 4).unbind(0)


class Mlp(nn.Module):
    """Two linear layers with a ReLU."""

    def __init__(
        self,
        dim: int,
        hidden: int,
        drop: float,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden, device=device, dtype=dtype)
        self.fc2 = nn.Linear(hidden, dim, device=device, dtype=dtype)
        self.drop = nn.Dropout(drop)

    def forward(self, x: Tensor) -> Tensor:
        """Map ``[..., dim]`` to ``[..., dim]``."""
        return self.fc2(self.drop(F.relu(self.fc1(x))))


class EncoderLayer(nn.Module):
    """A post-norm transformer layer over the objects."""

    def __init__(
        self,
        dim: int,
        num_heads: int,
        mlp_dim: int,
        drop: float,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        self.attn = Attention(dim, num_heads, drop, **dd)
        self.norm1 = nn.LayerNorm(dim, **dd)
        self.mlp = Mlp(dim, mlp_dim, drop, **dd)
        self.norm2 = nn.LayerNorm(dim, **dd)
        self.drop = nn.Dropout(drop)

    def forward(self, x: Tensor, mask: Tensor | None) -> Tensor:
        """Map ``[B, S, dim]`` to ``[B, S, dim]``."""
        x = self.norm1(x + self.drop(self.attn(x, mask)[0]))
        return self.norm2(x + self.drop(self.mlp(x)))


class DecoderLayer(nn.Module):
    """A post-norm transformer layer over the fixations so far, which looks at the objects."""

    def __init__(
        self,
        dim: int,
        num_heads: int,
        mlp_dim: int,
        drop: float,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        self.attn = Attention(dim, num_heads, drop, **dd)
        self.norm1 = nn.LayerNorm(dim, **dd)
        self.cross = CrossAttention(dim, num_heads, drop, **dd)
        self.norm2 = nn.LayerNorm(dim, **dd)
        self.mlp = Mlp(dim, mlp_dim, drop, **dd)
        self.norm3 = nn.LayerNorm(dim, **dd)
        self.drop = nn.Dropout(drop)

    def forward(
        self,
        x: Tensor,
        mask: Tensor | None,
        objects: Tensor,
        object_mask: Tensor | None,
        before: tuple[Kept, Kept] | None = None,
    ) -> tuple[Tensor, tuple[Kept, Kept]]:
        """Map fixations ``[B * n, T, dim]`` of ``n`` scanpaths in each of B scenes to the same shape.

        Args:
            x: The fixations.
            mask: Which of these and those before each of them sees.
            objects: Tokens ``[B, S, dim]`` of the scene.
            object_mask: Which of them are seen.
            before: What the call for the fixations before returned.

        Returns:
            ``[B * n, T, dim]``, and keys and values of the fixations and of the objects.
        """
        fixated, known = before or (None, None)
        out, fixated = self.attn(x, mask, fixated)
        x = self.norm1(x + self.drop(out))
        scenes = x
        if x.shape[0] != objects.shape[0]:  # the scanpaths of a scene share its keys
            scenes = x.unflatten(0, (objects.shape[0], -1)).flatten(1, 2)
        out, known = self.cross(scenes, objects, object_mask, known)
        x = self.norm2(x + self.drop(out.view_as(x)))
        return self.norm3(x + self.drop(self.mlp(x))), (fixated, known)


class ObjectHead(nn.Module):
    """Scores of all objects, the end and padding, from the fixations so far (object attention).

    Args:
        dim: Width.
        heads: Heads, mixed by a linear layer if there are several.
        scale: The d_k by whose root scores are divided; each head has ``dim`` channels whatever it is.
        device: Device of the parameters.
        dtype: Dtype of the parameters.
    """

    def __init__(
        self,
        dim: int,
        heads: int,
        scale: float,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        self.heads, self.scale = heads, scale**-0.5
        self.query = nn.Linear(dim, heads * dim, **dd)
        self.key = nn.Linear(dim, heads * dim, **dd)
        self.readout = nn.Linear(heads, 1, **dd) if heads > 1 else None

    def forward(self, x: Tensor, memory: Tensor, kept: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Score the encoder's output after each fixation.

        Args:
            x: Fixations ``[B, T, dim]``.
            memory: The encoder's output ``[B, S, dim]``.
            kept: Keys that an earlier call returned for the same ``memory``.

        Returns:
            Scores ``[B, T, S + 1]``, the last of them that of padding, and keys ``[B, heads, S, dim]``.
        """
        (q,) = split_heads(self.query(x), 1, self.heads)
        if kept is None:
            (kept,) = split_heads(self.key(memory), 1, self.heads)
        scores = F.pad((q @ kept.transpose(-2, -1)) * self.scale, (0, 1)).movedim(1, -1)  # [B, T, S + 1, heads]
        return (scores if self.readout is None else self.readout(scores)).squeeze(-1), kept


class Scene(NamedTuple):
    """What decoding needs of a batch of scenes."""

    tokens: Tensor  # [B, N + 3, dim]: decoder tokens of every index, without the step code
    objects: Tensor  # [B, N + 1, dim]: the encoder's output for the objects and the target token
    mask: Tensor | None  # [B, N + 1], True for real objects and the target token


def _no_classes(num_classes: int) -> None:
    need(num_classes == 0, "0: the classes of an OAT are the scene's objects", num_classes=num_classes)


class OAT(nn.Module):
    """The Object-level Attention Transformer.

    Args:
        in_chans: Channels of images and crops.
        num_classes: 0; the classes are the objects of the scene.
        embed_dim: Width E; half of a token is appearance, half place.
        num_heads: Heads of encoder and decoder.
        mlp_dim: Hidden width of their feed-forward layers.
        enc_depth: Encoder layers.
        dec_depth: Decoder layers.
        head_count: Heads of the object attention.
        head_dim_scale: The d_k by whose root its scores are divided (a setting of the official code, not a width).
        spp: Levels of spatial pyramid pooling of crops, 0 to 4; 0 takes crops of ``crop_size`` only.
        crop_size: Height and width to which objects are cut out of an image.
        grid: Rows and columns of the scene.
        pe: Place code: ``"gauss"``, or the sinusoids ``"original"``, ``"exp1"``, ``"exp2"``, ``"linear"``.
        pe_sigma: Width of the Gaussian, in rows.
        pe_norm: Length of the code of a coordinate.
        pe_alpha: Exponent or factor of ``exp1``, ``exp2`` and ``linear``.
        pe_table: Codes to look up instead, such as an official table ``[places, ceil(E / 6)]``.
        drop_rate: Dropout.
        backbone: Any model of timm or the zoo that gives features of stride 16, instead of the network for crops.
        backbone_pretrained: Load its published weights.
        device: Device of the parameters.
        dtype: Dtype of the parameters.

    Raises:
        ValueError: If an argument is outside its range or the backbone has no features of stride 16.
    """

    @checked(pe=PLACE_CODES)
    def __init__(
        self,
        in_chans: int = 3,
        num_classes: int = 0,
        embed_dim: int = 512,
        num_heads: int = 4,
        mlp_dim: int = 512,
        enc_depth: int = 4,
        dec_depth: int = 4,
        head_count: int = 2,
        head_dim_scale: float = 512,
        spp: int = 0,
        crop_size: tuple[int, int] = (150, 93),
        grid: tuple[int, int] = (6, 14),
        pe: str = "gauss",
        pe_sigma: float = 2.0,
        pe_norm: float = 8.76,
        pe_alpha: float = 0.9,
        pe_table: Tensor | Sequence[Sequence[float]] | None = None,
        drop_rate: float = 0.1,
        backbone: str | None = None,
        backbone_pretrained: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        _no_classes(num_classes=num_classes)
        need(embed_dim % 2 == 0, "an even number", embed_dim=embed_dim)
        check_multiple(embed_dim=embed_dim, num_heads=num_heads)
        smallest = SMALLEST_CROP if spp else SMALLEST_POOLED
        need(min(crop_size) >= smallest, f"2 numbers of at least {smallest}", crop_size=crop_size)
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        self.in_chans, self.num_classes = in_chans, num_classes
        self.num_features = self.head_hidden_size = self.embed_dim = embed_dim
        self.drop_rate = drop_rate
        self.crop_size = (crop_size[0], crop_size[1])
        self.grid = (grid[0], grid[1])
        self.grad_checkpointing = False
        half = embed_dim // 2
        self.place = PlaceCode(half, self.grid, pe, pe_sigma, pe_norm, pe_alpha, pe_table)
        self.backbone: nn.Module | None = None
        self.appearance: nn.Module
        if backbone is None:
            self.appearance = CropNet(half, in_chans, self.crop_size, spp, **dd)
        else:
            self.backbone = _stride_16(backbone, backbone_pretrained, in_chans, dd)
            speed_up(self.backbone)
            self.appearance = nn.Linear(self.backbone.feature_info.channels()[-1], half, **dd)  # type: ignore
        layer = (embed_dim, num_heads, mlp_dim, drop_rate)
        self.encoder = nn.ModuleList(EncoderLayer(*layer, **dd) for _ in range(enc_depth))
        self.decoder = nn.ModuleList(DecoderLayer(*layer, **dd) for _ in range(dec_depth))
        self.head = ObjectHead(embed_dim, head_count, head_dim_scale, **dd)
        self.drop = nn.Dropout(drop_rate)
        self.init_weights(needs_reset=False)

    def __prepare_scriptable__(self) -> nn.Module:
        """Called by ``torch.jit.script``."""
        raise RuntimeError("OAT cannot be scripted: its inputs and caches are optional and nested; use torch.export")

    @torch.jit.ignore
    def init_weights(self, needs_reset: bool = True) -> None:
        """Xavier for every matrix and filter, no biases in attention, PyTorch's defaults for the rest.

        A backbone initialises itself.

        Args:
            needs_reset: First give every layer PyTorch's default, as after ``to_empty()``.
        """
        if needs_reset and self.backbone is not None and hasattr(self.backbone, "init_weights"):
            self.backbone.init_weights()  # type: ignore[operator]
        for name, module in self.named_modules():
            if name.startswith("backbone") or name.endswith((".cross.q", ".cross.kv")):  # drawn by their parent
                continue
            if needs_reset and hasattr(module, "reset_parameters"):
                module.reset_parameters()  # type: ignore[operator]
            if isinstance(module, (nn.Linear, nn.Conv2d)):
                parts = self.head.heads if module in (self.head.query, self.head.key) else 1
                for weight in module.weight.chunk(parts):  # official: one matrix for each head
                    nn.init.xavier_uniform_(weight)
            elif isinstance(module, CrossAttention):
                module.init_weights()
        for module in self.modules():
            if isinstance(module, (Attention, CrossAttention)):  # as nn.MultiheadAttention starts
                for layer in module.children():
                    nn.init.zeros_(layer.bias)  # type: ignore[arg-type]

    @torch.jit.ignore
    @checked()
    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute the layers in the backward pass instead of storing their activations."""
        self.grad_checkpointing = enable

    @torch.jit.ignore
    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Layer groups for layer-wise decay."""
        return {
            "stem": r"^appearance|^backbone",
            "encoder": r"^encoder" if coarse else r"^encoder\.(\d+)",
            "decoder": r"^decoder" if coarse else r"^decoder\.(\d+)",
            "head": r"^head",
        }

    @torch.jit.ignore
    def get_classifier(self) -> nn.Module:
        """The head that scores the objects."""
        return self.head

    @checked()
    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Not possible: the classes are the objects of each scene.

        Raises:
            ValueError: Always, unless nothing is asked for.
        """
        _no_classes(num_classes=num_classes)
        need(not global_pool, "'' or None: an OAT pools nothing", global_pool=global_pool)

    def _grid_boxes(self, image: Tensor) -> tuple[Tensor, Tensor]:
        """Boxes ``[N, 4]`` of a uniform grid over an image, and its rows and columns ``[N, 2]``."""
        coords = self._grid_coords(self.grid[0] * self.grid[1], image.device)
        row, column = coords.unbind(-1)
        height, width = image.shape[2] / self.grid[0], image.shape[3] / self.grid[1]
        corners = (column * width, row * height, (column + 1) * width, (row + 1) * height)
        return torch.stack(corners, -1), coords

    def _grid_coords(self, n: int, device: torch.device) -> Tensor:
        index = torch.arange(n, device=device, dtype=torch.float32)
        column = index % self.grid[1]
        return torch.stack(((index - column) / self.grid[1], column), -1)

    def _place_boxes(self, image: Tensor, boxes: Tensor) -> Tensor:
        """Rows and columns ``[B, N, 2]`` of the centres of boxes: real numbers, whole ones for a table."""
        centre = boxes[..., :2] / 2 + boxes[..., 2:] / 2
        row = centre[..., 1] / image.shape[2] * self.grid[0] - 0.5
        column = centre[..., 0] / image.shape[3] * self.grid[1] - 0.5
        coords = torch.stack((row, column), -1)
        return coords if self.place.table is None else coords.round().clamp_min(0)

    def _cut(self, source: Tensor, boxes: Tensor, size: Sequence[int], scale: float = 1.0) -> Tensor:
        """Bilinear crops ``[B * N, C, h, w]`` of boxes ``[B, N, 4]``."""
        index = torch.arange(boxes.shape[0], device=boxes.device, dtype=boxes.dtype)
        rois = torch.cat((index[:, None, None].expand(-1, boxes.shape[1], 1), boxes), 2).flatten(0, 1)
        wide = torch.promote_types(source.dtype, torch.float32)  # RoIAlign knows no bfloat16 on a CPU
        return cut(source.to(wide), rois.to(wide), (size[0], size[1]), scale).to(source.dtype)

    def _look(self, image: Tensor, boxes: Tensor) -> Tensor:
        """Appearance ``[B, N + 1, E / 2]`` of boxed objects and of an all-ones crop."""
        if self.backbone is None:
            if is_plain(self.appearance, CropNet) and self.appearance.fits(image):  # type: ignore[operator]
                return self._with_blank(self.appearance.look(image, boxes))  # type: ignore[operator]
            return self._look_at_crops(self._cut(image, boxes, self.crop_size).unflatten(0, boxes.shape[:2]))
        if type(self.backbone) is FeatureListNet and not is_watched(self.backbone):
            features = run(image, *self.backbone.values())
        else:
            (features,) = self.backbone(image)
        pooled = self._cut(features, boxes, (7, 7), 1 / 16).mean((2, 3)).unflatten(0, boxes.shape[:2])
        blank = torch.ones_like(pooled[:, :1])
        return self.appearance(torch.cat((pooled, blank), 1))

    def _look_at_crops(self, crops: Tensor) -> Tensor:
        seen = self.appearance(crops.flatten(0, 1)).unflatten(0, crops.shape[:2])
        return self._with_blank(seen, crops.shape[3:])

    def _with_blank(self, seen: Tensor, size: Sequence[int] | None = None) -> Tensor:
        """Appearance of objects ``[B, N, E / 2]`` and, after them, of an all-ones crop."""
        blank = self.appearance(seen.new_ones(1, self.in_chans, *(size or self.crop_size)))
        return torch.cat((seen, blank.expand(seen.shape[0], 1, -1)), 1)

    def _scene(self, seen: Tensor, coords: Tensor, target: Tensor | None, object_mask: Tensor | None) -> Scene:
        """Encode scenes.

        Args:
            seen: Appearance of the objects and of an all-ones crop ``[B, N + 1, E / 2]``.
            coords: Rows and columns of the objects ``[B, N, 2]``.
            target: Target objects ``[B]``; None for object 0.
            object_mask: True for real objects ``[B, N]``.

        Returns:
            The scene.
        """
        B, N, _ = coords.shape
        rows, columns = self.grid
        if target is None:
            target = torch.zeros(B, dtype=torch.long, device=coords.device)
        # end, padding, start: where their index would lie on the grid, and the middle
        special = [(N // columns, N % columns), ((N + 1) // columns, (N + 1) % columns), (rows // 2, columns // 2)]
        others = torch.tensor(special, device=coords.device, dtype=coords.dtype).expand(B, 3, 2)
        flag = torch.arange(N + 3, device=coords.device) == target[:, None]
        look = torch.cat((seen, seen[:, -1:].expand(-1, 2, -1)), 1)  # [B, N + 3, E / 2]
        place = self.place(torch.cat((coords, others), 1), flag)
        tokens = torch.cat((look, place.to(look.dtype)), -1)
        hit = target[:, None]
        where = torch.cat((coords, pick(coords, hit)), 1)  # the target token is the last
        what = torch.cat((seen[:, :-1], pick(seen, hit)), 1)
        place = self.place(where, torch.arange(N + 1, device=coords.device).expand(B, -1) == N)
        x = torch.cat((what, place.to(what.dtype)), -1)
        mask = None
        if object_mask is not None:
            mask = F.pad(object_mask, (0, 1), value=True)
        visible = None if mask is None else mask[:, None, None]
        for layer in self.encoder:
            x = checkpoint(layer, x, visible, use_reentrant=False) if self._recompute() else layer(x, visible)
        return Scene(tokens, x, mask)

    def _recompute(self) -> bool:
        return self.grad_checkpointing and torch.is_grad_enabled()

    def _decode(self, scene: Scene, prefix: Tensor | None) -> Tensor:
        """Logits ``[B, T, N + 2]`` after a start token and each fixation of ``prefix`` ``[B, T - 1]``."""
        B, last, dim = scene.tokens.shape  # last: N + 3
        index = torch.full((B, 1), last - 1, dtype=torch.long, device=scene.tokens.device)
        if prefix is not None:
            index = torch.cat((index, torch.where(prefix < 0, last - 2, prefix)), 1)
        T = index.shape[1]
        x = pick(scene.tokens, index)
        x = self.drop(x + step_code(T, dim, device=x.device).to(x.dtype))
        mask = torch.ones(T, T, dtype=torch.bool, device=x.device).tril() & (index != last - 2)[:, None, None]
        visible = None if scene.mask is None else scene.mask[:, None, None]
        for layer in self.decoder:
            args = (x, mask, scene.objects, visible)
            x, _ = checkpoint(layer, *args, use_reentrant=False) if self._recompute() else layer(*args)
        return self._mask(self.head(x, scene.objects)[0], scene)

    def _mask(self, logits: Tensor, scene: Scene) -> Tensor:
        if scene.mask is None:
            return logits
        return logits.masked_fill(~F.pad(scene.mask, (0, 1), value=True)[:, None], -torch.inf)

    def _prepare(
        self,
        x: Tensor,
        boxes: Tensor | None,
        target: Tensor | None,
        object_mask: Tensor | None,
        coords: Tensor | None,
        prefix: Tensor | None = None,
    ) -> Scene:
        """The scene of images ``[B, C, H, W]`` or crops ``[B, N, C, h, w]``, with its arguments checked."""
        if x.ndim == 5:
            if self.backbone is not None:
                raise ValueError("got crops, but a model with a backbone needs image and boxes")
            if boxes is not None:
                raise ValueError("got crops and boxes; crops need coords instead")
            n, locate = x.shape[1], coords
            if locate is None:
                locate = self._grid_coords(n, x.device)
        elif x.ndim == 4:
            if boxes is None:
                boxes, locate = self._grid_boxes(x)
                boxes = boxes.expand(x.shape[0], -1, -1)
                locate = locate if coords is None else coords
            elif boxes.ndim != 3 or boxes.shape[0] != x.shape[0] or boxes.shape[2] != 4:
                raise ValueError(f"got boxes of shape {list(boxes.shape)}, need [{x.shape[0]}, N, 4]")
            else:
                locate = self._place_boxes(x, boxes) if coords is None else coords
            n = boxes.shape[1]
        else:
            raise ValueError(f"got input of shape {list(x.shape)}, need images [B, C, H, W] or crops [B, N, C, h, w]")
        B = x.shape[0]
        if locate.shape[-2:] != (n, 2) or locate.ndim > 3:
            raise ValueError(f"got coords of shape {list(locate.shape)}, need [{B}, {n}, 2]")
        _check_indices("target", target, (B,), 0, n - 1)
        _check_indices("prefix", prefix, (B, None), -1, n)
        if object_mask is not None and (object_mask.shape != (B, n) or object_mask.dtype != torch.bool):
            raise ValueError(
                f"got object_mask of shape {list(object_mask.shape)} and {object_mask.dtype}, need bool [{B}, {n}]"
            )
        seen = self._look_at_crops(x) if boxes is None else self._look(x, boxes)
        return self._scene(seen, locate.expand(B, -1, -1), target, object_mask)

    def forward(
        self,
        image: Tensor,
        boxes: Tensor | None = None,
        target: Tensor | None = None,
        prefix: Tensor | None = None,
        object_mask: Tensor | None = None,
        coords: Tensor | None = None,
    ) -> Tensor:
        """Scores of the next fixation after a start token and after every fixation so far.

        Args:
            image: Images ``[B, in_chans, H, W]`` from 0 to 1.
            boxes: Objects ``[B, N, 4]`` as pixels x1, y1, x2, y2; None divides the image into the grid.
            target: The objects searched for ``[B]``; None for object 0.
            prefix: Objects fixated so far ``[B, T - 1]``, -1 for padding; None for none.
            object_mask: ``[B, N]``, False for boxes that hold no object; their logits are minus infinity.
            coords: Rows and columns ``[B, N, 2]``, real numbers; None takes the boxes' centres on the grid.

        Returns:
            Logits ``[B, T, N + 2]``: objects, end, padding.

        Raises:
            ValueError: If a shape or an index does not fit.
        """
        if image.ndim != 4:
            raise ValueError(f"got image of shape {list(image.shape)}, need [B, {self.in_chans}, H, W]")
        return self._decode(self._prepare(image, boxes, target, object_mask, coords, prefix), prefix)

    def forward_objects(
        self,
        crops: Tensor,
        coords: Tensor | None = None,
        target: Tensor | None = None,
        prefix: Tensor | None = None,
        object_mask: Tensor | None = None,
    ) -> Tensor:
        """:meth:`forward` for objects that are cut out already (the official interface).

        Args:
            crops: Objects ``[B, N, in_chans, h, w]``.
            coords: Their rows and columns ``[B, N, 2]``; None counts along the grid.
            target: As in :meth:`forward`, like the rest.
            prefix: Objects fixated so far.
            object_mask: True for real objects.

        Returns:
            Logits ``[B, T, N + 2]``.

        Raises:
            ValueError: Likewise.
        """
        if crops.ndim != 5:
            raise ValueError(f"got crops of shape {list(crops.shape)}, need [B, N, {self.in_chans}, h, w]")
        return self._decode(self._prepare(crops, None, target, object_mask, coords, prefix), prefix)

    @torch.no_grad()
    @checked(mode=("greedy", "sample"))
    def generate(
        self,
        x: Tensor,
        boxes: Tensor | None = None,
        target: Tensor | None = None,
        max_len: int = 20,
        mode: str = "greedy",
        num_samples: int = 1,
        generator: torch.Generator | None = None,
        object_mask: Tensor | None = None,
        coords: Tensor | None = None,
    ) -> list[list[int]]:
        """Predict scanpaths: the scene is encoded once, and each step computes one fixation from kept keys.

        The first fixation is an object, every later one an object or the end (the padding class is left out).

        Args:
            x: Images ``[B, in_chans, H, W]`` or crops ``[B, N, in_chans, h, w]``.
            boxes: As in :meth:`forward`, like the rest.
            target: The objects searched for ``[B]``.
            max_len: Longest scanpath.
            mode: ``"greedy"`` for the most likely fixation, ``"sample"`` to draw one.
            num_samples: Scanpaths of each scene; 1 with ``"greedy"``.
            generator: Source of the draws.
            object_mask: True for real objects.
            coords: Rows and columns of the objects.

        Returns:
            ``B * num_samples`` lists of object indices, without the end; those of one scene one after the other.

        Raises:
            ValueError: If an argument does not fit.
        """
        need(mode == "sample" or num_samples == 1, "one sample with 'greedy'", num_samples=num_samples, mode=mode)
        scene = self._prepare(x, boxes, target, object_mask, coords)
        B, end = scene.tokens.shape[0], scene.tokens.shape[1] - 3
        index = torch.full((B, num_samples), end + 2, dtype=torch.long, device=scene.tokens.device)
        finished = torch.zeros_like(index, dtype=torch.bool)
        cache: dict[nn.Module, Any] = {}
        steps = []
        for step in range(max_len):
            logits = self._step(scene, index, step, cache)[..., : end + (step > 0)].float()
            if mode == "greedy":
                index = logits.argmax(-1)
            else:
                index = torch.multinomial(logits.softmax(-1).flatten(0, 1), 1, generator=generator).view(B, num_samples)
            finished = finished | (index == end)
            steps.append(index.masked_fill(finished, -1))
            if finished.all():
                break
        paths = torch.stack(steps, -1).flatten(0, 1).tolist()
        return [[i for i in path if i >= 0] for path in paths]

    def _step(self, scene: Scene, index: Tensor, step: int, cache: dict[nn.Module, Any]) -> Tensor:
        """Logits ``[B, n, N + 2]`` after tokens ``index`` ``[B, n]``; the cache holds what each layer returned."""
        x = pick(scene.tokens, index)
        x = self.drop(x + step_code(1, x.shape[2], step, x.device).to(x.dtype)).flatten(0, 1)[:, None]
        visible = None if scene.mask is None else scene.mask[:, None, None]
        for layer in self.decoder:
            x, cache[layer] = layer(x, None, scene.objects, visible, cache.get(layer))
        logits, cache[self.head] = self.head(x.view(*index.shape, x.shape[2]), scene.objects, cache.get(self.head))
        return self._mask(logits, scene)

    def loss(self, logits: Tensor, sequence: Tensor) -> Tensor:
        """Cross-entropy of teacher forcing, over the objects of the sequences and their ends.

        Args:
            logits: ``[B, T, N + 2]`` for the prefix ``sequence``.
            sequence: Fixated objects ``[B, T - 1]``, -1 for padding behind them.

        Returns:
            The mean, a scalar.

        Raises:
            ValueError: If the lengths do not fit.
        """
        if logits.shape[:2] != (sequence.shape[0], sequence.shape[1] + 1):
            raise ValueError(f"got logits of {list(logits.shape)} for a sequence of {list(sequence.shape)}")
        labels = next_fixations(sequence, logits.shape[2] - 2)
        return F.cross_entropy(logits.float().flatten(0, 1), labels.flatten(), ignore_index=-1)

    @torch.jit.ignore
    @checked(target=NATURAL, point=SHARE)
    def explain(
        self,
        image: Tensor,
        boxes: Tensor | Sequence[Sequence[float]] | None = None,
        target: int | None = None,
        max_len: int = 20,
        point: tuple[float, float] = (0.5, 0.5),
    ) -> list[Panel]:
        """The greedy scanpath of a search, and how likely it begins at each object.

        Args:
            image: ``[1, in_chans, height, width]`` from 0 to 1.
            boxes: Objects ``[1, N, 4]`` or ``[N, 4]`` as in :meth:`forward`; None divides the image into the grid.
            target: The object searched for; None for the one nearest to ``point``.
            max_len: Longest scanpath.
            point: Row and column as fractions of the image.

        Returns:
            The scanpath, in which fixations of one object that follow each other are one point, with the target's box;
            and the probability of each object to be the first fixation.

        Raises:
            ValueError: If an argument does not fit.
        """
        size = torch.tensor(image.shape[2:], device=image.device)
        given = None if boxes is None else torch.as_tensor(boxes, dtype=torch.float32, device=image.device)
        given = given[None] if given is not None and given.ndim == 2 else given
        objects = self._grid_boxes(image)[0] if given is None else given[0]
        named = "" if target is not None else ", the one at the point"
        if target is None:
            centres = (objects[..., :2] + objects[..., 2:]) / 2
            target = int((centres - (size * torch.tensor(point).to(size.device)).flip(0)).norm(dim=-1).argmin())
        sought = torch.tensor([target], device=image.device)
        with evaluating(self):
            (path,) = self.generate(image, given, sought, max_len)
            first = self(image, given, sought)[0, 0, :-2].float().softmax(0)  # neither end nor padding
        frames = objects[:, [1, 0, 3, 2]] / size.repeat(2)
        names, visited = _runs(path)
        points = spread_fixations(objects, visited).flip(1) / size
        length = (
            f"{len(path)} fixation{'s' * (len(path) != 1)}" if len(path) < max_len else f"first {max_len} fixations"
        )
        scanpath = Panel(
            title=f"Greedy scanpath, {length}; in search of object {target}{named} (box)",
            boxes=frames[[target]],
            lines=torch.stack([points[:-1], points[1:]], 1),
            points=points,
            names=names,
        )
        likely: dict[str, Any] = {"title": "How likely each object is the first fixation", "bar": "probability"}
        if given is None:
            return [scanpath, Panel(heat=first.view(self.grid), **likely)]
        frames = torch.cat((frames[[target]], frames[:target], frames[target + 1 :]))  # the first box stands out
        return [scanpath, Panel(heat=_paint(objects, first, image.shape[2:]), boxes=frames, **likely)]


def _runs(path: Sequence[int]) -> tuple[list[str], list[int]]:
    """Fixations of one object that follow each other: their numbers in the path, such as "2-4", and the object."""
    names, objects, start = [], [], 1
    for item, same in itertools.groupby(path):
        stop = start + len(list(same))
        names.append(f"{start}" if stop == start + 1 else f"{start}-{stop - 1}")
        objects.append(item)
        start = stop
    return names, objects


def spread_fixations(boxes: Tensor, sequence: Sequence[int]) -> Tensor:
    """Where fixations of objects are drawn: in the middle, or several beside each other, so that every one is seen.

    Args:
        boxes: ``[N, 4]`` as x1, y1, x2, y2.
        sequence: Fixated objects.

    Returns:
        Their x and y ``[n, 2]``.
    """
    sequence = list(sequence)
    spread = torch.empty(len(sequence), 2)
    for i, item in enumerate(sequence):
        before, rows = sequence[:i].count(item), min(sequence.count(item), 3)
        spread[i] = torch.tensor([min(before // 3, 2) * 0.16, (before % 3 - (rows - 1) / 2) * 0.3])
    visited, spread = boxes[sequence], spread.to(boxes.device)
    return (visited[:, :2] + visited[:, 2:]) / 2 + spread * (visited[:, 2:] - visited[:, :2])


def _paint(boxes: Tensor, values: Tensor, size: Sequence[int]) -> Tensor:
    """A map ``[height, width]`` with a value in each box, the largest where boxes overlap, and 0 elsewhere."""
    heat = values.new_zeros(*size)
    for (left, top, right, bottom), value in zip(boxes.round().int().clamp_min(0).tolist(), values, strict=True):
        heat[top:bottom, left:right].clamp_(min=value)
    return heat


class _Cut(torch.autograd.Function):
    """RoIAlign, a linear map of the image: its tangent is itself, its gradient :class:`_Paste`."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, rois: Tensor, size: tuple[int, int], scale: float) -> Tensor:
        return roi_align(x, rois, size, scale, aligned=True)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        x, rois, ctx.size, ctx.scale = inputs
        ctx.shape = x.shape
        ctx.save_for_backward(rois)
        ctx.save_for_forward(rois)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:  # type: ignore[override]
        return _Paste.apply(grad, *ctx.saved_tensors, ctx.size, ctx.scale, ctx.shape), None, None, None

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor, *_: Any) -> Tensor:  # type: ignore[override]
        return _Cut.apply(tangent, *ctx.saved_tensors, ctx.size, ctx.scale)


class _Paste(torch.autograd.Function):
    """The adjoint of :class:`_Cut`."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, rois: Tensor, size: tuple[int, int], scale: float, shape: tuple[int, ...]) -> Tensor:
        return torch.ops.torchvision._roi_align_backward(x, rois, scale, *size, *shape, -1, True)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        _, rois, ctx.size, ctx.scale, ctx.shape = inputs
        ctx.save_for_backward(rois)
        ctx.save_for_forward(rois)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None, None]:  # type: ignore[override]
        return _Cut.apply(grad, *ctx.saved_tensors, ctx.size, ctx.scale), None, None, None, None

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor, *_: Any) -> Tensor:  # type: ignore[override]
        return _Paste.apply(tangent, *ctx.saved_tensors, ctx.size, ctx.scale, ctx.shape)


def cut(x: Tensor, rois: Tensor, size: tuple[int, int], scale: float) -> Tensor:
    """Crops ``[K, C, h, w]`` of ``[B, C, H, W]`` by RoIAlign; torchvision's has no tangents and no second gradients.

    Args:
        x: Images or features.
        rois: Image and corners of each crop ``[K, 5]``, which get no gradient.
        size: Height and width of the crops.
        scale: Pixels of ``x`` for each pixel of the corners.

    Returns:
        The crops.
    """
    recorded = torch.is_grad_enabled() and x.requires_grad and not torch.are_deterministic_algorithms_enabled()
    if is_transforming() or (recorded and not (torch.compiler.is_compiling() or torch.jit.is_tracing())):
        return _Cut.apply(x, rois, size, scale)
    return roi_align(x, rois, size, scale, aligned=True)


def pick(x: Tensor, index: Tensor) -> Tensor:
    """Rows ``[B, T, C]`` of ``x`` ``[B, S, C]``; unlike ``take_along_dim`` it exports with any batch size."""
    return x.gather(1, index[..., None].expand(-1, -1, x.shape[2]))


def next_fixations(sequence: Tensor, end: int) -> Tensor:
    """Labels ``[B, T]`` of sequences ``[B, T - 1]``: the objects, then ``end`` once, then -1."""
    labels = F.pad(sequence, (0, 1), value=-1)
    return labels.scatter(1, (sequence >= 0).sum(1, keepdim=True), end)


def _check_indices(name: str, x: Tensor | None, shape: tuple[int | None, ...], low: int, high: int) -> None:
    if x is None:
        return
    fits = x.ndim == len(shape) and all(n in (None, m) for n, m in zip(shape, x.shape, strict=True))
    if not fits or x.dtype != torch.int64:
        need = ", ".join("T" if n is None else str(n) for n in shape)
        raise ValueError(f"got {name} of shape {list(x.shape)} and {x.dtype}, need int64 [{need}]")
    known = not (torch.compiler.is_compiling() or plain_only() or x.is_meta)
    if known and x.numel() and not (low <= x.min() and x.max() <= high):
        raise ValueError(f"got {name} from {int(x.min())} to {int(x.max())}, need {low} to {high}")


def _stride_16(name: str, pretrained: bool, in_chans: int, dd: dict[str, Any]) -> nn.Module:
    """A features-only backbone that gives its last map of stride 16."""
    check_model_name(backbone=name)
    info: Any = timm.create_model(name, features_only=True, device="meta").feature_info
    strides = info.reduction()
    need(16 in strides, f"a model with features of stride 16, not {', '.join(map(str, strides))}", backbone=name)
    index = len(strides) - 1 - strides[::-1].index(16)
    return timm.create_model(
        name, pretrained=pretrained, features_only=True, out_indices=(index,), in_chans=in_chans, **dd
    )


OFFICIAL = (
    ("transformer_encoder.layers.", "encoder."),
    ("transformer_decoder.layers.", "decoder."),
    (".self_attn.", ".attn."),
    (".multihead_attn.", ".cross."),
    (".in_proj_", ".qkv."),
    (".out_proj.", ".proj."),
    (".linear", ".mlp.fc"),
    ("cnn_embedding.cnn1.0.", "appearance.conv1."),
    ("cnn_embedding.cnn2.0.", "appearance.conv2."),
    ("cnn_embedding.fc.", "appearance.fc."),
    ("readout.", "head.readout."),
)
UNUSED = ("generator.", "LinearEmbedding.", "onedpositional_encoding.", "cross_attentions.")


def convert_oat(state_dict: dict[str, Tensor]) -> dict[str, Tensor]:
    """Weights of the official ``Seq2SeqTransformer`` under our names.

    Args:
        state_dict: Official state dict; layers that the official model never uses are dropped.

    Returns:
        A state dict for :class:`OAT`.
    """
    out = {}
    for key, value in state_dict.items():
        if not key.startswith(UNUSED):
            for theirs, ours in OFFICIAL:
                key = key.replace(theirs, ours)
            out[key] = value
    heads = 1 + max(int(key.split(".")[1]) for key in state_dict if key.startswith("cross_attentions."))
    for ours, theirs in (("query", "decode_fc"), ("key", "encode_fc")):
        for kind in ("weight", "bias"):
            parts = [state_dict[f"cross_attentions.{h}.{theirs}.{kind}"] for h in range(heads)]
            out[f"head.{ours}.{kind}"] = torch.cat(parts)
    if heads == 1:  # present, but never used
        out = {key: value for key, value in out.items() if not key.startswith("head.readout.")}
    return out


def checkpoint_filter_fn(state_dict: dict[str, Any], model: nn.Module) -> dict[str, Tensor]:
    """Official weights, or our own, for ``model``.

    Args:
        state_dict: Checkpoint or state dict.
        model: The model to load.

    Returns:
        A state dict for ``model``.
    """
    state_dict = unwrap(state_dict)
    official = any(key.startswith(("transformer_encoder.", "transformer_decoder.")) for key in state_dict)
    return convert_oat(state_dict) if official else state_dict


def _cfg(**kwargs: Any) -> dict[str, Any]:
    return {
        "num_classes": 0,
        "input_size": (3, 800, 1280),
        "pool_size": None,
        "crop_pct": 1.0,
        "interpolation": "bilinear",
        "mean": (0.0, 0.0, 0.0),
        "std": (1.0, 1.0, 1.0),
        "first_conv": "appearance.conv1",
        "classifier": None,
        "license": "apache-2.0",
        "paper_name": "OAT: Object-Level Attention Transformer for Gaze Scanpath Prediction",
        "paper_ids": "arXiv:2407.13335",
        "origin_url": "https://github.com/HKUST-NISL/oat_eccv24",
        **kwargs,
    }


default_cfgs = generate_default_cfgs(
    {
        "oat_base.untrained": _cfg(),
        "oat_small.untrained": _cfg(),
        "oat_resnet18.untrained": _cfg(first_conv="backbone.conv1"),
        "test_oat.untrained": _cfg(input_size=(3, 96, 128)),
    }
)


def _create_oat(variant: str, pretrained: bool = False, **kwargs: Any) -> OAT:
    if kwargs.pop("features_only", False):
        raise RuntimeError(f"features_only: {variant} predicts scanpaths and has no feature maps")
    return build(OAT, variant, pretrained, checkpoint_filter_fn, **kwargs)


@register_model
def test_oat(pretrained: bool = False, **kwargs: Any) -> OAT:
    """Tiny OAT for tests."""
    model_args: dict[str, Any] = {"embed_dim": 48, "num_heads": 2, "mlp_dim": 40, "enc_depth": 1, "dec_depth": 2}
    model_args |= {"head_dim_scale": 48, "spp": 2, "crop_size": (24, 20), "grid": (3, 5)}
    return _create_oat("test_oat", pretrained, **{**model_args, **kwargs})


@register_model
def oat_small(pretrained: bool = False, **kwargs: Any) -> OAT:
    """OAT of width 128 for crops of any size."""
    model_args = {"embed_dim": 128, "num_heads": 4, "mlp_dim": 256, "enc_depth": 2, "dec_depth": 2, "spp": 3}
    return _create_oat("oat_small", pretrained, **{**model_args, **kwargs})


@register_model
def oat_base(pretrained: bool = False, **kwargs: Any) -> OAT:
    """OAT in the official size."""
    return _create_oat("oat_base", pretrained, **kwargs)


@register_model
def oat_resnet18(pretrained: bool = False, **kwargs: Any) -> OAT:
    """OAT whose objects are seen by a ResNet-18."""
    return _create_oat("oat_resnet18", pretrained, **{"backbone": "resnet18", **kwargs})
