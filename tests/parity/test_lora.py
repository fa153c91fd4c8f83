"""What trains: LoRA's targets, frozen parts, learning rates of parts; and models that cannot be trained as they are."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from PIL import Image
from preparation import make_model
from safetensors.torch import load_file, save_file
from tiny_models import LAYOUTS, build_model, build_processor
from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor

import tuning
from tuning import sft_trainer
from tuning.config.parse import build_config
from tuning.errors import UserError
from tuning.model import build, load
from tuning.model.parts import LANGUAGE_MODEL, PARTS, PROJECTOR, VISION_TOWER, find_parts, freeze_parts, parameter_table

LORA = {"peft_method": "lora", "target_modules": ["q_proj", "v_proj"], "r": 4}


def find_targets(options: dict) -> list[str]:
    config = build_config(options)
    skeleton = load.build_skeleton(load.load_config(config.model))
    targets = build.find_lora_targets(config, skeleton, find_parts(skeleton))
    assert not targets.parameters  # these layouts have no experts
    return targets.modules


def part_of(name: str) -> str:
    """By the published layouts' own names, independent of `find_parts`."""
    if ".vision_tower." in name or ".vision_model." in name:
        return VISION_TOWER
    return LANGUAGE_MODEL if ".language_model." in name or "lm_head" in name else PROJECTOR


@pytest.mark.parametrize("layout", LAYOUTS)
def test_names_adapt_the_language_model_only(layout, make_options):
    names = [name for name, _ in build_model(layout).named_modules() if name.endswith((".q_proj", ".v_proj"))]
    assert {part_of(name) for name in names} == {VISION_TOWER, LANGUAGE_MODEL}  # the trap is there
    targets = find_targets(make_options(layout, **LORA))
    assert targets == [name for name in names if part_of(name) == LANGUAGE_MODEL]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_an_opened_vision_tower_is_adapted_too(layout, make_options):
    names = [name for name, _ in build_model(layout).named_modules() if name.endswith((".q_proj", ".v_proj"))]
    targets = find_targets(make_options(layout, **LORA, freeze_vision_tower=False))
    assert targets == names
    only_vision = find_targets(make_options(layout, **LORA, freeze_vision_tower=False, freeze_language_model=True))
    assert only_vision == [name for name in names if part_of(name) == VISION_TOWER]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_all_linear_adapts_every_linear_layer_but_the_head(layout, make_options):
    linear = [name for name, m in build_model(layout).named_modules() if isinstance(m, torch.nn.Linear)]
    language = [name for name in linear if part_of(name) == LANGUAGE_MODEL and "lm_head" not in name]
    assert find_targets(make_options(layout, **LORA | {"target_modules": "all-linear"})) == language
    assert len(language) >= 14


def test_a_regular_expression_must_match_a_full_name_and_looks_everywhere(make_options):
    expression = r".*vision_tower.*layers\.0\..*\.q_proj"
    (target,) = find_targets(make_options("llava15", **LORA | {"target_modules": expression}))
    assert part_of(target) == VISION_TOWER
    with pytest.raises(UserError, match="matches no module"):
        find_targets(make_options("llava15", **LORA | {"target_modules": r"layers\.0\..*q_proj"}))


def test_names_may_come_as_one_string_with_commas(make_options):
    listed = find_targets(make_options("llava15", **LORA))
    assert find_targets(make_options("llava15", **LORA | {"target_modules": "q_proj, v_proj"})) == listed


@pytest.mark.parametrize("layout", LAYOUTS)
def test_missing_targets_are_answered_with_what_there_is(layout, make_options):
    options = make_options(layout, peft_method="lora")
    with pytest.raises(UserError) as caught:
        tuning.train(options)
    lines = str(caught.value).splitlines()
    assert [line.split(":")[0].strip() for line in lines[1:-1]] == list(PARTS)
    assert "q_proj ×" in lines[1]
    assert "q_proj ×" in lines[-2]
    suggested = json.loads("{" + lines[-1].partition(": ")[2] + "}")
    assert "q_proj" in suggested["target_modules"]
    assert find_targets({**options, **suggested}) == find_targets({**options, "target_modules": "all-linear"})


def test_a_target_that_matches_nothing_is_an_error(make_options):
    with pytest.raises(UserError, match="query_key_value matches no module"):
        find_targets(make_options("llava15", **LORA | {"target_modules": ["q_proj", "query_key_value"]}))


def test_a_target_that_is_elsewhere_is_an_error_that_says_where(make_options):
    with pytest.raises(UserError, match="only in the vision_tower: set freeze_vision_tower false"):
        find_targets(make_options("llava15", **LORA | {"target_modules": ["fc1"]}))


