"""`python` for shell commands in tests: forks a process that has loaded torch already.

    python fork_python.py --serve SOCKET           # the process that forks
    python -IS fork_python.py SOCKET x.py ...      # what a shell is given as `python`

Loading torch takes ten seconds, and a page of commands starts dozens of scripts. Whatever is no
script (`-m`, `-c`, `-`) goes to the real interpreter, FORK_PYTHON_REAL.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import sys
from typing import NoReturn

LONGEST_MESSAGE = 1 << 20


def ask(path: str, arguments: list[str]) -> int:
    """Runs a script with this process's arguments, folder, environment and streams."""
    real = os.environ["FORK_PYTHON_REAL"]
    arguments = arguments[arguments[:1] == ["-u"] :]  # torchrun's, for its processes
    if not arguments or not arguments[0].endswith(".py"):
        os.execv(real, [real, *arguments])
    message = {"arguments": arguments, "folder": os.getcwd(), "environment": dict(os.environ)}
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as server:
        server.connect(path)
        socket.send_fds(server, [json.dumps(message).encode()], [0, 1, 2])
        return int(server.recv(16) or 1)


def serve(path: str) -> None:
    """Forks for every script that is asked for; several may run at once."""
    tests = os.path.dirname(os.path.abspath(__file__))
    repository = os.path.dirname(tests)
    sys.path[:] = [repository, *sys.path]
    import preloaded  # noqa: F401

    # Not what lies below: the packages may be in the repository's own .venv.
    sys.path[:] = [folder for folder in sys.path if folder not in (repository, tests)]
    for name in [name for name in sys.modules if name.partition(".")[0] == "common"]:
        del sys.modules[name]  # a script's own folder has its own
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as listener:
        listener.bind(path)
        listener.listen()
        print("ready", flush=True)
        signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # those that wait for a script just end
        while True:
            client, _ = listener.accept()
            content, streams, _, _ = socket.recv_fds(client, LONGEST_MESSAGE, 3)
            if os.fork() == 0:
                listener.close()
                wait_for(json.loads(content), streams, client)
            for stream in streams:
                os.close(stream)
            client.close()


def wait_for(message: dict, streams: list[int], client: socket.socket) -> NoReturn:
    """Forks the script, waits for it, and sends its exit status."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    child = os.fork()
    if child == 0:
        client.close()
        become(message, streams)
    for stream in streams:
        os.close(stream)
    client.send(str(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) & 255).encode())
    os._exit(0)


def become(message: dict, streams: list[int]) -> NoReturn:
    """Makes of this process the script that is asked for, runs it and ends."""
    import atexit
    import runpy
    import traceback

    import torch

    for number, stream in enumerate(streams):
        os.dup2(stream, number)
        os.close(stream)
    sys.stdin = os.fdopen(0)
    sys.stdout, sys.stderr = (os.fdopen(number, "w", buffering=1) for number in (1, 2))
    os.chdir(message["folder"])
    os.environ.clear()
    os.environ.update(message["environment"])
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", torch.get_num_threads())))
    sys.argv = message["arguments"]
    sys.path[:0] = [os.path.dirname(os.path.abspath(sys.argv[0]))]
    status: object = 0
    try:
        runpy.run_path(sys.argv[0], run_name="__main__")
    except SystemExit as stop:
        status = stop.code or 0
    except BaseException:
        traceback.print_exc()
        status = 1
    if isinstance(status, str):
        print(status, file=sys.stderr)
        status = 1
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)  # onnxruntime's destructors wait for a thread that was not forked


if __name__ == "__main__":
    if sys.argv[1] == "--serve":
        serve(sys.argv[2])
    else:
        sys.exit(ask(sys.argv[1], sys.argv[2:]))
