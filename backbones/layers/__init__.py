"""Modules shared by several families."""

from .contmix import ContMixBlock
from .features import FeatureGetter
from .halo import HaloAttention, swap_halo
from .hilo import HiLo
from .layout import to_fast_layout
from .prompt_tuning import (
    convert_tcpa,
    freeze_backbone,
    load_tcpa_state_dict,
    prompt_attention,
    reference_prompt_attention,
    tcpa,
    tcpa_parameters,
    tcpa_state_dict,
    vpt,
)
from .ulsam import ULSAM, add_ulsam

__all__ = [
    "ULSAM",
    "ContMixBlock",
    "FeatureGetter",
    "HaloAttention",
    "HiLo",
    "add_ulsam",
    "convert_tcpa",
    "freeze_backbone",
    "load_tcpa_state_dict",
    "prompt_attention",
    "reference_prompt_attention",
    "swap_halo",
    "tcpa",
    "tcpa_parameters",
    "tcpa_state_dict",
    "to_fast_layout",
    "vpt",
]
