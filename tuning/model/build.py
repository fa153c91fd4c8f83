"""A config → the model to train. Everything is planned on a skeleton before the weights are read."""

import functools
import os
from collections.abc import Callable, Collection
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from tuning.config.options import RunConfig
from tuning.console import print0
from tuning.distributed.fsdp import choose_wrap_classes, is_fsdp_asked_for, is_sharded
from tuning.errors import UserError, try_optional
from tuning.files import SHARDED_MODEL
from tuning.model import load
from tuning.model.adapter_plan import describe_adapter, plan_adapter
from tuning.model.attention import Attention, choose_attention
from tuning.model.dry_run import find_idle_parameters
from tuning.model.feature_cache import TowerOutput, patch_cached_vision_features, probe_tower
from tuning.model.flops import Flops, count_flops
from tuning.model.lora import add_lora, load_adapter, read_adapter_config
from tuning.model.lora_targets import LoraTargets, check_dora, check_modules_to_save, kept_whole, resolve_targets
from tuning.model.loss import patch_supervised_loss
from tuning.model.mllama import patch_mllama_cross_attention, patch_mllama_tower
from tuning.model.parts import (
    LANGUAGE_MODEL,
    PROJECTOR,
    VISION_TOWER,
    Parts,
    find_parts,
    freeze_parameters,
    freeze_parts,
    parameter_table,
)
from tuning.model.patch_embedding import patch_patch_embeddings
from tuning.model.picture_dtype import patch_picture_dtype
from tuning.model.quantize import Quantization, plan_quantization
from tuning.model.tower_attention import drop_row_lengths
from tuning.model.vision_tower import patch_frozen_statistics, patch_frozen_tower


@dataclass(frozen=True)
class ModelPlan:
    """What is known of a model before its weights are read.

    `lora_targets`: what LoRA adapts, nothing without it. `idle`: names of the vision tower's parameters that get no
    gradient, those after the last layer whose features are used; None where the skeleton could not be run.
    `wrap_classes`: class names of the layers that FSDP wraps. `tower_output`: the output of the vision tower, if its
    features are cached. `quantization`: how the weights of the language model are quantized, if they are.
    `stored_names`: of the adapter's weights, where PEFT reads them back under other names only. `flops`: the operations
    of a step as it is trained.
    """

    parts: Parts
    attention: Attention
    lora_targets: LoraTargets
    idle: set[str] | None
    wrap_classes: list[str]
    tower_output: TowerOutput | None = None
    quantization: Quantization | None = None
    stored_names: dict[str, str] = field(default_factory=dict)
    flops: Flops | None = None


@dataclass(frozen=True)
class TrainableModel:
    """A loaded model, ready for training, and what is known of it.

    `wrap_classes`: class names of the layers that FSDP wraps and `torch_compile` compiles. `dtypes`: those to save
    weights in, by name; FSDP may train in another one. `idle_is_known`: whether every parameter without a gradient was
    found and frozen. `stored_names`: those of an adapter's weights on the disk, by name, where they have others there.
    `flops`: see `ModelPlan`.
    """

    model: Any
    parts: Parts
    attention: Attention
    wrap_classes: list[str]
    dtypes: dict[str, torch.dtype]
    idle_is_known: bool
    stored_names: dict[str, str] = field(default_factory=dict)
    flops: Flops | None = None


