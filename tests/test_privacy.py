"""Epsilon, the noise that an epsilon asks for, and coins that nobody can guess."""

from __future__ import annotations

import ast
import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from fedfm.core.errors import ConfigError, PrivacyError, RunError
from fedfm.core.keys import Key
from fedfm.core.privacy import Guarantee, Release
from fedfm.core.secret import Secret, coins
from fedfm.local import SGD, ExampleDP
from fedfm.privacy import calibrate, epsilon_of
from fedfm.transforms import CentralDP, ClipByNorm

pytest.importorskip("dp_accounting", reason="the extra 'privacy' is not installed")
SOURCE = Path(__file__).parent.parent / "src" / "fedfm"
# Rate, noise multiplier, steps, delta; epsilon by RDP and by PLD. Made with dp-accounting 0.6.0; the first equals the closed form.
VECTORS = [
    (1, 1, 1, 1e-5, 4.728507, 4.377178),
    (1, 4, 1, 1e-6, 1.143169, 1.060702),
    (1, 10, 100, 1e-5, 4.728507, 4.377178),
    (0.01, 4, 10000, 1e-5, 1.035490, 0.946999),
    (250 / 60000, 1.1, 14400, 1e-5, 2.561716, 2.349645),
    (256 / 60000, 1.1, 3510, 1e-5, 1.280366, 1.132902),
    (5000 / 763430, 1, 5000, 1e-9, 4.183292, 3.898826),
    (1e-3, 1, 2000, 1e-6, 0.881912, 0.252282),
    (1, 8, 50, 1e-3, 3.045409, 2.695867),
    (0.01024, 0.8, 293, 1e-5, 2.660043, 2.054359),
    (1e-4, 0.6, 100000, 1e-7, 2.710245, 1.429631),
]


@pytest.mark.parametrize(("rate", "noise", "steps", "delta", "rdp", "pld"), VECTORS)
def test_epsilon_is_that_of_the_vectors(rate: float, noise: float, steps: int, delta: float, rdp: float, pld: float) -> None:
    releases = [Release(rate, noise, steps)]
    assert epsilon_of(releases, delta) == pytest.approx(pld, abs=1e-3)
    assert epsilon_of(releases, delta, "rdp") == pytest.approx(rdp, abs=1e-3)
    coarse = epsilon_of(releases, delta, fine=False)
    assert pld - 1e-6 <= coarse <= 1.05 * pld


@pytest.mark.parametrize(
    ("rate", "steps", "epsilon", "delta", "noise"),
    [
        (0.01, 1000, 1, 1e-5, 1.4147),
        (0.01, 1000, 8, 1e-5, 0.5863),
        (1, 50, 8, 1e-3, 3.3942),
        (1e-3, 2000, 1, 1e-7, 0.7681),
        (1, 1, 1, 1e-5, 3.73063163),
    ],
)
def test_noise_is_solved_for_an_epsilon(rate: float, steps: int, epsilon: float, delta: float, noise: float) -> None:
    solved = calibrate(rate, steps, epsilon, delta)
    assert solved == pytest.approx(noise, abs=1e-3)
    assert 0.999 * epsilon <= epsilon_of([Release(rate, solved, steps)], delta) <= epsilon
    quick = calibrate(rate, steps, epsilon, delta, fine=False)
    assert noise - 1e-3 <= quick <= 1.005 * noise and epsilon_of([Release(rate, quick, steps)], delta) <= epsilon


def test_less_noise_and_more_steps_spend_more() -> None:
    def spent(rate: float, noise: float, steps: int) -> float:
        return epsilon_of([Release(rate, noise, steps)], 1e-5, fine=False)

    assert spent(0.1, 1, 10) < spent(0.1, 1, 20) < spent(0.2, 1, 20) < spent(0.2, 0.8, 20)
    assert epsilon_of([], 1e-5) == epsilon_of([Release(0.1, 1.0, 0)], 1e-5) == 0 and calibrate(0.1, 0, 1.0, 1e-5) == 0
    assert epsilon_of([Release(0.5, 0.0)], 1e-5) == math.inf


def test_releases_with_other_noise_are_composed() -> None:
    together = epsilon_of([Release(1, 2.0, 4), Release(1, 1.0)], 1e-5)
    assert together == pytest.approx(epsilon_of([Release(1, 2**-0.5)], 1e-5), rel=1e-6)
    assert epsilon_of([Release(0.1, 1.0, 3), Release(0.1, 1.0, 4)], 1e-5) == epsilon_of([Release(0.1, 1.0, 7)], 1e-5)


