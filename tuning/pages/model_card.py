"""The model card: `README.md` of a saved model, from what is known of its run."""

import json
import re
from pathlib import Path

from huggingface_hub import CardData, EvalResult, ModelCard, ModelCardData

from tuning.files import CARD_FILE, write_text
from tuning.pages.run_summary import RunSummary

MARK = "<!-- Written by vlm-tuning, and anew by every run into this folder as long as this line is here. -->"
PIPELINE = "image-text-to-text"
NOT_SCORES = ("eval_runtime", "eval_samples_per_second", "eval_steps_per_second", "eval_tokens")


def write_card(facts: RunSummary) -> str:
    """The text of the card: metadata as the Hub reads it, then Markdown.

    Metadata: https://huggingface.co/docs/hub/model-cards#model-card-metadata
    """
    how = "LoRA adapter for" if facts.is_adapter else "fine-tuned from"
    sections = [
        f"---\n{card_metadata(facts).to_yaml()}\n---",
        MARK,
        f"# {facts.name}",
        f"A vision-language model, {how} `{facts.base_model}` with vlm-tuning.",
        describe_use(facts.name, facts.base_model if facts.is_adapter else None),
        _describe_data(facts),
        _describe_parts(facts),
        _table("## Training", ("setting", "value"), _settings(facts)),
        _describe_scores(facts),
        _table("## Versions", ("package", "version"), facts.versions.items()),
        _describe_config(facts),
    ]
    return "\n\n".join(section for section in sections if section) + "\n"


def card_metadata(facts: RunSummary) -> ModelCardData:
    """The head of the card. Names that only this machine knows are no ids of the Hub and left out."""
    licensed = {
        name: facts.base_metadata[name]
        for name in ("license", "license_name", "license_link")
        if facts.base_metadata.get(name)
    }
    return ModelCardData(
        model_name=facts.name,
        base_model=facts.base_model if facts.base_model in facts.on_hub else None,
        library_name="peft" if facts.is_adapter else "transformers",
        pipeline_tag=PIPELINE,
        tags=["vlm-tuning", *(["lora"] if facts.is_adapter else [])],
        datasets=[name for name in facts.datasets if name in facts.on_hub] or None,
        eval_results=_results(facts),
        **licensed,
    )


def _results(facts: RunSummary) -> list[EvalResult] | None:
    """The scores as a model index, which needs a dataset of the Hub."""
    if facts.validation not in facts.on_hub:
        return None
    name = str(facts.validation)
    return [
        EvalResult(
            PIPELINE, dataset_type=name, dataset_name=name, metric_type=metric.removeprefix("eval_"), metric_value=value
        )
        for metric, value in _scores(facts).items()
    ] or None


def describe_use(name: str, base_model: str | None = None) -> str:
    """Code that loads the model called `name` and asks it something; an adapter is put on its `base_model`."""
    loading = f'AutoModelForImageTextToText.from_pretrained("{base_model or name}", dtype="auto")'
    adapter = f'\nmodel = PeftModel.from_pretrained(model, "{name}")' if base_model else ""
    importing = "from peft import PeftModel\n" if base_model else ""
    return f"""\
## Use

```python
{importing}from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor

model = {loading}{adapter}
processor = AutoProcessor.from_pretrained("{name}")
content = [{{"type": "image", "image": Image.open("image.png")}}, {{"type": "text", "text": "What is in the image?"}}]
inputs = processor.apply_chat_template(
    [{{"role": "user", "content": content}}],
    add_generation_prompt=True,
    tokenize=True,
    return_dict=True,
    return_tensors="pt",
).to(model.device, dtype=model.dtype)
tokens = model.generate(**inputs, max_new_tokens=100)
print(processor.decode(tokens[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))
```"""


def _describe_data(facts: RunSummary) -> str:
    rows = "rows as they came" if facts.rows is None else f"{facts.rows:,} rows"
    left_out = f", of which {facts.rows_left_out:,} were left out" if facts.rows_left_out else ""
    answers = "answers only" if facts.options["assistant_only_loss"] else "all text"
    lines = [f"Trained on {rows} of {_quoted(facts.datasets)}{left_out}; the loss is on {answers}."]
    if facts.validation:
        lines.append(f"Evaluated on `{facts.validation}`.")
    return "## Data\n\n" + " ".join(lines)


def _quoted(names: list[str]) -> str:
    return ", ".join(f"`{name}`" for name in names)


def _describe_parts(facts: RunSummary) -> str:
    rows = [(size.part.replace("_", " "), f"{size.parameters:,}", f"{size.trained:,}") for size in facts.parts]
    return _table("## Parameters", ("part", "all", "trained"), rows)


