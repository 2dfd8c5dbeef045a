"""Scanpaths: metrics against the official outputs, data formats and their errors, training, evaluation, pictures."""

from __future__ import annotations

import csv
import dataclasses
import json
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from golden import load
from PIL import Image
from tolerance import close
from zoo import build

from vizoo.tools import cli
from vizoo.tools.common import UserError
from vizoo.tools.data.scanpaths import Batches, collate, load_scanpaths, search_task, split
from vizoo.tools.evaluation.scanpath import human_agreement
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
from vizoo.tools.training.scanpath import teacher_forced

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


# data formats


def sti():
    """Two scenes of 6x14 cells of 10x10 pixels; the target is in row 1, column 2."""
    scene = {
        "size": {"width": 140, "height": 60},
        "target": "t.jpg",
        "ground_truth": [{"xmin": 21, "xmax": 29, "ymin": 11, "ymax": 19}],
        "fixations": {"1": [[5, 5], [15, 5], [25.5, 15]], "2": [[139, 59], [150, -3], [25, 15], [25, 15]]},
    }
    return {"a.jpg": scene, "b.jpg": json.loads(json.dumps(scene))}


def sample(n=22, **changes):
    crops = [np.full((30, 20, 3), i / n, np.float32) for i in range(n)]
    fields = {"package_target": [3], "package_seq": [1, 2, 2, 3], "question_img_feature": crops}
    fields |= {"X": [5.0, 6, 7, 8], "Y": [1.0, 2, 3, 4], "id": "Q1", "layout_id": "Q1_a", "sub_id": 7}
    return {**fields, **changes}


CROPS = sample()["question_img_feature"]


def write(folder, content):
    path = folder / "data.json"
    path.write_text(json.dumps(content, default=lambda a: a.tolist()).replace("Infinity", "1e999"))
    return str(path)


def test_sti(tmp_path):
    data = load_scanpaths(write(tmp_path, sti()))
    assert data.grid == (6, 14)
    assert [t.sequence for t in data.trials[:2]] == [[0, 1, 16], [83, 13, 16, 16]]  # beside the image: the nearest box
    assert {t.target for t in data.trials} == {16}
    assert [(t.viewer, t.scene.name) for t in data.trials] == [(v, s) for s in ("a.jpg", "b.jpg") for v in ("1", "2")]
    assert data.trials[0].scene is data.trials[1].scene
    assert data.trials[0].scene.screen == (140, 60)


def test_sti_leaves_the_longest_out(tmp_path):
    content = sti()
    content["a.jpg"]["fixations"] = {str(i): [[5, 5]] * 3 for i in range(30)} | {"long": [[5, 5]] * 90}
    data = load_scanpaths(write(tmp_path, content))
    assert len(data.trials) == 32
    assert data.note.startswith("1 of 33 left out")


def test_samples(tmp_path):
    records = [sample(), sample(sub_id=8), sample(27, package_target=27, layout_id="Q2_b", id="Q2")]
    with (tmp_path / "data.pkl").open("wb") as f:
        pickle.dump(records, f)
    for path in (str(tmp_path / "data.pkl"), write(tmp_path, records)):
        data = load_scanpaths(path)
        first, second, third = data.trials
        assert data.grid == (3, 9)
        assert (first.target, first.sequence, first.viewer, first.task) == (2, [0, 1, 1, 2], "7", "Q1")
        assert first.scene is second.scene
        assert third.target == 26
        assert first.scene.crops.shape == (22, 3, 30, 20)
        assert first.scene.crops[11].unique().tolist() == [0.5]
        assert first.scene.boxes[12].tolist() == [152, 601, 304, 1050]  # second row, second column of the wine shelf
        assert third.scene.boxes[10].tolist() == [186, 440, 372, 745]
        assert third.scene.coords[10].tolist() == [1, 1]
    whole = sample(8, question_img_feature=np.full((8, 20, 20, 3), 51, np.uint8))
    with (tmp_path / "bytes.pickle").open("wb") as f:
        pickle.dump([whole], f)
    data = load_scanpaths(str(tmp_path / "bytes.pickle"), grid=(2, 4))
    assert data.trials[0].scene.crops.unique().tolist() == [pytest.approx(0.2)]
    assert data.trials[0].scene.boxes[5].tolist() == [640, 800, 1280, 1600]


