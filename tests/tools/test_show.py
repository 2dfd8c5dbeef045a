"""Pictures of attention: maps where they belong, bad input in one line."""

from __future__ import annotations

import numpy as np
import pytest
import timm
import torch
from PIL import Image

from vizoo.tools import cli, show


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
    assert cli.main([*words, "--out", str(out)]) == 0
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
        (["/nowhere.png", "--model", "test_medusa", "--checkpoint", "{weights}"], "image '/nowhere.png': no such file"),
        (["{weights}", "--model", "test_medusa", "--checkpoint", "{weights}"], "cannot identify image file"),
        (["{photo}", "--model", "test_medusa", "--checkpoint", "{weights}", "--out", "a.txt"], "ending must be .png"),
        (["{photo}", "--model", "test_medusa", "--checkpoint", "{weights}", "--out", "/no/a.png"], "no such folder"),
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
