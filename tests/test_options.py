"""The options that all recipes have."""

from __future__ import annotations

import argparse
import re
from pathlib import Path

import pytest
import torch

from common.command_line import UserError
from common.options import check_options, recipe_parser
from common.training import load_model


def options_of(*options: str) -> argparse.Namespace:
    return recipe_parser("", "x_", 1).parse_args(options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--matryoshka_weights", "1,1"], "give --matryoshka_dims too"),
        (["--matryoshka_dims", "8,4", "--matryoshka_weights", "1"], "1 weights for 2 dims"),
        (["--matryoshka_dims", "4,8"], "strictly decreasing"),
        (["--matryoshka_dims", "8,8"], "strictly decreasing"),
        (["--matryoshka_dims", "8,0"], "at least 1"),
        (["--num_epochs", "0"], "--num_epochs 0: must be above 0"),
        (["--learning_rate", "nan"], "--learning_rate nan: must be above 0"),
        (["--max_steps", "-1"], "--max_steps -1: must be above 0"),
        (["--seed", "-1"], "--seed -1"),
        (["--average_checkpoints", "0"], "--average_checkpoints 0: must be above 0"),
        (["--start_weight", "1"], "--start_weight 1.0: must be from 0 to below 1"),
        (["--attention_dropout", "1"], "--attention_dropout 1.0: must be from 0 to below 1"),
        (["--hidden_dropout", "-0.1"], "--hidden_dropout -0.1: must be from 0 to below 1"),
        (["--resume"], "give the folder"),
        (["--resume", "--run_dir", "nowhere"], "no run to go on with"),
        (["--run_dir", "."], "not empty"),
        pytest.param(
            ["--precision", "fp16"],
            "needs a GPU",
            marks=pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU"),
        ),
    ],
)
def test_options_that_cannot_work_are_refused(options: list[str], message: str) -> None:
    with pytest.raises(UserError, match=re.escape(message)) as error:
        check_options(options_of(*options), 1)
    assert len(str(error.value).splitlines()) == 1


def test_train_files_add_up_and_a_second_dev_or_test_file_is_refused() -> None:
    parser = recipe_parser("", "x_", 1, scored_pairs=True)
    args = parser.parse_args(["--train_file", "a", "b", "--train_file", "c", "--dev_file", "d"])
    assert args.train_file == [Path("a"), Path("b"), Path("c")] and args.dev_file == Path("d")
    assert parser.parse_args([]).train_file is None
    for option in ("--dev_file", "--test_file"):
        with pytest.raises(UserError, match=f"^{option} is given twice: put all pairs in one f"):
            options_of(option, "a", option, "b")


def test_a_dim_above_the_model_and_a_length_above_its_positions(encoder: Path) -> None:
    model = ["--model_name_or_path", str(encoder)]
    with pytest.raises(UserError, match="--matryoshka_dims 64: the model has 32"):
        load_model(options_of(*model, "--max_seq_length", "48", "--matryoshka_dims", "64,32"))
    with pytest.raises(UserError, match="has 64 positions"):
        load_model(options_of(*model, "--max_seq_length", "65"))


@pytest.mark.parametrize(
    ("length", "prompt", "filled"), [(1, "", 2), (2, "", 2), (3, None, 2), (3, "a", 3), (5, "a", 3)]
)
def test_a_length_that_prompt_and_special_tokens_fill(
    length: int, prompt: str | None, filled: int, encoder: Path
) -> None:
    options = ["--model_name_or_path", str(encoder), "--max_seq_length", str(length)]
    args = options_of(*options, *(() if prompt is None else ("--prompt", prompt)))
    if length > filled:
        assert load_model(args).max_seq_length == length
        return
    with pytest.raises(UserError, match=f"--max_seq_length {length}: no room .* are {filled}$"):
        load_model(args)