def broken_sti(**changes):
    content = sti()
    content["b.jpg"] |= changes
    return content


BROKEN = {
    r"data.json: record 'b.jpg': 'size' is missing": {"b.jpg": {}},
    r"record 'b.jpg', size: got 0x60": broken_sti(size={"width": 0, "height": 60}),
    r"record 'b.jpg', size: got 'wide'": broken_sti(size={"width": "wide", "height": 60}),
    r"record 'b.jpg', ground_truth: got \[\]": broken_sti(ground_truth=[]),
    r"record 'b.jpg', ground_truth: 'ymax' is missing": broken_sti(ground_truth=[{"xmin": 1, "xmax": 2, "ymin": 3}]),
    r"ground_truth: box .* is not inside": broken_sti(ground_truth=[{"xmin": 1, "xmax": 999, "ymin": 3, "ymax": 4}]),
    r"record 'b.jpg', fixations: got {}": broken_sti(fixations={}),
    r"'b.jpg', fixations of viewer '9': got \[\]": broken_sti(fixations={"9": []}),
    r"'b.jpg', fixations of viewer '9': got \[\[1, 2\], \[3\]\]": broken_sti(fixations={"9": [[1, 2], [3]]}),
    r"'b.jpg', fixations of viewer '9': got \[\[inf": broken_sti(fixations={"9": [[float("inf"), 2]]}),
    r"holds no record": {},
    r"need an object of images or a list": 3,
    r"record 1: 'package_seq' is missing": [sample(), {"package_target": 1, "question_img_feature": CROPS}],
    r"record 1, package_seq: got \[1, 23\], need whole numbers from 1 to 22": [sample(), sample(package_seq=[1, 23])],
    r"record 0, package_seq: got \[1.5\]": [sample(package_seq=[1.5])],
    r"record 0, package_seq: got \[\]": [sample(package_seq=[])],
    r"record 0, package_target: got 2 objects": [sample(package_target=[1, 2])],
    r"record 0, X: got .*, need 4 pixels": [sample(X=[1.0])],
    r"record 0: 23 objects, known are": [sample(23)],
    r"record 0: 'question_img_feature' is missing": [sample(question_img_feature=None)],
    r"record 0, question_img_feature: got \[22, 30, 20\]": [sample(question_img_feature=np.zeros((22, 30, 20)))],
    r"record 0, question_img_feature: need N crops": [sample(question_img_feature=[CROPS[0], CROPS[0][1:]])],
}  # fmt: skip


@pytest.mark.parametrize("message", BROKEN)
def test_errors_name_file_and_record(message, tmp_path):
    path = write(tmp_path, BROKEN[message])
    with pytest.raises(UserError, match=message) as found:
        load_scanpaths(path)
    assert path in str(found.value)


@pytest.mark.parametrize(
    ("point", "fits"),
    [
        ([-500, 99999], False),
        ([-15, 30], False),
        ([70, 67], False),
        ([1e8, 5], False),
        ([-13.9, -5.9], True),
        ([153.9, 65.9], True),
        (["5", 5], False),
        ([True, 5], False),
        ([None, 5], False),
        ([10**400, 5], False),
        ([[5], 5], False),
    ],
)
def test_gaze_may_leave_the_screen_by_a_tenth(point, fits, tmp_path):
    path = write(tmp_path, broken_sti(fixations={"9": [[5, 5], point]}))
    if fits:
        assert len(load_scanpaths(path).trials) == 3
        return
    with pytest.raises(UserError, match=r"record 'b.jpg', fixations of viewer '9': got"):
        load_scanpaths(path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"X": [5.0, 6, -500, 8], "Y": [1.0, 2, 99999, 4]},
            r"X and Y: got \(-500, 99999\), far outside the screen of 1680",
        ),
        ({"X": ["5", 6, 7, 8]}, r"record 0, X: got \['5', 6, 7, 8\]"),
        ({"package_target": [True]}, "record 0, package_target: got"),
        ({"package_target": "3"}, "record 0, package_target: got \\['3'\\]"),
        ({"package_seq": [10**400]}, "record 0, package_seq: got"),
        ({"package_seq": [[1], [2]]}, "record 0, package_seq: got"),
        ({"layout_id": [1]}, r"record 0, layout_id: got \[1\], need text or a number"),
        ({"question_img_feature": [[[["a"] * 3]]] * 22}, "record 0, question_img_feature: got"),
        ({"question_img_feature": [[[[1e300] * 3]]] * 22}, "record 0, question_img_feature: got"),
        ({"question_img_feature": [[[[1, 2]]]] * 22}, r"record 0, question_img_feature: got \[22, 1, 1, 2\]"),
        ({"question_img_feature": "crops"}, "record 0, question_img_feature: got"),
        ({"question_img_feature": {"0": CROPS[0]}}, "record 0, question_img_feature: got"),
    ],
)
def test_every_number_of_a_sample_is_checked(changes, message, tmp_path):
    with pytest.raises(UserError, match=message) as found:
        load_scanpaths(write(tmp_path, [sample(**changes)]))
    assert "\n" not in str(found.value)


