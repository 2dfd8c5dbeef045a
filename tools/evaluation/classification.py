"""``vizoo evaluate`` of a classifier: accuracy, sensitivity and precision on held-out images."""

from __future__ import annotations

import argparse
import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from timm.data import ImageNetInfo, infer_imagenet_subset
from timm.models import get_pretrained_cfg
from torch import nn

from vizoo.tools.common import (
    Table,
    UserError,
    build_model,
    compute_device,
    progress,
    read_yaml,
    resolve_model,
    save_figure,
)
from vizoo.tools.data.folders import digits_splits, open_split, reorder_classes, reordered
from vizoo.tools.data.shares import gather_batches
from vizoo.tools.evaluation.results import add_results, check_results, write_results
from vizoo.tools.options import WINDOW, Parser, add
from vizoo.tools.training.classification import accuracies, model_config, parse_options, shared_loader
from vizoo.tools.training.options import options_file, stored_options
from vizoo.tools.training.run import load_training_checkpoint, match_classes, say_unnamed, skipped_text
from vizoo.tools.training.task import ALONE, World, processes
from vizoo.tools.training.tuning import tune

LARGEST_MATRIX = 20  # classes of a confusion matrix that is printed
EXAMPLES = """\
examples:
  vizoo evaluate output/train/first
      the best checkpoint of a run of 'vizoo train', on its held-out images
  vizoo evaluate output/train/first --data other --split test --plot confusion.png
      the same model on the images of other/test/<class>/
  vizoo evaluate --model litv2_s --pretrained --data imagenet --batch-size 64
      published weights on imagenet/val/<class>/
  vizoo evaluate --model medusa_resnet50 --checkpoint model_best.pth.tar --data chest --window 600 1500
      DICOM or 16-bit images, shown by one window"""


def build_parser() -> argparse.ArgumentParser:
    """Command-line options."""
    p = Parser(
        prog="vizoo evaluate",
        description="Measure a classifier on held-out images: accuracy, and for each class sensitivity (recall) and "
        "positive predictive value (precision).  Options not given are those of the run.",
        epilog=EXAMPLES,
    )
    add_results(p, "classification", "the confusion matrix", required=False)
    add(p, "--model", "in place of a run")
    add(p, "--pretrained", "in place of --checkpoint")
    add(p, "--model-kwargs", "the run's")
    add(p, "--num-classes", "the number of classes in the data")
    add(p, "--data", "the run's; 'digits', or a folder with one folder for each split")
    add(p, "--split", "validation; a folder with one folder of images for each class")
    add(p, "--skip-unreadable")
    add(p, "--window", WINDOW)
    add(p, "--check-images", "the run's; auto")
    add(p, "--img-size", "the model's")
    add(p, "--in-chans", "3")
    add(p, "--crop-pct", "the model's")
    add(p, "--batch-size", "the run's; 128")
    add(p, "--workers", "the run's; 4, digits 0")
    return p


def _options(args: argparse.Namespace) -> argparse.Namespace:
    """The options of the run with those given here instead: the same parser, so the same checks."""
    words: list[str] = []
    if args.run:
        file = options_file(args.run)
        if not args.device and "device" in read_yaml(file, "RUN"):
            words += ["--device", "cuda" if torch.cuda.is_available() else "cpu"]
        words += ["-c", str(file)]
    elif not args.model:
        raise UserError("RUN or --model is missing; for example 'vizoo evaluate output/train/first'")
    given = {**vars(args), "val_split": args.split}
    for name in ("model", "num_classes", "data", "val_split", "check_images", "img_size", "in_chans", "crop_pct"):
        if given[name] is not None:
            words.append(f"--{name.replace('_', '-')}={given[name]}")
    for name in ("batch_size", "workers", "device"):
        if given[name] is not None:
            words.append(f"--{name.replace('_', '-')}={given[name]}")
    if args.batch_size is not None:
        words.append(f"--validation-batch-size={args.batch_size}")
    words += ["--skip-unreadable"] * args.skip_unreadable
    if args.window is not None:
        words += ["--window", *map(str, args.window)]
    if args.model_kwargs:
        words += ["--model-kwargs", *(f"{k}={v!r}" for k, v in args.model_kwargs.items())]
    return parse_options(words)


