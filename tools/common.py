"""What all tools share: one-line errors, numbers, model names, devices, progress bars, reading and writing of files."""

from __future__ import annotations

import contextlib
import csv
import difflib
import errno
import fnmatch
import functools
import gc
import io
import json
import os
import re
import reprlib
import signal
import stat
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, NamedTuple, NoReturn

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import Progress


class UserError(ValueError):
    """Bad input: the message names the argument, the value and what is allowed; tools exit with status 2."""


class Failure(Exception):
    """Something went wrong while running: the message says what, where, and what helps; tools exit with status 1."""


def short(value: Any, length: int = 120) -> str:
    """A value of unknown size as the message of an error shows it, without ever making all of its text."""
    try:
        text = repr(value[: length + 1]) if isinstance(value, str) else _excerpt(length).repr(value)
    except (ValueError, RecursionError):  # a number of over 4,300 digits
        text = f"a {type(value).__name__}"
    return text if len(text) <= length else f"{text[:length]}..."


def _excerpt(length: int) -> reprlib.Repr:
    found = reprlib.Repr()
    found.maxstring = found.maxother = found.maxlong = length
    return found


def run_tool(tool: Callable[[list[str]], int], argv: Sequence[str] | None, name: str) -> int:
    """Run the body of a tool and turn whatever is no fault of ours into one line and an exit status.

    Args:
        tool: Function of the argument list that returns the exit status.
        argv: Arguments; None means ``sys.argv[1:]``.  ``--debug`` anywhere shows tracebacks.
        name: Subcommand name for the message, empty for none.

    Returns:
        The exit status: that of ``tool``, 2 for bad input, 1 for what went wrong while running (a :class:`Failure`, a
        full disk, too little memory, a worker process that was killed), 130 after Ctrl-C.
    """
    args = list(sys.argv[1:] if argv is None else argv)
    debug = "--debug" in args
    args = [a for a in args if a != "--debug"]
    who = f"vizoo {name}".rstrip()
    try:
        stream = sys.stdout or open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115 - closed by a shell
        with contextlib.redirect_stdout(_UnreadOutput(stream)) as out:  # type: ignore[type-var]
            try:
                return tool(args)
            finally:
                out.flush()
    except KeyboardInterrupt:
        if debug:
            raise
        print(f"{who}: interrupted", file=sys.stderr)
        return 130
    except Exception as e:
        known = None if debug else explain(e)
        if known is None:
            raise
        status, text = known
        print(f"{who}: error: {text}", file=sys.stderr)
        return status


@contextlib.contextmanager
def imports() -> Iterator[None]:
    """Around the first heavy imports of a process, whose million objects are then never looked through for garbage."""
    if "torch" in sys.modules:
        yield
        return
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.enable()


@contextlib.contextmanager
def endings() -> Iterator[None]:
    """SIGTERM, and SIGHUP where it is not ignored, become ``SystemExit``, so that what is open inside is cleaned up."""

    def end(signum: int, frame: object) -> NoReturn:
        raise SystemExit(128 + signum)

    main = threading.current_thread() is threading.main_thread()  # no other one may set handlers
    wanted = [s for s in (signal.SIGTERM, signal.SIGHUP) if main and signal.getsignal(s) is signal.SIG_DFL]
    for s in wanted:
        signal.signal(s, end)
    try:
        yield
    finally:
        for s in wanted:
            signal.signal(s, signal.SIG_DFL)


class _UnreadOutput:
    """Standard output whose reader (head, less) may go away: the rest is not printed, but the work is done."""

    def __init__(self, stream: Any) -> None:
        self._stream = stream

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def _try(self, act: Callable[[], Any]) -> Any:
        try:
            return act()
        except BrokenPipeError:
            null = os.open(os.devnull, os.O_WRONLY)
            os.dup2(null, self._stream.fileno())  # what is left in the buffer goes there
            os.close(null)

    def write(self, text: str) -> int:
        """Print, if anybody reads."""
        self._try(lambda: self._stream.write(text))
        return len(text)

    def flush(self) -> None:
        """Print what is left, if anybody reads."""
        self._try(self._stream.flush)


# beginnings of messages that libraries give a bare RuntimeError, and what helps
LIBRARY_FAILURES = {
    "can't allocate memory": "out of memory; lower --batch-size, the image size or --workers",
    "out of memory": "out of memory; lower --batch-size, the image size or --workers",
    "can't start new thread": "the system starts no further thread; lower --workers",
    "DataLoader worker": "a data worker died, killed perhaps because memory ran out; lower --workers or --batch-size",
    "Connection closed by peer": "another process of this run ended; its own message says why",
    "Connection reset by peer": "another process of this run ended; its own message says why",
    "unable to open shared memory": "no shared memory is left for data workers; lower --workers",
    "unable to write to file": "no shared memory is left for data workers; lower --workers",
}


WRONG_PATHS = (errno.ENAMETOOLONG, errno.ELOOP, errno.ENOTDIR, errno.EISDIR)  # bad input wherever they are noticed


