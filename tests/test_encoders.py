"""Loading, refusing and saving encoders; the Hub's part through its real client and hub.py."""

import json
import shutil

import httpx2
import numpy as np
import pytest
import torch
from encoders import add_module_with_code, edit_json, write_family, write_plain_encoder
from hub import Hub
from huggingface_hub import HfApi, close_session
from huggingface_hub.errors import HfHubHTTPError, XetDownloadError
from safetensors.torch import load_file, save_file
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import Dense
from tokenizers import Tokenizer, normalizers
from transformers import BertConfig, RobertaConfig, XLNetConfig

from common import encoders
from common.command_line import UserError
from common.encoders import load_encoder, save_encoder

SENTENCES = ["한 남자가 기타를 친다.", '"따옴표"는 글자다.', "비"]


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    return write_plain_encoder(tmp_path_factory.mktemp("models") / "plain")


@pytest.fixture
def hub(tmp_path, plain):
    with Hub(tmp_path / "hub") as running:
        shutil.copytree(plain, tmp_path / "hub" / "owner" / "model")
        yield running


def to_bin(folder, extra: object = None) -> None:
    """Turns a folder's safetensors into the pickle of old checkpoints."""
    weights = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    torch.save(
        weights if extra is None else weights | {"extra": extra}, folder / "pytorch_model.bin"
    )


# --- The Hub ---------------------------------------------------------------------------------


def test_a_model_of_the_hub_loads_and_loads_again_offline(hub, plain, tmp_path, monkeypatch):
    hub.patch(monkeypatch, tmp_path / "cache")
    expected = load_encoder(str(plain)).encode(SENTENCES)
    np.testing.assert_array_equal(load_encoder("owner/model").encode(SENTENCES), expected)
    assert "GET /owner/model/resolve" in "\n".join(hub.requests)
    hub.requests.clear()
    hub.patch(monkeypatch, tmp_path / "cache", offline=True)
    np.testing.assert_array_equal(load_encoder("owner/model").encode(SENTENCES), expected)
    assert hub.requests == []


@pytest.mark.parametrize(
    "fault, reason",
    [
        ("missing", "no such folder, and no such model on the Hub"),
        ("gated", "gated: accept its terms on the Hub and set HF_TOKEN"),
        ("cut", "download failed: peer closed connection"),
        ("slow", "download failed: timed out"),
        ("wrong", "model.safetensors is not what the Hub's hash says"),
        ("wrong:config.json", "config.json is not what the Hub's hash says"),
        ("down", "the Hub cannot be reached"),
    ],
)
def test_a_fault_of_the_hub_is_one_line_and_leaves_no_half_model(
    hub, tmp_path, monkeypatch, fault, reason
):
    hub.faults["owner/model"] = fault
    hub.patch(monkeypatch, tmp_path / "cache")
    with pytest.raises(UserError) as error:
        load_encoder("owner/model")
    message = str(error.value)
    assert message.startswith("owner/model: ") and reason in message and "\n" not in message
    assert "hf_stand_in" not in message
    hub.patch(monkeypatch, tmp_path / "cache", offline=True)
    with pytest.raises(UserError, match=r"owner/model: .*not in the cache"):
        load_encoder("owner/model")
    del hub.faults["owner/model"]  # and it can be had once the Hub is well again
    hub.patch(monkeypatch, tmp_path / "cache")
    assert load_encoder("owner/model").encode(SENTENCES).shape == (3, 32)


def test_an_unreachable_hub_is_said(hub, tmp_path, monkeypatch):
    hub.url = "http://127.0.0.1:9"  # nothing listens on the discard port
    hub.patch(monkeypatch, tmp_path / "cache")
    with pytest.raises(UserError, match=r"owner/model: .*Hub cannot be reached: .*refused$"):
        load_encoder("owner/model")


