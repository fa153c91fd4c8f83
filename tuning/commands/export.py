"""`vlm-tuning export`: merge an adapter into a model that engines load, or check the adapter for one engine."""

import itertools
import shlex
import shutil
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from tuning.config.options import DTYPES, ModelSource, RowArguments, option
from tuning.console import print0
from tuning.data.collator import probe_collator
from tuning.data.dummy_samples import dummy_image_sample, dummy_samples
from tuning.data.from_config import make_encoder, open_path
from tuning.data.processing import find_added_start
from tuning.errors import RunEnded, UserError, try_optional, writing
from tuning.exit_codes import EXIT_INTERNAL_ERROR
from tuning.export.base_files import TEMPLATE_FILE, BaseFiles, read_base_files
from tuning.export.merge import AdaptedSkeleton, Merge, adapt_skeleton, plan_merge
from tuning.export.merged_model import write_weights
from tuning.export.proof import Comparison, WeightProof, compare_logits, memory_for_logits
from tuning.export.vllm import Serving, plan_transformers, plan_vllm, write_renamed
from tuning.files import CARD_FILE, CONFIG_FILE, read_json, write_text
from tuning.hub import HubRepo
from tuning.machine import check_space, free_memory
from tuning.model.load import find_template, load_processor, read_tokens
from tuning.model.lora import Adapter, BaseModel, find_adapter, has_processor, load_base
from tuning.model.saved_weights import open_weights
from tuning.pages.model_card import is_ours, merge_card
from tuning.training.checkpoint_files import commit_checkpoint

ROWS = 4
NOTICEABLE_LOSS = 0.05


@dataclass(frozen=True)
class ExportArguments:
    adapter: str = option("", "The adapter: the folder that training wrote, or a hub id.", required=True)
    output: str | None = option(None, "Folder to write; it must not exist yet.")
    base: str | None = option(None, "The base model, a folder or hub id (default: the one that the adapter names).")
    dtype: str = option("auto", "Precision of the written weights; auto: as the base stores them.", choices=DTYPES)
    target: str | None = option(
        None, "Do not merge; check whether this engine loads the adapter itself.", choices=("vllm", "transformers")
    )
    data_path: str | None = option(None, "Rows to compare the merged model with base and adapter on (the first four).")
    trust_remote_code: bool = option(False, "Run Python code that comes with the checkpoint.")
    push_to_hub: str | None = option(None, "Upload the written folder to this repository of the Hub, too.")


@dataclass(frozen=True)
class ExportOptions(RowArguments, ExportArguments):
    """All options of the command."""


OPTIONS = ExportOptions


def export(options: ExportOptions) -> None:
    """Merge, or check for an engine. Raises `UserError`, or `RunEnded` if the merged model is wrong."""
    adapter = find_adapter(options.adapter, options.base)
    if adapter is None:
        raise UserError(
            where=f"adapter {options.adapter}",
            problem="there is no adapter: adapter_config.json is missing.",
            fix="Give the folder that training wrote, or a hub id.",
        )
    source = ModelSource(adapter.base, trust_remote_code=options.trust_remote_code, use_flash_attn=False)
    base = load_base(source, adapter)
    repository = HubRepo(options.push_to_hub) if options.push_to_hub else None
    if repository:
        repository.open()
    adapted = adapt_skeleton(base.config, adapter)
    if options.target:
        serve(options, base, adapted)
    else:
        write_merged(options, base, adapted)
    if repository and options.output:
        repository.upload_folder(Path(options.output).expanduser())


def write_merged(options: ExportOptions, base: BaseModel, adapted: AdaptedSkeleton) -> None:
    """Write the merged model to `output`, and prove it before it gets that name."""
    assert options.output is not None
    output, adapter = Path(options.output).expanduser(), adapted.adapter
    dtype = None if options.dtype == "auto" else options.dtype
    files = files_of(base)
    with partial_folder(output) as folder:
        merge = plan_merge(open_weights(adapter.base), adapted, dtype and getattr(torch, dtype))
        print_plan(merge, adapter)
        check_space(output, sum(entry.nbytes for entry in merge.entries))
        with writing(f"output {output}"):
            proof = write_weights(merge, folder)
            files.write(folder, for_adapter=False)
            files.write_config(folder, base.config, dtype, untied=bool(merge.untied))
            write_card(adapter, folder, options.push_to_hub or output.name)
        proof.read_back(merge, folder)
        report_weights(proof)
        if has_memory_for_logits(merge):
            batches = sample_batches(options, base)
            report_logits(compare_logits(merge, folder, base, adapter, batches), len(batches))
    print_start(base.processor)
    print0(f"Done: {output} is a complete model.")


