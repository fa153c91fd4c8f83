"""Estimate the memory of one GPU of a large run: published model sizes on 1 to 1,024 GPUs, without weights or a GPU.

    python benchmarks/plan.py [--model granite_2b llava_7b llama_11b qwen_72b] [--gpus 1 8 64 512 1024]

The estimate is that of `vlm-tuning check` (`tuning/checking/`): a step runs on the meta device, and every tensor is
counted. The configurations are written here with the published sizes. Weights are not needed, and the tokenizer has
only a few words. A GPU has `ROWS` rows with a picture of 1024×768 pixels, a question of 100 words and an answer of 100
words. A word is a token. All runs use bfloat16 weights, gradient checkpointing and AdamW. `full` trains everything with
float32 master weights, `lora` has rank 16 on all linear layers of the language model, as in examples/models. With more
than one GPU, FSDP2 shards the model over all of them. `flops` is what tuning/model/flops.py counts for the rows.

`gathered_bytes` and `reduced_bytes` are the weights, and the gradients of trained weights, in the dtypes in which they
are computed. FSDP2 shards the first dimension and pads it to a multiple of the GPUs, and sends the padding, too.

docs/plan-a-large-run.md has the tables. docs/generate_plan.py writes them from the results.
"""

import argparse
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import redirect_stdout
from dataclasses import replace
from functools import partial
from io import StringIO
from pathlib import Path
from typing import Any

import numpy as np
from families import SCALES, style_tokenizer
from families import qwen2_5_vl as make_small_qwen
from record import describe_environment, print0, print_line
from workloads import make_config_and_processor, write_rows

ROWS, PICTURE, WORDS = 4, (1024, 768), 100
GPUS = (1, 8, 64, 512, 1024)
COMMON = {"dtype": "bfloat16", "gradient_checkpointing": True, "per_device_train_batch_size": ROWS}
METHODS: dict[str, dict[str, Any]] = {
    "full": {},
    "lora": {"peft_method": "lora", "target_modules": "all-linear", "r": 16, "lora_alpha": 32},
}


