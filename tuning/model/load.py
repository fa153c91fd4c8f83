"""Load a checkpoint: its configuration, its processor, and the model with all of its weights."""

import json
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors import SafetensorError
from transformers import (
    AutoConfig,
    AutoModelForImageTextToText,
    AutoProcessor,
    BaseImageProcessor,
    GenerationConfig,
    PreTrainedConfig,
    PreTrainedModel,
    TrainingArguments,
)
from transformers.integrations import deepspeed
from transformers.modeling_outputs import MoeCausalLMOutputWithPast
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING

from tuning.config.model_tokens import ModelTokens
from tuning.config.options import ModelSource
from tuning.config.values import shorten
from tuning.distributed.fsdp import receives_weights
from tuning.errors import UserError, describe_failure, first_line, try_optional
from tuning.files import read_user_text
from tuning.machine import has_c_compiler
from tuning.model.quantize import Quantization, keep_bnb_weights_trainable

PIXELS = {"min_pixels": "shortest_edge", "max_pixels": "longest_edge"}
"""Older names of the limits in an image processor's `size`, as in Qwen2.5-VL's. They win where a file has both."""


def patch_llama4_output() -> None:
    """Give `MoeCausalLMOutputWithPast` the field that the forward of Llama 4 reads from it, and that it lacks."""
    if not hasattr(MoeCausalLMOutputWithPast, "image_outputs"):
        MoeCausalLMOutputWithPast.image_outputs = None  # type: ignore[attr-defined]


patch_llama4_output()


def load_config(model: ModelSource) -> PreTrainedConfig:
    """The checkpoint's configuration. Raises `UserError` unless it is an image-text-to-text model."""
    name = model.model_name_or_path
    if (Path(name).expanduser() / "adapter_config.json").is_file():
        raise UserError(
            where=name, problem="this is a LoRA adapter, not a model.", fix="Merge it first: vlm-tuning export."
        )
    attempt = try_optional(lambda: AutoConfig.from_pretrained(name, trust_remote_code=model.trust_remote_code))
    config = attempt.value
    if config is None:
        raise UserError(
            where=f"model_name_or_path {name}",
            problem=f"the model cannot be loaded: {explain(attempt.error)}.",
            fix="Give a local folder with a config.json, or a hub id.",
        ) from attempt.error
    if type(config) not in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING and not model.trust_remote_code:
        raise UserError(
            where=f"model_name_or_path {name}",
            problem=f"a {config.model_type} model does not take images and text.",
            fix="Give an image-text-to-text model.",
        )
    return config


def load_processor(model: ModelSource, config: PreTrainedConfig) -> Any:
    """The checkpoint's processor with the user's chat template and `processor_kwargs` applied.

    A setting that the model's configuration also holds (`image_grid_pinpoints`) is changed in `config`, too: the model
    counts image tokens by it. Raises `UserError` for a setting that the processor does not have.
    """
    name, settings = model.model_name_or_path, with_limits_of_pixels(model.model_name_or_path, model.processor_kwargs)
    attempt = try_optional(
        lambda: AutoProcessor.from_pretrained(name, trust_remote_code=model.trust_remote_code, **settings)
    )
    if attempt.error:
        raise UserError(
            where=f"model_name_or_path {name}", problem=f"its processor cannot be loaded: {explain(attempt.error)}."
        ) from attempt.error
    processor: Any = attempt.value
    if not hasattr(processor, "image_processor"):
        raise UserError(
            where=f"model_name_or_path {name}",
            problem="it has no image processor.",
            fix="Give an image-text-to-text model.",
        )
    _complete(processor, config)
    _apply_settings(model.processor_kwargs, processor, config)
    _set_template(processor, _read_template(model.chat_template) if model.chat_template else "")
    return processor


