"""Runs the repository's scripts as a user does: the same files, arguments, output, exit status.

In this process, where torch and transformers are loaded already; what a test kills, limits or
needs a clean interpreter for gets a process of its own from `command`.
"""

from __future__ import annotations

import contextlib
import io
import os
import runpy
import subprocess
import sys
import threading
from pathlib import Path
from unittest import mock

import torch
from safetensors.torch import load_file

from common.command_line import REPOSITORY

SAMPLES = REPOSITORY / "tests" / "samples"
KORNLU = REPOSITORY.parent / "shared" / "KorNLUDatasets"
SCRIPTS = ("training_sts.py", "training_nli.py", "training_multi-task.py")
OFFLINE = os.environ | {"HF_HUB_OFFLINE": "1", "PYTHONPATH": str(REPOSITORY)}


def run_script(
    script: str | Path, *arguments: object, cwd: Path | None = None
) -> subprocess.CompletedProcess[str]:
    """Runs a script in this process; returns what a process of its own would have given."""
    line = [str(REPOSITORY / script), *map(str, arguments)]
    out, err, status = io.StringIO(), io.StringIO(), 0
    with (
        mock.patch.object(sys, "argv", line),
        mock.patch.object(threading, "excepthook", threading.excepthook),
        mock.patch.dict(os.environ),
        contextlib.chdir(cwd or "."),
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(err),
    ):
        try:
            runpy.run_path(line[0], run_name="__main__")
        except SystemExit as stop:
            status = stop.code
            if isinstance(status, str):
                print(status, file=err)
                status = 1
    return subprocess.CompletedProcess(line, status or 0, out.getvalue(), err.getvalue())


def training_arguments(encoder: Path, *options: object) -> list[str]:
    """Returns the arguments of a training script on the samples."""
    fixed = ["--model_name_or_path", encoder, "--max_seq_length", 48, "--data_dir", SAMPLES]
    return list(map(str, [*fixed, *options]))


def command(script: str | Path, encoder: Path, *options: object) -> list[str]:
    """Returns the command line of a training script for a process of its own."""
    return [sys.executable, str(REPOSITORY / script), *training_arguments(encoder, *options)]


def run(
    script: str | Path, encoder: Path, *options: object, cwd: Path | None = None
) -> subprocess.CompletedProcess[str]:
    """Runs a training script on the samples in this process."""
    return run_script(script, *training_arguments(encoder, *options), cwd=cwd)


def weights(folder: Path) -> dict[str, torch.Tensor]:
    """Returns the weights of a model folder."""
    return load_file(folder / "model.safetensors")
