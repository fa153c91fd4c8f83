"""Whether an engine loads an adapter itself, under which names, and with which options.

What vLLM takes is what version 0.32.0 was seen to do with the models of `VLLM_RUN` (tests/serving/test_vllm.py), and
for the others what its source says: lora/peft_helper.py (`PEFTHelper.validate_legal`), lora/utils.py
(`parse_fine_tuned_lora_name`), config/lora.py, and `supports_tower_connector_lora` in model_executor/models.
"""

import shutil
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from peft import LoraConfig, PeftModel, get_peft_model_state_dict
from peft.tuners.lora import LoraLayer
from safetensors.torch import save_file
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.utils import ADAPTER_SAFE_WEIGHTS_NAME

from tuning.export.checkpoint_keys import WeightTarget
from tuning.export.merge import AdaptedSkeleton, changes_base
from tuning.model.engine_names import name_for_engines
from tuning.model.load import build_skeleton, silent_transformers
from tuning.model.lora import ADAPTER_NAME
from tuning.model.parts import LANGUAGE_MODEL, find_parts
from tuning.model.saved_weights import open_weights

PEFT_PREFIX = "base_model.model."
VLLM = "0.32.0"
VLLM_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
VLLM_DEFAULT_RANK = 16
VLLM_RUN = {
    "Gemma3ForConditionalGeneration",
    "LlavaForConditionalGeneration",
    "LlavaNextForConditionalGeneration",
    "Qwen2_5_VLForConditionalGeneration",
    "SmolVLMForConditionalGeneration",
}
"""Models that vLLM was run with. It finds adapters under the names that training gives them."""
VLLM_NO_TOWER = {
    "LlavaForConditionalGeneration": "With --enable-tower-connector-lora vLLM fails at every picture of this model.",
    "Granite4VisionForConditionalGeneration": "vLLM adapts the language model of this model only.",
    "Mistral3ForConditionalGeneration": "vLLM adapts the language model of this model only.",
}
"""Models whose tower and projector vLLM does not adapt, and why."""
VLLM_NOTES = {
    "Gemma3ForConditionalGeneration": (
        "On a CPU, vLLM lets the tokens of a picture see only those before them. Training lets them see each other."
    )
}
VLLM_REMOVED = {"MllamaForConditionalGeneration": "0.10.2"}
"""Models that vLLM no longer has, and the last version that had them."""


@dataclass
class Serving:
    """How an engine takes an adapter.

    `obstacles`: what it would refuse or leave out. `options`: what to start it with. `notes`: what to tell the user.
    `names`: module of the model → the name that it must have in the adapter. `renamed`: those of them that the adapter
    does not have.
    """

    obstacles: list[str] = field(default_factory=list)
    options: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    names: dict[str, str] = field(default_factory=dict)
    renamed: dict[str, str] = field(default_factory=dict)


def plan_vllm(adapted: AdaptedSkeleton, keys: Iterable[str]) -> Serving:
    """How vLLM takes an adapter. `keys`: of the base checkpoint's tensors."""
    base, serving = adapted.model.get_base_model(), Serving()
    architecture, layers = type(base).__name__, lora_layers(adapted.model)
    serving.obstacles += find_vllm_refusals(adapted.model.peft_config[ADAPTER_NAME])
    if architecture in VLLM_REMOVED:
        serving.obstacles.append(
            f"vLLM has no {architecture} after {VLLM_REMOVED[architecture]}. Merge it and use transformers."
        )
    elif architecture not in VLLM_RUN:
        serving.notes.append(
            f"vLLM {VLLM} was not run with {architecture}. We take the names of the base checkpoint, which it reads."
            " Compare its answers: vlm-tuning verify-serving."
        )
    serving.notes += [VLLM_NOTES[architecture]] if architecture in VLLM_NOTES else []
    targets = adapted.key_rules.targets(keys)
    for name, layer in layers.items():
        if obstacle := find_vllm_obstacle(name, layer, base, targets):
            serving.obstacles.append(f"{name}: {obstacle}")
    stored = {key.removeprefix(PEFT_PREFIX).partition(".lora_")[0] for key in open_weights(adapted.adapter.folder)}
    serving.names = names_for_vllm(layers, adapted, targets)
    serving.renamed = {name: new for name, new in serving.names.items() if new not in stored}
    rank = max(layer.r[ADAPTER_NAME] for layer in layers.values())
    if rank > VLLM_RANKS[-1]:
        serving.obstacles.append(f"rank {rank} is more than vLLM's largest, {VLLM_RANKS[-1]}.")
    elif rank > VLLM_DEFAULT_RANK:
        serving.options.append(f"--max-lora-rank {next(r for r in VLLM_RANKS if r >= rank)}")
    parts = find_parts(base)
    outside = [name for name in layers if parts.of(name) != LANGUAGE_MODEL]
    if outside and architecture in VLLM_NO_TOWER:
        serving.obstacles.append(
            f"{VLLM_NO_TOWER[architecture]} {len(outside)} adapted layers are in its tower or projector."
        )
    elif outside:
        serving.options.append("--enable-tower-connector-lora")
        serving.notes.append(
            f"{len(outside)} adapted layers are in the vision tower or projector. Without"
            " --enable-tower-connector-lora, which vLLM calls experimental, it leaves them out without a warning."
        )
    return serving


def lora_layers(adapted: PeftModel) -> dict[str, LoraLayer]:
    """Module name → layer, of all that LoRA adapts."""
    modules = adapted.get_base_model().named_modules()
    return {name: module for name, module in modules if isinstance(module, LoraLayer)}