def with_limits_of_pixels(name: str, settings: Mapping[str, Any]) -> dict[str, Any]:
    """`settings` whose `size` has an effect where the processor's file has the older limits, which would win."""
    if not isinstance(size := settings.get("size"), dict):
        return dict(settings)
    published = try_optional(lambda: BaseImageProcessor.get_image_processor_dict(name)[0]).value or {}
    return {**settings, **{old: size[new] for old, new in PIXELS.items() if old in published and new in size}}


def read_tokens(model: ModelSource, processor: Any, config: PreTrainedConfig) -> ModelTokens:
    """What the checkpoint says of its tokens."""
    return ModelTokens(read_stop_tokens(model, processor), count_embeddings(processor, config))


def read_stop_tokens(model: ModelSource, processor: Any) -> list[str]:
    """The tokens at which the model stops: `eos_token_id` of its generation config, which may be several."""
    name = model.model_name_or_path
    found = try_optional(lambda: GenerationConfig.from_pretrained(name, trust_remote_code=model.trust_remote_code))
    ids = found.value.eos_token_id if found.value else None
    ids = [ids] if isinstance(ids, int) else ids or []
    return [token for token in processor.tokenizer.convert_ids_to_tokens(ids) if token]


def explain(error: Exception | None) -> str:
    """Why files of a checkpoint cannot be loaded, in one line: the library's own words, if meant for users."""
    assert error is not None
    return first_line(error) if isinstance(error, (OSError, ValueError, ImportError)) else describe_failure(error)


def _set_template(processor: Any, template: str) -> None:
    """Let processor and tokenizer have one and the same chat template: `template`, or the checkpoint's.

    A checkpoint may store one in tokenizer_config.json and another one beside it. Training takes the processor's, and
    a save would write either. Programs that load the saved model must find the trained one, wherever they look.
    """
    if chosen := template or find_template(processor):
        processor.chat_template = processor.tokenizer.chat_template = chosen


def find_template(processor: Any) -> str | None:
    """The chat template of a processor, or of its tokenizer: some processors (Chameleon's) read none."""
    return getattr(processor, "chat_template", None) or getattr(processor.tokenizer, "chat_template", None)


def _complete(processor: Any, config: PreTrainedConfig) -> None:
    """Take settings that processors of older checkpoints lack from the model's configuration."""
    known = {
        "patch_size": getattr(getattr(config, "vision_config", None), "patch_size", None),
        "vision_feature_select_strategy": getattr(config, "vision_feature_select_strategy", None),
    }
    for name, value in known.items():
        if value is not None and getattr(processor, name, value) is None:
            setattr(processor, name, value)


def _apply_settings(settings: dict[str, Any], processor: Any, config: PreTrainedConfig) -> None:
    image_processor = processor.image_processor
    edges = [
        old for old, new in PIXELS.items() if getattr(getattr(image_processor, "size", None), new, None) is not None
    ]
    unknown = [name for name in settings if not hasattr(image_processor, name) and name not in edges]
    if unknown:
        known = ", ".join(sorted(image_processor.to_dict()))
        kind = type(image_processor).__name__
        raise UserError(
            where="processor_kwargs", problem=f"unknown settings {', '.join(unknown)} for {kind}; it has: {known}."
        )
    for name, value in settings.items():
        if hasattr(config, name):
            setattr(config, name, value)
    tiles = getattr(getattr(config, "vision_config", None), "max_num_tiles", None)
    if tiles is not None and getattr(image_processor, "max_image_tiles", tiles) != tiles:
        raise UserError(
            where="processor_kwargs",
            problem=f"max_image_tiles must stay {tiles}: the model has learned one position for each tile.",
        )


def _read_template(template: str) -> str:
    if "{" in template:
        return template
    return read_user_text(template, where=f"chat_template {shorten(template)}", fix="Give a Jinja file or its text.")


