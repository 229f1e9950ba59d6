"""Frames from a guest to the host, as numpy arrays that no process copies.

In the virtual machine:    python frames.py send
On the host:               python frames.py show /run/ivshmem.sock

The server needs `--channels 64M`. The sender writes each frame directly into the shared memory, and
the reader looks at it there. A reader that is too slow loses the oldest frames: the sender never
waits for it.
"""

import sys
import time

import numpy as np

import ivshmem
import ivshmem.guest
from ivshmem import channel

HEIGHT, WIDTH = 480, 640


def send(channels: channel.Channels, count: int) -> None:
    frames = channels.create_messages(
        "frames", dtype="u1", shape=(HEIGHT, WIDTH), overflow="overwrite", slots=8, exist_ok=True
    )
    with frames.writer() as writer:
        for number in range(count):
            with writer.loan() as loan:  # `with` publishes it
                loan.array[:] = number % 256  # here a camera would write
            time.sleep(1 / 60)


def show(channels: channel.Channels, count: int) -> None:
    while True:
        try:
            frames = channels.open("frames", "messages", dtype="u1", shape=(HEIGHT, WIDTH))
            break
        except channel.NoSuchChannel:  # the sender starts later
            time.sleep(0.1)
    assert isinstance(frames, channel.Messages)
    with frames.reader("overwrite", history=1) as reader:
        for _ in range(count):
            view = reader.view(timeout=10)
            if view is None:
                sys.exit("no frame for 10 seconds")
            try:
                with view:
                    mean = view.array.mean()  # the sender can overwrite it during this line:
            except channel.Overtaken:  # then the result does not count
                continue
            print(f"mean {mean:.0f}, {reader.lost} frames lost", flush=True)


def main(work: str, path: str = "", count: str = "1000000") -> None:
    np.seterr(all="raise")
    with ivshmem.connect(path, timeout=10) if path else ivshmem.guest.open() as endpoint:
        with channel.open(endpoint) as channels:
            {"send": send, "show": show}[work](channels, int(count))


if __name__ == "__main__":
    main(*sys.argv[1:])
