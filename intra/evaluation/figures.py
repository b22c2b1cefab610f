"""The figures of the report, drawn as SVG: on the page they take its colours, by themselves (MLflow, figures/) they bring their own.

Every mark says its numbers in a <title>, and a table of the report holds them too. Methods differ by colour and by dash or shape.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape

from intra.evaluation import results
from intra.evaluation.results import Record

# Ink, paper, soft ink, lines, then the methods' colours: each at least 4.5 : 1 against the paper.
LIGHT = ("#1a1c20", "#ffffff", "#5a5f68", "#c9cdd4", "#0b57d0", "#b3261e", "#146c2e", "#8a5000", "#6b2fa0", "#00687a", "#5a5f68", "#1a1c20")
DARK = ("#e8eaed", "#16181c", "#a8adb5", "#454a52", "#8ab4f8", "#f2a19b", "#81c995", "#fcc674", "#cfa6f5", "#78d5e9", "#a8adb5", "#e8eaed")
NAMES = ("--ink", "--paper", "--soft", "--line", *(f"--c{number}" for number in range(8)))
COLOURS = 8
DASHES = ("none", "7 3", "2 3", "9 3 2 3")
WIDTH = 420  # px, of every figure: a narrow screen shows it whole
_LABEL = 12  # px, the height of a line of text
_ENDS = ("random", "oracle")


@dataclass(frozen=True)
class Figure:
    """One drawing. name: of its file; title: a heading; says: what it shows, for those who do not see it."""

    name: str
    title: str
    says: str
    height: float
    body: str

    def inline(self) -> str:
        """For a page that defines the variables of NAMES."""
        return self._svg("", "")

    def standalone(self) -> str:
        """A file of its own."""
        colours = "".join(f"{name}:{value};" for name, value in zip(NAMES, LIGHT, strict=True))
        style = f"<style>svg{{{colours}background:#fff;font-family:sans-serif}}{STYLE}</style>"
        return self._svg(' xmlns="http://www.w3.org/2000/svg"', f"<title>{escape(self.title)}</title>{style}") + "\n"

    def _svg(self, space: str, head: str) -> str:
        size = f'viewBox="0 0 {WIDTH} {_n(self.height)}" width="{WIDTH}" height="{_n(self.height)}"'
        return f'<svg{space} {size} role="img" aria-label="{escape(self.says)}">{head}{self.body}</svg>'


STYLE = (
    "svg text{fill:var(--ink);font-size:12px}svg .soft{fill:var(--soft)}svg .rule{stroke:var(--line);fill:none}"
    "svg .ink{stroke:var(--ink);fill:none}svg .line{fill:none;stroke-width:2}svg .paper{fill:var(--paper)}"
    + "".join(
        f".s{n}{{stroke:var(--c{n % COLOURS});stroke-dasharray:{DASHES[(n + n // COLOURS) % 4]}}}.w{n}{{stroke:var(--c{n % COLOURS})}}"
        f".f{n}{{fill:var(--c{n % COLOURS})}}"
        for n in range(4 * COLOURS)
    )
)


def recall_curves(found: Sequence[Record], methods: Sequence[str]) -> list[Figure]:
    """Complete-evidence recall over k, a figure a benchmark."""
    ks = sorted({int(r["metric"].rpartition("_")[2]) for r in found if r["metric"].startswith("complete_recall_at_")})
    left, right, top, bottom = 34, WIDTH - 116, 10, 250
    span = max(ks[-1] - ks[0], 1)
    figures = []
    for benchmark in results.whole(found):
        by_name = {(r["method"], r["metric"]): r for r in found if r["benchmark"] == benchmark}
        body = [_levels(left, right, top, bottom)]
        body += [_text(left + (k - ks[0]) / span * (right - left), bottom + 16, str(k), "middle", "soft") for k in ks]
        body.append(_text(right, bottom + 30, "k", "end", "soft"))
        ends: list[tuple[float, int, str]] = []
        for number, method in enumerate(methods):
            points = [(k, by_name[method, f"complete_recall_at_{k}"]) for k in ks if (method, f"complete_recall_at_{k}") in by_name]
            if not points:
                continue
            places = [(left + (k - ks[0]) / span * (right - left), bottom - r["value"] * (bottom - top)) for k, r in points]
            body.append(f'<polyline class="line s{number}" points="{" ".join(f"{_n(x)},{_n(y)}" for x, y in places)}"/>')
            for (x, y), (k, r) in zip(places, points, strict=True):
                body.append(_marker(number, x, y, f"{method}, k {k}: {results.interval(r)}"))
            ends.append((places[-1][1], number, method))
        for (y, number, method), placed in zip(sorted(ends), _apart([y for y, _, _ in sorted(ends)], _LABEL + 1, top, bottom), strict=True):
            body.append(f'<path class="rule" d="M{right + 5},{_n(y)}L{right + 12},{_n(placed)}"/>')
            body.append(_text(right + 14, placed + 4, method, "start", f"f{number}"))
        says = f"Complete-evidence recall over k on {benchmark}; the table of methods and benchmarks holds the numbers"
        figures.append(Figure(f"recall.{benchmark}", benchmark, says, bottom + 36, "".join(body)))
    return figures


def answers(found: Sequence[Record], methods: Sequence[str]) -> list[Figure]:
    """EM and F1 with their intervals, a figure a benchmark that has them."""
    figures = []
    for benchmark in results.whole(found):
        rows = {method: [r for metric in ("em", "f1") if (r := results.find(found, benchmark, method, metric))] for method in methods}
        if any(rows.values()):
            says = f"EM and F1 with 95 % intervals on {benchmark}; the table of methods and benchmarks holds the numbers"
            figures.append(_dots(f"answers.{benchmark}", benchmark, says, rows, ("EM", "F1"), (0.0, 1.0), ".3f"))
    return figures


def gap_closure(closed: Sequence[Record], methods: Sequence[str]) -> list[Figure]:
    """How much of the way from random to oracle each method goes, in per cent, a figure a benchmark."""
    figures = []
    for benchmark in dict.fromkeys(r["benchmark"] for r in closed):
        rows = {}
        for method in methods:
            mine = {r["metric"]: r for r in closed if (r["benchmark"], r["method"]) == (benchmark, method)}
            if mine:
                rows[method] = [mine[name] for name in ("gap_closure_em", "gap_closure_f1") if name in mine]
        values = [value for row in rows.values() for r in row for value in (r["low"], r["high"])]
        ends = (min(0.0, *values), max(100.0, *values))
        says = f"Gap closure on {benchmark}: random is 0, the oracle 100 per cent; the table below holds the numbers"
        figures.append(_dots(f"gap.{benchmark}", benchmark, says, rows, ("EM", "F1"), ends, ".1f"))
    return figures


def three_sets(found: Sequence[Record], size: int) -> Figure | None:
    """S_0, S_0 reranked by s_i, and INTRA's own set (paper, figure 3), at k = `size` or the smallest k evaluated."""
    ks = sorted({int(r["metric"].rpartition("_")[2]) for r in found if r["metric"].startswith("complete_recall_at_")})
    k = size if size in ks else ks[0]
    kinds = {"maxsim": "S_0", "s0_reranked": "S_0 reranked", "intra": "INTRA"}
    left, right, step, body, y = 104, WIDTH - 50, 19, [], 8.0
    for benchmark in results.whole(found):
        rows = [(name, results.find(found, benchmark, name, f"complete_recall_at_{k}")) for name in kinds]
        if any(r is None for _, r in rows):
            continue
        body.append(_text(0, y + 11, benchmark, "start", "", bold=True))
        y += 18
        for number, (name, r) in enumerate(rows):
            assert r is not None
            width, place = r["value"] * (right - left), (number + 6) % COLOURS if number < 2 else 0
            body.append(_text(left - 8, y + 12, kinds[name], "end"))
            body.append(f'<rect class="f{place}" x="{left}" y="{_n(y + 2)}" width="{_n(max(width, 1))}" height="13" fill-opacity=".75">')
            body.append(f"<title>{escape(f'{kinds[name]} on {benchmark}: {results.interval(r)}')}</title></rect>")
            body.append(_whisker(left + r["low"] * (right - left), left + r["high"] * (right - left), y + 8.5, "ink"))
            body.append(_text(left + r["high"] * (right - left) + 6, y + 12.5, f"{r['value']:.3f}"))
            y += step
        y += 10
    if not body:
        return None
    says = f"Complete-evidence recall at {k} of S_0, of S_0 reranked by INTRA's score, and of INTRA's own set, by benchmark"
    return Figure("three-sets", f"Complete-evidence recall@{k}", says, y, "".join(body))


