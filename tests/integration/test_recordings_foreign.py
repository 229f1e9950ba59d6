"""Recordings and a library for MCAP that we did not write: npm's `@mcap/core`, by night."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from support import commands
from support.channel_commands import started
from support.waiting import PATIENCE, until

import ivshmem
from ivshmem import Server, channel
from ivshmem.channel import Channels

pytestmark = [
    pytest.mark.usefixtures("commands"),
    pytest.mark.nightly,  # it loads packages
    pytest.mark.skipif(shutil.which("npm") is None, reason="needs npm"),
]

# Reads a file from its beginning, as a file without an index is read; and by its index, if it has
# one. Prints topic, bytes and schema of each message.
READ = """
import fs from "node:fs";
import { McapIndexedReader, McapStreamReader } from "@mcap/core";

const bytes = fs.readFileSync(process.argv[2]);
const channels = new Map(), schemas = new Map(), found = [];
const reader = new McapStreamReader({ validateCrcs: true });
reader.append(bytes);
for (let record; (record = reader.nextRecord()); ) {
  if (record.type === "Schema") schemas.set(record.id, record);
  if (record.type === "Channel") channels.set(record.id, record);
  if (record.type === "Message") {
    const { topic, schemaId } = channels.get(record.channelId);
    const data = Buffer.from(record.data).toString("hex");
    found.push([topic, data, schemas.get(schemaId)?.name ?? ""]);
  }
}
let indexed = null;
if (reader.done()) {
  const readable = {
    size: async () => BigInt(bytes.length),
    read: async (offset, size) => bytes.subarray(Number(offset), Number(offset + size)),
  };
  indexed = 0;
  const whole = await McapIndexedReader.Initialize({ readable });
  for await (const _ of whole.readMessages()) indexed++;
}
console.log(JSON.stringify({ found, indexed }));
"""

WRITE = """
import fs from "node:fs";
import { McapWriter } from "@mcap/core";

const fd = fs.openSync(process.argv[2], "w");
let at = 0n;
const writer = new McapWriter({
  writable: {
    position: () => at,
    write: async (data) => { fs.writeSync(fd, data); at += BigInt(data.length); },
  },
});
await writer.start({ profile: "", library: "" });
const schemaId = await writer.registerSchema({
  name: "P", encoding: "jsonschema", data: Buffer.from("{}"),
});
const channelId = await writer.registerChannel({
  topic: "points", messageEncoding: "json", schemaId, metadata: new Map(),
});
for (let i = 0; i < 5; i++) {
  const time = BigInt(i);
  const data = Buffer.from(`{"x":${i}}`);
  await writer.addMessage({ channelId, sequence: i, logTime: time, publishTime: time, data });
}
await writer.end();
"""


@pytest.fixture(scope="module")
def packages(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("npm")
    words = ["npm", "install", "--no-audit", "--no-fund", "@mcap/core"]
    subprocess.run(words, cwd=folder, check=True, capture_output=True)
    (folder / "read.mjs").write_text(READ)
    (folder / "write.mjs").write_text(WRITE)
    return folder


@pytest.fixture
def channels(socket_path: str) -> Iterator[Channels]:
    with Server(socket_path, "8M", channels="4M").start():
        with ivshmem.connect(socket_path, timeout=PATIENCE) as client:
            with channel.open(client, name="a test") as channels:
                yield channels


def read(packages: Path, file: Path) -> dict[str, Any]:
    words = ["node", "read.mjs", str(file)]
    done = subprocess.run(words, cwd=packages, check=True, capture_output=True, text=True)
    found: dict[str, Any] = json.loads(done.stdout)
    return found


@pytest.mark.parametrize("end", [signal.SIGINT, signal.SIGKILL])
def test_ours_are_read(
    socket_path: str,
    channels: Channels,
    directory: Path,
    packages: Path,
    end: signal.Signals,
) -> None:
    file = directory / "a.mcap"
    log = channels.create_messages("log", limit=100, schema="lines")
    with log.writer() as writer:
        with started(socket_path, "record", str(file)) as process:
            until(lambda: channels.list()[0].readers)
            for i in range(10):
                writer.put(b"%d" % i)
            until(lambda: file.stat().st_size > 200)
            process.send_signal(end)
            process.communicate(timeout=PATIENCE)
    seen = read(packages, file)
    assert seen["found"] == [["log", (b"%d" % i).hex(), "lines"] for i in range(10)]
    assert seen["indexed"] == (10 if end is signal.SIGINT else None)


def test_theirs_are_replayed(
    socket_path: str, channels: Channels, directory: Path, packages: Path
) -> None:
    file = directory / "a.mcap"
    subprocess.run(["node", "write.mjs", str(file)], cwd=packages, check=True)
    replay = ("channel", "replay", "-S", socket_path, str(file))
    for _ in range(2):  # the first one makes the channel
        done = commands.run(*replay)
        assert done.returncode == 0, done.stderr
    (info,) = channels.list()
    assert (info.name, info.type, info.published) == ("points", "schema P jsonschema", 10)
    found = channels.open("points", "messages")
    assert isinstance(found, channel.Messages)
    with found.reader(history=5) as reader:
        assert [reader.get(timeout=0) for _ in range(5)] == [b'{"x":%d}' % i for i in range(5)]