@pytest.mark.parametrize("size", [(10**9, 60), (10**400, 60), (-140, 60), (True, 60), ("140", 60), (float("inf"), 60)])
def test_screens_have_a_size(size, tmp_path):
    path = write(tmp_path, broken_sti(size={"width": size[0], "height": size[1]}))
    with pytest.raises(UserError, match=r"record 'b.jpg', size: got"):
        load_scanpaths(path)


def test_huge_grids_are_refused(tmp_path):
    with pytest.raises(UserError, match="--grid 100000 100000: at most 4096 objects"):
        load_scanpaths(write(tmp_path, sti()), grid=(100_000, 100_000))
    with pytest.raises(UserError, match="--grid 65 64: at most 4096 objects"):
        search_task(1, (65, 64))
    with pytest.raises(UserError, match="--trials 2000 of --grid 64 64: at most 1,048,576 crops in all"):
        search_task(2000, (64, 64))


class Calls:
    """Pickles as a call."""

    def __init__(self, function, *args):
        self.function, self.args = function, args

    def __reduce__(self):
        return self.function, self.args


def nested(depth):
    value: list = [1]
    for _ in range(depth):
        value = [value] * 1000
    return value


def spoilt_type():
    """An array of floats whose type says that it holds objects: NumPy would follow the numbers as addresses."""
    state = b"(K\x03U\x01|NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x3ftb"
    kind = b"cnumpy\ndtype\n(X\x02\x00\x00\x00f8\x89\x88tR" + state
    array = b"cnumpy.core.multiarray\n_reconstruct\n(cnumpy\nndarray\n(K\x00tU\x01btR"
    return b"\x80\x02" + array + b"(K\x01(K\x01t" + kind + b"\x89C\x08AAAAAAAAtb."


PICKLES = {
    "type that lies": (spoilt_type, "NumPy type float64 with the state"),
    "code": (lambda: pickle.dumps(Calls(eval, "1/0")), "it wants to import builtins.eval"),
    "module of numpy": (lambda: b"cnumpy.testing\nrundocs\n.", "it wants to import numpy.testing.rundocs"),
    "name of numpy": (lambda: b"cnumpy\nload\n.", "it wants to import numpy.load"),
    "dotted name": (lambda: pickle.dumps(Calls(np.ndarray.dump, 1)), "it wants to import"),
    "array of a terabyte": (
        lambda: pickle.dumps(Calls(np.ndarray, (10**12,))),
        "a NumPy array that NumPy did not write",
    ),
    "type of a terabyte": (
        lambda: pickle.dumps(Calls(np.dtype, "V1000000000")),
        "is none of numbers, text and objects",
    ),
    "codec": (lambda: b"c_codecs\nencode\n(Vabc\nVrot13\ntR.", "in the encoding .rot13."),
    "memo": (lambda: b"\x80\x02]r\xff\xff\xff\x7f.", "it keeps a value number 2147483647"),
    "length": (lambda: b"\x80\x04\x8e" + (2**40).to_bytes(8, "little") + b"a.", "cannot read it"),
    "cut": (lambda: pickle.dumps([1, 2])[:5], "cannot read it"),
    "empty": (lambda: b"", "cannot read it"),
    "text": (lambda: b"hello", "cannot read it"),
    "deep": (
        lambda: b"\x80\x02" + b"]" * 100_000 + b"a" * 99_999 + b".",
        "record 0: 'question_img_feature' is missing",
    ),
    "number": (lambda: pickle.dumps(10**5000), "holds int, need an object"),
    "arrays": (lambda: pickle.dumps({"a": np.zeros(3)}), "record 'a': 'size' is missing"),
    "lists in lists": (lambda: pickle.dumps([sample(package_seq=nested(4))]), "record 0, package_seq: got"),
    "crops in crops": (lambda: pickle.dumps([sample(question_img_feature=nested(5))]), "question_img_feature: got"),
    "long number": (lambda: pickle.dumps([sample(package_seq=[10**5000])]), "record 0, package_seq: got"),
}


