"""What several test files need."""

from __future__ import annotations

import functools
import gc
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from unittest import mock

import jinja2
import pytest
from filelock import FileLock

# Before torch is loaded. Two workers share two cores, and threads cost small encoders more than
# they give. No test asks the Hub; those of its stand-in say so themselves.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

from encoders import write_plain_encoder

REPOSITORY = Path(__file__).resolve().parent.parent


def pytest_collection_finish() -> None:
    """Takes what has been imported out of the garbage collector, which each training calls."""
    gc.freeze()


@pytest.fixture(scope="session", autouse=True)
def templates_are_compiled_once() -> Iterator[None]:
    """sentence-transformers compiles that of its model card for every checkpoint."""
    with mock.patch.object(jinja2, "Template", functools.cache(jinja2.Template)):
        yield


@pytest.fixture(scope="session")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a tiny plain BERT with random weights."""
    return write_plain_encoder(tmp_path_factory.mktemp("encoder") / "tiny")


@pytest.fixture(scope="session")
def offline_encoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the real encoder: that of the repository, or one built for the tests."""
    built = REPOSITORY / "models/e5-small-ko"
    if built.is_dir():
        return built
    base = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        base = base.parent  # of all workers
    folder = base / "models/e5-small-ko"
    folder.parent.mkdir(exist_ok=True)
    with FileLock(folder.with_suffix(".lock")):
        if folder.is_dir():
            return folder
        script = [sys.executable, str(REPOSITORY / "offline_encoder.py"), "--output", str(folder)]
        done = subprocess.run(script, capture_output=True, text=True)
        if done.returncode:
            pytest.skip(f"the offline encoder cannot be built: {done.stderr.strip()}")
    return folder


@pytest.fixture(scope="session")
def exports(offline_encoder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of exported files, each with the golden file of its kind."""
    from exports import write_exports  # loads what only these tests need

    return write_exports(tmp_path_factory.mktemp("exports"), offline_encoder)
