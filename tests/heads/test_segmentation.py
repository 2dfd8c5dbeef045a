"""Segmentors: mmseg's names, sizes and values, every family, loss, checkpoints; learning is tested with the trainer."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from golden import image, load, thin, weights
from tolerance import close, golden_close
from torch import nn
from zoo import PYRAMIDS, each_pyramid

from vizoo.heads.checkpoints import convert_checkpoint, read_checkpoint
from vizoo.heads.segmentation import ARCHS, FPN, FCNHead, FPNHead, UPerHead, load_segmentor, segmentor

COUNTS = {  # specification of the stock heads, 150 classes: UPerNet with auxiliary head, Semantic FPN
    (96, 192, 384, 768): (32_421_164, 4_373_142),
    (128, 256, 512, 1024): (34_534_700, 4_496_022),
    (64, 128, 384, 640): (31_520_044, 4_315_798),
    (64, 128, 448, 640): (31_700_268, 4_332_182),
    (80, 160, 528, 720): (32_482_604, 4_385_430),
    (64, 128, 256, 512): (30_307_628, 4_250_262),
    (192, 384, 768, 1536): (38_761_772, 4_741_782),
}


def size(*modules: nn.Module) -> int:
    return sum(p.numel() for m in modules for p in m.parameters())


@pytest.mark.parametrize("channels", COUNTS)
def test_sizes_of_the_heads(channels: tuple[int, ...]) -> None:
    with torch.device("meta"):
        upernet = size(UPerHead(channels, 150), FCNHead(channels[2], 150))
        assert (upernet, size(FPN(channels), FPNHead(256, (4, 8, 16, 32), 150))) == COUNTS[channels]


@pytest.mark.mm
@pytest.mark.parametrize("arch", ARCHS)
def test_values_are_those_of_mmseg(arch: str) -> None:
    """Same names, same values, same loss, on maps of odd sizes."""
    pytest.importorskip("vizoo.heads.mm")  # before mmseg
    from mmengine.structures import PixelData
    from mmseg.models import FCNHead as MMFCNHead
    from mmseg.models.decode_heads import FPNHead as MMFPNHead
    from mmseg.models.decode_heads import UPerHead as MMUPerHead
    from mmseg.models.necks import FPN as MMFPN
    from mmseg.structures import SegDataSample

    channels, index, norm = [8, 16, 24, 32], [0, 1, 2, 3], {"type": "BN"}
    shared = {"num_classes": 5, "norm_cfg": norm, "align_corners": False, "dropout_ratio": 0.1}
    maps = [torch.randn(2, c, -(-37 // s), -(-50 // s)) for c, s in zip(channels, (1, 2, 4, 8), strict=True)]
    if arch == "upernet":
        theirs = nn.ModuleDict({"decode_head": MMUPerHead(in_channels=channels, in_index=index, channels=12, **shared)})
        theirs["auxiliary_head"] = MMFCNHead(
            in_channels=24, in_index=2, channels=256, num_convs=1, concat_input=False, **shared
        )
        ours = nn.ModuleDict({"decode_head": UPerHead(channels, 5, 12), "auxiliary_head": FCNHead(24, 5)})
    else:
        theirs = nn.ModuleDict({"neck": MMFPN(in_channels=channels, out_channels=256, num_outs=4)})
        strides = [4, 8, 16, 32]
        theirs["decode_head"] = MMFPNHead(
            feature_strides=strides, in_channels=[256] * 4, in_index=index, channels=12, **shared
        )
        ours = nn.ModuleDict({"neck": FPN(channels), "decode_head": FPNHead(256, strides, 5, 12)})
    ours.load_state_dict(theirs.state_dict())
    ours.eval(), theirs.eval()
    with torch.no_grad():
        a, b = (net["neck"](maps) if arch == "semantic_fpn" else maps for net in (ours, theirs))
        close(ours["decode_head"](a), theirs["decode_head"](b), "graph")
        if arch == "upernet":
            close(ours["auxiliary_head"](maps[2]), theirs["auxiliary_head"](maps), "graph")
    model = segmentor(arch, "test_litv2", 5)
    logits, target = torch.randn(2, 5, 37, 50), torch.randint(0, 5, (2, 37, 50))
    target[:, :9] = 255
    samples = [SegDataSample(gt_sem_seg=PixelData(data=t[None])) for t in target]
    expected = theirs["decode_head"].loss_by_feat(logits, samples)["loss_ce"]
    close(model.loss({"out": logits}, target), expected, "graph")
    close(model.loss({"out": logits, "aux": logits}, target), 1.4 * expected, "graph")


@each_pyramid
def test_every_family(name: str) -> None:
    for arch in ARCHS:
        model = segmentor(arch, name, 4, channels=8).train()
        x = torch.randn(2, 3, 96, 96)
        out = model(x)
        assert {k: v.shape for k, v in out.items()}["out"] == (2, 4, 96, 96)
        assert ("aux" in out) is (arch == "upernet")
        model.loss(out, torch.randint(0, 4, (2, 96, 96))).backward()
        missing = [n for n, p in model.named_parameters() if p.grad is None]
        assert not missing
        assert model.eval()(x).keys() == {"out"}


@pytest.mark.filterwarnings("ignore:`torch.jit:FutureWarning")
@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("name", [*PYRAMIDS, "resnet18"])
def test_scripts(arch: str, name: str) -> None:
    model = segmentor(arch, name, 4, channels=8).eval()
    x = torch.randn(2, 3, 96, 96)
    with torch.no_grad():
        script = torch.jit.script(model)
        close(script(x)["out"], model(x)["out"], "graph")
        out = script.train()(x)
    assert {k: v.shape for k, v in out.items()} == dict.fromkeys(("out", "aux")[: len(out)], (2, 4, 96, 96))
    assert len(out) == (2 if arch == "upernet" else 1)


def test_pixels_without_a_class_do_not_count() -> None:
    model = segmentor("semantic_fpn", "test_litv2", 4, channels=8)
    out = {"out": torch.randn(1, 4, 8, 8, requires_grad=True)}
    loss = model.loss(out, torch.full((1, 8, 8), 255))
    assert loss == 0
    loss.backward()
    assert not out["out"].grad.any()


def test_checkpoints(tmp_path: Path) -> None:
    """Trained here or with mmseg (the same names), or published by the authors; nothing may be missing or left over."""
    model = segmentor("semantic_fpn", "test_litv2", 4, channels=8, backbone_kwargs={"feature_norms": (0, 1, 2, 3)})
    other = segmentor("semantic_fpn", "test_litv2", 4, channels=8, backbone_kwargs={"feature_norms": (0, 1, 2, 3)})
    state = {k: torch.randn_like(v) if v.is_floating_point() else v for k, v in model.state_dict().items()}
    torch.save({"state_dict": state, "meta": {"epoch": 1}}, tmp_path / "mm.pth")
    load_segmentor(other, tmp_path / "mm.pth")
    assert all(torch.equal(v, state[k]) for k, v in other.state_dict().items())
    assert_reads_twice(tmp_path / "mm.pth")
    missing = {k: v for k, v in state.items() if "conv_seg" not in k}
    torch.save(missing, tmp_path / "less.pth")
    with pytest.raises(ValueError, match=r"2 missing: decode_head\.conv_seg\.bias, decode_head\.conv_seg\.weight"):
        load_segmentor(other, tmp_path / "less.pth")
    torch.save({**state, "extra": torch.zeros(1)}, tmp_path / "more.pth")
    with pytest.raises(ValueError, match="1 unexpected: extra"):
        load_segmentor(other, tmp_path / "more.pth")
    with pytest.raises(ValueError, match="does not exist"):
        load_segmentor(other, tmp_path / "none.pth")
    (tmp_path / "text.pth").write_text("no checkpoint")
    with pytest.raises(ValueError, match="is not a checkpoint that PyTorch reads safely"):
        load_segmentor(other, tmp_path / "text.pth")


def assert_reads_twice(path: Path) -> None:
    """What is allowed while one file is read does not change what others may read."""
    before = torch.serialization.get_safe_globals()
    read_checkpoint(path)
    assert set(map(str, torch.serialization.get_safe_globals())) == set(map(str, before))


def test_mmengine_checkpoint_without_mmengine(tmp_path: Path) -> None:
    """A training checkpoint of mmengine, with its logs, reads safely in a process that cannot import mmengine."""
    pytest.importorskip("mmengine")
    from mmengine.logging import HistoryBuffer

    logs = HistoryBuffer()
    logs.update(1.5, 2)
    torch.save({"state_dict": {"a": torch.ones(2)}, "message_hub": {"loss": logs}}, tmp_path / "mm.pth")
    code = (
        "import sys; sys.modules['mmengine'] = None; from vizoo.heads.checkpoints import read_checkpoint; "
        f"print(read_checkpoint({str(tmp_path / 'mm.pth')!r})['state_dict']['a'].sum().item())"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.stdout.strip() == "2.0", done.stderr


def test_official_segmentor() -> None:
    """Names of LITv2's authors: a whole Semantic FPN of theirs loads strictly, and its levels are the recorded ones."""
    keys, meta, shape, outputs = load("litv2_s_seg_oddsize")
    model = segmentor("semantic_fpn", "litv2_s", 150, backbone_kwargs={"feature_norms": (0, 1, 2, 3)}).eval()
    official = {f"backbone.{k}": v for k, v in weights(keys).items()}
    heads = {k: v for k, v in model.state_dict().items() if not k.startswith("backbone.")}
    converted = convert_checkpoint({"state_dict": {**official, **heads}}, model)
    average = {f"module.{k}": v for k, v in {**official, **heads}.items()}
    averaged = convert_checkpoint({"state_dict": {"bias": torch.zeros(1)}, "state_dict_ema": average}, model)
    assert all(torch.equal(averaged[k], v) for k, v in converted.items())
    model.load_state_dict(converted)
    with torch.no_grad():
        maps = model.backbone(image(shape))
    for name, feature in thin(list(maps), meta["outputs"]["feat_strides_c_s"]).items():
        golden_close(feature, outputs[name], name)


def test_errors() -> None:
    with pytest.raises(ValueError, match="batch of 1 image in training, need at least 2"):
        segmentor("upernet", "test_litv2", 3, channels=8).train()(torch.randn(1, 3, 64, 64))
    with pytest.raises(ValueError, match="arch='unet', need 'semantic_fpn' or 'upernet'"):
        segmentor("unet", "test_litv2", 3)
    with pytest.raises(ValueError, match="num_classes=0, need 1 to 255: 255 is the id of pixels that do not count"):
        segmentor("upernet", "test_litv2", 0)
    with pytest.raises(ValueError, match=r"strides=\(4, 16\), need at least two, each twice the one before"):
        segmentor("upernet", "test_litv2", 3, strides=(4, 16))
