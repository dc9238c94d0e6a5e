"""Exported files and what programs in other languages have to get from them."""

from __future__ import annotations

from pathlib import Path

from commands import SAMPLES, run_script
from encoders import write_family
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


def export_with_golden(model: Path, output: Path) -> None:
    """Exports fp32 and int8, and their golden file; calibrates and scores on the samples."""
    # What is measured on the samples says nothing about a model.
    arguments = ["--quantize", "int8", "--data_dir", SAMPLES, "--force", "--no_speed"]
    arguments += ["--output", output, "--golden", output.with_suffix(".golden.json")]
    done = run_script("onnx/export_onnx.py", "--model", model, *arguments)
    assert done.returncode == 0, done.stderr


def write_exports(folder: Path, offline_encoder: Path) -> Path:
    """Writes fp32 and int8 files of four tiny encoders and of the real one; returns the folder."""
    for name, (config, length, prompt) in ENCODERS.items():
        plain = write_family(folder / "encoders" / name, config, model_max_length=length)
        model = SentenceTransformer(str(plain), device="cpu")
        if prompt:
            model.prompts, model.default_prompt_name = {"sts": prompt}, "sts"
        model.max_seq_length = length
        model.save_pretrained(str(plain.with_name(f"{name}-run")), create_model_card=False)
        export_with_golden(plain.with_name(f"{name}-run"), folder / f"{name}.onnx")
    export_with_golden(offline_encoder, folder / "e5-small-ko.onnx")
    return folder
