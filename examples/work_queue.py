"""Work for several processes: each job goes to one of them.

    python work_queue.py work /run/ivshmem.sock       # start several of these
    python work_queue.py add /run/ivshmem.sock one two three

Without a path, the program uses the device of the virtual machine in which it runs. The server
needs `--channels 1M`. If a worker dies, another one gets its job, marked as redelivered.
"""

import sys

import ivshmem
import ivshmem.guest
from ivshmem import channel


def work(channels: channel.Channels, _: tuple[str, ...]) -> None:
    jobs = channels.create_queue("jobs", limit=1024, exist_ok=True)
    with jobs.reader() as reader:
        print("ready", flush=True)
        while (job := reader.take()) is not None:
            with job:  # done at its end; given back if an exception leaves it
                again = " again" if job.redelivered else ""
                print(f"doing {bytes(job).decode()}{again}", flush=True)


def add(channels: channel.Channels, jobs: tuple[str, ...]) -> None:
    queue = channels.create_queue("jobs", limit=1024, exist_ok=True)
    with queue.writer() as writer:
        for job in jobs:
            writer.put(job.encode(), timeout=10)  # TimeoutError: no worker takes anything


def main(what: str, path: str = "", *jobs: str) -> None:
    with ivshmem.connect(path, timeout=10) if path else ivshmem.guest.open() as endpoint:
        with channel.open(endpoint) as channels:
            {"work": work, "add": add}[what](channels, jobs)


if __name__ == "__main__":
    try:
        main(*sys.argv[1:])
    except KeyboardInterrupt:
        sys.exit(130)
