"""``vizoo evaluate`` of scanpaths: predicted ones beside those of people."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from vizoo.backbones.oat import spread_fixations
from vizoo.tools.common import Table, UserError, compute_device, save_figure, short
from vizoo.tools.data.images import read_image
from vizoo.tools.data.scanpaths import PARTS, Trial, split
from vizoo.tools.evaluation.results import add_results, check_results, write_results
from vizoo.tools.options import Parser, add, number
from vizoo.tools.scanpaths import Behaviour
from vizoo.tools.training.options import check_choice, stored_arguments
from vizoo.tools.training.scanpath import build, build_train_parser, load_trials, path_metrics, predict
from vizoo.tools.training.task import processes

COMPARED = ("sequence_score", "edit_distance", "multimatch")
SHOWN = 4  # trials of a picture
EXAMPLES = """\
examples:
  vizoo evaluate output/train/amazon
      greedy scanpaths on the test part
  vizoo evaluate output/train/amazon --samples 100 --plot scanpaths.png --out amazon.json
      also 100 drawn scanpaths of each trial, a picture and a file of everything"""


def build_parser() -> Parser:
    """Command-line options."""
    p = Parser(
        prog="vizoo evaluate",
        description="Measure an oat_* model of 'vizoo train --task scanpath' beside the people.",
        epilog=EXAMPLES,
    )
    add_results(p, "scanpath", f"predicted and human scanpaths of {SHOWN} trials")
    add(p, "--data", "the run's")
    add(p, "--images", "the run's")
    add(p, "--split", f"test; or {', '.join(part for part in (*PARTS, 'all') if part != 'test')}", default="test")
    p.add_argument(
        "--samples", type=number(int, 0), default=0, metavar="N", help="also draw N scanpaths for each trial (0)"
    )
    add(p, "--seed", "0; of the draws", default=0)
    add(p, "--batch-size", default=20)
    return p


def evaluate_scanpaths(argv: list[str]) -> dict[str, Any]:
    """Measure a run; returns the figures."""
    args = build_parser().parse_args(argv)
    check_choice("--split", args.split, (*PARTS, "all"))
    options, records = stored_arguments(build_train_parser(), args.run, "scanpath")
    check_results(args)
    device = compute_device(args.device)
    options |= {k: v for k, v in {"data": args.data, "images": args.images}.items() if v is not None}
    data = load_trials(options)
    trials = (
        data.trials if args.split == "all" else split(data.trials, options["seed"], options["split_by"])[args.split]
    )
    checkpoint = args.checkpoint or str(Path(args.run) / "model_best.pth.tar")
    model = build(options["model"], options["model_kwargs"], checkpoint)
    size, longest = args.batch_size, records.get("max_len")
    if not isinstance(longest, int) or longest < 1:
        raise UserError(f"RUN {args.run!r}: its args.yaml has max_len {short(longest)}, need a whole number above 0")
    with processes(str(device)) as world:
        device = world.device
        model.to(device)
        paths, forced = predict(model, trials, longest, size, device, world=world)
    columns = {"greedy": [found[0] for found in paths]}
    result: dict[str, Any] = {"model": options["model"], "checkpoint": checkpoint, "data": options["data"]}
    result |= {"split": args.split, "trials": len(trials), **forced, "greedy": path_metrics(trials, paths)}
    if args.samples and world.primary:  # each draw follows from those before it, so one process makes all of them
        sampled, _ = predict(model, trials, longest, size, device, args.samples, args.seed)
        columns["drawn"] = [found[0] for found in sampled]
        result |= {"samples": args.samples, "sampled": path_metrics(trials, sampled)}
    result["people"] = human_agreement(trials, data.trials)
    result["scanpaths"] = [
        {"layout": t.scene.name, "viewer": t.viewer, "target": t.target, "human": t.sequence, "greedy": path}
        for t, path in zip(trials, columns["greedy"], strict=True)
    ]
    return write_results(args, result, _tables, functools.partial(_draw, trials, columns))


def _draw(trials: Sequence[Trial], columns: dict[str, list[list[int]]], result: dict[str, Any], path: Path) -> None:
    """Draw trials of different scenes."""
    chosen = range(0, len(trials), -(-len(trials) // SHOWN))
    titled = {f"{result['model']}, {name}": [paths[i] for i in chosen] for name, paths in columns.items()}
    draw_scanpaths([trials[i] for i in chosen], titled, path)


def human_agreement(trials: Sequence[Trial], everyone: Sequence[Trial]) -> dict[str, float] | None:
    """The metrics between people: each trial against what the other viewers of its scene did; None without any."""
    pairs = []
    for trial in trials:
        others = [t for t in everyone if t.scene is trial.scene and t.target == trial.target and t is not trial]
        if others:
            pairs.append((trial, [t.sequence for t in others]))
    return path_metrics(*zip(*pairs, strict=True)) if pairs else None  # type: ignore[arg-type]


def _tables(result: dict[str, Any]) -> list[Table]:
    """Predicted scanpaths beside people's, for people."""
    head = (
        f"{result['model']} on {result['trials']:,} trials ({result['split']}) of {result['data']}: "
        f"loss {result['loss']:.4f}, SIM {result['sim']:.4f}"
    )
    kinds = {"greedy": result["greedy"]}
    if "sampled" in result:
        kinds[f"sampled x{result['samples']}"] = result["sampled"]
    people = result["people"]
    rows = []
    for key in (*COMPARED, "nss", "delta"):
        # people meet each other's metrics, but behave like themselves
        human = "" if people is None or key == "delta" else f"{people[key]:.3f}"
        rows.append([key.replace("_", " "), *(f"{found[key]:.3f}" for found in kinds.values()), human])
    for key in Behaviour._fields:
        model = [f"{found[f'model_{key}']:.3f}" for found in kinds.values()]
        rows.append([key, *model, f"{result['greedy'][f'human_{key}']:.3f}"])
    below = "people: sequence score to NSS between viewers of a scene, the rest of these trials themselves."
    return [Table(["", *kinds, "people"], rows, range(1, len(kinds) + 2), [head], [below])]


