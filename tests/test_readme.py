"""README.md and the pages of docs/ and examples/ keep their promises: every command and Python block runs as written.

A block that cannot run here is preceded by ``<!-- not run: REASON -->``; its commands must still parse.  Two commands
take less time here (:data:`SHORTER`); CI also runs the first, of two whole models, as it is.
"""

from __future__ import annotations

import contextlib
import io
import os
import re
import shlex
import subprocess
from pathlib import Path
from typing import NamedTuple

import pytest

from vizoo.tools import cli

ROOT = Path(__file__).parents[1]
FOLDERS = ("backbones", "heads", "tools", "configs")
README, CI = ROOT / "README.md", ROOT / ".ci" / "run"
PAGES = [README, *sorted((ROOT / "docs").rglob("*.md")), *sorted((ROOT / "examples").glob("*.md"))]
SLOW = re.compile(r"vizoo (?:train|evaluate|bench|compare)\b|vizoo profile (?!.*--mode count)")  # minutes, or timings
LESS = ["--min-time", "0.2", "--max-time", "1", "--threads", "1"]
SHORTER = {  # what is added to a command here: less sampling by one thread, fewer epochs and digits, nothing else
    "vizoo profile litv2_s resnet50 ": [*LESS, "--batch", "1"],
    "vizoo profile ": LESS,
    "vizoo train --model litv2_s --data digits ": ["--epochs", "1", "--only-classes", "0", "1", "2"],
}
PLAIN = {"", "text", "bibtex", "csv", "yaml"}  # fences that hold no code to run
LINK = re.compile(r"\]\((?!https?:|#)([^)#]+)[^)]*\)")
INLINE = re.compile(r"`(vizoo [a-z]+(?: [^`]+)?)`")  # a command inside a sentence
INSTALL = re.compile(r"\b(?:pip3? install|-m venv|uv|conda|apt|apt-get)\b")
FENCE = re.compile(
    r"(?:^<!-- not run: (?P<reason>.*?) *-->\n\n?)?^(?P<fence>```+)(?P<language>\w*)\n(?P<body>.*?)^(?P=fence)[ ]*$",
    re.MULTILINE | re.DOTALL,
)


class Block(NamedTuple):
    """One fenced block of a page; ``reason`` says why it is not run, None when it is."""

    language: str
    body: str
    line: int
    reason: str | None
    page: Path = README

    @property
    def commands(self) -> list[str]:
        """Commands of a bash block: comments dropped, continued lines joined."""
        lines = re.sub(r"(^|\s)#.*$", "", self.body.replace("\\\n", " "), flags=re.MULTILINE).splitlines()
        return [" ".join(line.split()) for line in lines if line.strip()]


def blocks_of(text: str, page: Path = README) -> list[Block]:
    return [
        Block(m["language"], m["body"], text.count("\n", 0, m.start("body")) + 1, m["reason"], page)
        for m in FENCE.finditer(text)
    ]


TEXTS = {page: page.read_text(encoding="utf-8") for page in PAGES if page.is_file()}
BLOCKS = [block for page, text in TEXTS.items() for block in blocks_of(text, page)]
BASH = [b for b in BLOCKS if b.language == "bash"]
PYTHON = [b for b in BLOCKS if b.language == "python"]
SKIPPED = [b for b in BLOCKS if b.reason is not None]
COMMANDS = [c for b in BASH if b.reason is None for c in b.commands]
VIZOO = list(dict.fromkeys(part for c in COMMANDS for part in c.split(" && ") if part.startswith("vizoo ")))
FIRST = {
    c: next((b.page, b.line) for b in BASH if b.reason is None and any(c in x.split(" && ") for x in b.commands))
    for c in VIZOO
}
CHAINS = [[c for c in VIZOO if FIRST[c] == line] for line in sorted(set(FIRST.values()))]
OTHERS = [c for c in COMMANDS if not c.startswith("vizoo ")]


