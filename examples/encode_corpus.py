"""Encodes a text column of Parquet or JSON lines files with Ray Data: cores, GPUs, machines.

    pip install "ray[data]==2.60.*" "sentence-transformers==6.2.*"
    python encode_corpus.py corpus.parquet --output embeddings

writes embeddings/part-corpus-000000.parquet and so on: one part for each --rows_per_part rows of a
file, with all its columns and a last one, `embedding`. pandas.read_parquet("embeddings") reads them
all. It prints the rows of each file, and at the end what was encoded, how fast, and where it is.

- A text that is null or no string keeps its row, with a null embedding, and is counted.
- Stopped, even by kill -9, the same command goes on from the finished parts. _manifest.json holds
  what must stay the same: options, weights of the model, content of the files.
- int8 takes 255 steps between the lowest and the highest value of each dimension in 1,000 texts
  from all over the files (`ranges` in the manifest); values beyond them get the outermost step.
- JSON lines become the columns that their keys name, each of one type in all lines; a text that is
  no string is written as its JSON.
- On a cluster (--ray_address) every machine must see files, output and a model's folder at the
  same paths.

This file needs nothing else of its repository.
"""

import argparse
import fcntl
import hashlib
import io
import itertools
import json
import logging
import os
import sys
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import BinaryIO

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import ray
import torch
from ray.data import ActorPoolStrategy, DataContext
from safetensors import SafetensorError
from sentence_transformers import SentenceTransformer
from sentence_transformers.util import get_device_name, quantize_embeddings
from tqdm import tqdm

CALIBRATION_TEXTS = 1_000
MODEL_ERRORS = (OSError, ValueError, SafetensorError)
PROBE = 100 * "이 글의 임베딩으로 모델을 알아봅니다. "  # long enough to show max_seq_length
STRINGS = ("string", "large_string", "string_view", "null")  # Arrow's types of a text column


class UserError(Exception):
    """What the user can put right: one line on stderr, exit status 2."""


# --- 1. Input: each part of the output holds fixed rows of one file ------------------------------


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


def json_table(
    rows: list[dict], text_column: str, schema: pa.Schema | None = None
) -> tuple[pa.Table, list[str | None]]:
    """Returns the rows as a table, and their texts, None for what is no string."""
    values = [row.get(text_column) for row in rows]
    texts = [value if isinstance(value, str) else None for value in values]
    for row, value, text in zip(rows, values, texts, strict=True):
        if value is not text:
            row[text_column] = json.dumps(value, ensure_ascii=False)
    # Arrow takes the columns from the first row alone.
    rows[0] = dict.fromkeys(name for row in rows for name in row) | rows[0]
    return pa.Table.from_pylist(rows, schema=schema), texts


def scan_json(path: Path, args: argparse.Namespace, schema: pa.Schema) -> tuple:
    """Returns the columns, those of the files before included; start (in bytes) and rows of each
    part; and how many rows have no text."""
    parts, without_text = [], 0
    bar = tqdm(total=path.stat().st_size, unit="B", unit_scale=True, desc=path.name, leave=False)
    with path.open("rb") as file, bar:
        rows = json_rows(file)
        while True:
            start = file.tell()
            found = list(itertools.islice(rows, args.rows_per_part))
            if not found:
                return schema, parts, without_text
            try:
                table, texts = json_table([row for _, row in found], args.text_column)
                schema = pa.unify_schemas([schema, table.schema], promote_options="permissive")
            except (ValueError, TypeError, OverflowError) as error:  # Arrow's, too
                lines = f"{found[0][0]}-{found[-1][0]}"
                raise UserError(f"{path}:{lines}: {str(error).splitlines()[0]}") from None
            parts.append((start, len(found)))
            without_text += texts.count(None)
            bar.update(file.tell() - start)


