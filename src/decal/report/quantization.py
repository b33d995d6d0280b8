"""The report of a quantisation: its facts as plain data, and a picture of levels and errors as SVG."""

from __future__ import annotations

from dataclasses import asdict
from html import escape
from typing import Any

WIDTH, BAR, GAP, LEFT = 760, 14, 4, 230
INK, FILL, LINE = "#1f2933", "#3b7ea1", "#d9dee3"


def facts(result: Any) -> dict[str, Any]:
    """Return the measurements as JSON takes them."""
    values = asdict(result)
    values["path"] = None if result.path is None else str(result.path)
    return {**values, "error": result.error}


def picture(result: Any) -> str:
    """Return one SVG: the share of each level over all layers, and each layer's error, the largest first."""
    layers = sorted(result.layers, key=lambda layer: -layer.error)
    shares = _mean_levels(result)
    top = 250 if shares else 60
    height = top + (BAR + GAP) * len(layers) + 30
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{WIDTH}" height="{height}" font-family="sans-serif" '
        f'font-size="12" fill="{INK}">',
        f'<rect width="{WIDTH}" height="{height}" fill="white"/>',
        _text(20, 24, f"{result.format}: {result.bits:.3f} bits per weight, error {100 * result.error:.2f}%", size=15),
    ]
    if shares:
        parts.append(_text(20, 48, "Share of each of the 16 levels, from the lowest to the highest"))
        parts += _columns(shares, y=60, height=130)
    parts.append(_text(20, top - 12, "Error of each layer: ||W - decoded|| / ||W||"))
    largest = max(layer.error for layer in layers) or 1.0
    for i, layer in enumerate(layers):
        y = top + (BAR + GAP) * i
        length = (WIDTH - LEFT - 90) * layer.error / largest
        parts.append(_text(LEFT - 8, y + 11, _short(layer.name), anchor="end"))
        parts.append(f'<rect x="{LEFT}" y="{y}" width="{length:.1f}" height="{BAR}" fill="{FILL}"/>')
        parts.append(_text(LEFT + length + 6, y + 11, f"{100 * layer.error:.2f}%"))
    return "\n".join([*parts, "</svg>\n"])


def _mean_levels(result: Any) -> list[float]:
    layers = [layer for layer in result.layers if layer.levels]
    weights = sum(layer.weights for layer in layers)
    return [sum(layer.levels[i] * layer.weights for layer in layers) / weights for i in range(16)] if layers else []


def _columns(shares: list[float], *, y: int, height: int) -> list[str]:
    step, largest, parts = (WIDTH - 40) / 16, max(shares), []
    for i, share in enumerate(shares):
        tall = height * share / largest
        x = 20 + step * i
        parts.append(
            f'<rect x="{x:.1f}" y="{y + height - tall:.1f}" width="{step - 6:.1f}" height="{tall:.1f}" fill="{FILL}"/>'
        )
        parts.append(_text(x + (step - 6) / 2, y + height + 15, f"{100 * share:.1f}%", anchor="middle", size=10))
    parts.append(f'<line x1="20" x2="{WIDTH - 20}" y1="{y + height}" y2="{y + height}" stroke="{LINE}"/>')
    return parts


def _text(x: float, y: float, text: str, *, anchor: str = "start", size: int = 12) -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" font-size="{size}">{escape(text)}</text>'


def _short(name: str) -> str:
    return name if len(name) <= 34 else "..." + name[-31:]