def test_an_unknown_module_to_save_is_an_error(make_options):
    with pytest.raises(UserError, match=r"modules_to_save: projector matches no module; .*multi_modal_projector"):
        find_targets(make_options("llava15", **LORA, modules_to_save=["projector"]))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_saved_adapter_lists_full_names(layout, make_options, trainers):
    options = make_options(layout, **LORA | {"target_modules": "all-linear"}, max_steps=1)
    folder = tuning.train(options).model_dir
    saved = json.loads((folder / "adapter_config.json").read_text())
    assert sorted(saved["target_modules"]) == sorted(find_targets(options))
    assert saved["base_model_name_or_path"] == options["model_name_or_path"]
    before = dict(build_model(layout).named_parameters())
    for name, parameter in trainers[0].model.named_parameters():
        if "lora_B" in name:  # begins at zero
            assert parameter.any()
        elif "lora_" not in name:
            published = name.removeprefix("base_model.model.").replace(".base_layer", "")
            assert torch.equal(parameter, before[published]), name


@pytest.mark.parametrize("layout", LAYOUTS)
def test_only_adapters_get_a_gradient(layout, make_options):
    config = build_config(make_options(layout, **LORA))
    model = make_model(config)
    ids = torch.arange(5, 25)[None]
    model(input_ids=ids, attention_mask=torch.ones_like(ids), labels=ids).loss.backward()
    with_gradient = {name for name, parameter in model.named_parameters() if parameter.grad is not None}
    adapters = {name for name, _ in model.named_parameters() if "lora_" in name}
    assert all(part_of(name) == LANGUAGE_MODEL for name in adapters)
    crossing = {name for name in adapters if ".cross_attn." in name}  # a row without an image skips these
    assert with_gradient == adapters - crossing


def test_modules_to_save_are_trained_and_saved_in_full(make_options):
    options = make_options("llava15", **LORA, modules_to_save=["multi_modal_projector"], max_steps=2)
    folder = tuning.train(options).model_dir
    saved = load_file(folder / "adapter_model.safetensors")
    (name,) = (name for name in saved if name.endswith("multi_modal_projector.linear_1.weight"))
    before = dict(build_model("llava15").named_parameters())["model.multi_modal_projector.linear_1.weight"]
    assert saved[name].shape == before.shape
    assert not torch.equal(saved[name], before)


def find_idle(layout: str) -> set[str]:
    """Names of parameters that a real backward through a real image leaves without a gradient."""
    model, processor = build_model(layout), build_processor(layout)
    token = processor.tokenizer.convert_ids_to_tokens(model.config.image_token_index)
    inputs = processor(text=f"{token} What is it?", images=[Image.new("RGB", (50, 40))], return_tensors="pt")
    model(**inputs).logits.sum().backward()
    return {name for name, parameter in model.named_parameters() if parameter.grad is None}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layers_of_the_tower_that_no_gradient_reaches_are_frozen(layout, make_options):
    model = make_model(build_config(make_options(layout)))
    frozen = {name for name, parameter in model.named_parameters() if not parameter.requires_grad}
    assert frozen == find_idle(layout)
    assert bool(frozen) == (layout != "mllama")


@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_frozen_parts_get_no_gradient_and_all_others_move(layout, part, make_options, trainers):
    tuning.train(make_options(layout, **{f"freeze_{part}": True}, max_steps=1, save_strategy="no"))
    before, idle = dict(build_model(layout).named_parameters()), find_idle(layout)
    moved = dict.fromkeys(PARTS, 0)
    for name, parameter in trainers[0].model.named_parameters():
        assert parameter.requires_grad == (part_of(name) != part and name not in idle), name
        if part_of(name) == part:
            assert torch.equal(parameter, before[name]), name
        moved[part_of(name)] += not torch.equal(parameter, before[name])
    assert {name for name, count in moved.items() if not count} == {part}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_parameter_table_counts_every_parameter_once(layout):
    model = build_model(layout)
    parts = find_parts(model)
    freeze_parts(model, parts, {VISION_TOWER})
    lines = [line.replace(",", "").split() for line in parameter_table(model, parts).splitlines()[1:]]
    found = {name: (int(total), int(trainable)) for name, total, trainable, _ in lines}
    expected = dict.fromkeys(PARTS, 0)
    for name, parameter in model.named_parameters():
        expected[part_of(name)] += parameter.numel()
    everything = sum(parameter.numel() for parameter in model.parameters())
    assert found.pop("all") == (everything, everything - expected[VISION_TOWER])
    assert found == {part: (n, 0 if part == VISION_TOWER else n) for part, n in expected.items()}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_parts_train_at_their_own_learning_rates(layout, make_options, trainers):
    rates = {"vision_tower_learning_rate": 1e-5, "projector_learning_rate": 3e-4, "learning_rate": 1e-3}
    options = make_options(layout, **rates, lr_scheduler_type="constant", weight_decay=0.1, max_steps=1)
    tuning.train({**options, "save_strategy": "no"})
    groups = trainers[0].optimizer.param_groups
    rate_of = {parameter: group["lr"] for group in groups for parameter in group["params"]}
    expected = {VISION_TOWER: 1e-5, PROJECTOR: 3e-4, LANGUAGE_MODEL: 1e-3}
    named = {name: p for name, p in trainers[0].model.named_parameters() if name not in find_idle(layout)}
    assert len(rate_of) == sum(len(group["params"]) for group in groups) == len(named)
    assert {name: rate_of[p] for name, p in named.items()} == {name: expected[part_of(name)] for name in named}
    assert {group["weight_decay"] for group in groups} == {0.0, 0.1}
    decay_of = {parameter: group["weight_decay"] for group in groups for parameter in group["params"]}
    assert all(decay_of[p] == 0 for name, p in named.items() if name.endswith(("norm.weight", ".bias")))


