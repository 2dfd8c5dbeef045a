"""Adapters of official code, and stand-ins for what it needs: the other sides of :mod:`vizoo.tools.profiling.sides`.

Nothing of the official code is part of this package.  An adapter imports it from a checkout, which leaves no trace in
the process, and replaces compiled extensions that no longer build by a plain form of the same definition.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import importlib.metadata
import io
import os
import sys
import types
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import timm
import timm.layers
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vizoo.tools.common import Failure, UserError, is_exhausted, named
from vizoo.tools.profiling.timing import float32_products

Setting = tuple[Callable[[], Any], Callable[[Any], Any]]  # how to read it, and how to set it


def _attribute(owner: Any, name: str) -> Setting:
    return functools.partial(getattr, owner, name), functools.partial(setattr, owner, name)


# what an import may set for the whole process, beside products of float32
_SETTINGS: tuple[Setting, ...] = (
    (os.getcwd, os.chdir),
    (torch.get_default_dtype, torch.set_default_dtype),
    # for "cpu" torch would enter a mode that slows every call down; some releases cannot tell once it was left
    (lambda: torch.empty(0).device, lambda device: torch.set_default_device(None if device.type == "cpu" else device)),
    (torch.is_grad_enabled, torch.set_grad_enabled),
    (torch.is_anomaly_enabled, torch.autograd.set_detect_anomaly),
    (torch.get_num_threads, torch.set_num_threads),
    (torch.are_deterministic_algorithms_enabled, torch.use_deterministic_algorithms),
    (torch.backends.cuda.flash_sdp_enabled, torch.backends.cuda.enable_flash_sdp),
    (torch.backends.cuda.mem_efficient_sdp_enabled, torch.backends.cuda.enable_mem_efficient_sdp),
    (torch.backends.cuda.math_sdp_enabled, torch.backends.cuda.enable_math_sdp),
    *(_attribute(torch.backends.cudnn, name) for name in ("enabled", "benchmark", "deterministic", "allow_tf32")),
    _attribute(torch.backends.mkldnn, "enabled"),
)


def _read(get: Callable[[], Any]) -> Any:
    with contextlib.suppress(RuntimeError):  # older names of what the process sets by newer ones
        return get()


def _register_nothing(function: Any) -> Any:
    """In place of timm's decorator: the official names are ours too."""
    return function


@contextlib.contextmanager
def leaving_no_trace(folder: Path) -> Iterator[None]:
    """Undo what foreign code does to paths, modules, timm's registry and settings; what it prints is lost.

    Args:
        folder: All modules from there are forgotten, so that two checkouts never mix.

    Yields:
        Nothing.
    """
    path, modules, before = sys.path[:], dict(sys.modules), [_read(get) for get, _ in _SETTINGS]
    _StandIn("timm.models.registry", {"register_model": _register_nothing})
    try:
        with (
            float32_products(tf32=False),
            mock.patch.dict(os.environ),
            mock.patch("timm.models.register_model", _register_nothing),
            mock.patch("timm.models._registry.register_model", _register_nothing),
            torch.random.fork_rng(devices=[]),
            warnings.catch_warnings(),
            contextlib.redirect_stdout(io.StringIO()),
        ):
            warnings.simplefilter("ignore")  # old import paths of timm
            yield
    finally:
        sys.path[:] = path
        for name in [name for name in sys.modules if name not in modules and _is_of(name, folder)]:
            del sys.modules[name]
        sys.modules.update(modules)
        for (get, put), value in zip(_SETTINGS, before, strict=True):
            if value is not None and _read(get) != value:
                put(value)


class _StandIn(types.ModuleType):
    """A module with some members in place of one that does not build or must not run."""

    def __init__(self, name: str, members: dict[str, Any]):
        super().__init__(name)
        vars(self).update(members)
        sys.modules[name] = self


def _is_of(name: str, folder: Path) -> bool:
    """Whether a module is from a folder, or a stand-in, or of a package that the code made by hand."""
    module, package = sys.modules[name], sys.modules.get(name.partition(".")[0])
    places = [getattr(module, "__file__", None), *(getattr(module, "__path__", None) or ())]
    own = any(Path(place).is_relative_to(folder) for place in places if place)
    return own or isinstance(module, _StandIn) or getattr(package, "__spec__", None) is None