def scan_parquet(path: Path, args: argparse.Namespace, before: pa.Schema) -> tuple:
    """Returns the columns, which are those of the files before; first row and rows of each part;
    and how many rows have no text."""
    file, step = pq.ParquetFile(path), args.rows_per_part
    schema, rows, without_text = file.schema_arrow, file.metadata.num_rows, 0
    if before and not schema.equals(before):
        raise UserError(f"{path}: columns unlike those of {args.files[0]}: give it an own run")
    if args.text_column in schema.names:
        kind = schema.field(args.text_column).type
        if str(kind.value_type if pa.types.is_dictionary(kind) else kind) not in STRINGS:
            raise UserError(f"{path}: column {args.text_column!r} holds {kind}, not strings")
        for batch in file.iter_batches(columns=[args.text_column]):
            without_text += batch.column(0).null_count
    return schema, [(row, min(step, rows - row)) for row in range(0, rows, step)], without_text


def scan(args: argparse.Namespace) -> tuple[pa.Schema, list[dict], str]:
    """Reads and checks the files. Returns their columns, all parts, and a hash of the content."""
    if len({path.stem for path in args.files}) < len(args.files):
        raise UserError("two files have the same name, and parts are named by it")
    schema, parts, content = pa.schema([]), [], hashlib.sha256()
    for path in args.files:
        if path.suffix not in (".parquet", ".jsonl") or path.suffix != args.files[0].suffix:
            raise UserError(f"{path}: all names must end in .parquet, or all in .jsonl")
        try:
            with path.open("rb") as file:
                digest = hashlib.file_digest(file, "sha256").hexdigest()
            scan_file = scan_parquet if path.suffix == ".parquet" else scan_json
            schema, found, without_text = scan_file(path, args, schema)
            pq.write_table(schema.empty_table(), io.BytesIO())  # refuses what JSON alone can hold
        except (OSError, pa.ArrowException) as error:
            why = getattr(error, "strerror", None) or str(error).splitlines()[0]
            raise UserError(f"{path}: {why}") from None
        if args.text_column not in schema.names:
            raise UserError(f"{path}: no --text_column {args.text_column!r} in {schema.names}")
        if "embedding" in schema.names:
            raise UserError(f"{path}: there is a column 'embedding' already")
        content.update(f"{path.name} {digest}\n".encode())
        for number, (start, rows) in enumerate(found):
            name = f"part-{path.stem}-{number:06d}.parquet"
            parts.append({"name": name, "path": str(path.resolve()), "start": start, "rows": rows})
        rows = sum(rows for _, rows in found)
        print(f"{path}: {rows:,} rows, {without_text:,} of them without a text", flush=True)
    return schema, parts, content.hexdigest()[:16]


class Reader:
    """Reads the rows of parts."""

    def __init__(self, text_column: str, schema: pa.Schema) -> None:
        self.text_column, self.schema = text_column, schema
        self.groups, self.table = None, None

    def __call__(self, part: dict) -> tuple[pa.Table, list[str | None]]:
        """Returns a part's rows, and their texts, None for what is no string."""
        path, start, rows = part["path"], part["start"], part["rows"]
        if path.endswith(".jsonl"):
            with open(path, "rb") as file:
                file.seek(start)
                found = [row for _, row in itertools.islice(json_rows(file), rows)]
            return json_table(found, self.text_column, self.schema)
        file = pq.ParquetFile(path)
        sizes = [file.metadata.row_group(i).num_rows for i in range(file.num_row_groups)]
        ends = np.cumsum(sizes)
        first, last = np.searchsorted(ends, [start, start + rows - 1], side="right").tolist()
        if self.groups != (path, first, last):
            # A row group may hold a million rows: it is decoded once, not for each of its parts.
            self.table = file.read_row_groups(range(first, last + 1))
            self.groups = (path, first, last)
        table = self.table.slice(start - int(ends[first]) + sizes[first], rows)
        return table, table[self.text_column].to_pylist()


# --- 2. Work: a worker reads a part's rows, encodes them, and writes them ------------------------


