"""What every local trainer must do."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from fedfm.core.keys import Key
from fedfm.core.parts import Cohort, LocalTrainer, Objective, ServerOptimizer
from fedfm.core.secret import Secret
from fedfm.core.tree import Spec, Tree
from fedfm.testing.parts import check_part, copied, same

SIZE = 6
STEPS_K = (5, 5, 3, 1)
# Examples of each client, around its target.
NUM_EXAMPLES = 4


def check_local(trainer: LocalTrainer, server: ServerOptimizer | None = None) -> None:
    """A cohort's clients do not touch each other, what they started from stays as it was, and on a quadratic of its own each goes downhill.

    Args:
        server: The server step whose leaves the trainer needs (SCAFFOLD's control variate), where it needs some.

    Raises:
        AssertionError: naming the law that is broken.
    """
    check_part(trainer)
    name, work = type(trainer).__name__, trainer.work
    assert (work.steps is None) != (work.epochs is None), (
        f"{name}.work has steps={work.steps} and epochs={work.epochs}; exactly one is given"
    )
    for num_steps in (1, 7):
        rates = [trainer.lr_at(step, num_steps, round) for step in range(num_steps) for round in (1, 20)]
        assert all(math.isfinite(rate) and rate >= 0 for rate in rates), f"{name}.lr_at gives {rates}"
    params: Tree = {"w": _draw("start", SIZE)}
    # Before the first round no client remembers anything, and the server sends its initial state.
    received = copied(server.broadcast(params, server.init(params))) if server is not None else {}
    memories: list[Tree] = [{}] * len(STEPS_K)
    for round in (1, 2):
        together = _work(trainer, params["w"], received, memories, list(range(len(STEPS_K))), round)
        for k in range(len(STEPS_K)):
            alone = _work(trainer, params["w"], received, memories, [k], round)
            for what, in_bank, by_itself in zip(
                ("parameters", "payload", "memory"), (row[k] for row in together), (row[0] for row in alone), strict=True
            ):
                assert in_bank.keys() == by_itself.keys() and all(
                    torch.allclose(in_bank[x], by_itself[x], rtol=1e-5, atol=1e-7) for x in by_itself
                ), f"{name}: client {k}'s {what} depend on who shares its bank"
        again = _work(trainer, params["w"], received, memories, list(range(len(STEPS_K))), round)
        assert all(same(x, y) for once, twice in zip(together, again, strict=True) for x, y in zip(once, twice, strict=True)), (
            f"{name} does something else a second time"
        )
        if round == 1:
            for k, row in enumerate(together[0]):
                before, after = (params["w"] - _target(k)).norm(), (row["theta"] - _target(k)).norm()
                assert after < before, f"{name}: client {k} does not go downhill on its own quadratic"
        # From the second round on a server's leaves and a client's memory are not zero.
        received = {leaf: _draw(leaf, *x.shape) for leaf, x in received.items()}
        memories = together[2]


def _work(
    trainer: LocalTrainer, start_d: torch.Tensor, received: Tree, memories: list[Tree], clients: list[int], round: int
) -> tuple[list[Tree], list[Tree], list[Tree]]:
    """A round of these clients in one cohort, each on ``|w - target_k|^2 / 2``: parameters, extra leaves and memory of each."""
    name = type(trainer).__name__
    steps_k = [STEPS_K[k] for k in clients]
    target_kd = torch.stack([_target(k) for k in clients])
    leaves = memories[clients[0]]
    cohort = Cohort(
        theta_kd=start_d.expand(len(clients), -1).clone(),
        start_kd=start_d.expand(len(clients), -1).clone(),
        received=copied(received),
        memory={leaf: torch.stack([memories[k][leaf] for k in clients]) for leaf in leaves},
    )
    trainer.init(cohort)
    wrong = [slot for slot, x in cohort.slots.items() if x.shape[:1] != (len(clients),)]
    assert not wrong, f"{name}: the slots {wrong} have no leading client axis"
    assert torch.equal(cohort.theta_kd, start_d.expand(len(clients), -1)), f"{name}.init moves the parameters"
    lr_sum_k = torch.zeros(len(clients), dtype=torch.float64)
    for step in range(max(steps_k)):
        k = sum(num > step for num in steps_k)
        active = cohort.head(k)
        resting = cohort.theta_kd[k:].clone()
        lr_k = torch.tensor([trainer.lr_at(step, num, round) for num in steps_k[:k]], dtype=torch.float32).unsqueeze(1)
        with torch.no_grad():
            trainer.descend(
                active, _Quadratic(target_kd[:k], [Key.root(0).fold(round, client, step) for client in clients[:k]]), lr_k, step
            )
        assert torch.equal(cohort.theta_kd[k:], resting), f"{name} moves a client that has done its steps"
        lr_sum_k[:k] += lr_k.squeeze(1)
    extra = trainer.finish(cohort, lr_sum_k, torch.tensor(steps_k))
    assert torch.equal(cohort.start_kd, start_d.expand(len(clients), -1)) and same(cohort.received, received), (
        f"{name} changed what all clients share"
    )
    spec = Spec(("w",), ((SIZE,),), (torch.float32,))
    declared = {leaf.name: (len(clients), *leaf.shape) for leaf in trainer.leaves(spec, spec) if leaf.name != "w"}
    assert {leaf: tuple(x.shape) for leaf, x in extra.items()} == declared, (
        f"{name}.finish gives other leaves than are declared: {declared}"
    )
    assert all(x.dtype == torch.float32 for x in extra.values()), f"{name}.finish gives leaves that are not float32"
    rows = range(len(clients))
    return (
        [{"theta": cohort.theta_kd[row].clone()} for row in rows],
        [{leaf: x[row].clone() for leaf, x in extra.items()} for row in rows],
        [{leaf: x[row].clone() for leaf, x in cohort.memory.items()} for row in rows],
    )


class _Quadratic(Objective):
    """``|w - target_k|^2 / 2``. Each client's examples have targets of their own, of which ``target_k`` is the mean."""

    def __init__(self, target_kd: torch.Tensor, keys: list[Key]) -> None:
        self.target_kd, self._keys = target_kd, keys

    def losses(self, theta_kd: torch.Tensor) -> torch.Tensor:
        return (theta_kd - self.target_kd).square().sum(dim=1) / 2

    def gradient(self, theta_kd: torch.Tensor) -> torch.Tensor:
        return theta_kd - self.target_kd

    def per_example(self, theta_kd: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        owner_n = torch.arange(len(theta_kd)).repeat_interleave(NUM_EXAMPLES)
        offset_nd = torch.stack([_draw(f"offset-{i}", SIZE) for i in range(NUM_EXAMPLES)])
        offset_nd = (offset_nd - offset_nd.mean(dim=0)).repeat(len(theta_kd), 1)
        return (theta_kd - self.target_kd)[owner_n] + offset_nd, owner_n

    def clipped_sum(self, theta_kd: torch.Tensor, max_norm: float) -> torch.Tensor:
        grad_nd, owner_n = self.per_example(theta_kd)
        factor_n1 = (max_norm / grad_nd.norm(dim=1, keepdim=True)).clamp(max=1.0)
        return torch.zeros_like(theta_kd).index_add_(0, owner_n, grad_nd * factor_n1)

    @property
    def sizes(self) -> list[int]:
        return [NUM_EXAMPLES] * len(self._keys)

    def noisy(self, sum_kd: torch.Tensor, std_k: Sequence[float]) -> torch.Tensor:
        streams = [Secret.simulated(key).stream("noise") for key in self._keys]
        return torch.stack([stream.noisy(row_d, std).float() for row_d, std, stream in zip(sum_kd, std_k, streams, strict=True)])

    def keys(self, name: str) -> list[Key]:
        return [key.fold(name) for key in self._keys]


def _target(k: int) -> torch.Tensor:
    return 3 + _draw(f"target-{k}", SIZE)


def _draw(name: str, *shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=Key.root(0).fold("check_local", name).generator())
