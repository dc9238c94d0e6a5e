"""What several test files need."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from encoders import write_plain_encoder

REPOSITORY = Path(__file__).resolve().parent.parent


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
    folder = tmp_path_factory.mktemp("models") / "e5-small-ko"
    script = [sys.executable, str(REPOSITORY / "offline_encoder.py"), "--output", str(folder)]
    done = subprocess.run(script, capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"the offline encoder cannot be built: {done.stderr.strip()}")
    return folder
