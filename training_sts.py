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
from sentence_transformers.sentence_transformer import losses

from common.batches import check_accumulation, share, shuffled_batches
from common.command_line import command_line
from common.options import check_options, recipe_parser, start_processes
from common.run_folder import finish_run, open_run
from common.splits import read_data
from common.training import load_model, recipe_loss, recipe_trainer, train


class PearsonLoss(torch.nn.Module):
    """One minus the Pearson correlation of a batch's cosine similarities with its scores."""

    def __init__(self, model: torch.nn.Module) -> None:
        super().__init__()

    def compute_loss_from_embeddings(
        self, embeddings: list[torch.Tensor], labels: torch.Tensor
    ) -> torch.Tensor:
        cosine = torch.cosine_similarity(*embeddings)
        return 1 - torch.cosine_similarity(cosine - cosine.mean(), labels - labels.mean(), dim=0)


# Each is called with the model. forward(features, labels) gets the tokens of the two sentences, and
# the scores, (batch,) float32 in [0, 1]. What has compute_loss_from_embeddings(embeddings, labels)
# gets two (batch, dimension) tensors instead, of one forward.
LOSSES = {
    "cosine": losses.CosineSimilarityLoss,
    "cosent": losses.CoSENTLoss,
    "angle": losses.AnglELoss,
    "pearson": PearsonLoss,
}


def main() -> None:
    # 1. Options
    parser = recipe_parser(__doc__.splitlines()[0], "kor_sts_", num_epochs=5, scored_pairs=True)
    parser.add_argument("--batch_size", type=int, default=8, help="pairs a step")
    parser.add_argument(
        "--loss",
        choices=LOSSES,
        default="cosine",
        help="cosine: squared error of each pair, as the original; cosent, angle: the order of a "
        "batch's pairs; pearson: 1 - their correlation. The last three want 32 pairs or more",
    )
    args = parser.parse_args()
    processes = start_processes()
    check_options(args, processes)

    # 2. Data: KorSTS, or the files that the options name
    data = read_data(args, "sts")

    # 3. Batches and schedule: every pair once an epoch, in a new order
    rows = len(data.train["sts"])
    batches_per_epoch = math.ceil((rows - rows % processes) / args.batch_size)
    check_accumulation(args.gradient_accumulation_steps, batches_per_epoch)
    steps_per_epoch = round(batches_per_epoch / args.gradient_accumulation_steps)
    steps = args.max_steps or args.num_epochs * steps_per_epoch
    schedule = {
        "optim": "adamw_torch_fused",
        "learning_rate": args.learning_rate,
        "lr_scheduler_type": "linear",
        "warmup_steps": math.ceil(0.1 * steps),
        "weight_decay": 0.01,
        "max_grad_norm": 1.0,
    }
    batches = shuffled_batches(rows, args.batch_size, args.seed, processes)
    batches = itertools.islice(batches, steps * args.gradient_accumulation_steps)
    batches = list(share(batches, 0, processes))

    # 4. Model and loss
    model = load_model(args)
    loss = LOSSES[args.loss](model)

    # 5. Training: the dev score decides which checkpoint is kept
    run = open_run(args, data.records, model)
    trainer = recipe_trainer(
        run,
        model,
        train_data=data.train,
        losses={"sts": recipe_loss(model, loss, args, gather=processes > 1)},
        batches=batches,
        dev=data.dev,
        evaluate_at=set(range(steps_per_epoch, steps, steps_per_epoch)),
        **schedule,
    )
    result = train(run, trainer)

    # 6. Test score
    finish_run(run, result, data.test)


if __name__ == "__main__":
    with command_line():
        main()
