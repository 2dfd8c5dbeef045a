"""``vizoo bench``: a model or an attention layer against official code, timm, or plain PyTorch, in alternation.

``--suite gpu`` measures all of the zoo on a GPU in one command instead.
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import datetime
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from vizoo.tools.common import (
    Failure,
    UserError,
    append_table,
    build_model,
    check_table,
    compute_device,
    explain,
    print_table,
    progress,
    resolve_models,
    run_tool,
    short,
)
from vizoo.tools.gpu.suite import BUDGET, SECTIONS, run
from vizoo.tools.options import MOST, MOST_THREADS, Parser, number, read_size

EXAMPLES = """\
examples:
  vizoo bench litv2_s                                   fast paths against plain PyTorch
  vizoo bench litv2_s --official LITv2                  against a checkout of the official code
  vizoo bench halo_h1                                   against timm's model of the same definition
  vizoo bench litv2_s --batch 1 8 --threads 1 2 --dtype float32 bfloat16 --out results.csv
  vizoo bench litv2_s --official LITv2 --compile        both sides compiled
  vizoo bench hilo --size 56 --official LITv2           one attention layer, dim 384, on a 56x56 map
  vizoo bench halo --size 64 --batch 1 8                the first one of halo_h1 against timm's, on a 64x64 map
  vizoo bench ulsam --size 14 --batch 1 32              dim 512, against a loop over its 4 subspaces
  vizoo bench reversed --size 64 --mode train           reversed attention, 4,096 tokens, 3 heads
  vizoo bench --sass                                    machine code of all GPU kernels, no GPU needed
  vizoo bench --sass nat_tiny --dtype bfloat16 --batch 128 --out kernels.csv
  vizoo bench --warm nat_tiny --dtype bfloat16          compile the kernels of a model before its first step
  vizoo bench --suite gpu --out gpu.jsonl               tests, operators and models on a GPU, in eight minutes
  vizoo bench --suite gpu --out gpu.jsonl --sections ops --only halo

