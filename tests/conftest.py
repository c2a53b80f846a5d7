"""What all tests share: tests on ranks."""

from __future__ import annotations

import pytest

from tests.support.ranks import RanksPlugin


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addini("ranks_seconds", "the longest that one test on ranks may take", default="600")


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line(
        "markers", "ranks(*numbers): run the test's body on so many ranks; see tests/support/ranks.py"
    )
    config.pluginmanager.register(RanksPlugin(config), "ranks")
