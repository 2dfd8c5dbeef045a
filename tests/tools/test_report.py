"""The page of records: compact data, nothing mixed, nothing executed, and in a browser what a reader does with it."""

from __future__ import annotations

import copy
import functools
import html
import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
from records import failed, measurement, record

from vizoo.tools import report
from vizoo.tools.profiling import page
from vizoo.tools.profiling.published import Accuracy, accuracies, accuracy, family

EVIL = "</script><script>window.hacked=1</script><img src=x onerror='window.hacked=2'>"
NOISY = "noisy: interquartile range 14% of the median"
BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


def save(path: Path, *records: dict[str, Any]) -> Path:
    path.write_text("".join(json.dumps(r) + "\n" for r in records))
    return path


def embedded(text: str) -> Any:
    """The data of a page, as a browser reads them: the element ends at the first ``</script``."""
    (found,) = re.findall(r'<script type="application/json" id="data">(.*?)</script', text, re.DOTALL)
    return json.loads(found)


# published accuracies and families


def test_accuracies_are_those_of_the_measured_size(tmp_path: Path) -> None:
    (tmp_path / "x.csv").write_text("model,size,top1,source\nmine,96,50.5,here\n")
    known = accuracies(tmp_path / "x.csv")
    of = {name: record(name)["target"] for name in ("litv2_s", "resnet50", "mine")}
    assert accuracy(of["litv2_s"], known) == Accuracy(82.0, "its paper or official code")
    assert accuracy(of["resnet50"], known).top1 == 80.382  # type: ignore[union-attr] # resnet50.a1_in1k
    assert accuracy({**of["resnet50"], "name": "resnet50.a1_in1k"}, known).top1 == 80.382  # type: ignore[union-attr]
    assert accuracy({**of["resnet50"], "name": "resnet50.other"}, known) is None
    assert accuracy({**of["litv2_s"], "size": [256, 256]}, known) is None
    assert accuracy(of["mine"], known) is None
    assert accuracy({**of["mine"], "size": [96, 96]}, known) == Accuracy(50.5, "here")
    for other in ({"kwargs": {"num_classes": 10}}, {"weights": "w.pth"}, {"kind": "function"}, {"size": None}):
        assert accuracy({**of["litv2_s"], **other}, known) is None
    two = {("a.x", 224, 224): Accuracy(1, ""), ("a.y", 224, 224): Accuracy(2, "")}
    assert accuracy({**of["mine"], "name": "a"}, two) is None


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("model,size\na,224\n", "no column top1, source"),
        ("model,size,top1,source\na,224,101,x\n", "line 2: size and top1 are '224' and '101'"),
        ("model,size,top1,source\na,0,80,x\n", "line 2: size and top1 are '0' and '80'"),
        ("model,size,top1,source\na,224,nan,x\n", "line 2: size and top1 are '224' and 'nan'"),
    ],
)
def test_bad_accuracies(text: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "x.csv").write_text(text)
    records = save(tmp_path / "r.jsonl", record("a"))
    assert report.main([str(records), "--top1", str(tmp_path / "x.csv"), "--out", str(tmp_path / "r.html")]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "r.html").exists()


def test_families() -> None:
    names = ["litv2_s", "litv2_b.r384_in1k", "dinat_s_tiny", "dinat_tiny", "resnet50", "mobilenetv3_large_100", EVIL]
    said = ["LITv2", "LITv2", "DiNAT_s", "DiNAT", "resnet", "mobilenetv3", "others"]
    assert list(map(family, names)) == said


# the data


def test_nothing_of_different_conditions_is_joined() -> None:
    changes = [
        {},
        {"conditions": {"batch": 1}},
        {"conditions": {"dtype": "bf16"}},
        {"conditions": {"compile": "default"}},
        {"environment": {"fingerprint": "ba9876543210"}},
    ]
    data = page.page_data([record("a", **change) for change in changes], {})
    assert len(data["sets"]) == len(changes) == len({run["set"] for run in data["runs"]})
    assert len(data["models"]) == 1  # of which counts and modules are there once
    assert [m["fingerprint"] for m in data["machines"]] == ["0123456789ab", "ba9876543210"]
    assert len(page.page_data([record("a"), record("a", target={"size": [96, 96]})], {})["models"]) == 2


