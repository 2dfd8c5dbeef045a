"""The generated tables of the pages, as Markdown; :func:`rewrite` puts them between their markers.

A table stands between ``<!-- table: NAME -->`` and ``<!-- end table -->``.
"""

from __future__ import annotations

import ast
import datetime
import os
import re
import textwrap
from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from vizoo.tools.common import UserError, markdown
from vizoo.tools.documents.sources import benchmarks, families
from vizoo.tools.gpu.suite import FIELDS, read_record
from vizoo.tools.profiling.record import Record, read_records

CONFIG_HEAD = re.compile(
    r"(?P<head>.+?) on (?P<backbone>.+?), (?:COCO|ADE20K), (?P<schedule>[\d,]+ \w+)\. "
    r"Paper: .*?arXiv (?P<arxiv>[\d.]+)\. Published: (?P<published>.*?) Parameters: (?P<params>[\d,]+)\."
)
NUMBER = r"(\d+(?:\.\d+)?)"
SCORES = {
    "detection": {"box AP": f"box AP {NUMBER}", "mask AP": f"mask AP {NUMBER}"},
    "segmentation": {"mIoU": f"mIoU {NUMBER}", "multi-scale": rf"{NUMBER} \(multi-scale\)"},
}
WHOLE_WORDS: dict[str, Any] = {"break_long_words": False, "break_on_hyphens": False}
MARKED = re.compile(r"(<!-- table: (\w+) -->\n).*?(<!-- end table -->)", re.DOTALL)
NOT_MEASURED = "Not measured yet.\n"
SPEEDS = 5  # rows of the short table
TIMED_AS = {"device": "cpu", "threads": 1, "amp": False, "channels_last": False, "fused": True}
ONE, EIGHT = (1, "fp32", None), (8, "fp32", None)  # batch, dtype, compilation
GAINS = {"compiled": ("fp32", "default"), "bf16": ("bf16", None), "int8": ("int8", None)}


def listed(zoo: Sequence[Any]) -> list[Any]:
    """The models that users see; of a family without any, those for tests."""
    seen = {e.family for e in zoo if e.source != "for tests"}
    return [e for e in zoo if e.source != "for tests" or e.family not in seen]


def link(target: Path, page: Path) -> str:
    """The address of a file on a page."""
    return os.path.relpath(target, page.parent).replace(os.sep, "/")


def by_cost(models: Sequence[Any]) -> list[Any]:
    """Models from the cheapest to the dearest."""
    return sorted(models, key=lambda e: (e.macs, len(e.name)))


def models_table(models: Sequence[Any], about: Mapping[str, str] | None = None) -> str:
    """Models as a Markdown table; one whose branches can be merged has a row for each form.

    Args:
        models: Rows of the table of models.
        about: What to say of each, by name; adds it and links to weights.
    """
    rows = []
    for e in models:
        forms = [("", e.params, e.macs)]
        if e.merged_params:
            forms = [(", training form", e.params, e.macs), (", merged", e.merged_params, e.merged_macs)]
        weights = ", ".join(f"[{tag}]({url})" for tag, url in e.weights.items())
        for form, params, macs in forms:
            known = [f"{params / 1e6:.2f}", f"{macs / 1e9:.3f}", f"{e.size[0]}x{e.size[1]}", str(e.paper_top1 or "")]
            said, loaded = ([about[e.name]], [weights]) if about else ([], [])
            rows.append([f"`{e.name}`{form}", *said, *known, e.source, *loaded])
            weights = ""  # once for a model
    columns = ["params (M)", "GMACs", "input", "top-1, paper (%)", "source"]
    if about is None:
        return markdown(["model", *columns], rows, (1, 2, 3, 4))
    return markdown(["model", "what it is", *columns, "weights"], rows, (2, 3, 4, 5))


