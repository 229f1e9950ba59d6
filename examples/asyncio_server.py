"""A server inside of an asyncio program, which sees who joins and who leaves.

    python asyncio_server.py SOCKET

prints a line for each peer that joins or leaves, until Ctrl-C.
"""

import asyncio
import sys

import ivshmem


async def serve(path: str) -> None:
    news: asyncio.Queue[str] = asyncio.Queue()
    # The callbacks run within `step`, so in this loop: they must not block.
    with ivshmem.Server(
        path,
        "1M",
        on_join=lambda peer: news.put_nowait(f"peer {peer.id} joined: {peer.process}"),
        on_leave=lambda peer: news.put_nowait(f"peer {peer.id} left: {peer.process}"),
    ) as server:
        loop = asyncio.get_running_loop()
        # A step with the time limit 0 does what is to be done, and returns at once.
        loop.add_reader(server.fileno(), server.step, 0)
        print("serving", flush=True)
        try:
            while True:
                print(await news.get(), flush=True)
        finally:
            loop.remove_reader(server.fileno())


if __name__ == "__main__":
    try:
        asyncio.run(serve(sys.argv[1]))
    except KeyboardInterrupt:
        sys.exit(130)
