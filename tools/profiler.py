"""``vizoo profile``: what any timm model costs: parameters, multiply-accumulates, activations, memory, time."""

from __future__ import annotations

import argparse
import csv
import dataclasses
import importlib
import json
import multiprocessing
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vizoo.backbones.ops._cost import Cost, register_cost
from vizoo.tools.common import (
    UserError,
    atomic_write,
    build_model,
    print_table,
    progress,
    read_size,
    resolve_device,
    resolve_models,
    run_tool,
    stderr,
)

if TYPE_CHECKING:
    from vizoo.tools._counting import Count
    from vizoo.tools._timing import Comparison, Memory, Stats

__all__ = ["Cost", "Profile", "compare", "count", "measure", "profile", "register_cost"]

MODES = ("count", "memory", "latency", "throughput")
DTYPES = {"fp32": "float32", "tf32": "float32", "bf16": "bfloat16", "fp16": "float16"}
FOOTNOTE = """\
GMACs: multiply-accumulates of convolutions, linear layers and attention of one image, in 1e9; papers of this field
print them as FLOPs.  GFLOPs = 2 GMACs + other GFLOPs (norms, softmax, activations, biases, by fixed costs per element).
acts: elements written by those contractions, attention scores included."""
EXAMPLES = """\
examples:
  vizoo profile litv2_s                                    exact counts; needs no device and no weights
  vizoo profile litv2_s resnet50 --device cpu              everything, measured on this machine
  vizoo profile 'litv2_*' --mode count --size 800 1280     every match, at another size (height width)
  vizoo profile litv2_s --mode count --depth 2 --top 10    where the cost sits
  vizoo profile litv2_s --device cuda --dtype bf16 --compile --batch 128
  vizoo profile litv2_s resnet50 --device cpu --threads 1,2 --out speed.csv
  vizoo profile litv2_s litv2_m swin_tiny_patch4_window7_224 --device cpu --mode latency --plot cost.png
  vizoo profile litv2_s --strict --check                   fail on anything uncounted; compare two engines"""


