"""Dropout by bytes: shares, scale, gradients, seeds; and that packed training draws by it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from encoders import write_family
from exports import bert, roberta

from common.dropout import Dropout, drop, keep_mask
from common.encoders import load_encoder
from common.packing import _attention_in_fp32, pack_sentences


@pytest.mark.parametrize("dropped", [1, 26, 128, 255])
def test_a_share_of_the_elements_is_dropped(dropped: int) -> None:
    torch.manual_seed(1)
    mask = keep_mask(torch.Size([1000, 1001]), dropped)
    assert mask.dtype == torch.uint8 and set(mask.unique().tolist()) == {0, 1}
    share, deviation = dropped / 256, (dropped / 256 * (1 - dropped / 256) / mask.numel()) ** 0.5
    assert abs(1 - mask.float().mean().item() - share) < 5 * deviation
    neighbours = (mask[:, 1:] & mask[:, :-1]).float().mean().item()  # of one draw, mostly
    assert neighbours == pytest.approx((1 - share) ** 2, abs=0.003)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_is_kept_is_scaled_and_so_is_its_gradient(dtype: torch.dtype) -> None:
    torch.manual_seed(2)
    values = torch.rand(300, 7, dtype=dtype).add_(0.5).requires_grad_()
    dropped = drop(values, 0.1)
    assert dropped.dtype == dtype
    kept = dropped != 0
    torch.testing.assert_close(dropped[kept], (values * 256 / 230)[kept])
    dropped.backward(torch.full_like(dropped, 3))
    torch.testing.assert_close(values.grad, (kept * 3 * 256 / 230).to(dtype))
    torch.autograd.gradcheck(
        lambda values: (torch.manual_seed(3), drop(values, 0.4))[1],
        torch.rand(4, 5, dtype=torch.float64, requires_grad=True),
    )


def test_the_scale_is_not_rounded_to_bfloat16() -> None:
    values = torch.rand(100_000, generator=torch.Generator().manual_seed(9)).add_(1).bfloat16()
    dropped = drop(values, 0.1)
    kept = dropped != 0
    ratio = dropped[kept].float().sum() / values[kept].float().sum()
    assert ratio.item() == pytest.approx(256 / 230, rel=1e-4)


def test_draws_are_those_of_torchs_generator() -> None:
    values = torch.ones(100)
    torch.manual_seed(4)
    first = drop(values, 0.5)
    state = torch.get_rng_state()
    second = drop(values, 0.5)
    torch.set_rng_state(state)  # as a resumed run does
    assert torch.equal(drop(values, 0.5), second) and not torch.equal(first, second)


@pytest.mark.parametrize("share", [0.001, 0.003, 0.999, 1.0])
def test_a_share_that_bytes_miss_is_torchs(share: float) -> None:
    torch.manual_seed(5)
    expected = torch.nn.functional.dropout(torch.ones(10_000), share)
    torch.manual_seed(5)
    assert torch.equal(drop(torch.ones(10_000), share), expected)


def test_evaluation_drops_nothing() -> None:
    values = torch.ones(100)
    assert torch.equal(Dropout(0.5).eval()(values), values)
    assert torch.equal(Dropout(0.0)(values), values)


@pytest.mark.parametrize("config", [bert(), roberta()], ids=["bert", "roberta"])
def test_packed_training_never_asks_torch_for_dropout(
    config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = load_encoder(str(write_family(tmp_path, config)), 48, device="cpu")
    pack_sentences(model)
    model.train()

    def refused(*args: object, **options: object) -> None:
        raise AssertionError("torch's own dropout")

    monkeypatch.setattr(torch.nn.functional, "dropout", refused)
    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", refused)
    features = model.preprocess(["안녕하세요", "한 남자가 파스타를 먹는다."])
    one = model(dict(features))["sentence_embedding"]
    other = model(dict(features))["sentence_embedding"]
    assert one.isfinite().all() and not torch.equal(one, other)


def test_attention_drops_probabilities_and_passes_gradients() -> None:
    generator = torch.Generator().manual_seed(7)
    columns = [torch.randn(2, 3, 5, 4, generator=generator).requires_grad_() for _ in range(3)]
    mask = torch.zeros(2, 1, 5, 5).masked_fill(torch.eye(5) > 0, torch.finfo(torch.float32).min)
    torch.manual_seed(8)
    found, _ = _attention_in_fp32(None, *columns, mask, dropout=0.25, scaling=0.5)
    gradients = torch.autograd.grad(found.square().sum(), columns)
    torch.manual_seed(8)
    kept = keep_mask(torch.Size([2, 3, 5, 5]), 64).float()
    query, key, value = columns
    weights = (query @ key.mT * 0.5 + mask).softmax(-1) * kept / 0.75
    expected = (weights @ value).transpose(1, 2)
    torch.testing.assert_close(found, expected)
    assert found.is_contiguous()
    torch.testing.assert_close(gradients, torch.autograd.grad(expected.square().sum(), columns))


def test_a_packed_model_saves_what_it_was_loaded_from(tmp_path: Path) -> None:
    model = load_encoder(str(write_family(tmp_path / "plain", bert())), 48, device="cpu")
    names, config = list(model.state_dict()), model[0].model.config.to_dict()
    pack_sentences(model)
    assert list(model.state_dict()) == names and model[0].model.config.to_dict() == config


def test_attention_with_dropout_has_the_expectation_of_attention(tmp_path: Path) -> None:
    model = load_encoder(str(write_family(tmp_path, bert())), 48, device="cpu")
    pack_sentences(model)
    encoder, hidden = model[0].model, []
    attention = encoder.encoder.layer[0].attention.self
    attention.register_forward_hook(lambda module, inputs, outputs: hidden.append(outputs[0]))
    for module in model.modules():
        if isinstance(module, Dropout):
            module.p = 0.0
    model.train()
    features = model.preprocess(["안녕하세요", "한 남자가 파스타를 먹는다."])
    with torch.no_grad():
        model(dict(features))
        (expected,) = hidden
        hidden.clear()
        attention.dropout.p = 0.3
        torch.manual_seed(6)
        for _ in range(400):
            model(dict(features))
    drawn = torch.stack(hidden)
    assert drawn.std(0).max() > 0.01 * expected.abs().max()
    error = (drawn.mean(0) - expected).abs()
    assert (error < 6 * drawn.std(0) / 400**0.5 + 1e-6).all()
