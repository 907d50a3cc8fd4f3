"""Multi-query associative recall (MQAR; Arora et al. 2023, "Zoology", arXiv 2312.04927): pairs first, questions later.

    python data/mqar.py --stats                       # T 64, 4 pairs, V 8192: an example, how far back the answers are
    python data/mqar.py --T 256 --pairs 16 --stats    # another of the paper's settings

A row names `pairs` keys, each followed by its value, then shows every key once more; there the value is to be said:

    tokens    5 141   2 190   9 133   0   0   2   0   0   0   5   0   9   0
    labels    .   .   .   .   .   .   .   . 190   .   .   . 141   . 133   .        . is -1: no loss
"""
import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run as a script, only data/ is on the path
from nanolab.settings import answer_help, serve

answer_help(__name__, __file__)  # before the seconds that the next lines take

import numpy as np
import torch

from data import draw
from nanolab.run import command, fits
from nanolab.settings import UserError

CHUNK = 1024  # rows that are drawn together, by a generator of their own: fewer rows are the first ones of more


def _check(T, pairs, vocab_size, alpha, **counts):
    """UserError where no such row exists, or a count is below 1."""
    for name, value in (("pairs", pairs), *counts.items()):
        if value < 1:
            raise UserError(f"{name} is {value}: it must be at least 1")
    fits(16 * sum(counts.values()) * T, f"{sum(counts.values()):,} rows of {T:,} tokens")
    if 4 * pairs > T:
        raise UserError(f"T is {T}: {pairs} pairs and their queries need at least {4 * pairs} places")
    if vocab_size % 2 or vocab_size // 2 - 1 < pairs:
        raise UserError(f"vocab_size is {vocab_size}: it must be even, and for {pairs} different keys at least "
                        f"{2 * pairs + 2}")
    if not 0 < alpha <= 10:
        raise UserError(f"alpha is {alpha}: it must be above 0 and at most 10")


def _different(rng, n, k, size):
    """(n, k) int64: in each row k different whole numbers below size, every order of every choice equally likely."""
    out = np.empty((n, k), np.int64)
    for j in range(k):
        todo = np.arange(n)
        while len(todo):
            out[todo, j] = rng.random(len(todo)) * size
            todo = todo[(out[todo, :j] == out[todo, j, None]).any(1)]  # those that repeat an earlier one, again
    return out


