"""Would an engine load an adapter itself, and under which names? Told from the adapter and a model without weights.

The rules of vLLM are those of its source, version 0.33.0: vllm/lora/peft_helper.py (`PEFTHelper.validate_legal`),
lora/utils.py (`parse_fine_tuned_lora_name`), lora/lora_model.py, lora/model_manager.py, config/lora.py, and
model_executor/models/{llava,llava_next,registry}.py.
"""

import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from peft import LoraConfig, PeftModel, get_peft_model_state_dict
from peft.tuners.lora import LoraLayer
from safetensors.torch import save_file
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from tuning.export.merge import NAME, changes_base
from tuning.export.safetensors_files import WeightTarget
from tuning.model import load
from tuning.model.lora import ADAPTER_WEIGHTS, Adapter
from tuning.model.parts import LANGUAGE_MODEL, find_parts

PREFIX = "base_model.model."
VLLM_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
VLLM_DEFAULT_RANK = 16
VLLM_PREFIXES = {
    "model.language_model.": "language_model.model.",
    "model.vision_tower.": "vision_tower.",
    "model.multi_modal_projector.": "multi_modal_projector.",
    "lm_head.": "language_model.lm_head.",
}
VLLM_READ = ("LlavaForConditionalGeneration", "LlavaNextForConditionalGeneration")
"""Models whose prefixes these are, and which take LoRA in tower and projector."""
VLLM_TOWERS = ("clip_vision_model", "siglip_vision_model")
VLLM_REMOVED = {"MllamaForConditionalGeneration": "0.10.2"}
"""Models that vLLM no longer has, and the last version that had them."""


@dataclass
class Serving:
    """What an engine makes of an adapter. `obstacles`: what it would refuse or leave out; `options`: what to start it
    with. `renamed`: module of the model → the name it has to have in the adapter, where that is another."""

    obstacles: list[str] = field(default_factory=list)
    options: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    renamed: dict[str, str] = field(default_factory=dict)


def plan_vllm(adapted: PeftModel, places: dict[str, WeightTarget]) -> Serving:
    """How vLLM 0.33 takes `adapted`, a skeleton with its adapter. `places`: of the base checkpoint's tensors."""
    config, base = adapted.peft_config[NAME], adapted.get_base_model()
    serving, architecture = Serving(), type(base).__name__
    serving.obstacles += find_vllm_refusals(config)
    if architecture in VLLM_REMOVED:
        serving.obstacles.append(f"vLLM has no {architecture} after {VLLM_REMOVED[architecture]}.")
    known = architecture in VLLM_READ
    if not known:
        serving.notes.append(
            f"vLLM's code for {architecture} was not read for this check; names are as in the base checkpoint."
        )
    layers = {name: module for name, module in base.named_modules() if isinstance(module, LoraLayer)}
    parts, published = find_parts(base), {place.name: key for key, place in places.items()}
    fused = {place.name for place in places.values() if place.converted}
    outside = []
    for name, layer in layers.items():
        if isinstance(layer.get_base_layer(), nn.Embedding) or layer.get_base_layer() is _head(base):
            serving.obstacles.append(f"{name}: vLLM adapts embeddings and heads for some language models only.")
        elif not isinstance(layer.get_base_layer(), nn.Linear):
            serving.obstacles.append(f"{name}: vLLM adapts linear layers only.")
        elif f"{name}.weight" in fused:
            serving.obstacles.append(f"{name}: the base checkpoint stores it in another layout.")
        if parts.of(name) != LANGUAGE_MODEL:
            outside.append(name)
        if known:
            wanted = vllm_module(name, base.config)
            found = _map_prefix(name) == wanted
        else:
            wanted = published.get(f"{name}.weight", f"{name}.weight").removesuffix(".weight")
            found = wanted == name
        if not found:
            serving.renamed[name] = wanted
    rank = max(layer.r[NAME] for layer in layers.values())
    if rank > VLLM_RANKS[-1]:
        serving.obstacles.append(f"rank {rank} is more than vLLM's largest, {VLLM_RANKS[-1]}.")
    elif rank > VLLM_DEFAULT_RANK:
        serving.options.append(f"--max-lora-rank {next(r for r in VLLM_RANKS if r >= rank)}")
    if outside:
        serving.options.append("--enable-tower-connector-lora")
        serving.notes.append(
            f"{len(outside)} adapted layers are in the vision tower or projector: without"
            " --enable-tower-connector-lora, which vLLM calls experimental, it leaves them out and does not say so."
        )
    return serving


