"""What a measurement gives: the values of its JSON file, with attributes, as a table and shown by notebooks."""

from __future__ import annotations

import json
from html import escape
from typing import TYPE_CHECKING, Any

from latentprior.utils.errors import InputError, unknown
from latentprior.utils.formatting import number

if TYPE_CHECKING:
    from pandas import DataFrame

SHOWN_ROWS = 20  # of a table in a notebook


class Result(dict[str, Any]):
    """The dictionary that is written as JSON, with its values as attributes: ``result.heldout_loss.mean``.

    Dictionaries inside are results as well. A key that is a method of `dict`, such as "items", is reached by index.
    `table` is the dotted name of the list of rows that `to_pandas` gives and notebooks show; the first one by default.

    Examples:
        >>> result = lp.Result({"loss": 1.25, "rows": [{"t": 0.1, "error": {"mean": 2.0}}]})
        >>> result.loss, result["loss"], result.rows[0].error.mean
        (1.25, 1.25, 2.0)
        >>> list(result.to_pandas().columns)
        ['t', 'error.mean']
    """

    def __init__(self, values: dict[str, Any], table: str | None = None) -> None:
        super().__init__({key: _wrapped(value) for key, value in values.items()})
        object.__setattr__(self, "_table", table)

    def __getattr__(self, name: str) -> Any:
        try:
            return self[name]
        except KeyError:
            raise AttributeError(f"no {name!r} in this result: it has {', '.join(map(str, self))}") from None

    def __dir__(self) -> list[str]:
        return [*super().__dir__(), *map(str, self)]

    def __repr__(self) -> str:
        return f"Result({', '.join(f'{key}={_short(value)}' for key, value in self.items())})"

    def to_dict(self) -> dict[str, Any]:
        """Plain dictionaries and lists, as in the JSON file."""
        return json.loads(json.dumps(self))

    def tables(self) -> list[str]:
        """Dotted names of the lists of rows in this result, such as "summary.directions.methods.points"."""
        return list(_tables(self))

    def to_pandas(self, table: str | None = None) -> DataFrame:
        """One of `tables`, by default the main one or else all values as one row, with dotted names of nested values.

        Rows of a list inside another list's rows have the outer row's values in columns beside their own.
        """
        try:
            import pandas
        except ImportError as error:
            raise InputError("to_pandas needs pandas: pip install pandas") from error
        return pandas.DataFrame([_flat(row) for row in self._rows(table)])

    def _rows(self, table: str | None) -> list[dict[str, Any]]:
        tables = _tables(self)
        wanted = table or self._table or next(iter(tables), None)
        if wanted is None or table is None and wanted not in tables:
            return [self]
        if wanted not in tables:
            raise unknown("table", wanted, tables)
        return tables[wanted]

    def _repr_html_(self) -> str:
        single = {key: value for key, value in _flat(self).items() if not isinstance(value, list)}
        facts = "".join(f"<tr><th>{escape(key)}</th><td>{_cell(value)}</td></tr>" for key, value in single.items())
        parts = [f"<details><summary>{escape(repr(self))}</summary><table>{facts}</table></details>"]
        if _tables(self):
            rows = [_flat(row) for row in self._rows(None)]
            columns = list(dict.fromkeys(key for row in rows for key in row))
            head = "".join(f"<th>{escape(column)}</th>" for column in columns)
            cells = [[f"<td>{_cell(row.get(column))}</td>" for column in columns] for row in rows[:SHOWN_ROWS]]
            body = "".join(f"<tr>{''.join(row)}</tr>" for row in cells)
            more = f"<p>{len(rows) - SHOWN_ROWS} rows more: to_pandas()</p>" if len(rows) > SHOWN_ROWS else ""
            parts.append(f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>{more}")
        return "".join(parts)


def _wrapped(value: Any) -> Any:
    if isinstance(value, dict):
        return Result(value)
    return [_wrapped(item) for item in value] if isinstance(value, list) else value


def _tables(values: dict[str, Any]) -> dict[str, list[dict[str, Any]]]:
    """All lists of dictionaries by dotted name; rows of a list inside a row have the outer row's single values, too."""
    tables: dict[str, list[dict[str, Any]]] = {}

    def add(values: dict[str, Any], above: str, outer: dict[str, Any]) -> None:
        for key, value in values.items():
            if isinstance(value, dict):
                add(value, f"{above}{key}.", outer)
            elif isinstance(value, list) and value and all(isinstance(row, dict) for row in value):
                tables.setdefault(f"{above}{key}", []).extend(outer | row for row in value)
                for row in value:
                    single = {name: item for name, item in row.items() if not isinstance(item, (dict, list))}
                    add(row, f"{above}{key}.", outer | single)

    add(values, "", {})
    return tables


def _flat(row: dict[str, Any], above: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in row.items():
        flat |= _flat(value, f"{above}{key}.") if isinstance(value, dict) else {f"{above}{key}": value}
    return flat


def _short(value: Any) -> str:
    if isinstance(value, dict):
        return "{...}"
    return f"[{len(value)} items]" if isinstance(value, list) else repr(value)


def _cell(value: Any) -> str:
    if value is None or isinstance(value, float):
        return number(value)
    return escape(str(value))
