"""What the documents say of a family."""

from typing import NamedTuple

__all__ = ["NAMED_SIZES", "About"]

NAMED_SIZES = (
    "``torch.export`` refuses named sizes of images (``Dim('height')``) for {}; ``Dim.DYNAMIC`` works, and so do the "
    "names in ``dynamic_shapes`` of ``torch.onnx.export``."
)
"""A limit of several families, to be formatted with the models that it is about."""


class About(NamedTuple):
    """Where a family is from and what to know of it.

    ``python -m vizoo.tools.table`` writes it into NOTICE, the citations and the family's card, which also quotes the
    docstring of the family's file: its first line, and every paragraph that begins with "Deviations" or "Our choices".

    Attributes:
        name: As people call it.
        origin: Repository, commit and licence of the official code, where its weights are, and what is not official.
        papers: Of each, a reference (``A. Author, "Title", ICML 2025``) and the number at arXiv (``2505.02406``).
        golden: Patterns of the golden cases that are not called ``<family>_*``.
        checked: What else was compared with the official code or the paper.
        limits: What does not work or is not known, a sentence each.
        example: Python that shows what else the family offers; it follows code that makes ``model`` and ``image``.
    """

    name: str
    origin: str
    papers: tuple[tuple[str, str], ...]
    golden: tuple[str, ...] = ()
    checked: str = ""
    limits: tuple[str, ...] = ()
    example: str = ""
