"""The card of a family, ``docs/models/<family>.md``, written as a whole from the family's file and recorded data."""

from __future__ import annotations

import inspect
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from vizoo.tools.common import markdown
from vizoo.tools.documents.sources import (
    Family,
    Golden,
    as_markdown,
    benchmarks,
    golden_cases,
    tolerances,
    training_commands,
    view,
)
from vizoo.tools.documents.tables import (
    NOT_MEASURED,
    WHOLE_WORDS,
    by_cost,
    configs_table,
    gpu_table,
    link,
    listed,
    models_table,
    papers,
    records_table,
)

MOST_NAMES = 10  # outputs of a golden case that are named
IMPORTS = """\
import timm
import torch

import vizoo  # registers the zoo in timm

"""
COLUMNS = """\
Parameters and GMACs (multiply-accumulates of one image at the input size, in units of 1e9) are counted; top-1 is
ImageNet-1k accuracy as published, not verified by us.  The tag of weights, for
`timm.create_model("NAME.TAG", pretrained=True)`, leads to the file."""
TIMED = """\
Each row: both sides in one process, alternating, same weights and input, outputs compared first; medians.
[Speed]({speed}) says what each other side is."""


def card_path(root: Path, family: Family) -> Path:
    """The file of a family's card."""
    return root / f"docs/models/{family.name}.md"


def card(family: Family, root: Path, zoo: Sequence[Any]) -> str:
    """The card of a family.

    Args:
        family: The family.
        root: The checkout, whose files are read.
        zoo: Rows of the table of models.

    Returns:
        The whole page.

    Raises:
        UserError: If the family's docstring, a record or a config is not of the form of its siblings.
    """
    page, models = card_path(root, family), [e for e in listed(zoo) if e.family == family.name]
    sections = {
        "Use": _use(family, models),
        "Models": _models(family, models),
        "Papers and code": _origin(family, root, page),
        "What is exact, and how it was checked": _checked(family, root, models),
        "What is ours": [as_markdown(paragraph) for paragraph in family.choices],
        "Recipes": _recipes(family, root, page, models),
        "Measured cost": _cost(family, root, page, models),
        "Limits": ["\n".join(_filled(f"- {limit}", "  ") for limit in family.about.limits)],
    }
    source = f"backbones/{family.name}.py"
    parts = [f"<!-- Written by python -m vizoo.tools.table from {source} and recorded data: change those. -->"]
    parts += [f"# {family.about.name}", f"{family.sentence[0].upper()}{family.sentence[1:]}.", *_picture(family, root)]
    for title, texts in sections.items():
        if any(texts):
            parts += [f"## {title}", *texts]
    return "\n\n".join(part.strip("\n") for part in parts) + "\n"


def _filled(text: str, indent: str = "") -> str:
    return textwrap.fill(as_markdown(text), 120, subsequent_indent=indent, **WHOLE_WORDS)


def _picture(family: Family, root: Path) -> list[str]:
    shown = view(root, family.name)
    if shown is None:
        return []
    text, command, caption = shown
    picture = f"![{caption}](../pictures/{family.name}.jpg)"
    return [picture, _filled(f"{text}  The weights are untrained."), f"```bash\n{command}\n```"]


def _use(family: Family, models: Sequence[Any]) -> list[str]:
    cheapest = by_cost(models)[0]
    size = ", ".join(map(str, cheapest.size))
    hint = "  # pretrained=True downloads weights" if cheapest.weights else ""
    lines = [
        f'model = timm.create_model("{cheapest.name}").eval(){hint}',
        f"image = torch.randn(1, 3, {size})",
        "print(model(image).shape)",
    ]
    if "segmentation" in cheapest.tasks:
        lines += [
            f'features = timm.create_model("{cheapest.name}", features_only=True).eval()',
            "print([tuple(level.shape) for level in features(image)])",
        ]
    blocks = [IMPORTS + "\n".join(lines), inspect.cleandoc(family.about.example)]
    return [f"```python\n{block}\n```" for block in blocks if block]


