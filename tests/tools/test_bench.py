import csv
import json
import time

import pytest
import timm
import torch
from tolerance import golden_close
from torch import nn

from vizoo.tools import bench
from vizoo.tools.profiling import official, sides


def rows_of(path):
    with open(path, encoding="utf-8") as f:
        return list(csv.DictReader(f))


@pytest.mark.parametrize("extra", [[], ["--pass", "train"], ["--channels-last", "--batch", "1", "2"]], ids=str)
def test_model_against_plain(extra, tmp_path, capsys):
    out = tmp_path / "out.csv"
    words = ["test_litv2", "--rounds", "2", "--threads", "1", "--size", "64", "--out", str(out), *extra]
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
    assert "speed-up" in capsys.readouterr().out


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
    assert bench.main(words) == 0
    assert [(r["name"], r["peer"], r["shape"]) for r in rows_of(out)] == [("halo 64@16 b8 h3", "timm", "64x16x16")]
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


def test_official_code_that_fails_is_one_line(tmp_path, capsys):
    (tmp_path / "hilo.py").write_text("raise KeyError('moved')\n", encoding="utf-8")
    assert bench.main(["hilo", "--threads", "1", "--official", str(tmp_path)]) == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1
    assert "'hilo' cannot be built with --official" in err


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
    words = ["halo_26t", "--dtype", "bfloat16", "--rounds", "1", "--threads", "1", "--out", str(out)]
    assert bench.main(words) == 0
    assert [(r["peer"], r["shape"], r["peer_dtype"]) for r in rows_of(out)] == [("timm", "3x256x256", "bfloat16")]


def test_timm_side_has_our_parameters():
    for name in official.TIMM:
        ours, theirs = timm.create_model(name, device="meta"), official.timm_model(name)
        shapes = [{k: v.shape for k, v in m.state_dict().items()} for m in (ours, theirs)]
        assert shapes[0] == shapes[1], name
    assert official.timm_model("litv2_s") is None


def test_official_side_from_a_checkout(tmp_path, monkeypatch):
    """The adapter imports the checkout's modules with the compiled layer replaced, and forgets them afterwards."""
    import sys

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
    model = official.official_model(tmp_path, "litv2_s_alpha05", 96)
    assert isinstance(model, nn.Module)
    assert (model.kwargs["alpha"], model.kwargs["img_size"], model.kwargs["embed_dim"]) == (0.5, 96, 96)
    assert official.official_model(tmp_path, "litv2_b", 224).kwargs["num_heads"] == [4, 8, 16, 32]
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
    import sys

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
        peer = official.official_model(tmp_path, name, 224)
        nn.init.normal_(peer.rpb)
        layer = NeighborhoodAttention(8, num_heads=2, kernel_size=3, dilation=dilation)
        layer.load_state_dict(peer.state_dict(), strict=True)
        for size in ((9, 7), (4, 8)):
            x = torch.randn(2, *size, 8)
            golden_close(peer(x), layer(x), f"{name} {size}")
    assert sys.modules.get("natten") is natten
    assert timm.models.model_entrypoint("nat_mini").__module__ == "vizoo.backbones.nat"


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
    assert found.against == sides.LAYERS[name].against
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
    words = ["ulsam", "--size", "2", "--rounds", "1", "--dtype", "fp32", "tf32", "--threads", "1", "2", "--json"]
    assert bench.main([*words, "--out", str(out)]) == 0
    found, rows = json.loads(capsys.readouterr().out), rows_of(out)
    assert [(r["threads"], r["dtype"]) for r in found] == [(n, d) for n in (1, 2) for d in ("float32", "tf32")]
    for values, texts in zip(found, rows, strict=True):
        assert set(values) == set(bench.COLUMNS)
        for key, text in texts.items():
            assert text == format(values[key], bench.FORMATS.get(key, "")), key
        assert f"{values['peer_median_ms'] / values['median_ms']:.2f}" == texts["ratio"]