def evaluate_classifier(argv: list[str]) -> dict[str, Any]:
    """Measure a classifier; returns the figures."""
    args = build_parser().parse_args(argv)
    options = _options(args)
    name = resolve_model(options.model)
    check_results(args)
    device = compute_device(options.device)
    checkpoint = args.checkpoint or (str(Path(args.run) / "model_best.pth.tar") if args.run and not args.model else "")
    if not checkpoint and not args.pretrained:
        raise UserError("--checkpoint is missing: give one, or --pretrained for the published weights")
    dataset, classes = _open(options)
    outputs = options.num_classes or len(classes)
    if outputs < len(classes):
        raise UserError(f"--num-classes {outputs} is below the {len(classes)} classes of the data")
    if args.pretrained:
        trained, who = published_classes(name, classes, outputs), f"--pretrained {name}"
    else:
        trained, who = stored_classes(checkpoint, args.run), f"checkpoint {checkpoint!r}"
    order = match_classes(trained, classes, f"--data {options.data!r}", who)
    reorder_classes(dataset, order)
    classes = reordered(classes, order)
    kwargs, data = model_config(options, outputs)
    weights: dict[str, Any] = {"pretrained": args.pretrained, "checkpoint_path": checkpoint}
    with processes(str(device)) as world:
        model = build_model(name, functools.partial(tune, args=options), **weights, **kwargs).to(world.device)
        if world.primary:
            say_unnamed(trained, who)
        found = figures(model, shared_loader(options, dataset, data, world), world.device, classes, world)
    about = {"model": name, "checkpoint": checkpoint, "data": options.data}
    size = "x".join(map(str, data["input_size"]))
    return write_results(args, {**about, "input": size, "skipped": dataset.skipped, **found}, _tables, draw_confusion)


def _open(options: argparse.Namespace) -> tuple[Any, list[str]]:
    """Held-out images and the names of their classes."""
    mode = "L" if options.in_chans == 1 else "RGB"
    if options.data == "digits":
        splits = digits_splits(mode)
        return splits.held_out, splits.classes
    where = (options.data, options.val_split)
    dataset = open_split(*where, mode, options.check_images, options.window, options.skip_unreadable)
    index = dataset.reader.class_to_idx
    return dataset, sorted(index, key=index.__getitem__)


def stored_classes(checkpoint: str, run: str | None) -> list[str] | None:
    """Names of the classes that a classifier was trained on.

    Args:
        checkpoint: Its file.
        run: Folder of the run that made it, or None.

    Returns:
        The names in the order of its outputs, None where neither says them.
    """
    try:
        found = load_training_checkpoint(Path(checkpoint)).get("classes")
    except UserError:  # bare weights, or no checkpoint at all, which loading it will say
        found = None
    return found or (stored_options(run).get("classes") if run else None)


def published_classes(name: str, found: Sequence[str], outputs: int) -> list[str] | None:
    """Names of the classes of published weights.

    Args:
        name: Model.
        found: Classes of the data.
        outputs: Of the model that is to be measured.

    Returns:
        WordNet ids of ImageNet if the data are named so, None where the names cannot be known.

    Raises:
        UserError: If the weights have another number of outputs: the head would be a random one.
    """
    config = get_pretrained_cfg(name, allow_unregistered=True) if ":" not in name else None
    if config is None:
        return None
    count = config.num_classes
    if count != outputs:
        what = f"--num-classes is {outputs}" if outputs != len(found) else f"the data {outputs} classes"
        raise UserError(f"--pretrained: the published weights of {name!r} have {count} outputs, {what}")
    subset = infer_imagenet_subset({"num_classes": count})
    names = ImageNetInfo(subset).label_names() if subset else []
    return names if set(names) & set(found) else None


