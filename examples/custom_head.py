"""Put a head of your own on the maps of any backbone: here one that gives a value for each pixel, such as depth.

    python examples/custom_head.py --data rooms --model litv2_s

Images in rooms/images/, gray targets of the same names in rooms/targets/.  Needs vizoo and, for weights, the internet.
"""

import argparse
from pathlib import Path

import timm
import torch
from PIL import Image
from torch import nn
from torchvision.transforms.functional import normalize, resize, to_pil_image, to_tensor

import vizoo  # noqa: F401 - registers the zoo in timm


class PixelModel(nn.Module):
    """Joins the maps of all strides at the size of the largest, and maps them to one value for each pixel."""

    def __init__(self, name, pretrained):
        super().__init__()
        self.body = timm.create_model(name, pretrained=pretrained, features_only=True)
        channels = sum(self.body.feature_info.channels())
        self.head = nn.Sequential(nn.Conv2d(channels, 64, 1), nn.GELU(), nn.Conv2d(64, 1, 3, padding=1), nn.Sigmoid())

    def forward(self, image):
        """Images ``[B, 3, H, W]`` between 0 and 1 to values ``[B, 1, H, W]`` between 0 and 1."""
        maps = self.body(normalize(image, self.body.pretrained_cfg["mean"], self.body.pretrained_cfg["std"]))
        return resize(self.head(torch.cat([resize(x, maps[0].shape[2:]) for x in maps], 1)), image.shape[2:])


def main(argv=None):
    """Train, print the error, and write what the model says of the first image."""
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument("--data", required=True, type=Path, help="folder with images/ and targets/")
    p.add_argument("--model", default="litv2_s", help="any model of timm or vizoo with features")
    p.add_argument("--pretrained", action=argparse.BooleanOptionalAction, default=True)
    p.add_argument("--steps", type=int, default=1000, help="of eight images each")
    p.add_argument("--out", default="prediction.png")
    args = p.parse_args(argv)
    images, targets = (
        torch.stack([to_tensor(Image.open(f).convert(m).resize((224, 224))) for f in sorted((args.data / d).iterdir())])
        for d, m in (("images", "RGB"), ("targets", "L"))
    )
    model = PixelModel(args.model, args.pretrained)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-4)
    for step, some in enumerate(torch.randint(len(images), (args.steps, 8))):
        loss = nn.functional.l1_loss(model(images[some]), targets[some])
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        print(f"step {step + 1}: mean error {loss.item():.4f}", end="\r" if step % 50 else "\n")
    to_pil_image(model.eval().requires_grad_(False)(images[:1])[0]).save(args.out)


if __name__ == "__main__":
    main()
