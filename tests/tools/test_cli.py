"""The command line: help, unknown names, one-line errors, listing, environment, generated tables."""

import csv
import io
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import timm
import torch

from vizoo.tools import cli, common, models, options
from vizoo.tools.profiling import machine

ROOT = Path(__file__).parents[2]


def run(capsys, *words):
    """Exit status, standard output and standard error of ``vizoo WORDS``."""
    try:
        status = cli.main(list(words))
    except SystemExit as stop:
        status = stop.code
    out, err = capsys.readouterr()
    return status, out, err


def test_help_names_every_command(capsys):
    for words in ([], ["--help"], ["-h"], ["help"]):
        status, out, err = run(capsys, *words)
        assert status == 0
        assert err == ""
        assert all(f"  {name}" in out for name in cli.COMMANDS)
        assert "examples:" in out


@pytest.mark.parametrize("command", cli.COMMANDS)
def test_help_teaches_by_example(command, capsys):
    status, out, _ = run(capsys, command, "--help")
    assert status == 0
    assert f"  vizoo {command}" in out.partition("examples:")[2]


def test_version(capsys):
    import vizoo

    assert run(capsys, "--version") == (0, f"{vizoo.__version__}\n", "")


def test_unknown_command(capsys):
    status, out, err = run(capsys, "profil")
    assert (status, out) == (2, "")
    assert err == "vizoo: error: unknown command 'profil'; did you mean 'profile'?\n"
    assert "known: profile" in run(capsys, "zzz")[2]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["bench", "litv2_x"], "unknown model 'litv2_x'; did you mean litv2_"),
        (["bench", "resnet18"], "'resnet18' is not one model of the zoo"),
        (["bench", "litv2_*"], "'litv2_*' is not one model of the zoo"),
        (["bench", "torchvision:resnet18"], "'torchvision:resnet18' is not one model of the zoo"),
        (["bench", "litv2_s@512"], "'litv2_s@512' is not one model of the zoo"),
        (["bench", "litv2_s.nope"], "unknown tag 'nope' of model 'litv2_s'; known: alpha09_in1k, in1k"),
        (["bench", "test_litv2", "--batch", "0"], "--batch: got 0, must be a whole number between 1"),
        (["bench", "test_litv2", "--size", "0"], "--size 0: give one side"),
        (["bench", "test_litv2", "--size", "1", "2", "3"], "--size 1 2 3: give one side"),
        (["bench", "hilo", "--size", "4", "5", "--threads", "1"], "'hilo' takes the tokens of a square map"),
        (["bench", "litv2_s", "--official", ".", "--size", "64", "96", "--threads", "1"], "for square images"),
        (["bench", "--suite", "gpu", "--json"], "got --json"),
        (["bench", "--sass", "--dtype", "tf32"], "--dtype: --sass takes fp32, bf16 and fp16, got tf32"),
        (["bench", "test_litv2", "--device", "tpu"], "unknown device 'tpu'; allowed: cpu"),
        (["bench", "test_litv2", "--device", "cuda:77"], "device 'cuda:77' is not on this machine"),
        (["bench", "test_litv2", "--official", "/nowhere"], "--official '/nowhere': no such folder"),
        (["bench", "litv2_s", "--official", "."], "give a checkout of the official code"),
        (["bench", "test_litv2", "--out", "x.txt"], "--out 'x.txt': the ending must be .json or .csv or .md"),
        (["bench", "hf-hub:a/b"], "'hf-hub:a/b' is not one model of the zoo"),
        (["bench", "hilo", "--window-size", "0"], "--window-size: got 0, must be a whole number of at least 1"),
        (["bench", "hilo", "--alpha", "2"], "--alpha: got 2, must be a finite number between 0 and 1"),
        (["bench", "halo", "--alpha", "0.5"], "--alpha: is for 'hilo', got 'halo'"),
        (["bench", "hilo", "--channels-last"], "--channels-last: 'hilo' takes tokens"),
        (["bench", "halo", "--reparam"], "--reparam: 'halo' has no branches to merge"),
        (["bench", "halo", "--size", "1", "--threads", "1"], "'halo' cannot run in float32 on cpu with --size 1"),
        (["bench", "test_litv2", "--size", "1", "--threads", "1"], "with --size 1: got a 1x1 map to merge"),
        (["bench", "test_litv2", "--reparam", "--threads", "1"], "--reparam: 'test_litv2' has no branches to merge"),
        (["bench", "test_litv2", "--device", "meta"], "'meta' holds no values"),
        (["bench"], "give the name of one model"),
        (["models", "--yaml"], "unrecognized arguments: --yaml"),
        (["models", "--json", "--csv"], "--csv: not allowed with argument --json"),
        (["env", "now"], "unrecognized arguments: now"),
        (["models", "nothing*"], "no model of the zoo matches 'nothing*'; 'vizoo models' lists all"),
        (["models", "litv2", "litv3_s"], "no model of the zoo matches 'litv3_s'; did you mean litv2_s"),
        (["models", "nat", "--max-params", "1M"], "no model of the zoo is left by 'nat' --max-params 1e+06"),
        (["models", "--max-params", "x"], "argument --max-params: got 'x', must be a number above 0, perhaps with K"),
        (["models", "--max-macs", "-1G"], "argument --max-macs: expected one argument"),
        (["models", "--max-macs", "0"], "argument --max-macs: got '0', must be"),
        (["models", "--sort", "size"], "argument --sort: invalid choice: 'size' (choose from name, params, macs,"),
        (["profile", "test_litv2", "--sort", "size"], "argument --sort: invalid choice: 'size' (choose from "),
        (["profile", "litv2_x"], "unknown model 'litv2_x'; did you mean litv2_"),
        (["profile", "test_litv2", "--size", "0"], "--size 0"),
        (["profile", "test_litv2", "--device", "tpu"], "unknown device 'tpu'"),
        (["profile", "test_litv2", "--checkpoint", "/nowhere.pth"], "'/nowhere.pth' does not exist"),
        (["train", "--model", "litv2_x", "--data", "digits"], "unknown model 'litv2_x'"),
        (["train", "--model", "test_litv2", "--data", "digits", "--device", "tpu"], "unknown device 'tpu'"),
    ],
)
def test_bad_input_is_one_line(words, message, capsys):
    status, out, err = run(capsys, *words)
    assert status == 2
    assert err.count("\n") == 1, err
    assert err.startswith(f"vizoo {words[0]}: error: ")
    assert message in err