def _chunks(part, T, pairs, vocab_size, seed, random_non_queries, alpha):
    """Endlessly: of CHUNK rows the bytes without fillers, tokens and labels (CHUNK, T) int64. Rows of
    different parts (a word) come from different generators."""
    start, slots = 2 * pairs, (T - 2 * pairs) // 2
    weight = np.arange(1, slots + 1) ** (alpha - 1.0)
    number = 0
    while True:
        rng = draw.numpy_generator("mqar", part, seed, T, pairs, vocab_size, number)
        number += 1
        keys = 1 + _different(rng, CHUNK, pairs, vocab_size // 2 - 1)
        values = vocab_size // 2 + _different(rng, CHUNK, pairs, vocab_size // 2)
        # Drawing slots without putting back, in proportion to their weights, is a race of exponential clocks: the
        # first to ring is the first key's, and so on.
        clock = -np.log1p(-rng.random((CHUNK, slots))) / weight
        place = start + 2 * np.argsort(clock, 1)[:, :pairs]
        tokens, labels = np.zeros((CHUNK, T), np.int64), np.full((CHUNK, T), -1)
        tokens[:, 0:start:2], tokens[:, 1:start:2] = keys, values
        np.put_along_axis(tokens, place, keys, 1)
        np.put_along_axis(labels, place, values, 1)
        bare = [row.tobytes() for row in tokens]
        if random_non_queries:
            spare = tokens == 0
            while n := int(spare.sum()):
                tokens[spare] = rng.random(n) * vocab_size
                spare &= (tokens[:, :, None] == keys[:, None]).any(2)  # a filler must not be one of the row's keys
        yield bare, tokens, labels


def mqar(n, T, pairs, vocab_size, seed, random_non_queries=False, alpha=0.01):
    """n rows of multi-query associative recall: tokens (n, T) and labels (n, T), int64 tensors; -1 where no loss.

    The first 2 pairs tokens are key, value, key, value ...; keys are from 1 to V/2 - 1, values from V/2 to V - 1, none
    twice in a row. The rest is slots of two places; each key comes once more, at the first place of a slot of its own,
    and the label there is its value (nothing is to be shifted). The first key takes slot g = 1, 2, ... with probability
    proportional to g^(alpha - 1), the next keys likewise among those left (Zoology's power_a; alpha 1: evenly). All
    else is token 0, or, random_non_queries, any of the V tokens that is not one of the row's keys (Zoology draws from
    all V). The same seed gives the same rows, fewer are the first ones, and fillers change nothing else. Raises
    UserError: 4 pairs > T, V odd or too small for so many keys, n or pairs below 1, alpha not in (0, 10].
    """
    _check(T, pairs, vocab_size, alpha, n=n)
    rows = draw.first(n, _chunks("rows", T, pairs, vocab_size, seed, random_non_queries, alpha), (), "")[0]
    return tuple(map(torch.from_numpy, rows))


def split(n_train, n_test, T, pairs, vocab_size, seed, random_non_queries=False, alpha=0.01):
    """Rows to train and to test on, as mqar's: (tokens, labels), (tokens, labels). No test row is in training.

    n_train: [>= 1, <= 10_000_000] training rows
    n_test: [>= 1, <= 10_000_000] test rows, none of them in training
    T: [>= 1, <= 1_000_000] tokens of a row
    pairs: [>= 1, <= 1_000_000] keys with a value, all of them asked for
    vocab_size: [>= 1, <= 10_000_000] tokens that there are; even
    seed: of all that is drawn
    random_non_queries: random tokens instead of 0 between the queries
    alpha: [>= 0, <= 1000] of the power law; 1: queries evenly far away

    Both sides have generators of their own. Also, each training row is looked up in a hash table of the whole test
    rows (their bytes, so nothing is left to chance) and left out where it is there. Rows are compared before the
    fillers are drawn: one that differs in them only counts as the same. The test rows do not depend on n_train.
    Raises UserError as mqar does, and where hardly any row is left for training.
    """
    _check(T, pairs, vocab_size, alpha, n_train=n_train, n_test=n_test)
    settings = T, pairs, vocab_size, seed, random_non_queries, alpha
    hardly = (f"there are hardly any rows with T {T}, {pairs} pair{'s' * (pairs > 1)} and vocab_size {vocab_size} for "
              "training that are not in the test: take a smaller n_test or a larger vocab_size")
    test, seen, _ = draw.first(n_test, _chunks("test", *settings), (), hardly)
    train = draw.first(n_train, _chunks("train", *settings), frozenset(seen), hardly)[0]
    return tuple(map(torch.from_numpy, train)), tuple(map(torch.from_numpy, test))


def distances(labels, tokens):
    """How far back each query's value stands, 1 for the token just before: (n pairs,) int64, row by row, of labels and
    tokens (n, T)."""
    found = []
    for said, row in zip(labels.split(512), tokens.split(512)):
        n, query = (said >= 0).nonzero(as_tuple=True)
        key = (row[n] == row[n, query][:, None]).int().argmax(1)  # the first place with the key is the pair's
        found.append(query - key - 1)
    return torch.cat(found)


def reachable(labels, tokens, window):
    """The share of queries whose value is among the `window` last tokens, the query's own included: what one layer of
    attention over a sliding window can answer. labels, tokens: (n, T)."""
    return float((distances(labels, tokens) < window).double().mean())


def example(tokens, labels, most=8):
    """One row, tokens and labels (T,), in words: at most so many pairs and queries of it."""
    asked = (labels >= 0).nonzero()[:, 0].tolist()
    pairs, more = tokens[:2 * len(asked)].view(-1, 2).tolist(), ", ..." * (len(asked) > most)
    told = ", ".join(f"{key} is {value}" for key, value in pairs[:most])
    queries = ", ".join(f"{tokens[place]} at {place} (answer {labels[place]})" for place in asked[:most])
    return f"{told}{more}; asked for {queries}{more}"


def describe(rows, T, pairs, vocab_size, seed, random_non_queries, alpha, stats=False):
    """Prints what was drawn; for --stats one row, and how far back the answers are.

    stats: show a row and the shares within sliding windows
    """
    (tokens, labels), (test_tokens, test_labels) = rows
    print(f"mqar: {len(tokens):,} training and {len(test_tokens):,} test rows of {T} tokens, {pairs} pairs, vocabulary "
          f"{vocab_size:,}, alpha {alpha:g}, {'random' if random_non_queries else 'no'} fillers, seed {seed}; no test "
          "row is in training")
    if not stats:
        return
    print(f"the first test row: {example(test_tokens[0], test_labels[0])}")
    print(f"guessing among the row's values has an accuracy of {1 / pairs:.3f}, among all values "
          f"{2 / vocab_size:.2g}; values are {distances(labels, tokens).double().mean():.1f} tokens back")
    windows = [*(2 ** k for k in range(3, 20) if 2 ** k < T), T]
    print("within a sliding window are: " + ", ".join(
        f"{reachable(labels, tokens, window):.1%} of {window} tokens" for window in windows))


main = command(serve(split, describe, defaults=dict(n_train=100_000, n_test=3000, T=64, pairs=4, vocab_size=8192,
                                                    seed=0)))

if __name__ == "__main__":
    main()
