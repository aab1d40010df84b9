"""Keys, cards and names: what is kept private, what is refused, and whom the broker's lists let do what."""

from __future__ import annotations

import ast
import json
import os
import pickle
from dataclasses import replace
from itertools import combinations
from pathlib import Path

import pytest

import fedfm.wire
from fedfm.core.errors import ConfigError, MessageError

pytest.importorskip("cryptography", reason="the extra 'deploy' is not installed")
pytest.importorskip("nkeys", reason="the extra 'deploy' is not installed")

from fedfm.wire.identity import Card, Identity, Nkey
from fedfm.wire.subjects import Branch, Names, require_id, require_name

ID = "0123456789abcdef" * 2
ALICE, BOB = Identity.create("alice"), Identity.create("bob")


def test_an_identity_is_a_file_that_its_owner_alone_can_read(tmp_path: Path) -> None:
    path = tmp_path / "keys" / "identity.json"
    before = os.umask(0)
    try:
        ALICE.save(path)
    finally:
        os.umask(before)
    assert path.stat().st_mode & 0o777 == 0o600
    assert Identity.load(path) == ALICE and list(path.parent.iterdir()) == [path]
    path.chmod(0o640)
    with pytest.raises(ConfigError, match="mode 640"):
        Identity.load(path)


def test_no_key_is_shown_or_pickled() -> None:
    shown = repr(ALICE) + repr(ALICE.nkey) + repr([ALICE])
    assert ALICE.nkey.seed not in shown and repr(ALICE.sign) not in shown
    for secret in (ALICE, ALICE.nkey):
        with pytest.raises(TypeError, match="pickled"):
            pickle.dumps(secret)


def test_every_key_is_new_and_the_fingerprint_names_all_of_them() -> None:
    assert all(getattr(ALICE, key) != getattr(BOB, key) for key in ("sign", "x25519", "mlkem", "nkey"))
    # One key for the broker's challenges, another for messages.
    assert ALICE.nkey.public.encode() != ALICE.card.sign
    cards = [ALICE.card, *(replace(ALICE.card, **{key: getattr(BOB.card, key)}) for key in ("sign", "x25519", "mlkem"))]
    assert len({card.fingerprint for card in cards}) == 4
    assert replace(ALICE.card, name="carol").fingerprint == ALICE.card.fingerprint
    assert ALICE.card.fingerprint.startswith(ALICE.card.short.replace(" ", ""))


def test_a_card_crosses_as_json() -> None:
    text = json.dumps(ALICE.card.to_json())
    assert Card.from_json(json.loads(text)) == ALICE.card
    assert all(secret not in text for secret in (ALICE.nkey.seed, ALICE.sign.hex()))


GOOD = ALICE.card.to_json()