def llama_11b() -> tuple[Any, Any]:
    """https://huggingface.co/meta-llama/Llama-3.2-11B-Vision-Instruct/blob/main/config.json

    These are the defaults of transformers but for the size of a tile, which is 560 pixels.
    """
    import transformers
    from architectures.styles import llama3
    from transformers.models.mllama.configuration_mllama import MllamaTextConfig, MllamaVisionConfig

    style = llama3("<|image|>")
    tokenizer = style_tokenizer(style, image_token="<|image|>")
    processor = transformers.MllamaProcessor(
        transformers.MllamaImageProcessor(size={"height": 560, "width": 560}, max_image_tiles=4),
        tokenizer,
        chat_template=style.jinja(),
    )
    ids = {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    config = transformers.MllamaConfig(
        text_config=MllamaTextConfig(**ids),
        vision_config=MllamaVisionConfig(image_size=560),
        image_token_index=tokenizer.convert_tokens_to_ids("<|image|>"),
    )
    return config, processor


def qwen_72b() -> tuple[Any, Any]:
    """Qwen2.5-VL 72B. The language model has the defaults of transformers' `Qwen2_5_VLTextConfig`.

    The tower: https://huggingface.co/Qwen/Qwen2.5-VL-72B-Instruct-AWQ/blob/main/config.json
    """
    small, processor = make_small_qwen(SCALES["tests"])
    config: Any = type(small)(
        text_config={"rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [16, 24, 24]}},
        vision_config={"hidden_size": 1280, "intermediate_size": 3456, "out_hidden_size": 8192},
    )
    for name in ("image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id"):
        setattr(config, name, getattr(small, name))
    processor.image_processor.size = {"shortest_edge": 3136, "longest_edge": 12845056}
    return config, processor


MODELS: dict[str, tuple[str, Callable[[], tuple[Any, Any]]]] = {
    "granite_2b": ("Granite Vision 3.2 2B", partial(make_config_and_processor, "granite_vision", "2b")),
    "llava_7b": ("LLaVA-1.5 7B", partial(make_config_and_processor, "llava15", "7b")),
    "llama_11b": ("Llama 3.2 Vision 11B", llama_11b),
    "qwen_72b": ("Qwen2.5-VL 72B", qwen_72b),
}


class Planned:
    """A model of `MODELS` on the meta device, with its rows."""

    def __init__(self, name: str, method: str, folder: Path):
        from tuning.commands.check import open_encoder
        from tuning.config.parse import build_config
        from tuning.data.collator import probe_collator
        from tuning.data.from_config import dummy_batch, open_rows
        from tuning.model import load
        from tuning.model.build import plan_model
        from tuning.training.data_loading import choose_collator

        save_without_weights(name, folder)
        rows = write_rows(folder / "rows.jsonl", [PICTURE] * ROWS, words=[WORDS], answer_words=[WORDS])
        options = {
            "model_name_or_path": str(folder),
            "training_data_path": str(rows),
            "output_dir": str(folder / "run"),
        }
        self.config = build_config({**options, **COMMON, **METHODS[method], "use_cpu": True})
        self.model_config = load.load_config(self.config.model)
        encoder = open_encoder(self.config, self.model_config)
        self.plan = plan_model(self.config, self.model_config, partial(dummy_batch, encoder))
        self.collator = choose_collator(self.config, encoder, probe_collator(encoder.processor))
        source: Any = open_rows(self.config).train
        self.samples = [encoder.encode(row) for row in source]
        self.tokens = np.array([len(sample.sequence["input_ids"]) for sample in self.samples])

    def measure(self, gpus: int) -> dict[str, Any]:
        """The estimate for one of `gpus` GPUs over which FSDP shards the model."""
        from tuning.checking.step_memory import LongestRows, StepMemory
        from tuning.training.optimizer import patch_master_weights

        run = replace(self.config.run, accelerate_launch_args={"num_processes": gpus} if gpus > 1 else {})
        config, started = replace(self.config, run=run), time.monotonic()
        rows = LongestRows(self.tokens, lambda number: self.samples[number])
        memory = StepMemory(config, self.model_config, self.plan, self.collator, [rows], patch_master_weights)
        estimate = memory.estimate(ROWS)
        assert estimate is not None
        parts = {name: getattr(estimate, name) for name in ("weights", "gradients", "optimizer", "activations", "peak")}
        return {**parts, **self.count_work(memory, gpus), "seconds": round(time.monotonic() - started, 1)}

    def count_work(self, memory: Any, gpus: int) -> dict[str, Any]:
        """Parameters, what FSDP2 sends of them, and tokens and operations of a step's rows."""
        from tuning.data.collator import describe_batch
        from tuning.distributed.fsdp import padded_numel
        from tuning.training.utilisation import count_operations

        parameters, info = list(memory.build_skeleton().parameters()), describe_batch(self.samples)
        trained = [parameter for parameter in parameters if parameter.requires_grad]
        return {
            "parameters": sum(parameter.numel() for parameter in parameters),
            "trained": sum(parameter.numel() for parameter in trained),
            "gathered_bytes": sum(padded_numel(parameter, gpus) * parameter.itemsize for parameter in parameters),
            "reduced_bytes": sum(padded_numel(parameter, gpus) * parameter.itemsize for parameter in trained),
            "tokens": info.tokens,
            "flops": count_operations(self.plan.flops, [info]),
        }


def save_without_weights(name: str, folder: Path) -> None:
    """Write the configuration and the processor of a model of `MODELS`."""
    for part in MODELS[name][1]():
        part.save_pretrained(folder)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--method", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--gpus", type=int, nargs="+", default=list(GPUS))
    arguments = parser.parse_args(argv)
    environment = describe_environment()
    for name in arguments.model:
        for method in arguments.method:
            with tempfile.TemporaryDirectory() as folder:
                with redirect_stdout(StringIO()):  # what a run prints about its model
                    planned = Planned(name, method, Path(folder))
                for gpus in arguments.gpus:
                    print0(f"{MODELS[name][0]}, {method}, {gpus} GPUs …")
                    with redirect_stdout(StringIO()):
                        figures = planned.measure(gpus)
                    print_line("plan", environment, model=name, method=method, gpus=gpus, **figures)


if __name__ == "__main__":
    main()