def is_exhausted(error: BaseException) -> bool:
    """Whether memory, threads or a worker gave out, which no other argument of a constructor would mend."""
    return isinstance(error, RuntimeError | MemoryError) and explain(error) is not None


@contextlib.contextmanager
def taking(model: str, what: str) -> Iterator[None]:
    """Run a model on an input that it may not be able to take, which is one line then.

    Args:
        model: Its name.
        what: The input, and the option that would change it.

    Yields:
        Nothing.

    Raises:
        UserError: If the model fails otherwise than by memory, threads or a worker that gave out.
    """
    try:
        yield
    except (RuntimeError, AssertionError, ValueError, TypeError, IndexError, ZeroDivisionError) as e:
        if isinstance(e, UserError) or is_exhausted(e):
            raise
        reason = f"{type(e).__name__}: {one_line(e, 200)}"
        raise UserError(f"model {model!r} cannot take {what}: {reason}") from None


def explain(error: BaseException) -> tuple[int, str] | None:
    """Exit status and one line for an error that is no fault of this package.

    Args:
        error: What was raised.

    Returns:
        None for anything else: that is a fault to report, with its traceback.
    """
    if isinstance(error, UserError):
        return 2, str(error)
    if isinstance(error, Failure | FloatingPointError):  # the latter from heads, which know nothing of tools
        return 1, str(error)
    if isinstance(error, MemoryError):
        return 1, LIBRARY_FAILURES["out of memory"]
    if isinstance(error, OSError):
        file = f" {short(str(error.filename))}" if error.filename is not None else ""
        reason = error.strerror or " ".join(str(error).split()) or type(error).__name__
        return 2 if error.errno in WRONG_PATHS else 1, f"the system refuses{file}: {reason[:400]}"
    if isinstance(error, RuntimeError):
        text = str(error)
        return next(((1, f"{why} ({named(error)[:200]})") for k, why in LIBRARY_FAILURES.items() if k in text), None)
    return None


_HUBS = ("hf-hub:", "hf_hub:", "local-dir:")
_TARGETS = {"torchvision:": "torchvision", "mm:": "mm"}
_PROGRAMS = {".pt2": "exported", ".pt": "torchscript", ".pth": "torchscript", ".ts": "torchscript", ".onnx": "onnx"}


class Spec(NamedTuple):
    """What the text of a target says.

    Attributes:
        kind: ``timm``, ``torchvision``, ``function``, ``mm``, ``exported``, ``torchscript`` or ``onnx``.
        name: Name, place of a function, or file, without prefix and suffix.
        size: Sides of the suffix in pixels, one or height and width; None without one.
        prefix: ``torchvision:`` or ``mm:``, or nothing.
        suffix: As written.
    """

    kind: str
    name: str
    size: list[int] | None
    prefix: str
    suffix: str


def read_spec(text: str) -> Spec:
    """Take the text of a target apart; whether there is such a thing is not looked at.

    Args:
        text: ``NAME``, ``hf-hub:OWNER/NAME``, ``local-dir:FOLDER``, ``torchvision:NAME``, ``package.module:function``,
            ``file.py:function``, ``mm:CONFIG``, or a file ``.pt2``, ``.pt``, ``.pth``, ``.ts`` or ``.onnx``, perhaps
            with ``@224`` or ``@800x1280``, height before width.

    Returns:
        Its parts.
    """
    body, suffix = re.fullmatch(r"(.*?)(@[1-9]\d{0,4}(?:x[1-9]\d{0,4})?)?", text, re.DOTALL).groups("")  # type: ignore[union-attr]
    size = [int(side) for side in suffix[1:].split("x")] if suffix else None
    if body.startswith(_HUBS):
        return Spec("timm", body, size, "", suffix)
    for prefix, kind in _TARGETS.items():
        if body.startswith(prefix):
            return Spec(kind, body.removeprefix(prefix), size, prefix, suffix)
    if ":" in body or body.endswith(".py"):
        return Spec("function", body, size, "", suffix)
    return Spec(_PROGRAMS.get(os.path.splitext(body)[1], "timm"), body, size, "", suffix)


def resolve_models(patterns: Sequence[str]) -> list[str]:
    """Expand model names and globs over everything registered in timm (vizoo included), and in torchvision.

    Args:
        patterns: Names with or without tag, globs such as ``litv2*`` or ``torchvision:resnet*``, or other targets of
            :func:`read_spec`, which stay as they are; a suffix ``@224`` goes with every name of a glob.

    Returns:
        Names in the order asked for, each once; a glob gives timm's natural order.

    Raises:
        UserError: If a name or a glob matches nothing; close names are suggested.
    """
    names: list[str] = []
    for pattern in patterns:
        spec = read_spec(pattern)
        known = {"timm": _timm_names, "torchvision": _torchvision_names}.get(spec.kind)
        if known is None or spec.name.startswith(_HUBS):
            names.append(pattern)
        else:
            names += [f"{spec.prefix}{name}{spec.suffix}" for name in known(spec.name)]
    return list(dict.fromkeys(names))


