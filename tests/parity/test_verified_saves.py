"""A saved model that is not the one that was trained is told from one that is, and the run is not finished."""

import copy
import json
import re
import shutil
from dataclasses import replace
from pathlib import Path

import psutil
import pytest
import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import load_file, save_file

import tuning
from tuning import sft_trainer
from tuning.config.options import ModelArguments
from tuning.errors import RunEnded, UserError
from tuning.exit_codes import EXIT_INTERNAL_ERROR, exit_code_of
from tuning.files import SHARDED_MODEL
from tuning.training import checkpointing, read_back, verify_save
from tuning.training.final_model import trained_model
from tuning.training.model_writer import ModelWriter
from tuning.training.read_back import find_shard_fault
from tuning.training.trainer import SupervisedTrainer

LORA = {"peft_method": "lora", "target_modules": ["q_proj", "v_proj"], "r": 4}
METHODS = {"full": {}, "lora": LORA}


def change_weights(change):
    """A fault of the weights' file, by a function that changes the tensors by name."""

    def broken(target: Path, base: Path) -> None:
        (file,) = target.glob("*.safetensors")
        weights = load_file(file)
        change(weights)
        save_file(weights, file, {"format": "pt"})

    return broken


def drop(weights: dict) -> None:
    del weights[min(weights)]


def halve(weights: dict) -> None:
    weights[max(weights)] /= 2


def nudge(weights: dict) -> None:
    name = min(weights)
    weights[name].view(-1)[-1].add_(1e-6)


def round_off(weights: dict) -> None:
    weights.update({name: tensor.half() for name, tensor in weights.items()})


def add_one(weights: dict) -> None:
    weights["zz.weight"] = torch.zeros(2)


def untrain(weights: dict) -> None:
    for name, tensor in weights.items():
        weights[name] = torch.zeros_like(tensor) if "lora_B" in name else tensor


def write_base(target: Path, base: Path) -> None:
    shutil.copy(base / "model.safetensors", target)


def lose_template(target: Path, base: Path) -> None:
    (target / "chat_template.jinja").unlink()


def lose_processor(target: Path, base: Path) -> None:
    for name in ("processor_config.json", "tokenizer_config.json", "tokenizer.json"):
        (target / name).unlink()


def cut_off(target: Path, base: Path) -> None:
    (file,) = target.glob("*.safetensors")
    file.write_bytes(file.read_bytes()[:-8])


def change_json(name: str, *path: str, value):
    def broken(target: Path, base: Path) -> None:
        whole = part = json.loads((target / name).read_text())
        for key in path[:-1]:
            part = part[key]
        part[path[-1]] = value
        (target / name).write_text(json.dumps(whole))

    return broken


FAULTS = {
    "full: a tensor is missing": (change_weights(drop), "the file lacks 1 tensors, first"),
    "full: the base's weights": (write_base, r"\d+ of \d+ tensors differ, by up to [\d.e-]+, first .*weight"),
    "full: half of one tensor": (change_weights(halve), r"1 of \d+ tensors differ, by up to"),
    "full: one number": (change_weights(nudge), r"1 of \d+ tensors differ, by up to [\d.]+e-0[67]"),
    "full: another precision": (change_weights(round_off), r"is float16 \[.*\] instead of float32 \["),
    "full: one tensor more": (change_weights(add_one), "has 1 tensors too many, first zz.weight"),
    "full: no chat template": (lose_template, "its chat template differs"),
    "full: no processor": (lose_processor, "it cannot be read back"),
    "full: half a file": (cut_off, "it cannot be read back"),
    "full: another norm": (
        change_json("config.json", "text_config", "rms_norm_eps", value=0.5),
        r"its logits are off by [\d.e-]+ of their norm, though its tensors are the same",
    ),
    "full: another end": (
        change_json("generation_config.json", "eos_token_id", value=7),
        "its generation config differs",
    ),
    "lora: a tensor is missing": (change_weights(drop), "the file lacks 1 tensors, first base_model"),
    "lora: no training": (change_weights(untrain), r"\d+ of \d+ tensors differ, by up to [\d.e-]+, first .*lora_B"),
    "lora: half of one tensor": (change_weights(halve), r"1 of \d+ tensors differ"),
    "lora: no chat template": (lose_template, "its chat template differs"),
    "lora: another scale": (
        change_json("adapter_config.json", "lora_alpha", value=16),
        "its adapter config differs",
    ),
}


