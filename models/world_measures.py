"""What the models of a world are worth: figures of frames, latent actions, dynamics and words, on held-out clips.

Each evaluate_ function asks a `reader` (nanolab/world.py) for clips and returns {name: figure} of a model in evaluation
mode; `score` is what a stage is judged by. A mean over nothing, or a share of nothing, is not a number.

Shapes: B clips, T frames, H x W pixels, P colours of a palette, N tokens of a frame. Frames are float32 in 0..1.
"""
import functools
import itertools
import math
from collections import Counter

import torch
import torch.nn.functional as F

from kernels import cross_entropy
from models.discrete import code_statistics, mutual_information
from models.world_layers import move, to_patches


NOTHING = {"changed": "nothing changes", "information": "all actions are the same", "majority": "one clip only",
           "consistency": "no code moves the agent twice", "": "no other clip or action to compare with"}


def in_line(numbers):
    """name value, name value, ...; why where one is not a number, and of a whole frame what must be right."""
    def why(key, value):
        if math.isnan(value):
            return f" ({next(why for word, why in NOTHING.items() if word in key)})"
        return {"frame": " (all tokens right)", "drawn": " (all tokens right)"}.get(
            key, " (all pixels right)" * key.startswith("exact_"))
    return ", ".join(f"{key} {value:.4g}{why(key, value)}" for key, value in numbers.items())


# --- Frames ---

def pixel_loss(written, frames, indices, weight=None):
    """Mean loss a pixel: nats of the palette's colours where there is a palette, else squared error of RGB in 0..1.

    written (..., H, W, P or 3); frames (..., H, W, 3) float; indices (..., H, W) int64 or None; weight (..., H, W).
    """
    if indices is not None:
        loss = cross_entropy(written.flatten(0, -2).float(), indices.flatten())
    else:
        loss = (written.float() - frames).square().mean(-1).flatten()
    return loss.mean() if weight is None else (loss * weight.flatten()).sum() / weight.sum()


def changed(frames, before, threshold=0.0):
    """(...,) bool: pixels of frames (..., C) in which a channel differs from `before` by more than a threshold."""
    return ((frames - before).abs() > threshold).any(-1)