def _timm_names(pattern: str) -> list[str]:
    import timm

    import vizoo  # noqa: F401 - registers the zoo

    arch, _, tag = pattern.partition(".")
    if any(c in pattern for c in "*?["):
        found: list[str] = timm.list_models(pattern, include_tags="." in pattern)
        if not found:
            raise UserError(f"no model matches {pattern!r}; list the zoo with 'vizoo models'")
        return found
    if not timm.is_model(arch):
        raise _unknown(pattern, arch, timm.list_models(), "list the zoo with 'vizoo models'")
    tags = [t.partition(".")[2] for t in timm.list_models(f"{arch}.*", include_tags=True)]
    if tag and tag not in tags:
        raise UserError(f"unknown tag {tag!r} of model {arch!r}; known: {', '.join(tags) or 'none'}")
    return [pattern]


def _torchvision_names(pattern: str) -> list[str]:
    from torchvision.models import list_models

    names = list_models()
    found = fnmatch.filter(names, pattern)
    if not found:
        raise _unknown(f"torchvision:{pattern}", pattern, names, "list them with torchvision.models.list_models()")
    return found


def _unknown(model: str, name: str, names: Sequence[str], remedy: str) -> UserError:
    """The error for a name that is not among those known."""
    near = difflib.get_close_matches(name, names, n=3, cutoff=0.6)
    hint = f"did you mean {', '.join(near)}?" if near else remedy
    if "@" in name:  # a right size is no part of it
        hint = "a size behind a name is @224 or @800x1280, height before width, of 1 to 99999 pixels"
    return UserError(f"unknown model {model!r}; {hint}")


def resolve_model(pattern: str, option: str = "--model") -> str:
    """The one model of timm that a name or a glob stands for.

    Args:
        pattern: A name with or without tag, a source of timm, or a glob.
        option: That it was given with, for the message.

    Returns:
        Its name.

    Raises:
        UserError: As :func:`resolve_models`, if it stands for several, or for something else than a model of timm.
    """
    spec = read_spec(pattern)
    if spec.kind != "timm" or spec.suffix:
        what = f"ends with a size, {spec.suffix!r}" if spec.kind == "timm" else "is no model of timm"
        raise UserError(f"{option} {pattern!r} {what}; only 'vizoo profile' takes that")
    names = resolve_models([pattern])
    if len(names) != 1:
        raise UserError(f"{option} {pattern!r} matches {len(names)} models; name one")
    return names[0]


def build_model(name: str, prepare: Callable[[Any], None] | None = None, **kwargs: Any) -> Any:
    """``timm.create_model`` whose failures are one clear line.

    Args:
        name: Model name as for :func:`timm.create_model`.
        prepare: Changes the model before ``checkpoint_path`` is loaded.
        **kwargs: Passed on.

    Returns:
        The model.

    Raises:
        UserError: For a missing or unreadable checkpoint, weights that do not fit, or an argument the model lacks.
        Failure: If the checkpoint holds weights that are not finite.
    """
    import timm

    from vizoo.tools.profiling.meta import NoValues

    overlay = kwargs.get("pretrained_cfg_overlay") or {}
    for path in (kwargs.get("checkpoint_path"), overlay.get("file")):
        if path:
            check_file(path, "checkpoint file")
    given = kwargs.get("checkpoint_path") or overlay.get("file")
    try:
        if prepare is None:
            with NoValues():
                model = timm.create_model(name, **kwargs)
        else:
            checkpoint = kwargs.pop("checkpoint_path", "")
            model = timm.create_model(name, **kwargs)
            prepare(model)
            if checkpoint:
                timm.models.load_checkpoint(model, checkpoint)
        if given:
            check_weights(model, given)
        return model
    except (UserError, Failure):
        raise
    except Exception as e:  # whatever a constructor or an unpickler raises; --debug shows it whole
        if is_exhausted(e):
            raise
        if not given or isinstance(e, TypeError):
            raise UserError(f"cannot build {name!r}: {named(e)}") from e
        why = named(e) if isinstance(e, RuntimeError) else "not a checkpoint that PyTorch reads safely"
        raise UserError(f"checkpoint file {str(given)!r} does not fit {name!r} or cannot be read: {why}") from e


def check_weights(model: Any, file: str | Path) -> None:
    """Refuse a checkpoint with weights that are not finite: every figure of such a model is a wrong one.

    Args:
        model: With the weights loaded.
        file: Where they come from, for the message.

    Raises:
        Failure: Names the first parameter or statistic.
    """
    bad = [name for name, value in model.named_parameters() if not value.isfinite().all()]
    # of buffers some are infinite on purpose, such as masks of attention
    bad += [name for name, value in model.named_buffers() if value.is_floating_point() and value.isnan().any()]
    if bad:
        more = f" and in {len(bad) - 1} more" if len(bad) > 1 else ""
        what = f"holds NaN or infinity in {bad[0]}{more}"
        raise Failure(f"checkpoint file {short(str(file))} {what}; take an earlier checkpoint")


def one_line(error: BaseException, length: int = 300) -> str:
    """What an error of a library says, on one line.

    Args:
        error: The error.
        length: Most characters.

    Returns:
        Its message, or the name of its class where it has none.
    """
    return " ".join(str(error).split())[:length] or type(error).__name__


