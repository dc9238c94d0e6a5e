"""Families of encoders through the scripts: tiny ones with random weights."""

from __future__ import annotations

import copy
import json
import shutil
import subprocess
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import onnxruntime
import pandas as pd
import pytest
import torch
from commands import SAMPLES, keep_every_checkpoint, run, run_script, weights
from encoders import tiny_tokenizer, write_family, write_plain_encoder
from sentence_transformers import CrossEncoder, SentenceTransformer, SparseEncoder
from sentence_transformers.sentence_transformer.modules import StaticEmbedding
from sentence_transformers.sparse_encoder.modules import MLMTransformer, SpladePooling
from tokenizers import Tokenizer
from transformers import (
    AlbertConfig,
    BertConfig,
    BertForMaskedLM,
    BertForSequenceClassification,
    DebertaV2Config,
    DistilBertConfig,
    ElectraConfig,
    ModernBertConfig,
    MPNetConfig,
    PreTrainedConfig,
    Qwen3Config,
    RobertaConfig,
    XLMRobertaConfig,
)

from common.encoders import load_encoder
from common.exported import embed
from common.splits import say_unknown_tokens

LAYERS = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
SIZES = LAYERS | {
    "intermediate_size": 64,
    "max_position_embeddings": 160,
    "initializer_range": 0.2,
}
# kakaobank/kf-deberta-base's, but for its sizes.
KF_DEBERTA = {
    "relative_attention": True,
    "position_biased_input": False,
    "pos_att_type": ["p2c", "c2p"],
    "type_vocab_size": 0,
    "max_relative_positions": -1,
    "position_buckets": 16,
    "norm_rel_ebd": "layer_norm",
    "share_att_key": True,
}
CONFIGS = {
    "distilbert": DistilBertConfig(
        dim=32, hidden_dim=64, n_layers=2, n_heads=2, max_position_embeddings=160
    ),
    "albert": AlbertConfig(**SIZES, embedding_size=16),
    "mpnet": MPNetConfig(**SIZES, pad_token_id=1),
    "modernbert": ModernBertConfig(
        **SIZES, pad_token_id=0, bos_token_id=2, eos_token_id=3, cls_token_id=2, sep_token_id=3
    ),
    "deberta-v2": DebertaV2Config(**SIZES),
    "kf-deberta": DebertaV2Config(**SIZES, **KF_DEBERTA),
    "xlm-roberta": XLMRobertaConfig(**SIZES, type_vocab_size=1, pad_token_id=1),
    "electra": ElectraConfig(**SIZES, embedding_size=16),
    "qwen3": Qwen3Config(
        **SIZES, num_key_value_heads=1, head_dim=16, bos_token_id=None, eos_token_id=None
    ),
}


def family(folder: Path, name: str) -> Path:
    return write_family(folder, copy.deepcopy(CONFIGS[name]))


def benchmark(
    model: Path, results: Path, *options: object
) -> tuple[subprocess.CompletedProcess[str], Path]:
    """Runs benchmark.py; returns what it said, and the file of its row."""
    done = run_script("benchmark.py", model, "--data_dir", SAMPLES, "--results_dir", results,
                      *options)  # fmt: skip
    return done, results / f"{model.name}.json"


def refusal(done: subprocess.CompletedProcess[str]) -> str:
    """Returns the one line of a refusal."""
    assert done.returncode == 2, done.stderr
    assert "Traceback" not in done.stderr
    *_, line = done.stderr.splitlines()
    assert line.startswith("error: ") and done.stderr.count("error: ") == 1
    return line


def saved_config(folder: Path) -> dict:
    return json.loads((folder / "config.json").read_text(encoding="utf-8"))


# --- Positions -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("config", "usable", "refused"),
    [
        # Position 0 and the padding index 1 are no token's.
        (RobertaConfig(**SIZES | {"max_position_embeddings": 514}), 512, [513, 514]),
        (BertConfig(**SIZES | {"max_position_embeddings": 24}), 24, [25]),
    ],
    ids=["roberta", "bert"],
)
def test_positions_behind_the_padding_index_alone_are_usable(
    config: PreTrainedConfig, usable: int, refused: list[int], tmp_path: Path
) -> None:
    folder = write_family(tmp_path / "model", config)
    for length in refused:
        done = run("training_sts.py", folder, "--max_seq_length", length, "--max_steps", 1,
                   "--run_dir", tmp_path / "refused")  # fmt: skip
        expected = f"--max_seq_length {length}: {folder} has {usable} positions"
        assert refusal(done) == f"error: {expected}"
        assert not (tmp_path / "refused").exists()
    done = run("training_sts.py", folder, "--max_seq_length", usable, "--max_steps", 1,
               "--run_dir", tmp_path / "run", "--no_test")  # fmt: skip
    assert done.returncode == 0, done.stderr
    # The longest sentence reaches the last position, and none beyond it.
    model = load_encoder(str(tmp_path / "run"), device="cpu")
    assert model.encode("가" * 600, output_value="token_embeddings").shape == (usable, 32)


