"""The user data of `ivshmem qemu --cloud-init`: YAML that says what it should."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
from pathlib import Path
from typing import Any

import jsonschema  # type: ignore[import-untyped, unused-ignore]
import pytest
import yaml  # type: ignore[import-untyped]

from ivshmem.cli import cloud_init, guest_bundle, main

SCHEMA = "usr/lib/python3/dist-packages/cloudinit/config/schemas/schema-cloud-config-v1.json"


def printed(capsys: pytest.CaptureFixture[str], *options: str) -> tuple[str, dict[str, Any]]:
    assert main.main(["qemu", "--cloud-init", *options]) == 0
    text = capsys.readouterr().out
    assert text.splitlines()[0] == "#cloud-config"
    return text, yaml.safe_load(text)


def test_it_mounts_the_image_and_sets_up(capsys: pytest.CaptureFixture[str]) -> None:
    text, data = printed(
        capsys, "--guest-user", "debian", "--guest-user", "bob", "--guest-peers", "0,2,5-7"
    )
    assert set(data) == {"runcmd"}
    words = [shlex.split(line) for line in data["runcmd"]]
    assert words[1] == ["mount", "-o", "ro", f"LABEL={guest_bundle.LABEL}", words[0][-1]]
    assert words[2][1] == f"{words[0][-1]}/{guest_bundle.PROGRAM}"
    given = "--user debian --user bob --peers 0,2,5-7"
    assert words[2][2:] == ["guest", "setup", "--yes", *given.split()]
    # The command parses these words; and QEMU's words are those that `guest bundle` prints.
    main._parser(["guest"]).parse_args(words[2][2:])
    assert "-drive file=ivshmem.iso,if=virtio,readonly=on,format=raw" in text


def test_the_label_is_that_of_the_image() -> None:
    image = guest_bundle.make("iso")
    assert image[16 * 2048 + 40 :][:32].decode().strip() == guest_bundle.LABEL


def test_an_iommu_takes_a_reboot(capsys: pytest.CaptureFixture[str]) -> None:
    _, data = printed(capsys, "--iommu")
    assert "--access vfio" in data["runcmd"][2]
    assert data["runcmd"][-1] == "update-grub"
    (file,) = data["write_files"]
    assert "intel_iommu=on" in file["content"]
    assert data["power_state"]["mode"] == "reboot"


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        (["--guest-user", "x"], "--guest-user needs --cloud-init"),
        (["--guest-peers", "0"], "--guest-peers needs --cloud-init"),
        (["--cloud-init", "--guest-user", "a\n  - rm"], "not a name for a user or group"),
        (["--cloud-init", "--guest-peers", "0,\n- rm"], "is neither an id nor a range"),
        (["--cloud-init", "--guest-peers", ""], "is neither an id nor a range"),
    ],
)
def test_what_is_refused(capsys: pytest.CaptureFixture[str], words: list[str], reason: str) -> None:
    assert main.main(["qemu", *words]) == 1
    said = capsys.readouterr().err
    assert reason in said
    assert len(said.splitlines()) == 1


@pytest.mark.nightly
@pytest.mark.parametrize("iommu", [False, True])
def test_the_schema_of_cloud_init(tmp_path: Path, iommu: bool) -> None:
    """That of Debian's package, as `cloud-init schema` takes it."""
    user = ["-o", "APT::Sandbox::User=root"] if os.geteuid() == 0 else []
    fetched = subprocess.run(
        ["apt-get", *user, "-q", "download", "cloud-init"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    if fetched.returncode:
        reason = f"needs Debian's archive: {fetched.stderr.strip()}"
        if os.environ.get("CI"):
            pytest.fail(reason, pytrace=False)
        pytest.skip(reason)
    (deb,) = tmp_path.glob("*.deb")
    subprocess.run(["dpkg-deb", "-x", deb, tmp_path / "root"], check=True, timeout=300)
    schema = json.loads((tmp_path / "root" / SCHEMA).read_text())
    validator = jsonschema.Draft4Validator(schema)
    good = yaml.safe_load(cloud_init.user_data(["--user", "debian"], iommu=iommu))
    assert not [error.message for error in validator.iter_errors(good)]
    bad = {**good, "runcmd": "a text", "power_state": {"mode": "dance"}}
    assert len([*validator.iter_errors(bad)]) >= 2  # it is a schema that refuses
    assert not re.search(r"[^\x20-\x7e\n]", cloud_init.user_data([], iommu=iommu))