def arguments(command: str) -> list[str]:
    """Arguments of a ``vizoo`` command; shell syntax is refused because it would need a shell."""
    lexer = shlex.shlex(command, posix=True, punctuation_chars=True)
    lexer.whitespace_split, lexer.commenters = True, ""
    words = list(lexer)
    operators = [w for w in words if set(w) <= set("();<>|&") or w.startswith("$")]
    assert not operators, f"{command}: write it without shell operators"
    return words[1:]


def ci_commands() -> list[str]:
    """Commands of the CI script, without comments and shell options."""
    assert CI.is_file(), ".ci/run is missing"
    found = Block("bash", CI.read_text(encoding="utf-8"), 1, None).commands
    return [c for c in found if c.split()[0] not in ("set", "cd")]


SAMPLE = """# x
```bash
pip install .  # once
vizoo profile litv2_s \\
    --size 224
```
<!-- not run: downloads 200 MB -->
```bash
vizoo models
```
```python
x = 1
```
"""


def test_parser() -> None:
    """Comments, continued lines, reasons and line numbers are understood."""
    setup, download, python = blocks_of(SAMPLE)
    assert setup.commands == ["pip install .", "vizoo profile litv2_s --size 224"]
    assert arguments(setup.commands[1]) == ["profile", "litv2_s", "--size", "224"]
    assert (download.reason, setup.reason) == ("downloads 200 MB", None)
    assert (python.language, python.line) == ("python", 12)
    with pytest.raises(AssertionError, match="shell operators"):
        arguments("vizoo models > list.txt")


def test_readme_has_something_to_check() -> None:
    """No empty parametrisation hides a README without commands, and no other fence hides code."""
    assert README.is_file(), "README.md is missing"
    assert len(VIZOO) >= 3
    assert [b for b in PYTHON if b.reason is None]
    assert {b.language for b in BLOCKS} <= {"bash", "python"} | PLAIN
    for page, text in TEXTS.items():
        blocks = [b for b in BLOCKS if b.page == page]
        assert text.count("```") == 2 * len(blocks), f"{page.name}: a fence is not closed or not understood"
        reasons = sum(b.reason is not None for b in blocks)
        assert text.count("<!-- not run:") == reasons, f"{page.name}: a 'not run' comment does not stand above a fence"


def test_links_lead_somewhere() -> None:
    """Files and pictures that a page names are there, and every picture is shown."""
    found = {(page.parent / link).resolve() for page, text in TEXTS.items() for link in LINK.findall(text)}
    assert [str(path) for path in found if not path.exists()] == []
    pictures = {path for path in (ROOT / "docs" / "pictures").iterdir() if path.suffix != ".md"}
    assert pictures
    assert pictures <= found


def test_every_family_has_a_picture() -> None:
    shown = {path.stem for path in (ROOT / "docs" / "pictures").iterdir()}
    assert {path.stem for path in (ROOT / "backbones").glob("[!_]*.py")} <= shown


def test_setup_is_what_ci_runs() -> None:
    """The two set-up commands stand in CI word for word; CI installs nothing else and runs all others too."""
    setup = [c for c in OTHERS if INSTALL.search(c)]
    in_ci = ci_commands()
    assert len(setup) == 2
    assert setup == [c for c in in_ci if INSTALL.search(c)]
    assert [c for c in OTHERS if c not in in_ci] == []
    assert os.access(CI, os.X_OK), ".ci/run is not executable"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the checkout's folders linked; later commands of a block may read earlier results."""
    path = tmp_path_factory.mktemp("readme")
    for name in FOLDERS:
        if (ROOT / name).is_dir():
            (path / name).symlink_to(ROOT / name)
    return path


def run(words: list[str]) -> int:
    """Exit status of ``vizoo`` with these arguments, in this process."""
    try:
        return cli.main(words)
    except SystemExit as stop:  # argparse
        return stop.code if isinstance(stop.code, int) else int(stop.code is not None)