# --- Dropouts --------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["distilbert", "albert", "mpnet", "modernbert", "deberta-v2"])
def test_both_dropouts_reach_the_modules_of_every_family(name: str, tmp_path: Path) -> None:
    folder = family(tmp_path, name)

    def two_forwards(attention: float, hidden: float) -> tuple[torch.Tensor, torch.Tensor]:
        dropouts = {"attention_dropout": attention, "hidden_dropout": hidden}
        model = load_encoder(str(folder), 48, dropouts=dropouts, device="cpu").train()
        found = {m.p for m in model.modules() if isinstance(m, torch.nn.Dropout)}
        # ModernBERT's attention has the number alone.
        held = [getattr(module, "attention_dropout", None) for module in model.modules()]
        found |= {share for share in held if isinstance(share, float)}
        assert found - {0.0} == {attention, hidden} - {0.0}
        features = model.preprocess(["한 남자가 음식을 먹는다."])
        return tuple(model(dict(features))["sentence_embedding"] for _ in range(2))

    torch.manual_seed(0)
    torch.testing.assert_close(*two_forwards(0.0, 0.0), rtol=0, atol=1e-6)
    for given in ((0.5, 0.0), (0.0, 0.25)):
        first, second = two_forwards(*given)
        assert (first - second).abs().max() > 1e-3, given


@pytest.mark.parametrize("name", ["distilbert", "modernbert", "deberta-v2"])
def test_what_is_saved_keeps_the_models_own_dropouts(name: str, tmp_path: Path) -> None:
    folder, first, second = family(tmp_path / "model", name), tmp_path / "first", tmp_path / "two"
    done = run("training_sts.py", folder, "--max_steps", 1, "--attention_dropout", 0,
               "--hidden_dropout", 0.3, "--run_dir", first, "--no_test")  # fmt: skip
    assert done.returncode == 0, done.stderr
    own = {key: value for key, value in saved_config(folder).items() if "drop" in key}
    saved = {key: value for key, value in saved_config(first).items() if "drop" in key}
    assert len(own) >= 2 and saved == own
    done = run("training_sts.py", first, "--max_steps", 1, "--run_dir", second, "--no_test")
    assert done.returncode == 0, done.stderr
    assert {key: saved_config(second)[key] for key in own} == own


def test_a_dropout_that_a_family_has_not_is_refused(tmp_path: Path) -> None:
    folder = family(tmp_path / "model", "qwen3")
    done = run("training_sts.py", folder, "--hidden_dropout", 0, "--run_dir", tmp_path / "run")
    assert refusal(done) == f"error: --hidden_dropout: {folder} (qwen3) has no such dropout"
    assert not (tmp_path / "run").exists()


# --- Kinds of models -------------------------------------------------------------------------


def test_a_decoder_without_a_padding_index_trains(tmp_path: Path) -> None:
    folder = family(tmp_path / "model", "qwen3")
    assert saved_config(folder).get("pad_token_id") is None
    done = run("training_sts.py", folder, "--max_steps", 2, "--run_dir", tmp_path / "run")
    assert done.returncode == 0, done.stderr
    assert "note: qwen3 trains with padding" in done.stderr
    before, after = weights(folder), weights(tmp_path / "run")
    assert any(not torch.equal(before[name], after[name]) for name in before)


def test_a_tokenizer_without_a_pad_token_is_refused(tmp_path: Path) -> None:
    folder = write_family(tmp_path / "model", copy.deepcopy(CONFIGS["qwen3"]), pad_token=None)
    done = run("training_sts.py", folder, "--max_steps", 1, "--run_dir", tmp_path / "run")
    assert "no pad token: sentences cannot share a batch" in refusal(done)


def test_static_embeddings_are_scored_and_not_trained(tmp_path: Path) -> None:
    torch.manual_seed(0)
    embedding = StaticEmbedding(tiny_tokenizer(), embedding_dim=32)
    SentenceTransformer(modules=[embedding]).save_pretrained(str(tmp_path / "static"))
    folder = tmp_path / "static"
    done = run("training_sts.py", folder, "--max_steps", 1, "--run_dir", tmp_path / "run")
    assert refusal(done) == f"error: {folder}: StaticEmbedding: only transformers are trained here"
    done = run("training_sts.py", folder, "--attention_dropout", 0, "--run_dir", tmp_path / "run")
    assert str(folder) in refusal(done)
    done, row = benchmark(folder, tmp_path / "results")
    assert done.returncode == 0, done.stderr

    def refuse(constant: str) -> None:
        raise AssertionError(constant)

    content = json.loads(row.read_text(encoding="utf-8"), parse_constant=refuse)
    assert content["model"]["max_seq_length"] is None  # it cuts nothing off
    assert content["model"]["dimension"] == 32 and len(content["model"]["weights"]) == 1


