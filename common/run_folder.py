"""A training run on disk: what it was told, its checkpoints, its scores, what it leaves.

A run folder holds the finished model at its top and beside it run.json (command, options,
versions, data, times), scores.json, scores.png, logs/ (TensorBoard) and checkpoints/. A run is
finished when run.json says when. Only the first of several processes writes.
"""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import importlib.metadata
import itertools
import os
import platform
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list
from filelock import FileLock, Timeout
from huggingface_hub import HfApi
from sentence_transformers import SentenceTransformer

from common.checkpoints import last_checkpoint
from common.command_line import (
    REPOSITORY,
    UserError,
    file_sha256,
    first_line,
    form_of,
    read_json,
    stored_command,
    without_folder,
    write_json,
    write_text,
    writing,
)
from common.data import is_korsts_test
from common.encoders import HUB_ERRORS, model_folder, save_encoder, weight_files
from common.evaluation import SCORE_KEYS, SIMILARITIES, bootstrap, interval, spearman_line
from common.machine import cost_of, device_name, process_cost, training_precision
from common.model_card import model_card
from common.results import nearest_published
from common.scoring import PairsEvaluator

PACKAGES = ("sentence-transformers", "transformers", "torch", "datasets", "accelerate", "numpy")
# Options that may differ between a run and its --resume: they change nothing about the training,
# or say where something is whose content is compared.
FREE_ON_RESUME = ("resume", "run_dir", "output_dir", "push_to_hub", "no_test", "trust_remote_code")
FREE_ON_RESUME += ("data_dir", "train_files", "train_file", "dev_file", "test_file")
FREE_ON_RESUME += ("model_name_or_path", "guide")

Scores = dict[str, float]


@dataclasses.dataclass(frozen=True)
class Run:
    """A run that has been opened.

    Attributes:
        folder: where everything of it goes.
        args: what the command line said; never changed.
        checkpoint: the whole checkpoint that --resume goes on from; None starts at step 0.
        is_main: whether this is the process that writes.
        precision: fp32, bf16 or fp16, what training computes in: --precision auto is decided once.
        lock: keeps other runs out of the folder until it is finished or the process ends.
    """

    folder: Path
    args: argparse.Namespace
    checkpoint: Path | None
    is_main: bool
    precision: str
    lock: FileLock | None = None


@dataclasses.dataclass(frozen=True)
class Result:
    """What training gave.

    Attributes:
        model: the weights that dev liked best.
        dev: what scored them: its file name and pairs stand beside the scores.
        evaluations: (step, dev scores) of each evaluation; step 0 is before training.
        best_step: that of the best checkpoint.
        tried: dev scores of the best checkpoint and of the means of weights, where any were asked
            for, by name.
        chosen: name of the weights in `model`: `step N`, or one of `tried`.
        figures: steps, precision, prompt and cost of each part, as run.json keeps them.
    """

    model: SentenceTransformer
    dev: PairsEvaluator
    evaluations: list[tuple[int, Scores]]
    best_step: int
    tried: dict[str, Scores]
    chosen: str
    figures: dict[str, Any]

    @property
    def scores(self) -> Scores:
        """The dev scores of `model`."""
        return self.tried.get(self.chosen) or dict(self.evaluations)[self.best_step]


# --- Opening and going on --------------------------------------------------------------------


def check_folder(args: argparse.Namespace) -> None:
    """Raises `UserError` where --run_dir and --resume do not fit what is there already.

    Before data is read or a model loaded: options that differ from those of the run are found here.
    """
    if args.resume and args.run_dir is None:
        raise UserError("--resume: give the folder to go on in as --run_dir")
    if not PartialState().is_main_process:
        return  # the first process answers for the folder, and makes it
    if not args.resume:
        # What a run leaves that is killed while it begins, its lock, is nothing.
        if args.run_dir and args.run_dir.exists() and any(args.run_dir.glob("[!.]*")):
            raise UserError(f"--run_dir {args.run_dir}: not empty; --resume goes on with a run")
        return
    file = args.run_dir / "run.json"
    if not file.is_file():
        raise UserError(f"--resume: {args.run_dir}: no run.json: no run to go on with")
    with form_of(f"--resume: {file}", "damaged: train again in another folder"):
        run = read_json(file)
        finished, before = run["finished"], dict(run["options"])
        run["data"], run["processes"], run["precision"]
    if finished:
        raise UserError(f"{args.run_dir}: this run finished at {finished}")
    # What is saved is what is averaged.
    free = {*FREE_ON_RESUME} if args.average_checkpoints > 1 else {*FREE_ON_RESUME, "save_steps"}
    if args.leave_out:
        free -= {"no_test"}  # what is left out depends on it
    for name, value in _options(args).items():
        if name not in free and before.get(name) != value:
            was = before.get(name)
            raise UserError(f"--resume: --{name} is {value} now and was {was}: not that run")


