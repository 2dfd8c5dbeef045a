"""Every kind of target: what its text says, what is built, and which inputs it gets."""

from __future__ import annotations

import json
import pickle
import re
import warnings
import zipfile
from pathlib import Path

import pytest
import timm
import torch
from hand_counts import hand_count
from torch import nn
from zoo import build

from vizoo.tools import profiler
from vizoo.tools.common import Failure, UserError, read_spec, resolve_model, resolve_models
from vizoo.tools.profiling import onnx_file, profile
from vizoo.tools.profiling.counting import count
from vizoo.tools.profiling.programs import _is_formula
from vizoo.tools.profiling.target import find_target, read_inputs
from vizoo.tools.profiling.timing import Images, random_like

ROOT = Path(__file__).parents[2]
SCHEMA = json.loads((ROOT / "tools/profiling/record.schema.json").read_text(encoding="utf-8"))
CODE = """
from torch import nn

class Two(nn.Module):
    def __init__(self, width=4):
        super().__init__()
        self.table, self.layer = nn.Embedding(9, width), nn.Linear(width, 5)

    def forward(self, tokens, x):
        return self.layer(self.table(tokens) + x)

def make(width=8):
    net = nn.Sequential(nn.Conv2d(3, width, 3), nn.ReLU())
    net.default_cfg = {"input_size": (3, 20, 30)}
    return net

def none():
    return 3

number = 3
"""


class Net(nn.Module):
    """A small program: convolution with norm, tokens, a linear layer without and with a product of activations."""

    def __init__(self):
        super().__init__()
        self.conv, self.norm, self.head = nn.Conv2d(3, 8, 3, 2), nn.BatchNorm2d(8), nn.Linear(8, 5)

    def forward(self, x):
        tokens = self.norm(self.conv(x)).relu().flatten(2).transpose(1, 2)
        return self.head((tokens @ tokens.transpose(1, 2)).softmax(-1) @ tokens)


MACS = 8 * 27 * 49 + 2 * 49 * 49 * 8 + 49 * 8 * 5  # of Net at 16x16


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """The same model in every form."""
    folder = tmp_path_factory.mktemp("files")
    net, x = Net().eval(), torch.randn(2, 3, 16, 16)
    any_batch = ({0: torch.export.Dim("batch")},)
    torch.export.save(torch.export.export(net, (x[:1],)), folder / "one.pt2")
    torch.export.save(torch.export.export(net, (x,), dynamic_shapes=any_batch), folder / "any.pt2")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of forms that people still have
        torch.jit.save(torch.jit.trace(net, x), folder / "net.ts")
        axes = {"x": {0: "batch"}}
        torch.onnx.export(net, (x,), folder / "net.onnx", input_names=["x"], dynamic_axes=axes, dynamo=False)
    torch.save(net.state_dict(), folder / "weights.pth")
    (folder / "code.py").write_text(CODE, encoding="utf-8")
    return folder, net


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("resnet18.a1_in1k", ("timm", "resnet18.a1_in1k", None)),
        ("litv2*@224", ("timm", "litv2*", [224])),
        ("hf-hub:timm/resnet18@main", ("timm", "hf-hub:timm/resnet18@main", None)),
        ("local-dir:/a b/c:d@96x64", ("timm", "local-dir:/a b/c:d", [96, 64])),
        ("torchvision:maskrcnn_resnet50_fpn@800x1280", ("torchvision", "maskrcnn_resnet50_fpn", [800, 1280])),
        ("mm:configs/a.py@512", ("mm", "configs/a.py", [512])),
        ("package.module:Class.make", ("function", "package.module:Class.make", None)),
        ("dir/file.py:make@32x16", ("function", "dir/file.py:make", [32, 16])),
        ("file.py", ("function", "file.py", None)),
        ("a.b.pt2", ("exported", "a.b.pt2", None)),
        ("a.onnx@64", ("onnx", "a.onnx", [64])),
        *((f"a{end}", ("torchscript", f"a{end}", None)) for end in (".pt", ".pth", ".ts")),
    ],
)
def test_texts(text, parts):
    spec = read_spec(text)
    assert (spec.kind, spec.name, spec.size) == parts
    assert spec.prefix + spec.name + spec.suffix == text


