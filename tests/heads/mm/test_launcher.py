"""``vizoo mm``: what it refuses before anything starts, conversion of the authors' checkpoints, links for others."""

from __future__ import annotations

import importlib
import json
import os
import re
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from golden import image, load, weights
from tolerance import golden_close

from vizoo.heads.checkpoints import convert_checkpoint
from vizoo.tools import cli
from vizoo.tools.mm import build_parser
from vizoo.tools.training import mm as launcher

pytestmark = [pytest.mark.mm, pytest.mark.usefixtures("fast_parsing")]
pytest.importorskip("mmengine", reason="needs mmengine (extra mm), not installed")
mm = importlib.import_module("vizoo.heads.mm")


@pytest.fixture
def never_started(monkeypatch):
    """No runner is built."""
    from mmengine.runner import Runner

    monkeypatch.setattr(Runner, "from_cfg", lambda cfg: pytest.fail("it started"))


def refuse(capsys, *words, status: int = 2) -> str:
    """The message, one line, of a command that ends with this status."""
    assert cli.main(["mm", *map(str, words)]) == status
    message = capsys.readouterr().err
    assert message.startswith("vizoo mm: error: ")
    assert len(message.splitlines()) == 1, message
    return message


BACKBONE = 'model["backbone"].update({})\n'
BAD_CONFIGS = [
    ("retinanet", BACKBONE.format('model_name="resnet81"'), "model.backbone: got model_name='resnet81'"),
    ("retinanet", BACKBONE.format("strides=(4, 8, 16, 64)"), "model.backbone: got strides=(4, 8, 16, 64)"),
    ("retinanet", BACKBONE.format('pretrained="/no.pth"'), "model.backbone: got pretrained='/no.pth'"),
    ("retinanet", BACKBONE.format("colour=3"), "model.backbone: TypeError"),
    ("retinanet", 'model["backbone"].pop("model_name")\n', "model.backbone.model_name is missing"),
    (
        "retinanet",
        'model["neck"].update(in_channels=[256, 512, 1024, 2048])\n',
        "model.neck.in_channels=[256, 512, 1024, 2048], but [64, 128, 256, 512] come in",
    ),
    ("retinanet", 'model["bbox_head"].update(in_channels=48)\n', "model.bbox_head.in_channels=48, but 32 come in"),
    ("mask_rcnn", 'model["rpn_head"].update(in_channels=48)\n', "model.rpn_head.in_channels=48, but 64 come in"),
    (
        "mask_rcnn",
        'model["roi_head"]["mask_head"].update(in_channels=48)\n',
        "model.roi_head.mask_head.in_channels=48, but 64 come in",
    ),
    (
        "upernet",
        'model["decode_head"].update(in_channels=[64, 128, 256, 384])\n',
        "model.decode_head.in_channels=[64, 128, 256, 384], but [64, 128, 256, 512] come in",
    ),
    (
        "upernet",
        'model["auxiliary_head"].update(in_index=1)\n',
        "auxiliary_head.in_channels=256, but 128 come in",
    ),
    (
        "upernet",
        BACKBONE.format("strides=(4, 8, 16)"),
        "decode_head.in_index=[0, 1, 2, 3] in a model of 3 levels",
    ),
    (
        "semantic_fpn",
        'model["decode_head"].update(in_channels=[64, 64, 64, 32])\n',
        "model.decode_head.in_channels=[64, 64, 64, 32], but [64, 64, 64, 64] come in",
    ),
    ("upernet", 'model.update(pretrained="open-mmlab://r50")\n', "model.pretrained='open-mmlab://r50'"),
    ("retinanet", 'load_from = "/no.pth"\n', "load_from='/no.pth' does not exist"),
    ("retinanet", 'val_evaluator.update(ann_file="/no.json")\n', "val_evaluator.ann_file='/no.json' does not exist"),
    (
        "retinanet",
        'train_dataloader["dataset"].update(ann_file="no.json")\n',
        "train_dataloader.dataset: annotation file '",
    ),
    (
        "retinanet",
        'val_dataloader["dataset"].update(data_prefix=dict(img="images/no"))\n',
        "val_dataloader.dataset: image folder '",
    ),
    (
        "retinanet",
        'train_dataloader["dataset"].update(metainfo=dict(classes=("disc", "circle")))\n',
        "has no category 'circle'",
    ),
    (
        "upernet",
        'train_dataloader["dataset"].update(metainfo=dict(classes=("a", "b")))\n',
        "train_dataloader.dataset: mask folder '",
    ),
    (
        "upernet",
        'train_dataloader["dataset"] = dict(type="RepeatDataset", times=2, dataset=dict('
        'type="BaseSegDataset", data_prefix=dict(img_path="/no", seg_map_path="/no")))\n',
        "train_dataloader.dataset.dataset: ",
    ),
]


