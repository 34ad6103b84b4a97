"""A report of sections: one HTML file that holds its pictures, and the tables beside it as CSV."""

import base64
import csv
import dataclasses
import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from blackmamba.errors import ConfigError
from blackmamba.files import write_text


@dataclasses.dataclass(frozen=True)
class Table:
    """Rows of text under a head."""

    name: str
    """Of its CSV file, without the ending."""
    head: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]


@dataclasses.dataclass(frozen=True)
class Section:
    """One claim of the paper and what was found."""

    key: str
    title: str
    claim: str
    """The paper's, in our words, and where it is known from."""
    finding: str
    """What our numbers say."""
    tables: tuple[Table, ...] = ()
    pictures: tuple[tuple[str, Path], ...] = ()
    """What each shows, and its PNG file."""
    numbers: tuple[Table, ...] = ()
    """What pictures are drawn from and no table of the page has: CSV files alone."""


def write_report(
    folder: Path, title: str, facts: Sequence[tuple[str, str]], sections: Sequence[Section]
) -> Path:
    """Write FOLDER/report.html, and tables and numbers as FOLDER/NAME.csv; the path of the first.

    Args:
        folder: is there.
        title: of the page.
        facts: about machine and run, shown at its head.
        sections: in order; their pictures become part of the page.
    Raises:
        ConfigError: jinja2 is not installed.
    """
    try:
        import jinja2
    except ImportError:
        raise ConfigError(
            "a report: jinja2 is not installed; pip install 'blackmamba[report]'"
        ) from None
    for table in (t for section in sections for t in (*section.tables, *section.numbers)):
        text = io.StringIO()
        csv.writer(text).writerows([table.head, *table.rows])
        write_text(folder / f"{table.name}.csv", text.getvalue())
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("blackmamba.analyse", ""),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    page: Any = environment.get_template("report.html")
    path = folder / "report.html"
    write_text(path, page.render(title=title, facts=facts, sections=sections, embedded=_embedded))
    return path


def _embedded(picture: Path) -> str:
    return "data:image/png;base64," + base64.b64encode(picture.read_bytes()).decode()
