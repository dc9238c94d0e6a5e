"""Semantic search without torch: an .onnx file of onnx/export_onnx.py and nothing else.

    pip install numpy tokenizers onnxruntime
    python semantic_search_onnx.py --model ko-sroberta-multitask.onnx

Prints the five most similar of nine sentences for each of three queries. This file needs nothing
else of its repository, so that it can be copied as a start: `load` and `embed` are all it takes.
"""

import argparse
import os
import sys

import numpy as np
import onnxruntime
from tokenizers import Tokenizer

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


def load(path: str) -> tuple[onnxruntime.InferenceSession, Tokenizer]:
    """Returns the session and the tokenizer, which the file carries and which truncates and pads.

    Raises:
        ValueError: not a file that onnx/export_onnx.py wrote.
    """
    try:
        session = onnxruntime.InferenceSession(path)
        tokenizer = Tokenizer.from_str(session.get_modelmeta().custom_metadata_map["tokenizer"])
    except KeyError:
        raise ValueError(f"{path}: carries no tokenizer: not a file of export_onnx.py") from None
    except Exception as error:  # onnxruntime's errors have no other base
        why = str(error).splitlines()[0]
        if not os.path.isfile(path):
            why = "no such file: onnx/export_onnx.py makes it"
        if os.path.isfile(path) and os.path.getsize(path) < 200:
            with open(path, "rb") as file:
                if b"git-lfs" in file.read():
                    why = "a Git-LFS pointer, not the model: run git lfs pull"
        raise ValueError(f"{path}: {why}") from None
    return session, tokenizer


def embed(
    session: onnxruntime.InferenceSession, tokenizer: Tokenizer, sentences: list[str]
) -> np.ndarray:
    """Returns (sentences, dimension) float32 embeddings of unit length: one batch."""
    prompt = session.get_modelmeta().custom_metadata_map["prompt"]  # most models have none
    tokens = tokenizer.encode_batch([prompt + sentence for sentence in sentences])
    features = {
        "input_ids": [item.ids for item in tokens],
        "attention_mask": [item.attention_mask for item in tokens],
        "token_type_ids": [item.type_ids for item in tokens],
    }
    # Models differ in their inputs: BERT has token types, RoBERTa has none.
    feeds = {item.name: np.array(features[item.name]) for item in session.get_inputs()}
    (embeddings,) = session.run(["sentence_embedding"], feeds)
    return embeddings / np.linalg.norm(embeddings, axis=1, keepdims=True)


def main() -> None:
    for stream in filter(None, (sys.stdout, sys.stderr)):  # None: closed
        stream.reconfigure(errors="replace")  # what the console's encoding does not have
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True, metavar="FILE.onnx")
    parser.add_argument("--top_k", type=int, default=5, help="sentences for each query")
    args = parser.parse_args()
    if args.top_k < 1:
        parser.error(f"--top_k {args.top_k}: must be above 0")
    try:
        session, tokenizer = load(args.model)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)

    corpus = embed(session, tokenizer, CORPUS)
    queries = embed(session, tokenizer, QUERIES)
    for query, scores in zip(QUERIES, queries @ corpus.T, strict=True):
        print(f"\n======================\n\nQuery: {query}\n")
        print(f"Top {args.top_k} most similar sentences:")
        for place in np.argsort(-scores, kind="stable")[: args.top_k]:
            print(f"{CORPUS[place]} (Score: {scores[place]:.4f})")


if __name__ == "__main__":
    main()
