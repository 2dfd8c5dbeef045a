"""Comparing predicted with human scanpaths: sequences of objects, behaviour, MultiMatch, probabilities, saliency.

The metrics of OAT (https://arxiv.org/abs/2407.13335), equal to the official code's.  MultiMatch is a plain dynamic
programme, which needs no package; where two alignments cost the same, the diagonal one is taken.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

MULTIMATCH = ("vector", "direction", "length", "position", "duration")
FEWEST_POINTS = 3  # shorter scanpaths are padded with the point (1, 1), as in the official code


class Behaviour(NamedTuple):
    """What a scanpath does: whether it ends on the target, its length, and the shares of its fixations.

    Attributes:
        correct: 1 if the last fixation is on the target.
        length: Number of fixations.
        search: Share of fixations that enter an object for the first time.
        refixation: Share that stay on an object.
        revisit: Share that come back to an object.
    """

    correct: float
    length: float
    search: float
    refixation: float
    revisit: float


def sequence_score(pred: Sequence[int], true: Sequence[int]) -> float:
    """Longest common subsequence over the longer length, 1 for equal scanpaths."""
    row = [0] * (len(true) + 1)
    for p in pred:
        before = row
        row = [0]
        for j, t in enumerate(true):
            row.append(before[j] + 1 if p == t else max(before[j + 1], row[j]))
    return row[-1] / max(len(pred), len(true), 1)


def edit_distance(pred: Sequence[int], true: Sequence[int]) -> int:
    """Levenshtein distance with unit costs."""
    row = list(range(len(true) + 1))
    for i, p in enumerate(pred, 1):
        before = row
        row = [i]
        for j, t in enumerate(true):
            row.append(min(before[j] + (p != t), before[j + 1] + 1, row[j] + 1))
    return row[-1]


def behaviour(sequence: Sequence[int], target: int) -> Behaviour:
    """Describe one scanpath.

    Args:
        sequence: Fixated objects; an empty one is all zero.
        target: The object searched for.

    Returns:
        The five numbers.
    """
    n, seen, last = len(sequence), set(), None
    counts = {"search": 0, "refixation": 0, "revisit": 0}
    for i in sequence:
        counts["refixation" if i == last else "revisit" if i in seen else "search"] += 1
        seen.add(i)
        last = i
    return Behaviour(float(last == target), n, **{k: v / max(n, 1) for k, v in counts.items()})


def delta(model: Sequence[float], human: Sequence[float]) -> float:
    """Mean relative distance ``|model - human| / human`` of averaged behaviours.

    Args:
        model: Five averages.
        human: The same of the people; numbers that are 0 are left out.

    Returns:
        0 for the same behaviour; lower is better.
    """
    m, h = np.asarray(model, float), np.asarray(human, float)
    known = h != 0
    return float((np.abs(m - h)[known] / h[known]).mean())


def sim(probabilities: np.ndarray, sequence: Sequence[int]) -> float:
    """Probability that the model gives to each human choice, on average.

    Args:
        probabilities: ``[T, classes]``, teacher forced.
        sequence: The choices ``[T]``.

    Returns:
        A number from 0 to 1.
    """
    return float(probabilities[np.arange(len(sequence)), np.asarray(sequence)].mean())


def nss(pred: np.ndarray, true: np.ndarray, screen: tuple[int, int]) -> float:
    """Normalised scanpath saliency: the map that is 1 on predicted pixels, standardised, at the human pixels.

    Args:
        pred: Predicted points ``[P, 2]`` as x, y in pixels.
        true: Human points ``[Q, 2]``.
        screen: Width and height in pixels.

    Returns:
        The mean; 0 without any point.
    """
    pixels = {tuple(p) for p in np.asarray(pred, int).tolist()}
    if not pixels or not len(true):
        return 0.0
    share = len(pixels) / (screen[0] * screen[1])
    hits = np.mean([tuple(p) in pixels for p in np.asarray(true, int).tolist()])
    return float((hits - share) / np.sqrt(share * (1 - share)))


def multimatch(pred: np.ndarray, true: np.ndarray, screen: tuple[int, int]) -> np.ndarray:
    """MultiMatch of two scanpaths without simplification, durations all 1 (Jarodzka et al. 2010).

    Args:
        pred: Points ``[P, 2]`` as x, y in pixels.
        true: Points ``[Q, 2]``.
        screen: Width and height in pixels.

    Returns:
        Similarities of ``MULTIMATCH``, each from 0 to 1.
    """
    a, b = (
        np.concatenate([points, np.ones((max(FEWEST_POINTS - len(points), 0), 2))])
        for points in (np.reshape(true, (-1, 2)), np.reshape(pred, (-1, 2)))
    )
    u, v = np.diff(a, axis=0), np.diff(b, axis=0)
    i, j = cheapest_alignment(np.linalg.norm(u[:, None] - v[None], axis=-1))
    diagonal = float(np.hypot(*screen))
    turn = np.abs(np.arctan2(u[i, 1], u[i, 0]) - np.arctan2(v[j, 1], v[j, 0]))
    distances = (
        np.linalg.norm(u[i] - v[j], axis=1) / (2 * diagonal),
        np.minimum(turn, 2 * np.pi - turn) / np.pi,
        np.abs(np.linalg.norm(u[i], axis=1) - np.linalg.norm(v[j], axis=1)) / diagonal,
        np.linalg.norm(a[i] - b[j], axis=1) / diagonal,
        np.zeros(len(i)),
    )
    return 1 - np.array([np.median(d) for d in distances])


def cheapest_alignment(cost: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Cells of the cheapest path from the first to the last cell by steps right, down or diagonal.

    Args:
        cost: Of entering each cell ``[n, m]``.

    Returns:
        Row and column of every cell of the path.
    """
    n, m = cost.shape
    costs = cost.tolist()
    total = [[0.0] * m for _ in range(n)]
    for i in range(n):
        for j in range(m):
            ways = [total[y][x] for y, x in _before(i, j)]
            total[i][j] = min(ways) + costs[i][j] if ways else 0.0
    path = [(n - 1, m - 1)]
    while path[-1] != (0, 0):
        path.append(min(_before(*path[-1]), key=lambda cell: total[cell[0]][cell[1]]))  # the first of equal ones
    rows, columns = np.array(path[::-1]).T
    return rows, columns