def weight_map(weights: Sequence[Sequence[float]]) -> Figure:
    """The retriever's weight of each decoder layer (row) and query head (column)."""
    layers, heads = len(weights), len(weights[0])
    largest = max(abs(value) for row in weights for value in row) or 1.0
    left, top, cell, high = 60, 34, min(48.0, (WIDTH - 64) / heads), 22
    body = [_text(left + heads * cell / 2, 12, "query head", "middle", "soft"), _text(0, top - 6, "layer", "start", "soft")]
    body += [_text(left + (head + 0.5) * cell, top - 6, str(head), "middle", "soft") for head in range(heads)]
    for layer, row in enumerate(weights):
        y = top + layer * high
        body.append(_text(left - 10, y + 15, str(layer), "end", "soft"))
        for head, value in enumerate(row):
            share = abs(value) / largest
            x, colour = left + head * cell, 0 if value >= 0 else 1
            body.append(
                f'<rect class="f{colour}" fill-opacity="{share:.3f}" x="{_n(x)}" y="{y}" width="{_n(cell - 2)}" height="{high - 2}">'
            )
            body.append(f"<title>layer {layer}, head {head}: {value:.4g}</title></rect>")
            if heads <= 10:
                shade = "paper" if share > 0.6 else ""
                body.append(_text(x + cell / 2 - 1, y + 15, f"{value / largest:.2f}", "middle", shade))
    foot = top + layers * high + 16
    body.append(_text(0, foot, f"relative to the largest, {largest:.3g}; negative weights are red", "start", "soft"))
    says = f"Weights of {layers} decoder layers and {heads} heads; the table below the figure holds the numbers"
    return Figure("weights", "alpha by layer and head", says, foot + 8, "".join(body))


