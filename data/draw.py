"""Draw number n from hash(seed, n): what is drawn depends on its words alone, on every machine and in any order.

    draw.torch_generator(seed, "clips", step)        # of the words "0 clips 17", separated by spaces
    draw.numpy_generator("mqar", part, seed, n)
    draw.pair_hash(a, b, seed, 1)                    # of whole numbers, arrays at once

Only a NumPy generator's random() should be used: it is what no new version of NumPy may change.
"""
import hashlib

import numpy as np
import torch

from nanolab.settings import UserError


def digest(*words):
    """32 bytes: the sha256 of the words."""
    return hashlib.sha256(" ".join(map(str, words)).encode()).digest()


def torch_generator(*words):
    """A generator on the CPU, seeded by the words."""
    return torch.Generator().manual_seed(int.from_bytes(digest(*words)[:8], "little") >> 1)


def numpy_generator(*words):
    """A generator of NumPy's, PCG64, seeded by the words."""
    return np.random.Generator(np.random.PCG64(int.from_bytes(digest(*words)[:16], "little")))


def mix(x):
    """splitmix64's finaliser (Steele et al. 2014) of an array of uint64: each bit of the result depends on all of x."""
    with np.errstate(over="ignore"):
        x = np.asarray(x, np.uint64) + np.uint64(0x9E3779B97F4A7C15)
        x = (x ^ x >> np.uint64(30)) * np.uint64(0xBF58476D1CE4E5B9)
        x = (x ^ x >> np.uint64(27)) * np.uint64(0x94D049BB133111EB)
        return x ^ x >> np.uint64(31)


def pair_hash(a, b, *salts):
    """uint64 hashes of ordered pairs of whole numbers, arrays of one shape; salts: whole numbers."""
    key = np.uint64(0)
    for salt in salts:
        key = mix(key ^ np.uint64(salt))
    return mix(mix(key ^ np.asarray(a, np.uint64)) ^ np.asarray(b, np.uint64))


def chance(hashes, share):
    """bool array of uint64 hashes: true with the probability `share`."""
    return hashes >> np.uint64(11) < np.uint64(round(share * 2 ** 53))


def first(n, chunks, forbidden, hardly):
    """The first n rows of endless chunks whose keys are not forbidden: (list of arrays, their keys, how many rows were
    left out on the way). A chunk is (keys, array, ...), a row for each key. UserError(hardly): hardly any is new."""
    parts, kept, drawn = [], [], 0
    while len(kept) < n:
        keys, *arrays = next(chunks)
        if drawn >= 4 * len(keys) and len(kept) < drawn // 25:
            raise UserError(hardly)
        new = np.array([key not in forbidden for key in keys])
        parts.append([array[new] for array in arrays])
        kept += [key for key in keys if key not in forbidden]
        drawn += len(keys)
    return [np.concatenate(part)[:n] for part in zip(*parts)], kept[:n], drawn - len(kept)
