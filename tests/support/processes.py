"""Processes of a job as threads of a test, which meet at a store in memory."""

from concurrent.futures import ThreadPoolExecutor

from torch.distributed import HashStore

from parallel.runtime import Peers


def in_processes(function, world_size, a_machine=2):
    """[function(peers) of rank 0, of rank 1, ...], or the ValueErrors that they raise. Machines with
    `a_machine` processes each are called host-0, host-1, ..."""
    store = HashStore()

    def process(rank):
        machine, local_rank = divmod(rank, a_machine)
        peers = Peers(store, rank, world_size, local_rank, f"host-{machine}", a_machine)
        peers.limit_seconds = 120.0  # so that the error of another one is soon seen
        try:
            return function(peers)
        except ValueError as error:
            return error

    with ThreadPoolExecutor(world_size) as pool:
        return list(pool.map(process, range(world_size)))
