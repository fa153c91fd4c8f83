"""When one process of a run fails, the others end, whatever they wait for.

A process that waits for another one inside NCCL cannot be reached by an exception or a signal. So a thread of each
looks every second whether one has failed, in the store through which the processes found each other.
"""

import os
import threading
import time
from contextlib import suppress

import torch.distributed as dist

from tuning.exit_codes import EXIT_INTERNAL_ERROR, EXIT_OK, EXIT_STOPPED

FAILED, DONE = "vlm_tuning/exit_code", "vlm_tuning/done"
POLL_SECONDS = 1.0
GRACE_SECONDS = 10.0
"""The time for a process to end by itself, with its data workers, once another one has failed."""
_started = threading.Event()


def watch_processes() -> None:
    """End this process some seconds after another one has announced that it failed, unless it ends before."""
    if not dist.is_initialized() or dist.get_world_size() == 1 or _started.is_set():
        return
    _started.set()
    store = dist.distributed_c10d._get_default_store().clone()  # the main thread may be waiting on the other
    threading.Thread(target=_watch, args=(store,), name="watch processes", daemon=True).start()


def announce_end(exit_code: int) -> None:
    """Tell the other processes that this one ends: they end, too, if it failed, with the same exit code."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return
    keeps_store = dist.get_rank() == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
    with suppress(RuntimeError):  # the store may have gone with the process that kept it
        store = dist.distributed_c10d._get_default_store()
        if exit_code not in (EXIT_OK, EXIT_STOPPED):
            store.set(FAILED, str(exit_code))
        elif keeps_store:
            store.set(DONE, "")
        if keeps_store:
            time.sleep(1.5 * POLL_SECONDS)  # until the others have read it


def _watch(store: dist.Store) -> None:
    exit_code = None
    while exit_code is None:
        time.sleep(POLL_SECONDS)
        try:
            if store.check([FAILED]):
                exit_code = int(store.get(FAILED))
            elif store.check([DONE]):
                return
        except RuntimeError:  # the process that kept the store was killed
            exit_code = EXIT_INTERNAL_ERROR
    time.sleep(GRACE_SECONDS)
    os._exit(exit_code)
