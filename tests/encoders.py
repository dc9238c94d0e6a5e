"""Encoders of a few kilobytes that load and run like real ones; their weights are random."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import (
    AutoModel,
    BertConfig,
    BertModel,
    PreTrainedConfig,
    PreTrainedTokenizerFast,
)

SAMPLES = Path(__file__).parent / "samples"
SPECIAL_TOKENS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]"]


def tiny_tokenizer() -> Tokenizer:
    """Returns a tokenizer of single characters, those of the sample sentences."""
    text = "".join(path.read_text(encoding="utf-8") for path in sorted(SAMPLES.glob("*/*.tsv")))
    vocabulary = [*SPECIAL_TOKENS, *sorted(set(text) - set(" \t\n"))]
    tokenizer = Tokenizer(
        models.WordLevel({token: i for i, token in enumerate(vocabulary)}, unk_token="[UNK]")
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Whitespace(), pre_tokenizers.Split("", "isolated")]
    )
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    return tokenizer


def write_plain_encoder(folder: Path, seed: int = 0) -> Path:
    """Writes a two-layer BERT of 32 dimensions, without pooling, and returns its folder."""
    tokenizer = tiny_tokenizer()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        model_max_length=64,
        pad_token="[PAD]",
        unk_token="[UNK]",
        cls_token="[CLS]",
        sep_token="[SEP]",
    ).save_pretrained(folder)
    torch.manual_seed(seed)
    config = BertConfig(
        vocab_size=tokenizer.get_vocab_size(),
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=64,
        max_position_embeddings=64,
        initializer_range=0.2,
    )
    BertModel(config, add_pooling_layer=False).eval().save_pretrained(folder)
    return folder


def write_family(folder: Path, config: PreTrainedConfig, **tokenizer: object) -> Path:
    """Writes a plain encoder of any family, and returns its folder.

    Args:
        config: gets the vocabulary's size; where its padding index is 1, as in RoBERTa's kind, the
            tokenizer's is too.
        tokenizer: more options of the tokenizer.
    """
    content = json.loads(tiny_tokenizer().to_str())
    if config.pad_token_id == 1:
        content["model"]["vocab"] |= {"[UNK]": 0, "[PAD]": 1}
    config.vocab_size = len(content["model"]["vocab"])
    special = {"pad_token": "[PAD]", "unk_token": "[UNK]"}
    special |= {"cls_token": "[CLS]", "sep_token": "[SEP]"}
    PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(json.dumps(content)), **special | tokenizer
    ).save_pretrained(folder)
    torch.manual_seed(0)
    AutoModel.from_config(config).save_pretrained(folder)
    return folder


def edit_json(path: Path, **changes: object) -> None:
    """Sets keys of a JSON file."""
    content = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    path.write_text(json.dumps(content | changes), encoding="utf-8")


def add_module_with_code(folder: Path, ran: Path) -> None:
    """Appends a module of a class in carried.py, whose import makes the file `ran`."""
    modules = json.loads((folder / "modules.json").read_text(encoding="utf-8"))
    modules.append({"idx": 2, "name": "2", "path": "", "type": "carried.Carried"})
    (folder / "modules.json").write_text(json.dumps(modules), encoding="utf-8")
    code = (
        "from pathlib import Path\n"
        "from sentence_transformers.sentence_transformer.modules import Normalize\n"
        f"Path({str(ran)!r}).touch()\n"
        "class Carried(Normalize):\n"
        "    pass\n"
    )
    (folder / "carried.py").write_text(code, encoding="utf-8")