@pytest.mark.parametrize(
    "proxy, reason",
    [("socks5://127.0.0.1:9", ""), ("ftp://company:8080", "scheme"), ("http://[", "")],
)
def test_a_proxy_that_is_none_is_one_line(hub, tmp_path, monkeypatch, proxy, reason):
    hub.patch(monkeypatch, tmp_path / "cache")
    for name in ("http_proxy", "https_proxy", "all_proxy", "no_proxy"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)
    monkeypatch.setenv("ALL_PROXY", proxy)
    close_session()  # a client's proxy is that of its beginning
    try:
        with pytest.raises(UserError, match=rf"owner/model: .*{reason}") as error:
            load_encoder("owner/model")
        assert "\n" not in str(error.value)
    finally:
        close_session()


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("Data processing error: CAS service error: Request failed\nafter 5 retries"),
        XetDownloadError("no address to download from"),
        httpx2.InvalidURL("Invalid port"),
    ],
    ids=lambda error: type(error).__name__,
)
def test_whatever_stops_a_download_is_one_line(tmp_path, monkeypatch, error):
    def download(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr(encoders, "snapshot_download", download)
    with pytest.raises(UserError) as found:
        load_encoder("owner/model")
    assert str(found.value) == f"owner/model: download failed: {str(error).splitlines()[0]}"


def test_an_old_bin_of_the_hub_loads_and_a_pickle_with_more_is_refused(
    hub, plain, tmp_path, monkeypatch
):
    folder = tmp_path / "hub" / "owner" / "model"
    evil = shutil.copytree(folder, tmp_path / "hub" / "owner" / "evil")
    to_bin(folder)
    to_bin(evil, Evil(tmp_path / "owned"))
    hub.patch(monkeypatch, tmp_path / "cache")
    expected = load_encoder(str(plain)).encode(SENTENCES)
    np.testing.assert_array_equal(load_encoder("owner/model").encode(SENTENCES), expected)
    with pytest.raises(UserError, match=r"owner/evil: .* more than tensors: refused") as error:
        load_encoder("owner/evil")
    assert "\n" not in str(error.value)
    assert not (tmp_path / "owned").exists()


def test_a_pushed_folder_arrives(hub, plain, tmp_path, monkeypatch):
    hub.patch(monkeypatch, tmp_path / "cache")
    api = HfApi()
    api.create_repo("owner/pushed", exist_ok=True)
    api.upload_folder(repo_id="owner/pushed", folder_path=plain)
    assert hub.files("owner/pushed") == hub.files("owner/model")


@pytest.mark.parametrize("status", [403, 500])
def test_a_refused_push_leaves_nothing(hub, plain, tmp_path, monkeypatch, status):
    hub.faults["owner/pushed"] = f"push-{status}"
    hub.patch(monkeypatch, tmp_path / "cache")
    api = HfApi()
    api.create_repo("owner/pushed")
    with pytest.raises(HfHubHTTPError, match=str(status)):
        api.upload_folder(repo_id="owner/pushed", folder_path=plain)
    assert hub.files("owner/pushed") == {}


# --- Folders ---------------------------------------------------------------------------------


class Evil:
    """Unpickled by a careless reader, it makes a file."""

    def __init__(self, path) -> None:
        self.path = path

    def __reduce__(self):
        return (self.path.touch, ())


@pytest.fixture
def folder(plain, tmp_path):
    return shutil.copytree(plain, tmp_path / "model")


def test_a_plain_encoder_gets_mean_pooling_over_its_tokens(folder):
    model = load_encoder(str(folder))
    tokens = model.encode(SENTENCES, output_value="token_embeddings")
    expected = np.stack([sentence.mean(dim=0).cpu().numpy() for sentence in tokens])
    np.testing.assert_allclose(model.encode(SENTENCES), expected, atol=1e-6)
    assert all(weights.dtype == torch.float32 for weights in model.parameters())


def test_max_seq_length_is_set_and_cannot_exceed_the_positions(folder):
    assert load_encoder(str(folder), 16).max_seq_length == 16
    assert load_encoder(str(folder)).max_seq_length == 64
    with pytest.raises(UserError, match=r"--max_seq_length 65: .* has 64 positions"):
        load_encoder(str(folder), 65)


def test_an_encoder_without_a_position_table_takes_any_length(tmp_path):
    config = XLNetConfig(d_model=32, n_layer=1, n_head=2, d_inner=32, pad_token_id=0)
    model = load_encoder(str(write_family(tmp_path, config)), 200, device="cpu")
    assert model.max_seq_length == 200
    assert np.isfinite(model.encode("가" * 300)).all()


@pytest.mark.parametrize("config", [BertConfig, RobertaConfig])
def test_a_declared_length_beyond_the_positions_is_cut(tmp_path, config):
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    padding = int(config is RobertaConfig)
    config = config(**sizes, max_position_embeddings=34, pad_token_id=padding)
    folder = write_family(tmp_path / "plain", config)
    model = load_encoder(str(folder), device="cpu")
    expected = 32 if padding else 34  # RoBERTa's: two positions are no token's
    assert model.max_seq_length == expected
    assert np.isfinite(model.encode("가" * 100)).all()
    model.save_pretrained(str(tmp_path / "model"), create_model_card=False)
    for name, key in (("sentence_bert", "max_seq_length"), ("tokenizer", "model_max_length")):
        edit_json(tmp_path / f"model/{name}_config.json", **{key: 512})
    model = load_encoder(str(tmp_path / "model"), device="cpu")
    assert model.max_seq_length == expected
    assert np.isfinite(model.encode("가" * 100)).all()


@pytest.mark.parametrize(
    "break_it, reason",
    [
        (lambda f: [path.unlink() for path in f.iterdir()], "neither config.json nor modules.json"),
        (lambda f: edit_json(f / "config.json", model_type="no-such-type"), "cannot be loaded"),
        (lambda f: (f / "model.safetensors").unlink(), "cannot be loaded"),
        (lambda f: [path.unlink() for path in f.glob("token*")], "no tokenizer.json and no vocab"),
        (lambda f: (f / "model.safetensors").write_bytes(b"\0" * 50), "damaged weights"),
        (lambda f: (f / "config.json").write_text("[]"), "cannot be loaded: is a JSON file in it"),
        (lambda f: (f / "modules.json").write_text("[3]"), "cannot be loaded: is a JSON file in"),
        (lambda f: (f / "tokenizer_config.json").write_text("3"), "cannot be loaded: is a JSON"),
        (lambda f: (f / "run.json").write_text("[]"), "the run folder is damaged"),
        (lambda f: edit_json(f / "run.json", finished=None), "unfinished training run"),
        (lambda f: (f / "run.json").write_text("{"), "the run folder is damaged"),
        (
            lambda f: edit_json(f / "config.json", auto_map={"AutoModel": "x.X"}),
            "trust_remote_code",
        ),
        (lambda f: to_bin(f, Evil(f / "owned")), "a pickle that holds more than tensors: refused"),
    ],
)
def test_what_cannot_be_used_is_refused_in_one_line(folder, break_it, reason):
    break_it(folder)
    with pytest.raises(UserError) as error:
        load_encoder(str(folder))
    assert "model" in str(error.value) and reason in str(error.value)
    assert "\n" not in str(error.value)
    assert not (folder / "owned").exists()


def test_a_name_that_is_neither_folder_nor_hub_name():
    with pytest.raises(
        UserError, match="no/such/folder: no such folder, and not a name on the Hub"
    ):
        load_encoder("no/such/folder")


def test_modules_with_code_are_refused_and_run_with_the_flag(folder, tmp_path):
    save_encoder(load_encoder(str(folder)), folder)
    add_module_with_code(folder, tmp_path / "ran")
    with pytest.raises(UserError, match="its own Python code, which could do anything"):
        load_encoder(str(folder))
    assert not (tmp_path / "ran").exists()
    vectors = load_encoder(str(folder), trust_remote_code=True).encode(SENTENCES)
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-6)
    assert (tmp_path / "ran").exists()