@pytest.mark.parametrize("case", PICKLES)
def test_pickles_run_nothing_and_take_no_memory(case, tmp_path):
    import resource

    make, message = PICKLES[case]
    (tmp_path / "a.pkl").write_bytes(make())
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(UserError, match=message) as found:
        load_scanpaths(str(tmp_path / "a.pkl"))
    assert "\n" not in str(found.value)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 300_000  # kB


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_pickles_of_every_protocol_are_read(protocol, tmp_path):
    """Also fields that are scalars or arrays of NumPy, and arrays in Fortran's order."""
    more = {
        "package_target": np.int64(3),
        "layout_id": np.str_("Q1_a"),
        "package_seq": np.array([1, 2, 2, 3]),
        "X": np.array([5.0, 6, 7, 8]),
    }
    crops = np.asfortranarray(np.stack(CROPS))
    boxed = np.empty(len(CROPS), object)
    for i, crop in enumerate(CROPS):
        boxed[i] = crop.astype(">f4")
    for value in (crops, boxed, CROPS):
        (tmp_path / "a.pkl").write_bytes(pickle.dumps([sample(**more, question_img_feature=value)], protocol))
        (trial,) = load_scanpaths(str(tmp_path / "a.pkl")).trials
        assert (trial.target, trial.sequence, trial.scene.name) == (2, [0, 1, 1, 2], "Q1_a")
        assert trial.scene.crops.permute(0, 2, 3, 1).numpy() == pytest.approx(np.stack(CROPS))


def test_scenes_are_turned_as_viewers_show_them(tmp_path):
    """Crops, whole images and pictures come from one reader; a picture that cannot be read is named."""
    exif = Image.Exif()
    exif[274] = 6
    upright = np.zeros((120, 280, 3), np.uint8)
    upright[20:40, 40:60] = (255, 0, 0)
    for name in sti():
        Image.fromarray(np.rot90(upright)).save(tmp_path / name, format="PNG", exif=exif)
    trials = load_scanpaths(write(tmp_path, sti()), images=str(tmp_path)).trials
    row = Batches(trials, (24, 20))[0]
    assert row["x"].mean((2, 3))[16].tolist() == pytest.approx([1, 0, 0], abs=0.06)
    assert Batches(trials, None, (120, 280))[0]["x"].mul(255).permute(1, 2, 0).numpy() == pytest.approx(upright)
    (tmp_path / "a.jpg").write_bytes((tmp_path / "a.jpg").read_bytes()[:90])
    with pytest.raises(UserError, match=r"cannot read image '.*a\.jpg'"):
        Batches(trials, None)[0]
    with pytest.raises(UserError, match=r"record 'a\.jpg': cannot read image '.*a\.jpg'"):
        load_scanpaths(write(tmp_path, sti()), images=str(tmp_path))


def test_unreadable_files(tmp_path):
    (tmp_path / "evil.pkl").write_bytes(pickle.dumps([print, Path("x")]))
    (tmp_path / "cut.pkl").write_bytes(pickle.dumps([1, 2])[:5])
    (tmp_path / "cut.json").write_text("{")
    for name, message in (
        ("evil.pkl", "wants to import"),
        ("cut.pkl", "cannot read it"),
        ("cut.json", "is no JSON"),
        ("none.json", "does not exist"),
    ):
        with pytest.raises(UserError, match=message) as found:
            load_scanpaths(str(tmp_path / name))
        assert name in str(found.value)
    with pytest.raises(UserError, match=r"record 'a\.jpg': image .*a.jpg' does not exist"):
        load_scanpaths(write(tmp_path, sti()), images=str(tmp_path))
    with pytest.raises(UserError, match="do not fill --grid 2 4"):
        load_scanpaths(write(tmp_path, [sample()]), grid=(2, 4))


