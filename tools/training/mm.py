"""What ``vizoo mm`` does with configs of mmdet and mmseg: train, test, and convert checkpoints for them.

Differences from the packages' own ``train.py`` and ``test.py``: no compiled operators are needed, also by data workers
that are spawned; configs and data are checked first; several processes work on CPUs too (gloo); and a resumed run
repeats an uninterrupted one, see :class:`vizoo.heads.mm.SeedByPosition`.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import logging
import os
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from vizoo.heads.checkpoints import convert_checkpoint, read_checkpoint, state_of
from vizoo.tools.common import UserError, atomic_write, check_output, is_first_process, named, one_line
from vizoo.tools.data.checks import ClassIds, MaskFolder, check_masks
from vizoo.tools.data.coco import check_coco
from vizoo.tools.training.run import locked, match_classes

# what these packages say of each other at every start; what they say of a config is heard
warnings.filterwarnings("ignore", "pkg_resources is deprecated as an API", UserWarning)
warnings.filterwarnings("ignore", "``build_loss`` would be deprecated soon", UserWarning, r"mmseg\.")
logging.getLogger("torch.utils._pytree").addFilter(lambda record: "is an Enum subclass" not in record.getMessage())

try:  # at import, so that spawned data workers, which import this file first, find mmcv's operators too
    from vizoo.heads import mm
except ImportError as e:
    MISSING: str | None = str(e)
else:
    MISSING = None

CONVERTED = "vizoo mm convert"
ADAPTER = "VizooBackbone"
PYRAMIDS = ("FPN", "PAFPN", "FPN_CARAFE", "NASFPN", "HRFPN", "ChannelMapper", "MultiLevelNeck")  # one level in, one out
ADAPTER_ONLY = ("type", "pretrained", "frozen_stages", "norm_eval", "with_cp", "out_norm", "init_cfg", "_scope_")


def follow(args: argparse.Namespace) -> int:
    """Do what the options of ``vizoo mm`` ask for.

    Args:
        args: With ``action`` ``"train"``, ``"test"`` or ``"convert"`` and a ``config``.

    Returns:
        Exit status 0.

    Raises:
        UserError: If something in the options, the config or the data is wrong; nothing has been started then.
        FloatingPointError: If the loss, or a weight to test, is infinite or no number.
    """
    _need_file("--load-from ", args.load_from)
    cfg = load_config(args)
    if args.action == "convert":
        return _convert(cfg, args)
    run(cfg, args)
    return 0


# configs


def load_config(args: argparse.Namespace) -> Any:
    """Read a config and put the options of the command line into it.

    Args:
        args: Options of ``vizoo mm``.

    Returns:
        The ``mmengine.Config``.

    Raises:
        UserError: For a file or a base that does not exist, or that is no config.
    """
    cfg = read_config(args.config, args.cfg_options or ())
    cfg.launcher = args.launcher
    cfg.work_dir = args.work_dir or cfg.get("work_dir") or str(Path("work_dirs", Path(args.config).stem))
    if not isinstance(cfg.work_dir, str):
        raise UserError(f"work_dir={cfg.work_dir!r} is no path")
    if args.load_from:
        cfg.load_from = args.load_from
    if args.resume == "auto":
        cfg.resume = Path(cfg.work_dir, "last_checkpoint").is_file()
        if cfg.resume:
            cfg.load_from = None  # of the config: where training once started
    elif args.resume:
        if not Path(args.resume).is_file():
            raise UserError(f"--resume {args.resume!r} does not exist")
        cfg.resume, cfg.load_from = True, args.resume
    if args.amp:
        _mix_precision(cfg)
    return cfg


def read_config(name: str, options: Sequence[str] = ()) -> Any:
    """The config of a file, or of the zoo by its name, with options put into it.

    Args:
        name: The file, or the name.
        options: Texts ``KEY=VALUE``.

    Returns:
        The ``mmengine.Config``.

    Raises:
        UserError: For a file or a base that does not exist, that is no config, or a wrong option.
    """
    from mmengine.config import Config, DictAction

    if Path(name).is_dir():
        raise UserError(f"config {name!r} is a folder, need a file")
    file = name
    if not Path(name).is_file():
        try:
            file = mm.config_path(name)
        except ValueError as e:
            raise UserError(f"config {name!r} does not exist, and {e}") from None
    try:
        cfg = Config.fromfile(file)
        for option in options:
            key, equals, value = option.partition("=")
            if not equals or not all(key.split(".")):
                raise UserError(f"--cfg-options {option!r}: write KEY=VALUE")
            cfg.merge_from_dict({key: DictAction._parse_iterable(value)})
    except UserError:
        raise
    except (Exception, SystemExit) as e:  # a config is Python: it can raise anything
        raise UserError(f"config {name!r} cannot be read: {_explained(e)}") from e
    return cfg


def _mix_precision(cfg: Any) -> None:
    if not torch.cuda.is_available():
        raise UserError("--amp: mixed precision needs a GPU, none is here")
    if not hasattr(cfg.get("optim_wrapper"), "update"):
        raise UserError("--amp: the config has no optim_wrapper")
    cfg.optim_wrapper.update(type="AmpOptimWrapper", loss_scale="dynamic")


def check_config(cfg: Any) -> None:
    """Check what a config says about a zoo backbone, and the files it names.

    Args:
        cfg: The config.

    Raises:
        UserError: Names the key: an unknown model, a stride that it does not have, ``in_channels`` of a neck or head
            that differ from what comes in, a missing file.
    """
    model = cfg.get("model")
    if not hasattr(model, "get"):
        raise UserError(f"model={model!r}: need a dictionary, the model's config")
    backbone = model.get("backbone") or {}
    if not hasattr(backbone, "get"):
        raise UserError(f"model.backbone={backbone!r}: need a dictionary, the backbone's config")
    if _is_ours(backbone):
        if model.get("pretrained") is not None:
            raise UserError(
                f"model.pretrained={model.pretrained!r} is meant for another backbone: set model.pretrained=None, "
                "and model.backbone.pretrained for weights of the zoo"
            )
        _check_channels(model, _backbone_channels(backbone))
    for key in (
        "model.backbone.init_cfg.checkpoint",
        "model.init_cfg.checkpoint",
        "load_from",
        "val_evaluator.ann_file",
        "test_evaluator.ann_file",
    ):
        _need_file(f"{key}=", _get(cfg, key))


def _is_ours(backbone: Any) -> bool:
    return hasattr(backbone, "get") and _type(backbone) == ADAPTER


def _type(config: Any) -> str:
    """Name of a type, without the scope that may stand before it."""
    return str(config.get("type")).rpartition(".")[2]


def _get(cfg: Any, key: str) -> Any:
    """Value of a dotted key, None where a part is missing."""
    for part in key.split("."):
        cfg = cfg.get(part) if hasattr(cfg, "get") else None
    return cfg


def _is_remote(file: str) -> bool:
    return "://" in file


def _need_file(key: str, file: Any) -> None:
    """Refuse a local file that does not exist."""
    if isinstance(file, str) and not _is_remote(file) and not Path(file).is_file():
        raise UserError(f"{key}{file!r} does not exist")


def _backbone_channels(backbone: Any) -> list[int]:
    """Channels of the backbone's levels, by its config."""
    from vizoo.heads.features import pretrained_arguments

    if "model_name" not in backbone:
        raise UserError("model.backbone.model_name is missing")
    kwargs = {k: v for k, v in backbone.items() if k not in ADAPTER_ONLY}
    try:
        pretrained_arguments(backbone.get("pretrained", False))
        return mm.channels(**kwargs)
    except Exception as e:  # whatever the model's constructor raises
        raise UserError(f"model.backbone: {_explained(e)}") from e


