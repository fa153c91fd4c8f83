"""After the final save: is what lies on the disk the model that was trained, and does it load?"""

import inspect
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from peft import PeftConfig, PeftModel, get_peft_model_state_dict
from safetensors import SafetensorError, safe_open
from torch.distributed.checkpoint.api import CheckpointException
from transformers import AutoModelForImageTextToText, AutoProcessor, GenerationConfig
from transformers.core_model_loading import revert_weight_conversion
from transformers.utils import ADAPTER_SAFE_WEIGHTS_NAME, SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME

from tuning.config.options import ModelArguments, RunConfig
from tuning.console import print0
from tuning.distributed.failures import is_out_of_memory
from tuning.errors import RunEnded
from tuning.exit_codes import EXIT_INTERNAL_ERROR
from tuning.files import SHARDED_MODEL, write_json
from tuning.machine import free_memory
from tuning.model.attention import decoder_attention
from tuning.model.load import without_zero3
from tuning.model.lora import load_answering
from tuning.model.mllama import patch_mllama_cross_attention
from tuning.model.padding_free import CANNOT_RUN, HALF_TOLERANCE, TOLERANCE
from tuning.model.parts import count_numbers
from tuning.pages.model_card import put_card, write_card
from tuning.training.checkpoint_files import COMPLETE_FILE, join_shards
from tuning.training.checkpointing import plain_name
from tuning.training.evaluation import answering_mode
from tuning.training.optimizer import HALF
from tuning.training.resume import Progress
from tuning.training.run_summary import gather_facts
from tuning.training.self_check import whole
from tuning.training.trainer import SupervisedTrainer

LAST_TOKENS = 8  # of each row, whose logits are compared: those of all tokens of large vocabularies take gigabytes
ROOM = 1.3  # times the model, so that a second one fits comfortably
BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}  # bytes a number → its bits as a whole number
BESIDE = "saved"  # the name of the adapter that is read back beside the one that was trained
CANNOT_LOAD = (OSError, SafetensorError, CheckpointException, ImportError, *CANNOT_RUN)


class SavedWeights(Mapping[str, torch.Tensor]):
    """The tensors of a saved model or adapter by their names on the disk, each read when it is asked for."""

    def __init__(self, folder: Path):
        index = folder / SAFE_WEIGHTS_INDEX_NAME
        found = [folder / name for name in (ADAPTER_SAFE_WEIGHTS_NAME, SAFE_WEIGHTS_NAME)]
        files = [file for file in found if file.is_file()][:1]
        if not files:
            files = [folder / name for name in sorted(set(json.loads(index.read_text())["weight_map"].values()))]
        self._file_of: dict[str, Path] = {}
        for file in files:
            with safe_open(file, framework="pt") as opened:
                self._file_of |= dict.fromkeys(opened.keys(), file)

    def __getitem__(self, name: str) -> torch.Tensor:
        with safe_open(self._file_of[name], framework="pt") as opened:
            return opened.get_tensor(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self._file_of)

    def __len__(self) -> int:
        return len(self._file_of)


