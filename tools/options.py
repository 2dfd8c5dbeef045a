"""The options that several commands have: each is described once, so that it reads and behaves the same everywhere.

A command says what differs, its default and a note in parentheses, with :func:`add`.
"""

from __future__ import annotations

import argparse
import ast
import math
import os
import re
import sys
from collections.abc import Callable, Sequence
from numbers import Integral
from typing import Any, NoReturn

from vizoo.tools.common import UserError, is_shown, model_rows, short

MOST = 2**31 - 1  # of images, channels, classes: the largest number of a 32-bit index
MOST_THREADS = max(64, os.cpu_count() or 1)  # far more than help; OpenMP ends the process where the system has no more
MODELS = ("MODEL", "WORD")  # what stands for models in the usage of commands
COMPLETING = "_ARGCOMPLETE"  # in the environment where a shell asks, by argcomplete, what may follow


class Parser(argparse.ArgumentParser):
    """Parser of a command: the text of examples stays as it is, options are written out, errors are one line."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**{"formatter_class": argparse.RawDescriptionHelpFormatter, "allow_abbrev": False, **kwargs})
        self.add_argument("--debug", action="store_true", help="show full tracebacks")

    def error(self, message: str) -> NoReturn:
        """Raise instead of printing the usage.

        Raises:
            UserError: Always.
        """
        raise UserError(message)

    def parse_args(self, args: Any = None, namespace: Any = None) -> Any:
        """As of argparse; a shell that asks what may follow is answered, and the process ends.

        Args:
            args: Words; None means ``sys.argv[1:]``.
            namespace: Where the values go.

        Returns:
            Namespace.
        """
        if COMPLETING in os.environ:
            import argcomplete

            for action in self._actions:
                words = getattr(action.type, "words", None)
                if action.metavar in MODELS:
                    action.completer = _models  # type: ignore[attr-defined]
                elif words:
                    action.completer = argcomplete.ChoicesCompleter(words)  # type: ignore[attr-defined]
            argcomplete.autocomplete(self, always_complete_options=False)
        return super().parse_args(args, namespace)

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """As of argparse, but a word that an option with any number of values cannot take is an argument of its own.

        Args:
            args: Words; None means ``sys.argv[1:]``.
            namespace: Where the values go.

        Returns:
            Namespace and unknown words.
        """
        words = list(sys.argv[1:] if args is None else args)
        if words and words[0].startswith("-") and any(not a.option_strings for a in self._actions):
            words = self._arguments_first(words)
        return super().parse_known_args(words, namespace)

    def _arguments_first(self, words: list[str]) -> list[str]:
        """``--batch 1 8 MODEL`` as ``MODEL --batch 1 8``."""
        arguments, rest = [], []
        option, least = None, 0  # whose values follow, and how many it must have
        for word in words:
            if word.startswith("-"):
                option = self._option_string_actions.get(word)
                least = int(option is not None and option.nargs == "+")
            elif option is not None and option.nargs in ("+", "?") and not least and not _takes(option, word):
                arguments.append(word)
                option = None
                continue
            else:
                least = 0
            rest.append(word)
        return arguments + rest


def _models(prefix: str, **kwargs: Any) -> list[str]:
    """Names of the zoo; those of models for tests where they are begun."""
    return [row["name"] for row in model_rows() if is_shown(row["name"], prefix)]


def _takes(option: argparse.Action, word: str) -> bool:
    try:
        value = option.type(word) if callable(option.type) else word
    except (argparse.ArgumentTypeError, TypeError, ValueError):
        return False
    return option.choices is None or value in option.choices


def number(
    kind: type, low: float = -math.inf, high: float = math.inf, above: bool = False, below: bool = False
) -> Callable[[str], Any]:
    """Argument type: a finite number between two bounds.

    Args:
        kind: ``int`` or ``float``.
        low: Smallest value.
        high: Largest value.
        above: ``low`` itself is not allowed.
        below: ``high`` itself is not allowed.

    Returns:
        Parser of a text; it raises ``argparse.ArgumentTypeError`` with what is allowed.
    """
    need = "a whole number" if kind is int else "a finite number"
    if low > -math.inf and high < math.inf and not above and not below:
        need += f" between {low:g} and {high:g}"
    else:
        bounds = [f"above {low:g}" if above else f"of at least {low:g}"] * (low > -math.inf)
        bounds += [f"below {high:g}" if below else f"of at most {high:g}"] * (high < math.inf)
        need = " ".join([need, *" and ".join(bounds).split()])

    def parse(text: str) -> Any:
        try:
            value = kind(text)
            fits = math.isfinite(value)  # OverflowError for an int of over 308 digits
        except (ValueError, OverflowError):
            fits = False
        if not fits or not (low < value if above else low <= value) or not (value < high if below else value <= high):
            raise argparse.ArgumentTypeError(
                f"got {text if text.isprintable() and text[:120] == text != '' else short(text)}, must be {need}"
            )
        return value

    return parse


UNITS = {"K": 1e3, "M": 1e6, "G": 1e9, "B": 1e9}


def quantity(text: str) -> float:
    """Argument type: a number above 0, perhaps with a letter of :data:`UNITS`.

    Args:
        text: What was given.

    Returns:
        The number.

    Raises:
        argparse.ArgumentTypeError: For anything else.
    """
    unit = UNITS.get(text[-1:].upper())
    try:
        return unit * _ABOVE(text[:-1]) if unit else _ABOVE(text)
    except argparse.ArgumentTypeError:
        need = f"a number above 0, perhaps with {', '.join(UNITS)} behind it, such as 30M or 5.5e6"
        raise argparse.ArgumentTypeError(f"got {short(text)}, must be {need}") from None


class KeyValues(argparse.Action):
    """Collects words KEY=VALUE in a dictionary; a value is a literal of Python, else text."""

    def __call__(self, parser: Any, namespace: Any, values: Any, option_string: str | None = None) -> None:
        """Store the dictionary.

        Raises:
            argparse.ArgumentError: For a word without ``=`` or without a key.
        """
        found: dict[str, Any] = {}
        for word in values:
            key, equals, text = word.partition("=")
            if not equals or not key.isidentifier():
                raise argparse.ArgumentError(self, f"got {short(word)}, must be KEY=VALUE")
            found[key] = literal(text)
        setattr(namespace, self.dest, found)


def literal(text: str) -> Any:
    """The value of a literal of Python, or the text itself, whatever it looks like."""
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):  # TypeError: {[]: 1}
        return text


def read_size(values: Sequence[int] | int, name: str = "--size") -> tuple[int, int]:
    """Check an image size.

    Args:
        values: One side of a square in pixels, or height and width.
        name: Argument name for the message.

    Returns:
        ``(height, width)`` in pixels.

    Raises:
        UserError: If a side is below 1 or beyond :data:`MOST`, or there are more than two values.
    """
    sizes = read_sizes([values] if isinstance(values, int) else values, name)
    if len(sizes) > 1:
        raise UserError(f"{name} {','.join(f'{h}x{w}' for h, w in sizes)}: give one size")
    return sizes[0]


def read_sizes(values: Sequence[Any], name: str = "--size") -> list[tuple[int, int]]:
    """Check image sizes.

    Args:
        values: One side of a square in pixels, height and width, or lists of :func:`pixels`.
        name: Argument name for the message.

    Returns:
        Pairs ``(height, width)`` in pixels.

    Raises:
        UserError: As :func:`read_size`.
    """
    sizes: list[list[Any]] = [list(values)]
    if any(isinstance(value, list) for value in values):
        sizes = [size for value in values for size in (value if isinstance(value, list) else [[value]])]
    for sides in sizes:
        if len(sides) not in (1, 2) or not all(isinstance(s, int | Integral) and 1 <= int(s) <= MOST for s in sides):
            got = " ".join(map(str, sides))
            raise UserError(
                f"{name} {got}: give one side or height and width, each at least 1 pixel and at most {MOST}"
            )
    return [(int(sides[0]), int(sides[-1])) for sides in sizes]


def window_type(values: Sequence[float]) -> tuple[float, float]:
    """Check centre and width of a window.

    Args:
        values: Both.

    Returns:
        Both.

    Raises:
        ValueError: If the centre is no finite number or the width none above 0.
    """
    center, width = values
    if not (math.isfinite(center) and 0 < width < math.inf):
        raise ValueError(f"window of centre {center:g} and width {width:g}: need a finite centre and a width above 0")
    return float(center), float(width)


class _Window(argparse.Action):
    def __call__(self, parser: Any, namespace: argparse.Namespace, values: Any, option: str | None = None) -> None:
        try:
            setattr(namespace, self.dest, window_type(values))
        except ValueError as e:
            raise argparse.ArgumentError(self, str(e)) from None


# of --dtype, and torch's of what they hold; int8 are the products of linear layers only
DTYPES = {"fp32": "float32", "tf32": "float32", "bf16": "bfloat16", "fp16": "float16", "int8": "float32"}


def dtype(text: str) -> str:
    """Argument type: a key of :data:`DTYPES`; torch's names are understood too.

    Args:
        text: What was given.

    Returns:
        The key.

    Raises:
        argparse.ArgumentTypeError: For anything else.
    """
    known = {**{name: key for key, name in reversed(DTYPES.items())}, **{key: key for key in DTYPES}}
    if text not in known:
        raise argparse.ArgumentTypeError(f"got {short(text)}, must be one of {', '.join(DTYPES)}")
    return known[text]


def listed(kind: Callable[[str], Any]) -> Callable[[str], list[Any]]:
    """Argument type: values with commas between them, for an option of several words that :class:`Joined` joins.

    Args:
        kind: Type of one value.

    Returns:
        Parser of a text.
    """

    def parse(text: str) -> list[Any]:
        return [kind(part) for part in text.split(",")]

    parse.words = getattr(kind, "words", ())  # type: ignore[attr-defined] # for completion by a shell
    return parse


def choice(*allowed: str, **others: Any) -> Callable[[str], Any]:
    """Argument type: one of some words.

    Args:
        *allowed: Words that are their own value.
        **others: Further words and their values.

    Returns:
        Parser of a text; it raises ``argparse.ArgumentTypeError`` with what is allowed.
    """
    known = {**{word: word for word in allowed}, **others}

    def parse(text: str) -> Any:
        if text not in known:
            raise argparse.ArgumentTypeError(f"got {short(text)}, must be one of {', '.join(known)}")
        return known[text]

    parse.words = tuple(known)  # type: ignore[attr-defined]
    return parse


def pixels(text: str) -> Any:
    """Argument type: a side in pixels; several sizes with commas, as ``224,800x1280``, are a list of lists.

    Args:
        text: What was given.

    Returns:
        A whole number, or a list of sizes of one or two sides.

    Raises:
        argparse.ArgumentTypeError: For anything else.
    """
    if "," not in text and "x" not in text:
        return number(int)(text)
    try:
        return [[int(side) for side in size.split("x")] for size in text.split(",")]
    except ValueError:
        need = "pixels of a side, or sizes such as 224,384 or 800x1280"
        raise argparse.ArgumentTypeError(f"got {short(text)}, must be {need}") from None


def shapes(text: str) -> str:
    """Argument type: shapes of inputs with commas between them, each perhaps with a dtype, as ``2x3x224x224``.

    Args:
        text: What was given.

    Returns:
        The text.

    Raises:
        argparse.ArgumentTypeError: For anything else.
    """
    if not re.fullmatch(r"\d+(x\d+)*(:\w+)?(,\d+(x\d+)*(:\w+)?)*", text):
        raise argparse.ArgumentTypeError(
            f"got {short(text)}, must be shapes such as 2x3x224x224 or 1x77:int64,1x3x32x32"
        )
    return text


class Joined(argparse.Action):
    """Joins the lists that the words of an option are."""

    def __call__(self, parser: Any, namespace: argparse.Namespace, values: Any, option: str | None = None) -> None:
        """Store the list."""
        setattr(namespace, self.dest, [one for several in values for one in several])


TASKS = ("classification", "detection", "segmentation", "scanpath")
PARTS = ("train", "val", "test")  # of scanpaths
STATE = (  # of a device, as records of measurements tell it
    "clock_mhz", "max_clock_mhz", "memory_clock_mhz", "temperature_c", "power_w", "throttled", "throttle_count",
    "governor", "driver", "cudnn", "cudnn_benchmark", "float32_products", "flush_denormal",
)  # fmt: skip
MEASURES = ("count", "latency", "throughput", "memory", "train", "modules", "roofline", "energy")  # of the profiler
COMPILED = ("default", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs")  # modes of torch.compile
_COUNT, _POSITIVE = number(int, 0), number(int, 1)
_REAL, _ABOVE, _SHARE = number(float, 0), number(float, 0, above=True), number(float, 0, 1)
_TOGGLE: dict[str, Any] = {"action": argparse.BooleanOptionalAction, "default": False}
_SWITCH: dict[str, Any] = {"action": "store_true"}
_WORDS: dict[str, Any] = {"nargs": "*", "action": KeyValues, "metavar": "KEY=VALUE"}

SHARED: dict[str, dict[str, Any]] = {
    # model and data
    "--model": {"metavar": "MODEL", "help": "a model of timm or vizoo, see 'vizoo models'"},
    "--model-kwargs": {**_WORDS, "help": "further arguments of the model"},
    "--pretrained": {**_TOGGLE, "help": "published weights"},
    "--checkpoint": {"metavar": "FILE", "help": "weights to load"},
    "--num-classes": {"type": _COUNT, "metavar": "N", "help": "outputs of the model"},
    "--in-chans": {"type": _POSITIVE, "metavar": "N", "help": "channels of an image, 1 is gray and 3 is RGB"},
    "--reparam": {**_SWITCH, "help": "merge branches for inference where the model can"},
    "--data": {"metavar": "DATA", "help": "the data"},
    "--images": {"metavar": "DIR", "help": "images of the scenes"},
    "--split": {"metavar": "NAME", "help": "part of the data"},
    "--only-classes": {"nargs": "+", "metavar": "NAME", "help": "use only the images of these classes"},
    "--check-images": {
        "choices": ("auto", "full", "header", "none"),
        "help": "decode every image first, open it, or trust it; auto decodes up to 20,000, else opens",
    },
    "--check-data": {
        "choices": ("full", "none"),
        "help": "look at every image and mask first; the records of a COCO file are checked in any case",
    },
    "--skip-unreadable": {
        **_SWITCH,
        "help": "leave out images that cannot be read, and say how many, instead of stopping",
    },
    "--window": {
        "type": float,
        "nargs": 2,
        "action": _Window,
        "metavar": ("CENTER", "WIDTH"),
        "help": "values that 16-bit gray, float and DICOM images show",
    },
    "--size": {"type": pixels, "nargs": "+", "metavar": "N", "help": "pixels of an image"},
    "--img-size": {"type": _POSITIVE, "metavar": "N", "help": "side of the model's input in pixels"},
    "--crop-pct": {"type": number(float, 0.01, 1), "metavar": "SHARE", "help": "centre crop of held-out images"},
    "--scale": {"type": _REAL, "nargs": 2, "metavar": ("LOW", "HIGH"), "help": "random scale of training images"},
    "--hflip": {"type": _SHARE, "metavar": "P", "help": "probability of a mirrored training image"},
    "--workers": {"type": _COUNT, "metavar": "N", "help": "processes that read images"},
    # heads
    "--arch": {"metavar": "NAME", "help": "what stands on the backbone"},
    "--arch-kwargs": {**_WORDS, "help": "further arguments of the heads"},
    "--frozen-stages": {"type": number(int, -1), "metavar": "N", "help": "what stays fixed: 0 stem, 1 and stage 1"},
    # how it is computed
    "--device": {"metavar": "DEVICE", "help": "cpu, cuda or cuda:N"},
    "--input": {"type": shapes, "metavar": "SHAPE", "help": "of the inputs of a function or a file, as 1x3x224x224"},
    "--weights": {"metavar": "FILE", "help": "weights to load, as timm's checkpoint_path"},
    "--batch-size": {"type": _POSITIVE, "metavar": "N", "help": "images at once in each process"},
    "--batch": {
        "type": listed(number(int, 1, MOST)),
        "nargs": "+",
        "action": Joined,
        "metavar": "N",
        "help": "images at once",
    },
    "--threads": {
        "type": listed(number(int, 1, MOST_THREADS)),
        "nargs": "+",
        "action": Joined,
        "metavar": "N",
        "help": "CPU threads, each in a fresh process",
    },
    "--amp": {**_TOGGLE, "help": "mixed precision"},
    "--dtype": {
        "type": listed(dtype),
        "nargs": "+",
        "action": Joined,
        "metavar": "DTYPE",
        "help": "fp32, tf32, bf16 or fp16; of profile and compare also int8: dynamic, in linear layers, on a CPU",
    },
    "--channels-last": {**_TOGGLE, "help": "channels-last memory layout of images and weights"},
    "--compile": {
        "type": listed(choice(*COMPILED, no=None)),
        "nargs": "?",
        "const": ["default"],
        "metavar": "MODE",
        "help": f"torch.compile: {', '.join(COMPILED[:-1])} or {COMPILED[-1]}; or no",
    },
    "--graph": {
        "type": listed(choice(no=False, yes=True)),
        "nargs": "?",
        "const": [True],
        "metavar": "WHETHER",
        "help": "replay a CUDA graph of the call: no or yes",
    },
    "--rounds": {"type": number(int, 1, MOST), "metavar": "N", "help": "times that sides take turns"},
    "--cpu-time": {**_SWITCH, "help": "processor time in place of wall time: for a busy machine, one thread"},
    # training
    "--task": {"choices": TASKS, "help": "task of the model"},
    "--config": {"metavar": "FILE", "help": "YAML file of options, such as args.yaml; the command line overrides it"},
    "--grad-accum-steps": {"type": _POSITIVE, "metavar": "N", "help": "batches for each update"},
    "--amp-dtype": {"choices": ("float16", "bfloat16"), "help": "dtype of --amp"},
    "--sync-bn": {**_TOGGLE, "help": "BatchNorm over all processes, CUDA only"},
    "--dist-bn": {"choices": ("reduce", "broadcast", ""), "help": "statistics of BatchNorm after an epoch"},
    "--opt": {"metavar": "NAME", "help": "any optimizer of timm"},
    "--opt-eps": {"type": _REAL, "metavar": "EPS", "help": "what keeps it from dividing by zero"},
    "--opt-betas": {"type": _SHARE, "nargs": "+", "metavar": "BETA", "help": "decay of its averages"},
    "--momentum": {"type": _REAL, "metavar": "M", "help": "of optimizers that have one"},
    "--layer-decay": {"type": _REAL, "metavar": "FACTOR", "help": "layer-wise decay of the learning rate"},
    "--layer-decay-min-scale": {"type": _SHARE, "metavar": "MIN", "help": "its lower bound"},
    "--weight-decay": {"type": _REAL, "metavar": "W", "help": "not for biases and norms"},
    "--clip-grad": {"type": _ABOVE, "metavar": "NORM", "help": "clip gradients"},
    "--clip-mode": {"choices": ("norm", "value", "agc"), "help": "how gradients are clipped"},
    "--lr": {"type": _ABOVE, "metavar": "LR", "help": "learning rate"},
    "--epochs": {"type": _POSITIVE, "metavar": "N", "help": "passes over the training data"},
    "--sched": {
        "choices": ("cosine", "tanh", "step", "multistep", "poly", "wsd", "rsqrt", "constant"),
        "help": "how the learning rate falls",
    },
    "--sched-on-updates": {**_TOGGLE, "help": "change the learning rate at each update, not each epoch"},
    "--warmup-epochs": {"type": _COUNT, "metavar": "N", "help": "epochs in which the learning rate rises"},
    "--warmup-lr": {"type": _REAL, "metavar": "LR", "help": "where it starts"},
    "--warmup-prefix": {**_TOGGLE, "help": "add the warm-up to --epochs"},
    "--cooldown-epochs": {"type": _COUNT, "metavar": "N", "help": "at --min-lr after --epochs"},
    "--min-lr": {"type": _REAL, "metavar": "LR", "help": "where it ends"},
    "--decay-epochs": {"type": _REAL, "metavar": "N", "help": "of step, wsd and rsqrt"},
    "--decay-milestones": {"type": _POSITIVE, "nargs": "+", "metavar": "EPOCH", "help": "of multistep"},
    "--decay-rate": {"type": _REAL, "metavar": "RATE", "help": "of step and multistep, power of poly"},
    "--model-ema": {**_TOGGLE, "help": "average the weights; the average is evaluated"},
    "--model-ema-decay": {"type": _SHARE, "metavar": "DECAY", "help": "of the average"},
    "--model-ema-warmup": {**_TOGGLE, "help": "start with a shorter average"},
    "--seed": {"type": _COUNT, "metavar": "S", "help": "of all random numbers"},
    "--output": {"metavar": "DIR", "help": "where runs go"},
    "--experiment": {"metavar": "NAME", "help": "folder of the run in it"},
    "--resume": {
        "nargs": "?",
        "const": "auto",
        "metavar": "FILE",
        "help": "go on from a checkpoint; without a file from the newest of the run, from the start if there is none",
    },
    "--no-resume-opt": {**_SWITCH, "help": "resume the weights only, not the optimizer"},
    "--checkpoint-hist": {"type": _POSITIVE, "metavar": "N", "help": "best checkpoints to keep"},
    "--recovery-interval": {"type": _COUNT, "metavar": "N", "help": "also save every N updates"},
    "--eval-metric": {"metavar": "NAME", "help": "what says which epoch is the best"},
    "--log-interval": {"type": _POSITIVE, "metavar": "N", "help": "updates for a line where no bar is shown"},
    # results
    "--out": {"metavar": "FILE", "help": "write the result there"},
    "--plot": {"metavar": "FILE", "help": "draw a picture there"},
    "--json": {**_SWITCH, "help": "print the result as JSON and nothing else"},
    "--sort": {"metavar": "KEY", "help": "order of the rows"},
    "--check": {**_SWITCH, "help": "exit status 1 where something differs"},
}  # fmt: skip
WINDOW = "the whole range; the window in the DICOM file"  # note of --window
SHORT = {"--config": "-c", "--batch-size": "-b", "--workers": "-j"}


def add(parser: Any, flag: str, note: str = "", default: Any = None, required: bool = False) -> None:
    """Add a shared option.

    Args:
        parser: Parser of :mod:`argparse`, or a group of one.
        flag: Key of :data:`SHARED`.
        note: In parentheses after the text of the option: what holds here; empty for the default.
        default: Value where the option is not given.
        required: Whether it must be given.
    """
    spec = dict(SHARED[flag])
    if default is not None or ("default" not in spec and spec.get("action") != "store_true"):
        spec["default"] = {} if default is None and spec.get("action") is KeyValues else default
    if not note and default is not None and not isinstance(default, bool):
        values = default if isinstance(default, list | tuple) else [default]
        note = " ".join(f"{v:g}" if isinstance(v, float) else str(v) for v in values)
    spec["help"] += f" ({note})" if note else ""
    spec["help"] = spec["help"].replace("%", "%%")
    if required:
        spec["required"] = True
    parser.add_argument(*([SHORT[flag]] if flag in SHORT else []), flag, **spec)


def add_result(parser: Any, note: str = ".json, .csv or .md") -> None:
    """Add what every command has that prints a table: ``--json`` and ``--out``, for :mod:`vizoo.tools.common`.

    Args:
        parser: As for :func:`add`.
        note: Of ``--out``.
    """
    add(parser, "--json")
    add(parser, "--out", note)


def check_outputs(count: int | None) -> None:
    """Refuse ``--num-classes 0``, a model without a head, where the head is needed.

    Args:
        count: Of the option.

    Raises:
        UserError: For 0.
    """
    if count == 0:
        raise UserError("argument --num-classes: got 0, must be a whole number of at least 1")


def add_alias(parser: Any, flag: str, dest: str) -> None:
    """Keep a former name of an option working without showing it.

    Args:
        parser: As for :func:`add`, which has the option ``dest`` already.
        flag: The former name.
        dest: Attribute of the option, for example ``"plot"``.
    """
    spec = next(a for a in parser._actions if a.dest == dest)
    kept = {"action": type(spec), **{key: getattr(spec, key) for key in ("type", "nargs", "choices", "default")}}
    parser.add_argument(flag, dest=dest, **kept, help=argparse.SUPPRESS)