def count_embeddings(processor: Any, config: PreTrainedConfig) -> int | None:
    """For how many tokens the model has embeddings, where its tokenizer has more tokens; None where it has none more.

    Many models have rows to spare, and some more than their configuration says: the skeleton is asked then.
    """
    last = max(processor.tokenizer.get_vocab().values(), default=0)
    if last < getattr(config.get_text_config(), "vocab_size", 0):
        return None
    rows = build_skeleton(config).get_input_embeddings().weight.shape[0]
    return rows if last >= rows else None


def model_class(config: PreTrainedConfig) -> type[PreTrainedModel]:
    """The class that `AutoModelForImageTextToText` loads. For code that comes with a checkpoint, the base class."""
    return MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING.get(type(config), PreTrainedModel)


def choose_dtype(model: ModelSource, config: PreTrainedConfig) -> torch.dtype:
    """The precision of the weights: the user's choice, else the checkpoint's, else float32."""
    if model.dtype != "auto":
        return getattr(torch, model.dtype)
    dtype = getattr(config, "dtype", None) or torch.float32
    return getattr(torch, dtype) if isinstance(dtype, str) else dtype


def choose_compute_dtype(model: ModelSource, config: PreTrainedConfig, training: TrainingArguments) -> torch.dtype:
    """The precision that the model computes in: that of `bf16` or `fp16`, else that of the weights."""
    half = torch.bfloat16 if training.bf16 else torch.float16 if training.fp16 else None
    return half or choose_dtype(model, config)


def build_skeleton(config: PreTrainedConfig) -> PreTrainedModel:
    """The model on the meta device, without memory for weights, to read its structure before anything is loaded.

    Raises `UserError` where the model needs a package that is not installed (timm, for some towers).
    """
    try:
        with without_zero3(), torch.device("meta"):
            return AutoModelForImageTextToText.from_config(config)
    except ImportError as error:
        raise UserError(
            where=f"model_name_or_path {config.name_or_path or config.model_type}",
            problem=f"the model cannot be built: {explain(error).partition('. ')[0]}.",
            fix="Install this package.",
        ) from error


@contextmanager
def without_zero3() -> Iterator[None]:
    """Keep transformers from sharding a new model with DeepSpeed: a skeleton has nothing to shard."""
    zero3 = deepspeed._hf_deepspeed_config_weak_ref
    deepspeed.unset_hf_deepspeed_config()
    try:
        yield
    finally:
        deepspeed._hf_deepspeed_config_weak_ref = zero3


def avoid_kernels_without_compiler() -> None:
    """Keep PyTorch's operators as they are where there is no C compiler, as in slim images.

    torch 2.13 replaces some on CUDA, such as products of outer form, by Triton kernels. The first call would fail.
    """
    native = getattr(torch.backends, "python_native", None)  # earlier versions replace nothing
    if native is not None and not has_c_compiler():
        native.triton.enabled = False


