"""Loads encoders, and writes them so that every version of sentence-transformers opens them.

Training, benchmark and export load models here, so that a model that is missing, gated, cut off,
damaged, unfinished or no encoder at all gives the same one clear line everywhere.
"""

from __future__ import annotations

import json
import os
import pickle
import re
import shutil
from pathlib import Path

import httpx2
import numpy as np
import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import (
    GatedRepoError,
    HFValidationError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
    XetDownloadError,
)
from safetensors import SafetensorError
from safetensors.torch import load_file
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import Pooling, Transformer
from transformers import AutoConfig

from common.command_line import UserError, expanded, file_sha256, first_line, form_of, read_json
from common.data import blob_id

CONFIGURATION_FILES = ["*.json", "*.txt", "*.model", "README.md"]
# Of the Hub's client, the proxy's address (ImportError, ValueError) and Xet (RuntimeError, too).
HUB_ERRORS = (OSError, httpx2.HTTPError, httpx2.InvalidURL, XetDownloadError)
HUB_ERRORS += (ImportError, RuntimeError, ValueError)
POOLINGS = ("mean", "cls", "max")
# Families that are computed as BERT is: trained without padding, exported by rows, to int8 too.
BERT_LIKES = ("bert", "roberta", "xlm-roberta", "camembert", "electra")
# The names that families have for their dropouts in config.json.
DROPOUTS = {
    "attention_dropout": ("attention_probs_dropout_prob", "attention_dropout", "attn_pdrop"),
    "hidden_dropout": (
        "hidden_dropout_prob", "dropout", "hidden_dropout", "embedding_dropout", "mlp_dropout",
        "resid_pdrop", "embd_pdrop",
    ),
}  # fmt: skip
LFS_POINTER = b"version https://git-lfs.github.com/spec/"
CHECK_SENTENCES = ["한 남자가 음식을 먹는다.", "가", "A man is eating 파스타 at 7시 30분. " * 40]
OTHER_RUNTIMES = ["onnx/*", "openvino/*", "checkpoints/*", "*.onnx"]
OLD_MODULES = ("Transformer", "Pooling", "Normalize", "Dense")
OLD_MODULE_TYPES = {kind: f"sentence_transformers.models.{kind}" for kind in OLD_MODULES}
# What Dense has learnt since 2.7, and what it did before.
NEW_DENSE_DEFAULTS = {
    "module_input_name": "sentence_embedding",
    "module_output_name": "sentence_embedding",
    "use_residual": False,
}
OLD_POOLING_KEYS = {
    "pooling_mode_cls_token": "cls",
    "pooling_mode_mean_tokens": "mean",
    "pooling_mode_max_tokens": "max",
    "pooling_mode_mean_sqrt_len_tokens": "mean_sqrt_len_tokens",
    "pooling_mode_weightedmean_tokens": "weightedmean",
    "pooling_mode_lasttoken": "lasttoken",
}


def fetch_model(name_or_path: str, *, trust_remote_code: bool = False) -> Path:
    """Returns a local folder that holds the model, downloaded from the Hub if it is no folder.

    Of each module the safetensors are fetched, its .bin where it has none, and Python code only
    where it is trusted.

    What comes from the Hub is checked against the hashes that the Hub gives; `HF_HUB_OFFLINE=1`
    uses the cache alone.

    Raises:
        UserError: no such model, no permission, download cut off or different from its hash.
    """
    path = expanded(name_or_path)
    if path.is_dir():
        return path
    try:
        wanted = [*CONFIGURATION_FILES, "*.safetensors"] + ["*.py"] * trust_remote_code
        folder = _snapshot(name_or_path, wanted)
        bins = [
            f"{module}pytorch_model*.bin"
            for module in _module_folders(folder)
            if not any((folder / module).glob("*.safetensors"))
        ]
        if bins:
            folder = _snapshot(name_or_path, wanted + bins)
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
    except LocalEntryNotFoundError as error:
        raise UserError(
            f"{name_or_path}: no such folder, not in the cache, and the Hub cannot be reached: "
            f"{first_line(error.__cause__ or error)}"
        ) from None
    except HUB_ERRORS as error:
        raise UserError(f"{name_or_path}: download failed: {first_line(error)}") from None
    _check_hashes(name_or_path, folder)
    return folder


