"""A process of several ends with its exit code, its last words, and what it has registered for the end."""

import subprocess
import sys

PROGRAM = """
import atexit, sys, tempfile
import torch.distributed as dist
from tuning.distributed.processes import exit_process
dist.init_process_group("gloo", init_method=f"file://{tempfile.mkdtemp()}/store", rank=0, world_size=1)
atexit.register(lambda: print("registered"))
sys.stdout.write("last words, ")
exit_process(143)
"""


def test_a_process_leaves_with_its_exit_code_and_all_it_has_to_say():
    ended = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, timeout=300)
    assert (ended.returncode, ended.stdout) == (143, "last words, registered\n"), ended.stderr
