"""Parsers of ``vizoo evaluate``, one for each task; nothing heavy is imported to read options or to explain them."""

from __future__ import annotations

from vizoo.tools.evaluation.results import add_results
from vizoo.tools.options import PARTS, WINDOW, Parser, add, number

PICTURED = 4  # images or trials of a picture
CLASSIFIER_EXAMPLES = """\
examples:
  vizoo evaluate output/train/first
      the best checkpoint of a run of 'vizoo train', on its held-out images
  vizoo evaluate output/train/first --data other --split test --plot confusion.png
      the same model on the images of other/test/<class>/
  vizoo evaluate --model litv2_s --pretrained --data imagenet --batch-size 64
      published weights on imagenet/val/<class>/
  vizoo evaluate --model medusa_resnet50 --checkpoint model_best.pth.tar --data chest --window 600 1500
      DICOM or 16-bit images, shown by one window"""
DENSE_EXAMPLES = """\
examples:
  vizoo evaluate output/train/first
      the best epoch on the held-out images
  vizoo evaluate output/train/first --data other --plot predictions.png --out figures.json
      on the held-out part of another folder with the same classes"""
SCANPATH_EXAMPLES = """\
examples:
  vizoo evaluate output/train/amazon
      greedy scanpaths on the test part
  vizoo evaluate output/train/amazon --samples 100 --plot scanpaths.png --out amazon.json
      also 100 drawn scanpaths of each trial, a picture and a file of everything"""


def classifier_parser() -> Parser:
    """Command-line options."""
    p = Parser(
        prog="vizoo evaluate",
        description="Measure a classifier on held-out images: accuracy, and for each class sensitivity (recall) and "
        "positive predictive value (precision).  Options not given are those of the run.",
        epilog=CLASSIFIER_EXAMPLES,
    )
    add_results(p, "classification", "the confusion matrix", required=False)
    add(p, "--model", "in place of a run")
    add(p, "--pretrained", "in place of --checkpoint")
    add(p, "--model-kwargs", "the run's")
    add(p, "--num-classes", "the number of classes in the data")
    add(p, "--data", "the run's; 'digits', or a folder with one folder for each split")
    add(p, "--split", "validation; a folder with one folder of images for each class")
    add(p, "--only-classes", "the run's; all")
    add(p, "--skip-unreadable")
    add(p, "--window", WINDOW)
    add(p, "--check-images", "the run's; auto")
    add(p, "--img-size", "the model's")
    add(p, "--in-chans", "3")
    add(p, "--crop-pct", "the model's")
    add(p, "--batch-size", "the run's; 128")
    add(p, "--workers", "the run's; 4, digits 0")
    return p


def dense_parser(task: str) -> Parser:
    """Command-line options.

    Args:
        task: ``"detection"`` or ``"segmentation"``.

    Returns:
        The parser.
    """
    p = Parser(
        prog="vizoo evaluate", description=f"Measure a model of 'vizoo train --task {task}'.", epilog=DENSE_EXAMPLES
    )
    add_results(p, task, f"truth and prediction of {PICTURED} images")
    add(p, "--data", "the run's; another folder with the same classes")
    add(p, "--batch-size", "the run's; of a detector")
    add(p, "--workers", "the run's")
    add(p, "--check-data", "the run's")
    add(p, "--skip-unreadable")
    return p


def scanpath_parser() -> Parser:
    """Command-line options."""
    p = Parser(
        prog="vizoo evaluate",
        description="Measure an oat_* model of 'vizoo train --task scanpath' beside the people.",
        epilog=SCANPATH_EXAMPLES,
    )
    add_results(p, "scanpath", f"predicted and human scanpaths of {PICTURED} trials")
    add(p, "--data", "the run's")
    add(p, "--images", "the run's")
    add(p, "--split", f"test; or {', '.join(part for part in (*PARTS, 'all') if part != 'test')}", default="test")
    p.add_argument(
        "--samples", type=number(int, 0), default=0, metavar="N", help="also draw N scanpaths for each trial (0)"
    )
    add(p, "--seed", "0; of the draws", default=0)
    add(p, "--batch-size", default=20)
    return p
