"""Training on a GPU: rows without padding, graphs of the layers, and the scripts whole."""

from __future__ import annotations

import itertools
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from commands import SAMPLES, keep_every_checkpoint, run
from encoders import edit_json, write_family
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.losses import CosineSimilarityLoss
from transformers import BertConfig, ElectraConfig, PreTrainedConfig, RobertaConfig

from common import graphs, training
from common.batches import shuffled_batches
from common.checkpoints import step_of
from common.data import read_korsts
from common.encoders import load_encoder
from common.graphs import Graphs, use_graphs
from common.packing import OneForward, pack_sentences

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU with CUDA")

SHAPE = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
SHAPE |= {"intermediate_size": 128, "max_position_embeddings": 66, "initializer_range": 0.2}
ROBERTA = SHAPE | {"type_vocab_size": 1, "pad_token_id": 1}


@pytest.fixture(autouse=True)
def captures(monkeypatch: pytest.MonkeyPatch) -> list[torch.Size]:
    """The shapes of rows that were recorded."""
    found, capture = [], Graphs.capture

    def noted(self: Graphs, hidden: torch.Tensor, mask: torch.Tensor) -> graphs.Captured:
        found.append(hidden.shape)
        return capture(self, hidden, mask)

    monkeypatch.setattr(Graphs, "capture", noted)
    return found


def gpu_model(
    folder: Path, config: PreTrainedConfig, dropout: float, packed: bool = True
) -> SentenceTransformer:
    """Returns a model that trains on the GPU, with graphs where it is packed."""
    if not folder.is_dir():
        write_family(folder, config)
    torch.manual_seed(0)
    model = load_encoder(str(folder), 48, device="cuda")
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = dropout
    if packed:
        pack_sentences(model)
        use_graphs(model)
    return model.train()


def batches(model: SentenceTransformer, how_many: int, size: int = 8) -> list:
    """Returns features of KorSTS-like pairs and their labels, on the GPU."""
    pairs = read_korsts(SAMPLES / "KorSTS/sts-train.tsv")
    found = []
    for rows in itertools.islice(shuffled_batches(len(pairs), size, 777), how_many):
        columns = [list(pairs[name].iloc[rows]) for name in ("sentence1", "sentence2")]
        features = [
            {name: value.cuda() for name, value in model.preprocess(column).items()
             if isinstance(value, torch.Tensor)}
            for column in columns
        ]  # fmt: skip
        found.append((features, torch.tensor(pairs["score"].iloc[rows].to_numpy()).cuda()))
    return found


def train(
    model: SentenceTransformer, data: list, precision: str = "fp32", steps_of: int = 1
) -> tuple[list[float], list[torch.Tensor]]:
    """Returns the losses of one forward a batch, and the last step's gradients."""
    loss = OneForward(model, CosineSimilarityLoss(model), gather=False)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)
    losses, gradients = [], []
    for number, (features, labels) in enumerate(data, 1):
        with torch.autocast("cuda", torch.bfloat16, enabled=precision == "bf16"):
            value = loss([dict(column) for column in features], labels)
        value.backward()
        losses.append(value.item())
        if number % steps_of == 0:
            gradients = [p.grad.clone() for p in model.parameters() if p.grad is not None]
            optimizer.step()
            optimizer.zero_grad()
    return losses, gradients


@pytest.mark.parametrize(
    "config",
    [BertConfig(**SHAPE), RobertaConfig(**ROBERTA), ElectraConfig(**SHAPE, embedding_size=16)],
    ids=lambda config: config.model_type,
)
@pytest.mark.parametrize("steps_of", [1, 2], ids=["", "two batches a step"])
def test_graphs_give_the_padded_losses_and_gradients(
    config: PreTrainedConfig, steps_of: int, tmp_path: Path, captures: list[torch.Size]
) -> None:
    padded = gpu_model(tmp_path / "model", config, 0.0, packed=False)
    data = batches(padded, 20)
    expected = train(padded, data, steps_of=steps_of)
    actual = train(gpu_model(tmp_path / "model", config, 0.0), data, steps_of=steps_of)
    assert 0 < len(captures) == len(set(captures)) < 10
    assert actual[0] == pytest.approx(expected[0], abs=1e-5)
    for one, other in zip(actual[1], expected[1], strict=True):
        torch.testing.assert_close(one, other, atol=1e-4, rtol=1e-3)


