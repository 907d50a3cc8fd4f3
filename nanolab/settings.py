"""Settings of a script from its own source, its command line and its presets; command lines of plain functions.

    answer_help(__name__, __file__)                          # at the top: -h, before the seconds of importing torch

    settings = override(globals())                           # in main(): --name value, --preset NAME, -h

Defaults, types, limits and groups are read from the script's own source, and from that of the config
classes that its FURTHER names: a comment may begin with what is allowed, `[>= 1]`, `[layer, rms]`, `[none, > 0.0]`,
`[path]`, and last when it counts, `[>= 2, with mixer strided/fixed]`, `[not with optimizer sgd]`, `[with qk_norm]`.

Or of functions, by their signatures and docstrings:

    def load(dataset, max_bytes=None):
        '''Finds a text.

        dataset: enwik8, or a file
        max_bytes: [>= 1] only the first so many bytes; none: all
        '''

    main = command(serve(load, show))                        # python data/text.py enwik8 --max_bytes 1000 --stats

Imports nothing that takes long.
"""
import os
import signal
import sys
from pathlib import Path


def interrupted(number, frame):
    """Ctrl-C while the imports run; `command` puts Python's own handler back."""
    os.write(2, b"error: interrupted\n")
    os._exit(130)


def surroundings():
    """What a command must not depend on: closed standard streams, their encoding, the picture backend of a notebook."""
    while (descriptor := os.open(os.devnull, os.O_RDWR)) < 3:    # else the next file that is opened gets a closed one's
        pass
    os.close(descriptor)
    sys.stdout, sys.stderr = sys.stdout or open(os.devnull, "w"), sys.stderr or open(os.devnull, "w")
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")
    os.environ["MPLBACKEND"] = "agg"                         # matplotlib's import fails where the named one is missing


ROOT = Path(__file__).resolve().parents[1]
# A command of ours, not a test or a notebook.
_main = getattr(sys.modules["__main__"], "__file__", None)
if _main and Path(_main).resolve().parent in {ROOT / room for room in ("", "data", "nanolab", "models")}:
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, interrupted)
    surroundings()

import argparse
import ast
import contextlib
import difflib
import functools
import inspect
import io
import itertools
import json
import math
import operator
import re
import shutil
import textwrap
import tokenize

LIMITS = {">=": operator.ge, ">": operator.gt, "<=": operator.le, "<": operator.lt}
NOUNS = {bool: "true or false", int: "a whole number", float: "a number", str: "text"}
WHOLE = 2 ** 63                                              # whole numbers are kept in 64 bits, with a sign
SMALLEST, LARGEST = 2.0 ** -126, 2.0 ** 128                  # numbers as float32, without those that lose digits
SWITCH = {"true": True, "yes": True, "1": True, "false": False, "no": False, "0": False}


class UserError(Exception):
    """A person's mistake, said in one line; `command` prints it and exits with status 2."""


@contextlib.contextmanager
def as_user_error(where=""):
    """Within it a ValueError says what a person mistook: UserError, its sentence after `where`."""
    try:
        yield
    except ValueError as error:
        raise UserError(f"{where}{error}") from error


