"""``vizoo train --task scanpath`` and ``vizoo evaluate`` of such a run: OAT on human scanpaths.

Teacher forcing with Adam, a constant learning rate and clipped gradients; the best epoch is the one whose greedy
scanpaths on the validation part behave most like people (``delta``), as in the official training.
"""

from __future__ import annotations

import argparse
import datetime
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch

from vizoo.backbones.oat import OAT, next_fixations
from vizoo.tools.common import (
    UserError,
    build_model,
    check_output,
    compute_device,
    print_table,
    progress,
    resolve_models,
    save_figure,
    short,
    write_json,
)
from vizoo.tools.data.folders import seed_everything
from vizoo.tools.data.images import read_image
from vizoo.tools.data.scanpaths import PARTS, Batches, Scanpaths, Trial, collate, load_scanpaths, search_task, split
from vizoo.tools.options import KeyValues, Parser, number
from vizoo.tools.scanpaths import Behaviour, average, compare, sim
from vizoo.tools.training.options import stored_arguments
from vizoo.tools.training.run import (
    EpochRun,
    check_loss,
    open_run,
    refuse_processes,
    write_options,
    write_summary,
)

BLANK = {True: (19, 19), False: (29, 29)}  # crops of data without images: the smallest with and without spp
COMPARED = ("sequence_score", "edit_distance", "multimatch")
SHOWN = 4  # trials of a picture
TRAIN_EXAMPLES = """\
examples:
  vizoo train --task scanpath --data search --model oat_small --lr 3e-4 --epochs 5 --experiment search
      a synthetic viewer who goes row by row to the target, learnt from scratch in about two minutes on a CPU
  vizoo train --task scanpath --data Amazon.json --images covers --model oat_small --experiment amazon
      people who look for a book cover; without --images from the places alone
  vizoo evaluate output/train/amazon --samples 100 --plot scanpaths.png
      the best epoch on the test part beside the people"""
EVALUATE_EXAMPLES = """\
examples:
  vizoo evaluate output/train/amazon
      greedy scanpaths on the test part
  vizoo evaluate output/train/amazon --samples 100 --plot scanpaths.png --out amazon.json
      also 100 drawn scanpaths of each trial, a picture and a file of everything"""


