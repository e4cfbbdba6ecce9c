"""Dask as the executor: `--dask local`, `--dask slurm`, or the address of a scheduler that runs already."""

from __future__ import annotations

import re
from collections.abc import Iterator
from concurrent.futures import Executor
from contextlib import ExitStack, contextmanager

from streammerge.base.errors import UserError

# A unit is given to so many workers one after the other when they die of it.
_RETRIES = 5
_ADDRESS = re.compile(r"(tcp|tls|ws|wss|ucx|inproc)://\S+")
_WAIT_SECONDS = 10


@contextmanager
def dask_executor(where: str, workers: int) -> Iterator[Executor]:
    """An executor over Dask workers: `workers` new processes here, at most so many Slurm jobs, or whoever is there.

    What a Slurm job asks for is in Dask's own configuration, `jobqueue.slurm`. Raises UserError.
    """
    if where not in {"local", "slurm"} and not _ADDRESS.fullmatch(where):
        raise UserError(f"--dask {where}: give local, slurm, or the address of a scheduler like tcp://host:8786.")
    try:
        from distributed import Client, LocalCluster
    except ImportError:
        raise UserError("--dask needs Dask: pip install 'streammerge[cluster]'") from None
    with ExitStack() as stack:
        address = where
        if where == "local":
            # Nothing listens to the outside; and the budget is ours to keep, so the nanny need not kill for it.
            cluster = stack.enter_context(
                LocalCluster(
                    n_workers=workers,
                    threads_per_worker=1,
                    host="127.0.0.1",
                    dashboard_address="127.0.0.1:0",
                    memory_limit=0,
                )
            )
            address = cluster.scheduler_address
        elif where == "slurm":
            address = stack.enter_context(_slurm(workers))
        try:
            client = stack.enter_context(Client(address, timeout=_WAIT_SECONDS))
        except OSError as error:
            raise UserError(f"--dask {where}: no scheduler answers there ({error}).") from None
        yield stack.enter_context(client.get_executor(retries=_RETRIES))


@contextmanager
def _slurm(workers: int) -> Iterator[str]:
    try:
        from dask_jobqueue import SLURMCluster
    except ImportError:
        raise UserError("--dask slurm needs dask-jobqueue: pip install 'streammerge[cluster]'") from None
    try:
        cluster = SLURMCluster()
    except ValueError as error:
        # Cores and memory, which only the site knows.
        raise UserError(f"--dask slurm: {error}. Dask reads it from jobqueue.slurm in ~/.config/dask/*.yaml.") from None
    with cluster:
        cluster.adapt(minimum=1, maximum=workers)
        yield cluster.scheduler_address
