"""The latest content of something, for any number of readers.

    python latest_value.py set /run/ivshmem.sock "21.5 C"
    python latest_value.py watch /run/ivshmem.sock

Without a path, the program uses the device of the virtual machine in which it runs. The server
needs `--channels 1M`. A reader never sees half of a change. The content stays when its writer ends.
"""

import sys

import ivshmem
import ivshmem.guest
from ivshmem import channel


def put(value: channel.Value, content: str) -> None:
    with value.writer() as writer:  # there is one at a time
        writer.put(content.encode())


def watch(value: channel.Value, _: str) -> None:
    with value.reader() as reader:
        content = reader.get()  # None: there was none yet
        while True:
            if content is not None:
                print(content.decode(), flush=True)
            content = reader.wait_changed()


def main(what: str, path: str = "", content: str = "") -> None:
    with ivshmem.connect(path, timeout=10) if path else ivshmem.guest.open() as endpoint:
        with channel.open(endpoint) as channels:
            value = channels.create_value("temperature", limit=64, exist_ok=True)
            {"set": put, "watch": watch}[what](value, content)


if __name__ == "__main__":
    try:
        main(*sys.argv[1:])
    except KeyboardInterrupt:
        sys.exit(130)
