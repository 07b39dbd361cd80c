"""Fixtures that every test may use."""

import os
import sys
from collections.abc import Iterator
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
def _private_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Digests remembered by a test stay in its own cache, and the person's stay out of it."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setenv("XDG_CACHE_HOME", str(tmp_path_factory.getbasetemp() / "cache"))
        yield


@pytest.fixture(autouse=True)
def _own_answers(request: pytest.FixtureRequest) -> Iterator[None]:
    """What is found in an architecture by code that a test has changed is found by that test alone."""
    changes_code = "monkeypatch" in request.fixturenames
    _forget_architectures(changes_code)
    yield
    _forget_architectures(changes_code)


def _forget_architectures(wanted: bool) -> None:
    if wanted and "compress.models.architecture" in sys.modules:
        sys.modules["compress.models.architecture"].forget()
