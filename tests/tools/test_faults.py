"""Bad input to every command: the exit status, one line on standard error that names it, and nothing written."""

from __future__ import annotations

import errno
import importlib
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from runs import TASKS, words

from vizoo.tools import cli, common

FILES: dict[str, Callable[[Path], object]] = {
    "empty": lambda p: p.write_bytes(b""),
    "text": lambda p: p.write_text("hello\n"),
    "latin1": lambda p: p.write_bytes("größe: 3\n".encode("latin-1")),
    "utf16": lambda p: p.write_bytes("epochs: 3\n".encode("utf-16")),
    "zeros": lambda p: p.write_bytes(bytes(1000)),
    "fifo": lambda p: os.mkfifo(p),
    "folder": lambda p: p.mkdir(),
    "fifo.json": lambda p: os.mkfifo(p),
    "folder.json": lambda p: p.mkdir(),
    "loop.json": lambda p: p.symlink_to(p.name),
    "loop": lambda p: p.symlink_to(p.name),
    "readonly.json": lambda p: (p.write_text('{"vizoo": 1}'), p.chmod(0o444)),
    "foreign.json": lambda p: p.write_text('{"mine": 1}'),
    "foreign.png": lambda p: Image.new("RGB", (8, 8)).save(p),
    "foreign.csv": lambda p: p.write_text("a,b\n1,2\n"),
    "folder.csv": lambda p: p.mkdir(),
    "pipe": lambda p: os.mkfifo(p),
    "broken.pth": lambda p: p.write_bytes(b"PK broken"),
    "ours.csv": lambda p: p.write_text("vizoo,b\n1,2\n"),
    "readonly.csv": lambda p: (p.write_text("vizoo\n"), p.chmod(0o444)),
    "latin.csv": lambda p: p.write_bytes(b"vizoo\xe4\n"),
    "empty.py": lambda p: p.write_text(""),
    "syntax.py": lambda p: p.write_text("model = dict(\n"),
    "list.yaml": lambda p: p.write_text("- a\n- b\n"),
    "unknown.yaml": lambda p: p.write_text("qqqq_zzzz: 1\n"),
    "near.yaml": lambda p: p.write_text("epoch: 1\n"),
    "tag.yaml": lambda p: p.write_text("epochs: !!python/object/apply:os.system ['touch ran']\n"),
    "bomb.yaml": lambda p: p.write_text(
        "a: &a [1,1,1,1,1,1,1,1,1]\n"
        + "".join(f"{y}: &{y} [{','.join([f'*{x}'] * 9)}]\n" for x, y in zip("abcdefgh", "bcdefghi", strict=True))
    ),
    "deep.yaml": lambda p: p.write_text("a: " + "[" * 3000 + "]" * 3000 + "\n"),
    "keys.yaml": lambda p: p.write_text("1: 2\n"),
    "date.yaml": lambda p: p.write_text("epochs: 2001-99-99\n"),
    "seg.yaml": lambda p: p.write_text("task: segmentation\nepochs: 1\n"),
    "mapping.yaml": lambda p: p.write_text("epochs: {a: 1}\n"),
    "huge.yaml": lambda p: p.write_text(f"seed: {'9' * 400}\n"),
    "tensor.pth": lambda p: torch.save(torch.zeros(3), p),
    "list.pth": lambda p: torch.save([1, 2], p),
    "other.pth": lambda p: torch.save({"state_dict": {"a": torch.zeros(1)}}, p),
}

