"""Attributes of the images of a folder, from a table that lies in it."""

import csv
import io

from etils import epath

from vqbeam.configs import VqbeamError

FILE = "attributes.csv"


def read_attributes(file: epath.Path) -> tuple[tuple[str, ...], dict[str, tuple[int, ...]]]:
    """Reads a table whose first column is the path of an image below the folder of the file.

    Each other column is an attribute, with 1 for the images that have it and 0 for the others. Rows
    of images that are not in the folder do no harm.

    Returns:
        The names of the attributes, and for each path the values.

    Raises:
        VqbeamError: The table has no attribute, one without a name or twice, or another value.
    """
    try:
        text = file.read_bytes().decode("utf-8-sig")  # spreadsheets write a byte-order mark
        rows = csv.reader(io.StringIO(text, newline=""))
        _, *names = next(rows, [""])
        lines = {row[0]: _values(file, rows.line_num, row, names) for row in rows if row}
    except (UnicodeDecodeError, csv.Error) as error:
        raise VqbeamError(f"{file} is not a CSV table in UTF-8 ({error}); save it anew") from error
    if not names:
        raise VqbeamError(f"{file} has no attribute; give each a column, behind that of the path")
    wrong = [name for name in names if not name or "," in name or names.count(name) > 1]
    if wrong:
        raise VqbeamError(
            f"{file} has an attribute {wrong[0]!r}; give each a name of its own without a comma"
        )
    return tuple(names), lines


def _values(file, line: int, row: list[str], names: list[str]) -> tuple[int, ...]:
    values = [value.strip() for value in row[1:]]
    if len(values) != len(names) or not set(values) <= {"0", "1"}:
        raise VqbeamError(
            f"{file}, line {line}: {','.join(values)!r}; give 0 or 1 for each of the "
            f"{len(names)} attributes"
        )
    return tuple(map(int, values))