@pytest.mark.parametrize(
    ("releases", "delta", "words"),
    [
        ([Release(0.1, 1.0), Release(0.1, 1.0, unit="row")], 1e-5, "different things"),
        ([Release(1, 1.0), Release(1, 1.0, kind="skellam")], 1e-5, "No accountant here composes"),
        ([Release(0.5, 1.0, kind="skellam")], 1e-5, "gains from sampling"),
        ([Release(0.0, 1.0)], 1e-5, "sampling rate is 0"),
        ([Release(1.1, 1.0)], 1e-5, "sampling rate is 1.1"),
        ([Release(0.1, math.nan)], 1e-5, "noise multiplier is nan"),
        ([Release(0.1, 1.0, -1)], 1e-5, "-1 releases"),
        ([Release(0.1, 1.0)], 0.0, "delta is 0"),
        ([Release(0.1, 1.0)], 1.0, "delta is 1"),
    ],
)
def test_what_cannot_be_named_is_refused(releases: list[Release], delta: float, words: str) -> None:
    with pytest.raises(PrivacyError, match=words):
        epsilon_of(releases, delta)


@pytest.mark.parametrize(("epsilon", "delta"), [(0.0, 1e-5), (math.inf, 1e-5), (-1.0, 1e-5), (1.0, 0.0)])
def test_a_budget_that_is_none_is_refused(epsilon: float, delta: float) -> None:
    with pytest.raises(PrivacyError):
        calibrate(0.1, 10, epsilon, delta)


def test_a_missing_package_is_named_with_its_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    from fedfm.core.errors import MissingExtra
    from fedfm.privacy import accounting

    accounting._epsilon.cache_clear()
    monkeypatch.setitem(sys.modules, "dp_accounting", None)
    with pytest.raises(MissingExtra, match=r"pip install 'fedfm\[privacy\]'"):
        epsilon_of([Release(0.3, 1.0, 7)], 1e-5)
    monkeypatch.setitem(sys.modules, "cryptography.hazmat.primitives.ciphers", None)
    with pytest.raises(MissingExtra, match=r"pip install 'fedfm\[privacy\]'"):
        Secret.system().stream("noise")


def test_a_release_is_written_and_read() -> None:
    for release in (Release(0.1, 1.1, 5), Release(1 / 3, 0.7, 1, "row"), Release(1.0, 2.5, 9, "owner", "skellam")):
        assert Release.of(release.name, release.steps) == release
    assert Release.of("answer/train", 3) is None
    with pytest.raises(RunError, match="no release"):
        Release.of("gaussian noise x, rate 0.1, one row", 1)


def test_an_epsilon_never_stands_alone() -> None:
    told = Guarantee(
        3.0, 1e-5, "one row", "a row added or removed", "Poisson sampling", "the server adds noise", "PLD", assumes=("honesty",)
    )
    for word in ("epsilon 3", "delta 1e-05", "one row", "added or removed", "Poisson", "the server", "PLD", "Assumes: honesty"):
        assert word in told.sentence()
    assert Guarantee.from_json(told.to_json()) == told
    assert Guarantee.from_json(json.loads(json.dumps(replace(told, epsilon=math.inf).to_json(), allow_nan=False))).epsilon == math.inf
    simulated = Guarantee.from_json({**told.to_json(), "simulated": True}).sentence()
    assert "simulated epsilon 3" in simulated and "protects nobody" in simulated