def named(error: BaseException) -> str:
    """:func:`one_line` after the name of the error's class, for errors that say little without it."""
    return f"{type(error).__name__}: {one_line(error, 400)}"


def is_first_process() -> bool:
    """Whether this process is the only one, or the first of those that ``torchrun`` started."""
    return os.environ.get("RANK", "0") == "0"


def resolve_device(spec: str) -> Any:
    """Check a device string.

    Args:
        spec: ``cpu``, ``cuda``, ``cuda:1`` or ``meta``.

    Returns:
        The ``torch.device``.

    Raises:
        UserError: If the string is no device, or the device is not on this machine.
    """
    import torch

    allowed = "allowed: cpu, cuda, cuda:N, meta"
    try:
        device = torch.device(spec)
    except RuntimeError:
        raise UserError(f"unknown device {spec!r}; {allowed}") from None
    if device.type not in ("cpu", "cuda", "meta"):
        raise UserError(f"unsupported device {spec!r}; {allowed}")
    if device.type == "cuda":
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
        if (device.index or 0) >= count:
            raise UserError(f"device {spec!r} is not on this machine, which has {count} CUDA devices; {allowed}")
    return device


def compute_device(spec: str | None) -> Any:
    """Check a device that values are computed on.

    Args:
        spec: ``cpu``, ``cuda`` or ``cuda:1``; None for a GPU if there is one, else the CPU.

    Returns:
        The ``torch.device``.

    Raises:
        UserError: As :func:`resolve_device`, and for ``meta``.
    """
    import torch

    device = resolve_device(spec or ("cuda" if torch.cuda.is_available() else "cpu"))
    if device.type == "meta":
        raise UserError("--device 'meta' holds no values; allowed: cpu, cuda, cuda:N")
    return device


def check_file(path: str | Path, name: str) -> Path:
    """Say what is wrong with a file that is to be read, before it is opened: opening a pipe would wait for ever.

    Args:
        path: The file.
        name: Argument name for the message.

    Returns:
        Its path.

    Raises:
        UserError: If it does not exist, is a folder, a pipe or a device, or cannot be reached or read.
    """
    try:
        mode = os.stat(path).st_mode
    except (OSError, ValueError) as e:
        missing = isinstance(e, FileNotFoundError | NotADirectoryError)
        reason = " does not exist" if missing else f": {getattr(e, 'strerror', None) or e}"
        raise UserError(f"{name} {short(str(path))}{reason}") from None
    if not stat.S_ISREG(mode):
        kind = "a folder" if stat.S_ISDIR(mode) else "a pipe or device"
        raise UserError(f"{name} {short(str(path))} is {kind}, need a file")
    if not os.access(path, os.R_OK):
        raise UserError(f"{name} {short(str(path))}: no permission to read it")
    return Path(path)


def read_text(path: str | Path, name: str) -> str:
    """Read a text file in UTF-8, with or without byte order mark.

    Args:
        path: The file.
        name: Argument name for the message.

    Returns:
        Its text.

    Raises:
        UserError: As :func:`check_file`, and for another encoding.
    """
    file = check_file(path, name)
    try:
        return file.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as e:
        raise UserError(
            f"{name} {short(str(path))} is no text in UTF-8: byte {e.start} is {e.object[e.start]:#x}"
        ) from None
    except OSError as e:
        raise UserError(f"{name} {short(str(path))}: {e.strerror}") from None


def read_json(path: str | Path, name: str) -> Any:
    """Read a JSON file of finite numbers.

    Args:
        path: The file.
        name: Argument name for the message.

    Returns:
        Its contents.

    Raises:
        UserError: As :func:`read_text`; for what is no JSON, NaN and infinite numbers, and nesting without end.
    """

    def refuse(token: str) -> NoReturn:
        raise ValueError(f"{token} is no number of JSON")

    try:
        return json.loads(read_text(path, name), parse_constant=refuse)
    except UserError:
        raise
    except RecursionError:
        raise UserError(f"{name} {short(str(path))} is nested too deeply") from None
    except ValueError as e:
        raise UserError(f"{name} {short(str(path))} is no JSON: {one_line(e)}") from None


MOST_VALUES = 1_000_000  # of a YAML file; aliases of aliases make billions of a few lines


def read_yaml(path: str | Path, name: str) -> dict[str, Any]:
    """Read a YAML file of options: text, numbers, lists and mappings.

    Args:
        path: The file.
        name: Argument name for the message.

    Returns:
        The options by name.

    Raises:
        UserError: As :func:`read_text`; for what is no YAML, asks for Python objects, or holds anything but options.
    """
    import yaml

    what = f"{name} {short(str(path))}"
    try:
        options = yaml.safe_load(read_text(path, name))
        left = MOST_VALUES
        unseen = [options]
        while unseen:
            value = unseen.pop()
            left -= 1
            if left < 0:
                raise UserError(f"{what} holds over {MOST_VALUES:,} values")
            if isinstance(value, dict | list | tuple | set):
                unseen += [*value, *value.values()] if isinstance(value, dict) else list(value)
    except UserError:
        raise
    except RecursionError:
        raise UserError(f"{what} is nested too deeply") from None
    except (yaml.YAMLError, ValueError, TypeError) as e:  # ValueError: a date or a number that is none
        raise UserError(f"{what} is no YAML: {one_line(e, 200)}") from None
    if not isinstance(options, dict) or not all(isinstance(key, str) for key in options):
        raise UserError(f"{what}: expected lines 'option: value'")
    return options


