"""Which modules LoRA adapts, what trains, and at which pace."""

import json

import pytest
from tiny_models import LAYOUTS, build_model

import tuning
from tuning import sft_trainer
from tuning.config.arguments import LoraArguments
from tuning.errors import UserError
from tuning.model.lora import add_lora, check_modules_to_save, resolve_targets
from tuning.model.parts import LANGUAGE_MODEL, PARTS, PROJECTOR, VISION_TOWER, find_parts, parameter_table


def resolve(layout: str, targets, open_parts=(LANGUAGE_MODEL,)) -> list[str]:
    model = build_model(layout)
    return resolve_targets(model, find_parts(model), LoraArguments("lora", target_modules=targets), set(open_parts))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_names_look_into_the_language_model_only(layout):
    model = build_model(layout)
    everywhere = [name for name, _ in model.named_modules() if name.endswith("q_proj")]
    chosen = resolve(layout, ["q_proj"])
    assert chosen
    assert set(chosen) < set(everywhere)  # the vision tower has modules of that name too
    assert {find_parts(model).of(name) for name in chosen} == {LANGUAGE_MODEL}
    assert resolve(layout, ["q_proj"], PARTS) == everywhere


@pytest.mark.parametrize("layout", LAYOUTS)
def test_all_linear_takes_every_linear_layer_but_the_head(layout):
    chosen = resolve(layout, "all-linear")
    assert {name.rpartition(".")[2] for name in chosen} >= {"q_proj", "o_proj", "gate_proj", "down_proj"}
    assert not any("lm_head" in name for name in chosen)


def test_a_regular_expression_matches_full_names_everywhere():
    chosen = resolve("llava15", r".*vision_tower.*layers\.[01]\..*(q|v)_proj")
    assert len(chosen) == 4
    assert all("vision_tower" in name for name in chosen)


def test_names_may_be_separated_by_commas():
    assert resolve("llava15", "q_proj,v_proj") == resolve("llava15", ["q_proj", "v_proj"])


def test_without_targets_the_error_lists_what_each_part_offers_and_the_line_to_add():
    with pytest.raises(UserError) as caught:
        resolve("granite_vision", None)
    message = str(caught.value)
    for line in (
        "vision_tower: ",
        "multi_modal_projector: linear_1",
        "language_model: ",
        '"target_modules": ["q_proj"',
    ):
        assert line in message


def test_a_target_that_matches_nothing_is_an_error_that_says_where_it_is():
    with pytest.raises(UserError, match="q_prj matches no module"):
        resolve("llava15", ["q_proj", "q_prj"])
    with pytest.raises(UserError, match="only in the vision_tower: set freeze_vision_tower false"):
        resolve("llava15", ["fc1"])
    with pytest.raises(UserError, match="matches no module"):
        resolve("llava15", "nothing.*")
    with pytest.raises(UserError, match=r"lm_haed matches no module"):
        check_modules_to_save(build_model("llava15"), ["lm_haed"])


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_table_counts_every_parameter_once(layout):
    model = build_model(layout)
    parts = find_parts(model)
    adapted = add_lora(model, LoraArguments("lora", target_modules=["q_proj"]), resolve(layout, ["q_proj"]))
    *_, last = parameter_table(adapted, parts).splitlines()
    total = sum(parameter.numel() for parameter in adapted.parameters())
    trainable = sum(parameter.numel() for parameter in adapted.parameters() if parameter.requires_grad)
    assert [int(word.replace(",", "")) for word in last.split()[1:3]] == [total, trainable]
    assert 0 < trainable < total


@pytest.fixture
def trainers(monkeypatch):
    """The trainer of every run, as `trainers[-1]`."""
    seen, save = [], sft_trainer.save
    monkeypatch.setattr(sft_trainer, "save", lambda trainer, config: (seen.append(trainer), save(trainer, config)))
    return seen


