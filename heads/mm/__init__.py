"""The zoo in mmdet and mmseg: importing this package is all that a config or a script needs.

``custom_imports = dict(imports=["vizoo.heads.mm"])`` in a config, or ``import vizoo.heads.mm`` before anything of mmdet
or mmseg in a script, does the following, once:

* ``mmcv._ext``, the compiled operators of mmcv, is answered by :mod:`vizoo.heads.mm.ext` where mmcv has none;
* checkpoints of mmengine load, and run no code in them; and ``mmdet::`` and ``mmseg::`` bases are found;
* ``VizooBackbone``, ``TimmLayerDecay``, ``SeedByPosition`` and ``StopWhenDiverged`` are registered in mmengine's root
  registries, which mmdet and mmseg ask too, so no ``_scope_`` is needed;
* the models of the zoo are registered in timm.

Neither mmdet nor mmseg nor mmcv's operators are imported here.
"""

try:
    import mmengine  # noqa: F401 - the first of the packages needed
except ImportError as e:
    raise ImportError(
        "vizoo.heads.mm needs mmengine, mmcv, mmdet and mmsegmentation: install them with pip install 'vizoo[mm]'"
    ) from e

import vizoo as _vizoo  # noqa: F401 - registers the zoo

from . import compat, ext

ext.install()
compat.load_safely()
compat.find_configs()

from .backbone import VizooBackbone, channels, data_preprocessor  # noqa: E402 - after the steps above
from .compat import config_path  # noqa: E402
from .hooks import SeedByPosition, StopWhenDiverged  # noqa: E402
from .optim import TimmLayerDecay  # noqa: E402

__all__ = [
    "SeedByPosition",
    "StopWhenDiverged",
    "TimmLayerDecay",
    "VizooBackbone",
    "channels",
    "config_path",
    "data_preprocessor",
]