def official_side(adapter: str, checkout: Path, file: str, **arguments: Any) -> nn.Module:
    """A module of official code, with weights as its constructor draws them.

    Args:
        adapter: Function of this module that imports and builds it.
        checkout: Folder of the official repository.
        file: In that folder, by which it is known.
        **arguments: Of the adapter: those of a layer, or ``name``, ``size`` and ``reparam`` of a model.

    Returns:
        The module.

    Raises:
        UserError: If the folder is not that repository, or its code fails, or needs a package that is not there.
    """
    if not (checkout / file).is_file():
        raise UserError(f"--official {str(checkout)!r}: no {file} there; give a checkout of the official code")
    checkout = checkout.resolve()
    try:
        with leaving_no_trace(checkout):
            built: nn.Module = globals()[adapter](checkout, **arguments)
        return built
    except (Exception, SystemExit) as e:
        if isinstance(e, UserError | Failure) or is_exhausted(e):
            raise
        raise UserError(f"--official {str(checkout)!r}: its code {_reason(e)}") from e


def _reason(error: BaseException) -> str:
    package = error.name if isinstance(error, ModuleNotFoundError) else None
    if package and "." not in package:
        return f"needs the package {package}, which is not installed: pip install {package}"
    return f"fails: {named(error)}"


def _import(folder: Path, name: str, stand_ins: dict[str, dict[str, Any]]) -> Any:
    """A module of official code, where others are replaced by stand-ins with these members."""
    sys.path.insert(0, str(folder))
    own = {entry.stem for entry in folder.iterdir()}
    for loaded in [loaded for loaded in sys.modules if loaded.partition(".")[0] in own]:
        del sys.modules[loaded]  # of another project that has the same names
    for stand_in, members in stand_ins.items():
        _StandIn(stand_in, members)
    return importlib.import_module(name)


class _DeformConv2dPack(nn.Module):
    """The official compiled layer's parameters around torchvision's operator."""

    def __init__(self, in_channels: int, out_channels: int, kernel_size: int, stride: int, padding: int, **_: Any):
        super().__init__()
        conv = nn.Conv2d(in_channels, out_channels, kernel_size, stride)
        self.weight, self.bias, self.stride = conv.weight, conv.bias, stride
        self.conv_offset = nn.Conv2d(in_channels, 2 * kernel_size**2, kernel_size, stride)

    def forward(self, x: Tensor) -> Tensor:
        from torchvision.ops import deform_conv2d

        return deform_conv2d(x, self.conv_offset(x), self.weight, self.bias, stride=self.stride)


def litv2(checkout: Path, name: str, size: int, reparam: bool) -> nn.Module:
    """The official LITv2 of one of our names."""
    stub = "mm_modules.DCN.modules.deform_conv2d"
    parents: dict[str, dict[str, Any]] = {"mm_modules": {}, "mm_modules.DCN": {}, "mm_modules.DCN.modules": {}}
    stubs = {**parents, stub: {"DeformConv2dPack": _DeformConv2dPack}}
    code = _import(checkout / "classification", "models.litv2", stubs)
    base = name.startswith("litv2_b")
    alphas = {"00": 0.0, "02": 0.2, "04": 0.4, "05": 0.5, "07": 0.7, "10": 1.0}
    model: nn.Module = code.LITv2(
        img_size=size,
        embed_dim=128 if base else 96,
        depths=[2, 2, 6, 2] if name.startswith("litv2_s") else [2, 2, 18, 2],
        num_heads=[4, 8, 16, 32] if base else [3, 6, 12, 24],
        alpha=alphas[name[-2:]] if "alpha" in name else 0.9,
        local_ws=[0, 0, 2, 1],
    )
    return model


def hilo(checkout: Path, side: int, **arguments: Any) -> nn.Module:
    """The official stand-alone HiLo layer, called as ``layer(tokens, H, W)``."""
    layer: nn.Module = _import(checkout, "hilo", {}).HiLo(**arguments)
    return layer


# what new releases of setuptools and timm lack; the official code asks the first for its CUDA extension
_TRANSNEXT: dict[str, dict[str, Any]] = {
    "pkg_resources": {"get_distribution": importlib.metadata.distribution, "DistributionNotFound": ImportError},
    "timm.models.layers": vars(timm.layers),
}


def transnext(checkout: Path, name: str, size: int, reparam: bool) -> nn.Module:
    """The official TransNeXt of one of our names, with its attention in PyTorch."""
    name = name.replace("aaaa", "AAAA")
    trained = 256 if name.endswith("AAAA") else 224
    code = _import(checkout / "classification", "transnext", _TRANSNEXT)
    model: nn.Module = getattr(code, name)(img_size=size, pretrain_size=trained)
    return model


def moh_vit(checkout: Path, name: str, size: int, reparam: bool) -> nn.Module:
    """The official MoH-ViT of one of our names, with its attention in PyTorch."""
    code = _import(checkout / "MoH-ViT", "transnext", _TRANSNEXT)
    name = name.replace("moh_vit", "moh_transnext")
    model: nn.Module = getattr(code, name)(img_size=size, pretrain_size=224)
    return model