def cost_and_quality(points: Mapping[str, tuple[float, float]], methods: Sequence[str], quality: str, name: str) -> Figure | None:
    """Quality over seconds a question (logarithmic). points: method -> (seconds, quality in [0, 1])."""
    shown = {method: (max(points[method][0], 1e-6), points[method][1]) for method in methods if method in points}
    if not shown:
        return None
    left, right, top, bottom = 34, WIDTH - 70, 12, 250
    low = math.floor(math.log10(min(x for x, _ in shown.values())))
    high = max(math.ceil(math.log10(max(x for x, _ in shown.values()))), low + 1)

    def place(seconds: float) -> float:
        return left + 10 + (math.log10(seconds) - low) / (high - low) * (right - left - 20)

    body = [_levels(left, right, top, bottom)]
    for power in range(low, high + 1):
        tick = seconds(10.0**power) if power < 2 else f"{10**power} s"  # rather than 1.67 min
        body.append(_text(place(10.0**power), bottom + 16, tick, "middle", "soft"))
        body.append(f'<path class="rule" d="M{_n(place(10.0**power))},{bottom}v4"/>')
    body.append(_text(right, bottom + 31, "time a question, logarithmic", "end", "soft"))
    taken: list[tuple[float, float, float, float]] = []
    dots = [
        (number, method, place(shown[method][0]), bottom - shown[method][1] * (bottom - top))
        for number, method in enumerate(methods)
        if method in shown
    ]
    taken += [(x - 4, y - 4, x + 4, y + 4) for _, _, x, y in dots]
    for number, method, x, y in dots:
        body.append(_marker(number, x, y, f"{method}: {seconds(shown[method][0])} a question, {quality} {shown[method][1]:.3f}"))
        body.append(_label(method, number, x, y, taken))
    says = f"{quality} over the time a question takes, by method; the table below holds the numbers"
    return Figure(name, quality, says, bottom + 36, "".join(body))


def _dots(
    name: str, title: str, says: str, rows: Mapping[str, Sequence[Record]], series: Sequence[str], ends: tuple[float, float], form: str
) -> Figure:
    """A row a method; of each series a mark on its interval."""
    left, right, top, step = 108, WIDTH - 26, 24, 27

    def place(value: float) -> float:
        return left + (value - ends[0]) / (ends[1] - ends[0]) * (right - left)

    bottom = top + step * len(rows)
    body = [
        f'<circle class="f0" cx="{left + 4}" cy="8" r="4"/>' + _text(left + 12, 12, series[0]),
        f'<rect class="paper w1" x="{left + 50}" y="4.5" width="7" height="7" stroke-width="1.8"/>' + _text(left + 62, 12, series[1]),
    ]
    whole = ends[1] > 2
    for value in [0, 25, 50, 75, 100] if whole else [0, 0.25, 0.5, 0.75, 1]:
        body.append(f'<path class="rule" d="M{_n(place(value))},{top}V{bottom}"/>')
        body.append(_text(place(value), bottom + 15, f"{value} %" if whole else f"{value:g}", "middle", "soft"))
    for number, (method, found) in enumerate(rows.items()):
        y = top + step * number + step / 2
        body.append(_text(left - 8, y + 4, method, "end"))
        for mark, r in enumerate(found):
            x, at = place(r["value"]), y - 5 + 10 * mark
            says_it = f"{method}, {series[mark]}: {r['value']:{form}} [{r['low']:{form}}, {r['high']:{form}}]"
            body.append(_whisker(place(r["low"]), place(r["high"]), at, f"line w{mark}"))
            body.append(
                f'<circle class="f0" cx="{_n(x)}" cy="{_n(at)}" r="4"><title>{escape(says_it)}</title></circle>'
                if mark == 0
                else f'<rect class="paper w1" x="{_n(x - 3.5)}" y="{_n(at - 3.5)}" width="7" height="7" stroke-width="1.8">'
                f"<title>{escape(says_it)}</title></rect>"
            )
    return Figure(name, title, says, bottom + 22, "".join(body))


