"""The search on the real models as a table and a picture.

    evomerge run search_spaces/real.yaml
    python bench/real.py runs/real

writes bench/results/real.md and bench/results/real.svg from the run's own record.
"""

from __future__ import annotations

import argparse
import statistics
from pathlib import Path

from evomerge.report.tables import result_table, table
from evomerge.run.folder import RunFolder
from evomerge.study.candidate import Candidate

HERE = Path(__file__).parent
STAGES = ("plan", "materialise", "score")


def costs(candidates: tuple[Candidate, ...]) -> str:
    """Where a candidate's time goes, over those that were scored in full and computed (not read back)."""
    computed = [c for c in candidates if c.state == "done" and "score" in c.seconds]
    rows = []
    for method in sorted({str(c.recipe["merge_method"]) for c in computed}):
        of_method = [c for c in computed if c.recipe["merge_method"] == method]
        median = {stage: statistics.median(c.seconds[stage] for c in of_method) for stage in (*STAGES, "total")}
        rest = median["total"] - median["score"]
        seconds = (f"{median[stage]:.2f}" for stage in (*STAGES, "total"))
        rows.append([method, str(len(of_method)), *seconds, f"{rest / median['total']:.0%}"])
    header = ["method", "candidates", *(f"{stage}, s" for stage in (*STAGES, "total")), "not scoring"]
    return table(header, rows)


def picture(candidates: tuple[Candidate, ...], width: int = 760, height: int = 320) -> str:
    """An SVG: every candidate's fitness in order, the best so far, and the best of generation 0."""
    scored = [c for c in candidates if c.fitness is not None]
    values = [c.fitness or 0.0 for c in scored]
    low, high = min(values), max(values)
    pad = 0.05 * (high - low)
    left, top, right, bottom = 56, 16, width - 16, height - 36

    def x(number: int) -> float:
        return left + (right - left) * number / max(1, scored[-1].number)

    def y(value: float) -> float:
        return bottom - (bottom - top) * (value - low + pad) / (high - low + 2 * pad)

    baseline = max(c.fitness or 0.0 for c in scored if c.generation == 0)
    dots, steps, best = [], [], float("-inf")
    for c in scored:
        fitness = c.fitness or 0.0
        colour = "#8a8f98" if c.generation == 0 else "#2f6fde"
        dots.append(f'<circle cx="{x(c.number):.1f}" cy="{y(fitness):.1f}" r="3" fill="{colour}" opacity="0.75"/>')
        if fitness > best:
            steps.append((x(c.number), y(fitness)))
            best = fitness
    corners = "".join(f"H{px:.1f}V{py:.1f}" for px, py in steps[1:])
    path = f"M{steps[0][0]:.1f},{steps[0][1]:.1f}{corners}H{right}"
    ticks = [low + (high - low) * k / 4 for k in range(5)]
    labels = [
        f'<text x="{left - 6}" y="{y(t) + 4:.1f}" text-anchor="end">{t:.2f}</text>'
        f'<line x1="{left}" x2="{right}" y1="{y(t):.1f}" y2="{y(t):.1f}" stroke="#dddddd"/>'
        for t in ticks
    ]
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" font-family="sans-serif" '
            'font-size="12" fill="#444444">',
            f'<rect width="{width}" height="{height}" fill="#ffffff"/>',
            *labels,
            f'<line x1="{left}" x2="{right}" y1="{y(baseline):.1f}" y2="{y(baseline):.1f}" stroke="#8a8f98" '
            'stroke-dasharray="5 4"/>',
            f'<text x="{right}" y="{y(baseline) + 14:.1f}" text-anchor="end">best of generation 0</text>',
            *dots,
            f'<path d="{path}" fill="none" stroke="#d9480f" stroke-width="2"/>',
            f'<text x="{(left + right) / 2}" y="{height - 8}" text-anchor="middle">candidate</text>',
            f'<text x="{left}" y="{top - 3}">fitness on the search items (1 = the best source on every task)</text>',
            "</svg>",
        ]
    )


def main() -> None:
    """Writes the two files."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("--out", type=Path, default=HERE / "results")
    args = parser.parse_args()
    folder = RunFolder.existing(args.run)
    result = folder.result()
    if result is None:
        raise SystemExit(f"{args.run}: not finished yet")
    candidates = folder.candidates()
    text = [
        "# The real models\n",
        "Four fine-tunes of a 135M model (SmolLM2-135M-Instruct), four real tasks, two cores without a GPU.\n",
        "    evomerge run search_spaces/real.yaml\n    python bench/real.py runs/real\n",
        result_table(result) + "\n",
        "Each cell: value ± standard error (items). `winner is better by`: paired difference on the same items.\n",
        "![fitness by candidate](real.svg)\n",
        "## Where a candidate's time goes (medians)\n",
        costs(candidates),
    ]
    args.out.mkdir(exist_ok=True)
    (args.out / "real.md").write_text("\n".join(text) + "\n")
    (args.out / "real.svg").write_text(picture(candidates) + "\n")
    print("\n".join(text))


if __name__ == "__main__":
    main()
