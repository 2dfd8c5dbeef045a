"""Malicious pickles by hand, in the second protocol, as torch.save writes, and files that hold them.

Those of ``RUNS`` make a file ``ran`` in the working folder when they are read without limits.
"""

from __future__ import annotations

import io
import pickle
import tarfile
from pathlib import Path

import torch


def name(module: str, what: str) -> bytes:
    return f"c{module}\n{what}\n".encode()


def text(value: str) -> bytes:
    raw = value.encode()
    return b"X" + len(raw).to_bytes(4, "little") + raw


def number(value: int) -> bytes:
    return b"J" + value.to_bytes(4, "little", signed=True)


def group(*items: bytes) -> bytes:
    return b"(" + b"".join(items) + b"t"


def call(function: bytes, *arguments: bytes) -> bytes:
    return function + group(*arguments) + b"R"


def mapping(**items: bytes) -> bytes:
    return b"}(" + b"".join(text(k) + v for k, v in items.items()) + b"u"


def build(instance: bytes, state: bytes) -> bytes:
    return instance + state + b"b"


def made(kind: bytes, *arguments: bytes) -> bytes:
    """``kind.__new__(kind, *arguments)``."""
    return kind + group(*arguments) + b"\x81"


LOGS = name("mmengine.logging.history_buffer", "HistoryBuffer")
GETATTR, OLD_GETATTR = name("builtins", "getattr"), name("__builtin__", "getattr")
CODE = text("open('ran', 'w').close()")  # in the working folder


def attribute(of: bytes, *names: str, getattr_: bytes = GETATTR) -> bytes:
    for what in names:
        of = call(getattr_, of, text(what))
    return of


def item(of: bytes, key: str) -> bytes:
    return call(attribute(of, "__getitem__"), text(key))


def builtin_of(function: bytes, what: str) -> bytes:
    """A builtin by the globals of a function."""
    builtins = item(attribute(function, "__globals__"), "__builtins__")
    return item(builtins, what)


def import_(module: str) -> bytes:
    return call(name("builtins", "__import__"), text(module))


INIT = attribute(LOGS, "__init__")
MODULES = attribute(item(attribute(INIT, "__globals__"), "warnings"), "sys", "modules")
EXEC, TOUCH = name("builtins", "exec"), text("touch ran")
RUNS = {  # name -> pickle that runs code when it is read without limits
    "exec": call(EXEC, CODE),
    "eval of Python 2": call(name("__builtin__", "eval"), CODE),
    "import": call(attribute(import_("os"), "system"), TOUCH),
    "os": call(name("os", "system"), TOUCH),
    "posix": call(name("posix", "system"), TOUCH),
    "subprocess": call(name("subprocess", "check_call"), b"](" + text("touch") + text("ran") + b"e"),
    "numpy testing": call(name("numpy.testing._private.utils", "runstring"), CODE, b"}"),
    "numpy f2py": call(name("numpy.f2py.crackfortran", "myeval"), CODE),
    "partial": call(call(name("functools", "partial"), EXEC, CODE)),
    "attrgetter": call(call(call(name("operator", "attrgetter"), text("system")), import_("os")), TOUCH),
    "methodcaller": call(call(name("operator", "methodcaller"), text("system"), TOUCH), import_("os")),
    "map": call(name("builtins", "list"), call(name("builtins", "map"), EXEC, b"](" + CODE + b"e")),
    "pickle in a pickle": call(
        name("_pickle", "loads"),
        call(name("_codecs", "encode"), text((call(EXEC, CODE) + b".").decode()), text("latin1")),
    ),
    "torch.hub": call(name("torch.hub", "_load_local"), text("hub"), text("entry")),
    "globals of __init__": call(builtin_of(INIT, "exec"), CODE),
    "globals of a method": call(builtin_of(attribute(LOGS, "mean"), "exec"), CODE),
    "getattr of Python 2": call(builtin_of(attribute(LOGS, "__init__", getattr_=OLD_GETATTR), "eval"), CODE),
    "modules of a method": call(attribute(call(attribute(MODULES, "get"), text("os")), "system"), TOUCH),
    "state is exec": build(
        build(made(LOGS), mapping(__setstate__=builtin_of(INIT, "exec"), statistics_methods=b"}")), CODE
    ),
    "state by name": build(build(made(LOGS), mapping(__setstate__=EXEC, statistics_methods=b"}")), CODE),
    "state of another class": build(build(made(name("types", "SimpleNamespace")), mapping(__setstate__=EXEC)), CODE),
}


