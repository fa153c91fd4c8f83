"""The console script `vlm-tuning`; `python -m tuning.cli` is the same program."""

import difflib
import importlib
import sys
from collections.abc import Sequence

from tuning.exit_codes import EXIT_USER_ERROR

USAGE = """\
usage: vlm-tuning COMMAND …

  train config.json | --flag value …   fine-tune a model
  check config.json | --flag value …   what will the model see, and is anything wrong? Trains nothing
  predict config.json | --flag value … answer the questions of a dataset, and score the answers
  convert IN OUT                       put data of any form that is recognised into the documented one
  export --adapter DIR --output DIR    merge an adapter into a model that engines load, and prove it
  chat --model_name_or_path MODEL      talk to a model about pictures, in the browser
  demo [--output_dir DIR]              see it work: a tiny model learns to read handwritten digits

vlm-tuning train --help lists every option."""

COMMANDS = {
    "train": "tuning.sft_trainer",
    "check": "tuning.commands.check",
    "predict": "tuning.commands.predict",
    "convert": "tuning.commands.convert",
    "export": "tuning.commands.export",
    "chat": "tuning.commands.chat",
    "demo": "tuning.demo.digits",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code. Commands are imported when they are called: torch takes seconds."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    command = arguments.pop(0) if arguments else "--help"
    if command in ("-h", "--help"):
        print(USAGE)
        return 0
    if command not in COMMANDS:
        near = difflib.get_close_matches(command, COMMANDS, n=1)
        guess = f" Did you mean {near[0]}?" if near else ""
        print(f"Error: unknown command '{command}'.{guess}\n\n{USAGE}", file=sys.stderr)
        return EXIT_USER_ERROR
    run = importlib.import_module(COMMANDS[command]).main
    return run(arguments, all_gpus=True) if command == "train" else run(arguments)


if __name__ == "__main__":
    sys.exit(main())
