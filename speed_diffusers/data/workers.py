"""Processes that load data end with the process that they load for."""

import multiprocessing
import os
import threading


def end_with_parent(worker: int = 0) -> None:
    """Makes a worker of a DataLoader end as soon as the process that it loads for is gone; for `worker_init_fn`.

    torch's workers look at the parent that the operating system names, which is the fork server under `forkserver`;
    and the fork server ends once nobody holds the pipe to it any more, which its workers do. After a kill both would
    wait for one another for good.

    Args:
        worker: Number of the worker, which DataLoader gives; without a meaning here.
    """
    threading.Thread(target=_end_after_parent, name="end_with_parent", daemon=True).start()


def _end_after_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None, "not the main process"
    parent.join()
    os._exit(1)  # nobody is left to tell
