"The small pieces of HTML that the views are made of, and data as addresses."

import base64
import csv
import html
import io
from pathlib import Path

STATIC = Path(__file__).resolve().parent / "static"


def read_static(name: str) -> str:
    "The text of a file in static/."
    return (STATIC / name).read_text(encoding="utf-8")


def escape(value) -> str:
    "A value as text that is safe in HTML."
    return html.escape(str(value))


def bold(value) -> str:
    "A value that stands out."
    return f"<b>{escape(value)}</b>"


def code_html(value) -> str:
    "A value in the type of code."
    return f"<code>{escape(value)}</code>"


def caption_html(text: str, status: bool = False) -> str:
    "A line of HTML below a figure; a status is read aloud when it changes."
    role = " role='status'" if status else ""
    return f"<p class='caption'{role}>{text}</p>"


def heading_html(text: str) -> str:
    "The name of a group of things."
    return f"<h2 class='group-name'>{escape(text)}</h2>"


def figures_html(pairs: list) -> str:
    "Figures with small-caps names above them."
    rows = [f"<div><dt>{escape(k)}</dt><dd>{escape(v)}</dd></div>" for k, v in pairs]
    return f"<dl class='numbers'>{''.join(rows)}</dl>"


def format_cell(value) -> str:
    "A value as the text of a table's cell."
    if value is None:
        return ""
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def column_names(rows: list) -> list:
    "The keys of dicts, in the order in which they come up."
    names = {}
    for row in rows:
        names |= dict.fromkeys(row)
    return list(names)


def table_html(rows: list, caption: str, columns: list = None) -> str:
    "Dicts as an HTML table, of all their keys or these."
    columns = columns or column_names(rows)
    head = "".join(f"<th scope='col'>{escape(column)}</th>" for column in columns)
    body = ""
    for row in rows:
        cells = "".join(f"<td>{escape(format_cell(row.get(column)))}</td>" for column in columns)
        body += f"<tr>{cells}</tr>"
    return (
        f"<div class='scroll' tabindex='0' role='group' aria-label='{escape(caption)}'>"
        f"<table class='plain'><caption>{escape(caption)}</caption>"
        f"<thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>"
    )


def details_html(name: str, inside: str) -> str:
    "A table alternative that stays out of the way until it is wanted."
    return f"<details class='folded'><summary>{escape(name)}</summary>{inside}</details>"


def count_noun(count: int, noun: str) -> str:
    "A count with its noun: 1 run, 2,000 runs."
    return f"{count:,} {noun}" if count == 1 else f"{count:,} {noun}s"


def csv_url(rows: list) -> str:
    "Dicts as the address of a CSV file."
    out = io.StringIO()
    writer = csv.DictWriter(out, column_names(rows))
    writer.writeheader()
    writer.writerows(rows)
    return data_url(out.getvalue().encode(), "text/csv")


def data_url(data: bytes, kind: str) -> str:
    "Bytes as an address that a page can show or save."
    return f"data:{kind};base64,{base64.b64encode(data).decode()}"