def test_the_newest_of_each_measurement_is_shown() -> None:
    old = record("a", 10.0, environment={"date": "2026-11-28"})
    new = record(
        "a", 20.0, measurements=[measurement("throughput", "images/s", 20.0)], environment={"date": "2026-11-29"}
    )
    for records in ([old, new], [new, old]):
        (run,) = page.page_data(records, {})["runs"]
        assert {m[0]: m[3] for m in run["measurements"]}["throughput"] == 20.0
        assert len(run["measurements"]) == len(old["measurements"])


def test_modules_are_a_tree_of_those_that_can_be_seen() -> None:
    one = record("a")
    (model,), (run,) = (page.page_data([one], {})[key] for key in ("models", "runs"))
    names, parents, params, macs = zip(*model["modules"], strict=True)
    assert names == ("", "stem", "stages.0", "attn")  # the one with a thousandth is left out
    assert parents == (-1, 0, 0, 2)
    assert macs == params == (100_000, 10_000, 90_000, 50_000)
    assert run["seconds"] == [100_000, 10_000, 90_000, 50_000]
    assert run["whole"] == 0.8
    many = copy.deepcopy(one)
    many["modules"] += [{**one["modules"][1], "path": f"m{i}"} for i in range(1000)]
    assert len(page.page_data([many], {})["models"][0]["modules"]) == page.MOST


def test_a_page_of_100_models_is_below_1_mb() -> None:
    """Of models with 300 modules each, everything measured by 100 samples."""
    one = record("a")
    one["modules"] += [{**one["modules"][1], "path": f"stages.0.blocks.{i}.attention"} for i in range(300)]
    for m in one["measurements"]:
        m["samples"] = [[0.123456789 + i for i in range(100)]]
    records = [{**one, "target": {**one["target"], "spec": f"model_{i}", "name": f"model_{i}"}} for i in range(100)]
    assert len(json.dumps(records)) > 6e6
    assert len(page.page(page.page_data(records, {}))) < 1e6


def test_labels_tell_targets_apart() -> None:
    targets = [
        record("a")["target"],
        record("a", target={"size": [96, 128]})["target"],
        record("b")["target"],
        record("b", target={"kind": "torchvision", "spec": "torchvision:b"})["target"],
        record("c", target={"kwargs": {"x": 1}})["target"],
        record("c", target={"kwargs": {"x": 2}})["target"],
    ]
    models = page.page_data([record("", target=target) for target in targets], {})["models"]
    assert [m["label"] for m in models] == ["a@224", "a@96x128", "b@224", "torchvision:b", "c@224 x=1", "c@224 x=2"]


def test_doubts_are_words_of_the_badge() -> None:
    noisy = [measurement("latency", "s", 1.0, quality=[NOISY])]
    partial = {**record("a")["counts"], "status": "partial", "reasons": ["nms has no formula"]}
    busy = record("a", measurements=noisy, counts=partial, notes=["machine busy: used 61%", "compiled in pieces"])
    (run,) = page.page_data([busy], {})["runs"]
    assert [word for word, _ in run["doubts"]] == ["partial", "noisy", "busy"]
    assert page.page_data([failed("a", "too large")], {})["runs"][0]["doubts"] == [["failed", "too large"]]
    assert "doubts" not in page.page_data([record("a")], {})["runs"][0]


def test_text_of_records_stays_text() -> None:
    text = page.page(page.page_data([record(EVIL, notes=[EVIL], command=EVIL), failed("b", EVIL)], {}))
    plain = page.page(page.page_data([record("a")], {}))
    assert embedded(text)["models"][0]["name"] == EVIL
    assert text.lower().count("</script") == plain.lower().count("</script") == 2
    assert "<img" not in text


