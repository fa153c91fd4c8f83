"""`vlm-tuning export`: what it refuses, what its proof finds, that nothing half-written stays; adapters for engines."""

import errno
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
import torch
from peft import LoraConfig, get_peft_model
from peft.tuners.lora import Linear as LoraLinear
from safetensors.torch import load_file, save_file
from tiny_models import build_model, build_processor
from transformers import AutoModelForImageTextToText, AutoProcessor

import tuning
from tuning import cli
from tuning.config.options import ModelSource
from tuning.export import merged_model
from tuning.export.base_files import BaseFiles
from tuning.export.merge import Merge
from tuning.model.answering import load_answering
from tuning.model.saved_weights import tensor_bytes
from tuning.pages.model_card import MARK

QV = ["q_proj", "v_proj"]


@pytest.fixture(scope="module")
def make_adapter(models, tmp_path_factory):
    """A folder with a random adapter of the llava15 model, or of another layout."""

    def make(layout: str = "llava15", **lora) -> Path:
        torch.manual_seed(3)
        folder = tmp_path_factory.mktemp("adapter") / "adapter"
        model = AutoModelForImageTextToText.from_pretrained(models[layout])
        config = LoraConfig(**{"r": 4, "target_modules": QV, "init_lora_weights": False, **lora})
        get_peft_model(model, config).save_pretrained(folder)
        return folder

    return make


@pytest.fixture(scope="module")
def adapter(make_adapter):
    return make_adapter()


@pytest.fixture
def run(tmp_path, capfd):
    """Run the command with an output folder: its exit code and all that it printed."""

    def command(*words: object, output: str = "out") -> tuple[int, str]:
        code = cli.main(["export", *map(str, words), *(["--output", str(tmp_path / output)] if output else [])])
        printed = capfd.readouterr()
        return code, printed.out + printed.err

    return command