def _snapshot(name: str, patterns: list[str]) -> Path:
    return Path(snapshot_download(name, allow_patterns=patterns, ignore_patterns=OTHER_RUNTIMES))


def _module_folders(folder: Path) -> list[str]:
    """Returns the folders of a model's modules, as prefixes of file names; "" is the top."""
    if not (folder / "modules.json").is_file():
        return [""]
    paths = {module["path"] for module in read_json(folder / "modules.json")}
    return sorted(f"{path}/" if path else "" for path in paths)


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
    with form_of(run_file, "not that of a run: the run folder is damaged"):
        finished = read_json(run_file).get("finished")
    if not finished:
        raise UserError(f"{folder}: an unfinished training run: go on with --resume")


def _check_kind(name: str, folder: Path) -> None:
    """Raises `UserError` for what is no sentence encoder, or has no weights in its files."""
    settings, config = (
        read_json(folder / file) if (folder / file).is_file() else {}
        for file in ("config_sentence_transformers.json", "config.json")
    )
    kind = settings.get("model_type", "SentenceTransformer")
    is_plain = not (folder / "modules.json").is_file()
    architecture = (config.get("architectures") or [""])[0]
    if kind != "SentenceTransformer":
        raise UserError(f"{name}: a {kind}, not a SentenceTransformer")
    if is_plain and architecture.endswith("ForSequenceClassification"):
        raise UserError(f"{name}: a classifier (CrossEncoder), not a sentence encoder")
    for path in weight_files(folder):
        with path.open("rb") as file:
            if file.read(len(LFS_POINTER)) == LFS_POINTER:
                raise UserError(
                    f"{path}: a Git-LFS pointer, not the weights: `git lfs pull` fetches them"
                )


def _check_no_code(name: str, folder: Path) -> None:
    config_file, modules_file = folder / "config.json", folder / "modules.json"
    carries_code = config_file.is_file() and "auto_map" in read_json(config_file)
    if modules_file.is_file():
        modules = read_json(modules_file)
        types = [module["type"] for module in modules]
        carries_code |= not all(type_.startswith("sentence_transformers.") for type_ in types)
        for module in modules:
            settings = folder / module["path"] / "config.json"
            if module["type"].endswith(".Dense") and settings.is_file():
                # The library takes another function, Tanh, in place of code it may not run.
                function = read_json(settings).get("activation_function", "torch.")
                carries_code |= not function.startswith("torch.")
    if carries_code:
        raise UserError(
            f"{name}: carries its own Python code, which could do anything on this machine; "
            "read it, and give --trust_remote_code if you trust it"
        )


