"""Pictures of attention: maps where they belong, bad input in one line."""

from __future__ import annotations

import os

import numpy as np
import pytest
import timm
import torch
from PIL import Image

from vizoo.tools import cli, show

DEPENDENCY = "test_dependencyvit_lite"


@pytest.fixture
def photo(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 255, (60, 90, 3)).astype(np.uint8)
    Image.fromarray(pixels).save(tmp_path / "photo.png")
    return tmp_path / "photo.png"


@pytest.fixture
def weights(tmp_path):
    torch.manual_seed(0)
    torch.save(timm.create_model("test_medusa").state_dict(), tmp_path / "m.pth")
    return tmp_path / "m.pth"


def test_every_map_is_drawn_over_the_image(photo, weights, tmp_path, monkeypatch, capsys):
    drawn, draw = [], show.draw_attention

    def spy(*args):
        drawn.append(args)
        draw(*args)

    monkeypatch.setattr(show, "draw_attention", spy)
    out = tmp_path / "a.png"
    words = ["show", str(photo), "--model", "test_medusa", "--checkpoint", str(weights), "--img-size", "64"]
    assert cli.main([*words, "--plot", str(out)]) == 0
    assert "4 maps of test_medusa" in capsys.readouterr().out
    image, whole, local, *_ = drawn[0]
    assert image.shape == (3, 64, 96)
    model = timm.create_model("test_medusa", checkpoint_path=str(weights)).eval()
    mean, std = (torch.tensor(model.default_cfg[k])[:, None, None] for k in ("mean", "std"))
    with torch.no_grad():
        expected = model.attention_maps(((image - mean) / std)[None])
    torch.testing.assert_close(whole, expected[0][0])
    for a, b in zip(local, expected[1], strict=True):
        torch.testing.assert_close(a, b[0])
    with Image.open(out) as picture:
        width, height = picture.size
        assert width > 3 * height
        assert len(picture.convert("RGB").getcolors(10**6)) > 1000


def test_channel_maps_and_gray(tmp_path):
    maps = [torch.rand(5, 4, 4), torch.rand(5, 2, 2)]
    show.draw_attention(torch.rand(1, 32, 24), torch.rand(1, 16, 16), maps, tmp_path / "a.png", "title")
    with Image.open(tmp_path / "a.png") as picture:
        assert len(picture.convert("RGB").getcolors(10**6)) > 500


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["{photo}", "--model", "test_medusa"], "--checkpoint is missing"),
        (["{photo}", "--model", "medusa_x", "--checkpoint", "{weights}"], "unknown model 'medusa_x'"),
        (["{photo}", "--model", "medusa_*", "--checkpoint", "{weights}"], "matches 5 models; name one"),
        (["{photo}", "--model", "test_resnet", "--checkpoint", "{weights}"], "does not fit 'test_resnet'"),
        (
            ["/nowhere.png", "--model", "test_medusa", "--checkpoint", "{weights}"],
            "'/nowhere.png' does not exist",
        ),
        (["{weights}", "--model", "test_medusa", "--checkpoint", "{weights}"], "cannot identify image file"),
        (["{photo}", "--model", "test_medusa", "--checkpoint", "{weights}", "--plot", "a.txt"], "ending must be .png"),
        (["{photo}", "--model", "test_medusa", "--checkpoint", "{weights}", "--plot", "/no/a.png"], "no such folder"),
    ],
)
def test_bad_input_is_one_line(words, message, photo, weights, capsys):
    assert cli.main(["show", *(w.format(photo=photo, weights=weights) for w in words)]) == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1, err
    assert message in err


def test_model_without_maps(photo, tmp_path, capsys):
    torch.save(timm.create_model("test_resnet").state_dict(), tmp_path / "r.pth")
    assert cli.main(["show", str(photo), "--model", "test_resnet", "--checkpoint", str(tmp_path / "r.pth")]) == 2
    assert "'test_resnet' has no attention maps to draw; allowed: medusa_*" in capsys.readouterr().err


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


@pytest.mark.parametrize("command", [["show", "--model", "test_medusa"], ["dependency", "--model", DEPENDENCY]])
@pytest.mark.parametrize("case", BAD_PICTURES)
def test_bad_pictures_are_one_line(case, command, tmp_path, capsys):
    make, message = BAD_PICTURES[case]
    make(tmp_path / "a.png")
    torch.save(timm.create_model(command[-1]).state_dict(), tmp_path / "m.pth")
    words = [*command, str(tmp_path / "a.png"), "--checkpoint", str(tmp_path / "m.pth"), "--img-size", "64"]
    assert cli.main([*words, "--plot", str(tmp_path / "out.png")]) == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1, err
    assert message in err
    assert not (tmp_path / "out.png").exists()


