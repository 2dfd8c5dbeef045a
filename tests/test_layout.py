"""The house rules that can be read off the files: who imports whom, what is tested where, what is tracked."""

from __future__ import annotations

import ast
import functools
import graphlib
import importlib.util
import json
import re
import subprocess
import sys
import textwrap
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
from checkout import ROOT, tracked
from golden import LARGEST

OPS, LAYERS, BACKBONES = "vizoo.backbones.ops", "vizoo.backbones.layers", "vizoo.backbones"
FOLDERS = [f for f in ("backbones", "heads", "tools", "configs") if (ROOT / f).is_dir()]
NEVER_ON_IMPORT = {"fvcore", "matplotlib", "mmcv", "mmdet", "mmengine", "mmseg", "psutil", "pydicom", "rich", "sklearn"}
NEVER_ON_IMPORT |= {"torchmetrics", "yaml"}


class Import(NamedTuple):
    """One imported module, as an absolute name."""

    module: str
    line: int
    always: bool  # stands at the top level of the file, so it runs with every import

    def within(self, *packages: str) -> bool:
        return any(self.module == p or self.module.startswith(f"{p}.") for p in packages)


def module_name(path: Path) -> str:
    parts = ("vizoo", *path.relative_to(ROOT).with_suffix("").parts)
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def files(folder: str, pattern: str = "**/*.py") -> list[Path]:
    return sorted(p for p in (ROOT / folder).glob(pattern) if "__pycache__" not in p.parts)


def imports(path: Path) -> Iterator[Import]:
    """Every import of a file; ``from package import module`` counts as the module when it is one of ours."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    top = {id(node) for node in tree.body}
    package = module_name(path) if path.name == "__init__.py" else module_name(path).rpartition(".")[0]
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield Import(alias.name, node.lineno, id(node) in top)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parents = package.split(".")
                base = ".".join(filter(None, (*parents[: len(parents) - node.level + 1], base)))
            for alias in node.names:
                full = f"{base}.{alias.name}"
                ours = base.split(".")[0] == "vizoo" and is_module(full)
                yield Import(full if ours else base, node.lineno, id(node) in top)


def is_module(name: str) -> bool:
    path = ROOT.joinpath(*name.split(".")[1:])
    return path.with_suffix(".py").is_file() or (path / "__init__.py").is_file()


def is_family(name: str) -> bool:
    """Whether a module is a family's file: a public one directly in ``backbones/``."""
    parent, _, leaf = name.rpartition(".")
    return parent == BACKBONES and not leaf.startswith("_") and name not in (OPS, LAYERS)


@functools.cache
def is_command(name: str) -> bool:
    """Whether a module is a command: a file directly in ``tools/`` with a ``main``."""
    path = ROOT.joinpath(*name.split(".")[1:]).with_suffix(".py")
    return path.parent == ROOT / "tools" and path.is_file() and "\ndef main(" in path.read_text(encoding="utf-8")


@functools.cache
def is_heavy(name: str) -> bool:
    """Whether importing a module brings in anything that is neither ours nor in the standard library."""
    unseen, seen = [name], set()
    while unseen:
        module = unseen.pop()
        if not module or module in seen:
            continue
        seen.add(module)
        package, _, rest = module.partition(".")
        if package != "vizoo":
            if package not in sys.stdlib_module_names:
                return True
            continue
        path = ROOT.joinpath(*rest.split("."))
        file = path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
        unseen.append(module.rpartition(".")[0])
        unseen += [found.module for found in imports(file) if found.always] if rest and file.is_file() else []
    return False


# the table of CONTRIBUTING

WORDS: dict[str, Callable[[Import], bool]] = {
    "anything": lambda found: True,
    "a family": lambda found: is_family(found.module),
    "another family": lambda found: is_family(found.module),
    "a command": lambda found: is_command(found.module),
    "anything heavy at the top": lambda found: found.always and is_heavy(found.module),
    "the standard library": lambda found: found.module.split(".")[0] in sys.stdlib_module_names,
}
ITEM = re.compile(r"`([\w/*]+)`(| itself| at the top)")