@pytest.mark.usefixtures("never_started")
@pytest.mark.parametrize(("kind", "extra", "message"), BAD_CONFIGS)
def test_bad_config(kind, extra, message, write_config, tmp_path, capsys):
    """One message that names the key; nothing is started."""
    config = tmp_path / "config.py"
    write_config(config, kind, "resnet18", extra)
    assert message in refuse(capsys, "train", config, "--work-dir", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_channels_that_are_not_known(write_config, tmp_path):
    """Necks of another kind, and no backbone of the zoo: nothing is refused."""
    neck = 'model["neck"] = dict(type="YOLOV3Neck", num_scales=3, in_channels=[9, 9, 9], out_channels=[3, 2, 1])\n'
    for extra in (neck, 'model["backbone"] = dict(type="ResNet", depth=50)\n', 'model = dict(type="Twin")\n'):
        config = write_config(tmp_path / "config.py", "retinanet", "resnet18", extra)
        launcher.check_config(launcher.load_config(build_parser().parse_args(["train", str(config)])))


def test_other_annotations_are_not_checked(write_config, tmp_path):
    """LVIS names its images in another way."""
    change = '["dataset"].update(type="LVISV1Dataset", ann_file="/x")\n'
    extra = f"train_dataloader{change}val_dataloader{change}"
    config = write_config(tmp_path / "config.py", "retinanet", "resnet18", extra)
    cfg = launcher.load_config(build_parser().parse_args(["train", str(config)]))
    launcher.check_data(cfg, ("train", "val"))


@pytest.mark.usefixtures("never_started")
def test_bad_words(write_config, tmp_path, capsys):
    config = write_config(tmp_path / "config.py", "retinanet", "resnet18")
    assert "CONFIG is missing" in refuse(capsys, "train")
    (tmp_path / "child.py").write_text('_base_ = "missing.py"')
    assert "missing.py" in refuse(capsys, "train", tmp_path / "child.py")
    assert "config '/no.py' does not exist" in refuse(capsys, "train", "/no.py")
    near = "litv2_s_retinanet_8xb2-1x_coco"
    assert near in refuse(capsys, "train", "litv2_s_retinanet_8xb2-1x_cocoo")
    args = build_parser().parse_args(["train", near])
    cfg = launcher.load_config(args)
    assert (cfg.model.backbone.model_name, cfg.work_dir) == ("litv2_s", str(Path("work_dirs", near)))
    assert "--load-from '/no.pth' does not exist" in refuse(capsys, "test", config, "--load-from", "/no.pth")
    assert "--load-from is missing" in refuse(capsys, "test", config)
    assert "--resume '/no.pth' does not exist" in refuse(capsys, "train", config, "--resume", "/no.pth")
    assert "--cfg-options 'x': write KEY=VALUE" in refuse(capsys, "train", config, "--cfg-options", "x")
    assert "--load-from and --out are missing" in refuse(capsys, "convert", config)
    words = ["convert", config, "--load-from", config, "--out"]
    assert "--out '/no/x.pth': no such folder" in refuse(capsys, *words, "/no/x.pth")
    assert "torchrun" in refuse(capsys, "train", config, "--launcher", "pytorch", "--no-check-data")
    if not torch.cuda.is_available():
        assert "--amp" in refuse(capsys, "train", config, "--amp")


CONFIGS = {  # file -> contents, and what is said
    "syntax.py": (b"model = dict(", "'was never closed'"),
    "binary.py": (b"\x00\xff\xfe\x01" * 9, "cannot be read"),
    "binary.json": (b"\x00\xff\xfe\x01" * 9, "cannot be read"),
    "empty.py": (b"", "model=None: need a dictionary"),
    "raises.py": (b"raise RuntimeError('one' + chr(10) * 2 + 'two')", "RuntimeError: one two"),
    "leaves.py": (b"raise SystemExit(0)", "SystemExit"),
    "text.txt": (b"model = 3", "cannot be read"),
    "number.py": (b"model = 3", "model=3: need a dictionary"),
    "backbone.py": (b"model = dict(backbone=3)", "model.backbone=3: need a dictionary"),
    "work_dir.py": (b"work_dir = 5\nmodel = dict(type='X')", "work_dir=5 is no path"),
    "list.json": (b"[1, 2]", "cannot be read"),
}


@pytest.mark.usefixtures("never_started")
@pytest.mark.parametrize("action", ["train", "convert"])
@pytest.mark.parametrize("name", list(CONFIGS))
def test_files_that_are_no_config(name, action, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    contents, message = CONFIGS[name]
    Path(name).write_bytes(contents)
    torch.save({"a": torch.ones(1)}, "a.pth")
    words = ["--load-from", "a.pth", "--out", "x.pth"] if action == "convert" else []
    assert message.strip("'") in refuse(capsys, action, name, *words)
    assert {p.name for p in tmp_path.iterdir()} == {name, "a.pth"}


OPTIONS = [
    "=3",
    "x",
    "model=3",
    "model.backbone=3",
    "model.backbone.strides=abc",
    "model.neck=7",
    "model.neck.in_channels=7",
    "model.bbox_head=x",
    "train_dataloader=5",
    "train_dataloader.dataset=5",
    "val_dataloader.dataset.type=Nothing",
    "load_from=/no.pth",
    "work_dir=7",
]


@pytest.mark.usefixtures("never_started")
@pytest.mark.parametrize("option", OPTIONS)
def test_options_that_make_no_sense(option, write_config, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    config = write_config(tmp_path / "config.py", "retinanet", "resnet18")
    refuse(capsys, "train", config, "--cfg-options", option)
    assert [p.name for p in tmp_path.iterdir()] == ["config.py"]


@pytest.mark.usefixtures("never_started")
def test_work_dir(write_config, tmp_path, capsys):
    config = write_config(tmp_path / "config.py", "retinanet", "resnet18")
    (tmp_path / "file").write_text("x")
    for folder in (tmp_path / "file", tmp_path / "file" / "below" / "it", "/proc/version/x"):
        for action in (["train"], ["test", "--load-from", tmp_path / "file"]):
            assert "is no folder that can be written" in refuse(
                capsys, action[0], config, *action[1:], "--work-dir", folder
            )
    assert (tmp_path / "file").read_text() == "x"
    assert "is a folder" in refuse(capsys, "train", tmp_path)
    assert "invalid choice" in refuse(capsys, "fly", config)
    assert "unrecognized arguments: --fly" in refuse(capsys, "train", config, "--fly")
    assert "only 'vizoo mm convert'" in refuse(capsys, "train", config, "--out", tmp_path / "x.pth")


CHECKPOINTS = {  # contents, and what is said
    "text": (b"no checkpoint", "is not a checkpoint that PyTorch reads safely"),
    "nothing": (b"", "is not a checkpoint that PyTorch reads safely"),
    "a list": ([1, 2], "holds a list, need a dictionary"),
    "no weights": ({}, "holds no weights"),
    "a state that is a number": ({"state_dict": 3}, "holds no weights"),
    "numbers for tensors": ({"state_dict": {"a": 3}}, "holds int under 'a', need tensors"),
    "no names": ({"state_dict": {3: torch.ones(1)}}, "under 3, need tensors"),
    "truncated": (None, "is not a checkpoint that PyTorch reads safely"),
}


@pytest.mark.usefixtures("never_started")
@pytest.mark.parametrize("words", ["test --load-from", "train --load-from", "train --resume", "convert --load-from"])
@pytest.mark.parametrize("kind", list(CHECKPOINTS))
def test_files_that_are_no_checkpoint(kind, words, write_config, tmp_path, capsys):
    config = write_config(tmp_path / "config.py", "semantic_fpn", "test_nat", options="feature_norms=(0, 1, 2, 3)")
    contents, message = CHECKPOINTS[kind]
    file = tmp_path / "bad.pth"
    if isinstance(contents, bytes):
        file.write_bytes(contents)
    else:
        torch.save({"state_dict": {"a": torch.ones(9999)}} if contents is None else contents, file)
        if contents is None:
            file.write_bytes(file.read_bytes()[:-2000])
    action, option = words.split()
    out = ["--out", tmp_path / "x.pth"] if action == "convert" else []
    found = refuse(capsys, action, config, "--work-dir", tmp_path / "work", *out, option, file)
    assert message in found
    assert f"{option} {str(file)!r}" in found
    assert {p.name for p in tmp_path.iterdir()} == {"config.py", "bad.pth"}


@pytest.mark.usefixtures("never_started")
def test_resume_from_weights(write_config, tmp_path, capsys):
    config = write_config(tmp_path / "config.py", "retinanet", "resnet18")
    words = ["train", config, "--work-dir", tmp_path / "work", "--resume"]
    for rest in (
        {},
        {"meta": {}, "message_hub": {}, "optimizer": {}},
        {"meta": {"epoch": 1, "iter": 1}, "optimizer": 3},
    ):
        torch.save({"state_dict": {"a": torch.ones(1)}, **rest}, tmp_path / "a.pth")
        assert "holds weights only, no training" in refuse(capsys, *words, tmp_path / "a.pth")
    (tmp_path / "work").mkdir()
    (tmp_path / "work" / "last_checkpoint").write_text(str(tmp_path / "gone.pth"))
    assert f"--resume {str(tmp_path / 'gone.pth')!r}" in refuse(capsys, *words)


@pytest.mark.usefixtures("never_started")
def test_weights_that_are_no_numbers(write_config, tmp_path, capsys):
    config = write_config(tmp_path / "config.py", "retinanet", "resnet18")
    torch.save({"state_dict": {"a": torch.ones(1), "b.c": torch.tensor([1.0, float("nan")])}}, tmp_path / "a.pth")
    words = ["test", config, "--load-from", tmp_path / "a.pth", "--work-dir", tmp_path / "work"]
    assert "holds weights that are no finite numbers: b.c" in refuse(capsys, *words, status=1)


def test_weights_out_of_reach(write_config, tmp_path, capsys):
    """One message before the first step: nobody answers at that address."""
    extra = BACKBONE.format('pretrained="http://127.0.0.1:9/none.pth"')
    config = write_config(tmp_path / "config.py", "retinanet", "resnet18", extra)
    words = ["train", config, "--no-check-data", "--work-dir", tmp_path / "out"]
    assert "refused" in refuse(capsys, *words)


def test_missing_extra(monkeypatch, capsys):
    monkeypatch.setattr(launcher, "MISSING", "install vizoo[mm]")
    assert "vizoo[mm]" in refuse(capsys, "train", "x.py")


def test_bad_record_names_the_data_set(shapes, write_config, tmp_path, capsys, never_started):
    """A class id out of range, a box outside, a mask of another size: in the message before training."""
    data = json.loads((shapes / "annotations" / "instances_training.json").read_text())
    data["annotations"][3]["category_id"] = 12
    data["annotations"][4]["bbox"][0] = 150
    bad = tmp_path / "bad.json"
    bad.write_text(json.dumps(data))
    extra = f'train_dataloader["dataset"].update(ann_file="{bad}")\n'
    config = write_config(tmp_path / "config.py", "retinanet", "resnet18", extra)
    message = refuse(capsys, "train", config)
    assert "train_dataloader.dataset: annotation file" in message
    assert "annotation 3: category_id 12" in message
    assert "annotation 4: bbox [150," in message


def test_options_reach_the_config(write_config, tmp_path):
    config = write_config(tmp_path / "config.py", "retinanet", "resnet18")
    options = ["--cfg-options", "train_cfg.max_epochs=7", "model.backbone.strides=[8,16]", "note=abc"]
    cfg = launcher.load_config(build_parser().parse_args(["train", str(config), *options]))
    assert (cfg.train_cfg.max_epochs, list(cfg.model.backbone.strides), cfg.note) == (7, [8, 16], "abc")
    assert cfg.work_dir == str(Path("work_dirs", "config"))
    assert not cfg.resume


def test_files_of_a_config_are_looked_for(write_config, tmp_path, capsys):
    """One rule for weights in the config and on the command line: a local file must be there, an address may be."""
    where = 'model["backbone"].update(init_cfg=dict(type="Pretrained", checkpoint="{}"))\n'
    config = write_config(tmp_path / "config.py", "retinanet", "resnet18", where.format("/no.pth"))
    assert "model.backbone.init_cfg.checkpoint='/no.pth' does not exist" in refuse(capsys, "train", config)
    assert "--load-from '/no.pth' does not exist" in refuse(capsys, "train", config, "--load-from", "/no.pth")
    for address in ("https://example.org/a.pth", "s3://bucket/a.pth"):
        config = write_config(tmp_path / "config.py", "retinanet", "resnet18", where.format(address))
        args = build_parser().parse_args(["train", str(config), "--load-from", address])
        launcher.check_config(launcher.load_config(args))


def test_spellings_of_options():
    parse = build_parser().parse_args
    assert [parse(["train", *words]).resume for words in ([], ["--resume"], ["--resume", "a.pth"])] == [
        None,
        "auto",
        "a.pth",
    ]
    assert [parse(["train", *words]).amp for words in ([], ["--amp"], ["--no-amp"])] == [False, True, False]
    assert parse(["convert", "c.py", "--out", "a.pth"]).out == "a.pth"
    assert parse(["train", "c.py", "--no-check-data"]).no_check_data


def test_resume_forgets_where_training_started(write_config, tmp_path):
    """``--resume`` takes the newest checkpoint, and ``load_from`` of the config only when there is none."""
    config = write_config(tmp_path / "config.py", "retinanet", "resnet18", 'load_from = "start.pth"\n')
    words = ["train", str(config), "--work-dir", str(tmp_path), "--resume"]
    cfg = launcher.load_config(build_parser().parse_args(words))
    assert (cfg.resume, cfg.load_from) == (False, "start.pth")
    (tmp_path / "last_checkpoint").write_text("x.pth")
    cfg = launcher.load_config(build_parser().parse_args(words))
    assert (cfg.resume, cfg.load_from) == (True, None)


# checkpoints of the authors

CASES = {
    "litv2_s_det": ("litv2_s", "feature_norms=(1, 2, 3)", "retinanet"),
    "litv2_s_seg_oddsize": ("litv2_s", "feature_norms=(0, 1, 2, 3)", "semantic_fpn"),
    "overlock_t_seg_192x256": ("overlock_t", 'dense="seg"', "upernet"),
}


def official(case: str) -> dict[str, torch.Tensor]:
    return {f"backbone.{k}": v for k, v in weights(load(case).keys).items()}


def official_nat() -> dict[str, torch.Tensor]:
    """NAT-Mini's backbone under the names of the official detectors: a classifier's without its end, with norms."""
    state = {f"backbone.{k}": v for k, v in weights(load("nat_mini").keys).items()}
    state = {k: v for k, v in state.items() if not k.startswith(("backbone.norm.", "backbone.head."))}
    for i in range(4):
        state[f"backbone.norm{i}.weight"], state[f"backbone.norm{i}.bias"] = (torch.randn(64 * 2**i) for _ in range(2))
    return state


def build(config: Path):
    from mmengine.config import Config
    from mmengine.registry import MODELS, init_default_scope

    cfg = Config.fromfile(config)
    init_default_scope(cfg.default_scope)
    return MODELS.build(cfg.model)


@pytest.mark.parametrize("case", [*CASES, "nat_mini"])
def test_convert(case, write_config, tmp_path, capsys):
    """An authors' checkpoint fits our model strictly, and its levels are the official ones."""
    name, form, kind = CASES.get(case, ("nat_mini", "feature_norms=(0, 1, 2, 3)", "semantic_fpn"))
    config = write_config(tmp_path / "config.py", kind, name, options=form)
    model = build(config).eval()
    heads = {k: v.clone() for k, v in model.state_dict().items() if not k.startswith("backbone.")}
    backbone = official_nat() if case == "nat_mini" else official(case)
    meta = {"CLASSES": ("a", "b"), "PALETTE": [[1, 2, 3], [4, 5, 6]], "epoch": 12}
    torch.save({"state_dict": {**backbone, **heads}, "meta": meta}, tmp_path / "official.pth")
    out = tmp_path / "ours.pth"
    words = ["--load-from", str(tmp_path / "official.pth"), "--out", str(out)]
    assert cli.main(["mm", "convert", str(config), *words]) == 0
    assert "none missing, none unexpected" in capsys.readouterr().out
    converted = torch.load(out, weights_only=True)
    assert converted["meta"]["dataset_meta"] == {"classes": meta["CLASSES"], "palette": meta["PALETTE"]}
    for parameter in model.parameters():
        torch.nn.init.zeros_(parameter)
    model.load_state_dict(converted["state_dict"], strict=True)
    for k, v in heads.items():
        assert torch.equal(model.state_dict()[k], v), k
    if case == "nat_mini":
        for i, norm in enumerate(model.backbone.body.model.feature_norms):
            assert torch.equal(norm.weight, backbone[f"backbone.norm{i}.weight"])
        return
    keys, recorded, shape, outputs = load(case)
    thin = recorded.get("outputs", {}).get("feat_strides_c_s") or {
        f"feat{i}": s for i, s in enumerate(((8, 4), (8, 2), (16, 1), (16, 1)))
    }
    with torch.no_grad():
        features = model.backbone(image(shape))
    for feature, (level, (c, s)) in zip(features, sorted(thin.items()), strict=True):
        golden_close(feature[:, ::c, ::s, ::s], outputs[level], level)


@pytest.fixture(scope="module")
def small(write_config, tmp_path_factory):
    """A small segmentor and its weights under official names."""
    config = write_config(
        tmp_path_factory.mktemp("small") / "c.py", "semantic_fpn", "test_nat", options="feature_norms=(0, 1, 2, 3)"
    )
    model = build(config)
    state = {k.replace("backbone.body.model.", "backbone."): v for k, v in model.state_dict().items()}
    state = {re.sub(r"backbone\.feature_norms\.(\d)", r"backbone.norm\1", k): v.clone() for k, v in state.items()}
    return SimpleNamespace(model=model, state=state)


def test_convert_small(small):
    state = {f"module.{k}": v for k, v in small.state.items()}
    converted = convert_checkpoint({"state_dict": state}, small.model)
    assert converted.keys() == small.model.state_dict().keys()


@pytest.mark.parametrize(
    ("drop", "add", "message"),
    [
        ("backbone.norm2.bias", {}, "1 missing: backbone.body.model.feature_norms.2.bias"),
        ("backbone.norm", {}, "8 missing: backbone.body.model.feature_norms.0.bias"),
        ("decode_head.conv_seg.bias", {}, "1 missing: decode_head.conv_seg.bias"),
        (None, {"decode_head.extra": torch.zeros(1)}, "1 unexpected: decode_head.extra"),
        (None, {"backbone.extra.weight": torch.zeros(1)}, "1 unexpected: backbone.body.model.extra.weight"),
        (None, {"backbone.norm.weight": torch.ones(3)}, "1 unexpected: backbone.norm.weight"),
        (None, {"decode_head.conv_seg.bias": torch.zeros(9)}, "1 of another shape: decode_head.conv_seg.bias"),
    ],
)
def test_convert_is_strict(drop, add, message, small):
    state = {k: v for k, v in small.state.items() if drop is None or not k.startswith(drop)}
    with pytest.raises(ValueError, match=re.escape(message)):
        convert_checkpoint({"state_dict": {**state, **add}}, small.model)


def test_convert_keeps_what_is_there(write_config, tmp_path, capsys, small, monkeypatch):
    """Only what an earlier ``convert`` wrote is replaced, and a place that cannot be written is refused at once."""
    config = write_config(tmp_path / "config.py", "semantic_fpn", "test_nat", options="feature_norms=(0, 1, 2, 3)")
    source = tmp_path / "official.pth"
    torch.save({"state_dict": small.state}, source)
    before = source.read_bytes()
    words = ["convert", config, "--load-from", source, "--out"]
    out = tmp_path / "ours.pth"
    assert cli.main(["mm", *map(str, words), str(out)]) == 0
    assert cli.main(["mm", *map(str, words), str(out)]) == 0
    capsys.readouterr()
    torch.save({"state_dict": {}, "meta": {"writer": "me"}}, tmp_path / "mine.pth")
    (tmp_path / "notes.pth").write_text("notes")
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "link.pth").symlink_to(source)
    monkeypatch.setattr(launcher, "convert_checkpoint", lambda *args: pytest.fail("it started"))
    for place, message in {
        tmp_path: "is a folder, need a file",
        tmp_path / "pipe": "is no regular file, need a file",
        source: "is the file of --load-from",
        tmp_path / "link.pth": "is the file of --load-from",
        tmp_path / "mine.pth": "exists and was not written by 'vizoo mm convert'",
        tmp_path / "notes.pth": "exists and was not written by 'vizoo mm convert'",
        Path("/proc/x.pth"): "its folder is read-only",
        Path("/no/x.pth"): "no such folder",
        source / "x.pth": "no such folder",
    }.items():
        assert message in refuse(capsys, *words, place)
    assert source.read_bytes() == before
    assert (tmp_path / "notes.pth").read_text() == "notes"


def test_convert_writes_all_or_nothing(write_config, tmp_path, capsys, small, monkeypatch):
    config = write_config(tmp_path / "config.py", "semantic_fpn", "test_nat", options="feature_norms=(0, 1, 2, 3)")
    torch.save({"state_dict": small.state}, tmp_path / "official.pth")

    def full(what, file):
        file.write(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr(torch, "save", full)
    words = ["convert", config, "--load-from", tmp_path / "official.pth", "--out", tmp_path / "ours.pth"]
    assert cli.main(["mm", *map(str, words)]) == 130
    assert {p.name for p in tmp_path.iterdir()} == {"config.py", "official.pth"}


def test_convert_reads_safely(write_config, tmp_path, capsys):
    """A file that would run code is refused."""
    config = write_config(tmp_path / "config.py", "semantic_fpn", "test_nat", options="feature_norms=(0, 1, 2, 3)")
    torch.save({"state_dict": SimpleNamespace()}, tmp_path / "evil.pth")
    words = ["convert", config, "--load-from", tmp_path / "evil.pth", "--out", tmp_path / "x.pth"]
    assert "is not a checkpoint that PyTorch reads safely" in refuse(capsys, *words)
    assert not (tmp_path / "x.pth").exists()


# links


def test_link(tmp_path, monkeypatch, capsys):
    """The file is written, works without our finder, is removed, and one of somebody else is left alone."""
    package = tmp_path / "mmcv"
    package.mkdir()
    spec = SimpleNamespace(submodule_search_locations=[str(package)])
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: spec if name == "mmcv" else None)
    assert cli.main(["mm", "link"]) == 0
    namespace: dict = {"__name__": "mmcv._ext"}
    exec((package / "_ext.py").read_text(), namespace)
    ext = importlib.import_module("vizoo.heads.mm.ext")
    assert namespace["nms"] is ext.nms
    assert namespace["__getattr__"] is ext.missing
    assert cli.main(["mm", "link"]) == 0
    assert cli.main(["mm", "unlink"]) == 0
    assert not (package / "_ext.py").exists()
    assert cli.main(["mm", "unlink"]) == 0
    assert "nothing to remove" in capsys.readouterr().out
    (package / "_ext.py").write_text("nms = 3\n")
    assert "stays as it is" in refuse(capsys, "link")
    assert "stays as it is" in refuse(capsys, "unlink")
    (package / "_ext.py").write_bytes(b"\xff\xfe\x00")
    assert "stays as it is" in refuse(capsys, "link")
    (package / "_ext.py").unlink()
    (package / "_ext.py").mkdir()
    assert "stays as it is" in refuse(capsys, "unlink")
    spec.submodule_search_locations = ["/proc"]
    assert "cannot write '/proc/_ext.py'" in refuse(capsys, "link")
    shutil.rmtree(package)
    spec.submodule_search_locations = []
    assert "mmcv is not installed" in refuse(capsys, "link")