def test_images_are_cut_into_objects(tmp_path):
    """Crops of the scene's image, which may have another resolution than the fixations; boxes for a backbone."""
    pixels = np.zeros((120, 280, 3), np.uint8)
    pixels[20:40, 40:60] = (255, 0, 0)  # row 1, column 2
    for name in sti():
        Image.fromarray(pixels).save(tmp_path / name, format="PNG")
    (trial, *_) = load_scanpaths(write(tmp_path, sti()), images=str(tmp_path)).trials
    row = Batches([trial], (24, 20))[0]
    assert row["x"].shape == (84, 3, 24, 20)
    assert row["x"].mean((2, 3))[16].tolist() == pytest.approx([1, 0, 0], abs=0.06)
    assert row["x"].mean((1, 2, 3)).topk(2).values.tolist() == pytest.approx([1 / 3, 0], abs=0.03)
    row = Batches([trial], None, (60, 280))[0]
    assert row["x"].shape == (3, 60, 280)
    assert row["boxes"][16].tolist() == [40, 10, 60, 20]


def test_scenes_of_different_sizes_share_a_batch(tmp_path):
    """Padding with masked objects changes no logits, and the loss is that of the scenes alone."""
    trials = load_scanpaths(
        write(tmp_path, [sample(), sample(27, package_seq=[9], X=None, Y=None, id="Q2", layout_id="b")])
    ).trials
    model = build("test_oat", grid=(3, 11), pe_sigma=3.0)
    together = collate([Batches(trials, (24, 20))[i] for i in range(2)])
    assert together["object_mask"].sum(1).tolist() == [22, 27]
    assert together["sequence"].tolist() == [[0, 1, 1, 2], [8, -1, -1, -1]]
    with torch.no_grad():
        logits = teacher_forced(model, {**together, "boxes": None})
        for i, n in enumerate((22, 27)):
            alone = collate([Batches(trials, (24, 20))[i]])
            assert alone["object_mask"] is None
            expected = teacher_forced(model, {**alone, "boxes": None})[0]
            t = len(trials[i].sequence) + 1
            close(torch.cat((logits[i, :t, :n], logits[i, :t, 27:]), 1), expected[:t], "rerun")


def test_split():
    trials = search_task(50).trials
    twins = [dataclasses.replace(t, viewer="twin") for t in trials]
    parts = split(trials + twins, seed=1)
    assert {k: len(v) for k, v in parts.items()} == {"train": 80, "val": 10, "test": 10}
    names = [{t.scene.name for t in part} for part in parts.values()]
    assert not names[0] & names[1] | names[0] & names[2] | names[1] & names[2]
    assert split(trials, 1)["test"] == split(trials, 1)["test"] != split(trials, 2)["test"]
    by_trial = split(trials + twins, 1, "scanpath")
    assert {t.scene.name for t in by_trial["test"]} & {t.scene.name for t in by_trial["train"]}
    with pytest.raises(UserError, match="too few layouts"):
        split(trials[:3], 1)


