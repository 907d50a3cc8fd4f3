"""Recordings of a world as arrays: video files, GIFs, folders of them or of pictures, and .npz files.

An episode is a file, or a folder of pictures in the order of their names (frame 2 before frame 10); a folder of files
or of folders holds several. Actions lie beside: NAME.txt of NAME.mp4, actions.txt in a folder of pictures, a number a
line, one for each frame. Frames are read one by one and averaged down at once, so that a film of hours needs the
memory of its small frames only.
"""
import functools
import math
import re
import zipfile
import zlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from data import files
from nanolab.run import fits
from nanolab.settings import UserError

FILMS = (".mp4", ".m4v", ".mov", ".mkv", ".webm", ".avi")
PICTURES = (".png", ".jpg", ".jpeg", ".bmp", ".webp")


@dataclass
class Recording:
    """frames (N, H, W, 3) uint8; actions (N,) whole numbers from 0 or floats, entry k done at frame k, or None; starts:
    the first frame of each episode, from 0 on."""
    frames: np.ndarray
    actions: np.ndarray | None
    starts: list


def known(name):
    """Whether the name is a recording's."""
    return Path(name).suffix.lower() in (".npz", ".gif", *FILMS) or Path(name).expanduser().is_dir()


def read(path, size=64, fps=None, lag=0):
    """The Recording at a path. size: pixels of a side of frames that are no .npz file's; fps: so many frames a second
    of films and GIFs, at most; None: all. lag: the action of a frame is the one done so many frames before, in an
    episode's first ones its first. UserError: not there, damaged, frames of several sizes, other actions than frames.
    """
    path = Path(path).expanduser()
    if path.suffix.lower() == ".npz":
        frames, actions, episode = _checked(path, _unpack(path))
        starts = [0] if episode is None else [0, *(np.flatnonzero(np.diff(episode)) + 1).tolist()]
    else:
        parts = [_episode(part, size, fps) for part in _episodes(path)]
        if len({actions is None for _, actions in parts}) > 1:
            raise UserError(f"{path}: some episodes have actions beside them and some have none")
        frames = np.concatenate([frames for frames, _ in parts])
        actions = None if parts[0][1] is None else np.concatenate([actions for _, actions in parts])
        starts = np.cumsum([0] + [len(frames) for frames, _ in parts[:-1]]).tolist()
        if actions is not None:
            actions = _check_actions(path, "actions", actions, len(frames))
    if lag and actions is not None and len(actions):
        first = np.repeat(starts, np.diff([*starts, len(frames)]))
        actions = actions[np.maximum(np.arange(len(frames)) - lag, first)]
    return Recording(frames, actions, starts)


# --- Films and pictures ---

def _in_order(folder, kinds):
    """The files of these kinds in a folder (None: its folders), by name, numbers as numbers."""
    found = [path for path in folder.iterdir() if (path.is_dir() if kinds is None else path.suffix.lower() in kinds)]
    return sorted(found, key=lambda path: [(word.isdecimal(), int(word) if word.isdecimal() else 0, word)
                                           for word in re.split(r"(\d+)", path.name)])


def _episodes(path):
    """The files, or folders of pictures, that are the episodes of what lies at a path."""
    if not path.exists():
        raise UserError(f"{path}: no such file or folder")
    if not path.is_dir() or _in_order(path, PICTURES):
        return [path]
    found = _in_order(path, (".gif", *FILMS)) or [one for one in _in_order(path, None) if _in_order(one, PICTURES)]
    if not found:
        raise UserError(f"{path} holds no pictures ({', '.join(PICTURES)}), no films ({', '.join(FILMS)}, .gif) and no "
                        "folders of pictures")
    return found


