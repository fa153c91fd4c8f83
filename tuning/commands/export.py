"""`vlm-tuning export`: an adapter → a model that engines load, or an adapter under the names that they look for."""

import gc
import itertools
import shutil
import sys
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedConfig

from tuning.config.options import ModelSource, RowArguments, option
from tuning.config.parse import describe_command, read_command
from tuning.console import print0
from tuning.data.collator import probe_collator
from tuning.data.dummy_samples import dummy_samples
from tuning.data.from_config import make_encoder, open_path
from tuning.errors import RunEnded, UserError
from tuning.exit_codes import EXIT_INTERNAL_ERROR, exit_code_of
from tuning.export.merge import Merge, adapt_skeleton, plan_merge
from tuning.export.merged_model import (
    TOLERANCES,
    Comparison,
    compare_layouts,
    compare_logits,
    copy_files,
    count_bytes,
    last_logits,
    prove_weights,
    stored_dtype,
    write_weights,
)
from tuning.export.safetensors_files import find_folder, find_places, read_checkpoint
from tuning.export.vllm import Serving, plan_transformers, plan_vllm, write_renamed
from tuning.files import CARD_FILE, CONFIG_FILE, read_json, write_text
from tuning.hub import NOT_OF_THE_MODEL, HubRepo
from tuning.machine import check_space, free_memory
from tuning.model import load
from tuning.model.attention import choose_attention
from tuning.model.lora import Adapter, add_adapter, find_adapter, has_processor, load_base_config
from tuning.model.mllama import patch_mllama_cross_attention
from tuning.pages.model_card import is_ours, merge_card
from tuning.training.checkpoint_files import commit_checkpoint

USAGE = "vlm-tuning export --adapter DIR --output DIR | config.json"
ROWS = 4
NOTICEABLE = 0.05


@dataclass(frozen=True)
class ExportArguments:
    adapter: str = option("", "The adapter: the folder that training wrote, or a hub id.")
    output: str | None = option(None, "Folder to write; it must not exist yet.")
    base: str | None = option(None, "The base model, a folder or hub id (default: the one that the adapter names).")
    dtype: str = option(
        "auto", "Precision of the written weights: auto (the base's own), float32, bfloat16 or float16."
    )
    target: str | None = option(None, "Do not merge: check the adapter itself for vllm or transformers.")
    data_path: str | None = option(None, "Rows to compare the merged model with base and adapter on (the first four).")
    trust_remote_code: bool = option(False, "Run Python code that comes with the checkpoint.")
    push_to_hub: str | None = option(None, "Upload the written folder to this repository of the Hub, too.")


def export(options: ExportArguments, rows: RowArguments) -> None:
    """Merge, or check for an engine. Raises `UserError`, or `RunEnded` where the merged model is not right."""
    adapter = find_adapter(options.adapter, options.base)
    if adapter is None:
        raise UserError(where=f"adapter {options.adapter}", problem="is no adapter: it has no adapter_config.json.")
    source = ModelSource(adapter.base, trust_remote_code=options.trust_remote_code, use_flash_attn=False)
    base, config, processor = load_base_config(source, adapter)
    repository = HubRepo(options.push_to_hub) if options.push_to_hub else None
    if repository:
        repository.open()
    if options.target:
        serve(options, config, adapter, processor, repository)
        return
    assert options.output is not None
    output, dtype = Path(options.output).expanduser(), None
    if options.dtype != "auto":
        dtype = getattr(torch, options.dtype)
    with written_beside(output) as folder:
        merge = plan_merge(read_checkpoint(find_folder(adapter.base)), config, adapter)
        say_merge(merge, adapter)
        check_space(output, count_bytes(merge, dtype))
        write_weights(merge, folder, dtype)
        copy_files(merge, folder, config, dtype, without=NOT_OF_THE_MODEL)
        processor.save_pretrained(folder)
        write_card(adapter, folder, options.push_to_hub or output.name)
        prove(merge, folder, dtype)
        compare(Models(base, config, processor, adapter, folder), merge, dtype, options, rows)
    print0(f"Done: {output} is a model of its own.")
    if repository:
        repository.upload_folder(output)


