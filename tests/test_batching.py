import time

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fedfm.core.batch import IGNORE, Row, Shaping, collate
from fedfm.core.keys import Key
from fedfm.core.parts import Work
from fedfm.core.task import Vocabulary
from fedfm.data import plan

KEY = Key.root(0)
quick = settings(deadline=None, max_examples=50)


class Lengths:
    """Examples of which only the lengths matter."""

    vocabulary = Vocabulary(100)

    def __init__(self, lengths):
        self.lengths = np.array(lengths, dtype=np.int64)

    def __len__(self):
        return len(self.lengths)

    def ids(self, i):
        return np.arange(self.lengths[i])

    def start(self, i):
        return 0

    def label(self, i):
        return -1


lengths = st.lists(st.integers(1, 40), min_size=1, max_size=60)


@quick
@given(lengths, st.integers(1, 9), st.integers(1, 3), st.integers(1, 3))
def test_an_epoch_takes_every_example_exactly_once(lengths, batch_size, accumulate, epochs):
    steps = plan(Lengths(lengths), Work(batch_size, None, epochs, accumulate), KEY.fold("a"), KEY.fold("r"))
    per_epoch = -(-len(lengths) // (batch_size * accumulate))
    assert len(steps) == per_epoch * epochs
    for epoch in range(epochs):
        taken = np.concatenate(steps[epoch * per_epoch : (epoch + 1) * per_epoch])
        assert sorted(taken.tolist()) == list(range(len(lengths)))
    assert all(0 < len(step) <= batch_size * accumulate for step in steps)


@quick
@given(lengths, st.integers(1, 9), st.integers(0, 30))
def test_steps_go_on_over_shuffles_and_use_examples_evenly(lengths, batch_size, num):
    steps = plan(Lengths(lengths), Work(batch_size, num, None), KEY.fold("a"), KEY.fold("r"))
    assert len(steps) == num
    uses = np.bincount(np.concatenate([np.zeros(0, dtype=np.int64), *steps]), minlength=len(lengths))
    assert uses.max() - uses.min() <= 1


@quick
@given(lengths, st.integers(1, 4))
def test_all_examples_at_once(lengths, num):
    everything = list(range(len(lengths)))
    assert [step.tolist() for step in plan(Lengths(lengths), Work(None, num, None), KEY, KEY)] == [everything] * num
    assert [step.tolist() for step in plan(Lengths(lengths), Work(None, None, num), KEY, KEY)] == [everything] * num
    assert [step.tolist() for step in plan(Lengths(lengths), Work(len(lengths), None, num), KEY, KEY)] == [everything] * num


@quick
@given(lengths)
def test_a_plan_is_a_function_of_its_arguments(lengths):
    def of(client, round):
        return [step.tolist() for step in plan(Lengths(lengths), Work(3, None, 2), KEY.fold(client), KEY.fold("round", round))]

    assert of("a", 1) == of("a", 1)
    # The round's key orders the steps and draws nothing else.
    assert sorted(of("a", 1)[: -(-len(lengths) // 3)]) == sorted(of("a", 2)[: -(-len(lengths) // 3)])


def test_no_examples_no_steps():
    assert plan(Lengths([]), Work(4, 10, None), KEY, KEY) == []
    assert plan(Lengths([]), Work(None, None, 2), KEY, KEY) == []


def test_a_short_step_falls_on_any_length():
    short = set()
    for client in range(40):
        steps = plan(Lengths(range(1, 11)), Work(4, None, 1), KEY.fold(client), KEY.fold("r"))
        (step,) = (step for step in steps if len(step) == 2)
        short.add(int(step.min()))
    assert len(short) > 2


def padded(clients, batch_size, key_round):
    """Tokens in the rectangles that a bank of these clients computes, by whether they share the round's key."""
    plans = [plan(Lengths(lengths), Work(batch_size, None, 1), KEY.fold(k), key_round(k)) for k, lengths in enumerate(clients)]
    return sum(
        max(max(clients[k][i] for i in steps[s]) for k, steps in enumerate(plans)) * len(plans) * batch_size for s in range(len(plans[0]))
    )


def test_clients_of_a_round_draw_like_lengths_together():
    rng = np.random.default_rng(0)
    clients = [rng.geometric(0.02, size=64).clip(1, 256).tolist() for _ in range(16)]
    together = padded(clients, 4, lambda k: KEY.fold("round"))
    apart = padded(clients, 4, lambda k: KEY.fold("round", k))
    real = sum(map(sum, clients))
    assert together < 0.6 * apart
    assert 1 - real / together < 0.4


row = st.tuples(st.integers(1, 12), st.integers(0, 12))


@st.composite
def clients_rows(draw):
    shapes = draw(st.lists(st.lists(row, max_size=3), min_size=1, max_size=5))
    rng = np.random.default_rng(draw(st.integers(0, 99)))
    clients = []
    for shape in shapes:
        clients.append([])
        for n, start in shape:
            targets = rng.integers(1, 50, n)
            targets[: min(start, n)] = IGNORE
            clients[-1].append(Row(rng.integers(1, 50, n).astype(np.int32), targets, {"kind": rng.integers(1, 3, n)}))
    return clients


@quick
@given(clients_rows(), st.integers(1, 8), st.booleans())
def test_collate_keeps_every_token_and_target(parts, multiple, causal):
    rows = max(1, max(len(part) for part in parts))
    batch = collate(parts, Shaping(0, causal, False, multiple))
    ids, (total, width) = batch.inputs["input_ids"], batch.shape
    assert ids.shape == batch.shape and total == len(parts) * rows and width % multiple == 0
    assert ("attention_mask" in batch.inputs) != causal
    tensors = [*batch.inputs.values(), *batch.targets.values(), batch.pick_p, batch.row_q, batch.owner_q]
    assert all(x.dtype == torch.int64 for x in tensors)
    expected = []
    for k, part in enumerate(parts):
        for r in range(rows):
            row = part[r] if r < len(part) else Row(np.zeros(0, dtype=np.int64), np.zeros(0, dtype=np.int64), {"kind": np.zeros(0)})
            there, n = ids[k * rows + r], len(row.ids)
            assert there[:n].tolist() == row.ids.tolist() and not there[n:].any()
            if any(parts):
                kind = batch.inputs["kind"][k * rows + r]
                assert kind[:n].tolist() == row.extra["kind"].tolist() and not kind[n:].any()
            if not causal:
                # An empty row keeps one position in sight, so that attention is over something.
                assert batch.inputs["attention_mask"][k * rows + r].sum() == max(n, 1)
            for position, target in enumerate(row.targets.tolist()):
                if target != IGNORE:
                    expected.append(((k * rows + r) * width + position, k * rows + r, target, k))
    places = zip(batch.pick_p.tolist(), batch.row_q.tolist(), batch.targets["labels"].tolist(), batch.owner_q.tolist())
    assert list(places) == expected
    assert batch.lengths.tolist() == [max((len(row.ids) for row in part), default=0) for part in parts]
    assert batch.real_rows.tolist() == [len(part) for part in parts]
    assert batch.num_tokens == sum(len(row.ids) for part in parts for row in part)
    assert batch.num_slots == len(parts) * rows * width


@quick
@given(clients_rows())
def test_collate_of_one_client_is_its_block(parts):
    batch = collate(parts, Shaping(causal=True))
    rows = batch.shape[0] // len(parts)
    for k, part in enumerate(parts):
        alone = collate([part], Shaping(causal=True))
        num_rows, width = alone.shape
        is_client = batch.owner_q == k
        for name, x in alone.inputs.items():
            assert torch.equal(batch.inputs[name][k * rows : k * rows + num_rows, :width], x)
        assert torch.equal(batch.targets["labels"][is_client], alone.targets["labels"])
        assert torch.equal(batch.row_q[is_client] - k * rows, alone.row_q)


def test_collate_with_one_class_for_each_row():
    ids = np.array([5, 6, 7])
    parts = [[Row(ids, np.array([2])), Row(ids[:1], np.array([0]))], [Row(ids[:2], np.array([1]))]]
    batch = collate(parts, Shaping(per_row=True))
    assert batch.per_row and batch.pick_p.tolist() == batch.row_q.tolist() == [0, 1, 2]
    assert batch.targets["labels"].tolist() == [2, 0, 1] and batch.owner_q.tolist() == [0, 0, 1]
    assert batch.inputs["attention_mask"].tolist() == [[1, 1, 1], [1, 0, 0], [1, 1, 0], [1, 0, 0]]


def test_collate_is_no_part_of_a_step():
    rng = np.random.default_rng(0)
    parts = [[Row(rng.integers(0, 99, 64), rng.integers(0, 99, 64))] for _ in range(16)]
    times = []
    for _ in range(20):
        begun = time.perf_counter()
        collate(parts, Shaping(causal=True))
        times.append(time.perf_counter() - begun)
    assert min(times) < 0.5e-3
