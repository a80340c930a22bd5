"""One thread for every test, and the fixtures that several files share."""

import os

os.environ["OMP_NUM_THREADS"] = "1"  # the models are so small that threads only wait for each other

import pytest
from command_worker import Commands
from formats import save_ours
from hub_server import running_hub
from tiny import tiny_model


@pytest.fixture(scope="module")
def hub():
    """The Hub's endpoints on loopback."""
    with running_hub() as server:
        yield server


@pytest.fixture(scope="module")
def commands(hub, tmp_path_factory):
    """Runs `cjepa` in a process that is signed in there."""
    worker = Commands(hub.environment(tmp_path_factory.mktemp("home")))
    yield worker
    worker.close()


@pytest.fixture
def ours():
    """A pre-training model of C-JEPA whose encoders differ."""
    return tiny_model().eval()


@pytest.fixture
def folder(ours, tmp_path):
    """The folder of `ours` with its image processor."""
    return save_ours(ours, tmp_path / "ours")


@pytest.fixture
def few_penalties(monkeypatch):
    """The linear probe tries three penalties instead of nine, for runs of which no test asks what the best one is."""
    monkeypatch.setattr("trainers.probes.C_GRID", (0.01, 1.0, 100.0))
