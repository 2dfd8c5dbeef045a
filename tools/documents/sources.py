"""What the documents are written from: families, golden cases, recorded benchmarks, recipes and pages of a checkout."""

from __future__ import annotations

import csv
import inspect
import json
import re
from collections.abc import Collection
from fnmatch import fnmatchcase
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

from vizoo.backbones.layers.about import About
from vizoo.tools.common import UserError, read_text

PAGES = ("README.md", "docs/**/*.md", "configs/*/README.md")
RECORDED = {"name", "peer", "median_ms", "peer_median_ms", "ratio"}  # columns that make a CSV file a benchmark
CHOICES = ("Deviations", "Our choices")  # begin the paragraphs of a family's docstring that its card quotes
NAMES = "Names"  # begins those about the names of models
# what ran: the first of these in metadata
OFFICIAL = ("constructor", "create_model", "call", "cls", "model", "role", "kind")
ADDRESS = re.compile(r"(?<![\w/])(?:https?://)?(github\.com/[\w./-]*\w)")
LIMIT = re.compile(r"^([A-Z]\w*) = ([\d.e-]+)\b", re.MULTILINE)
CODE = re.compile(r"(?<!`)`(?!`)[^`]+`(?!`)")  # in a line of text
TRAIN = re.compile(r"(?:`|^|^# Command: +)(?:OMP_NUM_THREADS=\d+ )?(vizoo train [^`\n]+)", re.MULTILINE)


class Family(NamedTuple):
    """A family of the zoo.

    Attributes:
        name: Of its file, without suffix.
        about: What the file says of it.
        text: The file's docstring.
    """

    name: str
    about: About
    text: str

    @property
    def sentence(self) -> str:
        """What it is in a few words, without a full stop."""
        return self.text.partition("\n\n")[0].partition(": ")[2].rstrip(".")

    @property
    def names(self) -> list[str]:
        """The paragraphs about the names of its models."""
        return [p for p in self.text.split("\n\n") if p.startswith(NAMES)]

    @property
    def choices(self) -> list[str]:
        """The paragraphs about what is ours.

        Raises:
            UserError: If there is none.
        """
        found = [p for p in self.text.split("\n\n") if p.startswith(CHOICES)]
        if not found:
            words = " or ".join(map(repr, CHOICES))
            raise UserError(f"backbones/{self.name}.py: no paragraph of the docstring begins with {words}")
        return found

    def owns(self, case: str) -> bool:
        """Whether a golden case is of this family."""
        return any(fnmatchcase(case, p) for p in (self.name, f"{self.name}_*", *self.about.golden))


class Golden(NamedTuple):
    """A recorded case.

    Attributes:
        name: Of the file, without suffix.
        official: What ran; empty where the origin says it.
        origin: Where it is from.
        replaced: What stood in for what no longer runs; empty where nothing did.
        shape: Of the input.
        outputs: Names of what is compared.
    """

    name: str
    official: str
    origin: str
    replaced: str
    shape: tuple[int, ...]
    outputs: list[str]


def families() -> list[Family]:
    """All families, ordered by what people call them."""
    import vizoo.backbones

    modules = [m for m in vars(vizoo.backbones).values() if isinstance(m, ModuleType) and hasattr(m, "ABOUT")]
    found = [Family(m.__name__.rpartition(".")[2], m.ABOUT, inspect.cleandoc(m.__doc__ or "")) for m in modules]
    return sorted(found, key=lambda family: family.about.name.lower())


def as_markdown(text: str) -> str:
    """Text of a docstring or of ``About``: code in single backticks, code hosts as links."""
    text = re.sub(r":\w+:`([^`]+)`", r"`\1`", text).replace("``", "`")
    return ADDRESS.sub(lambda m: f"[{m[1]}](https://{m[1]})", text)


def golden_cases(folder: Path, family: Family) -> list[Golden]:
    """The cases of a family, from their metadata."""
    import numpy as np

    found = []
    for path in sorted(folder.glob("*.npz")):
        if not family.owns(path.stem):
            continue
        with np.load(path, allow_pickle=False) as archive:
            meta = json.loads(str(archive["meta"]))
            shape = tuple(int(n) for n in archive["input_shape"])
            outputs = [n for n in archive.files if n not in ("keys", "meta", "input_shape") and "/" not in n]
        origin = [meta["source"], *(f"{key} {meta[key][:7]}" for key in ("commit", "version") if meta.get(key))]
        official = next((str(meta[key]) for key in OFFICIAL if meta.get(key)), "")
        replaced = str(meta.get("shim") or meta.get("shims") or "none")
        found.append(
            Golden(path.stem, official, ", ".join(origin), "" if replaced == "none" else replaced, shape, outputs)
        )
    return found


def tolerances(path: Path) -> dict[str, float]:
    """The numbers in capitals that ``tests/tolerance.py`` sets, by name.

    Raises:
        UserError: If the file cannot be read.
    """
    return {name: float(number) for name, number in LIMIT.findall(read_text(path, "--root"))}


def benchmarks(folder: Path) -> list[tuple[str, dict[str, str]]]:
    """Recorded benchmarks: the family, which begins the file's name, and the row."""
    found = []
    for path in sorted(folder.glob("*.csv")):
        reader = csv.DictReader(path.read_text(encoding="utf-8").splitlines())
        if set(reader.fieldnames or []) >= RECORDED:
            found += [(path.stem.partition("-")[0], row) for row in reader]
    return found


def pages(root: Path) -> list[Path]:
    """The pages of a checkout that may hold generated tables."""
    return sorted(path for pattern in PAGES for path in root.glob(pattern) if path.is_file())


def view(root: Path, family: str) -> tuple[str, str, str] | None:
    """How ``docs/show.md`` shows a family: what is drawn, the command, the picture's caption; None if it does not."""
    page = root / "docs/show.md"
    text = page.read_text(encoding="utf-8") if page.is_file() else ""
    section = next((s for s in text.split("\n## ") if f"(pictures/{family}.jpg)" in s), "")
    found = re.match(r"[^\n]*\n(.*?)\n+```bash\n(.*?)\n```\n+!\[(.*?)\]\(", section, re.DOTALL)
    return (found[1], found[2], found[3]) if found else None


def training_commands(root: Path, family: str, names: Collection[str]) -> dict[Path, list[str]]:
    """The ``vizoo train`` commands of recipes and pages that train a family, each once, by file.

    Args:
        root: The checkout.
        family: Its name; a command that names it uses it, as ``--tune tcpa``.
        names: Its models.
    """
    recipes = sorted((root / "configs/classification").glob("*.yaml"))
    found: dict[Path, list[str]] = {}
    seen = set()
    for path in [*recipes, *(p for p in pages(root) if p.parent != root / "docs/models")]:
        text = CODE.sub(lambda m: m[0].replace("\n", " "), path.read_text(encoding="utf-8").replace("\\\n", ""))
        default = re.search(r"^model: (\w+)", text, re.MULTILINE)
        for command in (" ".join(m[1].split()) for m in TRAIN.finditer(text)):
            model = re.search(r"--model ([\w-]+)", command) or default
            uses = (model and model[1] in names) or re.search(rf"(?<![\w-]){family}\b", command)
            if uses and command not in seen:
                seen.add(command)
                found.setdefault(path, []).append(command)
    return found
