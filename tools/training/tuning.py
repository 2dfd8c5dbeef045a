"""What ``--tune`` makes of a model: prompts, and which parameters are trained."""

from __future__ import annotations

import argparse

from torch import nn

from vizoo.backbones.layers import PROMPTS, freeze_backbone, has_prompts
from vizoo.tools.common import UserError


def tune(model: nn.Module, args: argparse.Namespace) -> None:
    """Freeze what ``--tune`` does not train, and give the model prompts.

    Args:
        model: The model, changed in place.
        args: ``tune``, ``tune_kwargs`` and ``model``.

    Raises:
        UserError: If the model cannot be tuned like this.
    """
    if args.tune_kwargs and args.tune not in PROMPTS:
        raise UserError(f"--tune-kwargs needs --tune {', '.join(PROMPTS)}")
    if args.tune == "linear":
        model.requires_grad_(False)
        classifier = model.get_classifier()  # type: ignore[operator]
        for head in classifier if isinstance(classifier, tuple) else (classifier,):
            head.requires_grad_(True)
    elif args.tune in PROMPTS:
        try:
            if args.tune_kwargs or not has_prompts(model, args.tune):
                PROMPTS[args.tune](model, **args.tune_kwargs)
            freeze_backbone(model)
        except (ValueError, TypeError, NotImplementedError) as e:
            raise UserError(f"--tune {args.tune} with --model {args.model!r}: {e}") from None
