"""The coordinator's folder: who it is, who belongs, and what the broker lets each of them do.

::

    nightingale/
      consortium.yaml     settings; the only file here that a person edits
      roster.jsonl        who was invited, joined, returned, was revoked: only added to, each line chained to those before
      ca/                 the certificate authority: its key is the most precious file here
      coordinator/        the coordinator's identity, and its certificate for the broker
      broker/             the broker's configuration, certificate, log and stored messages
      jobs/  runs/        what was asked for, and what came of it

Covered here: nobody but the folder's owner can look into it; two commands at once do not mix; a crash at any moment leaves a roster that holds, and
the broker's configuration is made from it anew. Not covered: an older copy of the roster put back, which would bring back who was revoked since.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import re
import secrets
import shutil
import ssl
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields
from datetime import datetime, timedelta
from functools import cached_property
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from fedfm.core import disk, words
from fedfm.core.errors import ConfigError, MessageError, RunError
from fedfm.silos import certificates, private
from fedfm.silos.authority import Authority, Issued
from fedfm.silos.broker import SERVER_CERTIFICATE, SERVER_KEY, Broker, BrokerSettings, User, find_server, write_identity
from fedfm.silos.certificates import Holder, require_host
from fedfm.silos.invitation import Invitation
from fedfm.silos.members import ROSTER, Invited, Members
from fedfm.wire.identity import Card, Identity, require_cryptography
from fedfm.wire.link import Link
from fedfm.wire.subjects import Names, require_name

SETTINGS = "consortium.yaml"
IDENTITY, CLIENT = "identity.json", "client.pem"
COORDINATOR = "coordinator"
_ANY = {"0.0.0.0": "127.0.0.1", "::": "::1"}
# Certificates of the broker and of the coordinator are made anew when they have less than this left.
_RENEW = timedelta(days=30)
_OWN_LIFETIME = timedelta(days=365)
_HEAD = """\
# The settings of a consortium; docs/deploy.md explains them. What is changed here holds from the next start of the broker on.
"""


@dataclass(frozen=True)
class Settings:
    """What ``consortium.yaml`` holds.

    Args:
        name: The consortium's slug. It cannot be changed later.
        urls: Where members reach the broker, ``tls://HOST:PORT``.
        listen: Address and port on which the broker listens.
        broker: ``own`` if this folder's broker is started by ``fedfm serve``, ``external`` if somebody else runs one.
        sync: How often the broker writes to the disk for good: ``always``, or a time such as ``1s`` or ``2m``.
        max_payload: Largest message in bytes; chunks of 512,000 bytes and their heads must fit.
        max_store: Largest total of stored messages in bytes; ``null`` leaves it to NATS.
        max_connections: Most connections at a time.
        member_days: Days for which a member's certificate is valid.
        invitation_days: Days for which an invitation is valid.

    Raises:
        ConfigError: naming the setting that cannot mean what it says.
    """

    name: str
    urls: tuple[str, ...]
    listen: str = "127.0.0.1:4222"
    broker: str = "own"
    sync: str = "1s"
    max_payload: int = 1 << 20
    max_store: int | None = None
    max_connections: int = 1024
    member_days: int = 365
    invitation_days: int = 7

    def __post_init__(self) -> None:
        try:
            require_name(self.name)
        except MessageError as error:
            raise ConfigError(f"name: {error}") from error
        if not self.urls:
            raise ConfigError(
                "urls: at least one address is needed at which members reach the broker, such as tls://broker.example.org:4222."
            )
        for url in self.urls:
            _require_url(url)
        _address(self.listen)
        if self.broker not in ("own", "external"):
            raise ConfigError(f"broker: {self.broker!r:.40} is neither 'own' nor 'external'.")
        if not isinstance(self.sync, str) or not re.fullmatch(r"always|[1-9][0-9]{0,4}(ms|s|m|h)", self.sync):
            raise ConfigError(f"sync: {self.sync!r:.40} is neither 'always' nor a time such as 500ms, 1s or 2m.")
        limits = {
            "max_payload": (1 << 20, 64 << 20),
            "max_store": (1 << 20, 1 << 60),
            "max_connections": (4, 1 << 20),
            "member_days": (1, 3650),
            "invitation_days": (1, 90),
        }
        for name, (low, high) in limits.items():
            value = getattr(self, name)
            if name == "max_store" and value is None:
                continue
            if not isinstance(value, int) or isinstance(value, bool) or not low <= value <= high:
                raise ConfigError(f"{name}: {value!r:.40} is not a whole number from {low} to {high}.")

    @property
    def hosts(self) -> list[str]:
        """Under which names members reach the broker; its certificate holds them."""
        return list(dict.fromkeys(_require_url(url) for url in self.urls))

    def write(self, path: Path) -> None:
        """Writes the file.

        Raises:
            RunError: if it cannot be written.
        """
        import yaml

        values = {**asdict(self), "urls": list(self.urls)}
        private.write(path, (_HEAD + yaml.safe_dump(values, sort_keys=False)).encode())

    @staticmethod
    def read(path: Path) -> Settings:
        """Undoes :meth:`write`.

        Raises:
            ConfigError: if it is not there, no YAML, or has settings that cannot mean what they say.
        """
        import yaml

        shown = words.clean(path, 120)
        try:
            values: Any = yaml.safe_load(private.read(path))
        except (yaml.YAMLError, UnicodeDecodeError, RecursionError) as error:
            raise ConfigError(f"{shown} is no YAML: {error!s:.200}") from error
        known = {field.name for field in fields(Settings)}
        if not isinstance(values, dict) or not values.keys() >= {"name", "urls"} or not values.keys() <= known:
            wrong = sorted(map(str, set(values) - known)) if isinstance(values, dict) else []
            raise ConfigError(
                f"{shown} must hold 'name' and 'urls', and may hold {words.listed(sorted(known), 12)}"
                + (f"; it holds {words.listed(wrong)}." if wrong else ".")
            )
        if not isinstance(values["urls"], list) or not all(isinstance(value, str) for value in [*values["urls"], values["name"]]):
            raise ConfigError(f"{shown}: 'name' is a text, and 'urls' a list of texts.")
        try:
            return Settings(**{**values, "urls": tuple(values["urls"])})
        except ConfigError as error:
            raise ConfigError(f"{shown}: {error}") from error


class Consortium:
    """The folder of a coordinator.

    Args:
        folder: Where it is.
        settings: What its ``consortium.yaml`` says.
    """

    def __init__(self, folder: Path, settings: Settings) -> None:
        self.folder, self.settings = folder, settings
        self.names = Names(settings.name)

    @staticmethod
    def create(folder: Path, settings: Settings, now: datetime) -> Consortium:
        """A new consortium: keys, authority, certificates, the broker's configuration and an empty roster.

        Raises:
            ConfigError: if the folder has something in it, or others can enter it.
            MissingExtra: if the packages of the extra ``deploy`` are not installed.
            RunError: if it cannot be written.
        """
        if folder.exists() and any(folder.iterdir() if folder.is_dir() else [folder]):
            raise ConfigError(f"{words.clean(folder, 120)} is not empty. A consortium begins in a folder of its own; give another one.")
        require_cryptography()
        if settings.broker == "own":
            find_server()
        private.make_folder(folder)
        consortium = Consortium(folder, settings)
        try:
            consortium._fill(now)
        except BaseException:
            # It was empty, and what there is now is of no use.
            for path in folder.iterdir():
                shutil.rmtree(path) if path.is_dir() else path.unlink()
            raise
        return consortium

    def _fill(self, now: datetime) -> None:
        folder, settings = self.folder, self.settings
        for name in ("coordinator", "broker", "jobs", "runs"):
            private.make_folder(folder / name)
        authority = Authority.create(folder / "ca", settings.name, now)
        identity = Identity.create(COORDINATOR)
        identity.save(folder / "coordinator" / IDENTITY)
        private.write(folder / ROSTER, b"")
        members = Members(folder / ROSTER)
        members.add("founded", now, consortium=settings.name, card=identity.card.to_json(), authority=_fingerprint(authority.pem))
        self._certify_coordinator(members, now)
        self._certify_broker(now)
        self.apply(now)
        # Last, so that a folder with it is complete.
        settings.write(folder / SETTINGS)

    @staticmethod
    def open(folder: Path) -> Consortium:
        """The consortium in a folder.

        Raises:
            ConfigError: if there is none, others can enter the folder, or its settings do not hold.
            RunError: if its roster is damaged or of another consortium.
        """
        if not (folder / SETTINGS).is_file():
            raise ConfigError(
                f"{words.clean(folder, 120)} holds no consortium (there is no {SETTINGS} in it). Begin one: fedfm consortium init DIR --name NAME"
            )
        private.require_folder(folder)
        consortium = Consortium(folder, Settings.read(folder / SETTINGS))
        members = consortium.members()
        if members.consortium != consortium.settings.name:
            raise RunError(
                f"{folder / ROSTER} is of the consortium {members.consortium!r}, and {SETTINGS} names {consortium.settings.name!r}. "
                "A consortium keeps its name; put the old one back."
            )
        return consortium

    # --- what is in it ---------------------------------------------------------------------------------------------

    @cached_property
    def identity(self) -> Identity:
        """The coordinator's private keys."""
        return Identity.load(self.folder / "coordinator" / IDENTITY)

    @cached_property
    def authority(self) -> Authority:
        """The certificate authority."""
        return Authority.open(self.folder / "ca", self.settings.name)

    @cached_property
    def broker(self) -> Broker:
        """The broker."""
        settings, (host, port) = self.settings, _address(self.settings.listen)
        how = BrokerSettings(settings.name, host, port, settings.sync, settings.max_payload, settings.max_store, settings.max_connections)
        private.make_folder(self.folder / "broker")
        return Broker(self.folder / "broker", how, external=settings.broker == "external")

    def members(self) -> Members:
        """What the roster says now; another process may have added to it.

        Raises:
            RunError: if it is damaged.
        """
        return Members.read(self.folder / ROSTER)

    def context(self) -> ssl.SSLContext:
        """How the coordinator connects to the broker.

        Raises:
            ConfigError: if its certificate is missing or damaged, or others can read its key.
        """
        return certificates.client_context(self.authority.pem, self.folder / "coordinator" / CLIENT)

    def link(self) -> Link:
        """How the coordinator reaches the members that belong now.

        Raises:
            ConfigError: if the coordinator's keys are missing or damaged, or others can read them.
        """
        return Link(self.names, (self.url,), self.identity, self.context, self.cards)

    def cards(self) -> dict[str, Card]:
        """The public keys of the members that belong now, by name.

        Raises:
            RunError: if the roster is damaged.
        """
        return {member.name: member.card for member in self.members().active(certificates.now())}

    @property
    def url(self) -> str:
        """Where the coordinator itself reaches the broker: on this machine if the broker is its own, whatever the way is from outside."""
        if self.settings.broker == "external":
            return self.settings.urls[0]
        host, port = _address(self.settings.listen)
        host = _ANY.get(host, host)
        return f"tls://{f'[{host}]' if ':' in host else host}:{port}"

    @property
    def _hosts(self) -> list[str]:
        """What the broker's certificate holds."""
        return list(dict.fromkeys([*self.settings.hosts, _require_url(self.url)]))

    # --- what changes it -------------------------------------------------------------------------------------------

    @contextmanager
    def changing(self, patience: float = 30.0) -> Iterator[Members]:
        """The roster, while nobody else changes it.

        Args:
            patience: Seconds to wait for another process.

        Raises:
            RunError: if another process keeps it for longer, or it is damaged.
        """
        try:
            lock = os.open(self.folder / ".lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        except OSError as error:
            raise disk.cannot_write(self.folder / ".lock", error) from error
        try:
            self._acquire(lock, time.monotonic() + patience)
            yield self.members()
        finally:
            os.close(lock)

    def _acquire(self, lock: int, deadline: float) -> None:
        while True:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                return
            except OSError as error:
                if time.monotonic() >= deadline:
                    raise RunError(f"{self.folder} is being changed by another process. Wait for it to end, then try again.") from error
                time.sleep(0.01)

    def invite(self, member: str, now: datetime) -> Invitation:
        """A new invitation; an earlier one for the same name is void.

        A name that nobody has takes any keys. A member's name takes the keys that the member has, so that it can come back on a new machine. A name that was
        revoked takes new keys.

        Raises:
            ConfigError: if the name is no slug, or the coordinator's.
            RunError: if the roster cannot be written, or the broker does not take it over.
        """
        _require_member(member)
        token = secrets.token_bytes(32)
        expires = now + timedelta(days=self.settings.invitation_days)
        id = secrets.token_hex(16)
        key = certificates.new_key()
        issued = self.authority.client("invitation", id, key.public_key(), now, expires - now)
        with self.changing() as members:
            known = members.members.get(member)
            card = known.card.fingerprint if known is not None and known.revoked is None else ""
            members.add(
                "invited",
                now,
                member=member,
                invitation=id,
                token=token_digest(token),
                serial=f"{issued.serial:x}",
                expires=expires.isoformat(),
                card=card,
            )
            self.apply(now, members)
        return Invitation(
            consortium=self.settings.name,
            member=member,
            id=id,
            urls=self.settings.urls,
            authority=self.authority.pem,
            coordinator=self.identity.card,
            token=token,
            certificate=issued.pem,
            key=certificates.key_pem(key).decode(),
            expires=expires,
            card=card,
        )

    def revoke(self, member: str, now: datetime) -> bool:
        """Puts a member out, and voids its open invitations; the broker cuts its connection off.

        Returns:
            Whether it was a member, and not only invited.

        Raises:
            ConfigError: if nobody of this name is there.
            RunError: if the roster cannot be written, or the broker does not take it over.
        """
        _require_member(member)
        with self.changing() as members:
            known, invited = members.members.get(member), members.open_invitation(member, now)
            belongs = known is not None and known.revoked is None
            if not belongs and invited is None:
                # The broker may not have heard of it the last time.
                self.apply(now, members)
                how = "left" if known is not None and known.left else "was revoked"
                was = f"{how} on {known.revoked:%Y-%m-%d}" if known is not None else "was never invited, or its invitation is void"
                raise ConfigError(f"{member} {was}. fedfm consortium list shows who is there.")
            members.add("revoked", now, member=member)
            self.apply(now, members)
        return belongs

    def let_go(self, member: str, serial: str, now: datetime) -> bool:
        """Takes a member that leaves off the roster and the broker, and voids its open invitations.

        Args:
            serial: Number of the certificate with which it leaves, in hexadecimal digits. A member that has another one by now stays.

        Returns:
            Whether it left.

        Raises:
            RunError: if the roster cannot be written, or the broker does not take it over.
        """
        with self.changing() as members:
            known = members.members.get(member)
            leaves = known is not None and known.revoked is None and f"{known.serial:x}" == serial
            if leaves:
                members.add("left", now, member=member)
            # In both cases: a crash may have come before the broker was told.
            self.apply(now, members)
        return leaves

    def enter(self, members: Members, invited: Invited, now: datetime, **what: Any) -> Issued:
        """Writes down that a member joined or returned, with a new certificate. Only with the roster from :meth:`changing`.

        Args:
            what: ``card``, ``key`` (public, of its certificate) and ``request`` (its digest).

        Raises:
            RunError: if the roster cannot be written.
        """
        card, lifetime = what["card"], timedelta(days=self.settings.member_days)
        issued = self.authority.client("member", invited.member, what["key"], now, lifetime)
        known = members.members.get(invited.member)
        returns = known is not None and known.card.fingerprint == card.fingerprint
        members.add(
            "returned" if returns else "joined",
            now,
            member=invited.member,
            invitation=invited.id,
            card=card.to_json(),
            serial=f"{issued.serial:x}",
            certificate=issued.pem,
            expires=issued.expires.isoformat(),
            request=what["request"],
        )
        return issued

    def users(self, members: Members, now: datetime) -> list[User]:
        """Who may connect to the broker now, and what each may do."""
        name, names = self.settings.name, self.names
        users = [User(Holder(name, "coordinator", COORDINATOR, members.serial).uri, names.coordinator_rights(COORDINATOR), None)]
        for member in members.active(now):
            holder = Holder(name, "member", member.name, member.serial)
            users.append(User(holder.uri, names.member_rights(member.name), f"{name}_member_{member.name}"))
        for invited in members.invitations.values():
            if invited.opens(now):
                holder = Holder(name, "invitation", invited.id, invited.serial)
                users.append(User(holder.uri, names.enrolment_rights(invited.id), f"{name}_invitation_{invited.id}"))
        return users

    def apply(self, now: datetime, members: Members | None = None) -> None:
        """Lets the broker follow the roster.

        Raises:
            ConfigError: if NATS refuses the configuration.
            RunError: if it cannot be written, or the running broker does not take it over.
        """
        self.broker.configure(self.users(self.members() if members is None else members, now))

    def renew(self, now: datetime) -> None:
        """Makes the certificates of the broker and the coordinator anew where they end soon, or where ``urls`` has other hosts than the broker's has.

        Raises:
            RunError: if they cannot be written, or the running broker does not take them over.
        """
        with self.changing() as members:
            if self._coordinator_is_stale(members, now):
                self._certify_coordinator(members, now)
            if self._broker_is_stale(now):
                self._certify_broker(now)
                if self.broker.process() is not None:
                    self.broker.reload()
            self.apply(now, members)

    def _coordinator_is_stale(self, members: Members, now: datetime) -> bool:
        try:
            made = certificates.certificate(private.read(self.folder / "coordinator" / CLIENT))
        except (ConfigError, MessageError):
            return True
        return made.serial_number != members.serial or made.not_valid_after_utc < now + _RENEW

    def _broker_is_stale(self, now: datetime) -> bool:
        from cryptography import x509

        folder = self.folder / "broker"
        try:
            made = certificates.certificate(private.read(folder / SERVER_CERTIFICATE))
            fits = made.public_key() == certificates.load_key(folder / SERVER_KEY).public_key()
            names = made.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
        except (ConfigError, MessageError, x509.ExtensionNotFound):
            return True
        return not fits or made.not_valid_after_utc < now + _RENEW or list(names) != certificates.server_names(self._hosts)

    def _certify_broker(self, now: datetime) -> None:
        key = certificates.new_key()
        issued = self.authority.server(self._hosts, key.public_key(), now, _OWN_LIFETIME)
        write_identity(self.folder / "broker", issued.pem, certificates.key_pem(key), self.authority.pem)

    def _certify_coordinator(self, members: Members, now: datetime) -> None:
        key = certificates.new_key()
        issued = self.authority.client("coordinator", COORDINATOR, key.public_key(), now, _OWN_LIFETIME)
        # One file with both, so that a crash cannot leave a key without its certificate.
        private.write(self.folder / "coordinator" / CLIENT, certificates.key_pem(key) + issued.pem.encode())
        members.add("coordinator", now, serial=f"{issued.serial:x}", expires=issued.expires.isoformat())


def token_digest(token: bytes) -> str:
    """What the coordinator keeps of an invitation's token. The token has 256 random bits, so that nobody can guess it from the digest."""
    return hashlib.blake2b(token, digest_size=32, person=b"fedfm token").hexdigest()


def _fingerprint(pem: str) -> str:
    return hashlib.blake2b(pem.encode(), digest_size=32).hexdigest()


def _require_member(name: str) -> None:
    try:
        require_name(name)
    except MessageError as error:
        raise ConfigError(f"A member's name: {error}") from error
    if name == COORDINATOR:
        raise ConfigError(f"{COORDINATOR!r} is the name of the coordinator itself. Choose another name for the member.")


def _require_url(url: str) -> str:
    """The host of a URL of a broker."""
    try:
        parts = urlsplit(url)
        host, port = parts.hostname, parts.port
    except ValueError as error:
        raise ConfigError(f"urls: {words.clean(url, 80)!r} is no address: {error}.") from error
    if parts.scheme != "tls" or not host or port is None or parts.username is not None or parts.path or parts.query or parts.fragment:
        raise ConfigError(
            f"urls: {words.clean(url, 80)!r} is no address of a broker. Write it as tls://HOST:PORT, such as tls://broker.example.org:4222."
        )
    require_host(host)
    return host


def default_listen(urls: Sequence[str]) -> str:
    """Where the broker listens unless something is said: the port of the first URL, on this machine alone if no URL names another.

    Raises:
        ConfigError: if a URL is none.
    """
    hosts = [_require_url(url) for url in urls]
    return f"{'127.0.0.1' if set(hosts) <= {'127.0.0.1', 'localhost'} else '0.0.0.0'}:{urlsplit(urls[0]).port}"


def _address(listen: object) -> tuple[str, int]:
    host, _, port = listen.rpartition(":") if isinstance(listen, str) else ("", "", "")
    host = host.removeprefix("[").removesuffix("]")
    if not host or not port.isdecimal() or not 1 <= int(port) <= 65535:
        raise ConfigError(f"listen: {listen!r:.60} is no address and port such as 0.0.0.0:4222.")
    return host, int(port)
