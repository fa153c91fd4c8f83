"""TRL, installed beside the results in a folder that git ignores, and that only its own processes see."""

import subprocess
import sys
from pathlib import Path

from record import ROOT, print0

TRL_VERSION = "1.16.0"
PEERS = ROOT / "benchmarks" / ".peers"


def install_trl() -> Path:
    """The folder with TRL, made where it is not there yet: the one thing a benchmark downloads.

    TRL alone is installed (`--no-deps`): what it stands on is in this environment, so that both sides run on the same
    torch, transformers and peft. A machine without a network can be given the folder.
    """
    folder = PEERS / f"trl-{TRL_VERSION}"
    if not (folder / "trl").is_dir():
        print0(f"Installing TRL {TRL_VERSION} …")
        command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(folder)]
        subprocess.run([*command, f"trl=={TRL_VERSION}"], check=True, stdout=sys.stderr)
    return folder
