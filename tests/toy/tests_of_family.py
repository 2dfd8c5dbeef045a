"""Toy: official outputs, auxiliary loss, phases and pictures."""

import timm
import torch
from golden import image, load, weights
from panels import check_family_explains, explained
from tolerance import golden_close

from vizoo.backbones import toy
from vizoo.tools import cli


def test_official_outputs():
    keys, _, shape, outputs = load("toy")
    model = timm.create_model("test_toy", aux_head=True).eval()
    model.load_state_dict(toy.checkpoint_filter_fn(weights(keys), model))
    with torch.no_grad():
        golden_close(model(image(shape)), outputs["out_0"], "logits")


def test_auxiliary_classifier_and_phases_are_trained(tmp_path, capsys):
    torch.manual_seed(0)
    before = timm.create_model("test_toy", aux_head=True, in_chans=1)
    torch.save(before.state_dict(), tmp_path / "start.pth")
    words = ["train", "--data", "digits", "--model", "test_toy", "--in-chans", "1", "--model-kwargs", "aux_head=True"]
    words += ["--initial-checkpoint", str(tmp_path / "start.pth"), "--epochs", "2", "--warmup-epochs", "0", "-j", "0"]
    assert cli.main([*words, "-b", "256", "--output", str(tmp_path), "--experiment", "run"]) == 0
    said = capsys.readouterr().out
    assert "from epoch 1 on: " in said
    assert "learn, at 0.5 of the learning rate" in said
    after = torch.load(tmp_path / "run" / "last.pth.tar", weights_only=True)["state_dict"]
    changed = {k.partition(".")[0] for k, v in before.named_parameters() if not torch.equal(v, after[k])}
    assert {"aux_head", "head", "stages", "stem"} <= changed


def test_explain():
    model = timm.create_model("test_toy").eval()
    (panel,) = explained(model, torch.randn(1, 3, 64, 96), stage=2)
    assert panel.heat.shape == (8, 12)
    check_family_explains(toy)
