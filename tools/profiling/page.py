"""A page of records: the compact data that ``page.html`` draws, in one file that asks no network for anything."""

from __future__ import annotations

import json
import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any

from vizoo.tools.common import atomic_write
from vizoo.tools.profiling.published import Accuracy, accuracy, family, zoo

Plain = Mapping[str, Any]  # a record of schema 1, or a part of it

LEAST = 0.004  # share of a model that a module, or an operator, needs in some figure to be shown
MOST = 150  # modules of a model that are shown
GRAIN = 100_000  # figures of modules are shares of the whole model in these parts
FIGURES = ("params", "macs", "seconds")  # of modules, which an icicle shows
DOUBTS = {"throttled": r"throttl", "busy": r"\bbusy\b", "noisy": r"\bnoisy\b|\bclocks?\b"}  # and how texts tell them
MARK = "<!-- data -->"  # of the template: where the data go


def write_page(records: Sequence[Plain], path: str | Path, known: Mapping[Any, Accuracy]) -> None:
    """Write the page of records.

    Args:
        records: As of :func:`page_data`.
        path: HTML file to write.
        known: As of :func:`page_data`.

    Raises:
        Failure: As :func:`vizoo.tools.common.atomic_write`.
    """
    text = page(page_data(records, known))
    with atomic_write(path) as f:
        f.write(text)


def page(data: Plain) -> str:
    """The page of data; no text in them can end the element that holds them.

    Args:
        data: Of :func:`page_data`.

    Returns:
        HTML.
    """
    template = resources.files("vizoo").joinpath("tools", "profiling", "page.html").read_text(encoding="utf-8")
    text = json.dumps(data, separators=(",", ":"), ensure_ascii=True, allow_nan=False)
    before, after = template.split(MARK)
    return before + text.replace("<", "\\u003c") + after


def page_data(records: Sequence[Plain], known: Mapping[Any, Accuracy]) -> dict[str, Any]:
    """What the page shows of records, each text and each tree of modules once.

    Args:
        records: Plain values of schema 1, in any order; of one target under equal conditions the newest of each
            measurement is shown.
        known: Published accuracies, of :func:`vizoo.tools.profiling.published.accuracies`.

    Returns:
        ``sets``: conditions, of which nothing is mixed; ``models``: targets with counts and modules; ``runs``: what was
        measured of a model under one set; ``machines``: what is equal in all records of a machine.
    """
    import vizoo

    newest = _fold(records)
    machines, sets = _machines(newest), list({_key(c): c for c in map(_conditions, newest)}.values())
    groups: dict[str, list[dict[str, Any]]] = defaultdict(list)  # the records of each target
    for record in newest:
        groups[_key(record["target"], _form(record))].append(record)
    models, runs = [], []
    labels = _labels([members[0]["target"] for members in groups.values()])
    for label, members in zip(labels, groups.values(), strict=True):
        drawn = _drawn(members)
        models.append(_model(members, label, drawn, known))
        for record in members:
            place = {"model": len(models) - 1, "set": sets.index(_conditions(record))}
            runs.append({**place, **_run(record, list(drawn), machines[record["environment"]["fingerprint"]])})
    return {
        "vizoo": vizoo.__version__,
        "sets": [{**c, "machine": list(machines).index(c["fingerprint"])} for c in sets],
        "machines": list(machines.values()),
        "models": models,
        "runs": runs,
    }


def _key(*parts: Any) -> str:
    return json.dumps(parts, sort_keys=True)


def _conditions(record: Plain) -> dict[str, Any]:
    return {"fingerprint": record["environment"]["fingerprint"], **record["conditions"]}


def _form(record: Plain) -> list[Any]:
    """The conditions that counts depend on."""
    return [record["conditions"][name] for name in ("fused", "reparam", "features")]


def _fold(records: Sequence[Plain]) -> list[dict[str, Any]]:
    """One record of each target under each set of conditions: the newest, with the newest of each measurement."""
    found: dict[str, dict[str, Any]] = {}
    for record in sorted(records, key=lambda r: str(r["environment"]["date"])):
        key = _key(record["target"], _conditions(record))
        old = found.pop(key, None)  # so that the order is that of the newest
        new = found[key] = dict(record)
        if old is None:
            continue
        kinds = {(m["kind"], m["batch"]) for m in new["measurements"]}
        new["measurements"] = [m for m in old["measurements"] if (m["kind"], m["batch"]) not in kinds] + list(
            new["measurements"]
        )
        new["counts"] = new["counts"] or old["counts"]
        for name in ("modules", "ops"):
            if not any(row["seconds"] is not None for row in new[name]):
                new[name] = old[name] or new[name]
    return list(found.values())


def _machines(records: Sequence[Plain]) -> dict[str, dict[str, Any]]:
    """By fingerprint what is equal in the environments of all its records."""
    found: dict[str, dict[str, Any]] = {}
    for record in records:
        here = record["environment"]
        same = found.setdefault(here["fingerprint"], dict(here))
        for name in [name for name, value in same.items() if name not in here or here[name] != value]:
            del same[name]
    return found


def _labels(targets: Sequence[Plain]) -> list[str]:
    """A short text for each target that tells it from the others, as far as anything does."""

    def texts(t: Plain) -> list[str]:
        size = f"@{'x'.join(map(str, dict.fromkeys(t['size'])))}" if t["size"] else ""
        more = "".join(f" {key}={value}" for key, value in t["kwargs"].items())
        more += f" {t['weights']}" if t["weights"] else ""
        return [t["name"], t["name"] + size, t["spec"], t["spec"] + size, t["spec"] + size + more]

    seen: dict[str, set[str]] = defaultdict(set)
    for t in targets:
        for text in texts(t):
            seen[text].add(_key(t))
    return [next((text for text in texts(t) if len(seen[text]) == 1), texts(t)[-1]) for t in targets]


