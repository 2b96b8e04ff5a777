"""Reports as a page: what a picture's report says, as a short caption and as a table with meters."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

from facegen.report import Likeness, Report


def caption(report: Report) -> str:
    """A few words under a picture."""
    parts = [f"likeness {report.likeness.cosine:.2f}"] if report.likeness else []
    if report.obedience and report.obedience.asked:
        parts.append(f"prompt {len(report.obedience.hit)}/{len(report.obedience.asked)}")
    if report.provenance and report.provenance.seed is not None:
        parts.append(f"seed {report.provenance.seed}")
    return " · ".join(parts)


def table(reports: Sequence[Report]) -> str:
    """One row per picture, as HTML."""
    if not reports:
        return ""
    measured = any(report.measures or report.people for report in reports)
    rows = "".join(_row(place, report, measured) for place, report in enumerate(reports, 1))
    more = "<th>measured</th>" if measured else ""
    head = f"<tr><th></th><th>same person?</th><th>faces</th><th>prompt</th>{more}<th>seed</th><th>seconds</th></tr>"
    return f'<table class="reports">{head}{rows}</table>{_notes(reports)}'


def progress(fraction: float, words: str) -> str:
    """A bar with words over it."""
    return (
        f'<div class="progress" role="progressbar" aria-valuenow="{round(100 * fraction)}">'
        f'<div style="width:{100 * fraction:.1f}%"></div><span>{escape(words)}</span></div>'
    )


def _row(place: int, report: Report, measured: bool) -> str:
    seed = report.provenance.seed if report.provenance else None
    cells = [
        str(place),
        _likeness(report),
        "–" if report.faces is None else str(report.faces),
        _prompt(report),
        *([_measures(report)] if measured else []),
        "–" if seed is None else str(seed),
        "–" if report.seconds is None else f"{report.seconds:.1f}",
    ]
    return f"<tr>{''.join(f'<td>{cell}</td>' for cell in cells)}</tr>"


def _measures(report: Report) -> str:
    """What the task measured itself, and each of several people."""
    told = [f"person {place}: {one}" for place, one in enumerate(report.people, 1)]
    told += [f"{what}: {value:.4g}" for what, value in report.measures.items()]
    return "<br>".join(map(escape, told)) or "–"


def _likeness(report: Report) -> str:
    if report.likeness is None:
        return f'<span class="muted">{escape(report.not_judged.get("likeness", "no photo was given"))}</span>'
    likeness = report.likeness
    word = {True: "yes", False: "no", None: ""}[likeness.same]
    return f'<span class="{word or "muted"}">{word} {likeness.cosine:.2f}</span>{meter(likeness)}'


def meter(likeness: Likeness) -> str:
    """Where a likeness lies between strangers and photos of one person; a mark stands at the threshold."""
    if likeness.floor is None or likeness.ceiling is None or likeness.ceiling <= likeness.floor:
        return ""
    span = likeness.ceiling - likeness.floor
    filled = _within((likeness.cosine - likeness.floor) / span)
    mark = ""
    if likeness.threshold is not None:
        mark = f'<i style="left:{100 * _within((likeness.threshold - likeness.floor) / span):.0f}%"></i>'
    tip = f"strangers {likeness.floor:.2f}, photos of one person {likeness.ceiling:.2f}"
    return f'<span class="meter" title="{tip}"><b style="width:{100 * filled:.0f}%"></b>{mark}</span>'


def _within(share: float) -> float:
    return min(max(share, 0.0), 1.0)


def _prompt(report: Report) -> str:
    obedience = report.obedience
    if obedience is None:
        return f'<span class="muted">{escape(report.not_judged.get("prompt", "–"))}</span>'
    if not obedience.asked:
        return '<span class="muted">nothing to judge</span>'
    hits = "".join(f'<span class="tag yes">{escape(one)}</span>' for one in obedience.hit)
    return hits + "".join(f'<span class="tag no">{escape(one)}</span>' for one in obedience.missed)


def _notes(reports: Sequence[Report]) -> str:
    first = next((report.likeness for report in reports if report.likeness), None)
    notes = []
    if first is not None:
        notes.append(f"Likeness is the cosine given by {first.judge}, which took no part in making the pictures.")
        if first.floor is not None and first.ceiling is not None:
            notes.append(f"To it, strangers are {first.floor:.2f} and photos of one person {first.ceiling:.2f}.")
    licence = next((report.provenance.licence for report in reports if report.provenance), "")
    notes += [f"Licence of the weights: {licence}."] if licence else []
    return f'<p class="muted">{escape(" ".join(notes))}</p>' if notes else ""
