"""After the final save: is the model on the disk the one that was trained, and does it load?"""

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import send_to_device
from peft import PeftModel
from transformers import AutoModelForImageTextToText

from tuning.config.options import ModelArguments
from tuning.console import print0
from tuning.data.collator import Collator
from tuning.data.encode import Sample
from tuning.distributed.processes import Processes
from tuning.errors import RunEnded, describe_failure, try_optional
from tuning.exit_codes import EXIT_INTERNAL_ERROR
from tuning.machine import free_device_memory
from tuning.model.answering import load_answering, without_masked
from tuning.model.attention import decoder_attention
from tuning.model.load import name_attention, without_zero3
from tuning.model.mllama import patch_mllama_cross_attention
from tuning.model.padding_free import HALF_TOLERANCE, TOLERANCE
from tuning.model.parts import count_numbers
from tuning.model.picture_dtype import patch_picture_dtype
from tuning.model.saved_weights import SavedWeights
from tuning.training.checkpoint_files import load_checkpoint
from tuning.training.evaluation import answering_mode
from tuning.training.model_writer import ModelWriter
from tuning.training.optimizer import HALF
from tuning.training.read_back import find_setting_fault, find_tensor_fault, weights_on_disk
from tuning.training.trained_weights import gather_trained, plain_name

LAST_TOKENS = 8  # of each row, whose logits are compared: those of all tokens of large vocabularies take gigabytes
ROOM = 1.3  # times the model, so that a second one fits comfortably
SECOND_ADAPTER = "saved"  # the name of the saved adapter, while it is loaded into the trained model


@dataclass(frozen=True)
class TrainedModel:
    """The model in memory, without wrappers, and what is needed to run it.

    `dtypes`: those to save, by name. `attention`: the implementation it was loaded with. `dummy_samples`: short rows
    with and without an image, for `collator`. `writer`: what saved it.
    """

    model: Any
    dtypes: Mapping[str, torch.dtype]
    attention: str
    collator: Collator
    dummy_samples: Callable[[], Sequence[Sample]]
    processes: Processes
    is_main_process: bool
    is_fsdp: bool
    is_zero3: bool
    writer: ModelWriter

    @property
    def is_adapter(self) -> bool:
        return isinstance(self.model, PeftModel)

    @property
    def needs_all_processes(self) -> bool:
        """Whether FSDP or ZeRO-3 shards the model, so that all must gather its weights and run it together."""
        return self.is_zero3 or (self.is_fsdp and self.processes.number > 1)

    @property
    def device(self) -> torch.device:
        return self.processes.accelerator.device

    @property
    def computes_in_half(self) -> bool:
        return self.processes.accelerator.mixed_precision != "no" or not HALF.isdisjoint(self.dtypes.values())


def verify_saved_model(
    trained: TrainedModel,
    folder: Path,
    source: Path | None,
    settings: ModelArguments,
    *,
    force: bool,
) -> None:
    """Read the model in `folder` back. Compare it with the one in memory, or with the checkpoint `source` it is of.

    Every tensor must be the same bit by bit, and so must the processor. The model must load as a user loads it, and
    give the same logits.

    An adapter is loaded into the trained model where that can be done. A second model is loaded where it fits into
    memory, or with `force` in any case, unless `why_not_loaded` names another reason. All processes must call this; the
    main process reads. Raises `RunEnded` on all of them.
    """
    main = trained.is_main_process
    as_second_adapter = trained.is_adapter and not trained.needs_all_processes
    if as_second_adapter:  # PEFT loads no second adapter that trains biases
        as_second_adapter = trained.model.peft_config[trained.model.active_adapter].bias == "none"
    reason = "" if as_second_adapter or not main else why_not_loaded(trained, settings, force=force)
    loads = bool(trained.processes.all_gather_ints([main and not reason]).any())
    weights: Mapping[str, torch.Tensor] = {}
    logits = None
    if source is None and (main or trained.needs_all_processes):
        weights = weights_to_save(trained, folder)
        logits = trained_logits(trained) if loads else None

    def find_fault() -> str:
        expected = checkpoint_weights(trained, source) if source else weights
        fault = find_tensor_fault(SavedWeights(folder), expected)
        fault = fault or find_setting_fault(trained.writer, trained.model, folder)
        if fault or not loads:
            return fault
        with without_zero3():  # this process loads the model alone
            return find_loading_fault(trained, folder, logits, settings, as_second_adapter=as_second_adapter)

    fault = ""
    if main:
        attempt = try_optional(find_fault, catch_user_errors=True)
        fault = attempt.value or ""
        if attempt.error:
            fault = f"it cannot be {f'compared with {source}' if source else 'read back'}"
            fault = f"{fault} ({describe_failure(attempt.error)})"
    trained.processes.raise_on_all_ranks(not_the_trained_model(folder, fault) if fault else None)
    compared = ["weights"] + ["logits"] * (logits is not None)
    result = f"its {' and '.join(compared)} are those {f'of {source}' if source else 'that were trained'}"
    print0(f"Read {folder} back: {result}{f'. It was not loaded: {reason}' if reason else ''}.")


def not_the_trained_model(folder: Path, fault: str) -> RunEnded:
    return RunEnded(
        f"The model saved in {folder} is not the one that was trained: {fault}. The run is not marked as finished, and"
        " its checkpoints stay as they are. Run the same command again to save the model again.",
        EXIT_INTERNAL_ERROR,
    )


def why_not_loaded(trained: TrainedModel, settings: ModelArguments, *, force: bool) -> str:
    """What keeps the main process from loading the saved model, or adapter with its base; "" if nothing does."""
    if settings.quantization:
        return f"its base was trained in {settings.quantization}, and would be loaded as it is published"
    return "" if force or has_room(trained) else "there is no room for a second model"


