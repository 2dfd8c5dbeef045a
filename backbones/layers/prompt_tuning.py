"""Prompt tuning of frozen vision transformers: TCPA, and VPT and VFPT as baselines.

TCPA: "Token Coordinated Prompt Attention is Needed for Visual Prompting", Z. Liu, X. Zou, G. Hua, J. Zhou, ICML 2025,
https://arxiv.org/abs/2505.02406.  Official code, without licence: github.com/zhoujiahuan1991/ICML2025-TCPA.  VPT:
"Visual Prompt Tuning", M. Jia et al., ECCV 2022, https://arxiv.org/abs/2203.12119.  VFPT: "Visual Fourier Prompt
Tuning", R. Zeng et al., NeurIPS 2024, https://arxiv.org/abs/2411.01327.

TCPA's prompts are keys and values only, fresh in every block: see :mod:`vizoo.backbones.ops.prompt_attention`.
"""

import contextlib
from collections.abc import Iterator
from types import FunctionType
from typing import TYPE_CHECKING, Any, Final, List, Optional, Tuple, Union  # noqa: UP035 - TorchScript

import torch
import torch.nn.functional as F
from timm.layers import Attention, PatchEmbed, get_device_dtype, is_exporting, register_notrace_module
from timm.models._features import feature_take_indices
from timm.models.vision_transformer import Block, ResPostBlock, VisionTransformer
from timm.models.vision_transformer import checkpoint_filter_fn as vit_filter_fn
from torch import Tensor, nn

from ..ops.prompt_attention import prompt_attention, reference_prompt_attention
from ..ops.prompt_match import Pool, kernel_takes, prompt_match
from .checks import NATURAL, checked, need

__all__ = [
    "convert_tcpa",
    "freeze_backbone",
    "load_tcpa_state_dict",
    "prompt_attention",
    "reference_prompt_attention",
    "tcpa",
    "tcpa_parameters",
    "tcpa_state_dict",
    "vpt",
]

TOPK = 10  # the paper's number of prompts for each token
POOLS = ("token", "avg", "max", "avgmax", "map", "prr", "")  # of timm's VisionTransformer


def fourier_prompts(prompts: Tensor) -> Tensor:
    """Real part of the 2-D Fourier transform of ``[..., P, D]``, in at least float32 (VFPT)."""
    wide = prompts.to(torch.promote_types(prompts.dtype, torch.float32))
    return torch.real(torch.fft.fft2(wide)).to(prompts.dtype)


def _full_precision(x: Tensor) -> contextlib.AbstractContextManager[Any]:
    kind = x.device.type
    return torch.autocast(kind, enabled=False) if torch.amp.is_autocast_available(kind) else contextlib.nullcontext()


class _Memory:
    """What a forward pass leaves behind: neither copied nor saved with the model."""

    def __init__(self) -> None:
        self.match_loss: Tensor | None = None

    def __reduce__(self) -> tuple[type, tuple[()]]:
        return _Memory, ()