def test_an_activation_that_is_not_torchs_is_code_too(folder):
    model = SentenceTransformer(modules=[*load_encoder(str(folder), device="cpu"), Dense(32, 16)])
    save_encoder(model, folder)
    assert load_encoder(str(folder)).get_embedding_dimension() == 16
    edit_json(folder / "2_Dense/config.json", activation_function="carried.Activation")
    # sentence-transformers warns, and takes Tanh.
    with pytest.raises(UserError, match="its own Python code"):
        load_encoder(str(folder))


def test_a_plain_encoder_inside_another_models_folder_is_itself(folder, tmp_path):
    save_encoder(load_encoder(str(folder)), tmp_path / "outer")
    inner = shutil.copytree(folder, tmp_path / "outer/inner")
    assert encoders.model_folder(load_encoder(str(inner))) == inner


# --- Saving ----------------------------------------------------------------------------------


def test_a_saved_encoder_has_the_layout_that_old_versions_read(folder, tmp_path):
    saved = tmp_path / "saved"
    saved.mkdir()
    (saved / "run.json").write_text('{"finished": "now"}', encoding="utf-8")
    model = load_encoder(str(folder), 48)
    save_encoder(model, saved)
    modules = json.loads((saved / "modules.json").read_text(encoding="utf-8"))
    assert [module["type"] for module in modules] == [
        "sentence_transformers.models.Transformer",
        "sentence_transformers.models.Pooling",
    ]
    pooling = json.loads((saved / modules[1]["path"] / "config.json").read_text(encoding="utf-8"))
    assert pooling["word_embedding_dimension"] == 32
    assert [key for key, value in pooling.items() if value is True and "mode" in key] == [
        "pooling_mode_mean_tokens"
    ]
    assert json.loads((saved / "sentence_bert_config.json").read_text(encoding="utf-8")) == {
        "max_seq_length": 48,
        "do_lower_case": False,
    }
    assert (saved / "run.json").is_file() and not list(saved.glob(".saving*"))
    again = load_encoder(str(saved))
    assert again.max_seq_length == 48
    np.testing.assert_array_equal(again.encode(SENTENCES), model.encode(SENTENCES))


