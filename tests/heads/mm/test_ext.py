"""The stand-in for mmcv's compiled operators: values against slow references, gradients, dtypes, who answers when.

Boxes, regions of interest and PSANet's masks by the kernels' own rules: ``test_ext_rules.py``.
"""

from __future__ import annotations

import importlib
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tolerance import close
from torch import Tensor

import vizoo
from vizoo.tools.mm import LINK

pytestmark = pytest.mark.mm
pytest.importorskip("mmengine", reason="needs mmengine (extra mm), not installed")
ext = importlib.import_module("vizoo.heads.mm.ext")

HALVES = [torch.float16, torch.bfloat16]


# regions of interest


def bilinear(x: Tensor, py: float, px: float) -> Tensor:
    """Value ``[C]`` of ``[C, H, W]`` at a point, as RoIAlign defines it."""
    _, h, w = x.shape
    if py < -1 or py > h or px < -1 or px > w:
        return x.new_zeros(len(x))
    py, px = max(py, 0), max(px, 0)
    y0, x0 = min(int(py), h - 1), min(int(px), w - 1)
    y1, x1 = min(y0 + 1, h - 1), min(x0 + 1, w - 1)
    dy, dx = (0.0 if y0 == h - 1 else py - y0), (0.0 if x0 == w - 1 else px - x0)
    top = (1 - dx) * x[:, y0, x0] + dx * x[:, y0, x1]
    return (1 - dy) * top + dy * ((1 - dx) * x[:, y1, x0] + dx * x[:, y1, x1])


