"""When one process of a run fails, the others end, whatever they wait for.

A process that waits for another one inside NCCL cannot be reached by an exception or a signal. So a thread of each
looks every second whether one has failed, in the store through which the processes found each other.
"""

import os
import threading
import time
from contextlib import suppress

import torch.distributed as dist

from tuning.exit_codes import EXIT_OK, EXIT_STOPPED

FAILED = "vlm_tuning/exit_code"
POLL_SECONDS = 1.0
GRACE_SECONDS = 10.0
"""The time for a process to end by itself, with its data workers, once another one has failed."""
_started = threading.Event()


def watch_processes() -> None:
    """End this process some seconds after another one has announced that it failed, unless it ends before.

    Only commands announce it: in a program that calls `tuning.train`, nothing ends.
    """
    if not dist.is_initialized() or dist.get_world_size() == 1 or _started.is_set():
        return
    _started.set()
    store = dist.distributed_c10d._get_default_store().clone()  # the main thread may be waiting on the other
    threading.Thread(target=_watch, args=(store,), name="watch processes", daemon=True).start()


def announce_failure(exit_code: int) -> None:
    """Tell the other processes that this one ends with `exit_code`, unless it ends as they do. They end so, too."""
    if exit_code in (EXIT_OK, EXIT_STOPPED) or not dist.is_initialized() or dist.get_world_size() == 1:
        return
    with suppress(RuntimeError):  # the store may have gone with the process that kept it
        dist.distributed_c10d._get_default_store().set(FAILED, str(exit_code))
        if dist.get_rank() == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
            time.sleep(1.5 * POLL_SECONDS)  # the store ends with this process: the others have read it by then


def _watch(store: dist.Store) -> None:
    try:
        while not store.check([FAILED]):
            time.sleep(POLL_SECONDS)
        exit_code = int(store.get(FAILED))
    except RuntimeError:  # the store has ended
        return
    time.sleep(GRACE_SECONDS)
    os._exit(exit_code)