def verify_saved(
    trainer: Any, folder: Path, checkpoint: Path | None, settings: ModelArguments, *, wanted: bool | None
) -> None:
    """Read the model saved in `folder` back, and compare it with the one in memory, or with `checkpoint`'s if given.

    Every tensor must be the same bit by bit, and so must the processor; the model must load as a user loads it, and
    give the same logits. `wanted`: `verify_save`; a second model is loaded where there is room, or if `wanted`, and a
    second adapter always, unless `why_not_loaded` says otherwise. To be called by all processes; the first one reads.
    Raises `RunEnded` on all of them.
    """
    if wanted is False:
        return
    first = trainer.args.should_save
    model = trainer.accelerator.unwrap_model(trainer.model)
    together = trainer.is_fsdp_enabled and trainer.processes.number > 1
    adapter = isinstance(model, PeftModel)
    beside = adapter and not (together or trainer.is_deepspeed_enabled)
    beside = beside and model.peft_config[model.active_adapter].bias == "none"  # PEFT takes one else
    hindrance = "" if beside or not first else why_not_loaded(trainer, model, settings, bool(wanted))
    loads = bool(trainer.processes.share([first and not hindrance]).any())
    expected: Mapping[str, torch.Tensor] | None = None
    logits = None
    if checkpoint is None and not trainer.is_deepspeed_enabled and (first or together):
        expected = trained_weights(trainer, model)
        logits = trained_logits(trainer, model) if loads else None
    fault = ""
    if first:
        try:
            if checkpoint and not trainer.is_deepspeed_enabled:
                expected = checkpoint_weights(checkpoint)
            fault = find_tensor_fault(SavedWeights(folder), expected)
            fault = fault or find_setting_fault(folder, trainer, model, settings.trust_remote_code)
            if not fault and loads:
                fault = find_loading_fault(folder, trainer, model, logits, settings, beside=beside)
        except CANNOT_LOAD as error:
            if isinstance(error, RuntimeError) and is_out_of_memory(error):
                raise
            done = f"compared with {checkpoint}" if checkpoint else "read back"
            fault = f"it cannot be {done} ({type(error).__name__}: {str(error).strip().partition(chr(10))[0]})"
    trainer.processes.raise_on_all_ranks(broken(folder, fault) if fault else None)
    compared = ["weights"] * (expected is not None) + ["logits"] * (logits is not None)
    origin = f"of {checkpoint}" if checkpoint else "that were trained"
    what = "it loads" if loads else "its files are whole"
    what = f"its {' and '.join(compared)} are those {origin}" if compared else what
    print0(f"Read {folder} back: {what}{f'. It was not loaded: {hindrance}' if hindrance else ''}.")


def broken(folder: Path, fault: str) -> RunEnded:
    return RunEnded(
        f"The model saved in {folder} is not the one that was trained: {fault}. The run is not marked as finished, and"
        " its checkpoints stay as they are: the same command saves the model again.",
        EXIT_INTERNAL_ERROR,
    )


def why_not_loaded(trainer: Any, model: torch.nn.Module, settings: ModelArguments, wanted: bool) -> str:
    """What keeps the first process from loading the saved model, or adapter with its base; "" if nothing does."""
    if trainer.is_deepspeed_enabled and isinstance(model, PeftModel):  # PEFT would gather what all of them hold
        return "under DeepSpeed one process cannot load an adapter alone"
    if settings.quantization:
        return f"its base was trained in {settings.quantization}, and would be loaded as it is published"
    return "" if wanted or has_room(trainer, model) else "there is no room for a second model"


def has_room(trainer: Any, model: torch.nn.Module) -> bool:
    """Whether a second model fits comfortably where the first one is, and into the memory that it comes through."""
    size = sum(
        count_numbers(parameter) * trainer.dtypes.get(plain_name(name), parameter.dtype).itemsize
        for name, parameter in model.named_parameters()
    )
    free = free_memory()
    if trainer.args.device.type == "cuda":
        torch.cuda.empty_cache()
        free = min(free, torch.cuda.mem_get_info(trainer.args.device)[0])
    return ROOM * size < free


