"""What a script needs before it knows any subject: errors, files replaced whole, hashes, commands.

Exit statuses: 0 done, 2 bad arguments or bad data (a `UserError`), 1 anything else, 130 after
Ctrl-C. Progress goes to stderr, results to stdout.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import io
import json
import os
import re
import shlex
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

REPOSITORY = Path(__file__).resolve().parent.parent


class UserError(Exception):
    """A bad argument, file or model: its message is all that a user needs to put it right."""


class Once(argparse.Action):
    """An option that may not be given twice: argparse would drop the first without a word.

    Its `const` says what to do instead.
    """

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: Any,
        option_string: str | None = None,
    ) -> None:
        if getattr(namespace, self.dest) is not None:
            raise UserError(f"{option_string} is given twice: {self.const}")
        setattr(namespace, self.dest, values)


@contextlib.contextmanager
def command_line() -> Iterator[None]:
    """Ends a script as its users expect: errors in one line, no traceback.

    Exit status 2 for a `UserError` (bad arguments or data), 1 for what the machine refuses (a full
    disk, a folder without write permission, more of the GPU's memory) and for a command that fails,
    130 after Ctrl-C.
    """
    threading.excepthook = _end_thread
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # what the console's encoding does not have
    try:
        for argument in sys.argv[1:]:
            if not is_unicode(argument):
                encoding = sys.getfilesystemencoding()
                raise UserError(
                    f"{argument!r}: not {encoding} text: rename what has this name, or set another "
                    "locale (LC_ALL=C.UTF-8)"
                )
        yield
        _flush_output()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)
    except FloatingPointError as error:  # a loss or an embedding that is not finite
        print(f"error: {error}", file=sys.stderr)
        sys.exit(1)
    except subprocess.CalledProcessError as error:  # it has said why
        command, status = shlex.join(map(str, error.cmd)), error.returncode
        print(f"error: exit status {status} of: {command}", file=sys.stderr)
        sys.exit(1)
    except OSError as error:
        print(_system_line(error), file=sys.stderr)
        sys.exit(1)
    except RuntimeError as error:
        if type(error).__name__ != "OutOfMemoryError":  # torch's, which not every script loads
            raise
        print(f"error: {first_line(error)}", file=sys.stderr)
        sys.exit(1)


def _flush_output() -> None:
    """Raises `OSError` where stdout takes no more: at its exit Python would say so in its way."""
    if sys.stdout is None:  # closed (>&-)
        return
    try:
        sys.stdout.flush()
    except OSError as error:
        with open(os.devnull, "wb") as nowhere:
            os.dup2(nowhere.fileno(), sys.stdout.fileno())
        raise OSError(error.errno, error.strerror, "stdout") from None


def is_unicode(text: str) -> bool:
    """Tells whether text can be written: bytes that are not of the console's encoding cannot.

    A Korean folder from a Windows zip has a name of such bytes, and any in an ASCII locale.
    """
    return not re.search("[\ud800-\udfff]", text)


def _system_line(error: OSError) -> str:
    return f"error: {error.filename or 'system'}: {error.strerror or error}"


def _end_thread(args: threading.ExceptHookArgs) -> None:
    """Gives the system's refusals one line in threads too (TensorBoard writes in one)."""
    if isinstance(args.exc_value, OSError):
        print(_system_line(args.exc_value), file=sys.stderr)
    else:
        threading.__excepthook__(args)


def first_line(error: BaseException) -> str:
    """Returns the first line of an error's message, or its type where it has none."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Gives a name to write to, then renames: others see the old file whole, or the new one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def writing(path: Path) -> Iterator[None]:
    """Makes an `OSError` of what torch and safetensors raise when the disk is full."""
    try:
        yield
    except (RuntimeError, SafetensorError) as error:
        raise OSError(None, f"not written: {first_line(error)}", str(path)) from None


def write_text(path: Path, text: str) -> None:
    """Replaces a file by this UTF-8 text, whole or not at all."""
    with replacing(path) as file:
        file.write_text(text, encoding="utf-8")


def write_json(path: Path, content: Any) -> None:
    """Replaces a file by this content as JSON; raises `ValueError` for NaN and infinite numbers."""
    text = json.dumps(content, indent=2, ensure_ascii=False, allow_nan=False)
    write_text(path, text + "\n")


def read_json(path: Path) -> Any:
    """Returns a JSON file's content."""
    return json.loads(path.read_text(encoding="utf-8"))


@contextlib.contextmanager
def form_of(path: Path | str, what: str) -> Iterator[None]:
    """Makes a `UserError` of a stored file that is damaged, or of another form than the code."""
    try:
        yield
    except (ValueError, LookupError, TypeError, AttributeError, ArithmeticError, RecursionError):
        raise UserError(f"{path}: {what}") from None


def file_sha256(path: Path) -> str:
    """Returns the SHA-256 of a file's content, hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def expanded(path: str | Path) -> Path:
    """Returns a path with the home folder for its ~; a ~ that is of no user stays."""
    return Path(os.path.expanduser(path))


def without_folder(value: str) -> str:
    """Returns the last part of what is a path on this machine, and anything else as it is."""
    # os.path's: a prompt may be longer than any file's name, which pathlib raises for.
    is_local = value.startswith((".", "~", os.sep)) or os.path.exists(value)
    return expanded(value).resolve().name if is_local else value


def stored_command(arguments: Sequence[str] | None = None) -> str:
    """Returns a command line (default: this process's) with paths cut to their last part.

    For files that other people see: where a folder lies on this machine is nobody's business.
    """
    script, *rest = sys.argv if arguments is None else arguments

    def shorten(argument: str) -> str:
        option, equals, value = (
            argument.rpartition("=") if argument[:2] == "--" else ("", "", argument)
        )
        return option + equals + without_folder(value)

    return shlex.join(["python", Path(script).name, *map(shorten, rest)])