def test_unreadable_checkpoint(tmp_path, capsys):
    (tmp_path / "broken.pth").write_bytes(b"not a checkpoint")
    status, _, err = run(
        capsys, "profile", "test_litv2", "--measure", "count", "--weights", str(tmp_path / "broken.pth")
    )
    assert (status, err.count("\n")) == (2, 1)
    assert "broken.pth" in err


def test_debug_shows_the_traceback():
    with pytest.raises(common.UserError, match="no model of the zoo"):
        cli.main(["models", "nothing*", "--debug"])


def test_module_and_script():
    """``python -m vizoo``, ``python -m vizoo.tools.models`` and ``python tools/models.py`` are the same."""
    outs = {
        subprocess.run([sys.executable, *words, "litv2_m"], capture_output=True, text=True, check=True, cwd=ROOT).stdout
        for words in (["-m", "vizoo", "models"], ["tools/models.py"])
    }
    assert len(outs) == 1
    assert "48.83" in outs.pop()


def test_models_lists_what_is_registered(capsys):
    status, out, _ = run(capsys, "models", "--csv")
    assert status == 0
    rows = list(csv.DictReader(io.StringIO(out)))
    names = [r["model"] for r in rows]
    assert not [n for n in names if n.startswith("test_")]
    assert all(timm.is_model(n) for n in names)
    row = next(r for r in rows if r["model"] == "litv2_b.r384_in1k")
    assert list(row.values()) == [
        "litv2_b.r384_in1k",
        "86.52",
        "39.646",
        "384x384",
        "84.7",
        "official weights",
        "apache-2.0",
        "litv2",
        "classification detection segmentation",
        "",
        "",
        "r384_in1k=https://github.com/ziplab/LITv2/releases/download/v1.0/litv2_b_384.pth",
    ]
    status, out, _ = run(capsys, "models", "litv2_s", "test_*")
    assert "litv2_s " in out
    assert "test_litv2" in out
    assert "litv2_m" not in out
    assert "…" not in out  # never squeezed


def names(capsys, *words):
    """What ``vizoo models`` lists."""
    status, out, err = run(capsys, "models", *words, "--json")
    assert (status, err) == (0, "")
    return [entry["name"] for entry in json.loads(out)]


def test_words_globs_and_families(capsys):
    everything = names(capsys)
    assert names(capsys, "litv2_b") == ["litv2_b", "litv2_b.r384_in1k"]
    assert names(capsys, "overlock", "alpha1") == [
        "litv2_s_alpha10",
        *("overlock_b", "overlock_s", "overlock_t", "overlock_xt"),
    ]
    assert names(capsys, "halonet") == [n for n in everything if n.startswith("halo_")]  # the family's name
    assert {"nat_tiny", "dinat_tiny", "vitrpb_base"} <= set(names(capsys, "nat"))
    assert names(capsys, "litv2_?") == ["litv2_b", "litv2_m", "litv2_s"]
    assert names(capsys, "nat_mini") == ["nat_mini"]  # a name itself, not also dinat_mini
    assert names(capsys, "test_nat") == ["test_nat"]
    assert names(capsys, "test_na") == ["test_nat", "test_nat_isotropic"]
    assert not [n for n in names(capsys, "oat") if n.startswith("test_")]
    assert names(capsys, "t*_oat") == ["test_oat"]