def _check_channels(model: Any, channels: list[int]) -> None:
    """Compare ``in_channels`` of neck and heads with what comes in."""
    necks = model.get("neck") or []
    for i, neck in enumerate(necks if isinstance(necks, list) else [necks]):
        key = f"model.neck[{i}]" if isinstance(necks, list) else "model.neck"
        if _type(neck) not in PYRAMIDS or not isinstance(neck.get("out_channels"), int):
            return  # what enters and leaves this neck is not known here
        given = list(neck.get("in_channels") or [])
        if given != channels:
            raise UserError(f"{key}.in_channels={given}, but {channels} come in")
        channels = [neck.out_channels] * (neck.get("num_outs") or len(channels))
    for key, head in _heads(model):
        given, index = head.get("in_channels"), head.get("in_index")
        if given is None or (not necks and not key.startswith(("model.decode_head", "model.auxiliary_head"))):
            continue
        if isinstance(given, int):
            expected: Any = channels[index if isinstance(index, int) else -1]
        else:
            given, indices = list(given), range(len(channels)) if index is None else index
            if not isinstance(indices, Sequence) or max(indices) >= len(channels):
                raise UserError(f"{key}.in_index={index} in a model of {len(channels)} levels")
            expected = [channels[i] for i in indices]
        if given != expected:
            raise UserError(f"{key}.in_channels={given}, but {expected} come in")


