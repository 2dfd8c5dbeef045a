"""``vizoo bench --suite gpu``: tests, operators and models on a GPU in one command, row by row on the disk.

Sections follow each other: the tests, while further processes compile what is measured later; the environment;
operators in every form; models; a few images at a time, where the host is the limit, against a CUDA graph; where the
models' time goes; compiled models; what one model reaches of another's speed.  A child process measures one job at a
time.  Where it crashes or hangs, that job is recorded as failed and a fresh process goes on with the next.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import importlib.util
import json
import os
import re
import select
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import IO, Any

from vizoo.tools.common import MARK, Failure, UserError, check_output, read_text, short
from vizoo.tools.gpu.models import Measured, measured

# shares of the time
SECTIONS = {"tests": 0.22, "env": 0.03, "ops": 0.24, "models": 0.2, "graphs": 0.06, "profile": 0.03, "compile": 0.22}
BUDGET = 460.0  # seconds: within eight minutes
START, MOST = (
    60.0,
    {"env": 40.0, "ops": 40.0, "models": 40.0, "graphs": 40.0, "profile": 20.0, "compile": 120.0},
)  # seconds of a job
WARMERS = 4  # processes that compile; each holds a model in the GPU's memory
ROOT = Path(__file__).resolve().parents[2]
FIELDS = ("section", "item", "dtype", "form", "batch", "mode")  # of a job
PROFILED = 8
FEW = 8  # images, of which a GPU makes so little work that the host may be the limit
DRY_MODELS = [
    Measured("test_nat", 2, ("train plain",), compiled=True, few=True),
    Measured("test_overlock", 2, ("infer channels_last", "infer merged")),
    Measured("test_resnet", 2, compiled=True, peer="test_nat", share=0.5),
]
GRAPH_SHARE = 1 / 1.3  # of the images a second of a CUDA graph, for a few images


class Record:
    """A file of JSON rows that only grows: each row is on the disk before the next job starts.

    Args:
        path: File to add to.
    """

    def __init__(self, path: Path) -> None:
        self.start = time.monotonic()
        self.failed = 0
        self.rows: list[dict[str, Any]] = []
        old = path.read_bytes() if path.exists() else b""
        whole = old.rfind(b"\n") + 1  # a run that was killed while writing leaves a part of a row
        self.file = path.open("ab")
        self.file.truncate(whole)

    def write(self, row: dict[str, Any]) -> None:
        """Add a row, and show it on one line."""
        row = {**row, "t": round(time.monotonic() - self.start, 1)}
        self.file.write(json.dumps(row).encode() + b"\n")
        self.file.flush()
        os.fsync(self.file.fileno())
        self.rows.append(row)
        self.failed += "failed" in row
        print(line(row), flush=True)

    def close(self) -> None:
        """Close the file."""
        self.file.close()


def line(row: dict[str, Any]) -> str:
    """A row as people read it while it runs."""
    shown = [f"{row['t']:6.1f} s", *(str(row[k]) for k in FIELDS if k in row)]
    units = {
        "forward_ms": "ms",
        "both_ms": "ms both",
        "images_per_s": "images/s",
        "share": "of the floor",
        "ratio": "times as fast",
        "total_us": "us",
    }
    shown += [f"{row[k]:.4g} {unit}" for k, unit in units.items() if row.get(k) is not None]
    if "summary" in row:
        shown.append(row["summary"])
    if "failed" in row:
        shown.append(f"FAILED: {row['failed'][:200]}")
    return "  ".join(shown)


class Worker:
    """A child process that measures; started when there is a job, and again after a crash.

    Args:
        mode: ``dry`` or ``gpu``.
        command: What to run in place of the true child.
    """

    def __init__(self, mode: str, command: Sequence[str] = (sys.executable, "-m", "vizoo.tools.gpu.worker")) -> None:
        self.mode, self.command = mode, command
        self.process: subprocess.Popen[bytes] | None = None
        self.results: int | None = None
        self.unread = b""
        self.log: IO[bytes] | None = None

    def ask(self, job: dict[str, Any], seconds: float) -> dict[str, Any]:
        """Result of a job.

        Args:
            job: What to measure.
            seconds: After which it counts as hanging.

        Returns:
            What the child answers, or ``failed`` with the reason.
        """
        try:
            if self.process is None:
                self._start()
                self._read(min(START, seconds))
            assert self.process is not None
            assert self.process.stdin is not None
            self.process.stdin.write(json.dumps(job).encode() + b"\n")
            self.process.stdin.flush()
            row = self._read(seconds)
        except (TimeoutError, EOFError, BrokenPipeError) as e:
            row = {"failed": f"stopped after {seconds:.0f} s" if isinstance(e, TimeoutError) else self._end()}
            self.close()
        if row.pop("fatal", False):
            self.close()
        return row

    def _start(self) -> None:
        self.log = tempfile.TemporaryFile()  # noqa: SIM115 - closed with the process
        self.results, writing = os.pipe()
        self.unread = b""
        self.process = subprocess.Popen(
            [*self.command, str(writing), self.mode],
            stdin=subprocess.PIPE,
            stdout=self.log,
            stderr=self.log,
            pass_fds=[writing],
            start_new_session=True,  # killed with the processes that it starts
            env=child_environment(self.mode),
        )
        os.close(writing)

    def _read(self, seconds: float) -> dict[str, Any]:
        """The next line of the child.

        Raises:
            TimeoutError: If it takes longer.
            EOFError: If the child ended before.
        """
        assert self.results is not None
        end = time.monotonic() + seconds
        while b"\n" not in self.unread:
            left = end - time.monotonic()
            if left <= 0 or not select.select([self.results], [], [], left)[0]:
                raise TimeoutError
            more = os.read(self.results, 1 << 16)
            if not more:
                raise EOFError
            self.unread += more
        text, _, self.unread = self.unread.partition(b"\n")
        row: dict[str, Any] = json.loads(text)
        return row

    def _end(self) -> str:
        """Why the child ended: the signal or status, and its last line."""
        assert self.process is not None
        assert self.log is not None
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(5)
        status = self.process.poll()
        how = f"by {signal.Signals(-status).name}" if status is not None and status < 0 else f"with status {status}"
        self.log.seek(0)
        last = self.log.read().decode(errors="replace").strip().splitlines()[-1:]
        return f"the process ended {how}{''.join(f': {text[:200]}' for text in last)}"

    def close(self) -> None:
        """End the child and all it started."""
        if self.process is not None:
            kill(self.process)
            assert self.process.stdin is not None
            with contextlib.suppress(BrokenPipeError):
                self.process.stdin.close()
            self.process = None
        if self.results is not None:
            os.close(self.results)
            self.results = None
        if self.log is not None:
            self.log.close()
            self.log = None


def kill(process: subprocess.Popen[bytes]) -> None:
    """End a process that leads a session, with the session."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def child_environment(mode: str) -> dict[str, str]:
    """Environment of a child: nothing of a test run around it; without a GPU Triton's interpreter and one thread."""
    found = {k: v for k, v in os.environ.items() if not k.startswith("PYTEST_")}
    found.pop("TRITON_INTERPRET", None)
    if mode == "dry":
        found.update(TRITON_INTERPRET="1", OMP_NUM_THREADS="1")  # of more, on busy cores, each waits for the others
    return found


