"""Attention to prompts that every token chooses for itself (TCPA), and timm's blocks with it.

"Token Coordinated Prompt Attention is Needed for Visual Prompting", Z. Liu, X. Zou, G. Hua, J. Zhou, ICML 2025,
https://arxiv.org/abs/2505.02406.  The Fourier transform of prompts: "Visual Fourier Prompt Tuning", R. Zeng et al.,
NeurIPS 2024, https://arxiv.org/abs/2411.01327.

The prompts are keys and values only, fresh in every block: see :mod:`vizoo.backbones.ops.prompt_attention`.
"""

import contextlib
from typing import TYPE_CHECKING, Any, Final, Optional, Tuple  # noqa: UP035 - TorchScript

import torch
import torch.nn.functional as F
from timm.layers import Attention, is_exporting, register_notrace_module
from timm.models.vision_transformer import Block, ResPostBlock
from torch import Tensor, nn

from ..ops.prompt_attention import prompt_attention, reference_prompt_attention
from ..ops.prompt_match import Pool, kernel_takes, prompt_match

__all__ = [
    "TCPA",
    "PromptedAttention",
    "TCPABlock",
    "TCPAResPostBlock",
    "fourier_prompts",
    "full_precision",
    "refuse_masks",
]


def fourier_prompts(prompts: Tensor) -> Tensor:
    """Real part of the 2-D Fourier transform of ``[..., P, D]``, in at least float32 (VFPT)."""
    wide = prompts.to(torch.promote_types(prompts.dtype, torch.float32))
    return torch.real(torch.fft.fft2(wide)).to(prompts.dtype)


def full_precision(x: Tensor) -> contextlib.AbstractContextManager[Any]:
    """Context without autocast on the device of ``x``."""
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

    def cosines(self, x: Tensor, keys: Tensor) -> Tensor:
        """Cosines ``[B, T, n]`` of tokens ``[B, T, D]`` and keys ``[n, D]``, in at least float32."""
        wide = torch.promote_types(x.dtype, torch.float32)
        x = x.to(wide)
        return x @ F.normalize(keys.to(wide), dim=-1).t() / x.norm(2.0, -1, keepdim=True).clamp_min(1e-12)

    def nearest(self, x: Tensor, keys: Tensor, topk: int) -> Tuple[Tensor, Tensor]:  # noqa: UP006 - TorchScript
        """Choose the prompts whose keys are nearest to each token by cosine.

        Args:
            x: Tokens ``[B, T, D]``.
            keys: Keys ``[n, D]``.
            topk: Prompts for each token.

        Returns:
            Choice ``[B, T, n]``, 1 for a chosen prompt, and the mean of ``1 - cosine`` over the chosen.
        """
        cosine = self.cosines(x, keys)
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
        with full_precision(x):
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


def refuse_masks(attn_mask: Optional[Tensor], is_causal: bool) -> None:  # noqa: UP045 - TorchScript
    """Refuse the masks that timm's blocks take."""
    if attn_mask is not None or is_causal:
        raise NotImplementedError("prompted blocks take neither attn_mask nor is_causal")


@register_notrace_module
class TCPABlock(_TCPABlock, Block):
    """timm's ``Block`` with prompts."""

    def forward(self, x: Tensor, attn_mask: Optional[Tensor] = None, is_causal: bool = False) -> Tensor:  # noqa: UP045
        """``[B, N, D]`` to ``[B, N, D]``."""
        refuse_masks(attn_mask, is_causal)
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
        refuse_masks(attn_mask, is_causal)
        x = x + self.drop_path1(self.norm1(self.attend(x)))
        return x + self.drop_path2(self.norm2(self.mlp(x)))