CLS, DET, SEG, GAZE = "TRAIN-classification", "TRAIN-detection", "TRAIN-segmentation", "TRAIN-scanpath"
LONG = "x" * 5000
CONFIG = "litv2_s_mask-rcnn_8xb2-1x_coco"
# the words after a command that is right without them, and what the line must name
TRAIN: dict[str, list[tuple[str, str]]] = {
    CLS: [
        ("-c BAD/empty", "expected lines 'option: value'"),
        ("-c BAD/text", "expected lines 'option: value'"),
        ("-c BAD/latin1", "no text in UTF-8"),
        ("-c BAD/utf16", "no text in UTF-8"),
        ("-c BAD/zeros", "no YAML"),
        ("-c BAD/fifo", "is a pipe or device, need a file"),
        ("-c BAD/folder", "is a folder, need a file"),
        ("-c BAD/loop", "symbolic links"),
        ("-c BAD/list.yaml", "expected lines 'option: value'"),
        ("-c BAD/unknown.yaml", "unknown option 'qqqq_zzzz'"),
        ("-c BAD/near.yaml", "did you mean 'epochs'"),
        ("-c BAD/tag.yaml", "no YAML"),
        ("-c BAD/bomb.yaml", "over 1,000,000 values"),
        ("-c BAD/deep.yaml", "nested too deeply"),
        ("-c BAD/keys.yaml", "expected lines 'option: value'"),
        ("-c BAD/date.yaml", "no YAML"),
        ("-c BAD/seg.yaml", "is of --task 'segmentation'"),
        ("-c BAD/mapping.yaml", "epochs takes a value"),
        ("-c BAD/huge.yaml", "--seed"),
        (f"-c {LONG}", "File name too long"),
        ("-c RUN-segmentation/args.yaml", "is of --task 'segmentation', need classification"),
        ("-c RUN-scanpath/args.yaml", "is of --task 'scanpath', need classification"),
        ("--resume BAD/empty", "cannot read the checkpoint"),
        ("--resume BAD/text", "cannot read the checkpoint"),
        ("--resume BAD/zeros", "cannot read the checkpoint"),
        ("--resume BAD/fifo", "is a pipe or device, need a file"),
        ("--resume BAD/folder", "is a folder, need a file"),
        ("--resume BAD/tensor.pth", "no training checkpoint"),
        ("--resume BAD/other.pth", "no training checkpoint"),
        ("--resume RUN-detection/last.pth.tar", "--resume"),
        ("--initial-checkpoint BAD/text", "checkpoint file"),
        ("--initial-checkpoint BAD/fifo", "is a pipe or device, need a file"),
        ("--initial-checkpoint BAD/other.pth", "checkpoint file"),
        ("--initial-checkpoint BAD/list.pth", "checkpoint file"),
        ("--pretrained-path BAD/folder", "is a folder, need a file"),
        ("--pretrained-path BAD/tensor.pth", "checkpoint file"),
        ("--model oat_small", "oat_small"),
        ("--model 'test_*'", "models; name one"),
        ("--model ''", "--model is missing"),
        (f"--model {LONG}", "unknown model"),
        ("--model-kwargs foo=1", "foo"),
        ("--model-kwargs foo", "--model-kwargs: got 'foo', must be KEY=VALUE"),
        ("--model-kwargs =3", "must be KEY=VALUE"),
        ("--model-kwargs foo={[]:1}", "foo"),
        ("--num-classes 1", "--num-classes 1 is below the 2 classes"),
        ("--num-classes -1", "--num-classes: got -1"),
        ("--epochs 0", "--epochs: got 0"),
        ("--epochs 1.5", "--epochs: got 1.5, must be a whole number"),
        (f"--epochs {'9' * 400}", "--epochs: got"),
        ("--lr nan", "--lr: got nan"),
        ("--lr -1", "--lr: got -1"),
        ("--lr inf", "--lr: got inf"),
        ("--opt nothing", "--opt 'nothing'"),
        ("--opt adamw --opt-betas 0.9", "--opt"),
        ("--sched never", "invalid choice: 'never'"),
        ("--std 0", "--std: got 0, must be a finite number above 0"),
        ("--std nan", "--std: got nan"),
        ("--mean nan", "--mean: got nan"),
        ("--ratio 2 1", "--ratio 2 1: need two numbers, 0 < LOW <= HIGH"),
        ("--scale 1 0.5", "--scale 1 0.5: need two numbers"),
        ("--scale 0 0", "--scale 0 0: need two numbers"),
        ("--hflip 2", "--hflip: got 2, must be a finite number between 0 and 1"),
        ("--drop-path 2", "--drop-path: got 2"),
        ("--drop-path nan", "--drop-path: got nan"),
        ("--drop -1", "--drop: got -1"),
        ("--img-size 0", "--img-size: got 0"),
        ("--img-size -5", "--img-size: got -5"),
        ("--model test_vit --img-size 1", "cannot take input 1x1"),
        ("--batch-size 0", "--batch-size: got 0"),
        ("--batch-size 999", "--batch-size 999 exceeds the 16 training images"),
        ("--workers -1", "--workers: got -1"),
        ("--mixup 0.5 --batch-size 5", "--batch-size 5 is odd"),
        ("--aa nonsense", "--aa nonsense"),
        ("--window nan 10", "--window"),
        ("--window 1 -10", "--window"),
        ("--window 1 0", "--window"),
        ("--window 1", "--window"),
        ("--data BAD/text", "is no folder"),
        ("--data BAD/folder", "has no folder 'train/'"),
        ("--data nowhere", "is no folder"),
        (f"--data {LONG}", "File name too long"),
        ("--output BAD/text", "--output"),
        (f"--experiment {LONG}", "File name too long"),
        ("--device meta", "'meta' holds no values"),
        ("--device gpu", "unknown device 'gpu'"),
        ("--torchcompile nothing", "--torchcompile 'nothing'"),
        ("--tune tcpa", "--tune"),
        ("--lr-scale x", "must be PATTERN=FACTOR"),
        ("--lr-scale x=nan", "must be PATTERN=FACTOR"),
        ("--nonsense", "unrecognized arguments: --nonsense"),
        ("--task gaze", "invalid choice: 'gaze'"),
    ],
    DET: [
        ("--data nowhere", "--data"),
        ("--data BAD/text", "--data"),
        ("--lr 0", "--lr: got 0"),
        ("--lr nan", "--lr: got nan"),
        ("--size 0 0", "--size: got 0"),
        ("--size 96", "--size: expected 2 arguments"),
        ("--epochs -1", "--epochs: got -1"),
        ("--arch yolo", "invalid choice: 'yolo'"),
        ("--arch-kwargs foo=1", "foo"),
        ("--arch-kwargs foo", "must be KEY=VALUE"),
        ("--model-kwargs foo=1", "foo"),
        ("--model oat_small", "oat_small"),
        ("--model nothing", "unknown model 'nothing'"),
        ("--frozen-stages -2", "--frozen-stages: got -2"),
        ("--frozen-stages 99", "frozen"),
        ("--opt nothing", "--opt 'nothing'"),
        ("--batch-size 999", "--batch-size 999 exceeds"),
        ("--resume BAD/text", "cannot read the checkpoint"),
        ("--resume BAD/other.pth", "no training checkpoint"),
        ("--resume RUN-classification/last.pth.tar", "no checkpoint of 'vizoo train --task detection'"),
        ("--resume RUN-segmentation/last.pth.tar", "no checkpoint of 'vizoo train --task detection'"),
        ("--output BAD/text", "--output"),
        ("--device meta", "'meta' holds no values"),
    ],
    SEG: [
        ("--data nowhere", "--data"),
        ("--num-classes 300", "300"),
        ("--num-classes 0", "--num-classes: got 0"),
        ("--num-classes 2", "--num-classes 2"),
        ("--scale 2 1", "--scale 2 1: need two numbers, 0 < LOW <= HIGH"),
        ("--scale nan 1", "--scale: got nan"),
        ("--size 0", "--size: got 0"),
        ("--arch upernet -b 1", "--batch-size 1"),
        ("--arch-kwargs foo=1", "foo"),
        ("--clip-grad nan", "--clip-grad: got nan"),
        ("--decay-rate 2", "--decay-rate: got 2"),
        ("--resume RUN-detection/last.pth.tar", "no checkpoint of 'vizoo train --task segmentation'"),
        (f"--experiment {LONG}", "File name too long"),
    ],
    GAZE: [
        ("--data BAD/empty", "--data"),
        ("--data BAD/text", "--data"),
        ("--data nowhere.json", "does not exist"),
        ("--trials 3", "--trials: got 3"),
        ("--grid 0 3", "--grid: got 0"),
        ("--model resnet18", "predicts no scanpaths"),
        ("--model-kwargs foo=1", "foo"),
        ("--model-kwargs foo", "must be KEY=VALUE"),
        ("--patience 0", "--patience: got 0"),
        ("--lr inf", "--lr: got inf"),
        ("--images nowhere", "nowhere"),
        ("--resume RUN-detection/last.pth.tar", "no checkpoint of 'vizoo train --task scanpath'"),
        ("--output BAD/text", "--output"),
    ],
}
OUTPUTS = [  # of all commands that write a file of the user's choice; OUT is the option and its command
    ("BAD/folder", "the ending must be .json"),
    ("BAD/folder.json", "is a folder, need a file"),
    ("BAD/fifo.json", "is no regular file, need a file"),
    ("nowhere/x.json", "no such folder"),
    ("x.txt", "the ending must be .json"),
    ("BAD/readonly.json", "read-only"),
    ("BAD/foreign.json", "vizoo did not write"),
    ("BAD/loop.json", "symbolic links"),
    (f"{LONG}.json", "File name too long"),
]
EVALUATE = [
    ("nowhere", "holds no args.yaml"),
    ("BAD/folder", "holds no args.yaml"),
    ("BAD/text", "holds no args.yaml"),
    (LONG, "holds no args.yaml"),
    ("", "RUN or --model is missing"),
    ("--model test_resnet --data DATA", "--checkpoint is missing"),
    ("--model test_resnet --checkpoint BAD/text --data DATA", "checkpoint file"),
    ("--model test_resnet --checkpoint BAD/fifo --data DATA", "is a pipe or device"),
    ("--model test_resnet --checkpoint BAD/other.pth --data DATA", "checkpoint file"),
    ("--model oat_small --checkpoint RUN-scanpath/last.pth.tar --data DATA", "oat_small"),
    ("--model resnet18 --pretrained --data DATA", "have 1000 outputs, the data 2 classes"),
    ("RUN-classification --checkpoint RUN-detection/last.pth.tar", "checkpoint"),
    ("RUN-classification --data nowhere", "is no folder"),
    ("RUN-classification --split none", "has no folder 'none/'"),
    ("RUN-classification --img-size 0", "--img-size: got 0"),
    ("RUN-classification --num-classes 1", "--num-classes 1 is below"),
    ("RUN-classification --num-classes 7", "checkpoint"),
    ("RUN-classification --batch-size 0", "--batch-size: got 0"),
    ("RUN-classification --workers x", "--workers"),
    ("RUN-classification --crop-pct 3", "--crop-pct: got 3"),
    ("RUN-classification --window 1 nan", "--window"),
    ("RUN-classification --model-kwargs foo", "must be KEY=VALUE"),
    ("RUN-classification --device gpu", "unknown device 'gpu'"),
    ("RUN-classification --nonsense", "unrecognized arguments: --nonsense"),
    ("RUN-classification --task detection", "RUN"),
    ("RUN-detection --task segmentation", "RUN"),
    ("RUN-detection --checkpoint BAD/zeros", "cannot read the checkpoint"),
    ("RUN-detection --checkpoint RUN-segmentation/last.pth.tar", "RUN"),
    ("RUN-detection --data DATA", "--data"),
    ("RUN-segmentation --checkpoint BAD/folder", "is a folder"),
    ("RUN-segmentation --workers -1", "--workers: got -1"),
    ("RUN-scanpath --checkpoint BAD/text", "checkpoint file"),
    ("RUN-scanpath --samples -1", "--samples: got -1"),
    ("RUN-scanpath --split best", "invalid choice: 'best'"),
    ("RUN-scanpath --data BAD/text", "--data"),
    ("BROKEN-empty", "expected lines 'option: value'"),
    ("BROKEN-tag", "no YAML"),
    ("BROKEN-task", "args.yaml"),
    ("BROKEN-keys", "unknown option"),
    ("BROKEN-value", "args.yaml"),
    ("BROKEN-missing", "--arch"),
]
BROKEN = {
    "empty": "",
    "tag": "task: !!python/name:os.system\n",
    "task": "task: cooking\nmodel: x\ndata: y\n",
    "keys": "task: detection\nqqqq_zzzz: 1\n",
    "value": "task: segmentation\ndata: x\nepochs: [1, 2]\n",
    "missing": "task: detection\narch: yolo\n",
}
MORE: list[tuple[str, int, str]] = [
    ("nonsense", 2, "unknown command 'nonsense'"),
    ("trian", 2, "did you mean 'train'"),
    ("show", 2, "--model"),
    ("show nowhere.png --model test_dependencyvit", 2, "nowhere.png"),
    ("show BAD/text --model test_dependencyvit", 2, "cannot identify image file"),
    ("show BAD/fifo --model test_dependencyvit", 2, "is a pipe or device"),
    ("show BAD/folder --model test_dependencyvit", 2, "is a folder"),
    ("show IMG --model nothing --pretrained", 2, "unknown model 'nothing'"),
    ("show IMG --model 'test_*' --pretrained", 2, "models; name one"),
    ("show IMG --model test_medusa --checkpoint BAD/text", 2, "checkpoint file"),
    ("show IMG --model test_medusa --checkpoint BAD/fifo", 2, "is a pipe or device"),
    ("show IMG --model test_medusa --checkpoint nowhere", 2, "does not exist"),
    ("show IMG --model test_medusa --img-size 0", 2, "--img-size: got 0"),
    ("show IMG --model test_medusa --img-size -5", 2, "--img-size: got -5"),
    ("show IMG --model test_medusa --window nan 10", 2, "--window"),
    ("show IMG --model test_medusa --window 1 -10", 2, "--window"),
    ("show IMG --model test_medusa --num-classes -1", 2, "--num-classes: got -1"),
    ("show IMG --model test_medusa --model-kwargs foo", 2, "must be KEY=VALUE"),
    ("show IMG --model test_medusa --plot x.jpg", 2, "the ending must be .png"),
    ("show IMG --model test_medusa --out nowhere/x.png", 2, "no such folder"),
    ("show IMG --model test_medusa --out BAD/foreign.png", 2, "vizoo did not write"),
    ("show IMG --model test_medusa --point 1 1", 2, "--point: what 'test_medusa' shows by explain does not depend"),
    ("show IMG --model test_medusa --class 1", 2, "--class is for --view grad-cam"),
    ("show IMG --model test_medusa --view heat", 2, "invalid choice: 'heat'"),
    ("show IMG --model test_medusa --explain-kwargs parts=5", 2, "'parts' is unknown; allowed for 'test_medusa': none"),
    ("show IMG --model test_resnet --view explain", 2, "has no explain(); allowed: grad-cam, receptive-field"),
    ("show IMG --model test_resnet --explain-kwargs a=1", 2, "'a' is unknown; allowed for 'test_resnet': none"),
    ("show IMG --model test_resnet --class 1000", 2, "--class 1000: the model has classes 0 to 999"),
    ("show IMG --model test_resnet --class -1", 2, "--class: got -1"),
    ("show IMG --model test_resnet --point 9999 0", 2, "--point 9999 0 lies outside of"),
    ("show IMG --model test_resnet --point nan 0", 2, "--point: got nan"),
    ("show IMG --model test_resnet --point -1 0", 2, "--point: got -1"),
    ("show IMG --model test_resnet --view grad-cam --num-classes 0", 2, "--num-classes: got 0"),
    ("show IMG --model test_dependencyvit --explain-kwargs layers=0", 2, "got layers=0"),
    ("show IMG --model test_dependencyvit --explain-kwargs layers=99", 2, "got layers=99"),
    ("show IMG --model test_dependencyvit --explain-kwargs parts=0", 2, "got parts=0"),
    ("show IMG --model test_dependencyvit --explain-kwargs min_size=-1", 2, "got min_size=-1"),
    ("show IMG --model test_dependencyvit --explain-kwargs method=x", 2, "got method='x'"),
    (
        "show IMG --model test_dependencyvit --explain-kwargs layrs=2",
        2,
        "allowed for 'test_dependencyvit': method, layers",
    ),
    ("dependency IMG", 2, "unknown command 'dependency'"),
    ("mm", 2, "action"),
    ("mm fly", 2, "invalid choice: 'fly'"),
    ("mm train", 2, "CONFIG is missing"),
    ("mm train nowhere.py", 2, "does not exist"),
    ("mm train BAD/folder", 2, "config"),
    ("mm train BAD/empty.py", 2, "need a dictionary, the model's config"),
    ("mm train BAD/syntax.py", 2, "cannot be read"),
    ("mm train BAD/zeros", 2, "config"),
    (f"mm train {LONG}", 2, "File name too long"),
    ("mm train CFG --cfg-options foo", 2, "write KEY=VALUE"),
    ("mm train CFG --resume nowhere", 2, "--resume"),
    ("mm train CFG --load-from nowhere", 2, "--load-from 'nowhere' does not exist"),
    ("mm train CFG --launcher x", 2, "invalid choice: 'x'"),
    ("mm test CFG", 2, "--load-from is missing"),
    ("mm test CFG --load-from BAD/tensor.pth", 2, "ann_file"),
    ("mm convert CFG", 2, "--out"),
    ("mm convert CFG --load-from BAD/other.pth --out BAD/folder", 2, "is a folder"),
    ("mm convert CFG --load-from BAD/other.pth --out nowhere/x.pth", 2, "no such folder"),
    ("mm convert CFG --load-from BAD/other.pth --out BAD/tensor.pth", 2, "exists"),
    ("mm convert CFG --load-from BAD/other.pth --out BAD/other.pth", 2, "--load-from"),
    ("mm convert CFG --load-from BAD/other.pth --out x.pth", 2, "does not fit"),
    ("mm convert CFG --load-from BAD/zeros --out x.pth", 2, "--load-from"),
    ("profile", 2, "MODEL"),
    ("profile litv2_x", 2, "did you mean litv2_"),
    ("profile nothing*", 2, "no model matches 'nothing*'"),
    ("profile litv2_s.nope", 2, "unknown tag 'nope'"),
    ("profile test_litv2 --size 0", 2, "--size 0"),
    ("profile test_litv2 --size 1", 2, "cannot run at size 1x1"),
    ("profile test_litv2 --size -4", 2, "--size"),
    ("profile test_litv2 --size 1 2 3", 2, "--size 1 2 3"),
    ("profile test_litv2 --size big", 2, "--size"),
    ("profile test_litv2 --size 9999999999999999999999", 2, "--size 99999"),
    ("profile test_vit --size 1", 2, "cannot run at size 1x1"),
    ("profile test_litv2 --batch 0", 2, "--batch"),
    ("profile test_litv2 --batch 1.5", 2, "--batch"),
    ("profile test_litv2 --threads 0", 2, "--threads"),
    ("profile test_litv2 --threads 1,x", 2, "--threads"),
    ("profile test_litv2 --threads 100000", 2, "--threads"),
    ("profile test_litv2 --import ''", 2, "--import ''"),
    ("profile test_litv2 --import .", 2, "--import '.'"),
    ("profile test_litv2 --import no_such_package", 2, "no_such_package"),
    ("profile test_litv2 --device tpu", 2, "unknown device 'tpu'"),
    ("profile test_litv2 --device cuda:63", 2, "not on this machine"),
    ("profile test_litv2 --device meta --mode latency", 2, "meta device"),
    ("profile test_litv2 --mode speed", 2, "--mode"),
    ("profile test_litv2 --dtype int4", 2, "--dtype"),
    ("profile test_litv2 --amp", 2, "bf16 or fp16"),
    ("profile test_litv2 --min-time 3 --max-time 1", 2, "--min-time 3"),
    ("profile test_litv2 --max-time nan", 2, "--max-time"),
    ("profile test_litv2 --depth -1", 2, "--depth"),
    ("profile test_litv2 --top -3", 2, "--top"),
    ("profile test_litv2 --in-chans 0", 2, "--in-chans"),
    ("profile test_litv2 --num-classes -1", 2, "--num-classes"),
    ("profile test_litv2 --model-kwargs alpha", 2, "--model-kwargs: got 'alpha'"),
    ("profile test_litv2 --model-kwargs no_such=3", 2, "no_such"),
    ("profile test_litv2 --model-kwargs alpha=3", 2, "alpha=3"),
    ("profile test_litv2 --weights nowhere.pth", 2, "--weights"),
    ("profile test_litv2 --checkpoint BAD/folder", 2, "is a folder"),
    ("profile test_litv2 --checkpoint BAD/pipe", 2, "a pipe"),
    ("profile test_litv2 --checkpoint BAD/broken.pth", 2, "broken.pth"),
    (f"profile test_litv2 --weights {LONG}.pth", 2, "--weights"),
    ("profile test_litv2 --out x.txt", 2, "--out 'x.txt'"),
    ("profile test_litv2 --out BAD/folder.csv", 2, "is a folder"),
    ("profile test_litv2 --out nowhere/x.csv", 2, "no such folder"),
    (f"profile test_litv2 --out {LONG}.json", 2, "--out"),
    ("profile test_litv2 --out BAD/foreign.csv", 2, "did not write"),
    ("profile test_litv2 --out BAD/ours.csv", 2, "other columns"),
    ("profile test_litv2 --out BAD/foreign.json", 2, "did not write"),
    ("profile test_litv2 --out BAD/readonly.csv", 2, "read-only"),
    ("profile test_litv2 --out BAD/latin.csv", 2, "UTF-8"),
    ("profile test_litv2 --plot x.gif", 2, "--plot 'x.gif'"),
    ("profile test_litv2 --plot BAD/foreign.png", 2, "did not write"),
    ("profile test_litv2 --sise 3", 2, "--sise"),
    ("profile test_litv2 --depth 1 --sort size", 2, "--sort"),
    ("profile test_litv2 --features --model-kwargs out_indices=(9,)", 2, "test_litv2"),
    ("bench", 2, "name"),
    ("bench litv2_x", 2, "did you mean litv2_"),
    ("bench resnet18", 2, "not one model of the zoo"),
    ("bench litv2_*", 2, "not one model of the zoo"),
    ("bench hf-hub:a/b", 2, "not one model of the zoo"),
    ("bench local-dir:/nowhere", 2, "not one model of the zoo"),
    (f"bench {LONG}", 2, "unknown model"),
    ("bench test_litv2 --batch 0", 2, "--batch"),
    ("bench test_litv2 --threads 0", 2, "--threads"),
    ("bench test_litv2 --rounds 0", 2, "--rounds"),
    ("bench test_litv2 --size 0", 2, "--size 0"),
    ("bench test_litv2 --size 1 --threads 1", 2, "--size 1"),
    ("bench halo --size 1 --threads 1", 2, "--size 1"),
    ("bench hilo --window 0", 2, "--window"),
    ("bench hilo --alpha 2", 2, "--alpha"),
    ("bench hilo --alpha nan", 2, "--alpha"),
    ("bench halo --window 2", 2, "--window"),
    ("bench test_litv2 --alpha 0.5", 2, "--alpha"),
    ("bench halo --reparam", 2, "--reparam"),
    ("bench test_litv2 --reparam --threads 1", 2, "no branches to merge"),
    ("bench hilo --channels-last", 2, "--channels-last"),
    ("bench test_litv2 --dtype int8", 2, "--dtype"),
    ("bench test_litv2 --device meta", 2, "meta"),
    ("bench test_litv2 --device tpu", 2, "unknown device 'tpu'"),
    ("bench test_litv2 --cpu-time --threads 2", 2, "--cpu-time"),
    ("bench test_litv2 --official nowhere", 2, "--official"),
    ("bench litv2_s --official BAD/folder --threads 1", 2, "--official"),
    ("bench oat_small --official BAD/folder --threads 1", 2, "--official"),
    (f"bench litv2_s --official {LONG}", 2, "--official"),
    ("bench halo --official BAD/folder", 2, "no official code of 'halo'"),
    ("bench test_litv2 --out x.txt", 2, "--out 'x.txt'"),
    ("bench test_litv2 --out BAD/folder.csv", 2, "is a folder"),
    ("bench test_litv2 --out nowhere/x.csv", 2, "no such folder"),
    ("bench test_litv2 --out BAD/foreign.csv", 2, "did not write"),
    ("bench test_litv2 --out BAD/ours.csv", 2, "other columns"),
    ("bench test_litv2 --out BAD/readonly.csv", 2, "read-only"),
    (f"bench test_litv2 --out {LONG}.csv", 2, "--out"),
    ("bench test_litv2 --size 9999999999999999999999", 2, "--size 99999"),
    ("bench test_litv2 --batch 99999999999", 2, "--batch"),
    ("models nothing*", 2, "no model of the zoo matches 'nothing*'"),
    ("models resnet26", 2, "no model of the zoo matches 'resnet26'"),
    ("models --jsonl", 2, "--jsonl"),
    (f"models {LONG}", 2, "no model of the zoo matches"),
    ("env now", 2, "now"),
    ("env --yaml", 2, "--yaml"),
]


