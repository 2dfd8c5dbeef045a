"""Pictures of what models see: panels where they belong, bad input in one line."""

from __future__ import annotations

import os

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from torch import nn

from vizoo.backbones.layers import Panel
from vizoo.tools import cli, show
from vizoo.tools.pictures.draw import draw_panels

MODEL = ["--model", "test_dependencyvit_lite"]


@pytest.fixture
def photo(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 255, (60, 90, 3)).astype(np.uint8)
    Image.fromarray(pixels).save(tmp_path / "photo.png")
    return tmp_path / "photo.png"


@pytest.fixture
def drawn(monkeypatch):
    """What is drawn: image, panels, path and title of each picture."""
    calls, draw = [], draw_panels

    def spy(*args):
        calls.append(args)
        draw(*args)

    monkeypatch.setattr("vizoo.tools.pictures.draw.draw_panels", spy)
    return calls


def test_explain_is_drawn_over_what_the_model_got(photo, drawn, tmp_path, capsys):
    torch.save(timm.create_model("test_medusa").state_dict(), tmp_path / "m.pth")
    out = tmp_path / "a.png"
    words = ["show", str(photo), "--model", "test_medusa", "--checkpoint", str(tmp_path / "m.pth"), "--img-size", "64"]
    assert cli.main([*words, "--plot", str(out)]) == 0
    said = capsys.readouterr()
    assert said.err == ""
    image, panels, _, title = drawn[0]
    assert said.out.splitlines() == [f"{out}: test_medusa over {photo}, 64x96", *(f"  {p.title}" for p in panels)]
    assert title == "test_medusa: photo.png as 64x96"
    assert image.shape == (3, 64, 96)
    model = timm.create_model("test_medusa", checkpoint_path=str(tmp_path / "m.pth")).eval()
    mean, std = (torch.tensor(model.default_cfg[k])[:, None, None] for k in ("mean", "std"))
    expected = model.explain(((image - mean) / std)[None])
    assert len(panels) == 5
    for a, b in zip(panels, expected, strict=True):
        torch.testing.assert_close(a.heat, b.heat)
    with Image.open(out) as picture:
        assert picture.size[0] <= 1600
        assert len(picture.convert("RGB").getcolors(10**6)) > 1000


def test_settings_point_and_views(photo, drawn, tmp_path, capsys, monkeypatch):
    """Settings reach the model, the point as fractions of what it gets; views are drawn in the order asked for."""
    asked = []

    def explain(self, image, point=(0.5, 0.5), size=1):
        asked.append((tuple(image.shape), point, size))
        return [Panel(title="own", points=torch.tensor([point]))]

    monkeypatch.setattr(type(timm.create_model("test_resnet")), "explain", explain, raising=False)
    words = ["show", str(photo), "--model", "test_resnet", "--img-size", "64", "--plot", str(tmp_path / "a.png")]
    assert cli.main([*words, "--point", "45", "15", "--explain-kwargs", "size=3"]) == 0
    assert asked == [((1, 3, 64, 96), (0.25, 0.5), 3)]
    assert cli.main([*words, "--view", "receptive-field", "explain", "grad-cam", "--class", "7"]) == 0
    titles = [p.title for p in drawn[1][1]]
    assert [t.split()[0] for t in titles] == ["Effective", "own", "Grad-CAM"]
    assert "class 7 " in titles[2]
    assert "test_resnet, untrained" in drawn[1][3]
    assert "untrained weights" in capsys.readouterr().err


def test_models_of_one_size_get_the_middle(photo, drawn, tmp_path):
    words = ["show", str(photo), "--model", "test_vit", "--plot", str(tmp_path / "a.png")]
    assert cli.main([*words, "--point", "16", "59.9"]) == 0
    image, panels, *_ = drawn[0]
    side = timm.create_model("test_vit").pretrained_cfg["input_size"][-1]
    assert image.shape == (3, side, side)
    assert [p.title.split()[0] for p in panels] == ["Grad-CAM", "Effective"]
    row, column = panels[1].points[0].tolist()
    assert row > 0.9
    assert column < 0.1
    with Image.open(photo) as whole:
        middle = np.asarray(whole.crop((15, 0, 75, 60)).resize((side, side), Image.Resampling.BICUBIC))
    assert np.abs(image.permute(1, 2, 0).numpy() * 255 - middle).mean() < 2


def test_untrained_weights_are_called_untrained_and_repeat(photo, tmp_path, capsys):
    pictures = []
    for name in ("a.png", "b.png"):
        out = tmp_path / name
        assert cli.main(["show", str(photo), *MODEL, "--plot", str(out)]) == 0
        said = capsys.readouterr()
        assert "untrained weights" in said.err
        assert "Dependency tree" in said.out
        pictures.append(out.read_bytes())
    assert pictures[0] == pictures[1]


def test_photo_of_scikit_learn(drawn, tmp_path):
    words = ["show", "flower", *MODEL, "--img-size", "48", "--plot", str(tmp_path / "a.png")]
    assert cli.main(words) == 0
    assert drawn[0][0].shape == (3, 48, 64 if drawn[0][0].shape[2] == 64 else 80)
    assert cli.main(["show", *MODEL, "--img-size", "48", "--plot", str(tmp_path / "a.png")]) == 0
    assert "china" in drawn[1][3]


