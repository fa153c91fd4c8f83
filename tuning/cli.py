"""The console script `vlm-tuning`; `python -m tuning.cli` is the same program."""

import difflib
import importlib
import sys
from collections.abc import Sequence
from dataclasses import dataclass

from tuning.console import print_error
from tuning.errors import UserError
from tuning.exit_codes import EXIT_OK, EXIT_USER_ERROR, run_command, was_launched


@dataclass(frozen=True)
class Command:
    """`module` has `OPTIONS`, a dataclass, and `run(options)`. `arguments`: as the usage shows them."""

    module: str
    arguments: str
    summary: str


COMMANDS = {
    "train": Command("tuning.sft_trainer", "config.json | --flag value …", "Fine-tune a model."),
    "check": Command(
        "tuning.commands.check",
        "config.json | --flag value …",
        "Read all data as train would, and report problems. Trains nothing.",
    ),
    "predict": Command(
        "tuning.commands.predict",
        "config.json | --flag value …",
        "Answer the questions of a dataset, and score the answers.",
    ),
    "verify-serving": Command(
        "tuning.commands.verify_serving",
        "--server_url URL --model_name_or_path MODEL",
        "Compare a server with training on a few rows, and name the first difference.",
    ),
    "convert": Command("tuning.commands.convert", "IN OUT", "Convert a dataset to our format."),
    "export": Command(
        "tuning.commands.export", "--adapter DIR --output DIR", "Merge an adapter into a model, and verify the result."
    ),
    "chat": Command(
        "tuning.commands.chat",
        "--model_name_or_path MODEL [--compare MODEL] [--port 7860]",
        "Talk to a model about images, in the browser.",
    ),
    "demo": Command(
        "tuning.demo.digits", "[--output_dir DIR]", "Train a tiny model to read handwritten digits, as an example."
    ),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code. Only that command is imported: torch takes seconds."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    name = arguments.pop(0) if arguments else "--help"
    if name in ("-h", "--help"):
        print(describe_commands())
        return EXIT_OK
    if name not in COMMANDS:
        near = difflib.get_close_matches(name, COMMANDS, n=1)
        guess = f" Did you mean {near[0]}?" if near else ""
        print(f"Error: unknown command '{name}'.{guess}\n\n{describe_commands()}", file=sys.stderr)
        return EXIT_USER_ERROR
    try:
        command = importlib.import_module(COMMANDS[name].module)
    except UserError as error:  # torchvision cannot be imported
        print_error(f"Error: {error}")
        return EXIT_USER_ERROR
    if name == "train":
        return command.main(arguments, all_gpus=True)
    from tuning.config.describe import describe_command
    from tuning.config.parse import read_command

    usage = f"vlm-tuning {name} {COMMANDS[name].arguments}\n\n{COMMANDS[name].summary}"
    return run_command(
        lambda words: command.run(read_command(words, command.OPTIONS)),
        lambda: describe_command(usage, command.OPTIONS),
        arguments,
    )


def describe_commands() -> str:
    """The text of `vlm-tuning --help`."""
    usages = [f"  {name} {command.arguments}\n      {command.summary}" for name, command in COMMANDS.items()]
    return "\n".join(
        ["usage: vlm-tuning COMMAND …", "", *usages, "", "vlm-tuning COMMAND --help lists the options of a command."]
    )


if __name__ == "__main__":
    exit_code = main()
    if was_launched():
        from tuning.distributed.processes import exit_process

        exit_process(exit_code)
    sys.exit(exit_code)
