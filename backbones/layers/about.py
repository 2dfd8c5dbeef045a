"""What NOTICE and README say of a family."""

from typing import NamedTuple

__all__ = ["About"]


class About(NamedTuple):
    """Where a family is from; ``python -m vizoo.tools.table`` writes it into NOTICE and README.

    Attributes:
        name: As people call it.
        origin: Repository, commit and licence of the official code, where its weights are, and what is not official.
        papers: Of each, a reference (``A. Author, "Title", ICML 2025``) and the number at arXiv (``2505.02406``).
    """

    name: str
    origin: str
    papers: tuple[tuple[str, str], ...]
