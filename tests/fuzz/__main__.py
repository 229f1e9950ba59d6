"""The command line: `python -m fuzz`, with tests/ on the path; `make fuzz` runs it."""

from __future__ import annotations

import argparse
import sys
import time
import traceback
from pathlib import Path

from .campaign import Campaign, Found, time_limit
from .targets import TARGETS


def main() -> int:
    """Run inputs, or one again; the exit status."""
    parser = argparse.ArgumentParser(prog="fuzz", description=__doc__.splitlines()[0])
    parser.add_argument("--count", type=int, default=1_000_000, help="inputs, of all targets")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--target", choices=["all", *TARGETS], default="all")
    parser.add_argument("--replay", type=Path, metavar="FILE", help="run this one input of TARGET")
    parser.add_argument("--findings", type=Path, default=Path("build/fuzz"), metavar="DIRECTORY")
    args = parser.parse_args()
    if args.replay is not None:
        if args.target == "all":
            parser.error("--replay needs the --target of the input")
        return _replay(args.target, args.replay)
    args.findings.mkdir(parents=True, exist_ok=True)
    names = list(TARGETS) if args.target == "all" else [args.target]
    shares = sum(TARGETS[name].share for name in names)
    failed = False
    for name in names:
        count = -(-args.count * TARGETS[name].share // shares)
        failed |= not _run(name, count, args.seed, args.findings / f"{name}-{args.seed}")
    return int(failed)


def _run(name: str, count: int, seed: int, file: Path) -> bool:
    began = time.monotonic()
    with TARGETS[name]() as target, file.open("wb", buffering=0) as current:
        campaign = Campaign(target, seed, current)
        try:
            campaign.run(count)
        except Found as found:
            file.write_bytes(found.data)
            traceback.print_exception(found.__cause__)
            print(f"{name}: seed {seed}, input {found.index}, written to {file}:")
            print(target.show(found.data))
            print(f"again: make fuzz TARGET={name} REPLAY={file}", flush=True)
            return False
    file.unlink()
    print(
        f"{name:10} {count:8} inputs, no finding; {len(campaign.kept)} kept,"
        f" {len(campaign.reached)} steps reached in {', '.join(target.modules)};"
        f" {time.monotonic() - began:.0f} s, grew by {campaign.growth >> 10} MiB",
        flush=True,
    )
    return True


def _replay(name: str, file: Path) -> int:
    with TARGETS[name]() as target:
        data = file.read_bytes()
        print(target.show(data), flush=True)
        with time_limit():
            target.check(data)
        target.check_mappings()
    print("no finding")
    return 0


if __name__ == "__main__":
    sys.exit(main())
