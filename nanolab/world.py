"""Clips of a world as its models read and write them: frames, tokens, actions, captions; pictures of what they make.

Shapes: B clips, T frames, H x W pixels, P colours of a palette, N tokens of a frame. Frames are float32 in 0..1.
"""
import torch
import torch.nn.functional as F

from data.video import AGENT, BALL, caption, paint, read_caption, read_cells
from models.world_words import as_characters


def latent_actions(model, frames):
    """frames (B, T, H, W, 3) -> codes (B, T - 1) of the steps between them; before the first frame stands a copy of it,
    as often as the model's history asks."""
    frames = torch.cat((frames[:, :1].expand(-1, model.history - 1, -1, -1, -1), frames), 1)
    windows = [frames[:, t:t + model.history + 1] for t in range(frames.size(1) - model.history)]
    found = [model.quantiser(model.encode(window)).codes for window in windows]
    return torch.stack(found, 1) if found else torch.empty(len(frames), 0, dtype=torch.int64, device=frames.device)


class Reader:
    """Clips of one side of a data.video.Video, on a device; asked for by index (B,) int64.

    models: {stage: trained model}, which may still grow. kind: tokens are those of the "tokenizer", or the world's own
    "cells". source: actions are the n_codes of the "latent" action model, or the n_actions "true" ones; that no action
    leads to a clip's first frame is said by the number after the last of them.
    """
    movers = {"agent": AGENT, "ball": BALL}

    def __init__(self, clips, palette, device, models=None, kind="tokenizer", source="latent", n_actions=0,
                 n_codes=0):
        self.clips, self.palette, self.device = clips, palette, torch.device(device)
        self.models = {} if models is None else models
        self.kind, self.source, self.n_actions = kind, source, n_actions
        self.no_action = n_codes if source == "latent" else n_actions
        self.colours = None if palette is None else palette.to(device).float() / 255
        self.side = None if clips.stored_cells is None else clips.stored_cells.size(-1)

    def spread(self, T, count):
        """(count,) int64: clips of T frames, evenly over all."""
        n = self.clips.count(T)
        return torch.linspace(0, n - 1, min(count, n), dtype=torch.float64).long()

    def frames(self, index, T):
        """(B, T, H, W, 3)."""
        return self.clips.frames(index, T).to(self.device).float() / 255

    def pictures(self, index, T):
        """(frames, indices (B, T, H, W) int64 of the palette's colours, or None where there is no palette)."""
        if self.palette is None:
            return self.frames(index, T), None
        indices = self.clips.indices(index, T).to(self.device).long()
        return self.colours[indices], indices

    @torch.no_grad()
    def tokens(self, index, T):
        """(B, T, N) int64: frames as the dynamics read them."""
        if self.kind == "cells":
            return self.clips.cells(index, T).to(self.device).long().flatten(2)
        return self.models["tokenizer"].tokens(self.frames(index, T))

    @torch.no_grad()
    def tokens_and_actions(self, index, T):
        """(tokens (B, T, N), actions (B, T) int64, the one that led to each frame)."""
        tokens = self.tokens(index, T)
        actions = self.clips.actions(index, T).to(self.device) if self.source == "true" else latent_actions(
            self.models["actions"], self.frames(index, T))
        return tokens, F.pad(actions, (1, 0), value=self.no_action)

    def captions(self, index):
        """Captions of the clips' first frames, (B, S) int64."""
        return as_characters([caption(cells) for cells in self.clips.cells(index, 1)[:, 0].numpy()]).to(self.device)

    def is_caption(self, text):
        """Whether a text describes a possible picture."""
        return read_caption(text, self.side) is not None

    def as_frames(self, written):
        """What a model wrote (..., P or 3) as RGB: the likeliest colour of the palette, or clipped."""
        return written.float().clamp(0, 1) if self.palette is None else self.colours[written.argmax(-1)]

    def paint(self, tokens, cache=None):
        """Tokens (B, T, N) -> frames (B, T, H, W, 3). A spatio-temporal tokenizer also sees the frames before: they are
        to be in `tokens`, or in a cache of its own."""
        if self.kind == "tokenizer":
            return self.as_frames(self.models["tokenizer"].pixels(tokens, cache))
        cells = tokens.view(*tokens.shape[:2], self.side, self.side).to(torch.uint8).cpu().numpy()
        return torch.from_numpy(paint(cells, self.clips.cell_px)).to(tokens.device).float() / 255

    def cells(self, frames):
        """The cells (..., side, side) uint8 that are seen on frames (..., H, W, 3), on the CPU."""
        return read_cells(as_bytes(frames), self.clips.cell_px)


def as_bytes(frames):
    """Frames in 0..1 as uint8 on the CPU."""
    return (frames * 255).round().byte().cpu()


# --- Pictures, for the eye: {title: frames of a row} ---

def draw_tokenizer(model, reader, T):
    """The last frames of 8 clips of T, and what their tokens say of them."""
    frames = reader.frames(reader.spread(T, 8), T)
    return {"held-out frames": frames[:, -1], "from their tokens": reader.as_frames(model(frames, None)[0])[:, -1]}


def draw_actions(model, reader):
    """Two frames of 8 clips, and what becomes of the first by the code of the second, and by every code."""
    frames = reader.frames(reader.spread(model.history + 1, 8), model.history + 1)
    past, codes = frames[:, :-1], model.quantiser(model.encode(frames)).codes

    def after(codes):
        return reader.as_frames(model.predict(past, model.quantiser.look_up(codes)))
    rows = {"the frame before": past[:, -1], "the frame after": frames[:, -1],
            "written from the code inferred: " + ", ".join(map(str, codes.tolist())): after(codes)}
    return rows | {f"from code {code}": after(torch.full_like(codes, code)) for code in range(model.n_codes)}


def draw_dynamics(model, reader, context, ahead=8, **how):
    """8 frames of three clips, and those generated after the same frames and actions; how: of `generate`."""
    T, held, rows = min(context - 1 + ahead, reader.clips.length), context - 1, {}
    index = reader.spread(T, 8)[::3]
    tokens, actions = reader.tokens_and_actions(index, T)
    made = model.generate(tokens[:, :held], actions[:, :held], actions[:, held:], **how)
    seen = reader.paint(torch.cat((tokens[:, :held], made), 1))[:, held:]
    for i, true in enumerate(reader.frames(index, T)):
        rows[f"held-out clip {i + 1}, frames {held + 1} to {T}"] = true[held:]
        words = ", ".join(map(str, actions[i, held:].tolist()))
        rows[f"generated after frame {held} and these actions: {words}"] = seen[i]
    return rows


def draw_frame(model, reader, steps):
    """8 frames, and those drawn from their captions in so many rounds."""
    index = reader.spread(1, 8)
    drawn = model.draw(reader.captions(index), steps=steps, temperature=0.0)[:, None]
    return {"held-out frames": reader.frames(index, 1)[:, 0], "drawn from their captions": reader.paint(drawn)[:, 0]}