def families_table(zoo: Sequence[Any], cards: Path, page: Path) -> str:
    """One row for each family: models from the cheapest to the dearest, parameters, best accuracy, weights.

    Args:
        zoo: Rows of the table of models.
        cards: Folder of the cards.
        page: Where the table stands.
    """
    rows = []
    for family in families():
        models = [e for e in zoo if e.family == family.name and e.source != "for tests"]
        if not models:
            continue
        ordered = by_cost(models)
        params = [f"{e.params / 1e6:.1f}" for e in sorted(models, key=lambda e: e.params)]
        best = max(models, key=lambda e: e.paper_top1 or 0.0)
        names = f"`{ordered[0].name}` to `{ordered[-1].name}`, {len(models)} models"
        span = (names, f"{params[0]} to {params[-1]}")
        rows.append(
            [
                f"[{family.about.name}]({link(cards / f'{family.name}.md', page)})",
                family.sentence,
                *(span if len(models) > 1 else (f"`{ordered[0].name}`", params[0])),
                f"{best.paper_top1} (`{best.name}`)" if best.paper_top1 else "",
                _weights(models),
            ]
        )
    columns = ["family", "what it is", "models", "params (M)", "best top-1, paper (%)", "weights"]
    return markdown(columns, rows, (3,))


def _weights(models: Sequence[Any]) -> str:
    """Whose weights there are, and of how many models where they differ."""
    kinds = {"official weights": "official", "timm weights": "timm's"}
    by_hand = {"official weights by hand": "official, by hand"}
    found = Counter(
        (kinds.get(e.source, "timm's of the backbone") if e.weights else by_hand.get(e.source, "none"))
        + (" (reconstruction)" if e.source == "reconstruction" else "")
        for e in models
    )
    return ", ".join(kind if len(found) == 1 else f"{count} {kind}" for kind, count in found.items())


def records_table(records: Sequence[dict[str, str]]) -> str:
    """Recorded benchmarks as a Markdown table, one row for each record."""
    names = ("peer", "mode", "shape", "batch", "dtype", "threads", "device", "torch", "median_ms", "peer_median_ms")
    rows = [[f"`{r['name']}`", *(r[name].partition("+")[0] for name in names), f"**{r['ratio']}x**"] for r in records]
    conditions = ["against", "mode", "input", "batch", "dtype", "threads", "device", "torch"]
    return markdown(["what", *conditions, "ms", "theirs, ms", "speed-up"], rows, (4, 6, 9, 10, 11))


def speed_table(folder: Path) -> str:
    """Every recorded benchmark as a Markdown table."""
    return records_table([row for _, row in benchmarks(folder)])


def memory_table(folder: Path) -> str:
    """What recorded training steps have at once besides weights and input, ours and the other side's."""
    found = [r for _, r in benchmarks(folder) if r["mode"].split()[0] == "train" and r.get("memory_mb")]
    if not found:
        return NOT_MEASURED
    rows = []
    for r in found:
        ours, theirs = float(r["memory_mb"]), float(r["peer_memory_mb"])
        what = [f"`{r['name']}`", r["peer"], r["shape"], r["batch"], r["dtype"]]
        rows.append([*what, f"{ours:.0f}", f"{theirs:.0f}", f"{ours / theirs:.2f}"])
    return markdown(["what", "against", "input", "batch", "dtype", "MB", "theirs, MB", "share"], rows, (3, 5, 6, 7))


def speeds_table(folder: Path, names: Collection[str]) -> str:
    """The best record of a family, families with a record of a whole model first; at most ``SPEEDS`` rows.

    Args:
        folder: Of the records.
        names: The zoo's models.
    """

    def rank(row: dict[str, str]) -> tuple[bool, bool, bool, bool, float]:
        plain = row["mode"].split()[0] == "infer", row["dtype"] == "float32", row["batch"] == "1"
        return row["name"] in names, *plain, float(row["ratio"])

    best: dict[str, dict[str, str]] = {}
    for family, row in benchmarks(folder):
        best[family] = max(best.get(family, row), row, key=rank)
    return records_table(sorted(best.values(), key=rank, reverse=True)[:SPEEDS])


