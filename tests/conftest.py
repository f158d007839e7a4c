"""The whole run: quick tests first, those that start servers or Ray last; no deadlines on noisy machines."""

from __future__ import annotations

import pytest
from hypothesis import settings

settings.register_profile("noisy", deadline=None)
settings.load_profile("noisy")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: item.get_closest_marker("ray") is not None)