def trained_weights(trainer: Any, model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """What is to be on the disk of the model in memory, by its name there.

    What FSDP sharded is put together tensor by tensor, by all processes, and kept by the first.
    """
    adapter = isinstance(model, PeftModel)
    if adapter and not trainer.is_fsdp_enabled:
        return get_peft_model_state_dict(model)
    weights: dict[str, torch.Tensor] = {}
    of_parameter: dict[int, torch.Tensor] = {}  # tied ones stay one
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    for name, parameter in model.state_dict(keep_vars=True).items():
        if adapter and name not in trained and f".{model.active_adapter}." not in name:
            continue
        if id(parameter) not in of_parameter:
            tensor = whole(parameter.detach())
            if trainer.is_fsdp_enabled:  # which may hold trained ones in float32
                tensor = tensor.to(trainer.dtypes.get(plain_name(name), tensor.dtype))
                tensor = tensor.cpu() if trainer.args.should_save else tensor[:0]
            of_parameter[id(parameter)] = tensor
        weights[plain_name(name)] = of_parameter[id(parameter)]
    if not trainer.args.should_save:
        return {}
    if adapter:
        return get_peft_model_state_dict(model, state_dict=weights)
    return revert_weight_conversion(model, weights)


def checkpoint_weights(checkpoint: Path) -> Mapping[str, torch.Tensor]:
    """What the model of a checkpoint consists of, by the names on the disk."""
    if not (checkpoint / SHARDED_MODEL).is_dir():
        return SavedWeights(checkpoint)
    model = join_shards(checkpoint).requires_grad_(False)
    return revert_weight_conversion(model, model.state_dict(keep_vars=True))


def find_tensor_fault(saved: Mapping[str, torch.Tensor], expected: Mapping[str, torch.Tensor] | None) -> str:
    """How `saved` differs from `expected`, looked at one by one; "" if it does not. Of tied ones, one tensor in
    a `dict`, one is enough."""
    if expected is None:
        return ""
    if surplus := sorted(saved.keys() - expected.keys()):
        return f"the file has {len(surplus)} tensors too many, first {surplus[0]}"
    missing = [name for name in expected if name not in saved]
    if isinstance(expected, dict):
        there = {id(expected[name]) for name in saved}
        missing = [name for name in missing if id(expected[name]) not in there]
    if missing:
        return f"the file lacks {len(missing)} tensors, first {missing[0]}"
    differing, worst = [], 0.0
    for name in saved:
        found, wanted = saved[name], expected[name].cpu()
        if (found.shape, found.dtype) != (wanted.shape, wanted.dtype):
            kinds = (f"{str(t.dtype).removeprefix('torch.')} {list(t.shape)}" for t in (found, wanted))
            return f"{name} is {' instead of '.join(kinds)}"
        bits = BITS[found.element_size()]
        if not torch.equal(found.contiguous().view(bits), wanted.contiguous().view(bits)):
            differing.append(name)
            worst = max(worst, float((found.double() - wanted.double()).abs().max()))
    if differing:
        return f"{len(differing)} of {len(saved)} tensors differ, by up to {worst:.3g}, first {differing[0]}"
    return ""


def find_setting_fault(folder: Path, trainer: Any, model: Any, trust_remote_code: bool) -> str:
    """What of the saved processor, generation settings and adapter settings differs from those in memory."""
    mine, saved = trainer.processing_class, AutoProcessor.from_pretrained(folder, trust_remote_code=trust_remote_code)
    pairs = {
        "chat template": [processor.chat_template for processor in (saved, mine)],
        "vocabulary": [processor.tokenizer.get_vocab() for processor in (saved, mine)],
        "image processor": [processor.image_processor.to_dict() for processor in (saved, mine)],
        "generation config": [
            config.to_diff_dict() for config in (GenerationConfig.from_pretrained(folder), model.generation_config)
        ],
    }
    if isinstance(model, PeftModel):
        configs = (PeftConfig.from_pretrained(str(folder)), model.peft_config[model.active_adapter])
        pairs["adapter config"] = [{**config.to_dict(), "inference_mode": True} for config in configs]
    for name, (found, expected) in pairs.items():
        if found != expected:
            return f"its {name} is another{_first_difference(found, expected)}"
    return ""


def _first_difference(found: Any, expected: Any) -> str:
    if not (isinstance(found, dict) and isinstance(expected, dict)):
        return ""
    name = next(name for name in [*expected, *found] if found.get(name) != expected.get(name))
    return f": {name} is {found.get(name)!r:.60}, not {expected.get(name)!r:.60}"


def trained_logits(trainer: Any, model: Any) -> torch.Tensor | None:
    """Logits of the model in memory for a padded batch; None, on all processes, where it takes no such batch."""
    try:
        with decoder_attention(model, trainer.attention.loaded):
            return read_logits(trainer, model)
    except CANNOT_RUN as error:
        if isinstance(error, RuntimeError) and is_out_of_memory(error):
            raise
        print0(f"No logits to compare: {type(error).__name__}: {str(error).partition(chr(10))[0]}")
        return None


@torch.no_grad()
def read_logits(trainer: Any, model: Any) -> torch.Tensor:
    """Logits of the last tokens of three rows, with and without an image, `[rows, tokens, vocabulary]`, float32.

    By the stock forward, without labels; what lies behind the end of a row is 0.
    """
    batch = replace(trainer.collator, padding_free=False, dummy_image_sample=None).join(trainer.dummy_samples())
    lengths = batch["attention_mask"].sum(dim=1)
    kept = torch.cat([torch.arange(max(0, length - LAST_TOKENS), length) for length in lengths.tolist()]).unique()
    inputs = {name: value for name, value in batch.items() if name != "labels"}
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    some = "logits_to_keep" in inspect.signature(type(base).forward).parameters
    if some:
        inputs["logits_to_keep"] = kept
    with answering_mode(model), trainer.accelerator.autocast():
        logits = model(**trainer._prepare_inputs(inputs)).logits
    logits = (logits if some else logits[:, kept]).float().cpu()
    return logits.masked_fill((kept >= lengths[:, None])[..., None], 0)


def find_loading_fault(
    folder: Path, trainer: Any, model: Any, expected: torch.Tensor | None, settings: ModelArguments, *, beside: bool
) -> str:
    """What goes wrong when the saved model is loaded, or how its logits differ from those `expected`.

    `beside`: it is an adapter, and goes on the base in memory.
    """
    if beside:
        with saved_adapter(model, folder), decoder_attention(model, trainer.attention.loaded):
            found = read_logits(trainer, model) if expected is not None else None
    elif isinstance(model, PeftModel):
        source = replace(settings, model_name_or_path=str(folder))
        loaded = load_answering(source, device=trainer.args.device).model
        found = read_logits(trainer, loaded) if expected is not None else None
    else:
        with without_zero3():
            loaded, report = AutoModelForImageTextToText.from_pretrained(
                folder,
                attn_implementation=trainer.attention.loaded,
                trust_remote_code=settings.trust_remote_code,
                output_loading_info=True,
            )
        for problem in ("missing_keys", "unexpected_keys", "mismatched_keys"):
            if report[problem]:
                return f"loading it tells of {problem.replace('_', ' ')}, first {min(map(str, report[problem]))}"
        patch_mllama_cross_attention(loaded)
        found = read_logits(trainer, loaded.to(trainer.args.device)) if expected is not None else None
    if found is None or expected is None:
        return ""
    half = trainer.accelerator.mixed_precision != "no" or not HALF.isdisjoint(trainer.dtypes.values())
    off = ((found - expected).norm() / expected.norm()).item()
    if off <= (HALF_TOLERANCE if half else TOLERANCE):
        return ""
    return f"its logits are off by {off:.3g} of their norm, though its tensors are the same"


@contextmanager
def saved_adapter(model: PeftModel, folder: Path) -> Iterator[None]:
    """Let `model` run with the adapter saved in `folder` instead of its own for a while."""
    own, trains, training = model.active_adapter, {p: p.requires_grad for p in model.parameters()}, model.training
    try:
        model.load_adapter(str(folder), BESIDE, torch_device=str(model.device))
        model.set_adapter(BESIDE)
        yield
    finally:
        model.set_adapter(own)
        if BESIDE in model.peft_config:
            model.delete_adapter(BESIDE)
        for parameter, flag in trains.items():
            parameter.requires_grad_(flag)
        model.train(training)


def save(trainer: SupervisedTrainer, config: RunConfig, progress: Progress) -> None:
    """Save the final model beside its place, move it there, and only then mark the run as finished."""
    target, output_dir = Path(config.save_model_dir), Path(config.training.output_dir)
    if lost := trainer.lost_best:
        print0(f"Warning: the best step, {lost}, was not saved; let save_steps be eval_steps to keep it.")
    card = write_card(gather_facts(trainer, config))
    checkpoint = progress.folder if progress.trained_to_end else None
    files = trainer.save_final(target, checkpoint, lambda saved: put_card(card, saved, target))
    verify_saved(trainer, target, trainer.final_source(checkpoint), config.model, wanted=config.run.verify_save)
    if trainer.args.should_save:
        end = {"global_step": trainer.state.global_step, "files": files}
        write_json(output_dir / COMPLETE_FILE, {**trainer.fingerprint, **end})
    trainer.accelerator.wait_for_everyone()
    if trainer.hub and trainer.args.should_save:
        trainer.hub.upload_final(target, files, output_dir)
