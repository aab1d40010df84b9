"""Estimates the memory of a bank by arithmetic, so that the estimate does not depend on what else runs on the machine.

An upper estimate of a training step in plain PyTorch: what the backward pass keeps of each token in each layer, the logits in float32 with their
gradient, and each client's own parameters with the trainer's copies of them.
"""

from __future__ import annotations

from fedfm.client.house import House

# Vectors of the hidden and of the feed-forward width that a layer keeps of a token for its backward pass.
_HIDDEN, _INNER = 20, 5
# Logits, their logarithms and their gradient, in float32.
_LOGITS = 3 * 4
# Parameters, start, gradient, two moments and two temporaries, in float32.
_COPIES = 7 * 4


def base_bytes(house: House) -> int:
    """Bytes of the frozen base, in its own type."""
    return sum(p.numel() * p.element_size() for p in house.foundation.model.parameters())


def client_bytes(house: House) -> int:
    """Bytes that one more client adds to a bank, with examples of full length."""
    task, work = house.plan.task, house.plan.local.work
    rows = work.batch_size or max(len(house.shard(client).train) for client in house.clients)
    tokens = rows * task.max_length
    # Where examples are clipped each is a slice: its parameters, its gradient and a temporary.
    slices = 3 * 4 * rows if work.poisson else 0
    return tokens * _token_bytes(house, task.max_length) + house.tuned.spec.size * (_COPIES + slices)


def _token_bytes(house: House, length: int) -> int:
    config, foundation = house.foundation.model.config, house.foundation
    hidden = _first(config, ("hidden_size", "n_embd", "d_model", "dim"), 1024)
    inner = _first(config, ("intermediate_size", "n_inner", "d_ff", "hidden_dim"), 4 * hidden)
    layers = _first(config, ("num_hidden_layers", "n_layer", "num_layers", "n_layers"), 24)
    heads = _first(config, ("num_attention_heads", "n_head", "num_heads", "n_heads"), hidden // 64)
    vocabulary = len(house.labels) or _first(config, ("vocab_size",), 50_000)
    size: int = next(foundation.model.parameters()).element_size()
    kept = 2 * hidden if foundation.spec.gradient_checkpointing else _HIDDEN * hidden + _INNER * inner + heads * length
    return layers * kept * size + vocabulary * _LOGITS


def _first(config: object, names: tuple[str, ...], default: int) -> int:
    """The value of the first of these names that a config has; architectures use different names."""
    for name in names:
        value = getattr(config, name, None)
        if isinstance(value, int) and value > 0:
            return value
    return default
