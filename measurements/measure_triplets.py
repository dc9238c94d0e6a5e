"""Times triplets from a file of KorNLI's size: common/formats.py against the original's way.

    python measurements/measure_triplets.py

Writes 942,854 rows in KorNLI's shape, of generated words as long as XNLI's Korean sentences: for
each premise an entailment, a neutral and a contradiction. This is not KorNLI. Both ways read it in
processes of their own, in turn. Timed is everything from the file to the triplets, in ours with
checks and blob id; imports are not timed, but count in the peak memory. The original's way is given
the triplets as lists, which are smaller than its InputExample. Prints medians as one line of JSON.
Give it a machine with nothing else to do, and about 200 MB of disk.
"""

from __future__ import annotations

import argparse
import csv
import json
import random
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parent.parent
sys.path.append(str(REPOSITORY))

from common.command_line import command_line  # noqa: E402

KORNLI_ROWS = 392_702 + 550_152
LABELS = ("entailment", "neutral", "contradiction")
WAYS = ("original", "ours")


def generate_rows(rows: int, seed: int) -> Iterator[str]:
    """Yields a header and `rows` lines.

    As in XNLI, premises have about 53 characters in 13 words, hypotheses 27 in 7.
    """
    generator = random.Random(seed)
    words = ["".join(chr(generator.randint(0xAC00, 0xD7A3)) for _ in range(3)) for _ in range(9000)]
    words += [
        word[: generator.randint(1, 2)] + "은는이가을를에서"[i % 8] for i, word in enumerate(words)
    ]
    yield "sentence1\tsentence2\tgold_label\n"
    for row in range(rows):
        if row % 3 == 0:
            # Its number makes the premise distinct.
            premise = " ".join(generator.choices(words, k=generator.randint(6, 18)))
            premise = f"{premise} {row // 3}번."
        hypothesis = " ".join(generator.choices(words, k=generator.randint(4, 10)))
        yield f"{premise}\t{hypothesis}.\t{LABELS[row % 3]}\n"


def original_triplets(path: str, seed: int) -> int:
    """The original's way, from sets in whatever order they have."""
    random.seed(seed)
    partners: dict[str, dict[str, set[str]]] = {}

    def add(sentence: str, other: str, label: str) -> None:
        if sentence not in partners:
            partners[sentence] = {"contradiction": set(), "entailment": set(), "neutral": set()}
        partners[sentence][label].add(other)

    with open(path, encoding="utf-8") as file:
        for row in csv.DictReader(file, delimiter="\t", quoting=csv.QUOTE_NONE):
            sentence1, sentence2 = row["sentence1"].strip(), row["sentence2"].strip()
            add(sentence1, sentence2, row["gold_label"])
            add(sentence2, sentence1, row["gold_label"])
    triplets = []
    for sentence, others in partners.items():
        if others["entailment"] and others["contradiction"]:
            for swap in (False, True):
                positive = random.choice(list(others["entailment"]))
                negative = random.choice(list(others["contradiction"]))
                pair = [positive, sentence] if swap else [sentence, positive]
                triplets.append([*pair, negative])
    return len(triplets)


def measure(way: str, path: str, seed: int) -> dict[str, float]:
    """Runs one way in this process. Memory is the process's peak, in GB of 10**9 bytes."""
    if way == "ours":
        from common.formats import read_nli_triplets

        def run() -> int:
            return len(read_nli_triplets([path], seed)[0])
    else:

        def run() -> int:
            return original_triplets(path, seed)

    wall, cpu = time.perf_counter(), time.process_time()
    triplets = run()
    wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    unit = 1 if sys.platform == "darwin" else 1024  # getrusage counts KiB but on macOS
    return {
        "cpu_seconds": cpu,
        "wall_seconds": wall,
        "peak_gb": peak * unit / 1e9,
        "triplets": triplets,
    }


def positive(text: str) -> int:
    """Returns a whole number above 0, as argparse's type."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number above 0")
    return int(text)


def main() -> None:
    """Runs what the command line asks for."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rows", type=positive, default=KORNLI_ROWS, help="fewer, to try it out")
    parser.add_argument("--repeats", type=positive, default=3)
    parser.add_argument("--seed", type=int, default=777)
    parser.add_argument("--child", nargs=2, metavar=("WAY", "FILE"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        print(json.dumps(measure(*args.child, args.seed)))
        return
    # Without data libraries here: a child's peak starts from the memory of its parent.
    laps: dict[str, list[dict[str, float]]] = {way: [] for way in WAYS}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "generated.tsv"
        print(f"writing {args.rows:,} rows", file=sys.stderr)
        with open(path, "w", encoding="utf-8", newline="") as file:
            file.writelines(generate_rows(args.rows, args.seed))
        megabytes = path.stat().st_size / 1e6
        for _ in range(args.repeats):
            for way in WAYS:
                command = [sys.executable, __file__, "--seed", str(args.seed)]
                command += ["--child", way, str(path)]
                done = subprocess.run(command, stdout=subprocess.PIPE, check=True)
                laps[way].append(json.loads(done.stdout))
                print(way, laps[way][-1], file=sys.stderr)
    medians = {
        way: {
            key: round(statistics.median(lap[key] for lap in laps[way]), 3)
            for key in ("cpu_seconds", "wall_seconds", "peak_gb")
        }
        for way in WAYS
    }
    (triplets,) = {lap["triplets"] for way in WAYS for lap in laps[way]}  # the same of all
    original, ours = (medians[way]["cpu_seconds"] for way in WAYS)
    report = {
        "rows": args.rows,
        "file_megabytes": round(megabytes, 1),
        "triplets": triplets,
        "repeats": args.repeats,
        **medians,
        "cpu_times_as_fast": round(original / ours, 2),
    }
    print(json.dumps(report))


if __name__ == "__main__":
    with command_line():
        main()
