"""The plugin of pytest that vizoo brings: the fixture ``vizoo_cost``.

It lies beside the package because pytest imports it in every session, in which ``import vizoo`` would register models.
"""

from __future__ import annotations

from typing import Any

import pytest


@pytest.fixture
def vizoo_cost() -> Any:
    """What a model costs: ``vizoo_cost(model, x).assert_macs(n)``, see ``vizoo.tools.profiling.fixture``."""
    from vizoo.tools.profiling.fixture import Checks

    return Checks