def test_the_command_merges_from_a_config_file_and_compares_on_rows(adapter, rows, tmp_path):
    options = {"adapter": str(adapter), "output": str(tmp_path / "out"), "data_path": str(rows)}
    (tmp_path / "export.json").write_text(json.dumps(options))
    command = [sys.executable, "-m", "tuning.cli", "export", str(tmp_path / "export.json")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "Logits on 4 rows" in done.stdout
    assert f"Done: {tmp_path / 'out'}" in done.stdout
    assert {file.name for file in tmp_path.iterdir()} == {"export.json", "out"}


def test_the_adapters_own_processor_template_and_card_win(make_adapter, run, tmp_path):
    adapter = make_adapter()
    processor = build_processor("llava15")
    processor.chat_template += "{# ours #}"
    processor.save_pretrained(adapter)
    card = f"---\nlibrary_name: peft\n---\n{MARK}\nLoRA adapter for x\n\n## Use\n\nPeftModel\n\n## Data\n\nrows\n"
    (adapter / "README.md").write_text(card)
    assert run("--adapter", adapter)[0] == 0
    merged_card = (tmp_path / "out" / "README.md").read_text()
    assert "library_name: transformers" in merged_card
    assert "PeftModel" not in merged_card
    assert "## Data\n\nrows" in merged_card
    assert AutoProcessor.from_pretrained(tmp_path / "out").chat_template.endswith("{# ours #}")


def test_nothing_of_the_run_that_trained_the_base_is_copied(adapter, make_options, run, tmp_path):
    """Its report shows pictures, its settings paths of this machine."""
    options = make_options("llava15", max_steps=1, report_samples=1, output_dir=str(tmp_path / "base"))
    base = tuning.train(options).model_dir
    for name in ("check.json", "tracker_runs.json", "skipped_rows.jsonl", "trainer_state.json", "answers.jsonl"):
        (base / name).write_text("{}")
    of_the_model = json.loads((base / ".complete").read_text())["files"]
    assert {"report.html", "resolved_config.json", "run_facts.json"} < {file.name for file in base.iterdir()}
    assert run("--adapter", adapter, "--base", base)[0] == 0
    kept_here = {"README.md", "run_identity.json", "training_args.bin"}
    assert {file.name for file in (tmp_path / "out").iterdir()} == set(of_the_model) - kept_here


def test_a_folder_that_is_there_is_left_alone(adapter, run, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").write_text("mine")
    code, said = run("--adapter", adapter)
    assert code == 1
    assert "it exists already" in said
    assert [file.name for file in (tmp_path / "out").iterdir()] == ["mine.txt"]
    assert [file.name for file in tmp_path.iterdir()] == ["out"]


def halve_changed(make):
    return lambda merge, entry: make(merge, entry) / (1 if entry.change is None else 2)


def leave_first(make):
    """The first layer is written as it was."""
    seen = []

    def made(merge, entry):
        if entry.change is not None and not seen:
            seen.append(entry)
            return entry.source.read()
        return make(merge, entry)

    return made


def blank_copies(make):
    return lambda merge, entry: make(merge, entry) * (entry.change is not None)


def flip_a_bit(write):
    """The file is damaged as it is written."""

    def written(file, entries, tensors):
        write(file, entries, tensors)
        content = bytearray(file.read_bytes())
        content[-1] ^= 1
        file.write_bytes(content)

    return written


def drop_a_key(write):
    def written(file, entries, tensors):
        write(file, entries, tensors)
        tensors = load_file(file)
        tensors.pop("language_model.model.norm.weight")
        save_file(tensors, file)

    return written


def merge_nothing(_):
    return lambda layer, **_: None


def lose_setting(copy):
    def copied(plan, folder, *rest, **options):
        copy(plan, folder, *rest, **options)
        config = json.loads((folder / "config.json").read_text())
        config["text_config"]["rms_norm_eps"] = 0.5
        (folder / "config.json").write_text(json.dumps(config))

    return copied


FAULTS = {
    "halved": (Merge, "make", halve_changed, r"proj.weight is not what base and adapter make of it \(12 faults\)"),
    "a layer is not merged": (Merge, "make", leave_first, r"q_proj.weight is not .* \(1 faults\)"),
    "a key is dropped": (merged_model, "write_tensors", drop_a_key, "language_model.model.norm.weight is missing"),
    "a bit is flipped": (
        merged_model,
        "write_tensors",
        flip_a_bit,
        r"is not what base and adapter make .* \(1 faults\)",
    ),
    "tensors of the base are changed": (Merge, "make", blank_copies, r"is not what base and adapter make of it"),
    "PEFT merges nothing": (LoraLinear, "merge", merge_nothing, "the layer does not give what base and adapter give"),
    "a setting is lost": (BaseFiles, "write_config", lose_setting, r"its logits differ by [\d.]+% of the largest"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_is_found_and_nothing_is_kept(fault, adapter, run, tmp_path, monkeypatch):
    place, name, spoil, message = FAULTS[fault]
    monkeypatch.setattr(place, name, spoil(getattr(place, name)))
    code, said = run("--adapter", adapter)
    assert code == 203
    assert re.search(f"The merged model differs from base and adapter: .*{message}", said), said
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_is_told_before_anything_is_written(adapter, run, tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    code, said = run("--adapter", adapter)
    assert code == 1
    assert "67 MB are needed, and 0 MB are free" in said
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "No space left on device"), KeyboardInterrupt()])
def test_what_is_interrupted_leaves_nothing(error, adapter, run, tmp_path, monkeypatch):
    def fail(file, entries, tensors):
        file.write_bytes(tensor_bytes(next(iter(tensors))))
        raise error

    monkeypatch.setattr(merged_model, "write_tensors", fail)
    code, said = run("--adapter", adapter)
    assert (code, "No space left" in said) == ((1, True) if isinstance(error, OSError) else (130, False))
    assert list(tmp_path.iterdir()) == []


def test_what_cannot_be_merged_is_refused(adapter, make_adapter, models, run, tmp_path):
    def spoilt(**changes) -> Path:
        folder = tmp_path / "_".join(changes)
        shutil.copytree(adapter, folder)
        config = json.loads((folder / "adapter_config.json").read_text())
        (folder / "adapter_config.json").write_text(json.dumps(config | changes))
        return folder

    lacking = spoilt(r=4)
    tensors = load_file(lacking / "adapter_model.safetensors")
    gone = sorted(tensors)[0]
    save_file({name: tensor for name, tensor in tensors.items() if name != gone}, lacking / "adapter_model.safetensors")
    cases = {
        "there is no adapter": ["--adapter", models["llava15"]],
        r"does not fit the model: size mismatch .*\[16, 4\]": ["--adapter", spoilt(lora_alpha=8, r=2)],
        gone: ["--adapter", lacking],
        "does not fit the model: Target modules": ["--adapter", spoilt(target_modules=["query"])],
        "another model or other modules than this one: .*cross_attn": [
            "--adapter",
            make_adapter("mllama"),
            "--base",
            models["llava15"],
        ],
        "init_lora_weights pissa changed the base": ["--adapter", spoilt(init_lora_weights="pissa")],
        "base_model_name_or_path .*cannot be loaded": ["--adapter", spoilt(base_model_name_or_path=str(tmp_path))],
        "adapter: is required": [],
    }
    there = set(tmp_path.iterdir())
    for message, words in cases.items():
        code, said = run(*words)
        assert code == 1, said
        assert "Traceback" not in said
        assert re.search(message, said), (message, said)
    assert set(tmp_path.iterdir()) == there
    assert "unknown" in run("--adapter", adapter, "--target", "tgi")[1]
    assert "output: is required" in run("--adapter", adapter, output="")[1]


def test_a_model_that_does_not_fit_in_memory_is_proven_by_layers(adapter, run, monkeypatch):
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=1000))
    code, said = run("--adapter", adapter)
    assert code == 0
    assert "Logits were not compared" in said
    assert "12 merged layers give the right output" in said