class Row(NamedTuple):
    """A row of the table: which files it is about, and what its items say of an import."""

    files: str
    may: dict[str, Callable[[Import], bool]]
    never: dict[str, Callable[[Import], bool]]

    def is_about(self, path: str) -> bool:
        """Whether a path fits; ``*`` stays within a folder, a slash at the end takes all below it."""
        pattern = re.escape(self.files).replace(r"\*", "[^/]*")
        return re.fullmatch(f"{pattern}.*" if self.files.endswith("/") else pattern, path) is not None


def absolute(name: str) -> str:
    """The import name of a package, or of ours in short: ``ops/backend`` is ``vizoo.backbones.ops.backend``."""
    parts = name.split("/")
    if (ROOT / "backbones" / parts[0]).is_dir():
        parts.insert(0, "backbones")
    elif len(parts) == 1 and name not in FOLDERS:
        return name
    full = ".".join(("vizoo", *parts))
    if "*" not in full and not is_module(full):
        raise ValueError(f"`{name}` is no module of ours")
    return full


def rule(item: str) -> Callable[[Import], bool]:
    """What one item of a cell says of an import."""
    if item in WORDS:
        return WORDS[item]
    parts = ITEM.fullmatch(item)
    if parts is None:
        raise ValueError(f"{item!r} is neither a name in backticks nor one of {', '.join(WORDS)}")
    name, how = absolute(parts[1]), parts[2]
    if how == " itself":
        return lambda found: found.module == name
    pattern = re.compile(re.escape(name).replace(r"\*", r"[^.]*") + r"(\..*)?")
    return lambda found: pattern.fullmatch(found.module) is not None and (found.always or not how)


def table(text: str) -> list[Row]:
    """The rows under "Who may import whom"; a row that cannot be read is an error."""
    section = text.partition("## Who may import whom\n")[2].partition("\n## ")[0]
    rows = []
    for line in [line for line in section.splitlines() if line.startswith("|")][2:]:
        try:
            place, *cells = (cell.strip() for cell in line.strip("|").split("|"))
            may, never = ({item: rule(item) for item in cell.split(", ")} for cell in cells)
            rows.append(Row(place.strip("`"), may, never))
        except ValueError as e:
            raise ValueError(f"cannot read {line}: {e}") from e
    return rows


