"""Vision backbones on the timm interface: importing this package registers every model in timm."""

__version__ = "0.1.0"

from . import backbones as backbones