def test_changes_that_rounding_takes_away_are_told(models, make_adapter, run, tmp_path):
    adapter = make_adapter(lora_alpha=4)
    tensors = load_file(adapter / "adapter_model.safetensors")
    smaller = {name: tensor * 0.02 for name, tensor in tensors.items()}
    save_file(smaller, adapter / "adapter_model.safetensors", metadata={"format": "pt"})
    base = tmp_path / "base"
    build_model("llava15", dtype=torch.bfloat16).save_pretrained(base)
    build_processor("llava15").save_pretrained(base)
    code, said = run("--adapter", adapter, "--base", base)
    assert code == 0
    assert re.search(r"Rounding loses \d+% of what the adapter adds", said), said
    code, said = run("--adapter", adapter, "--base", base, "--dtype", "float32", output="exact")
    assert (code, "Rounding" in said) == (0, False)


def test_nothing_is_said_of_saving_where_an_adapter_of_the_head_answers(make_adapter, recwarn):
    folder = make_adapter(target_modules=["lm_head"])
    recwarn.clear()
    assert load_answering(ModelSource(str(folder)), device="cpu").adapter.folder == folder
    assert not [warning for warning in recwarn if "save_embedding_layers" in str(warning.message)]


REFUSED = {
    "use_dora: vLLM has no DoRA": {"use_dora": True},
    "modules_to_save lm_head: vLLM takes no full modules": {"modules_to_save": ["lm_head"]},
    "bias all: vLLM takes no biases": {"bias": "all"},
    "embed_tokens: vLLM adapts embeddings and heads for some": {"target_modules": ["embed_tokens"]},
    "lm_head: vLLM adapts embeddings and heads for some": {"target_modules": ["lm_head"]},
    "patch_embedding: vLLM adapts linear layers only": {"target_modules": ["patch_embedding"]},
}


def test_what_vllm_would_not_load_is_told_with_the_command_that_merges(make_adapter, run, tmp_path):
    for reason, lora in REFUSED.items():
        folder = make_adapter(**lora)
        code, said = run("--adapter", folder, "--target", "vllm")
        assert code == 1
        assert reason in said
        assert f"Merge it instead: vlm-tuning export --adapter {folder} --output DIR" in said
    code, said = run("--adapter", make_adapter("mllama"), "--target", "vllm")
    assert (code, "vLLM has no MllamaForConditionalGeneration after 0.10.2" in said) == (1, True)
    assert list(tmp_path.iterdir()) == []


def test_an_adapter_that_vllm_loads_as_it_is(make_adapter, run):
    language_model = r".*language_model.*\.(q|v)_proj"
    folder = make_adapter(target_modules=language_model, r=20, use_rslora=True)
    code, said = run("--adapter", folder, "--target", "vllm", output="")
    assert code == 0
    assert f"--enable-lora --max-lora-rank 32 --lora-modules tuned={folder}" in said


def test_vllm_is_told_of_a_chat_template_that_the_base_does_not_have(make_adapter, run, models):
    folder = make_adapter(target_modules=r".*language_model.*\.q_proj")
    processor = AutoProcessor.from_pretrained(models["llava15"])
    for template, told in (
        (processor.chat_template, ""),
        ("{{ 1 }}", f" --chat-template {folder}/chat_template.jinja"),
    ):
        processor.chat_template = processor.tokenizer.chat_template = template
        processor.save_pretrained(folder)
        code, said = run("--adapter", folder, "--target", "vllm", output="")
        assert code == 0
        assert f"--enable-lora{told} --lora-modules tuned={folder}" in said


def test_layers_of_the_tower_are_renamed_for_vllm(make_adapter, run, tmp_path):
    """PEFT saved this one. Training gives its adapters these names from the start."""
    lora = {"target_modules": [*QV, "linear_1"], "rank_pattern": {"vision_tower.*q_proj": 2}}
    folder = make_adapter("granite_vision", **lora)
    code, said = run("--adapter", folder, "--target", "vllm", output="")
    assert (code, "8 modules have another name in vllm" in said) == (1, True)
    code, said = run("--adapter", folder, "--target", "vllm")
    assert code == 0
    assert "--enable-tower-connector-lora" in said
    before, after = (load_file(place / "adapter_model.safetensors") for place in (folder, tmp_path / "out"))
    inserted = {name.replace("vision_tower.", "vision_tower.vision_model."): tensor for name, tensor in before.items()}
    assert inserted.keys() == after.keys() != before.keys()
    assert all(torch.equal(tensor, after[name]) for name, tensor in inserted.items())
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    towers = ("model.vision_tower", "model.vision_tower.vision_model")
    assert config["rank_pattern"] == {
        f"{tower}.encoder.layers.{layer}.self_attn.q_proj": 2 for tower in towers for layer in range(4)
    }
    code, said = run("--adapter", tmp_path / "out", "--target", "vllm", output="")
    assert (code, "vLLM loads it" in said) == (0, True)