def _models(family: Family, models: Sequence[Any]) -> list[str]:
    about = {e.name: as_markdown(_described(e.name)) for e in models}
    licences = dict.fromkeys(e.licence for e in models if e.licence)
    stated = f"Licence of the models: {', '.join(licences)}." if licences else ""
    names = [as_markdown(paragraph) for paragraph in family.names]
    return [*names, models_table(models, about), COLUMNS, *([stated] if stated else [])]


def _described(name: str) -> str:
    """The first line of a model's docstring."""
    from timm.models import model_entrypoint

    return (model_entrypoint(name.partition(".")[0]).__doc__ or "").partition("\n")[0].rstrip(".")


def _origin(family: Family, root: Path, page: Path) -> list[str]:
    origin = family.about.origin
    source = link(root / f"backbones/{family.name}.py", page)
    lines = [
        *(f"{reference}." for reference in papers(family.about)),
        f"Code: {origin}" if origin.startswith("github") else f"{origin[0].upper()}{origin[1:]}",
        f"Ours: [backbones/{family.name}.py]({source}).",
    ]
    return ["\n".join(_filled(f"- {line}", "  ") for line in lines)]


def _checked(family: Family, root: Path, models: Sequence[Any]) -> list[str]:
    cases = golden_cases(root / "tests/golden", family)
    parts = []
    if built := [f"`{e.name}`" for e in models if e.source == "reconstruction"]:
        which = "All models are" if len(built) == len(models) else f"{', '.join(built)} are"
        parts.append(_filled(f"{which} reconstructions: there is no official output to compare them with."))
    if cases:
        parts += [_filled(_limit(root)), *_recorded(cases)]
    return [*parts, *([_filled(family.about.checked)] if family.about.checked else [])] or ["Nothing is recorded."]


def _limit(root: Path) -> str:
    known = tolerances(root / "tests/tolerance.py")
    single, double = (f"{known[name]:.0e}".replace("e-0", "e-") for name in ("GOLDEN", "GOLDEN_FLOAT64"))
    return (
        "The outputs below are recorded for known weights and inputs, and tests reproduce them to a relative error "
        f"(norm of the difference over norm of the record) of {single} in float32, and {double} where both sides ran "
        "in float64."
    )


def _recorded(cases: Sequence[Golden]) -> list[str]:
    rows = []
    for case in cases:
        outputs = ", ".join(case.outputs) if len(case.outputs) <= MOST_NAMES else f"{len(case.outputs)} arrays"
        shape = "x".join(map(str, case.shape)) if all(case.shape) else ""
        rows.append([f"`{case.name}`", case.official, shape, outputs])
    origins = [f"Recorded from {origin}." for origin in dict.fromkeys(c.origin for c in cases)]
    replaced = [f"What stood in for what no longer runs: {r}." for r in dict.fromkeys(c.replaced for c in cases) if r]
    return [markdown(["case", "what ran", "input", "recorded"], rows), *map(_filled, [*origins, *replaced])]


def _recipes(family: Family, root: Path, page: Path, models: Sequence[Any]) -> list[str]:
    names = {e.name.partition(".")[0] for e in models}
    parts = []
    for path, commands in training_commands(root, family.name, names).items():
        listed_in = f"[{path.relative_to(root).as_posix()}]({link(path, page)})"
        parts += [f"From {listed_in}:", "<!-- not run: trains -->\n```bash\n" + "\n".join(commands) + "\n```"]
    for task in ("detection", "segmentation"):
        folder = root / "configs" / task
        if table := configs_table(folder, page, names):
            parts += [f"{task.capitalize()} ([how to run them]({link(folder / 'README.md', page)})):", table]
    return parts


def _cost(family: Family, root: Path, page: Path, models: Sequence[Any]) -> list[str]:
    results = root / "tools/results"
    parts = []
    if rows := [row for name, row in benchmarks(results) if name == family.name]:
        parts += [records_table(rows), TIMED.format(speed=link(root / "docs/speed.md", page))]
    on_gpu = gpu_table(results, {e.name for e in models})
    if on_gpu != NOT_MEASURED:
        parts += ["On a GPU:", on_gpu]
    return parts or [NOT_MEASURED]