@pytest.mark.parametrize("command", ["show", "dependency"])
@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--img-size 0", "--img-size: got 0, must be a whole number of at least 1"),
        ("--img-size -5", "--img-size: got -5"),
        ("--img-size 1.5", "--img-size: got 1.5"),
        ("--img-size 100000", "--img-size 100000 makes "),
        ("--num-classes 0", "--num-classes: got 0"),
        ("--num-classes -1", "--num-classes: got -1"),
        ("--window 0", "--window: expected 2 arguments"),
        ("--window nan 10", "--window: window of centre nan and width 10"),
        ("--window 1 -10", "width -10: need a finite centre and a width above 0"),
        ("--window a b", "--window: invalid float value: 'a'"),
        ("--model-kwargs foo", "--model-kwargs: got 'foo', must be KEY=VALUE"),
    ],
)
def test_bad_options_are_one_line(words, message, command, photo, tmp_path, capsys):
    model = {"show": "test_medusa", "dependency": DEPENDENCY}[command]
    torch.save(timm.create_model(model).state_dict(), tmp_path / "m.pth")
    given = [command, str(photo), "--model", model, "--checkpoint", str(tmp_path / "m.pth"), *words.split()]
    assert cli.main([*given, "--plot", str(tmp_path / "out.png")]) == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1, err
    assert message in err
    assert not (tmp_path / "out.png").exists()


@pytest.mark.parametrize(
    ("command", "value"), [("show", float("nan")), ("dependency", float("nan")), ("dependency", float("inf"))]
)
def test_broken_weights_draw_nothing(value, command, photo, tmp_path, capsys):
    model = {"show": "test_medusa", "dependency": DEPENDENCY}[command]
    state = timm.create_model(model).state_dict()
    key = next(k for k, v in state.items() if v.dim() == 4)
    state[key].fill_(value)
    torch.save(state, tmp_path / "m.pth")
    words = [command, str(photo), "--model", model, "--checkpoint", str(tmp_path / "m.pth"), "--img-size", "64"]
    assert cli.main([*words, "--plot", str(tmp_path / "out.png")]) == 1
    err = capsys.readouterr().err
    assert err.count("\n") == 1, err
    assert "NaN" in err
    assert not (tmp_path / "out.png").exists()


@pytest.mark.parametrize("command", ["show", "dependency"])
def test_former_name_of_plot(command, photo, tmp_path, capsys):
    """``--out``, as the option was called, still draws the same picture and is checked alike, but is not shown."""
    model = {"show": "test_medusa", "dependency": DEPENDENCY}[command]
    torch.save(timm.create_model(model).state_dict(), tmp_path / "m.pth")
    words = [command, str(photo), "--model", model, "--checkpoint", str(tmp_path / "m.pth"), "--img-size", "64"]
    for option in ("--plot", "--out"):
        assert cli.main([*words, option, str(tmp_path / f"{option[2:]}.png")]) == 0
    assert (tmp_path / "plot.png").read_bytes() == (tmp_path / "out.png").read_bytes()
    capsys.readouterr()
    assert cli.main([*words, "--out", "a.txt"]) == 2
    assert "--plot 'a.txt': the ending must be .png" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        cli.main([command, "--help"])
    shown = capsys.readouterr().out
    assert "--plot FILE" in shown
    assert "--out" not in shown


def test_picture_is_turned_and_windowed(tmp_path):
    """What the model sees is the image as a viewer shows it, with the window that was asked for."""
    exif = Image.Exif()
    exif[274] = 6
    pixels = np.add.outer(np.arange(64) * 500, np.arange(96) * 300).astype(np.uint16)
    Image.fromarray(pixels).save(tmp_path / "a.png", exif=exif)
    data = {"input_size": (1, 64, 64), "mean": (0.5,), "std": (0.5,)}
    x, _ = show.read_input(str(tmp_path / "a.png"), data, 64, (30000, 20000))
    expected = np.rot90((pixels - 29999.5) / 19999 + 0.5, -1).clip(0, 1)
    assert x.shape == (1, 1, 96, 64)
    assert np.abs(x[0, 0].numpy() - expected).max() < 0.01
