"""`serve --check`: what the file says can be had here, or why not; and the documentation's file."""

from __future__ import annotations

import configparser
import os
import re
import subprocess
from pathlib import Path

import pytest
from support import commands

from ivshmem.cli.config_checks import obstacles
from ivshmem.config import RegionConfig, ServiceConfig
from ivshmem.memory import pages
from ivshmem.service.config_file import read_toml

HOME = Path(__file__).parents[2]
PAGE = HOME / "docs/howto/several-regions.md"
EXAMPLE = re.findall(r"```toml\n(.*?)```", PAGE.read_text(), re.DOTALL)[0]


def found(**settings: object) -> list[str]:
    region = RegionConfig("/run/x/a", **settings)  # type: ignore[arg-type]
    return list(obstacles(ServiceConfig({"a": region}, source="/etc/ivshmem.toml")))


def test_the_example_of_the_documentation_suits_its_unit() -> None:
    """The unit's user may do all of it, on a machine without huge pages in reserve."""
    unit = configparser.RawConfigParser(strict=False)
    unit.read(HOME / "systemd/system/ivshmem.service")
    groups = unit["Service"]["SupplementaryGroups"].split()
    for region in read_toml(EXAMPLE.encode(), PAGE.name)["region"].values():
        assert region.get("group", groups[0]) in groups
        assert not region.get("hugepages")
        assert region["socket"].startswith(f"/run/{unit['Service']['RuntimeDirectory']}/")
    # The group is there, also where nothing else has made it.
    assert f"g {groups[0]} " in (HOME / "systemd/sysusers.d/ivshmem.conf").read_text()


def test_huge_pages_of_all_regions_together(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    knobs = tmp_path / "hugepages-2048kB"
    knobs.mkdir()
    for name, number in (("nr_hugepages", 3), ("free_hugepages", 3), ("resv_hugepages", 0)):
        (knobs / name).write_text(f"{number}\n")
    monkeypatch.setattr(pages, "HUGE_PAGES", tmp_path)
    regions = {name: RegionConfig(f"/{name}", "4M", hugepages="2M") for name in "ab"}
    config = ServiceConfig(regions)
    assert list(obstacles(config)) == [
        "hugepages, 8M in all: 4 huge pages of 2M are needed, 3 of 3 are free; run as root:"
        f" echo 4 > {knobs}/nr_hugepages"
    ]
    # What is printed, typed.
    line = next(obstacles(config)).partition("as root: ")[2]
    subprocess.run(["sh", "-c", line], check=True)
    (knobs / "free_hugepages").write_text("4\n")
    assert list(obstacles(config)) == []


def test_groups(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    monkeypatch.setattr(os, "getgroups", lambda: [1])
    (said,) = found(group="0" if os.getegid() else "2")
    assert "only a member of the group can give the socket to it" in said
    assert found(group="1") == []
    (said,) = found(owner="root")
    assert said == 'region.a.owner = "root": only root can give the socket to another user'


def test_the_unit_s_groups(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    assert found(group="kvm") == []
    (said,) = found(group="daemon")
    assert "SupplementaryGroups=daemon" in said


@pytest.mark.usefixtures("commands")
def test_check_says_so(tmp_path: Path) -> None:
    file = tmp_path / "c.toml"
    file.write_text(f'[region.a]\nsocket = "{tmp_path}/a"\nhugepages = true\nsize = "1P"\n')
    done = commands.run("serve", "--check", "--config", file)
    assert done.returncode == 1
    assert "1 region" in done.stdout  # the plan, all the same
    assert done.stderr.startswith("ivshmem: ")
    assert "huge pages" in done.stderr