@functools.cache
def rows() -> list[Row]:
    return table((ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8"))


def refused(path: Path, found: Import) -> str | None:
    """Why a file may not have an import, or None when it may."""
    if found.within(*FOLDERS):
        return "our folders are imported by their vizoo name"
    row = next((row for row in rows() if row.is_about(path.relative_to(ROOT).as_posix())), None)
    if row is None:
        return "no row of the table is about this file"
    for item, hit in row.never.items():
        if hit(found):
            return f"{row.files} never imports {item}"
    if WORDS["the standard library"](found) or any(hit(found) for hit in row.may.values()):
        return None
    return f"{row.files} may import {', '.join(row.may)}"


@pytest.mark.parametrize("folder", [f for f in FOLDERS if f != "configs"])
def test_import_rules(folder: str) -> None:
    """The table of who may import whom."""
    paths = files(folder)
    assert paths, f"{folder}/ holds no Python file"
    broken = []
    for path in paths:
        for found in imports(path):
            reason = refused(path, found)
            if reason:
                broken.append(f"{path.relative_to(ROOT)}:{found.line} imports {found.module}: {reason}")
    assert not broken, "\n".join(broken)


def test_import_rules_bite() -> None:
    """The rules above refuse what they are there to refuse."""

    def reason(path: str, module: str, always: bool = True) -> str | None:
        return refused(ROOT / path, Import(module, 1, always))

    bad = [
        ("backbones/__init__.py", "os"),
        ("backbones/__init__.py", OPS),
        ("backbones/ops/attention.py", "timm"),
        ("backbones/ops/attention.py", "torchvision"),
        ("backbones/ops/attention.py", "triton"),
        ("backbones/ops/attention.py", "natten.functional"),
        ("backbones/ops/attention.py", f"{OPS}.other"),
        ("backbones/ops/attention.py", LAYERS),
        ("backbones/layers/mixer.py", f"{BACKBONES}.family"),
        ("backbones/layers/mixer.py", "torchvision"),
        ("backbones/layers/mixer.py", "triton", False),
        ("backbones/family.py", f"{BACKBONES}.other"),
        ("backbones/family.py", "vizoo"),
        ("backbones/family.py", "vizoo.tools.common"),
        ("backbones/family.py", "vizoo.heads"),
        ("backbones/family.py", "mmseg"),
        ("backbones/family.py", "fvcore.nn"),
        ("backbones/family.py", "triton"),
        ("backbones/family.py", "triton", False),
        ("heads/segmentation.py", f"{BACKBONES}.family"),
        ("heads/segmentation.py", f"{LAYERS}.plain"),
        ("heads/segmentation.py", "mmseg.models"),
        ("heads/segmentation.py", "vizoo.heads.mm"),
        ("heads/mm/backbone.py", "vizoo.tools.common"),
        ("heads/mm/backbone.py", f"{BACKBONES}.family"),
        ("heads/mm/backbone.py", LAYERS),
        ("tools/bench.py", "backbones"),
        ("tools/bench.py", "triton", False),
        ("tools/bench.py", "torch"),
        ("tools/bench.py", "numpy"),
        ("tools/profiler.py", f"{OPS}.cost"),
        ("tools/profiler.py", "vizoo.tools.profiling.profile"),
        ("tools/train.py", "vizoo.tools.training.loop"),
        ("tools/mm.py", "vizoo.tools.training.mm"),
        ("tools/scanpaths.py", "vizoo.tools.bench"),
        ("tools/gpu/machine_code.py", "triton"),
        ("tools/gpu/machine_code.py", "vizoo.tools.bench", False),
        ("tools/gpu/suite.py", "triton", False),
        ("tools/gpu/suite.py", "vizoo.tools.bench", False),
        ("configs/new.py", "torch"),
    ]
    assert [case for case in bad if reason(*case) is None] == []
    good = [
        ("backbones/__init__.py", f"{BACKBONES}.family"),
        ("backbones/ops/attention.py", "triton.language", False),
        ("backbones/ops/attention.py", f"{OPS}.backend", True),
        ("backbones/ops/attention.py", f"{OPS}._kernels", True),
        ("backbones/layers/mixer.py", "math", True),
        ("backbones/layers/mixer.py", f"{OPS}.attention", True),
        ("backbones/family.py", f"{OPS}.attention", True),
        ("backbones/family.py", f"{BACKBONES}._shared", True),
        ("backbones/family.py", "timm.layers", True),
        ("heads/segmentation.py", f"{LAYERS}.checks", True),
        ("heads/mm/backbone.py", "vizoo", True),
        ("heads/mm/backbone.py", "mmengine.model", True),
        ("tools/bench.py", f"{BACKBONES}.family", False),
        ("tools/bench.py", "torch", False),
        ("tools/bench.py", "vizoo.tools.show", True),
        ("tools/bench.py", "vizoo.tools.profiling.sides", True),
        ("tools/profiler.py", "vizoo.tools.profiling.profile", False),
        ("tools/train.py", "vizoo.tools.training.parsers", True),
        ("tools/train.py", "vizoo", True),
        ("tools/table.py", "torch", True),
        ("tools/scanpaths.py", "numpy", True),
        ("tools/gpu/machine_code.py", "triton.compiler", False),
        ("tools/gpu/suite.py", "vizoo.tools.common", True),
    ]
    assert [case for case in good if reason(*case) is not None] == []


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("| `heads/` | `torch` |", "not enough values"),
        ("| `heads/` | `torch` | `timm` | `numpy` |", "too many values"),
        ("| `heads/` | torch | `timm` |", "'torch' is neither"),
        ("| `heads/` | `torch` | something else |", "'something else' is neither"),
        ("| `heads/` | `torch`; `timm` | a family |", "is neither"),
        ("| `heads/` | `layers/chekcs` | a family |", "`layers/chekcs` is no module of ours"),
        ("| `heads/` | `layer/checks` | a family |", "`layer/checks` is no module of ours"),
    ],
)
def test_rows_are_read_or_refused(line: str, message: str) -> None:
    head = "## Who may import whom\n| in | may import | never |\n|---|---|---|\n"
    assert [row.files for row in table(f"{head}| `heads/` | `torch`, `layers/checks` | a family |\n")] == ["heads/"]
    with pytest.raises(ValueError, match=rf"cannot read .*{re.escape(message)}"):
        table(f"{head}{line}\n\n## Next")


