"""Configuration files that are wrong, and what is said of each."""

from __future__ import annotations

SOCKET = 'socket = "/run/x/a"\n'
A = f"[region.a]\n{SOCKET}"

WRONG: dict[str, tuple[str | bytes, str]] = {
    "empty": ("", "no region: add a table [region.NAME] with a socket"),
    "no TOML": ("a", "not TOML: "),
    "no text": (b"\xff", "not TOML: 'utf-8' codec can't decode byte 0xff"),
    "twice": (A + SOCKET, "not TOML: "),
    "deep": (f"a = {'[' * 10**5}", "not TOML: "),
    "decimal": (f"{A}size = {'9' * 9999}", "not TOML: Exceeds the limit"),
    "hexadecimal": (
        f"{A}size = 0x{'f' * 9999}",
        "region.a.size = ...: TOML's numbers have 63 bits",
    ),
    "64 bits": (f"{A}vectors = {1 << 63}", f"region.a.vectors = {1 << 63}: TOML's numbers"),
    "large": ("#" * (1 << 20) + "\n", "the file is larger than 1M, the limit"),
    "table": (f"regions = 1\n{A}", "regions: unknown (is region meant?)"),
    "control character": (
        f'"\\u001b[2J" = 1\n{A}',
        r"\x1b[2J: unknown (known are service, region)",
    ),
    "region": ("region = 5", "no region"),
    "region.a": ("[region]\na = 5", "region.a: expected a table"),
    "service": (f"service = 1\n{A}", "service: expected a table"),
    "name of a region": (
        '[region."a.b"]\nsocket="/x"',
        'region."a.b": a name has up to 64 letters, digits, - and _',
    ),
    "foreign digit": ('[region."²"]\nsocket="/x"', 'region."²": a name has'),
    "key": (f'{A}socke = "/x"', "region.a.socke: unknown (is socket meant?)"),
    "strange key": (f"{A}zzz = 1", "region.a.zzz: unknown (known are socket, size, vectors, name"),
    "key of the service": (f"{A}[service]\nlogformat = 1", "(is log_format meant?)"),
    "no socket": ("[region.a]", "region.a: no socket: add its path"),
    "relative": ('[region.a]\nsocket = "a"', 'region.a.socket = "a": expected an absolute path'),
    "long": (f'[region.a]\nsocket = "/{"x" * 200}"', "at most 107 bytes, this one 201"),
    "line": (
        '[region.a]\nsocket = "/a\\nb"',
        r'socket = "/a\nb": expected a text of printable characters',
    ),
    "size": (
        f'{A}size = "3M"',
        'region.a.size = "3M": a region cannot have 3M: it must be a power of two and at least one'
        " page (4K); the nearest that works is 4M",
    ),
    "fraction": (f"{A}size = 4e6", 'size = 4000000.0: expected a size, such as "4M"'),
    "true size": (f"{A}size = true", 'size = true: expected a size, such as "4M"'),
    "negative size": (f"{A}size = -1", "a size cannot be negative"),
    "largest size": (f"{A}size = {(1 << 63) - 1}", "the largest is 4E"),
    "vectors": (f"{A}vectors = 2049", "vectors = 2049: expected a number from 0 to 2048"),
    "POSIX name": (f'{A}name = "a/b"', "is not a POSIX shared memory name"),
    "hugepages": (f'{A}hugepages = "3M"', 'hugepages = "3M": this machine has no huge pages of 3M'),
    "flag": (f"{A}keep = 1", "region.a.keep = 1: expected true or false"),
    "date": (f"{A}keep = 1979-05-27", "region.a.keep = 1979-05-27: expected true or false"),
    "existing": (f'{A}existing = "x"', "expected one of attach, grow, refuse, replace, require"),
    "list": (f'{A}existing = ["attach"]', "existing = ['attach']: expected one of attach"),
    "slots": (f"{A}names = 4096", "names = 4096: expected a number from 0 to 4095"),
    "channels": (f'{A}channels = "8K"', 'channels = "8K": at least 16K'),
    "few channels": (f"{A}channels = 4096", "channels = 4096: at least 16K"),
    "true channels": (f"{A}channels = true", 'channels = true: expected a size, such as "1M"'),
    "decimal mode": (f"{A}mode = 660", "mode = 660: expected up to three octal digits in quotes"),
    "mode": (f'{A}mode = "7777"', 'mode = "7777": expected up to three octal digits'),
    "digits": (f'{A}mode = "٦٦٠"', "up to three octal digits"),
    "owner": (f'{A}owner = "no-such"', "no user 'no-such' on this system"),
    "uid": (f"{A}owner = {1 << 32}", "uid 4294967296: allowed are 0 to"),
    "group": (f'{A}group = "no-such"', "no group 'no-such' on this system"),
    "true group": (f"{A}group = true", "group = true: expected a name or a number"),
    "rule": (f'{A}allow = ["guid:5"]', "the rule 'guid:5' cannot be read: allowed are uid:USER"),
    "rules": (f'{A}deny = "all"', 'deny = "all": expected a list of texts, such as ["uid:1000"]'),
    "long rule": (f'{A}deny = ["{"x" * 9999}"]', "the rule 'xxx"),
    "limit": (f"{A}peers_per_uid = 0", "a number from 1 to"),
    "log_format": (f'{A}[service]\nlog_format = "xml"', "expected one of text, json"),
    "port": (f"{A}[service]\nmetrics = 65536", "metrics = 65536: expected [HOST:]PORT"),
    "IPv6": (f'{A}[service]\nmetrics = "::1:94"', "expected [HOST:]PORT, such as"),
    # what one setting says to another
    "places": (f'{A}name = "n"\nfile = "/f"', "region.a: name and file exclude each other"),
    "readonly": (f"{A}readonly = true", "only a name or a file can be attached to: give one"),
    "grow": (f'{A}file = "/f"\nexisting = "grow"', 'existing = "grow": only a name can grow'),
    "huge pages": (
        f'{A}size = "1M"\nhugepages = "2M"',
        'region.a.size = "1M": memory in huge pages cannot have 1M',
    ),
    "room for names": (
        f"{A}size = 4096\nnames = 32",
        "they take 4224 bytes, and the region has 4K",
    ),
    "room for channels": (
        f'{A}size = "1M"\nchannels = "1M"',
        'region.a.channels = "1M": 1M for channels: a region of 1M has room for 16K to 1008K',
    ),
    # what one region says to another
    "one socket": (
        f'{A}[region.b]\nsocket = "/run//x/a"',
        'region.b.socket = "/run//x/a": region.a.socket is the same',
    ),
    "one name": (
        f'{A}name = "n"\n[region.b]\nsocket = "/b"\nname = "/n"',
        'region.b.name = "/n": region.a.name is the same',
    ),
    "one memory": (
        f'{A}name = "n"\n[region.b]\nsocket = "/b"\nfile = "/dev/shm/n"',
        'region.b.file = "/dev/shm/n": region.a.name is the same',
    ),
    "control": (
        f'{A}[service]\ncontrol = "/run/x/a"',
        'region.a.socket = "/run/x/a": service.control is the same',
    ),
}
