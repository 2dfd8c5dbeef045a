"""TCPA: vision transformers whose frozen blocks read prompts that every token chooses for itself.

Paper: "Token Coordinated Prompt Attention is Needed for Visual Prompting", Z. Liu, X. Zou, G. Hua, J. Zhou, ICML 2025,
https://arxiv.org/abs/2505.02406.  Official code, without licence or trained prompts:
github.com/zhoujiahuan1991/ICML2025-TCPA.

Names are those of timm's models and ``_tcpa``: the model with its weights, after :func:`tcpa`, whose arguments have the
prefix ``tcpa_`` here.

Prompts start fresh, and so the output of a pretrained backbone changes until they are trained:

    model = timm.create_model("vit_base_patch16_224_tcpa", pretrained=True, num_classes=10)
    freeze_backbone(model)
    optimizer = torch.optim.AdamW(tcpa_parameters(model), lr=0.005, weight_decay=0.1)
    loss = F.cross_entropy(model(x), y) + model.extra_loss()

``model.training_phase(epoch, epochs)`` chooses prompts at random in the first epochs, as the paper does; it and the
weight of the matching loss are the settings ``tcpa_random_epochs`` and ``tcpa_match_weight``.

Our choices, for layers that the transformers of the official code do not have: register tokens choose from the prompts
of the class token; without a class token there are image prompts only; a norm of queries and keys is that of the
prompts' keys too.  Matching and the Fourier transform are computed in float32 in every precision.
"""

import inspect
from dataclasses import replace
from typing import Any

from timm.models import generate_default_cfgs, get_arch_pretrained_cfgs, register_model
from timm.models.vision_transformer import ATTN_LAYERS, VisionTransformer

from .layers import (
    convert_tcpa,
    freeze_backbone,
    load_tcpa_state_dict,
    tcpa,
    tcpa_parameters,
    tcpa_state_dict,
    vpt,
)
from .layers.about import About
from .layers.build import build
from .layers.checks import check_arguments, check_multiple, check_patches, need, scaled
from .layers.prompt_tuning import checkpoint_filter_fn

__all__ = [
    "convert_tcpa",
    "freeze_backbone",
    "load_tcpa_state_dict",
    "tcpa",
    "tcpa_parameters",
    "tcpa_state_dict",
    "vpt",
]

ABOUT = About(
    "TCPA",
    "github.com/zhoujiahuan1991/ICML2025-TCPA, commit dce8b3a, no licence, no trained prompts; backbones and their "
    "weights are those of timm 1.0.31, Apache-2.0.",
    (
        (
            'Z. Liu, X. Zou, G. Hua, J. Zhou, "Token Coordinated Prompt Attention is Needed for Visual Prompting", '
            "ICML 2025",
            "2505.02406",
        ),
    ),
    golden=("vfpt_*",),
    limits=(
        "There are no trained prompts: the output of a pretrained backbone changes until they are trained.  No "
        "accuracy of the paper was repeated.",
        "``tcpa`` takes timm's ``VisionTransformer`` itself, with blocks of the classes ``Block`` and ``ResPostBlock`` "
        "and attention of the class ``Attention``, and no attention masks.",
        "As timm's, a model takes images of one size, ``img_size``, or of any with ``dynamic_img_size=True``.",
    ),
    example="""
        # prompts in any VisionTransformer of timm; only they and the head are trained and stored
        from vizoo.backbones.layers import freeze_backbone, tcpa, tcpa_parameters, tcpa_state_dict

        vit = freeze_backbone(tcpa(timm.create_model("test_vit", num_classes=10)))
        optimizer = torch.optim.AdamW(tcpa_parameters(vit), lr=0.005, weight_decay=0.1)
        loss = vit.train()(torch.randn(2, 3, 160, 160)).logsumexp(1).sum() + vit.extra_loss()
        small = tcpa_state_dict(vit)  # prompts, keys and head
    """,
)

PREFIX = "tcpa_"
SETTINGS = {PREFIX + name for name in list(inspect.signature(tcpa).parameters)[1:]}


DEFAULTS = {name: p.default for name, p in inspect.signature(VisionTransformer).parameters.items()}


def _prompted(**kwargs: Any) -> VisionTransformer:
    settings = {k.removeprefix(PREFIX): kwargs.pop(k) for k in sorted(SETTINGS & kwargs.keys())}
    check_arguments(VisionTransformer, kwargs, attn_layer=tuple(ATTN_LAYERS))
    given = {**DEFAULTS, **kwargs}
    check_multiple(embed_dim=given["embed_dim"], num_heads=given["num_heads"])
    check_patches(given["img_size"], given["patch_size"])
    scaled(given["embed_dim"], mlp_ratio=given["mlp_ratio"])
    pooled = {name: given[name] for name in ("global_pool", "class_token")}
    need(pooled["global_pool"] != "token" or pooled["class_token"], "a class token for token pooling", **pooled)
    try:
        return tcpa(VisionTransformer(**kwargs), **settings)
    except ValueError as e:
        raise ValueError(str(e).replace("got ", f"got {PREFIX}", 1)) from e