@pytest.fixture(scope="module")
def finished(tmp_path_factory, models, rows):
    """Method → options of a run that has ended with a checkpoint, and its trainer. Copied before use."""
    root, seen, save = tmp_path_factory.mktemp("verified"), [], sft_trainer.save_final_model

    def train(method: str) -> tuple[dict, SupervisedTrainer]:
        options = {
            "model_name_or_path": str(models["llava15"]),
            "training_data_path": str(rows),
            "output_dir": str(root / method),
            "per_device_train_batch_size": 4,
            "learning_rate": 1e-2,
            "dataloader_num_workers": 0,
            "report_samples": 0,
            "max_steps": 1,
            **METHODS[method],
        }
        tuning.train(options)
        return options, seen[-1]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            sft_trainer, "save_final_model", lambda trainer, *rest: (seen.append(trainer), save(trainer, *rest))
        )
        return {method: train(method) for method in METHODS}


@pytest.mark.parametrize("name", FAULTS)
def test_a_save_that_went_wrong_is_told(name, finished, tmp_path, models):
    (fault, told), (options, trainer) = FAULTS[name], finished[name.partition(":")[0]]
    folder = tmp_path / "saved"
    shutil.copytree(options["output_dir"], folder)
    settings, trained = ModelArguments(model_name_or_path=str(models["llava15"])), trained_model(trainer)
    verify_save.verify_saved_model(trained, folder, None, settings, force=False)
    fault(folder, models["llava15"])
    with pytest.raises(RunEnded, match=re.escape(f"The model saved in {folder} is not the one that was")) as ended:
        verify_save.verify_saved_model(trained, folder, None, settings, force=False)
    assert re.search(told, ended.value.message)


def break_saves(patch: pytest.MonkeyPatch, fault, base: Path) -> None:
    """Let `fault` befall every final save."""
    save = SupervisedTrainer.save_final

    def broken(trainer, target, *rest):
        names = save(trainer, target, *rest)
        fault(target, base)
        return names

    patch.setattr(SupervisedTrainer, "save_final", broken)


@pytest.mark.parametrize("method", METHODS)
def test_a_run_whose_save_went_wrong_is_not_finished(method, make_options, monkeypatch, capsys, models):
    break_saves(monkeypatch, change_weights(halve), models["llava15"])
    options = make_options("llava15", max_steps=1, **METHODS[method])
    assert exit_code_of(lambda: tuning.train(options)) == EXIT_INTERNAL_ERROR
    folder, said = Path(options["output_dir"]), capsys.readouterr()
    assert f"The model saved in {folder} is not the one that was trained: 1 of " in said.err
    assert "Traceback" not in said.err
    assert "Done" not in said.out
    assert not (folder / ".complete").exists()


@pytest.mark.parametrize("method", METHODS)
def test_a_checkpoint_that_went_wrong_is_deleted(method, make_options, monkeypatch, capsys, models):
    """The one before it stays, and the same command continues there."""
    write = ModelWriter.write

    def broken(writer, model, folder, weights):
        write(writer, model, folder, weights)
        if folder.name.endswith("checkpoint-2"):
            change_weights(halve)(folder, models["llava15"])

    options = make_options("llava15", max_steps=3, save_strategy="steps", save_steps=1, **METHODS[method])
    with monkeypatch.context() as patch:
        patch.setattr(ModelWriter, "write", broken)
        assert exit_code_of(lambda: tuning.train(options)) == EXIT_INTERNAL_ERROR
    folder, said = Path(options["output_dir"]), capsys.readouterr().err
    assert re.search(r"The checkpoint of step 2 does not have the weights in memory: 1 of \d+ tensors differ", said)
    assert f"the same command again: it continues from {folder / 'checkpoint-1'}." in said
    assert "Traceback" not in said
    assert [found.name for found in folder.glob("*checkpoint-*")] == ["checkpoint-1"]
    tuning.train(options)
    assert (folder / "checkpoint-2").is_dir()


