"""What tests ask of errors and of counts."""
import math
import re

import numpy as np
import pytest

from nanolab.run import UserError


def raises_one_line(*words):
    """A UserError of one line that has all the words."""
    pattern = "".join(f"(?=.*{re.escape(word)})" for word in words)
    return pytest.raises(UserError, match=rf"\A{pattern}[^\n]+\Z")


def evenly(counts, expected):
    """Do counts fit the expected ones? Chi-square within five standard deviations of its mean (df, at least 2 df)."""
    counts, expected = np.asarray(counts, float), np.broadcast_to(expected, np.shape(counts)).astype(float)
    chi, df = ((counts - expected) ** 2 / expected).sum(), counts.size - 1
    return abs(chi - df) < 5 * math.sqrt(2 * df + (1 / expected).sum())