@dataclasses.dataclass
class Profile:
    """What one model costs, as counted and measured.

    Attributes:
        model: Name.
        size: Height and width in pixels; None for inputs that are no image.
        config: Device, dtype and the other conditions of the measurement.
        environment: Versions and machine.
        counts: Counts of one image.
        latency: Seconds of one call at ``latency_batch``.
        throughput: Images a second at ``throughput_batch``.
        memory: Peak memory at ``throughput_batch``, or at ``latency_batch`` when no throughput was asked for.
        fvcore_total: Total as fvcore counts, with its norms and pooling.
        notes: What was uncounted, doubtful or changed on the way.
    """

    model: str
    size: tuple[int, int] | None
    config: dict[str, Any]
    environment: dict[str, Any]
    counts: Count
    latency: Stats | None = None
    latency_batch: int | None = None
    throughput: float | None = None
    throughput_batch: int | None = None
    memory: Memory | None = None
    fvcore_total: int | None = None
    notes: list[str] = dataclasses.field(default_factory=list)

    @property
    def params(self) -> int:
        """Parameters, shared ones once."""
        return self.counts.params

    @property
    def macs(self) -> int:
        """Multiply-accumulates of contractions."""
        return self.counts.macs

    @property
    def flops_other(self) -> int:
        """FLOPs of everything that is no contraction."""
        return self.counts.flops_other

    @property
    def acts(self) -> int:
        """Elements written by contractions."""
        return self.counts.acts

    @property
    def bytes(self) -> int:
        """Bytes moved by all operators, a lower bound of memory traffic."""
        return self.counts.bytes

    @property
    def uncounted(self) -> dict[str, int]:
        """Operators nobody could price, with their calls."""
        return self.counts.uncounted

    def by_module(self, depth: int = 1, sort: str = "", top: int = 0) -> list[dict[str, Any]]:
        """Costs of the modules down to a depth.

        Args:
            depth: Number of name parts shown; 0 is the whole model.
            sort: ``macs``, ``acts`` or ``other`` for the most expensive first; empty for the order of names.
            top: Most rows; 0 for all.

        Returns:
            Rows with ``module, macs, share, acts, other``.
        """
        rows: list[dict[str, Any]] = [
            {
                "module": path or self.model,
                "macs": c.macs,
                "share": c.macs / max(1, self.macs),
                "acts": c.acts,
                "other": c.other,
            }
            for path, c in sorted(self.counts.modules.items())
            if (path.count(".") + 1 if path else 0) <= depth
        ]
        if sort:
            rows.sort(key=lambda row: -row[sort])
        return rows[:top] if top else rows

    def by_op(self) -> list[dict[str, Any]]:
        """Rows with ``op, calls, macs, share``, the most expensive first."""
        rows = [
            {"op": name, "calls": calls, "macs": macs, "share": macs / max(1, self.macs)}
            for name, (macs, calls) in self.counts.ops.items()
        ]
        return sorted(rows, key=lambda row: (-row["macs"], row["op"]))

    def to_dict(self) -> dict[str, Any]:
        """Everything, JSON-ready; times in milliseconds, memory in bytes."""
        c = self.counts
        return {
            "model": self.model,
            "size": list(self.size) if self.size else None,
            "params": c.params,
            "trainable": c.trainable,
            "buffers": c.buffers,
            "state_bytes": c.state_bytes,
            "macs": c.macs,
            "flops_other": c.flops_other,
            "acts": c.acts,
            "bytes": c.bytes,
            "kernels": c.kernels,
            "largest_tensor": c.largest,
            "uncounted": c.uncounted,
            "fvcore_total": self.fvcore_total,
            "latency_batch": self.latency_batch,
            "latency": self.latency.to_dict() if self.latency else None,
            "throughput_batch": self.throughput_batch,
            "throughput": self.throughput,
            "memory": self.memory._asdict() if self.memory else None,
            "config": self.config,
            "environment": self.environment,
            "notes": self.notes,
        }

    def to_row(self) -> dict[str, Any]:
        """One flat row for CSV files; times in milliseconds, memory in bytes."""
        d = self.to_dict()
        latency, memory = d["latency"] or {}, d["memory"] or {}
        return {
            "model": self.model,
            "height": self.size[0] if self.size else "",
            "width": self.size[1] if self.size else "",
            **{k: d[k] for k in ("params", "macs", "flops_other", "acts", "bytes", "kernels", "fvcore_total")},
            "uncounted": " ".join(f"{k}:{v}" for k, v in self.uncounted.items()),
            "latency_batch": d["latency_batch"],
            **{f"latency_{k}": latency.get(k) for k in ("median_ms", "p10_ms", "p90_ms", "iqr_ms", "n", "first_ms")},
            "throughput_batch": d["throughput_batch"],
            "throughput": d["throughput"],
            "peak_bytes": memory.get("peak"),
            "cpu_use": latency.get("cpu_use"),
            **self.config,
            **self.environment,
            "notes": "; ".join(self.notes),
        }

    def table(self) -> str:
        """The row of this model as a Markdown table with its conventions."""
        return self.to_markdown()

    def to_markdown(self) -> str:
        """The row of this model as a Markdown table with its conventions."""
        return markdown_table([self])

    def to_json(self, path: str | Path) -> None:
        """Write everything to a JSON file, in one step."""
        write_results([self], Path(path), "json")

    def to_csv(self, path: str | Path) -> None:
        """Append the flat row to a CSV file, in one step."""
        write_results([self], Path(path), "csv")


def count(model: Any, *args: Any, **kwargs: Any) -> Count:
    """Count what one call of a module costs; see :func:`vizoo.tools._counting.count`."""
    from vizoo.tools import _counting

    return _counting.count(model, *args, **kwargs)


def measure(*args: Any, **kwargs: Any) -> Stats:
    """Time a function; see :func:`vizoo.tools._timing.measure`."""
    from vizoo.tools import _timing

    return _timing.measure(*args, **kwargs)


def compare(*args: Any, **kwargs: Any) -> Comparison:
    """Time functions in alternation; see :func:`vizoo.tools._timing.compare`."""
    from vizoo.tools import _timing

    return _timing.compare(*args, **kwargs)


