"""Model folders of other people through the scripts: code, pointers, old layouts, model cards."""

from __future__ import annotations

import hashlib
import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from commands import REPOSITORY, SAMPLES, keep_every_checkpoint, run, run_script
from encoders import add_module_with_code, edit_json
from hub import Hub
from safetensors.torch import load_file
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import Dense

from common.encoders import load_encoder, save_encoder

sys.path.append(str(REPOSITORY / "onnx"))

import measure_onnx

POINTER = f"version https://git-lfs.github.com/spec/v1\noid sha256:{'0' * 64}\nsize 442494816\n"
SENTENCES = ["한 남자가 기타를 친다.", "비"]


def train(folder: Path, target: Path, *options: object) -> subprocess.CompletedProcess[str]:
    return run("training_sts.py", folder, "--max_steps", 2, "--no_test", "--run_dir", target,
               *options)  # fmt: skip


def benchmark(model: object, results: Path, *options: object) -> subprocess.CompletedProcess[str]:
    return run_script("benchmark.py", model, "--data_dir", SAMPLES, "--results_dir", results,
                      *options)  # fmt: skip


def export(model: object, output: Path, *options: object) -> subprocess.CompletedProcess[str]:
    return run_script("onnx/export_onnx.py", "--model", model, "--output", output, *options)


def refusal(done: subprocess.CompletedProcess[str]) -> str:
    """Returns the one line of a refusal."""
    assert done.returncode == 2, done.stderr
    assert "Traceback" not in done.stderr and done.stderr.count("error: ") == 1
    return done.stderr.splitlines()[-1]


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def to_bin(file: Path) -> None:
    torch.save(load_file(file), file.with_name("pytorch_model.bin"))
    file.unlink()


@pytest.fixture
def saved(encoder: Path, tmp_path: Path) -> Path:
    """A folder with modules.json, made from the tiny encoder."""
    save_encoder(load_encoder(str(encoder), 48), tmp_path / "saved")
    return tmp_path / "saved"


@pytest.fixture
def dense(encoder: Path, tmp_path: Path) -> Path:
    """The same with a Dense module behind its pooling."""
    torch.manual_seed(0)
    model = load_encoder(str(encoder), 48, device="cpu")
    model = SentenceTransformer(modules=[*model, Dense(32, 16)], device="cpu")
    save_encoder(model, tmp_path / "dense")
    return tmp_path / "dense"


# --- Code ------------------------------------------------------------------------------------


def add_encoder_with_code(folder: Path, ran: Path) -> None:
    edit_json(folder / "config.json", auto_map={"AutoModel": "carried.CarriedModel"})
    code = (
        "from pathlib import Path\n"
        "from transformers import BertModel\n"
        f"Path({str(ran)!r}).touch()\n"
        "class CarriedModel(BertModel):\n"
        "    pass\n"
    )
    (folder / "carried.py").write_text(code, encoding="utf-8")


@pytest.mark.parametrize("add_code", [add_module_with_code, add_encoder_with_code])
def test_a_run_with_code_is_whole(add_code: object, saved: Path, tmp_path: Path) -> None:
    ran, folder = tmp_path / "ran", tmp_path / "run"
    add_code(saved, ran)
    assert "give --trust_remote_code if you trust it" in refusal(train(saved, folder))
    assert not ran.exists() and not folder.exists()

    # Checkpoints are read back by all that read them: best, means, with the start.
    options = ["--save_steps", 1, "--average_checkpoints", 2, "--start_weight", 0.25]
    done = train(saved, folder, "--trust_remote_code", *options)
    assert done.returncode == 0, done.stderr
    assert ran.exists()
    ran.unlink()
    output, results = tmp_path / "out/tiny.onnx", tmp_path / "results"
    for refused in (benchmark(folder, results), export(folder, output)):
        assert "give --trust_remote_code if you trust it" in refusal(refused)
    vectors = load_encoder(str(folder), trust_remote_code=True).encode(SENTENCES)
    is_normalized = add_code is add_module_with_code
    assert (np.abs(np.linalg.norm(vectors, axis=1) - 1).max() < 1e-6) == is_normalized
    for done in (
        benchmark(folder, results, "--trust_remote_code"),
        export(folder, output, "--trust_remote_code"),
    ):
        assert done.returncode == 0, done.stderr


