"""Who may become a peer, and of what kind: rules about users, groups and processes.

Knows: rules as texts, what they mean, which process has which program, who joined how often.
Does not know: sockets, what a peer is sent, what becomes of who is refused.

Invariants:
1. Rules are read once, at construction: what cannot be read raises there, and nothing later does.
2. What cannot be found out about somebody counts against them: it matches no rule of `allow`, and
   every rule of `deny` and `readonly`.
3. What is remembered of joins is bounded by the users who joined during the last minute.
"""

from __future__ import annotations

import operator
import os
import time
from collections.abc import Callable, Iterable

from ..system.accounts import group_id, user_id
from ..system.credentials import Credentials
from ..system.named_tuple import NamedTuple
from ..text import counted

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import SupportsIndex, TypeAlias

_COMM = 15  # bytes of a process's name that the kernel keeps in /proc/PID/comm
_DELETED = " (deleted)"  # follows the path of a program that was replaced since, as by an upgrade

_MINUTE = 60.0  # seconds
_MANY_USERS = 1024  # remembered before those are looked for who need not be any more

_FORMS = 'uid:USER, gid:GROUP, process:PROGRAM, root or all (for example "uid:libvirt-qemu")'

# Whether somebody is meant; None if that cannot be found out.
_Test: TypeAlias = Callable[[Credentials], "bool | None"]


class Verdict(NamedTuple):
    """A decision about a process that connects.

    Attributes:
        allowed: whether it becomes a peer.
        readonly: whether it gets a descriptor of the memory that is open for reading only.
        reason: why it is refused, or can only read, in a few words; "" if neither.
    """

    allowed: bool
    readonly: bool = False
    reason: str = ""


class Rules:
    """Rules about which processes may become peers of a server, and whether they may write.

    Args:
        allow: these processes may be peers, and no others. Without any, each process that can open
            the socket may.
        deny: these may not, even if `allow` names them.
        readonly: these get memory that they can only read.
        peers_per_uid: how many peers a user can have at a time, so that no user takes all ids and
            descriptors. It limits root, too: on many hosts guests run as root.
        joins_per_minute: how often a user's peers can join, root's, too. So many may come at once,
            and then each after its share of a minute. There are 65,536 ids, and one that QEMU was
            told of is not used again while that QEMU runs. Without a limit, a user who connects
            thousands of times a second uses them up in seconds.

    Each rule is a text:

    | rule | means |
    |---|---|
    | `uid:1000`, `uid:libvirt-qemu` | processes of that user (its effective uid) |
    | `gid:107`, `gid:kvm` | processes of that group: their effective one or a supplementary one |
    | `process:qemu-system-x86_64` | processes that run a program of that file name |
    | `root` | the same as `uid:0` |
    | `all` | everybody |

    The kernel tells user and groups as they were when the process connected, so a process cannot
    pretend to be another user. Names are looked up once, here.

    A rule about processes helps against mistakes. Against attackers it does not help, unless other
    rules restrict the users. Any user can give a program any name, debug it, or connect and then
    run another program, and pids are used again. The name is that of the executable file. If that
    is hidden, it is the name that the process gives itself, of which the kernel keeps 15 bytes.

    Raises:
        ValueError: a rule cannot be read, a user or a group does not exist, or a limit would admit
            no process.
    """

    # What __repr__ finds where a constructor has failed.
    allow: tuple[str, ...] = ()
    deny: tuple[str, ...] = ()
    readonly: tuple[str, ...] = ()
    peers_per_uid: int | None = None
    joins_per_minute: int | None = None

    def __init__(
        self,
        allow: Iterable[str] = (),
        deny: Iterable[str] = (),
        readonly: Iterable[str] = (),
        peers_per_uid: SupportsIndex | None = None,
        joins_per_minute: SupportsIndex | None = None,
    ) -> None:
        self.allow = _texts(allow, "allow")
        self.deny = _texts(deny, "deny")
        self.readonly = _texts(readonly, "readonly")
        self.peers_per_uid = _limit(peers_per_uid, "peers_per_uid")
        self.joins_per_minute = _limit(joins_per_minute, "joins_per_minute")
        self._joins: dict[int, float] = {}  # by uid: when all the joins so far are paid for
        self._allow = [(text, parse(text)) for text in self.allow]
        self._deny = [(text, parse(text)) for text in self.deny]
        self._readonly = [(text, parse(text)) for text in self.readonly]

    def judge(self, who: Credentials, connected_of_uid: int | None = 0) -> Verdict:
        """What becomes of `who`, whose user has `connected_of_uid` peers already.

        None: it only asks, and limits do not matter. An answer that allows a join counts as one.
        """
        for text, test in self._deny:
            if test(who) is not False:
                return Verdict(False, reason=f"deny {text}")
        if self._allow and not any(test(who) for _, test in self._allow):
            return Verdict(False, reason="no rule of allow matches")
        if connected_of_uid is not None and (reason := self._over(who.uid, connected_of_uid)):
            return Verdict(False, reason=reason)
        for text, test in self._readonly:
            if test(who) is not False:
                return Verdict(True, readonly=True, reason=f"readonly {text}")
        return Verdict(True)

    def _over(self, uid: int, connected: int) -> str:
        """The limit that a user has reached, "" if none; then this is one join more."""
        if self.peers_per_uid is not None and connected >= self.peers_per_uid:
            return f"uid {uid} has {connected} of {counted(self.peers_per_uid, 'peer')}"
        if self.joins_per_minute is not None:
            now = time.monotonic()
            share = _MINUTE / self.joins_per_minute
            paid = max(self._joins.get(uid, 0.0), now) + share
            if paid > now + _MINUTE + share / 100:  # a little for what floats lose
                return f"uid {uid} has joined {counted(self.joins_per_minute, 'time')} in a minute"
            if len(self._joins) >= _MANY_USERS:
                self._joins = {other: at for other, at in self._joins.items() if at > now}
            self._joins[uid] = paid
        return ""

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Rules) and self._key() == other._key()

    def __hash__(self) -> int:
        return hash(self._key())

    def __repr__(self) -> str:
        allow, deny, readonly, peers_per_uid, joins_per_minute = self._key()
        return f"Rules({allow=}, {deny=}, {readonly=}, {peers_per_uid=}, {joins_per_minute=})"

    def _key(self) -> tuple[object, ...]:
        return self.allow, self.deny, self.readonly, self.peers_per_uid, self.joins_per_minute