def environment(device: Any) -> dict[str, Any]:
    """Versions and machine of a measurement."""
    import datetime

    import psutil
    import timm
    import torch

    import vizoo
    from vizoo.tools.env import cpu_name

    gpu = device.type == "cuda"
    return {
        "vizoo": vizoo.__version__,
        "torch": torch.__version__,
        "timm": timm.__version__,
        "cuda": torch.version.cuda if gpu else None,
        "machine": torch.cuda.get_device_name(device) if gpu else cpu_name(),
        "cores": psutil.cpu_count(logical=False),
        "load": round(psutil.getloadavg()[0], 2),
        "date": datetime.datetime.now().astimezone().isoformat(timespec="seconds"),
    }


def profile(
    model: Any,
    inputs: Sequence[Any] | None = None,
    *,
    size: int | Sequence[int] | None = None,
    mode: str | Sequence[str] = "count",
    device: str = "cpu",
    dtype: str = "fp32",
    amp: bool = False,
    channels_last: bool = False,
    compile: bool | str = False,
    batch: int | None = None,
    fvcore: bool = False,
    check: bool = False,
    min_time: float = 2.0,
    max_time: float = 10.0,
    model_kwargs: dict[str, Any] | None = None,
    step: Any = None,
) -> Profile:
    """Count and measure one model.

    Args:
        model: A timm name, or any ``nn.Module``.
        inputs: Positional inputs of a module at batch 1; None draws one image.
        size: Side, or height and width, in pixels; None is the model's own.
        mode: Any of ``count``, ``memory``, ``latency``, ``throughput``, or ``all``.  Counts are always made.
        device: ``cpu``, ``cuda`` or ``cuda:N``.
        dtype: ``fp32``, ``tf32``, ``bf16`` or ``fp16`` of weights and input; with ``amp`` that of autocast.
        amp: Keep float32 weights and run under autocast.
        channels_last: Model and image in channels_last memory.
        compile: ``torch.compile``; a string is its mode.
        batch: Images at once for latency and throughput; None is 1, and 8 on a CPU or 64 on a GPU.
        fvcore: Also fvcore's own total.
        check: Compare both engines and check that the cost is linear in the batch; differences become notes.
        min_time: Least seconds of sampling.
        max_time: Most seconds of sampling.
        model_kwargs: Arguments of ``timm.create_model``.
        step: Called with a text when a new part begins, for a progress bar.

    Returns:
        The result.

    Raises:
        UserError: For an unknown name, device, dtype or mode, a size the model cannot take, or a bad combination.
    """
    import torch

    modes = [mode] if isinstance(mode, str) else list(mode)
    modes = list(MODES) if "all" in modes else modes
    for name in modes:
        if name not in MODES:
            raise UserError(f"mode {name!r}: allowed are {', '.join(MODES)} and all")
    if dtype not in DTYPES:
        raise UserError(f"dtype {dtype!r}: allowed are {', '.join(DTYPES)}")
    if batch is not None and batch < 1:
        raise UserError(f"batch {batch}: at least 1")
    timed = [m for m in modes if m != "count"]
    where = resolve_device(device)
    if timed and where.type == "meta":
        raise UserError(f"mode {timed[0]}: the meta device computes nothing; give cpu or cuda")
    if amp and dtype not in ("bf16", "fp16"):
        raise UserError(f"amp with dtype {dtype}: give dtype bf16 or fp16")

    tell = step or (lambda text: None)
    real = bool(timed or check or fvcore)
    tell("building")
    if isinstance(model, str):
        name = resolve_models([model])[0]
        net = build_model(name, **(model_kwargs or {}), **({} if real else {"device": "meta"}))
    else:
        name, net = type(model).__name__, model
    side: tuple[int, int] | None = None
    if inputs is None:
        from timm.models import get_model_input_config

        config = get_model_input_config(net)
        side = read_size(size, "size") if size is not None else tuple(config["input_size"][1:])  # type: ignore[assignment]
        if isinstance(model, str) and config["fixed_input_size"] and side != tuple(config["input_size"][1:]):
            net = build_model(
                name, **{**(model_kwargs or {}), "img_size": side}, **({} if real else {"device": "meta"})
            )
        inputs = (torch.empty(1, config["input_size"][0], *side, device="meta"),)
    was_training = net.training
    net.eval()

    tell("counting")
    result = Profile(name, side, {}, {}, _counted(net, inputs, name, side))
    result.notes += [f"uncounted: {op} ({calls} calls)" for op, calls in result.uncounted.items()]
    if check or fvcore:
        _second_engine(result, net, inputs, check, fvcore)

    result.config = {
        "device": str(where),
        "dtype": dtype,
        "amp": amp,
        "channels_last": channels_last,
        "compile": compile,
        "threads": torch.get_num_threads() if where.type == "cpu" else None,
    }
    result.environment = environment(where)
    if timed:
        _measure(result, net, inputs, timed, where, batch, min_time, max_time, tell)
    if not isinstance(model, str):
        net.train(was_training)
    return result


