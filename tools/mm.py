"""``vizoo mm``: train and test configs of mmdet and mmseg, with checks before anything starts."""

from __future__ import annotations

import argparse
import importlib.util
from collections.abc import Sequence
from pathlib import Path

from vizoo.tools.common import UserError, atomic_write, run_tool
from vizoo.tools.options import Parser, add

EXAMPLES = """\
examples:
  vizoo mm train configs/detection/mmdet/litv2_s_mask-rcnn_8xb2-1x_coco.py
      train; results go to work_dirs/NAME/, --work-dir puts them elsewhere
  vizoo mm train CONFIG --resume
      continue the newest checkpoint of the work dir exactly where it stopped
  torchrun --nproc_per_node=8 -m vizoo.tools.mm train CONFIG --launcher pytorch
      one process on each GPU, or on CPUs
  vizoo mm test CONFIG --load-from epoch_12.pth
      the metrics of the config's test_evaluator
  vizoo mm convert CONFIG --load-from official.pth --out ours.pth
      a detector or segmentor published by a backbone's authors, for this config
  vizoo mm link
      let scripts that know nothing of vizoo find mmcv's operators; 'vizoo mm unlink' takes it back"""

LINK_MARK = "Written by 'vizoo mm link'"
LINK = f'''"""{LINK_MARK}; 'vizoo mm unlink' removes it."""

from vizoo.heads.mm.ext import fill

fill(globals())
'''


def build_parser() -> argparse.ArgumentParser:
    """Options of ``vizoo mm``."""
    p = Parser(
        prog="vizoo mm",
        description="Train and test configs of mmdet and mmseg, convert checkpoints for them.",
        epilog=EXAMPLES,
    )
    p.add_argument("action", choices=["train", "test", "convert", "link", "unlink"])
    p.add_argument("config", nargs="?", metavar="CONFIG", help="config file (.py), or the name of one of the zoo's")
    p.add_argument("--work-dir", metavar="DIR", help="where logs and checkpoints go; default work_dirs/NAME")
    add(p, "--resume")
    p.add_argument("--load-from", metavar="FILE", help="checkpoint to test, to convert, or to start training from")
    add(p, "--amp", "needs a GPU")
    p.add_argument("--cfg-options", nargs="+", metavar="KEY=VALUE", help="settings that replace those of the config")
    p.add_argument("--launcher", choices=["none", "pytorch"], default="none", help="'pytorch' under torchrun")
    p.add_argument("--no-check-data", action="store_true", help="start without looking at images and annotations")
    add(p, "--out", "the checkpoint of 'convert'")
    return p


def main(argv: Sequence[str] | None = None) -> int:
    """Run ``vizoo mm``; arguments and exit status as for :func:`vizoo.tools.common.run_tool`."""
    return run_tool(_main, argv, "mm")


def _main(argv: list[str]) -> int:
    args = build_parser().parse_args(argv)
    from vizoo.tools.training import mm

    if mm.MISSING:
        raise UserError(mm.MISSING)
    if args.action in ("link", "unlink"):
        return link(args.action == "link")
    if args.config is None:
        raise UserError(f"CONFIG is missing: vizoo mm {args.action} CONFIG")
    if args.out and args.action != "convert":
        raise UserError(f"--out {args.out!r}: only 'vizoo mm convert' writes a checkpoint")
    return mm.follow(args)


def link(wanted: bool) -> int:
    """Write the stand-in into the installed mmcv as ``mmcv/_ext.py``, or remove it.

    Args:
        wanted: Whether it should be there.

    Returns:
        Exit status 0.

    Raises:
        UserError: If mmcv is missing, its folder cannot be written, or the file is another one.
    """
    spec = importlib.util.find_spec("mmcv")
    if spec is None or not spec.submodule_search_locations:
        raise UserError("mmcv is not installed")
    file = Path(next(iter(spec.submodule_search_locations)), "_ext.py")
    if file.exists() and not (file.is_file() and LINK_MARK in file.read_text(encoding="utf-8", errors="replace")):
        raise UserError(f"{str(file)!r} is not one that 'vizoo mm link' wrote; it stays as it is")
    if wanted:
        with atomic_write(file) as f:
            f.write(LINK)
        print(f"wrote {file}; a compiled extension beside it still comes first")
    elif file.exists():
        try:
            file.unlink()
        except OSError as e:
            raise UserError(f"cannot remove {str(file)!r}: {e.strerror}") from None
        print(f"removed {file}")
    else:
        print(f"nothing to remove: {file} does not exist")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
