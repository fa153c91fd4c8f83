"""The parts of every architecture: what counts as tower, as projector and as language model."""

import pytest
from architectures.checkpoints import ARCHS, build
from peft import LoraConfig, get_peft_model
from torch import nn

from tuning.model.load import build_skeleton
from tuning.model.mllama import patch_mllama_cross_attention
from tuning.model.parts import (
    LANGUAGE_MODEL,
    PROJECTOR,
    VISION_TOWER,
    find_inner_projectors,
    find_parts,
    freeze_parts,
)


def modules_of(model, parts, part):
    """The outermost modules (or bare parameters) all of whose parameters belong to a part."""
    of = {name: parts.of(name) for name, _ in model.named_parameters()}
    found = []
    for name in sorted({".".join(name.split(".")[:depth]) for name in of for depth in range(1, 9)}):
        inside = {kind for full, kind in of.items() if full == name or full.startswith(f"{name}.")}
        if inside == {part} and not any(name.startswith(f"{outer}.") for outer in found):
            found.append(name)
    return [name.removeprefix("model.") for name in found]


QWEN_3_VL = ["visual.deepstack_merger_list", "visual.merger"]
GLM = ["visual.downsample", "visual.merger"]
PROJECTORS = {
    "qwen2_vl": ["visual.merger"],
    "qwen2_5_vl": ["visual.merger"],
    "qwen3_vl": QWEN_3_VL,
    "qwen3_vl_moe": QWEN_3_VL,
    "qwen3_5": ["visual.merger"],
    "qwen2_5_omni_thinker": ["visual.merger"],
    "qwen3_omni_moe_thinker": ["visual.merger", "visual.merger_list"],
    "glm4v": GLM,
    "glm4v_moe": GLM,
    "glm46v": GLM,
    "glm_ocr": GLM,
    "hunyuan_vl": ["vision_tower.patch_merger"],
    "hy_v4_vl": ["vision_tower.patch_merger"],
    "exaone4_5": ["visual.merger"],
    "cohere_compass": QWEN_3_VL,
    "inkling2": ["vision_tower.merger"],
    "granite_docling": ["vision_model.connector"],
    "deepseek_vl_hybrid": ["aligner", "high_res_vision_alpha", "high_res_vision_neck", "high_res_vision_proj"],
    "deepseek_ocr2": ["multi_modal_projector", "view_separator"],
    "minicpmv4_6": ["merger"],  # `vit_merger` runs between the layers of the tower
    "internvl": ["multi_modal_projector"],
    "paddleocr_vl": ["projector"],
    "kimi_k25": ["mm_projector"],
    "lfm3_vl": ["multi_modal_projector"],
    "ernie4_5_vl_moe": ["resampler_model"],
    "idefics2": ["connector"],
    "llama4": ["multi_modal_projector"],
    "nemotron_h_omni": ["multi_modal_projector"],
    "llava": ["multi_modal_projector"],
    "llava_next": ["image_newline", "multi_modal_projector"],
    "mllama": ["multi_modal_projector"],
    "idefics3": ["connector"],
}
TOWERS = {
    "deepseek_vl_hybrid": ["high_res_vision_model", "vision_model"],
    "deepseek_ocr2": ["vision_tower"],  # SAM and the other encoder are inside
    "video_llava": ["image_tower", "video_tower"],
    "qwen2_5_omni_thinker": ["audio_tower", "visual.blocks", "visual.patch_embed"],
    "gemma3n": ["audio_tower", "vision_tower"],
    "qwen2_5_vl": ["visual.blocks", "visual.patch_embed"],
    "qwen3_vl": ["visual.blocks", "visual.patch_embed", "visual.pos_embed"],
    "minicpmv4_6": ["vision_tower"],
    "llava": ["vision_tower"],
    "llava_next": ["vision_tower"],
    "llava_next_video": ["vision_tower"],
    "mllama": ["vision_model"],
    "idefics3": ["vision_model"],
}


