"""How many messages a second torchrun's store answers, with many clients and many connections."""

import threading
import time
from datetime import timedelta

from torch.distributed import TCPStore

SECONDS = 3.0
VALUE = b"x" * 64
PATIENCE = timedelta(minutes=5)


def operations_per_second(port: int, connections: int, seconds: float = SECONDS) -> float:
    """Messages a second (a set and a get in turn) that the store at `port` answers to so many connections,
    each with a thread of this process that waits for the answer before it asks again."""
    stores = [TCPStore("127.0.0.1", port, is_master=False, timeout=PATIENCE) for _ in range(connections)]
    counts, ready, ends = [0] * connections, threading.Barrier(connections + 1), threading.Event()

    def ask(number):
        store, key = stores[number], f"speed/{number}"
        ready.wait()
        while not ends.is_set():
            store.set(key, VALUE)
            store.get(key)
            counts[number] += 2

    threads = [threading.Thread(target=ask, args=(number,)) for number in range(connections)]
    for thread in threads:
        thread.start()
    ready.wait()
    begun = time.monotonic()
    time.sleep(seconds)
    ends.set()
    for thread in threads:
        thread.join()
    return sum(counts) / (time.monotonic() - begun)
