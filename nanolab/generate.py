"""The next byte or id: filters, drawing, `generate`, which goes on with a batch of prompts from a cache, and
`beam_search`, which looks for the likeliest text."""
import copy
import math

import numpy as np
import torch

from nanolab.plan import plan_of
from nanolab.run import UserError, onto


def filter_logits(logits, temperature=1.0, top_k=None, top_p=None, min_p=None, typical_p=None):
    """Logits (B, V) -> float32 logits (B, V) over temperature, with everything that may not be drawn at -inf.

    The filters look at the distribution after the temperature, in the order top_k, top_p, typical_p, min_p, each at
    what the one before it left. top_k keeps exactly k bytes and top_p the shortest prefix of the sorted bytes whose sum
    reaches p; of equal ones the smaller byte value comes first. typical_p (Meister et al. 2022) does the same with the
    bytes sorted by how far their surprisal, -ln p, is from its mean, the entropy. min_p (Nguyen et al. 2024) keeps what
    is at least min_p times as probable as the best. The first byte always stays: the best, or the most typical, which
    may be another. temperature must be above 0.
    """
    logits = logits.float() / max(temperature, 1e-30)            # a smaller one would overflow, and change nothing
    if top_k is not None and top_p is None:                      # what the sort below would say, without sorting
        k = min(top_k, logits.size(-1))
        kth = logits.topk(k, sorted=False).values.amin(-1, keepdim=True)                 # (B, 1)
        drop = logits < kth
        if drop.device.type != "cpu" or int(drop.sum()) != drop.numel() - k * len(drop):                # ties
            tie = logits == kth
            room = k - (logits > kth).sum(-1, keepdim=True)
            drop |= tie & (tie.cumsum(-1) > room)
        logits = logits.masked_fill(drop, -torch.inf)
    elif top_p is not None:
        values, order = logits.sort(dim=-1, descending=True, stable=True)                # (B, V)
        if top_k is not None:
            values[:, top_k:] = -torch.inf
        if top_p < 1:
            before = values.softmax(-1).cumsum(-1)[:, :-1]       # (B, V - 1), all that stands before a byte
            values[:, 1:].masked_fill_(before >= top_p, -torch.inf)
        logits = torch.empty_like(values).scatter_(1, order, values)
    if typical_p is not None and typical_p < 1:
        surprisal, p = -logits.log_softmax(-1), logits.softmax(-1)                       # (B, V)
        order = (surprisal - torch.special.entr(p).sum(-1, keepdim=True)).abs().argsort(dim=-1, stable=True)
        before = p.gather(1, order).cumsum(-1)[:, :-1]                                   # (B, V - 1)
        drop = torch.zeros_like(p, dtype=torch.bool).scatter_(1, order[:, 1:], before >= typical_p)
        logits = logits.masked_fill(drop, -torch.inf)
    if min_p:
        logits = logits.masked_fill(logits < logits.amax(-1, keepdim=True) + math.log(min_p), -torch.inf)
    return logits


def draw(logits, generator, temperature=1.0, top_k=None, top_p=None, min_p=None, typical_p=None, u=None):
    """Logits (B, V) -> next bytes (B,) int64. Temperature 0 takes the most probable and draws no random number.

    Inverse of the cumulated distribution at one uniform number per row, u (B, 1), by default drawn on the generator's
    own device (CPU), so that a seed gives the same text everywhere, without multinomial's checks and waits. generator
    None: the global one.
    """
    if temperature == 0:
        return logits.argmax(-1)
    if u is None:
        u = torch.rand(logits.size(0), 1, generator=generator, device=generator.device if generator else None)
    if logits.size(0) == 1 and logits.device.type == "cpu" and not (top_p or min_p or typical_p):
        token = draw_alone(logits[0].numpy(), u.item(), temperature, top_k)
        if token is not None:
            return torch.full((1,), token)
    p = filter_logits(logits, temperature, top_k, top_p, min_p, typical_p).softmax(-1)
    reached = p.cumsum(-1)
    level = onto(p.device, u) * reached[:, -1:]
    if p.device.type != "cpu":
        return first_past(reached, level, p)
    return torch.searchsorted(reached, level, right=True)[:, 0].clamp_(max=p.size(1) - 1)