def test_names_are_expanded():
    found = resolve_models(["torchvision:resnet*@64", "test_lit*@96", "torchvision:resnet18@64", "x.onnx", "a:b"])
    assert found[0] == "torchvision:resnet101@64"
    assert found.count("torchvision:resnet18@64") == 1
    assert found[-3:] == ["test_litv2@96", "x.onnx", "a:b"]
    with pytest.raises(UserError, match="unknown model 'torchvision:resnet19'; did you mean resnet18"):
        resolve_models(["torchvision:resnet19"])
    for text in ("x.onnx", "torchvision:resnet18", "resnet18@224"):
        with pytest.raises(UserError, match="only 'vizoo profile' takes that"):
            resolve_model(text)


def test_mask_rcnn_by_hand(capsys):
    """The dense part by the independent count, the heads by 1000 proposals and 100 detections."""
    from torchvision.models import get_model
    from torchvision.models.detection import MaskRCNN_ResNet50_FPN_Weights

    with torch.device("meta"):
        net = get_model("maskrcnn_resnet50_fpn", weights=None, weights_backbone=None).eval()
        box = 256 * 7 * 7 * 1024 + 1024 * 1024 + 1024 * (91 + 4 * 91)
        mask = 4 * 14 * 14 * 256 * 256 * 9 + 14 * 14 * 256 * 256 * 4 + 28 * 28 * 256 * 91
        dense = {side: hand_count(_Dense(net), torch.empty(1, 3, *side)).total() for side in ((800, 1280), (800, 800))}
    assert dense[800, 1280] + 1000 * box + 100 * mask == 259_592_279_040
    assert profiler.main(["torchvision:maskrcnn_resnet50_fpn@800x1280", "--strict", "--json"]) == 0
    assert re.search(r'"macs": ?259592279040\b', capsys.readouterr().out)
    # torchvision publishes that of an image of noise, 800x800 after scaling, in which nothing is detected
    published = MaskRCNN_ResNet50_FPN_Weights.DEFAULT.meta["_ops"]
    assert round((dense[800, 800] + 1000 * box) / 1e9, 2) == published == 134.38


class _Dense(nn.Module):
    def __init__(self, net):
        super().__init__()
        self.backbone, self.head = net.backbone, net.rpn.head

    def forward(self, x):
        return self.head(list(self.backbone(x).values()))


class Maps(nn.Module):
    """The smallest backbone: two maps."""

    out_channels = 4

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 4, 3, 2, 1), nn.Conv2d(4, 4, 3, 2, 1)

    def forward(self, x):
        x = self.first(x)
        return {"0": x, "1": self.second(x)}


@pytest.fixture
def detector():
    from torchvision.models.detection import FasterRCNN
    from torchvision.models.detection.anchor_utils import AnchorGenerator

    anchors = AnchorGenerator(((8,), (16,)), ((1.0,),) * 2)
    proposals = {"rpn_pre_nms_top_n_test": 40, "rpn_post_nms_top_n_test": 30, "box_detections_per_img": 5}
    return FasterRCNN(Maps(), 3, 32, 32, rpn_anchor_generator=anchors, **proposals).eval()


def test_most_boxes(detector):
    """As many as the detector's own limits let through, of any image; a real one is counted for its own boxes."""
    for n in (1, 2):
        most = count(detector, [torch.empty(3, 32, 32, device="meta")] * n)
        assert (most.status, most.engine, most.uncounted) == ("complete", "meta", {})
        dense = hand_count(_Dense(detector), torch.empty(1, 3, 32, 32)).total()
        box = 4 * 7 * 7 * 1024 + 1024 * 1024 + 1024 * 5 * 3
        assert most.macs == n * (dense + 30 * box)
        # NMS of 40 and 40 proposals, all of one class, then of 30 boxes for each of two classes
        assert most.ops["torchvision::nms"][:3] == (0, n * 16 * (80**2 + 2 * 30**2), n * 3)
        assert most.ops["torchvision::roi_align"][1] == n * 8 * 30 * 4 * 7 * 7 * 2**2
    found = count(detector, [torch.rand(3, 32, 32)])
    assert (found.status, found.engine) == ("partial", "cpu")
    assert dense < found.macs <= most.macs // 2