class Settings(dict):
    """Every setting by name. `.explicit`: names set by a flag or the preset; `.flags`: by a flag; `.command`: the words
    as typed; `.script`: the script's path; `.only`: when a setting counts, for `idle`. `.fingerprint`: of the data in
    files, see `check_data`; None where there are none.
    """

    explicit, flags, command, fingerprint, script, _globals, only = frozenset(), (), (), None, None, None, {}

    def put(self, **values):
        """Sets some of them, and the script's globals with them."""
        self.update(values)
        self._globals.update(values)

    def check_data(self, checkpoint, names, fingerprint):
        """Keeps the fingerprint (a text or a number) of the run's data for its checkpoints.

        names: the settings that say which data. UserError where they are those of `checkpoint` (None: a new run) and
        its fingerprint is another: the data changed under the same name.
        """
        self.fingerprint = fingerprint
        same = checkpoint and all(checkpoint["settings"].get(name) == self[name] for name in names)
        if same and checkpoint.get("fingerprint", fingerprint) != fingerprint:
            raise UserError(f"the data of {names[0]} {as_typed(self[names[0]])} changed since the checkpoint: its "
                            f"fingerprint was {checkpoint['fingerprint']}, now it is {fingerprint}; resume with the "
                            "data of the saved run")

    def idle(self, name):
        """Why a setting has no effect beside the others, by its comment: "with mixer full"; "" where it has one."""
        if not self.only.get(name):
            return ""
        unwanted, other, words = self.only[name]
        value = self[other]
        found = not set(words).isdisjoint(re.split("[,:+]", str(value))) if words else value not in (None, 0, "none")
        return self.idle(other) or (f"with {other} {as_typed(value)}" if found == unwanted else "")

    def refuse_idle(self, names, where):
        """UserError where one of the settings `names` was typed, none of which has an effect `where`."""
        if idle := [name for name in names if name in self.explicit]:
            raise UserError(f"--{idle[0]} has no effect {where}: leave it out")


class Common:
    """The settings that all scripts that train have alike."""
    run_name: str = None           # name of the run's directory, out_dir/script/run_name; none: date and time
    out_dir: str = "runs"          # where the runs lie
    tag: str = None                # a word by which `python -m nanolab.runs clean --tag` finds the run
    resume: bool = False           # [path] go on with run_name (none: the newest run); --resume PATH: from that one
    debug: bool = False            # tiny and short, no wandb, no tensorboard
    wandb: str = "disabled"        # [disabled, offline, online]
    tensorboard: bool = False      # curves for TensorBoard in the run's directory
    profile: bool = False          # torch's profiler over three steps: a table, and trace.json in the run's directory
    keep_every: int = None         # [none, >= 1] numbered checkpoints at multiples of so many steps stay for good
    max_seconds: float = None      # [none, > 0.0] of training, resumes included, of each model or stage; schedules too


class _Setting:
    """One `name = default  # [what is allowed] comment` of a script."""

    def __init__(self, name, default, comment, group=""):
        self.name, self.default, self.comment, self.group = name, default, comment, group
        bracket = re.match(r"\[(.*?)\]", comment)
        items = [item.strip() for item in bracket[1].split(",")] if bracket else []
        last = re.fullmatch(r"(not )?with (\w+) ?(.*)", items[-1] if items else "")
        self.only = (bool(last[1]), last[2], last[3].split("/") if last[3] else []) if last else None
        items = items[:-1] if last else items
        self.bounds = [re.match(r"([<>]=?)\s*(.*)", item).groups() for item in items if item[:1] in ("<", ">")]
        kinds = {type(value) for value in (default if isinstance(default, tuple) else (default,))}
        self.kind = float if kinds == {int, float} else kinds.pop()
        if default is None:
            self.kind = float if any("." in bound for _, bound in self.bounds) else int if self.bounds else str
        # 'none' is a word like any other among the choices of a text, and stands for None everywhere else.
        self.none = default is None or ("none" in items and self.kind is not str)
        self.path = "path" in items                          # --resume alone, or --resume PATH
        self.words = [item for item in items if item[:1] not in ("<", ">") and item != "path"
                      and not (self.none and item == "none")]
        self.default = self.read(default)

    def wants(self, noun=True):
        """What would be right, as the end of an error message."""
        also = self.words + ["a path"] * self.path + ["none"] * self.none
        if self.kind is str and self.words:
            return "must be one of " + ", ".join(also)
        limits = " and ".join(f"{sign} {bound}" for sign, bound in self.bounds)
        if noun:
            limits = f"{NOUNS[self.kind]} {limits}"
        if isinstance(self.default, tuple):
            limits = f"{len(self.default)} values with commas between them, each {limits}"
        return "must be " + ", or ".join([limits.strip(), *also])

    def read(self, value, typed=False):
        """`value` as this setting holds it; typed: a word of the command line. ValueError: what would be right."""
        if not isinstance(self.default, tuple):
            return self.read_one(value, typed)
        parts = value.strip("()").split(",") if typed else value
        if not isinstance(parts, (tuple, list)) or len(parts) != len(self.default):
            raise ValueError(self.wants())
        return tuple(self.read_one(part, typed) for part in parts)

    def read_one(self, value, typed):
        if self.none and (value is None or typed and value.lower() == "none"):
            return None
        if typed and self.kind is bool and value.lower() in SWITCH and not (self.path and value in "01"):
            return SWITCH[value.lower()]
        if isinstance(value, str) and (self.path or value in self.words):
            return value
        if typed and self.kind in (int, float) or self.kind is float and type(value) is int:
            try:
                value = self.kind(value)
            except (ValueError, OverflowError):
                raise ValueError(self.wants()) from None
        endless = type(value) is float and not math.isfinite(value)
        if type(value) is not self.kind or endless or (self.kind is str and self.words):
            raise ValueError(self.wants() + (_nearest(value, self.words) if isinstance(value, str) else ""))
        if not all(LIMITS[sign](value, float(bound)) for sign, bound in self.bounds):
            raise ValueError(self.wants(noun=False))
        if self.kind is int and not -WHOLE <= value < WHOLE:
            raise ValueError(f"{self.wants()}; whole numbers have 64 bits here")
        if self.kind is float and value and not SMALLEST <= abs(value) < LARGEST:
            raise ValueError(f"{self.wants()}; numbers are 0 or from 1.2e-38 to 3.4e38 in size, as float32 holds them")
        return value


