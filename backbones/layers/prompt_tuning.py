"""Prompt tuning of frozen vision transformers of timm: TCPA, and VPT and VFPT as baselines.

The layers and their papers are in ``prompt_attention.py`` (TCPA) and ``vpt.py``.  TCPA's official code, without
licence: github.com/zhoujiahuan1991/ICML2025-TCPA.
"""

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, List, Optional, Tuple, Union  # noqa: UP035 - TorchScript

import torch
import torch.nn.functional as F
from timm.layers import Attention, PatchEmbed, get_device_dtype, to_2tuple
from timm.models._features import feature_take_indices
from timm.models.vision_transformer import Block, ResPostBlock, VisionTransformer
from timm.models.vision_transformer import checkpoint_filter_fn as vit_filter_fn
from torch import Tensor, nn

from .checkpoint import unwrap
from .checks import NATURAL, Range, check_positions, checked, need
from .panel import Panel, seen_by
from .prompt_attention import TCPA, PromptedAttention, TCPABlock, TCPAResPostBlock, full_precision
from .vpt import VPT, VPTBlock, VPTResPostBlock, alias

__all__ = [
    "PROMPTS",
    "convert_tcpa",
    "freeze_backbone",
    "has_prompts",
    "load_tcpa_state_dict",
    "tcpa",
    "tcpa_parameters",
    "tcpa_state_dict",
    "vpt",
]

TOPK = 10  # the paper's number of prompts for each token
POOLS = ("token", "avg", "max", "avgmax", "map", "prr", "")  # of timm's VisionTransformer


class PixelPromptPatchEmbed(PatchEmbed):
    """Patch embedding of the image plus a learnt function of it (the official "IPrompt")."""

    embed = alias(PatchEmbed.forward, "embed")

    def forward(self, x: Tensor) -> Tensor:
        """Images ``[B, C, H, W]`` to what the plain embedding returns."""
        return self.embed(x + self.prompter(x))  # type: ignore[operator]


