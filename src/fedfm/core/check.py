"""The plan check: trust is a property of the whole plan.

Each part declares what it needs, hides and promises (:class:`fedfm.core.parts.Traits`) and may
look at the plan it is in. ``check`` reads all of it before anything runs.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

from fedfm.core.errors import PlanError, PrivacyError
from fedfm.core.leaves import Leaf
from fedfm.core.parts import Finding, Part, Plan, Transform, refuse, transform_place, warn
from fedfm.core.roster import Roster
from fedfm.core.tree import Spec, Tree


def check(plan: Plan, num_clients: int | None = None, roster: Roster | None = None, params: Tree | None = None) -> list[Finding]:
    """All findings, refusals first.

    Args:
        num_clients: How many owners there are, where that is known.
        roster: What they tell of themselves, where they were asked.
        params: The parameters that train, where the model is loaded.
    """
    findings = [
        *_traits(plan),
        *_order(plan),
        *_sums(plan),
        *_carried(plan, num_clients, params),
        *_privacy(plan),
        *_cohort(plan, num_clients),
        *_withheld(plan, roster),
        *_idle(plan),
    ]
    for place, part in plan.parts().items():
        findings.extend(part.check(plan))
        findings.extend(_guarantee(place, part, plan, num_clients))
    order = {"refusal": 0, "warning": 1, "note": 2, "promise": 3}
    return sorted(dict.fromkeys(findings), key=lambda finding: order[finding.level])


def require(plan: Plan, num_clients: int | None = None, roster: Roster | None = None, params: Tree | None = None) -> list[Finding]:
    """Like :func:`check`, but refusals are raised together.

    Raises:
        PlanError: with every refusal, its reason and its remedy.
    """
    findings = check(plan, num_clients, roster, params)
    refusals = [f"{finding.where}: {finding.text}" for finding in findings if finding.level == "refusal"]
    if refusals:
        raise PlanError("This plan cannot mean what it says.\n" + "\n".join(f"- {text}" for text in refusals))
    return findings


def _guarantee(place: str, part: Part, plan: Plan, num_clients: int | None) -> Iterator[Finding]:
    """What a privacy promise comes to in numbers, or why it cannot be named."""
    try:
        guarantee = part.guarantee(plan, num_clients)
    except PrivacyError as error:
        yield refuse(place, str(error))
        return
    if guarantee is not None:
        yield Finding("promise", place, guarantee.sentence())
        if guarantee.caution:
            yield warn(place, guarantee.caution)


def _traits(plan: Plan) -> Iterator[Finding]:
    parts = plan.parts()
    for place, part in parts.items():
        for text in part.traits().promises:
            yield Finding("promise", place, text)
        for other_place, other in parts.items():
            clash = part.traits().needs & other.traits().hides
            if other is not part and clash and not (isinstance(part, Transform) and isinstance(other, Transform)):
                yield refuse(
                    place,
                    f"{type(part).__name__} needs {', '.join(sorted(clash))}, which {type(other).__name__} ({other_place}) hides. Remove one of the two.",
                )


def _order(plan: Plan) -> Iterator[Finding]:
    # Within a chain only what stands to the left of a transform can hide something from it.
    for i, part in enumerate(plan.transforms):
        for other in plan.transforms[:i]:
            clash = part.traits().needs & other.traits().hides
            if clash:
                yield refuse(
                    transform_place(i),
                    f"{type(part).__name__} needs {', '.join(sorted(clash))}, which {type(other).__name__} to its left hides. "
                    f"Put {type(part).__name__} before {type(other).__name__}.",
                )


def _sums(plan: Plan) -> Iterator[Finding]:
    """A channel that shows sums alone decodes the sum, so decoding must commute with addition."""
    if "single-updates" not in plan.channel.traits().hides:
        return
    channel = type(plan.channel).__name__
    if not plan.aggregator.takes_sums():
        yield refuse(
            "aggregator", f"{type(plan.aggregator).__name__} needs each client's update, and {channel} shows sums alone. Use Mean."
        )
    for i, transform in enumerate(plan.transforms):
        if "linear" not in transform.traits().is_:
            yield refuse(
                transform_place(i),
                f"{type(transform).__name__} cannot be decoded from a sum, and {channel} shows sums alone. Leave one of the two out.",
            )
    if plan.on_failure == "retry":
        yield refuse(
            "on_failure",
            f"retry asks few clients once more, whose sum tells more of each, and {channel} is there to hide it. Use leave_out.",
        )
    alone = [leaf.name for leaf in _leaves(plan) if leaf.reduce == "each"]
    if alone:
        yield refuse("local", f"{type(plan.local).__name__} sends {', '.join(alone)} that must stay apart, and {channel} shows sums alone.")


def _carried(plan: Plan, num_clients: int | None, params: Tree | None) -> Iterator[Finding]:
    """What answers hold must pass the channel as they declare it."""
    cohort = plan.min_clients if num_clients is None else plan.sampler.largest_cohort(num_clients)
    yield from plan.channel.check_leaves(_leaves(plan, params), max(cohort, 1), plan.aggregator.uniform())


def _leaves(plan: Plan, params: Tree | None = None) -> tuple[Leaf, ...]:
    """What would leave a client; before a model is loaded, one with one parameter, which shows the kinds of leaves."""
    one = Spec(("parameter",), ((1,),), (torch.float32,))
    trained, travelling = (one, one) if params is None else (Spec.of(params), Spec.of(plan.travelling(params)))
    declared = plan.local.leaves(trained, travelling)
    for transform in plan.transforms:
        declared = transform.leaves(declared)
    return declared


def _privacy(plan: Plan) -> Iterator[Finding]:
    """A privacy promise holds for what it covers; one leaf beside it breaks it. Coins that one part repeats are no secret of another."""
    promises = {place: part for place, part in plan.parts().items() if "private" in part.traits().is_}
    simulated = {place for place, part in promises.items() if "simulated" in part.traits().is_}
    if simulated and simulated != set(promises):
        yield refuse(
            min(simulated),
            f"{', '.join(sorted(simulated))} is simulated and {', '.join(sorted(set(promises) - simulated))} is not. A run protects or it can be repeated: "
            "set simulated alike in all.",
        )
    groups = {"delta", "told", *(leaf.group for leaf in _leaves(plan))}
    for i, transform in enumerate(plan.transforms):
        bare = sorted(groups - transform.covers)
        if "private" in transform.traits().is_ and bare:
            yield refuse(
                transform_place(i),
                f"{type(transform).__name__} promises privacy and covers {', '.join(sorted(transform.covers))}, but leaves of the group "
                f"{' and '.join(bare)} leave uncovered.",
            )


def _idle(plan: Plan) -> Iterator[Finding]:
    """Numbers with which a run learns nothing."""
    if plan.rounds == 0:
        yield warn("rounds", "with 0 rounds the base is evaluated and nothing is trained. Set rounds to 1 or more.")
    for place, part in plan.parts().items():
        if getattr(part, "lr", None) == 0:
            yield warn(place, f"{type(part).__name__} has lr 0, so every step is zero and the model stays as it is. Set lr above 0.")


def _withheld(plan: Plan, roster: Roster | None) -> Iterator[Finding]:
    if roster is None:
        return
    for place, part in plan.parts().items():
        for what in sorted(part.traits().needs & {"counts", "labels"}):
            owners = roster.withholds(what)
            if owners:
                yield refuse(
                    place,
                    f"{part} needs the owners' {what}, which {', '.join(owners[:3])}{' and others' if len(owners) > 3 else ''} withhold. "
                    "Let every client count alike (Mean: {weights: uniform}), or ask the owners.",
                )


def _cohort(plan: Plan, num_clients: int | None) -> Iterator[Finding]:
    if num_clients is None:
        return
    cohort = plan.sampler.cohort_size(num_clients)
    yield from plan.channel.check_cohort("train", min(cohort, num_clients))
    yield from plan.channel.check_cohort("count what all owners have", num_clients)
    if cohort > num_clients:
        yield refuse(
            "sampler",
            f"a cohort of {cohort} is asked for, but only {num_clients} owners have usable data. Lower it to at most {num_clients}.",
        )
    needed = max(plan.min_clients, plan.aggregator.min_updates())
    if cohort < needed:
        yield refuse(
            "aggregator" if plan.aggregator.min_updates() >= plan.min_clients else "min_clients",
            f"a round needs {needed} updates ({type(plan.aggregator).__name__} needs {plan.aggregator.min_updates()}, min_clients is {plan.min_clients}), "
            f"but the cohort is {cohort} of {num_clients} owners. Sample more clients or ask for less.",
        )