def test_order_and_limits(capsys):
    by_top1 = names(capsys, "halonet", "--sort", "top1", "--reverse")
    assert (by_top1[0], by_top1[-1]) == ("halo_h7", "halo_resnet50_det")  # the last has none
    assert names(capsys, "halonet", "--sort", "top1")[-1] == "halo_resnet50_det"
    assert names(capsys, "litv2_?", "--sort", "params") == ["litv2_s", "litv2_m", "litv2_b"]
    assert names(capsys, "litv2_?", "--sort", "macs", "--reverse") == ["litv2_b", "litv2_m", "litv2_s"]
    assert names(capsys, "halonet", "--sort", "input")[-1] == "halo_resnet50_det"
    assert names(capsys, "litv2_?", "--max-params", "48830368") == ["litv2_m", "litv2_s"]
    assert names(capsys, "litv2_?", "--max-params", "4.8e7") == ["litv2_s"]
    assert names(capsys, "litv2_?", "--max-params", "30M", "--max-macs", "3.8G") == ["litv2_s"]
    assert names(capsys, "--task", "scanpath") == ["oat_base", "oat_resnet18", "oat_small"]
    detectors = set(names(capsys, "--task", "detection"))
    assert detectors == set(names(capsys, "--task", "segmentation"))
    assert {"litv2_s", "overlock_t"} <= detectors
    assert not detectors & {"nat_isotropic_small", "vit_base_patch16_224_tcpa", "oat_base"}
    assert set(names(capsys)) - set(names(capsys, "--task", "classification")) == set(names(capsys, "oat"))


def test_merged_forms_and_weights_are_told(capsys):
    out = run(capsys, "models", "overlock_xt", "litv2_s_alpha00", "--links")[1]
    assert "overlock_xt is the training form; with its branches merged (--reparam): 16.45 M, 2.701 GMACs." in out
    assert "litv2_s_alpha00 is" not in out
    assert [line.split()[:2] for line in out.splitlines() if "https://" in line] == [
        ["litv2_s_alpha00", "in1k"],
        ["overlock_xt", "in1k"],
        ["overlock_xt", "reparam_in1k"],
    ]
    assert run(capsys, "models", "test_nat", "--links")[1].split()[-1] == "none"


def test_models_as_json(capsys):
    status, out, err = run(capsys, "models", "litv2_b", "test_litv2", "--json")
    assert (status, err) == (0, "")
    first, *_, second = json.loads(out)
    assert (first["name"], first["params"], first["size"]) == ("litv2_b", 86_520_704, [224, 224])
    assert list(first["weights"]) == ["in1k", "r384_in1k"]
    assert second["paper_top1"] is None


def test_model_entries():
    entry = models.list_zoo(["litv2_b"])[0]
    assert (entry.size, entry.paper_top1, list(entry.weights)) == ((224, 224), 83.6, ["in1k", "r384_in1k"])


def test_env(capsys):
    status, out, _ = run(capsys, "env")
    assert status == 0
    assert torch.__version__.partition("+")[0] in out
    assert "onednn" in out
    status, out, _ = run(capsys, "env", "--json")
    found = json.loads(out)
    assert set(found["backends"]) == {"torch", "onednn", "cuda", "triton", "natten"}
    assert found["cores"] >= 1
    assert machine.installation()["versions"]["timm"] == timm.__version__


def test_atomic_write_keeps_the_old_file(tmp_path):
    path = tmp_path / "x.txt"
    path.write_text("old", encoding="utf-8")

    def half():
        with common.atomic_write(path) as f:
            f.write("new")
            raise RuntimeError("half way")

    with pytest.raises(RuntimeError, match="half"):
        half()
    assert path.read_text(encoding="utf-8") == "old"
    assert list(tmp_path.iterdir()) == [path]
    with common.atomic_write(path) as f:
        f.write("new")
    assert path.read_text(encoding="utf-8") == "new"
    with pytest.raises(common.UserError, match="cannot write"), common.atomic_write(tmp_path / "no" / "x.txt"):
        pass


def test_names_and_globs():
    names = common.resolve_models(["litv2_b*", "resnet18", "litv2_b", "litv2_b.r384_in1k"])
    assert names == ["litv2_b", "resnet18", "litv2_b.r384_in1k"]
    assert common.resolve_models(["litv2_b.*"]) == ["litv2_b.in1k", "litv2_b.r384_in1k"]


