"""``vizoo bench``: a model or an attention layer against official code, timm, or plain PyTorch, in alternation.

``--suite gpu`` measures all of the zoo on a GPU in one command instead.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import itertools
import math
import os
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vizoo.tools.common import (
    Failure,
    Results,
    Rows,
    Table,
    UserError,
    check_result,
    compute_device,
    explain,
    give,
    one_line,
    progress,
    read_spec,
    refuse_failures,
    resolve_models,
    run_tool,
    short,
)
from vizoo.tools.gpu import machine_code as code
from vizoo.tools.gpu.models import measured
from vizoo.tools.gpu.suite import BUDGET, SECTIONS, run
from vizoo.tools.options import DTYPES, MOST, STATE, Parser, add, add_alias, add_result, number, read_size
from vizoo.tools.profiling.sides import (
    LAYERS,
    TOLERANCE,
    TRAINING_TOLERANCE,
    Sides,
    build_sides,
    distance,
    find_official,
    official_names,
    run_pass,
    seeded,
    training_distances,
)

if TYPE_CHECKING:
    from vizoo.tools.profiling.timing import Comparison

EXAMPLES = """\
examples:
  vizoo bench litv2_s                                   fast paths against plain PyTorch
  vizoo bench litv2_s --official LITv2                  against a checkout of the official code
  vizoo bench halo_h1                                   against timm's model of the same definition
  vizoo bench litv2_s --batch 1 8 --threads 1 2 --dtype fp32 bf16 --out results.csv
  vizoo bench litv2_s --official LITv2 --compile        both sides compiled
  vizoo bench hilo --size 56 --official LITv2           one attention layer, dim 384, on a 56x56 map
  vizoo bench halo --size 64 --batch 1 8                the first one of halo_h1 against timm's, on a 64x64 map
  vizoo bench ulsam --size 14 --batch 1 32              dim 512, against a loop over its 4 subspaces
  vizoo bench reversed --size 64 --pass train           reversed attention, 4,096 tokens, 3 heads
  vizoo bench --sass                                    machine code of all GPU kernels, no GPU needed
  vizoo bench --sass nat_tiny --dtype bf16 --batch 128 --out kernels.csv
  vizoo bench --warm nat_tiny --dtype bf16              compile the kernels of a model before its first step
  vizoo bench --suite gpu --out gpu.jsonl               tests, operators and models on a GPU, in eight minutes
  vizoo bench --suite gpu --out gpu.jsonl --sections ops --only halo