def test_modules_json_comes_last_so_that_half_a_model_is_none(folder, tmp_path, monkeypatch):
    model = load_encoder(str(folder))
    save_encoder(model, tmp_path / "saved")
    moved = []

    def stop(source, target):
        moved.append(target.name)
        if target.name == "config.json" and target.parent.name == "saved":
            raise KeyboardInterrupt

    monkeypatch.setattr("common.encoders.os.replace", stop)
    with pytest.raises(KeyboardInterrupt):
        save_encoder(model, tmp_path / "saved")
    assert "model.safetensors" in moved and "modules.json" not in moved
    assert not (tmp_path / "saved" / "modules.json").exists()


def read(path) -> dict:
    return json.loads(path.read_text(encoding="utf-8"))


def test_what_was_written_is_compared_before_it_is_delivered(folder, tmp_path, monkeypatch):
    model, saved = load_encoder(str(folder), device="cpu"), tmp_path / "saved"
    save_encoder(model, saved)
    before = {path: path.read_bytes() for path in saved.rglob("*") if path.is_file()}
    with torch.no_grad():
        next(model.parameters()).mul_(2)  # another model for the same folder

    write_old_layout = encoders._write_old_layout

    def spoil(model, staging):
        write_old_layout(model, staging)
        weights = load_file(staging / "model.safetensors")
        weights["encoder.layer.1.output.dense.bias"][3] += 1e-3
        save_file(weights, staging / "model.safetensors", metadata={"format": "pt"})

    monkeypatch.setattr(encoders, "_write_old_layout", spoil)
    with pytest.raises(OSError, match="does not give the model's embeddings") as error:
        save_encoder(model, saved)
    assert error.value.filename == str(saved / ".saving")
    # What was there is there: the older model, whole, and nothing else.
    found = {path for path in saved.rglob("*") if path.is_file()}
    assert {path: path.read_bytes() for path in found} == before
    assert not (saved / ".saving").exists()
    monkeypatch.undo()
    save_encoder(model, saved)
    np.testing.assert_array_equal(
        load_encoder(str(saved), device="cpu").encode(SENTENCES), model.encode(SENTENCES)
    )