def open_run(
    args: argparse.Namespace,
    data: list[dict[str, Any]],
    model: SentenceTransformer,
    guide: SentenceTransformer | None = None,
) -> Run:
    """Makes the run folder and its run.json, or finds those of --resume, and locks the folder.

    Args:
        args: the command line.
        data: what `splits.read_data` says of each file.
        model: what training starts from.
        guide: what --guide names.

    Raises:
        UserError: another run is at work there, it began with other data or another model, or a
            checkpoint is damaged.
    """
    folder = args.run_dir
    if folder is None:
        name = args.model_name_or_path.rstrip("/").replace("/", "-").lstrip(".-")
        time_text = datetime.datetime.now().strftime("%Y-%m-%d_%H-%M-%S")
        folder = args.output_dir / f"{args.output_prefix}{name}-{time_text}"
    # Every process takes the first one's folder: clocks differ.
    (folder,) = broadcast_object_list([folder])
    is_main, lock, checkpoint = PartialState().is_main_process, None, None
    precision = args.precision
    if is_main:
        begun = {"data": data, "start_model": start_model(args.model_name_or_path, model)}
        begun["guide"] = start_model(args.guide, guide) if guide else None
        begun["processes"] = PartialState().num_processes
        folder.mkdir(parents=True, exist_ok=True)
        lock = FileLock(folder / ".lock", timeout=0)
        try:
            lock.acquire()
        except Timeout:
            raise UserError(f"{folder}: another run is at work in this folder") from None
        if args.resume:
            _check_same_contents(folder, begun)
            checkpoint = last_checkpoint(folder / "checkpoints")
            precision = read_json(folder / "run.json")["precision"]
        else:
            begun["precision"] = precision = training_precision(args.precision)
            begun["device"] = device_name(model.device)
            _begin(folder, args, begun)
    checkpoint, precision = broadcast_object_list([checkpoint, precision])
    return Run(folder, args, checkpoint, is_main, precision, lock)


def start_model(name_or_path: str, model: SentenceTransformer) -> dict[str, Any]:
    """Returns what identifies a model that a run begins with: name, and hash of each file."""
    return {
        "name": without_folder(name_or_path),
        "weights": weight_hashes(model_folder(model)),
    }


def weight_hashes(folder: Path) -> dict[str, str]:
    """Returns the SHA-256 of each file of a model folder's weights, by its path in the folder."""
    files = weight_files(folder)
    return {path.relative_to(folder).as_posix(): file_sha256(path) for path in files}


def _check_same_contents(folder: Path, now: dict[str, Any]) -> None:
    """Raises `UserError` where data or start model are not those that the run began with."""
    run = read_json(folder / "run.json")
    for split in ("train", "dev", "test"):
        before, found = (
            [r for r in side["data"] if r.get("split") == split] for side in (run, now)
        )
        # Without the test set, and with it again, a run is the same one.
        if split == "test" and not (before and found):
            continue
        for old, new in itertools.zip_longest(before, found):
            if old is None or new is None or old["blob_id"] != new["blob_id"]:
                name = (new or old)["file"]
                raise UserError(
                    f"--resume: {name}: another content than the run in {folder} has for {split}"
                )
    for kind in ("start_model", "guide"):
        before, found = run.get(kind) or {}, now[kind] or {}
        if before.get("weights") != found.get("weights"):
            name = found.get("name") or before["name"]
            raise UserError(f"--resume: {name}: other weights than the run in {folder} began with")
    if run["processes"] != now["processes"]:
        print(
            f"note: {now['processes']} processes now, {run['processes']} before: the order of "
            "dropout's draws is another one",
            file=sys.stderr,
        )


def _begin(folder: Path, args: argparse.Namespace, begun: dict[str, Any]) -> None:
    write_json(
        folder / "run.json",
        {
            "command": stored_command(),
            "options": _options(args),
            **begun,
            "versions": {name: importlib.metadata.version(name) for name in PACKAGES}
            | {"python": platform.python_version()},
            "git_commit": _git_commit(),
            "threads": torch.get_num_threads(),
            "started": _now(),
            "finished": None,
        },
    )


def _options(args: argparse.Namespace) -> dict[str, Any]:
    """Returns the options as they are stored: without folders, which are this machine's alone."""

    def stored(name: str, value: Any) -> Any:
        if isinstance(value, list):
            return [stored(name, part) for part in value]
        is_place = isinstance(value, Path) or (name in ("model_name_or_path", "guide") and value)
        return without_folder(str(value)) if is_place else value

    return {name: stored(name, value) for name, value in vars(args).items()}


def _now() -> str:
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")