def plan_model(
    config: RunConfig, model_config: PreTrainedConfig, dummy_batch: Callable[[int], dict[str, torch.Tensor]]
) -> ModelPlan:
    """Plan the model on a skeleton without weights, so that mistakes are reported before the weights are read.

    `dummy_batch(rows)` returns a batch of that many rows with one image each.
    """
    skeleton = load.build_skeleton(model_config)
    parts = find_parts(skeleton)
    wrap_classes = choose_wrap_classes(skeleton, wanted_wrap_classes(config))
    targets = find_lora_targets(config, skeleton, parts) if config.lora.peft_method else LoraTargets()
    if config.lora.use_dora:
        autocast = config.training.bf16 or config.training.fp16
        check_dora(skeleton, targets, None if autocast else load.choose_dtype(config.model, model_config))
    quantization = None
    if config.model.quantization:
        whole = kept_whole(targets.parameters)
        quantization = find_quantization(config, model_config, skeleton, parts, whole)
    stored_names: dict[str, str] = {}
    if config.lora.peft_method:
        adapter = plan_adapter(functools.partial(load.build_skeleton, model_config), config.lora, targets)
        targets, stored_names = adapter.targets, adapter.stored_names
        print0(describe_adapter(adapter, config.lora))
    prepared = prepare_model(skeleton, config, parts, targets)
    tower_output = None
    if config.model.cache_vision_features:
        tower_output = probe_tower(prepared, dummy_batch(2), sharded=is_sharded(config.training))
    return ModelPlan(
        parts=parts,
        attention=pick_attention(config, model_config),
        lora_targets=targets,
        idle=find_idle_vision(prepared, parts, dummy_batch(1)),
        wrap_classes=wrap_classes,
        tower_output=tower_output,
        quantization=quantization,
        stored_names=stored_names,
        flops=count_flops(prepared, parts),
    )


def wanted_wrap_classes(config: RunConfig) -> list[str]:
    """The layer classes that the user named for FSDP, to the launcher or in `fsdp_config`."""
    launcher = os.environ.get("FSDP_TRANSFORMER_CLS_TO_WRAP", "") if is_fsdp_asked_for() else ""
    named = [name.strip() for name in launcher.split(",") if name.strip()]
    settings = config.training.fsdp_config  # a text where fsdp is off: then transformers does not read it
    return named or (settings.get("transformer_layer_cls_to_wrap") if isinstance(settings, dict) else None) or []


def find_idle_vision(skeleton: PreTrainedModel, parts: Parts, batch: dict[str, torch.Tensor]) -> set[str] | None:
    """Names of trainable parameters of the vision tower that no image reaches; None where the skeleton cannot run."""
    idle = try_optional(lambda: find_idle_parameters(skeleton, batch)).value
    return None if idle is None else {name for name in idle if parts.of(name) == VISION_TOWER}


def build_model(
    config: RunConfig, model_config: PreTrainedConfig, plan: ModelPlan, resume_from: Path | None = None
) -> TrainableModel:
    """Load the base model, or the checkpoint to resume from, and freeze what the config does not train."""
    print0(plan.attention.reason)
    settings, adapter = config.model, None
    if resume_from and config.lora.peft_method:
        adapter = resume_from
    elif resume_from and not (resume_from / SHARDED_MODEL).is_dir():
        settings = replace(settings, model_name_or_path=str(resume_from))
    with torch.random.fork_rng(devices=[]):  # ZeRO-3 draws weights first: a new adapter must not depend on that
        model = load.load_model(
            settings,
            model_config,
            dtype=load.choose_dtype(config.model, model_config),
            attention=plan.attention.loaded,
            quantization=plan.quantization,
        )
    if plan.quantization:
        print0(f"{len(plan.quantization.layers)} layers of the language model are kept in {plan.quantization.kind}.")
    targets = plan.lora_targets
    if adapter and not read_adapter_config(adapter).target_parameters:  # of an earlier version, which left experts out
        targets = replace(targets, experts=[])
    model = prepare_model(model, config, plan.parts, targets)
    freeze_parameters(model, plan.idle or set())
    patch_frozen_statistics(model)
    if adapter and not any(parameter.is_meta for parameter in model.parameters()):  # else FSDP sends the main process's
        load_adapter(model, adapter)
    if plan.tower_output and config.model.cache_vision_features:
        patch_cached_vision_features(model, plan.tower_output, config.model.cache_vision_features)
    print0(parameter_table(model, plan.parts))
    dtypes = {name: parameter.dtype for name, parameter in model.named_parameters()}
    known = plan.idle is not None
    return TrainableModel(
        model, plan.parts, plan.attention, plan.wrap_classes, dtypes, known, plan.stored_names, plan.flops
    )


