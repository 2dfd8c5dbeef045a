"""Pictures of dependency trees: what is drawn is what the model recorded; bad input in one line."""

from __future__ import annotations

import numpy as np
import pytest
import timm
import torch
from PIL import Image

from vizoo.backbones.layers import dependency_tree, subtrees
from vizoo.tools import cli, dependency

MODEL = ["--model", "test_dependencyvit_lite"]


@pytest.fixture
def photo(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 255, (60, 90, 3)).astype(np.uint8)
    Image.fromarray(pixels).save(tmp_path / "photo.png")
    return tmp_path / "photo.png"


def test_what_the_model_recorded_is_drawn_over_the_image(photo, tmp_path, monkeypatch, capsys):
    drawn, draw = [], dependency.draw_dependency

    def spy(*args):
        drawn.append(args)
        draw(*args)

    monkeypatch.setattr(dependency, "draw_dependency", spy)
    torch.manual_seed(0)
    weights, out = tmp_path / "m.pth", tmp_path / "a.png"
    torch.save(timm.create_model(MODEL[1], num_classes=7).state_dict(), weights)
    words = ["dependency", str(photo), *MODEL, "--checkpoint", str(weights), "--num-classes", "7", "--img-size", "64"]
    options = ["--method", "edmonds", "--layers", "3", "--parts", "3", "--min-size", "2", "--plot", str(out)]
    assert cli.main(words + options) == 0
    said = capsys.readouterr()
    assert "edmonds tree of 4x6 tokens, root at row" in said.out
    assert said.err == ""
    pixels, found, tree, parts, *_ = drawn[0]
    assert pixels.shape == (3, 64, 96)
    model = timm.create_model(MODEL[1], num_classes=7, checkpoint_path=str(weights)).eval()
    model.set_record_dependency()
    mean, std = (torch.tensor(model.default_cfg[k])[:, None, None] for k in ("mean", "std"))
    with torch.no_grad():
        model(((pixels - mean) / std)[None])
    expected = model.get_dependency(3)
    torch.testing.assert_close(found.masks, expected.masks)
    assert torch.equal(tree.parents, dependency_tree(found, "edmonds").parents)
    assert torch.equal(parts, subtrees(found, tree, 3, 2))
    with Image.open(out) as picture:
        width, height = picture.size
        assert width > 2 * height
        assert len(picture.convert("RGB").getcolors(10**6)) > 1000


def test_untrained_weights_are_called_untrained_and_repeat(photo, tmp_path, capsys):
    pictures = []
    for name in ("a.png", "b.png"):
        out = tmp_path / name
        assert cli.main(["dependency", str(photo), *MODEL, "--plot", str(out)]) == 0
        said = capsys.readouterr()
        assert "untrained weights" in said.err
        assert "greedy tree of 6x9 tokens" in said.out
        pictures.append(out.read_bytes())
    assert pictures[0] == pictures[1]


def test_photo_of_scikit_learn(tmp_path, capsys):
    words = ["dependency", "flower", *MODEL, "--img-size", "48", "--plot", str(tmp_path / "a.png")]
    assert cli.main(words) == 0
    assert "tree of 3x4 tokens" in capsys.readouterr().out


def test_one_token_and_gray(tmp_path):
    Image.fromarray(np.full((20, 20), 90, np.uint8)).save(tmp_path / "gray.png")
    words = ["dependency", str(tmp_path / "gray.png"), *MODEL, "--model-kwargs", "in_chans=1", "--img-size", "9"]
    assert cli.main([*words, "--plot", str(tmp_path / "a.png")]) == 0
    assert (tmp_path / "a.png").stat().st_size > 1000


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["{photo}", "--model", "dependencyvit_*"], "matches 4 models; name one"),
        (["{photo}", "--model", "test_resnet"], "'test_resnet' has no dependency tree; allowed: dependencyvit_*"),
        (["{photo}", *MODEL, "--checkpoint", "{photo}"], "photo.png' does not fit 'test_dependencyvit_lite'"),
        (["/nowhere.png", *MODEL], "image '/nowhere.png' does not exist"),
        (["{photo}", *MODEL, "--plot", "a.txt"], "ending must be .png"),
        (["{photo}", *MODEL, "--plot", "/no/a.png"], "no such folder"),
        (["{photo}", *MODEL, "--layers", "5"], "--layers 5: from 1 to 4, the layers of test_dependencyvit_lite"),
        (["{photo}", *MODEL, "--parts", "0"], "--parts: got 0, must be a whole number of at least 1"),
        (["{photo}", *MODEL, "--min-size", "-1"], "--min-size: got -1, must be a whole number of at least 1"),
        (["{photo}", *MODEL, "--img-size", "640", "--method", "edmonds"], "--method edmonds: got method='edmonds' for"),
    ],
)
def test_bad_input_is_one_line(words, message, photo, capsys):
    assert cli.main(["dependency", *(w.format(photo=photo) for w in words)]) == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1, err
    assert message in err
