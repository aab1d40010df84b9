"""The commands of a consortium. Only what ``--help`` needs is imported here; a command imports the rest when it runs."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from fedfm.cli.group import Command, usable_path

consortium = typer.Typer(
    name="consortium",
    help="Begin a consortium of real silos, invite members, see who is there, and put a member out.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)


Folder = Annotated[Path, typer.Argument(metavar="DIR", help="The consortium's folder.", callback=usable_path)]
Member = Annotated[str, typer.Argument(metavar="MEMBER", help="The member's name: letters a-z, digits and hyphens.")]
Json = Annotated[bool, typer.Option("--json", help="Answer in JSON on stdout.")]


@consortium.command(cls=Command)
def init(
    folder: Folder,
    name: Annotated[str, typer.Option(help="The consortium's name: letters a-z, digits and hyphens.")],
    url: Annotated[
        list[str] | None,
        typer.Option(help="Where members reach the broker, tls://HOST:PORT; may be given more than once. Default: this machine alone."),
    ] = None,
    listen: Annotated[
        str | None, typer.Option(metavar="ADDRESS:PORT", help="On which the broker listens. Default: the port of --url, on all addresses.")
    ] = None,
    external: Annotated[
        bool, typer.Option("--external-broker", help="Somebody else runs the broker; write the configuration to install there.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Begin a consortium: keys, certificate authority, broker configuration, roster."""
    from fedfm.silos.certificates import now
    from fedfm.silos.consortium import Consortium, Settings, default_listen

    urls = tuple(url or ["tls://127.0.0.1:4222"])
    settings = Settings(name, urls, listen or default_listen(urls), "external" if external else "own")
    made = Consortium.create(folder, settings, now())
    card = made.identity.card
    if as_json:
        _show({"consortium": name, "folder": str(folder), "urls": list(urls), "listen": settings.listen, "fingerprint": card.fingerprint})
        return
    print(f"consortium   {name}, in {folder}")
    print(f"broker       {', '.join(urls)}" + ("" if external else f" (listens on {settings.listen})"))
    print(f"coordinator  {card.short}   (the first half of its fingerprint; members compare it)")
    if external:
        print(f"install      {made.broker.accounts_file} at the broker; docs/deploy.md says how")
    print(f"next         fedfm consortium invite {folder} MEMBER")


@consortium.command(cls=Command)
def invite(
    folder: Folder,
    member: Member,
    out: Annotated[Path | None, typer.Option(help="The file to write. Default: MEMBER.invitation.json here.", callback=usable_path)] = None,
    as_json: Json = False,
) -> None:
    """Write an invitation for one member; it works once, until it expires."""
    from fedfm.silos.certificates import now
    from fedfm.silos.consortium import Consortium
    from fedfm.silos.invitation import require_free

    opened = Consortium.open(folder)
    path = out or Path(f"{member}.invitation.json")
    require_free(path)
    invitation = opened.invite(member, now())
    invitation.write(path)
    if as_json:
        _show({"member": member, "invitation": str(path), "expires": invitation.expires.isoformat(), "returns": bool(invitation.card)})
        return
    print(f"invitation   {path}   (secret; works once, until {invitation.expires:%Y-%m-%d %H:%M} UTC)")
    if invitation.card:
        print(f"for          the keys that {member} has, so that it can come back; for new keys revoke {member} first")
    print(f"coordinator  {invitation.coordinator.short}   (compare it with {member} on the telephone)")
    _tell_external(opened)


@consortium.command(name="list", cls=Command)
def list_(folder: Folder, as_json: Json = False) -> None:
    """Show who was invited, who belongs, who is out, and until when."""
    from fedfm.core import words
    from fedfm.silos.certificates import now
    from fedfm.silos.consortium import Consortium

    opened = Consortium.open(folder)
    rows = opened.members().table(now())
    if as_json:
        _show({"consortium": opened.settings.name, "broker_runs": opened.broker.process() is not None, "members": rows})
        return
    if not rows:
        print(f"Nobody was invited yet. Next: fedfm consortium invite {folder} MEMBER")
        return
    print(f"{'member':<24}{'state':<10}{'since':<12}{'until':<12}{'refused':>8}  keys")
    for row in rows:
        since, until = (str(row[name] or "-")[:10] for name in ("since", "until"))
        print(f"{words.clean(row['member'], 22):<24}{row['state']:<10}{since:<12}{until:<12}{row['refused']:>8}  {row['keys'] or '-'}")
    if opened.settings.broker == "own":
        print(f"\nThe broker {'runs' if opened.broker.process() is not None else 'does not run'}.")


@consortium.command(cls=Command)
def revoke(folder: Folder, member: Member, as_json: Json = False) -> None:
    """Put a member out at once, and void its open invitations."""
    from fedfm.silos.certificates import now
    from fedfm.silos.consortium import Consortium

    opened = Consortium.open(folder)
    belonged = opened.revoke(member, now())
    runs = opened.broker.process() is not None
    if as_json:
        _show({"member": member, "was_member": belonged, "broker_runs": runs})
        return
    print(f"revoked  {member}{'' if belonged else ' (it was invited, and had not entered)'}")
    if opened.settings.broker == "own":
        print("The broker has cut it off." if runs else "The broker does not run; it will not let it in.")
    _tell_external(opened)


def _tell_external(opened: Any) -> None:
    if opened.settings.broker == "external":
        print(
            f"Install {opened.broker.accounts_file} at the broker now, and let it read its configuration again, twice (nats-server --signal reload)."
        )


def _show(value: object) -> None:
    from fedfm.cli.parts import show_json

    show_json(value)
