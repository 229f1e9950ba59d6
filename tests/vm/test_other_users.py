"""What other users put at a path, with each value of the settings that protect some systems.

fs.protected_symlinks, protected_hardlinks, protected_regular and protected_fifos belong to the
whole machine, so this one is a guest.
"""

import pytest

from .harness import MakeGuest

SETTINGS = (
    # symlinks, hardlinks, regular, fifos
    (0, 0, 0, 0),
    (1, 1, 1, 1),  # Debian's
    (1, 1, 2, 2),  # systemd's
    (0, 1, 0, 0),
    (1, 0, 2, 0),
)


@pytest.mark.nightly
def test_other_users(guest: MakeGuest) -> None:
    a = guest(
        f"""
        import os
        from pathlib import Path
        import attacks

        names = ("symlinks", "hardlinks", "regular", "fifos")
        for place in ("/tmp", "/dev/shm"):
            os.makedirs(place, exist_ok=True)
            if not os.path.ismount(place):
                assert os.system(f"busybox mount -t tmpfs none {{place}}") == 0
            os.chmod(place, 0o1777)
        place = Path("/tmp/place")
        place.mkdir(mode=0o755)
        for values in {SETTINGS}:
            for name, value in zip(names, values):
                setting = Path(f"/proc/sys/fs/protected_{{name}}")
                setting.write_text(str(value))
                assert setting.read_text().strip() == str(value)
            for attack in attacks.ATTACKS:
                attacks.run(attack, place)
                print("held:", *values, attack.__name__, flush=True)
        """
    )
    assert a.wait(timeout=300) == 0
    assert len([line for line in a.lines if line.startswith("held:")]) == 5 * 9
