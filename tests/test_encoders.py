"""Loading, refusing and saving encoders; the Hub's part through its real client and hub.py."""

import json
import shutil

import numpy as np
import pytest
import torch
from encoders import edit_json, write_plain_encoder
from hub import Hub
from huggingface_hub import HfApi
from huggingface_hub.errors import HfHubHTTPError
from safetensors.torch import load_file

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
    with pytest.raises(UserError, match=r"owner/model: .*the Hub cannot be reached"):
        load_encoder("owner/model")


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


@pytest.mark.parametrize(
    "break_it, reason",
    [
        (lambda f: [path.unlink() for path in f.iterdir()], "neither config.json nor modules.json"),
        (lambda f: edit_json(f / "config.json", model_type="no-such-type"), "cannot be loaded"),
        (lambda f: (f / "model.safetensors").unlink(), "cannot be loaded"),
        (lambda f: (f / "model.safetensors").write_bytes(b"\0" * 50), "damaged weights"),
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
    modules = json.loads((folder / "modules.json").read_text(encoding="utf-8"))
    modules.append({"idx": 2, "name": "2", "path": "", "type": "carried.Carried"})
    (folder / "modules.json").write_text(json.dumps(modules), encoding="utf-8")
    code = (
        "from pathlib import Path\n"
        "from sentence_transformers.sentence_transformer.modules import Normalize\n"
        f"Path({str(tmp_path / 'ran')!r}).touch()\n"
        "class Carried(Normalize):\n"
        "    pass\n"
    )
    (folder / "carried.py").write_text(code, encoding="utf-8")
    with pytest.raises(UserError, match="its own Python code, which could do anything"):
        load_encoder(str(folder))
    assert not (tmp_path / "ran").exists()
    vectors = load_encoder(str(folder), trust_remote_code=True).encode(SENTENCES)
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-6)
    assert (tmp_path / "ran").exists()


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
