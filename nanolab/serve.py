"""A command line for plain functions: options, types, bounds and help come from their signatures and docstrings.

    from nanolab.serve import answer_help, serve

    answer_help(__name__, __file__)          # -h, before the seconds that importing torch takes

    def load(dataset, max_bytes=None):
        '''Finds a text.

        dataset: enwik8, or a file
        max_bytes: [>= 1] only the first so many bytes; none: all
        '''

    def show(text, stats=False):
        ...

    main = command(serve(load, show))        # python data/text.py enwik8 --max_bytes 1000 --stats

An option's line is `name: [what is allowed] what it is`, as the comment of a script's setting; a line that goes on is
indented, and an argument without one is no option. A first argument that is a text is a bare word; one without a
default must be typed.
"""
import argparse
import ast
import contextlib
import inspect
import re
import sys
import tokenize
from pathlib import Path

from nanolab.settings import UserError, _answer, _Setting, columns, shown


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
    """A main(argv=None): the first step, a function, is called with the options that its arguments name, each next one
    with what the one before returned and with its own options; an option of the same name is said to all.

    defaults: {argument: value} in place of the functions' own. commands: {word: steps} of which the first word typed
    chooses one, in place of `steps`. main raises UserError for what is typed wrongly; main.read(words), which calls no
    step, too.
    """
    def read(words):
        """(the steps, {option: value}) that the words ask for."""
        g = (steps or next(iter(commands.values())))[0].__globals__
        path = Path(g["__file__"])
        parser = Parser(prog=f"{path.parent.name}/{path.name}", description=g["__doc__"].splitlines()[0])
        if commands:
            parts = parser.add_subparsers(dest="command", required=True, metavar="|".join(commands),
                                          parser_class=Parser)
            for word, chain in commands.items():
                said = inspect.getdoc(chain[0]).splitlines()[0]
                _add_options(parts.add_parser(word, help=said, description=said), chain, {})
        else:
            _add_options(parser, steps, defaults or {})
        typed = vars(parser.parse_args([re.sub("^--(no-)?[^=]+", _underscored, word) for word in words]))
        return steps or commands[typed["command"]], typed

    def main(argv=None):
        chain, typed = read(sys.argv[1:] if argv is None else argv)
        found = []                                               # what the step before returned
        for step in chain:
            options = list(inspect.signature(step).parameters)[len(found):]
            found = [step(*found, **{name: typed[name] for name in options if name in typed})]
    main.read = read
    return main


def _underscored(option):
    """An option as it is called here: --max-bytes is --max_bytes."""
    return f"--{option[1] or ''}{option[0].removeprefix('--').removeprefix('no-').replace('-', '_')}"


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
            setting = _Setting(name, "" if needed else default, said[name], "")
            how = dict(default=None if needed else default, help=said[name].replace("%", "%%"))
            if setting.kind is bool:
                parser.add_argument(f"--{name}", action=argparse.BooleanOptionalAction, **how)
            elif number == place == 0 and setting.kind is str and option.kind is not option.KEYWORD_ONLY:
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


def answer_help(name, path):
    """At the top of a file that ends with `main = command(serve(...))`, with its __name__ and __file__: prints the text
    of -h and exits, if that was asked for. Reads the functions' signatures from the source; none of it is run."""
    if name != "__main__" or not {"-h", "--help"} & set(sys.argv[1:]):
        return
    with tokenize.open(path) as file:
        tree = ast.parse(file.read())
    main = next(node for node in tree.body if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "main")
    used = {node.id for node in ast.walk(main) if isinstance(node, ast.Name)}
    functions = [node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name in used]
    for function in functions:
        function.body = function.body[:1]                        # the docstring
    g = {"__doc__": ast.get_docstring(tree), "__file__": path, "serve": serve, "command": lambda main: main}
    exec(compile(ast.Module([*functions, main], []), path, "exec"), g)
    with contextlib.suppress(UserError):                         # which the command itself will say
        g["main"]()