@pytest.mark.parametrize(("fault", "told"), [(lose_processor, "cannot be read back"), (cut_off, "cannot be ")])
def test_a_checkpoint_that_cannot_be_read_back_is_deleted(fault, told, make_options, monkeypatch, models):
    write = ModelWriter.write
    monkeypatch.setattr(
        ModelWriter,
        "write",
        lambda writer, model, folder, weights: (
            write(writer, model, folder, weights),
            fault(folder, models["llava15"]),
        ),
    )
    options = make_options("llava15", max_steps=1)
    with pytest.raises((RunEnded, UserError), match=told):
        tuning.train(options)
    assert not list(Path(options["output_dir"]).glob("*checkpoint-*"))


def test_a_setting_that_a_checkpoint_does_not_give_back_is_named_once(make_options, monkeypatch, capsys):
    """The weights are worth more. The final save is not excused."""
    write = ModelWriter.write_files
    monkeypatch.setattr(
        ModelWriter,
        "write_files",
        lambda writer, model, folder, dtype: (write(writer, model, folder, dtype), lose_template(folder, folder)),
    )
    options = make_options("llava15", max_steps=2, save_strategy="steps", save_steps=1)
    with pytest.raises(RunEnded, match="its chat template differs"):
        tuning.train(options)
    said = capsys.readouterr().out
    assert said.count("does not load as it is in memory: its chat template differs") == 1
    assert {found.name for found in Path(options["output_dir"]).glob("checkpoint-*")} == {
        "checkpoint-1",
        "checkpoint-2",
    }


def test_with_verify_save_false_no_checkpoint_is_read(make_options, monkeypatch):
    monkeypatch.setattr(checkpointing, "find_tensor_fault", None)
    tuning.train(make_options("llava15", max_steps=1, verify_save=False))


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_a_wrong_shard_is_told(finished, tmp_path, monkeypatch):
    model = finished["full"][1].model
    dcp.save({"model": model.state_dict()}, checkpoint_id=tmp_path / SHARDED_MODEL, no_dist=True)
    assert find_shard_fault(model, tmp_path) == ""
    changed = copy.deepcopy(model)
    halve(changed.state_dict())
    assert re.search(r"1 of \d+ tensors differ, by up to .*weight", find_shard_fault(changed, tmp_path))
    reads, read = [], read_back.read_shards
    monkeypatch.setattr(read_back, "read_shards", lambda *args, **kwargs: reads.append(read(*args, **kwargs)))
    assert find_shard_fault(model, tmp_path) == ""
    assert len(reads) == 1  # each reads the list of all shards
    monkeypatch.setattr(read_back, "READ_AT_ONCE", 100_000)
    assert find_shard_fault(model, tmp_path) == ""
    assert 3 < len(reads) < len(model.state_dict())
    monkeypatch.setattr(read_back, "PATIENCE", 0)
    (tmp_path / SHARDED_MODEL / ".metadata").unlink()
    with pytest.raises(FileNotFoundError):
        find_shard_fault(model, tmp_path)


def test_the_same_command_saves_again_and_compares_with_the_checkpoint(finished, tmp_path, monkeypatch, capsys):
    for method, (options, _) in finished.items():
        folder = tmp_path / method
        shutil.copytree(options["output_dir"], folder)
        (folder / ".complete").unlink()
        options = {**options, "output_dir": str(folder)}
        with monkeypatch.context() as patch:
            break_saves(patch, change_weights(halve), folder)
            with pytest.raises(RunEnded, match=r"1 of .* tensors differ"):
                tuning.train(options)
        tuning.train(options)
        assert f"its weights are those of {folder / 'checkpoint-1'}." in capsys.readouterr().out
        assert (folder / ".complete").exists()