Outputs are compared before anything is timed, and nothing is recorded when they differ; for --pass train gradients too,
in float64, with every rate of dropout and stochastic depth 0 on both sides.  In bf16 the official side stays in
float32 on a CPU, where its deformable convolution has no bfloat16.  A suite runs in a checkout and needs
nothing but torch, triton, timm and pytest; what it knows is in its file at once, whatever happens then.  MB is what a
call of either side has at once besides weights and input."""
COLUMNS = [
    "name", "peer", "mode", "shape", "dtype", "peer_dtype", "batch", "threads", "rounds", "median_ms", "p20_ms",
    "p80_ms", "peer_median_ms", "peer_p20_ms", "peer_p80_ms", "ratio", "ratio_low", "ratio_high", "memory_mb",
    "peer_memory_mb", "error", "grad_error", "cpu_use", "device", *STATE, "torch", "timm", "vizoo", "commit", "date",
    "notes",
]  # fmt: skip
LEAST = 0.1  # seconds of a sample: single calls of a layer would measure the cache that the other side left behind
LAYER_OPTIONS = ("window_size", "alpha")  # arguments of layers that are options
QUANTILES = {"median": 0.5, "p20": 0.2, "p80": 0.8}
FORMATS = {  # of figures in files and in the table
    **dict.fromkeys(("median_ms", "p20_ms", "p80_ms", "peer_median_ms", "peer_p20_ms", "peer_p80_ms"), ".2f"),
    "ratio": ".2f",
    **dict.fromkeys(("ratio_low", "ratio_high"), ".4g"),
    **dict.fromkeys(("memory_mb", "peer_memory_mb"), ".1f"),
    **dict.fromkeys(("error", "grad_error"), ".1e"),
    "cpu_use": ".2f",
    "occupancy": ".3f",
    **dict.fromkeys(("issue_ms", "floor_ms"), ".4f"),
}
SHOWN = {
    "name": "what",
    "peer": "against",
    "mode": "mode",
    "shape": "shape",
    "dtype": "dtype",
    "threads": "threads",
    "batch": "batch",
    "median_ms": "ms",
    "peer_median_ms": "theirs ms",
    "ratio": "speed-up",
    "ratio_low": "from",
    "ratio_high": "to",
    "memory_mb": "MB",
    "peer_memory_mb": "theirs MB",
    "error": "error",
    "grad_error": "of gradients",
    "cpu_use": "cpu use",
}
# options that timings of one model or layer have too
COMMON = ("name", "batch", "dtype", "channels_last", "out", "json")
KINDS = {  # other kinds of benchmark, with the options that go with each
    "suite": ("out", "seconds", "sections", "only", "dry"),
    "sass": ("name", "batch", "dtype", "channels_last", "capability", "out", "json"),
    "warm": ("name", "batch", "dtype", "channels_last", "capability", "out", "json"),
}


def build_parser() -> argparse.ArgumentParser:
    """Command-line options."""
    p = Parser(prog="vizoo bench", description=str(__doc__).replace("`", ""), epilog=EXAMPLES)
    *most, last = map(repr, LAYERS)
    p.add_argument(
        "name",
        nargs="*",
        metavar="MODEL",
        help=f"a model of the zoo, or {', '.join(most)} or {last} for one attention layer",
    )
    kind = p.add_argument_group("in place of timing one model or layer").add_mutually_exclusive_group()
    kind.add_argument("--suite", choices=["gpu"], help="measure the whole zoo on a GPU, with --out")
    kind.add_argument(
        "--sass",
        action="store_true",
        help="what the Triton kernels of a training step cost in machine code, by model (default: one of each family)",
    )
    kind.add_argument("--warm", action="store_true", help="compile these kernels into Triton's cache, run nothing")
    default = "timm's model if it has one, else plain PyTorch"
    p.add_argument(
        "--official",
        type=Path,
        metavar="DIR",
        help=f"checkout of the official code of {official_names()} (default: {default})",
    )
    add(p, "--batch", "1; with --sass and --warm one, 128")
    add(p, "--threads", "torch's")
    add(p, "--dtype", "of our side; fp32, with --sass and --warm of the model, bf16")
    sides = ", ".join(f"{name} {layer.side}" for name, layer in LAYERS.items())
    add(p, "--size", f"the model's; of the map of a layer: {sides}")
    p.add_argument("--window-size", type=number(int, 1), metavar="N", help=f"window of {_defaults('window_size')}")
    add_alias(p, "--window", "window_size")
    share = f"share of low-frequency heads of {_defaults('alpha')}"
    p.add_argument("--alpha", type=number(float, 0, 1), metavar="X", help=share)
    p.add_argument(
        "--pass",
        dest="pass_",
        choices=["infer", "train"],
        default="infer",
        help="forward, or forward and backward (infer)",
    )
    add_alias(p, "--mode", "pass_")
    add(p, "--reparam", "both sides")
    add(p, "--compile", "both sides")
    add(p, "--channels-last")
    add(p, "--device", default="cpu")
    add(p, "--cpu-time")
    add(p, "--rounds", "20 calls", default=20)
    add_result(p, ".json, .csv, to which rows are added, or .md; .jsonl of a suite")
    p.add_argument(
        "--capability",
        type=number(int, 80, MOST),
        metavar="N",
        help="with --sass and --warm: compute capability times 10 of the GPU to compile for (this one's, else 90)",
    )
    suite = p.add_argument_group("options of --suite gpu")
    suite.add_argument(
        "--seconds", type=number(float, 1, MOST), default=BUDGET, metavar="S", help=f"for everything ({BUDGET:g})"
    )
    add_alias(suite, "--budget", "seconds")
    chosen = [s for s in SECTIONS if s != "env"]
    suite.add_argument("--sections", nargs="+", choices=chosen, default=chosen, help="what to run (everything)")
    suite.add_argument("--only", default="", metavar="TEXT", help="operators and models with this in their name")
    suite.add_argument("--dry", action="store_true", help="try it on a CPU with tiny shapes")
    return p


def _defaults(key: str) -> str:
    """Layers that have an argument, and what it is where nothing is said."""
    return ", ".join(f"{name} ({layer.arguments[key]:g})" for name, layer in LAYERS.items() if key in layer.arguments)


@contextlib.contextmanager
def _explained(args: argparse.Namespace, what: str, kind: type[Exception]) -> Iterator[None]:
    """Turn whatever official code, constructors and kernels raise into one line."""
    try:
        yield
    except Exception as e:
        if explain(e) is not None:
            raise
        given = {"size": " ".join(map(str, args.size or ())), "official": args.official}
        options = " ".join(f"--{k} {v}" for k, v in given.items() if v)
        raise kind(f"{args.name!r} {what}{' with ' * bool(options)}{options}: {one_line(e)}") from e


def _layer_arguments(args: argparse.Namespace) -> dict[str, Any]:
    return {k: getattr(args, k) for k in LAYER_OPTIONS if getattr(args, k) is not None}


class _Side:
    """A side, ready on the device; a call is what is timed: inference, or a forward and a backward pass."""

    def __init__(self, args: argparse.Namespace, module: Any, shape: Sequence[int], more: Sequence[Any], dtype: str):
        import torch

        from vizoo.tools.profiling.timing import compiled

        device, kind = compute_device(args.device), getattr(torch, dtype)
        self.train, self.more = args.pass_ == "train", more
        self.module = module.to(device, kind).train(self.train)
        self.x = torch.randn(*shape, generator=torch.Generator().manual_seed(1)).to(device, kind)
        if args.channels_last:
            self.module = self.module.to(memory_format=torch.channels_last)
            self.x = self.x.contiguous(memory_format=torch.channels_last)
        self.run: Any = compiled(self.module, mode=args.compile) if args.compile else self.module

    def __call__(self) -> list[Any]:
        if self.train:
            self.module.zero_grad(set_to_none=True)
        return run_pass(self.run, (self.x, *self.more), self.train)

    def memory(self) -> float:
        """Megabytes that a call has at once, besides weights and input; the gradients of a training step count."""
        from vizoo.tools.profiling.memory import peak_memory

        def call() -> None:
            self()
            self.module.zero_grad(set_to_none=True)

        return peak_memory(call, self.module, (self.x, *self.more), self.x.device).activations / 1e6


def _peer_dtype(args: argparse.Namespace, sides: Sides, dtype: str) -> str:
    """Dtype of the other side: official code has operators without half precision on a CPU."""
    return "fp32" if sides.against == "official" and compute_device(args.device).type == "cpu" else dtype


def _check_training(args: argparse.Namespace, sides: Sides) -> dict[str, float]:
    """Refuse sides that do not train alike; how far their gradients are apart, by column."""
    with _explained(args, "cannot train", UserError if args.size else Failure):
        found = training_distances(sides)
    for what, error in found.items():
        _refuse(args, "training in float64", what, error, TRAINING_TOLERANCE["float64"])
    return {"grad_error": found["gradients"]}


def _check_outputs(args: argparse.Namespace, ours: _Side, theirs: _Side, dtype: str) -> dict[str, float]:
    """Refuse sides whose outputs differ as they are timed; how far they are apart, by column."""
    device, outputs = compute_device(args.device), []
    with _explained(args, f"cannot run in {dtype} on {device}", UserError if args.size else Failure):
        for side in (ours, theirs):
            with seeded(device):
                outputs.append(side())
        error = distance(*outputs)
    _refuse(args, dtype, "outputs", error, (TRAINING_TOLERANCE if ours.train else TOLERANCE)[dtype])
    return {"error": error}


def _refuse(args: argparse.Namespace, where: str, what: str, error: float, allowed: float) -> None:
    if not error <= allowed:
        raise Failure(f"{args.name}, {where}: {what} differ by {error:.1e}, allowed {allowed:g}; not timed")


def _timed(args: argparse.Namespace, sides: Sides, batch: int, dtype: str) -> tuple[Comparison, dict[str, Any]]:
    """Check and time both sides; the timings, and the other columns: errors, memory and the state of the device."""
    import torch

    from vizoo.tools.profiling.state import Watch
    from vizoo.tools.profiling.timing import compare, float32_products

    device, train, name = compute_device(args.device), args.pass_ == "train", _written(dtype)
    kinds = [DTYPES[d] for d in (dtype, _peer_dtype(args, sides, dtype))]
    shape = (batch, *sides.shape)
    errors = _check_training(args, sides) if train else {}
    with _explained(args, "cannot be built", UserError):
        ours = _Side(args, sides.ours, shape, (), kinds[0])
        theirs = _Side(args, sides.peer, shape, sides.more, kinds[1])
    # fp32 is what the process makes of it, as before any measurement
    products = float32_products(tf32=True) if dtype == "tf32" else contextlib.nullcontext()
    with torch.set_grad_enabled(train), torch.inference_mode(not train), products:
        errors |= _check_outputs(args, ours, theirs, name)
        with _explained(args, f"fails in {name} on {device}", Failure), progress() as bar:
            task = bar.add_task("timing", total=args.rounds)
            watch = Watch(device)

            def tick() -> None:
                watch.look()
                bar.advance(task)

            timed = compare(
                {"ours": ours, "theirs": theirs},
                rounds=args.rounds,
                device=device,
                tick=tick,
                clock=time.process_time if args.cpu_time else time.perf_counter,
                least=LEAST,
            )
            memory = {"memory_mb": ours.memory(), "peer_memory_mb": theirs.memory()}
    return timed, {**errors, **memory, **watch.record, "notes": "; ".join(watch.notes)}


def _written(dtype: str) -> str:
    """A dtype as rows name it: torch's name; TF32, which is none of torch's, by its own."""
    return dtype if dtype == "tf32" else DTYPES[dtype]


def _mode(args: argparse.Namespace) -> str:
    """How both sides are run, as rows say it."""
    words = [args.pass_, *["reparam"] * args.reparam]
    if args.compile:
        words.append("compile" if args.compile == "default" else f"compile={args.compile}")
    return " ".join([*words, *(o for o in ("channels_last", "cpu_time") if getattr(args, o))])


def one_case(args: argparse.Namespace, batch: int, dtype: str) -> dict[str, Any]:
    """Check and time one batch size and dtype with the current number of threads.

    Args:
        args: Parsed options.
        batch: Images at once.
        dtype: Dtype of our side, a key of :data:`vizoo.tools.options.DTYPES`.

    Returns:
        A row by column name.

    Raises:
        UserError: If a side cannot be built or run as the options say.
        Failure: If outputs or gradients of the two sides differ, or one fails while being timed.
    """
    import torch

    from vizoo.tools.profiling.machine import device_name, versions
    from vizoo.tools.profiling.timing import quantile

    size = None if args.size is None else read_size(args.size)
    with _explained(args, "cannot be built", UserError):
        sides = build_sides(args.name, size, args.official, args.reparam, _layer_arguments(args))
    timed, about = _timed(args, sides, batch, dtype)
    row: dict[str, Any] = {
        "name": sides.label,
        "peer": sides.against,
        "mode": _mode(args),
        "shape": "x".join(map(str, sides.shape)),
        "dtype": _written(dtype),
        "peer_dtype": _written(_peer_dtype(args, sides, dtype)),
        "batch": batch,
        "threads": torch.get_num_threads(),
        "rounds": args.rounds,
    }
    for side, seconds in (("", timed.seconds["ours"]), ("peer_", timed.seconds["theirs"])):
        row.update({f"{side}{k}_ms": 1e3 * quantile(seconds, q) for k, q in QUANTILES.items()})
    row.update(zip(("ratio", "ratio_low", "ratio_high"), timed.ratio("theirs"), strict=True))
    row.update({"grad_error": None, **about}, cpu_use=timed.cpu_use)
    row.update({k: v for k, v in versions().items() if k in COLUMNS})
    return {**row, "device": device_name(compute_device(args.device)), "date": datetime.date.today().isoformat()}


def _texts(row: dict[str, Any]) -> dict[str, str]:
    """A row as it is written in files and shown."""
    return {k: "" if v is None else format(v, FORMATS.get(k, "")) for k, v in row.items()}


def _check_kind(args: argparse.Namespace, p: argparse.ArgumentParser) -> str:
    """Refuse options of one kind of benchmark in another.

    Returns:
        The option that says what kind it is: a key of ``KINDS``, empty for timings of one model or layer.

    Raises:
        UserError: If they do not go together.
    """
    given = [k for k, v in vars(args).items() if v != p.get_default(k) and not (k == "name" and v == [])]
    kind = next((k for k in KINDS if k in given), "")
    if kind:
        wrong = [k for k in given if k != kind and k not in KINDS[kind]]
        if wrong:
            names = ", ".join(" ".join(map(short, args.name)) if k == "name" else _option(k) for k in wrong)
            goes = ", ".join("names of models" if k == "name" else _option(k) for k in KINDS[kind])
            raise UserError(f"--{kind}: goes with {goes}; got {names}")
        return kind
    for k in given:
        if k not in COMMON and (needs := [f"--{name}" for name, options in KINDS.items() if k in options]):
            raise UserError(f"{_option(k)}: needs {' or '.join(needs).replace('--suite', '--suite gpu')}")
    if len(args.name) != 1:
        got = " ".join(map(short, args.name)) or "none"
        raise UserError(
            f"give the name of one model or attention layer, or {', '.join(f'--{k}' for k in KINDS)}; got {got}"
        )
    return ""


def _option(key: str) -> str:
    return f"--{key.rstrip('_').replace('_', '-')}"


def _check_of_zoo(name: str) -> None:
    import timm

    spec = read_spec(name)
    names = [] if ":" in name or spec.kind != "timm" or spec.suffix else resolve_models([name])
    if names != [name] or not timm.models.model_entrypoint(name.partition(".")[0]).__module__.startswith("vizoo."):
        raise UserError(f"{short(name)} is not one model of the zoo; 'vizoo models' lists them")


def _capability(given: int | None) -> int:
    """Compute capability times 10: as given, else that of the GPU that is here, else of an H100."""
    import torch

    major, minor = torch.cuda.get_device_capability() if torch.cuda.is_available() else (9, 0)
    return given or 10 * major + minor


def _compile(args: argparse.Namespace) -> None:
    """Compile kernels for a GPU that need not be there: report on them, or only fill the cache."""
    from vizoo.tools.profiling.machine import commit

    option = "--sass" if args.sass else "--warm"
    for name in args.name:
        _check_of_zoo(name)
    if len(args.batch or [0]) > 1:
        raise UserError(f"--batch: {option} takes one number, got {' '.join(map(str, args.batch))}")
    if other := {"tf32", "int8"} & set(args.dtype or []):
        raise UserError(f"--dtype: {option} takes fp32, bf16 and fp16, got {min(other)}")
    columns = code.WARM_COLUMNS if args.warm else code.COLUMNS
    check_result(args.out, columns)
    names, dtypes = args.name or [m.name for m in measured() if m.kernels], [DTYPES[d] for d in args.dtype or ["bf16"]]
    capability = _capability(args.capability)
    todo = (names, dtypes, (args.batch or [128])[0], capability, args.channels_last)
    about = {"capability": capability, **code.versions(), "commit": commit()}
    if args.warm:
        rows = [dict(zip(columns, line, strict=False)) | about for line in code.warm(*todo)]
        table = Table(columns[:4], [[str(row[k]) for k in columns[:4]] for row in rows], (2, 3))
        give(args, rows, [table], Rows(columns, rows))
        return
    with progress() as bar:
        task = bar.add_task("compiling", total=None)
        rows = []
        for found in code.report(*todo):
            rows.append({**code.row(found), **about})
            bar.advance(task)
    texts = [_texts(row) for row in rows]
    give(args, rows, [code.report_table(texts)], Rows(columns, texts))


def _check(args: argparse.Namespace) -> None:
    layer = LAYERS.get(args.name)
    check_result(args.out, COLUMNS)
    if args.size is not None:
        read_size(args.size)
    if args.compile is not None:
        if len(args.compile) > 1:
            raise UserError(f"--compile {','.join(map(str, args.compile))}: give one mode")
        args.compile = args.compile[0]
    if args.official and not os.path.isdir(args.official):
        raise UserError(f"--official {short(str(args.official))}: no such folder")
    if args.cpu_time and (args.threads != [1] or args.device != "cpu"):
        raise UserError("--cpu-time: adds up all threads, so it needs --threads 1 and --device cpu")
    for key in _layer_arguments(args):
        if layer is None or key not in layer.arguments:
            able = " or ".join(repr(name) for name, known in LAYERS.items() if key in known.arguments)
            raise UserError(f"{_option(key)}: is for {able}, got {short(args.name)}")
    if layer and args.reparam:
        raise UserError(f"--reparam: {args.name!r} has no branches to merge")
    if layer and layer.tokens and args.channels_last:
        raise UserError(f"--channels-last: {args.name!r} takes tokens, not a map")
    if not layer:
        _check_of_zoo(args.name)
    if args.official:
        find_official(args.name)
    compute_device(args.device)


def _row(case: tuple[str, int], args: argparse.Namespace, alone: bool) -> dict[str, Any]:
    """The row of one dtype and batch; one among others that cannot be timed says why."""
    import torch

    torch._dynamo.reset()
    try:
        return one_case(args, batch=case[1], dtype=case[0])
    except (Failure, UserError) as e:
        if alone:
            raise
        return _failed(case, args, torch.get_num_threads(), e)


def _failed(case: tuple[str, int], args: argparse.Namespace, threads: int, why: Exception) -> dict[str, Any]:
    dtype, batch = case
    about = {"name": args.name, "mode": _mode(args), "dtype": _written(dtype), "batch": batch, "threads": threads}
    return {**about, "failure": str(why), "bad_input": isinstance(why, UserError)}


def _table(rows: Sequence[dict[str, Any]]) -> Table:
    cells = []
    for row in map(_texts, rows):
        cells.append([row.get(key, "") for key in SHOWN])
        if "failure" in row:  # in place of the times
            cells[-1] = [*cells[-1][: list(SHOWN).index("batch") + 1], row["failure"]]
    return Table(list(SHOWN.values()), cells, range(5, len(SHOWN)))


def _plain(row: dict[str, Any]) -> dict[str, Any]:
    """A row for JSON, which knows no infinity: the end of an interval that one round leaves open."""
    return {k: None if v == math.inf else v for k, v in row.items()}


def _record(rows: Sequence[dict[str, Any]]) -> Rows:
    """What is recorded: nothing of two sides that do not give the same."""
    return Rows(COLUMNS, [_texts(row) for row in rows if "failure" not in row])


def _bench(argv: list[str]) -> int:
    p = build_parser()
    args = p.parse_args(argv)
    import torch

    from vizoo.tools.profiling.machine import run_cases
    from vizoo.tools.profiling.timing import BUSY

    kind = _check_kind(args, p)
    if kind == "suite":
        return run(args)
    if kind:
        _compile(args)
        return 0
    if "int8" in (args.dtype or []):
        raise UserError(
            "--dtype: got int8, which vizoo compare times against fp32: vizoo compare NAME --dtype fp32,int8"
        )
    args.name, args.batch, args.dtype = args.name[0], args.batch or [1], args.dtype or ["fp32"]
    _check(args)
    cases, numbers = list(itertools.product(args.dtype, args.batch)), args.threads or [torch.get_num_threads()]
    alone = len(cases) * len(numbers) == 1
    with Results(args, [args.name], _table, _record, _plain) as results:
        for case, threads, found in run_cases(numbers, cases, _row, args, alone):
            results.add(_failed(case, args, threads, found) if isinstance(found, Failure) else found)
        results.end()
    rows = results.found
    if not args.cpu_time and any(row.get("cpu_use") is not None and row["cpu_use"] < BUSY for row in rows):
        print("machine busy: less than 80 % of the processor was ours, numbers are unreliable", file=sys.stderr)
    for note in dict.fromkeys(f"{row['name']}: {row['notes']}" for row in rows if row.get("notes")):
        print(note, file=sys.stderr)
    failures = [row["failure"] for row in rows if "failure" in row]
    refuse_failures(failures, len(rows), all(row.get("bad_input") for row in rows))
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    """Time ours against theirs; returns the exit status."""
    return run_tool(_bench, argv, "bench")


if __name__ == "__main__":
    raise SystemExit(main())
