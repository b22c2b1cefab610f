"""The Ray cluster a workflow runs on: the one it was submitted to, or a local one of its own."""

from __future__ import annotations

import logging
import os

LOCAL_OBJECT_STORE = 512 * 1024**2  # bytes; states never travel through the object store


def connect() -> None:
    """Connects this process to Ray, once. A submitted job (RAY_ADDRESS) joins its cluster; otherwise Ray starts here.

    A local Ray gets two logical CPUs to spare: actors that hold every CPU would leave none for reading and hang the job.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_TRAIN_V2_ENABLED", "1")
    if "RAY_ADDRESS" not in os.environ:
        os.environ.setdefault("RAY_AUTH_MODE", "disabled")
    import ray

    if ray.is_initialized():
        return
    if "RAY_ADDRESS" in os.environ:
        ray.init(logging_level=logging.WARNING)
    else:
        ray.init(
            num_cpus=(os.cpu_count() or 1) + 2,
            object_store_memory=LOCAL_OBJECT_STORE,
            include_dashboard=False,
            logging_level=logging.WARNING,
            log_to_driver=False,
        )
