"""The forward without padding."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest
import torch
from commands import SAMPLES, run
from encoders import write_family
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer import modules
from sentence_transformers.sentence_transformer.losses import CosineSimilarityLoss
from transformers import (
    BertConfig,
    CamembertConfig,
    DistilBertConfig,
    ElectraConfig,
    PreTrainedConfig,
    RobertaConfig,
    XLMRobertaConfig,
)

from common import graphs
from common.batches import shuffled_batches
from common.data import read_korsts
from common.encoders import load_encoder
from common.packing import GPU_STEPS, lay_in_rows, pack_sentences

CONFIG = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 64,
    "max_position_embeddings": 66,
    "initializer_range": 0.2,
}
# What is made like RoBERTa counts positions from behind its padding index.
ROBERTA = CONFIG | {"type_vocab_size": 1, "pad_token_id": 1}


@pytest.mark.parametrize(
    "config",
    [
        BertConfig(**CONFIG),
        RobertaConfig(**ROBERTA),
        XLMRobertaConfig(**ROBERTA),
        CamembertConfig(**ROBERTA),
        ElectraConfig(**CONFIG, embedding_size=16),
    ],
    ids=lambda config: config.model_type,
)
def test_packed_sentences_give_the_padded_losses_and_gradients(
    config: PreTrainedConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_family(tmp_path, config)
    places = []  # of the tokens that go through the encoder, by forward

    def steps(packed: bool) -> tuple[list[float], list[torch.Tensor], list[int]]:
        torch.manual_seed(0)
        model = load_encoder(str(tmp_path), 48, device="cpu")
        places.clear()
        model[0].model.embeddings.register_forward_pre_hook(
            lambda module, args, kwargs: places.append(kwargs["input_ids"].numel()),
            with_kwargs=True,
        )
        if packed:
            pack_sentences(model)
        for module in model.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.0
        model.train()
        loss = CosineSimilarityLoss(model)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
        pairs = read_korsts(SAMPLES / "KorSTS/sts-train.tsv")
        losses = []
        for batch in itertools.islice(shuffled_batches(len(pairs), 8, 777), 20):
            columns = [list(pairs[name].iloc[batch]) for name in ("sentence1", "sentence2")]
            features = [model.preprocess(column) for column in columns]
            value = loss(features, torch.tensor(pairs["score"].iloc[batch].to_numpy()))
            value.backward()
            gradients = [p.grad.clone() for p in model.parameters() if p.grad is not None]
            optimizer.step()
            optimizer.zero_grad()
            losses.append(value.item())
        return losses, gradients, list(places)

    padded, packed = steps(False), steps(True)
    assert len(packed[2]) == 40  # both columns of 20 batches
    assert sum(packed[2]) < 0.9 * sum(padded[2])
    assert "trains with padding" not in capsys.readouterr().err
    assert padded[0] == pytest.approx(packed[0], abs=1e-5)
    for expected, actual in zip(padded[1], packed[1], strict=True):
        torch.testing.assert_close(actual, expected, atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize("steps", [(1, 1), GPU_STEPS], ids=["", "on a GPU"])
@pytest.mark.parametrize(
    "lengths", [[1], [7, 7, 7, 7], [48, 3, 3, 40, 20, 20], [100, 90, 5, 5, 5, 1], [10] * 64]
)
def test_rows_hold_every_sentence_once_and_little_else(
    lengths: list[int], steps: tuple[int, int]
) -> None:
    width, rows, first = lay_in_rows(lengths, *steps)
    taken = [
        place for start, n in zip(first, lengths, strict=True) for place in range(start, start + n)
    ]
    assert len(set(taken)) == len(taken) == sum(lengths)
    assert max(taken) < rows * width
    assert all(
        start // width == (start + n - 1) // width for start, n in zip(first, lengths, strict=True)
    )
    assert width % steps[0] == 0 and rows % steps[1] == 0
    if steps == (1, 1):
        assert rows * width <= max(24, 1.1 * sum(lengths))


def test_on_a_gpu_rows_have_few_shapes() -> None:
    lengths = [5 + 7 * number % 44 for number in range(192)]
    width, rows, _ = lay_in_rows(lengths, *GPU_STEPS)
    assert rows * width < 1.1 * sum(lengths)
    shapes = {lay_in_rows(lengths[number:], *GPU_STEPS)[:2] for number in range(20)}
    assert len(shapes) < 5


def test_on_other_devices_the_forward_stays(tmp_path: Path) -> None:
    model = load_encoder(str(write_family(tmp_path, BertConfig(**CONFIG))), 48, device="cpu")
    pack_sentences(model.to("meta"))
    assert "forward" not in vars(model[0].model)


def test_rows_may_be_longer_than_a_sentence_can_be(tmp_path: Path) -> None:
    config = RobertaConfig(**ROBERTA | {"max_position_embeddings": 18})  # 16 tokens
    model = load_encoder(str(write_family(tmp_path, config, model_max_length=16)), 16, device="cpu")
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    features = model.preprocess(["한 남자가 파스타를 먹는다. 맛있게 먹는다."] * 3)
    assert lay_in_rows(features["attention_mask"].sum(1).tolist())[0] > 16
    padded = model(dict(features))["sentence_embedding"]
    pack_sentences(model)
    torch.testing.assert_close(model.train()(dict(features))["sentence_embedding"], padded)


@pytest.mark.parametrize(
    "config",
    [
        DistilBertConfig(dim=32, hidden_dim=64, n_layers=1, n_heads=2),
        BertConfig(**CONFIG, is_decoder=True),
    ],
    ids=["another family", "a decoder"],
)
def test_what_is_not_packed_says_so_and_keeps_its_forward(
    config: PreTrainedConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = load_encoder(str(write_family(tmp_path, config)), 48, device="cpu")
    capsys.readouterr()
    pack_sentences(model)
    (line,) = capsys.readouterr().err.splitlines()
    family = "bert, a decoder," if getattr(config, "is_decoder", False) else "distilbert"
    assert line.startswith(f"note: {family} trains with padding: only bert, ")
    assert "forward" not in vars(model[0].model)


def test_a_model_that_uses_all_layers_trains_with_padding(encoder: Path, tmp_path: Path) -> None:
    options = {"max_seq_length": 48, "config_kwargs": {"output_hidden_states": True}}
    layers = modules.WeightedLayerPooling(32, num_hidden_layers=2, layer_start=1)
    parts = [modules.Transformer(str(encoder), **options), layers, modules.Pooling(32)]
    SentenceTransformer(modules=parts).save_pretrained(str(tmp_path / "layers"))
    done = run("training_sts.py", tmp_path / "layers", "--max_steps", 2, "--no_test",
               "--run_dir", tmp_path / "run")  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "note: bert trains with padding: the model uses all layers\n" in done.stderr


def test_code_that_calls_itself_bert_trains_with_padding(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = load_encoder(str(write_family(tmp_path, BertConfig(**CONFIG))), 48, device="cpu")
    encoder = model[0].model
    encoder.__class__ = type("JinaBertModel", (type(encoder),), {"__module__": "carried"})
    capsys.readouterr()
    pack_sentences(model)
    assert capsys.readouterr().err.startswith("note: JinaBertModel, code of its own, trains with")
    assert "forward" not in vars(encoder)


def test_graphs_take_few_shapes_and_one_forward_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a GPU: what is recorded and replayed is tests/test_gpu.py's."""
    for name in ("graph_pool_handle", "Stream"):
        monkeypatch.setattr(torch.cuda, name, lambda: None)
    monkeypatch.setattr(graphs.Graphs, "capture", lambda self, hidden, mask: len(self.captured))
    monkeypatch.setattr(graphs.Replay, "apply", lambda graphs, captured, *_: captured)
    monkeypatch.setattr(graphs, "MOST_SHAPES", 2)
    found = graphs.Graphs(torch.nn.Linear(2, 2))

    def compute(rows: int, dtype: torch.dtype = torch.float32) -> int | None:
        return found.compute(torch.zeros(rows, 4, 2), torch.zeros(rows, 1, 4, 4, dtype=dtype))

    assert compute(1) == 0
    assert compute(1) is None  # its backward is still to come
    found.in_use = False
    assert compute(1, torch.bfloat16) == 1  # another shape, for this
    found.in_use = False
    assert compute(2) is None  # a third shape
    assert compute(1) == 0


def test_without_a_gpu_there_are_no_graphs(tmp_path: Path) -> None:
    model = load_encoder(str(write_family(tmp_path, BertConfig(**CONFIG))), 48, device="cpu")
    pack_sentences(model)
    graphs.use_graphs(model)
    assert "forward" not in vars(model[0].model.encoder)