def _heads(model: Any) -> Iterator[tuple[str, Any]]:
    """Heads that read the levels, with their keys."""
    roi_heads = ("roi_head.bbox_head", "roi_head.mask_head")
    for key in ("rpn_head", "bbox_head", "mask_head", *roi_heads, "decode_head", "auxiliary_head"):
        found = _get(model, key)
        for i, head in enumerate(found if isinstance(found, list | tuple) else [found]):
            name = f"model.{key}[{i}]" if isinstance(found, list | tuple) else f"model.{key}"
            if hasattr(head, "get"):
                yield name, head
            elif head is not None:
                raise UserError(f"{name}={head!r}: need a dictionary, the head's config")


# data


def check_data(cfg: Any, splits: Sequence[str]) -> None:
    """Check the data sets of a config, record by record.

    Args:
        cfg: The config.
        splits: ``train``, ``val``, ``test``.

    Raises:
        UserError: Names the data set's key, the file and the bad records.
    """
    seen: list[Any] = []
    for split in splits:
        loader = cfg.get(f"{split}_dataloader") or {}
        for key, dataset in _datasets(f"{split}_dataloader.dataset", loader.get("dataset")):
            same = {k: v for k, v in dataset.items() if k != "pipeline"}
            if same in seen:
                continue
            seen.append(same)
            try:
                _check_dataset(cfg, same, labelled=split != "test")
            except Exception as e:  # whatever a constructor raises
                raise UserError(f"{key}: {_explained(e)}") from e


def _datasets(key: str, dataset: Any) -> Iterator[tuple[str, Any]]:
    """The data sets inside wrappers."""
    if dataset is None:
        return
    if not hasattr(dataset, "get"):
        raise UserError(f"{key}={dataset!r}: need a dictionary, the data set's config")
    if "dataset" in dataset:
        yield from _datasets(f"{key}.dataset", dataset.dataset)
    elif "datasets" in dataset:
        for i, part in enumerate(dataset.datasets):
            yield from _datasets(f"{key}.datasets[{i}]", part)
    else:
        yield key, dataset


def _check_dataset(cfg: Any, config: dict[str, Any], labelled: bool) -> None:
    from mmengine.registry import DATASETS

    with DATASETS.switch_scope_and_registry(cfg.get("default_scope")) as registry:
        dataset = registry.build({**config, "pipeline": [], "lazy_init": True})
    readers = [getattr(type(dataset), name, None) for name in ("load_data_list", "parse_data_info")]
    owners = {getattr(reader, "__qualname__", "").partition(".")[0] for reader in readers}
    if owners == {"CocoDataset"}:  # no class that reads another form of annotations
        classes = dataset.metainfo.get("classes")
        check_coco(dataset.ann_file, dataset.data_prefix.get("img", ""), classes, labelled=labelled)
    elif hasattr(dataset, "seg_map_suffix") and dataset.data_prefix.get("seg_map_path"):
        names = None
        if dataset.ann_file:
            if not Path(dataset.ann_file).is_file():
                raise ValueError(f"ann_file {dataset.ann_file!r} does not exist")
            names = Path(dataset.ann_file).read_text(encoding="utf-8").split()
        classes = type(dataset).METAINFO.get("classes") if dataset.label_map else dataset.metainfo.get("classes")
        folders = (dataset.data_prefix["img_path"], dataset.data_prefix["seg_map_path"])
        count = len(classes or range(255))  # without names any class may occur
        ids = ClassIds(count, dataset.reduce_zero_label, dataset.ignore_index)
        check_masks(MaskFolder(*folders, dataset.img_suffix, dataset.seg_map_suffix, names), ids)