def _counted(net: Any, inputs: Sequence[Any], name: str, side: tuple[int, int] | None) -> Count:
    try:
        return count(net, *inputs)
    except Exception as e:
        at = f" at size {side[0]}x{side[1]}" if side else ""
        text = " ".join(str(e).split())[:300] or type(e).__name__
        raise UserError(f"{name!r} cannot run{at}: {text}") from e


def _random_like(x: Any, batch: int, device: Any, dtype: Any) -> Any:
    """Random input of another batch size: zeros would flatter power and hide slow numbers."""
    import torch

    if not isinstance(x, torch.Tensor) or not x.is_floating_point():
        return x
    generator = torch.Generator().manual_seed(0)
    return torch.randn(batch * x.shape[0], *x.shape[1:], generator=generator).to(device, dtype)


def _second_engine(result: Profile, net: Any, inputs: Sequence[Any], check: bool, fvcore: bool) -> None:
    import torch

    from vizoo.tools._counting import fvcore_macs

    one = [_random_like(x, 1, "cpu", torch.float32) for x in inputs]
    if fvcore:
        result.fvcore_total = fvcore_macs(net, *one, contractions=False)
    if check:
        second = fvcore_macs(net, *one)
        if second != result.macs:
            result.notes.append(f"engines differ: fvcore counts {second:,} multiply-accumulates, not {result.macs:,}")
        three = count(net, *(_random_like(x, 3, "meta", torch.float32) for x in inputs)).macs
        if three != 3 * result.macs:
            result.notes.append(f"not linear in the batch: {three:,} multiply-accumulates for 3 images")


def _measure(
    result: Profile,
    net: Any,
    inputs: Sequence[Any],
    modes: Sequence[str],
    device: Any,
    batch: int | None,
    min_time: float,
    max_time: float,
    tell: Any,
) -> None:
    import contextlib

    import torch

    from vizoo.tools._timing import back_to_back, peak_memory
    from vizoo.tools._timing import measure as timing

    config = result.config
    dtype = getattr(torch, DTYPES[config["dtype"]])
    weights = torch.float32 if config["amp"] else dtype
    net = net.to(device, weights)
    if config["channels_last"]:
        net = net.to(memory_format=torch.channels_last)
    run = net
    if config["compile"]:
        torch._dynamo.reset()
        run = torch.compile(net, mode=config["compile"] if isinstance(config["compile"], str) else None)

    @contextlib.contextmanager
    def conditions() -> Any:
        tf32 = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
        benchmark = torch.backends.cudnn.benchmark
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = config["dtype"] == "tf32"
        torch.backends.cudnn.benchmark = True
        try:
            with torch.inference_mode(), torch.autocast(device.type, dtype=dtype, enabled=config["amp"]):
                yield
        finally:
            torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = tf32
            torch.backends.cudnn.benchmark = benchmark

    def call_of(n: int) -> tuple[Any, list[Any]]:
        given = [_random_like(x, n, device, weights) for x in inputs]
        if config["channels_last"]:
            given = [x.contiguous(memory_format=torch.channels_last) if x.dim() == 4 else x for x in given]
        return lambda: run(*given), given

    large = batch or (64 if device.type == "cuda" else 8)
    with conditions():
        if "latency" in modes:
            tell(f"latency, batch {batch or 1}")
            call, _ = call_of(batch or 1)
            result.latency_batch = batch or 1
            result.latency = timing(call, device, min_time=min_time, max_time=max_time)
            result.notes += [f"latency: {w}" for w in result.latency.warnings]
        while "throughput" in modes:
            tell(f"throughput, batch {large}")
            try:
                call, _ = call_of(large)
                stats = timing(call, device, min_time=min_time, max_time=max_time)
                seconds = back_to_back(call, device) if device.type == "cuda" else stats.median
            except torch.cuda.OutOfMemoryError:
                if large == 1:
                    raise UserError(f"{result.model!r}: one image does not fit into the memory of {device}") from None
                torch.cuda.empty_cache()
                large //= 2
                continue
            result.throughput, result.throughput_batch = large / seconds, large
            result.notes += [f"throughput: {w}" for w in stats.warnings]
            if large != (batch or large):
                result.notes.append(f"out of memory: batch reduced to {large}")
            break
        if "memory" in modes:
            tell("memory")
            n = result.throughput_batch or result.latency_batch or batch or 1
            if config["compile"] and device.type == "cpu":
                result.notes.append("memory is that of the uncompiled model")
            given = call_of(n)[1]
            target = net if device.type == "cpu" else run
            result.memory = peak_memory(lambda: target(*given), net, given, device)