def plan(dry: bool, only: str = "") -> dict[str, list[dict[str, Any]]]:
    """Jobs of each section whose item contains ``only``, the most important ones first."""
    from vizoo.backbones.ops.backend import HAS_TRITON, natten_missing
    from vizoo.tools.gpu.cases import cases

    absent = {"natten"} if dry or natten_missing() else set()
    absent |= set() if HAS_TRITON else {"triton"}
    if importlib.util.find_spec("torchvision") is None:
        absent.add("torchvision")
    if dry:
        absent |= {"flex", "torchvision"}  # without a gradient and without bfloat16 on a CPU
    ops = []
    for dtype in ("bfloat16", "float32"):
        for case in cases(dry):
            for form in case.names():
                costly = form == "flex" or form.endswith("compiled")  # to compile
                # Triton's interpreter is wrong in bfloat16; the rest needs no second dtype to be tried
                wrong = dry and (form == "triton") != (dtype == "float32")
                if form not in absent and not wrong and not (costly and dtype == "float32"):
                    ops.append({"item": case.name, "dtype": dtype, "form": form})
    models, compiled, profiled, graphs = [], [], [], []
    rows = DRY_MODELS if dry else measured()
    for i, row in enumerate(rows):
        job: dict[str, Any] = {"item": row.name, "batch": row.batch}
        models += [{**job, "mode": mode} for mode in ("infer", "train", *row.modes)]
        if row.compiled:
            compiled += [{**job, "mode": f"{mode} compiled"} for mode in ("infer", "train")]
        if i < (1 if dry else PROFILED):
            profiled.append({**job, "mode": "infer"})
    for i, name in enumerate(row.name for row in rows if row.few):
        graphs += [{"item": name, "batch": FEW, "mode": mode} for mode in ("infer", "infer graph")]
        if i < 2 and not dry:
            compiled += [
                {"item": name, "batch": FEW, "mode": f"{mode} compiled reduce-overhead"} for mode in ("infer", "train")
            ]
    found = {"ops": ops, "models": models, "graphs": graphs, "profile": profiled, "compile": compiled}
    chosen = {k: [{"section": k, **job} for job in jobs if only in job["item"]] for k, jobs in found.items()}
    return {"env": [{"section": "env", "item": "environment"}], **chosen}


