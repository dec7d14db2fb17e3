"""What all pictures share: their type, colours, axes, and how other people's text is written in them.

Plotly reads a little HTML in every text: all names go through `label`, which shows them as they are.
"""

from __future__ import annotations

import html
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from evomerge.evaluation.scores import NORMAL
from evomerge.system.text import one_line

if TYPE_CHECKING:
    import plotly.graph_objects as go

ACCENT, QUIET, RANDOM = "#e4572e", "#8a94a3", "#4c9ed9"
"""The winner; what is there for comparison; the random search."""
PALETTE = ("#4c78a8", "#f2a541", "#54a24b", "#b279a2", "#72b7b2", "#d67195", "#9d755d", "#eeca3b")


@dataclass(frozen=True)
class Picture:
    """A picture and the numbers behind it.

    Attributes:
        name: Names its file of numbers.
        title: What it shows.
        caption: How to read it.
        header: Of the numbers.
        rows: The numbers.
        figure: A plotly figure.
    """

    name: str
    title: str
    caption: str
    header: tuple[str, ...]
    rows: tuple[tuple[Any, ...], ...]
    figure: go.Figure


def label(text: str, width: int = 26, lines: int = 2) -> str:
    """Writes other people's text for plotly: on few short lines, and no markup in it has an effect."""
    wrapped = textwrap.wrap(one_line(text, lines * width - 4 if lines > 1 else width), width, break_on_hyphens=False)
    return "<br>".join(html.escape(line, quote=False) for line in wrapped) or " "


def figure_of(height: int, left: int = 60) -> go.Figure:
    import plotly.graph_objects as go

    return style(go.Figure(), height, left)


def style(figure: go.Figure, height: int, left: int) -> go.Figure:
    figure.update_layout(
        template="none",
        height=height,
        margin={"l": left, "r": 16, "t": 14, "b": 50},
        paper_bgcolor="rgba(0,0,0,0)",
        plot_bgcolor="rgba(0,0,0,0)",
        font={"family": "system-ui, -apple-system, Segoe UI, Roboto, sans-serif", "size": 13},
        legend={"orientation": "h", "yanchor": "bottom", "y": 1.0, "x": 0},
        hovermode="closest",
        hoverlabel={"align": "left"},
    )
    axis = {"automargin": True, "zeroline": False, "gridcolor": "rgba(128,128,128,0.25)", "title_font_size": 13}
    figure.update_xaxes(**axis)
    figure.update_yaxes(**axis)
    return figure


def name_rows(figure: go.Figure, texts: Sequence[str], *, reverse: bool = False, margin: float = 0.5) -> None:
    """Names the positions 0, 1, ... of the vertical axis."""
    span = [-margin, len(texts) - 1 + margin]
    figure.update_yaxes(tickvals=[*range(len(texts))], ticktext=list(texts), range=span[::-1] if reverse else span)


def error_bars(errors: Sequence[float | None]) -> dict[str, Any]:
    return {
        "type": "data",
        "array": [NORMAL * (error or 0.0) for error in errors],
        "thickness": 1.5,
        "width": 5,
        "color": QUIET,
    }