def _before(i: int, j: int) -> list[tuple[int, int]]:
    """Cells from which a path may enter ``(i, j)``, the diagonal first."""
    return [(y, x) for y, x in ((i - 1, j - 1), (i - 1, j), (i, j - 1)) if y >= 0 and x >= 0]


def centres(places: Any, screen: tuple[int, int]) -> np.ndarray:
    """Centres of objects.

    Args:
        places: Boxes ``[N, 4]`` as pixels x1, y1, x2, y2, or rows and columns of a uniform grid over the screen.
        screen: Width and height in pixels.

    Returns:
        ``[N, 2]`` as x, y in pixels.

    Raises:
        ValueError: If it is neither.
    """
    given = np.asarray(places, float)
    if given.shape == (2,) and (given >= 1).all():
        rows, columns = (int(n) for n in given)
        index = np.arange(rows * columns)
        cell = np.stack((index % columns, index // columns), 1) + 0.5
        return cell * np.array([screen[0] / columns, screen[1] / rows])
    if given.ndim != 2 or given.shape[1] != 4:
        raise ValueError(f"got places of shape {list(given.shape)}, need boxes [N, 4] or a grid (rows, columns)")
    return (given[:, :2] + given[:, 2:]) / 2


def scanpath_metrics(
    pred: Sequence[Any], true: Sequence[Any], target: Any, places: Any, screen: tuple[int, int]
) -> dict[str, float]:
    """Compare predicted with human scanpaths.

    Args:
        pred: Predicted objects of each trial, or those of a single trial.
        true: Human objects of the same trials.
        target: Object searched for in each trial.
        places: Boxes ``[N, 4]`` in pixels, or ``(rows, columns)`` of a uniform grid over the screen.
        screen: Width and height in pixels.

    Returns:
        Averages over the trials: ``sequence_score``, ``edit_distance``, ``multimatch`` (of the first four) and
        ``multimatch_<part>``, ``nss``, ``model_<behaviour>`` and ``human_<behaviour>`` of :class:`Behaviour`, and
        ``delta``.

    Raises:
        ValueError: If the numbers of trials differ, there is none, or an object has no place.
    """
    if np.ndim(target) == 0:
        pred, true, target = [pred], [true], [target]
    if not len(pred) == len(true) == len(target) > 0:
        raise ValueError(f"got {len(pred)} predicted and {len(true)} human scanpaths for {len(target)} targets")
    where = centres(places, screen)
    rows = [compare(p, t, int(g), where, screen) for p, t, g in zip(pred, true, target, strict=True)]
    return average(rows)


def compare(
    pred: Sequence[int], true: Sequence[int], target: int, where: np.ndarray, screen: tuple[int, int]
) -> dict[str, float]:
    """Metrics of one trial, all but ``delta``, which needs averages.

    Args:
        pred: Predicted objects.
        true: Human objects.
        target: The object searched for.
        where: Centres ``[N, 2]`` of the objects in pixels.
        screen: Width and height in pixels.

    Returns:
        As :func:`scanpath_metrics`.

    Raises:
        ValueError: If an object has no place.
    """
    pred, true = [int(i) for i in pred], [int(i) for i in true]
    for name, sequence in (("pred", pred), ("true", true), ("target", [target])):
        if sequence and not 0 <= min(sequence) <= max(sequence) < len(where):
            raise ValueError(f"got {name} {sequence}, need objects from 0 to {len(where) - 1}")
    p, t = (where[np.array(s, int)] for s in (pred, true))
    parts = multimatch(p, t, screen)
    return {
        "sequence_score": sequence_score(pred, true),
        "edit_distance": float(edit_distance(pred, true)),
        "multimatch": float(parts[:4].mean()),
        **{f"multimatch_{name}": float(v) for name, v in zip(MULTIMATCH, parts, strict=True)},
        "nss": nss(p, t, screen),
        **{f"model_{k}": v for k, v in behaviour(pred, target)._asdict().items()},
        **{f"human_{k}": v for k, v in behaviour(true, target)._asdict().items()},
    }


def average(rows: Sequence[dict[str, float]]) -> dict[str, float]:
    """Averages of :func:`compare` over trials, and their ``delta``."""
    out = {key: float(np.mean([row[key] for row in rows])) for key in rows[0]}
    means = [[out[f"{who}_{k}"] for k in Behaviour._fields] for who in ("model", "human")]
    return {**out, "delta": delta(*means)}