def test_learning_rates_of_parts_survive_a_resume(make_options, trainers, tmp_path):
    rates = {"vision_tower_learning_rate": 1e-5, "projector_learning_rate": 3e-4}
    options = make_options("llava15", **rates, max_steps=4, save_steps=2)
    whole = tuning.train(options).model_dir
    shutil.copytree(whole / "checkpoint-2", tmp_path / "cut" / "checkpoint-2")
    cut = tuning.train({**options, "output_dir": str(tmp_path / "cut")}).model_dir
    expected, found = load_file(whole / "model.safetensors"), load_file(cut / "model.safetensors")
    assert all(torch.equal(expected[name], found[name]) for name in expected)


def test_processor_settings_reach_processor_and_model_and_are_saved(make_options):
    pinpoints = [[32, 64], [96, 32]]
    options = make_options("llava_next_vicuna", processor_kwargs={"image_grid_pinpoints": pinpoints}, max_steps=1)
    assert AutoConfig.from_pretrained(options["model_name_or_path"]).image_grid_pinpoints != pinpoints
    folder = tuning.train(options).model_dir
    assert AutoConfig.from_pretrained(folder).image_grid_pinpoints == pinpoints
    assert AutoProcessor.from_pretrained(folder).image_processor.image_grid_pinpoints == pinpoints


def test_an_unknown_processor_setting_is_an_error_that_lists_the_known_ones(make_options):
    with pytest.raises(UserError, match=r"processor_kwargs: unknown settings grid .*image_grid_pinpoints"):
        tuning.train(make_options("llava_next_vicuna", processor_kwargs={"grid": [[32, 64]]}))


def test_an_adapter_is_no_model(make_options, tmp_path):
    adapter = tuning.train(make_options("llava15", **LORA, max_steps=1)).model_dir
    options = make_options("llava15", output_dir=str(tmp_path / "second"))
    with pytest.raises(UserError, match="this is a LoRA adapter, not a model"):
        tuning.train({**options, "model_name_or_path": str(adapter)})


@pytest.fixture
def copy_of_model(models, tmp_path):
    """A copy of the llava15 model whose weights can be changed: `copy_of_model(change)` returns its folder."""

    def make(change) -> str:
        folder = tmp_path / "changed"
        shutil.copytree(models["llava15"], folder)
        weights = load_file(folder / "model.safetensors")
        change(weights)
        save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
        return str(folder)

    return make


def one_name(weights: dict, end: str) -> str:
    (name,) = (name for name in weights if name.endswith(end) and part_of("." + name) == LANGUAGE_MODEL)
    return name


@pytest.mark.parametrize("method", [{}, LORA], ids=["full", "lora"])
def test_a_checkpoint_that_lacks_a_weight_is_refused(method, make_options, copy_of_model):
    folder = copy_of_model(lambda weights: weights.pop(one_name(weights, "layers.1.self_attn.k_proj.weight")))
    with pytest.raises(UserError, match=r"lacks 1 of the model's weights: .*layers\.1\.self_attn\.k_proj\.weight"):
        tuning.train({**make_options("llava15"), "model_name_or_path": folder, **method})


def test_a_weight_of_another_shape_is_refused(make_options, copy_of_model):
    def cut(weights):
        name = one_name(weights, "layers.1.self_attn.k_proj.weight")
        weights[name] = weights[name][:-1].clone()

    with pytest.raises(UserError, match=r"does not fit .*k_proj\.weight"):
        tuning.train({**make_options("llava15"), "model_name_or_path": copy_of_model(cut)})


@pytest.mark.parametrize("method", [{}, LORA], ids=["full", "lora"])
def test_a_loss_that_is_no_number_ends_the_run_and_names_the_rows(method, make_options, copy_of_model, tmp_path, capfd):
    def spoil(weights):
        weights[one_name(weights, "layers.1.self_attn.k_proj.weight")][0, 0] = float("nan")

    options = {**make_options("llava15"), "model_name_or_path": copy_of_model(spoil), **method}
    (tmp_path / "config.json").write_text(json.dumps(options))
    assert sft_trainer.main([str(tmp_path / "config.json")]) == 1
    error = next(line for line in capfd.readouterr().err.splitlines() if "Error:" in line)
    assert error.count("rows.jsonl, row ") == 4
    assert "the loss became nan at step 1" in error
    left = {file.name for file in Path(options["output_dir"]).iterdir()}
    logs = {"training_logs.jsonl", "sample_predictions.jsonl", "run_progress.json", "report.html"}
    assert left <= {"resolved_config.json", "run_facts.json", *logs}


def test_the_base_model_itself_is_left_alone(make_options, models):
    before = (models["llava15"] / "model.safetensors").read_bytes()
    tuning.train(make_options("llava15", max_steps=1))
    assert (models["llava15"] / "model.safetensors").read_bytes() == before
    AutoModelForImageTextToText.from_pretrained(models["llava15"])
