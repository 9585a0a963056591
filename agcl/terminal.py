"""What commands print alike."""

from collections.abc import Iterable

from rich.table import Table
from rich.text import Text


def facts_table(rows: Iterable[tuple[str, str | Text]]) -> Table:
    """Names and what they stand for, below each other; long texts are folded."""
    table = Table.grid(padding=(0, 2))
    table.add_column(style="dim", no_wrap=True)
    table.add_column(overflow="fold")
    for name, value in rows:
        table.add_row(name, Text(value) if isinstance(value, str) else value)
    return table
