"""The curves of a run, from its lines of metrics: their names, the picture, and their mirrors, TensorBoard and wandb.

A mirror takes up what it lacks of a resumed run's lines (`catch_up`), then a line at a time (`log`).
"""
import contextlib
import os
import re
import struct

from nanolab.settings import UserError

PANELS = {"loss": "loss (nats per target)", "bpb": "bits per byte", "accuracy": "accuracy", "exact": "exact match",
          "digit_accuracy": "accuracy of a digit", "perplexity": "perplexity of the codes", "psnr": "PSNR (dB)",
          "information": "I(code; action) / H(action)", "changed": "changed tokens that are right",
          "frame": "whole frames that are right"}


def is_name(name):
    """Whether it can name a folder inside a run's directory."""
    return isinstance(name, str) and re.fullmatch(r"[\w-]{1,100}", name) is not None


def curve_of(entry):
    """The curve of a line of metrics: model, stage, split and whatever else it says in words, as in `val/block`."""
    first = {key: entry[key] for key in ("model", "stage", "split") if key in entry}
    return "/".join(value for value in {**first, **entry}.values() if isinstance(value, str))


def _numbers(entry, curve):
    """{name: what a line of metrics measures}."""
    return {f"{curve}/{key}": value for key, value in entry.items()
            if key != "step" and type(value) in (int, float)}


def draw(lines, file):
    """Draws what PANELS names, as far as it is there, over the steps of a run's lines into an open PNG file."""
    from matplotlib.figure import Figure
    curves, powers, whose = {key: {} for key in PANELS}, {}, {}
    for entry in lines:
        for name, value in entry.items():
            key, _, power = name.rpartition("_") if name.startswith("digit_accuracy_") else (name, "", "")
            if key in PANELS and value is not None:
                label = curve_of(entry) + (f" 10^{power}" if power else "")
                curves[key].setdefault(label, []).append((entry["step"], value))
                if power:                                    # a colour for each digit, a line style for each model
                    powers[label] = int(power)
                    whose.setdefault(curve_of(entry), len(whose))
    panels = [key for key in curves if curves[key]] or ["loss"]
    figure = Figure(figsize=(8, 4.5 * len(panels)), layout="constrained", dpi=100)
    for axes, key in zip(figure.subplots(len(panels), squeeze=False)[:, 0], panels):
        for name, points in sorted(curves[key].items()):
            style = dict(linewidth=1) if len(points) > 60 else dict(marker="o", markersize=3.5)
            if name in powers:
                dashes = ("-", "--", ":", "-.")[whose[name.rpartition(" ")[0]] % 4]
                style |= dict(color=f"C{powers[name] % 10}", linestyle=dashes)
            axes.plot(*zip(*points), label=name, **style)
        axes.set(xlabel="step", ylabel=PANELS[key])
        axes.grid(alpha=0.3)
        if curves[key]:
            axes.legend(fontsize="small" if len(curves[key]) > 6 else None)
    figure.savefig(file, format="png")


class TensorBoard:
    """A model's curves in a folder of its own: TensorBoard shows them as a run, and its steps count alone.

    reached: {model: the step where a resumed run goes on}, "" for all others; of a new run {}.
    """

    def __init__(self, directory, reached):
        self.directory, self.reached, self.boards = directory, reached, {}

    def catch_up(self, lines):
        """What was written after the step where the run goes on is hidden, that step itself too: it is said again."""
        for model in [model for model in self.reached if model] or self.reached:
            self._open(model)
        for entry in lines:
            if entry["step"] == self.reached.get(entry.get("model", ""), self.reached.get("")):
                self.log(entry, 0)

    def log(self, entry, number):
        """A line of metrics."""
        model = entry.get("model", "")
        board = self.boards.get(model) or self._open(model)
        for name, value in _numbers(entry, curve_of({**entry, "model": None})).items():
            board.add_scalar(name, value, entry["step"])

    def _open(self, model):
        if model and not is_name(model):                     # a damaged file must not lead out of the directory
            raise UserError(f"{self.directory / 'metrics.jsonl'} is damaged: {model[:50]!r} is no name of a model")
        from torch.utils.tensorboard import SummaryWriter
        purge = self.reached.get(model, self.reached.get(""))
        self.boards[model] = SummaryWriter(str(self.directory / "tensorboard" / model), purge_step=purge)
        return self.boards[model]

    def flush(self):
        """To the disk."""
        for board in self.boards.values():
            board.flush()

    def close(self, good):
        """At the run's end."""
        for board in self.boards.values():
            board.close()


class Wandb:
    """A run of wandb, by its `mode` under a name, that goes on where the directory's files say which it is."""

    def __init__(self, directory, name, mode, config):
        import wandb
        self.directory, ident = directory, directory / "wandb_id"
        if not (ident.exists() and ident.read_text().isalnum()):     # else of what wandb wrote here under it
            found = [re.search(r"run-\d+_\d+-(\w+)", path.name) for path in directory.glob("wandb/*run-*")]
            ident.write_text(next((match[1] for match in found if match), os.urandom(4).hex()))
        try:
            if mode == "online" and not wandb.login(prompt=False):
                raise UserError("wandb has no API key: type `wandb login` once, or choose --wandb offline")
            self.run = wandb.init(project="nanolab", name=name, id=ident.read_text(), mode=mode, resume="allow",
                                  dir=str(directory), config=config,
                                  settings=wandb.Settings(silent=True, console="off", init_timeout=60))
            self.run.define_metric("*", step_metric="step")  # its own step counts lines: two models may be apart
        except wandb.Error as error:
            raise UserError(f"wandb did not start: {error}; --wandb offline needs no network") from None

    def catch_up(self, lines):
        """What a killed process did not bring there any more."""
        there = wandb_lines(self.directory) if lines else ()
        for number, entry in enumerate(lines, 1):
            if number not in there:
                self.log(entry, number)

    def log(self, entry, number):
        """Line `number` of the metrics; what wandb has, a resumed run only repeats."""
        if number >= self.run.step:
            self.run.log({**_numbers(entry, curve_of(entry)), "step": entry["step"]}, step=number)

    def flush(self):
        """Its own process does."""

    def close(self, good):
        """At the run's end."""
        self.run.finish(0 if good else 1)


def wandb_lines(directory):
    """The numbers of the lines of metrics in the files that wandb keeps in a run's directory: a set.

    Their format is LevelDB's log: blocks of 32,768 bytes, of records (check sum, size, kind) that may be in parts.
    """
    from wandb.proto.wandb_internal_pb2 import Record
    found = set()
    for path in directory.glob("wandb/*run-*/*.wandb"):
        data, at, record = path.read_bytes(), 7, b""         # after the file's own header
        with contextlib.suppress(Exception):                 # what a kill has cut off
            while at + 7 <= len(data):
                left = 32768 - at % 32768
                if left < 7:                                 # no record begins in the rest of a block
                    at += left
                    continue
                size, kind = struct.unpack_from("<HB", data, at + 4)
                record, at = record + data[at + 7:at + 7 + size], at + 7 + size
                if kind in (1, 4):                           # whole, or the last part
                    found.add(Record.FromString(record).history.step.num)    # 0: a record of something else
                    record = b""
    return found
