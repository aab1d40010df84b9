"""Keys and certificates for connections to the broker, as both the coordinator and a member use them.

A client's certificate names its holder in one place, a URI that holds the certificate's own serial number::

    urn:fedfm:nightingale:member:st-marys:6b2f09c1...

The broker takes this URI as the user's name, so that the key of the connection and the rights of the user cannot come apart, and an old
certificate of the same member is another user, whom the broker does not know.

Covered here: TLS 1.3 alone, both sides with certificates of the consortium's authority, keys on P-256 from the operating system's generator.
Not covered: what a holder of a valid key does with its rights; messages are signed and sealed besides (``wire/``).
"""

from __future__ import annotations

import ipaddress
import re
import ssl
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING

from fedfm.core import words
from fedfm.core.errors import ConfigError, MessageError
from fedfm.silos import private
from fedfm.wire.identity import require_cryptography

if TYPE_CHECKING:
    from cryptography import x509
    from cryptography.hazmat.primitives.asymmetric.ec import EllipticCurvePrivateKey, EllipticCurvePublicKey

ROLES = ("coordinator", "member", "invitation")
_URI = re.compile(r"urn:fedfm:([a-z0-9-]{1,40}):(coordinator|member|invitation):([a-z0-9-]{1,40}):([0-9a-f]{1,40})")
_MAX = 1 << 14
"""Bytes of a certificate or a request; ours have less than 2,000."""


def now() -> datetime:
    """The time, to the second, as certificates have it."""
    return datetime.now(UTC).replace(microsecond=0)


@dataclass(frozen=True)
class Holder:
    """Whom a client's certificate names.

    Args:
        consortium: Its slug.
        role: ``coordinator``, ``member`` or ``invitation``.
        name: A slug: of the coordinator, the member, or the id of the invitation.
        serial: The certificate's serial number.
    """

    consortium: str
    role: str
    name: str
    serial: int

    @property
    def uri(self) -> str:
        """The name of the broker's user.

        Example:
            >>> Holder("nightingale", "member", "st-marys", 255).uri
            'urn:fedfm:nightingale:member:st-marys:ff'
        """
        return f"urn:fedfm:{self.consortium}:{self.role}:{self.name}:{self.serial:x}"

    @staticmethod
    def parse(uri: str) -> Holder:
        """Undoes :attr:`uri`.

        Raises:
            MessageError: if it is no such name.
        """
        match = _URI.fullmatch(uri)
        if match is None:
            raise MessageError(f"{uri!r:.80} names no holder of a certificate of a consortium.")
        return Holder(match[1], match[2], match[3], int(match[4], 16))


def new_key() -> EllipticCurvePrivateKey:
    """A private key on P-256, from the operating system's generator.

    Raises:
        MissingExtra: if ``cryptography`` is not installed.
    """
    require_cryptography()
    from cryptography.hazmat.primitives.asymmetric import ec

    return ec.generate_private_key(ec.SECP256R1())


def key_pem(key: EllipticCurvePrivateKey) -> bytes:
    """A private key as text: secret, and not encrypted."""
    from cryptography.hazmat.primitives import serialization

    return key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())


def load_key(path: Path) -> EllipticCurvePrivateKey:
    """The private key in a file.

    Raises:
        ConfigError: if the file is not there, is no key of ours, or others can read it.
    """
    return parse_key(private.read(path, _MAX), words.clean(path, 120))


def parse_key(pem: bytes, what: str) -> EllipticCurvePrivateKey:
    """Undoes :func:`key_pem`.

    Args:
        what: Where it is from, as the error names it.

    Raises:
        ConfigError: if it is no private key on P-256.
    """
    require_cryptography()
    from cryptography.exceptions import UnsupportedAlgorithm
    from cryptography.hazmat.primitives import serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    try:
        key = serialization.load_pem_private_key(pem, None)
    except (ValueError, TypeError, UnsupportedAlgorithm) as error:
        raise ConfigError(f"{what} is no private key that fedfm wrote. Restore it from a backup.") from error
    if not isinstance(key, ec.EllipticCurvePrivateKey) or not isinstance(key.curve, ec.SECP256R1):
        raise ConfigError(f"{what} is a private key of another kind than fedfm writes (P-256). Restore it from a backup.")
    return key


def request(key: EllipticCurvePrivateKey, name: str) -> bytes:
    """A request for a certificate (CSR), as text. It proves that its sender has the private key."""
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes, serialization

    builder = x509.CertificateSigningRequestBuilder().subject_name(subject(name, None))
    return builder.sign(key, hashes.SHA256()).public_bytes(serialization.Encoding.PEM)