def test_a_run_whose_template_an_earlier_version_saved_as_published_is_finished(finished, models, tmp_path):
    """Its checkpoint has the base's template. The final model gets the one that ends answers."""
    published = (models["llava15"] / "chat_template.jinja").read_text()
    for method, (options, _) in finished.items():
        folder = tmp_path / method
        shutil.copytree(options["output_dir"], folder)
        (folder / ".complete").unlink()
        (folder / "checkpoint-1" / "chat_template.jinja").write_text(published)
        (folder / "checkpoint-1" / "chat_template.json").write_text(json.dumps({"chat_template": published}))
        tuning.train({**options, "output_dir": str(folder)})
        saved = (folder / "chat_template.jinja").read_text()
        assert saved.endswith(published)
        assert saved != published
        assert not (folder / "chat_template.json").exists()


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_a_checkpoint_that_cannot_be_read_is_told(finished, tmp_path):
    """One whole, and one that FSDP sharded."""
    options, trainer = finished["full"]
    folder, checkpoint = Path(options["output_dir"]), tmp_path / "checkpoint-1"
    shutil.copytree(folder / "checkpoint-1", checkpoint)
    settings, trained = ModelArguments(model_name_or_path=options["model_name_or_path"]), trained_model(trainer)
    told = re.escape(f"it cannot be compared with {checkpoint} (")
    cut_off(checkpoint, folder)
    with pytest.raises(RunEnded, match=told):
        verify_save.verify_saved_model(trained, folder, checkpoint, settings, force=False)
    dcp.save({"model": trainer.model.state_dict()}, checkpoint_id=checkpoint / SHARDED_MODEL, no_dist=True)
    verify_save.verify_saved_model(trained, folder, checkpoint, settings, force=False)
    next((checkpoint / SHARDED_MODEL).glob("*.distcp")).write_bytes(b"")
    with pytest.raises(RunEnded, match=told):
        verify_save.verify_saved_model(trained, folder, checkpoint, settings, force=False)


def test_the_first_process_alone_reads_a_checkpoint(finished, monkeypatch):
    """Every other one would have the whole model in memory."""
    options, trainer = finished["full"]
    trained = replace(trained_model(trainer), is_fsdp=True, is_main_process=False)
    monkeypatch.setattr(trained.processes, "number", 2)
    monkeypatch.setattr(trained.processes, "all_gather_ints", torch.tensor)
    monkeypatch.setattr(trained.processes, "raise_on_all_ranks", lambda error: None)
    monkeypatch.setattr(verify_save, "checkpoint_weights", None)
    folder = Path(options["output_dir"])
    verify_save.verify_saved_model(trained, folder, folder / "checkpoint-1", ModelArguments(), force=False)


def test_the_trained_model_stays_as_it_was(make_options, trainers, capsys):
    """Also with all that an adapter may have, and beside which PEFT takes no second one."""
    extras = {"use_dora": True, "modules_to_save": ["multi_modal_projector"]}
    for changes in (LORA | extras, LORA | {"bias": "all"}):
        tuning.train(
            make_options("granite_vision", max_steps=1, overwrite_output_dir=True, verify_save=False, **changes)
        )
        assert "back" not in capsys.readouterr().out
        trainer = trainers[-1]
        model = trainer.model.train()
        before = {name: (p.requires_grad, p.clone()) for name, p in model.named_parameters()}
        folder = Path(trainer.args.output_dir)
        verify_save.verify_saved_model(trained_model(trainer), folder, None, ModelArguments(), force=False)
        assert "its weights and logits are those that were trained." in capsys.readouterr().out
        after = dict(model.named_parameters())
        assert after.keys() == before.keys()
        assert all(p.requires_grad == before[n][0] and torch.equal(p, before[n][1]) for n, p in after.items())
        assert model.training
        assert model.active_adapter == "default"


def test_without_room_for_a_second_model_its_tensors_are_compared(make_options, monkeypatch, capsys):
    monkeypatch.setattr(verify_save, "ROOM", 1e12)
    tuning.train(make_options("granite_vision", max_steps=1))
    said = capsys.readouterr().out
    assert "its weights are those that were trained. It was not loaded: there is no room for a second model." in said


def test_the_room_for_what_deepspeed_sharded_is_that_of_the_whole(finished, monkeypatch):
    model, size = torch.nn.ParameterList([torch.empty(0)]), psutil.virtual_memory().available
    trained = replace(trained_model(finished["full"][1]), model=model)
    assert verify_save.has_room(trained)
    monkeypatch.setattr(model[0], "ds_numel", size, raising=False)
    assert not verify_save.has_room(trained)


def test_a_full_model_takes_the_place_of_an_earlier_adapter(make_options, capsys):
    """transformers would load the adapter on top of it."""
    tuning.train(make_options("llava15", max_steps=1, **LORA))
    tuning.train(make_options("llava15", max_steps=1, overwrite_output_dir=True))
    assert capsys.readouterr().out.count("its weights and logits are those that were trained.") == 2
