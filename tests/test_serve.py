"""serve: options from signatures and docstrings, what is typed wrongly, and -h before any long import."""
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
from nanolab.settings import UserError, serve


def load(dataset, max_bytes=None, share=0.5, ball=True, word="a", seed=7):
    """Finds a text.

    dataset: a name, or
        a file
    max_bytes: [>= 1] only the first; none: all
    share: [> 0.0, < 1.0] 50 % is half
    ball: is there one?
    word: [a, b] one of two
    seed: of all
    """
    return dict(dataset=dataset, max_bytes=max_bytes, share=share, ball=ball, word=word, seed=seed)


def show(found, seed, stats=False):
    """Shows it.

    stats: count
    """
    return {**found, "shown": (seed, stats)}


def last(found):
    """A step without options."""
    RETURNED.append(found)


RETURNED = []
main = serve(load, show, last, defaults=dict(seed=3))


def typed(words, main=main):
    main(words.split())
    return RETURNED.pop()


def test_options_reach_the_functions_that_name_them():
    assert typed("x") == dict(dataset="x", max_bytes=None, share=0.5, ball=True, word="a", seed=3, shown=(3, False))
    found = typed("y --max-bytes 12 --share=.25 --no-ball --word b --stats --seed -4")
    assert found == dict(dataset="y", max_bytes=12, share=0.25, ball=False, word="b", seed=-4, shown=(-4, True))
    assert typed("--max_bytes none z")["max_bytes"] is None


def test_commands_and_options_that_must_be_typed():
    def train(*, out, n=3):
        """Trains.

        out: a file
        n: [>= 0] how many
        """
        return out, n

    def look(*, text=None):
        """Looks.

        text: which
        """
        return text
    both = serve(train=(train, last), look=(look, last))
    assert typed("train --out x --n 0", both) == ("x", 0) and typed("look", both) is None
    for words in ("train", "", "lok", "train --out x --n -1", "look --out x"):
        with pytest.raises(UserError):
            both(words.split())


@pytest.mark.parametrize("words, said", [
    ("", "dataset"), ("x --max_bytes 0", "must be >= 1"), ("x --max_bytes few", "must be a whole number >= 1"),
    ("x --share 1", "< 1.0"), ("x --word c", "one of a, b"), ("x --nonsense", "--nonsense"), ("x --stats 3", "3")])
def test_what_is_typed_wrongly_is_said(words, said):
    with pytest.raises(UserError) as error:
        main(words.split())
    assert said in str(error.value) and len(str(error.value).splitlines()) == 1


@pytest.mark.parametrize("words", [["text"], ["arc"], ["video"], ["facts"], ["mqar"], ["smollm"], ["tokens"],
                                   ["tokens", "train"]])
def test_help_is_answered_before_torch_is_imported(words, tmp_path):
    name, *more = words
    (tmp_path / "torch.py").write_text("raise SystemExit('torch was imported')")
    done = subprocess.run([sys.executable, ROOT / f"data/{name}.py", *more, "-h"], cwd=tmp_path, capture_output=True,
                          text=True, env={"PYTHONPATH": str(tmp_path)})
    assert done.returncode == 0 and not done.stderr and done.stdout.startswith(f"usage: data/{name}.py")
    assert max(map(len, done.stdout.splitlines())) <= 80