def requested_key(pem: bytes) -> EllipticCurvePublicKey:
    """The public key of a request. Nothing else in it is used: the authority alone says what a certificate holds.

    Raises:
        MessageError: if it is no request, its signature is wrong, or the key is not on P-256.
    """
    require_cryptography()
    from cryptography import x509
    from cryptography.exceptions import UnsupportedAlgorithm
    from cryptography.hazmat.primitives.asymmetric import ec

    if len(pem) > _MAX:
        raise MessageError(f"A request for a certificate has {len(pem)} bytes; at most {_MAX} are read.")
    try:
        read = x509.load_pem_x509_csr(pem)
        key, signed = read.public_key(), read.is_signature_valid
    except (ValueError, TypeError, UnsupportedAlgorithm) as error:
        raise MessageError(f"A request for a certificate cannot be read: {error!s:.120}.") from error
    if not signed:
        raise MessageError("The signature of a request for a certificate is wrong.")
    if not isinstance(key, ec.EllipticCurvePublicKey) or not isinstance(key.curve, ec.SECP256R1):
        raise MessageError("A request for a certificate has a key of another kind; it must be on P-256.")
    return key


def certificate(pem: bytes) -> x509.Certificate:
    """A certificate from its text.

    Raises:
        MessageError: if it is none.
    """
    require_cryptography()
    from cryptography import x509

    if len(pem) > _MAX:
        raise MessageError(f"A certificate has {len(pem)} bytes; at most {_MAX} are read.")
    try:
        return x509.load_pem_x509_certificate(pem)
    except (ValueError, TypeError) as error:
        raise MessageError(f"A certificate cannot be read: {error!s:.120}.") from error


def holder(of: x509.Certificate) -> Holder:
    """Whom a client's certificate names.

    Raises:
        MessageError: if it names nobody, more than one, or a serial number that is not its own.
    """
    from cryptography import x509

    try:
        names = of.extensions.get_extension_for_class(x509.SubjectAlternativeName).value.get_values_for_type(x509.UniformResourceIdentifier)
    except (ValueError, x509.ExtensionNotFound, x509.DuplicateExtension) as error:
        raise MessageError("A certificate names no holder.") from error
    if len(names) != 1:
        raise MessageError(f"A certificate names {len(names)} holders; it must name one.")
    named = Holder.parse(names[0])
    if named.serial != of.serial_number:
        raise MessageError("A certificate names a serial number that is not its own.")
    return named


def require_issued(of: x509.Certificate, by: x509.Certificate, key: EllipticCurvePublicKey, when: datetime) -> Holder:
    """The holder of a certificate that an authority made for a key, and that is valid.

    Raises:
        MessageError: if it is another authority's, another key's, or not valid at ``when``.
    """
    from cryptography.exceptions import InvalidSignature

    try:
        of.verify_directly_issued_by(by)
    except (ValueError, TypeError, InvalidSignature) as error:
        raise MessageError("A certificate was not made by the authority of this consortium.") from error
    if of.public_key() != key:
        raise MessageError("A certificate is for another key.")
    if not of.not_valid_before_utc <= when <= of.not_valid_after_utc:
        raise MessageError(
            f"A certificate is valid from {of.not_valid_before_utc:%Y-%m-%d %H:%M} to {of.not_valid_after_utc:%Y-%m-%d %H:%M} UTC, "
            f"and it is {when:%Y-%m-%d %H:%M} UTC. Check the clock of this machine."
        )
    return holder(of)


def subject(name: str, organisation: str | None) -> x509.Name:
    """What a person reads in a certificate; no machine of ours does."""
    from cryptography import x509
    from cryptography.x509.oid import NameOID

    attributes = [x509.NameAttribute(NameOID.COMMON_NAME, name)]
    if organisation is not None:
        attributes.append(x509.NameAttribute(NameOID.ORGANIZATION_NAME, organisation))
    return x509.Name(attributes)


def require_host(host: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address | str:
    """An address, or a host name.

    Raises:
        ConfigError: if it is neither.
    """
    try:
        return ipaddress.ip_address(host)
    except ValueError:
        if re.fullmatch(r"(?!-)[A-Za-z0-9-]{1,63}(\.[A-Za-z0-9-]{1,63})*", host) and len(host) <= 253:
            return host
    raise ConfigError(f"urls: {words.clean(host, 60)!r} is no host name and no address under which members could reach the broker.")


def server_names(hosts: Sequence[str]) -> list[x509.GeneralName]:
    """Host names and addresses, as a server's certificate has them.

    Raises:
        ConfigError: if one is neither.
    """
    from cryptography import x509

    known = [require_host(host) for host in hosts]
    return [x509.DNSName(host) if isinstance(host, str) else x509.IPAddress(host) for host in known]


def client_context(authority: str, client: Path) -> ssl.SSLContext:
    """How somebody connects to the broker: TLS 1.3, the broker's certificate checked against one authority, a certificate of one's own.

    Args:
        authority: The authority's certificate, as text. No other authority is trusted, the machine's own ones included.
        client: A file with one's private key and certificate.

    Raises:
        ConfigError: if it is missing or damaged, or others can read it.
    """
    private.read(client, 2 * _MAX)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    try:
        context.load_verify_locations(cadata=authority)
        context.load_cert_chain(client)
    except (ssl.SSLError, OSError, ValueError) as error:
        raise ConfigError(f"{words.clean(client, 120)} holds no key with its certificate, or is damaged ({error!s:.80}).") from error
    return context
