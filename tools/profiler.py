"""``vizoo profile``: what any timm model costs: parameters, multiply-accumulates, activations, memory, time."""

from __future__ import annotations

import argparse
import contextlib
import copy
import dataclasses
import importlib
import json
import multiprocessing
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vizoo.backbones.ops.cost import Cost, register_cost
from vizoo.tools.common import (
    Failure,
    UserError,
    append_table,
    atomic_write,
    build_model,
    check_file,
    check_output,
    check_table,
    console,
    explain,
    print_table,
    progress,
    resolve_device,
    resolve_models,
    run_tool,
    save_figure,
    short,
)
from vizoo.tools.options import MOST, MOST_THREADS, Parser, literal, number, read_size

if TYPE_CHECKING:
    from vizoo.tools.profiling.counting import Count
    from vizoo.tools.profiling.timing import Comparison, Memory, Stats

__all__ = ["Cost", "Profile", "compare", "count", "measure", "profile", "register_cost"]

MODES = ("count", "memory", "latency", "throughput")
DTYPES = {"fp32": "float32", "tf32": "float32", "bf16": "bfloat16", "fp16": "float16"}
FOOTNOTE = """\
GMACs: multiply-accumulates of convolutions, linear layers and attention of one image, in 1e9; papers of this field
print them as FLOPs.  GFLOPs = 2 GMACs + other GFLOPs (norms, softmax, activations, biases, by fixed costs per element).
acts: elements written by those contractions, attention scores included.  Counted by vizoo profile."""
FVCORE = "fvcore G: fvcore's total in 1e9: a multiply-accumulate counts one, and norms and pooling are in it."
EXAMPLES = """\
examples:
  vizoo profile litv2_s                                    exact counts; needs no device and no weights
  vizoo profile litv2_s resnet50 --device cpu              everything, measured on this machine
  vizoo profile 'litv2_*' --mode count --size 800 1280     every match, at another size (height width)
  vizoo profile litv2_s --mode count --depth 2 --top 10    where the cost sits
  vizoo profile litv2_s --device cuda --dtype bf16 --compile --batch 128
  vizoo profile litv2_s resnet50 --device cpu --threads 1,2 --out speed.csv
  vizoo profile litv2_s litv2_m swin_tiny_patch4_window7_224 --device cpu --mode latency --plot cost.png
  vizoo profile litv2_s --strict --check                   fail on a partial count; compare two engines"""