def shares(rows: Sequence[dict[str, Any]], dry: bool) -> Iterator[dict[str, Any]]:
    """How fast compiled models are beside others of the same run, and calls of few images beside their CUDA graphs.

    Args:
        rows: Rows of the run.
        dry: Whether it was a dry run.

    Yields:
        Rows with ``ratio``, of the images a second, and ``least``, the ratio that is aimed at.
    """
    aims = {m.name: [(m.peer, m.share)] for m in (DRY_MODELS if dry else measured()) if m.peer}
    speed = {(row["item"], row["batch"], row["mode"]): row["images_per_s"] for row in rows if "images_per_s" in row}
    for item, batch, mode in speed:
        pairs = [((item, batch, f"{mode} graph"), GRAPH_SHARE)]
        if mode in ("infer compiled", "train compiled"):
            pairs += [((peer, batch, mode), least) for peer, least in aims.get(item, ())]
        for theirs, least in pairs:
            if theirs in speed:
                row = {
                    "section": "shares",
                    "item": item,
                    "batch": batch,
                    "mode": mode,
                    "beside": f"{theirs[0]} {theirs[2]}",
                }
                ratio = speed[item, batch, mode] / speed[theirs]
                yield {**row, "ratio": ratio, "least": least, "summary": f"beside {row['beside']}, aim {least:.2f}"}


def floor_of(row: dict[str, Any], peaks: dict[str, Any]) -> dict[str, Any]:
    """Least time of an operator by its bytes and its arithmetic, and the share of it that was reached."""
    if "bytes" not in row or not peaks:
        return {}
    floor = 1e3 * max(row["bytes"] / peaks["bytes_per_s"], row["flops"] / peaks["flops_per_s"][row["dtype"]])
    return {"floor_ms": floor, "share": floor / row["forward_ms"]} if "forward_ms" in row else {"floor_ms": floor}