def cpu_table(folder: Path, names: Collection[str]) -> str:
    """What every recorded model takes on the CPU of the newest records, the zoo's in bold, by multiply-accumulates.

    The rate is multiply-accumulates per second over those of timm's resnet50, in float32 and batches of 8, measured
    nearest in time: a machine is not equally fast on every day.  The gains of other dtypes and of ``torch.compile`` are
    those of one image, over float32 measured nearest in time.

    Args:
        folder: Holds records ``profile-*.jsonl`` of one thread; of a repeated measurement the newest counts.
        names: The zoo's models.
    """
    records = [r for path in sorted(folder.glob("profile-*.jsonl")) for r in read_records(path)]
    records = [r for r in records if r.latency and all(r.conditions[k] == value for k, value in TIMED_AS.items())]
    records.sort(key=_measured_at)
    if not records:
        return NOT_MEASURED
    records = [r for r in records if r.environment["fingerprint"] == records[-1].environment["fingerprint"]]
    found = {(r.name, r.size, *_form(r)): r for r in records}
    references = [r for r in records if (r.name, *_form(r)) == ("resnet50", *EIGHT)]
    rows = []
    for r in sorted((r for r in found.values() if _form(r) == ONE), key=lambda r: r.macs):
        several = found.get((r.name, r.size, *EIGHT))
        reference = several and _nearest(references, several)
        ones = [other for other in records if (other.name, other.size, *_form(other)) == (r.name, r.size, *ONE)]
        others = [found.get((r.name, r.size, 1, *form)) for form in GAINS.values()]
        rows.append(
            [
                f"**`{r.name}`**" if r.name.partition(".")[0] in names else f"`{r.name}`",
                "" if r.size is None else f"{r.size[0]}x{r.size[1]}",
                f"{r.macs / 1e9:.2f}",
                f"{1e3 * _seconds(r):.1f}",
                f"{8 / _seconds(several):.1f}" if several else "",
                f"{r.macs / _seconds(several) * _seconds(reference) / reference.macs:.2f}"
                if several and reference
                else "",
                *(f"{_seconds(_nearest(ones, other)) / _seconds(other):.2f}x" if other else "" for other in others),
            ]
        )
    columns = ["model", "input", "GMACs", "ms, batch 1", "images/s, batch 8", "rate", *GAINS]
    return markdown(columns, rows, tuple(range(2, len(columns))))


def _nearest(records: Sequence[Record], to: Record) -> Any:
    """The one that was measured nearest in time; None if there is none."""
    return min(records, key=lambda r: abs(_measured_at(r) - _measured_at(to)), default=None)


def _form(r: Record) -> tuple[int, str, str | None]:
    return r.conditions["batch"], r.conditions["dtype"], r.conditions["compile"]


def _measured_at(r: Record) -> float:
    return datetime.datetime.fromisoformat(str(r.environment["date"])).timestamp()


def _seconds(r: Record) -> float:
    assert r.latency is not None
    return float(r.latency.median)


def gpu_table(folder: Path, names: Collection[str] | None = None) -> str:
    """Operators and models measured on GPUs by ``vizoo bench --suite gpu``, as two Markdown tables.

    Args:
        folder: Holds records ``gpu-<card>-torch<version>.jsonl``; of a repeated measurement the last one counts.
        names: Only these models, and no operator; None for everything.

    Raises:
        UserError: If a record holds something else.
    """
    found = {
        (path.name, *(row.get(k, "") for k in FIELDS)): row
        for path in sorted(folder.glob("gpu-*.jsonl"))
        for row in read_record(path)
    }

    def digits(row: dict[str, Any], key: str, form: str, unit: float = 1.0) -> str:
        return "" if row.get(key) is None else f"{row[key] / unit:{form}}"

    place = ["device", "torch", "triton"]
    operators, models = [], []
    for row in found.values():
        if "failed" in row or (names is not None and row["item"] not in names):
            continue
        where = [row["run"].get(key, "") for key in place]
        if "forward_ms" in row:
            times = [digits(row, key, ".3f") for key in ("forward_ms", "both_ms", "floor_ms")]
            what = [f"`{row['item']}`", row["form"], row["dtype"], str(row["batch"])]
            operators.append([*what, *times, digits(row, "error", ".0e"), *where])
        elif "images_per_s" in row:
            what = [f"`{row['item']}`", row["mode"], str(row["batch"])]
            speed = [digits(row, "images_per_s", ",.0f"), digits(row, "peak_bytes", ".2f", 2**30)]
            models.append([*what, *speed, *where])
    if not operators and not models:
        return NOT_MEASURED
    columns = ["operator", "form", "dtype", "batch", "forward, ms", "with backward, ms", "floor, ms", "error", *place]
    head = ["model", "mode", "batch", "images/s", "peak, GiB", *place]
    tables = [markdown(columns, operators, (3, 4, 5, 6, 7)), markdown(head, models, (2, 3, 4))]
    return "\n".join(text for text, rows in zip(tables, (operators, models), strict=True) if rows)