COLUMNS = [
    "model", "height", "width", "params", "macs", "flops_other", "acts", "bytes", "kernels", "fvcore_total", "status",
    "reasons", "latency_batch", "latency_median_ms", "latency_p10_ms", "latency_p90_ms", "latency_iqr_ms",
    "latency_n", "latency_first_ms", "throughput_batch", "throughput", "peak_bytes", "cpu_use", "device", "dtype",
    "amp", "channels_last", "compile", "threads", "fused", "reparam", "features", "vizoo", "commit", "python",
    "torch", "timm", "cuda", "machine", "instructions", "cores", "load", "date", "notes",
]  # fmt: skip


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
        notes: What was doubtful or changed while measuring.
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

    @property
    def status(self) -> str:
        """``complete``, or ``partial`` when the counts miss something or hold for some inputs only."""
        return self.counts.status

    @property
    def reasons(self) -> list[str]:
        """Why the counts are partial, one line each."""
        return self.counts.reasons

    def by_module(self, depth: int = 1, sort: str = "", top: int = 0) -> list[dict[str, Any]]:
        """Costs of the modules down to a depth.

        Args:
            depth: Number of name parts shown; 0 is the whole model.
            sort: ``macs``, ``params``, ``acts`` or ``other`` for the most expensive first; empty for the model's order.
            top: Most rows; 0 for all.

        Returns:
            Rows with ``module, params, macs, share, acts, other, out``, the last the shape of the output.
        """
        rows = self.counts.by_module(depth, sort, top)
        return [{**row, "module": row["module"] or self.model} for row in rows]

    def by_op(self, top: int = 0) -> list[dict[str, Any]]:
        """Rows with ``op, calls, macs, share, other``, the most expensive first; ``top`` limits them."""
        return self.counts.by_op(top)

    def to_dict(self) -> dict[str, Any]:
        """Everything, JSON-ready; times in milliseconds, memory in bytes."""
        c = self.counts
        return {
            "model": self.model,
            "environment": self.environment,  # near the beginning, where a file of ours is told by
            "size": list(self.size) if self.size else None,
            "status": c.status,
            "reasons": c.reasons,
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
            "modules": {path: m._asdict() for path, m in c.modules.items()},
            "ops": self.by_op(),
            "fvcore_total": self.fvcore_total,
            "latency_batch": self.latency_batch,
            "latency": self.latency.to_dict() if self.latency else None,
            "throughput_batch": self.throughput_batch,
            "throughput": self.throughput,
            "memory": self.memory._asdict() if self.memory else None,
            "config": self.config,
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
            "status": self.status,
            "reasons": "; ".join(self.reasons),
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
    """Count what one call of a module costs; see :func:`vizoo.tools.profiling.counting.count`."""
    from vizoo.tools.profiling import counting

    return counting.count(model, *args, **kwargs)


def measure(*args: Any, **kwargs: Any) -> Stats:
    """Time a function; see :func:`vizoo.tools.profiling.timing.measure`."""
    from vizoo.tools.profiling import timing

    return timing.measure(*args, **kwargs)


def compare(*args: Any, **kwargs: Any) -> Comparison:
    """Time functions in alternation; see :func:`vizoo.tools.profiling.timing.compare`."""
    from vizoo.tools.profiling import timing

    return timing.compare(*args, **kwargs)


def environment(device: Any) -> dict[str, Any]:
    """Versions and machine of a measurement."""
    import datetime
    import platform

    import psutil
    import timm
    import torch

    import vizoo
    from vizoo.tools.bench import commit
    from vizoo.tools.env import cpu_name

    gpu = device.type == "cuda"
    return {
        "vizoo": vizoo.__version__,
        "commit": commit(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "timm": timm.__version__,
        "cuda": torch.version.cuda if gpu else None,
        "machine": torch.cuda.get_device_name(device) if gpu else cpu_name(),
        "instructions": torch.backends.cpu.get_cpu_capability(),
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
        Failure: If it cannot be run on the device: a kernel or memory is missing.
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
    real = bool(timed or check or fvcore or (model_kwargs or {}).get("checkpoint_path"))
    tell("building")
    kwargs, given = dict(model_kwargs or {}), inputs is not None
    net, name, side, inputs = _build(model, inputs, size, kwargs, real)
    modes_before = {m: m.training for m in net.modules()}
    net.eval()
    try:
        tell("counting")
        anew = None if given else lambda: _build(model, None, size, kwargs, real=True)[0].eval()
        result = Profile(name, side, {}, {}, _counted(net, inputs, name, side, anew))
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
            own = isinstance(model, str)  # a module of the caller is neither moved nor converted
            _measure(result, net if own else copy.deepcopy(net), inputs, timed, where, batch, min_time, max_time, tell)
    finally:
        for module, training in modes_before.items():
            module.training = training
    return result


def _build(
    model: Any, inputs: Sequence[Any] | None, size: Any, kwargs: dict[str, Any], real: bool
) -> tuple[Any, str, tuple[int, int] | None, Sequence[Any]]:
    """Model, name, image size and inputs; without ``real`` the weights are on the meta device."""
    import torch
    from timm.models import get_model_input_config

    from vizoo.tools.profiling.counting import unwrap

    place: dict[str, Any] = {} if real else {"device": "meta"}
    if isinstance(model, str):
        name = resolve_models([model])[0]
        net = build_model(name, **kwargs, **place)
    else:
        net = unwrap(model)
        name = type(net).__name__
    if inputs is not None:
        return net, name, None, inputs
    config = get_model_input_config(net)
    side = tuple(config["input_size"][1:]) if size is None else read_size(size, "size")
    if isinstance(model, str) and config["fixed_input_size"] and side != tuple(config["input_size"][1:]):
        net = build_model(name, **{**kwargs, "img_size": side}, **place)
    return net, name, (side[0], side[1]), (torch.empty(1, config["input_size"][0], *side, device="meta"),)


def _counted(
    net: Any, inputs: Sequence[Any], name: str, side: tuple[int, int] | None, real: Callable[[], Any] | None
) -> Count:
    """Counts on the meta device, or where that cannot settle them of ``real()`` weights and random inputs."""
    from vizoo.tools.profiling.timing import random_like

    found: Count | None = None
    try:
        try:
            found = count(net, *inputs)
            settled = found.engine not in ("meta", "fake") or len(found.reasons) <= len(found.uncounted)
            if settled or real is None:
                return found
        except (AssertionError, ValueError):  # what the model itself checks
            raise
        except Exception:
            if real is None:
                raise
        net = real()
        return count(net, *(random_like(x, 1, "cpu", _dtype(net)) for x in inputs), engine="real")
    except Exception as e:
        if found is not None:
            return found
        if explain(e) is not None:
            raise
        at = f" at size {side[0]}x{side[1]}" if side else ""
        raise UserError(f"{name!r} cannot run{at}: {one_line(e)}") from e


def one_line(e: BaseException) -> str:
    """Message of an error on one line, or its name where it has none."""
    return " ".join(str(e).split())[:300] or type(e).__name__


def _dtype(net: Any) -> Any:
    import torch

    return next((p.dtype for p in net.parameters() if p.is_floating_point()), torch.float32)


def _second_engine(result: Profile, net: Any, inputs: Sequence[Any], check: bool, fvcore: bool) -> None:
    from vizoo.tools.profiling.counting import differences, fvcore_counts
    from vizoo.tools.profiling.timing import random_like

    try:
        one = [random_like(x, 1, "cpu", _dtype(net)) for x in inputs]
        total = fvcore_counts(net, *one, contractions=False).get("", 0) if fvcore else None
        second = fvcore_counts(net, *one) if check else {}
    except Exception as e:  # whatever a trace raises
        raise Failure(f"{result.model!r}: the second engine cannot trace it: {one_line(e)}") from e
    result.fvcore_total = total
    if check:
        wrong = differences(result.counts, second)
        result.notes += [f"engines differ: multiply-accumulates of {text}" for text in wrong]
        where = "meta" if result.counts.engine in ("meta", "fake") else "cpu"
        three = count(net, *(random_like(x, 3, where, _dtype(net)) for x in inputs)).macs
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
    import torch

    from vizoo.tools.profiling.timing import conditions, measure_model

    config = result.config
    dtype = getattr(torch, DTYPES[config["dtype"]])
    weights = torch.float32 if config["amp"] else dtype
    options = {"channels_last": config["channels_last"], "compile": config["compile"], "batch": batch}
    try:
        net = net.to(device, weights)
        if config["channels_last"]:
            net = net.to(memory_format=torch.channels_last)
        with conditions(device, dtype, config["amp"], config["dtype"] == "tf32"):
            found = measure_model(
                net,
                inputs,
                modes,
                device,
                weights=weights,
                min_time=min_time,
                max_time=max_time,
                step=tell,
                **options,
            )
    except torch.cuda.OutOfMemoryError:
        raise Failure(f"{result.model!r}: one image does not fit into the memory of {device}") from None
    except Exception as e:  # an operator that lacks the dtype, a compiler that is not there
        given = "".join(f" --{k.replace('_', '-')}" for k in ("amp", "channels_last", "compile") if config[k])
        text = f"{result.model!r} cannot run on {device} with --dtype {config['dtype']}{given}: {one_line(e)}"
        raise Failure(text) from e
    result.latency, result.latency_batch = found.latency, found.latency_batch
    result.throughput, result.throughput_batch = found.throughput, found.throughput_batch
    result.memory = found.memory
    result.notes += found.notes


# tables and files


def _cells(profiles: Sequence[Profile]) -> tuple[list[str], list[list[str]]]:
    """Headers and cells, partial counts with a star; columns that no profile fills are left out."""

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
        star = "*" if p.reasons else ""
        rows.append(
            [
                p.model,
                f"{p.size[0]}x{p.size[1]}" if p.size else "",
                fmt(p.params, 1e6, 2),
                fmt(p.macs, 1e9, 3) + star,
                fmt(p.flops_other, 1e9, 3) + star,
                fmt(p.acts, 1e6, 2) + star,
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
    if c["compile"] and p.latency:
        parts.append(f"first call with compilation {p.latency.first:.1f} s")
    parts.append(f"torch {e['torch']}, {e['date'][:10]}")
    return "; ".join(parts) + "."


def _footnotes(profiles: Sequence[Profile]) -> list[str]:
    """Why counts are partial, and the conventions of the columns that are shown."""
    partial = [f"* {p.model}: partial count: {reason}." for p in profiles for reason in p.reasons]
    total = any(p.fvcore_total is not None for p in profiles)
    return list(filter(None, [*dict.fromkeys(partial), _conditions(profiles), FOOTNOTE, FVCORE if total else ""]))


def markdown_table(profiles: Sequence[Profile]) -> str:
    """Profiles as a Markdown table with its conventions."""
    columns, rows = _cells(profiles)
    rule = ["---" if c in ("model", "note") else "---:" for c in columns]
    lines = [f"| {' | '.join(cells)} |" for cells in (columns, rule, *rows)]
    return "\n".join([*lines, "", *_footnotes(profiles), ""])


def print_profiles(profiles: Sequence[Profile]) -> None:
    """Print the table with its conventions; notes follow below it."""
    columns, rows = _cells(profiles)
    several = len({p.config.get("threads") for p in profiles}) > 1
    names = [f"{p.model}, {p.config['threads']} threads" if several else p.model for p in profiles]
    notes = [(name, note) for name, p in zip(names, profiles, strict=True) for note in p.notes]
    if "note" in columns:
        columns, rows = columns[:-1], [row[:-1] for row in rows]
    print_table(columns, rows, numeric=range(1, len(columns)))
    for line in _footnotes(profiles):
        print(line)
    for name, note in notes:
        console(stderr=True).print(f"{name}: {note}", style="yellow", soft_wrap=True)


def write_results(profiles: Sequence[Profile], path: Path, kind: str) -> None:
    """Write profiles to a file in one step: JSON and Markdown anew, CSV appended with one row each.

    Raises:
        UserError: If an existing CSV file has other columns.
        Failure: If the file cannot be written.
    """
    if kind == "csv":
        append_table(path, COLUMNS, [p.to_row() for p in profiles])
        return
    text = json.dumps([p.to_dict() for p in profiles], indent=1) if kind == "json" else markdown_table(profiles)
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
    figure, axes = plt.subplots(figsize=(8, 4.5), layout="constrained")
    families: dict[str, list[int]] = {}
    for i, p in enumerate(profiles):
        families.setdefault(f"{p.model.split('_')[0]}, {p.config.get('threads')}", []).append(i)
    for members in families.values():  # a thin line joins the sizes of a family
        members.sort(key=lambda i: profiles[i].macs)
        axes.plot([profiles[i].macs / 1e9 for i in members], [values[i] for i in members], color="0.8", zorder=1)
    several = len({p.config.get("threads") for p in profiles}) > 1
    markers, colors = "osD^vP*X", plt.get_cmap("tab10").colors  # type: ignore[attr-defined]
    for i, p in enumerate(profiles):
        name = f"{p.model}, {p.config.get('threads')} threads" if several else p.model
        name += " (partial count)" if p.reasons else ""
        axes.scatter(
            p.macs / 1e9, values[i], s=45, color=colors[i % 10], marker=markers[i // 10 % 8], label=name, zorder=2
        )
    axes.legend(loc="center left", bbox_to_anchor=(1, 0.5), frameon=False, fontsize=8)
    axes.set_xlabel("GMACs (multiply-accumulates of one image, 1e9)")
    axes.set_ylabel(label)
    axes.set_ylim(bottom=0)
    axes.set_xlim(left=0)
    axes.grid(alpha=0.3)
    threads = profiles[0].config.get("threads")
    where = _conditions(profiles).split(";")[:2] + ([f" {threads} threads"] if threads and not several else [])
    axes.set_title(",".join(where) if len(where) > 1 else "counts", fontsize=9)
    save_figure(figure, path, dpi=150)
    plt.close(figure)


# command line


def parser() -> argparse.ArgumentParser:
    """Command-line options."""
    p = Parser(
        prog="vizoo profile",
        description=str(__doc__).replace("`", ""),
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    p.add_argument("models", nargs="+", metavar="MODEL", help="timm names or globs, vizoo's included")
    p.add_argument("--mode", nargs="+", choices=[*MODES, "all"], help="what to do (count; all when --device is given)")
    p.add_argument(
        "--size", type=int, nargs="+", metavar="N", help="side, or height and width, in pixels (the model's)"
    )
    p.add_argument(
        "--batch",
        type=number(int, 1, MOST),
        metavar="N",
        help="images at once (latency 1; throughput 8 on a CPU, 64 on a GPU)",
    )
    p.add_argument("--device", help="cpu, cuda, cuda:N or meta")
    p.add_argument(
        "--threads", metavar="N[,N]", help="CPU threads; several are measured in a fresh process each (physical cores)"
    )
    p.add_argument("--dtype", choices=list(DTYPES), default="fp32", help="of weights and input (fp32)")
    p.add_argument("--amp", action="store_true", help="float32 weights under autocast to --dtype")
    p.add_argument("--channels-last", action="store_true", help="channels_last memory")
    p.add_argument(
        "--compile",
        nargs="?",
        const="default",
        default=False,
        choices=["default", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs"],
        metavar="MODE",
        help="torch.compile: default, reduce-overhead, max-autotune or max-autotune-no-cudagraphs",
    )
    p.add_argument(
        "--fused",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="fused attention and kernels (default), or plain PyTorch",
    )
    p.add_argument("--reparam", action="store_true", help="merge branches for inference where the model can")
    p.add_argument("--features", action="store_true", help="the backbone as features_only")
    p.add_argument("--in-chans", type=number(int, 1, MOST), metavar="N", help="channels of the image")
    p.add_argument("--num-classes", type=number(int, 0, MOST), metavar="N", help="classes of the head; 0 for none")
    p.add_argument("--model-kwargs", nargs="+", default=[], metavar="K=V", help="further arguments of the model")
    p.add_argument("--checkpoint", metavar="FILE", help="weights, as timm's checkpoint_path")
    p.add_argument("--depth", type=number(int, 0), metavar="N", help="also list modules down to this depth")
    p.add_argument("--by", choices=["module", "op"], help="list modules (depth 1) or operators")
    p.add_argument("--sort", choices=["macs", "params", "acts", "other"], default="", help="order of the modules")
    p.add_argument("--top", type=number(int, 0), default=0, metavar="N", help="most rows of that list")
    p.add_argument("--fvcore", action="store_true", help="also fvcore's total, with its norms and pooling")
    p.add_argument(
        "--check",
        action="store_true",
        help="compare both counting engines and batches; exit status 1",
    )
    p.add_argument("--strict", action="store_true", help="exit status 1 when a count is partial")
    p.add_argument("--min-time", type=number(float, 0), default=2.0, metavar="S", help="least seconds of sampling (2)")
    p.add_argument("--max-time", type=number(float, 0), default=10.0, metavar="S", help="most seconds of sampling (10)")
    p.add_argument("--out", type=Path, metavar="FILE", help="write .json, .csv (appended) or .md")
    p.add_argument("--plot", type=Path, metavar="FILE", help="picture of speed or size over GMACs: .png, .pdf or .svg")
    p.add_argument(
        "--import", dest="packages", nargs="+", default=[], metavar="PACKAGE", help="packages that register models"
    )
    return p


def _model_kwargs(args: argparse.Namespace) -> dict[str, Any]:
    kwargs: dict[str, Any] = {}
    for item in args.model_kwargs:
        key, equal, value = item.partition("=")
        if not equal or not key.isidentifier():
            raise UserError(f"--model-kwargs {item!r}: write NAME=VALUE")
        kwargs[key] = literal(value)
    kwargs.update({key: value for key in ("in_chans", "num_classes") if (value := getattr(args, key)) is not None})
    if args.checkpoint:
        kwargs["checkpoint_path"] = args.checkpoint
    if args.features:
        kwargs["features_only"] = True
    return kwargs


def _threads(args: argparse.Namespace) -> list[int]:
    if args.threads is None:
        from vizoo.tools.profiling.timing import default_threads

        return [default_threads()]
    try:
        threads = [int(n) for n in args.threads.split(",")]
    except ValueError:
        threads = [0]
    if min(threads) < 1 or max(threads) > MOST_THREADS:
        raise UserError(f"--threads {short(args.threads)}: give numbers from 1 to {MOST_THREADS}, separated by commas")
    return threads


def _check(args: argparse.Namespace) -> tuple[list[str], list[str]]:
    """Refuse bad input before anything runs; returns the names and modes."""
    if args.out and args.out.suffix == ".csv":
        check_table(args.out, "--out", COLUMNS)
    check_output(args.out, "--out", ".json", ".csv", ".md")
    check_output(args.plot, "--plot", ".png", ".pdf", ".svg")
    if args.checkpoint is not None:
        check_file(args.checkpoint, "--checkpoint")
    if args.size is not None:
        read_size(args.size)
    if args.max_time < args.min_time:
        raise UserError(f"--min-time {args.min_time:g} --max-time {args.max_time:g}: need 0 <= min <= max seconds")
    _model_kwargs(args)
    _threads(args)
    _import(args.packages)
    resolve_device(args.device or "cpu")
    modes = args.mode or (["all"] if args.device not in (None, "meta") else ["count"])
    return resolve_models(args.models), modes


def _import(packages: Sequence[str]) -> None:
    for package in packages:
        try:
            importlib.import_module(package)
        except (Exception, SystemExit) as e:  # whatever a package does when it is imported
            raise UserError(f"--import {short(package)}: cannot be imported: {one_line(e)}") from e


@contextlib.contextmanager
def _fused(enable: bool) -> Iterator[None]:
    """Models built inside use fused attention and kernels, or do not."""
    from timm.layers import set_fused_attn, use_fused_attn

    before = use_fused_attn(), use_fused_attn(experimental=True)
    set_fused_attn(enable, experimental=enable and before[1])
    try:
        yield
    finally:
        set_fused_attn(*before)


def _one(args: argparse.Namespace, name: str, modes: list[str], tell: Any) -> Profile:
    kwargs = _model_kwargs(args)
    model: Any = name
    with _fused(args.fused):
        if args.reparam:
            from timm.utils.model import reparameterize_model

            model = reparameterize_model(build_model(name, **kwargs).eval())
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
    result.config.update(fused=args.fused, reparam=args.reparam, features=args.features)
    return result


def _breakdown(args: argparse.Namespace, p: Profile) -> None:
    if args.by == "op":
        rows = [
            [r["op"], f"{r['calls']:,}", f"{r['macs'] / 1e9:.4f}", f"{r['share']:.1%}", f"{r['other'] / 1e9:.4f}"]
            for r in p.by_op(args.top)
        ]
        print(f"\noperators of {p.model}")
        print_table(["operator", "calls", "GMACs", "share", "other GFLOPs"], rows, numeric=(1, 2, 3, 4))
        return
    rows = [
        [
            r["module"],
            f"{r['params'] / 1e6:.3f}",
            f"{r['macs'] / 1e9:.4f}",
            f"{r['share']:.1%}",
            f"{r['acts'] / 1e6:.3f}",
            f"{r['other'] / 1e9:.4f}",
            "x".join(map(str, r["out"] or ())),
        ]
        for r in p.by_module(1 if args.depth is None else args.depth, args.sort, args.top)
    ]
    print(f"\nmodules of {p.model}")
    columns = ["module", "params M", "GMACs", "share", "acts M", "other GFLOPs", "output"]
    print_table(columns, rows, numeric=range(1, 6))


def _one_interop_thread() -> None:
    import torch

    torch.set_num_interop_threads(1)


def _profile_all(args: argparse.Namespace, names: list[str], modes: list[str], threads: int) -> list[Profile]:
    """Profile every model with one number of threads."""
    import torch

    _import(args.packages)
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
        import torch

        before = torch.get_num_threads()
        profiles = _profile_all(args, names, modes, threads[0])
        torch.set_num_threads(before)
    else:  # OpenMP keeps the pool of its first size, so each setting gets a fresh process
        profiles = []
        for n in threads:
            spawn = multiprocessing.get_context("spawn")
            with ProcessPoolExecutor(1, mp_context=spawn, initializer=_one_interop_thread) as pool:
                try:
                    profiles += pool.submit(_profile_all, args, names, modes, n).result()
                except BrokenProcessPool:
                    raise Failure(f"the process with {n} threads died, killed perhaps because memory ran out") from None
    print_profiles(profiles)
    if args.by or args.depth is not None:
        for p in profiles:
            _breakdown(args, p)
    if args.out:
        write_results(profiles, args.out, args.out.suffix[1:])
    if args.plot:
        plot(profiles, args.plot)
    partial = [f"{p.model}: {p.reasons[0]}" for p in profiles if p.reasons]
    if args.strict and partial:
        raise Failure(f"--strict: partial counts: {'; '.join(partial)}")
    differ = [n for p in profiles for n in p.notes if n.startswith(("engines differ", "not linear"))]
    return int(args.check and bool(differ))


def main(argv: Sequence[str] | None = None) -> int:
    """Profile models; returns the exit status."""
    return run_tool(_run, argv, "profile")


if __name__ == "__main__":
    from vizoo.tools import profiler  # under its own name its results can be sent between processes

    raise SystemExit(profiler.main())