def shifted(plan, reader):
    """Actions (B, T) of other clips: of a recording half of the batch away, since the next clip's are nearly the same,
    else the clip before's."""
    return plan.roll(1 if reader.side else max(1, len(plan) // 2), 0)


def over(a, b):
    """a / b; not a number where b is 0."""
    return a / b if b else math.nan


def psnr(error):
    """Decibels of a mean squared error of values in 0..1: of many frames that of their pooled error. 100 at most; not a
    number of one that is none."""
    return math.nan if math.isnan(error) else -10 * math.log10(max(error, 1e-10))


def frame_psnrs(square):
    """The sum of the frames' own PSNRs: square (..., H, W, 3), squared errors."""
    return (-10 * square.flatten(-3).mean(-1).double().clamp(min=1e-10).log10()).sum().item()


def ssim(a, b, size=11, sigma=1.5):
    """Structural similarity (Wang et al. 2004) of frames (B, H, W, 3) in 0..1: mean over frames, colours and windows, a
    Gaussian of 11 pixels (fewer where a side has fewer), without padding."""
    size = min(size, *a.shape[1:3])
    place = torch.arange(size, device=a.device) - (size - 1) / 2
    line = torch.exp(-place.float().square() / (2 * sigma ** 2))
    line = line / line.sum()
    a, b = (x.permute(0, 3, 1, 2).flatten(0, 1).unsqueeze(1) for x in (a, b))   # (3 B, 1, H, W)

    def mean(x):
        return F.conv2d(F.conv2d(x, line.view(1, 1, 1, -1)), line.view(1, 1, -1, 1))
    ma, mb = mean(a), mean(b)
    va, vb, cov = mean(a * a) - ma * ma, mean(b * b) - mb * mb, mean(a * b) - ma * mb
    c1, c2 = 0.01 ** 2, 0.03 ** 2
    return ((2 * ma * mb + c1) * (2 * cov + c2) / ((ma ** 2 + mb ** 2 + c1) * (va + vb + c2))).mean().item()


@torch.no_grad()
def evaluate_tokenizer(model, reader, T, clips, threshold=0.0):
    """Figures of clips of T frames. psnr, ssim: of whole frames; frame_psnr: mean over frames of each one's;
    changed_psnr: of patches in which a value differs from the frame before by more than the threshold, changed_floor:
    of copying that frame there; usage, perplexity: of the codebook over all clips."""
    sums, codes = Counter(), []
    for index in reader.spread(T, clips).split(64):
        n, (frames, indices) = len(index), reader.pictures(index, T)
        written, found = model(frames, None)
        seen = reader.as_frames(written)
        square = (seen - frames).square()
        patches = to_patches(frames, model.patch)
        truth, copied = patches[:, 1:], patches[:, :-1]
        moved = changed(truth, copied, threshold)                                # (B, T - 1, N)
        sums.update(clips=n, loss=pixel_loss(written, frames, indices).item() * n,
                    error=square.mean().item() * n, frame_psnr=frame_psnrs(square),
                    ssim=ssim(seen.flatten(0, 1), frames.flatten(0, 1)) * n,
                    changed=to_patches(square, model.patch)[:, 1:].mean(-1)[moved].sum().item(),
                    floor=(truth - copied).square().mean(-1)[moved].sum().item(), moved=moved.sum().item())
        codes.append(found.codes.cpu())
    n, used = sums["clips"], code_statistics(torch.cat(codes).view(-1, 1), model.codebook_size)
    return dict(loss=sums["loss"] / n, psnr=psnr(sums["error"] / n), frame_psnr=sums["frame_psnr"] / (n * T),
                ssim=sums["ssim"] / n, changed_psnr=psnr(over(sums["changed"], sums["moved"])),
                changed_floor=psnr(over(sums["floor"], sums["moved"])), usage=used["usage"],
                perplexity=used["perplexity"], score=-sums["loss"] / n)


# --- Latent actions ---

def majority_map(codes, labels, n_codes, n_labels):
    """(n_codes,) int64: the label that came most often with each code."""
    return (codes * n_labels + labels).bincount(minlength=n_codes * n_labels).view(n_codes, n_labels).argmax(1)


def ceilings(counts, n_codes):
    """What a code that knows the label could score: counts (L,) of the labels. With fewer codes than labels a code
    stands for several: the best way to share them, of more than six labels only a good one, in which the two rarest
    share a code until there are as many as codes."""
    def nats(shares):
        return -sum(p * math.log(p) for p in shares if p)
    shares = sorted((counts / counts.sum()).tolist())
    kept, best = [*shares], sum(shares[-n_codes:])
    while len(kept) > n_codes:
        kept = sorted([kept[0] + kept[1], *kept[2:]])
    most = nats(kept)
    if n_codes < len(shares) <= 6:
        maps = itertools.product(range(n_codes), repeat=len(shares))
        most = max(nats([sum(p for p, code in zip(shares, codes) if code == k) for k in range(n_codes)])
                   for codes in maps)
    return dict(ceiling_information=over(most, nats(shares)), ceiling_majority=best)


def naming(codes, labels, n_codes, n_labels):
    """What codes (M, T) say of labels (M, T), both int64.

    information: I(code; label) / H(label); majority: accuracy of naming the label by a map from codes that was counted
    on one half of the clips, on the other; majority_200: counted on 200 steps; majority_floor: of naming the commonest;
    moved_information: what "label 0 or not" alone would score; ceiling_*: see `ceilings`.
    """
    half, few = len(codes) // 2, min(200, len(codes) // 2 * codes.size(1))
    fit, fit_labels, test, test_labels = (x.flatten() for x in (codes[:half], labels[:half], codes[half:],
                                                                labels[half:]))
    codes, labels = codes.flatten(), labels.flatten()
    shared, _, entropy = mutual_information(codes, labels, n_codes, n_labels)
    moved, _, _ = mutual_information((labels > 0).long(), labels, 2, n_labels)

    def accuracy(n):
        named = majority_map(fit[:n], fit_labels[:n], n_codes, n_labels)[test]
        return over((named == test_labels).double().mean().item(), half and 1)
    return dict(information=over(shared, entropy), moved_information=over(moved, entropy), majority=accuracy(None),
                majority_200=accuracy(few), majority_floor=test_labels.bincount().max().item() / len(test_labels),
                **ceilings(labels.bincount(minlength=n_labels), n_codes))


@torch.no_grad()
def evaluate_actions(model, reader, clips):
    """Figures of a latent action model; true actions are for scoring only.

    psnr_1, psnr_4: of 1 and 4 frames written after each other from the codes inferred; frame_psnr_1, frame_psnr_4:
    means over frames of each one's; copy_1, copy_4: of the last true frame instead; dpsnr_1, dpsnr_4: psnr less that of
    codes inferred in other clips (of the same 64; a clip alone has no other and is left out), dpsnr_random_4: less that
    of uniform codes. The rest: see `naming` and `consistency_of`.
    """
    generator, held = torch.Generator().manual_seed(0), model.history
    T, sums, every, labels = held + 4, Counter(), [], []
    for index in reader.spread(T, clips).split(64):
        n, (frames, indices), true = len(index), reader.watch(index, T), reader.frames(index, T)
        windows = [frames[:, t:t + held + 1] for t in range(4)]
        codes = torch.stack([model.quantiser(model.encode(window)).codes for window in windows], 1)  # (B, 4)
        written, _ = model(windows[0])
        last = None if indices is None else indices[:, held]
        sums.update(clips=n, pairs=n * (n > 1),
                    loss=pixel_loss(written, windows[0][:, -1], last).item() * n)
        plans = {"inferred": codes, "permuted": shifted(codes, reader),
                 "random": torch.randint(model.n_codes, codes.shape, generator=generator).to(codes.device)}
        for name, plan in plans.items():
            past = frames[:, :held]
            for t in range(4):
                out = reader.as_watched(model.predict(past, model.quantiser.look_up(plan[:, t])))[:, None]
                past = torch.cat((past[:, 1:], out), 1)
                square = (reader.as_seen(out)[:, 0] - true[:, held + t]).square()
                error = square.mean().item() * n
                sums[name, t] += error * (n > 1 or name != "permuted")
                if name == "inferred":
                    copied = (true[:, held - 1] - true[:, held + t]).square().mean().item()
                    sums["copy", t] += copied * n
                    sums["each", t] += frame_psnrs(square)
                    sums["paired", t] += error * (n > 1)
        every.append(codes.cpu())
        effective = reader.clips.effective(index, T)
        if effective is not None:
            labels.append(effective[:, held - 1:])
    codes, n = torch.cat(every), sums["clips"]
    used = code_statistics(codes.view(-1, 1), model.n_codes)

    def value(name, t):
        return psnr(over(sums[name, t], sums["pairs"] if name in ("permuted", "paired") else n))
    numbers = dict(loss=sums["loss"] / n, psnr_1=value("inferred", 0), psnr_4=value("inferred", 3),
                   frame_psnr_1=sums["each", 0] / n, frame_psnr_4=sums["each", 3] / n, copy_1=value("copy", 0),
                   copy_4=value("copy", 3), dpsnr_1=value("paired", 0) - value("permuted", 0),
                   dpsnr_4=value("paired", 3) - value("permuted", 3),
                   dpsnr_random_4=value("inferred", 3) - value("random", 3), usage=used["usage"],
                   perplexity=used["perplexity"], score=-sums["loss"] / n)
    if labels:
        numbers |= naming(codes, torch.cat(labels), model.n_codes, reader.n_actions)
    if reader.side:
        shares = codes.flatten().bincount(minlength=model.n_codes).float() / codes.numel()
        numbers |= consistency_of(model, reader, shares, clips)
    return numbers


@torch.no_grad()
def consistency_of(model, reader, shares, clips):
    """Whether a code means the same wherever it starts: every code writes the frame after each of so many pasts, and
    moves the agent in a direction, or not. A code counts as often as it is inferred, its share (n_codes,).

    consistency: mean cosine of two such directions under one code (0: no code has a direction, 1: each has one, in all
    worlds; a code that moved the agent once is left out; not a number: all have); lost: share of the written frames
    without exactly one agent.
    """
    sums, moved, lost, n = torch.zeros(model.n_codes, 2), torch.zeros(model.n_codes), torch.zeros(model.n_codes), 0
    agent, side = reader.movers["agent"], reader.side
    for index in reader.spread(model.history, clips).split(64):
        frames, _ = reader.watch(index, model.history)
        before = (reader.plain(reader.clips.cells(index, model.history)[:, -1]) == agent).flatten(1).int().argmax(1)
        n += len(index)
        for code in range(model.n_codes):
            e = model.quantiser.look_up(torch.full((len(index),), code, device=frames.device))
            seen = reader.as_seen(reader.as_watched(model.predict(frames, e))[:, None])[:, 0]
            agents = (reader.plain(reader.cells(seen)) == agent).flatten(1)
            one = agents.sum(1) == 1
            now = agents.int().argmax(1)
            step = torch.stack((now // side - before // side, now % side - before % side), 1).float()
            went = one & (now != before)
            sums[code] += F.normalize(step[went], dim=1).sum(0)
            moved[code] += went.sum()
            lost[code] += (~one).sum()
    cosine = (sums.square().sum(1) - moved) / (moved * (moved - 1)).clamp(min=1)  # without a step with itself
    weight = shares * moved * (moved > 1)
    return dict(consistency=((cosine * weight).sum() / weight.sum()).item(),      # of no pairs 0 / 0
                lost=(lost * shares).sum().item() / n)


def untrained_floor(model, train, val, batches, clips):
    """`information` and `majority` of an action model before training, its BatchNorm settled on `batches` of clips."""
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm1d):
            module.momentum = None                            # the plain mean over all batches
    with torch.no_grad():
        for index in batches:
            found = model(train.watch(index, model.history + 1)[0])[1]
            model.quantiser.follow(found.z, found.codes)
    numbers = evaluate_actions(model.eval(), val, clips)
    if val.side is None:
        numbers |= against_time(model, train, val, clips)
    names = "information", "majority", "null_information", "named", "r2"
    return {f"untrained_{key}": numbers[key] for key in names if key in numbers}


@torch.no_grad()
def against_time(model, train, val, clips):
    """How much of `information` a recording's few frames say by chance, and what codes say that was counted elsewhere.

    null_information: I / H of codes rolled in time against the labels (mean of 8 rolls), which keeps what each says of
    itself a little later; steps: as many. named: accuracy of naming the label by the map from codes that was counted on
    the training part; r2: of the numbers that the labels were, by each code's mean there (0: no better than the mean).
    """
    def coded(reader, count):
        index = reader.spread(model.history + 1, count)
        codes = [model.quantiser(model.encode(reader.watch(part, model.history + 1)[0])).codes.cpu()
                 for part in index.split(64)]
        labels, values = reader.clips.effective(index, model.history + 1), reader.clips.values(index, model.history + 1)
        return torch.cat(codes), labels[:, -1], None if values is None else values[:, -1]
    K, n = model.n_codes, val.n_actions
    (codes, labels, values), (there, their_labels, their_values) = coded(val, clips), coded(train, 4096)
    rolled = [mutual_information(codes.roll(k * len(codes) // 9), labels, K, n) for k in range(1, 9)]
    said = majority_map(there, their_labels, K, n)[codes]
    found = dict(null_information=over(sum(one[0] for one in rolled) / 8, rolled[0][2]), steps=len(codes),
                 named=(said == labels).double().mean().item())
    if values is not None:
        counts = there.bincount(minlength=K)
        means = torch.zeros(K, dtype=torch.float64).index_add_(0, there, their_values) / counts
        means = torch.where(counts > 0, means, their_values.mean())              # a code that was never seen there
        spread = (values - values.mean()).square().sum().item()
        found["r2"] = 1 - over((values - means[codes]).square().sum().item(), spread)
    return found


def linear_probe(train, val, T, clips, train_clips=4096, penalty=1.0):
    """What a linear map knows of the label: ridge regression, fitted with labels, from T frames of 16 x 16 grey values
    to the last action's one-hots. probe_information, probe_majority: of what it names, I over H and accuracy;
    probe_floor: accuracy of the commonest."""
    def features(reader, count):
        parts = []
        for index in reader.spread(T, count).split(256):
            frames = reader.frames(index, T).mean(-1).flatten(0, 1)[:, None]
            small = F.adaptive_avg_pool2d(frames, 16).view(len(index), -1).double().cpu()
            parts.append((F.pad(small, (0, 1), value=1.0), reader.clips.effective(index, T)[:, -1]))
        return map(torch.cat, zip(*parts))
    (x, y), (test, truth) = features(train, train_clips), features(val, clips)
    target, n = F.one_hot(y, val.n_actions).double(), val.n_actions
    weights = torch.linalg.solve(x.T @ x + penalty * torch.eye(x.size(1), dtype=torch.float64), x.T @ target)
    said = (test @ weights).argmax(1)
    shared, _, entropy = mutual_information(said, truth, n, n)
    return dict(probe_information=over(shared, entropy), probe_majority=(said == truth).double().mean().item(),
                probe_floor=truth.bincount().max().item() / len(truth))


def meanings_of(reader, clips):
    """(the true action that most often took effect with each code (n_codes,) int64; for each true action the code that
    stands for it most often, of those that mean it, None where none does); (None, None) where no actions are known."""
    model, n = reader.models["actions"], reader.n_actions
    T = model.history + 1
    index = reader.spread(T, clips)
    labels = reader.clips.effective(index, T)
    if labels is None or not n:
        return None, None
    with torch.no_grad():
        codes = torch.cat([reader.codes(part, T)[:, -1].cpu() for part in index.split(64)])
    counts = (codes * n + labels[:, -1]).bincount(minlength=model.n_codes * n).view(model.n_codes, n)
    meanings = counts.argmax(1)
    means = [torch.where(meanings == action, counts[:, action], 0) for action in range(n)]
    return meanings, [int(count.argmax()) if count.any() else None for count in means]


# --- Floors of recordings ---

@torch.no_grad()
def copy_psnr(reader, T, clips):
    """PSNR of all frames of clips of T by copying the frame before each."""
    error = n = 0
    for index in reader.spread(T, clips).split(64):
        frames = reader.frames(index, T)
        error, n = error + (frames[:, 1:] - frames[:, :-1]).square().mean().item() * len(index), n + len(index)
    return psnr(error / n)


def fit_flows(train, n_actions, steps=300, batch=32):
    """One flow for each true action, (A, 2, 4, 4) pixels, by which the last frame moved is nearest the next: 32 numbers
    each, by Adam on clips of the training part."""
    flows = torch.zeros(n_actions, 2, 4, 4, device=train.device, requires_grad=True)
    opt, chance = torch.optim.Adam([flows], lr=0.1), torch.Generator().manual_seed(0)
    for step in range(steps):
        opt.param_groups[0]["lr"] = 0.1 * (1 - step / steps)
        index = torch.randint(train.clips.count(2), (batch,), generator=chance)
        frames, actions = train.frames(index, 2), train.clips.effective(index, 2)[:, 0].to(train.device)
        opt.zero_grad()
        (move(frames[:, 0], flows[actions]) - frames[:, 1]).square().mean().backward()
        opt.step()
    return flows.detach()


def rollout_floors(train, val, context, clips):
    """PSNR at the frames of `evaluate_rollouts` of what no learned dynamics should be under. mean_n: the mean frame of
    the training part, whatever came before; moved_n: the last true frame, moved n times by the flow of each true action
    (`fit_flows`), where there are any."""
    ahead, held = min(16, val.clips.length - context + 1), context - 1
    index, times = val.spread(held + ahead, clips), [t for t in (1, 4, 16) if t <= ahead]
    whole = train.spread(1, 4096)
    mean = sum(train.frames(part, 1).sum((0, 1)) for part in whole.split(64)) / len(whole)
    flows, sums = val.n_actions and fit_flows(train, val.n_actions), Counter()
    for part in index.split(64):
        frames, labels = val.frames(part, held + ahead), val.clips.effective(part, held + ahead)
        now = frames[:, held - 1]
        for t in range(1, ahead + 1):
            if val.n_actions:
                now = move(now, flows[labels[:, held + t - 2].to(val.device)])
            for name, seen in (("mean", mean), ("moved", now)):
                sums[name, t] += (seen - frames[:, held + t - 1]).square().flatten(1).mean(1).sum().item()
    names = ("mean", "moved") if val.n_actions else ("mean",)
    return {f"{name}_{t}": psnr(sums[name, t] / len(index)) for name in names for t in times}


def of_play(figures):
    """(a line of what playing these dynamics scores, by their figures in the summary; whether that is enough to play);
    where nobody has played them "", True."""
    if "play_agent" not in figures:
        return "", True
    agent, effect, ball = (figures[f"play_{name}"] for name in ("agent", "effect", "ball"))
    return (f"played {figures['play_presses']} presses in 20 worlds: agent there {agent:.1%}, effect right "
            f"{effect:.1%}, ball right {ball:.1%}", agent >= 0.99 and effect >= 0.95 and ball >= 0.95)


def doubts(stage, figures):
    """{flag: line}: reasons not to believe in a stage, by its figures in the summary."""
    def of(name):
        value = figures.get(name if name.startswith("rollout") else f"{stage}_{name}")
        return math.nan if value is None else value           # compared with it, nothing is less
    found, untrained = (of(f"{name}information") - of(f"{name}null_information") for name in ("", "untrained_"))
    copied = of("copy") + min(0.02, (1 - of("copy")) / 2)
    reasons = dict(
        tokenizer=[
            ("dead_codebook", of("perplexity") < 1.5,
             f"one code carries nearly all (perplexity {of('perplexity'):.2f})"),
            ("below_copying", of("psnr") < of("copy_psnr"), f"below copying the last frame ({of('psnr'):.1f} against "
             f"{of('copy_psnr'):.1f} dB): no rollout can beat copying")],
        actions=[
            ("codes_say_nothing", of("dpsnr_1") < 0.1,
             f"codes say nothing: other clips' codes cost {of('dpsnr_1'):.2f} dB"),
            ("few_steps", of("null_information") > 0.1, f"{of('steps'):.0f} steps are too few to score information: "
             f"codes rolled in time reach {of('null_information'):.2f}"),
            ("as_untrained", found <= untrained,
             "less its null, information is no more than an untrained encoder's")],
        dynamics=[
            ("blank_tokens", of("copy") == 1, "no token ever changes: that all are right means nothing"),
            ("as_copying", of("tokens") <= copied or of("rollout_psnr_1") <= of("rollout_copy_1") + 0.2,
             f"no better than copying: {of('tokens'):.1%} of tokens against {of('copy'):.1%}, "
             f"{of('rollout_psnr_1'):.1f} against {of('rollout_copy_1'):.1f} dB"),
            ("below_mean", of("rollout_psnr_16") < of("rollout_mean_16"),
             "after 16 frames the mean frame of the training part is better")])
    return {flag: line for flag, holds, line in reasons.get(stage, ()) if holds}


# --- Dynamics ---

@torch.no_grad()
def evaluate_dynamics(model, reader, T, clips, window=None, causal=False):
    """Figures of clips of T frames whose last one is wholly hidden, named in one pass, likeliest tokens; by causal
    dynamics one token after another, likeliest each (its loss is given the true ones before).

    tokens, changed: share of all tokens and of those that differ from the frame before; copy: of all, by copying it;
    agent, ball: share of the clips in which it moved to another cell and stands there (left out where none moved);
    frame: whole frames. Rollouts are what `evaluate_rollouts` is for.
    """
    sums = Counter()
    for index in reader.spread(T, clips).split(64):
        truth, actions = reader.tokens_and_actions(index, T)
        last, before = truth[:, -1], truth[:, -2]
        if causal:
            logits = model(truth, actions, window=window)[:, -1]
            cache = model.new_cache(len(truth), T, window)
            model(truth[:, :-1], actions[:, :-1], cache)
            said = model.next_frame(actions[:, -1], cache, temperature=0.0)
        else:
            hidden = torch.cat((truth[:, :-1], torch.full_like(truth[:, -1:], model.mask)), 1)
            true = dict(before=reader.frames(index, T)[:, -2:-1]) if model.draft else {}
            logits = model(hidden, actions, window=window, **true)[:, -1]
            said = logits.argmax(-1)
        right, moved = said == last, last != before
        sums.update(frames=len(index), n=last.numel(), right=right.sum().item(), changed=right[moved].sum().item(),
                    loss=F.cross_entropy(logits.flatten(0, 1), last.flatten(), reduction="sum").item(),
                    moved=moved.sum().item(), copied=(~moved).sum().item(), whole=right.all(1).sum().item())
        cells = reader.clips.cells(index, T)
        if cells is not None:
            written = said
            if reader.kind != "cells":
                written = reader.cells(reader.paint(torch.cat((truth[:, :-1], said[:, None]), 1))[:, -1])
            written, cells = reader.plain(written.view(len(index), -1).cpu()), reader.plain(cells.flatten(2))
            for name, kind in reader.movers.items():
                appears = (cells[:, -1] == kind) & (cells[:, -2] != kind)        # (B, N)
                sums.update({name: ((written == kind) & appears).sum().item(), f"{name}s": appears.sum().item()})
    n = sums["n"]
    return dict(loss=sums["loss"] / n, tokens=sums["right"] / n, changed=over(sums["changed"], sums["moved"]),
                copy=sums["copied"] / n, frame=sums["whole"] / sums["frames"],
                perplexity=math.exp(min(sums["loss"] / n, 50)), score=-sums["loss"] / n,
                **{name: sums[name] / sums[f"{name}s"] for name in reader.movers if sums[f"{name}s"]})


@torch.no_grad()
def evaluate_rollouts(model, reader, context, clips, **how):
    """PSNR of frames 1, 4 and 16 after `context` - 1 true ones, each generated from those before: with the actions that
    led there (psnr_n; frame_psnr_n: mean over frames of each one's), with those of another clip of the same 64
    (permuted_n) or even draws (random_n); copy_n: the last true frame stays; dpsnr_4 = psnr_4 - random_4 (Genie's),
    dpsnr_permuted_4. exact_n: share of frames n that are wholly right. Of recordings, expected_n: the mean of what each
    hidden token may be, decoded in place of the likeliest, from which the next frame goes on (but for drafts, which are
    of the frame shown); and both with what the tokenizer lost of the last true frame added (psnr_residual_n,
    expected_residual_n), whose loss what stands still then does not pay. how: of the model's `generate`."""
    ahead, held = min(16, reader.clips.length - context + 1), context - 1
    T, sums, generator = held + ahead, Counter(), torch.Generator().manual_seed(0)
    for index in reader.spread(T, clips).split(64):
        n, (truth, actions) = len(index), reader.tokens_and_actions(index, T)
        frames, plan = reader.frames(index, T), actions[:, held:]
        plans = {"psnr": plan, "permuted": shifted(plan, reader),
                 "random": torch.randint(model.n_actions, plan.shape, generator=generator).to(plan.device)}
        if reader.merged is not None:
            plans["random"] = reader.merged[plans["random"]]
        last = frames[:, held - 1:held]
        begin = functools.partial(model.generate, truth[:, :held], actions[:, :held], generator=generator, **how,
                                  **(dict(shown=last) if model.draft else {}))
        written = {name: reader.paint(torch.cat((truth[:, :held], begin(chosen)), 1))[:, held:]
                   for name, chosen in plans.items()}
        if reader.blurs(model):
            expected = []
            begin(plan, watch=lambda logits: expected.append(reader.expected(logits)) or expected[-1])
            written["expected"] = torch.cat(expected, 1)
            lost = last - reader.paint(truth[:, held - 1:held])
            written |= {f"{name}_residual": (written[name] + lost).clamp(0, 1) for name in ("psnr", "expected")}
        written["copy"] = last.expand(-1, ahead, -1, -1, -1)
        sums.update(clips=n, pairs=n * (n > 1))
        for (name, seen), t in itertools.product(written.items(), (1, 4, 16)):
            if t <= ahead:
                square = (seen[:, t - 1] - frames[:, held + t - 1]).square()
                error = square.flatten(1).mean(1)
                sums[name, t] += error.sum().item() * (n > 1 or name != "permuted")
                if name == "psnr":
                    sums["exact", t] += (error < 1e-9).sum().item()
                    sums["frame_psnr", t] += frame_psnrs(square)
                    sums["paired", t] += error.sum().item() * (n > 1)
    counts = dict(permuted=sums["pairs"], paired=sums["pairs"])
    counts |= dict(permuted=0, random=0) if model.n_actions == 1 else {}
    means = {key: over(total, counts.get(key[0], sums["clips"])) for key, total in sums.items()
             if isinstance(key, tuple)}
    numbers = {f"{name}_{t}": mean if name in ("exact", "frame_psnr") else psnr(mean)
               for (name, t), mean in means.items() if name != "paired"}
    if ("psnr", 4) in means:
        numbers |= dict(dpsnr_4=numbers["psnr_4"] - numbers["random_4"],
                        dpsnr_permuted_4=psnr(means["paired", 4]) - numbers["permuted_4"])
    return numbers


# --- Words ---

@torch.no_grad()
def evaluate_text(model, reader, clips):
    """loss: nats per character of held-out captions; perplexity: exp of it; valid: share of 64 texts that it writes
    itself which describe a possible picture, different: how many of those differ."""
    losses = n = 0
    for index in reader.spread(1, clips).split(64):
        text = reader.captions(index)
        count = (text != 0).sum().item() + len(text)
        losses += model.nats(text).item() * count
        n += count
    written = model.write(64, generator=torch.Generator().manual_seed(0))
    valid = [text for text in written if reader.is_caption(text)]
    return dict(loss=losses / n, perplexity=math.exp(losses / n), valid=len(valid) / 64, different=len(set(valid)),
                score=-losses / n)


@torch.no_grad()
def evaluate_frame(model, reader, clips, steps):
    """tokens, frame: share of tokens and of whole frames that are right, all named in one pass; drawn: of whole frames
    filled in by MaskGIT in so many steps; loss in nats per token; floor: tokens right by the commonest token."""
    sums, every = Counter(), []
    for index in reader.spread(1, clips).split(64):
        truth, text = reader.tokens(index, 1)[:, 0], reader.captions(index)
        logits = model(torch.full_like(truth, model.codebook_size), model.read(text))
        right = logits.argmax(-1) == truth
        drawn = model.draw(text, steps=steps, temperature=0.0) == truth
        sums.update(frames=len(truth), n=truth.numel(), right=right.sum().item(), whole=right.all(1).sum().item(),
                    loss=F.cross_entropy(logits.flatten(0, 1), truth.flatten(), reduction="sum").item(),
                    drawn=drawn.all(1).sum().item())
        every.append(truth.flatten().cpu())
    n, frames = sums["n"], sums["frames"]
    return dict(loss=sums["loss"] / n, tokens=sums["right"] / n, frame=sums["whole"] / frames,
                drawn=sums["drawn"] / frames, score=-sums["loss"] / n,
                floor=torch.cat(every).bincount().max().item() / n)
