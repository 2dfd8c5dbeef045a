"""Fine-tune any backbone on a folder of images, with timm's parts and a loop of your own.

    python examples/finetune.py --data flowers --model litv2_s --epochs 10

The images lie in flowers/train/<class>/ and flowers/val/<class>/.  In the first epoch the head learns alone, then all.
Needs vizoo alone, and the internet for published weights.  `vizoo train` also checks the data and resumes exactly.
"""

import argparse

import timm
import torch
from timm.data import create_dataset, create_loader, resolve_model_data_config
from timm.optim import create_optimizer_v2
from timm.scheduler import CosineLRScheduler

import vizoo  # noqa: F401 - registers the zoo in timm


@torch.inference_mode()
def accuracy(model, loader):
    """Per cent of the images that are classified correctly."""
    right = [(model.eval()(images).argmax(1) == target).sum().item() for images, target in loader]
    return 100 * sum(right) / len(loader.dataset)


def main(argv=None):
    """Train, print the accuracy after each epoch, and save the weights."""
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument("--data", required=True, help="folder with train/<class>/ and val/<class>/")
    p.add_argument("--model", default="litv2_s", help="any classifier of timm or vizoo")
    p.add_argument("--pretrained", action=argparse.BooleanOptionalAction, default=True)
    p.add_argument("--epochs", type=int, default=10)
    p.add_argument("--workers", type=int, default=2)
    p.add_argument("--out", default="finetuned.pth")
    args = p.parse_args(argv)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    train, val = (create_dataset("", args.data, split) for split in ("train", "validation"))  # finds val/ too
    count = len(train.reader.class_to_idx)
    model = timm.create_model(args.model, pretrained=args.pretrained, num_classes=count).to(device)
    how = {**resolve_model_data_config(model), "num_workers": args.workers, "persistent_workers": False}
    batches = create_loader(train, batch_size=min(32, len(train)), is_training=True, device=device, **how)
    held_out = create_loader(val, batch_size=32, device=device, **how)
    optimizer = create_optimizer_v2(model, "adamw", lr=5e-4, weight_decay=0.05, layer_decay=0.8)  # earlier layers: less
    schedule = CosineLRScheduler(optimizer, t_initial=args.epochs * len(batches), t_in_epochs=False)
    for epoch in range(args.epochs):
        model.train(epoch > 0).requires_grad_(epoch > 0).get_classifier().requires_grad_(True)  # first the head alone
        for step, (images, target) in enumerate(batches, epoch * len(batches)):
            schedule.step_update(step)
            loss = torch.nn.functional.cross_entropy(model(images), target, label_smoothing=0.1)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        print(f"epoch {epoch + 1}: loss {loss.item():.3f}, held-out accuracy {accuracy(model, held_out):.1f} %")
    torch.save(model.state_dict(), args.out)
    print(f"model = timm.create_model({args.model!r}, num_classes={count}, checkpoint_path={args.out!r})")


if __name__ == "__main__":
    main()
