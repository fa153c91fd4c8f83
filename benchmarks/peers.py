"""Install TRL in a folder that git ignores and that only the processes measuring TRL import from."""

import subprocess
import sys
from pathlib import Path

from record import ROOT, print0

TRL_VERSION = "1.16.0"
PEERS = ROOT / "benchmarks" / ".peers"


def install_trl() -> Path:
    """The folder with TRL, which is installed if it is missing. Nothing else is downloaded by a benchmark.

    TRL is installed without its dependencies (`--no-deps`), so that both sides use the torch, transformers and peft of
    this environment. For a machine without a network, copy the folder.
    """
    folder = PEERS / f"trl-{TRL_VERSION}"
    if not (folder / "trl").is_dir():
        print0(f"Installing TRL {TRL_VERSION} …")
        command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(folder)]
        subprocess.run([*command, f"trl=={TRL_VERSION}"], check=True, stdout=sys.stderr)
    return folder