MARK = b"vizoo"  # every file that a tool writes to a path of the user's choice says so in its beginning


def _mode(file: Path) -> int | None:
    try:
        return file.stat().st_mode
    except FileNotFoundError:
        return None


def check_output(path: str | Path | None, name: str, *suffixes: str, mark: bytes | None = MARK) -> None:
    """Say before any work starts that a file cannot be written, or that it holds something that is not ours.

    Args:
        path: File to write; None is nothing to check.
        name: Argument name for the message.
        *suffixes: Endings that are allowed; none allows all.
        mark: What an older file must have in its beginning to be replaced; None looks at no contents.

    Raises:
        UserError: For another ending, a folder that is missing or cannot be written, a path that is no file or is
            read-only, or a file that another program wrote.
    """
    if path is None:
        return
    what, file = f"{name} {short(str(path))}", Path(path)
    if suffixes and file.suffix not in suffixes:
        raise UserError(f"{what}: the ending must be {' or '.join(suffixes)}")
    try:
        folder = Path(os.path.abspath(file)).parent
        if not folder.is_dir():
            raise UserError(f"{what}: no such folder")
        if not os.access(folder, os.W_OK) or not folder.stat().st_mode & 0o222:
            raise UserError(f"{what}: its folder is read-only")
        mode = _mode(file)
    except UserError:
        raise
    except (OSError, ValueError) as e:
        raise UserError(f"{what}: {getattr(e, 'strerror', None) or e}") from None
    if mode is None:
        return
    if not stat.S_ISREG(mode):
        raise UserError(f"{what} is {'a folder' if stat.S_ISDIR(mode) else 'no regular file'}, need a file")
    if not os.access(file, os.W_OK) or not mode & 0o222:
        raise UserError(f"{what}: the file is read-only")
    if mark is None:
        return
    with file.open("rb") as f:
        head = f.read(1 << 16)
    if head and mark not in head:
        raise UserError(f"{what}: holds something that vizoo did not write; remove it or choose another name")


@functools.cache
def console(stderr: bool = False) -> Console:
    """Standard output or error of rich, which a GPU machine may lack, so it is imported where something is drawn."""
    from rich.console import Console

    return Console(stderr=stderr, highlight=False)


class Table(NamedTuple):
    """A table for people.

    Attributes:
        columns: Heads, with the units of what stands below them.
        rows: Cells as text; the last cell of a row with fewer cells than columns may take the rest of the line.
        numeric: Columns that are aligned right.
        above: Lines before it.
        below: Lines after it, such as what its columns mean.
    """

    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    numeric: Sequence[int] = ()
    above: Sequence[str] = ()
    below: Sequence[str] = ()


class _Grid:
    """Lines of a table whose rows may come one by one, for which rich needs all of them at once.

    Cells are never squeezed: they do not wrap, heads do at spaces.

    Args:
        table: Its columns, and rows that are known.
    """

    def __init__(self, table: Table) -> None:
        from rich.cells import cell_len

        self.length, self.numeric, count = cell_len, table.numeric, len(table.columns)
        self.heads = [column.split(" ") for column in table.columns]
        whole = [row for row in table.rows if len(row) == count] or [[""] * count]
        self.widths = [
            max(map(cell_len, [*head, *cells]))
            for head, cells in zip(self.heads, zip(*whole, strict=True), strict=True)
        ]

    def row(self, cells: Sequence[str]) -> str:
        """One line."""
        parts = []
        for k, (cell, width) in enumerate(zip(cells, self.widths, strict=False)):
            space = " " * (width - self.length(cell))
            parts.append(space + cell if k in self.numeric else cell + space)
        return f" {'  '.join(parts)}".rstrip()

    def head(self) -> str:
        """The heads and the line below them, after an empty one."""
        high = max(map(len, self.heads))
        lines = [self.row(words) for words in zip(*([""] * (high - len(h)) + h for h in self.heads), strict=True)]
        return "\n".join(["", *lines, f" {'─' * (sum(self.widths) + 2 * len(self.widths) - 2)}"])


def print_tables(*tables: Table) -> None:
    """Print tables with an empty line between them."""
    for i, table in enumerate(tables):
        apart = bool(i and tables[i - 1].below)  # a grid ends with an empty line
        grid = _Grid(table)
        rows = map(grid.row, table.rows)
        print("\n" * apart, *(f"{line}\n" for line in table.above), sep="", end="")
        print(grid.head(), *rows, "", *table.below, sep="\n")


