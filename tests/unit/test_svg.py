"""What is left of a plot's SVG shows the same picture."""

import io
from xml.etree import ElementTree

from matplotlib.figure import Figure

from labs.harness.reports.svg import compact

SVG = "{http://www.w3.org/2000/svg}"


def test_a_compact_plot_has_the_shapes_and_words_of_the_plot_in_fewer_bytes() -> None:
    figure = Figure()
    ax = figure.subplots()
    ax.plot([0.123456, 1, 2], [3, 1.98765, 2], "o-", label="1.23456 & <two>")
    ax.legend()
    file = io.StringIO()
    figure.savefig(file, format="svg")
    before, after = ElementTree.fromstring(file.getvalue()), compact(file.getvalue())
    tree = ElementTree.fromstring(after)
    assert len(after) < 0.8 * len(file.getvalue())
    for shape in ("path", "use", "text", "clipPath"):
        assert len(list(tree.iter(SVG + shape))) == len(list(before.iter(SVG + shape))), shape
    for old, new in zip(before.iter(SVG + "path"), tree.iter(SVG + "path"), strict=True):
        for was, now in zip(old.get("d", "").split(), new.get("d", "").split(), strict=True):
            assert was == now if was.isalpha() else abs(float(was) - float(now)) <= 0.005
    names = {element.get("id") for element in tree.iter()}
    for element in tree.iter(SVG + "use"):
        assert element.attrib["{http://www.w3.org/1999/xlink}href"][1:] in names