def test_nothing_is_delivered_to_a_new_folder_either(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(encoders.np, "array_equal", lambda *_: False)
    with pytest.raises(OSError):
        save_encoder(load_encoder(str(folder)), tmp_path / "saved")
    assert not list((tmp_path / "saved").iterdir())


def test_additional_special_tokens_have_the_name_that_transformers_4_reads(tmp_path):
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    tokens = ["[E1]", "[E2]"]
    config = BertConfig(**sizes, intermediate_size=32, max_position_embeddings=64)
    folder = write_family(tmp_path / "plain", config, additional_special_tokens=tokens)
    known = read(folder / "config.json")["vocab_size"]
    model = load_encoder(str(folder), device="cpu")
    model[0].model.resize_token_embeddings(known + 2)
    save_encoder(model, tmp_path / "saved")
    saved = read(tmp_path / "saved/tokenizer_config.json")
    assert saved["additional_special_tokens"] == tokens
    assert not isinstance(saved.get("extra_special_tokens"), list)
    assert saved["tokenizer_class"] == "PreTrainedTokenizerFast"
    tokenizer = load_encoder(str(tmp_path / "saved"), device="cpu").tokenizer
    ids = tokenizer("가[E1]나[E2]")["input_ids"]
    assert len(ids) == 6 and {known, known + 1} < set(ids)
    assert tokenizer.decode(ids, skip_special_tokens=True).split() == ["가", "나"]


@pytest.mark.parametrize("where", ["module", "tokenizer"])
def test_lower_case_stays_what_the_base_has(folder, tmp_path, where):
    if where == "module":  # sentence-transformers' own
        save_encoder(load_encoder(str(folder)), folder)
        edit_json(folder / "sentence_bert_config.json", do_lower_case=True)
    else:  # that of an uncased BERT
        file = str(folder / "tokenizer.json")
        tokenizer = Tokenizer.from_file(file)
        tokenizer.normalizer = normalizers.Lowercase()
        tokenizer.save(file)
    model = load_encoder(str(folder))
    texts = ["a man", "A MAN"]
    assert model.tokenizer(texts[0])["input_ids"] == model.tokenizer(texts[1])["input_ids"]
    save_encoder(model, tmp_path / "first")
    save_encoder(load_encoder(str(tmp_path / "first")), tmp_path / "second")
    again = load_encoder(str(tmp_path / "second"))
    lower, upper = again.encode(texts)
    np.testing.assert_array_equal(lower, upper)
    np.testing.assert_array_equal(lower, model.encode(texts)[0])
    config = read(tmp_path / "second/sentence_bert_config.json")
    assert config["do_lower_case"] is (where == "module")


def test_a_dense_module_of_today_stays_what_it_is(folder, tmp_path):
    dense = Dense(32, 16, use_residual=True)
    model = SentenceTransformer(modules=[*load_encoder(str(folder), device="cpu"), dense])
    save_encoder(model, tmp_path / "saved")
    config = read(tmp_path / "saved/2_Dense/config.json")
    assert config["use_residual"] is True and "module_input_name" not in config
    again = load_encoder(str(tmp_path / "saved"), device=str(model.device))
    np.testing.assert_array_equal(again.encode(SENTENCES), model.encode(SENTENCES))