@pytest.mark.parametrize(
    ("card", "words"),
    [
        (None, "none"),
        ([], "none"),
        ({**GOOD, "kind": "fedfm identity"}, "none"),
        ({**GOOD, "version": 2}, "version 2; this side reads 1"),
        ({**GOOD, "extra": 1}, "differs in extra"),
        ({name: value for name, value in GOOD.items() if name != "mlkem"}, "differs in mlkem"),
        ({**GOOD, "name": "Alice"}, "no name"),
        ({**GOOD, "name": "../alice"}, "no name"),
        ({**GOOD, "name": 7}, "not a short text"),
        ({**GOOD, "sign": "###"}, "not base64"),
        ({**GOOD, "sign": GOOD["x25519"][:40]}, "has 30 bytes; it has 32"),
        ({**GOOD, "mlkem": GOOD["sign"]}, "has 32 bytes; it has 1184"),
        ({**GOOD, "mlkem": "/" * 1578 + "8="}, "public key that is none"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_what_is_no_card_is_refused(card: object, words: str) -> None:
    with pytest.raises(MessageError, match=words):
        Card.from_json(card)


@pytest.mark.parametrize("text", ["", "[]", "{", '{"kind":"fedfm card"}', "[" * 50_000, "x" * 70_000, "\0\xff"])
def test_what_is_no_identity_is_refused(tmp_path: Path, text: str) -> None:
    path = tmp_path / "identity"
    path.write_text(text)
    path.chmod(0o600)
    with pytest.raises(ConfigError, match="not an identity"):
        Identity.load(path)
    with pytest.raises(ConfigError, match="cannot be read"):
        Identity.load(tmp_path / "absent")


@pytest.mark.parametrize("seed", ["", "SU", "é" * 58, ALICE.nkey.public, ALICE.nkey.seed[:-1], "SU" + "A" * 56, "SA" + ALICE.nkey.seed[2:]])
def test_what_is_no_nkey_is_refused(seed: str) -> None:
    with pytest.raises(ConfigError, match="nkey"):
        Nkey(seed)


@pytest.mark.parametrize("name", ["", "A", "a" * 41, "a.b", "a*", ">", "a b", "../x", "a/b", "ä", "a\n", None, 3])
def test_what_is_no_name_is_refused(name: object) -> None:
    with pytest.raises(MessageError):
        require_name(name)
    for make in (Names, Names("c").up, Names("c").down, Names("c").ask, Names("c").inbox):
        with pytest.raises(MessageError):
            make(name)  # type: ignore[arg-type]


@pytest.mark.parametrize("value", ["", ID[:-1], ID + "0", ID.upper(), "../" + ID[3:], None])
def test_what_is_no_id_is_refused(value: object) -> None:
    with pytest.raises(MessageError):
        require_id(value)


def allows(pattern: str, subject: str) -> bool:
    """Whether a broker's pattern covers a subject or a narrower pattern."""
    tokens, names = pattern.split("."), subject.split(".")
    for i, token in enumerate(tokens):
        if token == ">":
            return len(names) > i
        if i >= len(names) or (token != "*" and token != names[i]):
            return False
    return len(tokens) == len(names)


def uses(branch: Branch) -> list[str]:
    return [branch.message, branch.chunk(ID, 3), branch.head(ID), branch.all, branch.get, branch.info, branch.next, branch.acknowledge]


def test_a_member_may_use_its_own_branches_and_nobody_elses() -> None:
    names, others = Names("c"), ["b", "a-", "a-b", "aa"]
    rights = names.member_rights("a")

    def may(subject: str) -> bool:
        return any(allows(pattern, subject) for pattern in rights.publish)

    up, down = names.up("a"), names.down("a")
    assert all(map(may, (up.message, up.chunk(ID, 0), up.info, down.next, down.acknowledge)))
    assert may(names.bodies.get.replace(">", f"chunk.{ID}.3")) and may(down.get.replace(">", f"chunk.{ID}.3"))
    # It reads what it is sent by asking for it, and cannot forge that.
    assert not any(map(may, (down.message, down.chunk(ID, 0), names.bodies.head(ID), names.bodies.chunk(ID, 0), up.next)))
    for other in others:
        assert not any(map(may, uses(names.up(other)) + uses(names.down(other)))), other
    for foreign in ("$JS.API.STREAM.CREATE.x", "$JS.API.STREAM.DELETE.fed_c_UP_a", "$JS.API.STREAM.PURGE.fed_c_UP_a", "$JS.API.INFO", "x"):
        assert not may(foreign)
    assert list(rights.subscribe) == ["_INBOX.c.a.>"]
    assert not any(allows(pattern, f"{names.inbox(other)}.x") for pattern in rights.subscribe for other in others)


def test_an_invitation_opens_its_own_two_subjects() -> None:
    names = Names("c")
    rights = names.enrolment_rights("invite-1")
    assert any(allows(pattern, names.ask("invite-1")) for pattern in rights.publish)
    for closed in (names.answer("invite-1"), names.ask("invite-2"), names.up("a").message, names.bodies.get):
        assert not any(allows(pattern, closed) for pattern in rights.publish)
    assert allows(names.asks, names.ask("invite-1")) and not allows(names.asks, names.answer("invite-1"))


def test_no_two_streams_or_subjects_meet() -> None:
    names = [Names("c"), Names("c-a"), Names("c-up-a")]
    branches = [branch for name in names for who in ("a", "up", "a-b") for branch in (name.up(who), name.down(who))]
    branches += [branch for name in names for branch in (name.bodies, name.enrolments)]
    assert len({branch.stream for branch in branches}) == len(branches)
    assert not any(allows(a.all, b.message) or allows(b.all, a.message) for a, b in combinations(branches, 2))


def test_the_number_of_a_chunk_is_read_from_its_subject() -> None:
    branch = Names("c").up("a")
    assert branch.index(branch.chunk(ID, 1234)) == 1234
    assert [branch.index(subject) for subject in ("x", "x.", "x.-1", "x.1e3", "x.²", "x." + "9" * 30, "")] == [None] * 7


def test_no_generator_of_simulations_is_used_on_the_wire() -> None:
    for path in sorted(Path(fedfm.wire.__file__).parent.glob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            modules = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            modules += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            assert not any(module.split(".")[0] in ("random", "numpy", "torch") for module in modules), f"{path.name} imports {modules}"
            assert not (isinstance(node, ast.Attribute) and node.attr in ("random", "randn", "rand")), f"{path.name}:{node.lineno}"
