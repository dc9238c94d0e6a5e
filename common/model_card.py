"""The model card of a finished run: its README.md."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCardData, metadata_load
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import Pooling
from yaml import YAMLError

from common.command_line import expanded, first_line
from common.data import is_korsts_test
from common.evaluation import SCORE_KEYS

SHARE_ALIKE = "cc-by-sa-4.0"


def licence_of(folder: Path) -> str:
    """Returns the licence that the model card names; "unknown" where no card can be read."""
    card = folder / "README.md"
    try:
        data = metadata_load(card) if card.is_file() else None
    except (ValueError, YAMLError) as error:
        print(f"note: {card}: licence unknown: {first_line(error)}", file=sys.stderr)
        return "unknown"
    return str((data or {}).get("license") or "unknown")


def model_card(
    name: str,
    args: argparse.Namespace,
    data: list[dict[str, Any]],
    model: SentenceTransformer,
    scores: dict[str, Any],
) -> str:
    """Returns a model card with the test scores as metadata.

    Args:
        name: the model's.
        args: the command line of the run.
        data: run.json's records of the files.
        scores: what scores.json holds.
    """
    test, test_file = scores.get("test", {}), scores.get("test_file", "")
    is_korsts = is_korsts_test(test_file, data)
    train = [record for record in data if record["split"] == "train"]
    files = ", ".join(f"`{record['file']}` ({record['rows']:,} rows)" for record in train)
    base, folder = args.model_name_or_path, expanded(args.model_name_or_path)
    is_local = folder.is_dir()  # of the same words as `encoders.fetch_model`
    # KorNLUDatasets (a part of it too, which is not the published file), the klue models, and what
    # an earlier stage made of them ask for it; what other files ask for, only their owner knows.
    is_kornlu = any(record["published"] is not None for record in train)
    asks = is_kornlu or base.startswith("klue/") or (is_local and licence_of(folder) == SHARE_ALIKE)
    licence = SHARE_ALIKE if asks else None
    pooling = " and ".join(m.pooling_mode for m in model if isinstance(m, Pooling)) or "no"
    card_data = ModelCardData(
        language="ko",
        license=licence,
        library_name="sentence-transformers",
        pipeline_tag="sentence-similarity",
        tags=["sentence-transformers", "sentence-similarity", "feature-extraction"],
        base_model=None if is_local else base,
        model_name=name,
        eval_results=[
            EvalResult(
                task_type="semantic-similarity",
                dataset_type=test_file,
                dataset_name="KorSTS test" if is_korsts else test_file,
                metric_type=key,
                metric_value=round(100 * test[key], 2),
            )
            for key in SCORE_KEYS
            if key in test
        ]
        or None,
    )
    return f"""---
{card_data.to_yaml()}
---

# {name}

A Korean sentence encoder: {pooling} pooling, {args.max_seq_length} tokens, trained from
`{folder.resolve().name if is_local else base}` with `{Path(sys.argv[0]).name}` of
ko-sentence-transformers (seed {args.seed}). Options, data and versions: `run.json`; all scores:
`scores.json`. Training data: {files}\
{". KorNLUDatasets is CC BY-SA 4.0" if is_kornlu else ""}.

```python
from sentence_transformers import SentenceTransformer

model = SentenceTransformer("PATH_OR_NAME")
embeddings = model.encode(["안녕하세요?", "한국어 문장 임베딩을 위한 모델입니다."])
```

Dev cosine Spearman x100 ({scores["dev_file"]}, {scores["dev_pairs"]:,} pairs): \
{100 * scores["dev"]["cosine_spearman"]:.2f}.
"""
