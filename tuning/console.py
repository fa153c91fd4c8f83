"""Printing to the user: once, whatever the number of processes, and on a line of its own."""

import os
import sys


def print0(text: str) -> None:
    """Print from the first process only."""
    if os.environ.get("RANK", "0") == "0":
        encoding = sys.stdout.encoding or "utf-8"  # a row may have half a character, and a terminal few of them
        print(text.encode(encoding, "backslashreplace").decode(encoding), flush=True)


def print_error(message: str, trace: str = "") -> None:
    """Print why a command ends, and write `message` to the file that `TERMINATION_LOG_FILE` names, if it is set."""
    close_progress_bars()
    line_break = "\n" if os.environ.get("RANK", "0") != "0" else ""  # the first process may have left a bar open
    print(line_break + trace + message, file=sys.stderr, flush=True)
    if log_file := os.environ.get("TERMINATION_LOG_FILE"):
        with open(log_file, "w", encoding="utf-8", errors="backslashreplace") as file:
            file.write(message + "\n")


def close_progress_bars(*, redraw: bool = True) -> None:
    """End the lines of tqdm's bars, so that a message starts on a line of its own; without `redraw`, erase the bars."""
    if "tqdm" in sys.modules:
        for bar in list(getattr(sys.modules["tqdm"].tqdm, "_instances", ())):
            bar.leave = bar.leave and redraw
            bar.disable = bar.disable or not redraw
            bar.close()