def options(models, rows, tmp_path, **more) -> dict:
    paths = {"model_name_or_path": str(models["llava15"]), "training_data_path": str(rows)}
    run = {"output_dir": str(tmp_path / "out"), "max_steps": 2, "save_strategy": "no", "dataloader_num_workers": 0}
    return {**paths, **run, **more}


def test_the_saved_adapter_carries_full_names(models, rows, tmp_path):
    every = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    lora = {"peft_method": "lora", "target_modules": every, "modules_to_save": ["lm_head"], "use_rslora": True}
    tuning.train(options(models, rows, tmp_path, **lora, freeze_vision_tower=False))
    saved = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert set(saved["target_modules"]) == set(resolve("llava15", every, (LANGUAGE_MODEL, VISION_TOWER)))
    assert all(name.startswith("model.") for name in saved["target_modules"])
    assert saved["use_rslora"] is True
    assert saved["base_model_name_or_path"] == str(models["llava15"])


def test_each_part_learns_at_its_own_pace(models, rows, tmp_path, trainers):
    rates = {"learning_rate": 1e-3, "vision_tower_learning_rate": 1e-5, "projector_learning_rate": 1e-4}
    tuning.train(options(models, rows, tmp_path, **rates, lr_scheduler_type="constant"))
    trainer = trainers[-1]
    expected = {VISION_TOWER: 1e-5, PROJECTOR: 1e-4, LANGUAGE_MODEL: 1e-3}
    names = {id(parameter): name for name, parameter in trainer.model.named_parameters()}
    groups = trainer.optimizer.param_groups
    found = {id(p): group["lr"] for group in groups for p in group["params"]}
    assert found.keys() == names.keys()
    assert all(rate == expected[trainer.parts.of(names[key])] for key, rate in found.items())


def test_a_frozen_part_stays_as_it_was(models, rows, tmp_path, trainers):
    before = {name: p.detach().clone() for name, p in build_model("llava15").named_parameters()}
    tuning.train(options(models, rows, tmp_path, freeze_vision_tower=True, learning_rate=1e-2))
    moved = {
        trainers[-1].parts.of(name)
        for name, parameter in trainers[-1].model.named_parameters()
        if not parameter.equal(before[name])
    }
    assert moved == {PROJECTOR, LANGUAGE_MODEL}


def test_processor_settings_reach_processor_and_model_and_are_saved(models, rows, tmp_path, capsys):
    grid = [[32, 32]]
    more = {"model_name_or_path": str(models["llava16_mistral"]), "processor_kwargs": {"image_grid_pinpoints": grid}}
    tuning.train(options(models, rows, tmp_path, **more))
    assert "image costs 36 image tokens" in capsys.readouterr().out  # one tile of 16, newlines, and the whole picture
    saved = json.loads((tmp_path / "out" / "processor_config.json").read_text())
    assert saved["image_processor"]["image_grid_pinpoints"] == grid
    assert json.loads((tmp_path / "out" / "config.json").read_text())["image_grid_pinpoints"] == grid
    with pytest.raises(UserError, match="unknown settings image_grid for"):
        tuning.train(options(models, rows, tmp_path, processor_kwargs={"image_grid": grid}))


def test_accumulation_changes_neither_loss_nor_weights(models, rows, tmp_path, trainers):
    weights = []
    for size, accumulation in ((8, 1), (1, 8), (4, 2)):
        shape = {"per_device_train_batch_size": size, "gradient_accumulation_steps": accumulation}
        more = {"output_dir": str(tmp_path / str(size)), "learning_rate": 1e-2, "logging_steps": 1, "optim": "sgd"}
        tuning.train(options(models, rows, tmp_path, **shape, **more))
        log = [json.loads(line) for line in (tmp_path / str(size) / "training_logs.jsonl").read_text().splitlines()]
        weights.append(([line["loss"] for line in log], dict(trainers[-1].model.state_dict())))
    for losses, state in weights[1:]:
        assert losses == pytest.approx(weights[0][0], rel=1e-5)
        assert all(state[name].allclose(weights[0][1][name], atol=1e-6) for name in state)
    assert len(weights[0][0]) == 2