@contextmanager
def partial_folder(output: Path) -> Iterator[Path]:
    """A folder next to `output` that gets its name at the end. After an error or an interrupt it is deleted."""
    if output.exists():
        raise UserError(
            where=f"output {output}", problem="it exists already.", fix="Give a folder that does not exist."
        )
    folder = output.with_name(f".{output.name}.partial")
    try:
        with writing(f"output {output}"):
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir(parents=True)
        yield folder
        with writing(f"output {output}"):
            commit_checkpoint(folder, output)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def files_of(base: BaseModel) -> BaseFiles:
    """The base's files beside its weights, edited for the processor to save."""
    source = base.source
    return read_base_files(source.model_name_or_path, base.processor, trust_remote_code=source.trust_remote_code)


def print_plan(merge: Merge, adapter: Adapter) -> None:
    changed = sum(entry.change is not None for entry in merge.entries)
    print0(f"{adapter.folder} changes {changed} of {len(merge.entries)} tensors of {adapter.base}.")
    if merge.untied:
        print0(
            f"{' and '.join(merge.untied)} are tied in the base model. The adapter makes them differ: both are stored."
        )
    if (read_json(adapter.folder / CONFIG_FILE) or {}).get("quantization"):
        print0("The adapter was trained on quantised weights. It is merged into the base model's unquantised ones.")


def write_card(adapter: Adapter, folder: Path, name: str) -> None:
    """Give the merged model the card that training wrote for its adapter, adapted to the merge."""
    card = adapter.folder / CARD_FILE
    if card.is_file() and is_ours(card):
        write_text(folder / CARD_FILE, merge_card(card.read_text(encoding="utf-8"), name))


def report_weights(proof: WeightProof) -> None:
    """Print what the proof found. Raises `RunEnded` where a tensor is wrong."""
    if proof.faults:
        raise wrong_model(f"{proof.faults[0]} ({len(proof.faults)} faults).")
    print0(
        f"Weights: keys, shapes and formats are those of the base. {proof.layers} merged layers give the right output."
    )
    if proof.lost_share > NOTICEABLE_LOSS:
        print0(
            f"Rounding loses {proof.lost_share:.0%} of what the adapter adds: its changes are smaller than the steps of"
            " this precision. --dtype float32 keeps them."
        )


def wrong_model(fault: str) -> RunEnded:
    return RunEnded(f"The merged model differs from base and adapter: {fault} Nothing was kept.", EXIT_INTERNAL_ERROR)


def has_memory_for_logits(merge: Merge) -> bool:
    """Whether the model fits in memory in float32. If not, a line says that the logits are not compared."""
    needed, free = memory_for_logits(merge), free_memory()
    if needed > free:
        print0(
            f"Logits were not compared: the model in float32 needs {needed / 1e9:.0f} GB of memory and"
            f" {free / 1e9:.0f} GB are free. Each merged layer was compared on its own."
        )
    return needed <= free


def report_logits(result: Comparison, rows: int) -> None:
    """Print how the logits of the merged model compare. Raises `RunEnded` where they are wrong."""
    agreeing = "all" if result.agreeing == result.positions else f"{result.agreeing} of"
    print0(
        f"Logits on {rows} rows: the largest difference is {result.difference:.1e} of the largest logit;"
        f" {agreeing} {result.positions} first choices agree."
    )
    if not result.difference <= result.tolerance:  # also where it is NaN
        raise wrong_model(f"its logits differ by {result.difference:.2%} of the largest.")