# tables and files


def _cells(profiles: Sequence[Profile]) -> tuple[list[str], list[list[str]]]:
    """Headers and cells; columns that no profile fills are left out."""

    def fmt(value: Any, scale: float, digits: int) -> str:
        return "" if value is None else f"{value / scale:.{digits}f}"

    columns = [
        "model",
        "size",
        "params M",
        "GMACs",
        "other GFLOPs",
        "acts M",
        "fvcore G",
        "peak MB",
        "ms p50",
        "± IQR",
        "img/s",
        "threads",
        "note",
    ]
    rows = []
    for p in profiles:
        rows.append(
            [
                p.model,
                f"{p.size[0]}x{p.size[1]}" if p.size else "",
                fmt(p.params, 1e6, 2),
                fmt(p.macs, 1e9, 3),
                fmt(p.flops_other, 1e9, 3),
                fmt(p.acts, 1e6, 2),
                fmt(p.fvcore_total, 1e9, 3),
                f"{p.memory.peak / 1e6:.0f}" if p.memory else "",
                f"{1e3 * p.latency.median:.1f}" if p.latency else "",
                f"{1e3 * p.latency.iqr:.1f}" if p.latency else "",
                f"{p.throughput:.1f}" if p.throughput else "",
                str(p.config.get("threads") or "") if p.latency or p.throughput else "",
                "; ".join(p.notes),
            ]
        )
    keep = [i for i in range(len(columns)) if any(row[i] for row in rows)]
    return [columns[i] for i in keep], [[row[i] for i in keep] for row in rows]


def _conditions(profiles: Sequence[Profile]) -> str:
    """One line with the conditions of the measurement, empty when nothing was measured."""
    p = next((p for p in profiles if p.latency or p.throughput or p.memory), None)
    if p is None:
        return ""
    c, e = p.config, p.environment
    parts = [f"{e['machine']} ({c['device']})", c["dtype"] + (" autocast" if c["amp"] else "")]
    parts += ["channels_last"] * c["channels_last"] + [f"compiled {c['compile']}"] * bool(c["compile"])
    if p.latency:
        parts.append(f"ms: median of one call, batch {p.latency_batch}")
    if p.throughput:
        parts.append(f"img/s: batch {p.throughput_batch}")
    if p.memory:
        parts.append(f"peak MB: weights, input and activations, batch {p.throughput_batch or p.latency_batch or 1}")
    parts.append(f"torch {e['torch']}, {e['date'][:10]}")
    return "; ".join(parts) + "."


def markdown_table(profiles: Sequence[Profile]) -> str:
    """Profiles as a Markdown table with its conventions."""
    columns, rows = _cells(profiles)
    rule = ["---" if c in ("model", "note") else "---:" for c in columns]
    lines = [f"| {' | '.join(cells)} |" for cells in (columns, rule, *rows)]
    return "\n".join([*lines, "", *filter(None, [_conditions(profiles), FOOTNOTE]), ""])


def print_profiles(profiles: Sequence[Profile]) -> None:
    """Print the table with its conventions; notes follow below it."""
    columns, rows = _cells(profiles)
    notes = [(p.model, note) for p in profiles for note in p.notes]
    if "note" in columns:
        columns, rows = columns[:-1], [row[:-1] for row in rows]
    print_table(columns, rows, numeric=range(1, len(columns)))
    for line in filter(None, [_conditions(profiles), FOOTNOTE]):
        print(line)
    for name, note in notes:
        stderr.print(f"{name}: {note}", style="yellow")


