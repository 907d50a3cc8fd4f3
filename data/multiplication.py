"""Multiplication problems: which there are, which are held out, and how they are written as tokens.

Whether a pair is held out is a function of the pair, the fraction and a seed: a x b and b x a are on the same side,
in every range of digits and on every machine. Nothing here draws from a random generator: pairs, their order and the
order of batches come from one hash, that of data/draw.py, which no new version of a library can change.
"""
import hashlib
import math

import numpy as np
import torch

from data.draw import chance, mix, pair_hash
from nanolab.settings import UserError

SYMBOLS = "0123456789*=$ "  # tokens: digits, times, equals, end of the answer, padding
TIMES, EQUALS, END, PADDING = range(10, 14)
ENUMERATED = 2 ** 20  # so many pairs are listed; of more, examples are drawn


def held_out(a, b, fraction, seed):
    """bool array: is the unordered pair {a, b} in the held-out part? About `fraction` of all pairs are."""
    a, b = np.asarray(a), np.asarray(b)
    return chance(pair_hash(np.minimum(a, b), np.maximum(a, b), seed, 1), fraction)


def numbers(digits):
    """(first, how many) whole numbers of so many digits; 0 has one."""
    first = 10 ** (digits - 1) if digits > 1 else 0
    return first, 10 ** digits - first


def of_length(examples, digits):
    """Those of examples (N, 2) of which both numbers have at least so many digits."""
    return examples[(examples >= numbers(digits)[0]).all(1)]


class Problems:
    """Training examples and held-out pairs of operands with min_digits to max_digits digits each, 1 to 8.

    n_examples: of training, spread evenly over the pairs of lengths (3 and 3 digits, 3 and 4, ...) and over the pairs
    of numbers of these lengths: each comes once before one comes twice where all can be listed (2^20), else they are
    drawn. short_share: of the training examples, spread over all lengths from 1 to max_digits instead, a curriculum.
    val_fraction: of the unordered pairs. val_examples: held-out ordered pairs to evaluate on, at most. train
    (n_examples, 2), val (at most val_examples, 2): int16 tensors up to 4 digits, else int32, in an order of no meaning.
    Raises UserError where a side is empty.
    """

    def __init__(self, min_digits=3, max_digits=3, n_examples=1_000_000, val_fraction=0.05, val_examples=10_000,
                 seed=0, short_share=0.0):
        self.min_digits, self.max_digits, self.seed, self.val_fraction = min_digits, max_digits, seed, val_fraction
        self.n_short = short = round(n_examples * short_share)
        self.train, self.n_pairs = self._side([(min_digits, n_examples - short), (1, short)], False)
        self.val, self.n_held_out = self._side([(min_digits, val_examples)], True)
        for side, pairs in (("training", self.train), ("held-out", self.val)):
            if not len(pairs):
                raise UserError(f"there are no {side} pairs of {min_digits} to {max_digits} digits with val_fraction "
                                f"{val_fraction} and split_seed {seed}: choose others")
        self.hash = hashlib.sha256(self.val.numpy().astype("<i4").tobytes()).hexdigest()[:12]

    def _side(self, wanted, held):
        """Examples of one side as an (n, 2) tensor, and how many ordered pairs there are (None: not counted).

        wanted: [(fewest digits, how many examples, evenly over the lengths from there to max_digits)]."""
        shares = {}
        for fewest, n in wanted:
            grid = [(i, j) for i in range(fewest, self.max_digits + 1) for j in range(fewest, self.max_digits + 1)]
            for place, lengths in enumerate(grid if n else ()):
                shares[lengths] = shares.get(lengths, 0) + n // len(grid) + (place < n % len(grid))
        found = [self._pairs(*lengths, n, held) for lengths, n in shares.items()]
        available = None if None in (size for _, size in found) else sum(size for _, size in found)
        pairs = np.concatenate([pairs for pairs, _ in found])
        order = np.argsort(mix(np.arange(len(pairs), dtype=np.uint64) ^ mix(np.uint64(self.seed))), kind="stable")
        dtype = np.int16 if self.max_digits <= 4 else np.int32
        return torch.from_numpy(pairs[order].astype(dtype)), available

    def _pairs(self, i, j, n, held):
        """n ordered pairs (n, 2) int64 of i and j digits of one side, and how many there are (None: not counted)."""
        (a0, na), (b0, nb) = numbers(i), numbers(j)
        if na * nb <= ENUMERATED:
            index = np.arange(na * nb)
            a, b = a0 + index // nb, b0 + index % nb
            keep = held_out(a, b, self.val_fraction, self.seed) == held
            a, b = a[keep], b[keep]
            order = np.argsort(pair_hash(a, b, self.seed, 2), kind="stable")
            pairs = np.stack([a[order], b[order]], 1)
            wanted = min(n, len(pairs)) if held else n if len(pairs) else 0
            return np.resize(pairs, (wanted, 2)), len(pairs)             # np.resize begins again where they end
        parts, have, start = [], 0, 0
        while have < n:
            count = np.arange(start, start + max(1024, int(1.1 * n)), dtype=np.uint64)
            start += len(count)
            a, b = (first + (pair_hash(count, count, self.seed, 3 + held, i, j, which) % np.uint64(size)).astype("i8")
                    for which, (first, size) in enumerate(((a0, na), (b0, nb))))
            pairs = np.stack([a, b], 1)[held_out(a, b, self.val_fraction, self.seed) == held]
            parts.append(pairs)
            have += len(pairs)
        return np.concatenate([np.empty((0, 2), np.int64), *parts])[:n], None

    def describe(self):
        """One line: how many, split how, with seed and hash."""
        span = f"{self.min_digits}" if self.min_digits == self.max_digits else f"{self.min_digits} to {self.max_digits}"
        of = "" if self.n_pairs is None else f" of {self.n_pairs:,} ordered pairs"
        of = f"{f' ({self.n_short:,} with 1 to {self.max_digits} digits)' if self.n_short else ''}{of}"
        left = "" if self.n_held_out is None else f" of {self.n_held_out:,}"
        return (f"{span} digit{'s' * (self.max_digits > 1)}: {len(self.train):,} training examples{of}, "
                f"{len(self.val):,} held-out pairs{left}; split by unordered pair: seed {self.seed}, hash {self.hash}")


