"""Find the images of a folder that look like a given one, by features of any backbone.

    python examples/retrieval.py --data photos --query photos/beach/7.jpg --model litv2_s --top 5

Every image becomes one vector of length 1: the pooled features that the classifier of the model would see.  The
product of two is their cosine similarity.  Needs vizoo alone, and the internet for published weights.
"""

import argparse
from pathlib import Path

import timm
import torch
from PIL import Image
from timm.data import create_transform, resolve_model_data_config
from timm.data.readers import get_img_extensions

import vizoo  # noqa: F401 - registers the zoo in timm


def features(model, transform, files, batch_size=32):
    """Unit vectors ``[files, channels]`` of images."""
    rows = []
    with torch.inference_mode():
        for start in range(0, len(files), batch_size):
            images = [transform(Image.open(file).convert("RGB")) for file in files[start : start + batch_size]]
            rows.append(torch.nn.functional.normalize(model(torch.stack(images)), dim=1))
    return torch.cat(rows)


def main(argv=None):
    """Index the folder, look the query up, and print the nearest files."""
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument("--data", required=True, help="folder of images, searched with all folders in it")
    p.add_argument("--query", required=True, help="an image")
    p.add_argument("--model", default="litv2_s", help="any classifier of timm or vizoo")
    p.add_argument("--pretrained", action=argparse.BooleanOptionalAction, default=True)
    p.add_argument("--top", type=int, default=5)
    args = p.parse_args(argv)
    files = sorted(file for file in Path(args.data).rglob("*") if file.suffix.lower() in get_img_extensions())
    if not files:
        p.error(f"--data {args.data!r} holds no image")
    model = timm.create_model(args.model, pretrained=args.pretrained, num_classes=0).eval()  # 0: no classifier
    transform = create_transform(**resolve_model_data_config(model))
    index = features(model, transform, files)
    similarity = (index @ features(model, transform, [args.query])[0]).tolist()
    for cosine, file in sorted(zip(similarity, files, strict=True), reverse=True)[: args.top]:
        print(f"{cosine:.4f}  {file}")


if __name__ == "__main__":
    main()