# training and testing


def run(cfg: Any, args: argparse.Namespace) -> Any:
    """Check a config and its data, then train or test.

    Args:
        cfg: Of :func:`load_config`.
        args: Options of ``vizoo mm``.

    Returns:
        The runner.

    Raises:
        UserError: If something in the config or the data is wrong; nothing has been started then.
        FloatingPointError: If the loss, or a weight to test, is infinite or no number.
    """
    training = args.action == "train"
    if not training and not cfg.get("load_from"):
        raise UserError("--load-from is missing: the checkpoint to test")
    if (not training or cfg.get("resume")) and _is_ours(_get(cfg, "model.backbone")):
        cfg.model.backbone.pretrained = False  # every weight comes from the checkpoint
    _build(lambda: check_config(cfg))
    _check_work_dir(cfg.work_dir)
    checkpoint = _checkpoint_of(cfg)
    if not training and checkpoint:
        _check_finite(checkpoint, cfg.load_from)
    if not args.no_check_data:
        _build(lambda: check_data(cfg, ("train", "val") if training else ("test",)))
    if training:
        _add_hooks(cfg)
    on_cpus = args.launcher == "pytorch" and not torch.cuda.is_available()
    with _cpu_processes(cfg) if on_cpus else contextlib.nullcontext(), _main_module(), contextlib.ExitStack() as held:
        if training and is_first_process():
            Path(cfg.work_dir).mkdir(parents=True, exist_ok=True)
            held.enter_context(locked(Path(cfg.work_dir), "--work-dir"))
        return (_train if training else _test)(cfg, checkpoint)


def _add_hooks(cfg: Any) -> None:
    """Let a resumed run repeat an uninterrupted one, and end one whose loss is no number."""
    randomness = {**cfg.get("randomness", {})}
    cfg.randomness = {**randomness, "seed": randomness.get("seed") or 0}
    hooks = cfg.get("custom_hooks") or []
    ours = ({"type": "SeedByPosition", "seed": cfg.randomness.seed}, {"type": "StopWhenDiverged"})
    there = [hook.get("type") for hook in hooks]
    cfg.custom_hooks = [*hooks, *(hook for hook in ours if hook["type"] not in there)]


@contextlib.contextmanager
def _main_module() -> Iterator[None]:
    """Spawned data workers import the main module: let it be this one, which knows mmcv's operators."""
    main_module = sys.modules["__main__"]
    of_main = main_module.__spec__
    main_module.__spec__ = importlib.util.find_spec(__name__)
    try:
        yield
    finally:
        main_module.__spec__ = of_main


def _runner(cfg: Any) -> Any:
    from mmengine.registry import RUNNERS
    from mmengine.runner import Runner

    return _build(lambda: RUNNERS.build(cfg) if "runner_type" in cfg else Runner.from_cfg(cfg))


def _train(cfg: Any, checkpoint: dict[str, Any] | None) -> Any:
    """Train, or go on from a checkpoint that fits; the runner."""
    runner = _runner(cfg)
    _build(lambda: (runner.train_loop, runner.val_loop))
    runner.optim_wrapper = _build(lambda: runner.build_optim_wrapper(runner.optim_wrapper))
    backbone = getattr(getattr(runner.model, "module", runner.model), "backbone", None)
    if isinstance(backbone, mm.VizooBackbone):  # weights that cannot be had end it here, with a message
        _build(backbone.init_weights)
    if checkpoint and cfg.get("resume"):
        _check_fit(runner.model, checkpoint, "--resume")
        _check_optimizer(runner.optim_wrapper, checkpoint)
        _check_classes(runner.train_loop.dataloader.dataset, checkpoint, "--resume")
    runner.train()
    return runner


