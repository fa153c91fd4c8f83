"""Write docs/options.md from the options themselves.

python docs/generate_options.py            write the page
python docs/generate_options.py --check    exit with 1 if the page is not current
"""

import tuning  # noqa: F401 - before transformers imports torchvision  # isort: skip
import dataclasses
import sys
from pathlib import Path
from typing import Any

from transformers import TrainingArguments

from tuning.config.describe import describe_all_options
from tuning.config.options import SECTIONS, TRAINING_DEFAULTS

PAGE = Path(__file__).with_name("options.md")
COMMAND = "make docs"

# Section of the config → its heading, and the page that explains its options.
HEADINGS = {
    "model": ("Model", "[train.md](train.md), [speed-and-memory.md](speed-and-memory.md)"),
    "lora": ("LoRA", "[lora.md](lora.md)"),
    "data": ("Data", "[data.md](data.md), [batches.md](batches.md)"),
    "answers": ("Answers during training", "[evaluate.md](evaluate.md)"),
    "run": ("The run", "[resume.md](resume.md), [distributed.md](distributed.md)"),
    "check": ("Only for `vlm-tuning check`", "[check.md](check.md)"),
}

# Hugging Face's options with another default here → why.
REASONS = {
    "logging_steps": "500 hides the loss curve of most fine-tunings",
    "remove_unused_columns": "always false: data workers encode the rows and need all columns",
    "dataloader_persistent_workers": "workers do not start again every epoch",
    "report_to": "nothing is sent to a tracker unless you ask for it",
    "ddp_find_unused_parameters": "what gets no gradient is frozen, and every batch has an image",
    "ddp_broadcast_buffers": "buffers never change",
    "logging_nan_inf_filter": "a loss that is NaN or infinite ends the run, so there is nothing to hide",
}
DEPENDS = {
    "dataloader_num_workers": ("half of the cores, 8 at most", "the other half computes, or feeds the accelerator"),
    "eval_strategy": ("`epoch`, if you give validation data", "otherwise your validation data would have no effect"),
}

# Hugging Face's options that a run refuses: a value that it refuses, and why.
REFUSED = {
    "auto_find_batch_size": (True, "a process without memory would start again alone, with the same rows"),
    "average_tokens_across_devices": (False, "several processes would train another model than one"),
    "label_smoothing_factor": (0.1, "the loss is computed on supervised positions only"),
    "save_on_each_node": (True, "checkpoints are written once, to an `output_dir` that all machines share"),
    "use_liger_kernel": (True, "the loss is computed on supervised positions only"),
}


def show(value: Any) -> str:
    """A default as you write it in JSON; nothing for an option that has none."""
    if value is None or value == "":
        return ""
    return f"`{str(value).lower() if isinstance(value, bool) else value}`"


def option_table(section: str) -> list[str]:
    """The options of a section: name, type or choices, default, help."""
    lines = ["| option | value | default | what it does |", "| --- | --- | --- | --- |"]
    for option in describe_all_options():
        if option.section == section:
            value = ", ".join(map(show, option.choices)) or option.type
            what = option.help.replace("|", "\\|")
            lines.append(f"| `{option.name}` | {value} | {show(option.default)} | {what} |")
    return lines


def training_table() -> list[str]:
    """Hugging Face's options whose defaults differ here."""
    theirs = {entry.name: entry.default for entry in dataclasses.fields(TrainingArguments)}
    lines = ["| option | default here | Hugging Face's | why |", "| --- | --- | --- | --- |"]
    for name, default in TRAINING_DEFAULTS.items():
        if default != theirs[name]:
            lines.append(f"| `{name}` | {show(default)} | {show(theirs[name])} | {REASONS[name]} |")
    for name, (default, why) in DEPENDS.items():
        lines.append(f"| `{name}` | {default} | {show(theirs[name])} | {why} |")
    return lines


def render() -> str:
    lines = [
        "# All options",
        "",
        f"<!-- Written by docs/generate_options.py. Do not edit: change the options and run `{COMMAND}`. -->",
        "",
        "You give an option as a flag (`--learning_rate 1e-4`) or as a key of a JSON file. Flags override the file.",
        "`vlm-tuning check` takes the same options as `vlm-tuning train`. The other commands have their own, which",
        "`vlm-tuning COMMAND --help` lists.",
        "",
    ]
    for section in SECTIONS:
        heading, pages = HEADINGS[section]
        lines += [f"## {heading}", "", f"See {pages}.", "", *option_table(section), ""]
    lines += [
        "## Hugging Face's options",
        "",
        "You can use the options of",
        "[`TrainingArguments`](https://huggingface.co/docs/transformers/main_classes/trainer#transformers.TrainingArguments).",
        "They keep their names and meaning. These have another default here:",
        "",
        *training_table(),
        "",
        "A run refuses these:",
        "",
        "| option | refused | why |",
        "| --- | --- | --- |",
        *(
            f"| `{name}` | {'above 0' if isinstance(value, float) else show(value)} | {why} |"
            for name, (value, why) in REFUSED.items()
        ),
    ]
    return "\n".join(lines) + "\n"


def main() -> int:
    if "--check" in sys.argv[1:]:
        current = PAGE.is_file() and PAGE.read_text(encoding="utf-8") == render()
        print("docs/options.md is current." if current else f"docs/options.md is not current. Run: {COMMAND}")
        return 0 if current else 1
    PAGE.write_text(render(), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