def _head(base: PreTrainedModel) -> nn.Module | None:
    head = base.get_output_embeddings()
    return head.get_base_layer() if isinstance(head, LoraLayer) else head


def find_vllm_refusals(config: LoraConfig) -> list[str]:
    """What of an adapter's settings `PEFTHelper.validate_legal` raises for. rsLoRA and rank patterns are taken."""
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


def vllm_module(name: str, config: PreTrainedConfig) -> str:
    """What vLLM's LLaVA models call a module. Their towers have a level that transformers 5 has no longer."""
    mapped, tower = _map_prefix(name), "vision_tower."
    has_level = config.vision_config.model_type in VLLM_TOWERS and not mapped.startswith(f"{tower}vision_model.")
    return mapped.replace(tower, f"{tower}vision_model.", 1) if has_level and mapped.startswith(tower) else mapped


def _map_prefix(name: str) -> str:
    """Where `hf_to_vllm_mapper` of the LLaVA models looks for a module."""
    for prefix, new in VLLM_PREFIXES.items():
        if f"{name}.".startswith(prefix):
            return (new + f"{name}."[len(prefix) :]).removesuffix(".")
    return name


def plan_transformers(skeleton: PreTrainedModel, adapter: Adapter, adapted: PeftModel) -> Serving:
    """Whether `PeftModel.from_pretrained` and `load_adapter` of a model find a place for every tensor.

    `adapted`: another skeleton with the adapter on it, which is what the first of them does.
    """
    serving = Serving()
    with load.silent_transformers():
        info = skeleton.load_adapter(str(adapter.folder))
    if lost := sorted(map(str, info.missing_keys | info.unexpected_keys | info.mismatched_keys)):
        serving.obstacles.append(
            f"model.load_adapter finds no place for {len(lost)} tensors, such as {lost[0]};"
            " PeftModel.from_pretrained loads all of it."
        )
    if changes_base(adapted.peft_config[NAME].init_lora_weights):
        serving.notes.append("init_lora_weights changes the base model as the adapter is loaded.")
    return serving


def write_renamed(adapted: PeftModel, serving: Serving, adapter: Adapter, folder: Path) -> None:
    """Write the adapter and its settings under the names that `serving` found."""
    layers = {name: m for name, m in adapted.get_base_model().named_modules() if isinstance(m, LoraLayer)}
    new_names = {name: serving.renamed.get(name, name) for name in layers}
    tensors = {}
    for key, tensor in get_peft_model_state_dict(adapted).items():
        if tensor.is_meta:
            continue
        module = next((name for name in layers if key.startswith(f"{PREFIX}{name}.")), "")
        end = key.removeprefix(f"{PREFIX}{module}")
        tensors[f"{PREFIX}{new_names.get(module, module)}{end}"] = tensor.contiguous()
    shutil.copyfile(adapter.folder / "adapter_config.json", folder / "adapter_config.json")
    save_file(tensors, folder / ADAPTER_WEIGHTS, metadata={"format": "pt"})
    if serving.renamed:
        renamed_config(adapted.peft_config[NAME], layers, new_names).save_pretrained(folder)


def renamed_config(config: LoraConfig, layers: dict[str, Any], new_names: dict[str, str]) -> LoraConfig:
    """An adapter's settings for new names: each layer's rank and scaling stand under its full name."""
    changed = LoraConfig(**{**config.to_dict(), "runtime_config": config.runtime_config})
    changed.target_modules = sorted(new_names.values())
    changed.rank_pattern = {new_names[n]: m.r[NAME] for n, m in layers.items() if m.r[NAME] != config.r}
    changed.alpha_pattern = {
        new_names[n]: m.lora_alpha[NAME] for n, m in layers.items() if m.lora_alpha[NAME] != config.lora_alpha
    }
    return changed
