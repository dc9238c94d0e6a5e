"""Encodes a text column of Parquet or JSON lines files with Ray Data: cores, GPUs, machines.

    pip install "ray[data]==2.60.*" "sentence-transformers==6.2.*"
    python encode_corpus.py corpus.parquet --output embeddings

Section 1, "The example", is what to copy: workers read texts, encode them, write them. The others
are care: 2 "Input", 3 "Interrupted runs" (what must stay the same, the lock), 4 "Ray", 5 "Command
line". The file needs nothing else of its repository.

It writes embeddings/part-corpus-000000.parquet and so on: one part for --rows_per_part rows of a
file, with all its columns and a last one, `embedding`, null where the text is no string. Stopped,
even by kill -9, the same command goes on from the finished parts. Keys of JSON lines are columns,
of one type in all lines. int8 takes 255 steps between the lowest and the highest value of each
dimension in 1,000 texts (`ranges` in _manifest.json); values beyond get the outermost step. On a
cluster all machines must see files, output and a model's folder at the same paths.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import itertools
import json
import logging
import os
import sys
import time
import uuid
from argparse import ArgumentParser, ArgumentTypeError, Namespace
from collections.abc import Iterator
from pathlib import Path
from pickle import UnpicklingError
from typing import BinaryIO

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import ray
import torch
from filelock import FileLock, Timeout  # Ray brings it
from ray.data import ActorPoolStrategy, DataContext
from safetensors import SafetensorError
from sentence_transformers import SentenceTransformer
from sentence_transformers.util import get_device_name, quantize_embeddings
from tqdm import tqdm

# --- 1. The example: workers read texts, encode them, and write them beside their rows -----------


def load_encoder(name: str) -> SentenceTransformer:
    model = SentenceTransformer(name, device="cpu").float()  # weights may be kept in half
    # A prompt that is not declared is an empty one here, and would go before the default one.
    model.prompts = {key: prompt for key, prompt in model.prompts.items() if prompt}
    return model


def encode(model: SentenceTransformer, texts: list[str], args: Namespace) -> np.ndarray:
    """Returns float32 embeddings of shape (texts, dimension)."""
    embeddings = model.encode_document(
        texts,
        batch_size=args.batch_size,
        truncate_dim=args.dim,
        normalize_embeddings=args.normalize,
        show_progress_bar=False,
    )
    return embeddings.astype(np.float32, copy=False)


class Encoder:
    """A Ray worker: a model on its share of the cores, or on a GPU."""

    def __init__(self, args: Namespace, corpus: Corpus, manifest: dict, threads: int) -> None:
        torch.set_num_threads(threads)
        self.args, self.corpus, self.manifest = args, corpus, manifest
        self.model = load_encoder(args.model)
        if not is_model_of(manifest["probe"], self.model):
            raise ValueError(f"on one machine {args.model} is another model")
        self.model.to(get_device_name())

    def __call__(self, part: dict) -> dict:
        """Writes a part. Returns its rows and texts, and when it was begun and ended."""
        begun = time.time()
        table, has_text, texts = self.corpus.read(part)
        values = np.zeros((len(table), self.manifest["dimension"]), self.args.embedding_precision)
        if texts:
            found = encode(self.model, texts, self.args)
            if self.args.embedding_precision == "int8":
                ranges = np.array(self.manifest["ranges"], np.float32)
                found = quantize_embeddings(found, "int8", ranges=ranges)
            values[has_text] = found
        without = pa.array(~has_text)
        column = pa.FixedSizeListArray.from_arrays(values.ravel(), values.shape[1], mask=without)
        parquet = pa.BufferOutputStream()
        pq.write_table(table.append_column("embedding", column), parquet)
        write_whole(self.args.output / part["name"], parquet.getvalue())
        return {"rows": len(table), "texts": len(texts), "begun": begun, "ended": time.time()}


def encode_parts(parts: list[dict], settings: tuple, workers: int, share: dict) -> Iterator[dict]:
    """Yields what so many workers, each with its share of the machine, return for the parts."""
    encoded = ray.data.from_items(parts, override_num_blocks=len(parts)).map(
        CarefulEncoder,  # or Encoder, where an exception may end the run
        fn_constructor_args=settings,
        compute=ActorPoolStrategy(size=workers, max_tasks_in_flight_per_actor=1),
        **share,
    )
    yield from encoded.iter_rows()


# --- 2. Input: files are checked, and split into parts -------------------------------------------

STRINGS = ("string", "large_string", "string_view", "null")  # Arrow's types of a text column
Rows = tuple[pa.Table, np.ndarray, list[str]]  # all columns; which rows have a text; the texts


class UserError(Exception):
    """What the user can put right: one line on stderr, exit status 2."""


def first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def json_rows(file: BinaryIO) -> Iterator[tuple[int, dict]]:
    """Yields the rows from here on, each with its line. Raises `UserError` with file:line."""
    for number, line in enumerate(file, 1):
        if line.strip():
            try:
                row = json.loads(line)
            except (ValueError, RecursionError) as error:
                why = getattr(error, "msg", error)
                raise UserError(f"{file.name}:{number}: not JSON: {why}") from None
            if not isinstance(row, dict):
                raise UserError(f"{file.name}:{number}: not a JSON object")
            yield number, row


class Corpus:
    """Files, with the columns `schema`, and their `parts`: each holds certain rows of one file."""

    def __init__(self, args: Namespace) -> None:
        """Checks the files and prints their rows."""
        self.args, self.schema, self.parts, content = args, pa.schema([]), [], hashlib.sha256()
        if len({path.stem for path in args.files}) < len(args.files):
            raise UserError("two files have the same name, and parts are named by it")
        for path in args.files:
            if path.suffix not in (".parquet", ".jsonl") or path.suffix != args.files[0].suffix:
                raise UserError(f"{path}: all names must end in .parquet, or all in .jsonl")
            try:
                with path.open("rb") as file:
                    digest = hashlib.file_digest(file, "sha256").hexdigest()
                content.update(f"{path.name} {digest}\n".encode())
                scan = self.scan_parquet if path.suffix == ".parquet" else self.scan_json
                parts, texts = scan(path)
                pq.write_table(self.schema.empty_table(), io.BytesIO())  # refuses some JSON
            except (OSError, pa.ArrowException, UnicodeError) as error:
                why = getattr(error, "strerror", None) or first_line(error)
                raise UserError(f"{path}: {why}") from None
            column, columns = args.text_column, self.schema.names
            if (count := columns.count(column)) != 1:
                raise UserError(f"{path}: {count or 'no'} --text_column {column!r} in {columns}")
            if "embedding" in columns:
                raise UserError(f"{path}: there is a column 'embedding' already")
            for number, part in enumerate(parts):
                name = f"part-{path.stem}-{number:06d}.parquet"
                self.parts.append(part | {"name": name, "path": str(path.resolve())})
            rows = sum(part["rows"] for part in parts)
            print(f"{path}: {rows:,} rows, {rows - texts:,} of them without a text", flush=True)
        self.content = content.hexdigest()[:16]
        self.groups, self.table = None, None  # Parquet row groups that were read last

    def scan_parquet(self, path: Path) -> tuple[list[dict], int]:
        """Returns the parts (start: a row) and how many rows have a text."""
        file, before, args = pq.ParquetFile(path), self.schema, self.args
        self.schema, rows, texts = file.schema_arrow, file.metadata.num_rows, 0
        if before and not self.schema.equals(before):
            raise UserError(f"{path}: columns unlike those of {args.files[0]}: give it an own run")
        if self.schema.names.count(args.text_column) == 1:
            kind = self.schema.field(args.text_column).type
            if str(kind.value_type if pa.types.is_dictionary(kind) else kind) not in STRINGS:
                raise UserError(f"{path}: column {args.text_column!r} holds {kind}, not strings")
            for batch in file.iter_batches(columns=[args.text_column]):
                batch.validate(full=True)  # that its strings are UTF-8
                texts += len(batch) - batch.column(0).null_count
        starts = range(0, rows, args.rows_per_part)
        return [{"start": row, "rows": min(starts.step, rows - row)} for row in starts], texts

    def scan_json(self, path: Path) -> tuple[list[dict], int]:
        """Returns the parts (start: a byte) and how many rows have a text."""
        parts, start, texts = [], 0, 0
        with path.open("rb") as file:
            rows = json_rows(file)
            while found := list(itertools.islice(rows, self.args.rows_per_part)):
                try:
                    table, has_text, _ = self.json_table([row for _, row in found])
                    both = [self.schema, table.schema]
                    self.schema = pa.unify_schemas(both, promote_options="permissive")
                except (ValueError, TypeError, OverflowError) as error:  # Arrow's, too
                    lines = f"{found[0][0]}-{found[-1][0]}"
                    raise UserError(f"{path}:{lines}: {first_line(error)}") from None
                parts.append({"start": start, "rows": len(found)})
                start, texts = file.tell(), texts + int(has_text.sum())
        return parts, texts

    def json_table(self, rows: list[dict], schema: pa.Schema | None = None) -> Rows:
        column = self.args.text_column
        has_text = np.array([isinstance(row.get(column), str) for row in rows])
        texts = [row[column] for row in itertools.compress(rows, has_text)]
        for row in itertools.compress(rows, ~has_text):
            if row.get(column) is not None:
                row[column] = json.dumps(row[column], ensure_ascii=False)
        # Arrow takes the columns from the first row alone.
        rows[0] = dict.fromkeys(name for row in rows for name in row) | rows[0]
        return pa.Table.from_pylist(rows, schema=schema), has_text, texts

    def read(self, part: dict) -> Rows:
        path, start, rows = part["path"], part["start"], part["rows"]
        if path.endswith(".jsonl"):
            with open(path, "rb") as file:
                file.seek(start)
                found = [row for _, row in itertools.islice(json_rows(file), rows)]
            return self.json_table(found, self.schema)
        file = pq.ParquetFile(path)
        sizes = [file.metadata.row_group(i).num_rows for i in range(file.num_row_groups)]
        ends = np.cumsum(sizes)
        first, last = np.searchsorted(ends, [start, start + rows - 1], side="right").tolist()
        if self.groups != (path, first, last):
            # A row group may hold a million rows: it is decoded once, not for each of its parts.
            self.table = file.read_row_groups(range(first, last + 1))
            self.groups = (path, first, last)
        table = self.table.slice(start - int(ends[first]) + sizes[first], rows)
        texts = table[self.args.text_column]
        return table, texts.is_valid().to_numpy(), [t for t in texts.to_pylist() if t is not None]


# --- 3. Interrupted runs: what is finished, and what must stay the same ---------------------------

PROBE = 100 * "이 글의 임베딩으로 모델을 알아봅니다. "  # long enough to show max_seq_length


def write_whole(path: Path, content: bytes | pa.Buffer) -> None:
    """Writes beside the file, then renames: it is there as a whole, or not at all."""
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
    try:
        with temporary.open("wb") as file:
            file.write(content)
            os.fsync(file.fileno())  # a power cut must not leave the name without the content
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def is_model_of(probe: list[float], model: SentenceTransformer) -> bool:
    """Whether the model gives this embedding of `PROBE`: CPUs, bfloat16 too, differ by below 1%."""
    found = model.encode_document(PROBE).astype(np.float32)
    return len(found) == len(probe) and np.abs(found - probe).max() < 0.01 * np.abs(found).max()


def calibrate(model: SentenceTransformer, corpus: Corpus, args: Namespace) -> list[list[float]]:
    """Returns the lowest and highest value of each dimension, in texts from at most ten parts."""
    parts, texts = corpus.parts[:: max(1, -(-len(corpus.parts) // 10))], []
    for part in parts:
        texts += corpus.read(part)[2][: -(-1_000 // len(parts))]
    corpus.groups = corpus.table = None  # nothing to send to the workers
    if not texts:
        raise UserError("--embedding_precision int8: there is no text to take the ranges from")
    embeddings = encode(model, texts, args)
    return [embeddings.min(0).tolist(), embeddings.max(0).tolist()]


def open_output(args: Namespace, model: SentenceTransformer, corpus: Corpus) -> dict:
    """Begins the output folder, or checks that this command began it. Returns its manifest."""
    options = ("text_column", "normalize", "embedding_precision", "rows_per_part")
    manifest = {name: getattr(args, name) for name in options} | {"files": corpus.content}
    manifest["dimension"] = args.dim or model.get_embedding_dimension()
    path, again = args.output / "_manifest.json", "give another --output"
    if path.exists():
        try:
            begun = json.loads(path.read_bytes())
            why = [] if is_model_of(begun["probe"], model) else [f"another model, {begun['model']}"]
            why += [f"{k} {begun[k]}, not {v}" for k, v in manifest.items() if begun[k] != v]
            begun["ranges"], begun["model_bytes"] + 0
        except (ValueError, LookupError, TypeError, ArithmeticError, RecursionError):
            why = ["something else, or its _manifest.json is damaged"]
        if why:
            raise UserError(f"{args.output}: begun with {why[0]}: {again}")
        return begun
    if any(args.output.glob("[!.]*")):
        raise UserError(f"{args.output}: something else is there: {again}")
    int8 = args.embedding_precision == "int8"
    manifest["ranges"] = calibrate(model, corpus, args) if int8 else None
    manifest |= {"model": args.model, "probe": model.encode_document(PROBE).tolist()}
    manifest["model_bytes"] = sum(weights.nbytes for weights in model.parameters())
    write_whole(path, json.dumps(manifest, ensure_ascii=False, indent=1).encode())
    return manifest


# --- 4. Ray: as many workers as there is room for, which return their errors ---------------------

MODEL_ERRORS = (ImportError, OSError, ValueError, LookupError, RuntimeError, AttributeError)
MODEL_ERRORS += (TypeError, SafetensorError, UnpicklingError)


class CarefulEncoder:
    """Makes an `Encoder` with its first part. Returns errors: if raised, Ray would begin anew."""

    def __init__(self, *settings: object) -> None:
        self.settings, self.encoder = settings, None

    def __call__(self, part: dict) -> dict:
        try:
            self.encoder = self.encoder or Encoder(*self.settings)
            return self.encoder(part) | {"error": ""}
        except (*MODEL_ERRORS, UserError, pa.ArrowException) as error:  # OutOfMemoryError too
            return {"error": f"{part['name']}: {first_line(error)}"}


def start_ray(args: Namespace, model_bytes: int) -> tuple[int, dict[str, int]]:
    """Starts or joins Ray. Returns how many workers it has room for, and what each one takes."""
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"  # else it tells its makers of each start
    # Ray Data's own warnings stay; that its bars are off, and C++ notes, are nothing to act on.
    os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")
    logging.getLogger("ray.data._internal.progress").setLevel(logging.ERROR)
    options = {"logging_level": logging.WARNING, "log_to_driver": False}
    if args.ray_address == "local":
        # That nobody else may run code in this Ray is as it should be, and no warning.
        logging.getLogger("ray._private.authentication").setLevel(logging.ERROR)
        # No texts or embeddings pass through Ray's object store, only which rows to encode.
        options |= {"include_dashboard": False, "object_store_memory": 100_000_000}
    try:
        ray.init(args.ray_address, **options)
    except (RuntimeError, ConnectionError, ValueError) as error:
        raise OSError(f"Ray ({args.ray_address}): {first_line(error)}") from None
    logging.getLogger("ray.data").setLevel(logging.WARNING)
    context = DataContext.get_current()
    context.enable_progress_bars = context.print_on_execution_start = False
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    if gpus := sum(int(node.get("GPU", 0)) for node in nodes):
        return gpus, {"num_cpus": 1, "num_gpus": 1}
    # One thread a worker is fastest: threads wait for each other. But each holds the model.
    held = 1_000_000_000 + 2 * model_bytes  # libraries; weights, twice while they are loaded
    cores = [(int(node.get("CPU", 0)), int(node["memory"] // held)) for node in nodes]
    threads = args.threads or max(n // max(1, min(n, models)) for n, models in cores) or 1
    return sum(n // threads for n, _ in cores), {"num_cpus": threads}


def encode_all(args: Namespace, corpus: Corpus, manifest: dict, parts: list, bar: tqdm) -> None:
    """Encodes the parts, and prints how fast."""
    begin = time.time()
    room, share = start_ray(args, manifest["model_bytes"])
    workers = min(args.workers or room, len(parts))
    if not 0 < workers <= room:
        raise UserError(f"Ray has room for {room} workers of {share}: fewer --workers or --threads")
    there = vars(args) | {"output": args.output.resolve()}  # workers run in folders of their own
    if Path(args.model).is_dir():
        there["model"] = str(Path(args.model).resolve())
    settings, done = (Namespace(**there), corpus, manifest, share["num_cpus"]), []
    for part in encode_parts(parts, settings, workers, share):
        if part["error"]:
            raise OSError(part["error"])
        bar.update(part["rows"])
        done.append(part)
    bar.close()
    texts = sum(part["texts"] for part in done)
    seconds = max(part["ended"] for part in done) - min(part["begun"] for part in done)
    print(
        f"{texts:,} texts in {seconds:.1f} s, {texts / seconds:,.0f} a second "
        f"({time.time() - begin:.1f} s with Ray's start): {args.output}"
    )


# --- 5. Command line -----------------------------------------------------------------------------


def load_model(args: Namespace) -> SentenceTransformer:
    try:
        model = load_encoder(args.model)
    except MODEL_ERRORS as error:
        why = "" if Path(args.model).is_dir() else "no such folder, and not from the Hub: "
        why += first_line(error)
        for path in Path(args.model).rglob("*"):
            if path.is_file() and path.stat().st_size < 200 and b"git-lfs" in path.read_bytes():
                why = f"{path.name} is a Git-LFS pointer, not the weights: run git lfs pull"
        raise UserError(f"{args.model}: {why}") from None
    if args.dim and args.dim > (dimension := model.get_embedding_dimension()):
        raise UserError(f"--dim {args.dim}: {args.model} has {dimension} dimensions")
    return model


def run(args: Namespace) -> None:
    corpus = Corpus(args)
    model = load_model(args)
    args.output.mkdir(parents=True, exist_ok=True)
    with contextlib.ExitStack() as stack:
        try:
            stack.enter_context(FileLock(args.output / ".lock", timeout=0))
        except Timeout:
            raise UserError(f"{args.output}: another run is writing there") from None
        if os.name == "posix":  # where FileLock leaves the file, unlocked
            stack.callback((args.output / ".lock").unlink, missing_ok=True)
        manifest = open_output(args, model, corpus)
        del model  # the workers have their own
        for leftover in args.output.glob(".*." + 32 * "?"):
            leftover.unlink(missing_ok=True)  # a killed run was writing it
        missing = [part for part in corpus.parts if not (args.output / part["name"]).exists()]
        total, left = (sum(part["rows"] for part in some) for some in (corpus.parts, missing))
        if not missing:
            print(f"all {total:,} rows are there, nothing to do: {args.output}")
            return
        with tqdm(total=total, initial=total - left, unit=" rows", desc="encoding") as bar:
            encode_all(args, corpus, manifest, missing, bar)


def positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise ArgumentTypeError(f"{text!r} is not a whole number above 0")
    return int(text)


def main() -> None:
    for stream in filter(None, (sys.stdout, sys.stderr)):  # None: closed
        stream.reconfigure(errors="replace")  # what the console's encoding does not have
    parser = ArgumentParser(description=__doc__.splitlines()[0])
    add, default = parser.add_argument, "default: %(default)s"
    add("files", nargs="+", type=Path, help=".parquet or .jsonl, all with the same columns")
    add("--output", type=Path, required=True, help="folder for the parts")
    add("--text_column", default="text", help=default)
    add("--model", default="jhgan/ko-sroberta-multitask", help=f"Hub name or folder ({default})")
    add("--dim", type=positive, help="only the first dimensions, of a model of MatryoshkaLoss")
    add("--normalize", action="store_true", help="to unit length, which --dim takes away")
    add("--embedding_precision", choices=["float32", "int8"], default="float32")
    add("--batch_size", type=positive, default=32, help=default)
    add("--rows_per_part", type=positive, default=2048, help=f"{default}; small ones are slower")
    add("--ray_address", default="local", help="of a running cluster: `auto` or HOST:PORT")
    add("--workers", type=positive, help="models at work (default: one on each GPU or --threads)")
    add("--threads", type=positive, help="cores of a worker without a GPU (default: what fits)")
    args = parser.parse_args()
    try:
        run(args)
    except (UserError, OSError) as error:
        print(f"error: {first_line(error)}", file=sys.stderr)
        sys.exit(2 if isinstance(error, UserError) else 1)
    except KeyboardInterrupt:
        print("stopped: the same command goes on", file=sys.stderr)
        sys.exit(130)


if __name__ == "__main__":
    main()
