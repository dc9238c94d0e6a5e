"""Runs several training commands one after the other, in both of two processes.

    torchrun --standalone --nproc_per_node 2 tests/two_processes.py COMMANDS.json

COMMANDS.json is a list of [script, argument, ...]. Each is run as from the command line; the first
process writes COMMANDS.done-0 with exit status, stdout and stderr of each.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import pytest
from commands import keep_every_checkpoint, run_script

keep_every_checkpoint(pytest.MonkeyPatch())  # the tests look into their optimizers


def main() -> None:
    file = Path(sys.argv[1])
    done = []
    for script, *arguments in json.loads(file.read_text()):
        process = run_script(script, *arguments)
        done.append([process.returncode, process.stdout, process.stderr])
        if process.returncode:
            break  # the other process may wait for this one for ever
    if os.environ["RANK"] == "0" or done[-1][0]:
        file.with_suffix(f".done-{os.environ['RANK']}").write_text(json.dumps(done))
    if done[-1][0]:
        os._exit(1)


if __name__ == "__main__":
    main()