def _model(
    records: Sequence[Plain], label: str, drawn: Mapping[str, Sequence[Any]], known: Mapping[Any, Accuracy]
) -> dict[str, Any]:
    """What does not depend on how a target was run."""
    target = records[-1]["target"]
    published = accuracy(target, known)
    rows = {row["path"]: row for row in _tree(records)}
    return {
        "label": label,
        **{name: target[name] for name in ("name", "spec", "kind", "size", "weights", "kwargs")},
        "series": _key(*(target[name] for name in ("kind", "name", "weights", "kwargs"))),
        "family": family(target["name"]),
        "ours": target["name"] in zoo(),
        "top1": list(published) if published else None,
        "counts": next((r["counts"] for r in records[::-1] if r["counts"]), None),
        "modules": [[*place, *(_share(rows[path], rows[""], k) for k in FIGURES[:2])] for path, place in drawn.items()],
    }


def _tree(records: Sequence[Plain]) -> Sequence[Plain]:
    """The modules of a target."""
    return next((r["modules"] for r in records[::-1] if r["modules"]), [])


def _drawn(records: Sequence[Plain]) -> dict[str, tuple[str, int]]:
    """The modules of a target that an icicle shows, each with its name within the nearest one above it, and its index.

    A module is shown with all above it if it has a share of :data:`LEAST` in parameters, multiply-accumulates or time
    of any run; of more than :data:`MOST` the largest are.
    """
    shares = dict.fromkeys((row["path"] for row in _tree(records)), 0.0)
    for rows in (record["modules"] for record in records):
        for figure in FIGURES:
            whole = max((row[figure] or 0 for row in rows), default=0)
            for row in rows:
                if whole and row["path"] in shares:
                    shares[row["path"]] = max(shares[row["path"]], (row[figure] or 0) / whole)
    large = sorted((path for path in shares if shares[path] >= LEAST or not path), key=lambda path: -shares[path])
    chosen = set(large[:MOST])
    kept: dict[str, tuple[str, int]] = {}
    for path in filter(chosen.__contains__, shares):
        above = path
        while above:
            above = above.rpartition(".")[0]
            if above in kept:
                break
        parent = list(kept).index(above) if path else -1
        kept[path] = (path[len(above) :].lstrip("."), parent)
    return kept


def _share(row: Plain, whole: Plain, figure: str) -> int | None:
    return None if row[figure] is None else round(GRAIN * row[figure] / (whole[figure] or 1))


def _short(value: float | None, digits: int = 4) -> float | None:
    """Some significant digits of a figure that is drawn, whole numbers as such."""
    if value is None:
        return None
    rounded = float(f"{value:.{digits}g}")
    return int(rounded) if isinstance(value, int) or (rounded.is_integer() and abs(rounded) < 1e15) else rounded


def _run(record: Plain, drawn: Sequence[str], same: Plain) -> dict[str, Any]:
    """What was measured of a target; what there is nothing of is left out."""
    rows = {row["path"]: row for row in record["modules"]}
    timed = bool(rows and rows[""]["seconds"])
    cells = {
        "measurements": [_measurement(m) for m in record["measurements"]],
        "whole": rows[""]["seconds"] if timed else None,
        "seconds": [_share(rows[p], rows[""], "seconds") if p in rows else None for p in drawn] if timed else None,
        "ops": _operators(record["ops"]),
        "fewer": len(record["ops"]) - len(_operators(record["ops"])),
        "notes": record["notes"],
        "failure": record["failure"] and record["failure"]["reason"],
        "doubts": _doubts(record),
        "environment": {k: v for k, v in record["environment"].items() if k not in same and v is not None},
        "command": record["command"],
    }
    return {name: value for name, value in cells.items() if value}


def _operators(ops: Sequence[Plain]) -> list[list[Any]]:
    """The operators with a share of :data:`LEAST` in time, multiply-accumulates or bytes."""
    whole = {figure: sum(row[figure] or 0 for row in ops) for figure in ("seconds", "macs", "bytes")}
    return [
        [row["op"], row["calls"], *(_short(row[k]) for k in ("macs", "other", "bytes", "seconds", "ceiling"))]
        for row in ops
        if any((row[figure] or 0) > LEAST * whole[figure] for figure in whole)
    ]


def _measurement(m: Plain) -> list[Any]:
    """Kind, unit, batch, median and interval, number of processes and of samples, parts, quality."""
    samples = m["samples"]
    figures = [_short(value, 5) for value in (m["median"], *m["ci95"])]
    parts = {name: _short(value) for name, value in m["parts"].items()}
    return [m["kind"], m["unit"], m["batch"], *figures, len(samples), sum(map(len, samples)), parts, m["quality"]]


def _doubts(record: Plain) -> list[list[str]]:
    """What to be careful with: words of the badge, each with the text that says it."""
    found = [["failed", record["failure"]["reason"]]] if record["failure"] else []
    if record["counts"] and record["counts"]["status"] == "partial":
        found.append(["partial", "; ".join(record["counts"]["reasons"]) or "the count misses something"])
    for text in dict.fromkeys(q for m in record["measurements"] for q in m["quality"]):
        found.append([next((word for word, told in DOUBTS.items() if re.search(told, text)), "doubtful"), text])
    said = " ".join(text for _, text in found)
    for text in record["notes"]:
        word = next((word for word, told in DOUBTS.items() if re.search(told, text)), None)
        if word and text.partition(": ")[2] not in said:
            found.append([word, text])
    return found