def markdown(columns: Sequence[str], rows: Sequence[Sequence[str]], numeric: Sequence[int] = ()) -> str:
    """A Markdown table; ``numeric`` columns are aligned right."""
    rule = ["---:" if i in numeric else "---" for i in range(len(columns))]
    lines = [[cell.replace("|", "\\|") for cell in cells] for cells in (columns, rule, *rows)]
    return "".join(f"| {' | '.join(cells)} |\n" for cells in lines)


def markdown_text(tables: Sequence[Table]) -> str:
    """Tables as Markdown, with what stands above and below them."""
    parts = []
    for table in tables:
        texts = ["\n".join(table.above), markdown(*table[:3]), "\n".join(table.below)]
        parts += [text.strip("\n") for text in texts if text]
    return "\n\n".join(parts) + "\n"


def csv_text(table: Table) -> str:
    """A table as comma-separated values."""
    out = io.StringIO()
    csv.writer(out, lineterminator="\n").writerows([table.columns, *table.rows])
    return out.getvalue()


def model_rows() -> list[dict[str, str]]:
    """The rows of ``backbones/models.csv``, read without importing the zoo."""
    text = resources.files("vizoo").joinpath("backbones", "models.csv").read_text(encoding="utf-8")
    return list(csv.DictReader(text.splitlines()))


def is_shown(name: str, word: str) -> bool:
    """Whether a word of a user can mean a model: one for tests only where the word begins as their names do."""
    return word.startswith("test") or not name.startswith("test_")


def match_names(names: Sequence[str], patterns: Sequence[str]) -> list[str]:
    """The names that match any glob; all names when there is no pattern."""
    return [n for n in names if not patterns or any(fnmatch.fnmatch(n, p) for p in patterns)]


def progress(shown: bool = True) -> Progress:
    """A progress bar on standard error with elapsed and remaining time; it disappears when done.

    Args:
        shown: Whether to draw it; nothing is drawn in any case when standard error is no terminal.

    Returns:
        The bar.
    """
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    stderr = console(stderr=True)
    return Progress(
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        console=stderr,
        transient=True,
        disable=not (shown and stderr.is_terminal),
    )


@contextlib.contextmanager
def atomic_write(path: str | Path, mode: str = "w") -> Iterator[IO[Any]]:
    """Open a temporary file beside ``path`` that replaces it, on the disk, when the block ends without error.

    Args:
        path: File to write.
        mode: ``"w"`` or ``"wb"``.

    Yields:
        The open temporary file.

    Raises:
        Failure: If it cannot be written; what ``path`` held is still there.
        UserError: If its folder does not exist.
    """
    path = Path(path)
    temp = ""
    try:
        fd, temp = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name[:100]}.", suffix=".tmp")
        binary = "b" in mode
        with os.fdopen(fd, mode, encoding=None if binary else "utf-8", newline=None if binary else "") as f:
            yield f
            f.flush()
            os.fsync(f.fileno())
        umask = os.umask(0)
        os.umask(umask)
        os.chmod(temp, 0o666 & ~umask)
        replace(temp, path)
    except BaseException as e:
        with contextlib.suppress(OSError):
            os.unlink(temp)
        cause = e if isinstance(e, OSError) else e.__context__  # torch.save hides it behind an error of its own
        if isinstance(e, OSError | RuntimeError) and isinstance(cause, OSError):
            kind = UserError if isinstance(cause, FileNotFoundError) else Failure  # the folder is an argument too
            raise kind(f"cannot write {short(str(path))}: {cause.strerror or cause}") from None
        raise


def replace(source: str | Path, path: str | Path) -> None:
    """Rename a file over another one, and put the renaming on the disk where the system can.

    Args:
        source: In the same folder.
        path: What it replaces.
    """
    os.replace(source, path)
    with contextlib.suppress(OSError):
        fd = os.open(Path(path).parent, os.O_RDONLY)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)


def write_json(path: str | Path, result: Any) -> None:
    """Write a result as JSON that says who wrote it.

    Args:
        path: File to write.
        result: A dictionary of plain values, or a list of them.

    Raises:
        Failure: As :func:`atomic_write`.
    """
    import vizoo

    who = {"vizoo": vizoo.__version__}
    with atomic_write(path) as f:
        json.dump([who | row for row in result] if isinstance(result, list) else who | result, f, indent=2)


def print_json(result: Any) -> None:
    """Print a result for programs: what ``--json`` of every command does.

    Args:
        result: Plain values.
    """
    print(json.dumps(result, indent=2))


@contextlib.contextmanager
def without(bar: Progress | None) -> Iterator[None]:
    """Take a progress bar away while something is printed."""
    if bar is None:
        yield
        return
    bar.stop()
    try:
        yield
    finally:
        bar.start()


class Rows(NamedTuple):
    """Rows for a CSV file that keeps what it holds.

    Attributes:
        columns: Its columns, one of which says the version of vizoo.
        rows: Values by column.
    """

    columns: Sequence[str]
    rows: Sequence[Mapping[str, Any]]