def load_encoder(
    name_or_path: str,
    max_seq_length: int | None = None,
    *,
    pooling: str | None = None,
    dropouts: dict[str, float] | None = None,
    trust_remote_code: bool = False,
    device: str | None = None,
) -> SentenceTransformer:
    """Loads a Hub name or folder as a float32 sentence encoder.

    Args:
        name_or_path: Hub name, or folder (a run folder too).
        max_seq_length: tokens a sentence is cut to; None keeps what the model declares.
        pooling: one of `POOLINGS`, for a plain encoder, whose folder declares none (it has no
            modules.json); None is the mean over its tokens.
        dropouts: shares from 0 to below 1 by the names of `DROPOUTS`, for training; what is saved
            keeps the model's own.
        trust_remote_code: run Python code that the model carries.
        device: None takes the GPU where there is one.

    Raises:
        UserError: one line that says why the model cannot be used.
    """
    folder = fetch_model(name_or_path, trust_remote_code=trust_remote_code)
    check_finished(folder)
    if not (folder / "config.json").is_file() and not (folder / "modules.json").is_file():
        raise UserError(f"{name_or_path}: no encoder: neither config.json nor modules.json in it")
    try:
        _check_kind(name_or_path, folder)
        if not trust_remote_code:
            _check_no_code(name_or_path, folder)
        own = _own_dropouts(name_or_path, folder, dropouts or {}, trust_remote_code)
        config_kwargs = {key: dropouts[option] for option in own for key in own[option]}
        model_kwargs = {"dtype": torch.float32}
        if (folder / "modules.json").is_file():
            if pooling is not None:
                raise UserError(f"--pooling {pooling}: {name_or_path} declares its own pooling")
            model = SentenceTransformer(
                str(folder),
                device=device,
                trust_remote_code=trust_remote_code,
                local_files_only=True,
                model_kwargs=model_kwargs,
                config_kwargs=config_kwargs,
            )
        else:
            trust = {"trust_remote_code": trust_remote_code}
            transformer = Transformer(
                str(folder),
                max_seq_length=max_seq_length,
                model_kwargs=model_kwargs | trust,
                config_kwargs=config_kwargs | trust,
                processor_kwargs=trust,
            )
            width = transformer.get_embedding_dimension()
            modules = [transformer, Pooling(width, pooling_mode=pooling or "mean")]
            model = SentenceTransformer(modules=modules, device=device, local_files_only=True)
    except (OSError, ValueError, KeyError, RuntimeError, ImportError) as error:
        raise UserError(f"{name_or_path}: cannot be loaded: {first_line(error)}") from None
    except (AttributeError, TypeError) as error:
        why = f"is a JSON file in it of another form? {first_line(error)}"
        raise UserError(f"{name_or_path}: cannot be loaded: {why}") from None
    except SafetensorError as error:
        raise UserError(f"{name_or_path}: damaged weights: {first_line(error)}") from None
    except pickle.UnpicklingError:
        why = "its weights are a pickle that holds more than tensors: refused"
        raise UserError(f"{name_or_path}: {why}") from None
    for option in own:
        for key, value in own[option].items():
            setattr(model[0].model.config, key, value)
    if isinstance(model[0], Transformer):
        if len(model.tokenizer) <= len(model.tokenizer.all_special_tokens):  # made of no file
            raise UserError(f"{name_or_path}: no tokenizer.json and no vocabulary in it")
        positions = usable_positions(model)
        if max_seq_length is not None and positions is not None and max_seq_length > positions:
            raise UserError(
                f"--max_seq_length {max_seq_length}: {name_or_path} has {positions} positions"
            )
        if max_seq_length is not None:
            model.max_seq_length = max_seq_length
        elif _position_table(model) and None not in (positions, model.max_seq_length):
            # Declared, or the library's, which counts all rows of the table.
            model.max_seq_length = min(positions, model.max_seq_length)
    return model


def _own_dropouts(
    name: str, folder: Path, dropouts: dict[str, float], trust_remote_code: bool
) -> dict[str, dict[str, float]]:
    """Returns, for each dropout that is to change, the config's own values by their names."""
    if not dropouts:
        return {}
    where = folder / next(iter(_module_folders(folder)), "")
    config = AutoConfig.from_pretrained(
        where if (where / "config.json").is_file() else folder, trust_remote_code=trust_remote_code
    )
    own = {}
    for option in dropouts:
        own[option] = {
            key: getattr(config, key) for key in DROPOUTS[option] if hasattr(config, key)
        }
        if not own[option]:
            raise UserError(f"--{option}: {name} ({config.model_type}) has no such dropout")
    return own


def architecture(model: SentenceTransformer) -> str:
    """Names the encoder's family: one of `BERT_LIKES` only where it is computed as BERT is.

    Decoders are not, nor is code that a model carries, which may call itself bert.
    """
    kind, config = type(model[0].model), model[0].model.config
    if not kind.__module__.startswith("transformers."):
        return f"{kind.__name__}, code of its own,"
    return config.model_type + ", a decoder," * bool(getattr(config, "is_decoder", False))


def _position_table(model: SentenceTransformer) -> torch.nn.Embedding | None:
    table = getattr(getattr(model[0].model, "embeddings", None), "position_embeddings", None)
    return table if isinstance(table, torch.nn.Embedding) else None


def first_position(model: SentenceTransformer) -> int:
    """Returns the position of a sentence's first token.

    RoBERTa and what is made like it count from behind the padding index, others from 0.
    """
    padding = getattr(_position_table(model), "padding_idx", None)
    return 0 if padding is None else padding + 1


def usable_positions(model: SentenceTransformer) -> int | None:
    """Returns how many tokens the position table holds; None where there is none."""
    positions = getattr(model[0].model.config, "max_position_embeddings", None)
    if positions is None or positions < 1:  # XLNet says -1
        return None
    return positions - first_position(model)