def write_sparse(folder: Path, plain: Path) -> None:
    BertForMaskedLM.from_pretrained(plain).save_pretrained(folder / "base")
    shutil.copytree(plain, folder / "base", dirs_exist_ok=True,
                    ignore=shutil.ignore_patterns("model.safetensors", "config.json"))  # fmt: skip
    modules = [MLMTransformer(str(folder / "base")), SpladePooling()]
    SparseEncoder(modules=modules).save_pretrained(str(folder))


def write_cross(folder: Path, plain: Path) -> None:
    CrossEncoder(str(plain), num_labels=1).save_pretrained(str(folder))


def write_classifier(folder: Path, plain: Path) -> None:
    """Writes what CrossEncoder saved in its first years: the classifier alone."""
    shutil.copytree(plain, folder)
    BertForSequenceClassification.from_pretrained(plain).save_pretrained(folder)


@pytest.mark.parametrize(
    ("write", "kind"),
    [
        (write_sparse, "SparseEncoder"),
        (write_cross, "CrossEncoder"),
        (write_classifier, "CrossEncoder"),
    ],
    ids=["sparse", "cross", "classifier"],
)
def test_what_is_no_sentence_encoder_is_refused_by_name(
    write: object, kind: str, encoder: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "model"
    write(folder, encoder)
    done = run("training_sts.py", folder, "--max_steps", 1, "--run_dir", tmp_path / "run")
    for line in (refusal(done), refusal(benchmark(folder, tmp_path / "results")[0])):
        assert line.startswith(f"error: {folder}: a ") and kind in line
    assert not (tmp_path / "run").exists() and not (tmp_path / "results").exists()


# --- Pooling ---------------------------------------------------------------------------------


@pytest.mark.parametrize("pooling", ["cls", "max"])
def test_the_pooling_of_a_plain_encoder(pooling: str, encoder: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    done = run("training_sts.py", encoder, "--max_steps", 1, "--pooling", pooling,
               "--run_dir", folder)  # fmt: skip
    assert done.returncode == 0, done.stderr
    modes = json.loads((folder / "1_Pooling/config.json").read_text(encoding="utf-8"))
    key = {"cls": "pooling_mode_cls_token", "max": "pooling_mode_max_tokens"}[pooling]
    assert [name for name, value in modes.items() if value and "mode" in name] == [key]
    assert f": {pooling} pooling, 48 tokens" in (folder / "README.md").read_text(encoding="utf-8")

    done, row = benchmark(encoder, tmp_path / "results", "--pooling", pooling)
    assert done.returncode == 0, done.stderr
    described = json.loads(row.read_text(encoding="utf-8"))["model"]
    assert described["pooling"] == pooling and described["pooling_added"] is True
    (line,) = [line for line in done.stdout.splitlines() if encoder.name in line and "|" in line]
    assert f"{pooling} pooling added" in line

    output = tmp_path / "out/tiny.onnx"
    export = ["onnx/export_onnx.py", "--output", output, "--pooling", pooling, "--model"]
    done = run_script(*export, encoder)
    assert done.returncode == 0, done.stderr
    settings = json.loads(output.with_suffix(".json").read_text(encoding="utf-8"))
    assert settings["pooling"] == pooling
    text, tokenizer = "한 남자가 음식을 먹는다.", output.with_suffix(".tokenizer.json")
    found = embed(onnxruntime.InferenceSession(output), Tokenizer.from_file(str(tokenizer)), [text])
    tokens = load_encoder(str(encoder), device="cpu").encode(text, output_value="token_embeddings")
    by_hand = {"cls": tokens[0], "max": tokens.max(dim=0).values}[pooling]
    np.testing.assert_allclose(found[0], by_hand.numpy(), atol=1e-5)

    expected = f"error: --pooling {pooling}: {folder} declares its own pooling"
    again = run("training_sts.py", folder, "--pooling", pooling, "--run_dir", tmp_path / "again")
    results = tmp_path / "results"
    for done in (
        again,
        benchmark(folder, results, "--pooling", pooling)[0],
        run_script(*export, folder),
    ):
        assert refusal(done) == expected


# --- Whole recipes ---------------------------------------------------------------------------


RECIPES = {
    "original": ["training_multi-task.py", "--nli_batch_size", 8],
    # train.sh's V2, with means of weights.
    "v2": ["training_sts.py", "--loss", "pearson", "--batch_size", 32, "--learning_rate", 5e-5,
           "--attention_dropout", 0, "--start_weight", 0.25],
}  # fmt: skip


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("name", ["kf-deberta", "xlm-roberta", "electra"])
def test_a_family_trains_resumes_and_is_scored_and_exported(
    name: str, recipe: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    keep_every_checkpoint(monkeypatch)
    model, folder = family(tmp_path / "model", name), tmp_path / "trained"
    script, *options = RECIPES[recipe]
    options += ["--max_steps", 4, "--save_steps", 2, "--average_checkpoints", 2]
    options += ["--run_dir", folder]
    done = run(script, model, *options)
    assert done.returncode == 0, done.stderr
    assert ("trains with padding" in done.stderr) == (name == "kf-deberta")
    whole = weights(folder)

    # As if it had been killed before its last step.
    *_, earlier, last = sorted((folder / "checkpoints").glob("checkpoint-*"))
    assert last.name == "checkpoint-4"
    shutil.rmtree(last)
    for file in ("modules.json", "model.safetensors", "config.json", "scores.json"):
        (folder / file).unlink()
    run_file = folder / "run.json"
    content = json.loads(run_file.read_text(encoding="utf-8")) | {"finished": None}
    run_file.write_text(json.dumps(content), encoding="utf-8")
    done = run(script, model, *options, "--resume")
    assert done.returncode == 0, done.stderr
    assert f"resuming from {earlier}\n" in done.stderr
    resumed = weights(folder)
    assert whole.keys() == resumed.keys()
    assert all(torch.equal(whole[key], resumed[key]) for key in whole)

    done, row = benchmark(folder, tmp_path / "results")
    assert done.returncode == 0, done.stderr
    scored = json.loads(row.read_text(encoding="utf-8"))["scores"]["cosine_spearman"]
    test = json.loads((folder / "scores.json").read_text(encoding="utf-8"))["test"]
    assert scored == pytest.approx(test["cosine_spearman"], abs=1e-6)

    output = tmp_path / "out/tiny.onnx"
    export = ["onnx/export_onnx.py", "--model", folder, "--output", output]
    done = run_script(*export)
    assert done.returncode == 0, done.stderr
    assert sorted(path.name for path in output.parent.iterdir()) == [
        "tiny.json", "tiny.onnx", "tiny.tokenizer.json"
    ]  # fmt: skip
    tokenizer = Tokenizer.from_file(str(output.with_suffix(".tokenizer.json")))
    texts = ["한 남자가 음식을 먹는다.", "가", "여자가 악기를 연주하고 있다. " * 9]
    found = embed(onnxruntime.InferenceSession(output), tokenizer, texts)
    expected = load_encoder(str(folder), device="cpu").encode(texts)
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5)
    if name == "kf-deberta":
        done = run_script(*export, "--quantize", "int8", "--data_dir", SAMPLES,
                          "--results_dir", tmp_path / "results")  # fmt: skip
        assert "error: --quantize int8: deberta-v2 is none of bert, " in refusal(done)


# --- Tokenizers ------------------------------------------------------------------------------


def test_a_tokenizer_that_does_not_know_the_text_is_said(tmp_path: Path) -> None:
    write_plain_encoder(tmp_path / "korean")
    write_plain_encoder(tmp_path / "latin")
    file = tmp_path / "latin/tokenizer.json"
    content = json.loads(file.read_text(encoding="utf-8"))
    vocabulary = content["model"]["vocab"]
    content["model"]["vocab"] = {
        token: number for token, number in vocabulary.items() if token.isascii()
    }
    file.write_text(json.dumps(content), encoding="utf-8")
    said = {}
    for name in ("korean", "latin"):
        done = run("training_sts.py", tmp_path / name, "--max_steps", 1, "--no_test",
                   "--run_dir", tmp_path / f"{name}-run")  # fmt: skip
        assert done.returncode == 0, done.stderr
        said[name] = [line for line in done.stderr.splitlines() if "does not know" in line]
    assert said["korean"] == []
    (line,) = said["latin"]
    share = int(line.split("%")[0].rsplit(" ", 1)[1])
    assert line.startswith("warning: sts: the tokenizer does not know") and 50 < share < 100


def test_unknown_tokens_are_said_from_5_percent_on(capsys: pytest.CaptureFixture[str]) -> None:
    def tokenizer(texts: list[str], **_: object) -> dict[str, list[list[int]]]:
        return {"input_ids": [[0 if word == "?" else 1 for word in t.split()] for t in texts]}

    tokenizer.unk_token_id = 0
    model = SimpleNamespace(tokenizer=tokenizer)
    for known in (19, 20):
        words = " ".join(["?"] + ["가"] * known)
        say_unknown_tokens(
            model.tokenizer, {"sts": pd.DataFrame({"anchor": [words], "score": [1.0]})}
        )
        assert ("does not know 5% of the tokens" in capsys.readouterr().err) == (known == 19)