def test_one_token_and_gray(tmp_path):
    Image.fromarray(np.full((20, 20), 90, np.uint8)).save(tmp_path / "gray.png")
    words = ["show", str(tmp_path / "gray.png"), *MODEL, "--model-kwargs", "in_chans=1", "--img-size", "9"]
    assert cli.main([*words, "--plot", str(tmp_path / "a.png")]) == 0
    assert (tmp_path / "a.png").stat().st_size > 1000


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["{photo}", "--model", "medusa_x"], "unknown model 'medusa_x'"),
        (["{photo}", "--model", "medusa_*"], "matches 5 models; name one"),
        (["{photo}", *MODEL, "--checkpoint", "{photo}"], "photo.png' does not fit 'test_dependencyvit_lite'"),
        (["/nowhere.png", *MODEL], "image '/nowhere.png' does not exist"),
        (["{photo}", *MODEL, "--plot", "a.txt"], "ending must be .png"),
        (["{photo}", *MODEL, "--plot", "/no/a.png"], "no such folder"),
        (["{photo}", *MODEL, "--explain-kwargs", "layers=5"], "got layers=5, need 1 to 4"),
        (
            ["{photo}", *MODEL, "--img-size", "640", "--explain-kwargs", "method=edmonds"],
            "got method='edmonds' for",
        ),
        (["{photo}", *MODEL, "--img-size", "1280"], "need at most 4,096 tokens"),
        (["{photo}", "--model", "test_vit", "--point", "5", "5"], "columns 15 to 74 and rows 0 to 59 that the model"),
        (["{photo}", "--model", "test_oat", "--view", "grad-cam"], "--view grad-cam: OAT gives no classes"),
    ],
)
def test_bad_input_is_one_line(words, message, photo, capsys):
    assert cli.main(["show", *(w.format(photo=photo) for w in words)]) == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1, err
    assert message in err


BAD_PICTURES = {
    "folder": (lambda p: p.mkdir(), "is a folder, need a file"),
    "pipe": (lambda p: os.mkfifo(p), "is a pipe or device, need a file"),
    "text": (lambda p: p.write_text("no image"), "cannot identify image file"),
    "cut": (lambda p: (Image.new("RGB", (90, 90), "red").save(p), p.write_bytes(p.read_bytes()[:150])), "truncated"),
    "thin": (lambda p: Image.new("RGB", (5000, 1)).save(p), "is 5000x1 pixels: sides of at most 1 to 16"),
    "film": (
        lambda p: Image.new("L", (9, 9)).save(p, save_all=True, append_images=[Image.new("L", (9, 9), 9)]),
        "2 frames in one PNG file",
    ),
}


@pytest.mark.parametrize("case", BAD_PICTURES)
def test_bad_pictures_are_one_line(case, tmp_path, capsys):
    make, message = BAD_PICTURES[case]
    make(tmp_path / "a.png")
    words = ["show", str(tmp_path / "a.png"), "--model", "test_medusa", "--img-size", "64"]
    assert cli.main([*words, "--plot", str(tmp_path / "out.png")]) == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1, err
    assert message in err
    assert not (tmp_path / "out.png").exists()


@pytest.mark.parametrize("name", ["test_medusa", "test_dependencyvit_lite", "test_resnet"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_broken_weights_draw_nothing(name, value, photo, tmp_path, capsys):
    state = timm.create_model(name).state_dict()
    key = next(k for k, v in state.items() if v.dim() == 4)
    state[key].fill_(value)
    torch.save(state, tmp_path / "m.pth")
    words = ["show", str(photo), "--model", name, "--checkpoint", str(tmp_path / "m.pth"), "--img-size", "64"]
    assert cli.main([*words, "--plot", str(tmp_path / "out.png")]) == 1
    err = capsys.readouterr().err
    assert err.count("\n") == 1, err
    assert "NaN" in err
    assert not (tmp_path / "out.png").exists()


def test_former_name_of_plot(photo, tmp_path, capsys):
    """``--out``, as the option was called, still draws the same picture and is checked alike, but is not shown."""
    words = ["show", str(photo), "--model", "test_medusa", "--img-size", "64"]
    for option in ("--plot", "--out"):
        assert cli.main([*words, option, str(tmp_path / f"{option[2:]}.png")]) == 0
    assert (tmp_path / "plot.png").read_bytes() == (tmp_path / "out.png").read_bytes()
    capsys.readouterr()
    assert cli.main([*words, "--out", "a.txt"]) == 2
    assert "--plot 'a.txt': the ending must be .png" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        cli.main(["show", "--help"])
    shown = capsys.readouterr().out
    assert "--plot FILE" in shown
    assert "--out" not in shown


def test_picture_is_turned_and_windowed(tmp_path):
    """What the model sees is the image as a viewer shows it, with the window that was asked for."""
    exif = Image.Exif()
    exif[274] = 6
    pixels = np.add.outer(np.arange(64) * 500, np.arange(96) * 300).astype(np.uint16)
    Image.fromarray(pixels).save(tmp_path / "a.png", exif=exif)
    model = nn.Conv2d(1, 1, 1)
    x = show.read_input(str(tmp_path / "a.png"), model, 64, (30000, 20000), None).pixels
    expected = np.rot90((pixels - 29999.5) / 19999 + 0.5, -1).clip(0, 1)
    assert x.shape == (1, 1, 96, 64)
    assert np.abs(x[0, 0].numpy() - expected).max() < 0.01
