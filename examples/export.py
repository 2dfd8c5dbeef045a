"""Export a classifier as a PyTorch program and as ONNX, for a batch of any size, and compare both with the model.

    python examples/export.py --model litv2_s --size 224 --out litv2_s

Writes litv2_s.pt2 and litv2_s.onnx, which run without vizoo on images of this size.  Needs pip install onnx onnxscript
onnxruntime, and the internet for published weights.
"""

import argparse

import onnxruntime
import timm
import torch
from timm.data import resolve_model_data_config

import vizoo  # noqa: F401 - registers the zoo in timm


def main(argv=None):
    """Export, then run both files with a larger batch and print the largest difference of each."""
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument("--model", default="litv2_s", help="any classifier of timm or vizoo")
    p.add_argument("--pretrained", action=argparse.BooleanOptionalAction, default=True)
    p.add_argument("--checkpoint", default="", help="weights of your own")
    p.add_argument("--num-classes", type=int, help="of your own weights")
    p.add_argument("--size", type=int, help="side of the images in pixels (the model's)")
    p.add_argument("--out", default="exported", help="name of the files without .pt2 and .onnx")
    args = p.parse_args(argv)
    how = {"pretrained": args.pretrained and not args.checkpoint, "checkpoint_path": args.checkpoint}
    model = timm.create_model(args.model, num_classes=args.num_classes, exportable=True, **how).eval()
    channels, height, width = resolve_model_data_config(model)["input_size"]
    images = torch.randn(5, channels, args.size or height, args.size or width)
    with torch.no_grad():
        expected = model(images)
        program = torch.export.export(model, (images[:2],), dynamic_shapes=({0: torch.export.Dim.DYNAMIC},))
        torch.export.save(program, f"{args.out}.pt2")
        loaded = torch.export.load(f"{args.out}.pt2").module()(images)
        onnx = torch.onnx.export(program, input_names=["images"], output_names=["logits"], dynamo=True, verbose=False)
    onnx.save(f"{args.out}.onnx")
    session = onnxruntime.InferenceSession(f"{args.out}.onnx", providers=["CPUExecutionProvider"])
    logits = torch.from_numpy(session.run(["logits"], {"images": images.numpy()})[0])
    for file, got in ((f"{args.out}.pt2", loaded), (f"{args.out}.onnx", logits)):
        print(f"{file}: {len(images)} images, largest difference {(got - expected).abs().max().item():.1e}")


if __name__ == "__main__":
    main()
