"""`vlm-tuning predict` in this process, and the lines that it writes."""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

from tuning import cli

Predicted = tuple[int, list[dict[str, Any]], Any]  # exit code, the lines of the output, what was printed


def read_lines(path: str | Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in Path(path).read_text().splitlines()]


def flags_of(options: Mapping[str, Any]) -> list[str]:
    words = []
    for name, value in options.items():
        words += [f"--{name}", *(map(str, value) if isinstance(value, list) else [str(value)])]
    return words


def make_predict(capsys: pytest.CaptureFixture, **defaults: Any) -> Callable[..., Predicted]:
    """A function that runs the command with options besides `defaults`; one that is None is left out."""

    def predict(**changes: Any) -> Predicted:
        options = {name: value for name, value in {**defaults, **changes}.items() if value is not None}
        code = cli.main(["predict", *flags_of(options)])
        printed, output = capsys.readouterr(), Path(options["output"])
        return code, read_lines(output) if output.exists() else [], printed

    return predict
