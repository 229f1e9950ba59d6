"""What it costs to wait where no ring can come: a region without an endpoint.

Knows: the time of the processor that this process takes, and how late a message is seen. Does not
know: how it polls.
"""

from __future__ import annotations

import statistics
import threading
import time

from ivshmem import Directory, Region, channel

SECONDS = 5.0
MESSAGES = 50


def _share(wait: float, reader: channel.Reader | None) -> float:
    """Return the share of a core that this process takes while it waits so long."""
    before = time.process_time()
    if reader is None:
        time.sleep(wait)
    else:
        reader.get(wait)
    return (time.process_time() - before) / wait


def waited() -> dict[str, float]:
    """Shares of a core, and seconds from a put to the end of the wait."""
    with Region.create("4M") as region:
        Directory.create(region, channels="2M").close()
        with channel.open(region) as channels:
            messages = channels.create_messages("a", limit=64)
            with messages.writer() as writer, messages.reader() as reader:
                found = {
                    "nothing waits, of a core": _share(SECONDS, None),
                    "a reader waits, of a core": _share(SECONDS, reader),
                }
                late: list[float] = []
                for _ in range(MESSAGES):

                    def put() -> None:
                        time.sleep(0.05)  # so that the pauses have grown
                        writer.put(time.monotonic_ns().to_bytes(8, "little"))

                    thread = threading.Thread(target=put)
                    thread.start()
                    message = reader.get(10)
                    assert message is not None
                    late.append((time.monotonic_ns() - int.from_bytes(message, "little")) / 1e9)
                    thread.join()
                found["a message after a pause, median seconds"] = statistics.median(late)
                found["a message after a pause, longest seconds"] = max(late)
    return found
