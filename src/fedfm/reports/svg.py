"""Our own pictures: small SVG from numbers. Colours and fonts come from the page's style sheet, so they follow its theme."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from markupsafe import Markup, escape

from fedfm.core import words

Point = tuple[float, float | None]


@dataclass(frozen=True)
class Line:
    """A curve.

    Args:
        label: Written at its end.
        style: The CSS class that colours it.
        points: ``(x, y)`` in order of x; ``None`` is a gap.
    """

    label: str
    style: str
    points: Sequence[Point]


def ticks(low: float, high: float, at_most: int = 6) -> list[float]:
    """Round numbers (1, 2, 5 times a power of ten) within ``[low, high]``.

    Example:
        >>> ticks(0.0, 1.0, 6)
        [0.0, 0.2, 0.4, 0.6, 0.8, 1.0]
    """
    span = high - low
    if not (span > 0 and math.isfinite(span)):
        return [low]
    power = 10.0 ** math.floor(math.log10(span / at_most))
    step = next((m * power for m in (1, 2, 5, 10, 20) if span / (m * power) <= at_most), 10 * power)
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [round(i * step, 12) + 0.0 for i in range(first, last + 1)] or [low]


def chart(
    lines: Sequence[Line],
    band: Sequence[tuple[float, float, float]] = (),
    levels: Sequence[Line] = (),
    describe: str = "",
    width: int = 720,
    height: int = 340,
    margin: int = 132,
) -> Markup:
    """Curves over rounds, each labelled at its end.

    Args:
        band: ``(x, low, high)``: the shaded range.
        levels: Horizontal lines to compare with, one point each (its x is ignored).
        describe: What a reader who cannot see it is told.
        margin: Room for the labels at the right.
    """
    xs = [x for line in lines for x, _ in line.points] + [x for x, _, _ in band]
    ys = [y for line in (*lines, *levels) for _, y in line.points if y is not None] + [y for _, low, high in band for y in (low, high)]
    if not xs or not ys:
        return Markup("")
    left, top, bottom = 46, 12, 42
    px = _scale(min(xs), max(xs), left + 4, width - margin)
    y_low, y_high = _padded(min(ys), max(ys))
    py = _scale(y_low, y_high, height - bottom, top)
    body: list[Markup] = []
    for y in ticks(y_low, y_high):
        body.append(_tag("line", "grid", x1=left, x2=width - margin, y1=py(y), y2=py(y)))
        body.append(_text(left - 8, py(y) + 4, f"{y:g}", "tick end"))
    body += [_text(px(x), height - bottom + 18, f"{x:g}", "tick middle") for x in ticks(min(xs), max(xs), 8) if x == int(x)]
    body.append(_text((left + width - margin) / 2, height - 2, "round", "tick middle"))
    if band:
        edge = [(px(x), py(high)) for x, _, high in band] + [(px(x), py(low)) for x, low, _ in reversed(band)]
        body.append(Markup('<polygon class="band" points="{}"/>').format(" ".join(f"{x:.1f},{y:.1f}" for x, y in edge)))
    for level in levels:
        y = py(level.points[0][1] or 0.0)
        body.append(_tag("line", f"level {level.style}", x1=left, x2=width - margin, y1=y, y2=y))
    for line in lines:
        body.append(_path(line, px, py))
        body.extend(_dots(line, px, py, dots=len(line.points) <= 30))
    body.extend(_labels([*lines, *levels], px, py, width - margin + 8, top, height - bottom))
    return _svg(body, width, height, "chart", describe)


def spark(points: Sequence[Point], low: float, high: float, style: str, width: int = 132, height: int = 54) -> Markup:
    """A curve without axes; ``low`` and ``high`` are shared by the curves it stands among."""
    xs = [x for x, _ in points]
    if not xs or all(y is None for _, y in points):
        return Markup('<svg class="spark" viewBox="0 0 {} {}"></svg>').format(width, height)
    low, high = _padded(low, high)
    px, py = _scale(min(xs), max(xs), 4, width - 5), _scale(low, high, height - 4, 4)
    line = Line("", style, points)
    last = next((x, y) for x, y in reversed(points) if y is not None)
    end = _tag("circle", style, cx=px(last[0]), cy=py(last[1] or 0.0), r=2.6)
    return _svg([_path(line, px, py), end], width, height, "spark", "")


def markers(values: Sequence[tuple[str, float | None]], low: float, high: float, width: int = 220, height: int = 18) -> Markup:
    """Values as marks on a common scale; ``values`` pairs a CSS class with each."""
    seen = [(style, value) for style, value in values if value is not None]
    px = _scale(*_padded(low, high), 6, width - 6)
    body = [_tag("line", "grid", x1=2, x2=width - 2, y1=height / 2, y2=height / 2)]
    if seen:
        ends = [px(value) for _, value in seen]
        body.append(_tag("line", "range", x1=min(ends), x2=max(ends), y1=height / 2, y2=height / 2))
    body += [_tag("circle", style, cx=px(value), cy=height / 2, r=4.2) for style, value in seen]
    return _svg(body, width, height, "markers", "")


def area(values: Sequence[float], describe: str, width: int = 1060, height: int = 150) -> Markup:
    """Values from the largest to the smallest as one filled step curve."""
    top = max(values, default=0.0)
    if top <= 0:
        return Markup("")
    ordered = sorted(values, reverse=True)
    px, py = _scale(0, len(ordered), 4, width - 4), _scale(0, top, height - 22, 4)
    steps = [f"{px(i + side):.1f},{py(value):.1f}" for i, value in enumerate(ordered) for side in (0, 1)]
    shape = Markup('<polygon class="fill" points="{} {} {}"/>').format(
        f"{px(0):.1f},{py(0):.1f}", " ".join(steps), f"{px(len(ordered)):.1f},{py(0):.1f}"
    )
    notes = [_text(4, height - 3, "largest owner", "tick"), _text(width - 4, height - 3, f"smallest of {len(ordered)}", "tick end")]
    return _svg([shape, *notes], width, height, "chart", describe)


def _scale(low: float, high: float, start: float, end: float) -> Callable[[float], float]:
    # A single value sits in the middle. Dividing first keeps a span as large as the floats from overflowing.
    if high <= low:
        return lambda value: (start + end) / 2
    span = high / 2 - low / 2
    return lambda value: start + (value / 2 - low / 2) / span * (end - start)


def _padded(low: float, high: float) -> tuple[float, float]:
    pad = 0.06 * (high - low) if high > low else max(abs(high) * 0.1, 1e-6)
    low, high = (low - pad if low < 0 or low > pad else 0.0), high + pad
    return (low, high) if math.isfinite(high - low) else (low / 4, high / 4) if math.isfinite(low + high) else (-1e300, 1e300)


def _path(line: Line, px: Callable[[float], float], py: Callable[[float], float]) -> Markup:
    pen, parts = "M", []
    for x, y in line.points:
        if y is None:
            pen = "M"
        else:
            parts.append(f"{pen}{px(x):.1f} {py(y):.1f}")
            pen = "L"
    return Markup('<path class="curve {}" d="{}"/>').format(line.style, " ".join(parts))


def _dots(line: Line, px: Callable[[float], float], py: Callable[[float], float], dots: bool) -> Iterable[Markup]:
    for x, y in line.points:
        if y is not None:
            title = f"{line.label}, round {x:g}: {words.loss(y)}"
            if dots:
                yield _tag("circle", f"dot {line.style}", cx=px(x), cy=py(y), r=2.6)
            yield Markup('<circle class="touch" cx="{:.1f}" cy="{:.1f}" r="9"><title>{}</title></circle>').format(px(x), py(y), title)


def _labels(
    lines: Sequence[Line], px: Callable[[float], float], py: Callable[[float], float], x: float, top: float, bottom: float
) -> Iterable[Markup]:
    """Labels at the curves' ends, moved apart where they would overlap."""
    found = ((line, next((y for _, y in reversed(line.points) if y is not None), None)) for line in lines)
    ends = sorted(((line, y) for line, y in found if y is not None), key=lambda end: py(end[1]))
    places: list[float] = []
    for _, value in ends:
        places.append(max([py(value), *(place + 16 for place in places[-1:])]))
    for i in reversed(range(len(places))):
        places[i] = min(places[i], places[i + 1] - 16 if i + 1 < len(places) else bottom)
    for (line, value), y in zip(ends, places, strict=True):
        yield Markup('<text class="label {}" x="{:.1f}" y="{:.1f}">{} <tspan class="value">{}</tspan></text>').format(
            line.style, x, max(y, top) + 4, line.label, words.loss(value)
        )


def _tag(name: str, style: str, **numbers: float) -> Markup:
    attributes = Markup(" ").join(Markup('{}="{:.1f}"').format(key, value) for key, value in numbers.items())
    return Markup('<{} class="{}" {}/>').format(name, style, attributes)


def _text(x: float, y: float, text: str, style: str) -> Markup:
    return Markup('<text class="{}" x="{:.1f}" y="{:.1f}">{}</text>').format(style, x, y, text)


def _svg(body: Iterable[Markup], width: float, height: float, style: str, describe: str) -> Markup:
    told = Markup('role="img" aria-label="{}"').format(describe) if describe else Markup('aria-hidden="true"')
    return Markup('<svg class="{}" viewBox="0 0 {} {}" {}>{}</svg>').format(style, width, height, told, Markup("").join(map(escape, body)))