# training and evaluation


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A model of the search task, learnt in seconds."""
    out = tmp_path_factory.mktemp("scanpaths")
    words = "train --task scanpath --data search --trials 1000 --grid 2 4 --model test_oat --lr 3e-3 --epochs 3"
    assert cli.main([*words.split(), "--output", str(out), "--experiment", "run", "--device", "cpu"]) == 0
    return out / "run"


def test_learns_the_search_task(run, tmp_path, capsys):
    """Sequence score at least 0.95 on layouts never seen, and it stops on the target in over 95 %."""
    files = [tmp_path / "found.json", tmp_path / "found.png"]
    words = ["evaluate", run, "--samples", "3", "--out", files[0], "--plot", files[1], "--device", "cpu"]
    assert cli.main([str(w) for w in words]) == 0
    found = json.loads(files[0].read_text())
    assert found["trials"] == 100
    assert found["greedy"]["sequence_score"] >= 0.95
    assert found["greedy"]["model_correct"] > 0.95
    assert found["greedy"]["human_correct"] == 1
    assert found["sim"] > 0.9
    assert found["sampled"]["sequence_score"] > 0.9
    assert found["people"] is None  # one viewer a scene
    paths = [(s["human"], s["greedy"], s["target"]) for s in found["scanpaths"]]
    again = scanpath_metrics(*zip(*paths, strict=True), (2, 4), (96, 64))
    assert again["sequence_score"] == pytest.approx(found["greedy"]["sequence_score"])
    assert "sequence score" in capsys.readouterr().out
    with Image.open(files[1]) as picture:
        assert picture.width > picture.height / 3
        assert len(picture.convert("RGB").getcolors(10**7)) > 20
    with (run / "summary.csv").open() as f:
        rows = list(csv.DictReader(f))
    assert float(rows[-1]["train_loss"]) < 0.5 * float(rows[0]["train_loss"])


def trained(run):
    options = yaml.safe_load((run / "args.yaml").read_text())
    model = build(options["model"], **options["model_kwargs"], checkpoint_path=str(run / "model_best.pth.tar"))
    return model, search_task(40, (2, 4), seed=99).trials


def test_kept_keys_give_the_scanpaths_of_full_decoding(run):
    """The official way, everything again at every step, finds the same scanpaths, alone and in a batch."""
    model, trials = trained(run)
    batch = collate([Batches(trials, model.crop_size)[i] for i in range(len(trials))])
    paths = torch.empty(len(trials), 0, dtype=torch.long)
    for step in range(9):
        with torch.no_grad():
            logits = model.forward_objects(batch["x"], batch["coords"], batch["target"], paths)
        paths = torch.cat((paths, logits[:, -1, : 8 + (step > 0)].argmax(-1, keepdim=True)), 1)
    expected = [[*p, 8][: [*p, 8].index(8)] for p in paths.tolist()]
    assert len({tuple(p) for p in expected}) >= 8
    found = model.generate(batch["x"], target=batch["target"], coords=batch["coords"], max_len=9)
    assert found == expected
    alone = model.generate(batch["x"][:1], target=batch["target"][:1], coords=batch["coords"][:1], max_len=9)
    assert alone == expected[:1]


def test_people_against_each_other(run):
    _, trials = trained(run)
    first = dataclasses.replace(trials[0], viewer="b", sequence=[1, 2, 3])
    found = human_agreement([dataclasses.replace(first, sequence=[1, 2])], [first, *trials[1:]])
    assert found["sequence_score"] == pytest.approx(2 / 3)
    assert human_agreement([first], [first, *trials[1:]]) is None


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("train --task scanpath --data search --model resnet10t", "predicts no scanpaths"),
        ("train --task scanpath --data nothing.json", "does not exist"),
        ("train --task scanpath --data search --lr 0", "--lr: got 0, must be a finite number above 0"),
        ("train --task scanpath", "--data"),
        ("train --task gaze --data search", "invalid choice: 'gaze'"),
        ("evaluate RUN --split best", "invalid choice: 'best'"),
        ("evaluate RUN --out found.txt", "--out 'found.txt': the ending must be .json"),
        ("evaluate RUN --checkpoint missing.pth", "does not exist"),
        ("train --task scanpath --data search --output OUT --experiment run", "holds a run"),
    ],
)
def test_bad_input(words, message, run, capsys):
    given = words.replace("RUN", str(run)).replace("OUT", str(run.parent)).split()
    assert cli.main(given) == 2
    assert message in capsys.readouterr().err


def test_images_and_a_backbone(tmp_path):
    """The whole way from the JSON of 20 scenes with images to figures, objects seen by a backbone."""
    (scene,) = [s for name, s in sti().items() if name == "a.jpg"]
    (tmp_path / "data.json").write_text(json.dumps({f"{i}.png": scene for i in range(20)}))
    for i in range(20):
        Image.fromarray(np.full((60, 140, 3), 10 * i, np.uint8)).save(tmp_path / f"{i}.png")
    words = ["train", "--task", "scanpath", "--data", tmp_path / "data.json", "--images", tmp_path, "--grid", 2, 3]
    words += ["--model", "test_oat", "--model-kwargs", "backbone=resnet10t", "--epochs", 1, "--device", "cpu"]
    assert cli.main([str(w) for w in [*words, "--output", tmp_path, "--experiment", "run"]]) == 0
    out = tmp_path / "found.json"
    assert cli.main([str(w) for w in ("evaluate", tmp_path / "run", "--out", out, "--device", "cpu")]) == 0
    found = json.loads(out.read_text())
    assert found["trials"] == 4
    assert found["people"]["sequence_score"] == pytest.approx(
        sequence_score(*(s["human"] for s in found["scanpaths"][:2]))
    )
    words[6] = tmp_path / "nothing"
    (tmp_path / "nothing").mkdir()
    assert cli.main([str(w) for w in [*words, "--output", tmp_path, "--experiment", "other"]]) == 2
