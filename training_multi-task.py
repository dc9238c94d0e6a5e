"""Trains a Korean sentence encoder on KorNLI and KorSTS together, batch by batch in turn.

    python training_multi-task.py --model_name_or_path klue/roberta-base

The recipe: one step of NLI (multiple negatives ranking, 64 triplets without a text twice), one of
STS (cosine similarity, 8 pairs), and so on; 5 epochs, each as long as the shorter data; NLI goes on
through KorNLI across epochs. Each task has its own AdamW moments, the learning rate (2e-5, 10% of
linear warm-up) reaches 0 at the end. The dev score is taken after each epoch, and the best
checkpoint by dev cosine Spearman is scored on KorSTS-test.
Data: KorNLUDatasets, CC BY-SA 4.0. Expected (published): klue/roberta-base 85.60, klue/bert-base
84.71 cosine Spearman on KorSTS-test.
"""

from __future__ import annotations

import itertools
import math

from sentence_transformers.sentence_transformer.losses import (
    CosineSimilarityLoss,
    MultipleNegativesRankingLoss,
)

from common.batches import (
    check_accumulation,
    no_duplicates_batches,
    share,
    shuffled_batches,
)
from common.command_line import command_line
from common.options import FILES, check_options, recipe_parser, start_processes
from common.run_folder import finish_run, open_run
from common.splits import read_data
from common.training import load_model, recipe_loss, recipe_trainer, train
from common.two_tasks import AdamWPerTask, TakeTurns


def main() -> None:
    # 1. Options
    parser = recipe_parser(__doc__.splitlines()[0], "kor_multi_", num_epochs=5, scored_pairs=True)
    parser.add_argument("--nli_batch_size", type=int, default=64, help="triplets an NLI step")
    parser.add_argument("--sts_batch_size", type=int, default=8, help="pairs an STS step")
    parser.add_argument("--train_files", **FILES, help="KorNLI files instead of both")
    args = parser.parse_args()
    processes = start_processes()
    check_options(args, processes)

    # 2. Data: KorNLI and KorSTS, or the files that the options name
    data = read_data(args, "nli", "sts")

    # 3. Batches and schedule: NLI and STS in turn, an epoch as long as the shorter
    triplets, rows = data.train["nli"], len(data.train["sts"])
    accumulation = args.gradient_accumulation_steps
    sts_batches = math.ceil((rows - rows % processes) / args.sts_batch_size)
    nli_batches = max(1, len(triplets) // args.nli_batch_size)
    check_accumulation(accumulation, min(sts_batches, nli_batches))
    steps_per_epoch = 2 * round(min(sts_batches, nli_batches) / accumulation)
    steps = args.max_steps or args.num_epochs * steps_per_epoch
    schedule = {
        "learning_rate": args.learning_rate,
        "lr_scheduler_type": "linear",
        "warmup_steps": math.ceil(0.1 * steps),
        "weight_decay": 0.01,
        "max_grad_norm": 1.0,
    }
    nli = no_duplicates_batches(triplets, args.nli_batch_size, args.seed)
    sts = shuffled_batches(rows, args.sts_batch_size, args.seed, processes)
    batches = []
    for step in range(steps):
        task, offset = (nli, 0) if step % 2 == 0 else (sts, len(triplets))
        batches += share(itertools.islice(task, accumulation), offset, processes)

    # 4. Model and losses
    model = load_model(args)
    nli_loss = MultipleNegativesRankingLoss(model, scale=20.0, gather_across_devices=processes > 1)
    losses = {"nli": nli_loss, "sts": CosineSimilarityLoss(model)}

    # 5. Training: the dev score decides which checkpoint is kept
    run = open_run(args, data.records, model)
    trainer = recipe_trainer(
        run,
        model,
        train_data=data.train,
        losses={name: recipe_loss(model, loss, args) for name, loss in losses.items()},
        batches=batches,
        dev=data.dev,
        evaluate_at=set(range(steps_per_epoch, steps, steps_per_epoch)),
        optimizer=(AdamWPerTask, {"lr": args.learning_rate, "fused": True}),
        callbacks=[TakeTurns()],
        **schedule,
    )
    result = train(run, trainer)

    # 6. Test score
    finish_run(run, result, data.test)


if __name__ == "__main__":
    with command_line():
        main()
