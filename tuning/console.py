"""What a run tells its user."""

import os


def say(text: str) -> None:
    """Print once, from the first process."""
    if os.environ.get("RANK", "0") == "0":
        print(text, flush=True)
