"""What all tools share: one-line errors, model names, devices, progress bars, safe file writing."""

from __future__ import annotations

import argparse
import contextlib
import difflib
import fnmatch
import os
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import IO, Any, NoReturn

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

stdout = Console(highlight=False)
stderr = Console(stderr=True, highlight=False)


class UserError(ValueError):
    """Bad input: the message names the argument, the value and what is allowed; tools exit with status 2."""


class Parser(argparse.ArgumentParser):
    """Parser whose errors are one line, as all bad input of a tool."""

    def error(self, message: str) -> NoReturn:
        """Raise instead of printing the usage.

        Raises:
            UserError: Always.
        """
        raise UserError(message)


def run_tool(tool: Callable[[list[str]], int], argv: Sequence[str] | None, name: str) -> int:
    """Run the body of a tool and turn bad input into one line and exit status 2.

    Args:
        tool: Function of the argument list that returns the exit status.
        argv: Arguments; None means ``sys.argv[1:]``.  ``--debug`` anywhere shows tracebacks.
        name: Subcommand name for the message.

    Returns:
        The exit status: that of ``tool``, 2 for a :class:`UserError`, 130 after Ctrl-C.
    """
    args = list(sys.argv[1:] if argv is None else argv)
    debug = "--debug" in args
    args = [a for a in args if a != "--debug"]
    try:
        return tool(args)
    except UserError as e:
        if debug:
            raise
        print(f"vizoo {name}: error: {e}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        if debug:
            raise
        print(f"vizoo {name}: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:  # the reader (head, less) closed the pipe
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0


def resolve_models(patterns: Sequence[str]) -> list[str]:
    """Expand model names and globs over everything registered in timm (vizoo included).

    Args:
        patterns: Names with or without tag, ``local-dir:`` / ``hf-hub:`` sources, or globs such as ``litv2*``.

    Returns:
        Names in the order asked for, each once; a glob gives timm's natural order.

    Raises:
        UserError: If a name or a glob matches nothing; close names are suggested.
    """
    import timm

    import vizoo  # noqa: F401 - registers the zoo

    names: list[str] = []
    for pattern in patterns:
        if pattern.startswith(("hf-hub:", "hf_hub:", "local-dir:")):
            names.append(pattern)
            continue
        arch, _, tag = pattern.partition(".")
        if any(c in pattern for c in "*?["):
            found = timm.list_models(pattern, include_tags="." in pattern)
            if not found:
                raise UserError(f"no model matches {pattern!r}; list the zoo with 'vizoo models'")
            names += found
            continue
        if not timm.is_model(arch):
            near = difflib.get_close_matches(arch, timm.list_models(), n=3, cutoff=0.6)
            hint = f"did you mean {', '.join(near)}?" if near else "list the zoo with 'vizoo models'"
            raise UserError(f"unknown model {pattern!r}; {hint}")
        tags = [t.partition(".")[2] for t in timm.list_models(f"{arch}.*", include_tags=True)]
        if tag and tag not in tags:
            raise UserError(f"unknown tag {tag!r} of model {arch!r}; known: {', '.join(tags) or 'none'}")
        names.append(pattern)
    return list(dict.fromkeys(names))


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
    """
    import timm

    overlay = kwargs.get("pretrained_cfg_overlay") or {}
    for path in (kwargs.get("checkpoint_path"), overlay.get("file")):
        if path and not Path(path).is_file():
            raise UserError(f"checkpoint file {str(path)!r} does not exist")
    given = kwargs.get("checkpoint_path") or overlay.get("file")
    try:
        if prepare is None:
            return timm.create_model(name, **kwargs)
        checkpoint = kwargs.pop("checkpoint_path", "")
        model = timm.create_model(name, **kwargs)
        prepare(model)
        if checkpoint:
            timm.models.load_checkpoint(model, checkpoint)
        return model
    except UserError:
        raise
    except Exception as e:  # whatever a constructor or an unpickler raises; --debug shows it whole
        if not given or isinstance(e, TypeError):
            raise UserError(f"cannot build {name!r}: {_first_line(e)}") from e
        why = _first_line(e) if isinstance(e, RuntimeError) else "not a checkpoint that PyTorch reads safely"
        raise UserError(f"checkpoint file {str(given)!r} does not fit {name!r} or cannot be read: {why}") from e


def _first_line(e: BaseException) -> str:
    lines = [line.strip() for line in str(e).splitlines() if line.strip()]
    text = " ".join(lines[:3]) if lines else "no message"
    return f"{type(e).__name__}: {text[:400]}"


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


def check_outputs(args: argparse.Namespace) -> None:
    """Say before anything is computed when ``--out`` or ``--plot`` cannot be written.

    Args:
        args: ``out``, a .json file or None, and ``plot``, a .png file or None.

    Raises:
        UserError: For another ending, or a folder that does not exist.
    """
    for name, suffix in (("out", ".json"), ("plot", ".png")):
        path = getattr(args, name)
        if path and (Path(path).suffix != suffix or not Path(path).resolve().parent.is_dir()):
            raise UserError(f"--{name} {path!r}: need a file {suffix} in a folder that exists")


def read_size(values: Sequence[int] | int, name: str = "--size") -> tuple[int, int]:
    """Check an image size.

    Args:
        values: One side of a square in pixels, or height and width.
        name: Argument name for the message.

    Returns:
        ``(height, width)`` in pixels.

    Raises:
        UserError: If a side is below 1 or there are more than two values.
    """
    sides = [values] if isinstance(values, int) else list(values)
    if len(sides) not in (1, 2) or any(s < 1 for s in sides):
        got = " ".join(map(str, sides))
        raise UserError(f"{name} {got}: give one side or height and width, each at least 1 pixel")
    return sides[0], sides[-1]


def print_table(columns: Sequence[str], rows: Sequence[Sequence[str]], numeric: Sequence[int] = ()) -> None:
    """Print a table that is never squeezed: cells do not wrap, headers wrap at spaces.

    Args:
        columns: Headers.
        rows: Cells as text.
        numeric: Columns to align right.
    """
    from rich import box
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)
    for i, column in enumerate(columns):
        header = column.replace(" ", "\n")
        table.add_column(header, justify="right" if i in numeric else "left", no_wrap=True)
    for row in rows:
        table.add_row(*row)
    width = max(stdout.width, 2 + sum(max(map(len, cells)) + 2 for cells in zip(columns, *rows, strict=True)))
    Console(highlight=False, width=width).print(table)


def match_names(names: Sequence[str], patterns: Sequence[str]) -> list[str]:
    """The names that match any glob; all names when there is no pattern."""
    return [n for n in names if not patterns or any(fnmatch.fnmatch(n, p) for p in patterns)]


def progress(**kwargs: Any) -> Progress:
    """A progress bar on standard error with elapsed and remaining time; it disappears when done.

    Nothing is drawn when standard error is no terminal.
    """
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        console=stderr,
        transient=True,
        **{"disable": not stderr.is_terminal, **kwargs},
    )


@contextlib.contextmanager
def atomic_write(path: str | Path, mode: str = "w") -> Iterator[IO[Any]]:
    """Open a temporary file beside ``path`` that replaces it when the block ends without error.

    Args:
        path: File to write.
        mode: ``"w"`` or ``"wb"``.

    Yields:
        The open temporary file.

    Raises:
        UserError: If the folder does not exist or cannot be written.
    """
    path = Path(path)
    try:
        fd, temp = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=path.suffix)
    except OSError as e:
        raise UserError(f"cannot write {str(path)!r}: {e.strerror}") from None
    try:
        binary = "b" in mode
        with os.fdopen(fd, mode, encoding=None if binary else "utf-8", newline=None if binary else "") as f:
            yield f
        umask = os.umask(0)
        os.umask(umask)
        os.chmod(temp, 0o666 & ~umask)
        os.replace(temp, path)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(temp)
        raise