def _limit(value: SupportsIndex | None, what: str) -> int | None:
    if value is None:
        return None
    number = operator.index(value)
    if number < 1:
        raise ValueError(f"{what} {number}: 1 is the least; to let nobody in, deny all")
    return number


def _texts(rules: Iterable[str], what: str) -> tuple[str, ...]:
    """A text is iterable itself: its letters would each be refused, with a puzzling message."""
    if isinstance(rules, str):
        raise ValueError(
            f"{what}: expected a list of rules, got the text {rules!r}: write [{rules!r}]"
        )
    return tuple(rules)


# -- one rule -------------------------------------------------------------------------------------


def parse(text: str) -> _Test:
    """What a rule means.

    Raises:
        ValueError: it cannot be read, or names a user or a group that does not exist.
    """
    if not isinstance(text, str):
        raise ValueError(f"the rule {text!r} is not a text: allowed are {_FORMS}")
    if text == "all":
        return lambda _: True
    kind, colon, name = text.partition(":")
    if text == "root":
        kind, colon, name = "uid", ":", "0"
    if not colon or not name or kind not in ("uid", "gid", "process") or name != name.strip():
        raise ValueError(f"the rule {text!r} cannot be read: allowed are {_FORMS}")
    if kind == "process":
        return _process(text, name)
    try:
        number = user_id(name) if kind == "uid" else group_id(name)
    except ValueError as error:
        raise ValueError(f"the rule {text!r}: {error}") from None
    if kind == "uid":
        return lambda who: who.uid == number
    return lambda who: _in_group(who, number)


def _in_group(who: Credentials, group: int) -> bool | None:
    if who.gid == group:
        return True
    return None if who.groups is None else group in who.groups


def _process(text: str, name: str) -> _Test:
    if "/" in name:
        raise ValueError(
            f"the rule {text!r}: expected a file name without its directory, for example"
            f' "process:{os.path.basename(name) or "qemu-system-x86_64"}"'
        )
    return lambda who: _runs(who, name)


def _runs(who: Credentials, name: str) -> bool | None:
    try:
        path = os.readlink(f"/proc/{who.pid}/exe")
    except OSError:  # gone, in another pid namespace, or another user's that may not be looked at
        if who.process in ("", "?"):
            return None
        return who.process == name.encode()[:_COMM].decode(errors="replace")
    return os.path.basename(path.removesuffix(_DELETED)) == name