@pytest.mark.parametrize(
    ("part", "words"),
    [
        (lambda: CentralDP(clip=0.0, delta=1e-5, epsilon=1), "CentralDP.clip is 0"),
        (lambda: CentralDP(clip=1.0, delta=1e-5), "needs epsilon"),
        (lambda: CentralDP(clip=1.0, delta=1e-5, epsilon=-1), "epsilon is -1"),
        (lambda: CentralDP(clip=1.0, delta=1e-5, noise_multiplier=-1), "noise_multiplier is -1"),
        (lambda: CentralDP(clip=1.0, delta=2.0, epsilon=1), "delta is 2"),
        (lambda: CentralDP(clip=1.0, delta=1e-5, epsilon=1, quantile=1.0), "quantile is 1"),
        (lambda: CentralDP(clip=1.0, delta=1e-5, epsilon=1, clip_lr=0.0), "clip_lr is 0"),
        (lambda: CentralDP(clip=1.0, delta=1e-5, epsilon=1, accountant="guess"), "accountant is 'guess'"),  # type: ignore[arg-type]
        (lambda: ExampleDP(SGD(), max_norm=math.inf, delta=1e-5, epsilon=1), "ExampleDP.max_norm is inf"),
        (lambda: ExampleDP(SGD(), max_norm=1.0, delta=1e-5, epsilon=1, rounds=0), "rounds is 0"),
    ],
)
def test_a_part_refuses_numbers_that_keep_no_promise(part, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        part()


# --- coins


def test_the_stream_is_aes_256_in_counter_mode() -> None:
    from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes

    from fedfm.core.secret import Stream

    key = bytes(range(32))
    blocks = Cipher(algorithms.AES(key), modes.ECB()).encryptor().update(b"".join(i.to_bytes(16, "big") for i in range(5)))
    stream = Stream(key)
    assert stream.bytes(33) + stream.bytes(47) == blocks
    # FIPS 197, appendix C.3: the first block of this key is that of a counter of 0, so another plain text tells the cipher apart.
    known = Cipher(algorithms.AES(key), modes.ECB()).encryptor().update(bytes.fromhex("00112233445566778899aabbccddeeff"))
    assert known.hex() == "8ea2b7ca516745bfeafc49904b496089"


def test_normal_numbers_are_normal() -> None:
    from scipy import stats

    x = Secret.simulated(Key.root(1)).stream("noise").normal(200_001)
    assert len(x) == 200_001 and x.dtype == np.float64
    assert stats.kstest(x, "norm").pvalue > 1e-3
    assert abs(x.mean()) < 5 / len(x) ** 0.5 and abs(x.var() - 1) < 5 * (2 / len(x)) ** 0.5
    assert abs(np.corrcoef(x[:-1], x[1:])[0, 1]) < 5 / len(x) ** 0.5
    tails, expected = (np.abs(x) > 3).sum(), 2 * stats.norm.sf(3) * len(x)
    assert abs(tails - expected) < 5 * expected**0.5
    u = Secret.simulated(Key.root(2)).stream("sampler").uniform(100_000)
    assert u.min() > 0 and u.max() < 1 and stats.kstest(u, "uniform").pvalue > 1e-3


def test_no_two_streams_are_alike_and_none_is_given_twice() -> None:
    first, second = Secret.system(), Secret.system()
    drawn = [first.stream("noise", i).normal(64) for i in range(20)] + [second.stream("noise", i).normal(64) for i in range(20)]
    drawn += [first.stream("noise", "1").normal(64), first.stream("noise1").normal(64), first.stream(1, "noise").normal(64)]
    values = np.concatenate(drawn)
    assert len(np.unique(values)) == len(values)
    for i in range(len(drawn)):
        for j in range(i):
            assert abs(np.corrcoef(drawn[i], drawn[j])[0, 1]) < 0.7
    with pytest.raises(AssertionError, match="given out before"):
        first.stream("noise", 3)


def test_a_noisy_sum_is_on_a_grid_and_has_the_noise_it_should() -> None:
    x = torch.linspace(-3, 3, 50_000)
    noisy = Secret.simulated(Key.root(3)).stream("noise").noisy(x, 0.3)
    assert (noisy - x).std().item() == pytest.approx(0.3, rel=0.02) and noisy.dtype == torch.float64
    grid = 2.0 ** (math.floor(math.log2(0.3)) - 24)
    assert torch.equal((noisy / grid).round() * grid, noisy)
    assert torch.equal(Secret.system().stream("noise").noisy(x, 0.0), x.double())


def test_coins_come_from_the_system_under_a_promise_and_from_nowhere_without() -> None:
    key, real, play = Key.root(0), CentralDP(1.0, 1e-5, epsilon=1.0), CentralDP(1.0, 1e-5, epsilon=1.0, simulated=True)
    assert coins([ClipByNorm(1.0), SGD()], key) is None
    drawn = [coins([ClipByNorm(1.0), part], key).stream("noise").normal(9) for part in (real, real, play, play)]  # type: ignore[union-attr]
    assert not np.array_equal(drawn[0], drawn[1]) and np.array_equal(drawn[2], drawn[3])


def names_in(path: Path) -> set[str]:
    """Every module that a file imports, and every dotted name that it uses."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
        elif isinstance(node, ast.Attribute):
            names.add(ast.unparse(node))
    return names


def test_what_makes_noise_draws_from_no_generator_that_can_be_guessed() -> None:
    makers = [
        SOURCE / "core/secret.py",
        SOURCE / "transforms/central_dp.py",
        SOURCE / "transforms/distributed_dp.py",
        SOURCE / "transforms/local_dp.py",
        SOURCE / "local/example_dp.py",
        *(SOURCE / "privacy").glob("*.py"),
    ]
    guessable = ("random", "numpy.random", "np.random", "torch.randn", "torch.rand", "torch.normal", "torch.Generator", "torch.manual_seed")
    for path in makers:
        used = {name for name in names_in(path) for bad in guessable if name == bad or name.startswith(f"{bad}.")}
        assert not used, f"{path} uses {used}"
        assert not {name for name in names_in(path) if name.endswith((".generator", ".numpy")) and "key" in name.lower()}, path
    assert "os.urandom" in names_in(SOURCE / "core/secret.py")
