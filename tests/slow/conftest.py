"""What the tests of crashing runs share."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from support.crash_support import Command, Runs, make_family, runs


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Runs]:
    with runs(tmp_path_factory.mktemp("logs")) as started:
        yield started


@pytest.fixture(scope="module")
def command(tmp_path_factory: pytest.TempPathFactory) -> Command:
    return make_family(tmp_path_factory.mktemp("family"))