@pytest.mark.parametrize(
    "commands",
    [pytest.param(c, marks=pytest.mark.slow) if any(map(SLOW.match, c)) else c for c in CHAINS],
    ids=" + ".join,
)
def test_commands(commands: list[str], folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The commands of a block do what they say, one after the other, with exit status 0."""
    monkeypatch.chdir(folder)
    for command in commands:
        more = next((words for start, words in SHORTER.items() if command.startswith(start)), [])
        assert run(arguments(command) + more) == 0, command


@pytest.mark.parametrize("page", sorted({b.page for b in PYTHON if b.reason is None}), ids=lambda page: page.name)
def test_python_blocks(page: Path, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The Python blocks of a page run one after the other, as a reader of this page alone would paste them."""
    monkeypatch.chdir(folder)
    namespace: dict = {"__name__": "__main__"}
    for block in PYTHON:
        if block.page == page and block.reason is None:
            source = "\n" * (block.line - 1) + block.body  # tracebacks show the line of the page
            exec(compile(source, str(block.page), "exec"), namespace)


def check_options(command: str) -> None:
    """The subcommand exists and its help knows every option used."""
    name, *rest = arguments(command)
    assert name in cli.COMMANDS, f"{command}: unknown subcommand"
    task = rest[(i := rest.index("--task")) : i + 2] if "--task" in rest else []  # has a help of its own
    with contextlib.redirect_stdout(io.StringIO()) as out:
        assert run([name, *task, "--help"]) == 0
    known = set(re.findall(r"--[\w-]+|(?<!\w)-\w\b", out.getvalue()))
    used = {w.split("=")[0] for w in rest if re.match(r"--?[A-Za-z]", w)}
    assert not used - known, f"{command}: options {used - known} do not exist"


def check_script(command: str) -> None:
    """The script is in the checkout and knows every option used."""
    file, *rest = arguments(command)
    text = (ROOT / file).read_text(encoding="utf-8")
    used = {w for w in rest if re.match(r"--[a-z]", w)}
    assert used <= set(re.findall(r"--[\w-]+", text)), command


def test_blocks_not_run() -> None:
    """A block that is not run says why, and still parses: Python compiles, options exist, shell syntax holds."""
    for block in SKIPPED:
        assert block.reason, f"line {block.line}: give the reason"
        if block.language == "python":
            compile(block.body, str(block.page), "exec")
            continue
        assert block.language == "bash", f"line {block.line}: a {block.language or 'plain'} block is never run"
        done = subprocess.run(["bash", "-n"], input=block.body, text=True, capture_output=True, check=False)
        assert done.returncode == 0, f"line {block.line}: {done.stderr}"
        for command in block.commands:
            for part in command.split(" && "):
                if part.startswith("vizoo "):
                    check_options(part)
                if part.startswith("python "):
                    check_script(part)


@pytest.mark.parametrize("page", [p for p, text in TEXTS.items() if INLINE.search(text)], ids=lambda page: page.name)
def test_commands_inside_sentences(page: Path) -> None:
    """They name subcommands and options that exist."""
    for command in dict.fromkeys(INLINE.findall(TEXTS[page])):
        check_options(command)


def test_front_door() -> None:
    """The README is read in two minutes: a picture and the installation come first, the rest is links."""
    lines = TEXTS[README].splitlines()
    assert len(lines) <= 180
    first = min(i for i, line in enumerate(lines) if "pip install" in line)
    assert first < 30
    assert any(line.startswith("![") for line in lines[:first])
    linked = {(ROOT / link).resolve() for link in LINK.findall(TEXTS[README])}
    pages = set((ROOT / "docs").glob("*.md")) | {ROOT / "examples" / "README.md", ROOT / "CONTRIBUTING.md"}
    assert pages <= linked


def test_option_check_bites() -> None:
    check_options("vizoo profile litv2_s --help")
    with pytest.raises(AssertionError, match="no-such-option"):
        check_options("vizoo profile litv2_s --no-such-option 3")
    with pytest.raises(AssertionError, match="unknown subcommand"):
        check_options("vizoo no-such-command")