def configs_table(folder: Path, page: Path, names: Collection[str] | None = None) -> str:
    """Configs of detectors or segmentors as a Markdown table, from the head comment of each file below ``folder``.

    Args:
        folder: ``configs/detection`` or ``configs/segmentation``.
        page: Where the table stands.
        names: Only configs with one of these models as backbone; None for all.

    Returns:
        The table, empty without a config.

    Raises:
        UserError: If a head comment is not of the form of its siblings, or a config names no backbone.
    """
    scored = SCORES[folder.name]
    rows = []
    for path in sorted(folder.glob("*/*.py")):
        text = path.read_text(encoding="utf-8")
        head = " ".join((ast.get_docstring(ast.parse(text)) or "").split())
        found, model = CONFIG_HEAD.match(head), re.search(r"\bmodel_name=\"(\w+)", text)
        if found is None or model is None:
            raise UserError(f"{path}: the head comment or the model_name is not of the form of its siblings")
        if names is not None and model[1] not in names:
            continue
        scores = {name: m[1] for name, pattern in scored.items() if (m := re.search(pattern, found["published"]))}
        rows.append(
            [
                f"[{path.stem.rsplit('_8xb2', 1)[0]}]({link(path, page)})",
                found["backbone"],
                found["head"],
                found["schedule"],
                *(scores.get(name, "") for name in scored),
                f"{int(found['params'].replace(',', '')) / 1e6:.2f}",
                f"[{found['arxiv']}](https://arxiv.org/abs/{found['arxiv']})" if scores else "ours",
            ]
        )
    columns = ["config", "backbone", "head", "schedule", *scored, "params (M)", "source"]
    return markdown(columns, rows, (4, 5, 6)) if rows else ""


def papers(about: Any) -> list[str]:
    """References of a family's papers with their addresses."""
    return [f"{text}, [arXiv {n}](https://arxiv.org/abs/{n})" for text, n in about.papers]


def citations() -> str:
    """The papers of all families as a Markdown list."""
    lines = []
    for family in families():
        text = f"- {family.about.name}: {'; '.join(papers(family.about))}."
        lines += textwrap.wrap(text, 120, subsequent_indent="  ", **WHOLE_WORDS)
    return "\n".join(lines) + "\n"


def rewrite(text: str, page: Path, root: Path, zoo: Sequence[Any]) -> str:
    """Text of a page with every marked table written again.

    Args:
        text: Its contents.
        page: Its file.
        root: The checkout.
        zoo: Rows of the table of models.

    Raises:
        UserError: If a marked table is unknown.
    """
    results = root / "tools/results"
    tables: dict[str, Callable[[], str]] = {
        "models": lambda: models_table([e for e in zoo if e.source != "for tests"]),
        "families": lambda: families_table(zoo, root / "docs/models", page),
        "citations": citations,
        "speed": lambda: speed_table(results),
        "memory": lambda: memory_table(results),
        "speeds": lambda: speeds_table(results, {e.name for e in zoo}),
        "cpu": lambda: cpu_table(results, {e.name for e in zoo}),
        "gpu": lambda: gpu_table(results),
        "detection": lambda: configs_table(root / "configs/detection", page),
        "segmentation": lambda: configs_table(root / "configs/segmentation", page),
    }

    def fill(m: re.Match[str]) -> str:
        if m[2] not in tables:
            raise UserError(f"{page}: unknown table {m[2]!r}; known: {', '.join(tables)}")
        return f"{m[1]}{tables[m[2]]()}{m[3]}"

    return MARKED.sub(fill, text)
