"""Scanpaths: metrics against the official outputs, data formats and their errors, training, evaluation, pictures."""

from __future__ import annotations

import numpy as np
import pytest
from golden import load

from vizoo.tools.scanpaths import (
    Behaviour,
    behaviour,
    cheapest_alignment,
    delta,
    edit_distance,
    multimatch,
    nss,
    scanpath_metrics,
    sequence_score,
    sim,
)

SCREEN = (1680, 1050)
SHELF = [[c * 186, 135 + r * 305, c * 186 + 186, 135 + r * 305 + 305] for r in range(3) for c in range(9)]


@pytest.fixture(scope="module")
def recorded():
    out = {k: v.numpy() for k, v in load("oat_metrics").outputs.items()}
    for name in ("pred", "true"):
        out[name] = [[int(i) for i in row if i >= 0] for row in out[name]]
    return out


# metrics


def test_golden_metrics(recorded):
    where = np.array(SHELF, float)
    where = (where[:, :2] + where[:, 2:]) / 2
    for k, (p, t) in enumerate(zip(recorded["pred"], recorded["true"], strict=True)):
        assert sequence_score(p, t) == pytest.approx(recorded["sequence_score"][k], rel=1e-6)
        assert edit_distance(p, t) == recorded["edit_distance"][k]
        for name, path in (("pred", p), ("true", t)):
            assert behaviour(path, recorded["target"][k]) == pytest.approx(recorded[f"behavior_{name}"][k], rel=1e-12)
        if not recorded["multimatch_tie"][k]:
            assert multimatch(where[p], where[t], SCREEN) == pytest.approx(recorded["multimatch"][k], rel=1e-6), k
    means = (recorded[f"behavior_{name}"].mean(0) for name in ("pred", "true"))
    assert delta(*means) == pytest.approx(recorded["delta"][0], rel=1e-6)
    assert sim(recorded["sim_prob"], recorded["sim_target"]) == pytest.approx(recorded["sim"][0], rel=1e-6)


def test_golden_table(recorded):
    found = scanpath_metrics(recorded["pred"], recorded["true"], recorded["target"], SHELF, SCREEN)
    assert found["sequence_score"] == pytest.approx(recorded["sequence_score"].mean(), rel=1e-6)
    assert found["edit_distance"] == pytest.approx(recorded["edit_distance"].mean())
    assert found["delta"] == pytest.approx(recorded["delta"][0], rel=1e-6)
    for i, key in enumerate(Behaviour._fields):
        assert found[f"human_{key}"] == pytest.approx(recorded["behavior_true"][:, i].mean())
        assert found[f"model_{key}"] == pytest.approx(recorded["behavior_pred"][:, i].mean())


def test_metrics_by_hand():
    assert sequence_score([1, 2, 3, 4], [2, 4, 1]) == 0.5
    assert edit_distance([1, 2, 3, 4], [2, 4, 1]) == 3
    assert behaviour([5, 5, 2, 5, 7], 7) == (1, 5, 0.6, 0.2, 0.2)
    assert behaviour([], 7) == (0, 0, 0, 0, 0)
    assert delta([0.5, 3, 1, 0, 2], [1, 2, 1, 0, 1]) == pytest.approx((0.5 + 0.5 + 0 + 1) / 4)
    whole = scanpath_metrics([3, 4, 5], [3, 4, 5], 5, (2, 4), (400, 200))
    assert (whole["sequence_score"], whole["edit_distance"], whole["multimatch"], whole["delta"]) == (1, 0, 1, 0)
    with pytest.raises(ValueError, match=r"got pred \[8\]"):
        scanpath_metrics([8], [3], 3, (2, 4), (400, 200))
    with pytest.raises(ValueError, match="1 predicted and 2 human"):
        scanpath_metrics([[1]], [[1], [2]], [1, 2], (2, 4), (400, 200))
    with pytest.raises(ValueError, match="places of shape"):
        scanpath_metrics([1], [1], 1, [[1, 2, 3]], (400, 200))


def test_nss_is_that_of_the_map():
    rng = np.random.default_rng(0)
    pred, true = rng.integers(0, [30, 20], (9, 2)), rng.integers(0, [30, 20], (200, 2))
    drawn = np.zeros((20, 30))
    drawn[pred[:, 1], pred[:, 0]] = 1
    drawn = (drawn - drawn.mean()) / drawn.std()
    assert nss(pred, true, (30, 20)) == pytest.approx(drawn[true[:, 1], true[:, 0]].mean())


def test_alignment_is_the_cheapest():
    """Against every monotone path of a small matrix."""
    cost = np.random.default_rng(1).random((4, 3))

    def cheapest(i, j):
        if (i, j) == (0, 0):
            return 0.0
        ways = [(y, x) for y, x in ((i - 1, j), (i, j - 1), (i - 1, j - 1)) if min(y, x) >= 0]
        return cost[i, j] + min(cheapest(*w) for w in ways)

    rows, columns = cheapest_alignment(cost)
    assert (rows[0], columns[0], rows[-1], columns[-1]) == (0, 0, 3, 2)
    assert {(int(a), int(b)) for a, b in zip(np.diff(rows), np.diff(columns), strict=True)} <= {(0, 1), (1, 0), (1, 1)}
    assert cost[rows[1:], columns[1:]].sum() == pytest.approx(cheapest(3, 2))