def test_a_tower_that_vllm_does_not_adapt_is_merged_instead(make_adapter, run):
    folder = make_adapter(target_modules=["q_proj"])
    code, said = run("--adapter", folder, "--target", "vllm", output="")
    assert (
        code,
        "vLLM fails at every picture of this model. 4 adapted layers are in its tower or projector." in said,
    ) == (1, True)


def test_transformers_finds_a_place_for_every_tensor(make_adapter, run, tmp_path):
    folder = make_adapter(modules_to_save=["multi_modal_projector"], bias="all", use_rslora=True)
    code, said = run("--adapter", folder, "--target", "transformers", output="")
    assert (code, "transformers loads it" in said) == (0, True)
    code, said = run("--adapter", make_adapter(use_dora=True), "--target", "transformers", output="")
    assert (code, "finds no place for 24 tensors" in said) == (1, True)  # transformers 5.23 loses what DoRA needs
    assert "PeftModel.from_pretrained loads all of it" in said
    tensors = load_file(folder / "adapter_model.safetensors")
    extra = {**tensors, "base_model.model.model.nowhere.lora_A.weight": torch.zeros(4, 4)}
    save_file(extra, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    code, said = run("--adapter", folder, "--target", "transformers", output="")
    assert (code, "nowhere.lora_A" in said) == (1, True)


class WritableHub:
    """A stand-in for the Hub's client, where everything may be written."""

    endpoint = "https://huggingface.co"

    def __init__(self, token=None):
        pass

    def whoami(self):
        return {}

    def create_repo(self, name, **_):
        return SimpleNamespace(repo_id=name)


@pytest.fixture
def uploaded(monkeypatch):
    """Repository → the files it was given, by name."""
    seen: dict[str, dict[str, bytes]] = {}

    class Hub(WritableHub):
        def create_commit(self, repo_id, operations, **_):
            for operation in operations:
                with operation.as_file() as content:
                    seen.setdefault(repo_id, {})[operation.path_in_repo] = content.read()

    monkeypatch.setattr("tuning.hub.HfApi", Hub)
    return seen


def test_the_folder_is_uploaded(adapter, run, tmp_path, uploaded):
    code, said = run("--adapter", adapter, "--push_to_hub", "me/merged")
    assert (code, "Uploaded to https://huggingface.co/me/merged" in said) == (0, True)
    assert uploaded == {"me/merged": {file.name: file.read_bytes() for file in (tmp_path / "out").iterdir()}}


def test_an_adapter_is_uploaded_without_paths_of_this_machine(adapter, run, models, uploaded):
    assert run("--adapter", adapter, "--target", "transformers", "--push_to_hub", "me/adapter")[0] == 0
    files = uploaded["me/adapter"]
    assert json.loads(files["adapter_config.json"])["base_model_name_or_path"] == models["llava15"].name
    assert not [name for name, content in files.items() if str(models["llava15"].parent).encode() in content]


def test_a_repository_that_cannot_be_opened_is_told_before_the_merge(adapter, run, tmp_path):
    code, said = run("--adapter", adapter, "--push_to_hub", "me/merged", output="again")
    assert code == 1
    assert "push_to_hub: nothing can be uploaded to me/merged: there is no token" in said
    assert not (tmp_path / "again").exists()


def test_an_upload_that_fails_keeps_the_folder(adapter, run, monkeypatch, tmp_path):
    class Hub(WritableHub):
        def create_commit(self, *_, **__):
            raise OSError("no route to host")

    monkeypatch.setattr("tuning.hub.HfApi", Hub)
    code, said = run("--adapter", adapter, "--push_to_hub", "me/merged", output="again")
    assert code == 1
    assert f"hf upload me/merged {tmp_path}/again" in said
    assert (tmp_path / "again" / "model.safetensors").is_file()


def test_help_lists_the_options(capsys):
    assert cli.main(["export", "--help"]) == 0
    printed = capsys.readouterr().out
    assert all(f"--{name} " in printed for name in ("adapter", "output", "target", "data_path", "dataset_text_field"))