def test_bf16_differs_by_its_rounding(tmp_path: Path, captures: list[torch.Size]) -> None:
    padded = gpu_model(tmp_path / "model", BertConfig(**SHAPE), 0.0, packed=False)
    data = batches(padded, 10)
    expected = train(padded, data, "bf16")[0]
    actual = train(gpu_model(tmp_path / "model", BertConfig(**SHAPE), 0.0), data, "bf16")[0]
    assert captures
    assert actual == pytest.approx(expected, abs=2e-2)


def first_batch(folder: Path) -> tuple[SentenceTransformer, Callable[[], torch.Tensor]]:
    """Returns a model with dropout, and a function that returns the loss of its first batch."""
    model = gpu_model(folder, BertConfig(**SHAPE), 0.3)
    features, labels = batches(model, 1)[0]
    loss = OneForward(model, CosineSimilarityLoss(model), gather=False)
    return model, lambda: loss([dict(column) for column in features], labels)


def test_every_replay_draws_dropout_anew_from_the_seed(
    tmp_path: Path, captures: list[torch.Size]
) -> None:
    _, loss = first_batch(tmp_path / "model")

    def three() -> list[float]:
        torch.cuda.manual_seed(7)
        found = []
        for _ in range(3):
            value = loss()
            value.backward()
            found.append(value.item())
        return found

    recording = three()  # recorded at its first forward, which draws nothing
    assert len(set(recording)) == 3
    assert three() == recording
    state = torch.cuda.get_rng_state()
    following = loss()
    following.backward()
    torch.cuda.set_rng_state(state)  # as --resume does
    assert loss().item() == following.item()
    assert len(captures) == 1


def test_a_backward_drops_what_its_forward_dropped(
    tmp_path: Path, captures: list[torch.Size]
) -> None:
    """Against the slope of the loss along a direction, with the same draws at both ends."""
    model, loss = first_batch(tmp_path / "model")
    weights = list(model[0].model.encoder.parameters())
    generator = torch.Generator().manual_seed(0)
    direction = [torch.randn(p.shape, generator=generator).to(p.device) for p in weights]

    def moved(way: float) -> torch.Tensor:
        """Returns the loss after a step of that length, always with the same draws."""
        torch.cuda.manual_seed(7)
        with torch.no_grad():
            for p, step in zip(weights, direction, strict=True):
                p.add_(step, alpha=way)
        value = loss()
        value.backward()
        return value.detach().double()

    moved(0.0)
    slope = sum((p.grad * step).sum() for p, step in zip(weights, direction, strict=True))
    length = 1e-3
    rise = moved(length) - moved(-2 * length)
    assert slope.item() == pytest.approx(rise.item() / (2 * length), rel=0.05)
    assert len(captures) == 1


def test_a_second_forward_before_the_backward_runs_without_graphs(
    tmp_path: Path, captures: list[torch.Size]
) -> None:
    def gradients(packed: bool) -> list[torch.Tensor]:
        model = gpu_model(tmp_path / "model", BertConfig(**SHAPE), 0.0, packed)
        (features, labels), *_ = batches(model, 1)
        for _ in range(2):  # one forward a column: two before each backward
            model.zero_grad()
            CosineSimilarityLoss(model)([dict(column) for column in features], labels).backward()
        return [p.grad for p in model.parameters() if p.grad is not None]

    for one, other in zip(gradients(True), gradients(False), strict=True):
        torch.testing.assert_close(one, other, atol=1e-4, rtol=1e-3)
    assert len(captures) == 1  # the first column's


def test_scoring_runs_without_graphs(tmp_path: Path, captures: list[torch.Size]) -> None:
    model = gpu_model(tmp_path / "model", BertConfig(**SHAPE), 0.1)
    model.encode(["한 남자가 파스타를 먹는다."] * 3)
    assert not captures


# Of the scripts: what is trained in which way, without dropout where two ways are compared.
STS, NLI = ["training_sts.py"], ["training_nli.py", "--batch_size", 16]
WITHOUT_DROPOUT = ["--attention_dropout", 0, "--hidden_dropout", 0]
WAYS = {
    "sts": STS,
    "pearson": [*STS, "--loss", "pearson", "--batch_size", 32],
    "nli": NLI,
    "two batches a step": [*NLI, "--gradient_accumulation_steps", 2],
    "matryoshka": [*NLI, "--matryoshka_dims", "32,16"],
    "cached": [*NLI, "--mini_batch_size", 8],
    "multi-task": ["training_multi-task.py", "--nli_batch_size", 8],
}


