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
import platform
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list
from filelock import FileLock, Timeout
from huggingface_hub import EvalResult, HfApi, ModelCardData
from huggingface_hub.errors import HfHubHTTPError
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import Pooling

from common.checkpoints import last_checkpoint
from common.command_line import (
    REPOSITORY,
    UserError,
    file_sha256,
    first_line,
    read_json,
    stored_command,
    without_folder,
    write_json,
    write_text,
)
from common.encoders import model_folder, save_encoder, weight_files
from common.evaluation import SCORE_KEYS, SIMILARITIES, bootstrap, interval, spearman_line
from common.machine import cost_of, device_name, process_cost, training_precision
from common.results import nearest_published
from common.scoring import PairsEvaluator

PACKAGES = ("sentence-transformers", "transformers", "torch", "datasets", "accelerate", "numpy")
# Options that may differ between a run and its --resume: they change nothing about the training,
# or say where something is whose content is compared.
FREE_ON_RESUME = ("resume", "run_dir", "output_dir", "push_to_hub", "no_test", "trust_remote_code")
FREE_ON_RESUME += ("data_dir", "train_files", "model_name_or_path")
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
    if not (args.run_dir / "run.json").is_file():
        raise UserError(f"--resume: {args.run_dir}: no run.json: no run to go on with")
    run = read_json(args.run_dir / "run.json")
    if run["finished"]:
        raise UserError(f"{args.run_dir}: this run finished at {run['finished']}")
    # What is saved is what is averaged.
    free = FREE_ON_RESUME if args.average_checkpoints > 1 else (*FREE_ON_RESUME, "save_steps")
    for name, value in _options(args).items():
        before = run["options"].get(name)
        if name not in free and before != value:
            raise UserError(f"--resume: --{name} is {value} now and was {before}: not that run")


def open_run(
    args: argparse.Namespace, data: list[dict[str, Any]], model: SentenceTransformer
) -> Run:
    """Makes the run folder and its run.json, or finds those of --resume, and locks the folder.

    Args:
        args: the command line.
        data: what `data.file_record` says of each file.
        model: what training starts from.

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
            _begin(folder, args, begun)
    checkpoint, precision = broadcast_object_list([checkpoint, precision])
    return Run(folder, args, checkpoint, is_main, precision, lock)


def start_model(name_or_path: str, model: SentenceTransformer) -> dict[str, Any]:
    """Returns what identifies the model that training starts from: name, and hash of each file."""
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
    before, found = ({r["file"]: r["blob_id"] for r in side["data"]} for side in (run, now))
    for file in [*found, *before]:
        # Without the test set, and with it again, a run is the same one.
        if file in found and file in before and before[file] != found[file]:
            raise UserError(f"--resume: {file}: another content than the run in {folder} has")
    if run["start_model"]["weights"] != now["start_model"]["weights"]:
        name = now["start_model"]["name"]
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
            "device": device_name("cuda" if torch.cuda.is_available() else "cpu"),
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
        is_place = isinstance(value, Path) or name == "model_name_or_path"
        return without_folder(str(value)) if is_place else value

    return {name: stored(name, value) for name, value in vars(args).items()}


def _now() -> str:
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")


def _git_commit() -> str | None:
    command = ["git", "-C", str(REPOSITORY), "rev-parse", "HEAD"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None  # not a clone: a downloaded archive has no commit


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
    if scores["before_training"]:
        print(f"{dev.file} before training:  {spearman_line(scores['before_training'])}")
    print(f"{dev.file}, best ({result.chosen}): {spearman_line(result.scores)}")
    parts = result.figures["parts"]
    if test is not None:
        with cost_of("test scores", parts):
            embeddings = test.embed(result.model)
            test_scores = test.scores_of(*embeddings)
            samples = bootstrap(*embeddings, test.pairs["score"])["cosine_spearman"]
        low, high = interval(samples)
        scores |= {"test_file": test.file, "test_pairs": len(test.pairs), "test": test_scores}
        scores["test_interval"] = [low, high]
        print(f"{test}, x100:")
        print("  ".join(key for key in SCORE_KEYS))
        print("  ".join(f"{100 * test_scores[key]:{len(key)}.2f}" for key in SCORE_KEYS))
        for key, value in test_scores.items():
            if key.startswith("cosine_spearman@"):
                print(f"cosine_spearman at {key.split('@')[1]}: {100 * value:.2f}")
        score = test_scores["cosine_spearman"]
        print(f"cosine_spearman {100 * score:.2f} [{100 * low:.2f}, {100 * high:.2f}] (95%)")
        records = {record["file"]: record for record in read_json(run.folder / "run.json")["data"]}
        if test.file in records and records[test.file]["published"]:
            for name, value in nearest_published(REPOSITORY / "results", score):
                print(f"published: {100 * value:.2f} {name}")
    write_json(run.folder / "scores.json", scores)
    with cost_of("saving", parts):
        plot_scores(run.folder / "scores.png", dev.file, result.evaluations)
        write_text(run.folder / "README.md", model_card(run, result.model, scores))
        save_encoder(result.model, run.folder, trust_remote_code=run.args.trust_remote_code)
    content = read_json(run.folder / "run.json") | result.figures
    content |= {"weights": weight_hashes(run.folder), "whole": process_cost(), "finished": _now()}
    write_json(run.folder / "run.json", content)
    if run.lock is not None:
        run.lock.release()
    print(f"finished: {run.folder}")
    if run.args.push_to_hub:
        push(run.folder, run.args.push_to_hub)


def plot_scores(path: Path, dev_file: str, evaluations: list[tuple[int, Scores]]) -> None:
    """Draws the four dev Spearman correlations over the steps."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 4), layout="constrained")
    for name in SIMILARITIES:
        values = [100 * scores[f"{name}_spearman"] for _, scores in evaluations]
        axes.plot([step for step, _ in evaluations], values, marker="o", label=name)
    axes.set(xlabel="optimizer step", ylabel="dev Spearman x100", title=dev_file)
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=120)
    plt.close(figure)


