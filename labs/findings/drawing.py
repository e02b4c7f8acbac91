"""Plots are SVG in the colours of `dashboards.palette`; equal data gives equal bytes."""

from __future__ import annotations

from typing import Any

import matplotlib as mpl
import numpy as np
from numpy.typing import NDArray

mpl.use("svg")
mpl.rcParams.update(
    {
        "svg.hashsalt": "labs",  # the same data gives the same file
        "figure.constrained_layout.use": True,
        "font.size": 9,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.grid": True,
        "grid.alpha": 0.3,
        "savefig.facecolor": "white",
    }
)
import matplotlib.pyplot as plt  # noqa: E402  (the backend is chosen first)

__all__ = ["GREY", "plt", "thinned"]

GREY = "#666666"
MOST_DRAWN = 20_000  # points of one line; a page has few of them


def thinned(x: NDArray[Any], y: NDArray[Any]) -> tuple[NDArray[Any], NDArray[Any]]:
    """Thin out a line that has more points than can be seen; a shorter one stays as it is.

    Of each of many equal stretches its ends, its lowest and its highest point are kept.
    """
    if len(x) <= MOST_DRAWN:
        return x, y
    stretches = np.array_split(np.arange(len(x)), MOST_DRAWN // 4)
    kept = np.unique([(s[0], s[np.argmin(y[s])], s[np.argmax(y[s])], s[-1]) for s in stretches])
    return x[kept], y[kept]