def find_vllm_obstacle(
    name: str, layer: LoraLayer, base: PreTrainedModel, targets: Mapping[str, WeightTarget]
) -> str | None:
    """Why vLLM cannot adapt a layer, if it cannot."""
    head, module = base.get_output_embeddings(), layer.get_base_layer()
    if isinstance(module, nn.Embedding) or head in (layer, module):
        return "vLLM adapts embeddings and heads for some language models only."
    if not isinstance(module, nn.Linear):
        return "vLLM adapts linear layers only."
    if any(target.converted and target.name == f"{name}.weight" for target in targets.values()):
        return "the base checkpoint stores it in another layout."
    return None


def names_for_vllm(
    layers: Iterable[str], adapted: AdaptedSkeleton, targets: Mapping[str, WeightTarget]
) -> dict[str, str]:
    """Module → the name under which vLLM looks for what adapts it."""
    if type(adapted.model.get_base_model()).__name__ in VLLM_RUN:
        return {name: name_for_engines(name, adapted.key_rules.added_levels) for name in layers}
    keys = {target.name: adapted.key_rules.key_for_engines(key) for key, target in targets.items()}
    return {name: keys.get(f"{name}.weight", f"{name}.weight").removesuffix(".weight") for name in layers}


def find_vllm_refusals(config: LoraConfig) -> list[str]:
    """The settings of an adapter that `PEFTHelper.validate_legal` raises for. vLLM takes rsLoRA and rank patterns."""
    reasons = {
        "modules_to_save": f"modules_to_save {', '.join(config.modules_to_save or [])}: vLLM takes no full modules.",
        "use_dora": "use_dora: vLLM has no DoRA.",
        "lora_bias": "lora_bias: vLLM takes no biases.",
        "alora_invocation_tokens": "alora_invocation_tokens: vLLM has no activated LoRA.",
        "layer_replication": "layer_replication: vLLM does not replicate layers.",
        "use_bdlora": "use_bdlora: vLLM has no block-diagonal LoRA.",
        "use_qalora": "use_qalora: vLLM has no QALoRA.",
    }
    found = [reason for name, reason in reasons.items() if getattr(config, name, None)]
    if config.bias != "none":
        found.append(f"bias {config.bias}: vLLM takes no biases.")
    if changes_base(config.init_lora_weights):
        found.append(f"init_lora_weights {config.init_lora_weights}: it changed the base model.")
    return found


def plan_transformers(adapted: AdaptedSkeleton, config: PreTrainedConfig) -> Serving:
    """Whether `PeftModel.from_pretrained` and a model's `load_adapter` find a place for every tensor.

    `adapted` is what the first of them makes; the second one changes a model, and so gets a skeleton of its own.
    """
    serving = Serving()
    with silent_transformers():
        info = build_skeleton(config).load_adapter(str(adapted.adapter.folder))
    if lost := sorted(map(str, info.missing_keys | info.unexpected_keys | info.mismatched_keys)):
        serving.obstacles.append(
            f"model.load_adapter finds no place for {len(lost)} tensors, such as {lost[0]};"
            " PeftModel.from_pretrained loads all of it."
        )
    if changes_base(adapted.model.peft_config[ADAPTER_NAME].init_lora_weights):
        serving.notes.append("init_lora_weights changes the base model as the adapter is loaded.")
    return serving


def write_renamed(adapted: AdaptedSkeleton, serving: Serving, folder: Path) -> None:
    """Write the adapter and its settings under the names in `serving`."""
    layers = lora_layers(adapted.model)
    new_names = {name: serving.names.get(name, name) for name in layers}
    tensors = {}
    for key, tensor in get_peft_model_state_dict(adapted.model).items():
        if tensor.is_meta:
            continue
        module = next((name for name in layers if key.startswith(f"{PEFT_PREFIX}{name}.")), "")
        end = key.removeprefix(f"{PEFT_PREFIX}{module}")
        tensors[f"{PEFT_PREFIX}{new_names.get(module, module)}{end}"] = tensor.contiguous()
    shutil.copyfile(adapted.adapter.folder / "adapter_config.json", folder / "adapter_config.json")
    save_file(tensors, folder / ADAPTER_SAFE_WEIGHTS_NAME, metadata={"format": "pt"})
    if serving.renamed:
        rename_config(adapted.model.peft_config[ADAPTER_NAME], layers, new_names).save_pretrained(folder)


def rename_config(config: LoraConfig, layers: Mapping[str, LoraLayer], new_names: Mapping[str, str]) -> LoraConfig:
    """An adapter's settings for new names. Each layer's rank and scaling stand under its full name.

    The names of transformers stay beside them: PEFT takes those that exist.
    """
    changed = LoraConfig(**{**config.to_dict(), "runtime_config": config.runtime_config})
    ranks, alphas = dict[str, int](), dict[str, float]()
    for name, layer in layers.items():
        ranks |= dict.fromkeys((name, new_names[name]), layer.r[ADAPTER_NAME])
        alphas |= dict.fromkeys((name, new_names[name]), layer.lora_alpha[ADAPTER_NAME])
    changed.target_modules = sorted(ranks)
    changed.rank_pattern = {name: rank for name, rank in ranks.items() if rank != config.r}
    changed.alpha_pattern = {name: alpha for name, alpha in alphas.items() if alpha != config.lora_alpha}
    return changed
