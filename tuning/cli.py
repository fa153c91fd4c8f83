"""The console script `vlm-tuning`; `python -m tuning.cli` is the same program."""

import sys
from collections.abc import Sequence

from tuning.errors import EXIT_USER_ERROR

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


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code. Commands are imported when they are called: torch takes seconds."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    command = arguments.pop(0) if arguments else "--help"
    if command == "train":
        from tuning.sft_trainer import main as train

        return train(arguments, all_gpus=True)
    if command == "check":
        from tuning.check import main as check

        return check(arguments)
    if command == "predict":
        from tuning.predict import main as predict

        return predict(arguments)
    if command == "convert":
        from tuning.convert import main as convert

        return convert(arguments)
    if command == "export":
        from tuning.export import main as export

        return export(arguments)
    if command == "chat":
        from tuning.chat import main as chat

        return chat(arguments)
    if command == "demo":
        from tuning.demo.digits import main as demo

        return demo(arguments)
    if command in ("-h", "--help"):
        print(USAGE)
        return 0
    print(f"Error: unknown command '{command}'.\n\n{USAGE}", file=sys.stderr)
    return EXIT_USER_ERROR


if __name__ == "__main__":
    sys.exit(main())