def _levels(left: float, right: float, top: float, bottom: float) -> str:
    """Horizontal rules at quarters of 1."""
    parts = []
    for value in (0, 0.25, 0.5, 0.75, 1):
        y = bottom - value * (bottom - top)
        parts.append(f'<path class="rule" d="M{_n(left)},{_n(y)}H{_n(right)}"/>' + _text(left - 5, y + 4, f"{value:g}", "end", "soft"))
    return "".join(parts)


def _marker(number: int, x: float, y: float, says: str) -> str:
    """Circle, square, triangle or diamond, by the method's number."""
    title = f"<title>{escape(says)}</title>"
    shapes = ("M-4,0a4,4 0 1,0 8,0a4,4 0 1,0 -8,0", "M-3.5,-3.5h7v7h-7z", "M0,-4.5L4.2,3.5H-4.2z", "M0,-5L5,0L0,5L-5,0z")
    return f'<path class="f{number}" transform="translate({_n(x)},{_n(y)})" d="{shapes[number % 4]}">{title}</path>'


def _whisker(low: float, high: float, y: float, kind: str) -> str:
    return (
        f'<path class="{kind}" stroke="currentColor" d="M{_n(low)},{_n(y)}H{_n(high)}M{_n(low)},{_n(y - 3)}v6M{_n(high)},{_n(y - 3)}v6"/>'
    )


def _label(text: str, number: int, x: float, y: float, taken: list[tuple[float, float, float, float]]) -> str:
    """The text beside a point, where it covers nothing that stands already, if there is such a place."""
    width, places = 6.6 * len(text), []
    for shift in (0, -13, 13, -26, 26, -39, 39, -52, 52):
        places += [(x + 8, y + shift, "start"), (x - 8, y + shift, "end")]

    def box(place: tuple[float, float, str]) -> tuple[float, float, float, float]:
        start = place[0] if place[2] == "start" else place[0] - width
        return start, place[1] - 6, start + width, place[1] + 6

    def covers(one: tuple[float, float, float, float]) -> int:
        hit = sum(one[0] < other[2] and other[0] < one[2] and one[1] < other[3] and other[1] < one[3] for other in taken)
        return hit + 10 * (one[0] < 0 or one[2] > WIDTH or one[1] < 0)

    best = min(places, key=lambda place: (covers(box(place)), abs(place[1] - y)))
    taken.append(box(best))
    return _text(best[0], best[1] + 4, text, best[2], f"f{number}")


def _apart(values: Sequence[float], gap: float, low: float, high: float) -> list[float]:
    """Ascending values moved apart to at least `gap`, within low and high where they have room, near where they were."""
    placed: list[float] = []
    for value in values:
        placed.append(max(value, low, placed[-1] + gap if placed else low))
    limit = max(high, low + gap * (len(placed) - 1))
    for n in reversed(range(len(placed))):
        placed[n] = min(placed[n], limit)
        limit = placed[n] - gap
    return placed


def _text(x: float, y: float, text: str, anchor: str = "start", kind: str = "", bold: bool = False) -> str:
    attributes = (f' text-anchor="{anchor}"' if anchor != "start" else "") + (f' class="{kind}"' if kind else "")
    weight = ' font-weight="600"' if bold else ""
    return f'<text x="{_n(x)}" y="{_n(y)}"{attributes}{weight}>{escape(text)}</text>'


def seconds(value: float) -> str:
    """In the unit that suits it."""
    for size, unit in ((3600.0, "h"), (60.0, "min"), (1.0, "s"), (1e-3, "ms"), (1e-6, "µs")):
        if value >= size * 0.9995:
            return f"{value / size:.3g} {unit}"
    return f"{value / 1e-6:.2g} µs"


def _n(value: float) -> str:
    return f"{value:.1f}".rstrip("0").rstrip(".")
