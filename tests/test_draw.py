"""data/draw.py: the hash that everything is drawn from, written out once more, and figures that must never change."""
import hashlib

import numpy as np
import torch
from checks import raises_one_line

from data import draw


def test_generators_are_seeded_by_the_words_alone():
    digest = hashlib.sha256(b"0 clips 17 0.15 True").digest()
    words = 0, "clips", 17, 0.15, True
    assert draw.digest(*words) == digest
    seed = int.from_bytes(digest[:8], "little") // 2
    assert torch.equal(torch.rand(9, generator=draw.torch_generator(*words)),
                       torch.rand(9, generator=torch.Generator().manual_seed(seed)))
    seed = int.from_bytes(digest[:16], "little")
    assert (draw.numpy_generator(*words).random(9) == np.random.Generator(np.random.PCG64(seed)).random(9)).all()


def test_known_draws():
    assert draw.numpy_generator("mqar", "test", 0, 0).random() == 0.7858773239592972
    assert torch.randint(10 ** 9, (), generator=draw.torch_generator(0, "clips", 0)).item() == 907158413
    assert [hex(h) for h in draw.pair_hash([0, 123], [1, 456], 7, 1).tolist()] == [
        "0xecf5970337fcf2a6", "0x428da3959fabf5b7"]


def test_chance():
    hashes = draw.mix(np.arange(100_000, dtype=np.uint64))
    assert not draw.chance(hashes, 0).any() and draw.chance(hashes, 1).all()
    assert abs(draw.chance(hashes, 0.05).mean() - 0.05) < 0.003


def test_the_first_rows_of_chunks():
    def chunks():
        for start in range(0, 1000, 10):
            rows = np.arange(start, start + 10)
            yield list(map(str, rows)), rows, -rows
    (rows, others), keys, left_out = draw.first(12, chunks(), {"0", "3", "11", "40"}, "")
    assert rows.tolist() == [1, 2, 4, 5, 6, 7, 8, 9, 10, 12, 13, 14] == (-others).tolist() == list(map(int, keys))
    assert left_out == 3
    few = {f"{i}" for i in range(1000) if i % 60}  # one row of 60 is new: fewer than one of 25
    with raises_one_line("hardly any"):
        draw.first(3, chunks(), few, "hardly any")
