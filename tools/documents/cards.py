"""The card of a family, ``docs/models/<family>.md``: written as a whole from the family, its golden cases and records."""

from __future__ import annotations

import inspect
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
    configs_table,
    gpu_table,
    link,
    listed,
    models_table,
    papers,
    records_table,
)

MOST_NAMES = 8  # outputs of a golden case that are named
IMPORTS = """\
import timm
import torch

import vizoo  # registers the zoo in timm

"""
COLUMNS = """\
Parameters and GMACs (multiply-accumulates of one image at the input size, in units of 1e9) are counted; top-1 is ImageNet-1k
accuracy as published, not verified by us.  Of weights, the tag for `timm.create_model("NAME.TAG", pretrained=True)` is linked
to the file.
"""
TIMED = """\
Each row: both sides in one process, alternating, same weights and input, outputs compared first; medians.  See
[speed]({speed}) for what each other side is.
"""


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
    choices = "\n\n".join(as_markdown(p) for p in family.choices)
    sections = {
        "Use": _use(family, models),
        "Models": f"{models_table(models, with_weights=True)}\n{COLUMNS}",
        "Papers and code": _origin(family, root, page),
        "What is exact, and how it was checked": _checked(family, root, models),
        "Our choices": f"{choices}\n",
        "Recipes": _recipes(family, root, page, models),
        "Measured cost": _cost(family, root, page, models),
        "Limits": "".join(f"- {as_markdown(limit)}\n" for limit in family.about.limits),
    }
    source = f"backbones/{family.name}.py"
    head = [f"<!-- Written by python -m vizoo.tools.table from {source} and recorded data: change those. -->\n"]
    head += [f"# {family.about.name}\n", f"{family.sentence[0].upper()}{family.sentence[1:]}.\n"]
    return "\n".join([*head, _picture(family, root), *(f"## {k}\n\n{text}" for k, text in sections.items() if text)])


def _picture(family: Family, root: Path) -> str:
    shown = view(root, family.name)
    if shown is None:
        return ""
    text, command, caption = shown
    picture = f"![{caption}](../pictures/{family.name}.jpg)"
    return f"{picture}\n\nThe picture is that of untrained weights.  {text}\n\n```bash\n{command}\n```\n"


def _use(family: Family, models: Sequence[Any]) -> str:
    cheapest = min(models, key=lambda e: e.macs)
    size = ", ".join(map(str, cheapest.size))
    lines = [
        f'model = timm.create_model("{cheapest.name}").eval()  # weights: pretrained=True' * bool(cheapest.weights)
        or f'model = timm.create_model("{cheapest.name}").eval()',
        f"image = torch.randn(1, 3, {size})",
        "print(model(image).shape)",
    ]
    if "segmentation" in cheapest.tasks:
        lines += [
            f'features = timm.create_model("{cheapest.name}", features_only=True).eval()',
            "print([tuple(level.shape) for level in features(image)])",
        ]
    code = IMPORTS + "\n".join(lines) + "\n"
    example = inspect.cleandoc(family.about.example)
    return f"```python\n{code}```\n" + (f"\n```python\n{example}\n```\n" if example else "")


def _origin(family: Family, root: Path, page: Path) -> str:
    lines = [f"- {reference}." for reference in papers(family.about)]
    origin = as_markdown(family.about.origin)
    lines.append(f"- {origin[0].upper()}{origin[1:]}" if not origin.startswith("github") else f"- Code: {origin}")
    source = link(root / f"backbones/{family.name}.py", page)
    return "\n".join([*lines, f"- Ours: [backbones/{family.name}.py]({source})."]) + "\n"


def _checked(family: Family, root: Path, models: Sequence[Any]) -> str:
    cases = golden_cases(root / "tests/golden", family)
    parts = []
    built = [f"`{e.name}`" for e in models if e.source == "reconstruction"]
    if built:
        which = "All models are" if len(built) == len(models) else f"{', '.join(built)} are"
        parts.append(f"{which} reconstructions: no official output exists that they could be compared with.")
    if cases:
        parts += [_limit(root), _cases_table(cases)]
    if family.about.checked:
        parts.append(as_markdown(family.about.checked))
    return "\n\n".join(part.strip() for part in parts) + "\n" if parts else "Nothing is recorded.\n"


def _limit(root: Path) -> str:
    bounds = tolerances(root / "tests/tolerance.py")
    return (
        "These outputs are recorded for known weights and inputs, and the tests reproduce them to a relative error of "
        f"{bounds['GOLDEN']:.0e} (norm of the difference over norm of the record) in float32, {bounds['GOLDEN_FLOAT64']:.0e} "
        "where both sides ran in float64:"
    )


def _cases_table(cases: Sequence[Golden]) -> str:
    rows = []
    for case in cases:
        outputs = ", ".join(case.outputs) if len(case.outputs) <= MOST_NAMES else f"{len(case.outputs)} arrays"
        rows.append([f"`{case.name}`", case.official, "x".join(map(str, case.shape)).strip("0"), outputs])
    lines = [markdown(["case", "what ran", "input", "recorded"], rows)]
    lines += [f"Recorded from {as_markdown(origin)}." for origin in dict.fromkeys(c.origin for c in cases)]
    lines += [f"Replaced to run it: {text}." for text in dict.fromkeys(c.replaced for c in cases) if text]
    return "\n\n".join(line.strip() for line in lines)


def _recipes(family: Family, root: Path, page: Path, models: Sequence[Any]) -> str:
    names = {e.name.partition(".")[0] for e in models}
    parts = []
    for path, command in training_commands(root, family.name, sorted(names)):
        name = path.relative_to(root).as_posix()
        reason = f"<!-- not run: trains; {name} has it -->"
        parts.append(f"From [{name}]({link(path, page)}):\n\n{reason}\n```bash\n{command}\n```")
    for task in ("detection", "segmentation"):
        folder = root / "configs" / task
        if table := configs_table(folder, page, names):
            parts.append(f"{task.capitalize()} ([how to run them]({link(folder / 'README.md', page)})):\n\n{table}")
    return "\n\n".join(part.strip() for part in parts) + "\n" if parts else ""


def _cost(family: Family, root: Path, page: Path, models: Sequence[Any]) -> str:
    results = root / "tools/results"
    parts = []
    if rows := [row for name, row in benchmarks(results) if name == family.name]:
        parts.append(f"{records_table(rows)}\n{TIMED.format(speed=link(root / 'docs/speed.md', page))}")
    on_gpu = gpu_table(results, {e.name for e in models})
    if on_gpu != NOT_MEASURED:
        parts.append(f"On a GPU:\n\n{on_gpu}")
    return "\n".join(parts) or NOT_MEASURED