def test_the_page_needs_nothing_else() -> None:
    """No address but that of a namespace, nothing that loads, and no text becomes HTML."""
    text = page.page(page.page_data([record("a")], {}))
    assert re.findall(r"https?://[^\"' ]*", text) == ["http://www.w3.org/2000/svg"]
    assert not re.search(r"<(?:script|img|iframe)[^>]*\bsrc|@import|url\(|\bimport\(|\bfetch\(|XMLHttp|WebSocket", text)
    assert not re.search(r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|\beval\(|new Function", text)
    assert re.findall(r'<link rel="(\w+)" href="([^"]*)"', text) == [("icon", "data:,")]


# the command


def test_records_of_files(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    files = [
        str(save(tmp_path / "a.jsonl", record("litv2_s"))),
        str(save(tmp_path / "b.jsonl", record("x"), record("y"))),
    ]
    out = tmp_path / "r.html"
    assert report.main([*files, "--out", str(out)]) == 0
    assert capsys.readouterr().out == f"{out}: 3 records\n"
    data = embedded(out.read_text(encoding="utf-8"))
    assert [m["label"] for m in data["models"]] == ["litv2_s", "x", "y"]
    assert data["models"][0]["top1"][0] == 82.0
    assert report.main([*files, "--out", str(out)]) == 0  # a page of ours is replaced


def test_targets_are_profiled_first(tmp_path: Path) -> None:
    out = tmp_path / "r.html"
    assert report.main(["test_litv2", str(save(tmp_path / "a.jsonl", record("x"))), "--out", str(out)]) == 0
    data = embedded(out.read_text(encoding="utf-8"))
    assert {m["label"]: m["counts"]["macs"] for m in data["models"]} == {"x": 10**9, "test_litv2": 9_668_864}
    assert len(data["sets"]) == 2


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["a.jsonl", "--out", "r.pdf"], "--out 'r.pdf': the ending must be .html"),
        (["b.jsonl"], "RECORDS 'b.jsonl' does not exist"),
        (["a.jsonl", "--device", "cpu"], "--device: only targets are measured"),
        (["empty.jsonl"], "RECORDS empty.jsonl: no record there"),
        (["bad.jsonl"], "line 1 is no record"),
        (["no_such_model"], "unknown model 'no_such_model'"),
        (["a.jsonl", "--top1", "none.csv"], "--top1 'none.csv' does not exist"),
        (["a.jsonl", "--out", "other.html"], "holds something that vizoo did not write"),
    ],
)
def test_bad_input(
    words: list[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    save(tmp_path / "a.jsonl", record("a"))
    save(tmp_path / "empty.jsonl")
    (tmp_path / "bad.jsonl").write_text('{"schema": 1}\n')
    (tmp_path / "other.html").write_text("<p>mine")
    assert report.main(words) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "report.html").exists()
    assert (tmp_path / "other.html").read_text() == "<p>mine"


# in a browser

ERRORS = "<script>const errors = []; onerror = (m) => errors.push(String(m)); console.error = onerror;</script>"
READER = """<script>
const seen = { errors, width: innerWidth };
const all = (q) => [...document.querySelectorAll(q)], text = (q) => all(q).map((e) => e.textContent);
const head = (name) => all("#models th button").find((b) => b.textContent === name);
const choose = (id, value) => {
  const box = one(id); box.selectedIndex = [...box.options].findIndex((o) => o.textContent === value);
  box.dispatchEvent(new Event("change"));
};
function brute(points, x, y = 1) {
  return points.map((_, i) => i).filter((i) => !points.some((q) =>
    x * q.x >= x * points[i].x && y * q.y >= y * points[i].y && (q.x !== points[i].x || q.y !== points[i].y)));
}
let seed = 7;
const random = (n) => (seed = (seed * 48271) % 2147483647) % n;
seen.fronts = 0;
for (let n = 0; n < 400; n++) {
  const points = Array.from({ length: n % 40 }, () => ({ x: 1 + random(12), y: random(12) }));
  for (const x of [1, -1]) {
    const [a, b] = [pareto(points, x), brute(points, x)].map((f) => [...f].sort((i, j) => i - j).join());
    if (a === b) seen.fronts += 1;
  }
}
seen.sentence = text("h1")[0];
seen.badges = text("#doubts summary .badge");
seen.doubted = text("#doubts dd");
seen.points = all(".point").length;
seen.axes = text("#axis button");
seen.labels = text("#scatter .name");
seen.beside = one("beside").textContent;
seen.heads = text("#models th");
seen.sorted = {};
for (const name of ["images/s", "images/s", "model"]) {
  head(name).click();
  const th = head(name).parentElement;
  (seen.sorted[`${name} ${th.getAttribute("aria-sort")}`] = text("#models tbody td:first-child"));
  seen.focused = document.activeElement === head(name);
}
seen.reason = text("#models .reason");
one("words").value = "LITV2 s"; one("words").dispatchEvent(new Event("input"));
seen.filtered = [text("#models tbody td:first-child"), one("shown").textContent, all(".point").length];
one("words").value = ""; one("words").dispatchEvent(new Event("input"));
choose("family", "resnet"); seen.family = text("#models tbody td:first-child"); choose("family", "all");
all("#legend button").find((b) => b.textContent === "LITv2").click();
seen.hidden = [all(".point").length, all("#legend button").map((b) => b.getAttribute("aria-pressed")).join()];
all("#legend button").find((b) => b.textContent === "LITv2").click();
all("#axis button").find((b) => b.textContent === "GMACs").click();
seen.axis = [text("#chart-title")[0], text('#axis [aria-pressed="true"]')];
seen.stops = all('.point[tabindex="0"]').length;
choose("select-batch", "1");
seen.other = [text("h1")[0], text("#models tbody td:first-child"), text("#chart-title")[0]];
seen.other.push(text("#conditions label").length);
choose("select-batch", "8");
const after = (target, event, act) => new Promise((go) => {
  target.addEventListener(event, () => setTimeout(go), { once: true });
  act();
});
(async () => {
  const row = all("#models tbody tr").find((row) => row.textContent.startsWith("litv2_s"));
  await after(window, "hashchange", () => row.cells[2].click());
  seen.hash = location.hash; seen.open = one("model").open; seen.parts = text("#model h3");
  seen.inside = one("model").scrollWidth <= one("model").clientWidth;
  seen.cells = all("#model .cell").length; seen.command = text("#model pre")[0];
  all("#model .choice button").find((b) => b.textContent === "MACs").click();
  seen.cell = all("#model .cell")[1].getAttribute("aria-label");
  all("#model .cell")[2].dispatchEvent(new MouseEvent("click", { bubbles: true }));
  seen.zoomed = text("#model .cell")[0];
  await after(one("model"), "close", () => one("model").close());
  seen.closed = location.hash;
  await after(window, "hashchange", () => { location.hash = "#model=" + encodeURIComponent(EVIL); });
  seen.evil = [text("#model h2")[0] === EVIL, text("#model .notes li")[0] === EVIL, window.hacked || 0];
  seen.evil.push(all("img").length);
  await after(window, "hashchange", () => { location.hash = "#model=%E0%A4%A"; });
  seen.cut = one("model").open;
  seen.fits = document.documentElement.scrollWidth <= innerWidth;
  seen.requests = performance.getEntriesByType("resource").length;
})().catch((e) => errors.push(String(e))).finally(() => parent.postMessage(seen, "*"));
</script>"""


FRAMES = """<pre id="seen"></pre>
<script>
const found = [];
onmessage = (e) => { found.push(e.data); document.getElementById("seen").textContent = JSON.stringify(found); };
</script>
<div style="display: flex">
<iframe src="report.html" style="flex: none; border: 0" width="1280" height="800"></iframe>
<iframe src="report.html" style="flex: none; border: 0" width="390" height="800"></iframe>
</div>"""


@pytest.fixture(scope="module")
def read(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What a reader has seen in frames as wide as a screen and as a telephone."""
    if BROWSER is None:
        pytest.skip("needs Chromium")
    folder = tmp_path_factory.mktemp("page")
    reader = READER.replace("EVIL", json.dumps(EVIL).replace("<", "\\u003c"))
    text = page.page(page.page_data(shown(), accuracies()))
    (folder / "report.html").write_text(
        text.replace("<head>", f"<head>{ERRORS}", 1).replace("</body>", f"{reader}</body>")
    )
    (folder / "frames.html").write_text(FRAMES)
    words = [
        "--headless=new",
        "--no-sandbox",
        "--disable-gpu",
        f"--user-data-dir={folder / 'profile'}",
        "--window-size=1800,1000",
    ]
    command = [BROWSER, *words, "--virtual-time-budget=20000", "--dump-dom", (folder / "frames.html").as_uri()]
    for _ in range(3):  # on a busy machine Chromium may end before both frames have told
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)
        (found,) = re.findall(r'<pre id="seen">(.*?)</pre>', done.stdout, re.DOTALL) or [""]
        frames: list[dict[str, Any]] = json.loads(html.unescape(found) or "[]")
        if len(frames) == 2:
            return sorted(frames, key=lambda seen: -seen["width"])
    raise AssertionError(done.stderr[-2000:])


@functools.cache
def shown() -> list[dict[str, Any]]:
    noisy = [measurement("throughput", "images/s", 40.0, quality=[NOISY])]
    return [
        record("litv2_s", 20.0, 3_700_000_000, command="vizoo profile litv2_s --measure " + ",".join(["latency"] * 30)),
        record("litv2_m", 10.0, 7_400_000_000),
        record("litv2_b", 5.0, 13_000_000_000),
        record("resnet50", 18.0, 4_000_000_000),
        record("resnet18", 40.0, 1_800_000_000, measurements=noisy),
        record("litv2_s", 15.0, 3_700_000_000, conditions={"batch": 1}),
        record("swin_tiny_patch4_window7_224", 12.0, measurements=[measurement("throughput", "images/s", 12.0, 4)]),
        record(EVIL, 3.0, notes=[EVIL]),
        failed("resnet101", "one image does not fit"),
    ]


def test_it_is_still_and_fits(read: list[dict[str, Any]]) -> None:
    assert [seen["width"] for seen in read] == [1280, 390]
    for seen in read:
        assert seen["errors"] == []
        assert (seen["requests"], seen["fits"], seen["inside"]) == (0, True, True)


def test_pareto_is_brute_force(read: list[dict[str, Any]]) -> None:
    """400 sets of points, many of them equal in one figure or both, in both directions."""
    for seen in read:
        assert seen["fronts"] == 800


def test_first_view(read: list[dict[str, Any]]) -> None:
    seen = read[0]
    assert seen["sentence"] == "8 models on Test CPU, 1 thread, fp32, batch 8, torch 2.14.1, 2026-11-29"
    assert seen["badges"] == ["1 failed", "1 noisy"]
    assert seen["doubted"] == ["resnet101 one image does not fit", "resnet18 " + NOISY]
    assert seen["points"] == 5  # the others have no accuracy, failed, or ran at another batch
    assert seen["beside"].startswith(
        "2 models without a published accuracy at the measured size, or the other figure, are"
    )
    assert "1 model measured at another batch is in the table only." in seen["beside"]
    assert seen["axes"] == ["images/s", "GMACs", "params", "ms", "MB"]  # joules were not measured
    assert set(seen["labels"]) == {"resnet18", "litv2_s", "litv2_m", "litv2_b"}  # nothing beats them, but resnet50


def test_table(read: list[dict[str, Any]]) -> None:
    for seen in read:
        fast = ["resnet18", "litv2_s", "resnet50", "swin_tiny_patch4_window7_224", "litv2_m", "litv2_b", EVIL]
        assert seen["sorted"]["images/s descending"] == [*fast, "resnet101"]
        assert seen["sorted"]["images/s ascending"] == [*fast[::-1], "resnet101"]  # what has no figure comes last
        named = ["litv2_b", "litv2_m", "litv2_s", "resnet18", "resnet50", "resnet101", "swin_tiny_patch4_window7_224"]
        assert seen["sorted"]["model ascending"] == [EVIL, *named]
        assert seen["focused"]
        assert seen["reason"] == ["one image does not fit"]
        assert seen["filtered"] == [["litv2_s"], "1 of 8", 1]
        assert sorted(seen["family"]) == ["resnet101", "resnet18", "resnet50"]
        assert seen["hidden"] == [2, "false,true,true"]


def test_axes_and_conditions(read: list[dict[str, Any]]) -> None:
    for seen in read:
        assert seen["axis"] == ["Published accuracy over GMACs of one image", ["GMACs"]]
        assert seen["stops"] == 1
        sentence = "1 model on Test CPU, 1 thread, fp32, batch 1, torch 2.14.1, 2026-11-29"
        assert seen["other"] == [sentence, ["litv2_s"], "Images per second over GMACs of one image", 1]


def test_one_model(read: list[dict[str, Any]]) -> None:
    for seen in read:
        assert (seen["hash"], seen["open"], seen["closed"], seen["cut"]) == ("#model=litv2_s", True, "", False)
        assert seen["parts"] == [
            *("One image", "Measured", "Modules", "Roofline of operators", "Batch", "Peak memory: 300 MB, batch 8"),
            *("Training step: 1.2 s, batch 8", "The same again", "Conditions", "Environment"),
        ]
        assert seen["cells"] == 4
        assert seen["cell"] == "stem, 370 MMACs, 10 %, 3.7 M, 10 %, 40 ms, 10 %"
        assert seen["zoomed"] == "stages.0"
        assert seen["command"].startswith("vizoo profile litv2_s --measure latency,latency")
        assert seen["evil"] == [True, True, 0, 0]
