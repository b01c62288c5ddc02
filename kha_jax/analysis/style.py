"""How every figure of the project looks: one palette, one scale, one way to save (extra: plots).

The palettes stay apart for colour-blind readers: Paul Tol's bright scheme for kinds (with a line
style and a marker each, so that colour is never alone), red to blue through white for signed
values, viridis for what has an order, such as layers.
"""

import contextlib
import math
import re
from pathlib import Path
from typing import Any, Callable, Iterator

from kha_jax.storage import replacing, write_text

KINDS = ("#4477AA", "#EE6677", "#228833", "#CCBB44", "#AA3377", "#66CCEE")
STROKES = ("-", "--", "-.", ":", (0, (5, 1, 1, 1, 1, 1)), (0, (3, 1)))
MARKERS = "osD^vP"
SIGNED, POSITIVE, ORDERED = "RdBu_r", "cividis", "viridis"
# ink, page. The light ink is also what an SVG turns into the colour of the page around it.
THEMES = {"light": ("#1f2329", "#ffffff"), "dark": ("#e6e9ee", "#0d1117")}
SUFFIXES = (".png", ".pdf", ".svg")
PRINT, SCREEN = 300, 130  # dots per inch: what journals ask for, and what pages load quickly


class PlotsMissing(ImportError):
    """The extra is not installed; the message names it."""


def pyplot() -> Any:
    """matplotlib.pyplot without a window.

    Raises:
        PlotsMissing: names the extra that brings it.
    """
    try:
        import matplotlib
    except ImportError:
        raise PlotsMissing("figures need the extra: pip install -e '.[plots]'") from None
    from matplotlib import pyplot

    if "inline" not in matplotlib.get_backend():
        matplotlib.use("agg")
    return pyplot


def settings(theme: str = "light") -> dict[str, Any]:
    """matplotlib's settings for a theme of THEMES."""
    pyplot()
    from cycler import cycler

    ink, page = THEMES[theme]
    inked = ("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color")
    return {
        **dict.fromkeys(inked, ink),
        **dict.fromkeys(("figure.facecolor", "axes.facecolor", "savefig.facecolor"), page),
        "axes.prop_cycle": cycler(color=KINDS) + cycler(linestyle=STROKES),
        "axes.grid": True,
        "axes.spines.right": False,
        "axes.spines.top": False,
        "axes.titlesize": 9,
        "axes.labelsize": 9,
        "axes.linewidth": 0.8,
        "figure.constrained_layout.use": True,
        "figure.dpi": 100,
        "figure.titlesize": 10,
        "font.size": 9,
        "grid.alpha": 0.18,
        "grid.color": ink,
        "grid.linewidth": 0.6,
        "legend.fontsize": 8,
        "legend.frameon": False,
        "lines.linewidth": 1.4,
        "lines.markersize": 4,
        "pdf.fonttype": 42,  # TrueType, which journals take
        "svg.hashsalt": "kha_jax",
        "xtick.labelsize": 8,
        "ytick.labelsize": 8,
    }


@contextlib.contextmanager
def using(theme: str = "light") -> Iterator[Any]:
    """pyplot in this style, for as long as the context lasts."""
    plots = pyplot()
    with plots.rc_context(settings(theme)):
        yield plots


def use(theme: str = "light") -> None:
    """This style from here on, for notebooks."""
    pyplot().rcParams.update(settings(theme))


def of_layer(layer: int, layers: int) -> Any:
    """The colour of a layer: the ends of the scale, which vanish on a light or a dark page, are
    left out."""
    return pyplot().get_cmap(ORDERED)(0.22 + 0.64 * layer / max(layers - 1, 1))


def plain_log(axis: Any) -> None:
    """A logarithmic y axis with few, plain numbers."""
    from matplotlib.ticker import LogLocator, NullLocator, StrMethodFormatter

    axis.set_yscale("log")
    axis.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.yaxis.set_minor_locator(NullLocator())
    axis.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))


def images(axes: Any) -> None:
    """Prepares axes for an image: no grid, no ticks, a whole frame."""
    axes.grid(False)
    axes.set(xticks=[], yticks=[])
    for side in axes.spines.values():
        side.set_visible(True)


def row_of(count: int, height: float, width: float, **shared: Any) -> tuple[Any, list[Any]]:
    """Panels side by side, four in a row at most."""
    columns = min(4, count)
    rows = math.ceil(count / columns)
    figure, grid = pyplot().subplots(
        rows, columns, figsize=(width * columns + 0.8, height * rows), squeeze=False, **shared
    )
    for unused in grid.ravel()[count:]:
        unused.set_visible(False)
    return figure, list(grid.ravel()[:count])


def line(index: int, **more: Any) -> dict[str, Any]:
    """Colour, stroke and marker of a kind."""
    look = {
        "color": KINDS[index % 6],
        "linestyle": STROKES[index % 6],
        "marker": MARKERS[index % 6],
    }
    return {**look, **more}


def layer_bar(figure: Any, axes: Any, layers: int) -> None:
    """The scale of `of_layer` beside a figure."""
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import ListedColormap
    from matplotlib.ticker import MaxNLocator

    colours = ListedColormap([of_layer(layer, layers) for layer in range(layers)])
    shown = ScalarMappable(cmap=colours)
    shown.set_clim(-0.5, layers - 0.5)
    ticks = MaxNLocator(nbins=8, integer=True)
    figure.colorbar(shown, ax=axes, label="layer", ticks=ticks, fraction=0.04, aspect=30)


def shared_legend(figure: Any, panels: list[Any], side: str = "lower") -> None:
    """One legend for all panels, below them (or above: `upper`, where a figure has a label of its
    own below): each label once."""
    marks = {}
    for axes in panels:
        handles, labels = axes.get_legend_handles_labels()
        marks |= dict(zip(labels, handles))
    if marks:
        columns = min(len(marks), 6)
        figure.legend(marks.values(), marks.keys(), loc=f"outside {side} center", ncols=columns)


def save(draw: Callable[[], Any], path: Path) -> str:
    """Draws a figure as `path`.svg, .pdf, .png (for print) and _dark.png (for screens); returns the
    SVG's text for a page.

    draw: makes the figure anew under each theme. SVG and PDF have no background. The SVG's ink is
    the text colour of the page around it; as a file it follows what the reader's system prefers.
    """

    def write(figure: Any, ending: str, **options: Any) -> None:
        with replacing(Path(f"{path}{ending}")) as temporary:
            figure.savefig(temporary, **options)

    with using("dark") as plots:
        figure = draw()
        write(figure, "_dark.png", dpi=SCREEN)
        plots.close(figure)
    with using("light") as plots:
        figure = draw()
        write(figure, ".png", dpi=PRINT)
        write(figure, ".pdf", transparent=True, metadata={"CreationDate": None})
        nothing = dict.fromkeys(("Date", "Creator", "Format", "Type"))
        write(figure, ".svg", transparent=True, metadata=nothing)
        plots.close(figure)
    text = _inked_by_the_page(Path(f"{path}.svg").read_text())
    light, dark = (ink for ink, _ in THEMES.values())
    alone = f"<style>svg{{color:{light}}}@media(prefers-color-scheme:dark){{svg{{color:{dark}}}}}"
    write_text(Path(f"{path}.svg"), text.replace(">", f">{alone}</style>", 1))
    return text


def _inked_by_the_page(svg: str) -> str:
    """The SVG without prologue and metadata, its ink the colour of the text around it."""
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg[svg.index("<svg") :], flags=re.DOTALL)
    return svg.replace(THEMES["light"][0], "currentColor")