Outputs are compared before anything is timed, and nothing is recorded when they differ.  In bfloat16 the official side
stays in float32 on a CPU, where its deformable convolution has no bfloat16.  A suite runs in a checkout and needs
nothing but torch, triton, timm and pytest; what it knows is in its file at once, whatever happens then."""
COLUMNS = [
    "name",
    "peer",
    "mode",
    "shape",
    "dtype",
    "peer_dtype",
    "batch",
    "threads",
    "rounds",
    "median_ms",
    "p20_ms",
    "p80_ms",
    "peer_median_ms",
    "peer_p20_ms",
    "peer_p80_ms",
    "ratio",
    "error",
    "cpu_use",
    "device",
    "torch",
    "timm",
    "vizoo",
    "commit",
    "date",
]
TOLERANCE = {"float32": 1e-5, "bfloat16": 5e-2, "float16": 1e-2}  # ||ours - theirs|| / ||theirs||
LEAST = 0.1  # seconds of a sample: single calls of a layer would measure the cache that the other side left behind
LAYER: dict[str, Any] = {"dim": 384, "num_heads": 12, "window_size": 2, "alpha": 0.9}
HALO_LAYER: dict[str, Any] = {"dim": 64, "num_heads": 4, "block_size": 8, "halo_size": 3}
ULSAM_LAYER: dict[str, Any] = {"dim": 512, "num_splits": 4}
SIDES = {"hilo": 56, "halo": 64, "ulsam": 14, "reversed": 32}  # of the layers' maps
NO_OFFICIAL = {
    "halo": "there is no official code of 'halo'; it is timed against timm's layer",
    "ulsam": "the official code of 'ulsam' has no licence; it is timed against a loop like it",
    "reversed": "there is no official code of 'reversed'; it is timed against its plain form",
}
REVERSED_LAYER: dict[str, Any] = {"dim": 96, "num_heads": 3}


def parser() -> argparse.ArgumentParser:
    """Command-line options."""
    p = Parser(
        prog="vizoo bench",
        description=__doc__,
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    p.add_argument(
        "name", nargs="*", help="a model of the zoo, or 'hilo', 'halo', 'ulsam' or 'reversed' for one attention layer"
    )
    kind = p.add_argument_group("in place of timing one model or layer").add_mutually_exclusive_group()
    kind.add_argument("--suite", choices=["gpu"], help="measure the whole zoo on a GPU, with --out")
    kind.add_argument(
        "--sass",
        action="store_true",
        help="what the Triton kernels of a training step cost in machine code, by model (default: one of each family)",
    )
    kind.add_argument("--warm", action="store_true", help="compile these kernels into Triton's cache, run nothing")
    p.add_argument(
        "--official",
        type=Path,
        metavar="DIR",
        help="checkout of the official code (default: timm's model if it has one, else plain PyTorch)",
    )
    p.add_argument(
        "--batch", type=number(int, 1, MOST), nargs="+", help="images at once (1; with --sass and --warm one, 128)"
    )
    p.add_argument(
        "--threads",
        type=number(int, 1, MOST_THREADS),
        nargs="+",
        metavar="N",
        help="CPU threads, each in a fresh process (torch's)",
    )
    p.add_argument(
        "--dtype",
        nargs="+",
        choices=list(TOLERANCE),
        help="dtype of our side (float32; with --sass and --warm of the model, bfloat16)",
    )
    p.add_argument(
        "--size",
        type=int,
        metavar="N",
        help=f"side of the image (the model's), or of the map ({', '.join(f'{k} {v}' for k, v in SIDES.items())})",
    )
    p.add_argument("--window", type=number(int, 1), metavar="N", help="window of hilo (2)")
    p.add_argument("--alpha", type=number(float, 0, 1), metavar="X", help="share of low-frequency heads of hilo (0.9)")
    p.add_argument(
        "--mode", choices=["infer", "train"], default="infer", help="forward, or forward and backward (infer)"
    )
    p.add_argument("--reparam", action="store_true", help="both sides in their merged form for inference")
    p.add_argument("--compile", action="store_true", help="torch.compile both sides")
    p.add_argument("--channels-last", action="store_true", help="image and both models in channels_last")
    p.add_argument("--device", default="cpu", help="cpu, cuda, cuda:N (cpu)")
    p.add_argument(
        "--cpu-time", action="store_true", help="processor time in place of wall time: for a busy machine, one thread"
    )
    p.add_argument("--rounds", type=number(int, 1, MOST), default=20, help="timed calls of each side (20)")
    p.add_argument(
        "--out", type=Path, metavar="FILE", help="append the rows to this file: FILE.csv, or FILE.jsonl of a suite"
    )
    p.add_argument(
        "--capability",
        type=number(int, 80, MOST),
        metavar="N",
        help="with --sass and --warm: compute capability times 10 of the GPU to compile for (this one's, else 90)",
    )
    suite = p.add_argument_group("options of --suite gpu")
    suite.add_argument(
        "--budget", type=number(float, 1, MOST), default=BUDGET, metavar="SECONDS", help=f"for everything ({BUDGET:g})"
    )
    chosen = [s for s in SECTIONS if s != "env"]
    suite.add_argument("--sections", nargs="+", choices=chosen, default=chosen, help="what to run (everything)")
    suite.add_argument("--only", default="", metavar="TEXT", help="operators and models with this in their name")
    suite.add_argument("--dry", action="store_true", help="try it on a CPU with tiny shapes")
    return p


COMMON = ("name", "batch", "dtype", "channels_last", "out")  # options that timings of one model or layer have too
KINDS = {  # other kinds of benchmark, with the options that go with each
    "suite": ("out", "budget", "sections", "only", "dry"),
    "sass": ("name", "batch", "dtype", "channels_last", "capability", "out"),
    "warm": ("name", "batch", "dtype", "channels_last", "capability"),
}


def draw_weights(model: Any) -> None:
    """Give every parameter and buffer of a model random values of a trained model's size, offsets included."""
    import torch

    generator = torch.Generator().manual_seed(0)
    for name, value in model.state_dict().items():
        if not value.is_floating_point():
            continue
        noise = torch.randn(value.shape, generator=generator)
        if name.endswith("running_var"):
            value.copy_(0.5 + noise.abs())
        elif value.dim() > 1:
            value.copy_(noise / value[0].numel() ** 0.5)
        else:
            value.copy_(0.1 * noise + (1.0 if name.endswith("weight") else 0.0))


