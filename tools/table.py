"""Recounts ``backbones/models.csv``, and writes NOTICE and the generated tables of the READMEs; in a checkout.

A table stands between ``<!-- table: NAME -->`` and ``<!-- end table -->``; the tests fail when one is out of date.
"""

from __future__ import annotations

import argparse
import ast
import csv
import io
import os
import re
import textwrap
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

from vizoo.backbones.layers.about import About
from vizoo.tools.common import (
    Failure,
    UserError,
    atomic_write,
    build_model,
    markdown,
    match_names,
    read_text,
    run_tool,
    short,
)
from vizoo.tools.gpu.suite import FIELDS, read_record
from vizoo.tools.models import list_zoo
from vizoo.tools.options import TASKS, Parser, add
from vizoo.tools.profiling.counting import count

EXAMPLES = """\
examples:
  python -m vizoo.tools.table           recount models.csv, rewrite the tables, the citations and NOTICE
  python -m vizoo.tools.table litv2_s   recount only this row of models.csv
  python -m vizoo.tools.table --check   only say what is out of date"""
READMES = ("README.md", "configs/detection/README.md", "configs/segmentation/README.md")
CONFIG_HEAD = re.compile(
    r"(?P<head>.+?) on (?P<backbone>.+?), (?:COCO|ADE20K), (?P<schedule>[\d,]+ \w+)\. "
    r"Paper: .*?arXiv (?P<arxiv>[\d.]+)\. Published: (?P<published>.*?) Parameters: (?P<params>[\d,]+)\."
)
WHOLE_WORDS: dict[str, Any] = {"break_long_words": False, "break_on_hyphens": False}
ORIGINS = "Origins of the families."  # begins the paragraph of NOTICE above the families
MARKED = re.compile(r"(<!-- table: (\w+) -->\n).*?(<!-- end table -->)", re.DOTALL)


BY_HAND = ("name", "paper_top1", "source")  # columns of models.csv; the rest follows from the models
COUNTED = (
    *("family", "tasks", "params", "macs", "merged_params", "merged_macs"),
    *("height", "width", "licence", "weights"),
)


