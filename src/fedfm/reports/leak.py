"""The page of ``fedfm leak``: what a server could read from one owner's update, for a person who is no engineer.

It shows a text of the owner's, so it belongs into the owner's house. Text from data is escaped by the template.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fedfm.core.words import clean, percent
from fedfm.reports.page import page, write_page

_NAMES = {
    "EmbeddingRows": "Which words, from the embedding's rows",
    "Span": "Which words, from the first layer's gradient",
    "Labels": "Which classes the examples have",
    "Lengths": "How long the longest text is",
    "Membership": "Whether a text that the server holds is among mine",
}


def write(path: Path, leak: Mapping[str, Any]) -> Path:
    """Writes the page and returns its path.

    Args:
        leak: As ``Leak.to_json`` gives it.

    Raises:
        RunError: if it cannot be written.
    """
    return write_page(path, html(leak))


def html(leak: Mapping[str, Any]) -> str:
    """The page."""
    cases = [case for case in leak["cases"] if not case["why_not"]]
    return page(
        "leak.html",
        {
            "leak": leak,
            "cases": cases,
            "absent": [case for case in leak["cases"] if case["why_not"]],
            "rows": [(title(name), [cell(case["attacks"].get(name)) for case in cases]) for name in leak["questions"]],
            "bars": [bar(case, leak["tokens"]) for case in cases],
            "sentences": sentences(leak),
            "advice": advice(leak),
            "marked": [(case["title"], list(zip(leak["words"], case["marks"], strict=True))) for case in cases],
        },
    )


def title(name: str) -> str:
    """An attack as a row's title; its own name where another package brought it."""
    return _NAMES.get(name, name)


def cell(finding: Mapping[str, Any] | None) -> dict[str, str]:
    """One cell of the table: what was read, what chance gives, and a CSS class."""
    if finding is None or finding["right"] is None:
        return {"value": "nothing there", "note": "", "style": "good"}
    return {
        "value": percent(finding["right"]),
        "note": f"a guess: {percent(finding['chance'])}",
        "style": {"near chance": "good", "all": "bad"}.get(finding["word"], ""),
    }


def best(case: Mapping[str, Any], names: Sequence[str]) -> Mapping[str, Any] | None:
    """The finding of the attack that read most words; ``None`` where none had anything to read."""
    read = [case["attacks"][name] for name in names if name in case["attacks"] and case["attacks"][name]["right"] is not None]
    return max(read, key=lambda finding: float(finding["right"]), default=None)


def bar(case: Mapping[str, Any], names: Sequence[str]) -> dict[str, Any]:
    """One bar of the picture: words that were read, in percent, with the mark of chance."""
    found = best(case, names)
    right, chance = (0.0, 0.0) if found is None else (float(found["right"]), float(found["chance"]))
    return {
        "title": case["title"],
        "right": 100 * right,
        "chance": 100 * chance,
        "value": "nothing there" if found is None else percent(right),
    }


def sentences(leak: Mapping[str, Any]) -> list[str]:
    """What was read, a sentence or two for each case."""
    return [said for case in leak["cases"] if not case["why_not"] for said in _of_case(case, leak)]


def _of_case(case: Mapping[str, Any], leak: Mapping[str, Any]) -> list[str]:
    found, member = best(case, leak["tokens"]), case["attacks"].get("Membership")
    begin = f"{case['title']}: "
    if found is None:
        said = begin + "the update holds no rows of an embedding and no gradient of the first layer, so these attacks read no word."
    else:
        right, chance = percent(found["right"]), percent(found["chance"])
        said = (
            begin
            + {
                "all": f"the server reads all different words of the text ({right}; a guess without the update gets {chance}).",
                "near chance": f"the server reads {right} of the different words. That is near chance, because a guess without the update gets {chance}.",
                "part": f"the server reads {right} of the different words, where a guess without the update gets {chance}.",
            }[found["word"]]
        )
        if found["in_group"] is not None:
            said += f" Among the words of the whole sum, {percent(found['in_group'])} of this owner's show; whose they are, the sum does not say."
    if member is not None and member["word"] in ("part", "all") and case["name"] in ("noise", "plan", "released", "lora"):
        said += (
            " Whoever holds a text already can still test whether it was used: it is told apart from one that was not in "
            f"{percent(member['right'])} of pairs (a guess: 50 %)."
        )
    return [said]


def advice(leak: Mapping[str, Any]) -> list[str]:
    """What follows for this plan."""
    plan = next((case for case in leak["cases"] if case["name"] == "plan" and not case["why_not"]), None)
    if plan is None:
        return []
    found, said = best(plan, leak["tokens"]), []
    if found is not None and found["word"] != "near chance":
        said.append(
            "This plan's update gives words away. Train adapters instead of all parameters (LoRA), join a sum that the server sees only as a whole, or add noise."
        )
    labels, lengths = plan["attacks"].get("Labels"), plan["attacks"].get("Lengths")
    if labels and labels["word"] in ("part", "all"):
        said.append("This plan's update gives classes away: the classification head trains in the open, with LoRA too.")
    if lengths and lengths["word"] in ("part", "all"):
        said.append(
            "The length of texts can be read, from positions or from the numbers that the client itself tells (may_leave in its policy withholds them)."
        )
    if not said:
        said.append("These attacks read nothing from this plan's update beyond chance. Others may read more: this is a test, and no proof.")
    return said


def lines(leak: Mapping[str, Any]) -> list[str]:
    """The same for a terminal."""
    shown = [
        f"What a server could read from an update of {clean(leak['owner'], 60)} made from {leak['num_texts']} example(s), mean of {leak['trials']}; in brackets what a guess gets.",
        "",
    ]
    cases = [case for case in leak["cases"] if not case["why_not"]]
    for case in cases:
        shown.append(case["title"])
        for name in leak["questions"]:
            one = cell(case["attacks"].get(name))
            note = f" ({one['note'].removeprefix('a guess: ')})" if one["note"] else ""
            shown.append(f"  {title(name):<52}{one['value']}{note}")
    shown += [f"{case['title']}: not looked at, because {clean(case['why_not'], 300)}" for case in leak["cases"] if case["why_not"]]
    return [*shown, "", *sentences(leak), *advice(leak)]
