"""The guard at an owner's door: holds each request, and each answer before it leaves, to the owner's policy, and writes both into the owner's log.

Order: a request is logged, then held to every rule before any data is read; an answer is held to the rules again with what it declares, what it costs is
spent, and the log's line is on disk before it leaves. Where the log or the account cannot be read or written, nothing leaves.

Covered here: a coordinator that asks for what the owner does not allow, with whatever request. Not covered: what the allowed answers reveal; the size of the
cohort, which is the coordinator's word; an owner's machine whose code was changed.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from typing import Any

from fedfm import notation
from fedfm.client.asking import Door, Question
from fedfm.client.contribution import Contribution
from fedfm.client.log import OwnerLog
from fedfm.client.plan import ClientPlan
from fedfm.client.policy import BOUNDED, PRIVATE, SUMS, Policy
from fedfm.client.spent import SpentStore
from fedfm.core import messages, registry, words
from fedfm.core.errors import PAUSE, FedfmError, PolicyError, RunError
from fedfm.core.leaves import Kind
from fedfm.core.messages import ClientId, Failure, Reply, Request
from fedfm.core.parts import Channel, LocalTrainer, Part, Transform, errand_id
from fedfm.core.tree import raw

_ANSWER = "answer"


@dataclass(frozen=True)
class Asker:
    """Who asks, and for what. All of it but the coordinator's fingerprint is the coordinator's word.

    Args:
        coordinator: The fingerprint of who sends the requests, as the engine has verified it; ``local`` in a simulation.
        run: The run's name.
        cohort: How many clients a usual round asks.
        num_rounds: How many rounds are planned; 0 where nobody said.
    """

    coordinator: str = "local"
    run: str = "-"
    cohort: int = 1
    num_rounds: int = 0


@dataclass
class Guard:
    """One owner's guard.

    Args:
        client: Whose it is.
        policy: The rules.
        plan: What the coordinator says will be worked on, and how answers leave.
        asker: Who asks.
        log: The owner's log.
        spent: Where what was answered is counted.
        base: The digest of the base's weights; called only where a rule or a question needs it.
        now: The house's clock.
        door: Answers questions to a person.
        paused: Since when the owner has paused the house; ``None`` where it is open.
    """

    client: ClientId
    policy: Policy
    plan: ClientPlan
    asker: Asker
    log: OwnerLog
    spent: SpentStore
    base: Callable[[], str]
    now: Callable[[], datetime]
    door: Door
    paused: Callable[[], datetime | None] = lambda: None

    # --- requests ---------------------------------------------------------------------------------------------------------

    def receive(self, request: Request) -> None:
        """Writes a request into the log.

        Raises:
            RunError: if the log was changed or cannot be written.
        """
        self.log.note_policy(self.now(), {"owner": self.client, **self.policy.to_json()})
        size, digest = messages.size(request), digest_of(request)
        self.log.add(
            "request", self.now(), **self._of(request), coordinator=words.clean(self.asker.coordinator, 80), request=digest, size=size
        )

    def admit(self, request: Request, tells: Mapping[Kind, str] | None = None) -> None:
        """Holds a request to the rules, before any data is read.

        Args:
            tells: What the verb's answer tells and cannot leave out, each with the reason.

        Raises:
            PolicyError: naming the rule that refuses.
            RunError: if what was answered before is not known any more.
        """
        policy = self.policy
        self.admit_plan()
        verb = errand_id(request).partition("/")[0] if request.verb in self.plan.channel.verbs else request.verb
        _require_in("verbs", policy.verbs, verb, "the request asks to")
        if not policy.is_open(self.now()):
            raise PolicyError("hours", f"it is {self.now():%a %H:%M} here, and requests are taken {', '.join(policy.hours or ())}.")
        for kind, why in (tells or {}).items():
            if policy.withholds(kind):
                raise PolicyError(
                    "may_leave", f"the answer to {verb} tells its {kind} ({why}), and the owner lets {_listed(policy.may_leave)} leave."
                )
        self._require_quota(request)
        if policy.models is not None:
            self.admit_base(self.base())
        if policy.ask != "never":
            self._ask(request)

    def admit_plan(self) -> None:
        """Holds the plan itself to the rules that need neither model nor data: an owner's machine looks before it loads or prepares anything.

        Raises:
            PolicyError: naming the rule that refuses.
        """
        policy, plan = self.policy, self.plan
        self._require_no_pause()
        _require_in("coordinators", policy.coordinators, self.asker.coordinator, "the coordinator is")
        _require_in("tasks", policy.tasks, type(plan.task).__name__, "the task is")
        if policy.columns is not None:
            for column in plan.task.columns:
                _require_in("columns", tuple(policy.columns), column, "the task reads the column")
        if self.asker.cohort < policy.min_cohort:
            raise PolicyError(
                "min_cohort",
                f"the coordinator says that a round asks {self.asker.cohort}, and the owner wants {policy.min_cohort} or more.",
            )
        for demand in policy.demand:
            if not any(_meets(part, demand) for part in (plan.channel, plan.local, *plan.transforms)):
                raise PolicyError(
                    "demand", f"the owner demands {demand!r} before anything leaves, and no part of this plan meets it. {_offered(demand)}"
                )

    def admit_base(self, base: str) -> None:
        """Holds the base that the coordinator names to the rules, before a byte of it is fetched.

        Raises:
            PolicyError: if it is not among the owner's models.
        """
        if self.policy.models is not None and base not in self.policy.models:
            raise PolicyError(
                "models", f"the base's weights have the digest {base}, which is not among the owner's {len(self.policy.models)}."
            )

    def admit_bytes(self, size: int) -> None:
        """Holds what would be fetched of a base to the rules.

        Raises:
            PolicyError: if it is more than the owner takes from the coordinator.
        """
        most = self.policy.model_bytes
        if most is not None and size > most:
            raise PolicyError(
                "model_bytes",
                f"this machine lacks {words.size(size)} of the base, and its owner takes {words.size(most)} from the coordinator. "
                "Put the base's files where the plan names them, or into the folder of --models.",
            )

    def _require_no_pause(self) -> None:
        since = self.paused()
        if since is not None:
            raise PolicyError(
                PAUSE, f"its owner paused it on {since:%Y-%m-%d at %H:%M %Z}".rstrip() + ", and nothing leaves until that ends."
            )

    def is_waiting(self, request: Request, tells: Mapping[Kind, str] | None = None) -> bool:
        """Whether this request waits for a person, and for nothing else, so that an engine may keep it until it is answered."""
        try:
            self.admit(request, tells)
        except PolicyError as error:
            return error.rule == "ask" and self.door(self.client, self._question(request)) is None
        except FedfmError:
            pass
        return False

    def _require_quota(self, request: Request) -> None:
        policy = self.policy
        if policy.rounds is None and policy.total_bytes is None:
            return
        entries = [(what, amount) for what, amount in self.spent.entries(self.client) if what.startswith(f"{_ANSWER}/")]
        mine, kind = self._expense(request), self._expense(request).rpartition("/")[0]
        answered = {what for what, _ in entries if what.startswith(f"{kind}/")}
        # Asked again for the same, a house gives the same answer, which tells nothing new.
        if policy.rounds is not None and mine not in answered and len(answered) >= policy.rounds:
            raise PolicyError(
                "rounds",
                f"{len(answered)} different requests to {words.clean(request.verb, 40)} were answered, which is all that the owner gives.",
            )
        size = sum(amount for _, amount in entries)
        if policy.total_bytes is not None and size >= policy.total_bytes:
            raise PolicyError("total_bytes", f"{words.size(size)} have left, and the owner gives {words.size(policy.total_bytes)} in all.")

    def _ask(self, request: Request) -> None:
        question = self._question(request)
        verdict = self.door(self.client, question)
        self.log.note_question(self.now(), question, verdict)
        if verdict == "no":
            raise PolicyError("ask", f"a person was asked ({question.id}) and said no.")
        if verdict is None:
            raise PolicyError("ask", f"a person must say yes first, and is asked ({question.id}). Ask again later.")

    def _question(self, request: Request) -> Question:
        plan, asker, ask = self.plan, self.asker, self.policy.ask
        planned = f"{asker.num_rounds} rounds, " if asker.num_rounds else ""
        text = (
            f"The coordinator {words.clean(asker.coordinator, 80)} asks for the run {words.clean(asker.run, 80)} ({planned}{asker.cohort} clients in a round, as it says): "
            f"task {plan.task!r}, base with the digest {self.base()}, tuning {plan.tuning!r}, work {plan.local!r}. Answers leave {self.guarantee()}."
        )
        about: list[Any] = [
            asker.coordinator,
            asker.run,
            asker.cohort,
            asker.num_rounds,
            notation.write(plan),
            self.base(),
            self.policy.to_json(),
        ]
        if ask == "round":
            text += f" Now it asks to {words.clean(request.verb, 40)} in round {words.clean(request.round, 20)}."
            about += [request.verb, request.round]
        return Question(hashlib.blake2b(json.dumps(about).encode(), digest_size=8).hexdigest(), words.clean(text))

    # --- answers ----------------------------------------------------------------------------------------------------------

    def inspect(self, contribution: Contribution) -> None:
        """Holds an answer to the rules before its channel seals it.

        Raises:
            PolicyError: naming the rule that refuses.
        """
        update, leaves = contribution.update, contribution.leaves
        declared = {leaf.name for leaf in leaves}
        unknown = sorted(update.metrics.keys() - declared)
        if unknown:
            raise PolicyError("may_leave", f"the answer tells {words.listed(unknown)}, which its verb does not declare.")
        values: dict[str, Any] = {**update.payload, **update.metrics}
        for leaf in leaves:
            kept = [kind for kind in leaf.tells if self.policy.withholds(kind)]
            if kept and leaf.name in values and not leaf.is_silent(values[leaf.name]):
                raise PolicyError(
                    "may_leave", f"{leaf.name!r} tells {' and '.join(kept)}, and the owner lets {_listed(self.policy.may_leave)} leave."
                )
        groups = {leaf.group for leaf in leaves}
        for demand in self.policy.demand:
            if demand == PRIVATE and _meets(self.plan.local, demand):
                # What the trainer has made is covered; what else is told is not, so it must say nothing.
                stands = all(leaf.is_silent(values[leaf.name]) for leaf in leaves if leaf.tells and leaf.name in values)
            else:
                stands = _stands(demand, self.plan.channel, contribution.transforms, groups)
            if not stands:
                raise PolicyError(
                    "demand", f"the owner demands {demand!r}, which does not cover all of this answer ({', '.join(sorted(groups))})."
                )

    def release(self, request: Request, reply: Reply, contribution: Contribution | None) -> None:
        """Counts and logs an answer as it leaves. When this returns, both are on disk.

        Args:
            contribution: The answer before it was sealed; ``None`` in an exchange of the channel's own.

        Raises:
            PolicyError: if it is longer than the owner allows.
            RunError: if the account or the log cannot be written.
        """
        self._require_no_pause()
        parts = messages.pack_parts(reply)
        size, most, total = sum(map(len, parts)), self.policy.max_bytes, self.policy.total_bytes
        if most is not None and size > most:
            raise PolicyError("max_bytes", f"the answer has {words.size(size)}, and the owner lets {words.size(most)} leave at a time.")
        if total is not None:
            gone = math.fsum(amount for what, amount in self.spent.entries(self.client) if what.startswith(f"{_ANSWER}/"))
            if gone + size > total:
                raise PolicyError(
                    "total_bytes",
                    f"with this answer {words.size(gone + size)} would have left, and the owner gives {words.size(total)} in all.",
                )
        self.spent.add(self.client, self._expense(request), size)
        digest = hashlib.blake2b(digest_size=32)
        for part in parts:
            digest.update(part)
        groups = frozenset(leaf.group for leaf in contribution.leaves) if contribution else frozenset()
        through = [transform for transform in contribution.transforms if transform.covers & groups] if contribution else []
        self.log.add(
            "release",
            self.now(),
            **self._of(request),
            request=digest_of(request),
            size=size,
            blake2b=digest.hexdigest(),
            leaves=_contents(reply, contribution, self.policy),
            guarantee=self.guarantee(through),
        )

    def refuse(self, request: Request, failure: Failure, refusal: PolicyError | None = None) -> Failure:
        """What a coordinator is told of a request that is not answered, written into the log first.

        Args:
            refusal: What the policy says, where it was the policy that refused.

        Returns:
            The failure with its reason, where the policy lets it leave.
        """
        keep = refusal is None and self.policy.withholds("reasons")
        told = replace(failure, reason="its owner's log tells why.") if keep else failure
        try:
            if refusal is not None:
                self.log.add("refusal", self.now(), **self._of(request), rule=refusal.rule, why=refusal.why)
            else:
                self.log.add("failure", self.now(), **self._of(request), why=f"{failure.stage}: {failure.reason}", told=told.reason)
        except RunError:
            # The log is the owner's to mend; the coordinator learns no more than that.
            return replace(told, stage="log", reason="its owner's log cannot be written.")
        return told

    def guarantee(self, transforms: Sequence[Transform] | None = None) -> str:
        """Under which guarantee an answer leaves, in words."""
        chain = self.plan.transforms if transforms is None else transforms
        through = f"after {', '.join(map(repr, chain))}" if chain else "unchanged by any transform"
        private = (
            "" if any(_meets(part, PRIVATE) for part in (self.plan.local, *chain)) else " Nothing promises differential privacy at home."
        )
        channel = type(self.plan.channel).__name__
        seen = "sums alone are seen" if _meets(self.plan.channel, SUMS) else "the coordinator sees this owner's answer by itself"
        return f"{through}, by the channel {channel}: {seen}.{private}"

    def _of(self, request: Request) -> dict[str, Any]:
        return {"run": words.clean(self.asker.run, 80), "verb": words.clean(request.verb, 80), "round": words.clean(request.round, 20)}

    def _expense(self, request: Request) -> str:
        phase = "before" if request.round == 0 else "rounds"
        # An exchange of the channel counts with the verb that it is made for: the rule is about rounds.
        verb = f"{errand_id(request).partition('/')[0]}.{request.verb}" if request.verb in self.plan.channel.verbs else request.verb
        return f"{_ANSWER}/{words.clean(verb, 60)}/{phase}/{digest_of(request)}"


def digest_of(request: Request) -> str:
    """Names a request: 32 hexadecimal digits that differ where anything in it does."""
    digest = hashlib.blake2b(json.dumps([request.body.digest, dict(request.own)], sort_keys=True).encode(), digest_size=16)
    for name, leaf in sorted(request.own_tensors.items()):
        digest.update(json.dumps([name, str(leaf.dtype), list(leaf.shape)]).encode())
        digest.update(raw(leaf))
    return digest.hexdigest()


def _require_in(rule: str, allowed: Sequence[str] | None, given: str, said: str) -> None:
    if allowed is not None and given not in allowed:
        raise PolicyError(rule, f"{said} {words.clean(given, 80)}, and the owner allows {_listed(allowed)}.")


def _listed(names: Sequence[str]) -> str:
    return words.listed(names, 8) or "nothing"


def _meets(part: Part, demand: str) -> bool:
    """Whether a part of the plan is what the owner demands."""
    if demand == SUMS:
        return isinstance(part, Channel) and "single-updates" in part.traits().hides
    if demand == PRIVATE:
        # Noise that the server adds does not keep an answer from the server.
        return not isinstance(part, Channel) and "private" in part.traits().is_ and "server-noise" not in part.traits().is_
    if demand == BOUNDED:
        return isinstance(part, Transform) and "bounds" in part.traits().is_
    return type(part).__name__ == demand


def _stands(demand: str, channel: Channel, transforms: Sequence[Transform], groups: set[str]) -> bool:
    """Whether a demand is met for an answer of these groups of leaves."""
    if _meets(channel, demand):
        return True
    covers = frozenset[str]().union(*(transform.covers for transform in transforms if _meets(transform, demand)))
    if demand == PRIVATE:
        return groups <= covers
    # Numbers are no update: they have no length, and are bounded by their declaration.
    return groups - {"told"} <= covers


def _offered(demand: str) -> str:
    """Which parts would meet a demand, in words."""
    offered = []
    for room in ("channels", "local", "transforms"):
        for name, entry in registry.entries(room).items():
            try:
                part = entry.load()()
            except (TypeError, FedfmError):
                continue  # Whether it meets a demand depends on what it is given.
            if isinstance(part, Channel | LocalTrainer | Transform) and _meets(part, demand):
                offered.append(name)
    return f"It is met by {words.listed(offered, 8)}." if offered else "No part that is known here meets it without more ado."


def _contents(reply: Reply, contribution: Contribution | None, policy: Policy) -> Mapping[str, Any]:
    """What is in an answer, for the log: tensors by group, numbers with their values, and what was withheld."""
    if contribution is None:
        sent = {"names": list(reply.tensors), "values": sum(leaf.numel() for leaf in reply.tensors.values())}
        return {
            "tensors": {"channel": sent} if reply.tensors else {},
            "numbers": {name: _plain(value) for name, value in reply.meta.items()},
        }
    update, leaves = contribution.update, contribution.leaves
    kept = [leaf.name for leaf in leaves if any(policy.withholds(kind) for kind in leaf.tells)]
    tensors: dict[str, dict[str, Any]] = {}
    for leaf in leaves:
        if not leaf.is_number and leaf.name not in kept:
            group = tensors.setdefault(leaf.group, {"names": [], "values": 0})
            group["names"].append(leaf.name)
            group["values"] += leaf.size
    numbers = {name: _plain(value) for name, value in update.metrics.items() if name not in kept}
    return {"tensors": tensors, "numbers": numbers, "withheld": kept}


def _plain(value: Any) -> Any:
    """A value as JSON holds it."""
    if isinstance(value, str):
        return words.clean(value, 80)
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value