def _cfgs(*backbones: str) -> dict[str, Any]:
    """Configurations of timm's backbones under our names; weights without a licence are left out."""
    found: dict[str, Any] = {}
    for backbone in backbones:
        patch = int(backbone.partition("_patch")[2].partition("_")[0])
        for name, cfg in get_arch_pretrained_cfgs(backbone).items():
            if not cfg.license:
                continue
            tag = name.partition(".")[2]
            found[f"{backbone}_tcpa.{tag}"] = replace(cfg, pool_size=tuple(n // patch for n in cfg.input_size[1:]))
    return found


_TEST = {
    "input_size": (3, 96, 96),
    "pool_size": (6, 6),
    "fixed_input_size": True,
    "crop_pct": 0.9,
    "interpolation": "bicubic",
    "mean": (0.5, 0.5, 0.5),
    "std": (0.5, 0.5, 0.5),
    "first_conv": "patch_embed.proj",
    "classifier": "head",
}

default_cfgs = generate_default_cfgs(
    {
        "test_vit_tcpa.untrained": _TEST,
        "test_vit_gap_tcpa.untrained": _TEST,
        **_cfgs(
            "vit_tiny_patch16_224",
            "vit_small_patch16_224",
            "vit_base_patch16_224",
            "vit_large_patch16_224",
            "deit3_small_patch16_224",
            "vit_small_patch14_reg4_dinov2",
        ),
    }
)


def _create_tcpa(variant: str, pretrained: bool = False, **kwargs: Any) -> VisionTransformer:
    taps = kwargs.pop("out_indices", 3)
    return build(_prompted, variant, pretrained, checkpoint_filter_fn, taps=taps, rounds=None, **kwargs)


@register_model
def test_vit_tcpa(pretrained: bool = False, **kwargs: Any) -> VisionTransformer:
    """Tiny transformer with class and register tokens for tests."""
    model_args = {
        "img_size": 96,
        "embed_dim": 64,
        "depth": 3,
        "num_heads": 4,
        "reg_tokens": 1,
        "init_values": 0.1,
        "tcpa_cls_pool": 6,
        "tcpa_image_pool": 5,
        "tcpa_cls_topk": 3,
        "tcpa_image_topk": 2,
        "tcpa_cls_len": 2,
        "tcpa_prompt_drop": 0.0,
    }
    return _create_tcpa("test_vit_tcpa", pretrained, **{**model_args, **kwargs})


@register_model
def test_vit_gap_tcpa(pretrained: bool = False, **kwargs: Any) -> VisionTransformer:
    """Tiny transformer without class token, with pixel prompter, for tests."""
    model_args = {
        "img_size": 96,
        "embed_dim": 64,
        "depth": 3,
        "num_heads": 4,
        "class_token": False,
        "global_pool": "avg",
        "tcpa_host": "vpt",
        "tcpa_image_pool": 5,
        "tcpa_image_topk": 2,
        "tcpa_prompt_drop": 0.0,
        "tcpa_pixel_prompt": True,
    }
    return _create_tcpa("test_vit_gap_tcpa", pretrained, **{**model_args, **kwargs})


@register_model
def vit_tiny_patch16_224_tcpa(pretrained: bool = False, **kwargs: Any) -> VisionTransformer:
    """TCPA on ViT-Ti/16."""
    model_args = {"patch_size": 16, "embed_dim": 192, "depth": 12, "num_heads": 3}
    return _create_tcpa("vit_tiny_patch16_224_tcpa", pretrained, **{**model_args, **kwargs})


@register_model
def vit_small_patch16_224_tcpa(pretrained: bool = False, **kwargs: Any) -> VisionTransformer:
    """TCPA on ViT-S/16."""
    model_args = {"patch_size": 16, "embed_dim": 384, "depth": 12, "num_heads": 6}
    return _create_tcpa("vit_small_patch16_224_tcpa", pretrained, **{**model_args, **kwargs})


@register_model
def vit_base_patch16_224_tcpa(pretrained: bool = False, **kwargs: Any) -> VisionTransformer:
    """TCPA on ViT-B/16, the paper's backbone."""
    model_args = {"patch_size": 16, "embed_dim": 768, "depth": 12, "num_heads": 12}
    return _create_tcpa("vit_base_patch16_224_tcpa", pretrained, **{**model_args, **kwargs})


@register_model
def vit_large_patch16_224_tcpa(pretrained: bool = False, **kwargs: Any) -> VisionTransformer:
    """TCPA on ViT-L/16."""
    model_args = {"patch_size": 16, "embed_dim": 1024, "depth": 24, "num_heads": 16}
    return _create_tcpa("vit_large_patch16_224_tcpa", pretrained, **{**model_args, **kwargs})


@register_model
def deit3_small_patch16_224_tcpa(pretrained: bool = False, **kwargs: Any) -> VisionTransformer:
    """TCPA on DeiT-3-S/16."""
    model_args = {
        "patch_size": 16,
        "embed_dim": 384,
        "depth": 12,
        "num_heads": 6,
        "no_embed_class": True,
        "init_values": 1e-06,
    }
    return _create_tcpa("deit3_small_patch16_224_tcpa", pretrained, **{**model_args, **kwargs})


@register_model
def vit_small_patch14_reg4_dinov2_tcpa(pretrained: bool = False, **kwargs: Any) -> VisionTransformer:
    """TCPA on DINOv2-S/14 with registers."""
    model_args = {
        "patch_size": 14,
        "embed_dim": 384,
        "depth": 12,
        "num_heads": 6,
        "init_values": 1e-05,
        "reg_tokens": 4,
        "no_embed_class": True,
    }
    return _create_tcpa("vit_small_patch14_reg4_dinov2_tcpa", pretrained, **{**model_args, **kwargs})