def test_every_row_is_about_a_file() -> None:
    """The first row that fits a file is the one about it, so a row may not stand behind a wider one."""
    paths = [path.relative_to(ROOT).as_posix() for folder in FOLDERS for path in files(folder)]
    first = {next((row.files for row in rows() if row.is_about(path)), None) for path in paths}
    assert [row.files for row in rows() if row.files not in first] == []
    assert len(rows()) > 5


# tests mirror the source

WHOLE = {  # tests over a whole folder, and of what other packages do with it
    "backbones": {
        "arguments",
        "changed_models",
        "distributed",
        "exports",
        "features",
        "interface",
        "models",
        "pretrained",
    },
    "configs": {"configs"},
    "heads": {"others", "train"},
    "layers": set(),
    "ops": set(),
    "tools": {"data_faults", "faults", "hand_counts", "runs", "security", "tasks"},
}
SOURCES = {"layers": "backbones/layers", "ops": "backbones/ops"}  # of the folders of tests; else the same name
UNTESTED = {"backend", "cost", "operators"}  # in ops/, no operators: everything goes through them


def sources(folder: str) -> set[str]:
    """Names of the files of a folder that have tests in ``tests/folder``; those of wings of ``tools/`` too."""
    place = SOURCES.get(folder, folder)
    return {path.stem for pattern in ("*.py", "*/*.py")[: 1 + (folder == "tools")] for path in files(place, pattern)}


def covered(folder: str) -> set[str]:
    return {path.stem.removeprefix("test_") for path in files(f"tests/{folder}", "test_*.py")}


def unmatched(names: set[str], partners: set[str], others: set[str]) -> list[str]:
    """Names that have no partner and are not among the others, which must exist."""
    assert others <= names, f"there is no {', '.join(sorted(others - names))}"
    return sorted(names - partners - others)


def public(folder: str) -> set[str]:
    return {name for name in sources(folder) if not name.startswith("_")}


def test_every_family_and_operator_has_its_tests() -> None:
    assert unmatched(public("backbones"), covered("backbones"), set()) == []
    assert unmatched(public("ops"), covered("ops"), UNTESTED) == []


@pytest.mark.parametrize("folder", WHOLE)
def test_every_test_has_its_source(folder: str) -> None:
    assert covered(folder), "no tests"
    assert unmatched(covered(folder), sources(folder), WHOLE[folder]) == []


def test_rules_of_tests_bite() -> None:
    families, tests = public("backbones"), covered("backbones")
    assert {"litv2", "nat"} <= families
    assert {"counting", "train"} <= sources("tools")
    assert unmatched(families | {"moh"}, tests, set()) == ["moh"]
    assert unmatched(families, tests - {"nat"}, set()) == ["nat"]
    assert unmatched(tests | {"golden"}, families, WHOLE["backbones"]) == ["golden"]
    with pytest.raises(AssertionError, match="there is no pictures"):
        unmatched(tests, families, {"pictures"})


PARAMETERS = {"weight", "bias"}
SET_UP = re.compile(r"init|reset_parameters|open_gate|_from_timm|reparameterize|set_grid")  # outside every pass


def readings(source: str) -> list[int]:
    """Lines on which a method that may run in a pass reads the parameters of a module other than its own."""
    found = []
    for function in ast.walk(ast.parse(source)):
        if not isinstance(function, ast.FunctionDef) or SET_UP.search(function.name):
            continue
        for node in ast.walk(function):
            read = isinstance(node, ast.Attribute) and node.attr in PARAMETERS and not isinstance(node.ctx, ast.Store)
            if read and not (isinstance(node.value, ast.Name) and node.value.id == "self"):
                found.append(node.lineno)
    return found