def load_model(
    model: ModelSource,
    config: PreTrainedConfig,
    *,
    dtype: torch.dtype,
    attention: str,
    quantization: Quantization | None = None,
    **placement: str,
) -> PreTrainedModel:
    """Load all weights from safetensors. Raises `UserError` if the checkpoint lacks some or some do not fit.

    transformers would fill those with random numbers and continue. A process that receives its weights from rank 0
    gets the model on the meta device. Quantised weights cannot be sent: each reads its own. `placement`: `device_map`.
    """
    name = model.model_name_or_path
    avoid_kernels_without_compiler()
    if receives_weights() and type(config) in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING and not quantization:
        settings = {"dtype": dtype, "attn_implementation": name_attention(attention)}
        with silent_transformers():  # they would list every weight as missing
            return model_class(config).from_pretrained(None, config=config, state_dict={}, **settings)
    quantised = quantization.loading_options() if quantization else {}
    try:
        loaded, report = AutoModelForImageTextToText.from_pretrained(
            name,
            config=config,
            dtype=dtype,
            attn_implementation=name_attention(attention),
            use_safetensors=True,
            ignore_mismatched_sizes=True,  # the report lists them, and they are refused below
            trust_remote_code=model.trust_remote_code,
            output_loading_info=True,
            **{**quantised, **placement},
        )
    except (OSError, SafetensorError) as error:
        raise UserError(
            where=f"model_name_or_path {name}",
            problem=f"the weights cannot be loaded: {first_line(error)}.",
            fix="Use a checkpoint whose weights are complete and stored as safetensors.",
        ) from error
    except RuntimeError as error:  # transformers could not put the weights of experts into their quantised form
        if quantization is None:
            raise
        raise UserError(
            where=f"quantization {quantization.kind}",
            problem=f"the weights of this model cannot be kept so: {first_line(error)}.",
            fix="Train without quantization.",
        ) from error
    except ValueError as error:  # settings in its files, or options, that contradict each other
        raise UserError(
            where=f"model_name_or_path {name}",
            problem=f"the model cannot be loaded: {first_line(error)}.",
            fix="Correct its config.json, its generation_config.json or the option that this names.",
        ) from error
    check_complete(name, report)
    patch_weight_conversions(loaded)
    keep_bnb_weights_trainable(loaded)
    drop_unused_flags(loaded.generation_config)
    if Path(name).expanduser().exists():
        loaded.name_or_path = str(Path(name).expanduser().resolve())  # adapters name it as their base
    return loaded


def patch_weight_conversions(model: PreTrainedModel) -> None:
    """Keep only those conversions of weights that loading used, which saving reverts.

    Under ZeRO-3, transformers keeps all that the model might have needed. It would save names that no checkpoint of
    the model has, such as `language_model.model.model.norm.weight`.
    """
    if deepspeed.is_deepspeed_zero3_enabled():
        conversions = getattr(model, "_weight_conversions", [])
        model._weight_conversions = [conversion for conversion in conversions if conversion.was_used()]


def name_attention(attention: str) -> str | None:
    """What `from_pretrained` is asked for. By default it takes SDPA in each part of a model that supports it.

    Asked for SDPA, it refuses a model with a part that does not.
    """
    return None if attention == "sdpa" else attention


def check_complete(name: str, report: Mapping[str, Any]) -> None:
    """Raises `UserError` where transformers reports weights that the checkpoint lacks, or that do not fit."""
    for problem, keys in (("lacks", report["missing_keys"]), ("does not fit", report["mismatched_keys"])):
        if keys:
            listed = sorted(str(key) for key in keys)
            raise UserError(
                where=f"model_name_or_path {name}",
                problem=(
                    f"the checkpoint {problem} {len(listed)} of the model's weights: {', '.join(listed[:3])}"
                    f"{', …' if len(listed) > 3 else ''}."
                ),
                fix="Use a complete checkpoint of this model: these weights would be random.",
            )


def drop_unused_flags(config: GenerationConfig) -> None:
    """Remove generation flags that have no effect: transformers refuses to save a config that has some.

    Published checkpoints name a temperature without `do_sample`, for example. How the model answers stays the same.
    Raises `UserError` for a config that contradicts itself: the trained model could not be saved with it.
    """
    try:
        config.validate(strict=True)
        return
    except ValueError as error:
        unused = re.findall(r"^- `(\w+)`:", str(error), re.MULTILINE)
    for name in unused:
        setattr(config, name, None)
    try:
        config.validate(strict=True)
    except ValueError as error:
        raise UserError(where="generation_config.json", problem=f"{first_line(error)}.", fix="Correct it.") from error


@contextmanager
def silent_transformers() -> Iterator[None]:
    """Silence the warnings of transformers."""
    level = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity_error()
    try:
        yield
    finally:
        transformers.logging.set_verbosity(level)


def describe(config: PreTrainedConfig) -> str:
    """The settings that identify a model's architecture, as text that stays the same."""
    return json.dumps(config.to_diff_dict(), sort_keys=True, default=str)
