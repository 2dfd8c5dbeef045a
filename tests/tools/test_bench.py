import csv
import json
import os
import sys
import time
import types

import pytest
import timm
import torch
import torchvision
from tolerance import close, golden_close
from torch import nn

import vizoo.backbones.layers
from vizoo.tools import bench
from vizoo.tools.profiling import official, sides


def rows_of(path):
    with open(path, encoding="utf-8") as f:
        return list(csv.DictReader(f))


@pytest.mark.parametrize("extra", [[], ["--pass", "train"], ["--channels-last", "--batch", "1", "2"]], ids=str)
def test_model_against_plain(extra, tmp_path, capsys):
    out = tmp_path / "out.csv"
    words = ["test_litv2", "--rounds", "1", "--threads", "1", "--size", "64", "--out", str(out), *extra]
    assert bench.main(words) == 0
    assert bench.main(words) == 0  # appended
    rows = rows_of(out)
    assert len(rows) == (4 if "2" in extra else 2)
    assert list(rows[0]) == bench.COLUMNS
    for row in rows:
        assert row["peer"] == "plain"
        assert float(row["ratio"]) == pytest.approx(float(row["peer_median_ms"]) / float(row["median_ms"]), rel=0.02)
        assert float(row["error"]) < 1e-5
        assert float(row["p20_ms"]) <= float(row["median_ms"]) <= float(row["p80_ms"])
        assert min(float(row["memory_mb"]), float(row["peer_memory_mb"])) > 0
    assert "speed-up" in capsys.readouterr().out


class Scaled(nn.Module):
    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(500, 500))

    def forward(self, x):
        return x * self.scale + 1


def test_memory_of_a_side():
    """Two maps of 1 MB; in training the output, its gradient and that of the parameter at the least, in every call."""
    found = {}
    for mode in ("infer", "train"):
        args = bench.build_parser().parse_args(["scaled", "--pass", mode])
        side = bench._Side(args, Scaled(), (1, 500, 500), (), "float32")
        with torch.inference_mode(mode == "infer"):
            found[mode] = [side.memory() for _ in range(2)]
        assert found[mode][0] == found[mode][1]
    assert found["infer"][0] == pytest.approx(2.0, abs=0.01)
    assert 3.0 <= found["train"][0] < 6.0


@pytest.mark.slow
def test_thread_settings_get_processes_of_their_own(tmp_path):
    out = tmp_path / "out.csv"
    assert bench.main(["test_litv2", "--rounds", "1", "--threads", "1", "2", "--size", "32", "--out", str(out)]) == 0
    assert [row["threads"] for row in rows_of(out)] == ["1", "2"]


def test_layer(tmp_path):
    out = tmp_path / "out.csv"
    words = [
        "hilo",
        "--size",
        "4",
        "--dtype",
        "float32",
        "bfloat16",
        "--rounds",
        "1",
        "--threads",
        "1",
        "--out",
        str(out),
    ]
    assert bench.main(words) == 0
    rows = rows_of(out)
    assert [(r["name"], r["shape"], r["dtype"]) for r in rows] == [
        ("hilo w2 alpha 0.9", "16x384", "float32"),
        ("hilo w2 alpha 0.9", "16x384", "bfloat16"),
    ]


def test_layer_against_timm(tmp_path, capsys):
    out = tmp_path / "out.csv"
    words = ["halo", "--size", "16", "--pass", "train", "--rounds", "1", "--threads", "1", "--out", str(out)]
    assert bench.main([*words, "--dtype", "float32", "bfloat16"]) == 0
    found = [[row[c] for c in ("name", "peer", "shape", "dtype", "peer_dtype")] for row in rows_of(out)]
    assert found == [["halo 64@16 b8 h3", "timm", "64x16x16", dtype, dtype] for dtype in ("float32", "bfloat16")]
    assert bench.main([*words, "--official", str(tmp_path)]) == 2
    assert "no official code of 'halo'" in capsys.readouterr().err


def test_layer_against_loop(tmp_path, capsys):
    out = tmp_path / "out.csv"
    words = ["ulsam", "--size", "3", "--dtype", "float32", "bfloat16", "--rounds", "1", "--threads", "1"]
    assert bench.main([*words, "--out", str(out)]) == 0
    found = [[row[c] for c in ("name", "peer", "shape", "dtype", "peer_dtype")] for row in rows_of(out)]
    assert found == [["ulsam 512@3 g4", "loop", "512x3x3", dtype, dtype] for dtype in ("float32", "bfloat16")]
    assert bench.main([*words, "--official", str(tmp_path)]) == 2
    assert "has no licence" in capsys.readouterr().err