@pytest.mark.parametrize("values", [[0], [-3], [1, 2, 3], [4, 0]])
def test_sizes(values):
    with pytest.raises(common.UserError, match="at least 1 pixel"):
        options.read_size(values)
    assert options.read_size([5]) == (5, 5)
    assert options.read_size([5, 7]) == (5, 7)
    assert options.read_size(9) == (9, 9)


def test_a_reader_that_goes_away_ends_the_printing_only(tmp_path):
    """``vizoo evaluate ... --out figures.json | head`` writes its file."""
    code = (
        "import pathlib, sys\nfrom vizoo.tools import common\n"
        "def tool(argv):\n    for _ in range(9000):\n        print('x' * 99)\n"
        "    common.print_tables(common.Table(['a'], [['b']]))\n    pathlib.Path('done').touch()\n    return 0\n"
        "sys.exit(common.run_tool(tool, [], 'x'))"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code], cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout.readline() == "x" * 99 + "\n"
        process.stdout.close()
        assert process.wait() == 0
        assert process.stderr.read() == ""
    assert (tmp_path / "done").exists()


HEAVY = {"PIL", "matplotlib", "mmengine", "numpy", "psutil", "rich", "timm", "torch", "torchvision", "yaml"}
HELP = """
import contextlib, io, itertools, json, sys
from vizoo.tools import cli
from vizoo.tools.options import TASKS

words = [["--help"], ["--version"], *([name, "--help"] for name in cli.COMMANDS)]
words += [[name, "--task", task, "--help"] for name in ("train", "evaluate") for task in TASKS]
for asked in words:
    with contextlib.suppress(SystemExit), contextlib.redirect_stdout(io.StringIO()) as out:
        cli.main(asked)
    assert out.getvalue(), asked
print(json.dumps(sorted({name.partition(".")[0] for name in sys.modules})))
"""


def test_help_imports_nothing_heavy():
    """Help of every command and task is there at once: the packages that take seconds are not imported for it."""
    done = subprocess.run([sys.executable, "-c", HELP], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert not HEAVY & set(json.loads(done.stdout))


@pytest.mark.parametrize("unbuffered", ["", "1"])
@pytest.mark.parametrize("words", [[], ["profile", "--help"]], ids=str)
def test_nobody_reads_what_is_printed(words, unbuffered):
    """``vizoo | head -1``: no traceback, whenever the reader goes away."""
    read, write = os.pipe()
    os.close(read)
    argv, environment = [sys.executable, "-m", "vizoo", *words], {**os.environ, "PYTHONUNBUFFERED": unbuffered}
    done = subprocess.run(argv, stdout=write, stderr=subprocess.PIPE, text=True, env=environment, check=False)
    os.close(write)
    assert (done.returncode, done.stderr) == (0, "")


COMPLETE = """
import contextlib, functools, io, json, os, sys
import argcomplete
from vizoo.tools import cli

answers = {}
for line in sys.argv[1:]:
    out = io.StringIO()
    finder = functools.partial(argcomplete.CompletionFinder(), exit_method=sys.exit, output_stream=out)
    argcomplete.autocomplete = finder
    os.environ.update(_ARGCOMPLETE="1", _ARGCOMPLETE_IFS=" ", COMP_LINE=line, COMP_POINT=str(len(line)))
    with contextlib.suppress(SystemExit):
        cli.main([])
    answers[line] = out.getvalue().split()
print(json.dumps([answers, sorted({name.partition(".")[0] for name in sys.modules})]))
"""
COMPLETED = {
    "vizoo ": list(cli.COMMANDS),
    "vizoo pro": ["profile"],
    "vizoo --v": ["--version"],
    "vizoo nothing --v": ["--version"],
    "vizoo profile --stri": ["--strict"],
    "vizoo profile  litv2_s --measure lat": ["latency"],
    "vizoo profile test_lit": ["test_litv2"],
    "vizoo show --model test_lit": ["test_litv2"],
    "vizoo bench test_lit": ["test_litv2"],
    "vizoo train --task segmentation --frozen": ["--frozen-stages"],
    "vizoo train --frozen": [],
    "vizoo evaluate --task scanpath --sampl": ["--samples"],
    "vizoo mm conv": ["convert"],
}


def test_completion():
    """A shell is offered commands, options of the task that is named, choices and models, at once."""
    argv = [sys.executable, "-c", COMPLETE, *COMPLETED, "vizoo train --model "]
    done = subprocess.run(argv, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    answers, imported = json.loads(done.stdout)
    names = answers.pop("vizoo train --model ")
    assert answers == COMPLETED
    assert {"litv2_s", "overlock_t"} <= set(names)
    assert not [name for name in names if name.startswith(("test_", "-"))]
    assert not HEAVY & set(imported)
