"""Options of all commands: one parser class, each option explained, and those that several commands have the same."""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Callable

import pytest
from runs import TASKS

from vizoo.tools import cli, table
from vizoo.tools.options import Parser, add, add_alias, number

TASKED = ("train", "evaluate")  # a parser for each task
COMMANDS: dict[str, Callable[[], int]] = {
    **{name: lambda name=name: cli.main([name, "--help"]) for name in cli.COMMANDS if name not in TASKED},
    **{
        f"{name} --task {task}": lambda name=name, task=task: cli.main([name, "--task", task, "--help"])
        for name in TASKED
        for task in TASKS
    },
    "table": lambda: table.main(["--help"]),
}


def parser_of(show_help: Callable[[], int]) -> argparse.ArgumentParser:
    """The parser whose help a command prints."""
    found = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(argparse.ArgumentParser, "print_help", lambda self, file=None: found.append(self))
        with pytest.raises(SystemExit):
            show_help()
    return found[0]


@pytest.fixture(scope="module")
def parsers() -> dict[str, argparse.ArgumentParser]:
    return {name: parser_of(show_help) for name, show_help in COMMANDS.items()}


def options(parser: argparse.ArgumentParser) -> dict[str, argparse.Action]:
    """Actions by their long names, former names aside."""
    shown = [a for a in parser._actions if a.help != argparse.SUPPRESS]
    return {s: a for a in shown for s in a.option_strings if s.startswith("--")}


def meaning(kind: object) -> object:
    """A type of :func:`vizoo.tools.options.number` by its bounds, any other one itself."""
    closure = getattr(kind, "__closure__", None)
    return (kind.__code__, *(cell.cell_contents for cell in closure)) if closure else kind  # type: ignore[attr-defined]


def described(action: argparse.Action) -> dict[str, object]:
    """All of an option but its default, whether it must be given, and the note in parentheses at its end."""
    names = ("option_strings", "dest", "nargs", "const", "choices", "metavar")
    text = str(action.help).removesuffix(" (default: %(default)s)")  # which Python 3.10 adds to switches
    text = text.rpartition(" (")[0] if text.endswith(")") and " (" in text else text
    kinds = {"type": meaning(action.type), "action": type(action)}
    return {**{name: getattr(action, name) for name in names}, **kinds, "help": text}


def differences(parsers: dict[str, argparse.ArgumentParser]) -> list[str]:
    """What two parsers say differently of one option."""
    found = []
    for (a, first), (b, second) in itertools.combinations(parsers.items(), 2):
        ours, theirs = options(first), options(second)
        for flag in ours.keys() & theirs.keys():
            one, other = described(ours[flag]), described(theirs[flag])
            found += [f"{flag}: {k} {one[k]!r} in {a}, {other[k]!r} in {b}" for k in one if one[k] != other[k]]
    return sorted(found)


def test_shared_options_are_the_same(parsers) -> None:
    found = differences(parsers)
    assert not found, "\n" + "\n".join(found)


def test_there_are_shared_options(parsers) -> None:
    """The test above compares something: every task has what the one loop does, every evaluation what it leaves."""
    loop = {"--model-ema", "--amp", "--amp-dtype", "--grad-accum-steps", "--recovery-interval", "--resume", "--seed"}
    for task in TASKS:
        assert loop <= options(parsers[f"train --task {task}"]).keys(), task
        assert {"--out", "--plot", "--json", "--device"} <= options(parsers[f"evaluate --task {task}"]).keys(), task


@pytest.mark.parametrize("name", COMMANDS)
def test_parser(name: str, parsers) -> None:
    """Of the one class, and every option is explained; a former name stands for an option that is."""
    parser = parsers[name]
    assert type(parser) is Parser
    assert not parser.allow_abbrev
    text, shown = parser.format_help(), options(parser)
    assert {"--help", "--debug"} <= shown.keys()
    for action in parser._actions:
        if action.help == argparse.SUPPRESS:
            assert action.dest in {a.dest for a in shown.values()}, action.option_strings
            continue
        assert action.help or not action.option_strings, action.dest
        assert all(s in text for s in action.option_strings if not s.startswith("--no-"))


def made(**spec: object) -> Parser:
    parser = Parser(prog="x")
    parser.add_argument("--some", **{"help": "what it is (1)", "type": int, "metavar": "N", **spec})
    return parser


@pytest.mark.parametrize(
    "change",
    [
        {"type": float},
        {"nargs": "+"},
        {"nargs": "?", "const": 3},
        {"choices": (1, 2)},
        {"metavar": "COUNT"},
        {"dest": "other"},
        {"action": "append"},
        {"help": "what it was (1)"},
    ],
    ids=str,
)
def test_an_option_that_differs_is_found(change: dict[str, object]) -> None:
    (found, *_) = differences({"a": made(), "b": made(**change)})
    assert found.startswith("--some: ")
    assert " in a, " in found


def test_what_may_differ() -> None:
    """Default, need and note; a former name; and options that only one command has."""
    other = made(help="what it is (2; a note)", default=2, required=True)
    other.add_argument("--other", help="something else")
    add_alias(other, "--former", "some")
    assert differences({"a": made(), "b": other, "c": made(help="what it is")}) == []
    third = made(help="what it is")
    third.add_argument("--former", help="new here")
    assert differences({"a": other, "b": third}) == []


def test_numbers_are_compared_by_their_bounds() -> None:
    parsers = {name: made(type=number(int, low)) for name, low in (("a", 0), ("b", 0), ("c", 1))}
    assert [text[:15] for text in differences(parsers)] == ["--some: type (<", "--some: type (<"]
    assert differences({k: parsers[k] for k in "ab"}) == []


def test_the_table_gives_equal_options() -> None:
    first, second = Parser(prog="x"), Parser(prog="x")
    add(first, "--seed", default=1)
    add(second, "--seed", "of the draws", default=2, required=True)
    assert differences({"a": first, "b": second}) == []
