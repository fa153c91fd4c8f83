"""What a run tells its user."""

import os
import sys


def print0(text: str) -> None:
    """Print once, from the first process."""
    if os.environ.get("RANK", "0") == "0":
        print(text, flush=True)


def tell(message: str, trace: str = "") -> None:
    """Print the last words of a run, and write `message` to `TERMINATION_LOG_FILE`, if that is set."""
    _close_progress_bars()
    other_bar = "\n" if os.environ.get("RANK", "0") != "0" else ""  # the first process's, which may have no end
    print(other_bar + trace + message, file=sys.stderr, flush=True)
    if log_file := os.environ.get("TERMINATION_LOG_FILE"):
        with open(log_file, "w", encoding="utf-8") as file:
            file.write(message + "\n")


def _close_progress_bars(*, silently: bool = False) -> None:
    """End the lines of tqdm's bars, so that a message has a line of its own; `silently`: without drawing them again."""
    if "tqdm" in sys.modules:
        for bar in list(getattr(sys.modules["tqdm"].tqdm, "_instances", ())):
            bar.leave = bar.leave and not silently
            bar.disable = bar.disable or silently
            bar.close()
