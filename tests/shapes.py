"""Tiny pictures of shapes in COCO and ADE20K layout, which small detectors and segmentors learn in seconds."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

WIDTH, HEIGHT = 160, 128
CLASSES = ("rectangle", "disc", "triangle")
COLOURS = ((220, 60, 40), (40, 200, 60), (50, 80, 230))


def draw(random: np.random.RandomState) -> tuple[Image.Image, Image.Image, list[dict]]:
    """A noisy gray picture with one to three shapes, its mask (1 background, 2 to 4 shapes) and its objects."""
    image = Image.fromarray(random.randint(90, 160, (HEIGHT, WIDTH, 3)).astype(np.uint8))
    mask = Image.new("L", image.size, 1)
    objects: list[dict] = []
    for _ in range(random.randint(1, 4)):
        side, kind = random.randint(34, 64), random.randint(3)
        x, y = random.randint(0, WIDTH - side), random.randint(0, HEIGHT - side)
        if any(abs(x - o["bbox"][0]) < 50 and abs(y - o["bbox"][1]) < 50 for o in objects):
            continue
        if kind == 0:
            points = [(x, y), (x + side, y), (x + side, y + side), (x, y + side)]
        elif kind == 1:
            angles = np.linspace(0, 2 * np.pi, 24, endpoint=False)
            points = [(x + side / 2 * (1 + np.cos(a)), y + side / 2 * (1 + np.sin(a))) for a in angles]
        else:
            points = [(x + side / 2, y), (x + side, y + side), (x, y + side)]
        ImageDraw.Draw(image).polygon(points, fill=COLOURS[kind])
        ImageDraw.Draw(mask).polygon(points, fill=kind + 2)
        box = [x, y, side, side]
        flat = [float(v) for point in points for v in point]
        area = float(side * side / (2 if kind == 2 else 1))
        objects.append({"bbox": box, "category_id": kind + 1, "segmentation": [flat], "area": area, "iscrowd": 0})
    return image, mask, objects


def write(root: Path) -> Path:
    """Write 16 training and 6 validation pictures in the layouts of COCO and ADE20K, with the names of the classes."""
    random = np.random.RandomState(0)
    for split, count in (("training", 16), ("validation", 6)):
        images, annotations = [], []
        for folder in ("images", "annotations"):
            (root / folder / split).mkdir(parents=True)
        for i in range(count):
            image, mask, objects = draw(random)
            image.save(root / "images" / split / f"{i}.png")
            mask.save(root / "annotations" / split / f"{i}.png")
            images.append({"id": i, "file_name": f"{i}.png", "width": WIDTH, "height": HEIGHT})
            annotations += [{**o, "id": len(annotations) + j, "image_id": i} for j, o in enumerate(objects)]
        categories = [{"id": i + 1, "name": name} for i, name in enumerate(CLASSES)]
        data = {"images": images, "annotations": annotations, "categories": categories}
        (root / "annotations" / f"instances_{split}.json").write_text(json.dumps(data))
    (root / "classes.txt").write_text("\n".join(("background", *CLASSES)))
    return root