def _settings(facts: RunSummary):
    options = facts.options
    yield "steps", f"{facts.steps:,}"
    yield "epochs", f"{facts.epochs:.3g}"
    accumulated = options["gradient_accumulation_steps"]
    if budget := options.get("max_tokens_per_batch"):
        yield "batch of a step", f"{facts.processes * accumulated} × {budget:,} tokens at most"
    else:
        rows = options["per_device_train_batch_size"] * facts.processes * accumulated
        yield "batch of a step", f"{rows} rows"
    yield "learning rate", f"{options['learning_rate']:g}"
    for part in ("vision_tower", "projector"):
        if (rate := options.get(f"{part}_learning_rate")) is not None:
            yield f"learning rate, {part.replace('_', ' ')}", f"{rate:g}"
    yield "schedule", options["lr_scheduler_type"]
    warmup = options["warmup_steps"]  # below 1 a share of all steps
    yield "warmup", f"{warmup:g} steps" if warmup >= 1 else f"{warmup:.0%} of the steps"
    yield "optimizer", f"{options['optim']}, weight decay {options['weight_decay']:g}"
    mixed = next((f", {kind} mixed precision" for kind in ("bf16", "fp16") if options.get(kind)), "")
    yield "weights", f"{facts.dtype}{mixed}"
    yield "max_seq_length", options["max_seq_length"] or "the model's"
    yield "seed", options["seed"]
    if options.get("quantization"):
        yield "language model while training and scoring", f"{options['quantization']} (bitsandbytes)"
    if facts.is_adapter:
        yield "LoRA", f"r {options['r']}, alpha {options['lora_alpha']}, dropout {options['lora_dropout']:g}"
        targets = options["target_modules"]
        yield "LoRA on", f"`{targets}`" if isinstance(targets, str) else _quoted(targets)


def _scores(facts: RunSummary) -> dict[str, float]:
    """The scores of the last evaluation, or of that of the best step where this is the model that is saved."""
    lines = [line for line in facts.log_history if any(name.startswith("eval_") for name in line)]
    of_best = [line for line in lines if line.get("step") == facts.best_step]
    scores: dict[str, float] = {}
    for line in of_best or lines:
        named = {name: value for name, value in line.items() if name.startswith("eval_") and name not in NOT_SCORES}
        scores |= {name: value for name, value in named.items() if isinstance(value, (int, float))}
    return scores


def _describe_scores(facts: RunSummary) -> str:
    losses = [line["loss"] for line in facts.log_history if "loss" in line]
    figures = {"loss at the end of training": losses[-1]} if losses else {}
    rows = [(name, f"{value:.4g}") for name, value in (figures | _scores(facts)).items()]
    return _table("## Scores", ("score", "value"), rows) if rows else ""


def _describe_config(facts: RunSummary) -> str:
    options = json.dumps(facts.options, indent=2, default=str, ensure_ascii=False)
    folded = f"<details><summary>Every option of the run</summary>\n\n```json\n{options}\n```\n\n</details>"
    return f"## How it was made\n\n{folded}"


def _table(heading: str, columns: tuple[str, ...], rows) -> str:
    cells = [columns, ["---"] * len(columns), *rows]
    lines = ["| " + " | ".join(str(cell).replace("|", "\\|") for cell in row) + " |" for row in cells]
    return "\n".join([heading, "", *lines])


def put_card(text: str, saved: Path, target: Path) -> None:
    """Put a card beside a model just `saved`, which then goes to `target`. A card of the user's stays there."""
    if is_ours(target / CARD_FILE):
        write_text(saved / CARD_FILE, text)
    else:
        (saved / CARD_FILE).unlink(missing_ok=True)  # PEFT's


def is_ours(card: Path) -> bool:
    """Whether the card may be overwritten: it is not there, or has the line that we write into ours."""
    return not card.exists() or MARK in card.read_text(encoding="utf-8", errors="replace")


def merge_card(card: str, name: str) -> str:
    """The card of an adapter → that of the model called `name`, into which the adapter was merged."""
    head = ModelCard(card).data.to_dict() | {"library_name": "transformers"}
    before, _, rest = card.partition("\n## Use\n")
    opening = re.sub(r"^# .*", lambda _: f"# {name}", before.partition("\n---\n")[2], count=1, flags=re.MULTILINE)
    text = opening + "\n" + describe_use(name) + "\n\n## " + rest.partition("\n## ")[2]
    return f"---\n{CardData(**head).to_yaml()}\n---\n{text.replace('LoRA adapter for', 'a LoRA adapter merged into')}"