def print_start(processor: Any) -> None:
    """Print what to send to a server, where the chat template does not write the first token of a prompt."""
    question = [{"role": "user", "content": [{"type": "text", "text": "?"}]}]
    prompt = try_optional(lambda: processor.apply_chat_template(question, add_generation_prompt=True)).value
    if prompt is not None and (start := find_added_start(processor.tokenizer, prompt)):
        print0(
            f"In training every prompt begins with {start}, which the chat template does not write. vLLM adds it to a"
            ' chat where the request has "add_special_tokens": true.'
        )


def sample_batches(options: ExportOptions, base: BaseModel) -> list[dict[str, Any]]:
    """The user's first rows, or built-in ones with and without an image, one row per batch."""
    tokens = read_tokens(base.source, base.processor, base.config)
    encoder = make_encoder(options, base.processor, base.config, options.run_date, tokens=tokens)
    if options.data_path:
        source = open_path(options, options.data_path, options.dataset_split)
        samples = [encoder.encode(row) for row in itertools.islice(source, ROWS)]
    else:  # some processors take no row without an image
        samples = try_optional(lambda: dummy_samples(encoder)).value or [dummy_image_sample(encoder)]
    batches = [probe_collator(encoder.processor).join([sample]) for sample in samples]
    return [{name: value for name, value in batch.items() if name != "labels"} for batch in batches]


def serve(options: ExportOptions, base: BaseModel, adapted: AdaptedSkeleton) -> None:
    """Check the adapter itself for an engine. With `output`, write it under the names that the engine looks for."""
    engine, adapter = options.target, adapted.adapter
    if engine == "vllm":
        serving = plan_vllm(adapted, open_weights(adapter.base))
    else:
        serving = plan_transformers(adapted, base.config)
    for note in serving.notes:
        print0(note)
    if serving.obstacles:
        raise UserError(
            where=str(adapter.folder),
            problem="\n  - ".join([f"{engine} would not load all of this adapter:", *serving.obstacles]) + "\n",
            fix=f"Merge it instead: vlm-tuning export --adapter {options.adapter} --output DIR",
        )
    if options.output:
        output, files = Path(options.output).expanduser(), files_of(base) if has_processor(adapter.folder) else None
        with partial_folder(output) as folder, writing(f"output {output}"):
            write_renamed(adapted, serving, folder)
            if files:
                files.write(folder, for_adapter=True)
        print0(f"Done: {output} is the adapter with {len(serving.renamed)} modules renamed.")
    elif serving.renamed:
        name, new_name = next(iter(serving.renamed.items()))
        raise UserError(
            where=str(adapter.folder),
            problem=f"{len(serving.renamed)} modules have another name in {engine}, such as {new_name} for {name}.",
            fix="Add --output DIR to write the adapter under those names.",
        )
    if engine == "vllm":
        print_start(base.processor)
        serving.options += template_option(base, Path(options.output or adapter.folder).expanduser())
    print0(how_to_serve(options, serving, adapter))


def how_to_serve(options: ExportOptions, serving: Serving, adapter: Adapter) -> str:
    folder = options.output or str(adapter.folder)
    if options.target == "transformers":
        return f'transformers loads it: PeftModel.from_pretrained(model, "{folder}")'
    flags = "".join(f" {one}" for one in serving.options)
    return f"vLLM loads it: vllm serve {adapter.base} --enable-lora{flags} --lora-modules tuned={folder}"


def template_option(base: BaseModel, folder: Path) -> list[str]:
    """The option that has vLLM take the chat template of the adapter in `folder`, where its base has another one.

    vLLM reads that of the model that it serves, which is the base.
    """
    own, published = find_template(base.processor), find_template(load_processor(base.source, base.config))
    if isinstance(published, dict):
        published = published.get("default")
    if own is None or own == published:
        return []
    if not (folder / TEMPLATE_FILE).is_file():
        print0("vLLM needs the adapter's chat template in a file of its own: --output DIR writes it.")
        return []
    return [f"--chat-template {shlex.quote(str(folder / TEMPLATE_FILE))}"]


def run(options: ExportOptions) -> None:
    if not options.target and not options.output:
        raise UserError(where="config", problem="output: is required")
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Model has `tie_word_embeddings=True`")  # print_plan reports it
        warnings.filterwarnings("ignore", message="Setting `save_embedding_layers`")
        export(options)
