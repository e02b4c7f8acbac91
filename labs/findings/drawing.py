"""Plots are SVG in the colours of `dashboards.palette`; equal data gives equal bytes."""

from __future__ import annotations

import matplotlib as mpl

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

__all__ = ["GREY", "plt"]

GREY = "#666666"