def build_sides(args: argparse.Namespace) -> tuple[Any, Any, str, list[int]]:
    """Both sides with equal weights in float32 on the CPU.

    Args:
        args: Parsed options.

    Returns:
        Our module, the peer, the peer's name, and the input's shape without the batch.
    """
    from timm.layers import set_fused_attn

    from vizoo.tools.profiling.official import ULSAMLoop, official_hilo, official_model, timm_model

    if args.name == "halo":
        from timm.layers.halo_attn import HaloAttn

        from vizoo.backbones.layers import HaloAttention

        ours: Any = HaloAttention(**HALO_LAYER)
        draw_weights(ours)
        peer: Any = HaloAttn(**HALO_LAYER)
        peer.load_state_dict(ours.state_dict())
        side = args.size or SIDES[args.name]
        return ours, peer, "timm", [HALO_LAYER["dim"], side, side]
    if args.name == "ulsam":
        from vizoo.backbones.layers import ULSAM

        ours = ULSAM(**ULSAM_LAYER)
        draw_weights(ours)
        peer = ULSAMLoop(**ULSAM_LAYER)
        peer.load_state_dict(ours.official_state_dict())
        side = args.size or SIDES[args.name]
        return ours, peer, "loop", [ULSAM_LAYER["dim"], side, side]
    if args.name == "reversed":
        from vizoo.backbones.layers import ReversedAttention

        ours = ReversedAttention(**REVERSED_LAYER)
        draw_weights(ours)
        peer = ReversedAttention(**REVERSED_LAYER)
        peer.load_state_dict(ours.state_dict())
        peer.fused_attn = False
        side = args.size or SIDES[args.name]
        return ours, peer, "plain", [side * side, REVERSED_LAYER["dim"]]
    if args.name == "hilo":
        from vizoo.backbones.layers import HiLo

        arguments = _hilo(args)
        side = args.size or SIDES[args.name]
        ours = HiLo(qkv_bias=True, **arguments)
        draw_weights(ours)
        peer = official_hilo(args.official, **arguments) if args.official else HiLo(qkv_bias=True, **arguments)
        peer.load_state_dict(ours.state_dict())
        if not args.official:
            peer.fused_attn = False
        return ours, peer, "official" if args.official else "plain", [side * side, LAYER["dim"]]

    name = args.name
    kwargs: dict[str, Any] = {"deploy": True} if args.reparam else {}
    ours = build_model(name, **kwargs)
    side = args.size or ours.pretrained_cfg["input_size"][-1]
    if args.official:
        peer = official_model(args.official, name.partition(".")[0], side, args.reparam)
        draw_weights(peer)
        filter_fn = sys.modules[type(ours).__module__].checkpoint_filter_fn
        ours.load_state_dict(filter_fn(peer.state_dict(), ours))
        return ours, peer, "official", [3, side, side]
    draw_weights(ours)
    peer = timm_model(name.partition(".")[0])
    if peer is not None:
        peer.load_state_dict(ours.state_dict())
        return ours, peer, "timm", [3, side, side]
    set_fused_attn(False)
    try:
        peer = build_model(name, **kwargs)
    finally:
        set_fused_attn(True)
    peer.load_state_dict(ours.state_dict())
    return ours, peer, "plain", [3, side, side]


def _hilo(args: argparse.Namespace) -> dict[str, Any]:
    given = {"window_size": args.window, "alpha": args.alpha}
    return {**LAYER, **{k: v for k, v in given.items() if v is not None}}


@contextlib.contextmanager
def _explained(args: argparse.Namespace, what: str, kind: type[Exception]) -> Iterator[None]:
    """Turn whatever official code, constructors and kernels raise into one line."""
    from vizoo.tools.profiler import one_line

    try:
        yield
    except Exception as e:
        if explain(e) is not None:
            raise
        given = " ".join(f"--{k} {v}" for k in ("size", "official") if (v := getattr(args, k)) is not None)
        raise kind(f"{args.name!r} {what}{' with ' * bool(given)}{given}: {one_line(e)}") from e


