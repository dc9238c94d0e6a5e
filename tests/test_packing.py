"""The forward without padding."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest
import torch
from commands import SAMPLES
from sentence_transformers.sentence_transformer.losses import CosineSimilarityLoss

from common.batches import shuffled_batches
from common.data import read_korsts
from common.encoders import load_encoder
from common.packing import pack_sentences


@pytest.mark.parametrize("model_type", ["bert", "roberta"])
def test_packed_sentences_give_the_padded_losses_and_gradients(
    model_type: str, encoder: Path
) -> None:
    from transformers import RobertaConfig, RobertaModel

    def steps(packed: bool) -> tuple[list[float], list[torch.Tensor]]:
        torch.manual_seed(0)
        model = load_encoder(str(encoder), 48, device="cpu")
        if model_type == "roberta":
            config = model[0].model.config.to_dict() | {
                "type_vocab_size": 1,
                "model_type": "roberta",
            }
            config["max_position_embeddings"] = 66
            model[0].model = RobertaModel(RobertaConfig(**config))
        if packed:
            pack_sentences(model, row_length=40)
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
        return losses, gradients

    padded, packed = steps(False), steps(True)
    assert padded[0] == pytest.approx(packed[0], abs=1e-5)
    for expected, actual in zip(padded[1], packed[1], strict=True):
        torch.testing.assert_close(actual, expected, atol=1e-4, rtol=1e-3)