def figures(
    model: nn.Module, loader: Any, device: torch.device, classes: Sequence[str], world: World = ALONE
) -> dict[str, Any]:
    """Everything that this tool reports.

    Args:
        model: Maps images ``[B, C, H, W]`` to logits ``[B, at least classes]``.
        loader: Of :func:`vizoo.tools.data.folders.held_out_loader`.
        device: Where the model is.
        classes: Their names.
        world: Processes that share the images by whole batches.

    Returns:
        ``images``, ``loss``, ``top1`` and ``top5`` in per cent; ``confusion`` with a row for each true class and a
        column for each predicted one; ``classes`` with ``name``, ``images``, ``sensitivity`` (recall) and ``ppv``
        (positive predictive value, precision) in per cent, None where it is not defined.
    """
    from torchmetrics import MetricCollection
    from torchmetrics.classification import MulticlassConfusionMatrix, MulticlassPrecision, MulticlassRecall

    seen: list[tuple[int, torch.Tensor, torch.Tensor]] = []  # of each batch: outputs, predictions, targets
    with progress(world.primary) as bar:
        task = bar.add_task("evaluating", total=len(loader))

        def add(logits: torch.Tensor, target: torch.Tensor) -> None:
            seen.append((logits.shape[1], logits.argmax(1).cpu(), target.cpu()))
            bar.advance(task)

        totals = accuracies(model, loader, device, world=world, on_batch=add)
    batches = gather_batches(seen, world.rank, world.size)
    each: dict[str, Any] = {"num_classes": batches[0][0], "sync_on_compute": False}
    metrics: dict[str, Any] = {
        "recall": MulticlassRecall(average=None, **each),
        "precision": MulticlassPrecision(average=None, **each),
        "confusion": MulticlassConfusionMatrix(**each),
    }
    collection = MetricCollection(metrics)
    for _, predictions, target in batches:
        collection.update(predictions, target)
    values = collection.compute()
    matrix = values["confusion"]
    rows = []
    for i, name in enumerate(classes):
        images, called = int(matrix[i].sum()), int(matrix[:, i].sum())
        sensitivity = 100 * values["recall"][i].item() if images else None
        ppv = 100 * values["precision"][i].item() if called else None
        rows.append({"name": name, "images": images, "sensitivity": sensitivity, "ppv": ppv})
    return {"images": int(matrix.sum()), **totals, "classes": rows, "confusion": matrix.tolist()}


def _tables(result: dict[str, Any]) -> list[Table]:
    """The classes, and the confusion matrix if it is small, for people."""
    images = f"{result['images']:,} images{skipped_text(result['skipped'])}"
    top5 = f"top-5 {result['top5']:.2f} %, " if len(result["confusion"]) > 5 else ""
    above = [
        f"{result['model']} on {result['data']}, input {result['input']}, {images}",
        f"accuracy {result['top1']:.2f} %, {top5}loss {result['loss']:.4f}",
        "",
    ]

    def per_cent(x: float | None) -> str:
        return "" if x is None else f"{x:.1f}"

    rows = [[c["name"], f"{c['images']:,}", per_cent(c["sensitivity"]), per_cent(c["ppv"])] for c in result["classes"]]
    below = "sensitivity: share of a class that is found (recall); PPV: share of the calls that are right (precision)"
    tables = [Table(["class", "images", "sensitivity %", "PPV %"], rows, (1, 2, 3), above, [below])]
    if len(result["confusion"]) <= LARGEST_MATRIX:
        names = [c["name"] for c in result["classes"]]
        names += [str(i) for i in range(len(names), len(result["confusion"]))]
        counts = [[name, *map(str, row)] for name, row in zip(names, result["confusion"], strict=True)]
        head = ["confusion: a row for each true class, a column for each prediction"]
        tables.append(Table(["", *names], counts, range(1, len(names) + 1), head))
    return tables


def draw_confusion(result: dict[str, Any], path: Path) -> None:
    """Draw the confusion matrix, each row in shares of its class.

    Args:
        result: Of :func:`figures`, with ``model`` and ``data``.
        path: PNG file to write.
    """
    import numpy as np
    from matplotlib.figure import Figure

    counts = np.array(result["confusion"])
    names = [c["name"] for c in result["classes"]]
    names += [str(i) for i in range(len(names), len(counts))]
    shares = counts / np.maximum(counts.sum(1, keepdims=True), 1)
    side = max(4.5, min(12, 1.5 + 0.45 * len(names)))
    figure = Figure(figsize=(side + 1, side), dpi=150, layout="constrained")
    axes = figure.subplots()
    image = axes.imshow(shares, vmin=0, vmax=1, cmap="Blues")
    figure.colorbar(image, label="share of the true class")
    if len(names) <= LARGEST_MATRIX:
        for (i, j), count in np.ndenumerate(counts):
            colour = "white" if shares[i, j] > 0.5 else "black"
            axes.text(j, i, str(count), ha="center", va="center", color=colour, fontsize=8)
        axes.set_xticks(range(len(names)), names, rotation=45, ha="right", rotation_mode="anchor")
        axes.set_yticks(range(len(names)), names)
    axes.set(xlabel="predicted class", ylabel="true class")
    axes.set_title(f"{result['model']} on {Path(result['data']).name}: accuracy {result['top1']:.2f} %", fontsize=10)
    save_figure(figure, path)