def _episode(path, size, fps):
    """(frames (N, size, size, 3), actions (N,) or None) of one file or folder of pictures."""
    beside = path / "actions.txt" if path.is_dir() else path.with_suffix(".txt")
    if fps and path.is_dir():
        raise UserError(f"{path}: fps is for films and GIFs: a folder of pictures has no clock")
    frames, kept, shape, n = [], [], None, 0
    for n, (seconds, picture) in enumerate(_pictures(path), 1):
        shape = shape or picture.shape
        if picture.shape != shape:
            raise UserError(f"{path}: frame {n} is of {picture.shape[0]} x {picture.shape[1]} pixels, those before of "
                            f"{shape[0]} x {shape[1]}")
        if not fps or seconds >= len(kept) / fps - 1e-6:
            frames.append(shrink(picture, size, size))
            kept.append(n - 1)
            if len(kept) % 1024 == 1:
                fits(2 * len(kept) * size * size * 3, f"{path} (take a smaller fps): its first {len(kept):,} frames")
    if not frames:
        raise UserError(f"{path} has no frame")
    if not beside.is_file():
        return np.stack(frames), None
    try:
        actions = np.loadtxt(beside, ndmin=1)
    except (ValueError, OSError) as error:
        raise UserError(f"{beside} is no list of numbers, one a line: {error}") from error
    actions = _check_actions(beside, "actions", actions, n)[kept]
    whole = (actions == actions.round()).all() and 0 <= actions.min() <= actions.max() < 256
    return np.stack(frames), actions.astype(np.int64) if whole else actions


def _pictures(path):
    """(seconds from the start, or None; a picture (H, W, 3) uint8), one after another."""
    if path.is_dir():
        for one in _in_order(path, PICTURES):
            yield from ((None, picture) for _, picture in _still(one))
    elif path.suffix.lower() in FILMS:
        yield from _film(path)
    else:
        yield from _still(path)


def _still(path):
    """The pictures of a file that Pillow reads, grey and transparent ones in RGB; of a GIF all, with their seconds."""
    from PIL import Image, ImageSequence
    seconds = 0.0
    try:
        with Image.open(path) as image:
            for picture in ImageSequence.Iterator(image) if path.suffix.lower() == ".gif" else [image]:
                yield seconds, np.asarray(picture.convert("RGB"))
                seconds += picture.info.get("duration", 0) / 1000 or 0.1         # browsers' for those that say none
    except (OSError, ValueError, SyntaxError, EOFError, Image.DecompressionBombError) as error:
        raise UserError(f"{path} is no picture that can be read: {str(error) or type(error).__name__}") from error


def _film(path):
    """The frames of a video file, by PyAV."""
    try:
        import av
    except ImportError as error:
        raise UserError(f"{path}: video files need PyAV: pip install av") from error
    try:
        with av.open(str(path)) as film:
            if not film.streams.video:
                raise UserError(f"{path} has no video in it")
            rate = float(film.streams.video[0].average_rate or 25)
            for n, frame in enumerate(film.decode(video=0)):
                yield n / rate if frame.time is None else frame.time, frame.to_ndarray(format="rgb24")
    except av.FFmpegError as error:
        raise UserError(f"{path} is no video that can be read: {error}") from error


@functools.lru_cache
def _shares(size, to):
    """For `size` pixels averaged to `to`: which pixels each result is made of, and their whole-number weights, which
    add up to size; both (K, to), K the most pixels of one result."""
    results = np.arange(to)
    places = results * size // to + np.arange(math.ceil(size / to) + 1)[:, None]
    overlap = np.minimum((results + 1) * size, (places + 1) * to) - np.maximum(results * size, places * to)
    return places.clip(0, size - 1), np.where(places < size, overlap, 0).clip(0).astype(np.int32)