def one_case(args: argparse.Namespace, batch: int, dtype: str) -> dict[str, Any]:
    """Check and time one batch size and dtype with the current number of threads.

    Args:
        args: Parsed options.
        batch: Images at once.
        dtype: Dtype of our side.

    Returns:
        A row by column name.

    Raises:
        UserError: If a side cannot be built or run as the options say.
        Failure: If the outputs of the two sides differ, or it fails while being timed.
    """
    import numpy as np
    import timm
    import torch

    import vizoo
    from vizoo.tools.profiler import compare

    device = compute_device(args.device)
    with _explained(args, "cannot be built", UserError):
        ours, peer, peer_name, shape = build_sides(args)
        peer_dtype = "float32" if peer_name == "official" and device.type == "cpu" else dtype
        train = args.mode == "train"
        memory_format = torch.channels_last if args.channels_last else torch.preserve_format
        sides = []
        for module, name in ((ours, dtype), (peer, peer_dtype)):
            module = module.to(device, getattr(torch, name)).train(train)
            x = torch.randn(batch, *shape, generator=torch.Generator().manual_seed(1)).to(device, getattr(torch, name))
            if args.channels_last:
                module, x = module.to(memory_format=memory_format), x.contiguous(memory_format=memory_format)
            compiled = torch.compile(module) if args.compile else module
            inputs = (
                x,
                *((int(shape[0] ** 0.5),) * 2 if args.name == "hilo" and module is peer and args.official else ()),
            )

            def call(compiled: Any = compiled, inputs: Any = inputs, module: Any = module) -> Any:
                out = compiled(*inputs)
                out = out[0] if isinstance(out, tuple) else out  # reversed attention also returns its messages
                if train:
                    module.zero_grad(set_to_none=True)
                    out.square().mean().backward()
                return out

            sides.append(call)
    with torch.set_grad_enabled(train), torch.inference_mode(not train):
        with _explained(args, f"cannot run in {dtype} on {device}", UserError if args.size else Failure):
            a, b = (f().detach().float() for f in sides)
            error = float((a - b).norm() / b.norm())
        if not error <= TOLERANCE[dtype]:
            raise Failure(
                f"{args.name}, {dtype}: outputs differ by {error:.1e}, allowed {TOLERANCE[dtype]:g}; not timed"
            )
        with _explained(args, f"fails in {dtype} on {device}", Failure), progress() as bar:
            task = bar.add_task("timing", total=args.rounds)
            functions = dict(zip(("ours", "theirs"), sides, strict=True))
            clock = time.process_time if args.cpu_time else time.perf_counter
            timed = compare(
                functions,
                rounds=args.rounds,
                device=device,
                tick=lambda: bar.advance(task),
                clock=clock,
                least=LEAST,
            )

    def quantiles(seconds: list[float]) -> list[str]:
        return [f"{1e3 * q:.2f}" for q in np.quantile(seconds, [0.5, 0.2, 0.8])]

    labels = {
        "hilo": f"hilo w{_hilo(args)['window_size']} alpha {_hilo(args)['alpha']:g}",
        "halo": f"halo {shape[0]}@{shape[-1]} b{HALO_LAYER['block_size']} h{HALO_LAYER['halo_size']}",
        "ulsam": f"ulsam {shape[0]}@{shape[-1]} g{ULSAM_LAYER['num_splits']}",
        "reversed": f"reversed {REVERSED_LAYER['num_heads']} heads",
    }
    mq, tq = quantiles(timed.seconds["ours"]), quantiles(timed.seconds["theirs"])
    return {
        "name": labels.get(args.name, args.name),
        "peer": peer_name,
        "mode": " ".join(
            [args.mode, *(o for o in ("reparam", "compile", "channels_last", "cpu_time") if getattr(args, o))]
        ),
        "shape": "x".join(map(str, shape)),
        "dtype": dtype,
        "peer_dtype": peer_dtype,
        "batch": batch,
        "threads": torch.get_num_threads(),
        "rounds": args.rounds,
        **dict(zip(("median_ms", "p20_ms", "p80_ms"), mq, strict=True)),
        **dict(zip(("peer_median_ms", "peer_p20_ms", "peer_p80_ms"), tq, strict=True)),
        "ratio": f"{timed.ratio('theirs')[0]:.2f}",
        "error": f"{error:.1e}",
        "cpu_use": "" if timed.cpu_use is None else f"{timed.cpu_use:.2f}",
        "device": device_name(device),
        "torch": torch.__version__,
        "timm": timm.__version__,
        "vizoo": vizoo.__version__,
        "commit": commit(),
        "date": datetime.date.today().isoformat(),
    }


def device_name(device: Any) -> str:
    """Name of the processor or GPU."""
    import torch

    from vizoo.tools.env import cpu_name

    return torch.cuda.get_device_name(device) if device.type == "cuda" else cpu_name()


def commit() -> str:
    """Commit of the checkout this package runs from, with ``+`` for uncommitted changes; empty outside one."""
    folder = Path(__file__).resolve().parent
    done = subprocess.run(
        ["git", "-C", str(folder), "describe", "--always", "--dirty=+", "--exclude=*"],
        capture_output=True,
        text=True,
        check=False,
    )
    return done.stdout.strip()


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
    return f"--{key.replace('_', '-')}"


def _check_of_zoo(name: str) -> None:
    import timm

    names = [] if name.startswith(("hf", "local-dir:")) else resolve_models([name])
    if names != [name] or not timm.models.model_entrypoint(name.partition(".")[0]).__module__.startswith("vizoo."):
        raise UserError(f"{short(name)} is not one model of the zoo; 'vizoo models' lists them")