def has_room(trained: TrainedModel) -> bool:
    """Whether a second model fits comfortably on the device of the first one, and into main memory on its way there."""
    size = sum(
        count_numbers(parameter) * trained.dtypes.get(plain_name(name), parameter.dtype).itemsize
        for name, parameter in trained.model.named_parameters()
    )
    return ROOM * size < free_device_memory(trained.device)


def weights_to_save(trained: TrainedModel, folder: Path) -> Mapping[str, torch.Tensor]:
    """The weights of the model in memory, or of its adapter, by their names on disk; on the main process only.

    `folder`: see `gather_trained`.
    """
    gathered = None
    if trained.is_fsdp or trained.is_zero3 or not trained.is_adapter:
        main = trained.is_main_process
        gathered = gather_trained(trained.model, trained.dtypes, is_main_process=main, folder=folder)
        if not main:
            return {}
    return weights_on_disk(trained.writer, trained.model, gathered)


def checkpoint_weights(trained: TrainedModel, checkpoint: Path) -> Mapping[str, torch.Tensor]:
    """The weights of a checkpoint by their names on disk."""
    if trained.is_adapter or trained.writer.wrote(checkpoint):
        return SavedWeights(checkpoint)
    model = load_checkpoint(checkpoint).requires_grad_(False)
    return weights_on_disk(trained.writer, model, None)


def trained_logits(trained: TrainedModel) -> torch.Tensor | None:
    """Logits of the model in memory for a padded batch; None, on all processes, where it takes no such batch."""
    attempt = try_optional(lambda: logits_as_trained(trained), catch_user_errors=True)
    if attempt.error:
        print0(f"No logits to compare: {describe_failure(attempt.error)}")
    return attempt.value


def logits_as_trained(trained: TrainedModel) -> torch.Tensor:
    """`read_logits` of the model in memory, with the attention that a loaded model has."""
    with decoder_attention(trained.model, trained.attention):
        return read_logits(trained, trained.model)


@torch.no_grad()
def read_logits(trained: TrainedModel, model: Any) -> torch.Tensor:
    """Logits of the last tokens of three rows, with and without an image, `[rows, tokens, vocabulary]`, float32.

    `model` runs its stock forward, without labels, as `trained` would. Logits after the end of a row are 0.
    """
    batch = replace(trained.collator, padding_free=False, dummy_image_sample=None).join(trained.dummy_samples())
    lengths = batch["attention_mask"].sum(dim=1)
    kept = torch.cat([torch.arange(max(0, length - LAST_TOKENS), length) for length in lengths.tolist()]).unique()
    inputs = {name: value for name, value in batch.items() if name != "labels"}
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    takes_places = "logits_to_keep" in inspect.signature(type(base).forward).parameters
    if takes_places:
        inputs["logits_to_keep"] = kept
    with answering_mode(model), trained.processes.accelerator.autocast():
        logits = model(**send_to_device(inputs, trained.device)).logits
    logits = (logits if takes_places else logits[:, kept]).float().cpu()
    return logits.masked_fill((kept >= lengths[:, None])[..., None], 0)


def find_loading_fault(
    trained: TrainedModel,
    folder: Path,
    expected: torch.Tensor | None,
    settings: ModelArguments,
    *,
    as_second_adapter: bool,
) -> str:
    """What goes wrong when the saved model is loaded, or how its logits differ from `expected`; "" if nothing does.

    `as_second_adapter`: load the saved adapter into the trained model, whose base is in memory already.
    """
    if as_second_adapter:
        with saved_adapter(trained.model, folder):
            found = logits_as_trained(trained) if expected is not None else None
    elif trained.is_adapter:
        source = replace(settings, model_name_or_path=str(folder))
        loaded = load_answering(source, device=trained.device).model
        found = read_logits(trained, loaded) if expected is not None else None
    else:
        loaded, report = AutoModelForImageTextToText.from_pretrained(
            folder,
            attn_implementation=name_attention(trained.attention),
            trust_remote_code=settings.trust_remote_code,
            output_loading_info=True,
        )
        for problem in ("missing_keys", "unexpected_keys", "mismatched_keys"):
            if report[problem]:
                return f"loading it reports {problem.replace('_', ' ')}, first {min(map(str, report[problem]))}"
        patch_mllama_cross_attention(loaded)
        patch_picture_dtype(loaded)
        found = read_logits(trained, loaded.to(trained.device)) if expected is not None else None
    if found is None or expected is None:
        return ""
    found, expected = without_masked(found), without_masked(expected)
    difference = ((found - expected).norm() / expected.norm()).item()
    if difference <= (HALF_TOLERANCE if trained.computes_in_half else TOLERANCE):
        return ""
    return f"its logits are off by {difference:.3g} of their norm, though its tensors are the same"


@contextmanager
def saved_adapter(model: PeftModel, folder: Path) -> Iterator[None]:
    """Let `model` run with the adapter saved in `folder`, and with its own again afterwards."""
    own, training = model.active_adapter, model.training
    requires_grad = {parameter: parameter.requires_grad for parameter in model.parameters()}
    try:
        model.load_adapter(str(folder), SECOND_ADAPTER, torch_device=str(model.device))
        model.set_adapter(SECOND_ADAPTER)
        yield
    finally:
        model.set_adapter(own)
        if SECOND_ADAPTER in model.peft_config:
            model.delete_adapter(SECOND_ADAPTER)
        for parameter, flag in requires_grad.items():
            parameter.requires_grad_(flag)
        model.train(training)