def _test(cfg: Any, checkpoint: dict[str, Any] | None) -> Any:
    """Measure a checkpoint that fits; the runner."""
    runner = _runner(cfg)
    if checkpoint:
        name = f"--load-from {cfg.load_from!r}"
        _check_fit(runner.model, checkpoint, name)
        _check_classes(_build(lambda: runner.test_loop).dataloader.dataset, checkpoint, name)
    runner.test()
    return runner


def _check_work_dir(folder: str) -> None:
    """Refuse a folder for logs and checkpoints that cannot be one."""
    path = Path(folder)
    existing = next(p for p in (path, *path.absolute().parents) if p.exists())
    if not existing.is_dir() or not os.access(existing, os.W_OK | os.X_OK):
        raise UserError(f"--work-dir {folder!r}: {str(existing)!r} is no folder that can be written")


def _checkpoint_of(cfg: Any) -> dict[str, Any] | None:
    """The local checkpoint that a run starts from, read once so that a bad one is refused before anything starts."""
    file, name = cfg.get("load_from"), "--resume" if cfg.get("resume") else "--load-from"
    if cfg.get("resume") and file is None:
        from mmengine.runner import find_latest_checkpoint

        file = find_latest_checkpoint(cfg.work_dir)
    if not file or _is_remote(file):
        return None
    checkpoint = _read_checkpoint(file, name)
    meta, *states = (checkpoint.get(key) for key in ("meta", "message_hub", "optimizer"))
    whole = isinstance(meta, dict) and {"epoch", "iter"} <= meta.keys() and all(isinstance(s, dict) for s in states)
    if cfg.get("resume") and not whole:
        raise UserError(f"--resume {file!r} holds weights only, no training: start from it with --load-from")
    return checkpoint


def _check_finite(checkpoint: dict[str, Any], file: str) -> None:
    """Refuse to measure a model that is broken.

    Raises:
        FloatingPointError: Names the weights.
    """
    broken = [k for k, v in state_of(checkpoint).items() if not v.isfinite().all()]
    if broken:
        raise FloatingPointError(f"{file!r} holds weights that are no finite numbers: {', '.join(broken[:5])}")


def _check_fit(model: nn.Module, checkpoint: dict[str, Any], name: str) -> None:
    """Refuse a checkpoint of another model, of which mmengine would load what fits and leave the rest at random."""
    state, own = state_of(checkpoint), getattr(model, "module", model).state_dict()
    problems = {
        "missing": own.keys() - state.keys(),
        "unexpected": state.keys() - own.keys(),
        "of another shape": {k for k, v in own.items() if k in state and v.shape != state[k].shape},
    }
    texts = [f"{len(keys)} {what}: {', '.join(sorted(keys)[:5])}" for what, keys in problems.items() if keys]
    if texts:
        raise UserError(f"{name} does not fit the config; {'; '.join(texts)}")


def _check_classes(dataset: Any, checkpoint: dict[str, Any], name: str) -> None:
    """Refuse a checkpoint that was trained on other classes than those of the data, or on another order of them."""
    meta = checkpoint.get("meta") or {}
    described = meta.get("dataset_meta") or meta
    trained = described.get("classes") or described.get("CLASSES") if isinstance(described, dict) else None
    found = getattr(dataset, "metainfo", {}).get("classes")
    if not isinstance(trained, list | tuple) or not isinstance(found, list | tuple):
        return  # one of them does not say
    before, now = ([str(name).strip() for name in names] for names in (trained, found))
    if match_classes(before, now, "the config's data", name) != list(range(len(now))):
        raise UserError(f"{name} was trained on the classes of the config's data in another order")


def _check_optimizer(wrapper: Any, checkpoint: dict[str, Any]) -> None:
    """Refuse to resume with the state of another kind of optimizer, or of other parameter groups."""
    ours, theirs = wrapper.state_dict().get("param_groups"), checkpoint["optimizer"].get("param_groups")
    if not isinstance(ours, list) or not isinstance(theirs, list):
        return  # a wrapper of several optimizers
    missing = sorted({k for a, b in zip(ours, theirs, strict=False) for k in a.keys() - b.keys()})
    if len(ours) != len(theirs) or missing:
        why = f"it has no {missing[0]!r}" if missing else f"it has {len(theirs)} parameter groups, need {len(ours)}"
        raise UserError(f"--resume: its optimizer state does not fit optim_wrapper ({why}); start with --load-from")