def _compile(args: argparse.Namespace) -> None:
    """Compile kernels for a GPU that need not be there: report on them, or only fill the cache."""
    import torch

    from vizoo.tools.gpu import machine_code as code

    option = "--sass" if args.sass else "--warm"
    for name in args.name:
        _check_of_zoo(name)
    if len(args.batch or [0]) > 1:
        raise UserError(f"--batch: {option} takes one number, got {' '.join(map(str, args.batch))}")
    check_table(args.out, "--out", code.COLUMNS)
    capability = args.capability
    if capability is None:
        major, minor = torch.cuda.get_device_capability() if torch.cuda.is_available() else (9, 0)
        capability = 10 * major + minor
    todo = (
        args.name or code.MODELS,
        args.dtype or ["bfloat16"],
        (args.batch or [128])[0],
        capability,
        args.channels_last,
    )
    if args.warm:
        table = [[*map(str, line)] for line in code.warm(*todo)]
        print_table(["model", "dtype", "kernels", "compiled"], table, numeric=(2, 3))
        return
    versions = {"capability": capability, **code.versions(), "commit": commit()}
    with progress() as bar:
        task = bar.add_task("compiling", total=None)
        rows = []
        for found in code.report(*todo):
            rows.append({**code.row(found), **versions})
            bar.advance(task)
    code.print_report(rows)
    if args.out:
        append_table(args.out, code.COLUMNS, rows)


def _check(args: argparse.Namespace) -> None:
    check_table(args.out, "--out", COLUMNS)
    if args.size is not None:
        read_size(args.size)
    if args.official and not os.path.isdir(args.official):
        raise UserError(f"--official {short(str(args.official))}: no such folder")
    if args.cpu_time and (args.threads != [1] or args.device != "cpu"):
        raise UserError("--cpu-time: adds up all threads, so it needs --threads 1 and --device cpu")
    if args.official and args.name in NO_OFFICIAL:
        raise UserError(f"--official: {NO_OFFICIAL[args.name]}")
    for option in ("window", "alpha"):
        if getattr(args, option) is not None and args.name != "hilo":
            raise UserError(f"--{option}: is for 'hilo', got {short(args.name)}")
    if args.name in SIDES and args.reparam:
        raise UserError(f"--reparam: {args.name!r} has no branches to merge")
    if args.name in ("hilo", "reversed") and args.channels_last:
        raise UserError(f"--channels-last: {args.name!r} takes tokens, not a map")
    if args.name not in SIDES:
        _check_of_zoo(args.name)
    compute_device(args.device)


def _run(argv: list[str]) -> int:
    p = parser()
    args = p.parse_args(argv)
    kind = _check_kind(args, p)
    if kind == "suite":
        return run(args)
    if kind:
        _compile(args)
        return 0
    args.name, args.batch, args.dtype = args.name[0], args.batch or [1], args.dtype or ["float32"]
    _check(args)
    import torch

    rows: list[dict[str, Any]] = []
    threads = args.threads or [torch.get_num_threads()]
    if len(threads) > 1:  # OpenMP keeps the pool of its first size, so each setting gets a process
        for n in threads:
            with tempfile.TemporaryDirectory() as folder:
                part = Path(folder) / "part.csv"
                done = subprocess.run(
                    [sys.executable, "-m", "vizoo.tools.bench", *argv, "--threads", str(n), "--out", str(part)],
                    stdout=subprocess.DEVNULL,
                    check=False,
                )
                if done.returncode < 0:
                    raise Failure(f"the process with {n} threads was killed, perhaps because memory ran out")
                if done.returncode:
                    return done.returncode
                rows += csv.DictReader(part.read_text(encoding="utf-8").splitlines())
    else:
        torch.set_num_threads(threads[0])
        for dtype in args.dtype:
            for batch in args.batch:
                torch._dynamo.reset()
                rows.append(one_case(args, batch, dtype))
    shown = {
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
        "error": "error",
        "cpu_use": "cpu use",
    }
    print_table(list(shown.values()), [[str(row[k]) for k in shown] for row in rows], numeric=range(5, 12))
    if args.out:
        append_table(args.out, COLUMNS, rows)
    if not args.cpu_time and any(row["cpu_use"] and float(row["cpu_use"]) < 0.8 for row in rows):
        print("machine busy: less than 80 % of the processor was ours, numbers are unreliable", file=sys.stderr)
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    """Time ours against theirs; returns the exit status."""
    return run_tool(_run, argv, "bench")


if __name__ == "__main__":
    raise SystemExit(main())