def fill_disk() -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "x.csv")


def check_nan() -> None:
    layer = torch.nn.BatchNorm1d(1)
    layer.running_mean.fill_(float("nan"))  # type: ignore[union-attr]
    common.check_weights(layer, "x.pth")


RUNNING = {  # what goes wrong while a tool runs, as libraries really raise it
    "memory of PyTorch": (lambda: torch.empty(1 << 50), "out of memory; lower --batch-size"),
    "memory of NumPy": (lambda: np.empty(1 << 50), "out of memory; lower --batch-size"),
    "memory of Python": (lambda: bytearray(1 << 60), "out of memory; lower --batch-size"),
    "full disk": (fill_disk, "the system refuses 'x.csv': No space left on device"),
    "file that went away": (lambda: Path("gone").read_bytes(), "the system refuses 'gone': No such file"),
    "weights that are no numbers": (check_nan, "checkpoint file 'x.pth' holds NaN or infinity in running_mean"),
}


@pytest.mark.parametrize("case", RUNNING)
def test_what_goes_wrong_while_running(case, capsys) -> None:
    """Status 1 and one line; a fault of ours keeps its traceback."""
    raises, words = RUNNING[case]
    assert common.run_tool(lambda argv: raises() and 0, [], "train") == 1
    err = capsys.readouterr().err
    assert words in err
    assert len(err.splitlines()) == 1
    with pytest.raises(KeyError):
        common.run_tool(lambda argv: {}["x"], [], "train")
    with pytest.raises((RuntimeError, MemoryError, OSError, common.Failure)):
        common.run_tool(lambda argv: raises() and 0, ["--debug"], "train")


