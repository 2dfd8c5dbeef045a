"""The ``vizoo`` command: one subcommand for each tool.

A shell completes words with ``eval "$(register-python-argcomplete vizoo)"``: it then runs the command with the words
so far in the environment, and the parser that would read them answers.
"""

from __future__ import annotations

import difflib
import importlib
import os
import sys
from collections.abc import Sequence

from vizoo.tools.common import UserError, run_tool
from vizoo.tools.options import COMPLETING, Parser

COMMANDS = {
    "profile": ("profiler", "parameters, GMACs, activations, memory, latency and throughput of any timm model"),
    "compare": ("compare", "which of two models, conditions or revisions is faster, with a verdict and a budget"),
    "report": ("report", "one HTML page of what models cost: a picture, a table, and what each one consists of"),
    "models": ("models", "list the zoo: parameters, GMACs, input size, published top-1, source, licence"),
    "train": ("train", "train a classifier with the options of timm's script, a detector, a segmentor, or OAT"),
    "evaluate": ("evaluate", "measure and draw what was trained: classes, boxes, masks, scanpaths beside people's"),
    "show": ("show", "draw what a model sees in an image: its own maps, Grad-CAM, receptive field"),
    "mm": ("mm", "train and test configs of mmdet and mmseg, convert checkpoints for them"),
    "bench": ("bench", "time a family against its official code or the plain reference, alternating"),
    "env": ("env", "versions, devices and which backends are usable, for bug reports"),
}

EXAMPLES = """\
examples:
  vizoo models                                        what is in the zoo
  vizoo models 'litv2*'                               one family
  vizoo profile litv2_s resnet50 --device cpu         what two models cost on this machine
  vizoo profile litv2_s --size 512 --mode count       exact counts at another size, nothing is run
  vizoo train --model litv2_s --data digits           a first real training, minutes on a CPU
  vizoo env                                           what to paste into a bug report

'vizoo COMMAND --help' explains a command; '--debug' with any command shows full tracebacks."""


def usage() -> str:
    """Help text of the bare command."""
    import vizoo

    rows = "\n".join(f"  {name:12s}{text}" for name, (_, text) in COMMANDS.items())
    title = f"vizoo {vizoo.__version__}: vision backbones on the timm interface"
    return f"{title}\n\nusage: vizoo COMMAND [options]\n\n{rows}\n\n{EXAMPLES}"


def main(argv: Sequence[str] | None = None) -> int:
    """Run a subcommand.

    Args:
        argv: Arguments; None means ``sys.argv[1:]``.

    Returns:
        Exit status: 0 success, 2 bad input, else what the subcommand says.
    """
    args = list(sys.argv[1:] if argv is None else argv)
    if COMPLETING in os.environ:
        args = _typed()
    if args and args[0] in COMMANDS:
        module = importlib.import_module(f"vizoo.tools.{COMMANDS[args[0]][0]}")
        status: int = module.main(args[1:])
        return status
    return run_tool(lambda _: _answer(args), [], "")


def _answer(args: list[str]) -> int:
    """Say what there is, where no command is named."""
    if COMPLETING in os.environ:
        parser = Parser(prog="vizoo")
        parser.add_argument("command", choices=COMMANDS)
        parser.add_argument("--version", action="store_true")
        parser.parse_args(args)
    if not args or args[0] in ("-h", "--help", "help"):
        print(usage())
        return 0
    if args[0] in ("-V", "--version"):
        import vizoo

        print(vizoo.__version__)
        return 0
    near = difflib.get_close_matches(args[0], COMMANDS, n=1)
    hint = f"did you mean {near[0]!r}?" if near else f"known: {', '.join(COMMANDS)}"
    raise UserError(f"unknown command {args[0]!r}; {hint}")


def _typed() -> list[str]:
    """The words before the cursor, but for the one at it, where the shell asks what may follow.

    From the command on argcomplete sees them as those of a program.
    """
    words = os.environ["COMP_LINE"][: int(os.environ["COMP_POINT"])].split(" ")[:-1]
    first = int(os.environ[COMPLETING])
    args = [word for word in words if word][first:]
    if args and args[0] in COMMANDS:
        os.environ[COMPLETING] = str(first + 1)
    return args


if __name__ == "__main__":
    raise SystemExit(main())