def slow_roi_align(x: Tensor, rois: Tensor, size: tuple[int, int], scale: float, ratio: int, aligned: bool) -> Tensor:
    out = x.new_zeros(len(rois), x.shape[1], *size)
    for k, roi in enumerate(rois.tolist()):
        shift = 0.5 if aligned else 0.0
        x1, y1, x2, y2 = (v * scale - shift for v in roi[1:])
        w, h = x2 - x1, y2 - y1
        if not aligned:
            w, h = max(w, 1.0), max(h, 1.0)
        bh, bw = h / size[0], w / size[1]
        gh, gw = (ratio, ratio) if ratio > 0 else (-int(-bh // 1), -int(-bw // 1))
        for i in range(size[0]):
            for j in range(size[1]):
                for a in range(gh):
                    for b in range(gw):
                        point = (y1 + bh * (i + (a + 0.5) / gh), x1 + bw * (j + (b + 0.5) / gw))
                        out[k, :, i, j] += bilinear(x[int(roi[0])], *point) / (gh * gw)
    return out


def roi_align(x: Tensor, rois: Tensor, size=(3, 2), scale=0.5, ratio=0, aligned=True) -> Tensor:
    from mmcv.ops import RoIAlign

    return RoIAlign(size, scale, ratio, aligned=aligned)(x, rois)


ROIS = torch.tensor([[0, 1.0, 2.0, 13.0, 17.0], [1, -6.0, 0.0, 30.0, 9.5], [1, 4.0, 4.0, 9.0, 9.0]])


@pytest.mark.parametrize("aligned", [True, False])
@pytest.mark.parametrize("ratio", [0, 2])
def test_roi_align(aligned, ratio):
    x = torch.randn(2, 3, 9, 11, dtype=torch.float64)
    rois = ROIS.double()
    expected = slow_roi_align(x, rois, (3, 2), 0.5, ratio, aligned)
    torch.testing.assert_close(roi_align(x, rois, ratio=ratio, aligned=aligned), expected, rtol=1e-9, atol=1e-9)
    strided = x.permute(0, 1, 3, 2).contiguous().permute(0, 1, 3, 2)
    torch.testing.assert_close(roi_align(strided, rois, ratio=ratio, aligned=aligned), expected, rtol=1e-9, atol=1e-9)
    x.requires_grad_()
    assert torch.autograd.gradcheck(lambda x: roi_align(x, rois, ratio=ratio, aligned=aligned), x)


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("op", ["roi_align", "roi_pool"])
def test_roi_half(op, dtype):
    from mmcv.ops import roi_pool

    pool = roi_align if op == "roi_align" else lambda x, rois: roi_pool(x, rois, (3, 2), 0.5)
    x = torch.randn(2, 3, 9, 11, dtype=dtype).requires_grad_()
    out = pool(x, ROIS.to(dtype))
    wide = x.detach().float().requires_grad_()
    expected = pool(wide, ROIS.to(dtype).float())
    grad = torch.randn(out.shape).to(dtype)
    out.backward(grad)
    expected.backward(grad.float())
    assert out.dtype == x.grad.dtype == dtype
    assert torch.equal(out, expected.to(dtype))
    torch.testing.assert_close(x.grad, wide.grad.to(dtype))


# deformable convolution

GEOMETRIES = {
    "pad": {"stride": 1, "padding": 1},
    "stride": {"stride": 2, "padding": 1},
    "dilation": {"stride": 1, "padding": 2, "dilation": 2},
    "groups": {"stride": 1, "padding": 1, "groups": 2, "deform_groups": 2},
}


def deform(x: Tensor, offset: Tensor, weight: Tensor, mask: Tensor | None, bias: Tensor | None, **geometry) -> Tensor:
    from mmcv.ops import deform_conv2d, modulated_deform_conv2d

    names = ("stride", "padding", "dilation", "groups", "deform_groups")
    numbers = [geometry.get(name, {"padding": 0}.get(name, 1)) for name in names]
    if mask is None:
        return deform_conv2d(x, offset, weight, *numbers)
    return modulated_deform_conv2d(x, offset, mask, weight, bias, *numbers)


def slow_deform(x, offset, weight, mask, bias, stride=1, padding=0, dilation=1, groups=1, deform_groups=1) -> Tensor:
    """Sampled with zeros outside; gradients by autograd."""
    n, c, h, w = x.shape
    o, _, kh, kw = weight.shape
    oh, ow = offset.shape[2:]
    offset = offset.view(n, deform_groups, kh * kw, 2, oh, ow)
    columns = []
    for k in range(kh * kw):
        grid_y = torch.arange(oh).to(x)[:, None] * stride - padding + (k // kw) * dilation
        grid_x = torch.arange(ow).to(x) * stride - padding + (k % kw) * dilation
        parts = []
        for g in range(deform_groups):
            y, px = grid_y + offset[:, g, k, 0], grid_x + offset[:, g, k, 1]
            inside = (y > -1) & (y < h) & (px > -1) & (px < w)
            value = 0
            for dy in (0, 1):
                for dx in (0, 1):
                    iy, ix = y.floor().detach() + dy, px.floor().detach() + dx
                    weights = (1 - (y - iy).abs()) * (1 - (px - ix).abs())
                    ok = inside & (iy >= 0) & (iy < h) & (ix >= 0) & (ix < w)
                    flat = (iy.clamp(0, h - 1) * w + ix.clamp(0, w - 1)).long().view(n, 1, -1)
                    part = x.view(n, deform_groups, c // deform_groups, h * w)[:, g]
                    sampled = part.gather(2, flat.expand(-1, part.shape[1], -1)).view(n, -1, oh, ow)
                    value = value + sampled * torch.where(ok, weights, 0.0)[:, None]
            if mask is not None:
                value = value * mask.view(n, deform_groups, kh * kw, oh, ow)[:, g, k][:, None]
            parts.append(value)
        columns.append(torch.cat(parts, dim=1))
    stacked = torch.stack(columns, dim=2).view(n, groups, c // groups * kh * kw, oh * ow)
    out = (weight.view(groups, o // groups, -1) @ stacked).view(n, o, oh, ow)
    return out if bias is None else out + bias[:, None, None]


@pytest.mark.parametrize("offsets", ["random", "zero"])
@pytest.mark.parametrize("modulated", [False, True], ids=["v1", "v2"])
@pytest.mark.parametrize("geometry", list(GEOMETRIES))
def test_deform_conv(geometry, modulated, offsets):
    """Values and all gradients, also of samples exactly on the border, where zero offsets put them."""
    numbers = GEOMETRIES[geometry]
    x = torch.randn(2, 4, 7, 6, dtype=torch.float64)
    weight = torch.randn(4, 4 // numbers.get("groups", 1), 3, 3, dtype=torch.float64)
    size = torch.nn.functional.conv2d(
        x,
        weight,
        None,
        *(numbers.get(k, d) for k, d in (("stride", 1), ("padding", 0), ("dilation", 1), ("groups", 1))),
    ).shape[2:]
    groups = numbers.get("deform_groups", 1)
    offset = torch.randn(2, groups * 18, *size, dtype=torch.float64) * (1.7 if offsets == "random" else 0.0)
    leaves = [x, offset, weight]
    if modulated:
        leaves += [torch.rand(2, groups * 9, *size, dtype=torch.float64), torch.randn(4, dtype=torch.float64)]
    results = []
    for function in (deform, slow_deform):
        copies = [t.clone().requires_grad_() for t in leaves]
        rest = copies[3:] if modulated else [None, None]
        out = function(*copies[:3], *rest, **numbers)
        torch.manual_seed(3)
        results.append([out, *torch.autograd.grad(out, copies, torch.randn_like(out))])
    if offsets == "zero":  # inside, the slope at a whole pixel has two values: only samples outside are compared
        for found in results:
            found[2] = found[2] * border_only(offset, x.shape[2:], numbers, size)
    for found, expected in zip(*results, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)


def border_only(offset: Tensor, frame, numbers, size) -> Tensor:
    """1 for the samples of zero offsets that lie at -1 or at the size: their gradient must vanish."""
    groups = offset.shape[1] // 18
    outside = torch.zeros(9, *size, dtype=torch.bool)
    for k in range(9):
        start = [i * numbers.get("dilation", 1) - numbers["padding"] for i in (k // 3, k % 3)]
        y, x = (torch.arange(n) * numbers["stride"] + s for n, s in zip(size, start, strict=True))
        out_y, out_x = ((p <= -1) | (p >= n) for p, n in zip((y, x), frame, strict=True))
        outside[k] = out_y[:, None] | out_x
    assert outside.any()
    return outside.repeat_interleave(2, dim=0).repeat(groups, 1, 1).to(offset)


@pytest.mark.parametrize("modulated", [False, True], ids=["v1", "v2"])
def test_deform_channels_last(modulated):
    """The memory format of inputs and offsets changes nothing."""
    shapes = [(2, 4, 6, 5), (2, 18, 6, 5), (4, 4, 3, 3), *([(2, 9, 6, 5), (4,)] if modulated else [])]
    leaves = [torch.randn(shape) for shape in shapes]
    results = []
    for memory_format in (torch.contiguous_format, torch.channels_last):
        copies = [t.clone(memory_format=memory_format) if t.ndim == 4 else t.clone() for t in leaves]
        copies = [t.requires_grad_() for t in copies]
        out = deform(*copies, *([] if modulated else [None, None]), padding=1)
        results.append([out, *torch.autograd.grad(out.square().sum(), copies)])
    for a, b in zip(*results, strict=True):
        close(a, b, "rerun")


def test_deform_with_offsets_of_a_finer_level():
    """DyHead: the compiled operator reads the first values in memory, whatever their height and width say."""
    x, weight = torch.randn(2, 2, 4, 3, dtype=torch.float64), torch.randn(2, 2, 3, 3, dtype=torch.float64)
    offset, mask = torch.randn(2, 18, 8, 6, dtype=torch.float64), torch.rand(2, 9, 8, 6, dtype=torch.float64)
    leaves = [t.requires_grad_() for t in (x, offset, weight, mask)]
    out = deform(x, offset, weight, mask, None, padding=1)
    read = [t.flatten(1)[:, : c * 12].view(2, c, 4, 3) for t, c in ((offset, 18), (mask, 9))]
    expected = slow_deform(x, read[0], weight, read[1], None, padding=1)
    torch.testing.assert_close(out, expected)
    grad = torch.randn_like(out)
    found, slow = torch.autograd.grad(out, leaves, grad), torch.autograd.grad(expected, leaves, grad)
    for a, b in zip(found, slow, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


def test_deform_border_rule():
    """A sample at exactly -1 gets no offset gradient, one just inside gets one."""
    x, weight = torch.ones(1, 1, 3, 3), torch.ones(1, 1, 1, 1)
    for shift, slope in ((0.0, 0.0), (0.25, 1.0)):
        offset = torch.full((1, 2, 5, 5), 0.0)
        offset[0, 0, 0, 2] = shift  # the sample of row -1, column 1
        offset.requires_grad_()
        out = deform(x, offset, weight, None, None, padding=1)
        (grad,) = torch.autograd.grad(out[0, 0, 0, 2], offset)
        assert grad[0, 0, 0, 2].item() == slope


@pytest.mark.parametrize("dtype", HALVES)
def test_deform_half(dtype):
    x, offset = torch.randn(1, 2, 6, 5).to(dtype), torch.randn(1, 18, 6, 5).to(dtype)
    weight, mask, bias = torch.randn(2, 2, 3, 3).to(dtype), torch.rand(1, 9, 6, 5).to(dtype), torch.randn(2).to(dtype)
    leaves = [t.requires_grad_() for t in (x, offset, weight, mask, bias)]
    wide = [t.detach().float().requires_grad_() for t in leaves]
    out, expected = deform(*leaves, padding=1), deform(*wide, padding=1)
    assert out.dtype == dtype
    assert torch.equal(out, expected.to(dtype))
    out.sum().backward()
    expected.sum().backward()
    for a, b in zip(leaves, wide, strict=True):
        torch.testing.assert_close(a.grad, b.grad.to(dtype))


# focal losses

LABELS = torch.tensor([0, 2, 3, 1, 7, -1])  # three classes: 3, 7 and -1 are background


@pytest.mark.parametrize("weighted", [False, True])
def test_sigmoid_focal_loss(weighted):
    from mmcv.ops import sigmoid_focal_loss

    x = torch.randn(6, 3, dtype=torch.float64).requires_grad_()
    weight = torch.tensor([0.5, 2.0, 3.0], dtype=torch.float64) if weighted else None
    onehot = torch.nn.functional.one_hot(LABELS.clamp(0, 7), 8)[:, :3] * (LABELS >= 0)[:, None]
    p = x.sigmoid()
    pt, alpha = torch.where(onehot == 1, p, 1 - p), torch.where(onehot == 1, 0.3, 0.7)
    expected = -alpha * (1 - pt) ** 1.5 * pt.log()
    if weighted:
        rows = [weight[label].item() if 0 <= label < 3 else 1.0 for label in LABELS.tolist()]
        expected = expected * torch.tensor(rows, dtype=torch.float64)[:, None]
    found = sigmoid_focal_loss(x, LABELS, 1.5, 0.3, weight, "none")
    torch.testing.assert_close(found, expected)
    (slow,) = torch.autograd.grad(expected.sum(), x, retain_graph=True)
    (fast,) = torch.autograd.grad(sigmoid_focal_loss(x, LABELS, 1.5, 0.3, weight, "sum"), x)
    torch.testing.assert_close(fast, slow)
    extreme = torch.tensor([[200.0, -200.0, 0.0]])
    assert sigmoid_focal_loss(extreme, torch.tensor([1]), 2.0, 0.25, None, "none").isfinite().all()


@pytest.mark.parametrize("weighted", [False, True])
def test_softmax_focal_loss(weighted):
    from mmcv.ops import softmax_focal_loss

    labels = torch.tensor([0, 2, 1, -1, 1, 2])
    x = torch.randn(6, 3, dtype=torch.float64).requires_grad_()
    weight = torch.tensor([0.5, 2.0, 3.0], dtype=torch.float64) if weighted else None
    p = x.softmax(1)[torch.arange(6), labels.clamp(min=0)]
    rows = torch.ones(6) if weight is None else weight[labels.clamp(min=0)]
    expected = -0.3 * (1 - p) ** 1.5 * p.log() * rows * (labels >= 0)
    found = softmax_focal_loss(x.detach().clone(), labels, 1.5, 0.3, weight, "none")
    torch.testing.assert_close(found, expected)
    (slow,) = torch.autograd.grad(expected.sum(), x)
    leaf = x.detach().clone().requires_grad_()
    loss = softmax_focal_loss(leaf * 1, labels, 1.5, 0.3, weight, "sum")
    (fast,) = torch.autograd.grad(loss, leaf)
    torch.testing.assert_close(fast, slow)


@pytest.mark.parametrize("dtype", HALVES)
def test_focal_loss_half(dtype):
    x, none = torch.randn(6, 3).to(dtype), torch.zeros(0)
    out = torch.full_like(x, float("nan"))
    wide = torch.zeros(6, 3)
    for function in (ext.sigmoid_focal_loss_forward, ext.sigmoid_focal_loss_backward):
        function(x, LABELS, none, out, gamma=2.0, alpha=0.25)
        function(x.float(), LABELS, none, wide, gamma=2.0, alpha=0.25)
        assert torch.equal(out, wide.to(dtype))


# attention, CARAFE, masked convolution


def test_ms_deform_attn():
    shapes = torch.tensor([[4, 5], [2, 3]])
    start = torch.tensor([0, 20])
    value = torch.randn(2, 26, 2, 4, dtype=torch.float64).requires_grad_()
    places = torch.rand(2, 3, 2, 2, 2, 2, dtype=torch.float64).requires_grad_()
    weights = torch.rand(2, 3, 2, 2, 2, dtype=torch.float64).requires_grad_()
    leaves = (value, places, weights)
    expected = torch.zeros(2, 3, 8, dtype=torch.float64)
    rows = []
    for b in range(2):
        for q in range(3):
            for head in range(2):
                total: Tensor | int = 0
                for level, (h, w) in enumerate(shapes.tolist()):
                    level_map = value[b, start[level] : start[level] + h * w, head].T.view(4, h, w)
                    for point in range(2):
                        px, py = places[b, q, head, level, point] * torch.tensor([w, h]) - 0.5
                        y0, x0 = py.floor().long(), px.floor().long()
                        for iy in (y0, y0 + 1):
                            for ix in (x0, x0 + 1):
                                if 0 <= iy < h and 0 <= ix < w:
                                    share = (1 - (py - iy).abs()) * (1 - (px - ix).abs())
                                    total = total + level_map[:, iy, ix] * share * weights[b, q, head, level, point]
                rows.append(total)
    expected = torch.stack(rows).view(2, 3, 8)
    found = ext.ms_deform_attn_forward(value, shapes, start, places, weights, im2col_step=64)
    torch.testing.assert_close(found, expected)
    grad = torch.randn_like(expected)
    slow = torch.autograd.grad(expected, leaves, grad)
    fast = [torch.full_like(t, float("nan")) for t in leaves]
    with torch.no_grad():
        ext.ms_deform_attn_backward(value, shapes, start, places, weights, grad, *fast, im2col_step=64)
    for a, b in zip(fast, slow, strict=True):
        torch.testing.assert_close(a, b)


def test_carafe():
    from mmcv.ops import carafe, carafe_naive

    x = torch.randn(1, 4, 3, 5, dtype=torch.float64).requires_grad_()
    masks = torch.rand(1, 2 * 9, 6, 10, dtype=torch.float64).requires_grad_()
    expected = torch.zeros(1, 4, 6, 10, dtype=torch.float64)
    padded = torch.nn.functional.pad(x.detach(), (1, 1, 1, 1))
    for c in range(4):
        for i in range(6):
            for j in range(10):
                window = padded[0, c, i // 2 : i // 2 + 3, j // 2 : j // 2 + 3].flatten()
                expected[0, c, i, j] = (window * masks[0, (c // 2) * 9 : (c // 2 + 1) * 9, i, j].detach()).sum()
    torch.testing.assert_close(carafe(x, masks, 3, 2, 2), expected)
    torch.testing.assert_close(carafe_naive(x, masks, 3, 2, 2), expected)
    assert torch.autograd.gradcheck(lambda x, m: carafe(x, m, 3, 2, 2), (x, masks))


def test_masked_conv():
    from mmcv.ops import MaskedConv2d

    conv = MaskedConv2d(3, 4, 3, padding=1)
    x, mask = torch.randn(1, 3, 5, 6), (torch.rand(1, 5, 6) > 0.5).float()
    with torch.no_grad():
        torch.testing.assert_close(conv(x, mask), torch.nn.Conv2d.forward(conv, x) * mask)


# who answers for mmcv._ext


def test_unknown_operator():
    import mmcv._ext as found

    assert hasattr(found, "upfirdn2d")
    with pytest.raises(NotImplementedError, match="upfirdn2d"):
        found.upfirdn2d(torch.zeros(1))
    assert not hasattr(found, "__path__")
    with pytest.raises(AttributeError, match="__wrapped__"):
        _ = found.__wrapped__
    assert "torchvision" in found.get_compiling_cuda_version()
    assert found.get_compiler_version()


def test_docs_list_what_is_missing():
    """Every operator that mmcv asks for is here, or docs/mm.md names it or its file as missing."""
    import mmcv

    asked = {
        name: file.stem
        for file in Path(mmcv.__file__).parent.glob("ops/**/*.py")
        for names in re.findall(r"load_ext\(\s*'_ext',\s*\[(.*?)\]\s*\)", file.read_text(), re.DOTALL)
        for name in re.findall(r"'(\w+)'", names)
    }
    assert len(asked) > 100
    page = Path(__file__).parents[3] / "docs" / "mm.md"
    table = page.read_text(encoding="utf-8").partition("| for | missing operators |")[2].partition("\n\n")[0]
    listed = set(re.findall(r"`(\w+)`", table)) - {"MMSyncBN", "SyncBN"}
    missing = {name if name in listed else file for name, file in asked.items() if name not in ext.__all__}
    assert missing == listed
    assert set(ext.__all__) <= asked.keys()


SCENARIOS = """
import importlib, json, os, sys
import torch, timm
answers = {}
sys.modules["mmengine"] = None  # as if it were not installed
try:
    import vizoo.heads.mm
except ImportError as e:
    answers["missing"] = str(e)
del sys.modules["mmengine"]

import vizoo.heads.mm
from vizoo.heads.mm import ext
before = list(sys.meta_path)
importlib.reload(vizoo.heads.mm)
answers["twice"] = sys.meta_path == before
answers["heavy"] = [m for m in sys.modules if m.split(".")[0] in ("mmdet", "mmseg") or m.startswith("mmcv.ops")]
answers["found"] = importlib.util.find_spec("mmcv._ext").loader is not None

def ask(choice, extension):
    # what mmcv._ext.nms is, with a mmcv of our own that has this extension
    for name in [m for m in sys.modules if m.split(".")[0] == "mmcv"]:
        del sys.modules[name]
    if ext.ExtFinder in sys.meta_path:
        sys.meta_path.remove(ext.ExtFinder)
    os.environ["VIZOO_MMCV_EXT"] = choice
    sys.path.insert(0, os.path.join(sys.argv[1], extension))
    importlib.invalidate_caches()
    try:
        ext.install()
        ext.install()
        return str(importlib.import_module("mmcv._ext").nms)
    except Exception as e:
        return f"{type(e).__name__}: {e}"
    finally:
        del sys.path[0]

for choice, extension in json.loads(sys.argv[2]):
    answers[f"{choice}, {extension}"] = ask(choice, extension)
print(json.dumps(answers))
"""
EXTENSIONS = {
    "real": "nms = 'the real one'",
    "broken": "raise ImportError('undefined symbol')",
    "linked": LINK,
    "none": None,
}
CHOICES = [
    ("auto", "real", "the real one"),
    ("auto", "none", "<function nms at"),
    ("auto", "broken", "ImportError: undefined symbol"),
    ("torchvision", "real", "<function nms at"),
    ("off", "real", "the real one"),
    ("off", "none", "ModuleNotFoundError: No module named 'mmcv._ext'"),
    ("auto", "linked", "<function nms at"),
    ("torchvision", "linked", "<function nms at"),
    ("off", "linked", "ModuleNotFoundError: No module named 'mmcv._ext'"),
    ("of", "linked", "ValueError: got VIZOO_MMCV_EXT='of'"),
    ("of", "none", "ValueError: got VIZOO_MMCV_EXT='of'"),
]


@pytest.fixture(scope="module")
def answers(tmp_path_factory) -> dict:
    """What one fresh interpreter says about imports."""
    folder = tmp_path_factory.mktemp("extensions")
    for name, text in EXTENSIONS.items():
        (folder / name / "mmcv").mkdir(parents=True)
        (folder / name / "mmcv" / "__init__.py").write_text("")
        if text:
            (folder / name / "mmcv" / "_ext.py").write_text(text)
    argv = [sys.executable, "-c", SCENARIOS, str(folder), json.dumps([c[:2] for c in CHOICES])]
    env = {**os.environ, "PYTHONPATH": str(Path(vizoo.__file__).parents[1])}
    done = subprocess.run(argv, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize(("choice", "extension", "answer"), CHOICES)
def test_who_answers(choice, extension, answer, answers):
    """A real extension wins, a broken one stays an error, and the environment decides otherwise."""
    assert answers[f"{choice}, {extension}"].startswith(answer)


def test_imported_twice_and_light(answers):
    assert answers["twice"]
    assert answers["heavy"] == []
    assert answers["found"]


def test_missing_mm(answers):
    assert "needs mmengine" in answers["missing"]
    assert "vizoo[mm]" in answers["missing"]
