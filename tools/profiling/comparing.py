"""Which of two sides is faster: processes that take turns, the interval of the ratio of their times, and a verdict.

A side is a process of its own (:mod:`vizoo.tools.profiling.turns`), because two revisions of one package do not fit
into one.  Only one of both computes at a time, in the order A, B, B, A of a round, so that a drift of the machine meets
both alike.  Where a process lies in memory makes it faster or slower for all its life, so several pairs are started.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import os
import re
import signal
import statistics
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from vizoo.tools.common import Failure, Table, UserError, one_line, short
from vizoo.tools.options import number
from vizoo.tools.profiling.turns import Side

LEVEL = 0.95  # of intervals
DRAWS = 400  # of the bootstrap
FAST = 0.1  # quantile of the samples that sides are compared by
ALIKE = 0.05  # largest difference of outputs, relative to the largest, of what still counts as agreement
LEAST_PROCESSES = 3
ORDER = {1: (0,), 2: (0, 1, 1, 0)}  # of a round, by the number of sides
FILE = Path(__file__).with_name("turns.py")
START = "import runpy, sys; runpy.run_path(sys.argv.pop(1), run_name='__main__')"  # its folder stays out of the path


def percent(text: str) -> float:
    """Argument type: a share such as ``5%``.

    Args:
        text: What was given; the sign may be left out of ``5``, but not of ``0.05``, which could be either.

    Returns:
        The share, 0.05.

    Raises:
        argparse.ArgumentTypeError: For what is no number of at least 0, or could mean two shares.
    """
    share = float(number(float, 0)(text.removesuffix("%")))
    if 0 < share < 1 and not text.endswith("%"):
        raise argparse.ArgumentTypeError(f"got {text}: write {100 * share:g}% or {share:g}%")
    return share / 100


# statistics


class Spread(NamedTuple):
    """Logarithms of figures by process.

    Attributes:
        mean: Of the processes.
        variance: Of a single one.
        processes: How many there are.
    """

    mean: float
    variance: float
    processes: int

    @classmethod
    def of(cls, sides: Sequence[Sequence[Sequence[float]]], share: float) -> Spread:
        """The spread of a quantile of one side's samples, or of the ratio of two sides' quantiles.

        The variance is that between processes, but at least what the samples within them explain, by a bootstrap with
        a fixed seed, for a few processes may be close to each other by chance.  Samples of two sides are drawn in
        pairs, as they were taken, so that a drift of the machine is in both.

        Args:
            sides: Seconds by process of one side, or of B and A, whose samples stand in the order of their turns.
            share: Of the quantile.

        Returns:
            The spread.
        """
        import numpy as np

        values, drawn = [], []
        for process in zip(*sides, strict=True):
            logs = [np.log(some) for some in process]
            again = np.random.default_rng(0).integers(len(logs[0]), size=(DRAWS, len(logs[0])))
            value, draws = (
                [np.quantile(some[picked], share, axis=-1) for some in logs] for picked in (slice(None), again)
            )
            values.append(float(value[0] - sum(value[1:])))
            drawn.append(float(np.var(draws[0] - sum(draws[1:]))))
        between = statistics.variance(values) if len(values) > 1 else 0.0
        return cls(statistics.fmean(values), max(between, statistics.fmean(drawn)), len(values))

    @property
    def interval(self) -> tuple[float, float, float]:
        """The mean and its interval, not as logarithms."""
        return _interval(self.mean, self.variance / self.processes, self.processes - 1)


def _interval(middle: float, variance: float, freedom: int) -> tuple[float, float, float]:
    """Exponentials of a logarithm and its interval; without degrees of freedom that of the normal distribution."""
    from scipy.stats import norm, t

    q = (1 + LEVEL) / 2
    half = float(t.ppf(q, freedom) if freedom else norm.ppf(q)) * math.sqrt(variance)
    return math.exp(middle), math.exp(middle - half), math.exp(middle + half)


def middle_of(seconds: Sequence[Sequence[float]]) -> tuple[float, float, float]:
    """Median seconds of one side with their 95 % confidence interval.

    Args:
        seconds: Samples by process.

    Returns:
        Middle, lower and upper bound.
    """
    return Spread.of([seconds], 0.5).interval


def paired(a: Sequence[Sequence[float]], b: Sequence[Sequence[float]]) -> tuple[float, float, float]:
    """B's time over A's where they took turns.

    The ratio of the lowest deciles in each pair of processes, for what else a machine does only adds time; the mean of
    their logarithms over the pairs, and Student's interval with one degree of freedom less than pairs: a bootstrap of
    three processes would be too narrow.

    Args:
        a: Seconds of A by process and turn.
        b: Those of B in the turns beside them.

    Returns:
        The ratio and its 95 % confidence interval; of one pair it only knows the turns.
    """
    return Spread.of([b, a], FAST).interval


def unpaired(a: Sequence[Sequence[float]], b: Sequence[Sequence[float]]) -> tuple[float, float, float]:
    """B's time over A's where both were measured at different times, from their lowest deciles.

    Processes of a side that has only one are taken to differ as those of the other side do.

    Args:
        a: Seconds of A by process.
        b: Seconds of B by process.

    Returns:
        The ratio and its 95 % confidence interval.
    """
    one, other = (Spread.of([side], FAST) for side in (a, b))
    freedom = one.processes + other.processes - 2
    known = [s for s in (one, other) if s.processes > 1] or [one, other]
    least = sum(s.variance * max(1, s.processes - 1) for s in known) / sum(max(1, s.processes - 1) for s in known)
    variance = sum(max(s.variance, least if s.processes == 1 else 0.0) / s.processes for s in (one, other))
    return _interval(other.mean - one.mean, variance, freedom)


class Outcome(NamedTuple):
    """What a comparison found.

    Attributes:
        names: Of both sides.
        sides: How each was run.
        seconds: Samples of each, by process.
        ratio: B's time over A's, with the bounds of its interval.
        outputs: How far the outputs are apart, in a sentence.
        notes: What makes the figures doubtful.
        environment: Machine, versions and state.
    """

    names: tuple[str, str]
    sides: tuple[Side, Side]
    seconds: tuple[list[list[float]], list[list[float]]]
    ratio: tuple[float, float, float]
    outputs: str
    notes: list[str]
    environment: dict[str, Any]

    @property
    def verdict(self) -> str:
        """What B is: ``slower``, ``faster``, or ``undecided`` where the interval contains 1."""
        _, low, high = self.ratio
        return "slower" if low > 1 else "faster" if high < 1 else "undecided"

    def exceeds(self, budget: float) -> bool:
        """Whether B surely takes more time than A and a share of it: the lower bound is above."""
        return self.ratio[1] > 1 + budget

    @property
    def line(self) -> str:
        """The verdict in one line."""
        middle, low, high = self.ratio
        return f"B takes {middle:.3f} times as long as A ({low:.3f} to {high:.3f}): {self.verdict}"

    def to_dict(self) -> dict[str, Any]:
        """Plain values."""
        found: dict[str, Any] = {}
        for key, name, side, seconds in zip("ab", self.names, self.sides, self.seconds, strict=True):
            middle, low, high = middle_of(seconds)
            found[key] = {
                "name": name, **side._asdict(), "seconds": middle, "ci95": [low, high],
                "images_per_second": side.batch / middle, "samples": seconds,
            }  # fmt: skip
        ratio, low, high = self.ratio
        rest = {"outputs": self.outputs, "notes": self.notes, "environment": self.environment}
        return {**found, "ratio": ratio, "ci95": [low, high], "verdict": self.verdict, **rest}

    def table(self) -> Table:
        """Both sides and the verdict for people."""
        same = [k for k, one in self.sides[0]._asdict().items() if one == getattr(self.sides[1], k)]
        differing = [k for k in Side._fields if k not in (*same, "target")]
        rows = []
        for key, name, side, seconds in zip("AB", self.names, self.sides, self.seconds, strict=True):
            middle, low, high = middle_of(seconds)
            figures = [*(f"{1e3 * s:.3f}" for s in (middle, low, high)), f"{side.batch / middle:.1f}"]
            rows.append([key, name, *(_text(getattr(side, k)) for k in differing), *figures])
        columns = ["", "what", *(k.replace("_", "-") for k in differing), "ms", "from", "to", "img/s"]
        processes, turns = len(self.seconds[1]), len(self.seconds[1][0])
        e, side = self.environment, self.sides[0]
        how = [_text(getattr(side, k)) for k in ("dtype",) if k in same]
        where = "; ".join([f"{e['machine']} ({side.device})", *how, f"torch {e['torch']}"])
        below = [self.line, self.outputs, f"{processes} processes, {turns} turns in each; 95 % intervals", where]
        numeric = range(2 + len(differing), len(columns))
        return Table(columns, rows, [*numeric], below=[*below, *(f"note: {n}" for n in self.notes)])


def _text(value: Any) -> str:
    return "x".join(map(str, value)) if isinstance(value, list | tuple) else str(value)


# processes


class Place(NamedTuple):
    """Where a process finds its modules and files.

    Attributes:
        path: Its ``sys.path``.
        folder: Its working folder.
    """

    path: list[str]
    folder: Path


def here() -> Place:
    """Modules and files of this process."""
    return Place([p or os.getcwd() for p in sys.path], Path.cwd())


class Process:
    """A side that is running.

    Args:
        side: What it runs.
        place: Where.
        outputs: File for the outputs of its first call.
        cpu_time: Whether it tells processor time in place of wall time.
    """

    def __init__(self, side: Side, place: Place, outputs: Path, cpu_time: bool) -> None:
        self.side, self.log = side, outputs.with_suffix(".log")
        asked = {"side": side._asdict(), "path": place.path, "tools": str(FILE.parents[1]), "cpu_time": cpu_time}
        words = [sys.executable, "-c", START, str(FILE), json.dumps({**asked, "outputs": str(outputs)})]
        pipe = subprocess.PIPE
        with self.log.open("wb") as log:
            self.running = subprocess.Popen(
                words, stdin=pipe, stdout=pipe, stderr=log, cwd=place.folder, text=True, encoding="utf-8"
            )

    def tell(self, word: str) -> None:
        """Send a word; that the process is gone is noticed by :meth:`answer`."""
        assert self.running.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            self.running.stdin.write(f"{word}\n")
            self.running.stdin.flush()

    def answer(self) -> dict[str, Any]:
        """What it says next.

        Raises:
            UserError: If the side cannot be built or run for what was given.
            Failure: If it cannot be run otherwise, or its process died.
        """
        assert self.running.stdout is not None
        line = self.running.stdout.readline()
        if not line:
            lines = self.log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
            status = self.running.wait()
            killed = ", killed perhaps because memory ran out" * (status == -signal.SIGKILL)
            last = f": {lines[-1][:300]}" if lines else killed
            raise Failure(f"{self.side.target!r}: its process ended with status {status}{last}")
        found: dict[str, Any] = json.loads(line)
        if "error" in found:
            raise (UserError if found["status"] == 2 else Failure)(found["error"])
        return found

    def ask(self, word: str) -> dict[str, Any]:
        """Send a word and wait for what it says to that."""
        self.tell(word)
        return self.answer()

    def end(self) -> None:
        """End it, whatever it does."""
        self.running.kill()
        self.running.communicate()


class _Run(NamedTuple):
    """What the processes of one pair, or the process of a single side, found."""

    names: list[str]
    seconds: list[list[float]]  # by side and turn
    outputs: list[Path]
    environment: dict[str, Any]
    notes: list[str]


class Plan(NamedTuple):
    """How sides are timed.

    Attributes:
        processes: Fresh ones of each side, one after the other.
        rounds: In each process.
        cpu_time: Processor time in place of wall time.
        ready: Called with what each side says of itself, ``target`` and ``environment``, once it is built.
        tick: Called after each round.
    """

    processes: int = 5
    rounds: int = 30
    cpu_time: bool = False
    ready: Callable[[list[dict[str, Any]]], None] = lambda answers: None
    tick: Callable[[], None] = lambda: None


def _run(sides: Sequence[Side], places: Sequence[Place], folder: Path, plan: Plan) -> _Run:
    """Time fresh processes in turn."""
    files = [folder / f"{'ab'[i]}.pt" for i in range(len(sides))]
    with contextlib.ExitStack() as stack:
        running = []
        for side, place, file in zip(sides, places, files, strict=True):
            running.append(Process(side, place, file, plan.cpu_time))
            stack.callback(running[-1].end)
        ready = [process.answer() for process in running]
        plan.ready(ready)
        for process in running:
            process.ask("warm up")
        seconds: list[list[float]] = [[] for _ in sides]
        for _ in range(plan.rounds):
            for i in ORDER[len(sides)]:
                seconds[i].append(running[i].ask("run")["seconds"])
            plan.tick()
        ends = [process.ask("") for process in running]
    notes = [f"{'AB'[i]}: {note}" for i, end in enumerate(ends) for note in end["notes"]]
    environment = {**ready[-1]["environment"], **ends[-1]["state"]}
    return _Run([r["target"]["name"] for r in ready], seconds, files, environment, notes)


def measure_sides(
    sides: Sequence[Side], places: Sequence[Place], plan: Plan
) -> tuple[list[str], list[list[list[float]]], str, list[str], dict[str, Any]]:
    """Time one side, or two in turn, in several fresh processes.

    Args:
        sides: One or two.
        places: Where each is run; none for where this process is.
        plan: How.

    Returns:
        Names, seconds by side, process and turn, a sentence about the outputs, notes, and the environment.

    Raises:
        UserError: If a side cannot be built or run for what was given.
        Failure: If it cannot be run otherwise, or its process died.
    """
    seconds: list[list[list[float]]] = [[] for _ in sides]
    notes: list[str] = []
    told = ""
    with tempfile.TemporaryDirectory(prefix="vizoo-compare-") as folder:
        for _ in range(plan.processes):
            run = _run(sides, places or [here()] * len(sides), Path(folder), plan)
            for found, some in zip(seconds, run.seconds, strict=True):
                found.append(some)
            notes += run.notes
            told = told or (_about_outputs(sides, run.outputs) if len(sides) == 2 else "")
    return run.names, seconds, told, _counted(notes), run.environment


def _counted(notes: Sequence[str]) -> list[str]:
    """Notes of all processes, those that differ in figures once."""
    kinds: dict[str, list[str]] = {}
    for note in notes:
        kinds.setdefault(re.split(r"\d", note)[0], []).append(note)
    return [some[0] + f" (in {len(some)} processes)" * (len(some) > 1) for some in kinds.values()]


def _about_outputs(sides: Sequence[Side], files: Sequence[Path]) -> str:
    """A sentence about the outputs of both sides."""
    a, b = sides
    if a.target != b.target:
        return "outputs are those of different models, and not compared"
    if (a.size, a.batch) != (b.size, b.batch):
        return "outputs are those of different inputs, and not compared"
    import torch

    one, other = (torch.load(file, weights_only=True) for file in files)
    if not one and not other:
        return "outputs hold no tensors, and are not compared"
    if [t.shape for t in one] != [t.shape for t in other]:
        return "outputs differ: other shapes"
    apart = largest = 0.0
    for x, y in zip(one, other, strict=True):
        if x.numel():
            apart, largest = max(apart, float((x - y).abs().max())), max(largest, float(x.abs().max()))
        if not (x.isfinite().all() and y.isfinite().all()):
            return "outputs are not finite"
    share = apart / largest if largest else apart
    if not share:
        return "outputs are equal"
    return f"outputs agree to {share:.0e}" if share <= ALIKE else f"outputs differ by {share:.0%} of the largest"


# revisions and records


def _git(folder: Path, *words: str) -> str:
    """What git says in a folder.

    Raises:
        Failure: If it fails, or is not there.
    """
    try:
        done = subprocess.run(["git", "-C", str(folder), *words], capture_output=True, text=True, check=False)
    except FileNotFoundError:
        raise Failure("--rev: needs git, which is not installed") from None
    if done.returncode:
        raise Failure(one_line(Exception(done.stderr)))
    return done.stdout.strip()


@contextlib.contextmanager
def revision(rev: str | None, folder: Path) -> Iterator[Place]:
    """A revision of a git repository in a temporary folder, which is removed at the end.

    Args:
        rev: Whatever git takes for a commit; None for the files as they are.
        folder: In the repository.

    Yields:
        Its place: modules of its folder ``src``, of the repository, then those of this process.

    Raises:
        UserError: If the folder is in no repository, or the revision is none of it.
        Failure: If git fails.
    """
    try:
        root, inside = Path(_git(folder, "rev-parse", "--show-toplevel")), _git(folder, "rev-parse", "--show-prefix")
    except Failure as e:
        raise UserError(f"--rev: {folder} is in no git repository: {e}") from None
    if rev is None:
        yield _of(root, inside)
        return
    try:
        commit = _git(root, "rev-parse", "--verify", "--quiet", "--end-of-options", f"{rev}^{{commit}}")
    except Failure:
        raise UserError(f"--rev {short(rev)}: no revision of the repository {root}") from None
    with tempfile.TemporaryDirectory(prefix="vizoo-rev-") as temp:
        tree = Path(temp) / "tree"
        _git(root, "archive", "--format=tar", f"--output={temp}/tar", commit)
        with tarfile.open(f"{temp}/tar") as archive:
            archive.extractall(tree, filter="data")
        if not (tree / inside).is_dir():
            raise UserError(f"--rev {short(rev)}: has no folder {inside}")
        yield _of(tree, inside)


def _of(root: Path, inside: str) -> Place:
    return Place([str(p) for p in (root / "src", root) if p.is_dir()] + here().path, root / inside)


class Wanted(NamedTuple):
    """What a latency is to be compared with.

    Attributes:
        target: As of a record; one of its name fits ``spec`` or ``name``.
        conditions: Those of a record that must be the same.
        batch: Images at once.
        fingerprint: Of the machine.
    """

    target: Mapping[str, Any]
    conditions: Mapping[str, Any]
    batch: int
    fingerprint: str

    def is_of(self, target: Mapping[str, Any]) -> bool:
        """Whether a record is about the same target, with inputs of the same shapes but for the batch."""
        shapes = [[tuple(shape[1:]) for shape in t["inputs"]] for t in (self.target, target)]
        return bool({self.target["spec"], self.target["name"]} & {target["spec"], target["name"]}) and (
            shapes[0] == shapes[1]
        )


class Unlike(UserError):
    """There are records of the target, but of other conditions or another machine."""


def baseline(records: Sequence[Any], wanted: Wanted, file: str) -> Any:
    """The newest latency among records that another one may be compared with.

    Args:
        records: Of :func:`vizoo.tools.profiling.record.read_records`, the newest last.
        wanted: What it must be of.
        file: Their file, as the message names it.

    Returns:
        The measurement.

    Raises:
        Unlike: If there are only records of other conditions or another machine.
        UserError: If there is none of the target.
    """
    name = repr(wanted.target["name"])
    named = [r for r in records if not r.failure and wanted.is_of(r.target)]
    if not named:
        shapes = ", ".join("x".join(map(str, shape[1:])) for shape in wanted.target["inputs"])
        raise UserError(f"{file}: no record of {name} with inputs of {shapes} each; 'vizoo profile --save' adds one")
    alike = [r for r in named if all(r.conditions[k] == v for k, v in wanted.conditions.items())]
    found = [(r, m) for r in alike for m in r.measurements if (m.kind, m.batch) == ("latency", wanted.batch)]
    if not found:
        asked = ", ".join(f"{k} {_text(v)}" for k, v in {**wanted.conditions, "batch": wanted.batch}.items())
        raise Unlike(f"{file}: no latency of {name} with {asked}")
    same = [m for r, m in found if r.environment["fingerprint"] == wanted.fingerprint]
    if not same:
        other = found[-1][0].environment
        raise Unlike(
            f"{file}: {name} was recorded on {other['machine']} with torch {other['torch']} (fingerprint "
            f"{other['fingerprint']}), this is {wanted.fingerprint}: times of different machines are not compared"
        )
    return same[-1]
