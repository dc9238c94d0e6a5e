"""Loads encoders, and writes them so that every version of sentence-transformers opens them.

Training, benchmark and export load models here, so that a model that is missing, gated, cut off,
damaged, unfinished or no encoder at all gives the same one clear line everywhere.
"""

from __future__ import annotations

import json
import os
import pickle
import platform
import re
import shutil
from pathlib import Path

import httpx2
import numpy as np
import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from safetensors import SafetensorError
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import Pooling, Transformer

from common.command_line import UserError, file_sha256, first_line, read_json
from common.data import blob_id

CONFIGURATION_FILES = ["*.json", "*.txt", "*.model", "README.md"]
SAFETENSORS_FILES = ["*.safetensors"]
BIN_FILES = ["pytorch_model*.bin", "*/pytorch_model.bin"]
OTHER_RUNTIMES = ["onnx/*", "openvino/*", "checkpoints/*", "*.onnx"]
OLD_MODULE_TYPES = {
    "Transformer": "sentence_transformers.models.Transformer",
    "Pooling": "sentence_transformers.models.Pooling",
    "Normalize": "sentence_transformers.models.Normalize",
    "Dense": "sentence_transformers.models.Dense",
}
OLD_POOLING_KEYS = {
    "pooling_mode_cls_token": "cls",
    "pooling_mode_mean_tokens": "mean",
    "pooling_mode_max_tokens": "max",
    "pooling_mode_mean_sqrt_len_tokens": "mean_sqrt_len_tokens",
    "pooling_mode_weightedmean_tokens": "weightedmean",
    "pooling_mode_lasttoken": "lasttoken",
}


def fetch_model(name_or_path: str) -> Path:
    """Returns a local folder that holds the model, downloaded from the Hub if it is no folder.

    What comes from the Hub is checked against the hashes that the Hub gives; `HF_HUB_OFFLINE=1`
    uses the cache alone.

    Raises:
        UserError: no such model, no permission, download cut off or different from its hash.
    """
    path = Path(name_or_path).expanduser()
    if path.is_dir():
        return path
    try:
        folder = _snapshot(name_or_path, CONFIGURATION_FILES + SAFETENSORS_FILES)
        if not any(folder.rglob("*.safetensors")):
            folder = _snapshot(name_or_path, CONFIGURATION_FILES + BIN_FILES)
    except HFValidationError:
        raise UserError(f"{name_or_path}: no such folder, and not a name on the Hub") from None
    except GatedRepoError:
        raise UserError(
            f"{name_or_path}: gated: accept its terms on the Hub and set HF_TOKEN"
        ) from None
    except (RepositoryNotFoundError, RevisionNotFoundError):
        raise UserError(
            f"{name_or_path}: no such folder, and no such model on the Hub (or it is private)"
        ) from None
    except LocalEntryNotFoundError:
        raise UserError(
            f"{name_or_path}: no such folder, not in the cache, and the Hub cannot be reached"
        ) from None
    except (EntryNotFoundError, HfHubHTTPError, httpx2.HTTPError, OSError) as error:
        raise UserError(f"{name_or_path}: download failed: {first_line(error)}") from None
    _check_hashes(name_or_path, folder)
    return folder


def _snapshot(name: str, patterns: list[str]) -> Path:
    return Path(snapshot_download(name, allow_patterns=patterns, ignore_patterns=OTHER_RUNTIMES))


def _check_hashes(name: str, folder: Path) -> None:
    """Compares each file with the hash its cache entry is named by, and removes a wrong one."""
    for path in sorted(folder.rglob("*")):
        blob = path.resolve()
        if not path.is_file() or not re.fullmatch(r"[0-9a-f]{40}|[0-9a-f]{64}", blob.name):
            continue
        actual = file_sha256(blob) if len(blob.name) == 64 else blob_id(blob)
        if actual != blob.name:
            path.unlink()
            blob.unlink(missing_ok=True)
            raise UserError(
                f"{name}: {path.relative_to(folder)} is not what the Hub's hash says "
                "(removed from the cache): try again"
            )


def check_finished(folder: Path) -> None:
    """Raises `UserError` for the folder of a training run that has not ended."""
    run_file = folder / "run.json"
    if not run_file.is_file():
        return
    try:
        finished = read_json(run_file).get("finished")
    except ValueError:
        raise UserError(f"{run_file}: not JSON: the run folder is damaged") from None
    if not finished:
        raise UserError(f"{folder}: an unfinished training run: go on with --resume")


def _check_no_code(name: str, folder: Path) -> None:
    config_file, modules_file = folder / "config.json", folder / "modules.json"
    carries_code = config_file.is_file() and "auto_map" in read_json(config_file)
    if modules_file.is_file():
        modules = read_json(modules_file)
        carries_code |= any(
            not module["type"].startswith("sentence_transformers.") for module in modules
        )
    if carries_code:
        raise UserError(
            f"{name}: carries its own Python code, which could do anything on this machine; "
            "read it, and give --trust_remote_code if you trust it"
        )


