"""A run looks at its first steps: what should train has a gradient and moves, what is frozen stays as it is."""

import json
from contextlib import nullcontext

import pytest
import torch
from tiny_models import LAYOUTS, build_model, save_layout

from tuning import sft_trainer, train
from tuning.errors import UserError
from tuning.training.trainer import SupervisedTrainer

LORA = {"peft_method": "lora", "target_modules": "all-linear"}
SHORT = {"max_steps": 4, "save_strategy": "no"}
STEADY = {"lr_scheduler_type": "constant", "max_steps": 2, "save_steps": 1}


@pytest.fixture
def said(make_options, capsys):
    """What the self-check of a short run says, a line each."""

    def run(layout, **changes):
        train(make_options(layout, **SHORT, **changes))
        return [line for line in capsys.readouterr().out.splitlines() if line.startswith("Self-check")]

    return run


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_passes(said, layout):
    assert said(layout) == [
        "Self-check: training moves the vision tower and the projector and the language model.",
    ]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_lora_moves_its_part_only(said, layout, tmp_path):
    line = "Self-check: training moves the language model, and nothing moves the vision tower and the projector."
    assert said(layout, **LORA) == [line]


def test_every_part_can_be_adapted_or_trained_whole_beside_adapters(said):
    both = {"modules_to_save": ["multi_modal_projector"], "freeze_vision_tower": False}
    line = "Self-check: training moves the vision tower and the projector and the language model."
    assert said("llava15", **LORA, **both) == [line]


def test_weights_in_16_bits_move_by_their_copies(said):
    line = "Self-check: training moves the vision tower and the projector and the language model."
    assert said("llava15", dtype="bfloat16", learning_rate=1e-11) == [line]
    plain = said("llava15", dtype="bfloat16", learning_rate=1e-30, keep_master_weights=False, overwrite_output_dir=True)
    assert "Self-check: the language model has a gradient, but step 1 was too small to change its weights." in plain


def test_it_waits_for_images_and_for_the_end_of_a_warmup(said, rows, tmp_path, trainers):
    lines = [json.loads(line) for line in rows.read_text().splitlines()]
    text_only = [{"messages": [{"role": "user", "content": "Why?"}, lines[0]["messages"][1]], "images": []}] * 8
    path = rows.with_name("late_images.jsonl")
    path.write_text("".join(json.dumps(line) + "\n" for line in [*text_only, *lines]))
    settings = {"training_data_path": str(path), "train_sampling_strategy": "sequential", "warmup_steps": 2}
    everything = "Self-check: training moves the vision tower and the projector and the language model."
    assert said("llava15", **settings) == [everything]
    assert said("llava15", **settings, vision_tower_learning_rate=0, overwrite_output_dir=True) == [
        "Self-check: the vision tower does not change: its learning rate is 0.",
        "Self-check: training moves the projector and the language model.",
    ]


def test_without_any_image_it_says_what_it_cannot_know(said, rows):
    line = {"messages": [{"role": "user", "content": "Why?"}, {"role": "assistant", "content": "No."}], "images": []}
    path = rows.with_name("no_images.jsonl")
    path.write_text(f"{json.dumps(line)}\n" * 8)
    assert said("llava15", training_data_path=str(path)) == [
        "Self-check: nothing is known of the vision tower and the projector: no step had both an image and a learning"
        " rate for it.",
    ]


def test_a_step_too_small_for_float32_is_reported(said):
    alone = {"freeze_vision_tower": True, "freeze_multi_modal_projector": True}
    assert said("llava15", **alone, optim="sgd", learning_rate=1e-20) == [
        "Self-check: the language model has a gradient, but step 1 was too small to change its weights.",
    ]


def test_a_run_that_goes_on_looks_again(make_options, monkeypatch, capsys):
    """Its master weights differ from the 16-bit ones from the start, which is no movement."""
    options = make_options("llava15", dtype="bfloat16", learning_rate=1e-5, **STEADY)
    train(options)
    assert capsys.readouterr().out.count("Self-check: training moves") == 1
    with monkeypatch.context() as patch:
        with_optimizer(patch, lambda trainer, optimizer: setattr(optimizer, "step", lambda *_: None))
        with pytest.raises(UserError, match="the vision tower has a gradient, but did not change in step 3"):
            train(options | {"max_steps": 3})
    train(options | {"max_steps": 3})
    assert capsys.readouterr().out.count("Self-check: training moves") == 1


def with_optimizer(monkeypatch, change):
    create = SupervisedTrainer.create_optimizer

    def changed(trainer, model=None):
        optimizer = create(trainer, model)
        change(trainer, optimizer)
        return optimizer

    monkeypatch.setattr(SupervisedTrainer, "create_optimizer", changed)


