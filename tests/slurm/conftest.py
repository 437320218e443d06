"""One cluster of three nodes for all tests of this folder, and a small corpus."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.distributed.conftest import write_corpus
from tests.slurm.cluster import Cluster, missing


@pytest.fixture(scope="session")
def cluster() -> Iterator[Cluster]:
    """Skips, with the reason, where there can be none."""
    if reason := missing():
        pytest.skip(f"no Slurm cluster: {reason}")
    folder = Path(tempfile.mkdtemp(prefix="slurm-"))  # a short path: sockets lie in it
    cluster = Cluster(folder / "c", 3)
    try:
        cluster.start()
        yield cluster
    finally:
        cluster.stop()
        shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture(scope="session")
def tokens(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Token shards."""
    return write_corpus(tmp_path_factory.mktemp("tokens") / "train", 400)


@pytest.fixture(autouse=True)
def nothing_left(request: pytest.FixtureRequest) -> Iterator[None]:
    """No test's jobs stand in the way of the next one's."""
    yield
    if "cluster" in request.fixturenames:
        cluster: Cluster = request.getfixturevalue("cluster")
        cluster.clear()
