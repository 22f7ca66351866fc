"""Stateless, counter-based random numbers.

Every random number of a run is a pure function of the run seed and its purpose, so resuming needs no saved generator
state, and no sample depends on how many were drawn before it. The generator is Philox4x32-10 (Salmon et al.,
"Parallel random numbers: as easy as 1, 2, 3", SC 2011), checked against the paper's known-answer vectors.
"""

from __future__ import annotations

import hashlib
import json
import random

import numpy as np

_M0, _M1 = np.uint64(0xD2511F53), np.uint64(0xCD9E8D57)
_W0, _W1 = np.uint64(0x9E3779B9), np.uint64(0xBB67AE85)
_LOW, _SHIFT = np.uint64(0xFFFFFFFF), np.uint64(32)


def key(*parts: int | str) -> int:
    """Hashes numbers and names to a 64-bit key, e.g. `key(run_seed, step, task_id, index)`."""
    text = json.dumps([p if isinstance(p, str) else int(p) for p in parts])
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little")


def philox(counter: np.ndarray, keys: np.ndarray) -> np.ndarray:
    """Philox4x32-10. counter (..., 4) and keys (..., 2) hold 32-bit words in uint64; returns (..., 4) words."""
    c0, c1, c2, c3 = (counter[..., i].astype(np.uint64) for i in range(4))
    k0, k1 = keys[..., 0].astype(np.uint64), keys[..., 1].astype(np.uint64)
    for _ in range(10):
        p0, p1 = _M0 * c0, _M1 * c2
        c0, c1, c2, c3 = (p1 >> _SHIFT) ^ c1 ^ k0, p1 & _LOW, (p0 >> _SHIFT) ^ c3 ^ k1, p0 & _LOW
        k0, k1 = (k0 + _W0) & _LOW, (k1 + _W1) & _LOW
    return np.stack([c0, c1, c2, c3], axis=-1)


def uniforms(seed: int, count: int) -> np.ndarray:
    """`count` float64 numbers in [0, 1) for one 64-bit seed; number i does not depend on `count`."""
    index = np.arange(count, dtype=np.uint64)
    zero = np.zeros_like(index)
    counter = np.stack([index & _LOW, index >> _SHIFT, zero, zero], axis=-1)
    words = np.array([seed & 0xFFFFFFFF, (seed >> 32) & 0xFFFFFFFF], dtype=np.uint64)
    out = philox(counter, np.broadcast_to(words, (count, 2)))
    return ((out[:, 0] >> np.uint64(5)) * np.uint64(1 << 26) + (out[:, 1] >> np.uint64(6))) * (1.0 / (1 << 53))


def permutation(count: int, *parts: int | str) -> np.ndarray:
    """A permutation of range(count), determined by `parts`."""
    return np.argsort(uniforms(key("permutation", *parts), count), kind="stable")


def draw_order(count: int, start: int, take: int, seed: int, shuffle: bool = True) -> list[int]:
    """Rows start … start+take−1 of an endless pass over `count` rows, reshuffled every epoch, or always in order.

    The position in the data is the single integer `start`, so a resumed run continues with the right row.
    """
    if not shuffle:
        return [position % count for position in range(start, start + take)]
    out: list[int] = []
    position = start
    while len(out) < take:
        epoch, offset = divmod(position, count)
        rows = permutation(count, seed, epoch)[offset : offset + take - len(out)]
        out.extend(int(r) for r in rows)
        position += len(rows)
    return out


def seed_global(*parts: int | str) -> None:
    """Seeds Python, NumPy and torch, so that library randomness (dropout, LoRA init) is a function of `parts` too."""
    import torch

    value = key("global", *parts)
    random.seed(value)
    np.random.seed(value & 0xFFFFFFFF)
    torch.manual_seed(value & 0x7FFFFFFFFFFFFFFF)
