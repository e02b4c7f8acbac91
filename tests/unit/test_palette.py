"""Colours that every reader can tell apart, on a light page and on a dark one."""

from __future__ import annotations

from itertools import combinations

import numpy as np
import numpy.typing as npt
import pytest

from dashboards import palette

Vector = npt.NDArray[np.float64]
LIGHT, DARK = "#FFFFFF", "#14171C"  # the pages' grounds
SIGHTS = {  # linear RGB as it is seen; Machado, Oliveira and Fernandes 2009, severity 1
    "normal": np.eye(3),
    "protanopia": np.array([
        [0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216],
        [-0.003882, -0.048116, 1.051998],
    ]),
    "deuteranopia": np.array([
        [0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413],
        [-0.011820, 0.042940, 0.968881],
    ]),
    "tritanopia": np.array([
        [1.255528, -0.076749, -0.178779], [-0.078411, 0.930809, 0.147602],
        [0.004733, 0.691367, 0.303900],
    ]),
}  # fmt: skip
TO_CONES = np.array([
    [0.4122214708, 0.5363325363, 0.0514459929], [0.2119034982, 0.6806995451, 0.1073969566],
    [0.0883024619, 0.2817188376, 0.6299787005],
])  # fmt: skip
TO_OKLAB = np.array([
    [0.2104542553, 0.7936177850, -0.0040720468], [1.9779984951, -2.4285922050, 0.4505937099],
    [0.0259040371, 0.7827717662, -0.8086757660],
])  # fmt: skip


def linear(colour: str) -> Vector:
    values = np.array([int(colour[at : at + 2], 16) / 255 for at in (1, 3, 5)])
    return np.where(values <= 0.04045, values / 12.92, ((values + 0.055) / 1.055) ** 2.4)


def oklab(rgb: Vector) -> Vector:
    seen: Vector = TO_OKLAB @ np.cbrt(TO_CONES @ np.clip(rgb, 0, 1))
    return seen


def contrast(one: str, other: str) -> float:
    """As WCAG 2 defines it: 1 is none, 21 is black on white."""
    dark, light = sorted(float(linear(c) @ [0.2126, 0.7152, 0.0722]) for c in (one, other))
    return (light + 0.05) / (dark + 0.05)


@pytest.mark.parametrize("sight", SIGHTS)
def test_colours_differ_for_every_sight(sight: str) -> None:
    """By 0.07 in OKLab, which is what Okabe and Ito's own are apart at least."""
    colours = [*palette.VARIANTS, palette.BOUND]
    seen = {c: oklab(SIGHTS[sight] @ linear(c)) for c in colours}
    alike = [
        (one, other)
        for one, other in combinations(colours, 2)
        if np.linalg.norm(seen[one] - seen[other]) < 0.07
    ]
    assert alike == []


@pytest.mark.parametrize("colour", [*palette.VARIANTS, palette.BOUND])
def test_colours_can_be_read_on_light_and_on_dark(colour: str) -> None:
    assert contrast(colour, LIGHT) >= 2
    assert contrast(colour, DARK) >= 3