class Stream:
    """Batches from examples (n, 2), which should stand in an order without meaning, epoch after epoch: a function of
    the position. The i-th example of epoch e is number (start_e + stride_e i) mod n, stride_e having no factor in
    common with n: all come once, and no list of the order is kept."""

    def __init__(self, examples, seed):
        self.examples, self.seed = examples, seed

    def _order(self, epoch):
        n, trial = len(self.examples), 0
        start = int(pair_hash(epoch, 0, self.seed, 5)) % n
        while math.gcd(stride := int(pair_hash(epoch, trial, self.seed, 6)) % n, n) != 1 and n > 1:
            trial += 1
        return start, stride

    def at(self, position, size):
        """Examples `position` to position + size - 1 of the endless stream: (size, 2) int64 on the examples' device."""
        n, parts = len(self.examples), []
        while size:
            epoch, first = divmod(position, n)
            count = min(size, n - first)
            start, stride = self._order(epoch)
            index = torch.arange(first, first + count, device=self.examples.device)
            parts.append((index * stride + start) % n)
            position, size = position + count, size - count
        return self.examples[torch.cat(parts)].long()


class Notation:
    """How a problem of up to max_digits digits is written: source tokens, and the answer's.

    format: "plain"     123*456  =56088$     most significant digit first, $ ends the answer
            "reversed"  321*654  =88065$     least significant first
            "padded"    321*654  =880650     the same with zeros, operands to max_digits, answers to twice as many
            "trace"     321*654  =808...     padded, after each digit of the answer the carry into the next, two digits,
                                             tens first
    The decoder starts with "=". source_length S, answer_length T: of every batch; shorter ones are padded.
    """

    def __init__(self, format, max_digits):
        self.format, self.max_digits, self.width = format, max_digits, 2 * max_digits
        self.source_length = 2 * max_digits + 1
        self.answer_length = {"padded": self.width, "trace": 3 * self.width}.get(format, self.width + 1)
        self.fixed = format in ("padded", "trace")
        self.n_sums = 90 * max_digits                # running sums are below: 81 max_digits and a tenth of the last

    def digits(self, x, n):
        """x (B,) int64 -> (B, n) its digits, least significant first."""
        return x[:, None] // 10 ** torch.arange(n, device=x.device) % 10

    def lengths(self, x, n):
        """x (B,) -> (B,) how many of n digits it is written with; zeros are no digits but in 0, unless fixed."""
        if self.fixed:
            return torch.full_like(x, n)
        return (x[:, None] >= 10 ** torch.arange(n, device=x.device)).sum(1).clamp(min=1)

    def places(self, length, T):
        """length (B,) -> (B, T) the power of ten of each written digit; outside of the number any value."""
        t = torch.arange(T, device=length.device).expand(len(length), T)
        return length[:, None] - 1 - t if self.format == "plain" else t

    def sources(self, a, b):
        """a, b (B,) int64 -> tokens (B, S) int64 and padding (B, S) bool, True after the end (None: no row has any)."""
        N, S = self.max_digits, self.source_length
        n, m = self.lengths(a, N)[:, None], self.lengths(b, N)[:, None]
        t = torch.arange(S, device=a.device)[None]
        first = self.digits(a, N).gather(1, self.places(n[:, 0], S).clamp(0, N - 1))
        shift = (t - n - 1).clamp(min=0)                                 # b's digits begin after the sign
        second = self.digits(b, N).gather(1, (m - 1 - shift if self.format == "plain" else shift).clamp(0, N - 1))
        tokens = torch.where(t < n, first, torch.where(t == n, TIMES, second))
        padding = t > n + m
        if self.fixed:
            return tokens, None
        return tokens.masked_fill(padding, PADDING), padding

    def answers(self, a, b):
        """a, b (B,) int64 -> targets (B, T) int64 and places (B, T) int64: the power of ten that a target is the digit
        of; -1 for the end and for carries, -2 for padding, which does not count."""
        product, T = a * b, self.answer_length
        digits = self.digits(product, self.width)
        if self.format == "trace":
            carries = self.running_sums(a, b) // 10
            tokens = torch.stack([digits, carries // 10, carries % 10], 2).flatten(1)
            place = torch.arange(self.width, device=a.device)
            place = torch.stack([place, -torch.ones_like(place), -torch.ones_like(place)], 1).flatten()
            return tokens, place.expand(len(a), T)
        length = self.lengths(product, self.width)
        place = self.places(length, T)
        tokens, t = digits.gather(1, place.clamp(0, self.width - 1)), torch.arange(T, device=a.device)[None]
        length = length[:, None]
        tokens = torch.where(t < length, tokens, torch.where(t == length, END, PADDING))
        return tokens, torch.where(t < length, place, torch.where(t == length, -1, -2))

    def running_sums(self, a, b):
        """a, b (B,) -> (B, 2 max_digits) int64: the column sums of long multiplication with what is carried into them,
        c_k = sum of a_i b_(k-i) + floor(c_(k-1) / 10); digit k of the product is c_k mod 10 (Bai et al. 2025)."""
        x, y, sums = self.digits(a, self.width), self.digits(b, self.width), []
        carry = torch.zeros_like(a)
        for k in range(self.width):
            sums.append((x[:, :k + 1] * y[:, :k + 1].flip(1)).sum(1) + carry)
            carry = sums[-1] // 10
        return torch.stack(sums, 1)

    def inputs(self, targets):
        """targets (B, T) -> what the decoder reads: "=" and all targets but the last."""
        return torch.cat([torch.full_like(targets[:, :1], EQUALS), targets[:, :-1]], 1)

    def numbers(self, tokens):
        """tokens (B, T) -> the B numbers that they write, None where they write none."""
        found = []
        for row in tokens.tolist():
            if self.format == "trace":
                row = row[::3]
            row = row[:row.index(END)] if END in row and not self.fixed else row
            text = "".join(SYMBOLS[token] for token in row)
            text = text if self.format == "plain" else text[::-1]
            found.append(int(text) if text.isdigit() else None)
        return found

    def text(self, tokens):
        """tokens (T,) as the model reads them, without padding."""
        return "".join(SYMBOLS[token] for token in tokens.tolist()).rstrip()

    def example(self, a, b):
        """One line: a problem for people, and what the model reads and writes."""
        x, y = torch.tensor([a]), torch.tensor([b])
        read, write = self.text(self.sources(x, y)[0][0]), self.text(self.answers(x, y)[0][0])
        return f"{a} x {b} = {a * b}: the model reads {read} and writes ={write}"