def draw_alone(scores, u, temperature=1.0, top_k=None):
    """The byte that `draw` takes at the uniform number u, an int, from logits (V,), an array; None where equal ones
    stand at the edge of top_k. Two operations of torch would cost a lone row more than all of these.
    """
    if temperature == 0:
        return int(scores.argmax())
    kept = None
    if top_k is not None and top_k < len(scores):
        kept = np.flatnonzero(scores >= np.partition(scores, -top_k)[-top_k])
        if len(kept) > top_k:
            return None
        scores = scores[kept]
    reached = np.exp((scores - scores.max()) / max(temperature, 1e-30)).cumsum(dtype=np.float64)
    found = reached.searchsorted(u * reached[-1], "right")
    if found == len(reached):                                    # past the sum by rounding: the last that can be drawn
        found = reached.searchsorted(reached[-1])
    return int(found if kept is None else kept[found])


def first_past(reached, level, p):
    """The first byte (B,) int64 that can be drawn, of p (B, V) above 0, and whose sum (B, V) is past the level (B, 1).

    What searchsorted says on a CPU. A GPU's sums may move by a rounding error where nothing is added.
    """
    return ((reached > level) & (p > 0)).byte().argmax(-1)


class Repetition:
    """What `repetition_penalty` is about: the ids of each row so far, of the prompts (lists of ids) too, or the last
    `window` of them.

    CTRL (Keskar et al. 2019, arXiv 1909.05858, section 4.1) divides the logit of every id among them by the penalty,
    which makes a negative one likelier; that is multiplied by it instead, as transformers does.
    """

    def __init__(self, prompts, penalty, window=None, device=None):
        self.penalty, self.kept, longest = penalty, slice(window and -window, None), max(map(len, prompts))
        rows = [[-1] * (longest - len(prompt)) + list(prompt) for prompt in prompts]
        self.ids = torch.tensor(rows, device=device)[:, self.kept]                       # (B, n), -1: none

    def penalise(self, logits):
        """Logits (B, V) -> (B, V)."""
        ids = self.ids.where(self.ids >= 0, logits.size(1))
        seen = torch.zeros(len(ids), logits.size(1) + 1, dtype=torch.bool, device=ids.device).scatter_(1, ids, True)
        worse = torch.where(logits < 0, logits * self.penalty, logits / self.penalty)
        return torch.where(seen[:, :-1], worse, logits)

    def add(self, token):
        """Each row goes on with its id of token (B,)."""
        self.ids = torch.cat((self.ids, token.to(self.ids.device)[:, None]), 1)[:, self.kept]


class Stop:
    """One text that ends where its bytes have one of `strings` (bytes, none empty), also in the middle of an id; the
    string is left out. decode: id -> bytes. `done`: it has ended; `held`: bytes that may be the beginning of one."""

    def __init__(self, strings, decode):
        self.strings, self.decode, self.held, self.done = strings, decode, b"", False

    def add(self, token):
        """The bytes that the text is known to have more of with this id: none once it is done."""
        if self.done:
            return b""
        text, self.held = self.held + self.decode(token), b""
        found = [at for at in map(text.find, self.strings) if at >= 0]
        if found:
            self.done = True
            return text[:min(found)]
        n = max((n for string in self.strings for n in range(len(string)) if text.endswith(string[:n])), default=0)
        self.held = text[len(text) - n:]
        return text[:len(text) - n]


