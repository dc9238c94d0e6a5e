"""Runs the repository's scripts as a user does: the same files, arguments, output, exit status.

Loading torch and transformers takes ten seconds, so that tests run scripts in this process (`run`)
or, where they kill, stop or limit one, in a process forked from one that has loaded them (`start`).
What needs a clean interpreter gets one from `command`.
"""

from __future__ import annotations

import atexit
import contextlib
import io
import multiprocessing
import os
import resource
import runpy
import signal
import subprocess
import sys
import threading
from multiprocessing.connection import Connection
from pathlib import Path
from unittest import mock

import pytest
import torch
from safetensors.torch import load_file

from common import checkpoints
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
    out, err = (io.TextIOWrapper(io.BytesIO(), "utf-8", write_through=True) for _ in range(2))
    status = 0
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
    said = [stream.buffer.getvalue().decode() for stream in (out, err)]
    return subprocess.CompletedProcess(line, status or 0, *said)


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


def new_environment(folder: Path, *packages: str) -> Path:
    """Makes a virtual environment with these packages alone; returns its interpreter."""
    # pip would be installed too, and compile modules that nothing imports: twenty seconds.
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder], check=True)
    python = folder / "bin/python"
    pip = [sys.executable, "-m", "pip", "--python", python, "install", "--quiet", "--no-compile"]
    subprocess.run([*pip, *packages], check=True)
    return python


def keep_every_checkpoint(patch: pytest.MonkeyPatch) -> None:
    """Leaves each checkpoint of later runs whole: a kill behind any of them can be made up."""
    patch.setattr(checkpoints, "STATE_FILES", ())
    seal = checkpoints.seal_checkpoint
    patch.setattr(
        "common.training.seal_checkpoint", lambda folder, best_step, _: seal(folder, best_step, 999)
    )


def weights(folder: Path) -> dict[str, torch.Tensor]:
    """Returns the weights of a model folder."""
    return load_file(folder / "model.safetensors")


class Started:
    """A script in a process of its own, with what tests use of `subprocess.Popen`."""

    def __init__(
        self,
        script: str | Path,
        *arguments: object,
        cwd: Path | None = None,
        environment: dict[str, str] | None = None,
        encoding: str = "utf-8",
        largest_file: int | None = None,
    ) -> None:
        """Starts it: in a folder, with more variables, with the console's encoding."""
        self.args = [sys.executable, str(REPOSITORY / script), *map(str, arguments)]
        self.encoding = encoding
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["preloaded"])
        pipes = [context.Pipe(duplex=False) for _ in ("stdout", "stderr")]
        writers = [writer for _, writer in pipes]
        limits = (cwd or ".", environment or {}, encoding, largest_file)
        self.process = context.Process(target=_run_forked, args=(self.args[1:], writers, *limits))
        # For the process that forks, which the first start starts: it has no other path.
        here = os.pathsep.join([str(REPOSITORY), str(REPOSITORY / "tests")])
        with mock.patch.dict(os.environ, {"PYTHONPATH": here, "HF_HUB_OFFLINE": "1"}):
            self.process.start()
        self.read: list[list[bytes]] = [[], []]
        self.threads = []
        for (reader, writer), chunks in zip(pipes, self.read, strict=True):
            writer.close()
            thread = threading.Thread(target=_drain, args=(reader, chunks), daemon=True)
            thread.start()
            self.threads.append(thread)

    @property
    def returncode(self) -> int | None:
        return self.process.exitcode

    def poll(self) -> int | None:
        return self.process.exitcode

    def kill(self) -> None:
        self.process.kill()

    def send_signal(self, number: int) -> None:
        if self.process.exitcode is None:
            os.kill(self.process.pid, number)

    def said(self) -> tuple[str, str]:
        """Returns stdout and stderr as far as they have come."""
        out, err = (b"".join(chunks).decode(self.encoding, "ignore") for chunks in self.read)
        return out, err

    def communicate(self) -> tuple[str, str]:
        """Waits for the end; returns stdout and stderr."""
        self.process.join()
        for thread in self.threads:
            thread.join()
        return self.said()


def _drain(reader: Connection, chunks: list[bytes]) -> None:
    while chunk := os.read(reader.fileno(), 1 << 16):
        chunks.append(chunk)
    reader.close()


def _run_forked(
    line: list[str],
    writers: list[Connection],
    cwd: str | Path,
    environment: dict[str, str],
    encoding: str,
    largest_file: int | None,
) -> None:
    for number, writer in enumerate(writers, start=1):
        os.dup2(writer.fileno(), number)
        writer.close()
    sys.stdout, sys.stderr = (os.fdopen(number, "w", 1, encoding) for number in (1, 2))
    os.chdir(cwd)
    os.environ |= environment
    # Tests that run in the background inherit a SIGINT that is ignored.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    sys.argv = line
    assert "common.training" in sys.modules
    if largest_file is not None:  # a write beyond it fails in the middle of a file
        resource.setrlimit(resource.RLIMIT_FSIZE, (largest_file, largest_file))
    try:
        runpy.run_path(line[0], run_name="__main__")
    finally:
        atexit._run_exitfuncs()  # Ray's ends what it has started; multiprocessing calls none


def start(script: str | Path, encoder: Path, *options: object, **limits: int) -> Started:
    """Starts a training script on the samples in a process of its own."""
    return Started(script, *training_arguments(encoder, *options), **limits)
