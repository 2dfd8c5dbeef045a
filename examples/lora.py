"""Train LoRA adapters in every linear layer of a backbone, save them alone, and load them again.

    python examples/lora.py --data flowers --model litv2_s --out adapters

The images lie in flowers/train/<class>/.  Every weight of the backbone stays as it was published; the adapters and the
new classifier are some per cent of it.  Needs pip install peft, and the internet for published weights.
"""

import argparse

import timm
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from timm.data import create_dataset, create_transform, resolve_model_data_config
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader

import vizoo  # noqa: F401 - registers the zoo in timm


def backbone(name, pretrained, count):
    """The same model each time: published weights, and a classifier that follows from a seed."""
    torch.manual_seed(0)
    return timm.create_model(name, pretrained=pretrained, num_classes=count)


def main(argv=None):
    """Train, save the adapters, load them, and compare what both models say."""
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument("--data", required=True, help="folder with train/<class>/")
    p.add_argument("--model", default="litv2_s", help="any classifier of timm or vizoo")
    p.add_argument("--pretrained", action=argparse.BooleanOptionalAction, default=True)
    p.add_argument("--epochs", type=int, default=5)
    p.add_argument("--out", default="adapters", help="folder for the adapters")
    args = p.parse_args(argv)
    data = create_dataset("", args.data, "train")
    count = len(data.reader.class_to_idx)
    base = backbone(args.model, args.pretrained, count)
    data.transform = create_transform(**resolve_model_data_config(base), is_training=True)
    config = LoraConfig(r=8, target_modules="all-linear", modules_to_save=[base.pretrained_cfg["classifier"]])
    model = get_peft_model(base, config).eval()  # not train(): statistics of batch norms are no adapters and stay
    model.print_trainable_parameters()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    for epoch in range(args.epochs):
        for images, target in DataLoader(data, 32, shuffle=True):
            loss = cross_entropy(model(images), target)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        print(f"epoch {epoch + 1}: loss {loss.item():.3f}")
    model.save_pretrained(args.out)
    again = PeftModel.from_pretrained(backbone(args.model, args.pretrained, count), args.out).eval()
    with torch.inference_mode():
        difference = (again(images) - model(images)).abs().max().item()
    print(f"{args.out}: loaded again, the model differs by {difference:.1e}")


if __name__ == "__main__":
    main()
