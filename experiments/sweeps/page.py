"""One HTML page of figures that loads nothing: SVGs in the page's text colour, light or dark as the
reader's system prefers."""

import html

from rich.table import Table

from kha_jax.analysis import style

# The figures in the page's order, and what to look for in each.
SAYS = {
    "training": """Loss and validation over training. For mixtures, how uneven the experts' load
        is.""",
    "differences": """Every row's loss less that of its baseline, seed by seed: the bar is the 95%
        interval over seeds, each tick a seed, and the diamond is what the paper prints. A bar
        that crosses 0 is not distinguishable from no difference.""",
    "costs": """The same differences, the best first, and what each row costs beside them, over the
        baseline's: by the accounting, and step times where they were measured in turns.""",
    "rates": """The loss of each row over learning rates beside its baseline (grey, dashed). Bands
        are from the lowest to the highest seed; a cross is a rate at which a run diverged. A flat
        curve bears many rates.""",
    "gaps": """The same difference over training: an effect that is there should not depend on where
        training stopped.""",
    "losses": """The loss of each row beside its baseline (grey, dashed). Bands are from the lowest
        to the highest seed.""",
    "stability": """The loss of every step and the gradient norm, spikes marked, and the largest
        attention logit where it was logged. The paper reports fewer spikes with knocking (figures
        1 and 2).""",
    "depth": """How far matrices have come from where they started, layer by layer: 0 is untouched.
        A diagonal that lost and an off-diagonal share that won mean that features are shared.""",
    "heat_maps": """Every matrix less its start, on one scale: white is untouched, a blue diagonal
        a feature that a head keeps less of, colour off the diagonal a feature mixed into
        another.""",
    "clipped": """The entries cut to [0, 1], as in figure 3 of the paper: negative entries and
        diagonals above 1 cannot be seen.""",
    "diagonals": """The diagonals, features sorted: a step means that some features stay with their
        head and others are shared.""",
    "spectra": """Singular values. The identity is flat at 1; a steep curve lets few directions
        through.""",
    "blocks": """The same matrices, features that mix put together. Above each its modularity, in
        brackets that of the same entries shuffled: no more than that is no structure.""",
    "gates": """What the gate multiplies features by as z moves along its steepest direction: the
        light band holds all features, the dark one the middle half. A flat 1 is a gate that has
        learnt nothing.""",
    "history": """What training logged of the matrices, layers by colour. Curves that still move
        have not settled.""",
    "subspaces": """By the weights: how far T turns the main directions of each head, and whether
        it brings those of different heads closer (after below before).""",
    "similarity": """By the weights: how alike heads are and how well they predict each other,
        before and after T. The last is 1 by counting where the peers have as many features as the
        input.""",
}
PAGE = """<!doctype html><html lang="en"><head><meta charset="utf-8">{refresh}
<meta name="viewport" content="width=device-width, initial-scale=1"><title>{title}</title><style>
:root {{ color-scheme: light dark; --ink: {ink}; --page: {page}; --line: #8886; }}
@media (prefers-color-scheme: dark) {{ :root {{ --ink: {dark_ink}; --page: {dark_page}; }} }}
body {{ color: var(--ink); background: var(--page); font: 15px/1.5 system-ui, sans-serif;
        max-width: {width}px; margin: 2rem auto; padding: 0 1.2rem; }}
h1 {{ font-size: 1.4rem; }} h2 {{ font-size: 1.05rem; margin: 2.2rem 0 0.2rem; }}
p {{ white-space: pre-wrap; max-width: 46rem; margin: 0.2rem 0 0.8rem; }}
.runs {{ display: flex; flex-wrap: wrap; gap: 1.5rem; }}
figure {{ margin: 0; flex: 1 1 {least}px; min-width: 0; }} figcaption {{ font-weight: 600; }}
svg {{ max-width: 100%; height: auto; }}
.table {{ overflow-x: auto; }} table {{ border-collapse: collapse; font-size: 0.85rem; }}
td, th {{ padding: 0.15rem 0.7rem; border-bottom: 1px solid var(--line); text-align: right; }}
</style></head><body><h1>{title}</h1>{about}<div class="table">{table}</div>
{sections}</body></html>
"""


def write(
    runs: list[tuple[str, int | None]],
    table: Table,
    sections: dict[str, list[tuple[str, str]]],
    refresh: int | None = None,
) -> str:
    """The page of what runs learnt; see `render`.

    runs: name and step of each.
    """
    steps = ", ".join(f"{name} at step {step}" for name, step in runs if step is not None)
    title = f"What the heads learnt: {', '.join(name for name, _ in runs)}"
    return render(
        title, [steps or "bare checkpoints"], table, sections, refresh, wide=len(runs) > 1
    )


def render(
    title: str,
    about: list[str],
    table: Table,
    sections: dict[str, list[tuple[str, str]]],
    refresh: int | None = None,
    wide: bool = False,
) -> str:
    """A page.

    Args:
        title: its heading.
        about: paragraphs below it.
        table: shown first.
        sections: for names of SAYS, (run or nothing, SVG) of the figures side by side.
        refresh: seconds after which a browser loads the page again.
        wide: room for two figures in a row.
    """
    parts = []
    for name in (name for name in SAYS if name in sections):
        shown = "".join(
            f"<figure><figcaption>{html.escape(run)}</figcaption>{svg}</figure>"
            for run, svg in sections[name]
        )
        heading, says = name.replace("_", " ").capitalize(), " ".join(SAYS[name].split())
        parts.append(f'<h2>{heading}</h2><p>{says}</p><div class="runs">{shown}</div>')
    (ink, light), (dark_ink, dark) = style.THEMES.values()
    return PAGE.format(
        refresh=f'<meta http-equiv="refresh" content="{refresh}">' if refresh else "",
        title=html.escape(title),
        about="".join(f"<p>{html.escape(text)}</p>" for text in about),
        table=_as_html(table),
        sections="\n".join(parts),
        ink=ink,
        page=light,
        dark_ink=dark_ink,
        dark_page=dark,
        width=1800 if wide else 1150,
        least=520 if wide else 900,
    )


def _as_html(table: Table) -> str:
    head = "".join(f"<th>{html.escape(str(column.header))}</th>" for column in table.columns)
    rows = zip(*(column.cells for column in table.columns))
    body = ("".join(f"<td>{html.escape(str(cell))}</td>" for cell in row) for row in rows)
    return f"<table><tr>{head}</tr>" + "".join(f"<tr>{row}</tr>" for row in body) + "</table>"
