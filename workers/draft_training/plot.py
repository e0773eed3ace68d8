"""Draws a training run as an SVG: loss and accept length over steps. Plain text, no library."""

from collections.abc import Sequence
from pathlib import Path

_WIDTH, _HEIGHT, _MARGIN, _GAP = 760, 520, 64, 56
_Point = tuple[float, float]


def write_plot(
    file: Path, title: str, losses: Sequence[_Point], accept_lengths: Sequence[_Point], num_drafts: int
) -> None:
    """Write two charts, one above the other, of (step, value) points."""
    chart_height = (_HEIGHT - 2 * _MARGIN - _GAP) / 2
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {_HEIGHT}" font-family="sans-serif"'
        ' font-size="13">',
        f'<rect width="{_WIDTH}" height="{_HEIGHT}" fill="#ffffff"/>',
        f'<text x="{_MARGIN}" y="30" font-size="16" fill="#1b2733">{_escaped(title)}</text>',
        _chart("loss, simulated drafting", losses, _MARGIN, chart_height, "#9a3b3b"),
        _chart(
            f"accept length on held-out prompts, chains of {num_drafts} drafts, bonus token counted",
            accept_lengths,
            _MARGIN + chart_height + _GAP,
            chart_height,
            "#1f6f8b",
        ),
        f'<text x="{_WIDTH / 2}" y="{_HEIGHT - 14}" text-anchor="middle" fill="#50606e">step</text>',
        "</svg>",
    ]
    file.write_text("\n".join(parts) + "\n")


def _chart(label: str, points: Sequence[_Point], top: float, height: float, colour: str) -> str:
    bottom, right = top + height, _WIDTH - _MARGIN / 2
    lines = [
        f'<text x="{_MARGIN}" y="{top - 8:.1f}" fill="#1b2733">{_escaped(label)}</text>',
        f'<path d="M{_MARGIN} {top:.1f}V{bottom:.1f}H{right}" fill="none" stroke="#50606e"/>',
    ]
    if not points:
        return "\n".join(lines)
    low, high = min(y for _, y in points), max(y for _, y in points)
    low, high = (low, high) if high > low else (low - 0.5, high + 0.5)
    last = max(*(x for x, _ in points), 1.0)

    def place(x: float, y: float) -> str:
        across = _MARGIN + x / last * (right - _MARGIN)
        return f"{across:.1f} {bottom - (y - low) / (high - low) * height:.1f}"

    for share in (0.0, 0.5, 1.0):
        value, y = low + share * (high - low), bottom - share * height
        lines.append(f'<path d="M{_MARGIN} {y:.1f}H{right}" stroke="#dde4ea"/>')
        lines.append(
            f'<text x="{_MARGIN - 8}" y="{y + 4:.1f}" text-anchor="end" fill="#50606e">{value:.2f}</text>'
        )
        lines.append(
            f'<text x="{_MARGIN + share * (right - _MARGIN):.1f}" y="{bottom + 18:.1f}" text-anchor="middle"'
            f' fill="#50606e">{share * last:.0f}</text>'
        )
    path = "L".join(place(x, y) for x, y in points)
    lines.append(f'<path d="M{path}" fill="none" stroke="{colour}" stroke-width="2"/>')
    lines.append(
        f'<text x="{right}" y="{top - 8:.1f}" text-anchor="end" fill="{colour}">{points[-1][1]:.2f}</text>'
    )
    return "\n".join(lines)


def _escaped(text: str) -> str:
    return text.replace("&", "&amp;").replace("<", "&lt;")