def array(dtype: bytes, shape: bytes, data: bytes) -> bytes:
    """A NumPy array as NumPy 2 writes it."""
    empty = call(name("numpy._core.multiarray", "_reconstruct"), name("numpy", "ndarray"), group(number(0)), text("b"))
    return build(empty, group(number(1), shape, dtype, b"\x89", data))


def dtype(code: str, *state: bytes) -> bytes:
    made_ = call(name("numpy", "dtype"), text(code), b"\x89", b"\x88")
    return build(made_, group(number(3), *state))


PLAIN = (text("<"), b"N", b"N", b"N", number(-1), number(-1), number(0))
FIELDS = b"}" + text("a") + group(call(name("numpy", "dtype"), text("O8"), b"\x89", b"\x88"), number(0)) + b"s"
RAW = call(name("_codecs", "encode"), text("A" * 16), text("latin1"))
CORRUPT = {  # name -> pickle whose raw bytes would be taken for pointers, or that mmengine and NumPy do not write
    "a number with a field of objects": array(
        dtype("f8", text("<"), b"N", group(text("a")), FIELDS, number(8), number(1), number(0)), group(number(2)), RAW
    ),
    "objects without their flag": array(
        dtype("O8", text("|"), b"N", b"N", b"N", number(-1), number(-1), number(0)), group(number(2)), RAW
    ),
    "a number with the flags of objects": array(
        dtype("f8", text("<"), b"N", b"N", b"N", number(-1), number(-1), number(63)), group(number(2)), RAW
    ),
    "a structure": array(
        dtype("V8", text("|"), b"N", group(text("a")), FIELDS, number(8), number(1), number(0)), group(number(2)), RAW
    ),
    "objects from raw bytes": array(
        dtype("O8", text("|"), b"N", b"N", b"N", number(-1), number(-1), number(63)), group(number(2)), RAW
    ),
    "too few bytes": array(dtype("f8", *PLAIN), group(number(2_000_000_000)), RAW),
    "a negative shape": array(dtype("f8", *PLAIN), group(number(-2), number(-1)), RAW),
    "an array of no file": call(name("numpy", "ndarray"), group(number(1 << 30)), text("O")),
    "a new array": made(name("numpy", "ndarray"), group(number(1 << 30)), text("O")),
    "a scalar of objects": call(
        name("numpy._core.multiarray", "scalar"), call(name("numpy", "dtype"), text("O8"), b"\x89", b"\x88"), RAW
    ),
    "a type of a file's own": call(name("numpy", "dtype"), mapping(names=b"]", formats=b"]")),
    "logs that are called": call(LOGS, b"]", b"]"),
    "logs with another method": build(made(LOGS), mapping(mean=name("torch", "Tensor"), statistics_methods=b"}")),
    "logs that are no numbers": build(made(LOGS), mapping(_log_history=name("torch", "Tensor"))),
    "logs of no mapping": build(made(LOGS), b"]"),
    "attributes of arrays": attribute(name("numpy", "ndarray"), "tofile"),
    "attributes of tensors": attribute(name("torch", "Tensor"), "storage"),
    "subclasses": attribute(LOGS, "__subclasses__"),
}


# files


def write_zip(path: Path, data: bytes) -> None:
    writer = torch._C.PyTorchFileWriter(str(path))
    writer.write_record("data.pkl", data, len(data))
    writer.write_end_of_file()


def write_legacy(path: Path, data: bytes) -> None:
    whole = io.BytesIO()
    torch.save({}, whole, _use_new_zipfile_serialization=False)
    empty = pickle.dumps({}, 2)
    start = whole.getvalue().index(empty)
    path.write_bytes(whole.getvalue()[:start] + data + whole.getvalue()[start + len(empty) :])


def write_tar(path: Path, data: bytes) -> None:
    with tarfile.open(path, "w:", format=tarfile.PAX_FORMAT) as archive:
        for member in ("storages", "tensors", "pickle"):
            info = tarfile.TarInfo(member)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))


WRITERS = {"zip": write_zip, "legacy": write_legacy, "tar": write_tar, "pkl": lambda path, data: path.write_bytes(data)}
