"""docs/models.md: what trains, how batches are joined and what vLLM serves, for every architecture.

Each row comes from runs of a tiny checkpoint. `test_runs.py` compares the page with its runs.
"""

import contextlib
import io
import re
import tempfile
from collections.abc import Callable
from dataclasses import astuple, dataclass
from pathlib import Path

from architectures.case import Case
from architectures.names import TITLES
from architectures.registry import ARCHS, NOT_CHAT

import tuning
from tuning.errors import RunEnded, UserError, first_line

PAGE = Path(__file__).resolve().parents[2] / "docs" / "models.md"
YES = "yes"
LORA = {"peft_method": "lora", "target_modules": "all-linear", "lora_dropout": 0.0}
HEAD = """# Choose a model

```bash
vlm-tuning train config.json --model_name_or_path ibm-granite/granite-vision-3.2-2b
```

You can train the image-text-to-text models of `transformers` that have a chat template. This page lists all of them,
and why a few cannot be trained. `python docs/generate_models.py` writes it: a tiny checkpoint of each architecture is
trained in full, with LoRA on all linear layers, and with LoRA on 4-bit weights. `tests/architectures/` proves more of
each: the supervised tokens are the answers, the loss is that of the stock forward in float64, a row in a batch is as
it is alone, saved models and adapters read back. [examples/models](../examples/models/README.md) has a config for the
families people tune most.

- **Batches**: padding-free, or why they are padded. Some layers run row by row. See [batches.md](batches.md).
- **Pictures**: how many a row may have, and whether it needs one.
- **vLLM 0.32**: what it serves, read from its source. "no" means that it has no code for this model.

| People call it | Architecture | Full | LoRA | QLoRA | Batches | Pictures | vLLM 0.32 |
| --- | --- | --- | --- | --- | --- | --- | --- |
"""
TAIL = """
## What is not here

These names of the mapping are no chat models:

"""


@dataclass(frozen=True)
class Line:
    """A row of the page. `full`, `lora` and `qlora` are `YES`, or why not. `batches`: padding-free, or why padded."""

    title: str
    name: str
    full: str
    lora: str
    qlora: str
    batches: str
    pictures: str
    vllm: str


def describe_batches(printed: str) -> str:
    """How batches were joined, from what a run printed; without the difference that it measured."""
    found = re.findall(r"^Batches are (padding-free.*|padded to their longest row: .*?)(?:, by .*)?\.$", printed, re.M)
    short = found[-1].replace(" to their longest row", "") if found else ""
    return re.sub(r", and \d+ layers? runs? row by row", ", layers row by row", short)


def describe_pictures(case: Case) -> str:
    limit = "one" if case.family.single else "any number"
    return limit if not case.family.needs_image else f"{limit}, at least one"


def try_run(run: Callable[[], object]) -> tuple[str, str]:
    """Whether it trains, or why not, and what it printed."""
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(io.StringIO()):
        try:
            run()
        except (UserError, RunEnded) as error:
            return first_line(error).rstrip("."), printed.getvalue()
    return YES, printed.getvalue()


def measure(name: str) -> Line:
    with tempfile.TemporaryDirectory() as folder:
        case = Case.make(name, Path(folder))
        kinds = {"full": {}, "lora": LORA, "qlora": {**LORA, "quantization": "4bit"}}
        runs = {
            kind: try_run(lambda: tuning.train(case.options(output_dir=f"{folder}/{kind}", **changes)))  # noqa: B023
            for kind, changes in kinds.items()
        }
        outcomes = {kind: outcome for kind, (outcome, _) in runs.items()}
        title, vllm = TITLES[name]
        batches = describe_batches("".join(printed for _, printed in runs.values()))
        return Line(title, f"`{name}`", **outcomes, batches=batches, pictures=describe_pictures(case), vllm=vllm)


def read_page() -> dict[str, Line]:
    """The rows of the page by the name of their architecture."""
    rows = re.findall(r"^\| (.*) \|$", PAGE.read_text(), re.M) if PAGE.exists() else []
    lines = [Line(*cells) for cells in (row.split(" | ") for row in rows) if cells[1].startswith("`")]
    return {line.name.strip("`"): line for line in lines}


def write_page(lines: dict[str, Line]) -> None:
    known = sorted((line for name, line in lines.items() if name in ARCHS), key=lambda line: line.title.lower())
    rows = [f"| {' | '.join(astuple(line))} |" for line in known]
    others = [f"- `{name}`: {reason}" for name, reason in sorted(NOT_CHAT.items())]
    PAGE.write_text(HEAD + "\n".join(rows) + "\n" + TAIL + "\n".join(others) + "\n")