def pick_attention(config: RunConfig, model_config: PreTrainedConfig) -> Attention:
    """The attention of a run, and why."""
    return choose_attention(
        load.model_class(model_config),
        use_flash_attn=config.model.use_flash_attn,
        attn_implementation=config.model.attn_implementation,
        dtype=load.choose_compute_dtype(config.model, model_config, config.training),
        device_type=config.training.device.type,
    )


def prepare_model(model: PreTrainedModel, config: RunConfig, parts: Parts, lora_targets: LoraTargets) -> Any:
    """Patch the supervised loss into a model, or into a skeleton, add LoRA, and freeze what the config freezes."""
    patch_mllama_cross_attention(model)
    patch_mllama_tower(model)
    patch_supervised_loss(model)
    drop_row_lengths(model)
    patch_picture_dtype(model)
    patch_patch_embeddings(model)
    if config.lora.peft_method:
        model = add_lora(model, config.lora, lora_targets)
    else:
        frozen = {
            VISION_TOWER: config.model.freeze_vision_tower,
            PROJECTOR: config.model.freeze_multi_modal_projector,
            LANGUAGE_MODEL: config.model.freeze_language_model,
        }
        freeze_parts(model, parts, {part for part, freeze in frozen.items() if freeze})
    patch_frozen_tower(model, sharded=is_sharded(config.training))
    return model


def find_lora_targets(config: RunConfig, skeleton: PreTrainedModel, parts: Parts) -> LoraTargets:
    """What LoRA adapts."""
    trainable_parts = {LANGUAGE_MODEL} if not config.model.freeze_language_model else set()
    trainable_parts |= {VISION_TOWER} if config.model.freeze_vision_tower is False else set()
    trainable_parts |= {PROJECTOR} if config.model.freeze_multi_modal_projector is False else set()
    check_modules_to_save(skeleton, config.lora.modules_to_save)
    return resolve_targets(skeleton, parts, config.lora, trainable_parts)


def find_quantization(
    config: RunConfig,
    model_config: PreTrainedConfig,
    skeleton: PreTrainedModel,
    parts: Parts,
    whole: Collection[str] = (),
) -> Quantization:
    """Which weights to quantize, and how. `whole`: modules to leave out. Raises `UserError` where that cannot work."""
    kind, zero = config.model.quantization, config.training.deepspeed_plugin
    assert kind is not None
    if zero is not None and zero.zero_stage == 3:
        raise UserError(
            where=f"quantization {kind}",
            problem="transformers does not load quantized weights for DeepSpeed ZeRO-3.",
            fix="Use FSDP with quantization 4bit, or let every process hold the whole model (DDP).",
        )
    if kind == "8bit" and (is_fsdp_asked_for() or config.training.fsdp):
        raise UserError(
            where="quantization 8bit",
            problem="FSDP cannot shard 8-bit weights.",
            fix="Use quantization 4bit, or let every process hold the whole model (DDP).",
        )
    if kind == "8bit" and config.lora.use_dora and config.training.device.type == "cpu":
        raise UserError(
            where="quantization 8bit, use_dora",
            problem="PEFT loses the scales of 8-bit weights when it trains DoRA on a CPU.",
            fix="Use quantization 4bit, or LoRA without use_dora.",
        )
    return plan_quantization(
        skeleton,
        parts,
        kind,
        modules_to_save=[*(config.lora.modules_to_save or []), *whole],
        compute=load.choose_compute_dtype(config.model, model_config, config.training),
        device=config.training.device,
    )


def compile_layers(model: nn.Module, class_names: Collection[str], *, backend: str, mode: str | None) -> int:
    """Compile every layer of these classes in place, under its own name. Returns how many there are.

    Layers of one class share their code: it is compiled once and, with dynamic sizes, for all lengths. The rest of the
    model (joining text and images, the loss) selects by values, which would break a graph anyway.
    """
    layers = [module for module in model.modules() if {kind.__name__ for kind in type(module).__mro__} & {*class_names}]
    for layer in layers:
        layer.compile(backend=backend, mode=mode, dynamic=True)
    return len(layers)