def draw_scanpaths(trials: Sequence[Trial], predicted: dict[str, list[list[int]]], path: Path) -> None:
    """Draw human and predicted scanpaths side by side, a row for each trial.

    Args:
        trials: What people did.
        predicted: Titles of columns, and a scanpath of each trial for them.
        path: PNG file to write.
    """
    from matplotlib.figure import Figure
    from matplotlib.patches import Rectangle

    width, height = trials[0].scene.screen
    n = 1 + len(predicted)
    figure = Figure(figsize=(5.5 * n, 5.3 * height / width * len(trials) + 0.4), dpi=130, layout="constrained")
    panels = figure.subplots(len(trials), n, squeeze=False)
    for k, (row, trial) in enumerate(zip(panels, trials, strict=True)):
        scene = trial.scene
        columns = {f"viewer {trial.viewer}": trial.sequence, **{name: paths[k] for name, paths in predicted.items()}}
        for axes, (name, sequence) in zip(row, columns.items(), strict=True):
            axes.set(xlim=(0, scene.screen[0]), ylim=(scene.screen[1], 0), aspect="equal")
            if scene.image is not None:
                axes.imshow(read_image(scene.image), extent=(0, *scene.screen, 0))
            for i, (x1, y1, x2, y2) in enumerate(scene.boxes.tolist()):
                if scene.image is None and scene.crops is not None and scene.crops.max() > 0:
                    crop = scene.crops[i].permute(1, 2, 0).numpy()
                    axes.imshow(crop, extent=(x1, x2, y2, y1), alpha=0.5)
                edge = {"edgecolor": "tab:red", "linewidth": 2.5} if i == trial.target else {"edgecolor": "lightgray"}
                axes.add_patch(
                    Rectangle((x1, y1), x2 - x1, y2 - y1, fill=False, zorder=2 + (i == trial.target), **edge)
                )
            points = spread_fixations(scene.boxes, sequence).numpy()
            axes.plot(*points.T, color="tab:blue", linewidth=1.2, alpha=0.8, zorder=4)
            axes.scatter(*points.T, s=70, color="white", edgecolors="tab:blue", zorder=5)
            for i, (x, y) in enumerate(points, start=1):
                axes.text(x, y, str(i), ha="center", va="center", fontsize=6, zorder=6)
            axes.set_title(f"{name}, {scene.name}: {len(sequence)} fixations", fontsize=9)
            axes.set_xticks([])
            axes.set_yticks([])
    save_figure(figure, path)
