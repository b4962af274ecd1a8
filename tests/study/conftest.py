"""Makers of studies and servers."""

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from ksr_distill.study.basket import Prompt
from tests.study.studies import Server, make_study_of


@pytest.fixture
def make_study(tmp_path: Path) -> Callable[..., Path]:
    """Return a maker of studies with ``num_pairs`` pairs in ``num_categories`` categories."""

    def make(num_pairs: int = 6, num_categories: int = 2, **plan: object) -> Path:
        prompts = [
            Prompt(f"p{index:03d}", f"a picture {index}", f"kind {index % num_categories}")
            for index in range(num_pairs)
        ]
        return make_study_of(tmp_path, prompts, **plan)

    return make


@pytest.fixture(scope="module")
def serve() -> Iterator[Callable[[Path], Server]]:
    """Return a starter of servers; they end with the module."""
    servers: list[Server] = []

    def start(study: Path) -> Server:
        servers.append(Server(study))
        servers[-1].start()
        return servers[-1]

    yield start
    for server in servers:
        server.kill()