@contextmanager
def written_beside(output: Path) -> Iterator[Path]:
    """A folder beside `output` that takes its name at the end, and is gone if there is no good end."""
    if output.exists():
        raise UserError(where=f"output {output}", problem="is there already.", fix="Give a folder that does not exist.")
    folder = output.with_name(f".{output.name}.partial")
    try:
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        yield folder
        commit_checkpoint(folder, output)
    except OSError as error:
        raise UserError(where=f"output {output}", problem=f"cannot be written: {error.strerror or error}.") from error
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def say_merge(merge: Merge, adapter: Adapter) -> None:
    entries = [entry for shard in merge.shards.values() for entry in shard.values()]
    changed = sum(entry.change is not None for entry in entries)
    print0(f"{adapter.folder} changes {changed} of {len(entries)} tensors of {adapter.base}.")
    if merge.untied:
        print0(
            f"{' and '.join(merge.untied)} are one in the base model and two in the merged one: the adapter parts them."
        )
    if (read_json(adapter.folder / CONFIG_FILE) or {}).get("quantization"):
        print0(
            "The adapter was trained on quantised weights; it is merged into the base model's own, unquantised ones."
        )


def write_card(adapter: Adapter, folder: Path, name: str) -> None:
    """Give the merged model the card that training wrote for its adapter, with what is different now."""
    card = adapter.folder / CARD_FILE
    if card.is_file() and is_ours(card):
        write_text(folder / CARD_FILE, merge_card(card.read_text(encoding="utf-8"), name))


def prove(merge: Merge, folder: Path, dtype: torch.dtype | None) -> None:
    """Read back every file and tensor. Raises `RunEnded` naming the worst."""
    written = read_checkpoint(folder)
    if problems := compare_layouts(merge, written, dtype):
        raise failed(f"{problems[0]} ({len(problems)} differences from the base checkpoint).")
    proof = prove_weights(merge, written, dtype)
    if proof.faults:
        raise failed(f"{proof.worst} ({len(proof.faults)} faults).")
    print0(f"Weights: keys, shapes and formats are the base checkpoint's; {proof.layers} merged layers are as adapted.")
    if proof.lost_share > NOTICEABLE:
        print0(
            f"Rounding takes away {proof.lost_share:.0%} of what the adapter adds: its changes are smaller than the"
            " steps of this precision. --dtype float32 keeps them."
        )


def failed(what: str) -> RunEnded:
    return RunEnded(f"The merged model is not base and adapter: {what} Nothing was kept.", EXIT_INTERNAL_ERROR)


@dataclass(frozen=True)
class Models:
    """What is compared: the base as it is loaded, its adapter, and the merged folder."""

    base: ModelSource
    config: PreTrainedConfig
    processor: Any
    adapter: Adapter
    folder: Path


def compare(
    models: Models, merge: Merge, dtype: torch.dtype | None, options: ExportArguments, rows: RowArguments
) -> None:
    """Load the merged folder as a user would and hold its logits against those of base and adapter, in float32.

    Where the model does not fit in memory, the proof of every layer must do; that is said.
    """
    entries = [entry for shard in merge.shards.values() for entry in shard.values()]
    needed = int(1.2 * sum(4 * torch.Size(entry.source.shape).numel() for entry in entries))
    if needed > (free := free_memory()):
        print0(
            f"Logits were not compared: the model in float32 needs {needed / 1e9:.0f} GB of memory and"
            f" {free / 1e9:.0f} GB are free. Each merged layer was compared on its own."
        )
        return
    batches = sample_batches(models, options, rows)
    wanted = run_model(models, models.base, models.adapter, batches)
    own = replace(models.base, model_name_or_path=str(models.folder))
    found = run_model(models, own, None, batches)
    result = compare_logits(wanted, found)
    tolerance = max(TOLERANCES[stored_dtype(entry, dtype)] for entry in entries if entry.change is not None)
    print0(describe(result, len(batches)))
    if not result.difference <= tolerance:
        raise failed(f"its logits differ by {result.difference:.2%} of the largest.")


def sample_batches(models: Models, options: ExportArguments, rows: RowArguments) -> list[dict[str, Any]]:
    """The user's first rows, or built-in ones with and without an image, a batch each."""
    encoder = make_encoder(rows, models.processor, models.config, rows.run_date)
    samples = dummy_samples(encoder)
    if options.data_path:
        source = open_path(rows, options.data_path, rows.dataset_split)
        samples = [encoder.encode(row) for row in itertools.islice(source, ROWS)]
    batches = [probe_collator(encoder.processor).join([sample]) for sample in samples]
    return [{name: value for name, value in batch.items() if name != "labels"} for batch in batches]