def _nearest(word, names, prefix=""):
    found = difflib.get_close_matches(word, list(names), 1)
    return f"; did you mean {prefix}{found[0]}?" if found else ""


def _source(path):
    with tokenize.open(path) as file:
        return file.read()


def _comments(source, first=1):
    """{line: its comment} of a source whose first line is of this number."""
    found, line = {}, None
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT:
            row, column = token.start
            if line and column > 20 and not token.line[:column].strip():     # the comment of the line above goes on
                found[line] += " " + token.string.lstrip("# ")
            else:
                line = row + first - 1
                found[line] = token.string.lstrip("# ")
    return found


def _read_settings(path):
    """The settings of a script in the order of its source: {name: _Setting}. Nothing is run.

    Settings are the literals before `presets` and before the first function or class; CAPITALS and _names are not; and
    with FURTHER = {"the model": "model.py:Config but a b"} the commented fields of that class, but a and b.
    """
    source = _source(path)
    comments, found, further, group = _comments(source), {}, {}, "Settings"
    titles = {line: title[1] for line, comment in comments.items() if (title := re.fullmatch("-+ (.*?) -+ *", comment))}
    for node in ast.parse(source).body:
        name = ast.unparse(node.targets[0]) if isinstance(node, ast.Assign) and len(node.targets) == 1 else ""
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)) or name == "presets":
            break
        if name == "FURTHER":
            further = ast.literal_eval(node.value)
        if not name.isidentifier() or name.startswith("_") or name.isupper():
            continue
        try:
            default = ast.literal_eval(node.value)
        except (ValueError, TypeError):
            continue                                         # computed, so no setting
        if isinstance(default, (bool, int, float, str, tuple, type(None))) and default != ():
            group = next((titles[line] for line in range(node.lineno, 0, -1) if line in titles), group)
            found[name] = _Setting(name, default, comments.get(node.end_lineno, ""), group)
    for group, place in further.items():
        file, kind, *left_out = re.split(r":| but | ", place)
        new = {name: _Setting(name, default, comment, f"Further, of {group}")
               for name, default, comment in _read_fields(Path(path).parent / file, kind)
               if name not in found and name not in left_out}
        first = {name: spec for name, spec in found.items() if spec.group == "Run"} if group == "the run" else found
        found = first | new | found                          # a run's own beside those that the script shows
    return found