def encode(model: SentenceTransformer, texts: list[str], args: argparse.Namespace) -> np.ndarray:
    """Returns float32 embeddings of shape (texts, dimension)."""
    embeddings = model.encode(
        texts,
        batch_size=args.batch_size,
        truncate_dim=args.dim,
        normalize_embeddings=args.normalize,
        show_progress_bar=False,
    )
    return embeddings.astype(np.float32, copy=False)


def is_model_of(probe: list[float], model: SentenceTransformer) -> bool:
    """Whether the model, on a CPU, gives this embedding of `PROBE`: a name may come to stand for
    another model. 1% is more than CPUs differ in, bfloat16 included."""
    found = model.encode(PROBE).astype(np.float32)
    return len(found) == len(probe) and np.abs(found - probe).max() < 0.01 * np.abs(found).max()


def write_whole(path: Path, write: Callable[[Path], object]) -> None:
    """Writes beside the file, then renames: it is there as a whole, or not at all."""
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
    try:
        write(temporary)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


class Encoder:
    """A Ray worker: a model on its share of the cores, or on a GPU."""

    def __init__(
        self, args: argparse.Namespace, schema: pa.Schema, manifest: dict, threads: int
    ) -> None:
        torch.set_num_threads(threads)
        self.args, self.read = args, Reader(args.text_column, schema)
        self.dimension = manifest["dimension"]
        self.ranges = manifest["ranges"] and np.array(manifest["ranges"], dtype=np.float32)
        self.problem = ""
        try:
            self.model = SentenceTransformer(args.model, device="cpu")
            if not is_model_of(manifest["probe"], self.model):
                raise ValueError("on one machine it is another model")
            self.model.to(get_device_name())
        except (*MODEL_ERRORS, torch.OutOfMemoryError) as error:  # raised, Ray would start it again
            self.problem = f"{args.model}: {str(error).splitlines()[0]}"

    def __call__(self, part: dict) -> dict:
        """Writes one part. Returns its rows, texts, when it started and ended; or an `error`."""
        started = time.time()
        if self.problem:
            return {"error": self.problem}
        try:
            table, texts = self.read(part)
            has_text = np.array([text is not None for text in texts])
            values = np.zeros((len(texts), self.dimension), dtype=self.args.embedding_precision)
            if has_text.any():
                found = encode(self.model, [text for text in texts if text is not None], self.args)
                if self.ranges is not None:
                    found = quantize_embeddings(found, "int8", ranges=self.ranges)
                values[has_text] = found
            column = pa.FixedSizeListArray.from_arrays(
                values.ravel(), self.dimension, mask=pa.array(~has_text)
            )
            table = table.append_column("embedding", column)
            write_whole(self.args.output / part["name"], lambda path: pq.write_table(table, path))
        except (OSError, pa.ArrowException, torch.OutOfMemoryError) as error:
            return {"error": f"{part['name']}: {str(error).splitlines()[0]}"}
        done = {"rows": part["rows"], "texts": int(has_text.sum())}
        return done | {"started": started, "ended": time.time(), "error": ""}


# --- 3. The run: what is done already, and Ray for the rest --------------------------------------