def test_cpu_time_does_not_count_waiting(tmp_path, capsys, monkeypatch):
    build = bench.build_sides

    class Waiting(nn.Module):
        def __init__(self, module):
            super().__init__()
            self.module = module

        def forward(self, x):
            time.sleep(0.02)
            return self.module(x)

    def slow(*args):
        sides = build(*args)
        return sides._replace(peer=Waiting(sides.peer))

    monkeypatch.setattr(bench, "build_sides", slow)
    out = tmp_path / "out.csv"
    words = ["halo", "--size", "8", "--rounds", "2", "--out", str(out)]
    assert bench.main([*words, "--threads", "1", "--cpu-time"]) == 0
    assert "machine busy" not in capsys.readouterr().err
    assert bench.main([*words, "--threads", "1"]) == 0
    assert "machine busy" in capsys.readouterr().err
    rows = rows_of(out)
    assert [row["mode"] for row in rows] == ["infer cpu_time", "infer"]
    assert float(rows[0]["peer_median_ms"]) < 20 <= float(rows[1]["peer_median_ms"])
    assert float(rows[0]["cpu_use"]) < 0.8
    assert bench.main([*words, "--threads", "2", "--cpu-time"]) == 2
    assert "needs --threads 1" in capsys.readouterr().err


def test_reversed_attention(tmp_path, capsys):
    out = tmp_path / "out.csv"
    words = ["reversed", "--size", "5", "--pass", "train", "--rounds", "1", "--threads", "1"]
    assert bench.main([*words, "--out", str(out)]) == 0
    (row,) = rows_of(out)
    assert [row[k] for k in ("name", "peer", "shape")] == ["reversed 3 heads", "plain", "25x96"]
    assert bench.main([*words, "--official", str(tmp_path)]) == 2
    assert "--official: there is no official code of 'reversed'" in capsys.readouterr().err


def test_nothing_is_recorded_when_outputs_differ(tmp_path, capsys, monkeypatch):
    build = bench.build_sides

    def broken(*args):
        sides = build(*args)
        with torch.no_grad():
            sides.ours.stages[2].blocks[0].attn.l_proj.weight.mul_(1.5)
        return sides

    monkeypatch.setattr(bench, "build_sides", broken)
    out = tmp_path / "out.csv"
    assert bench.main(["test_litv2", "--rounds", "1", "--threads", "1", "--size", "32", "--out", str(out)]) == 1
    assert "outputs differ" in capsys.readouterr().err
    assert not out.exists()


def test_a_case_that_fails_takes_no_other_with_it(tmp_path, capsys, monkeypatch):
    """It is a row with its reason, and is not recorded; the exit status is that of what went wrong."""
    build = bench.build_sides

    def broken(*args):
        sides = build(*args)
        sides.ours.register_forward_pre_hook(lambda module, given: raise_at(given[0], 2))
        return sides

    def raise_at(x, batch):
        if len(x) == batch:
            raise NotImplementedError("no kernel")

    monkeypatch.setattr(bench, "build_sides", broken)
    out = tmp_path / "out.csv"
    words = ["ulsam", "--rounds", "1", "--threads", "1", "--out", str(out)]
    for size, last in (([], 1), (["--size", "2"], 1)):
        assert bench.main([*words, *size, "--batch", "1", "2", "3"]) == last
        shown, err = capsys.readouterr()
        assert "1 of 3 rows failed: 'ulsam' cannot run in float32 on cpu" in err
        (line,) = [line for line in shown.splitlines() if "no kernel" in line]
        assert line.split()[:5] == ["ulsam", "infer", "float32", "1", "2"]
    assert [row["batch"] for row in rows_of(out)] == ["1", "3", "1", "3"]
    assert bench.main([*words, "--size", "2", "--batch", "2", "2"]) == 2  # all of it is for what was given


