"""Train a detector on any backbone with a loop of your own, and draw what it finds in an image.

    python examples/detector.py --data coco --show street.jpg --model litv2_s

Needs pip install 'vizoo[detection]', and the internet for published weights.  `vizoo train --task detection` also
checks the data, measures average precision, resumes exactly, learns masks and uses GPUs.
"""

import argparse
import random

import torch
from PIL import Image
from torchvision.datasets import CocoDetection
from torchvision.transforms.functional import to_pil_image, to_tensor
from torchvision.utils import draw_bounding_boxes

from vizoo.heads.detection import detector


def draw(data):
    """Choose an image ``[3, H, W]`` between 0 and 1, with boxes and labels as torchvision's detectors take them."""
    image, records = random.choice(data)
    boxes = torch.tensor([r["bbox"] for r in records], dtype=torch.float32).reshape(-1, 4)
    boxes[:, 2:] += boxes[:, :2]  # width and height become the lower right corner
    return to_tensor(image), {"boxes": boxes, "labels": torch.tensor([r["category_id"] for r in records]).long()}


def main(argv=None):
    """Train for some steps, then draw the boxes found in an image."""
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument("--data", required=True, help="folder with train2017/ and annotations/instances_train2017.json")
    p.add_argument("--show", required=True, help="image to look at after training")
    p.add_argument("--model", default="litv2_s", help="any model of timm or vizoo with features")
    p.add_argument("--pretrained", action=argparse.BooleanOptionalAction, default=True)
    p.add_argument("--steps", type=int, default=1000, help="each of two images")
    p.add_argument("--size", type=int, default=480, help="shorter side of the images in pixels")
    p.add_argument("--out", default="detections.png")
    args = p.parse_args(argv)
    data = CocoDetection(f"{args.data}/train2017", f"{args.data}/annotations/instances_train2017.json")
    count = 1 + max(data.coco.cats)  # 0 is the background
    model = detector("fcos", args.model, count, args.pretrained, min_size=args.size, score_thresh=0.3)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, weight_decay=0.05)
    for step in range(args.steps):
        images, targets = zip(draw(data), draw(data), strict=True)
        loss = sum(model(images, targets).values())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        print(f"step {step + 1}: loss {loss.item():.3f}", end="\r" if step % 50 else "\n")
    image = to_tensor(Image.open(args.show).convert("RGB"))
    found = model.eval().requires_grad_(False)([image])[0]
    names = [data.coco.cats[i]["name"] for i in found["labels"].tolist()]
    to_pil_image(draw_bounding_boxes(image, found["boxes"], names) if names else image).save(args.out)
    print(f"{len(names)} objects: {args.out}")


if __name__ == "__main__":
    main()