def calibrate(
    model: SentenceTransformer, parts: list[dict], schema: pa.Schema, args: argparse.Namespace
) -> list[list[float]]:
    """Returns the lowest and highest value of each dimension, in texts from at most ten parts."""
    texts, read = [], Reader(args.text_column, schema)
    chosen = parts[:: max(1, -(-len(parts) // 10))]
    for part in chosen:
        found = [text for text in read(part)[1] if text is not None]
        texts += found[: -(-CALIBRATION_TEXTS // len(chosen))]
    if not texts:
        raise UserError("--embedding_precision int8: there is no text to take the ranges from")
    embeddings = encode(model, texts, args)
    return [embeddings.min(0).tolist(), embeddings.max(0).tolist()]


def load_model(args: argparse.Namespace) -> SentenceTransformer:
    try:
        model = SentenceTransformer(args.model, device="cpu")
    except MODEL_ERRORS as error:
        where = "" if Path(args.model).is_dir() else "no such folder, and not from the Hub: "
        raise UserError(f"{args.model}: {where}{str(error).splitlines()[0]}") from None
    dimension = model.get_embedding_dimension()
    if args.dim and args.dim > dimension:
        raise UserError(f"--dim {args.dim}: {args.model} has {dimension} dimensions")
    return model


def open_output(
    args: argparse.Namespace, model: SentenceTransformer, schema: pa.Schema, parts: list, files: str
) -> dict:
    """Begins the output folder, or checks that this command began it. Returns its manifest."""
    manifest = {
        "text_column": args.text_column,
        "dimension": args.dim or model.get_embedding_dimension(),
        "normalize": args.normalize,
        "embedding_precision": args.embedding_precision,
        "rows_per_part": args.rows_per_part,
        "files": files,
    }
    path, again = args.output / "_manifest.json", "give another --output"
    if path.exists():
        begun = json.loads(path.read_text(encoding="utf-8"))
        if not is_model_of(begun["probe"], model):
            raise UserError(f"{args.output}: begun with another model, {begun['model']}: {again}")
        for key, value in manifest.items():
            if value != begun[key]:
                raise UserError(
                    f"{args.output}: begun with {key} {begun[key]}, not {value}: {again}"
                )
        return begun
    if any(args.output.glob("[!.]*")):
        raise UserError(f"{args.output}: something else is there: {again}")
    probe = model.encode(PROBE).tolist()
    int8 = args.embedding_precision == "int8"
    ranges = calibrate(model, parts, schema, args) if int8 else None
    manifest |= {"model": args.model, "ranges": ranges, "probe": probe}
    manifest["model_bytes"] = sum(weights.nbytes for weights in model.parameters())
    text = json.dumps(manifest, ensure_ascii=False, indent=1)
    write_whole(path, lambda path: path.write_text(text, encoding="utf-8"))
    return manifest


def is_finished(path: Path, rows: int) -> bool:
    try:
        return pq.read_metadata(path).num_rows == rows
    except (FileNotFoundError, pa.ArrowInvalid):
        return False


def start_ray(args: argparse.Namespace, model_bytes: int) -> tuple[int, dict[str, int]]:
    """Starts or joins Ray. Returns how many workers it has room for, and what each one takes."""
    # Else Ray tells its makers' server of each start: nobody asked for that.
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
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
        raise OSError(f"Ray ({args.ray_address}): {str(error).splitlines()[0]}") from None
    logging.getLogger("ray.data").setLevel(logging.WARNING)
    context = DataContext.get_current()
    context.enable_progress_bars = context.print_on_execution_start = False
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    gpus = sum(int(node.get("GPU", 0)) for node in nodes)
    if gpus:
        return gpus, {"num_cpus": 1, "num_gpus": 1}
    # One thread a worker is fastest: threads wait for each other. But each holds the model.
    held = 1_000_000_000 + 2 * model_bytes  # libraries; weights, twice while they are loaded
    cores = [(int(node.get("CPU", 0)), int(node["memory"] // held)) for node in nodes]
    threads = args.threads or max(n // max(1, min(n, models)) for n, models in cores) or 1
    return sum(n // threads for n, _ in cores), {"num_cpus": threads}


def encode_parts(
    args: argparse.Namespace, schema: pa.Schema, manifest: dict, todo: list[dict], bar: tqdm
) -> None:
    """Encodes the parts with Ray, and prints how fast."""
    begin = time.time()
    room, share = start_ray(args, manifest["model_bytes"])
    workers = min(args.workers or room, len(todo))
    if not 0 < workers <= room:
        raise UserError(f"Ray has room for {room} workers of {share}: fewer --workers or --threads")
    there = vars(args) | {"output": args.output.resolve()}  # workers run in folders of their own
    if Path(args.model).is_dir():
        there["model"] = str(Path(args.model).resolve())
    encoded = ray.data.from_items(todo, override_num_blocks=len(todo)).map(
        Encoder,
        fn_constructor_args=(argparse.Namespace(**there), schema, manifest, share["num_cpus"]),
        compute=ActorPoolStrategy(size=workers, max_tasks_in_flight_per_actor=1),
        **share,
    )
    done = []
    for part in encoded.iter_rows():
        if part["error"]:
            raise OSError(part["error"])
        bar.update(part["rows"])
        done.append(part)
    texts = sum(part["texts"] for part in done)
    seconds = max(part["ended"] for part in done) - min(part["started"] for part in done)
    bar.close()
    print(
        f"{texts:,} texts in {seconds:.1f} s, {texts / seconds:,.0f} a second "
        f"({time.time() - begin:.1f} s with Ray's start): {args.output}"
    )


def run(args: argparse.Namespace) -> None:
    schema, parts, files = scan(args)
    model = load_model(args)
    args.output.mkdir(parents=True, exist_ok=True)
    folder = os.open(args.output, os.O_RDONLY)
    try:
        fcntl.flock(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
        manifest = open_output(args, model, schema, parts, files)
        del model  # the workers have their own
        for leftover in args.output.glob(".*." + 32 * "?"):
            leftover.unlink(missing_ok=True)  # a killed run was writing it
        todo = [p for p in parts if not is_finished(args.output / p["name"], p["rows"])]
        total, left = (sum(part["rows"] for part in some) for some in (parts, todo))
        if not todo:
            print(f"all {total:,} rows are there, nothing to do: {args.output}")
            return
        with tqdm(total=total, initial=total - left, unit=" rows", desc="encoding") as bar:
            encode_parts(args, schema, manifest, todo, bar)
    except BlockingIOError:
        raise UserError(f"{args.output}: another run is writing there") from None
    finally:
        os.close(folder)


def positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number above 0")
    return int(text)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    option = parser.add_argument
    option("files", nargs="+", type=Path, help=".parquet or .jsonl, all with the same columns")
    option("--output", type=Path, required=True, help="folder for the parts")
    option("--text_column", default="text", help="default: %(default)s")
    option("--model", default="jhgan/ko-sroberta-multitask", help="Hub name (default: %(default)s)"
           ", or the folder of a training run or of a plain encoder, to which "
           "sentence-transformers adds mean pooling")  # fmt: skip
    option("--dim", type=positive, help="only the first dimensions, of a model trained with "
           "MatryoshkaLoss; no longer of unit length without --normalize")  # fmt: skip
    option("--normalize", action="store_true", help="scale embeddings to unit length")
    option("--embedding_precision", choices=["float32", "int8"], default="float32")
    option("--batch_size", type=positive, default=32, help="default: %(default)s")
    option("--rows_per_part", type=positive, default=2048, help="default: %(default)s. Texts are "
           "sorted by length within a part: small parts are slower, large ones are lost when "
           "the run is stopped")  # fmt: skip
    option("--ray_address", default="local", help="a running cluster, `auto` or HOST:PORT "
           "(default: this machine alone)")  # fmt: skip
    option("--workers", type=positive, help="how many models encode (default: one on each GPU or, "
           "without any, wherever --threads cores are)")  # fmt: skip
    option("--threads", type=positive, help="cores of a worker that has no GPU (default: 1, "
           "or more where memory holds fewer models)")  # fmt: skip
    args = parser.parse_args()
    try:
        run(args)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except OSError as error:
        print(f"error: {str(error).splitlines()[0]}", file=sys.stderr)
        sys.exit(1)
    except KeyboardInterrupt:
        print("stopped: the same command goes on", file=sys.stderr)
        sys.exit(130)


if __name__ == "__main__":
    main()