def flowformer(checkout: Path, name: str, size: int, reparam: bool) -> nn.Module:
    """The official Flowformer with the arguments of its training script."""
    unused: dict[str, dict[str, Any]] = {"cv2": {}, "numpy.lib.arraypad": {"pad": None}}
    stubs = {**unused, "timm.models.layers": vars(timm.layers)}
    code = _import(checkout / "Flowformer_CV", "flowformer", stubs)
    model: nn.Module = code.Flowformer(
        img_size=size,
        embed_dim=[96, 192, 384, 768],
        depth=[3, 3, 10, 3],
        norm_layer=functools.partial(nn.LayerNorm, eps=1e-6),
        drop_path_rate=0.2,
        init_values=1e-5,
    )
    return model


def aggregated(
    checkout: Path, side: int, dim: int, num_heads: int, sr_ratio: int, pretrain_map: int, **others: Any
) -> nn.Module:
    """The official aggregated attention in PyTorch, called as ``layer(tokens, H, W)``."""
    code = _import(checkout / "classification", "transnext", _TRANSNEXT)
    index, table = code.get_relative_position_cpb((side,) * 2, (side // sr_ratio,) * 2, (pretrain_map,) * 2)

    class Layer(code.AggregatedAttention):  # type: ignore[misc, name-defined]
        """With the positions that the official model hands in."""

        def forward(self, x: Tensor, H: int, W: int) -> Tensor:
            out: Tensor = super().forward(x, H, W, self.index, self.table)
            return out

    layer: nn.Module = Layer(dim, (side, side), num_heads, sr_ratio=sr_ratio, **others)
    layer.register_buffer("index", index, persistent=False)
    layer.register_buffer("table", table, persistent=False)
    return layer


def _na2d_av(attn: Tensor, value: Tensor, kernel_size: int) -> Tensor:
    """The operator of NATTEN 0.17 that later releases dropped, by one gather, as the official code runs without it."""
    B, G, H, W, _ = attn.shape
    rows, cols = (
        (torch.arange(n, device=value.device) - kernel_size // 2).clamp(0, n - kernel_size)[:, None]
        + torch.arange(kernel_size, device=value.device)
        for n in (H, W)
    )
    windows = value[:, :, rows[:, None, :, None], cols[None, :, None, :]]  # [B, G, H, W, K, K, C]
    return (attn.unsqueeze(-2).to(value.dtype) @ windows.flatten(4, 5)).squeeze(-2)


def overlock(checkout: Path, name: str, size: int, reparam: bool) -> nn.Module:
    """The official OverLoCK of one of our names."""
    stubs: dict[str, dict[str, Any]] = {
        "natten": {},
        "natten.functional": {"na2d_av": _na2d_av},
        "mmengine": {},
        "mmengine.runner": {"load_checkpoint": None},
    }
    model: nn.Module = getattr(_import(checkout, "models.overlock", stubs), name)(deploy=reparam, use_ds=False)
    return model


class _NeighborhoodAttention2D(nn.Module):
    """The module of NATTEN 0.14, whose bias and CPU kernels later releases dropped, by one gather of all windows."""

    def __init__(self, dim: int, num_heads: int, kernel_size: int, dilation: int | None, qkv_bias: bool, **_: Any):
        super().__init__()
        self.num_heads, self.kernel_size, self.dilation = num_heads, kernel_size, dilation or 1
        self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias)
        self.rpb = nn.Parameter(torch.zeros(num_heads, 2 * kernel_size - 1, 2 * kernel_size - 1))
        self.proj = nn.Linear(dim, dim)

    def window(self, size: int, device: torch.device) -> tuple[Tensor, Tensor]:
        """Keys and rows of the bias for each position of an axis, both ``[size, kernel_size]``."""
        K, D = self.kernel_size, self.dilation
        i = torch.arange(size, device=device)
        t, r = i // D, i % D
        start = torch.minimum((t - K // 2).clamp(min=0), (size - r + D - 1) // D - K)
        j = start[:, None] + torch.arange(K, device=device)
        return j * D + r[:, None], j - t[:, None] + K - 1

    def forward(self, x: Tensor) -> Tensor:
        B, H0, W0, C = x.shape
        h, K, least = self.num_heads, self.kernel_size, self.kernel_size * self.dilation
        x = F.pad(x, (0, 0, 0, max(0, least - W0), 0, max(0, least - H0)))
        H, W = x.shape[1:3]
        q, k, v = self.qkv(x).reshape(B, H * W, 3, h, C // h).permute(2, 0, 3, 1, 4)
        (rows, bias_rows), (cols, bias_cols) = self.window(H, x.device), self.window(W, x.device)
        index = (rows[:, None, :, None] * W + cols[None, :, None, :]).reshape(H * W, K * K)
        bias = self.rpb[:, bias_rows[:, None, :, None], bias_cols[None, :, None, :]].reshape(h, H * W, 1, K * K)
        attn = (q * (C // h) ** -0.5).unsqueeze(3) @ k[:, :, index].transpose(3, 4) + bias
        out = (attn.softmax(-1) @ v[:, :, index]).squeeze(3).transpose(1, 2).reshape(B, H, W, C)
        return self.proj(out[:, :H0, :W0])


def nat(checkout: Path, name: str, size: int, reparam: bool) -> nn.Module:
    """The official NAT, DiNAT or ViT with relative position biases of one of our names."""
    flat = "isotropic" in name or name.startswith("vitrpb")
    file = "isotropic" if flat else "dinats" if name.startswith("dinat_s_") else name.split("_")[0]
    stubs = {"natten": {"NeighborhoodAttention2D": _NeighborhoodAttention2D}}
    model: nn.Module = getattr(_import(checkout / "classification", file, stubs), name)()
    return model


def ninformer(checkout: Path, name: str, size: int, reparam: bool) -> nn.Module:
    """The official blocks in the sizes of one of our names, with the layers around them of the training script.

    That script cannot be imported: it trains.
    """
    code = _import(checkout, "ninformer", {})
    width = {"tiny": 192, "small": 384, "base": 768}
    kind, patch, classes = name.split("_")[1], 16, 1000
    dim, depth = width.get(kind, 256), 12
    if kind == "cifar":
        patch, classes, depth = 4, 10, 4

    class Classifier(code.NiNformer):  # type: ignore[misc, name-defined]
        """With patches before, and mean and classifier after the blocks."""

        def __init__(self) -> None:
            super().__init__(dim, 2 * dim, (size // patch) ** 2, depth, dropout=0.0)
            self.patcher = nn.Conv2d(3, dim, patch, patch)
            self.classifier = nn.Linear(dim, classes)

        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = self.classifier(super().forward(self.patcher(x).flatten(2).transpose(1, 2)).mean(1))
            return out

    return Classifier()


def tcpa(checkout: Path, name: str, size: int, reparam: bool) -> nn.Module:
    """The official TCPA of a Fourier host with the settings of its scripts, around a model of timm.

    What chooses its hosts imports some that the repository lacks, and its weights are a file of the authors'.
    """

    def backbone(args: Any) -> nn.Module:
        return timm.create_model(name.removesuffix("_tcpa"))

    stubs: dict[str, dict[str, Any]] = {
        "models": {"__path__": [str(checkout / "models")]},
        "models.utils": {"get_backbone": backbone, "SimamModule": None},
        "train": {},
        "train.utils": {"device": torch.device("cpu")},
        "utils": {},
        "utils.args": {},
    }
    code = _import(checkout, "models.VFPT_TCPA", stubs)
    pools = {"pool_size_{}": 18, "topk_{}": 10, "len_prompts_{}": 1}
    sizes = {key.format(kind): number for key, number in pools.items() for kind in ("cls", "image")}
    switches = {"RDVP": True, "TDVP": True, "ADVP": False, "IPrompt": False, "simam": False, "random_prompt": False}

    class Prompted(code.Model_VFPT_TCPA):  # type: ignore[misc, name-defined]
        """With modes as a module has them."""

        def train(self, mode: bool = True) -> Prompted:
            super().train() if mode else super().eval()
            return self

        def eval(self) -> Prompted:
            return self.train(False)

    with mock.patch.object(nn.Parameter, "to", lambda self, *_: self):  # to a GPU, as it is made, without effect
        model: nn.Module = Prompted(types.SimpleNamespace(prompt_dropout_dvp=0.0, **sizes, **switches))
    return model


def oat(checkout: Path, name: str, size: int, reparam: bool) -> nn.Module:
    """The official OAT in the sizes of one of our names, called with scenes that a grid divides into objects.

    Its objects are files; here they are cut out as ours are, by RoIAlign of torchvision.  Codes of places and steps,
    which are no weights, are the numbers of ours: the official ones of places are a fit of them.
    """
    from torchvision.ops import roi_align

    plots: dict[str, dict[str, Any]] = {"matplotlib": {}, "matplotlib.pyplot": {}}
    code = _import(checkout / "src", "model.models", {**plots, "scipy": {}, "scipy.optimize": {"minimize": None}})
    ours: Any = timm.create_model(name, device="meta")
    layer, table = ours.encoder[0], "src/model/amazon_learned_random_PE.npy"
    rows, cols = ours.grid
    dim, objects = ours.embed_dim, rows * cols
    spp, heads, width = ours.appearance.spp, layer.attn.num_heads, layer.mlp.fc1.out_features
    depths, scale = (len(ours.encoder), len(ours.decoder)), round(ours.head.scale**-2)

    class Scenes(code.Seq2SeqTransformer):  # type: ignore[misc, name-defined]
        """For images, of which it searches the first object."""

        def __init__(self) -> None:
            attention = (3, ours.head.heads, scale)  # version, heads, d_k
            sizes = (*depths, dim, heads, objects + 2, 3, width)
            super().__init__(*sizes, "learned", 0.9, "None", *attention, spp, str(checkout / table))
            del self.pe
            places = ours.place._one(torch.arange(max(rows, cols) + 1.0))
            self.register_buffer("pe", places, persistent=False)
            steps = sys.modules[type(ours.place).__module__].step_code(64, dim)[:, None]
            self.onedpositional_encoding.register_buffer("pos_embedding", steps, persistent=False)
            index = torch.arange(objects)
            places = torch.stack((index // cols, index % cols, torch.zeros_like(index)), 1)
            target = places[:1] + torch.tensor([[0, 0, 1]])
            self.register_buffer("places", torch.cat((places, target)), persistent=False)
            self.register_buffer("start", torch.tensor([[rows // 2, cols // 2, 0]]), persistent=False)

        def forward(self, image: Tensor) -> Tensor:
            B, _, H, W = image.shape
            edges = torch.tensor([[W / cols, H / rows]]).repeat(1, 2)
            left_top = self.places[:, [1, 0]]
            boxes = (torch.cat((left_top, left_top + 1), 1) * edges).to(image.dtype)
            crops = roi_align(image, [boxes] * B, ours.crop_size, aligned=True).permute(0, 2, 3, 1)
            crops = crops.unflatten(0, (B, -1))
            blank = torch.ones_like(crops[:, :1])
            places, start = (t[:, None].expand(-1, B, -1) for t in (self.places, self.start))
            unseen, seen = torch.zeros(len(places), len(places)).bool(), torch.zeros(1, 1)
            out: Tensor = super().forward(places, start, crops, blank, unseen, seen, None, None, None)
            return out.transpose(0, 1)

    return Scenes()


class _Subspace(nn.Module):
    """Attention of one subspace in the official order, with the official names."""

    def __init__(self, dim: int, bn_momentum: float):
        super().__init__()
        self.conv_dws = nn.Conv2d(dim, dim, 1, groups=dim)
        self.bn_dws = nn.BatchNorm2d(dim, momentum=bn_momentum)
        self.conv_point = nn.Conv2d(dim, 1, 1)
        self.bn_point = nn.BatchNorm2d(1, momentum=bn_momentum)

    def attention(self, x: Tensor) -> Tensor:
        out = F.max_pool2d(F.relu(self.bn_dws(self.conv_dws(x))), 3, stride=1, padding=1)
        out = F.relu(self.bn_point(self.conv_point(out)))
        return F.softmax(out.flatten(2), dim=2).reshape(out.shape)

    def forward(self, x: Tensor) -> Tensor:
        return self.attention(x).expand(x.shape) * x + x


class ULSAMLoop(nn.Module):
    """ULSAM as the official code runs it, one small network after the other, with the official names.

    Written from the description of each step, since the official repository has no licence.

    Args:
        dim: Channels, a multiple of ``num_splits``.
        num_splits: Subspaces.
        bn_momentum: Momentum of the norms.
    """

    def __init__(self, dim: int, num_splits: int = 4, bn_momentum: float = 0.9):
        super().__init__()
        self.subspaces = nn.ModuleList(_Subspace(dim // num_splits, bn_momentum) for _ in range(num_splits))

    def attention(self, x: Tensor) -> Tensor:
        """Maps ``[B, num_splits, H, W]`` of ``x`` ``[B, dim, H, W]``."""
        parts = x.chunk(len(self.subspaces), dim=1)
        return torch.cat([s.attention(p) for s, p in zip(self.subspaces, parts, strict=True)], dim=1)  # type: ignore[operator]

    def forward(self, x: Tensor) -> Tensor:
        """Map ``[B, dim, H, W]`` to the same shape."""
        parts = x.chunk(len(self.subspaces), dim=1)
        return torch.cat([s(p) for s, p in zip(self.subspaces, parts, strict=True)], dim=1)