def run_tests(record: Record, dry: bool, until: float) -> None:
    """The GPU tests, then all kernel tests, on the GPU: one row each."""
    runs = {"gpu": ["-m", "gpu"], "kernels": ["-m", "not gpu and not slow", "-k", "triton or kernel or form"]}
    folders = (
        ["tests/ops/test_hilo.py", "tests/ops/test_halo.py"] if dry else ["tests/ops", "tests/tools/test_timing.py"]
    )
    if not (ROOT / "tests/ops").is_dir():
        record.write({"section": "tests", "item": "all", "failed": "no folder tests/ops: run it from a checkout"})
        return
    cores = len(os.sched_getaffinity(0))
    several = ["-n", str(min(8, cores // 2))] if cores >= 4 and importlib.util.find_spec("xdist") else []
    for i, (name, selection) in enumerate(runs.items()):
        if dry and name != "gpu":
            return  # on a CPU the suite of tests has its own command
        command = [sys.executable, "-m", "pytest", *folders, "-q", "--no-header", "-p", "no:cacheprovider", *several]
        left = until - time.monotonic()
        seconds = max(0.1, left / 2 if i == 0 else left)
        with tempfile.TemporaryFile() as log:
            process = subprocess.Popen(
                [*command, "--continue-on-collection-errors", *selection],
                cwd=ROOT,
                stdout=log,
                stderr=log,
                start_new_session=True,
                env=child_environment("dry" if dry else "gpu"),
            )
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(seconds)
            late = process.poll() is None
            kill(process)
            log.seek(0)
            text = log.read().decode(errors="replace")
        lines = text.strip().splitlines() or [""]
        row: dict[str, Any] = {"section": "tests", "item": name, "status": process.returncode, "summary": lines[-1]}
        row["failures"] = [re.sub(r" - .*", "", t) for t in lines if t.startswith(("FAILED ", "ERROR "))]
        if late:
            row["failed"] = f"stopped after {seconds:.0f} s"
        elif process.returncode:
            row["failed"] = f"pytest ended with status {process.returncode}"
            row["tail"] = text[-4000:]
        record.write(row)


@contextlib.contextmanager
def warming(jobs: Sequence[dict[str, Any]], mode: str, until: float) -> Iterator[None]:
    """Compile what the jobs need in parallel processes, so that caches on the disk hold it; nothing is recorded."""
    count = max(1, min(WARMERS, len(os.sched_getaffinity(0)) // 2))
    items = list(dict.fromkeys(job["item"] for job in jobs))
    parts = [[job for job in jobs if items.index(job["item"]) % count == i] for i in range(count)]
    stopped = threading.Event()

    def compile_part(part: Sequence[dict[str, Any]]) -> None:
        with contextlib.closing(Worker(mode)) as worker:
            for job in part:
                left = until - time.monotonic()
                if not stopped.is_set() and left > 0:
                    worker.ask({**job, "warm": True}, min(left, MOST[job["section"]]))

    with ThreadPoolExecutor(count) as pool:
        done = [pool.submit(compile_part, part) for part in parts]
        try:
            yield
        except BaseException:
            stopped.set()
            raise
    for future in done:
        future.result()


def run_jobs(
    record: Record, worker: Worker, jobs: Sequence[dict[str, Any]], until: float, peaks: dict[str, Any]
) -> None:
    """Measure the jobs of a section one after the other; what the time did not suffice for is one row."""
    for i, job in enumerate(jobs):
        left = until - time.monotonic()
        if left <= 0.5:
            names = [" ".join(str(rest[k]) for k in FIELDS[1:] if k in rest) for rest in jobs[i:]]
            record.write(
                {"section": job["section"], "item": "left out", "left_out": names, "summary": f"{len(names)} jobs"}
            )
            return
        row = {**job, **worker.ask(job, min(left, MOST[job["section"]]))}
        if job["section"] == "env":
            peaks.update(row)
        record.write({**row, **floor_of(row, peaks if "flops_per_s" in peaks else {})})


def check(args: argparse.Namespace) -> None:
    """Say what is wrong with the options before anything starts.

    Raises:
        UserError: For a missing or unusable ``--out``, an unknown section, or a machine without a GPU.
    """
    import torch

    if args.out is None:
        raise UserError("--suite gpu: needs --out FILE.jsonl")
    check_output(args.out, "--out", ".jsonl")
    if not args.dry and not torch.cuda.is_available():
        raise UserError("--suite gpu: no CUDA device is here; --dry tries it on a CPU with tiny shapes")
    jobs = plan(args.dry, args.only)
    if args.only and not any(jobs[section] for section in jobs if section != "env"):
        raise UserError(f"--only {short(args.only)}: no operator and no model is called like that")


def run(args: argparse.Namespace) -> int:
    """Run the chosen sections.

    Args:
        args: ``out``, ``seconds``, ``sections``, ``only`` and ``dry``.

    Returns:
        The exit status: 0.

    Raises:
        UserError: As :func:`check`.
        Failure: If something failed; the rows say what.
    """
    import vizoo
    from vizoo.tools.profiling.machine import commit

    begin = time.monotonic()
    check(args)
    mode = "dry" if args.dry else "gpu"
    sections = [s for s in SECTIONS if s in args.sections or s == "env"]  # no time means anything without its device
    jobs = plan(args.dry, args.only)
    end = begin + 0.98 * args.seconds
    head = {MARK.decode(): vizoo.__version__, "commit": commit(), "date": datetime.date.today().isoformat()}
    peaks: dict[str, Any] = {}
    with contextlib.closing(Record(Path(args.out))) as record, contextlib.closing(Worker(mode)) as worker:
        record.write({"section": "start", **head, "dry": args.dry, "sections": sections, "budget": args.seconds})
        for i, section in enumerate(sections):
            # what a section leaves goes to those after it
            share = SECTIONS[section] / sum(SECTIONS[s] for s in sections[i:])
            until = time.monotonic() + share * (end - time.monotonic())
            if section != "tests":
                run_jobs(record, worker, jobs[section], until, peaks)
                continue
            later = [job for s in sections if s in ("ops", "compile") for job in jobs[s] if needs_compiler(job)]
            with warming(later[:1] if args.dry else later, mode, until):
                run_tests(record, args.dry, until)
        for row in shares(record.rows, args.dry):
            record.write(row)
        failed = f"{record.failed} of {len(record.rows) - 1} rows failed"
        record.write({"section": "end", "summary": failed, "failures": record.failed})
    if record.failed:
        raise Failure(f"{failed}; {short(str(args.out))} says why")
    return 0


def needs_compiler(job: dict[str, Any]) -> bool:
    """Whether Triton or Inductor compile something for a job."""
    return job["section"] == "compile" or job["form"] in ("triton", "flex", "ours") or job["form"].endswith("compiled")


def read_record(path: Path) -> Iterator[dict[str, Any]]:
    """Rows of a record, each with what its run says about itself.

    Args:
        path: The file.

    Yields:
        Rows of runs on a GPU, with ``run``: the rows ``start`` and ``env`` of their run, as far as there are any.

    Raises:
        UserError: If a line is no row.
    """
    about: dict[str, Any] = {}
    for number, text in enumerate(read_text(path, "record").splitlines(), 1):
        try:
            row = json.loads(text)
            section = row["section"]
        except (ValueError, TypeError, KeyError):
            raise UserError(f"record {short(str(path))}: line {number} is no row of --suite gpu") from None
        if section == "start":
            about = dict(row)
        elif section == "env":
            about.update(row)
        if not about.get("dry", True):
            yield {**row, "run": about}