class TCPA(nn.Module):
    """The prompts of one block and the choice among them (paper section 3).

    Args:
        dim: Channels ``D``.
        num_prefix: Tokens that read the class prompts; 0 for no class prompts.
        fourier: Whether the prompts pass a Fourier transform (VFPT).
        cls_pool: Class prompts ``n_c``.
        image_pool: Image prompts ``n_i``.
        cls_topk: Class prompts for each prefix token.
        image_topk: Image prompts for each patch token.
        cls_len: Positions of one class prompt.
        image_len: Positions of one image prompt.
        prompt_drop: Dropout rate of the prompts.
        role_only: Whether every token takes all prompts of its kind.
        device: Device of the parameters.
        dtype: Dtype of the parameters.
    """

    cls_keys: Optional[Tensor]  # noqa: UP045 - TorchScript
    cls_prompts: Optional[Tensor]  # noqa: UP045 - TorchScript

    def __init__(
        self,
        dim: int,
        num_prefix: int,
        fourier: bool,
        cls_pool: int,
        image_pool: int,
        cls_topk: int,
        image_topk: int,
        cls_len: int,
        image_len: int,
        prompt_drop: float,
        role_only: bool,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        self.num_prefix, self.fourier, self.role_only = num_prefix, fourier, role_only
        self.cls_topk, self.image_topk, self.prompt_drop = cls_topk, image_topk, prompt_drop
        self.random_match = False
        if num_prefix:
            self.cls_keys = nn.Parameter(torch.empty(cls_pool, dim, **dd))
            self.cls_prompts = nn.Parameter(torch.empty(cls_pool, cls_len, dim, **dd))
        else:
            self.register_parameter("cls_keys", None)
            self.register_parameter("cls_prompts", None)
        self.image_keys = nn.Parameter(torch.empty(image_pool, dim, **dd))
        self.image_prompts = nn.Parameter(torch.empty(image_pool, image_len, dim, **dd))
        self.memory = _Memory()
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw prompts and keys uniformly from -1 to 1, as the official code does."""
        for parameter in self.parameters():
            nn.init.uniform_(parameter, -1.0, 1.0)

    def prompts(self, batch: int) -> Tensor:
        """The prompts of a pass: class prompts, then image prompts.

        Args:
            batch: Images, each of which draws its own dropout mask.

        Returns:
            ``[batch, P, D]`` where dropout acts, else ``[1, P, D]``.
        """
        out: Tensor = self.image_prompts.flatten(0, 1)
        keys: Tensor = self.image_keys
        cls_prompts, cls_keys = self.cls_prompts, self.cls_keys
        if cls_prompts is not None and cls_keys is not None:
            out, keys = torch.cat([cls_prompts.flatten(0, 1), out]), torch.cat([cls_keys, keys])
        # keys learn from the matching loss: the logits give them a gradient of 0; traces have one graph for both modes
        recorded = torch.is_grad_enabled() or torch.jit.is_tracing()
        out = out + 0.0 * keys.sum() if recorded else out.detach()
        out = out.unsqueeze(0)
        if self.training and self.prompt_drop > 0.0:
            out = F.dropout(out.expand(batch, -1, -1), self.prompt_drop)
        return fourier_prompts(out) if self.fourier else out

    def nearest(self, x: Tensor, keys: Tensor, topk: int) -> Tuple[Tensor, Tensor]:  # noqa: UP006 - TorchScript
        """Choose the prompts whose keys are nearest to each token by cosine.

        Args:
            x: Tokens ``[B, T, D]``.
            keys: Keys ``[n, D]``.
            topk: Prompts for each token.

        Returns:
            Choice ``[B, T, n]``, 1 for a chosen prompt, and the mean of ``1 - cosine`` over the chosen.
        """
        wide = torch.promote_types(x.dtype, torch.float32)
        x = x.to(wide)
        cosine = x @ F.normalize(keys.to(wide), dim=-1).t() / x.norm(2.0, -1, keepdim=True).clamp_min(1e-12)
        if self.training and self.random_match:
            index = torch.rand_like(cosine).argsort(-1)[..., :topk]
            value = cosine.gather(-1, index)
        else:
            value, index = cosine.topk(topk, dim=-1)
        return torch.zeros_like(cosine).scatter(-1, index, 1.0), 1.0 - value.mean()

    def _matched(self, x: Tensor) -> tuple[Tensor, Tensor] | None:
        """:meth:`choose` by a kernel; None where that does not take the call."""
        pools = [Pool(self.image_keys, self.image_topk, self.image_prompts.shape[1])]
        if self.cls_keys is not None and self.cls_prompts is not None:
            pools.insert(0, Pool(self.cls_keys, self.cls_topk, self.cls_prompts.shape[1]))
        by_rule = self.role_only or (self.training and self.random_match)
        return (
            None if by_rule or not kernel_takes(x, self.num_prefix, pools) else prompt_match(x, self.num_prefix, pools)
        )

    def choose(self, x: Tensor) -> Tuple[Tensor, Tensor]:  # noqa: UP006 - TorchScript
        """Which prompts each token takes (R-TCPA by role, T-TCPA by key).

        Args:
            x: Input of the block ``[B, N, D]``, prefix tokens first.

        Returns:
            ``[B, N, P]``, True where taken, and the matching loss of the block, 0 by role only.
        """
        if not torch.jit.is_scripting():
            found = self._matched(x)
            if found is not None:
                return found
        prefix, patches = x[:, : self.num_prefix], x[:, self.num_prefix :]
        loss = torch.zeros([], device=x.device)
        if self.role_only:
            image = torch.ones(patches.shape[0], patches.shape[1], self.image_keys.shape[0], device=x.device)
        else:
            image, loss = self.nearest(patches, self.image_keys, self.image_topk)
        image = image.repeat_interleave(self.image_prompts.shape[1], -1)
        keys, prompts = self.cls_keys, self.cls_prompts
        if keys is None or prompts is None:
            return image > 0, loss
        if self.role_only:
            cls = torch.ones(prefix.shape[0], prefix.shape[1], keys.shape[0], device=x.device)
        else:
            cls, distance = self.nearest(prefix, keys, self.cls_topk)
            loss = loss + distance
        cls = cls.repeat_interleave(prompts.shape[1], -1)
        return torch.cat([F.pad(cls, [0, image.shape[2]]), F.pad(image, [cls.shape[2], 0])], 1) > 0, loss

    def forward(self, x: Tensor) -> Tuple[Tensor, Tensor, Tensor]:  # noqa: UP006 - TorchScript
        """:meth:`prompts`, and :meth:`choose` in at least float32.

        Args:
            x: Input of the block ``[B, N, D]``, prefix tokens first.

        Returns:
            Prompts ``[B or 1, P, D]``, choice ``[B, N, P]`` and matching loss.
        """
        prompts = self.prompts(x.shape[0])
        if torch.jit.is_scripting():
            chosen, loss = self.choose(x)
            return prompts, chosen, loss
        with _full_precision(x):
            chosen, loss = self.choose(x)
        if not is_exporting():
            self.memory.match_loss = None if self.role_only else loss
        return prompts, chosen, loss


class PromptedAttention(Attention):
    """timm's ``Attention`` whose tokens also read prompts; its constructor is not used."""

    fused: Final[bool]  # type: ignore[misc]

    def forward(self, x: Tensor, prompts: Tensor, chosen: Tensor) -> Tensor:  # type: ignore[override]
        """Attention to tokens and chosen prompts.

        Args:
            x: Tokens ``[B, N, D]``.
            prompts: Prompts ``[B or 1, P, D]``, normed as the tokens are.
            chosen: ``[B, N, P]``, True where a token keeps a prompt.

        Returns:
            ``[B, N, D]``.
        """
        batch, n, _ = x.shape
        q, k, v = self.qkv(x).reshape(batch, n, 3, self.num_heads, self.head_dim).permute(2, 0, 3, 1, 4).unbind(0)
        own = self.qkv(prompts).reshape(prompts.shape[0], prompts.shape[1], 3, self.num_heads, self.head_dim)
        _, k_prompt, v_prompt = own.permute(2, 0, 3, 1, 4).unbind(0)
        q, k, k_prompt = self.q_norm(q), self.k_norm(k), self.k_norm(k_prompt)
        drop = self.attn_drop.p if self.training else 0.0
        if self.fused:
            out = prompt_attention(q, k, v, k_prompt, v_prompt, chosen, self.scale, drop)
        else:
            out = reference_prompt_attention(q, k, v, k_prompt, v_prompt, chosen, self.scale, drop)
        out = self.norm(out.transpose(1, 2).reshape(batch, n, self.attn_dim))
        if self.gate is not None:
            out = out * self.gate(x).sigmoid()
        return self.proj_drop(self.proj(out))


class _TCPABlock(nn.Module):
    """Attention of a block with prompts; mixed into timm's blocks."""

    if TYPE_CHECKING:  # TorchScript takes annotations of modules for interfaces
        norm1: nn.Module
        attn: Any
        tcpa: TCPA

    def inputs(self, x: Tensor) -> Tensor:
        """What attention reads of tokens or prompts ``[B, N, D]``."""
        return self.norm1(x)

    def attend(self, x: Tensor) -> Tensor:
        """Attention to tokens and chosen prompts, ``[B, N, D]`` to ``[B, N, D]``."""
        prompts, chosen, _ = self.tcpa(x)
        return self.attn(self.inputs(x), self.inputs(prompts), chosen)


def _no_mask(attn_mask: Optional[Tensor], is_causal: bool) -> None:  # noqa: UP045 - TorchScript
    if attn_mask is not None or is_causal:
        raise NotImplementedError("prompted blocks take neither attn_mask nor is_causal")


@register_notrace_module
class TCPABlock(_TCPABlock, Block):
    """timm's ``Block`` with prompts."""

    def forward(self, x: Tensor, attn_mask: Optional[Tensor] = None, is_causal: bool = False) -> Tensor:  # noqa: UP045
        """``[B, N, D]`` to ``[B, N, D]``."""
        _no_mask(attn_mask, is_causal)
        x = x + self.drop_path1(self.ls1(self.attend(x)))
        return x + self.drop_path2(self.ls2(self.mlp(self.norm2(x))))


@register_notrace_module
class TCPAResPostBlock(_TCPABlock, ResPostBlock):
    """timm's ``ResPostBlock`` with prompts."""

    def inputs(self, x: Tensor) -> Tensor:
        """Attention reads tokens and prompts as they are."""
        return x

    def forward(self, x: Tensor, attn_mask: Optional[Tensor] = None, is_causal: bool = False) -> Tensor:  # noqa: UP045
        """``[B, N, D]`` to ``[B, N, D]``."""
        _no_mask(attn_mask, is_causal)
        x = x + self.drop_path1(self.norm1(self.attend(x)))
        return x + self.drop_path2(self.norm2(self.mlp(x)))


class VPT(nn.Module):
    """Prompts appended to the tokens.

    Args:
        dim: Channels ``D``.
        num_prompts: Prompts ``p``.
        fourier: Whether the prompts pass a Fourier transform (VFPT).
        prompt_drop: Dropout rate of the prompts.
        device: Device of the parameters.
        dtype: Dtype of the parameters.
    """

    def __init__(
        self,
        dim: int,
        num_prompts: int,
        fourier: bool,
        prompt_drop: float,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        self.fourier, self.prompt_drop = fourier, prompt_drop
        self.prompts = nn.Parameter(torch.empty(num_prompts, dim, device=device, dtype=dtype))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw the prompts uniformly from -1 to 1, as TCPA's code does for its hosts."""
        nn.init.uniform_(self.prompts, -1.0, 1.0)

    def forward(self, x: Tensor) -> Tensor:
        """``[B, N, D]`` to ``[B, N + p, D]``; places do not matter, as keys carry no position."""
        out = self.prompts.expand(x.shape[0], -1, -1)
        out = F.dropout(out, self.prompt_drop, self.training)
        if not self.fourier:
            return torch.cat([x, out], 1)
        if torch.jit.is_scripting():
            return torch.cat([x, fourier_prompts(out)], 1)
        with _full_precision(x):
            out = fourier_prompts(out)
        return torch.cat([x, out], 1)


def _alias(method: Any, name: str) -> Any:
    """A parent's method under another name: TorchScript knows no ``super()``."""
    out = FunctionType(method.__code__, method.__globals__, name, method.__defaults__, method.__closure__)
    out.__annotations__ = method.__annotations__
    return out


class _VPTBlock(nn.Module):
    """A block that takes prompts in, or lets them out; mixed into timm's blocks."""

    if TYPE_CHECKING:
        vpt: nn.Module
        leaving: int

    def forward(self, x: Tensor, attn_mask: Optional[Tensor] = None, is_causal: bool = False) -> Tensor:  # noqa: UP045
        """``[B, N, D]`` to ``[B, N, D]``, with prompts in the sequence before and after where VPT is shallow."""
        _no_mask(attn_mask, is_causal)
        x = self.block(self.vpt(x))  # type: ignore[operator]
        return x[:, : x.shape[1] - self.leaving]


@register_notrace_module
class VPTBlock(_VPTBlock, Block):
    """timm's ``Block`` with VPT."""

    block = _alias(Block.forward, "block")


@register_notrace_module
class VPTResPostBlock(_VPTBlock, ResPostBlock):
    """timm's ``ResPostBlock`` with VPT."""

    block = _alias(ResPostBlock.forward, "block")


class PixelPromptPatchEmbed(PatchEmbed):
    """Patch embedding of the image plus a learnt function of it (the official "IPrompt")."""

    embed = _alias(PatchEmbed.forward, "embed")

    def forward(self, x: Tensor) -> Tensor:
        """Images ``[B, C, H, W]`` to what the plain embedding returns."""
        return self.embed(x + self.prompter(x))  # type: ignore[operator]


class PromptedVisionTransformer(VisionTransformer):
    """timm's ``VisionTransformer`` after :func:`tcpa` or :func:`vpt`; its constructor is not used."""

    __jit_unused_properties__ = ["match_loss", "random_match"]  # noqa: RUF012 - TorchScript's own name
    frozen = False  # set by freeze_backbone

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


@checked(cls_pool=NATURAL, cls_topk=NATURAL, cls_len=NATURAL, host=("vfpt", "vpt"))
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
    return model  # type: ignore[return-value]


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
    for container in ("state_dict", "model"):
        if isinstance(state_dict.get(container), dict):
            state_dict = state_dict[container]
    state_dict = vit_filter_fn(convert_tcpa(state_dict), model, adapt_layer_scale=True)
    own = {k: v for k, v in model.state_dict().items() if _is_prompt(k)}
    if not any(_is_prompt(k) for k in state_dict):
        return {**state_dict, **own}
    refit = {k: own[k] for k in own if "prompter" in k and k in state_dict and state_dict[k].shape != own[k].shape}
    return {**state_dict, **refit}


def _is_prompt(name: str) -> bool:
    return ".tcpa." in name or name.startswith("patch_embed.prompter.")
