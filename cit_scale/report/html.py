"""The template engine of the pages, and how names, numbers and dates stand in them.

Everything that comes from data or from a run folder is escaped. The pages hold no script, and their policy lets a
browser load nothing and run nothing, whatever a name contains.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup

from cit_scale.datasets.index import printable
from cit_scale.report.measures import Share
from cit_scale.run.folders import as_dict, dig, is_number
from cit_scale.run.show import as_date, as_figure

PAGE_SUFFIXES = (".html", ".htm")  # with one of which a page's file ends

LONG_NAME = 60  # characters of a name that are shown


def render_page(template: str, **values: Any) -> str:
    """A page as ASCII: other characters stand as their numbers, so that it is the same in every encoding of files."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent / "templates"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {
        "name": shown_name,
        "text": shown_text,
        "lines": lambda text: "\n".join(map(printable, text.splitlines())),
        "dict": as_dict,
        "job": lambda slurm: dig(slurm, "job_id") or "",
        "percent": percent,
        "share": share_text,
        "figure": as_figure,
        "date": as_date,
        "fixed": fixed,
    }
    text = environment.get_template(template).render(**values)
    return text.encode("ascii", "xmlcharrefreplace").decode()


def shown_text(text: object, most: int = LONG_NAME) -> str:
    """A name from data in one line: control characters escaped, the middle of a long one left out."""
    try:
        line = printable(text)
    except UnicodeEncodeError:  # half of a pair of surrogates, as JSON can hold it
        line = printable(str(text).encode("utf-8", "surrogatepass"))
    return line if len(line) <= most else f"{line[: most // 2]}\N{HORIZONTAL ELLIPSIS}{line[1 - most // 2 :]}"


def shown_name(text: object, most: int = LONG_NAME) -> Markup:
    """As ``shown_text``, isolated: a name in another direction of writing does not turn what stands beside it."""
    line = shown_text(text, most)
    return Markup("<bdi>{}</bdi>").format(line if line.strip() else "(no name)")


def fixed(value: Any, digits: int = 2) -> str:
    """A number; a dash for what is none."""
    return f"{value:.{digits}f}" if is_number(value) else "\N{EN DASH}"


def percent(value: Any, digits: int = 2) -> str:
    """A share from 0 to 1 in percent."""
    return fixed(100 * value if is_number(value) else None, digits)


def share_text(share: Share) -> Markup:
    """A share in percent, with its interval."""
    if not share.count:
        return Markup("\N{EN DASH}")
    low, high = share.interval
    return Markup('{} <span class="quiet">[{}, {}]</span>').format(
        percent(share.value), percent(low, 1), percent(high, 1)
    )
