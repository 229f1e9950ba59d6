"""Calls that an asyncio program serves, several at a time.

    python call_server.py serve /run/ivshmem.sock
    python call_server.py ask /run/ivshmem.sock "2 3 5"

Without a path, the program uses the device of the virtual machine in which it runs. The server
needs `--channels 1M`. If the process that serves a call dies, the caller gets ServerLost: no other
process gets the call, because the work may have been done already.
"""

import asyncio
import sys

import ivshmem
import ivshmem.guest
from ivshmem import channel


async def add(request: bytes) -> bytes:
    numbers = [int(word) for word in request.split()]  # ValueError: the caller gets CallFailed
    await asyncio.sleep(0)  # here it would ask a database
    return str(sum(numbers)).encode()


def serve(channels: channel.Channels, _: str) -> None:
    calls = channels.create_calls("add", limit=4096, exist_ok=True)

    async def run() -> None:
        with calls.server() as server:
            print("serving", flush=True)
            await server.serve_async(add)

    asyncio.run(run())


def ask(channels: channel.Channels, question: str) -> None:
    calls = channels.open("add", "calls")
    assert isinstance(calls, channel.Calls)
    with calls.caller() as caller:
        try:
            print(caller.call(question.encode(), timeout=10).decode())
        except channel.CallFailed as error:
            sys.exit(f"the server cannot do that: {error}")


def main(work: str, path: str = "", question: str = "") -> None:
    with ivshmem.connect(path, timeout=10) if path else ivshmem.guest.open() as endpoint:
        with channel.open(endpoint) as channels:
            {"serve": serve, "ask": ask}[work](channels, question)


if __name__ == "__main__":
    try:
        main(*sys.argv[1:])
    except KeyboardInterrupt:
        sys.exit(130)
