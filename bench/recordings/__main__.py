"""Recording, beside the library mcap alone: `python -m bench.recordings [FOLDER]`.

A writer publishes messages of 4 MiB at a pace, and a recorder writes them to a file. The library
alone writes the same bytes from memory to the same disk, as fast as it can. Both take turns. All
files end in fsync(2), which counts: otherwise the page cache would be measured.

The library runs in a thread, as in the recorder: in the main thread glibc's malloc gives the memory
of each chunk back to the kernel, and the library takes twice the time of the processor. That is
measured, too.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import ivshmem
from ivshmem import channel

SIZE = 4 << 20
LIMIT = 30.0  # seconds for a recorder to begin


def alone(file: Path, count: int) -> float:
    """Seconds that the library takes for so many messages."""
    from mcap.writer import CompressionType, Writer  # an extra

    message = os.urandom(SIZE)
    begun = time.perf_counter()
    with file.open("wb") as stream:
        writer: Any = Writer(stream, compression=CompressionType.NONE)
        writer.start()
        number = writer.register_channel("frames", "", 0)
        for i in range(count):
            writer.add_message(number, i, message, i)
        writer.finish()
        stream.flush()
        os.fsync(stream.fileno())
    return time.perf_counter() - begun


def in_a_thread(file: Path, count: int) -> float:
    """The same, in a thread."""
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(alone, file, count).result()


def recorded(file: Path, count: int, pace: float) -> tuple[float, int]:
    """Seconds until so many messages, published at a pace (bytes a second), are in a file; losses.

    The recorder is a process of its own.
    """
    path = str(file.with_suffix(".sock"))
    with ivshmem.Server(path, "512M", channels="256M").start():
        with ivshmem.connect(path) as client, channel.open(client) as channels:
            frames = channels.create_messages("frames", limit=SIZE, slots=16, writers=1, readers=2)
            words = ["channel", "record", str(file), "frames", "-S", path, "--json"]
            process = subprocess.Popen([sys.executable, "-m", "ivshmem", *words])
            deadline = time.monotonic() + LIMIT
            while not channels.list()[0].readers and time.monotonic() < deadline:
                time.sleep(0.01)
            message = os.urandom(SIZE)
            with frames.writer() as writer:
                begun = time.perf_counter()
                for i in range(count):
                    while time.perf_counter() < begun + i * SIZE / pace:
                        time.sleep(0.0005)
                    writer.put(message)
            process.terminate()
            process.wait()
            with file.open("rb") as stream:
                os.fsync(stream.fileno())
            took = time.perf_counter() - begun
    return took, count - _messages(file)


def _messages(file: Path) -> int:
    from mcap.reader import make_reader  # an extra

    with file.open("rb") as stream:
        summary = make_reader(stream).get_summary()
    assert summary is not None
    assert summary.statistics is not None
    return summary.statistics.message_count


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.recordings", description=__doc__)
    parser.add_argument("folder", nargs="?", help="on the disk that is measured (default: /tmp)")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--messages", type=int, default=256, help="of 4 MiB (default: 256)")
    parser.add_argument("--pace", type=float, default=1000, help="MB a second (default: 1000)")
    options = parser.parse_args()
    ratios, lost_shares = [], []
    volume = options.messages * SIZE / 1e6
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        for i in range(options.rounds):
            file = Path(folder) / f"{i}.mcap"
            main_thread = library = 0.0
            turns = ("main thread", "thread", "recorder")
            for turn in turns if i % 2 else reversed(turns):  # the first may find another disk
                os.sync()
                if turn == "recorder":
                    took, lost = recorded(file, options.messages, options.pace * 1e6)
                elif turn == "thread":
                    library = volume / in_a_thread(file, options.messages)
                else:
                    main_thread = volume / alone(file, options.messages)
                file.unlink()
            ours = volume * (1 - lost / options.messages) / took
            ratios.append(ours / library)
            lost_shares.append(lost / options.messages)
            print(
                f"round {i + 1}: mcap alone {library:.0f} MB/s ({main_thread:.0f} in the main"
                f" thread), recorded {ours:.0f} MB/s, ratio {ours / library:.2f}, lost {lost}"
            )
    print(
        f"median ratio {statistics.median(ratios):.2f}, median share lost"
        f" {statistics.median(lost_shares):.0%}"
    )


if __name__ == "__main__":
    main()