def model_card(run: Run, model: SentenceTransformer, scores: dict[str, Any]) -> str:
    """Returns the run folder's README.md: a model card with the test scores as metadata."""
    test, test_file = scores.get("test", {}), scores.get("test_file", "")
    base = run.args.model_name_or_path
    pooling = " and ".join(m.pooling_mode for m in model if isinstance(m, Pooling)) or "no"
    card_data = ModelCardData(
        language="ko",
        license="cc-by-sa-4.0",  # KorNLUDatasets and the klue models ask for it
        library_name="sentence-transformers",
        pipeline_tag="sentence-similarity",
        tags=["sentence-transformers", "sentence-similarity", "feature-extraction"],
        base_model=None if Path(base).exists() else base,
        model_name=run.folder.name,
        eval_results=[
            EvalResult(
                task_type="semantic-similarity",
                dataset_type=test_file,
                dataset_name="KorSTS test" if scores["test_pairs"] == 1379 else test_file,
                metric_type=key,
                metric_value=round(100 * test[key], 2),
            )
            for key in SCORE_KEYS
            if key in test
        ]
        or None,
    )
    return f"""---
{card_data.to_yaml()}
---

# {run.folder.name}

A Korean sentence encoder: {pooling} pooling, {run.args.max_seq_length} tokens, trained from
`{Path(base).name if Path(base).exists() else base}` with `{Path(sys.argv[0]).name}` of
ko-sentence-transformers (seed {run.args.seed}). Options, data and versions: `run.json`; all scores:
`scores.json`. The training data, KorNLUDatasets, is CC BY-SA 4.0.

```python
from sentence_transformers import SentenceTransformer

model = SentenceTransformer("PATH_OR_NAME")
embeddings = model.encode(["안녕하세요?", "한국어 문장 임베딩을 위한 모델입니다."])
```

Dev cosine Spearman x100 ({scores["dev_file"]}, {scores["dev_pairs"]:,} pairs): \
{100 * scores["dev"]["cosine_spearman"]:.2f}.
"""


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
    except (HfHubHTTPError, OSError, ValueError) as error:
        reason = first_line(error)
        sys.exit(f"error: {repository}: not uploaded: {reason}; {folder} is whole")
    print(f"uploaded: {repository}")