def write_results(profiles: Sequence[Profile], path: Path, kind: str) -> None:
    """Write profiles to a file in one step: JSON and Markdown anew, CSV appended with one row each.

    Raises:
        UserError: If the folder cannot be written, or an existing CSV file has other columns.
    """
    if kind == "json":
        text = json.dumps([p.to_dict() for p in profiles], indent=1)
    elif kind == "md":
        text = markdown_table(profiles)
    else:
        import io

        rows = [p.to_row() for p in profiles]
        old = path.read_text(encoding="utf-8") if path.is_file() else ""
        out = io.StringIO()
        writer = csv.DictWriter(out, fieldnames=list(rows[0]), lineterminator="\n")
        if not old:
            writer.writeheader()
        elif next(csv.reader(old.splitlines())) != list(rows[0]):
            raise UserError(f"--out {str(path)!r}: the file has other columns; give a new one")
        writer.writerows(rows)
        text = old + out.getvalue()
    with atomic_write(path) as f:
        f.write(text)


def plot(profiles: Sequence[Profile], path: Path) -> None:
    """Draw cost against speed: images a second where measured, else latency, else parameters; over GMACs.

    Args:
        profiles: At least one result.
        path: Picture file; the ending picks the format.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    if all(p.throughput for p in profiles):
        label = f"images/s, batch {profiles[0].throughput_batch}"
        values = [p.throughput or 0.0 for p in profiles]
    elif all(p.latency for p in profiles):
        label = f"latency, ms, batch {profiles[0].latency_batch}"
        values = [1e3 * p.latency.median for p in profiles if p.latency]
    else:
        label, values = "parameters, M", [p.params / 1e6 for p in profiles]
    figure, axes = plt.subplots(figsize=(7, 4.5), layout="constrained")
    families: dict[str, list[int]] = {}
    for i, p in enumerate(profiles):
        families.setdefault(p.model.split("_")[0], []).append(i)
    for family, members in families.items():
        members.sort(key=lambda i: profiles[i].macs)
        xs, ys = [profiles[i].macs / 1e9 for i in members], [values[i] for i in members]
        axes.plot(xs, ys, marker="o", linewidth=1, label=family)
        for i, x, y in zip(members, xs, ys, strict=True):
            threads = profiles[i].config.get("threads")
            many = len({q.config.get("threads") for q in profiles}) > 1
            text = f"{profiles[i].model}, {threads} threads" if many else profiles[i].model
            axes.annotate(text, (x, y), xytext=(5, 5), textcoords="offset points", fontsize=8)
    axes.set_xlabel("GMACs (multiply-accumulates of one image, 1e9)")
    axes.set_ylabel(label)
    axes.margins(0.18)
    axes.grid(alpha=0.3)
    axes.set_title(_conditions(profiles).split(";")[0] or "counts", fontsize=9)
    with atomic_write(path, "wb") as f:
        figure.savefig(f, format=path.suffix[1:], dpi=150)
    plt.close(figure)


# command line


def parser() -> argparse.ArgumentParser:
    """Command-line options."""
    p = argparse.ArgumentParser(
        prog="vizoo profile",
        description=__doc__,
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    p.add_argument("models", nargs="+", metavar="MODEL", help="timm names or globs, vizoo's included")
    p.add_argument("--mode", nargs="+", choices=[*MODES, "all"], help="what to do (count; all when --device is given)")
    p.add_argument(
        "--size", type=int, nargs="+", metavar="N", help="side, or height and width, in pixels (the model's)"
    )
    p.add_argument(
        "--batch", type=int, metavar="N", help="images at once (latency 1; throughput 8 on a CPU, 64 on a GPU)"
    )
    p.add_argument("--device", help="cpu, cuda, cuda:N or meta")
    p.add_argument(
        "--threads", metavar="N[,N]", help="CPU threads; several are measured in a fresh process each (all cores)"
    )
    p.add_argument("--dtype", choices=list(DTYPES), default="fp32", help="of weights and input (fp32)")
    p.add_argument("--amp", action="store_true", help="float32 weights under autocast to --dtype")
    p.add_argument("--channels-last", action="store_true", help="channels_last memory")
    p.add_argument("--compile", nargs="?", const=True, default=False, metavar="MODE", help="torch.compile")
    p.add_argument("--no-fused", action="store_true", help="plain PyTorch instead of fused attention and kernels")
    p.add_argument("--reparam", action="store_true", help="merge branches for inference where the model can")
    p.add_argument("--features", action="store_true", help="the backbone as features_only")
    p.add_argument("--in-chans", type=int, metavar="N", help="channels of the image")
    p.add_argument("--num-classes", type=int, metavar="N", help="classes of the head; 0 for none")
    p.add_argument("--model-kwargs", nargs="+", default=[], metavar="K=V", help="further arguments of the model")
    p.add_argument("--checkpoint", metavar="FILE", help="weights, as timm's checkpoint_path")
    p.add_argument("--depth", type=int, metavar="N", help="also list modules down to this depth")
    p.add_argument("--by", choices=["module", "op"], help="list modules (depth 1) or operators")
    p.add_argument("--sort", choices=["macs", "acts", "other"], default="", help="order of the modules")
    p.add_argument("--top", type=int, default=0, metavar="N", help="most rows of that list")
    p.add_argument("--fvcore", action="store_true", help="also fvcore's total, with its norms and pooling")
    p.add_argument("--check", action="store_true", help="compare both counting engines and batch sizes; exit status 3")
    p.add_argument("--strict", action="store_true", help="exit status 3 when an operator could not be counted")
    p.add_argument("--min-time", type=float, default=2.0, metavar="S", help="least seconds of sampling (2)")
    p.add_argument("--max-time", type=float, default=10.0, metavar="S", help="most seconds of sampling (10)")
    p.add_argument("--out", type=Path, metavar="FILE", help="write .json, .csv (appended) or .md")
    p.add_argument("--plot", type=Path, metavar="FILE", help="picture of speed or size over GMACs: .png, .pdf or .svg")
    p.add_argument(
        "--import", dest="packages", nargs="+", default=[], metavar="PACKAGE", help="packages that register models"
    )
    return p


def _model_kwargs(args: argparse.Namespace) -> dict[str, Any]:
    import ast

    kwargs: dict[str, Any] = {}
    for item in args.model_kwargs:
        key, equal, value = item.partition("=")
        if not equal or not key.isidentifier():
            raise UserError(f"--model-kwargs {item!r}: write NAME=VALUE")
        try:
            kwargs[key] = ast.literal_eval(value)
        except (ValueError, SyntaxError):
            kwargs[key] = value
    for key, least in (("in_chans", 1), ("num_classes", 0)):
        value = getattr(args, key)
        if value is not None:
            if value < least:
                raise UserError(f"--{key.replace('_', '-')} {value}: at least {least}")
            kwargs[key] = value
    if args.checkpoint:
        kwargs["checkpoint_path"] = args.checkpoint
    if args.features:
        kwargs["features_only"] = True
    return kwargs


def _threads(args: argparse.Namespace) -> list[int]:
    import psutil

    if args.threads is None:
        available = len(psutil.Process().cpu_affinity()) if hasattr(psutil.Process, "cpu_affinity") else None
        return [max(1, min(psutil.cpu_count(logical=False) or 1, available or 1 << 30))]
    try:
        threads = [int(n) for n in args.threads.split(",")]
    except ValueError:
        threads = [0]
    if min(threads) < 1:
        raise UserError(f"--threads {args.threads}: give numbers from 1, separated by commas")
    return threads


def _check(args: argparse.Namespace) -> tuple[list[str], list[str]]:
    """Refuse bad input before anything runs; returns the names and modes."""
    for package in args.packages:
        try:
            importlib.import_module(package)
        except ImportError as e:
            raise UserError(f"--import {package}: {e}") from None
    for option, allowed in (("out", (".json", ".csv", ".md")), ("plot", (".png", ".pdf", ".svg"))):
        path = getattr(args, option)
        if path is None:
            continue
        if path.suffix not in allowed:
            raise UserError(f"--{option} {str(path)!r}: the ending must be one of {', '.join(allowed)}")
        if not path.absolute().parent.is_dir():
            raise UserError(f"--{option} {str(path)!r}: the folder does not exist")
    if args.size is not None:
        read_size(args.size)
    if args.batch is not None and args.batch < 1:
        raise UserError(f"--batch {args.batch}: at least 1")
    if args.min_time < 0 or args.max_time < args.min_time:
        raise UserError(f"--min-time {args.min_time:g} --max-time {args.max_time:g}: need 0 <= min <= max seconds")
    resolve_device(args.device or "cpu")
    modes = args.mode or (["all"] if args.device not in (None, "meta") else ["count"])
    return resolve_models(args.models), modes


def _one(args: argparse.Namespace, name: str, modes: list[str], tell: Any) -> Profile:
    from timm.layers import set_fused_attn

    kwargs = _model_kwargs(args)
    model: Any = name
    if args.no_fused or args.reparam:
        from timm.utils.model import reparameterize_model

        set_fused_attn(not args.no_fused)
        try:
            model = build_model(name, **kwargs).eval()
        finally:
            set_fused_attn(True)
        if args.reparam:
            model = reparameterize_model(model)
    result = profile(
        model,
        size=args.size,
        mode=modes,
        device=args.device or "cpu",
        dtype=args.dtype,
        amp=args.amp,
        channels_last=args.channels_last,
        compile=args.compile,
        batch=args.batch,
        fvcore=args.fvcore,
        check=args.check,
        min_time=args.min_time,
        max_time=args.max_time,
        model_kwargs=kwargs,
        step=tell,
    )
    result.model = name
    result.config.update(fused=not args.no_fused, reparam=args.reparam, features=args.features)
    return result


def _breakdown(args: argparse.Namespace, p: Profile) -> None:
    if args.by == "op":
        rows = [[r["op"], f"{r['calls']:,}", f"{r['macs'] / 1e9:.4f}", f"{r['share']:.1%}"] for r in p.by_op()]
        print(f"\noperators of {p.model}")
        print_table(["operator", "calls", "GMACs", "share"], rows[: args.top or None], numeric=(1, 2, 3))
        return
    modules = p.by_module(1 if args.depth is None else args.depth, args.sort, args.top)
    rows = [
        [
            r["module"],
            f"{r['macs'] / 1e9:.4f}",
            f"{r['share']:.1%}",
            f"{r['acts'] / 1e6:.3f}",
            f"{r['other'] / 1e9:.4f}",
        ]
        for r in modules
    ]
    print(f"\nmodules of {p.model}")
    print_table(["module", "GMACs", "share", "acts M", "other GFLOPs"], rows, numeric=(1, 2, 3, 4))


def _profile_all(args: argparse.Namespace, names: list[str], modes: list[str], threads: int) -> list[Profile]:
    """Profile every model with one number of threads."""
    import torch

    torch.set_num_threads(threads)
    profiles = []
    with progress() as bar:
        task = bar.add_task("starting", total=len(names))
        for name in names:

            def tell(text: str, name: str = name) -> None:
                bar.update(task, description=f"{name}: {text}")

            profiles.append(_one(args, name, modes, tell))
            bar.advance(task)
    return profiles


def _run(argv: list[str]) -> int:
    args = parser().parse_args(argv)
    names, modes = _check(args)
    threads = _threads(args)
    if len(threads) == 1:
        profiles = _profile_all(args, names, modes, threads[0])
    else:  # OpenMP keeps the pool of its first size, so each setting gets a fresh process
        profiles = []
        for n in threads:
            with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
                profiles += pool.submit(_profile_all, args, names, modes, n).result()
    print_profiles(profiles)
    if args.by or args.depth is not None:
        for p in profiles:
            _breakdown(args, p)
    if args.out:
        write_results(profiles, args.out, args.out.suffix[1:])
    if args.plot:
        plot(profiles, args.plot)
    uncounted = args.strict and any(p.uncounted for p in profiles)
    differ = args.check and any(n.startswith(("engines differ", "not linear")) for p in profiles for n in p.notes)
    return 3 if uncounted or differ else 0


def main(argv: Sequence[str] | None = None) -> int:
    """Profile models; returns the exit status."""
    return run_tool(_run, argv, "profile")


if __name__ == "__main__":
    raise SystemExit(main())
