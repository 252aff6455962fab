"""How many messages a second torchrun's store answers, with many clients and many connections."""

import json
import os
import threading
import time
from datetime import timedelta

from torch.distributed import TCPStore

from tools.bench_ranks.cluster import fork, hosted_store

SECONDS = 3.0
VALUE = b"x" * 64
PATIENCE = timedelta(minutes=5)


def messages_per_second(processes: int, connections: int) -> float:
    """Messages a second (a set and a get in turn) that a store answers to so many `connections` in all.

    Each has a thread, of one of the `processes`, that waits for the answer before it asks again.
    """
    own = connections // processes
    with hosted_store() as port:
        results, write = os.pipe()
        children = [fork(_ask, port, own, processes, write) for _ in range(processes)]
        for child in children:
            os.waitpid(child, 0)
        os.close(write)
        with os.fdopen(results) as file:
            return sum(json.loads(line) for line in file)


def _ask(port, connections, processes, results):
    """Write to the pipe `results` how many messages a second this process's connections have had answered."""
    stores = [TCPStore("127.0.0.1", port, is_master=False, timeout=PATIENCE) for _ in range(connections)]
    stores[0].add("ready", 1)
    while stores[0].add("ready", 0) < processes:
        time.sleep(0.01)
    counts, ends = [0] * connections, time.monotonic() + SECONDS

    def ask(number):
        store, key = stores[number], f"{os.getpid()}/{number}"
        while time.monotonic() < ends:
            store.set(key, VALUE)
            store.get(key)
            counts[number] += 2

    threads = [threading.Thread(target=ask, args=(number,)) for number in range(connections)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    os.write(results, f"{sum(counts) / SECONDS}\n".encode())
