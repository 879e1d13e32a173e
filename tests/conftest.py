"""What every test file shares: a test that is `long` is `slow`, too."""

import pytest


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """So `-m "not slow"` leaves both out, whatever else the command line says."""
    for item in items:
        if item.get_closest_marker("long"):
            item.add_marker("slow")