def check_result(path: str | Path | None, columns: Sequence[str] | None = None) -> None:
    """Say before any work starts that ``--out`` cannot be written.

    Args:
        path: Its value.
        columns: Of the rows that are added to a CSV file; None where it is replaced.

    Raises:
        UserError: As :func:`check_output` and :func:`check_table`.
    """
    check_output(path, "--out", ".json", ".csv", ".md")
    if columns is not None and path is not None and Path(path).suffix == ".csv":
        check_table(path, "--out", columns)


def write_result(path: str | Path | None, result: Any, tables: Sequence[Table], record: Rows | None = None) -> None:
    """Write what a command found, in the form that the ending of ``--out`` says, in one step.

    Args:
        path: Value of ``--out``: ``.json`` holds the result, ``.csv`` the first table, ``.md`` all of them; None
            writes nothing.
        result: What ``--json`` prints: a dictionary, or a list of them.
        tables: What people read.
        record: Rows that are added to a CSV file in place of the table.

    Raises:
        UserError: As :func:`check_table`.
        Failure: As :func:`atomic_write`.
    """
    import vizoo

    if path is None:
        return
    kind = Path(path).suffix
    if kind == ".json":
        write_json(path, result)
    elif kind == ".csv" and record is not None:
        if record.rows:
            append_table(path, *record)
    else:
        columns, rows, *_ = tables[0]
        marked = Table([*columns, "vizoo"], [[*row, vizoo.__version__] for row in rows])
        with atomic_write(path) as f:
            f.write(csv_text(marked) if kind == ".csv" else f"{markdown_text(tables)}\nvizoo {vizoo.__version__}\n")


def give(args: Any, result: Any, tables: Sequence[Table], record: Rows | None = None) -> None:
    """Print what a command found, and write it.

    Args:
        args: ``json`` and ``out``, as :func:`vizoo.tools.options.add_result` adds them.
        result: As of :func:`write_result`.
        tables: As of :func:`write_result`.
        record: As of :func:`write_result`.
    """
    if args.json:
        print_json(result)
    else:
        print_tables(*tables)
    write_result(args.out, result, tables, record)


CELL_WIDTH = 7  # at least, of columns whose cells mostly come later


class Results:
    """Prints what a command finds, and writes it to ``--out``, as soon as it is known: a killed run keeps its rows.

    It is entered, so that JSON is whole where a command fails or is interrupted.

    Args:
        args: ``json`` and ``out``, as :func:`vizoo.tools.options.add_result` adds them.
        names: Cells of the first column that are to come.
        table: The table of some finds; its columns are the same for any of them.
        record: Their rows for a CSV file.
        plain: One of them in plain values, for JSON.
        filed: The table as Markdown files have it, with what a terminal shows elsewhere; None for the same.
    """

    def __init__(
        self,
        args: Any,
        names: Sequence[str],
        table: Callable[[Sequence[Any]], Table],
        record: Callable[[Sequence[Any]], Rows],
        plain: Callable[[Any], dict[str, Any]],
        filed: Callable[[Sequence[Any]], Table] | None = None,
    ) -> None:
        self.args, self.names, self.table, self.record, self.plain = args, names, table, record, plain
        self.filed = filed or table
        self.found: list[Any] = []
        self.plain_found: list[dict[str, Any]] = []
        self.grid: _Grid | None = None

    def add(self, one: Any, bar: Progress | None = None) -> None:
        """Print and write one find.

        Args:
            one: The find.
            bar: A progress bar that is shown meanwhile.

        Raises:
            UserError: As :func:`write_result`.
            Failure: As :func:`write_result`.
        """
        self.found.append(one)
        self.plain_found.append(self.plain(one))
        try:
            with without(bar):
                self._print_json() if self.args.json else self._print_row(one)
        finally:  # each of both, whatever happens to the other one
            self._write([one])

    def _print_json(self) -> None:
        text = json.dumps(self.plain_found[-1:], indent=2)
        print(("[" if len(self.found) == 1 else ",") + text[1:-2], end="", flush=True)

    def _print_row(self, one: Any) -> None:
        table = self.table([one])
        if self.grid is None:
            awaited = [[name, *["0" * CELL_WIDTH] * (len(table.columns) - 1)] for name in self.names]
            self.grid = _Grid(table._replace(rows=[*table.rows, *awaited]))
            print(self.grid.head())
        print(self.grid.row(table.rows[0]), flush=True)

    def _write(self, new: Sequence[Any], *more: Table) -> None:
        if self.args.out is not None:
            write_result(self.args.out, self.plain_found, [self.filed(self.found), *more], self.record(new))

    def end(self, *more: Table) -> None:
        """Print what stands below the table, and further tables, which go to Markdown files too.

        Args:
            *more: Further tables.
        """
        if self.found and not self.args.json:
            print("", *self.table(self.found).below, sep="\n")
            print("\n" * bool(more), end="")
            print_tables(*more)
        if more:
            self._write([], *more)

    def __enter__(self) -> Results:
        return self

    def __exit__(self, kind: Any, *error: Any) -> None:
        if self.args.json and (self.found or kind is None):
            print("\n]" if self.found else "[]")


