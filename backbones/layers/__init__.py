"""Modules for other networks, which users put into models of their own, and what the families share.

``HiLo``, ``NeighborhoodAttention``, ``HaloAttention``, ``FlowAttention``, ``FlowCrossAttention``,
``ReversedAttention``, ``AggregatedAttention`` and ``LengthScaledAttention`` take the place of another attention,
``ULSAM`` and ``ContMixBlock`` that of a block; ``MixtureOfHeads`` weighs the heads of one; ``add_ulsam``, ``moh``,
``swap_halo``, ``tcpa`` and ``vpt`` change a whole model.
"""

from .aggregated_attention import AggregatedAttention, LengthScaledAttention
from .contmix import ContMixBlock
from .dependency import Dependency, Tree, dependency_tree, saliency, subtrees
from .features import FeatureGetter
from .flow_attention import FlowAttention, FlowCrossAttention
from .halo import HaloAttention, swap_halo
from .hilo import HiLo
from .layout import to_fast_layout
from .mixture_of_heads import MixtureOfHeads, load_balance, moh
from .neighborhood import NeighborhoodAttention
from .panel import Panel
from .place_code import PlaceCode, step_code
from .prompt_tuning import (
    PROMPTS,
    convert_tcpa,
    freeze_backbone,
    has_prompts,
    load_tcpa_state_dict,
    tcpa,
    tcpa_parameters,
    tcpa_state_dict,
    vpt,
)
from .reversed_attention import ReversedAttention
from .ulsam import ULSAM, add_ulsam

__all__ = [
    "PROMPTS",
    "ULSAM",
    "AggregatedAttention",
    "ContMixBlock",
    "Dependency",
    "FeatureGetter",
    "FlowAttention",
    "FlowCrossAttention",
    "HaloAttention",
    "HiLo",
    "LengthScaledAttention",
    "MixtureOfHeads",
    "NeighborhoodAttention",
    "Panel",
    "PlaceCode",
    "ReversedAttention",
    "Tree",
    "add_ulsam",
    "convert_tcpa",
    "dependency_tree",
    "freeze_backbone",
    "has_prompts",
    "load_balance",
    "load_tcpa_state_dict",
    "moh",
    "saliency",
    "step_code",
    "subtrees",
    "swap_halo",
    "tcpa",
    "tcpa_parameters",
    "tcpa_state_dict",
    "to_fast_layout",
    "vpt",
]