def recount(text: str, patterns: Sequence[str] = ()) -> str:
    """``models.csv`` with everything that follows from the models written again.

    Args:
        text: Contents of the file; what is counted may be empty.
        patterns: Globs on the names to count; none means all.

    Returns:
        The new contents, ordered by name.

    Raises:
        UserError: If the columns are others, or a name is unknown.
        Failure: If a count is partial.
    """
    import vizoo  # noqa: F401 - registers the zoo

    reader = csv.DictReader(text.splitlines(), restval="")
    if list(reader.fieldnames or []) != [*BY_HAND, *COUNTED]:
        need = ",".join([*BY_HAND, *COUNTED])
        raise UserError(f"models.csv has the columns {short(','.join(reader.fieldnames or []))}, need {need}")
    rows = sorted(reader, key=lambda row: row["name"])
    names = [row["name"] for row in rows]
    for pattern in patterns:
        if not match_names(names, [pattern]):
            raise UserError(f"NAME {pattern!r} is no row of models.csv")
    chosen = set(match_names(names, patterns) if patterns else names)
    for row in rows:
        if row["name"] in chosen:
            row.update(counted_columns(row["name"], build_model(row["name"], device="meta")))
    out = io.StringIO()
    writer = csv.DictWriter(out, fieldnames=[*BY_HAND, *COUNTED], lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return out.getvalue()


def counted_columns(name: str, model: Any) -> dict[str, str]:
    """The columns of ``models.csv`` that follow from a model.

    Args:
        name: Its name, with or without a tag.
        model: The model, on any device.

    Returns:
        Texts by the names of ``COUNTED``.

    Raises:
        Failure: If a count is partial.
    """
    from timm.models import get_model_input_config, get_pretrained_cfg, list_models, model_entrypoint
    from timm.utils.model import reparameterize_model

    cfg: Any = get_pretrained_cfg(name)
    arch, dot, _ = name.partition(".")
    size = get_model_input_config(model)["input_size"]
    params, macs = _costs(name, model, size)
    merges = any(hasattr(module, "reparameterize") for module in model.modules())
    merged = _costs(name, reparameterize_model(model), size) if merges else ("", "")
    tags = [name] if dot else list_models(arch, pretrained=True, include_tags=True)
    return {
        "family": model_entrypoint(arch).__module__.rpartition(".")[2],
        "tasks": " ".join(_tasks(model)),
        **{"params": params, "macs": macs, "merged_params": merged[0], "merged_macs": merged[1]},
        **{"height": str(size[-2]), "width": str(size[-1]), "licence": cfg.license or ""},
        "weights": " ".join(f"{tag.partition('.')[2]}={_address(get_pretrained_cfg(tag))}" for tag in tags),
    }


def _costs(name: str, model: Any, size: Sequence[int]) -> tuple[str, str]:
    """Parameters, and multiply-accumulates of one image."""
    import torch

    counted = count(model, torch.empty(1, *size, device="meta"))
    if counted.reasons:
        raise Failure(f"{name}: partial count: {counted.reasons[0]}; not written")
    return str(counted.params), str(counted.macs)


def _tasks(model: Any) -> list[str]:
    """What ``vizoo train`` can train a model for; detectors and segmentors stand on maps of four strides."""
    from vizoo.backbones.oat import OAT

    pyramid = {4, 8, 16, 32} <= {level["reduction"] for level in getattr(model, "feature_info", ())}
    scanpath = isinstance(model, OAT)
    able = {"classification": not scanpath, "detection": pyramid, "segmentation": pyramid, "scanpath": scanpath}
    return [task for task in TASKS if able[task]]


def _address(cfg: Any) -> str:
    """Where timm gets weights from."""
    return f"https://huggingface.co/{cfg.hf_hub_id}" if cfg.hf_hub_id else cfg.url


def models_table() -> str:
    """The zoo as a Markdown table."""
    rows = [
        [
            f"`{e.name}`",
            f"{e.params / 1e6:.2f}",
            f"{e.macs / 1e9:.3f}",
            f"{e.size[0]}x{e.size[1]}",
            str(e.paper_top1 or ""),
            e.source,
        ]
        for e in list_zoo()
    ]
    return markdown(["model", "params (M)", "GMACs", "input", "top-1, paper (%)", "source"], rows, (1, 2, 3, 4))


def speed_table(folder: Path) -> str:
    """Recorded benchmarks of whole models as a Markdown table, one row for each record."""
    rows = []
    for path in sorted(folder.glob("*.csv")):
        for r in csv.DictReader(path.read_text(encoding="utf-8").splitlines()):
            rows.append(
                [
                    f"`{r['name']}`",
                    r["peer"],
                    r["device"],
                    r["mode"],
                    r["threads"],
                    r["batch"],
                    r["dtype"],
                    r["median_ms"],
                    r["peer_median_ms"],
                    f"**{r['ratio']}x**",
                ]
            )
    columns = ["what", "against", "device", "mode", "threads", "batch", "dtype", "ms", "theirs, ms", "speed-up"]
    return markdown(columns, rows, (4, 5, 7, 8, 9))


def gpu_table(folder: Path) -> str:
    """Operators and models measured on GPUs by ``vizoo bench --suite gpu``, as two Markdown tables.

    Args:
        folder: Holds records ``gpu-<card>-torch<version>.jsonl``; of a repeated measurement the last one counts.

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
        if "failed" in row:
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
        return "Not measured yet.\n"
    columns = ["operator", "form", "dtype", "batch", "forward, ms", "with backward, ms", "floor, ms", "error", *place]
    head = ["model", "mode", "batch", "images/s", "peak, GiB", *place]
    tables = [markdown(columns, operators, (3, 4, 5, 6, 7)), markdown(head, models, (2, 3, 4))]
    return "\n".join(text for text, rows in zip(tables, (operators, models), strict=True) if rows)


def configs_table(folder: Path) -> str:
    """Configs of detectors or segmentors as a Markdown table, from the head comment of each file below ``folder``.

    Raises:
        UserError: If a head comment is not of the form of its siblings.
    """
    detection = {"box AP": r"box AP ([\d.]+)", "mask AP": r"mask AP ([\d.]+)"}
    segmentation = {"mIoU": r"mIoU ([\d.]+)", "multi-scale": r"([\d.]+) \(multi-scale\)"}
    scored = detection if folder.name == "detection" else segmentation
    rows = []
    for path in sorted(folder.glob("*/*.py")):
        head = " ".join((ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or "").split())
        found = CONFIG_HEAD.match(head)
        if found is None:
            raise UserError(f"{path}: the head comment is not of the form of its siblings")
        scores = {name: m[1] for name, pattern in scored.items() if (m := re.search(pattern, found["published"]))}
        rows.append(
            [
                f"[{path.stem.rsplit('_8xb2', 1)[0]}]({path.parent.name}/{path.name})",
                found["backbone"],
                found["head"],
                found["schedule"],
                *(scores.get(name, "") for name in scored),
                f"{int(found['params'].replace(',', '')) / 1e6:.2f}",
                f"[{found['arxiv']}](https://arxiv.org/abs/{found['arxiv']})" if scores else "ours",
            ]
        )
    columns = ["config", "backbone", "head", "schedule", *scored, "params (M)", "source"]
    return markdown(columns, rows, (4, 5, 6))


def families() -> list[About]:
    """What the families say of themselves, by name."""
    import vizoo.backbones

    modules = [m for m in vars(vizoo.backbones).values() if isinstance(m, ModuleType) and hasattr(m, "ABOUT")]
    return sorted((m.ABOUT for m in modules), key=lambda about: about.name.lower())


def citations() -> str:
    """The papers of all families as a Markdown list."""
    lines = []
    for about in families():
        papers = "; ".join(f"{text}, [arXiv {n}](https://arxiv.org/abs/{n})" for text, n in about.papers)
        lines += textwrap.wrap(f"- {about.name}: {papers}.", 120, subsequent_indent="  ", **WHOLE_WORDS)
    return "\n".join(lines) + "\n"


def notice(text: str) -> str:
    """NOTICE with the origins of all families written again.

    Args:
        text: Contents of the file.

    Raises:
        UserError: If it has no paragraph that begins with ``ORIGINS``.
    """
    if f"\n\n{ORIGINS}" not in text:
        raise UserError(f"NOTICE has no paragraph that begins with {ORIGINS!r}")
    paragraph = text[text.index(ORIGINS) :].split("\n\n")[0]
    lines = []
    for about in families():
        start = f"{about.name:24s}" if len(about.name) < 24 else f"{about.name}  "
        lines += textwrap.wrap(start + about.origin, 120, subsequent_indent=" " * 24, **WHOLE_WORDS)
    return text[: text.index(ORIGINS)] + paragraph + "\n\n" + "\n".join(lines) + "\n"


def rewrite(text: str, root: Path) -> str:
    """Text of a README with every marked table written again.

    Args:
        text: Its contents.
        root: The checkout.

    Raises:
        UserError: If a marked table is unknown.
    """
    tables = {
        "models": models_table,
        "citations": citations,
        "speed": lambda: speed_table(root / "tools/results"),
        "gpu": lambda: gpu_table(root / "tools/results"),
        "detection": lambda: configs_table(root / "configs/detection"),
        "segmentation": lambda: configs_table(root / "configs/segmentation"),
    }

    def fill(m: re.Match[str]) -> str:
        if m[2] not in tables:
            raise UserError(f"unknown table {m[2]!r}; known: {', '.join(tables)}")
        return f"{m[1]}{tables[m[2]]()}{m[3]}"

    return MARKED.sub(fill, text)


def build_parser() -> argparse.ArgumentParser:
    """Command-line options."""
    p = Parser(prog="python -m vizoo.tools.table", description=str(__doc__).replace("`", ""), epilog=EXAMPLES)
    p.add_argument("name", metavar="NAME", nargs="*", help="rows of models.csv to count again (all)")
    p.add_argument("--root", type=Path, metavar="DIR", default=Path("."), help="the checkout (.)")
    add(p, "--check", "say what is out of date, write nothing")
    return p


def _table(argv: list[str]) -> int:
    args = build_parser().parse_args(argv)
    stale = 0
    readmes = [r for r in READMES if r == "README.md" or os.path.isfile(args.root / r)]
    for name in ("backbones/models.csv", "NOTICE", *readmes):
        path = args.root / name
        if not os.path.isfile(path):
            raise UserError(f"--root {short(str(args.root))}: no {name} there; give the checkout")
        old = read_text(path, "--root")
        if name.endswith(".csv"):
            text = recount(old, args.name)
        else:
            text = notice(old) if name == "NOTICE" else rewrite(old, args.root)
        if text == old:
            continue
        stale += 1
        print(f"{name} {'is out of date' if args.check else 'written'}")
        if not args.check:
            with atomic_write(path) as f:
                f.write(text)
    return int(bool(stale and args.check))


def main(argv: Sequence[str] | None = None) -> int:
    """Rewrite or check the generated tables; returns the exit status."""
    return run_tool(_table, argv, "table")


if __name__ == "__main__":
    raise SystemExit(main())
