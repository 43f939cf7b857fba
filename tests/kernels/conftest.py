from pathlib import Path

import pytest


def pytest_collection_modifyitems(config, items):
    """The long tail of the grids runs when -m speaks of slow tests."""
    if "slow" in config.option.markexpr:
        return
    for item in items:
        if item.get_closest_marker("slow") and Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.skip(reason="slow: add -m slow"))