def _git_commit() -> str | None:
    # The second fails where the commit is not of these scripts: an archive in somebody's clone.
    command = ["git", "-C", str(REPOSITORY), "rev-parse", "HEAD", "HEAD:./common"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None  # not a clone: a downloaded archive has no commit
    return done.stdout.split()[0]


# --- What a run leaves -----------------------------------------------------------------------


def finish_run(run: Run, result: Result, test: PairsEvaluator | None) -> None:
    """Scores the best model on the test set, once, and turns the run folder into a finished one."""
    if not run.is_main:
        return
    dev, dev_scores = result.dev, dict(result.evaluations)
    scores = {
        "dev_file": dev.file,
        "dev_pairs": len(dev.pairs),
        "before_training": dev_scores.get(0),
        "evaluations": [{"step": step, **values} for step, values in dev_scores.items() if step],
        "best_step": result.best_step,
        "tried": result.tried,
        "chosen": result.chosen,
        "dev": result.scores,
    }
    said = []  # printed when the run is whole: whoever reads it may be gone (a closed pipe)
    if scores["before_training"]:
        said.append(f"{dev.file} before training:  {spearman_line(scores['before_training'])}")
    said.append(f"{dev.file}, best ({result.chosen}): {spearman_line(result.scores)}")
    content = read_json(run.folder / "run.json") | result.figures
    parts = content["parts"]
    if test is not None:
        with cost_of("test scores", parts):
            embeddings = test.embed(result.model)
            test_scores = test.scores_of(*embeddings)
            samples = bootstrap(*embeddings, test.pairs["score"])["cosine_spearman"]
        low, high = interval(samples)
        scores |= {"test_file": test.file, "test_pairs": len(test.pairs), "test": test_scores}
        scores["test_interval"] = [low, high]
        said.append(f"{test}, x100:")
        said.append("  ".join(key for key in SCORE_KEYS))
        said.append("  ".join(f"{100 * test_scores[key]:{len(key)}.2f}" for key in SCORE_KEYS))
        for key, value in test_scores.items():
            if key.startswith("cosine_spearman@"):
                said.append(f"cosine_spearman at {key.split('@')[1]}: {100 * value:.2f}")
        score = test_scores["cosine_spearman"]
        ends = f"[{100 * low:.2f}, {100 * high:.2f}]"
        said.append(f"{test.file}: cosine_spearman {100 * score:.2f}, 95% interval {ends}")
        if is_korsts_test(test.file, content["data"]):
            for name, value in nearest_published(REPOSITORY / "results", score):
                said.append(f"published: {100 * value:.2f} {name}")
    write_json(run.folder / "scores.json", scores)
    with cost_of("saving", parts):
        plot_scores(run.folder / "scores.png", dev.file, result.evaluations)
        card = model_card(run.folder.name, run.args, content["data"], result.model, scores)
        write_text(run.folder / "README.md", card)
        with writing(run.folder):
            save_encoder(result.model, run.folder, trust_remote_code=run.args.trust_remote_code)
    content |= {"weights": weight_hashes(run.folder), "whole": process_cost(), "finished": _now()}
    write_json(run.folder / "run.json", content)
    if run.lock is not None:
        run.lock.release()
    print("\n".join([*said, f"finished: {run.folder}"]))
    if run.args.push_to_hub:
        push(run.folder, run.args.push_to_hub)


def plot_scores(path: Path, dev_file: str, evaluations: list[tuple[int, Scores]]) -> None:
    """Draws the four dev Spearman correlations over the steps."""
    os.environ["MPLBACKEND"] = "Agg"  # a notebook's own may be one that is not installed here
    import matplotlib.pyplot as plt

    plt.rcdefaults()  # whatever matplotlibrc is here
    figure, axes = plt.subplots(figsize=(7, 4), layout="constrained")
    for name in SIMILARITIES:
        values = [100 * scores[f"{name}_spearman"] for _, scores in evaluations]
        axes.plot([step for step, _ in evaluations], values, marker="o", label=name)
    title = dev_file if dev_file.isascii() else ""  # matplotlib's own font has no Hangul
    axes.set(xlabel="optimizer step", ylabel="dev Spearman x100", title=title)
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=120)
    plt.close(figure)


def push(folder: Path, repository: str) -> None:
    """Uploads the finished folder; a failure leaves it as it is and ends with status 1."""
    api = HfApi()
    try:
        api.create_repo(repository, exist_ok=True)
        api.upload_folder(
            repo_id=repository,
            folder_path=folder,
            ignore_patterns=["checkpoints/*", "logs/*", ".*"],
        )
    except HUB_ERRORS as error:
        reason = first_line(error)
        sys.exit(f"error: {repository}: not uploaded: {reason}; {folder} is whole")
    print(f"uploaded: {repository}")