def test_a_part_that_the_optimizer_forgets_stops_the_run(make_options, monkeypatch, tmp_path):
    def forget(trainer, optimizer):
        forgotten = {id(p) for name, p in trainer.model.named_parameters() if "projector" in name}
        for group in optimizer.param_groups:
            group["params"] = [p for p in group["params"] if id(p) not in forgotten]

    with_optimizer(monkeypatch, forget)
    first = r"\(first: model.multi_modal_projector.linear_1.weight\)"
    with pytest.raises(UserError, match=f"the projector has a gradient, but did not change in step 1 {first}"):
        train(make_options("llava15", **SHORT))
    assert not (tmp_path / "out" / "model.safetensors").exists()


def test_a_part_that_is_cut_off_from_the_loss_stops_the_run(make_options, monkeypatch):
    build_model = sft_trainer.build_model

    def cut(*arguments):
        built = build_model(*arguments)
        projector = built.model.model.multi_modal_projector
        projector.register_forward_hook(lambda module, inputs, output: output.detach())
        return built

    monkeypatch.setattr(sft_trainer, "build_model", cut)
    with pytest.raises(UserError, match="the vision tower should train, but got no gradient in step"):
        train(make_options("llava15", **SHORT))


def test_a_frozen_part_that_moves_stops_the_run(make_options, monkeypatch):
    def meddle(trainer, optimizer):
        frozen = next(p for name, p in trainer.model.named_parameters() if "vision_tower" in name)

        def touch(*_):
            frozen.data.view(-1)[0] += 1

        optimizer.register_step_post_hook(touch)

    with_optimizer(monkeypatch, meddle)
    with pytest.raises(
        UserError, match=r"the vision tower is frozen, but changed in step 1 \(first: .*class_embedding"
    ):
        train(make_options("llava15", **SHORT, freeze_vision_tower=True))


@pytest.mark.parametrize("persistent", [True, False])
def test_a_buffer_of_a_frozen_part_that_moves_stops_the_run(persistent, make_options, monkeypatch):
    """Unless checkpoints lack the buffer, as they lack the frequencies of a rope."""
    build_model = sft_trainer.build_model

    def count(*arguments):
        built = build_model(*arguments)
        tower = built.model.model.vision_tower
        tower.register_buffer("calls", torch.zeros(1), persistent=persistent)
        tower.register_forward_hook(lambda module, inputs, output: tower.calls.add_(1) and None)
        return built

    monkeypatch.setattr(sft_trainer, "build_model", count)
    options = make_options("llava15", **SHORT, freeze_vision_tower=True, verify_save=False)
    changed = pytest.raises(
        UserError, match=r"the vision tower is frozen, but changed in step 1 \(first: .*tower.calls"
    )
    with changed if persistent else nullcontext():
        train(options)


def test_gates_that_begin_at_zero_are_reported(said, tmp_path):
    folder = save_layout("mllama", tmp_path / "closed")
    model = build_model("mllama")
    for name, parameter in model.named_parameters():
        if name.endswith(("cross_attn_attn_gate", "cross_attn_mlp_gate")):
            torch.nn.init.zeros_(parameter)
    model.save_pretrained(folder)
    lines = said("mllama", model_name_or_path=str(folder))
    assert "the vision tower gets no gradient yet, because" in lines[0]
    assert "cross_attn" in lines[0]
    assert lines[-1] == "Self-check: training moves the language model."
    reach = {"freeze_vision_tower": False, "overwrite_output_dir": True}
    lines = said("mllama", model_name_or_path=str(folder), **LORA, **reach)
    assert lines[0].startswith("Self-check: Warning: the vision tower gets no gradient and never will, because")


def test_a_step_of_rows_left_out_says_nothing(said, rows):
    lines = [json.loads(line) for line in rows.read_text().splitlines()]
    long = json.loads(json.dumps(lines[0]))
    long["messages"][1]["content"] = "It is red. " * 400
    path = rows.with_name("long_first.jsonl")
    path.write_text("".join(json.dumps(line) + "\n" for line in [*[long] * 4, *lines]))
    settings = {"max_seq_length": 200, "overlong_rows": "drop", "train_sampling_strategy": "sequential"}
    everything = "Self-check: training moves the vision tower and the projector and the language model."
    assert said("llava15", training_data_path=str(path), **settings) == [everything]


def test_images_that_come_after_all_answers_are_waited_for(said, rows):
    lines = [json.loads(line) for line in rows.read_text().splitlines()]
    late = {
        "messages": [
            {"role": "user", "content": "Why?"},
            {"role": "assistant", "content": "It is so."},
            {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "And this?"}]},
        ],
        "images": ["0.png"],
    }
    path = rows.with_name("late_pictures.jsonl")
    path.write_text("".join(json.dumps(line) + "\n" for line in [*[late] * 8, *lines]))
    settings = {"training_data_path": str(path), "train_sampling_strategy": "sequential"}
    everything = "Self-check: training moves the vision tower and the projector and the language model."
    assert said("llava15", **settings) == [everything]