def refuse_failures(failures: Sequence[str], rows: int, bad_input: bool) -> None:
    """End a command whose rows are all given.

    Args:
        failures: Why some of them failed.
        rows: How many there are.
        bad_input: Whether what was given is the reason for each of the failures.

    Raises:
        UserError: If all of them failed for what was given.
        Failure: If some failed otherwise.
    """
    if failures:
        which = f"{len(failures)} of {rows} rows failed: " if rows > 1 else ""
        kind = UserError if bad_input and len(failures) == rows else Failure
        raise kind(which + "; ".join(dict.fromkeys(failures)))


def check_table(path: str | Path | None, name: str, columns: Sequence[str]) -> None:
    """Say before any work starts that rows cannot be added to a CSV file.

    Args:
        path: File to add to; None is nothing to check.
        name: Argument name for the message.
        columns: The columns that the rows will have.

    Raises:
        UserError: As :func:`check_output`, and for an existing file with other columns.
    """
    check_output(path, name, ".csv")
    if path is None or not Path(path).exists():
        return
    try:
        header = next(csv.reader(read_text(path, name).splitlines()), [])
    except csv.Error as e:
        raise UserError(f"{name} {short(str(path))} is no CSV: {e}") from None
    if header and header != list(columns):
        raise UserError(f"{name} {short(str(path))}: has other columns than these rows; give a new file")


def append_table(path: str | Path, columns: Sequence[str], rows: Sequence[Mapping[str, Any]]) -> None:
    """Add rows to a CSV file, new or with the same columns, in one step; what it holds stays as it is.

    Args:
        path: File to add to.
        columns: Its columns; what a row lacks stays empty.
        rows: Values by column.

    Raises:
        UserError: As :func:`check_table`.
        Failure: As :func:`atomic_write`.
    """
    with _locked(Path(path).parent):
        check_table(path, "file", columns)
        old = read_text(path, "file") if Path(path).exists() else ""
        with atomic_write(path) as f:
            f.write(old if old.endswith("\n") or not old else f"{old}\n")
            writer = csv.DictWriter(f, fieldnames=columns, lineterminator="\n")
            if not old:
                writer.writeheader()
            writer.writerows(rows)


def json_lines(path: str | Path, name: str) -> Iterator[tuple[int, Any]]:
    """Values of a file with one on each line; a last line that a killed process left unfinished is none.

    Args:
        path: The file.
        name: Argument name for messages.

    Yields:
        Number of the line, from 1, and its value.

    Raises:
        UserError: As :func:`read_text`, or if a line is no JSON.
    """
    text = read_text(path, name)
    lines = text.splitlines()
    for number, line in enumerate(lines, 1):
        try:
            value = json.loads(line)
        except (ValueError, RecursionError) as e:
            if number == len(lines) and not text.endswith("\n"):
                return
            raise UserError(f"{name} {short(str(path))}: line {number} is no JSON: {one_line(e)}") from None
        yield number, value


def append_json_line(path: str | Path, value: Any) -> None:
    """Add a line with a value to a file, whole or not at all; what a killed process left unfinished goes.

    Args:
        path: The file, which may be new.
        value: What JSON can hold.

    Raises:
        Failure: If it cannot be written.
        ValueError: If the value holds a number that is none.
    """
    line = json.dumps(value, allow_nan=False, separators=(",", ":")).encode() + b"\n"
    with _locked(Path(path).parent), open(path, "a+b") as f:
        end = _end_of_lines(f)
        try:
            f.truncate(end)
            f.write(line)
            f.flush()
            os.fsync(f.fileno())
        except BaseException:
            with contextlib.suppress(OSError):
                os.truncate(f.fileno(), end)
            raise


def _end_of_lines(f: IO[bytes]) -> int:
    """Where whole lines of an open file end; a value that only lacks the end of its line gets it."""
    f.seek(0)
    text = f.read()
    rest = text.rpartition(b"\n")[2]
    try:
        json.loads(rest or "0")
    except ValueError:
        return len(text) - len(rest)
    f.write(b"\n" * bool(rest))
    return f.tell()


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Between reading a file of a folder and replacing it: no other process does so, where the system can lock."""
    fd = None
    with contextlib.suppress(ImportError, OSError):  # the folder is gone, or a file system without locks
        import fcntl

        fd = os.open(folder, os.O_RDONLY)
        fcntl.flock(fd, fcntl.LOCK_EX)
    try:
        yield
    finally:
        if fd is not None:
            os.close(fd)


def save_figure(figure: Any, path: str | Path, **options: Any) -> None:
    """Write a figure of matplotlib, in the format of the file's ending, that says who wrote it.

    Args:
        figure: The figure.
        path: PNG, PDF or SVG file to write.
        **options: Passed on to ``savefig``.

    Raises:
        Failure: As :func:`atomic_write`.
    """
    import vizoo

    kind = Path(path).suffix[1:]
    who = {"Software" if kind == "png" else "Creator": f"vizoo {vizoo.__version__} with Matplotlib"}
    with atomic_write(path, "wb") as f:
        figure.savefig(f, format=kind, metadata=who, **options)
