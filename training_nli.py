"""Trains a Korean sentence encoder on KorNLI with a multiple negatives ranking loss.

    python training_nli.py --model_name_or_path klue/roberta-base

The recipe: (anchor, entailment, contradiction) triplets, the batch's other positives and all
negatives as negatives (scale 20), batches of 64 without a text twice, 1 epoch, AdamW at 2e-5 with
10% of linear warm-up. The dev score (KorSTS) is taken every 1,000 steps, and the best checkpoint
by dev cosine Spearman is scored on KorSTS-test.
Data: KorNLUDatasets, CC BY-SA 4.0. Expected (published): klue/roberta-base 83.85, klue/bert-base
83.16 cosine Spearman on KorSTS-test.
"""

from __future__ import annotations

import itertools
import math
from functools import partial

from sentence_transformers.sentence_transformer import losses

from common.batches import check_accumulation, no_duplicates_batches, share
from common.command_line import UserError, command_line
from common.encoders import load_encoder
from common.options import FILES, check_options, recipe_parser, start_processes
from common.run_folder import finish_run, open_run
from common.splits import read_data
from common.training import load_model, recipe_loss, recipe_trainer, train

# Each is called with the model. forward(features, labels) gets the tokens of anchor, positive and,
# of triplets, negative; labels is None. What has compute_loss_from_embeddings(embeddings, labels)
# gets one (batch, dimension) tensor a column instead, of one forward. CACHED: in mini-batches.
LOSSES = {
    "mnr": partial(losses.MultipleNegativesRankingLoss, scale=20.0),
    "gist": partial(losses.GISTEmbedLoss, temperature=0.05),
}
CACHED = {
    "mnr": partial(losses.CachedMultipleNegativesRankingLoss, scale=20.0),
    "gist": partial(losses.CachedGISTEmbedLoss, temperature=0.05),
}


def main() -> None:
    # 1. Options
    parser = recipe_parser(__doc__.splitlines()[0], "kor_nli_", num_epochs=1)
    parser.add_argument("--batch_size", type=int, default=64, help="triplets a step")
    parser.add_argument(
        "--mini_batch_size",
        type=int,
        help="encode so many at a time (cached loss): large batches, little memory, slower",
    )
    parser.add_argument(
        "--train_files",
        **FILES,
        help="KorNLI files; default: multinli.train.ko.tsv and snli_1.0_train.ko.tsv of data_dir",
    )
    parser.add_argument(
        "--loss", choices=LOSSES, default="mnr", help="mnr as the original; gist goes with --guide"
    )
    parser.add_argument("--guide", metavar="MODEL", help="finds false negatives: name or folder")
    args = parser.parse_args()
    processes = start_processes()
    check_options(args, processes)
    if args.mini_batch_size and args.loss not in CACHED:
        raise UserError(f"--mini_batch_size: not with --loss {args.loss}")

    # 2. Data: KorNLI, dev and test of KorSTS, or the files that the options name
    data = read_data(args, "nli")
    triplets = data.train["nli"]

    # 3. Batches and schedule: full ones without a text twice
    batches_per_epoch = max(1, len(triplets) // args.batch_size)
    check_accumulation(args.gradient_accumulation_steps, batches_per_epoch)
    steps_per_epoch = batches_per_epoch // args.gradient_accumulation_steps
    steps = args.max_steps or args.num_epochs * steps_per_epoch
    schedule = {
        "optim": "adamw_torch_fused",
        "learning_rate": args.learning_rate,
        "lr_scheduler_type": "linear",
        "warmup_steps": math.ceil(0.1 * steps),
        "weight_decay": 0.01,
        "max_grad_norm": 1.0,
    }
    batches = no_duplicates_batches(triplets, args.batch_size, args.seed)
    batches = itertools.islice(batches, steps * args.gradient_accumulation_steps)
    batches = list(share(batches, 0, processes))
    epoch_ends = range(steps_per_epoch, steps, steps_per_epoch)

    # 4. Model and loss: mnr has the texts of all processes as negatives
    model, options = load_model(args), {}
    guide = args.guide and load_encoder(args.guide, trust_remote_code=args.trust_remote_code)
    if guide:
        options["guide"] = guide.eval().requires_grad_(False)
    if args.mini_batch_size:
        options["mini_batch_size"] = args.mini_batch_size
    loss = (CACHED if args.mini_batch_size else LOSSES)[args.loss](model, **options)
    loss.gather_across_devices = processes > 1

    # 5. Training: the dev score decides which checkpoint is kept
    run = open_run(args, data.records, model, guide)
    trainer = recipe_trainer(
        run,
        model,
        train_data=data.train,
        losses={"nli": recipe_loss(model, loss, args)},
        batches=batches,
        dev=data.dev,
        evaluate_at={*range(1000, steps, 1000), *epoch_ends},
        **schedule,
    )
    result = train(run, trainer)

    # 6. Test score
    finish_run(run, result, data.test)


if __name__ == "__main__":
    with command_line():
        main()
