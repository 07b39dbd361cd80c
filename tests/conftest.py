"""Fixtures that every test may use."""

import os
from pathlib import Path

import pytest
from hypothesis import settings

ROOT = Path(__file__).resolve().parent.parent
SHARED = Path(os.environ.get("COMPRESS_SHARED") or ROOT.parent / "shared")


# A deadline is an assertion on time.
settings.register_profile("untimed", deadline=None)
settings.load_profile("untimed")


def pytest_configure(config: pytest.Config) -> None:
    # Two workers with all cores each would be slower than one, and another thread count gives other bytes.
    for variable in ("OMP_NUM_THREADS", "MKL_NUM_THREADS"):
        os.environ.setdefault(variable, "1" if "PYTEST_XDIST_WORKER" in os.environ else "2")
    # Nothing in a test may go and look on the network.
    for variable in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE", "TRANSFORMERS_OFFLINE"):
        os.environ.setdefault(variable, "1")


@pytest.fixture(scope="session")
def root() -> Path:
    """The root of the repository."""
    return ROOT


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder with real models and texts; a test that needs it is skipped, or fails, without it."""
    if SHARED.is_dir():
        return SHARED
    message = f"needs the shared models and texts at {SHARED} (or $COMPRESS_SHARED)"
    if os.environ.get("COMPRESS_REQUIRE_SHARED", "") not in ("", "0"):
        pytest.fail(message + ", and COMPRESS_REQUIRE_SHARED is set")
    pytest.skip(message)


@pytest.fixture(autouse=True)
def _private_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """Digests remembered by a test stay in its own cache, and the person's stay out of it."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.getbasetemp() / "cache"))
