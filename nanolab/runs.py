"""The runs that are there.

    python -m nanolab.runs list                             # status, step, best, size and age of every run
    python -m nanolab.runs clean --tag test --older_than 7d # says what it would remove; with --yes it does
"""
import argparse
import contextlib
import os
import re
import shutil
import stat
import time
from pathlib import Path

from nanolab.run import BUSY, as_size, command, is_run, is_running, lock_file, read_json, run_metrics
from nanolab.settings import Parser, UserError

UNITS = {"d": 86400, "h": 3600, "m": 60, "s": 1}  # of an age, in seconds


def find_runs(out_dir):
    """Directories of all runs under out_dir, sorted. No link is followed."""
    found = []
    for place, folders, files in os.walk(out_dir):
        if "lock" in files and is_run(Path(place)):
            found.append(Path(place))
            folders.clear()
    return sorted(found)


def describe_run(directory):
    """What `list` and `clean` say of a run: dict of name, status, step, best, bytes, age (seconds), tag.

    status: that of summary.json, or "running" while a process writes to it and "killed" where none does any more.
    """
    summary, settings = read_json(directory / "summary.json"), read_json(directory / "params.json").get("settings", {})
    files = []                                                   # what lstat says of them
    for place, _, names in os.walk(directory):
        for name in names:
            with contextlib.suppress(OSError):                   # a run that is being written replaces its files
                files.append(os.lstat(os.path.join(place, name)))
    files = [file for file in files if stat.S_ISREG(file.st_mode)]
    written = max((file.st_mtime for file in files), default=time.time())
    status = "running" if is_running(directory) else summary.get("status", "killed")
    if status == "running":                                      # the summary is written when a run ends
        status = "running" if is_running(directory) else "killed"
        summary = {"step": max((entry["step"] for entry in run_metrics(directory)), default=0)}
    best = [f"{name.removeprefix('best_')} {value:.4f}" for name, value in summary.items()
            if name.startswith("best_") and isinstance(value, float)]
    return dict(name=str(directory), status=status, step=summary.get("step", 0), best=", ".join(best),
                bytes=sum(file.st_size for file in files), age=max(0.0, time.time() - written),
                tag=settings.get("tag") or "")


def check_run(directory):
    """UserError: it is a link or no run of ours."""
    if directory.is_symlink() or not is_run(directory):
        raise UserError(f"{directory} is not the directory of a run: it is left alone")


def remove_run(directory):
    """Removes the directory of a run. UserError: it is none of ours, or a process is writing to it."""
    check_run(directory)
    with open(directory / "lock") as lock:
        try:
            lock_file(lock)                                      # held until it is gone: nobody can start to write
        except BUSY:
            raise UserError(f"another process is writing to {directory}: it is left alone") from None
        except OSError:                                          # a network folder that knows no locks
            pass
        try:
            shutil.rmtree(directory)                             # links inside are removed, not followed
        except OSError as error:
            raise UserError(f"{directory} is not wholly removed: {error.strerror}") from None


def _as_age(seconds):
    for unit, length in UNITS.items():
        if seconds >= length > 1:
            return f"{seconds // length:.0f}{unit}"
    return f"{seconds:.0f}s"


def _seconds(text):
    found = re.fullmatch(r"(\d+(?:\.\d+)?)([smhd])", text)
    if not found:
        raise argparse.ArgumentTypeError(f"{text!r} is no age: write 30m, 12h or 7d")
    return float(found[1]) * UNITS[found[2]]


@command
def main(argv=None):
    """The command line."""
    parser = Parser(prog="python -m nanolab.runs", description="the runs that are there")
    parts = parser.add_subparsers(dest="what", required=True, metavar="list|clean", parser_class=Parser)
    for name, words in (("list", "status, step, best, size and age of every run"),
                        ("clean", "say which runs would be removed; with --yes remove them")):
        part = parts.add_parser(name, help=words, description=words)
        part.add_argument("--out_dir", "--out-dir", type=Path, default=Path("runs"), help="where the runs lie")
        part.add_argument("--tag", help="only runs with this tag")
        part.add_argument("--older_than", "--older-than", type=_seconds, default=0.0, metavar="7d",
                          help="only runs that nothing was written to for so long: 30m, 12h, 7d")
    part.add_argument("--yes", action="store_true", help="do remove them")
    part.add_argument("runs", nargs="*", type=Path, help="these directories only")
    args = parser.parse_args(argv)
    chosen = getattr(args, "runs", [])
    if args.what == "clean" and not chosen and args.tag is None and not args.older_than:
        raise UserError("which runs? give --tag, --older_than or directories")
    if not chosen and not args.out_dir.is_dir():
        raise UserError(f"{args.out_dir}: no such directory")
    for directory in chosen:
        check_run(directory)
    found = [describe_run(directory) for directory in chosen or find_runs(args.out_dir)]
    found = [run for run in found if args.tag in (None, run["tag"]) and run["age"] >= args.older_than]
    if args.what == "clean":
        for run in [run for run in found if run["status"] == "running"]:
            print(f"{run['name']} is being written: it is left alone")
            found.remove(run)
    rows = [(run["name"], run["status"], str(run["step"]), run["best"], as_size(run["bytes"]), _as_age(run["age"]),
             run["tag"]) for run in found]
    rows = [("run", "status", "step", "best", "size", "age", "tag"), *rows] if rows else []
    widths = [max(map(len, column)) for column in zip(*rows)]
    for row in rows:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip())
    total = f"{len(found)} runs, {as_size(sum(run['bytes'] for run in found))}"
    if args.what == "list":
        print(total)
    elif not args.yes:
        print(f"{total} would be removed; with --yes they are")
    else:
        removed = 0
        for run in found:
            try:
                remove_run(Path(run["name"]))
                removed += 1
            except UserError as error:                           # it began to be written a moment ago
                print(error)
        print(f"{removed} runs removed")


if __name__ == "__main__":
    main()