def _read_checkpoint(file: str, name: str = "--load-from") -> dict[str, Any]:
    try:
        checkpoint = read_checkpoint(file)
        state_of(checkpoint)
    except ValueError as e:
        raise UserError(f"{name} {file!r}: {e}") from e
    return checkpoint


def _build(what: Callable[[], Any]) -> Any:
    """Build or check a part of the config; what mmengine raises for a bad one is one message."""
    try:
        return what()
    except (UserError, MemoryError):
        raise
    except Exception as e:  # whatever a constructor raises
        raise UserError(f"the config cannot be built: {_explained(e)}") from e


def _explained(e: BaseException) -> str:
    """What an exception of others says; a ValueError says enough without its name."""
    return one_line(e, 400) if isinstance(e, ValueError) else named(e)


@contextlib.contextmanager
def _cpu_processes(cfg: Any) -> Iterator[None]:
    """What mmengine's own launcher does only for GPUs."""
    if "RANK" not in os.environ:
        raise UserError("--launcher pytorch: start with torchrun --nproc_per_node=N -m vizoo.tools.mm ...")
    torch.distributed.init_process_group("gloo")
    try:
        cfg.model_wrapper_cfg = {
            "type": "MMDistributedDataParallel",
            "broadcast_buffers": False,
            "device_ids": None,  # written out: mmengine fills in a GPU otherwise
            **(cfg.get("model_wrapper_cfg") or {}),
        }
        _replace_sync_bn(cfg.model)
        yield
    finally:
        torch.distributed.destroy_process_group()


def _replace_sync_bn(node: Any) -> None:
    """``SyncBN`` exists on GPUs only."""
    if isinstance(node, dict):
        if node.get("type") == "SyncBN":
            node["type"] = "BN"
        for value in node.values():
            _replace_sync_bn(value)
    elif isinstance(node, list | tuple):
        for value in node:
            _replace_sync_bn(value)


# checkpoints of the authors


def _convert(cfg: Any, args: argparse.Namespace) -> int:
    from mmengine.registry import MODELS, init_default_scope

    if not args.load_from or not args.out:
        raise UserError("--load-from and --out are missing: the authors' checkpoint and where to write ours")
    _check_converted(args.out, args.load_from)
    checkpoint = _read_checkpoint(args.load_from)
    for key in ("load_from", "val_evaluator", "test_evaluator"):  # files that converting does not need
        cfg[key] = None
    _build(lambda: check_config(cfg))
    if not _is_ours(cfg.model.backbone):
        raise UserError(f"model.backbone.type={_type(cfg.model.backbone)!r}, need {ADAPTER!r}")
    cfg.model.backbone.pretrained = False
    init_default_scope(cfg.get("default_scope", "mmengine"))
    model = _build(lambda: MODELS.build(cfg.model))
    try:
        state = convert_checkpoint(checkpoint, model)
    except ValueError as e:
        raise UserError(f"--load-from {args.load_from!r}: {e}") from e
    meta = checkpoint.get("meta") or {}
    described = {"classes": meta.get("CLASSES"), "palette": meta.get("PALETTE")}
    dataset_meta = {k: v for k, v in described.items() if v is not None}
    written = {"writer": CONVERTED, **({"dataset_meta": dataset_meta} if dataset_meta else {})}
    with atomic_write(args.out, "wb") as file:
        torch.save({"state_dict": state, "meta": written}, file)
    print(f"{len(state)} tensors, none missing, none unexpected: {args.out}")
    return 0


def _check_converted(out: str, source: str) -> None:
    """Refuse a place for the converted checkpoint before any work, and any file there that is not an older one."""
    check_output(out, "--out", mark=None)
    path = Path(out)
    if path.exists():
        if path.samefile(source):
            raise UserError(f"--out {out!r} is the file of --load-from")
        try:
            meta = read_checkpoint(path).get("meta")
        except ValueError:
            meta = None
        if not isinstance(meta, dict) or meta.get("writer") != CONVERTED:
            raise UserError(f"--out {out!r} exists and was not written by {CONVERTED!r}; it stays as it is")