class PromptedVisionTransformer(VisionTransformer):
    """timm's ``VisionTransformer`` after :func:`tcpa` or :func:`vpt`; its constructor is not used."""

    __jit_unused_properties__ = ["match_loss", "random_match"]  # noqa: RUF012 - TorchScript's own name
    frozen = False  # set by freeze_backbone
    match_weight, random_epochs = 0.01, 10  # set by tcpa

    @property
    def match_loss(self) -> Tensor | None:
        """Matching loss of the last pass, summed over blocks; None if nothing was matched."""
        losses = [m.memory.match_loss for m in self.modules() if isinstance(m, TCPA)]
        found = [loss for loss in losses if loss is not None]
        return torch.stack(found).sum() if found else None

    @property
    def random_match(self) -> bool:
        """Whether training chooses prompts at random."""
        return any(m.random_match for m in self.modules() if isinstance(m, TCPA))

    @random_match.setter
    def random_match(self, value: bool) -> None:
        for module in self.modules():
            if isinstance(module, TCPA):
                module.random_match = value

    def extra_loss(self) -> Tensor | None:
        """What training adds to the loss: ``match_weight * match_loss``; None if nothing was matched."""
        loss = self.match_loss
        return None if loss is None else self.match_weight * loss

    def training_phase(self, epoch: int, epochs: int) -> None:
        """Choose prompts at random in the first ``random_epochs`` epochs.

        Args:
            epoch: The epoch that starts, from 0.
            epochs: How many there are.
        """
        self.random_match = epoch < self.random_epochs

    def explain(self, image: Tensor, layers: Sequence[int] | None = None) -> list[Panel]:
        """What patches take from the prompts of some blocks, in evaluation mode.

        Of TCPA's matching, the image prompt that is nearest to each patch, the first of those it takes.  Without a
        matching (VPT, or TCPA by role only), the share of each patch's attention that reads prompts.

        Args:
            image: ``[1, in_chans, H, W]``, as the model takes it.
            layers: Blocks, from 0; None for the first, the middle and the last.

        Returns:
            A panel for each block.

        Raises:
            ValueError: If it is not one image, or there are no such blocks.
        """
        shape, count = tuple(image.shape), len(self.blocks)
        need(len(shape) == 4 and shape[0] == 1, "one image [1, channels, height, width]", shape=shape)
        wanted = sorted({0, count // 2, count - 1}) if layers is None else layers
        check_positions(count, layers=wanted)
        blocks: list[tuple[int, Any]] = [(i % count, self.blocks[i]) for i in wanted]
        seen = seen_by(self, image, [layer for _, block in blocks for layer in (block, block.attn)])
        grid = self.patch_embed.dynamic_feat_size(image.shape[2:])  # type: ignore[arg-type]
        patches = slice(self.num_prefix_tokens, self.num_prefix_tokens + grid[0] * grid[1])
        panels = []
        with torch.no_grad(), full_precision(image):
            for (i, block), (inputs, _), (read, _) in zip(blocks, seen[::2], seen[1::2], strict=True):
                if isinstance(block, (TCPABlock, TCPAResPostBlock)) and not block.tcpa.role_only:
                    labels = block.tcpa.cosines(inputs[0][0, patches], block.tcpa.image_keys).argmax(-1)
                    panels.append(self._nearest_panel(i, labels.view(grid), len(block.tcpa.image_keys), image))
                else:
                    panels.append(self._share_panel(i, _prompt_share(block.attn, read, patches).view(grid), image))
        return panels

    def _nearest_panel(self, block: int, labels: Tensor, pool: int, image: Tensor) -> Panel:
        """Nearest prompts ``[h, w]`` of a pool; of patches that do not tile the image by its pixels."""
        used = len(labels.unique())
        height, width = self._covered(labels)
        if (height, width) != image.shape[2:]:  # padded beyond the image, or a rest at its edge without patches
            labels = labels.repeat_interleave(height // labels.shape[0], 0)
            labels = labels.repeat_interleave(width // labels.shape[1], 1)
            labels = F.pad(labels, (0, image.shape[3] - width, 0, image.shape[2] - height), value=-1)
        return Panel(title=f"Block {block}: nearest of {pool} image prompts, {used} in use", parts=labels)

    def _share_panel(self, block: int, share: Tensor, image: Tensor) -> Panel:
        """Shares ``[h, w]`` of attention."""
        height, width = self._covered(share)
        return Panel(
            title=f"Block {block}: attention of patches that reads prompts",
            heat=share.float(),
            area=(0.0, 0.0, height / image.shape[2], width / image.shape[3]),
            bar="share of attention",
        )

    def _covered(self, cells: Tensor) -> tuple[int, int]:
        """Height and width in pixels of so many patches ``[h, w]``."""
        height, width = to_2tuple(self.patch_embed.patch_size)
        return cells.shape[0] * height, cells.shape[1] * width

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | list[int] | None = None,
        return_prefix_tokens: bool = False,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
        output_dict: bool = False,
        attn_mask: Optional[Tensor] = None,  # noqa: UP045 - TorchScript
        is_causal: bool = False,
    ) -> Union[List[Tensor], Tuple[Tensor, List[Tensor]]]:  # noqa: UP006, UP007 - TorchScript
        """timm's; in TorchScript, which cannot compile that, without prefix tokens, dictionary and early stop."""
        if not torch.jit.is_scripting():
            return super().forward_intermediates(  # type: ignore[return-value]
                x,
                indices,
                return_prefix_tokens,
                norm,
                stop_early,
                output_fmt,
                intermediates_only,
                output_dict,
                attn_mask,
                is_causal,
            )
        take_indices, _ = feature_take_indices(len(self.blocks), indices)
        features: list[Tensor] = []
        H, W = self.patch_embed.dynamic_feat_size((x.shape[2], x.shape[3]))
        x = self.norm_pre(self.patch_drop(self._pos_embed(self.patch_embed(x))))
        for i, block in enumerate(self.blocks):
            x = block(x)
            if i in take_indices:
                feature = (self.norm(x) if norm else x)[:, self.num_prefix_tokens :]
                if output_fmt == "NCHW":
                    feature = feature.reshape(x.shape[0], H, W, x.shape[2]).permute(0, 3, 1, 2).contiguous()
                features.append(feature)
        if intermediates_only:
            return features
        return self.norm(x), features

    @torch.jit.ignore
    def no_weight_decay(self) -> set[str]:
        """Those of the backbone that it has."""
        return super().no_weight_decay() & dict(self.named_parameters()).keys()

    @checked(global_pool=POOLS)
    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Replace the classifier.

        Args:
            num_classes: Classes; 0 removes it.
            global_pool: Pooling as in timm; None keeps the current one.

        Raises:
            ValueError: If an argument is outside its range or the model has no such pooling; nothing has changed then.
        """
        before = self.num_classes
        try:
            super().reset_classifier(num_classes, global_pool)
        except AssertionError as e:
            self.num_classes = before  # timm sets it first
            raise ValueError(f"got global_pool={global_pool!r}, need a pooling that the model has: {e}") from e

    def train(self, mode: bool = True) -> "PromptedVisionTransformer":
        """Set the mode; a frozen backbone stays in evaluation mode."""
        super().train(mode)
        if self.frozen:
            for child in self.children():
                child.eval()
            for module in self.modules():
                if isinstance(module, (TCPA, VPT)):
                    module.train(mode)
            self.head.train(mode)
            self.head_drop.train(mode)
        return self


class ShallowPromptedVisionTransformer(PromptedVisionTransformer):
    """VPT-shallow, whose prompts are in the sequence of every block."""

    def forward_intermediates(self, *args: Any, **kwargs: Any) -> Any:
        """Refused: the tokens between blocks are no map."""
        raise NotImplementedError("VPT-shallow has prompts among its tokens; take deep=True for intermediate features")


def _prompt_share(attn: Attention, inputs: tuple[Tensor, ...], patches: slice) -> Tensor:
    """How much of the attention of patches reads prompts, a mean over the heads.

    Args:
        attn: The layer.
        inputs: What it got for one image: tokens with prompts at their end; or tokens, prompts and choice.
        patches: Which tokens are the patches.

    Returns:
        ``[T]``.
    """
    tokens, *prompted = inputs
    n = patches.stop
    x = torch.cat([tokens, prompted[0]], 1) if prompted else tokens
    q, k, _ = attn.qkv(x)[0].reshape(x.shape[1], 3, attn.num_heads, attn.head_dim).permute(1, 2, 0, 3)
    q, k = attn.q_norm(q[:, patches]), attn.k_norm(k)
    # a head at a time: all of them fill gigabytes for large images
    read = torch.stack([(a @ b.t() * attn.scale).softmax(-1)[:, n:] for a, b in zip(q, k, strict=True)]).mean(0)
    return (read * prompted[1][0, patches] if prompted else read).sum(-1)


_OWN = (".tcpa.", ".vpt.", "patch_embed.prompter.")


def _is_tuned(name: str) -> bool:
    return name.startswith("head.") or any(part in name for part in _OWN)


def _check_model(model: nn.Module) -> None:
    if isinstance(model, PromptedVisionTransformer):
        raise ValueError("model has prompts already")
    if type(model) is not VisionTransformer:
        raise NotImplementedError(f"model is a {type(model).__name__}; need timm's VisionTransformer itself")
    for block in model.blocks:
        if type(block) not in (Block, ResPostBlock):
            raise NotImplementedError(f"block {type(block).__name__}; supported are Block and ResPostBlock")
        if type(block.attn) is not Attention:
            raise NotImplementedError(f"attention {type(block.attn).__name__}; supported is Attention")


def _topk(name: str, topk: int | None, pool: int) -> int:
    if topk is None:
        return min(TOPK, pool)
    need(topk <= pool, f"1 to {pool}, the size of the pool", **{name: topk})
    return topk


@checked(
    cls_pool=NATURAL,
    cls_topk=NATURAL,
    cls_len=NATURAL,
    host=("vfpt", "vpt"),
    match_weight=Range(0),
    random_epochs=NATURAL,
)
def tcpa(
    model: VisionTransformer,
    *,
    host: str = "vfpt",
    cls_pool: int = 18,
    image_pool: int = 18,
    cls_topk: int | None = None,
    image_topk: int | None = None,
    cls_len: int = 1,
    image_len: int = 1,
    prompt_drop: float = 0.1,
    role_only: bool = False,
    pixel_prompt: bool = False,
    fused: bool = True,
    match_weight: float = 0.01,
    random_epochs: int = 10,
) -> PromptedVisionTransformer:
    """Give a vision transformer TCPA prompts, in place; all its parameter names stay.

    Register tokens choose among the class prompts, as the class token does.  A model without class token has image
    prompts only, which all its tokens read; settings of class prompts are ignored then.

    Args:
        model: timm's ``VisionTransformer``.
        host: ``vfpt`` (prompts pass a Fourier transform) or ``vpt``.
        cls_pool: Class prompts of each block.
        image_pool: Image prompts of each block.
        cls_topk: Class prompts for each prefix token; None for 10, or all of a smaller pool.
        image_topk: Image prompts for each patch token, likewise.
        cls_len: Positions of one class prompt.
        image_len: Positions of one image prompt.
        prompt_drop: Dropout rate of the prompts.
        role_only: Leave the matching out: every token takes all prompts of its kind (R-TCPA).
        pixel_prompt: Also add a small convolutional network of the image to the image.
        fused: Use ``scaled_dot_product_attention``; same numbers.
        match_weight: What :meth:`~PromptedVisionTransformer.extra_loss` weighs ``match_loss`` with, as all official
            scripts do.
        random_epochs: Epochs at the beginning in which training chooses prompts at random, likewise; see
            :meth:`~PromptedVisionTransformer.training_phase`.

    Returns:
        ``model``, now with ``match_loss`` and ``random_match``.

    Raises:
        ValueError: If a setting is out of range or the model has prompts already.
        NotImplementedError: For other models, blocks or attentions.
    """
    _check_model(model)
    prefix = model.num_prefix_tokens if model.has_class_token else 0
    for name, value in (("cls_pool", cls_pool), ("cls_topk", cls_topk), ("cls_len", cls_len)) if prefix else ():
        need(value != 0, "at least 1 for a model with a class token", **{name: value})
    settings: dict[str, Any] = {
        "cls_pool": cls_pool,
        "image_pool": image_pool,
        "cls_topk": _topk("cls_topk", cls_topk, cls_pool) if prefix else 0,
        "image_topk": _topk("image_topk", image_topk, image_pool),
        "cls_len": cls_len,
        "image_len": image_len,
        "prompt_drop": prompt_drop,
        "role_only": role_only,
    }
    all_chosen = not prefix and (role_only or settings["image_topk"] == image_pool)
    if pixel_prompt and type(model.patch_embed) is not PatchEmbed:
        raise NotImplementedError(f"pixel_prompt needs PatchEmbed, the model has {type(model.patch_embed).__name__}")
    dd = get_device_dtype(model)
    for block in model.blocks:
        block.tcpa = TCPA(model.embed_dim, prefix, host == "vfpt", **settings, **dd).train(block.training)
        block.__class__ = TCPABlock if type(block) is Block else TCPAResPostBlock
        block.attn.__class__ = PromptedAttention
        # without an unchosen prompt there is nothing to bring back
        block.attn.fused = fused and not all_chosen  # type: ignore[union-attr]
    if pixel_prompt:
        chans = model.in_chans
        model.patch_embed.prompter = nn.Sequential(
            nn.Conv2d(chans, 9, 11, padding=5, **dd), nn.PReLU(**dd), nn.Conv2d(9, chans, 11, padding=5, **dd)
        ).train(model.training)
        model.patch_embed.__class__ = PixelPromptPatchEmbed
    model.__class__ = PromptedVisionTransformer
    out: PromptedVisionTransformer = model  # type: ignore[assignment]
    out.match_weight, out.random_epochs = float(match_weight), int(random_epochs)
    return out


@checked()
def vpt(
    model: VisionTransformer,
    *,
    num_prompts: int = 10,
    deep: bool = True,
    fourier: bool = False,
    prompt_drop: float = 0.1,
) -> PromptedVisionTransformer:
    """Give a vision transformer VPT prompts, in place: the baselines of TCPA.

    Args:
        model: timm's ``VisionTransformer``.
        num_prompts: Prompts ``p``.
        deep: New prompts in every block, else those of the first block pass through all.
        fourier: Prompts pass a Fourier transform before every insertion (VFPT, if deep).
        prompt_drop: Dropout rate of the prompts.

    Returns:
        ``model``.

    Raises:
        ValueError: If a setting is out of range or the model has prompts already.
        NotImplementedError: For other models, blocks or attentions.
    """
    _check_model(model)
    dd = get_device_dtype(model)
    last = len(model.blocks) - 1
    for i, block in enumerate(model.blocks):
        enters, leaves = deep or i == 0, deep or i == last
        if enters or leaves:
            block.vpt = VPT(model.embed_dim, num_prompts, fourier, prompt_drop, **dd) if enters else nn.Identity()
            block.vpt.train(block.training)
            block.leaving = num_prompts if leaves else 0  # type: ignore[assignment]
            block.__class__ = VPTBlock if type(block) is Block else VPTResPostBlock
    model.__class__ = PromptedVisionTransformer if deep else ShallowPromptedVisionTransformer
    return model  # type: ignore[return-value]


PROMPTS: dict[str, Callable[..., PromptedVisionTransformer]] = {
    "tcpa": tcpa,
    "vpt": vpt,
    "vfpt": partial(vpt, fourier=True),
}
"""Kinds of prompts, and what gives them to a vision transformer."""


def has_prompts(model: nn.Module, kind: str | None = None) -> bool:
    """Whether a model has prompts.

    Args:
        model: Any model.
        kind: Of which kind of ``PROMPTS``; None for any.

    Returns:
        Whether it has.
    """
    if not isinstance(model, PromptedVisionTransformer):
        return False
    layers = [m for m in model.modules() if isinstance(m, (TCPA, VPT))]
    found = {"tcpa" if isinstance(m, TCPA) else "vfpt" if m.fourier else "vpt" for m in layers}
    return kind is None or kind in found


def _tuned(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    if not isinstance(model, PromptedVisionTransformer):
        raise ValueError(f"model is a {type(model).__name__} without prompts; call tcpa or vpt first")
    return ((name, p) for name, p in model.named_parameters() if _is_tuned(name))


def tcpa_parameters(model: nn.Module) -> list[nn.Parameter]:
    """Parameters that prompt tuning trains: prompts, keys, pixel prompter and head.

    Args:
        model: Result of :func:`tcpa` or :func:`vpt`.

    Returns:
        The parameters in the order of the model.

    Raises:
        ValueError: If the model has no prompts.
    """
    return [p for _, p in _tuned(model)]


def freeze_backbone(model: nn.Module) -> PromptedVisionTransformer:
    """Leave only :func:`tcpa_parameters` to be trained; ``train()`` keeps everything else in evaluation mode.

    Args:
        model: Result of :func:`tcpa` or :func:`vpt`.

    Returns:
        ``model``.

    Raises:
        ValueError: If the model has no prompts.
    """
    tuned = {id(p) for p in tcpa_parameters(model)}
    for parameter in model.parameters():
        parameter.requires_grad_(id(parameter) in tuned)
    assert isinstance(model, PromptedVisionTransformer)  # checked by tcpa_parameters
    model.frozen = True
    return model.train(model.training)


def tcpa_state_dict(model: nn.Module) -> dict[str, Tensor]:
    """The part of the state dict that prompt tuning trains.

    Args:
        model: Result of :func:`tcpa` or :func:`vpt`.

    Returns:
        Entries of ``model.state_dict()``.

    Raises:
        ValueError: If the model has no prompts.
    """
    wanted = {name for name, _ in _tuned(model)}
    return {k: v for k, v in model.state_dict().items() if k in wanted}


def load_tcpa_state_dict(model: nn.Module, state_dict: dict[str, Tensor]) -> None:
    """Load what :func:`tcpa_state_dict` gave; the backbone stays.

    Args:
        model: Result of :func:`tcpa` or :func:`vpt` with the same settings.
        state_dict: Entries of all tuned parameters.

    Raises:
        ValueError: If the model has no prompts, or entries are missing or unknown.
    """
    wanted = {name for name, _ in _tuned(model)}
    if wanted != state_dict.keys():
        missing, unknown = sorted(wanted - state_dict.keys()), sorted(state_dict.keys() - wanted)
        raise ValueError(f"state_dict does not fit: missing {missing[:3]}, unknown {unknown[:3]}")
    model.load_state_dict(state_dict, strict=False)


def convert_tcpa(state_dict: dict[str, Any]) -> dict[str, Tensor]:
    """Our names for an official state dict of TCPA or VFPT.

    Args:
        state_dict: ``Pool.*``, ``Prompter.*``, ``prompts`` and ``backbone.*``; other names are kept.

    Returns:
        State dict of the model after :func:`tcpa` or :func:`vpt`.
    """
    out = {}
    for key, value in state_dict.items():
        if key == "prompts":
            out.update({f"blocks.{i}.vpt.prompts": v for i, v in enumerate(value)})
        elif key.startswith(("Pool.Pool_cls.", "Pool.Pool_image.")):
            name = key.removeprefix("Pool.Pool_").replace(".", "_")
            out.update({f"blocks.{i}.tcpa.{name}": v for i, v in enumerate(value)})
        else:
            key = key.removeprefix("backbone.")
            out[key.replace("Prompter.Prompter.", "patch_embed.prompter.")] = value
    return out


def checkpoint_filter_fn(state_dict: dict[str, Any], model: VisionTransformer) -> dict[str, Tensor]:
    """Weights of the plain backbone, the official TCPA names, or our own, for ``model``.

    Args:
        state_dict: Checkpoint or state dict.
        model: The model to load; without prompts in the checkpoint, or for another number of channels, the
            model's own stay.

    Returns:
        A state dict for ``model``.
    """
    state_dict = unwrap(state_dict)
    state_dict = vit_filter_fn(convert_tcpa(state_dict), model, adapt_layer_scale=True)
    own = {k: v for k, v in model.state_dict().items() if _is_prompt(k)}
    if not any(_is_prompt(k) for k in state_dict):
        return {**state_dict, **own}
    refit = {k: own[k] for k in own if "prompter" in k and k in state_dict and state_dict[k].shape != own[k].shape}
    return {**state_dict, **refit}


def _is_prompt(name: str) -> bool:
    return ".tcpa." in name or name.startswith("patch_embed.prompter.")
