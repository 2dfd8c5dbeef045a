"""Pictures of records: which figures are drawn, every point named, nothing joined that was measured differently."""

from pathlib import Path
from typing import Any

import pytest
from records import measurement, record

from vizoo.tools.profiling import picture
from vizoo.tools.profiling.record import Record


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Draws records and gives the axes."""
    saved: list[Any] = []
    monkeypatch.setattr(picture, "save_figure", lambda figure, path, **options: saved.append(figure))

    def draw(*plain: dict[str, Any]) -> Any:
        picture.plot([Record.from_dict(one) for one in plain], Path("x.png"))
        return saved[-1].axes[0]

    return draw


def lines(axes: Any) -> dict[str, list[tuple[float, float]]]:
    return {line.get_label(): list(zip(*line.get_data(), strict=True)) for line in axes.get_lines()}


def texts(axes: Any) -> set[str]:
    return {text.get_text() for text in axes.texts} - {""}


def test_accuracy_over_speed(drawn: Any) -> None:
    axes = drawn(record("litv2_m", 10.0), record("litv2_s", 20.0), record("swin_tiny_patch4_window7_224", 15.0))
    assert lines(axes) == {"LITv2": [(10.0, 83.3), (20.0, 82.0)], "swin": [(15.0, 81.388)]}
    assert texts(axes) == {"litv2_m", "litv2_s", "swin_tiny"}
    assert axes.get_title(loc="left") == "Test CPU (cpu), fp32, 1 thread, batch 8, PyTorch 2.14.1"
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("images per second", "published top-1 on ImageNet-1k (%)")


def test_only_what_was_measured_alike_is_joined(drawn: Any) -> None:
    one, two = {"conditions": {"threads": 1}}, {"conditions": {"threads": 2}}
    axes = drawn(*(record(name, v, **how) for how in (one, two) for name, v in (("litv2_s", 20.0), ("litv2_m", 10.0))))
    assert set(lines(axes)) == {"LITv2, 1 threads", "LITv2, 2 threads"}
    assert all(len(points) == 2 for points in lines(axes).values())
    assert axes.get_title(loc="left") == "Test CPU (cpu), fp32, batch 8, PyTorch 2.14.1"


def test_what_all_have_is_drawn(drawn: Any) -> None:
    """A model without an accuracy, then one without throughput, then one without any time."""
    plain = [record("litv2_s", 20.0, 10**9), record("dependencyvit_small", 10.0, 2 * 10**9)]
    assert drawn(*plain).get_ylabel() == "images per second"
    assert lines(drawn(*plain)) == {"LITv2": [(1.0, 20.0)], "dependencyvit": [(2.0, 10.0)]}
    plain[0] = record("litv2_s", measurements=[measurement("latency", "s", 0.25)])
    axes = drawn(*plain)
    assert axes.get_ylabel() == "latency, ms"
    assert lines(axes)["LITv2"] == [(1.0, 250.0)]
    counted = [record(name, measurements=[]) for name in ("litv2_s", "litv2_m")]
    axes = drawn(*counted)
    assert (axes.get_ylabel(), axes.get_title(loc="left")) == ("parameters, M", "counts")


def test_families_of_others_are_one_where_they_are_many(drawn: Any) -> None:
    others = [
        "resnet50",
        "swin_tiny_patch4_window7_224",
        "convnext_tiny",
        "pvt_v2_b2",
        "regnety_032",
        "efficientnet_b0",
    ]
    others += ["vit_a", "maxvit_a", "levit_a", "coat_a", "xcit_a"]
    axes = drawn(*(record(name, 10.0 + i) for i, name in enumerate(["litv2_s", *others])))
    assert set(lines(axes)) == {"LITv2", picture.REST}
    assert len(texts(axes)) == 12
    (rest,) = [line for line in axes.get_lines() if line.get_label() == picture.REST]
    assert rest.get_linestyle() == "None"


def test_names(drawn: Any) -> None:
    """A model in several sizes says which, and a partial count has a star."""
    partial = {**record("x")["counts"], "status": "partial", "reasons": ["nms"]}
    sizes = [record("litv2_s", v, target={"size": [side, side]}) for v, side in ((20.0, 224), (10.0, 384))]
    axes = drawn(*sizes, record("resnet50", counts=partial))
    assert texts(axes) == {"litv2_s 224x224", "litv2_s 384x384", "resnet50*"}