def load_encoder(
    name_or_path: str,
    max_seq_length: int | None = None,
    *,
    trust_remote_code: bool = False,
    device: str | None = None,
) -> SentenceTransformer:
    """Loads a Hub name or folder as a float32 sentence encoder.

    A folder without modules.json is a plain encoder and gets mean pooling over its tokens.

    Args:
        name_or_path: Hub name, or folder (a run folder too).
        max_seq_length: tokens a sentence is cut to; None keeps what the model declares.
        trust_remote_code: run Python code that the model carries.
        device: None takes the GPU where there is one.

    Raises:
        UserError: one line that says why the model cannot be used.
    """
    folder = fetch_model(name_or_path)
    check_finished(folder)
    if not (folder / "config.json").is_file() and not (folder / "modules.json").is_file():
        raise UserError(f"{name_or_path}: no encoder: neither config.json nor modules.json in it")
    try:
        if not trust_remote_code:
            _check_no_code(name_or_path, folder)
        model_kwargs = {"dtype": torch.float32}
        if (folder / "modules.json").is_file():
            model = SentenceTransformer(
                str(folder),
                device=device,
                trust_remote_code=trust_remote_code,
                local_files_only=True,
                model_kwargs=model_kwargs,
            )
        else:
            transformer = Transformer(
                str(folder),
                max_seq_length=max_seq_length,
                model_kwargs={**model_kwargs, "trust_remote_code": trust_remote_code},
                config_kwargs={"trust_remote_code": trust_remote_code},
                processor_kwargs={"trust_remote_code": trust_remote_code},
            )
            pooling = Pooling(transformer.get_embedding_dimension(), pooling_mode="mean")
            model = SentenceTransformer(
                modules=[transformer, pooling], device=device, local_files_only=True
            )
    except (OSError, ValueError, KeyError, RuntimeError, ImportError) as error:
        raise UserError(f"{name_or_path}: cannot be loaded: {first_line(error)}") from None
    except SafetensorError as error:
        raise UserError(f"{name_or_path}: damaged weights: {first_line(error)}") from None
    except pickle.UnpicklingError:
        raise UserError(
            f"{name_or_path}: its weights are a pickle that holds more than tensors: refused"
        ) from None
    if max_seq_length is not None:
        positions = getattr(model[0].model.config, "max_position_embeddings", None)
        if positions is not None and max_seq_length > positions:
            raise UserError(
                f"--max_seq_length {max_seq_length}: {name_or_path} has {positions} positions"
            )
        model.max_seq_length = max_seq_length
    return model


def device_name(device: str | torch.device) -> str:
    """Returns the GPU's name, or the processor's."""
    if torch.device(device).type == "cuda":
        return torch.cuda.get_device_name(device)
    cpuinfo = Path("/proc/cpuinfo")
    text = cpuinfo.read_text() if cpuinfo.is_file() else ""
    found = re.search(r"^model name\s*:\s*(.+)$", text, re.MULTILINE)
    return found[1].strip() if found else platform.processor() or platform.machine()


def default_prompt(model: SentenceTransformer) -> str:
    """Returns what the model puts before every sentence unless told otherwise; "" for nothing."""
    return model.prompts.get(model.default_prompt_name) or ""


def weight_files(folder: Path) -> list[Path]:
    """Returns the files that hold a model folder's weights, sorted: those of all its modules."""
    files = [*folder.glob("*.safetensors"), *folder.glob("*/*.safetensors")]
    if not files:
        files = [*folder.glob("pytorch_model*.bin"), *folder.glob("*/pytorch_model*.bin")]
    return sorted(files)


def save_encoder(model: SentenceTransformer, folder: Path) -> None:
    """Writes the encoder to a folder in the layout that sentence-transformers 2.7 and later read.

    modules.json gets its name last: before that, no library takes the folder for a whole model.
    Other files of the folder stay. The model card is the caller's.
    """
    staging = folder / ".saving"
    shutil.rmtree(staging, ignore_errors=True)
    model.save_pretrained(str(staging), create_model_card=False)
    _write_old_layout(model, staging)
    (folder / "modules.json").unlink(missing_ok=True)
    names = sorted(path.relative_to(staging) for path in staging.rglob("*") if path.is_file())
    last = [Path("config.json"), Path("modules.json")]
    for name in [*(name for name in names if name not in last), *last]:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        os.replace(staging / name, folder / name)
    shutil.rmtree(staging)


def _write_old_layout(model: SentenceTransformer, folder: Path) -> None:
    """Rewrites the files whose form changed with sentence-transformers 6 and transformers 5."""

    def rewrite(name: str, content: dict | list) -> None:
        (folder / name).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")

    modules = read_json(folder / "modules.json")
    for module in modules:
        kind = module["type"].rsplit(".", 1)[-1]
        module["type"] = OLD_MODULE_TYPES.get(kind, module["type"])
        if kind == "Pooling":
            config_name = f"{module['path']}/config.json"
            config = read_json(folder / config_name)
            modes = np.atleast_1d(config["pooling_mode"])
            old = {key: mode in modes for key, mode in OLD_POOLING_KEYS.items()}
            old["include_prompt"] = config.get("include_prompt", True)
            rewrite(config_name, {"word_embedding_dimension": config["embedding_dimension"], **old})
    rewrite("modules.json", modules)
    rewrite(
        "sentence_bert_config.json",
        {"max_seq_length": model.max_seq_length, "do_lower_case": False},
    )
    tokenizer_config = read_json(folder / "tokenizer_config.json")
    if tokenizer_config.get("tokenizer_class") == "TokenizersBackend":
        tokenizer_config["tokenizer_class"] = "PreTrainedTokenizerFast"
        rewrite("tokenizer_config.json", tokenizer_config)
