"""The report of a run as one HTML page without a network: pictures, their numbers, and how to reproduce it."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterator, Mapping, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

from evomerge.report.drawing import Picture
from evomerge.report.figures import pictures, scores
from evomerge.report.lineage import whole_recipe
from evomerge.report.run_data import RunData
from evomerge.report.tables import constraint_rows
from evomerge.study.candidate import find
from evomerge.system.text import one_line, plain

_MOST_ROWS = 200  # of a table in the page: the rest is in the CSV files
_LONGEST = 100_000  # characters of a text that is shown whole


def report_page(data: RunData, *, refresh: int | None = None) -> str:
    """Renders the page.

    Args:
        data: The run.
        refresh: Seconds after which a browser reads the page again; None for never.
    """
    from jinja2 import Environment, FileSystemLoader, StrictUndefined
    from markupsafe import Markup
    from plotly.offline import get_plotlyjs

    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent), autoescape=True, undefined=StrictUndefined, trim_blocks=False
    )
    environment.filters |= {"line": _line, "block": _block}
    environment.filters |= {"cell": _cell, "flat": _flat}
    drawn = pictures(data)
    figures = {picture.name: json.loads(picture.figure.to_json()) for picture in drawn}
    heading, verdict, tone = _verdict(data)
    winner = None if data.winner is None else find(data.history, data.winner)
    return environment.get_template("page.html.jinja").render(
        data=data,
        pictures=drawn,
        figures=Markup(_in_script(json.dumps(figures, separators=(",", ":")))),
        plotly=Markup(get_plotlyjs().replace("</script", "<\\/script")),
        heading=heading,
        verdict=one_line(verdict, 1000),
        tone=tone,
        facts=_facts(data),
        constraints=constraint_rows(data.result.constraints) if data.result and data.result.constraints else None,
        refresh=refresh,
        most_rows=_MOST_ROWS,
        winner_yaml=whole_recipe(data.history, winner).to_yaml() if winner else "",
        version=data.environment.get("versions", {}).get("evomerge", ""),
    )


_SUMMARY = """<div><b>{{ heading }}</b><p>{{ verdict }}</p>
{% if picture %}<table><tr>{% for name in picture.header %}<th>{{ name }}</th>{% endfor %}</tr>
{% for row in picture.rows | reverse %}<tr>{% for cell in row %}<td>{{ cell | cell }}</td>{% endfor %}</tr>
{% endfor %}</table>{% endif %}</div>"""


def summary(data: RunData) -> str:
    """Renders the verdict and the scores of a run for a notebook."""
    from jinja2 import Environment

    environment = Environment(autoescape=True)
    environment.filters["cell"] = _cell
    heading, verdict, _ = _verdict(data)
    title = f"{one_line(data.status.run)}: {heading}"
    picture = scores(data)
    return environment.from_string(_SUMMARY).render(heading=title, verdict=one_line(verdict, 1000), picture=picture)


def csv_text(picture: Picture) -> str:
    """Writes the numbers behind a picture as CSV."""
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow(picture.header)
    writer.writerows([_csv_cell(cell) for cell in row] for row in picture.rows)
    return buffer.getvalue()


def _csv_cell(cell: Any) -> Any:
    """A cell that no spreadsheet takes for a formula: names are other people's."""
    if not isinstance(cell, str):
        return cell
    text = one_line(cell, 1000)
    return f"'{text}" if text.startswith(("=", "+", "-", "@")) else text


def _verdict(data: RunData) -> tuple[str, str, str]:
    """The heading, the verdict in a sentence, and whether that is good."""
    result, status = data.result, data.status
    if result is None:
        best = status.best
        if best is None:
            return "The search has begun", "Nothing is scored yet.", ""
        first = max((c.fitness for c in data.history if c.generation == 0 and c.fitness is not None), default=None)
        ahead = "" if first is None else f", {best.fitness - first:+.4f} against the best of generation 0"
        return (
            f"Candidate {best.candidate} is the best so far",
            f"{status.candidates.recorded} of {status.candidates.budget} candidates; the best has fitness "
            f"{best.fitness:.4f}{ahead}. Whether it is better than the rest is measured when the search ends.",
            "",
        )
    score = result.winner.fitness["test"]
    error = "" if score.stderr is None else f" ± {score.stderr:.3f}"
    tone = "" if result.within_noise_of else "better" if result.baselines else ""
    tone = "worse" if " is worse than " in result.verdict else tone
    return f"Candidate {result.winner.candidate} wins with {score.value:.3f}{error}", result.verdict, tone


def _facts(data: RunData) -> list[tuple[str, str]]:
    counts, items = data.status.candidates, data.status.items
    facts = [("candidates", f"{counts.recorded} of {counts.budget}"), ("stopped early", str(counts.pruned))]
    facts += [("failed", str(counts.failed))] if counts.failed else []
    facts += [("saved by racing", f"{items.saved:.0%}")] if items.saved else []
    seconds = sum(float(c.seconds.get("total", 0.0)) for c in (*data.history, *data.random_history))
    facts += [("work on candidates", str(timedelta(seconds=round(seconds))))] if seconds else []
    if data.result is None and data.status.seconds_left:
        facts.append(("time left, about", str(timedelta(seconds=round(data.status.seconds_left)))))
    return facts


def _in_script(text: str) -> str:
    """JSON that nothing in it can end as the content of a script element."""
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def _line(value: Any, limit: int = 200) -> str:
    return one_line(str(value), limit)


def _block(text: str) -> str:
    return plain(text[:_LONGEST]).strip() or "(nothing)"


def _cell(value: Any) -> str:
    if value is None:
        return "–"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:,.0f}" if value.is_integer() else f"{value:,.1f}" if abs(value) >= 100 else f"{value:.4f}"
    return one_line(str(value), 600)


def _flat(content: Mapping[str, Any], before: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in content.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{before}{key}: ")
        else:
            yield f"{before}{key}", ", ".join(map(str, value)) if _is_list(value) else value


def _is_list(value: Any) -> bool:
    return isinstance(value, Sequence) and not isinstance(value, str)