def default_prompt(model: SentenceTransformer) -> str:
    """Returns what the model puts before every sentence unless told otherwise; "" for nothing."""
    return model.prompts.get(model.default_prompt_name) or ""


def weight_files(folder: Path) -> list[Path]:
    """Returns the files that hold a model folder's weights, sorted: those of all its modules."""
    files = []
    for module in _module_folders(folder):
        place = folder / module
        files += [*place.glob("*.safetensors")] or [*place.glob("pytorch_model*.bin")]
    return sorted(files)


def model_folder(model: SentenceTransformer) -> Path:
    """Returns the folder that the model was loaded from: a folder, or a snapshot of the cache."""
    return Path(model[0].model.name_or_path)


def save_encoder(
    model: SentenceTransformer, folder: Path, *, trust_remote_code: bool = False
) -> None:
    """Writes the encoder to a folder in the layout that sentence-transformers 2.7 and later read.

    What was written is loaded and compared before it gets its name, and modules.json gets its name
    last: before that, no library takes the folder for a whole model. Other files of the folder
    stay. The model card is the caller's.

    Raises:
        OSError: the written folder does not give the model's embeddings.
        SafetensorError, RuntimeError: it cannot be written.
    """
    staging = folder / ".saving"
    shutil.rmtree(staging, ignore_errors=True)
    try:
        model.save_pretrained(str(staging), create_model_card=False)
        _write_old_layout(model, staging)
        lift_code(staging)
        _check_saved(model, staging, trust_remote_code)
    except BaseException:
        shutil.rmtree(staging, ignore_errors=True)
        raise
    (folder / "modules.json").unlink(missing_ok=True)
    names = sorted(path.relative_to(staging) for path in staging.rglob("*") if path.is_file())
    last = [Path("config.json"), Path("modules.json")]
    for name in [*(name for name in names if name not in last), *last]:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        os.replace(staging / name, folder / name)
    shutil.rmtree(staging)


def lift_code(folder: Path) -> None:
    """Copies the code of a saved folder's modules to its top, the only place it is loaded from.

    sentence-transformers writes it beside each module alone.
    """
    for module in filter(None, _module_folders(folder)):
        for path in (folder / module).glob("*.py"):
            shutil.copy(path, folder / path.name)


def check_embeddings(model: SentenceTransformer) -> np.ndarray:
    """Returns what the model gives for `CHECK_SENTENCES`, (sentences, dimension) float32."""
    was_training = model.training
    embeddings = model.encode(CHECK_SENTENCES, show_progress_bar=False)
    model.train(was_training)
    return embeddings


def _check_saved(model: SentenceTransformer, folder: Path, trust_remote_code: bool) -> None:
    """Raises `OSError` unless the folder gives the embeddings that the model gives."""
    saved = load_encoder(str(folder), trust_remote_code=trust_remote_code, device=str(model.device))
    expected, found = check_embeddings(model), check_embeddings(saved)
    if not np.array_equal(expected, found):
        raise OSError(None, "what was saved does not give the model's embeddings", str(folder))


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
        elif kind == "Dense":
            config_name = f"{module['path']}/config.json"
            config = read_json(folder / config_name)
            new = {key for key, value in NEW_DENSE_DEFAULTS.items() if config.get(key) == value}
            rewrite(config_name, {key: config[key] for key in config if key not in new})
            # 2.7 reads this module's weights from nothing else (tensors alone, safe to unpickle).
            weights = load_file(folder / module["path"] / "model.safetensors")
            torch.save(weights, folder / module["path"] / "pytorch_model.bin")
    rewrite("modules.json", modules)
    lower_case = getattr(model[0], "do_lower_case", False)
    settings = {"max_seq_length": model.max_seq_length, "do_lower_case": lower_case}
    rewrite("sentence_bert_config.json", settings)
    tokenizer_config = read_json(folder / "tokenizer_config.json")
    if tokenizer_config.get("tokenizer_class") == "TokenizersBackend":
        tokenizer_config["tokenizer_class"] = "PreTrainedTokenizerFast"
    if isinstance(tokenizer_config.get("extra_special_tokens"), list):  # 4 wants names for them
        tokenizer_config["additional_special_tokens"] = tokenizer_config.pop("extra_special_tokens")
    rewrite("tokenizer_config.json", tokenizer_config)
