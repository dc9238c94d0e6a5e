"""Exported files and what programs in other languages have to get from them."""

from __future__ import annotations

import json
from pathlib import Path

from commands import SAMPLES, run_script
from encoders import edit_json, write_family
from sentence_transformers import SentenceTransformer
from transformers import BertConfig, PreTrainedConfig, RobertaConfig

SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
SIZES |= {"intermediate_size": 64, "initializer_range": 0.2}


def bert() -> BertConfig:
    return BertConfig(**SIZES, max_position_embeddings=640)


def roberta() -> RobertaConfig:
    """One token type, so no such input; positions counted from the padding index 1."""
    return RobertaConfig(**SIZES, max_position_embeddings=130, type_vocab_size=1)


ENCODERS: dict[str, tuple[PreTrainedConfig, int, str]] = {  # config, longest input, prompt
    "bert": (bert(), 64, ""),
    "bert-prompt": (bert(), 600, "질문: "),  # longer than what some tokenizers take by default
    "roberta": (roberta(), 128, ""),
    "roberta-prompt": (roberta(), 128, "글 😀 "),
}
TOKENIZERS = ("opening", "closings", "wordpiece")


def write_tokenizer(folder: Path, name: str) -> None:
    """Changes the tokenizer of a plain encoder to one that is cut, or splits, in another way."""
    path = folder / "tokenizer.json"
    content = json.loads(path.read_text(encoding="utf-8"))
    pieces = content["post_processor"]["single"]
    if name == "opening":
        content["post_processor"]["single"] = pieces[:2]
    elif name == "closings":
        content["post_processor"]["single"] = [*pieces, pieces[-1]]
    elif name == "wordpiece":
        content["model"] |= {"type": "WordPiece", "continuing_subword_prefix": "##"}
        content["model"]["max_input_chars_per_word"] = 100
        content["pre_tokenizer"] = {"type": "BertPreTokenizer"}
        content["normalizer"] = {"type": "BertNormalizer", "lowercase": False}
        content["normalizer"] |= {"clean_text": True, "handle_chinese_chars": True}
        content["normalizer"]["strip_accents"] = None
    edit_json(path, **content)


def export_with_golden(model: Path, output: Path) -> None:
    """Exports fp32 and int8, and their golden file; calibrates and scores on the samples."""
    # What is measured on the samples says nothing about a model.
    arguments = ["--quantize", "int8", "--data_dir", SAMPLES, "--force", "--no_speed"]
    arguments += ["--output", output, "--golden", output.with_suffix(".golden.json")]
    done = run_script("onnx/export_onnx.py", "--model", model, *arguments)
    assert done.returncode == 0, done.stderr


def write_exports(folder: Path, offline_encoder: Path) -> Path:
    """Writes fp32 and int8 files of four tiny encoders and of the real one; returns the folder.

    Also fp32 files of encoders with other tokenizers.
    """
    for name, (config, length, prompt) in ENCODERS.items():
        plain = write_family(folder / "encoders" / name, config, model_max_length=length)
        model = SentenceTransformer(str(plain), device="cpu")
        if prompt:
            model.prompts, model.default_prompt_name = {"sts": prompt}, "sts"
        model.max_seq_length = length
        model.save_pretrained(str(plain.with_name(f"{name}-run")), create_model_card=False)
        export_with_golden(plain.with_name(f"{name}-run"), folder / f"{name}.onnx")
    for name in TOKENIZERS:
        plain = write_family(folder / "encoders" / name, bert(), model_max_length=64)
        write_tokenizer(plain, name)
        options = ["--output", folder / f"{name}.onnx", "--golden", folder / f"{name}.golden.json"]
        done = run_script("onnx/export_onnx.py", "--model", plain, *options)
        assert done.returncode == 0, done.stderr
    export_with_golden(offline_encoder, folder / "e5-small-ko.onnx")
    return folder