def test_too_large_a_model_is_no_bad_input(capsys, folders, tmp_path, monkeypatch) -> None:
    """Memory that gives out is status 1 wherever it happens."""
    monkeypatch.chdir(tmp_path)
    for more in (["--num-classes", str(1 << 45)], ["--img-size", "8000000"]):
        assert cli.main([*words("classification", folders), *more]) == 1, more
        err = capsys.readouterr().err
        assert "out of memory" in err
        assert len(err.splitlines()) == 1
    assert list(tmp_path.iterdir()) == []


@pytest.fixture(scope="module")
def bad(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("bad")
    for name, make in FILES.items():
        make(root / name)
    for name, text in BROKEN.items():
        (root / f"run-{name}").mkdir()
        (root / f"run-{name}" / "args.yaml").write_text(text)
    return root


def snapshot(*roots: Path) -> dict[str, tuple[int, int]]:
    found = {}
    for root in roots:
        for folder, _, names in os.walk(root):
            for name in names:
                state = os.lstat(os.path.join(folder, name))
                found[os.path.join(folder, name)] = (state.st_mtime_ns, state.st_size)
    return found


def cases() -> list:
    out = []
    for command, rows in TRAIN.items():
        out += [(f"{command} {given}", 2, word) for given, word in rows]
    for command in (f"evaluate RUN-{task}" for task in TASKS):
        out += [(f"{command} --out {given}", 2, word) for given, word in OUTPUTS]
        out += [(f"{command} --plot BAD/foreign.png", 2, "vizoo did not write")]
    out += [(f"evaluate {given}", 2, word) for given, word in EVALUATE]
    out += MORE
    return [
        pytest.param(*case, id=case[0].replace(LONG, "LONG"), marks=[pytest.mark.mm] * case[0].startswith("mm"))
        for case in out
    ]


@pytest.mark.parametrize(("command", "status", "word"), cases())
def test_bad_input(command, status, word, bad, folders, runs, tmp_path, monkeypatch, capfd) -> None:
    monkeypatch.chdir(tmp_path)
    if command.startswith("mm"):
        importlib.import_module("vizoo.tools.training.mm")  # its packages may warn, once
        capfd.readouterr()
    given: list[str] = []
    for text in command.split(" "):
        text = text.strip("'")
        if text.startswith("TRAIN-"):
            given += [*words(text.removeprefix("TRAIN-"), folders), "--output", "out", "--experiment", "new"]
            continue
        text = text.replace("BAD/", f"{bad}/").replace("DATA", str(folders / "images"))
        text = {"IMG": str(folders / "images" / "val" / "dark" / "0.png"), "CFG": CONFIG}.get(text, text)
        text = text.replace("RUN-", f"{runs}/") if text.startswith("RUN-") else text
        text = text.replace("BROKEN-", f"{bad}/run-") if text.startswith("BROKEN-") else text
        given.append(text)
    given = [g for g in given if g or command.endswith("''")]
    before = snapshot(bad, folders, runs, tmp_path)
    assert cli.main(given) == status
    err = capfd.readouterr().err
    assert len(err.strip().splitlines()) == 1, err
    assert word in err, err
    assert err.startswith("vizoo")
    assert "Traceback" not in err
    assert snapshot(bad, folders, runs, tmp_path) == before