@pytest.fixture
def losses(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The losses of the scripts' steps."""
    found, training_step = [], training.RecipeTrainer.training_step

    def noted(*args: Any, **kwargs: Any) -> torch.Tensor:
        loss = training_step(*args, **kwargs)
        found.append(loss.item())
        return loss

    monkeypatch.setattr(training.RecipeTrainer, "training_step", noted)
    return found


def trained(encoder: Path, folder: Path, *options: object) -> str:
    """Returns what a script says that trains eight steps."""
    script, *rest = options
    rest += ["--max_steps", 8, "--no_test", "--run_dir", folder]
    done = run(script, encoder, *rest)
    assert done.returncode == 0, done.stderr
    return done.stderr


@pytest.mark.parametrize("way", WAYS)
def test_the_scripts_have_the_losses_that_padding_gives(
    way: str,
    encoder: Path,
    tmp_path: Path,
    losses: list[float],
    captures: list[torch.Size],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    options = [*WAYS[way], *WITHOUT_DROPOUT, "--precision", "fp32"]
    trained(encoder, tmp_path / "packed", *options)
    assert bool(captures) == (way != "cached")
    packed = [losses.pop() for _ in list(losses)]
    recorded = len(captures)
    monkeypatch.setattr(training, "pack_sentences", lambda model: None)
    trained(encoder, tmp_path / "padded", *options)
    assert len(captures) == recorded
    assert packed == pytest.approx(losses[::-1], abs=1e-4)


@pytest.mark.parametrize("precision", ["fp16", "bf16"])
@pytest.mark.parametrize("way", ["sts", "nli", "gist", "cached", "multi-task"])
def test_the_scripts_train_in_half_precision(
    way: str, precision: str, encoder: Path, tmp_path: Path, losses: list[float]
) -> None:
    gist = [*NLI, "--loss", "gist", "--guide", encoder]
    options = [*(gist if way == "gist" else WAYS[way]), *WITHOUT_DROPOUT, "--precision"]
    trained(encoder, tmp_path / precision, *options, precision)
    half = [losses.pop() for _ in list(losses)]
    trained(encoder, tmp_path / "fp32", *options, "fp32")
    assert half == pytest.approx(losses[::-1], abs=3e-2)


@pytest.mark.parametrize("way", ["pearson", "nli", "cached", "multi-task"])
def test_a_resumed_run_goes_on_with_the_same_losses(
    way: str,
    encoder: Path,
    tmp_path: Path,
    losses: list[float],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """With dropout: its draws go on where the checkpoint was written."""
    keep_every_checkpoint(monkeypatch)
    options = [*WAYS[way], "--precision", "fp32", "--save_steps", 4]
    trained(encoder, tmp_path / "run", *options)
    whole = losses[4:]
    losses.clear()
    for checkpoint in (tmp_path / "run/checkpoints").glob("checkpoint-*"):
        if step_of(checkpoint) > 4:
            shutil.rmtree(checkpoint)
    for name in ("modules.json", "scores.json"):
        (tmp_path / "run" / name).unlink()
    edit_json(tmp_path / "run/run.json", finished=None)
    said = trained(encoder, tmp_path / "run", *options, "--resume")
    assert "checkpoint-4\n" in said
    assert losses == pytest.approx(whole, abs=1e-5)


def test_a_batch_waits_for_nothing_on_its_way(
    encoder: Path, tmp_path: Path, captures: list[torch.Size], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A step does not wait for the GPU: not for a batch, nor for its layout, nor for its loss."""
    step, waits = training.RecipeTrainer.training_step, []

    def strict(self: training.RecipeTrainer, *args: Any, **kwargs: Any) -> torch.Tensor:
        recorded = len(captures)
        torch.cuda.set_sync_debug_mode("warn")
        try:
            with warnings.catch_warnings(record=True) as said:
                warnings.simplefilter("always")
                loss = step(self, *args, **kwargs)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        if len(captures) == recorded:  # recording a graph waits
            waits.append([str(one.message) for one in said if "synchronizing" in str(one.message)])
        return loss

    monkeypatch.setattr(training.RecipeTrainer, "training_step", strict)
    trained(encoder, tmp_path / "run", *NLI, "--precision", "bf16")
    assert len(waits) > 2 and not any(waits[1:])
