"""Official checkpoints as a user meets them: downloaded, from a file, with a wrong hash, unreadable."""

import functools
import hashlib
import http.server
import threading

import pytest
import timm
import torch
from golden import image, load, weights
from timm.models import set_pretrained_check_hash
from tolerance import golden_close

import vizoo  # noqa: F401
from vizoo.backbones.litv2 import checkpoint_filter_fn

CASE = "litv2_s"


@pytest.fixture(scope="module")
def official(tmp_path_factory):
    """A folder with a checkpoint as the official training script writes it."""
    yacs = pytest.importorskip("yacs.config", reason="yacs is absent, so no official checkpoint can be written")
    folder = tmp_path_factory.mktemp("releases")
    config = yacs.CfgNode({"MODEL": {"NAME": "litv2_small", "DROP_PATH_RATE": 0.2}, "AMP_OPT_LEVEL": "O1"})
    keys, _, _, _ = load(CASE)
    checkpoint = {
        "model": weights(keys),
        "optimizer": {"state": {}, "param_groups": [{"lr": 1e-3, "betas": (0.9, 0.999)}]},
        "lr_scheduler": {"last_epoch": 299},
        "max_accuracy": 82.0,
        "epoch": 299,
        "config": config,
    }
    torch.save(checkpoint, folder / "litv2_s.pth")
    digest = hashlib.sha256((folder / "litv2_s.pth").read_bytes()).hexdigest()[:8]
    for name in (f"right-{digest}.pth", "wrong-deadbeef.pth"):
        (folder / name).hardlink_to(folder / "litv2_s.pth")
    return folder


@pytest.fixture(scope="module")
def server(official):
    """Address of a local server of that folder."""

    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *args):
            pass

    handler = functools.partial(Quiet, directory=str(official))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as httpd:
        threading.Thread(target=httpd.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{httpd.server_port}"
        httpd.shutdown()


@pytest.fixture
def hash_check():
    set_pretrained_check_hash(True)
    yield
    set_pretrained_check_hash(False)


def check_outputs(model):
    _, _, shape, outputs = load(CASE)
    with torch.no_grad():
        golden_close(model.eval()(image(shape)), outputs["logits"])


def test_download(server, tmp_path):
    overlay = {"url": f"{server}/litv2_s.pth"}
    model = timm.create_model("litv2_s", pretrained=True, pretrained_cfg_overlay=overlay, cache_dir=tmp_path)
    check_outputs(model)
    assert (tmp_path / "litv2_s.pth").is_file()


def test_download_with_another_head_and_input(server, tmp_path):
    overlay = {"url": f"{server}/litv2_s.pth"}
    kwargs = {"pretrained": True, "pretrained_cfg_overlay": overlay, "cache_dir": tmp_path}
    model = timm.create_model("litv2_s", num_classes=7, in_chans=1, **kwargs)
    keys, _, _, _ = load(CASE)
    stem = weights({"patch_embed.proj.weight": keys["patch_embed.proj.weight"]})["patch_embed.proj.weight"]
    torch.testing.assert_close(model.patch_embed.proj.weight.detach(), stem.sum(1, keepdim=True))
    assert model(torch.zeros(1, 1, 64, 96)).shape == (1, 7)
    features = timm.create_model("litv2_s", features_only=True, out_indices=(1, 3), **kwargs)
    assert [tuple(f.shape[1:]) for f in features(torch.zeros(1, 3, 64, 96))] == [(192, 8, 12), (768, 2, 3)]


def test_hash(server, tmp_path, hash_check, official):
    right = next(p.name for p in official.iterdir() if p.name.startswith("right-"))
    overlay = {"url": f"{server}/{right}"}
    check_outputs(timm.create_model("litv2_s", pretrained=True, pretrained_cfg_overlay=overlay, cache_dir=tmp_path))
    overlay = {"url": f"{server}/wrong-deadbeef.pth"}
    with pytest.raises(RuntimeError, match="invalid hash value"):
        timm.create_model("litv2_s", pretrained=True, pretrained_cfg_overlay=overlay, cache_dir=tmp_path)
    assert not (tmp_path / "wrong-deadbeef.pth").exists()


def test_file(official):
    overlay = {"file": str(official / "litv2_s.pth")}
    check_outputs(timm.create_model("litv2_s", pretrained=True, pretrained_cfg_overlay=overlay))


def test_no_code_is_run_from_a_checkpoint(tmp_path):
    class Evil:
        def __reduce__(self):
            return exec, ("raise SystemExit('executed')",)

    torch.save({"model": {}, "config": Evil()}, tmp_path / "evil.pth")
    with pytest.raises(Exception, match=r"(?i)weights.only"):
        timm.create_model("test_litv2", pretrained=True, pretrained_cfg_overlay={"file": str(tmp_path / "evil.pth")})


def test_filter_leaves_our_state_dicts_alone():
    model = timm.create_model("test_litv2")
    state = model.state_dict()
    headless = {k: v for k, v in sorted(state.items(), reverse=True) if not k.startswith("head.")}
    for given in (state, headless):
        returned = checkpoint_filter_fn(given, model)
        assert list(returned) == list(given)
        assert all(returned[k] is given[k] for k in given)
    wrapped = {"state_dict": {f"module.{k}": v for k, v in state.items()}}
    assert list(checkpoint_filter_fn(wrapped, model)) == list(state)


def test_window_size_needs_no_other_weights():
    state = timm.create_model("test_litv2").state_dict()
    model = timm.create_model("test_litv2", window_size=4, num_classes=1000)
    model.load_state_dict(state)
    assert [b.attn.window_size for b in model.stages[2].blocks] == [4, 4]


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"window_size": -1}, "window_size=-1"),
        ({"window_size": (0, 2, 1)}, r"window_size=\(0, 2, 1\)"),
        ({"alpha": 2.0}, "alpha=2.0"),
        ({"feature_norms": (4,)}, r"feature_norms=\(4,\)"),
        ({"feature_norms": (1,), "features_only": True, "feature_cls": "hook"}, "feature_cls='hook'"),
    ],
)
def test_bad_arguments(kwargs, message):
    with pytest.raises(ValueError, match=message):
        timm.create_model("test_litv2", **kwargs)


def test_too_small_images_are_named():
    model = timm.create_model("test_litv2").eval()
    with torch.no_grad():
        assert model(torch.zeros(1, 3, 29, 32)).shape == (1, 1000)
        with pytest.raises(ValueError, match="at least 32x32 pixels"):
            model(torch.zeros(1, 3, 28, 32))