def test_layers_are_called_not_read() -> None:
    """Only ``layers/plain.py`` decides when a fast path may read the parameters of a layer instead of calling it."""
    broken = [
        f"{path.relative_to(ROOT)}:{line}"
        for path in files("backbones")
        if path.name != "plain.py"
        for line in readings(path.read_text(encoding="utf-8"))
    ]
    assert not broken, "\n".join(broken)


def test_reading_rule_bites() -> None:
    bad = (
        "F.linear(x, self.fc.weight)",
        "linear(x, self.qkv.bias)",
        "self.mlp.fc1.weight.t()",
        "a = self.fc; a.weight",
    )
    good = ("F.conv2d(x, self.weight, self.bias)", "self.fc(x)", "project(self.fc, x)")
    for lines, expected in ((bad, [2]), (good, [])):
        for line in lines:
            assert readings(f"def forward(self, x):\n    {line}\n") == expected, line
    assert readings("def init_weights(self):\n    zeros_(self.fc.weight)\n") == []


def test_nobody_imports_tools() -> None:
    """Only the command line's entry point knows the tools."""
    paths = [p for f in FOLDERS if f != "tools" for p in files(f)] + [ROOT / "src/vizoo/__init__.py"]
    assert [p for p in paths for found in imports(p) if found.within("vizoo.tools")] == []


def test_tool_names_hide_no_standard_module() -> None:
    """``python tools/x.py`` puts tools/ first on the path, so ``tools/profile.py`` would break torch."""
    assert [p.name for p in files("tools", "*.py") if p.stem in sys.stdlib_module_names] == []


def test_every_family_is_imported() -> None:
    """One line per family in ``backbones/__init__.py``, sorted, and a family for each line."""
    here = [found.module for found in imports(ROOT / "backbones/__init__.py") if is_family(found.module)]
    assert here == sorted(module_name(p) for p in files("backbones", "[!_]*.py"))


@pytest.mark.parametrize("folder", [f for f in FOLDERS if f in ("backbones", "heads")])
def test_folder_is_not_a_package_of_its_own(folder: str) -> None:
    """From the checkout ``import backbones`` would register every model twice."""
    spec = importlib.util.spec_from_file_location(folder, ROOT / folder / "__init__.py")
    assert spec is not None
    assert spec.loader is not None
    with pytest.raises(ImportError, match=f"vizoo.{folder}"):
        spec.loader.exec_module(importlib.util.module_from_spec(spec))


MEASURE = """
import importlib, importlib.resources, json, sys
import vizoo
alone = sorted({m.split(".")[0] for m in sys.modules})
sys.modules["vizoo.backbones"] = None
failed = []
for _ in range(2):
    try:
        import timm
    except ModuleNotFoundError as e:
        failed.append([e.name, "timm" in sys.modules])
del sys.modules["vizoo.backbones"]
before = set(sys.modules)
import timm
new = set(sys.modules) - before
kernels = sorted(m for m in new if m.startswith("vizoo.") and m.endswith("_kernels"))
registered = timm.is_model("test_litv2") and vizoo.backbones.litv2.__name__ == "vizoo.backbones.litv2"
own = timm.__loader__ is timm.__spec__.loader and not type(timm.__loader__).__module__.startswith("vizoo")
importlib.resources.files("timm").joinpath("version.py").read_text()
importlib.reload(timm)
print(json.dumps({"alone": alone, "failed": failed, "registered": registered, "own": own,
                  "new": sorted({m.split(".")[0] for m in new}), "kernels": kernels}))
"""