def build_train_parser() -> argparse.ArgumentParser:
    """Command-line options of training."""
    p = Parser(
        prog="vizoo train --task scanpath",
        description="Train an oat_* model on human scanpaths.",
        epilog=TRAIN_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    p.add_argument("--task", choices=("scanpath",), help="what to train")
    p.add_argument("--data", required=True, metavar="NAME|FILE", help="'search' or a .json, .pkl or .pickle file")
    p.add_argument("--images", metavar="DIR", help="images of the scenes (objects look alike without them)")
    p.add_argument("--grid", type=number(int, 1), nargs=2, metavar=("ROWS", "COLUMNS"), help="of a scene (the data's)")
    p.add_argument("--trials", type=number(int, 20), default=2000, metavar="N", help="of 'search' (2000)")
    p.add_argument("--split-by", choices=("layout", "scanpath"), default="layout", help="what is in one part (layout)")
    p.add_argument("--model", default="oat_small", metavar="MODEL", help="(oat_small)")
    p.add_argument("--model-kwargs", nargs="*", default={}, action=KeyValues, metavar="KEY=VALUE", help="arguments")
    p.add_argument("--epochs", type=number(int, 1), default=500, metavar="N", help="at most (500)")
    p.add_argument("--patience", type=number(int, 1), default=30, metavar="N", help="epochs without a better one (30)")
    p.add_argument("-b", "--batch-size", type=number(int, 1), default=20, metavar="N", help="(20)")
    p.add_argument("--lr", type=number(float, 0, above=True), default=1e-4, metavar="LR", help="of Adam (1e-4)")
    p.add_argument("--clip-grad", type=number(float, 0, above=True), default=1.0, metavar="NORM", help="(1.0)")
    p.add_argument("--eval-metric", choices=("delta", "sequence_score"), default="delta", help="what is best (delta)")
    p.add_argument("--seed", type=number(int, 0), default=1234, metavar="S", help="of weights, order and split (1234)")
    p.add_argument("--device", metavar="DEVICE", help="cpu, cuda or cuda:N (cuda if there is one)")
    p.add_argument("--output", default="output/train", metavar="DIR", help="(output/train)")
    p.add_argument("--experiment", metavar="NAME", help="folder in it (date-time-model)")
    p.add_argument(
        "--resume",
        nargs="?",
        const="auto",
        metavar="PATH",
        help="go on from a checkpoint; without a path from the newest of --experiment; from the start if there is none",
    )
    return p


def build_evaluate_parser() -> argparse.ArgumentParser:
    """Command-line options of evaluation."""
    p = Parser(
        prog="vizoo evaluate",
        description="Measure an oat_* model of 'vizoo train --task scanpath' beside the people.",
        epilog=EVALUATE_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    p.add_argument("run", metavar="RUN", help="folder that 'vizoo train --task scanpath' wrote")
    p.add_argument("--task", choices=("scanpath",), help="may be said again")
    p.add_argument("--checkpoint", metavar="PATH", help="weights (the best of the run)")
    p.add_argument("--data", metavar="NAME|FILE", help="other scanpaths (the run's)")
    p.add_argument("--images", metavar="DIR", help="their images")
    p.add_argument("--split", choices=(*PARTS, "all"), default="test", help="part of the data (test)")
    p.add_argument("--samples", type=number(int, 0), default=0, metavar="N", help="also draw N scanpaths a trial (0)")
    p.add_argument("--seed", type=number(int, 0), default=0, metavar="S", help="of the draws (0)")
    p.add_argument("-b", "--batch-size", type=number(int, 1), default=20, metavar="N", help="(20)")
    p.add_argument("--device", metavar="DEVICE", help="cpu, cuda or cuda:N (cuda if there is one)")
    p.add_argument("--out", metavar="FILE.json", help="write the figures and every scanpath there")
    p.add_argument("--plot", metavar="FILE.png", help=f"draw predicted and human scanpaths of {SHOWN} trials there")
    return p


def _load(options: dict[str, Any]) -> Scanpaths:
    grid = tuple(options["grid"]) if options.get("grid") else None
    if options["data"] == "search":
        if options.get("images"):
            raise UserError(f"--images {options['images']!r}: 'search' has no images")
        return search_task(options["trials"], grid or (3, 5), seed=options["seed"])  # type: ignore[arg-type]
    return load_scanpaths(options["data"], options.get("images"), grid)  # type: ignore[arg-type]


def _build(name: str, kwargs: dict[str, Any], checkpoint: str = "") -> OAT:
    (name,) = resolve_models([name])
    if timm.models.model_entrypoint(name.partition(".")[0]).__module__ != OAT.__module__:
        raise UserError(f"--model {name!r} predicts no scanpaths; allowed: oat_*")
    model: OAT = build_model(name, checkpoint_path=checkpoint, **kwargs)
    return model


def batches(
    model: OAT, trials: Sequence[Trial], size: int, device: torch.device, generator: torch.Generator | None = None
) -> Iterator[dict[str, Any]]:
    """Trials as :func:`vizoo.tools.data.scanpaths.collate` gives them, on the device.

    Args:
        model: Says whether it looks at crops or whole images.
        trials: The trials.
        size: Of a batch.
        device: Where they go.
        generator: Shuffles them; None keeps their order.

    Yields:
        Batches.
    """
    images = model.backbone is not None
    height, width = model.pretrained_cfg["input_size"][1:]  # type: ignore[index]
    data = Batches(trials, None if images else model.crop_size, (height, width))
    loader = torch.utils.data.DataLoader(data, size, generator is not None, collate_fn=collate, generator=generator)
    for batch in loader:
        batch = {k: v.to(device) if isinstance(v, torch.Tensor) else v for k, v in batch.items()}
        yield {**batch, "boxes": batch["boxes"] if images else None}


def teacher_forced(model: OAT, batch: dict[str, Any]) -> torch.Tensor:
    """Logits ``[B, T, N + 2]`` of a batch."""
    place = (batch["target"], batch["sequence"], batch["object_mask"])
    if batch["boxes"] is None:
        return model.forward_objects(batch["x"], batch["coords"], *place)
    out: torch.Tensor = model(batch["x"], batch["boxes"], *place, batch["coords"])
    return out


def predict(
    model: OAT,
    trials: Sequence[Trial],
    max_len: int,
    size: int,
    device: torch.device,
    samples: int = 0,
    seed: int = 0,
) -> tuple[list[list[list[int]]], dict[str, float]]:
    """Predict scanpaths.

    Args:
        model: The model.
        trials: What to predict.
        max_len: Longest scanpath.
        size: Trials of a batch.
        device: Where the model is.
        samples: Scanpaths to draw for each trial; 0 for the greedy one.
        seed: Of the draws.

    Returns:
        Scanpaths of each trial; and ``loss`` and ``sim``, teacher forced.
    """
    model.eval()
    generator = torch.Generator(device).manual_seed(seed)
    paths: list[list[list[int]]] = []
    losses, sims = [], []
    mode, n = ("sample", samples) if samples else ("greedy", 1)
    for batch in batches(model, trials, size, device):
        scene = {"object_mask": batch["object_mask"], "coords": batch["coords"]}
        flat = model.generate(batch["x"], batch["boxes"], batch["target"], max_len, mode, n, generator, **scene)
        paths += [flat[i : i + n] for i in range(0, len(flat), n)]
        with torch.inference_mode():
            logits = teacher_forced(model, batch)
            losses.append(model.loss(logits, batch["sequence"]).item() * len(logits))
            labels = next_fixations(batch["sequence"], logits.shape[2] - 2).cpu().numpy()
            probabilities = logits.softmax(-1).cpu().numpy()
        sims += [sim(p[: (t >= 0).sum()], t[t >= 0]) for p, t in zip(probabilities, labels, strict=True)]
    return paths, {"loss": sum(losses) / len(trials), "sim": float(np.mean(sims))}


def measure(trials: Sequence[Trial], paths: Sequence[Sequence[Sequence[int]]]) -> dict[str, float]:
    """Metrics of predicted scanpaths, those of one trial averaged first.

    Args:
        trials: What people did.
        paths: Scanpaths of each trial.

    Returns:
        As :func:`vizoo.tools.scanpaths.scanpath_metrics`.
    """
    rows = []
    for trial, predicted in zip(trials, paths, strict=True):
        where = ((trial.scene.boxes[:, :2] + trial.scene.boxes[:, 2:]) / 2).numpy()
        rows.append(average([compare(p, trial.sequence, trial.target, where, trial.scene.screen) for p in predicted]))
    return average(rows)


def human_agreement(trials: Sequence[Trial], everyone: Sequence[Trial]) -> dict[str, float] | None:
    """The metrics between people: each trial against what the other viewers of its scene did; None without any."""
    pairs = []
    for trial in trials:
        others = [t for t in everyone if t.scene is trial.scene and t.target == trial.target and t is not trial]
        if others:
            pairs.append((trial, [t.sequence for t in others]))
    return measure(*zip(*pairs, strict=True)) if pairs else None  # type: ignore[arg-type]


def train_scanpaths(argv: list[str]) -> int:
    """Train; returns the exit status."""
    args = build_train_parser().parse_args(argv)
    refuse_processes("scanpath")
    device = compute_device(args.device)
    seed_everything(args.seed)
    options = {k: v for k, v in vars(args).items() if v is not None}
    data = _load(options)
    parts = split(data.trials, args.seed, args.split_by)
    kwargs: dict[str, Any] = {"grid": data.grid, **args.model_kwargs}
    if "crop_size" not in kwargs and not args.images:
        crops = data.trials[0].scene.crops
        spp = getattr(_build(args.model, {**kwargs, "device": "meta"}).appearance, "spp", 1)
        kwargs["crop_size"] = BLANK[bool(spp)] if crops is None else tuple(crops.shape[2:])
    model = _build(args.model, kwargs).to(device)
    max_len = max(len(t.sequence) for t in parts["train"])
    counts = {name: len(trials) for name, trials in parts.items()}
    kwargs = {k: list(v) if isinstance(v, tuple) else v for k, v in kwargs.items()}
    stored = {k: v for k, v in options.items() if k not in ("resume", "debug")}
    stored |= {"task": "scanpath", "model_kwargs": kwargs, "max_len": max_len}
    with open_run(args, args.model) as (folder, checkpoint):
        trainer = _Trainer(model, parts, {**stored, "trials_of_parts": counts}, device, folder)
        if checkpoint:
            trainer.resume(checkpoint)
        if not checkpoint:
            trainer.save(-1)  # so that a run that stops in its first epoch can go on
        write_options(folder, stored)
        millions = sum(p.numel() for p in model.parameters()) / 1e6
        sizes = ", ".join(f"{n:,} {name}" for name, n in counts.items())
        print(f"{args.model}: {millions:.2f} M parameters, {device}\n{args.data}: {sizes}\noutput: {folder}")
        if data.note:
            print(data.note)
        best = trainer.fit()
        print(
            f"best {args.eval_metric} {best[args.eval_metric]:.4f} on validation, epoch {int(best['epoch']) + 1}: "
            f"{folder / 'model_best.pth.tar'}\nmeasure it on the test part: vizoo evaluate {folder}"
        )
    return 0


class _Trainer(EpochRun):
    """One training run."""

    kept = ("model", "model_kwargs", "max_len", "trials_of_parts", "split_by", "batch_size", "eval_metric", "seed")

    def __init__(
        self, model: OAT, parts: dict[str, list[Trial]], options: dict[str, Any], device: torch.device, folder: Path
    ) -> None:
        super().__init__(model, options, folder)
        self.parts, self.device, self.metric = parts, device, options["eval_metric"]
        self.optimizer = torch.optim.Adam(model.parameters(), lr=options["lr"])

    def entries(self) -> dict[str, Any]:
        """What else a checkpoint holds."""
        return {"arch": self.options["model"]}

    def best(self) -> dict[str, float] | None:
        """The best row of this folder's epochs, the first of equal ones."""
        sign = 1 if self.options["eval_metric"] == "delta" else -1
        rows = self.history[self.taken_over :]
        return min(rows, key=lambda row: sign * row[self.options["eval_metric"]]) if rows else None

    def fit(self) -> dict[str, float]:
        """Train to the last epoch or until nothing gets better; returns the best row of summary.csv."""
        options, parts = self.options, self.parts
        epochs, patience, metric = options["epochs"], options["patience"], options["eval_metric"]
        print("  epoch  train loss  val loss  sequence score   delta  elapsed")
        best = self.best()
        while self.epoch < epochs and not (best and self.epoch - 1 - best["epoch"] >= patience):
            loss = self._train_epoch()
            paths, found = predict(self.model, parts["val"], options["max_len"], options["batch_size"], self.device)
            row = {"epoch": self.epoch, "train_loss": loss, **found, **measure(parts["val"], paths)}
            self.history.append(row)
            best = self.best()
            better = best is row
            self.save(self.epoch, *["model_best"] * better)
            write_summary(self.folder, self.history)
            elapsed = datetime.timedelta(seconds=int(self.elapsed + time.monotonic() - self.started))
            print(
                f"{self.epoch + 1:3d}/{epochs:<3d}  {row['train_loss']:10.4f}  {row['loss']:8.4f}  "
                f"{row['sequence_score']:14.4f}  {row['delta']:6.3f}{'*' if better else ' '} {elapsed}",
                flush=True,
            )
            self.epoch += 1
        assert best is not None  # there is an epoch at least
        if self.epoch < epochs:
            print(f"no better {metric} for {patience} epochs")
        return best

    def _train_epoch(self) -> float:
        options, trials, total = self.options, self.parts["train"], 0.0
        self.model.train()
        seed_everything(options["seed"], self.epoch)  # a resumed run draws the same dropout
        generator = torch.Generator().manual_seed(options["seed"] + self.epoch)
        steps = -(-len(trials) // options["batch_size"])
        with progress() as bar:
            task = bar.add_task(f"epoch {self.epoch + 1}/{options['epochs']}", total=steps)
            shuffled = batches(self.model, trials, options["batch_size"], self.device, generator)
            for k, batch in enumerate(shuffled):
                loss = self.model.loss(teacher_forced(self.model, batch), batch["sequence"])
                where = f"in epoch {self.epoch + 1}, batch {k + 1} of {steps}"
                check_loss(loss.item(), where, f"lower --lr {options['lr']:g}")
                self.optimizer.zero_grad()
                loss.backward()
                torch.nn.utils.clip_grad_norm_(self.model.parameters(), options["clip_grad"])
                self.optimizer.step()
                total += loss.item() * len(batch["target"])
                bar.advance(task)
        return total / len(trials)


def evaluate_scanpaths(argv: list[str]) -> int:
    """Measure a run; returns the exit status."""
    args = build_evaluate_parser().parse_args(argv)
    options, records = stored_arguments(build_train_parser(), args.run, "scanpath")
    check_output(args.out, "--out", ".json")
    check_output(args.plot, "--plot", ".png")
    device = compute_device(args.device)
    options |= {k: v for k, v in {"data": args.data, "images": args.images}.items() if v is not None}
    data = _load(options)
    trials = (
        data.trials if args.split == "all" else split(data.trials, options["seed"], options["split_by"])[args.split]
    )
    checkpoint = args.checkpoint or str(Path(args.run) / "model_best.pth.tar")
    model = _build(options["model"], options["model_kwargs"], checkpoint).to(device)
    size, longest = args.batch_size, records.get("max_len")
    if not isinstance(longest, int) or longest < 1:
        raise UserError(f"RUN {args.run!r}: its args.yaml has max_len {short(longest)}, need a whole number above 0")
    greedy, forced = predict(model, trials, longest, size, device)
    result: dict[str, Any] = {"model": options["model"], "checkpoint": checkpoint, "data": options["data"]}
    result |= {"split": args.split, "trials": len(trials), **forced, "greedy": measure(trials, greedy)}
    sampled = None
    if args.samples:
        sampled, _ = predict(model, trials, longest, size, device, args.samples, args.seed)
        result |= {"samples": args.samples, "sampled": measure(trials, sampled)}
    result["people"] = human_agreement(trials, data.trials)
    _report(result)
    if args.out:
        rows = [
            {"layout": t.scene.name, "viewer": t.viewer, "target": t.target, "human": t.sequence, "greedy": g[0]}
            for t, g in zip(trials, greedy, strict=True)
        ]
        write_json(args.out, {**result, "scanpaths": rows})
    if args.plot:
        chosen = range(0, len(trials), -(-len(trials) // SHOWN))  # of different scenes
        columns = {f"{result['model']}, greedy": [greedy[i][0] for i in chosen]}
        if sampled:
            columns[f"{result['model']}, drawn"] = [sampled[i][0] for i in chosen]
        draw_scanpaths([trials[i] for i in chosen], columns, Path(args.plot))
    return 0


def _report(result: dict[str, Any]) -> None:
    print(
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
    print_table(["", *kinds, "people"], rows, numeric=range(1, len(kinds) + 2))
    print("people: sequence score to NSS between viewers of a scene, the rest of these trials themselves.")


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
            points = ((scene.boxes[:, :2] + scene.boxes[:, 2:]) / 2)[list(sequence)].numpy()
            # fixations of one object fan out, so that every number can be read
            spread = np.array([[min(m // 3, 2) * 0.16, m % 3 * 0.22] for m in _repeats(sequence)])
            sides = (scene.boxes[:, 2:] - scene.boxes[:, :2])[list(sequence)].numpy()
            points = points + (spread - [0.0, 0.22]) * sides
            axes.plot(*points.T, color="tab:blue", linewidth=1.2, alpha=0.8, zorder=4)
            axes.scatter(*points.T, s=70, color="white", edgecolors="tab:blue", zorder=5)
            for i, (x, y) in enumerate(points, start=1):
                axes.text(x, y, str(i), ha="center", va="center", fontsize=6, zorder=6)
            axes.set_title(f"{name}, {scene.name}: {len(sequence)} fixations", fontsize=9)
            axes.set_xticks([])
            axes.set_yticks([])
    save_figure(figure, path)


def _repeats(sequence: Sequence[int]) -> list[int]:
    """How often each object was fixated before."""
    return [list(sequence[:i]).count(item) for i, item in enumerate(sequence)]