@pytest.mark.parametrize("name", PROJECTORS)
def test_the_projector_is_what_maps_features_to_the_language_model(name):
    model = build_skeleton(build(name).config)
    assert modules_of(model, find_parts(model), PROJECTOR) == PROJECTORS[name]


@pytest.mark.parametrize("name", TOWERS)
def test_every_encoder_is_a_tower(name):
    model = build_skeleton(build(name).config)
    assert modules_of(model, find_parts(model), VISION_TOWER) == TOWERS[name]


@pytest.mark.parametrize("name", PROJECTORS)
def test_the_projector_trains_with_a_frozen_tower(name):
    model = build_skeleton(build(name).config)
    parts = find_parts(model)
    freeze_parts(model, parts, {VISION_TOWER, LANGUAGE_MODEL})
    training = {parameter_name for parameter_name, parameter in model.named_parameters() if parameter.requires_grad}
    assert training == {parameter for parameter, _ in model.named_parameters() if parts.of(parameter) == PROJECTOR}
    assert training


# Early fusion, discrete image tokens, or a tower whose every layer merges patches: there is no module between.
WITHOUT_PROJECTOR = {"apertus1p5", "chameleon", "emu3", "idefics", "inkling_mm_model"}


@pytest.mark.parametrize("name", ARCHS)
def test_every_architecture_has_a_projector_and_a_language_model(name):
    model = build_skeleton(build(name).config)
    parts = find_parts(model)
    kinds = {parts.of(parameter_name) for parameter_name, _ in model.named_parameters()}
    assert LANGUAGE_MODEL in kinds
    assert (PROJECTOR in kinds) == (name not in WITHOUT_PROJECTOR)
    assert all(parts.of(name) != LANGUAGE_MODEL for name in (*parts.vision_tower, *parts.projector))


def test_adapters_belong_to_the_part_of_their_module():
    model = build_skeleton(build("qwen3_vl").config)
    adapted = get_peft_model(model, LoraConfig(target_modules=r".*(merger\.linear_fc1|blocks\.0\.attn\.qkv|q_proj)"))
    parts = find_parts(adapted)
    start = "base_model.model.model."
    assert parts.of(f"{start}visual.merger.linear_fc1.lora_A.default.weight") == PROJECTOR
    assert parts.of(f"{start}visual.blocks.0.attn.qkv.lora_A.default.weight") == VISION_TOWER
    assert parts.of(f"{start}language_model.layers.0.self_attn.q_proj.lora_A.default.weight") == LANGUAGE_MODEL


class Block(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)


class Tower(nn.Module):
    """A tower whose last module has a name that says nothing."""

    def __init__(self, width, out):
        super().__init__()
        self.embed = nn.Conv2d(3, width, 4)
        self.layers = nn.ModuleList([Block(width), Block(width)])
        self.norm = nn.LayerNorm(width)
        self.pooling = nn.Sequential(nn.Linear(width, out), nn.GELU(), nn.Linear(out, width))
        self.to_text = nn.Sequential(
            nn.LayerNorm(width), nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, out)
        )


def test_an_unnamed_projector_is_told_by_its_width():
    assert find_inner_projectors(Tower(8, 20), 20) == ["to_text"]
    assert find_inner_projectors(Tower(8, 8), 8) == []  # every module has this width
    assert find_inner_projectors(nn.Sequential(nn.Linear(4, 4)), 4) == []  # no layers


@pytest.mark.parametrize("name", ["aria", "idefics", "mllama"])
def test_mllamas_care_for_rows_is_for_mllama_only(name):
    model = build_skeleton(build(name).config)
    before = {module_name for module_name, module in model.named_modules() if module._forward_pre_hooks}
    patch_mllama_cross_attention(model)
    after = {module_name for module_name, module in model.named_modules() if module._forward_pre_hooks}
    assert any("cross_attn" in module_name for module_name, _ in model.named_modules())
    assert (after != before) == (name == "mllama")