def shrink(screen, height=64, width=64):
    """A screen (H, W, 3) uint8 averaged by area, exactly: (height, width, 3) uint8. No matrix product, whose threads
    would cost more than they bring."""
    area = screen.shape[0] * screen.shape[1]
    rows = sum(screen[place] * weight[:, None, None] for place, weight in zip(*_shares(screen.shape[0], height)))
    total = sum(rows[:, place] * weight[:, None] for place, weight in zip(*_shares(screen.shape[1], width)))
    return ((total + area // 2) // area).astype(np.uint8)


# --- .npz files ---

def _unpack(path):
    """(name, array) of what is needed from an .npz file, which may unpack to no more than data/files.py says."""
    if not path.is_file():
        raise UserError(f"{path}: no such file")
    try:
        with zipfile.ZipFile(path):  # numpy would take a single array or a pickle for something else
            pass
        with np.load(path, allow_pickle=False) as file:
            names = [name for name in ("frames", "actions", "angle", "episode") if name in file.files]
            size, most = sum(file.zip.getinfo(f"{name}.npy").file_size for name in names), files.most_unpacked(path)
            if size > most:
                raise UserError(f"{path} unpacks to {size:,} bytes: more than {most:,} are refused")
            return {name: file[name] for name in names}
    except (zipfile.BadZipFile, zlib.error, EOFError, ValueError, OSError, LookupError, MemoryError,
            NotImplementedError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(f"{path} is no .npz file of plain arrays, or is damaged: {reason}") from error


def _checked(path, arrays):
    """(frames, actions or None, episodes (N,) or None) of an .npz file, checked."""
    if "frames" not in arrays:
        raise UserError(f"{path} has no array named frames")
    frames = arrays["frames"]
    if frames.dtype != np.uint8:
        raise UserError(f"{path}: frames are {frames.dtype}, they must be uint8")
    if frames.ndim != 4 or frames.shape[3] != 3:
        raise UserError(f"{path}: frames are of shape {frames.shape}, it must be (N, H, W, 3)")
    if 0 in frames.shape[1:]:
        raise UserError(f"{path}: frames are of shape {frames.shape}, height and width must be at least 1")
    episode = arrays.get("episode")
    if episode is not None and (episode.shape != (len(frames),) or episode.dtype.kind not in "iu"):
        raise UserError(f"{path}: episode is {episode.dtype} of shape {episode.shape}, it must be whole numbers, (N,)")
    name = next((name for name in ("actions", "angle") if name in arrays), None)
    return frames, None if name is None else _check_actions(path, name, arrays[name], len(frames)), episode


def _check_actions(path, name, actions, n):
    """The actions of n frames, or UserError."""
    if actions.ndim != 1:
        raise UserError(f"{path}: {name} are of shape {actions.shape}, it must be (N,)")
    if len(actions) != n:
        raise UserError(f"{path}: there are {n:,} frames and {len(actions):,} {name}, they must be as many")
    if actions.dtype.kind not in ("fiu" if name == "actions" else "f"):
        raise UserError(f"{path}: {name} are {actions.dtype}, they must be "
                        f"{'whole numbers or ' if name == 'actions' else ''}floats")
    if actions.dtype.kind == "f" and not np.isfinite(actions).all():
        raise UserError(f"{path}: {name} are not all finite: entry {np.flatnonzero(~np.isfinite(actions))[0]} is "
                        f"{actions[~np.isfinite(actions)][0]}")
    if actions.dtype.kind != "f" and len(actions) and not 0 <= actions.min() <= actions.max() < 256:
        raise UserError(f"{path}: {name} go from {actions.min()} to {actions.max()}, they must be from 0 to 255")
    return actions


# --- What can be seen in it ---

def shifts(frames, largest=6):
    """frames (N, H, W, 3) uint8 -> (N - 1, 4) float: by how many pixels the upper and the lower half moved from each to
    the next, sideways and up or down: the shift by which their grey values differ least, of those up to `largest`."""
    grey = frames.astype(np.float32).mean(-1)
    H, W = grey.shape[1:]
    most, found = max(1, min(largest, H // 8, W // 4)), []
    for rows in (slice(0, H // 2), slice(H // 2, H)):
        for axis in (2, 1):
            half = np.moveaxis(grey[:, rows], axis, 1)
            n = half.shape[1]
            errors = [abs(half[1:, most:n - most] - half[:-1, most + d:n - most + d]).mean((1, 2))
                      for d in range(-most, most + 1)]
            found.append(np.argmin(errors, 0) - most)
    return np.stack(found, 1).astype(np.float64)


def visible(train, val):
    """How much of the actions a linear map of `shifts` knows, for each frame by which they may lag: [share], of (frames
    (N, H, W, 3), actions (N,) numbers, entry k between frames k and k + 1), fitted on one and scored on the other: R2,
    0 for what knows the mean alone."""
    (x, y), (test, truth) = ((np.pad(shifts(frames), ((0, 0), (0, 1)), constant_values=1), actions[:len(frames) - 1])
                             for frames, actions in (train, val))
    found = []
    for lag in range(min(6, len(truth) - 2)):
        pairs = [(a[lag:], b[:len(b) - lag]) for a, b in ((x, y), (test, truth))]
        (a, b), (c, d) = pairs
        weights = np.linalg.solve(a.T @ a + np.eye(a.shape[1]), a.T @ b)
        spread = ((d - d.mean()) ** 2).sum()
        found.append(1 - ((d - c @ weights) ** 2).sum() / spread if spread else math.nan)
    return found
