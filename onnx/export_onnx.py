"""Exports a sentence encoder to one checked .onnx file; on request int8 and fp16 ones beside it.

    cd onnx && python export_onnx.py                     # jhgan/ko-sroberta-multitask
    python onnx/export_onnx.py --model RUN --quantize int8 --data_dir KorNLUDatasets

The graph is the whole encoder: input_ids and attention_mask (and token_type_ids where the model
has several types), int64 [batch, length], to sentence_embedding, float32 [batch, dimension], by
standard operators of opset 17 alone. Beside NAME.onnx come NAME.tokenizer.json (it truncates and
pads) and NAME.json (what a consumer needs to know); both are also metadata of the file, which can
therefore be deployed alone. A file gets its name only after onnxruntime has given for it what
sentence-transformers gives. quantize_onnx.py says how int8 is done, measure_onnx.py what is
measured; calibration is on KorSTS-train, without the sentences that KorSTS-test has too.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import signal
import sys
import tempfile
import warnings
from pathlib import Path

import onnx
import torch
from onnx import helper
from onnxruntime.transformers.float16 import convert_float_to_float16
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import Normalize, Pooling, Transformer
from tokenizers import Tokenizer

HERE = Path(__file__).resolve().parent
sys.path.extend([str(HERE), str(HERE.parent)])  # the scripts' own modules, from any folder

from check_onnx import OPSET, CheckFailed, check_file, write_golden  # noqa: E402
from measure_onnx import expected_loss, measure, score_files, score_line, write_results  # noqa: E402
from quantize_onnx import calibrate, calibration_sentences, choose_int8, dev_pairs, weight_bytes  # noqa: E402

from common.command_line import UserError, command_line, expanded, first_line, read_json  # noqa: E402
from common.data import DATA_DIR, read_korsts  # noqa: E402
from common.encoders import (  # noqa: E402
    BERT_LIKES,
    POOLINGS,
    architecture,
    default_prompt,
    load_encoder,
    model_folder,
    weight_files,
)
from common.model_card import licence_of  # noqa: E402
from common.results import onnx_table  # noqa: E402

MAX_FILE_BYTES = 2**31 - 2**20  # protobuf's limit, less room for the graph itself

Settings = dict[str, str | int | bool]


# --- 1. The graph ---------------------------------------------------------------------------


class SentenceEncoder(torch.nn.Module):
    """Transformer, pooling and normalisation of a sentence-transformers model, for the exporter."""

    def __init__(self, model: SentenceTransformer, dim: int) -> None:
        super().__init__()
        transformer, *self.after = model
        self.transformer = transformer.model
        self.config = self.transformer.config
        self.dim = dim
        self.bert_like = architecture(model) in BERT_LIKES

    def forward(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor,
        token_type_ids: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Maps int64 (batch, length) inputs to float32 (batch, dim) embeddings."""
        inputs = {"input_ids": input_ids}
        if token_type_ids is not None:
            inputs["token_type_ids"] = token_type_ids
        if self.bert_like:
            hidden = self.token_rows(attention_mask, self.transformer.embeddings(**inputs))
        else:
            hidden = self.transformer(attention_mask=attention_mask, **inputs).last_hidden_state
        features = {"token_embeddings": hidden, "attention_mask": attention_mask}
        for module in self.after:
            features = module(features)
        return features["sentence_embedding"][:, : self.dim]

    def token_rows(self, attention_mask: torch.Tensor, embedded: torch.Tensor) -> torch.Tensor:
        """Runs BERT's layers on a (tokens, hidden) matrix: padding costs only in the attention.

        Two-dimensional linear layers are also what onnxruntime computes fastest (bias inside the
        multiplication, int8 too), and its slow fusion of residual and LayerNorm stays away.
        """
        batch, length = attention_mask.shape
        heads, width = self.config.num_attention_heads, self.config.hidden_size
        if hasattr(self.transformer, "embeddings_project"):  # ELECTRA
            embedded = self.transformer.embeddings_project(embedded)
        tokens = attention_mask.reshape(-1)
        kept = tokens.nonzero().squeeze(1)  # the places of tokens among batch * length
        row = (tokens.cumsum(0) - 1).clamp(min=0)  # and back; padding gets any row
        # Rows become heads and come back in one step each, without transposing: where a head's
        # query lies among (tokens * 3 * heads) vectors, (batch, heads, length), and where its
        # context lies among (batch * heads * length), (tokens, heads).
        head = torch.arange(heads)
        query_place = row.view(batch, 1, length) * (3 * heads) + head[:, None]
        before = kept // length * ((heads - 1) * length)  # the other heads of earlier sentences
        context_place = (kept + before)[:, None] + head * length
        lowest = torch.finfo(embedded.dtype).min
        masked = (1 - attention_mask.to(embedded.dtype))[:, None, None] * lowest
        rows = embedded.reshape(batch * length, -1)[kept]
        for layer in self.transformer.encoder.layer:
            attention = layer.attention.self
            parts = (attention.query, attention.key, attention.value)
            weight = torch.cat([part.weight for part in parts])  # one multiplication, not three
            bias = torch.cat([part.bias for part in parts])
            vectors = torch.nn.functional.linear(rows, weight, bias).view(-1, width // heads)
            places = (query_place, query_place + heads, query_place + 2 * heads)
            query, key, value = (torch.nn.functional.embedding(place, vectors) for place in places)
            scores = query @ key.transpose(2, 3) * attention.scaling + masked
            context = (scores.softmax(dim=-1) @ value).view(-1, width // heads)
            context = torch.nn.functional.embedding(context_place, context).view(-1, width)
            rows = layer.attention.output(context, rows)
            rows = layer.output(layer.intermediate(rows), rows)
        return rows[row].view(batch, length, -1)


def check_exportable(
    name: str, model: SentenceTransformer, dim: int | None, quantize: str | None
) -> None:
    """Raises `UserError` that names what of the model cannot be exported."""
    for position, module in enumerate(model):
        expected = (Transformer, Pooling, Normalize)[min(position, 2)]
        if not isinstance(module, expected):
            found = type(module).__name__
            raise UserError(f"{name}: module {position} is {found}, not {expected.__name__}")
    mode = model[1].pooling_mode
    if mode not in POOLINGS:
        raise UserError(f"{name}: pooling {mode!r} is not supported, only {', '.join(POOLINGS)}")
    if not model[1].include_prompt and any(model.prompts.values()):
        raise UserError(f"{name}: a pooling that leaves the prompt out is not supported")
    dimension = model.get_embedding_dimension()
    if dim is not None and not 1 <= dim <= dimension:
        raise UserError(f"--dim {dim}: {name} has {dimension} dimensions")
    if not getattr(model.tokenizer, "is_fast", False):
        raise UserError(f"{name}: its tokenizer has no fast version, which a tokenizer.json needs")
    if model.tokenizer.pad_token is None:
        raise UserError(f"{name}: its tokenizer has no pad token: sentences cannot share a batch")
    if not 0 < (model.max_seq_length or 0) < 2**31:
        raise UserError(f"{name}: no max_seq_length, nor model_max_length of its tokenizer")
    if not model.tokenizer("")["input_ids"]:
        raise UserError(f"{name}: its tokenizer adds no token: an empty sentence has no embedding")
    family = architecture(model)
    if quantize and family not in BERT_LIKES:
        raise UserError(f"--quantize {quantize}: {family} is none of {', '.join(BERT_LIKES)}")


def export_tokenizer(model: SentenceTransformer) -> Tokenizer:
    """Returns a copy of the tokenizer that truncates and pads as the model does."""
    original = model.tokenizer
    tokenizer = Tokenizer.from_str(original.backend_tokenizer.to_str())
    tokenizer.enable_truncation(model.max_seq_length)
    tokenizer.enable_padding(
        direction=original.padding_side,
        pad_id=original.pad_token_id,
        pad_type_id=original.pad_token_type_id,
        pad_token=original.pad_token,
    )
    return tokenizer


def export_graph(model: SentenceTransformer, dim: int, folder: Path) -> onnx.ModelProto:
    """Traces the encoder into an ONNX model; `folder` holds the exporter's files."""
    encoder = SentenceEncoder(model, dim).eval()
    inputs = ["input_ids", "attention_mask"]
    if getattr(encoder.config, "type_vocab_size", 0) > 1:
        inputs.append("token_type_ids")
    output = "sentence_embedding"
    attention_mask = torch.tensor([[1, 1, 1, 1, 1, 1, 1], [1, 1, 1, 1, 1, 0, 0]])
    examples = (torch.ones_like(attention_mask), attention_mask, torch.zeros_like(attention_mask))
    implementation = encoder.config._attn_implementation
    encoder.transformer.set_attn_implementation("eager")  # plain operators, exact to 2e-6
    with warnings.catch_warnings():
        # What the tracer fixes is what the check on other shapes and masks is for.
        warnings.simplefilter("ignore", torch.jit.TracerWarning)
        warnings.filterwarnings("ignore", category=DeprecationWarning, message=".*legacy")
        warnings.filterwarnings("ignore", category=UserWarning, module="torch.onnx")
        try:
            torch.onnx.export(
                encoder,
                examples[: len(inputs)],
                folder / "traced.onnx",
                input_names=inputs,
                output_names=[output],
                dynamic_axes={name: {0: "batch", 1: "length"} for name in inputs}
                | {output: {0: "batch"}},
                opset_version=OPSET,
                dynamo=False,
            )
        except RuntimeError as error:
            raise CheckFailed(f"{architecture(model)}: no graph: {first_line(error)}") from None
    encoder.transformer.set_attn_implementation(implementation)
    proto = onnx.load(folder / "traced.onnx")
    # Equal weights (biases of 0) come as one, by way of nodes that only rename it.
    names = {
        node.output[0]: node.input[0] for node in proto.graph.node if node.op_type == "Identity"
    }
    kept = [node for node in proto.graph.node if node.output[0] not in names]
    for node in kept:
        node.input[:] = [names.get(name, name) for name in node.input]
    del proto.graph.node[:]
    proto.graph.node.extend(kept)
    shape = proto.graph.output[0].type.tensor_type.shape
    shape.dim[1].dim_value = dim  # the tracer does not know the width of a slice
    return proto


# --- 2. Files -------------------------------------------------------------------------------


def settings_of(name: str, model: SentenceTransformer, dim: int) -> Settings:
    """Returns what a consumer of the file needs to know, and where the model comes from."""
    folder = model_folder(model)
    if folder.parent.name == "snapshots":  # of the Hub's cache, named by commit
        revision = folder.name
    else:
        name, digest = folder.resolve().name, hashlib.sha256()
        for path in weight_files(folder):
            digest.update(path.read_bytes())
        revision = f"sha256:{digest.hexdigest()}"
    return {
        "model": name,
        "revision": revision,
        "licence": licence_of(folder),
        "max_seq_length": model.max_seq_length,
        "pooling": model[1].pooling_mode,
        "normalized": dim == model[1].get_embedding_dimension()
        and isinstance(model[-1], Normalize),
        "dimension": dim,
        "prompt": default_prompt(model),
    }


def write_files(
    proto: onnx.ModelProto, path: Path, settings: Settings, tokenizer: Tokenizer
) -> None:
    """Writes NAME.onnx with its metadata, NAME.json and NAME.tokenizer.json.

    What protobuf cannot hold (2 GB) goes to NAME.onnx.data.
    """
    content = tokenizer.to_str()
    helper.set_model_props(
        proto, {name: str(value) for name, value in settings.items()} | {"tokenizer": content}
    )
    path.with_suffix(".tokenizer.json").write_text(content, encoding="utf-8")
    inputs = [item.name for item in proto.graph.input]
    interface = {"inputs": inputs, "output": proto.graph.output[0].name}
    text = json.dumps(settings | interface, ensure_ascii=False, indent=2)
    path.with_suffix(".json").write_text(text + "\n", encoding="utf-8")
    if weight_bytes(proto) <= MAX_FILE_BYTES:
        onnx.save(proto, path)
        return
    print(f"{path.name} is above 2 GB: {path.name}.data goes with it", file=sys.stderr)
    copy = onnx.ModelProto()  # saving takes the weights out of the model
    copy.CopyFrom(proto)
    onnx.save(copy, path, save_as_external_data=True, location=f"{path.name}.data")


def deliver(written: Path, target: Path) -> None:
    """Gives checked files their final names, the .onnx last; older ones are replaced."""
    data = target.with_name(f"{target.name}.data")
    if not written.with_name(data.name).exists():
        data.unlink(missing_ok=True)
    for suffix in (".onnx.data", ".tokenizer.json", ".json", ".onnx"):
        path = written.with_suffix(suffix)
        if path.exists():
            os.replace(path, target.with_suffix(suffix))
    print(f"{target}: {target.stat().st_size / 1e6:.1f} MB", file=sys.stderr)


def remove_older(target: Path, settings: Settings) -> None:
    """Removes NAME-int8 and NAME-fp16 where they are of another model, --dim or --pooling.

    NAME.golden.json, too: the vectors in it are no longer those of the file.
    """

    def other(path: Path) -> Settings | None:
        """Returns what the settings beside a file say where they are of another export."""
        file = path.with_suffix(".json")
        try:
            before = dict(read_json(file)) if file.is_file() else settings
        except (ValueError, TypeError, RecursionError):
            return {}  # damaged: nobody can say whose it is
        return before if any(before.get(key) != settings[key] for key in settings) else None

    for kind in ("int8", "fp16"):
        sibling = target.with_name(f"{target.stem}-{kind}.onnx")
        before = other(sibling)
        if before is not None and before.get("precision", kind) == kind:  # not only so named
            print(f"{sibling}: of another export: removed", file=sys.stderr)
            remove(sibling)
    golden = target.with_suffix(".golden.json")
    if golden.is_file() and other(target) is not None:  # NAME.json is still the earlier file's
        print(f"{golden}: of another export: removed", file=sys.stderr)
        golden.unlink()


def remove(path: Path) -> None:
    """Removes an exported file and what lies beside it."""
    for suffix in (".onnx", ".onnx.data", ".json", ".tokenizer.json"):
        path.with_suffix(suffix).unlink(missing_ok=True)


# --- 3. Command line ------------------------------------------------------------------------


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--model", default="jhgan/ko-sroberta-multitask", help="Hub name, or folder (a run's too)")
    add("--output", type=Path, help="default: models/NAME.onnx beside this script")
    pooling = "of a plain encoder, whose folder declares none (default: mean)"
    add("--pooling", choices=POOLINGS, help=pooling)
    add("--dim", type=int, help="keep the first dimensions only (Matryoshka models)")
    add("--quantize", choices=["int8"], help="also write NAME-int8.onnx, and measure both")
    fp16 = "also write NAME-fp16.onnx for GPUs: half the size, no faster on a CPU"
    add("--fp16", action="store_true", help=fp16)
    data = "KorNLUDatasets: int8 is calibrated on its KorSTS-train, measured on its KorSTS-test"
    add("--data_dir", type=Path, default=DATA_DIR, help=data)
    loss = "points of KorSTS-test cosine Spearman (x100) that int8 may lose"
    add("--max_loss", type=float, default=0.5, help=loss)
    add("--force", action="store_true", help="keep an int8 file that loses more")
    speed = "with --quantize: compare scores alone, without timing; no measurement is kept"
    add("--no_speed", action="store_true", help=speed)
    results = "measurements go to onnx/NAME.json in it"
    add("--results_dir", type=Path, default=HERE.parent / "results", help=results)
    golden = "also write sentences and their vectors, for the tests of other languages' programs"
    add("--golden", type=Path, metavar="NAME.golden.json", help=golden)
    code = "run Python code that the model carries: it can do anything on this machine"
    add("--trust_remote_code", action="store_true", help=code)
    args = parser.parse_args()
    if args.output is None:
        name = expanded(args.model).resolve().name
        args.output = HERE / "models" / f"{name}.onnx"
    if args.output.suffix != ".onnx" or expanded(args.output).is_dir():
        parser.error(f"--output {args.output}: the name of a file, which should end in .onnx")
    if args.golden and not args.golden.name.endswith(".golden.json"):
        parser.error(f"--golden {args.golden}: the name should end in .golden.json")
    return args


def export(args: argparse.Namespace) -> None:
    # 1. Everything that can be wrong, before anything takes long
    target = expanded(args.output).absolute()
    if args.quantize:
        test = read_korsts(args.data_dir / "KorSTS/sts-test.tsv")
        texts, dev = calibration_sentences(args.data_dir, test), dev_pairs(args.data_dir)
    target.parent.mkdir(parents=True, exist_ok=True)
    if args.golden:
        args.golden.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".export-", dir=target.parent) as temporary:
        staging, work = Path(temporary), Path(temporary, "work")
        work.mkdir()
        options = {"pooling": args.pooling, "trust_remote_code": args.trust_remote_code}
        model = load_encoder(args.model, **options, device="cpu")
        check_exportable(args.model, model, args.dim, args.quantize)
        dim = args.dim or model.get_embedding_dimension()
        tokenizer = export_tokenizer(model)
        settings = settings_of(args.model, model, dim)

        # 2. fp32
        print(f"exporting {args.model}", file=sys.stderr)
        proto = export_graph(model, dim, work)
        fp32 = staging / target.name
        write_files(proto, fp32, settings | {"precision": "fp32"}, tokenizer)
        check_file(fp32, model, tokenizer, dim, "fp32")
        if args.quantize:
            print(f"calibrating on {len(texts):,} sentences of sts-train.tsv", file=sys.stderr)
            prompt = default_prompt(model)  # consumers put it before every sentence
            activations = calibrate(fp32, tokenizer, [prompt + text for text in texts])
        remove_older(target, settings)
        if args.golden:
            args.golden.unlink(missing_ok=True)  # of the files that are replaced here
        deliver(fp32, target)
        written = [target]

        # 3. fp16
        if args.fp16:
            fp16 = staging / f"{target.stem}-fp16.onnx"
            half = convert_float_to_float16(str(target), keep_io_types=True)  # above 2 GB, too
            write_files(half, fp16, settings | {"precision": "fp16"}, tokenizer)
            check_file(fp16, model, tokenizer, dim, "fp16")
            written.append(target.with_name(fp16.name))
            deliver(fp16, written[-1])

        # 4. int8: kept where it loses little enough
        if args.quantize:
            int8 = staging / f"{target.stem}-int8.onnx"
            print(f"choosing the int8 form on {len(dev):,} pairs of sts-dev.tsv", file=sys.stderr)
            quantized, kept, lost = choose_int8(
                proto, activations, expected_loss(tokenizer, target, dev, prompt)
            )
            layers = f"all but {', '.join(kept)}" if kept else "all layers"
            print(f"int8: {layers}; {lost:.2f} points expected to be lost", file=sys.stderr)
            described = settings | {"precision": "int8", "float32_layers": ", ".join(kept)}
            write_files(quantized, int8, described, tokenizer)
            onnx.checker.check_model(int8, full_check=True)
            print("measuring on sts-test.tsv", file=sys.stderr)
            files = {"ONNX fp32": target, "ONNX int8": int8}
            if args.no_speed:
                rows = score_files(tokenizer, files, test, default_prompt(model))
                print(score_line(rows))
            else:
                rows = measure(model, tokenizer, files, test, args.trust_remote_code)
                print("\n".join(onnx_table(rows)))
            lost = 100 * rows[-1]["lost"]
            if not lost <= args.max_loss and not args.force:
                remove(target.with_name(int8.name))  # an older one would pass for this one
                raise CheckFailed(
                    f"int8 loses {lost:.2f} points, more than --max_loss {args.max_loss}; "
                    "not written (--force keeps it)"
                )
            written.append(target.with_name(int8.name))
            deliver(int8, written[-1])
            if not args.no_speed:
                results = args.results_dir / "onnx" / f"{target.stem}.json"
                write_results(results, settings["model"], settings["revision"], rows)

        # 5. What other languages have to find
        if args.golden:
            write_golden(args.golden, written)


def main() -> None:
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # staged files go, as with Ctrl-C
    args = parse_arguments()
    try:
        export(args)
    except CheckFailed as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    with command_line():
        main()
