"""Semantic search: the five most similar of nine sentences for each of three queries.

    pip install sentence-transformers
    python semantic_search.py

This file needs nothing else of its repository. The repository's README has the output that was
published for the default model. The sentences come from
https://github.com/BM-K/KoSentenceBERT-SKT.
"""

import argparse
import sys
from pathlib import Path
from pickle import UnpicklingError

from safetensors import SafetensorError
from sentence_transformers import SentenceTransformer, util

# What the libraries raise for a folder that is damaged or holds something else, or a bad proxy.
MODEL_ERRORS = (ImportError, OSError, ValueError, LookupError, RuntimeError, AttributeError)
MODEL_ERRORS += (TypeError, SafetensorError, UnpicklingError)

CORPUS = [
    "한 남자가 음식을 먹는다.",
    "한 남자가 빵 한 조각을 먹는다.",
    "그 여자가 아이를 돌본다.",
    "한 남자가 말을 탄다.",
    "한 여자가 바이올린을 연주한다.",
    "두 남자가 수레를 숲 속으로 밀었다.",
    "한 남자가 담으로 싸인 땅에서 백마를 타고 있다.",
    "원숭이 한 마리가 드럼을 연주한다.",
    "치타 한 마리가 먹이 뒤에서 달리고 있다.",
]
QUERIES = [
    "한 남자가 파스타를 먹는다.",
    "고릴라 의상을 입은 누군가가 드럼을 연주하고 있다.",
    "치타가 들판을 가로 질러 먹이를 쫓는다.",
]


def main() -> None:
    for stream in filter(None, (sys.stdout, sys.stderr)):  # None: closed
        stream.reconfigure(errors="replace")  # what the console's encoding does not have
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--model",
        default="jhgan/ko-sroberta-multitask",
        help="Hub name (default: %(default)s), or the folder of a training run or of a plain "
        "encoder, to which sentence-transformers adds mean pooling",
    )
    args = parser.parse_args()
    try:
        model = SentenceTransformer(args.model).float()  # weights may be kept in half
    except MODEL_ERRORS as error:
        why = (str(error).strip() or type(error).__name__).splitlines()[0]
        if not Path(args.model).is_dir():
            why = f"no such folder, and not from the Hub: {why}"
        for path in Path(args.model).rglob("*"):
            if path.is_file() and path.stat().st_size < 200 and b"git-lfs" in path.read_bytes():
                why = f"{path.name} is a Git-LFS pointer, not the weights: run git lfs pull"
        print(f"error: {args.model}: {why}", file=sys.stderr)
        sys.exit(2)

    # Where a model declares no prompt for queries or documents sentence-transformers adds an empty
    # one, which would be taken before the model's default prompt.
    model.prompts = {key: prompt for key, prompt in model.prompts.items() if prompt}
    queries, corpus = model.encode_query(QUERIES), model.encode_document(CORPUS)
    found = util.semantic_search(queries, corpus, top_k=5)
    for query, hits in zip(QUERIES, found, strict=True):
        print(query)
        for hit in hits:
            print(f"  {hit['score']:.4f}  {CORPUS[hit['corpus_id']]}")


if __name__ == "__main__":
    main()