def test_a_resumed_run_may_trust_what_the_first_did(
    saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    keep_every_checkpoint(monkeypatch)
    add_module_with_code(saved, tmp_path / "ran")
    folder = tmp_path / "run"
    done = train(saved, folder, "--trust_remote_code", "--save_steps", 1,
                 "--average_checkpoints", 2)  # fmt: skip
    assert done.returncode == 0, done.stderr
    edit_json(folder / "run.json", finished=None)
    shutil.rmtree(folder / "checkpoints/checkpoint-2")
    (folder / "modules.json").unlink()
    done = train(saved, folder, "--trust_remote_code", "--save_steps", 1,
                 "--average_checkpoints", 2, "--resume")  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "resuming from" in done.stderr and (folder / "carried.py").is_file()


def test_code_comes_from_the_hub_with_the_flag_alone(
    saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    add_module_with_code(saved, tmp_path / "ran")
    shutil.copytree(saved, tmp_path / "hub/owner/model")
    with Hub(tmp_path / "hub") as hub:
        hub.patch(monkeypatch, tmp_path / "cache")
        assert "its own Python code" in refusal(train(Path("owner/model"), tmp_path / "run"))
        assert not any(".py" in request for request in hub.requests)
        assert list((tmp_path / "cache").rglob("*.safetensors"))
        assert not list((tmp_path / "cache").rglob("*.py"))
        done = train(Path("owner/model"), tmp_path / "run", "--trust_remote_code")
        assert done.returncode == 0, done.stderr
        (code,) = (tmp_path / "cache").rglob("*.py")
        assert code.read_bytes() == (saved / "carried.py").read_bytes()


# --- Weights ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name", ["model.safetensors", "pytorch_model.bin", "2_Dense/model.safetensors"]
)
def test_a_git_lfs_pointer_is_named(name: str, dense: Path, tmp_path: Path) -> None:
    file = dense / name
    file.with_name("model.safetensors").unlink()
    file.write_text(POINTER, encoding="utf-8")
    expected = f"error: {file}: a Git-LFS pointer, not the weights: `git lfs pull` fetches them"
    for done in (
        train(dense, tmp_path / "run"),
        benchmark(dense, tmp_path / "results"),
        export(dense, tmp_path / "out/tiny.onnx"),
    ):
        assert refusal(done) == expected
    assert not (tmp_path / "run").exists() and not list((tmp_path / "out").iterdir())


def test_weights_half_safetensors_half_bin_come_from_the_hub(
    dense: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = load_encoder(str(dense)).encode(SENTENCES)
    model = shutil.copytree(dense, tmp_path / "hub/owner/model")
    to_bin(model / "2_Dense/model.safetensors")
    # What is there twice, or is another runtime's, stays where it is.
    (model / "pytorch_model.bin").write_bytes(b"the same weights again")
    (model / "onnx").mkdir()
    (model / "onnx/model.onnx").write_bytes(b"a graph")
    with Hub(tmp_path / "hub") as hub:
        hub.patch(monkeypatch, tmp_path / "cache")
        np.testing.assert_array_equal(load_encoder("owner/model").encode(SENTENCES), expected)
        got = [request for request in hub.requests if request.startswith("GET")]
        assert not any(request.endswith((".onnx", "/pytorch_model.bin")) and
                       "2_Dense" not in request for request in got)  # fmt: skip
        done = benchmark("owner/model", tmp_path / "results")
        assert done.returncode == 0, done.stderr
    row = json.loads((tmp_path / "results/owner--model.json").read_text(encoding="utf-8"))
    assert row["model"]["weights"] == {
        name: sha256(model / name) for name in ("2_Dense/pytorch_model.bin", "model.safetensors")
    }


def test_each_module_with_weights_has_a_hash(dense: Path, tmp_path: Path) -> None:
    done = benchmark(dense, tmp_path / "results")
    assert done.returncode == 0, done.stderr
    described = json.loads((tmp_path / "results/dense.json").read_text(encoding="utf-8"))["model"]
    files = [dense / "2_Dense/model.safetensors", dense / "model.safetensors"]
    assert described["weights"] == {str(f.relative_to(dense)): sha256(f) for f in files}
    assert len(set(described["weights"].values())) == 2 and described["dimension"] == 16
    assert described["size_bytes"] == sum(file.stat().st_size for file in files)

    done = train(dense, tmp_path / "run")
    assert done.returncode == 0, done.stderr
    config = json.loads((tmp_path / "run/2_Dense/config.json").read_text(encoding="utf-8"))
    assert config == {  # all that sentence-transformers 2.7's Dense takes
        "in_features": 32,
        "out_features": 16,
        "bias": True,
        "activation_function": "torch.nn.modules.activation.Tanh",
    }
    trained = json.loads((tmp_path / "run/run.json").read_text(encoding="utf-8"))
    begun = trained["start_model"]["weights"]
    assert begun == described["weights"] and trained["weights"].keys() == begun.keys()
    assert all(trained["weights"][name] != begun[name] for name in begun)  # both were trained


# --- Exports ---------------------------------------------------------------------------------


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Keeps measurements short: what is measured on the samples says nothing about a model."""
    monkeypatch.setattr(measure_onnx, "SENTENCES", {32: 8, 1: 2})
    monkeypatch.setattr(measure_onnx, "ROUNDS", 1)
    monkeypatch.setattr(measure_onnx, "first_embedding_seconds", lambda *_: 1.0)


def old_layout(folder: Path) -> None:
    """Moves the transformer to where sentence-transformers had it in its first years."""
    place = folder / "0_Transformer"
    place.mkdir()
    stays = ("modules.json", "config_sentence_transformers.json", "README.md")
    for path in list(folder.iterdir()):
        if path.is_file() and path.name not in stays:
            path.rename(place / path.name)
    modules = json.loads((folder / "modules.json").read_text(encoding="utf-8"))
    modules[0]["path"] = place.name
    (folder / "modules.json").write_text(json.dumps(modules), encoding="utf-8")


def settings_of(output: Path) -> dict:
    return json.loads(output.with_suffix(".json").read_text(encoding="utf-8"))


@pytest.mark.usefixtures("quick")
def test_an_old_layout_is_exported_with_the_hash_of_its_weights(
    saved: Path, tmp_path: Path
) -> None:
    old_layout(saved)
    (saved / "README.md").write_text("---\nlicense: mit\n---\n", encoding="utf-8")
    output, results = tmp_path / "out/tiny.onnx", tmp_path / "results"
    done = export(saved, output, "--quantize", "int8", "--force", "--data_dir", SAMPLES,
                  "--results_dir", results)  # fmt: skip
    assert done.returncode == 0, done.stderr
    weights = saved / "0_Transformer/model.safetensors"
    settings = settings_of(output)
    assert settings["revision"] == f"sha256:{sha256(weights)}"
    assert (settings["model"], settings["licence"]) == ("saved", "mit")
    row, *_ = json.loads((results / "onnx/tiny.json").read_text(encoding="utf-8"))["rows"]
    assert row["size_bytes"] == weights.stat().st_size > 0
    done = benchmark(saved, results)
    assert done.returncode == 0, done.stderr
    described = json.loads((results / "saved.json").read_text(encoding="utf-8"))["model"]
    assert described["weights"] == {"0_Transformer/model.safetensors": sha256(weights)}
    done = train(saved, tmp_path / "run", "--attention_dropout", 0)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("card", "licence"),
    [
        ("---\nlicense: [mit\ntags: {\n---\n# A model\n", "unknown"),
        ("---\n- license\n- mit\n---\n# A model\n", "unknown"),
        ("---\nlicense: mit\n---\n# A model\n", "mit"),
        ("# A model\n", "unknown"),
        ("---\nlanguage: ko\n---\n", "unknown"),
    ],
    ids=["broken", "no mapping", "whole", "no metadata", "no licence"],
)
def test_the_licence_comes_from_a_card_that_can_be_read(
    card: str, licence: str, saved: Path, tmp_path: Path
) -> None:
    (saved / "README.md").write_text(card, encoding="utf-8")
    output = tmp_path / "out/tiny.onnx"
    done = export(saved, output)
    assert done.returncode == 0, done.stderr
    assert settings_of(output)["licence"] == licence
    lines = [line for line in done.stderr.splitlines() if "licence unknown" in line]
    assert len(lines) == (card.startswith("---\nlicense: [") or card.startswith("---\n- "))


def files(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


FP32 = ["tiny.json", "tiny.onnx", "tiny.tokenizer.json"]
INT8 = ["tiny-int8.json", "tiny-int8.onnx", "tiny-int8.tokenizer.json"]


@pytest.fixture
def exported(quick: None, saved: Path, tmp_path: Path) -> list[object]:
    """Exports the model with its int8 file; returns the options for that."""
    options = ["--quantize", "int8", "--data_dir", SAMPLES, "--results_dir", tmp_path / "results"]
    done = export(saved, tmp_path / "out/tiny.onnx", *options, "--force")
    assert done.returncode == 0 and files(tmp_path / "out") == sorted(FP32 + INT8)
    return options


def test_a_refused_int8_leaves_no_older_one(
    exported: list[object], saved: Path, tmp_path: Path
) -> None:
    output = tmp_path / "out/tiny.onnx"
    done = export(saved, output, *exported, "--max_loss", -100)  # whatever it loses
    assert done.returncode == 1, done.stderr
    assert "more than --max_loss -100.0; not written" in done.stderr.splitlines()[-1]
    assert files(output.parent) == FP32


def test_a_float32_file_that_is_only_named_so_stays(saved: Path, tmp_path: Path) -> None:
    assert export(saved, tmp_path / "out/tiny-int8.onnx").returncode == 0
    done = export(saved, tmp_path / "out/tiny.onnx", "--dim", 16)
    assert done.returncode == 0 and "removed" not in done.stderr
    assert files(tmp_path / "out") == sorted(FP32 + INT8)


@pytest.mark.parametrize("change", ["weights", "options", "{", "[3]", "nothing"])
def test_an_export_leaves_no_int8_of_another_model(
    change: str, exported: list[object], saved: Path, tmp_path: Path
) -> None:
    output, options = tmp_path / "out/tiny.onnx", []
    if change == "weights":
        model = load_encoder(str(saved), device="cpu")
        with torch.no_grad():
            next(model.parameters()).mul_(0.5)
        save_encoder(model, saved)
    elif change == "options":
        options = ["--dim", 16]
    elif change != "nothing":
        (output.parent / "tiny-int8.json").write_text(change, encoding="utf-8")
    done = export(saved, output, *options)
    assert done.returncode == 0, done.stderr
    assert files(output.parent) == (sorted(FP32 + INT8) if change == "nothing" else FP32)
    assert ("of another export: removed" in done.stderr) == (change != "nothing")


@pytest.mark.parametrize("change", ["weights", "options", "nothing"])
def test_an_export_leaves_no_vectors_of_another_model(
    change: str, saved: Path, tmp_path: Path
) -> None:
    output, golden = tmp_path / "out/tiny.onnx", tmp_path / "out/tiny.golden.json"
    assert export(saved, output, "--golden", golden).returncode == 0
    if change == "weights":
        model = load_encoder(str(saved), device="cpu")
        with torch.no_grad():
            next(model.parameters()).mul_(0.5)
        save_encoder(model, saved)
    done = export(saved, output, *(["--dim", 16] if change == "options" else []))
    assert done.returncode == 0, done.stderr
    assert golden.exists() == (change == "nothing")
    assert ("of another export: removed" in done.stderr) == (change != "nothing")