@pytest.mark.parametrize(
    ("name", "shapes", "size"),
    [
        ("resnet18", [[1, 3, 224, 224]], (224, 224)),
        ("efficientnet_b1@64", [[1, 3, 64, 64]], (64, 64)),
        ("lraspp_mobilenet_v3_large", [[1, 3, 520, 520]], (520, 520)),
        ("r3d_18", [[1, 3, 16, 112, 112]], (112, 112)),
        ("raft_small", [[1, 3, 520, 960]] * 2, (520, 960)),
        ("fasterrcnn_mobilenet_v3_large_320_fpn", [[3, 320, 512]], (320, 512)),
        ("ssdlite320_mobilenet_v3_large", [[3, 320, 320]], (320, 320)),
    ],
)
def test_torchvision_inputs(name, shapes, size):
    found = find_target(f"torchvision:{name}")
    assert (found.to_dict()["inputs"], found.size, found.kind) == (shapes, size, "torchvision")
    assert all(p.is_meta for p in found.net.parameters())


def test_detectors_take_a_list_of_images():
    found = find_target("torchvision:fasterrcnn_mobilenet_v3_large_320_fpn@64x96")
    images = random_like(found.inputs[0], 3, "cpu", torch.float32)
    assert isinstance(found.inputs[0], Images)
    assert [tuple(image.shape) for image in images] == [(3, 64, 96)] * 3
    seen = []
    found.net.backbone.register_forward_pre_hook(lambda module, args: seen.append(tuple(args[0].shape)))
    count(found.net.eval(), *found.inputs)
    assert set(seen) == {(1, 3, 64, 96)}  # the detector does not scale it
    with pytest.raises(UserError, match="scales every image to 320x320"):
        find_target("torchvision:ssdlite320_mobilenet_v3_large@224")


def test_functions_and_classes(files):
    folder, _ = files
    found = profile.profile(f"{folder}/code.py:make", model_kwargs={"width": 6})
    assert (found.name, found.size, found.counts.macs) == (f"{folder}/code.py:make", (20, 30), 18 * 28 * 6 * 27)
    two = find_target(f"{folder}/code.py:Two", "2x7:int64,2x7x4")
    assert two.to_dict()["inputs"] == [[2, 7], [2, 7, 4]]
    assert count(two.net, *two.inputs).macs == 2 * 7 * 4 * 5
    assert find_target("torch.nn:Identity").size == (224, 224)
    assert set(two.to_dict()) == set(SCHEMA["properties"]["target"]["required"])
    assert two.kind in SCHEMA["properties"]["target"]["properties"]["kind"]["enum"]


@pytest.mark.parametrize(
    ("text", "options", "message"),
    [
        ("{}/code.py:number", {}, "'number' is a int, need a function or a class"),
        ("{}/code.py:none", {}, "returns a int, need an nn.Module"),
        ("{}/code.py:nothing", {}, "has no 'nothing'"),
        ("{}/code.py", {}, "write file.py:function or package.module:function"),
        ("{}/none.py:make", {}, "does not exist"),
        ("no.such.package:make", {}, "cannot be imported: ModuleNotFoundError"),
        ("{}/code.py:make", {"kwargs": {"depth": 2}}, "cannot build .*unexpected keyword argument 'depth'"),
        ("{}/code.py:make", {"inputs": "1xa"}, "--input '1xa': write shapes like"),
        ("{}/code.py:make", {"inputs": "1x3:text"}, "--input '1x3:text': write shapes like"),
        ("{}/code.py:make", {"weights": "{}/net.ts"}, "do not fit .* or cannot be read"),
        ("{}/one.pt2", {"kwargs": {"a": 1}}, "--model-kwargs: .* is a finished program"),
        ("{}/one.pt2@96", {}, "size 96x96: .* is made for 16x16"),
        ("{}/net.onnx@96", {}, "size 96x96: .* is made for 16x16"),
        ("{}/weights.pth", {}, "is not TorchScript and holds no program"),
        ("{}/none.onnx", {}, "does not exist"),
    ],
)
def test_bad_targets(files, text, options, message):
    filled = {k: v.format(files[0]) if isinstance(v, str) else v for k, v in options.items()}
    with pytest.raises(UserError, match=message):
        find_target(text.format(files[0]), **filled)