class Draft:
    """Guesses of a lone row's next bytes, which one pass then reads together: what stood behind the last ORDER bytes
    before, as far as it goes, or what stands most often behind the last few in `table`, an Ngrams.

    How often each kind of guess was right is counted at every byte, guessed or not: as many are handed out as are worth
    their columns. `passes` and `bytes` count what was read so far, and drawn.
    """
    ORDER = 6

    def __init__(self, table=None):
        self.table, self.text, self.seen, self.right = table, [], {}, {}
        self.at, self.run, self.options = None, 0, []  # the place that is copied from, and how long it has been right
        self.passes = self.bytes = 0

    def add(self, token):
        """The text goes on with this byte."""
        for kind, byte in self.options:
            counts = self.right.setdefault(kind, [1, 2])
            counts[0] += byte == token
            counts[1] += 1
        self.text.append(token)
        self.at, self.run = self._go_on(self.at, self.run, token)
        last = tuple(self.text[-self.ORDER:])
        if self.at is None:
            self.at, self.run = self.seen.get(last), 0
        self.seen[last] = len(self.text)
        self.options = self._next(self.at, self.run)

    def _go_on(self, at, run, byte):
        return (at + 1, run + 1) if at is not None and self.text[at] == byte else (None, 0)

    def _next(self, at, run):
        """[(kind, byte)]: what may come next."""
        found = [] if at is None else [(min(run, 31) // 2, self.text[at])]
        return found if self.table is None else found + self.table.after(self.text)

    def _odds(self, kind):
        right, of = self.right.get(kind, (1, 2))
        return right / of

    def guess(self, most, costs):
        """At most so many bytes. costs: {columns: cost of a pass of no more, over that of one column}, rising."""
        at, run, options, n, p, worth = self.at, self.run, self.options, len(self.text), 1.0, [1.0]
        while options and len(worth) <= min(most, max(costs) - 1):
            odds, byte = max((self._odds(kind), byte) for kind, byte in options)
            p *= odds
            if p < 0.05:
                break
            worth.append(worth[-1] + p)                          # bytes that a pass with one more column is to give
            at, run = self._go_on(at, run, byte)
            self.text.append(byte)
            options = self._next(at, run)
        guesses, self.text[n:] = self.text[n:], []
        best = max(range(len(worth)), key=lambda i: worth[i] / next(costs[c] for c in costs if c > i))
        return guesses[:best]


class Ngrams:
    """What stands most often behind each 6, 5, 4, 3 and 2 ids of a text, ids (N,) of numpy, of which it takes the first
    LONGEST. Contexts are told apart by at most 20 bits of a hash: two that meet cost a guess, no more."""
    LONGEST, FACTOR = 2 ** 22, 0x9E3779B97F4A7C15

    def __init__(self, ids):
        ids, self.best = ids[:self.LONGEST].astype(np.uint64), {}
        self.bits = min(20, max(8, len(ids).bit_length() + 2))
        for order in (6, 5, 4, 3, 2):
            places = np.zeros(max(0, len(ids) - order), np.uint64)
            for i in range(order):
                places = (places + ids[i:i + len(places)]) * np.uint64(self.FACTOR)  # modulo 2^64
            places = places >> np.uint64(64 - self.bits)
            pairs, counts = np.unique(places << np.uint64(32) | ids[order:], return_counts=True)
            places = (pairs >> np.uint64(32)).astype(np.int64)
            totals = np.bincount(places, counts, 2 ** self.bits)
            rising = np.argsort(counts, kind="stable")           # of those written to one place the last one stays
            best, share = np.zeros(2 ** self.bits, np.int32), np.zeros(2 ** self.bits, np.int8)
            best[places[rising]] = (pairs & np.uint64(2 ** 32 - 1)).astype(np.int32)[rising]
            share[places[rising]] = (8 * counts / totals[places])[rising].astype(np.int8)
            share[totals < 2] = -1                               # seen once, or never: not known
            self.best[order] = memoryview(best), memoryview(share)  # one of their numbers costs less than an array's

    def after(self, text):
        """[((order, eighths of the cases), id)] by the longest context known, or []."""
        for order, (best, share) in self.best.items():
            place = 0
            for i in text[-order:]:
                place = (place + i) * self.FACTOR & 2 ** 64 - 1
            place >>= 64 - self.bits
            if share[place] >= 0 and len(text) >= order:
                return [((order, share[place]), best[place])]
        return []


class ByModel:
    """What a Plan does, by the model and its cache. UserError where a layer cannot take bytes back."""
    costs = {1: 1.0, 4: 1.4, 8: 1.5, 16: 1.7}

    def __init__(self, model, T, window):
        self.model, self.cache = model, model.new_cache(1, T, window=window)
        if self.spare(0) <= 0:
            c = model.config
            whose = f"mixer {c.mixer!r}" if c.documents == "none" else f"a model with documents {c.documents!r}"
            raise UserError(f"{whose} has states that cannot go back: it goes without a draft")
        self.reset = self.cache.reset

    def spare(self, n):
        """How many positions beside n more may be read and taken back."""
        return min(layer.room for layer in self.cache.layers) - n

    def read(self, ids):
        """A list of n ids -> logits (n, V) after each."""
        x = torch.tensor([ids], device=self.model.embed.device)
        return self.model(x, cache=self.cache)[0].cpu().numpy()

    def crop(self, n):
        """Forgets the last n positions."""
        self.cache.crop(self.cache.length - n)


@torch.inference_mode()
def generate(model, prompts, length, generator=None, use_cache=True, log=None, draft=None, repetition_penalty=1.0,
             repetition_window=None, **how):
    """Yields `length` times the next bytes (B,) int64 of all rows, from a cache; the same ones without.

    prompts: list of B byte strings, none empty, of any lengths (shorter ones are padded on the left, masked). Longer
    than block_size: only the last block_size bytes are read. how: temperature, top_k, top_p, min_p, typical_p. The
    model should be in eval mode. Learned positions: all rows start again at once, when the longest has filled the
    window. Other positions roll on; without a cache the whole text is read again for each byte, full attention limited
    to the last block_size positions. log: an open file, to which goes at the end, also where the generator is closed
    before it, what each layer's cache held. repetition_penalty, repetition_window: as Repetition; at 1 there is none.

    A lone row goes by a Plan where there is one. draft: a Draft for a lone row; one pass then reads what it guesses
    too, each byte is drawn from the model's logits there by its own number, and a guess stands while it is what was
    drawn: the same bytes in fewer passes. Raises ValueError, when the first byte is asked for, if a prompt is empty, or
    a draft has several rows or no cache; UserError where a draft's layers cannot go back.
    """
    T = model.config.block_size
    where = next(model.parameters()).device
    window = T if T > 1 and model.config.rolls else None
    rows = [list(prompt[-T:]) for prompt in prompts]
    if not rows or not all(rows):
        raise ValueError("there must be a prompt, and each must have at least one byte")
    if draft is not None and (len(rows) > 1 or not use_cache):
        raise ValueError("a draft is for a lone row with a cache")
    repetition = None
    if repetition_penalty != 1:
        repetition = Repetition(prompts, repetition_penalty, repetition_window, where)
    reader = plan_of(model) if len(rows) == 1 and use_cache and log is None else None
    if reader is None and draft is not None:
        reader = ByModel(model, T, window)
    if reader is not None:
        cache = getattr(reader, "cache", None)
        steps = _alone(reader, rows[0], length, generator, T, window is not None, draft, repetition, how)
    else:
        cache = model.new_cache(len(rows), T, window=window) if use_cache else None
        steps = _together(model, rows, length, generator, cache, window, repetition, how)
    try:
        yield from steps
    finally:
        if log is not None and cache is not None:
            print(*cache.log(), sep="\n", file=log)


def _together(model, rows, length, generator, cache, window, repetition, how):
    """`generate` for all rows at once, with a Cache or None."""
    T, where, rolls = model.config.block_size, next(model.parameters()).device, window is not None
    n_bytes = torch.tensor([len(row) for row in rows])           # bytes of each row so far
    columns = int(n_bytes.max())
    x = torch.tensor([[0] * (columns - len(row)) + row for row in rows], device=where)   # (B, columns), padded left
    recent, held = [x], columns                                  # what a restart would read, and its bytes
    positions = _left_padded(n_bytes, columns, where)
    for step in range(length):
        if not rolls and held > T:                               # the window is full: start again from its last half
            if cache is not None:
                cache.reset()
            x = torch.cat(recent, 1)[:, -max(1, T // 2):]
            recent, held = [x], x.size(1)
            positions = _left_padded(n_bytes + step, x.size(1), where)
        if cache is not None:
            logits = model(x, positions=positions, cache=cache)[:, -1]                   # (B, V)
        else:
            logits = model(torch.cat(recent, 1), positions=positions, window=window)[:, -1]
        token = draw(logits if repetition is None else repetition.penalise(logits), generator, **how)
        if repetition is not None:
            repetition.add(token)
        yield token
        x = token[:, None]                                                               # (B, 1)
        if positions is not None:                                # a cache knows where its rows go on
            positions = None if cache is not None else torch.cat((positions, positions[:, -1:] + 1), 1)
        if not rolls or cache is None:
            recent.append(x)
            held += 1


def _alone(reader, text, length, generator, T, rolls, draft, repetition, how):
    """`generate` for a lone row, by a Plan or ByModel."""
    new, text = text, list(text)
    take = _taker(length, generator, **how)
    for token in text if draft else ():
        draft.add(token)
    while length:
        if not rolls and len(text) > T:
            reader.reset()
            text = text[-max(1, T // 2):]
            new = list(text)
        guesses = []
        if draft is not None:
            most = reader.spare(len(new)) if rolls else T - len(text)
            guesses = draft.guess(min(most, length - 1), reader.costs)
            draft.passes += 1
        for i, scores in enumerate(reader.read(new + guesses)[-1 - len(guesses):]):
            if repetition is not None:
                scores = repetition.penalise(torch.from_numpy(scores)[None])[0].numpy()
            token = take(scores)
            length -= 1
            if not rolls:
                text.append(token)
            if draft is not None:
                draft.add(token)
                draft.bytes += 1
            drawn = torch.tensor([token])
            if repetition is not None:
                repetition.add(drawn)
            yield drawn
            if i < len(guesses) and token != guesses[i]:
                reader.crop(len(guesses) - i)
                break
        new = [token]


def _taker(length, generator, temperature=1.0, top_k=None, **how):
    """A function logits (V,) of numpy -> the id that `draw` takes, of `length` in a row."""
    left, numbers, of_few = length, [], not any(how.values())

    def take(scores):
        nonlocal left, numbers
        if temperature == 0:
            return int(scores.argmax())
        if not numbers:  # as many as torch would draw one by one, and the same
            numbers = torch.rand(min(left, 1000), generator=generator, device="cpu").tolist()[::-1]
            left -= len(numbers)
        u = numbers.pop()
        token = draw_alone(scores, u, temperature, top_k) if of_few else None
        if token is None:
            token = int(draw(torch.from_numpy(scores[None]), None, temperature, top_k, **how, u=torch.tensor([[u]])))
        return token
    return take


def _left_padded(n_bytes, columns, device):
    """Positions (B, columns) of rows that end together, -1 where a row has no byte; None when every row is full."""
    if bool((n_bytes >= columns).all()):
        return None
    return (torch.arange(columns) - (columns - n_bytes.clamp(max=columns))[:, None]).clamp(min=-1).to(device)


@torch.inference_mode()
def beam_search(model, prompt, length, n_beams, length_penalty=1.0, stop=None, log=None):
    """The n_beams best texts after a prompt that were found, best first: [(score, ids, nats)], where nats are -ln p of
    the ids, a list, and score is nats / len(ids) ** length_penalty, as Hugging Face's beams have it: less is better.

    At every step the n_beams likeliest continuations of all beams go on; of equal ones those of smaller ids. What
    `stop`, a Stop, ends is set aside if it is among these, and the next one goes on in its place. It is over after
    `length` ids, or when n_beams have ended and no beam can become better than these. Prompt, windows and log are as in
    `generate`; length_penalty must not be negative.
    """
    T = model.config.block_size
    window = T if T > 1 and model.config.rolls else None
    cache = model.new_cache(1, T, window=window)
    x = text = torch.tensor([list(prompt[-T:])], device=model.embed.device)              # (B, n), B is 1 at first
    beams, ended = [(0.0, [], stop or Stop((), lambda token: b""))], []                  # nats, ids, Stop; by their ids

    def score(nats, n):
        return nats / max(n, 1) ** length_penalty
    for n in range(1, length + 1):
        if window is None and text.size(1) > T:                  # full: start again from the last half
            cache.reset()
            x = text = text[:, -max(1, T // 2):]
        costs = -model(x, cache=cache)[:, -1].cpu().double().log_softmax(-1).numpy()     # (B, V)
        costs += np.array([[nats] for nats, *_ in beams])
        going = []                                               # (parent, id, beam)
        for rank, place in enumerate(costs.argsort(axis=None, kind="stable")):
            parent, token = divmod(int(place), costs.shape[1])
            _, ids, end = beams[parent]
            nats, ids, end = float(costs[parent, token]), [*ids, token], copy.copy(end)
            end.add(token)
            if not end.done:
                going.append((parent, token, (nats, ids, end)))
            elif rank < n_beams:
                ended.append((score(nats, n), ids, nats))
            if len(going) == n_beams:
                break
        ended = sorted(ended)[:n_beams]
        best = min((beam[0] for *_, beam in going), default=math.inf)
        if not going or len(ended) == n_beams and ended[-1][0] < score(best, length):
            break
        parents, tokens, beams = zip(*sorted(going))
        parents, x = (torch.tensor(column, device=x.device) for column in (parents, tokens))
        cache, x = cache.fork(parents.bincount(minlength=len(costs))), x[:, None]        # in the order of their parents
        if window is None:
            text = torch.cat((text[parents], x), 1)
    else:
        ended = sorted(ended + [(score(nats, length), ids, nats) for nats, ids, _ in beams])[:n_beams]
    if log is not None:
        print(*cache.log(), sep="\n", file=log)
    return ended