def run_model(
    models: Models, source: ModelSource, adapter: Adapter | None, batches: list[dict[str, Any]]
) -> list[torch.Tensor]:
    """Logits of a model that is loaded for it and gone afterwards."""
    config = models.config if adapter else load.load_config(source)
    kind = load.model_class(config)
    attention = choose_attention(
        kind, use_flash_attn=False, attn_implementation=None, dtype=torch.float32, device_type="cpu"
    )
    model = load.load_model(source, config, dtype=torch.float32, attention=attention.loaded)
    patch_mllama_cross_attention(model)
    logits = last_logits((add_adapter(model, adapter) if adapter else model).eval(), batches)
    del model
    gc.collect()
    return logits


def describe(result: Comparison, rows: int) -> str:
    agreeing = "all" if result.agreeing == result.positions else f"{result.agreeing} of"
    return (
        f"Logits on {rows} rows: the largest difference is {result.difference:.1e} of the largest logit;"
        f" {agreeing} {result.positions} first choices agree."
    )


def serve(
    options: ExportArguments, config: PreTrainedConfig, adapter: Adapter, processor: Any, repository: HubRepo | None
) -> None:
    """Check the adapter itself for an engine, and write it for that engine where `output` is given."""
    adapted = adapt_skeleton(load.build_skeleton(config), adapter)
    if options.target == "vllm":
        keys = read_checkpoint(find_folder(adapter.base)).tensors
        serving = plan_vllm(adapted, find_places(load.build_skeleton(config), keys))
    else:
        serving = plan_transformers(load.build_skeleton(config), adapter, adapted)
    for note in serving.notes:
        print0(note)
    if serving.obstacles:
        raise UserError(
            where=str(adapter.folder),
            problem="\n  - ".join([f"{options.target} would not load all of this adapter:", *serving.obstacles]) + "\n",
            fix=f"Merge it instead: vlm-tuning export --adapter {options.adapter} --output DIR",
        )
    if options.output:
        output = Path(options.output).expanduser()
        with written_beside(output) as folder:
            write_renamed(adapted, serving, adapter, folder)
            if has_processor(adapter.folder):
                processor.save_pretrained(folder)
        print0(f"Done: {output} is the adapter with {len(serving.renamed)} modules renamed.")
        if repository:
            repository.upload_folder(output)
    elif serving.renamed:
        name, wanted = next(iter(serving.renamed.items()))
        raise UserError(
            where=str(adapter.folder),
            problem=(
                f"{len(serving.renamed)} modules have another name in {options.target}, such as {wanted} for {name}."
            ),
            fix="Add --output DIR to write the adapter under those names.",
        )
    print0(how_to_serve(options, serving, adapter))


def how_to_serve(options: ExportArguments, serving: Serving, adapter: Adapter) -> str:
    folder = options.output or str(adapter.folder)
    if options.target == "transformers":
        return f'transformers loads it: PeftModel.from_pretrained(model, "{folder}")'
    extra = "".join(f" {one}" for one in serving.options)
    return f"vLLM loads it: vllm serve {adapter.base} --enable-lora{extra} --lora-modules tuned={folder}"


def run(argv: Sequence[str]) -> None:
    options, rows = read_command(argv, ExportArguments, RowArguments, required=["adapter"])
    if options.target not in (None, "vllm", "transformers"):
        raise UserError(where="config", problem=f"target: {options.target!r} is unknown; use vllm or transformers")
    if not options.target and not options.output:
        raise UserError(where="config", problem="output: is required")
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Model has `tie_word_embeddings=True`")  # said in our own words
        warnings.filterwarnings("ignore", message="Setting `save_embedding_layers`")
        export(options, rows)


def main(argv: Sequence[str] | None = None) -> int:
    """The command: returns its exit code."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    if any(argument in ("-h", "--help") for argument in arguments):
        print(describe_command(USAGE, ExportArguments, RowArguments))
        return 0
    return exit_code_of(lambda: run(arguments))


if __name__ == "__main__":
    sys.exit(main())