@pytest.mark.parametrize("text", ["name,peer\nmine,kept\n", "vizoo,mine\n1,kept\n"], ids=["foreign", "ours"])
def test_other_columns_are_refused_before_anything_is_timed(text, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(bench, "one_case", lambda *args: pytest.fail("something was timed"))
    out = tmp_path / "out.csv"
    out.write_text(text, encoding="utf-8")
    assert bench.main(["test_litv2", "--out", str(out)]) == 2
    assert capsys.readouterr().err.count("\n") == 1
    assert out.read_text(encoding="utf-8") == text


def test_rows_are_added_and_nothing_is_rewritten(tmp_path):
    out = tmp_path / "out.csv"
    old = ",".join(bench.COLUMNS) + "\n" + '\'07,"a\nb"' + "," * (len(bench.COLUMNS) - 2)  # no end of line
    out.write_text(old, encoding="utf-8")
    assert bench.main(["ulsam", "--size", "2", "--rounds", "1", "--threads", "1", "--out", str(out)]) == 0
    text = out.read_text(encoding="utf-8")
    assert text.startswith(f"{old}\nulsam 512@2")
    assert text.count("ulsam") == 1


def test_the_table_is_printed_before_it_is_written(tmp_path, capsys, monkeypatch):
    def full(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("vizoo.tools.common.os.fsync", full)
    out = tmp_path / "out.csv"
    assert bench.main(["ulsam", "--size", "2", "--rounds", "1", "--threads", "1", "--out", str(out)]) == 1
    printed, err = capsys.readouterr()
    assert "ulsam 512@2" in printed
    assert "No space left on device" in err
    assert list(tmp_path.iterdir()) == []


def test_a_kernel_that_fails_is_one_line(capsys, monkeypatch):
    build = bench.build_sides

    def broken(*args):
        sides = build(*args)
        sides.ours.forward = lambda x: (_ for _ in ()).throw(NotImplementedError("no kernel\nhere"))
        return sides

    monkeypatch.setattr(bench, "build_sides", broken)
    assert bench.main(["ulsam", "--threads", "1"]) == 1
    assert capsys.readouterr().err == "vizoo bench: error: 'ulsam' cannot run in float32 on cpu: no kernel here\n"


MISSING = "needs the package {0}, which is not installed: pip install {0}"
FAULTS = {
    "raise KeyError('moved')": "fails: KeyError: 'moved'",
    "import no_such_package.nn": MISSING.format("no_such_package"),
    "import hidden": MISSING.format("hidden"),
    "class HiLo(": "fails: SyntaxError: ",
    "from timm.layers import NoSuchLayer": "fails: ImportError: cannot import name 'NoSuchLayer'",
    "import timm.models.no_such_file": "fails: ModuleNotFoundError: No module named 'timm.models.no_such_file'",
    "print('loud'); raise SystemExit('no GPU')": "fails: SystemExit: no GPU",
    "HiLo = 3": "fails: TypeError: 'int' object is not callable",
    "": "fails: AttributeError: module 'hilo' has no attribute 'HiLo'",
}


@pytest.mark.parametrize(("code", "why"), FAULTS.items(), ids=list(FAULTS.values()))
def test_official_code_that_fails_is_one_line(code, why, tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "hidden", None)
    (tmp_path / "hilo.py").write_text(f"{code}\n", encoding="utf-8")
    words = ["hilo", "--threads", "1", "--official", str(tmp_path)]
    assert bench.main(words) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith(f"vizoo bench: error: --official {str(tmp_path)!r}: its code {why}")
    assert err.count("\n") == 1
    with pytest.raises(bench.UserError) as caught:  # --debug shows what the code raised
        bench.main([*words, "--debug"])
    assert caught.value.__cause__ is not None


@pytest.mark.slow
def test_official_code_that_fails_in_a_process_is_one_line(tmp_path, capsys):
    (tmp_path / "hilo.py").write_text("import no_such_package\n", encoding="utf-8")
    assert bench.main(["hilo", "--threads", "1", "2", "--official", str(tmp_path)]) == 2
    assert capsys.readouterr().err.splitlines()[-1].endswith("pip install no_such_package")


def test_official_code_leaves_no_trace(tmp_path, monkeypatch):
    """Whatever it sets on import or in a constructor; its modules go before those of the same name that are loaded."""
    (tmp_path / "inner").mkdir()
    (tmp_path / "inner" / "part.py").write_text("", encoding="utf-8")
    (tmp_path / "mine.py").write_text("WHERE = 'checkout'\n", encoding="utf-8")
    (tmp_path / "hilo.py").write_text(
        "import os, sys, types, warnings\n"
        "import torch, inner.part, mine\n"
        "from timm.models import register_model\n"
        "from timm.models.registry import register_model as old\n"
        "from torch import nn\n"
        "print('loud')\n"
        "sys.path[:] = ['/nowhere', *sys.path]\n"
        "sys.modules['natten_of_theirs'] = types.ModuleType('natten_of_theirs')\n"
        "os.environ['OF_THEIRS'] = '1'\n"
        "os.chdir('/')\n"
        "torch.set_default_dtype(torch.float64)\n"
        "torch.set_default_device('meta')\n"
        "torch.set_grad_enabled(False)\n"
        "torch.set_num_threads(torch.get_num_threads() + 1)\n"
        "torch.set_float32_matmul_precision('medium')\n"
        "torch.use_deterministic_algorithms(True)\n"
        "torch.backends.cudnn.benchmark = True\n"
        "torch.backends.cudnn.allow_tf32 = False\n"
        "torch.backends.cuda.enable_flash_sdp(False)\n"
        "torch.manual_seed(5)\n"
        "@register_model\n"
        "@old\n"
        "def nat_mini():\n"
        "    pass\n"
        "class HiLo(nn.Identity):\n"
        "    where = mine.WHERE\n",
        encoding="utf-8",
    )
    mine = types.ModuleType("mine")
    monkeypatch.setitem(sys.modules, "mine", mine)

    def state():
        torch.empty(0)
        return (
            *(list(sys.path), os.getcwd(), dict(os.environ), torch.get_default_dtype(), torch.empty(0).device),
            *(torch.is_grad_enabled(), torch.get_num_threads(), torch.are_deterministic_algorithms_enabled()),
            *(torch.backends.cudnn.benchmark, torch.backends.cudnn.allow_tf32, torch.get_float32_matmul_precision()),
            *(torch.backends.cuda.flash_sdp_enabled(), torch.get_rng_state().tolist(), torch.empty(0).device),
            timm.models.model_entrypoint("nat_mini"),
        )

    torchs, before = set(sys.modules), state()
    layer = official.official_side("hilo", tmp_path, "hilo.py", side=14)
    assert layer.where == "checkout"
    assert state() == before
    assert sys.modules["mine"] is mine
    assert not {"hilo", "inner", "inner.part", "natten_of_theirs"} & (set(sys.modules) - torchs)


def stochastic(rate):
    """Modules of all libraries that leave something to chance in training, and shapes of their inputs."""
    torchs, image = torchvision.models.swin_transformer.SwinTransformerBlock, (2, 8, 8, 8)
    rates = {"dropout": rate, "attention_dropout": rate, "stochastic_depth_prob": rate}
    return {
        "dropout": (nn.Dropout(rate), image),
        "dropout 2d": (nn.Dropout2d(rate), image),
        "alpha dropout": (nn.AlphaDropout(rate), image),
        "feature alpha dropout": (nn.FeatureAlphaDropout(rate), image),
        "attention": (nn.TransformerEncoderLayer(8, 2, 8, dropout=rate), (4, 4, 8)),
        "lstm": (nn.LSTM(8, 8, 2, dropout=rate), (4, 4, 8)),
        "stochastic depth": (torchvision.ops.StochasticDepth(rate, "row"), (64, 8)),
        "torchvision's block": (torchvision.ops.DropBlock2d(rate, 3), image),
        "torchvision's swin": (torchs(8, 2, [4, 4], [0, 0], **rates), image),
        "drop path": (timm.layers.DropPath(rate), (64, 8)),
        "block": (timm.layers.DropBlock2d(rate, 3), image),
        "patch dropout": (timm.layers.PatchDropout(rate, num_prefix_tokens=0), (2, 16, 8)),
        "residual": (timm.models.efficientvit_msra.ResidualDrop(nn.Identity(), drop=rate), (64, 8, 8, 8)),
        "swin": (timm.create_model("test_vit", drop_rate=rate, attn_drop_rate=rate), (2, 3, 160, 160)),
        "ours": (timm.create_model("test_litv2", drop_rate=rate, drop_path_rate=rate), (2, 3, 64, 64)),
    }


@pytest.mark.parametrize("name", stochastic(0.5))
def test_nothing_is_left_to_chance(name):
    module, shape = stochastic(0.5)[name]
    x = torch.randn(shape)

    def differ():
        runs = []
        for seed in (1, 2):
            torch.manual_seed(seed)
            out = module.train()(x)
            runs.append(out[0] if isinstance(out, tuple) else out)
        return not torch.equal(*runs)

    assert differ()
    sides.leave_nothing_to_chance(module)
    assert not differ()


@pytest.mark.parametrize(
    ("out", "mode", "why"),
    [
        ("self.drop(out)", "train", ""),
        ("out.detach() / 2 + out / 2", "infer", ""),
        ("out.detach() / 2 + out / 2", "train", "training in float64: gradients differ by 1.0e+00, allowed 1e-09"),
        ("1.1 * out", "train", "training in float64: outputs differ by 9.1e-02, allowed 1e-09"),
        ("1.1 * out", "infer", "float32: outputs differ by 9.1e-02, allowed 1e-05"),
    ],
)
def test_official_code_is_compared_before_it_is_timed(out, mode, why, tmp_path, capsys):
    (tmp_path / "hilo.py").write_text(
        "from torch import nn\n"
        "from vizoo.backbones.layers import HiLo as Ours\n"
        "class HiLo(Ours):\n"
        "    def __init__(self, **kwargs):\n"
        "        super().__init__(**kwargs)\n"
        "        self.drop = nn.Dropout(0.5)\n"
        "    def forward(self, x, H, W):\n"
        "        out = super().forward(x, [H, W])\n"
        f"        return {out}\n",
        encoding="utf-8",
    )
    file = tmp_path / "out.csv"
    words = ["hilo", "--size", "4", "--mode", mode, "--rounds", "1", "--threads", "1", "--out", str(file)]
    assert bench.main([*words, "--official", str(tmp_path)]) == (1 if why else 0)
    if why:
        assert f"hilo, {why}; not timed" in capsys.readouterr().err
        assert not file.exists()
        return
    (row,) = rows_of(file)
    assert (row["peer"], row["mode"]) == ("official", mode)
    assert float(row["ratio_low"]) <= float(row["ratio"]) + 0.005
    assert float(row["ratio"]) - 0.005 <= float(row["ratio_high"])
    assert row["grad_error"] == "" if mode == "infer" else float(row["grad_error"]) < 1e-9


@pytest.mark.parametrize(
    ("name", "size"), [("test_overlock", 64), ("test_vit_tcpa", 96), ("ulsam", 6), ("halo", 16), ("reversed", 4)]
)
def test_both_sides_train_alike(name, size):
    """Also where one side splits the parameters of the other, and where chance has no rate."""
    found = sides.training_distances(sides.build_sides(name, (size, size)))
    assert set(found) == {"outputs", "gradients"}
    assert all(error < 1e-10 for error in found.values()), found


def test_every_case_is_there():
    """Names of the table stand for something: models of the zoo, layers, adapters."""
    for name, case in sides.CASES.items():
        if case.layer:
            assert hasattr(vizoo.backbones.layers, case.layer.ours)
        else:
            assert timm.list_models(name, module="")
        if isinstance(case.official, sides.Official):
            assert callable(getattr(official, case.official.adapter))
        assert sides.find_case(name) is case
    assert sides.find_case("litv2_s.r384_in1k") is sides.CASES["litv2_*"]
    assert sides.find_case("nat_mini") is sides.CASES["nat_*"]
    assert sides.find_case("halo_h0").peer is None


@pytest.mark.parametrize(
    ("words", "why"),
    [
        (["test_litv2"], "no official code is known for 'test_litv2'; it is known for hilo, aggregated, litv2_*"),
        (["halo_26t"], "there is no official code of HaloNet"),
        (["litv2_s"], "no classification/models/litv2.py there"),
        (["hilo", "--size", "4", "8"], "--size 4 8: 'hilo' takes the tokens of a square map; give one side"),
        (["litv2_s", "--size", "64", "96"], "--size 64 96: official code is built for square images; give one side"),
        (["litv2_s", "--reparam"], "--reparam: 'litv2_s' has no branches to merge"),
        (["halo_26t", "--alpha", "0.5"], "--alpha: is for 'hilo', got 'halo_26t'"),
    ],
)
def test_what_official_code_cannot_be(words, why, tmp_path, capsys):
    assert bench.main([*words, "--threads", "1", "--official", str(tmp_path)]) == 2
    err = capsys.readouterr().err
    assert why in err
    assert err.count("\n") == 1


def test_official_layer_gets_height_and_width(tmp_path):
    code = "from vizoo.backbones.layers import HiLo as Ours\nclass HiLo(Ours):\n    def forward(self, x, H, W):\n"
    (tmp_path / "hilo.py").write_text(f"{code}        return super().forward(x, [H, W])\n", encoding="utf-8")
    out = tmp_path / "out.csv"
    words = ["hilo", "--size", "4", "--window-size", "1", "--rounds", "1", "--threads", "1", "--dtype", "bf16"]
    assert bench.main([*words, "--official", str(tmp_path), "--out", str(out)]) == 0
    (row,) = rows_of(out)
    found = [row[k] for k in ("name", "peer", "shape", "dtype", "peer_dtype")]
    assert found == ["hilo w1 alpha 0.9", "official", "16x384", "bfloat16", "float32"]


def test_model_against_timm(tmp_path):
    out = tmp_path / "out.csv"
    assert bench.main(["halo_26t", "--rounds", "1", "--threads", "1", "--out", str(out)]) == 0
    assert [(r["peer"], r["shape"], r["peer_dtype"]) for r in rows_of(out)] == [("timm", "3x256x256", "float32")]


def test_timm_side_has_our_parameters():
    names = [name for name, case in sides.CASES.items() if case.against == "timm" and not case.layer]
    assert len(names) == 6
    for name in names:
        ours, theirs = timm.create_model(name, device="meta"), sides.CASES[name].peer()
        shapes = [{k: v.shape for k, v in m.state_dict().items()} for m in (ours, theirs)]
        assert shapes[0] == shapes[1], name


def test_official_side_from_a_checkout(tmp_path, monkeypatch):
    """The adapter imports the checkout's modules with the compiled layer replaced, and forgets them afterwards."""
    package = tmp_path / "classification" / "models"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("", encoding="utf-8")
    (package / "litv2.py").write_text(
        "from mm_modules.DCN.modules.deform_conv2d import DeformConv2dPack\n"
        "class LITv2(DeformConv2dPack):\n"
        "    def __init__(self, **kwargs):\n"
        "        super().__init__(3, 4, kernel_size=2, stride=2, padding=0)\n"
        "        self.kwargs = kwargs\n",
        encoding="utf-8",
    )

    def build(name, size):
        code = sides.find_official(name)
        return official.official_side(code.adapter, tmp_path, code.file, name=name, size=size, reparam=False)

    model = build("litv2_s_alpha05", 96)
    assert isinstance(model, nn.Module)
    assert (model.kwargs["alpha"], model.kwargs["img_size"], model.kwargs["embed_dim"]) == (0.5, 96, 96)
    assert build("litv2_b", 224).kwargs["num_heads"] == [4, 8, 16, 32]
    assert model(torch.zeros(1, 3, 6, 8)).shape == (1, 4, 3, 4)
    assert sorted(k for k, _ in model.named_parameters()) == [
        "bias",
        "conv_offset.bias",
        "conv_offset.weight",
        "weight",
    ]
    assert not [name for name in sys.modules if name.startswith(("mm_modules", "models."))]
    assert str(tmp_path / "classification") not in sys.path


def test_official_nat_from_a_checkout(tmp_path):
    """The stand-in for NATTEN 0.14 has its parameters and the outputs of our layer, also on small dilated maps."""
    from vizoo.backbones.layers import NeighborhoodAttention

    folder = tmp_path / "classification"
    folder.mkdir()
    (folder / "nat.py").write_text(
        "from natten import NeighborhoodAttention2D as NA\n"
        "from timm.models.registry import register_model\n"
        "@register_model\n"
        "def nat_mini():\n"
        "    return NA(8, num_heads=2, kernel_size=3, dilation=None, bias=True, qkv_bias=True, attn_drop=0.0)\n",
        encoding="utf-8",
    )
    (folder / "dinats.py").write_text(
        "from nat import NA\n"
        "def dinat_s_tiny():\n"
        "    return NA(8, num_heads=2, kernel_size=3, dilation=2, bias=True, qkv_bias=True, attn_drop=0.0)\n",
        encoding="utf-8",
    )
    natten = sys.modules.get("natten")
    for name, dilation in (("nat_mini", 1), ("dinat_s_tiny", 2)):
        code = sides.find_official(name)
        peer = official.official_side(code.adapter, tmp_path, code.file, name=name, size=224, reparam=False)
        nn.init.normal_(peer.rpb)
        layer = NeighborhoodAttention(8, num_heads=2, kernel_size=3, dilation=dilation)
        layer.load_state_dict(peer.state_dict(), strict=True)
        for size in ((9, 7), (4, 8)):
            x = torch.randn(2, *size, 8)
            golden_close(peer(x), layer(x), f"{name} {size}")
    assert sys.modules.get("natten") is natten
    assert timm.models.model_entrypoint("nat_mini").__module__ == "vizoo.backbones.nat"


@pytest.mark.parametrize(
    ("name", "asked"),
    [
        ("transnext_micro_aaaa", "transnext_micro_AAAA {'img_size': 96, 'pretrain_size': 256}"),
        ("transnext_base", "transnext_base {'img_size': 96, 'pretrain_size': 224}"),
        ("moh_vit_small_80", "moh_transnext_small_80 {'img_size': 96, 'pretrain_size': 224}"),
    ],
)
def test_official_transnext_from_a_checkout(name, asked, tmp_path):
    """It takes the attention in PyTorch, as it finds no package of its CUDA extension."""
    code = sides.find_official(name)
    (tmp_path / code.file).parent.mkdir()
    (tmp_path / code.file).write_text(
        "import pkg_resources, torch\n"
        "from timm.models.layers import DropPath\n"
        "try:\n"
        "    pkg_resources.get_distribution('swattention')\n"
        "except pkg_resources.DistributionNotFound:\n"
        "    from attention_native import found\n"
        f"def {asked.partition(' ')[0]}(**kwargs):\n"
        f"    return found(f'{asked.partition(' ')[0]} {{kwargs}}')\n",
        encoding="utf-8",
    )
    (tmp_path / code.file).with_name("attention_native.py").write_text(
        "import torch\ndef found(asked):\n    module = torch.nn.Identity()\n    module.asked = asked\n"
        "    return module\n",
        encoding="utf-8",
    )
    peer = official.official_side(code.adapter, tmp_path, code.file, name=name, size=96, reparam=False)
    assert peer.asked == asked
    assert "pkg_resources" not in sys.modules or sys.modules["pkg_resources"].__file__


def test_official_aggregated_attention_from_a_checkout(tmp_path):
    """The layer gets the positions that the official model hands in."""
    folder = tmp_path / "classification"
    folder.mkdir()
    (folder / "transnext.py").write_text(
        "from attention_native import AggregatedAttention\n"
        "import torch\n"
        "def get_relative_position_cpb(*sizes):\n"
        "    return tuple(torch.tensor(sizes[i:]) for i in (0, 2))\n",
        encoding="utf-8",
    )
    (folder / "attention_native.py").write_text(
        "from vizoo.backbones.layers import AggregatedAttention as Ours\n"
        "class AggregatedAttention(Ours):\n"
        "    def __init__(self, dim, input_resolution, num_heads, sr_ratio):\n"
        "        super().__init__(dim, num_heads, sr_ratio, pretrain_map=56)\n"
        "        assert input_resolution == (8, 8)\n"
        "    def forward(self, x, H, W, index, table):\n"
        "        assert index.tolist() == [[8, 8], [1, 1], [56, 56]] and table.tolist() == [[56, 56]]\n"
        "        return super().forward(x, [H, W])\n",
        encoding="utf-8",
    )
    found = sides.build_sides("aggregated", (8, 8), tmp_path)
    assert found.more == (8, 8)
    x = torch.randn(1, *found.shape)
    golden_close(found.peer(x, *found.more), found.ours(x))


def test_official_flowformer_from_a_checkout(tmp_path):
    code = sides.find_official("flowformer_19")
    (tmp_path / code.file).parent.mkdir()
    (tmp_path / code.file).write_text(
        "import cv2\nfrom numpy.lib.arraypad import pad\nfrom timm.models.layers import trunc_normal_\n"
        "from torch import nn\n"
        "class Flowformer(nn.Identity):\n    def __init__(self, **kwargs):\n"
        "        super().__init__()\n        self.kwargs = kwargs\n",
        encoding="utf-8",
    )
    peer = official.official_side(code.adapter, tmp_path, code.file, name="flowformer_19", size=64, reparam=False)
    assert (peer.kwargs["img_size"], peer.kwargs["depth"], peer.kwargs["init_values"]) == (64, [3, 3, 10, 3], 1e-5)
    assert "cv2" not in sys.modules or sys.modules["cv2"].__file__


@pytest.mark.parametrize(
    ("name", "size", "asked"),
    [("ninformer_cifar", 32, (256, 512, 64, 4, 0.0)), ("ninformer_tiny_patch16_224", 224, (192, 384, 196, 12, 0.0))],
)
def test_official_ninformer_from_a_checkout(name, size, asked, tmp_path):
    """The blocks of the repository between the layers of its training script."""
    code = sides.find_official(name)
    (tmp_path / code.file).write_text(
        "from torch import nn\nclass NiNformer(nn.Module):\n"
        "    def __init__(self, d_model, d_ffn, seq_len, num_layers, dropout):\n        super().__init__()\n"
        "        self.asked = d_model, d_ffn, seq_len, num_layers, dropout\n"
        "    def forward(self, x):\n        assert x.shape == (2, self.asked[2], self.asked[0])\n        return x\n",
        encoding="utf-8",
    )
    peer = official.official_side(code.adapter, tmp_path, code.file, name=name, size=size, reparam=False)
    assert peer.asked == asked
    ours = timm.create_model(name, device="meta")
    assert peer(torch.zeros(2, 3, size, size)).shape == (2, ours.num_classes)
    assert {"patcher.weight", "classifier.bias"} <= peer.state_dict().keys()


def test_official_tcpa_from_a_checkout(tmp_path):
    """With modes as a module has them, though its own take none, and without the GPU that it asks for."""
    name = "vit_base_patch16_224_tcpa"
    code = sides.find_official(name)
    (tmp_path / "models").mkdir()
    (tmp_path / "models" / "__init__.py").write_text("from models.missing import model\n", encoding="utf-8")
    (tmp_path / "models" / "TCPA.py").write_text("from train.utils import device\n", encoding="utf-8")
    (tmp_path / code.file).write_text(
        "from utils.args import *\nimport torch\nfrom torch import nn\n"
        "from models.utils import get_backbone, SimamModule\nfrom models.TCPA import device\n"
        "class Model_VFPT_TCPA(nn.Module):\n"
        "    def __init__(self, args):\n        super().__init__()\n        self.args, self.mode = args, ''\n"
        "        self.keys = nn.Parameter(torch.zeros(args.pool_size_cls, args.topk_image))\n"
        "        self.keys.to('cuda')\n        self.name = get_backbone\n"
        "    def train(self):\n        self.mode = 'train'\n"
        "    def eval(self):\n        self.mode = 'eval'\n",
        encoding="utf-8",
    )
    peer = official.official_side(code.adapter, tmp_path, code.file, name=name, size=224, reparam=False)
    assert peer.keys.shape == (18, 10)
    assert [peer.eval().mode, peer.train().mode, peer.train(False).mode] == ["eval", "train", "eval"]
    assert not [module for module in sys.modules if module.split(".")[0] in ("models", "train")]


@pytest.mark.parametrize(("name", "asked"), [("oat_small", (2, 2, 128, 4, 86)), ("oat_base", (4, 4, 512, 4, 86))])
def test_official_oat_from_a_checkout(name, asked, tmp_path):
    """Crops of the scene, first places, and codes that are ours and no weights."""
    code = sides.find_official(name)
    folder = (tmp_path / code.file).parent
    folder.mkdir(parents=True)
    (folder / "positionalEncoding.py").write_text(
        "import matplotlib.pyplot as plt\nfrom scipy.optimize import minimize\n", encoding="utf-8"
    )
    (tmp_path / code.file).write_text(
        "import torch\nfrom torch import nn\nfrom .positionalEncoding import *\n"
        "class Steps(nn.Module):\n    def __init__(self):\n        super().__init__()\n"
        "        self.register_buffer('pos_embedding', torch.zeros(5000, 1, 8))\n"
        "class Seq2SeqTransformer(nn.Module):\n    def __init__(self, *asked):\n        super().__init__()\n"
        "        self.asked, self.pe, self.onedpositional_encoding = asked, None, Steps()\n"
        "    def forward(self, *given):\n        self.given = given\n        return given[0][:1].float()\n",
        encoding="utf-8",
    )
    peer = official.official_side(code.adapter, tmp_path, code.file, name=name, size=800, reparam=False)
    assert peer.asked[:5] == asked
    assert not peer.state_dict()
    image = torch.rand(2, 3, 96, 140)
    assert peer(image).shape == (2, 1, 3)
    places, start, crops, blank, *_ = peer.given
    assert places[[0, 15, 83, 84], 0].tolist() == [[0, 0, 0], [1, 1, 0], [5, 13, 0], [0, 0, 1]]
    assert start.tolist() == [[[3, 7, 0]] * 2]
    ours = timm.create_model(name)
    boxes = ours._grid_boxes(image)[0].expand(2, -1, -1)
    cut = ours._cut(image, boxes, ours.crop_size).unflatten(0, (2, 84)).permute(0, 1, 3, 4, 2)
    close(crops[:, :84], cut, "same")
    close(crops[:, 84], cut[:, 0], "same")
    assert blank.shape == (2, 1, *ours.crop_size, 3)
    assert blank.min() == blank.max() == 1
    code = ours.place(torch.tensor([[3.0, 9.0]]), torch.ones(1))
    close(peer.pe[[3, 9, 1]].flatten()[: code.shape[1]], code[0], "same")


@pytest.mark.parametrize("name", sides.LAYERS)
@torch.inference_mode()
def test_both_sides_of_every_layer(name):
    """A new entry of the table is all that a layer needs: same weights, same outputs, a label without gaps."""
    found = sides.build_sides(name, (8, 8))
    x = torch.randn(2, *found.shape, generator=torch.Generator().manual_seed(0))
    ours, theirs = (side.eval()(x) for side in (found.ours, found.peer))
    first = [out[0] if isinstance(out, tuple) else out for out in (ours, theirs)]
    assert (first[0] - first[1]).norm() <= sides.TOLERANCE["float32"] * first[1].norm()
    assert found.label.startswith(name)
    assert found.against == sides.CASES[name].against
    assert x[0].numel() == 64 * sides.LAYERS[name].arguments["dim"]


def test_former_names_of_options(tmp_path):
    parse = bench.build_parser().parse_args
    assert parse(["hilo", "--window", "3", "--mode", "train"]) == parse(
        ["hilo", "--window-size", "3", "--pass", "train"]
    )
    assert parse(["--compile", "litv2_s"]) == parse(["litv2_s", "--compile", "default"])
    for words in (["hilo", "--mode", "both"], ["hilo", "--window", "0"]):
        with pytest.raises(bench.UserError, match=r"must be|invalid choice"):
            parse(words)


def test_height_and_width(tmp_path):
    out = tmp_path / "out.csv"
    words = ["--rounds", "1", "--threads", "1", "--out", str(out)]
    assert bench.main(["halo", "--size", "8", "16", *words]) == 0
    assert bench.main(["test_litv2", "--size", "32", "64", *words]) == 0
    assert [(r["name"], r["shape"]) for r in rows_of(out)] == [
        ("halo 64@8x16 b8 h3", "64x8x16"),
        ("test_litv2", "3x32x64"),
    ]


def test_json_and_files_hold_the_same_rows(tmp_path, capsys):
    out = tmp_path / "out.csv"
    words = ["ulsam", "--size", "2", "--rounds", "2", "--dtype", "fp32", "tf32", "--threads", "1", "2", "--json"]
    assert bench.main([*words, "--out", str(out)]) == 0
    found, rows = json.loads(capsys.readouterr().out), rows_of(out)
    assert [(r["threads"], r["dtype"]) for r in found] == [(n, d) for n in (1, 2) for d in ("float32", "tf32")]
    for values, texts in zip(found, rows, strict=True):
        assert set(values) == set(bench.COLUMNS)
        for key, text in texts.items():
            assert text == ("" if values[key] is None else format(values[key], bench.FORMATS.get(key, ""))), key
        assert values["ratio_low"] <= values["ratio"] <= values["ratio_high"]
    # of one round the ratio is that of the medians; of several it is the median of theirs
    words = ["ulsam", "--size", "2", "--rounds", "1", "--dtype", "fp32", "tf32", "--threads", "1", "--json"]
    assert bench.main([*words, "--out", str(out)]) == 0
    for values, texts in zip(json.loads(capsys.readouterr().out), rows_of(out)[len(rows) :], strict=True):
        assert f"{values['peer_median_ms'] / values['median_ms']:.2f}" == texts["ratio"]