@pytest.mark.parametrize("name", ["one.pt2", "any.pt2", "net.ts@16", "net.onnx"])
def test_programs_count_alike(files, name):
    folder, net = files
    found = profile.profile(f"{folder}/{name}")
    assert (found.counts.status, found.counts.macs, found.size) == ("complete", MACS, (16, 16))
    assert hand_count(net, torch.empty(1, 3, 16, 16)).total() == MACS


@pytest.mark.parametrize("name", ["any.pt2", "net.ts@16", "net.onnx"])
def test_programs_run_alike(files, name):
    folder, net = files
    found = find_target(f"{folder}/{name}", real=True)
    x = random_like(found.inputs[0], 3, "cpu", torch.float32)
    with torch.no_grad():
        out = found.net.to("cpu", torch.float32)(x)
        torch.testing.assert_close(out[0] if isinstance(out, list) else out, net(x))


def test_programs_of_one_batch_say_so(files):
    found = find_target(f"{files[0]}/one.pt2")
    with pytest.raises(ValueError, match="exported for a batch of 1, got 3: export it with dynamic_shapes"):
        found.net(torch.randn(3, 3, 16, 16))
    with pytest.raises(ValueError, match=r"takes x of [?]x3x16x16, got 1x3x32x32"):
        find_target(f"{files[0]}/net.onnx").net(torch.randn(1, 3, 32, 32))
    with pytest.raises(Failure, match="give --dtype fp32"):
        find_target(f"{files[0]}/net.onnx").net.to("cpu", torch.bfloat16)


class Tokens(nn.Module):
    """As ViT: a class token as often as there are images, whose shape onnx does not follow."""

    def __init__(self):
        super().__init__()
        self.token, self.head = nn.Parameter(torch.randn(1, 1, 4)), nn.Linear(4, 3)

    def forward(self, x):
        return self.head(torch.cat([self.token.expand(x.shape[0], -1, -1), x.flatten(2).transpose(1, 2)], 1))


@pytest.mark.filterwarnings("ignore")
def test_shapes_that_onnx_cannot_tell(tmp_path, monkeypatch):
    net, x, file = Tokens().eval(), torch.randn(1, 4, 2, 2), str(tmp_path / "x.onnx")
    torch.onnx.export(net, (x,), file, dynamo=False)
    found = profile.count(file)
    assert (found.status, found.macs) == ("complete", 5 * 4 * 3)
    monkeypatch.setattr(onnx_file.OnnxFile, "_ran", lambda self, given: {})
    with pytest.raises(Failure, match=r"onnx cannot tell the shape of .*, which Expand makes"):
        profile.count(file)


def test_unknown_nodes_are_named(files, tmp_path):
    import onnx

    model = onnx.load(files[0] / "net.onnx")
    next(node for node in model.graph.node if node.op_type == "Softmax").op_type = "Bernoulli"
    onnx.save(model, tmp_path / "x.onnx")
    found = profile.count(f"{tmp_path}/x.onnx")
    assert (found.status, found.uncounted, found.macs) == ("partial", {"onnx_file::Bernoulli": 1}, MACS)


class Evil:
    def __init__(self, file):
        self.file = file

    def __reduce__(self):
        return Path.touch, (self.file,)


def test_programs_run_no_pickles(files, tmp_path):
    """Neither in the place of weights nor as a constant, and no size is code."""
    mark = tmp_path / "mark"
    with zipfile.ZipFile(files[0] / "one.pt2") as old, zipfile.ZipFile(tmp_path / "evil.pt2", "w") as new:
        for name in old.namelist():
            data = old.read(name)
            if "weights" in name and name.endswith(".json"):
                data = data.replace(b'"use_pickle": false', b'"use_pickle": true')
                assert b'"use_pickle": true' in data
            elif "/weights/" in name:
                torch.save(Evil(mark), tmp_path / "weight")
                data = (tmp_path / "weight").read_bytes()
            new.writestr(name, data)
    (tmp_path / "evil.pt").write_bytes(pickle.dumps(Evil(mark)))
    for name in ("evil.pt2", "evil.pt"):
        with pytest.raises(UserError, match=name):
            find_target(f"{tmp_path}/{name}")
    assert not mark.exists()
    assert _is_formula("Max(1, Symbol('s77', positive=True, integer=True)//2)")
    for text in ("open('x')", "__import__('os')", "(1).__class__", "Symbol('open(1)')", "x.y", "[x for x in y]", "1;2"):
        assert not _is_formula(text)


