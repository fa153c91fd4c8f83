"""How processor, attention and device are chosen, and what is printed about it."""

from types import SimpleNamespace

import pytest
import torch
from tiny_models import LAYOUTS, build_model, build_processor, save_layout
from transformers import LlavaForConditionalGeneration

from tuning.config.options import ModelArguments
from tuning.config.parse import build_config, resolve
from tuning.distributed.fsdp import choose_wrap_classes
from tuning.errors import UserError
from tuning.model import attention, load
from tuning.model.build import wanted_wrap_classes
from tuning.model.parts import LANGUAGE_MODEL, PARTS, PROJECTOR, VISION_TOWER, find_parts
from tuning.training.trainer import make_arguments

WRAPPED = {
    "granite_vision": ["SiglipEncoderLayer", "GraniteDecoderLayer"],
    "llava15": ["CLIPEncoderLayer", "LlamaDecoderLayer"],
    "llava_next_vicuna": ["CLIPEncoderLayer", "LlamaDecoderLayer"],
    "llava16_mistral": ["CLIPEncoderLayer", "MistralDecoderLayer"],
    "mllama": ["MllamaVisionEncoderLayer", "MllamaSelfAttentionDecoderLayer", "MllamaCrossAttentionDecoderLayer"],
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_layers_to_wrap_are_those_of_the_model_or_those_that_are_named(layout):
    model = build_model(layout)
    assert choose_wrap_classes(model) == WRAPPED[layout]
    assert choose_wrap_classes(model, WRAPPED[layout][1:]) == WRAPPED[layout][1:]
    with pytest.raises(UserError, match=f"contains no MambaLayer.*choose from {', '.join(WRAPPED[layout])}"):
        choose_wrap_classes(model, [WRAPPED[layout][1], "MambaLayer"])


def test_layers_may_be_named_to_the_launcher_or_to_the_trainer(monkeypatch):
    config = SimpleNamespace(training=SimpleNamespace(fsdp_config={"transformer_layer_cls_to_wrap": ["A"]}))
    assert wanted_wrap_classes(config) == ["A"]
    monkeypatch.setenv("FSDP_TRANSFORMER_CLS_TO_WRAP", "B, C")
    assert wanted_wrap_classes(config) == ["A"]
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    assert wanted_wrap_classes(config) == ["B", "C"]


@pytest.fixture(scope="module")
def llava(tmp_path_factory):
    return save_layout("llava15", tmp_path_factory.mktemp("models") / "llava15")


def test_a_processor_without_patch_size_is_completed_from_the_model(llava, tmp_path):
    processor = build_processor("llava15")
    processor.patch_size = processor.vision_feature_select_strategy = None
    build_model("llava15").save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    arguments = ModelArguments(str(tmp_path))
    completed = load.load_processor(arguments, load.load_config(arguments))
    assert (completed.patch_size, completed.vision_feature_select_strategy) == (8, "default")


def test_a_chat_template_is_read_from_a_file_or_from_its_text(llava, tmp_path):
    (tmp_path / "own.jinja").write_text("{{ 'from a file' }}")
    for given, expected in ((str(tmp_path / "own.jinja"), "{{ 'from a file' }}"), ("{{ 'text' }}", "{{ 'text' }}")):
        arguments = ModelArguments(str(llava), chat_template=given)
        assert load.load_processor(arguments, load.load_config(arguments)).chat_template == expected


def test_mllama_keeps_the_number_of_tiles_it_has_learned(tmp_path):
    folder = save_layout("mllama", tmp_path)
    arguments = ModelArguments(str(folder), processor_kwargs={"max_image_tiles": 2})
    with pytest.raises(UserError, match="max_image_tiles must stay 4"):
        load.load_processor(arguments, load.load_config(arguments))


def test_a_text_model_is_refused(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(UserError, match="llama model, which does not take images"):
        load.load_config(ModelArguments(str(tmp_path)))


CHOICES = {
    "asked not to": ({"use_flash_attn": False}, "sdpa", "packed", "use_flash_attn is false"),
    "no GPU": ({"device_type": "cpu"}, "sdpa", "packed", "needs a CUDA GPU"),
    "wrong precision": ({"dtype": torch.float32}, "sdpa", "packed", "bfloat16 or float16"),
    "all there": ({}, "sdpa", "packed_flash", "torch.nn.attention.varlen"),
    "named": ({"attn_implementation": "flash_attention_2"}, *["flash_attention_2"] * 2, "from attn_implementation"),
    "named, padded": ({"attn_implementation": "eager"}, "eager", None, "from attn_implementation"),
}


@pytest.mark.parametrize("case", CHOICES)
def test_attention_is_chosen_and_explained(case):
    changes, loaded, packed, words = CHOICES[case]
    situation = {"use_flash_attn": True, "attn_implementation": None, "dtype": torch.bfloat16, "device_type": "cuda"}
    chosen = attention.choose_attention(LlavaForConditionalGeneration, **(situation | changes))
    assert (chosen.loaded, chosen.packed) == (loaded, packed)
    assert words in chosen.reason


def test_without_a_launcher_one_of_several_gpus_is_used_and_said(tmp_path):
    (tmp_path / "rows.json").write_text("[]")
    options = {"model_name_or_path": "some/model", "training_data_path": str(tmp_path / "rows.json")}
    given = build_config({**options, "output_dir": str(tmp_path / "out")})
    given.training._n_gpu = 4
    config = resolve(given)
    assert (config.training.n_gpu, given.training.n_gpu) == (1, 4)
    assert config.training.train_batch_size == given.training.per_device_train_batch_size
    assert "--num_processes=4" in config.notes[-1]


def test_under_fsdp_gradients_are_sharded_after_every_micro_batch(monkeypatch, tmp_path):
    (tmp_path / "rows.json").write_text("[]")
    options = {"model_name_or_path": "some/model", "training_data_path": str(tmp_path / "rows.json")}
    config = build_config({**options, "output_dir": str(tmp_path / "out"), "gradient_accumulation_steps": 4})
    assert not make_arguments(config, idle_is_known=True).accelerator_config.gradient_accumulation_kwargs
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    kept = make_arguments(config, idle_is_known=True).accelerator_config.gradient_accumulation_kwargs
    assert kept == {"sync_each_batch": True}
    assert not config.training.accelerator_config.gradient_accumulation_kwargs


def test_ddp_looks_for_parameters_without_gradient_where_they_are_unknown(tmp_path, capsys):
    (tmp_path / "rows.json").write_text("[]")
    options = {"model_name_or_path": "some/model", "training_data_path": str(tmp_path / "rows.json")}
    config = build_config({**options, "output_dir": str(tmp_path / "out")})
    assert make_arguments(config, idle_is_known=True).ddp_find_unused_parameters is False
    assert make_arguments(config, idle_is_known=False).ddp_find_unused_parameters is True
    assert "ddp_find_unused_parameters is true" in capsys.readouterr().out
    assert config.training.ddp_find_unused_parameters is False


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_parameter_belongs_to_the_part_it_is_in(layout):
    model = build_model(layout)
    parts = find_parts(model)
    of = {name: parts.of(name) for name, _ in model.named_parameters()}
    assert set(of.values()) == set(PARTS)
    assert (
        of["lm_head.weight" if "lm_head.weight" in of else "model.language_model.embed_tokens.weight"] == LANGUAGE_MODEL
    )
    for name, part in of.items():
        if ".vision_tower." in name or ".vision_model." in name:
            assert part == VISION_TOWER
        if "multi_modal_projector" in name or "image_newline" in name:
            assert part == PROJECTOR
    skeleton = load.build_skeleton(model.config)
    assert find_parts(skeleton) == parts
    assert all(parameter.device.type == "meta" for parameter in skeleton.parameters())
