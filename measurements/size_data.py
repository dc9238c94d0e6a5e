"""An encoder and data of the size that users train, without the Hub, for size.py.

The encoder has klue/roberta-base's shape and random weights. KorNLI's two files have its number of
rows, for each premise an entailment, a neutral and a contradiction, of generated words: this is not
KorNLI. KorSTS is copied, or generated as well. MultiNLI's sentences have as many words as XNLI's
dev has, SNLI's as KorSTS has, where these are there.
"""

from __future__ import annotations

import csv
import re
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast, RobertaConfig, RobertaModel

from common.command_line import replacing, write_text
from common.data import NLI_LABELS, NLI_TRAIN_FILES, STS_COLUMNS, read_kornli, read_korsts

SHAPE = {
    "vocab_size": 32_000, "hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12,
    "intermediate_size": 3_072, "max_position_embeddings": 514, "type_vocab_size": 1,
    "pad_token_id": 1,
}  # fmt: skip
KORNLI_ROWS = dict(zip(NLI_TRAIN_FILES, (392_702, 550_152), strict=True))
KORSTS_ROWS = {"train": 5_749, "dev": 1_500}
SEED = 777
STEMS = 4_000  # of generated words; the other places are KorSTS's most frequent
ENDINGS = ["", "는", "을", "이", "에서", "하고", "했다", "에"]


class Sentences:
    """Draws sentences of generated words: stems of two syllables, each with an ending or none."""

    def __init__(self) -> None:
        self.generator = np.random.default_rng(SEED)
        syllables = self.generator.integers(ord("가"), ord("힣") + 1, (2 * STEMS, 2))
        self.stems = list(dict.fromkeys("".join(map(chr, pair)) for pair in syllables))[:STEMS]
        self.words = np.array([stem + end for stem in self.stems for end in ENDINGS], dtype=object)

    def draw(self, how_many: int, counts: np.ndarray) -> list[str]:
        """Returns sentences that have as many words as `counts` says, drawn from it."""
        ends = np.cumsum(self.generator.choice(counts, how_many)).tolist()
        words = self.words[self.generator.integers(len(self.words), size=ends[-1])].tolist()
        return [" ".join(words[a:b]) + "." for a, b in zip([0, *ends], ends, strict=False)]


def word_counts(table: pd.DataFrame) -> list[np.ndarray]:
    """Returns how many words each sentence1 has, and each sentence2."""
    return [table[name].str.split().str.len().to_numpy() for name in ("sentence1", "sentence2")]


def write_data(folder: Path, data_dir: Path | None, dev_pairs: int | None) -> list[str]:
    """Writes KorNLI's and KorSTS's files, where KorNLI's are not there already.

    Returns the stems that the tokenizer is to know.
    """
    source, usual = Sentences(), np.arange(4, 11)
    words: Counter[str] = Counter()
    for name, rows in KORSTS_ROWS.items():
        if data_dir:
            text = (data_dir / f"KorSTS/sts-{name}.tsv").read_text(encoding="utf-8")
            header, *lines = text.rstrip("\n").split("\n")
        else:
            header, scores = "\t".join(STS_COLUMNS), source.generator.uniform(0, 5, rows)
            pairs = zip(source.draw(rows, usual), source.draw(rows, usual), strict=True)
            lines = [
                f"generated\tnone\t2026\t{row}\t{score:.3f}\t{first}\t{second}"
                for row, (score, (first, second)) in enumerate(zip(scores, pairs, strict=True))
            ]
        words.update(re.findall("(?<![가-힣])[가-힣]{2}", "\n".join(lines)))
        if name == "dev" and dev_pairs:  # from everywhere: genres stand one behind the other
            lines = [lines[number * len(lines) // dev_pairs] for number in range(dev_pairs)]
        write_text(folder / f"KorSTS/sts-{name}.tsv", "\n".join([header, *lines]) + "\n")
    usual = word_counts(read_korsts(folder / "KorSTS/sts-train.tsv"))
    xnli = data_dir and data_dir / "KorNLI/xnli.dev.ko.tsv"
    counts = [word_counts(read_kornli(xnli)[0]) if xnli and xnli.is_file() else usual, usual]
    for (name, rows), (first, second) in zip(KORNLI_ROWS.items(), counts, strict=True):
        if (folder / name).is_file():
            continue
        premises, others = source.draw(-(-rows // 3), first), source.draw(rows, second)
        with replacing(folder / name) as path, open(path, "w", encoding="utf-8") as file:
            file.write("sentence1\tsentence2\tgold_label\n")
            file.writelines(
                f"{premises[row // 3]}\t{other}\t{NLI_LABELS[row % 3]}\n"
                for row, other in enumerate(others)
            )
    return list(dict.fromkeys([*source.stems, *(word for word, _ in words.most_common())]))


def write_encoder(folder: Path, stems: list[str]) -> dict[str, Any]:
    """Writes encoder/, of `SHAPE` with random weights, beside the data.

    Its tokenizer knows all syllables, so that no Korean is unknown, and as many stems as there are
    places. Returns the number of parameters, and the mean tokens of each file's sentences.
    """
    special = {"cls_token": "[CLS]", "pad_token": "[PAD]", "sep_token": "[SEP]"}
    special |= {"unk_token": "[UNK]", "mask_token": "[MASK]"}
    letters = [*map(chr, range(ord("!"), ord("~") + 1)), *map(chr, range(ord("가"), ord("힣") + 1))]
    names = [*special.values(), *letters, *(f"##{letter}" for letter in letters), *stems]
    vocabulary = {token: number for number, token in enumerate(names[: SHAPE["vocab_size"]])}
    tokenizer = Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    ends = [(token, vocabulary[token]) for token in ("[CLS]", "[SEP]")]
    tokenizer.post_processor = processors.TemplateProcessing("[CLS] $A [SEP]", special_tokens=ends)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, model_max_length=512, **special)
    fast.save_pretrained(folder / "encoder")
    torch.manual_seed(SEED)
    model = RobertaModel(RobertaConfig(**SHAPE), add_pooling_layer=False)
    model.save_pretrained(folder / "encoder")
    lengths = {}
    for path in sorted(folder.glob("Kor*/*.tsv")):
        table = pd.read_csv(path, sep="\t", quoting=csv.QUOTE_NONE, nrows=3_000)
        for name in ("sentence1", "sentence2"):
            tokens = [len(row) for row in fast(table[name].tolist())["input_ids"]]
            lengths[f"{path.name}, {name}"] = round(sum(tokens) / len(tokens), 1)
    return {"parameters": model.num_parameters(), "tokens_a_sentence": lengths}
