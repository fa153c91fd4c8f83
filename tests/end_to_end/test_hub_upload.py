"""push_to_hub against a server on this machine: what is uploaded, and what is said when it cannot be."""

import json

import huggingface_hub.constants
import pytest
from hub_server import READ_TOKEN, TOKEN, serve_hub
from huggingface_hub import ModelCard

import tuning
from tuning.errors import UserError
from tuning.sft_trainer import main

LORA = {"peft_method": "lora", "target_modules": ["q_proj"]}


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """A hub that the libraries take for the Hub, on which nobody is logged in."""
    with serve_hub() as server:
        monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", server.address)
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(huggingface_hub.constants, "HF_TOKEN_PATH", str(tmp_path / "no_token"))
        for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"):
            monkeypatch.delenv(name, raising=False)
        yield server


@pytest.fixture
def options(make_options):
    def make(**changes):
        return make_options("llava15", max_steps=2, push_to_hub=True, **{"hub_token": TOKEN} | changes)

    return make


@pytest.mark.parametrize("lora", [False, True])
def test_the_repository_holds_the_model_its_card_and_the_log_and_nothing_else(lora, hub, options, models, tmp_path):
    place = {"save_model_dir": str(tmp_path / "final")} if lora else {}  # else among checkpoints and settings
    result = tuning.train(options(hub_model_id="me/colours", hub_strategy="end", **(LORA if lora else {}), **place))
    assert list(hub.repos) == ["me/colours"]
    files = hub.repos["me/colours"]["main"]
    weights = {"adapter_model.safetensors", "adapter_config.json"} if lora else {"model.safetensors", "config.json"}
    processor = {"processor_config.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja"}
    assert set(files) == {*weights, *processor, "generation_config.json", "README.md", "training_logs.jsonl"}
    for name, content in files.items():
        assert TOKEN.encode() not in content, name
        assert str(tmp_path.parent).encode() not in content, name
        assert str(models["llava15"].parent).encode() not in content, name
        if name not in ("adapter_config.json", "training_logs.jsonl"):
            assert content == (result.model_dir / name).read_bytes(), name
    assert hub.commits == ["Trained"]
    assert ModelCard(files["README.md"].decode()).data.library_name == ("peft" if lora else "transformers")
    assert all(TOKEN.encode() not in file.read_bytes() for file in tmp_path.rglob("*") if file.is_file())


def test_the_repository_is_called_like_the_output_folder_and_may_be_a_branch(hub, options):
    tuning.train(options(hub_revision="try"))
    assert set(hub.repos) == {"user/out"}
    assert not hub.repos["user/out"]["main"]
    assert "model.safetensors" in hub.repos["user/out"]["try"]


@pytest.mark.parametrize(("strategy", "folders"), [("every_save", ()), ("checkpoint", ("last-checkpoint",))])
def test_checkpoints_are_uploaded_as_the_strategy_says(strategy, folders, hub, options, tmp_path):
    limit = {"save_steps": 1, "save_total_limit": 1, "hub_always_push": True}
    tuning.train(options(hub_strategy=strategy, output_dir=str(tmp_path / "some" / "run"), **limit))
    files = hub.repos["user/run"]["main"]
    assert hub.commits == ["Step 1 of training", "Step 2 of training", "Trained"]
    assert {name.partition("/")[0] for name in files if "/" in name} == set(folders)
    for folder in folders:
        assert {f"{folder}/optimizer.pt", f"{folder}/trainer_state.json", f"{folder}/model.safetensors"} <= set(files)
        assert json.loads(files[f"{folder}/trainer_state.json"])["global_step"] == 2
    assert not [name for name in files if "training_args" in name or "identity" in name]
    assert not [name for name, content in files.items() if str(tmp_path).encode() in content]


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"hub_token": None}, "there is no token"),
        ({"hub_token": "hf_wrong"}, "the token is not accepted"),
        ({"hub_token": READ_TOKEN}, "the token may only read"),
        ({"hub_model_id": "not a name"}, "not a name"),
    ],
)
def test_what_forbids_the_upload_is_said_before_the_weights_are_read(
    changes, said, hub, options, tmp_path, monkeypatch
):
    monkeypatch.setattr("tuning.sft_trainer.build_model", pytest.fail)
    with pytest.raises(UserError, match=said):
        tuning.train(options(**changes))
    assert not (tmp_path / "out").exists()
    assert not hub.commits


@pytest.mark.parametrize(("offline", "said"), [(True, "HF_HUB_OFFLINE is set"), (False, "cannot be reached")])
def test_a_missing_network_is_said_before_the_weights_are_read(offline, said, hub, options, monkeypatch):
    monkeypatch.setattr("tuning.sft_trainer.build_model", pytest.fail)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", offline)
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(UserError, match=said):
        tuning.train(options())


def test_a_failed_upload_leaves_the_model_and_the_same_command_uploads_it(hub, options, tmp_path, capsys):
    config = tmp_path / "config.json"
    config.write_text(json.dumps(options(hub_model_id="me/colours")))
    hub.is_full = "forbidden"
    assert main([str(config)]) == 1
    said = capsys.readouterr().err
    assert f"the model is saved in {tmp_path}/out, but was not uploaded to me/colours: the token may not write" in said
    assert f"hf upload me/colours {tmp_path}/out" in said
    assert "Traceback" not in said
    assert (tmp_path / "out" / "model.safetensors").is_file()
    assert not hub.repos["me/colours"]["main"]
    hub.is_full = ""
    assert main([str(config)]) == 0
    files = hub.repos["me/colours"]["main"]
    assert files["model.safetensors"] == (tmp_path / "out" / "model.safetensors").read_bytes()
    assert "README.md" in files
    assert not [name for name in files if "training_args" in name or "checkpoint" in name]
    assert "already finished" in capsys.readouterr().out


def test_a_checkpoint_that_is_not_uploaded_does_not_end_the_run(hub, options, capsys, monkeypatch):
    hub.is_full = "forbidden"
    with pytest.raises(UserError, match="but was not uploaded"):
        tuning.train(options(hub_strategy="every_save", save_steps=1))
    assert "checkpoint-1 was not uploaded: the token may not write there." in capsys.readouterr().out