def test_weights(files, tmp_path):
    folder, net = files
    (tmp_path / "net.py").write_text(f"import sys\nmake = sys.modules[{__name__!r}].Net", encoding="utf-8")
    found = find_target(f"{tmp_path}/net.py:make", "1x3x16x16", weights=f"{folder}/weights.pth")
    torch.testing.assert_close(found.net.state_dict(), net.state_dict())
    bad = dict(net.state_dict(), **{"head.bias": torch.full((5,), float("nan"))})
    torch.save(bad, tmp_path / "nan.pth")
    with pytest.raises(Failure, match=r"holds NaN or infinity in head\.bias"):
        find_target(f"{tmp_path}/net.py:make", "1x3x16x16", weights=f"{tmp_path}/nan.pth")
    ours = build("test_litv2")
    torch.save(ours.state_dict(), tmp_path / "ours.pth")
    again = find_target("test_litv2", weights=f"{tmp_path}/ours.pth")
    torch.testing.assert_close(again.net.state_dict(), ours.state_dict())
    with pytest.raises(UserError, match="load them into the module"):
        find_target(ours, weights=f"{tmp_path}/ours.pth")


def test_sources_of_timm(tmp_path, monkeypatch):
    """A folder as timm saves it, and the same as a repository of the hub."""
    from timm.models import _hub

    net = build("test_litv2", num_classes=7)
    timm.models.save_for_hf(net, tmp_path, safe_serialization=True)
    assert {"config.json", "model.safetensors"} <= {f.name for f in tmp_path.iterdir()}
    known = count(net, torch.empty(1, 3, 96, 96, device="meta")).macs
    assert profile.count(f"local-dir:{tmp_path}").macs == known
    asked = []

    def download(repo_id, filename, **kwargs):
        asked.append((repo_id, filename))
        return str(tmp_path / filename)

    monkeypatch.setattr(_hub, "hf_hub_download", download)
    found = profile.profile("hf-hub:owner/name@96x64")
    assert (found.size, asked) == ((96, 64), [("owner/name", "config.json")])


def test_inputs_by_shape():
    x, ids = read_inputs("2x3x8x8, 1x77:int64")
    assert (tuple(x.shape), x.dtype, x.is_meta) == ((2, 3, 8, 8), torch.float32, True)
    assert (tuple(ids.shape), ids.dtype, int(ids.sum())) == ((1, 77), torch.int64, 0)


@pytest.mark.mm
@pytest.mark.slow
@pytest.mark.parametrize(
    ("config", "size"),
    [("litv2_s_semfpn_8xb2-80k_ade20k-512x512", (512, 512)), ("litv2_s_mask-rcnn_8xb2-1x_coco", (800, 1280))],
)
def test_configs(config, size):
    """Whole models of mmseg and mmdet in mode ``tensor``, of the size that the config is for."""
    found = profile.profile(f"mm:{config}")
    assert (found.size, found.counts.status) == (size, "complete")


@pytest.mark.parametrize("device", ["meta", "cpu"])
def test_only_tensors_without_values_stay_unfilled(device):
    """What fills is left out on the meta device alone, and returns its tensor either way."""
    from vizoo.tools.profiling.meta import NoValues

    with NoValues():
        x = torch.full((64, 3, 3, 3), 7.0, device=device)
        for fill in (torch.nn.init.kaiming_normal_, torch.nn.init.uniform_, torch.Tensor.normal_, torch.Tensor.zero_):
            before, made = x._version, fill(x)
            assert made is x
            assert (x._version > before) is (device == "cpu")
    assert x.is_meta or not x.any()
