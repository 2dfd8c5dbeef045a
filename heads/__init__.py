"""Heads on the zoo's backbones: classification, detection, segmentation."""

if not __name__.startswith("vizoo."):
    raise ImportError("this folder is the package vizoo.heads; import it by that name")