def test_importing_is_light(tmp_path: Path) -> None:
    """``import vizoo`` registers the models with timm, to which it adds no plotting, progress or mm* package,
    and no operator's kernels; by itself it imports neither torch nor timm."""
    done = subprocess.run([sys.executable, "-c", MEASURE], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    measured = json.loads(done.stdout)
    assert not {"numpy", "timm", "torch", *NEVER_ON_IMPORT} & set(measured["alone"])
    assert measured["failed"] == [["vizoo.backbones", False]] * 2  # an import that failed is never half there
    assert measured["registered"]
    assert measured["own"]
    assert not NEVER_ON_IMPORT & set(measured["new"])
    assert measured["kernels"] == [f"{OPS}._kernels"]  # what all share


# tracked files


PRIVATE = re.compile(
    r"""(?<![\w.~}])/(?:home|root|Users|work|workspace|scratch)/\w  # a path of one machine
    |\b(?:10|192\.168|172\.(?:1[6-9]|2\d|3[01]))(?:\.\d{1,3}){2,3}\b(?!\.\d)  # an address of a private network
    |\b[\w-]+\.(?:internal|intranet|corp|lan)\b  # a private host name
    |--(?:(?:extra-)?index-url|trusted-host)\b  # a package source of one network""",
    re.VERBOSE,
)


def test_private_pattern_bites() -> None:
    bad = ["x = '/" + "home/me/data'", "http://10" + ".1.2.3/x", "build" + ".internal", "pip --index" + "-url x"]
    assert [text for text in bad if not PRIVATE.search(text)] == []
    good = ["https://github.com/user/repo", "torch 2.10.0", "/tmp/out", "docs/home/page", "a = 10.5"]
    assert [text for text in good if PRIVATE.search(text)] == []


def test_no_private_path_or_host() -> None:
    """Nothing in the repository says on which machine or network it was made."""
    found = []
    for path in tracked():
        data = path.read_bytes()
        if b"\0" in data:
            continue
        for number, line in enumerate(data.decode("utf-8").splitlines(), 1):
            if PRIVATE.search(line):
                found.append(f"{path.relative_to(ROOT)}:{number}: {line.strip()[:100]}")
    assert not found, "\n".join(found)


def test_no_large_file() -> None:
    """Records of the whole zoo, and their page, may be larger than the rest."""
    recorded = {ROOT / "docs/profile.html", *(ROOT / "tools/results").glob("profile-*.jsonl")}
    assert [p for p in tracked() if p.stat().st_size > (2 << 20 if p in recorded else LARGEST)] == []


# how the tools hang together


def graph(folder: str) -> dict[str, set[str]]:
    """The modules of a folder with the modules of the same folder that they import, wherever in the file."""
    names = {module_name(path): path for path in files(folder)}
    return {name: {found.module for found in imports(path)} & names.keys() for name, path in names.items()}


def cycle(found: dict[str, set[str]]) -> list[str]:
    """Modules that import each other in a ring; empty when there is none."""
    try:
        graphlib.TopologicalSorter(found).prepare()
    except graphlib.CycleError as e:
        ring: list[str] = e.args[1]
        return ring
    return []


def test_tools_import_each_other_in_one_direction() -> None:
    assert cycle(graph("tools")) == []


def test_cycles_are_found() -> None:
    found = graph("tools")
    assert "vizoo.tools.gpu.machine_code" in found["vizoo.tools.bench"]
    assert "vizoo.tools.data.images" in found["vizoo.tools.show"]
    found["vizoo.tools.common"] |= {"vizoo.tools.bench"}  # as an import in a function would
    assert {"vizoo.tools.bench", "vizoo.tools.common"} <= set(cycle(found))


def borrowed(path: Path, found: Import) -> bool:
    """Whether a file imports an underscored module of ours from another folder."""
    parts = found.module.split(".")
    for i, part in enumerate(parts):
        if parts[0] == "vizoo" and part.startswith("_"):
            return not module_name(path).startswith(f"{'.'.join(parts[:i])}.")
    return False


def test_underscored_modules_stay_in_their_folder() -> None:
    paths = [path for folder in FOLDERS for path in files(folder)]
    broken = [(str(p.relative_to(ROOT)), found.module) for p in paths for found in imports(p) if borrowed(p, found)]
    assert broken == []


def test_rule_of_underscores_bites() -> None:
    def found(path: str, module: str) -> bool:
        return borrowed(ROOT / path, Import(module, 1, False))

    assert found("tools/bench.py", f"{OPS}._kernels")
    assert found("backbones/layers/hilo.py", f"{OPS}._hilo_kernels")
    assert found("tools/train.py", "vizoo.tools.training._loop")
    assert not found("backbones/ops/hilo.py", f"{OPS}._kernels")
    assert not found("tools/bench.py", f"{OPS}.backend")
    assert not found("tools/bench.py", "torch._dynamo")


LONGEST = 60  # lines of a function


def adds_option(node: ast.stmt) -> bool:
    """Whether a statement adds one option to a parser."""
    if not isinstance(node, ast.Expr) or not isinstance(node.value, ast.Call):
        return False
    function = node.value.func
    name = function.attr if isinstance(function, ast.Attribute) else getattr(function, "id", "")
    return name in ("add", "add_alias", "add_argument")


def long_functions(source: str) -> list[str]:
    """Names of functions that are too long; lists of options may be, of which most statements add one."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            continue
        lines = (node.end_lineno or node.lineno) + 1 - node.lineno
        if lines > LONGEST and sum(map(adds_option, node.body)) * 2 <= len(node.body):
            found.append(node.name)
    return found


def test_functions_of_tools_are_short() -> None:
    found = {str(p.relative_to(ROOT)): long_functions(p.read_text(encoding="utf-8")) for p in files("tools")}
    assert {path: names for path, names in found.items() if names} == {}


def test_rule_of_length_bites() -> None:
    def function(*statements: str) -> str:
        return "def f(p):\n" + "".join(f"    {line}\n" for line in statements)

    assert long_functions(function(*["x = 1"] * LONGEST)) == ["f"]
    assert long_functions(function(*["x = 1"] * (LONGEST - 1))) == []
    options = ["p.add_argument('--x')", "add(p, '--y')"] * LONGEST
    assert long_functions(function(*options)) == []
    assert long_functions(function(*options, *["x = 1"] * (2 * LONGEST))) == ["f"]
    method = textwrap.indent(function(*["x = 1"] * LONGEST), "    ")
    assert long_functions(f"class A:\n{method}") == ["f"]


# kernels


def holds_kernels(path: Path) -> bool:
    """Whether a file of ``ops/`` is for kernels: for what all share, or for those of the operator that names it."""
    operator = path.with_name(f"{path.stem.removeprefix('_').removesuffix('_kernels')}.py")
    called = f'KernelModule("{path.stem}")'
    return path.stem == "_kernels" or (operator.is_file() and called in operator.read_text(encoding="utf-8"))


def misplaced(path: Path, source: str, found: Iterable[Import]) -> str | None:
    """What a file of ``ops/`` may not do with kernels, or None when all is in its place."""
    if holds_kernels(path):
        return None
    found = list(found)
    if re.search(r"\btriton\.jit\b", source) or any(x.within("triton") for x in found):
        return "kernels of ops/<op>.py stand in ops/_<op>_kernels.py, what all share in ops/_kernels.py"
    if any(x.module.endswith("_kernels") and x.module != f"{OPS}._kernels" for x in found):
        return "a file of kernels is imported when it is first used, by KernelModule"
    return None


def test_kernels_have_files_of_their_own() -> None:
    paths = files("backbones/ops")
    reasons = {p.name: misplaced(p, p.read_text(encoding="utf-8"), imports(p)) for p in paths}
    assert {name: reason for name, reason in reasons.items() if reason} == {}
    assert [p.name for p in paths if p.stem.endswith("_kernels") and not holds_kernels(p)] == []


def test_rule_of_kernels_bites() -> None:
    kernel = "@triton.jit\ndef f(x_ptr): ...\n"

    def reason(name: str, source: str = "", *modules: str) -> str | None:
        return misplaced(ROOT / "backbones/ops" / name, source, [Import(module, 1, False) for module in modules])

    for name in ("halo.py", "_halo.py", "_halos_kernels.py", "_backend_kernels.py", "backend.py"):
        assert reason(name, kernel), name
        assert reason(name, "", "triton.language"), name
        assert reason(name, "", f"{OPS}._halo_kernels"), name
        assert not reason(name, "def f(x): ...\n", f"{OPS}._kernels", "torch"), name
    for name in ("_halo_kernels.py", "_depthwise3x3_kernels.py", "_kernels.py"):
        assert not reason(name, kernel, "triton.language", f"{OPS}._na2d_av_kernels"), name
