"""Orders of rows."""

from __future__ import annotations

import itertools

import pandas as pd
import pytest
from commands import SAMPLES

from common.batches import no_duplicates_batches, share, shuffled_batches
from common.command_line import UserError
from common.formats import read_nli_triplets


def test_shuffled_batches_cover_every_row_each_pass_in_a_new_order() -> None:
    batches = list(itertools.islice(shuffled_batches(21, 8, 777), 6))
    assert [len(batch) for batch in batches] == [8, 8, 5, 8, 8, 5]
    first, second = sum(batches[:3], []), sum(batches[3:], [])
    assert sorted(first) == sorted(second) == list(range(21))
    assert first != second
    shared = list(itertools.islice(shuffled_batches(21, 8, 777, 2), 3))
    assert [len(batch) for batch in shared] == [8, 8, 4]


def test_fewer_rows_than_processes_are_refused_before_a_batch_is_asked_for() -> None:
    with pytest.raises(UserError, match="1 pairs to train on cannot be shared by 2 processes"):
        shuffled_batches(1, 8, 777, 2)
    assert next(shuffled_batches(2, 8, 777, 2)) in ([0, 1], [1, 0])


def test_nli_batches_hold_no_text_twice_and_go_on_through_the_data() -> None:
    files = [SAMPLES / f"KorNLI/{name}" for name in
             ("multinli.train.ko.tsv", "snli_1.0_train.ko.tsv")]  # fmt: skip
    triplets, _ = read_nli_triplets(files, 777)
    batches = list(itertools.islice(no_duplicates_batches(triplets, 16, 777), 30))
    for batch in batches:
        texts = triplets.iloc[batch].to_numpy().ravel().tolist()
        assert len(batch) == 16
        assert len(set(texts)) == len(texts)
    per_pass = len(triplets) // 16
    first_pass = sum(batches[:per_pass], [])
    assert len(set(first_pass)) > 0.9 * len(first_pass)
    assert batches[:per_pass] != batches[per_pass : 2 * per_pass]


def test_texts_that_differ_in_case_and_spaces_alone_are_duplicates() -> None:
    rows = [(f"a{i % 2}", f"b{i}", f"c{i}") for i in range(4)]
    table = pd.DataFrame(rows, columns=["anchor", "positive", "negative"])
    table.loc[2, "anchor"] = " A0 "
    for batch in itertools.islice(no_duplicates_batches(table, 2, 1), 6):
        anchors = table["anchor"].iloc[batch].str.strip().str.lower()
        assert anchors.nunique() == 2


def test_data_too_small_for_one_batch_is_an_error() -> None:
    table = pd.DataFrame({"anchor": ["a"] * 9, "positive": ["b"] * 9, "negative": ["c"] * 9})
    with pytest.raises(UserError, match="9 triplets cannot fill one batch of 4"):
        next(no_duplicates_batches(table, 4, 777))


def test_shares_are_equal_and_make_up_the_batch() -> None:
    shares = list(share([[0, 1, 2, 3], [4, 5]], 100, 2))
    assert shares == [[100, 101], [102, 103], [104], [105]]
