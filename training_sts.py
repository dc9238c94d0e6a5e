"""Trains a Korean sentence encoder on KorSTS with a cosine similarity loss.

    python training_sts.py --model_name_or_path klue/roberta-base

The recipe: pairs with scores / 5 as cosine targets (mean squared error), batches of 8, 5 epochs,
AdamW at 2e-5 with 10% of linear warm-up. The dev score is taken after each epoch, and the best
checkpoint by dev cosine Spearman is scored on KorSTS-test.
Data: KorNLUDatasets, CC BY-SA 4.0. Expected (published): klue/roberta-base 81.82, klue/bert-base
81.23 cosine Spearman on KorSTS-test.
"""

from __future__ import annotations

import itertools
import math

import torch
from sentence_transformers.sentence_transformer.losses import (
    AnglELoss,
    CoSENTLoss,
    CosineSimilarityLoss,
)

import training_util
from data_util import command_line, file_record, read_korsts


class PearsonLoss(torch.nn.Module):
    """One minus the Pearson correlation of a batch's cosine similarities with its scores."""

    def __init__(self, model: torch.nn.Module) -> None:
        super().__init__()

    def compute_loss_from_embeddings(
        self, embeddings: list[torch.Tensor], labels: torch.Tensor
    ) -> torch.Tensor:
        cosine = torch.cosine_similarity(*embeddings)
        return 1 - torch.cosine_similarity(cosine - cosine.mean(), labels - labels.mean(), dim=0)


LOSSES = {
    "cosine": CosineSimilarityLoss,
    "cosent": CoSENTLoss,
    "angle": AnglELoss,
    "pearson": PearsonLoss,
}


def main() -> None:
    # 1. Options
    parser = training_util.recipe_parser(
        __doc__.splitlines()[0], output_prefix="kor_sts_", num_epochs=5
    )
    parser.add_argument("--batch_size", type=int, default=8, help="pairs a step")
    parser.add_argument(
        "--loss",
        choices=LOSSES,
        default="cosine",
        help="cosine: squared error of each pair, as the original; cosent, angle: the order of a "
        "batch's pairs; pearson: 1 - their correlation. The last three want 32 pairs or more",
    )
    args = parser.parse_args()
    training_util.check_options(args)

    # 2. Data
    files = {name: args.data_dir / f"KorSTS/sts-{name}.tsv" for name in ("train", "dev", "test")}
    if args.no_test:
        del files["test"]
    tables = {name: read_korsts(path) for name, path in files.items()}
    records = [file_record(files[name], len(table)) for name, table in tables.items()]

    # 3. Batches: every pair once an epoch, in a new order
    rows = len(tables["train"])
    batches_per_epoch = math.ceil((rows - rows % args.world_size) / args.batch_size)
    steps_per_epoch = math.ceil(batches_per_epoch / args.gradient_accumulation_steps)
    steps = args.max_steps or args.num_epochs * steps_per_epoch
    batches = training_util.shuffled_batches(rows, args.batch_size, args.seed, args.world_size)
    batches = itertools.islice(batches, steps * args.gradient_accumulation_steps)
    batches = list(training_util.share(batches, 0, args.world_size))

    # 4. Model and loss
    model = training_util.load_model(args)
    loss = training_util.recipe_loss(model, LOSSES[args.loss](model), args, gather=True)

    # 5. Training: the dev score decides which checkpoint is kept
    training_util.open_run_folder(args, records)
    trainer = training_util.recipe_trainer(
        args,
        model,
        train_data={"sts": tables["train"]},
        losses={"sts": loss},
        batches=batches,
        steps=steps,
        evaluate_at=set(range(steps_per_epoch, steps, steps_per_epoch)),
        dev=tables["dev"],
    )
    best = training_util.train(args, trainer)

    # 6. Test score
    training_util.finish_run(args, trainer, best, tables.get("test"))


if __name__ == "__main__":
    with command_line():
        main()