@functools.cache
def _read_fields(path, kind):
    """[(name, default, comment)] of the commented fields of the config class `kind` in a file."""
    source = _source(path)
    node = next(node for node in ast.parse(source).body if isinstance(node, ast.ClassDef) and node.name == kind)
    comments = _comments(textwrap.dedent("\n".join(source.splitlines()[node.lineno:node.end_lineno])), node.lineno + 1)
    return [(field.target.id, ast.literal_eval(field.value), comments[field.end_lineno]) for field in node.body
            if isinstance(field, ast.AnnAssign) and field.value and field.end_lineno in comments]


@functools.cache
def _fields_of(kind):
    """{name: _Setting} of a config class."""
    return {name: _Setting(name, default, comment)
            for name, default, comment in _read_fields(Path(inspect.getsourcefile(kind)), kind.__name__)}


def check_fields(config):
    """ValueError, one sentence, where a field of a config has a value that the comment beside it does not allow."""
    for name, spec in _fields_of(type(config)).items():
        try:
            spec.read(getattr(config, name))
        except ValueError as error:
            raise ValueError(f"{name} is {getattr(config, name)!r}, but {error}") from None


def override(g, argv=None, positional=None):
    """Sets the globals `g` of a script from the command line, and returns all its settings.

    `g["presets"]` maps names to sets of settings, `g["aliases"]` other names of settings to their own.
    argv: the words after the script's name (None: this process's). positional: the setting that one bare word sets.
    Returns Settings. Raises UserError for a person's mistake, ValueError for a mistake in the script; exits for -h.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    specs, presets, typed, rest = _read_settings(g["__file__"]), g.get("presets", {}), {}, list(argv)
    aliases = g.get("aliases", {})
    if {"-h", "--help"} & set(argv):
        _answer(_help(g, specs, presets, positional))
    for preset, name, value in [(p, name, value) for p, values in presets.items() for name, value in values.items()]:
        try:
            specs[name].read(value)
        except (KeyError, ValueError) as error:
            raise ValueError(f"preset {preset}: {name} = {value!r}: {error}") from None
    while rest:
        word = rest.pop(0)
        name, equals, value = word.removeprefix("--").partition("=")
        name = name.replace("-", "_")
        name = aliases.get(name, name)
        if positional and positional not in typed and not word.startswith("-"):
            name, equals, value = positional, "=", word
        elif not word.startswith("--") or not name:
            hint = f"; did you mean --preset {word}?" if word in presets else _nearest(word.strip("-"), specs, "--")
            raise UserError(f"unexpected word {shown(word)!r}{hint or ': settings are written --name value'}")
        off = name.removeprefix("no_")
        if name not in specs and off in specs:
            if specs[off].kind is not bool or equals:
                raise UserError(f"{word}: --no-name is for settings that are true or false, and takes no value")
            name, equals, value = off, "=", "false"
        if name not in specs:
            near = _nearest(name, [*specs, *aliases], "--")
            raise UserError(f"unknown setting --{shown(name)}{near or '; -h lists them all'}")
        spec, coming = specs[name], rest[0] if rest and not rest[0].startswith("--") else None
        alone = spec.kind is bool and not (coming and (spec.path or coming.lower() in {*SWITCH, *spec.words}))
        if not equals and coming is None and not alone:
            raise UserError(f"--{name}: a value is missing; it {spec.wants()}")
        if not equals:
            value = "true" if alone else rest.pop(0)
        with as_user_error(f"--{name} {shown(value)}: "):
            typed[name] = spec.read(value, typed=True)
    flags, chosen = tuple(typed), typed.get("preset")
    if chosen is not None and chosen not in presets:
        raise UserError(f"--preset {shown(chosen)}: must be one of {', '.join(presets)}{_nearest(chosen, presets)}")
    typed = {name: specs[name].read(value) for name, value in presets.get(chosen, {}).items()} | typed
    settings = Settings({name: typed.get(name, spec.default) for name, spec in specs.items()})
    settings.explicit, settings.command, settings.script, settings._globals = frozenset(typed), argv, g["__file__"], g
    settings.flags, settings.only = flags, {name: spec.only for name, spec in specs.items()}
    g.update(settings)
    return settings


def begin(g, argv=None):
    """`override` for a script that trains: with --debug also what g["debug_settings"] says and no flag does."""
    settings = override(g, argv)
    if settings["debug"]:
        settings.put(**{name: value for name, value in g["debug_settings"].items() if name not in settings.explicit})
    return settings


def answer_help(name, path, positional=None):
    """At the top of a script, with its __name__ and __file__: prints the text of -h and exits, if that was asked for.

    Reads presets and aliases, or the signatures of the functions that `serve` is given, from the source without running
    it. Where presets are computed it does nothing: `override` will answer. positional: as for `override`.
    """
    if name == "__main__" and {"-h", "--help"} & set(sys.argv[1:]):
        _answer_help(path, positional)


def _answer_help(path, positional):
    tree, g = _read_tables(path)
    main = [node for node in tree.body if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "main"]
    if main:
        used = {node.id for node in ast.walk(main[0]) if isinstance(node, ast.Name)}
        functions = [node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name in used]
        for function in functions:
            function.body = function.body[:1]                # the docstring
        g |= {"serve": serve, "command": lambda main: main}
        exec(compile(ast.Module([*functions, *main], []), path, "exec"), g)
        with contextlib.suppress(UserError):                 # which the command itself will say
            g["main"]()
    elif g:
        _answer(_help(g, _read_settings(path), g.get("presets", {}), positional))


def _read_tables(path):
    """(the tree of a script's source, its {"presets", "aliases", "__doc__", "__file__"}, as far as it has them); the
    script is not run. {} where presets or aliases are computed."""
    tree = ast.parse(_source(path))
    g = {"__doc__": ast.get_docstring(tree, clean=False), "__file__": str(path)}
    for node in (node for node in tree.body if isinstance(node, ast.Assign)):
        wanted = ast.unparse(node.targets[0]) in ("presets", "aliases")
        if wanted or isinstance(node.value, ast.Call) and ast.unparse(node.value.func) == "dict":
            try:                                             # a dict(...) may be what presets build upon
                exec(compile(ast.Module([node], []), str(path), "exec"), {"__builtins__": {"dict": dict}}, g)
            except NameError:
                if wanted:
                    return tree, {}
    return tree, g


def _answer(text):
    """Prints what -h says, and exits; who has closed our standard output (`| head`) has seen enough."""
    try:
        print(text, flush=True)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)         # else the flush at exit would meet it again
    sys.exit(0)


def columns():
    """The width of what is printed: the terminal's, but no less than 80 and no more than 120 columns."""
    return min(120, max(80, shutil.get_terminal_size().columns))


def _help(g, specs, presets, positional):
    """The text of -h, `columns` wide."""
    width = columns()

    def entry(left, right, column):
        column = min(column, width // 2)                     # what stands on the right has half of the width at least
        if len(left) >= column:
            indent = " " * (len(left) - len(left.lstrip()) + 4)
            lines = textwrap.wrap(left, width, subsequent_indent=indent, break_on_hyphens=False) or [left]
            return lines + (entry("", right, column) if right else [])
        return textwrap.wrap(right, width, initial_indent=left.ljust(column), subsequent_indent=" " * column) or [left]

    out = []
    for paragraph in (g.get("__doc__") or "").strip().split("\n\n"):
        if paragraph.startswith(" "):                        # commands, with comments beside them
            rows = [re.split(r" +(?=# )", line + " # ", maxsplit=1) for line in paragraph.split("\n")]
            for left, right in rows:
                out += entry(left, right.removesuffix(" # ").removesuffix("# "), max(len(row[0]) for row in rows) + 2)
        else:
            out += textwrap.wrap(paragraph, width)
        out.append("")
    word = f" [{positional}]" if positional else ""
    out += [f"usage: python {Path(g['__file__']).name}{word} [--name value] [--switch] [--no-switch]", ""]
    if presets:
        out.append("Presets: --preset NAME; flags win over it")
        for name, values in presets.items():
            out += entry(f"  {name}", ", ".join(f"{key}={as_typed(value)}" for key, value in values.items()), 20)
        out.append("")
    further = sorted(specs.values(), key=lambda spec: spec.group.startswith("Further"))
    for group, members in itertools.groupby(further, lambda spec: spec.group):
        out += textwrap.wrap(group, width)
        for spec in members:
            also = "".join(f"; also --{alias}" for alias, name in g.get("aliases", {}).items() if name == spec.name)
            out += entry(f"  --{spec.name} {as_typed(spec.default)}", spec.comment + also, 34)
        out.append("")
    return "\n".join(out).rstrip()


def as_typed(value):
    """A value as one would type it."""
    if isinstance(value, (tuple, list)):
        return ",".join(map(as_typed, value))
    if value is None or isinstance(value, bool):
        return str(value).lower()
    return str(value) if str(value).isprintable() and value != "" else json.dumps(value)


def shown(value):
    """What was typed, for an error message: on one line, and not longer than one."""
    text = "".join(letter if letter.isprintable() else " " for letter in str(value))
    return text if len(text) <= 80 else f"{text[:60]}... ({len(text):,} characters)"


def as_bytes(text):
    """The bytes of a text in which escapes stand as in Python, `\\n`, `\\0`, `\\xff`; b"" where they are none."""
    try:
        return text.encode().decode("unicode_escape").encode("latin-1")
    except UnicodeError:
        return b""


def unknown(what, given, known, also=()):
    """The UserError of a name that is not among the `known` ones (nor among `also`), with the nearest of all."""
    listed = f": choose {', '.join(known)}" * (len(known) < 20)
    return UserError(f"unknown {what} {shown(given)!r}{listed}{_nearest(str(given), [*known, *also])}")


def check_settings(script, values, specs=None):
    """`values` {name: value}, as a file gives them, in the types of the script's settings. Nothing is run.

    specs: what `_read_settings` found in the script, for many calls. UserError: a name that the script has not, or a
    value that it does not allow.
    """
    specs, found = specs or _read_settings(script), {}
    for name, value in values.items():
        if name not in specs:
            raise UserError(f"{Path(script).name} has no setting {name!r}{_nearest(str(name), specs)}")
        with as_user_error(f"{name} {shown(as_typed(value))}: "):
            found[name] = specs[name].read(as_typed(value), typed=True)
    return found


def adopt(settings, saved, architecture=(), of_this_command=()):
    """Makes `settings`, and the script's globals, those of a resumed run: `saved`, except what was typed.

    architecture: names that always come from the checkpoint; a flag that says otherwise is overruled in one line.
    of_this_command: names that stay as they are, beside resume, out_dir, run_name, dp and tp. What the checkpoint does
    not know keeps the script's value. UserError: the checkpoint holds a value that the script does not allow.
    """
    specs, adopted, moved, overruled = _read_settings(settings.script), {}, [], []
    kept = {"resume", "out_dir", "run_name", "dp", "tp", *of_this_command}
    for name in [name for name in settings if name in saved and name not in kept]:
        with as_user_error(f"the checkpoint's {name} {saved[name]!r} is not allowed here: "):
            old, new = specs[name].read(saved[name]), settings[name]
        if old == new or name in settings.explicit and name not in architecture:
            continue
        adopted[name] = old
        if name in settings.explicit:
            overruled.append(f"{name} {as_typed(old)} comes from the checkpoint: --{name} {as_typed(new)} is overruled")
        else:
            moved.append(f"{name} {as_typed(old)} (not {as_typed(new)})")
    if overruled:
        print("; ".join(overruled))
    if moved:
        print("from the checkpoint:", ", ".join(moved))
    settings.put(**adopted)


# --- Command lines of plain functions ---

class Parser(argparse.ArgumentParser):
    """argparse, but what is typed wrongly is a UserError, and -h is `columns` wide."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs, formatter_class=lambda prog: argparse.HelpFormatter(prog, width=columns()))

    def error(self, message):
        raise UserError(message)

    def print_help(self, file=None):
        """Prints what -h says, and exits."""
        _answer(self.format_help().rstrip())


def serve(*steps, defaults=None, **commands):
    """A main(argv=None) of plain functions, whose signatures and docstrings say its options, types, bounds and help.

    The first step is called with the options that its arguments name, each next one with what the one before returned
    and with its own options; an option of the same name is said to all. A line that goes on is indented; an argument
    without a line is no option; a first one that is a text is a bare word, and so are others of the first step that are
    texts without a default; one without a default must be typed.
    defaults: {argument: value} in place of the functions' own. commands: {word: steps} of which the first word typed
    chooses one, in place of `steps`. main raises UserError for what is typed wrongly; main.read(words), which calls no
    step, too.
    """
    def main(argv=None):
        chain, typed = main.read(sys.argv[1:] if argv is None else argv)
        found = []                                               # what the step before returned
        for step in chain:
            options = list(inspect.signature(step).parameters)[len(found):]
            found = [step(*found, **{name: typed[name] for name in options if name in typed})]
    main.read = functools.partial(_read_words, steps, defaults or {}, commands)
    return main


def _read_words(steps, defaults, commands, words):
    """(the steps, {option: value}) that the words ask for."""
    g = (steps or next(iter(commands.values())))[0].__globals__
    path = Path(g["__file__"])
    parser = Parser(prog=f"{path.parent.name}/{path.name}", description=g["__doc__"].splitlines()[0])
    if commands:
        parts = parser.add_subparsers(dest="command", required=True, metavar="|".join(commands), parser_class=Parser)
        for word, chain in commands.items():
            said = inspect.getdoc(chain[0]).splitlines()[0]
            _add_options(parts.add_parser(word, help=said, description=said), chain, {})
    else:
        _add_options(parser, steps, defaults)
    words = [re.sub("^(--(?:no-)?)([^=]+)", lambda option: option[1] + option[2].replace("-", "_"), word)
             for word in words]                                  # --max-bytes is --max_bytes
    typed = vars(parser.parse_args(words))
    return steps or commands[typed["command"]], typed


def _add_options(parser, steps, defaults):
    """Adds the options of all steps to an argparse parser, each once."""
    known = set()
    for number, step in enumerate(steps):
        lines = re.findall(r"^(\w+): (.+(?:\n .+)*)", inspect.getdoc(step) or "", re.MULTILINE)
        said = {name: " ".join(text.split()) for name, text in lines}
        for place, option in enumerate(list(inspect.signature(step).parameters.values())[number > 0:]):
            name, default = option.name, defaults.get(option.name, option.default)
            if name in known or name not in said:
                continue
            known.add(name)
            needed = default is option.empty
            setting = _Setting(name, "" if needed else default, said[name])
            how = dict(default=None if needed else default, help=said[name].replace("%", "%%"))
            if setting.kind is bool:
                parser.add_argument(f"--{name}", action=argparse.BooleanOptionalAction, **how)
            elif number == 0 and (place == 0 or needed) and setting.kind is str and option.kind != option.KEYWORD_ONLY:
                parser.add_argument(name, nargs=None if needed else "?", type=_reader(setting), **how)
            else:
                parser.add_argument(f"--{name}", required=needed, type=_reader(setting), **how)


def _reader(setting):
    """What argparse reads a word with."""
    def read(text):
        try:
            return setting.read(text, typed=True)
        except ValueError as error:
            raise argparse.ArgumentTypeError(f"{shown(text)!r} {error}") from None
    return read
