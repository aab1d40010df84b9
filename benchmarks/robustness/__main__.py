"""Runs killed and resumed, bytes changed, clients and servers that lie: a row for each kind, and exit code 1 where anything came out wrong."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from benchmarks import common
from benchmarks.common import Row, say
from benchmarks.robustness import clients, kills, mutations, servers
from benchmarks.robustness.ground import Tally, workshop

SECTIONS = ("kills", "mutations", "clients", "servers")


def tallies(section: str, folder: Path, quick: bool) -> Iterator[Tally]:
    """The rows of a section."""
    if section == "kills":
        return kills.run(quick)
    made = {"mutations": mutations.run, "clients": clients.run, "servers": servers.run}
    return made[section](folder, quick)


def table(rows: Sequence[Row]) -> str:
    """Rows as a Markdown table."""
    lines = ["| what | kind | cases | what came of them | longest | wrong |", "|---|---|---|---|---|---|"]
    lines += [
        f"| {row['section']} | {row['kind']} | {row['cases']:,} | {row['outcomes']} | {row['slowest']:.2g} s | {len(row['wrong'])} |"
        for row in rows
    ]
    lines.append(f"| **all** | | **{sum(row['cases'] for row in rows):,}** | | | **{sum(len(row['wrong']) for row in rows)}** |")
    return "\n".join(lines)


def main() -> None:
    """The table."""
    options = common.parser(__doc__)
    options.add_argument("sections", nargs="*", metavar="SECTION", help=f"one or more of {', '.join(SECTIONS)}; all unless given")
    given = options.parse_args()
    unknown = set(given.sections) - set(SECTIONS)
    if unknown:
        options.error(f"there is no section {', '.join(sorted(unknown))}; there are {', '.join(SECTIONS)}")
    rows: list[Row] = []
    with workshop() as folder:
        for section in given.sections or SECTIONS:
            for tally in tallies(section, folder, given.quick):
                say(f"{tally.section}: {tally.kind}: {tally.cases:,} cases, {len(tally.wrong)} wrong")
                for what in tally.wrong[:5]:
                    say(f"    {what}")
                rows.append({**common.machine(), **tally.to_row()})
                common.save(rows, given.json)
    print(common.where(rows), table(rows), sep="\n")
    if any(row["wrong"] for row in rows):
        sys.exit(1)


if __name__ == "__main__":
    main()
