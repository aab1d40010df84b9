"""The certificate authority of a consortium: it says who may open a connection to the broker, and until when.

Covered here: certificates for the broker and its clients, each for one use; a client's cannot stand for a broker. A certificate is withdrawn by
taking its serial number out of the broker's users (:mod:`fedfm.silos.consortium`), which takes effect at once; there is no list to fetch.
Not covered: somebody who has the file ``ca.key``. Such a person can connect as anybody, though not sign or read messages as anybody.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING

from fedfm.core.errors import ConfigError, MessageError
from fedfm.silos import certificates, private
from fedfm.silos.certificates import Holder
from fedfm.wire.identity import require_cryptography

if TYPE_CHECKING:
    from collections.abc import Sequence

    from cryptography import x509
    from cryptography.hazmat.primitives.asymmetric.ec import EllipticCurvePrivateKey, EllipticCurvePublicKey

CERTIFICATE, KEY = "ca.pem", "ca.key"
LIFETIME = timedelta(days=3652)
# A member's clock may be behind ours.
_SKEW = timedelta(hours=1)


@dataclass(frozen=True)
class Issued:
    """A certificate that was made.

    Args:
        pem: Its text.
        serial: Its serial number.
        expires: Its last second.
    """

    pem: str
    serial: int
    expires: datetime


@dataclass(frozen=True)
class Authority:
    """Makes certificates.

    Args:
        consortium: The consortium's slug.
        key: The authority's private key.
        certificate: Its own certificate.
    """

    consortium: str
    key: EllipticCurvePrivateKey
    certificate: x509.Certificate

    @staticmethod
    def create(folder: Path, consortium: str, when: datetime) -> Authority:
        """A new authority, written into ``folder``.

        Raises:
            ConfigError: if others can enter the folder.
            MissingExtra: if ``cryptography`` is not installed.
            RunError: if it cannot be written.
        """
        require_cryptography()
        from cryptography import x509
        from cryptography.hazmat.primitives import hashes

        private.make_folder(folder)
        key = certificates.new_key()
        name = certificates.subject(f"fedfm authority of {consortium}", consortium)
        builder = (
            x509.CertificateBuilder(name, name, key.public_key(), x509.random_serial_number())
            .not_valid_before(when - _SKEW)
            .not_valid_after(when + LIFETIME)
            .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
            .add_extension(_usage(signs_certificates=True), critical=True)
            .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
        )
        authority = Authority(consortium, key, builder.sign(key, hashes.SHA256()))
        private.write(folder / KEY, certificates.key_pem(key))
        private.write(folder / CERTIFICATE, authority.pem.encode())
        return authority

    @staticmethod
    def open(folder: Path, consortium: str) -> Authority:
        """The authority in a folder.

        Raises:
            ConfigError: if it is missing, damaged, or open to others.
        """
        private.require_folder(folder)
        key = certificates.load_key(folder / KEY)
        try:
            certificate = certificates.certificate(private.read(folder / CERTIFICATE))
        except MessageError as error:
            raise ConfigError(f"{folder / CERTIFICATE} is damaged: {error} Restore it from a backup.") from error
        if certificate.public_key() != key.public_key():
            raise ConfigError(f"{folder / CERTIFICATE} and {folder / KEY} do not belong together. Restore both from one backup.")
        return Authority(consortium, key, certificate)

    @property
    def pem(self) -> str:
        """The authority's certificate as text, which everybody may have."""
        from cryptography.hazmat.primitives import serialization

        return self.certificate.public_bytes(serialization.Encoding.PEM).decode()

    def client(self, role: str, name: str, key: EllipticCurvePublicKey, when: datetime, lifetime: timedelta) -> Issued:
        """A certificate for a client of the broker.

        Args:
            role: ``coordinator``, ``member`` or ``invitation``.
            name: The holder's slug.
        """
        from cryptography import x509
        from cryptography.x509.oid import ExtendedKeyUsageOID

        assert role in certificates.ROLES
        serial = x509.random_serial_number()
        uri = x509.UniformResourceIdentifier(Holder(self.consortium, role, name, serial).uri)
        return self._issue(name, key, serial, [uri], ExtendedKeyUsageOID.CLIENT_AUTH, when, lifetime)

    def server(self, hosts: Sequence[str], key: EllipticCurvePublicKey, when: datetime, lifetime: timedelta) -> Issued:
        """A certificate for the broker.

        Args:
            hosts: Names and addresses under which clients reach it.

        Raises:
            ConfigError: if one of them is neither.
        """
        from cryptography import x509
        from cryptography.x509.oid import ExtendedKeyUsageOID

        names = certificates.server_names(hosts)
        return self._issue("broker", key, x509.random_serial_number(), names, ExtendedKeyUsageOID.SERVER_AUTH, when, lifetime)

    def _issue(
        self,
        name: str,
        key: EllipticCurvePublicKey,
        serial: int,
        names: Sequence[x509.GeneralName],
        use: x509.ObjectIdentifier,
        when: datetime,
        lifetime: timedelta,
    ) -> Issued:
        from cryptography import x509
        from cryptography.hazmat.primitives import hashes, serialization

        # A certificate that outlives its authority would be refused all the same, with a reason that nobody understands.
        expires = min(when + lifetime, self.certificate.not_valid_after_utc)
        if expires <= when:
            raise ConfigError(
                f"The certificate authority of {self.consortium} expired on {self.certificate.not_valid_after_utc:%Y-%m-%d}. "
                "Make a new consortium and invite its members again."
            )
        made = (
            x509.CertificateBuilder(self.certificate.subject, certificates.subject(name, self.consortium), key, serial)
            .not_valid_before(when - _SKEW)
            .not_valid_after(expires)
            .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
            .add_extension(_usage(signs_certificates=False), critical=True)
            .add_extension(x509.ExtendedKeyUsage([use]), critical=True)
            .add_extension(x509.SubjectAlternativeName(names), critical=False)
            .add_extension(x509.SubjectKeyIdentifier.from_public_key(key), critical=False)
            .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(self.key.public_key()), critical=False)
            .sign(self.key, hashes.SHA256())
        )
        return Issued(made.public_bytes(serialization.Encoding.PEM).decode(), serial, expires)


def _usage(signs_certificates: bool) -> x509.KeyUsage:
    from cryptography import x509

    return x509.KeyUsage(
        digital_signature=not signs_certificates,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        key_cert_sign=signs_certificates,
        crl_sign=signs_certificates,
        encipher_only=False,
        decipher_only=False,
    )
