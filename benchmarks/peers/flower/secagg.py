"""CPU time of one client of Flower's SecAgg+: its own client functions, one after the other, for one sum. Runs in Flower's environment."""

from __future__ import annotations

import importlib
import json
import os
import sys
from statistics import median
from time import process_time
from typing import Any

import numpy as np
from flwr.common import ndarrays_to_parameters
from flwr.common.secure_aggregation.crypto.symmetric_encryption import encrypt, generate_shared_key
from flwr.common.secure_aggregation.secaggplus_constants import Key
from flwr.common.secure_aggregation.secaggplus_utils import share_keys_plaintext_concat
from flwr.supercore.primitives.asymmetric import (
    bytes_to_private_key,
    bytes_to_public_key,
    generate_key_pairs,
    private_key_to_bytes,
    public_key_to_bytes,
)

# The package shows a function by the module's name.
secagg = importlib.import_module("flwr.client.mod.secure_aggregation.secaggplus_mod")


def others_of(neighbours: int) -> dict[int, tuple[bytes, bytes, bytes]]:
    """Keys of other clients: both public ones, and the private one that a client's shares are encrypted with."""
    keys = {}
    for i in range(1, neighbours + 1):
        _, public1 = generate_key_pairs()
        private2, public2 = generate_key_pairs()
        keys[i] = public_key_to_bytes(public1), public_key_to_bytes(public2), private_key_to_bytes(private2)
    return keys


def seconds(size: int, shares: int, others: dict[int, tuple[bytes, bytes, bytes]], update: Any) -> float:
    state = secagg.SecAggPlusState()
    state.nid = 0
    setup = {
        Key.SAMPLE_NUMBER: shares, Key.SHARE_NUMBER: shares, Key.THRESHOLD: shares // 2 + 1, Key.CLIPPING_RANGE: 1.0, Key.TARGET_RANGE: 1 << 22,
        Key.MOD_RANGE: 1 << 32, Key.MAX_WEIGHT: 1000.0,
    }  # fmt: skip
    began = process_time()
    public1, public2 = secagg._setup(state, setup).values()
    secagg._share_keys(state, {"0": (public1, public2), **{str(i): keys[:2] for i, keys in others.items()}})
    used = process_time() - began
    sources, ciphertexts = [], []
    for i, (_, _, private2) in others.items():
        key = generate_shared_key(bytes_to_private_key(private2), bytes_to_public_key(state.pk2))
        share = os.urandom(len(state.rd_seed_share_dict[0])), os.urandom(len(state.sk1_share_dict[0]))
        sources.append(i)
        ciphertexts.append(encrypt(key, share_keys_plaintext_concat(i, 0, *share)))
    parameters = ndarrays_to_parameters([update])
    began = process_time()
    secagg._collect_masked_vectors(state, {Key.CIPHERTEXT_LIST: ciphertexts, Key.SOURCE_LIST: sources}, 100, parameters)
    secagg._unmask(state, {Key.ACTIVE_NODE_ID_LIST: [0, *others], Key.DEAD_NODE_ID_LIST: []})
    return used + process_time() - began


def main() -> None:
    options = json.loads(sys.argv[1])
    others = others_of(options["shares"] - 1)
    update = (np.random.default_rng(0).standard_normal(options["size"]) * 1e-3).astype(np.float32)
    taken = [seconds(options["size"], options["shares"], others, update) for _ in range(options["repetitions"])]
    print(json.dumps({"cpu": median(taken)}))


if __name__ == "__main__":
    main()
