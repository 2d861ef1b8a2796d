"""Tables in Markdown and LaTeX."""

from collections.abc import Sequence


def markdown_table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """The lines of a table; a bar within a cell is escaped."""
    first, *body = ("| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in [head, *rows])
    return [first, "|" + " --- |" * len(head), *body]


def latex_table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table for the package booktabs; ± is written in math mode."""
    lines = [f"\\begin{{tabular}}{{l{'r' * (len(head) - 1)}}}", "\\toprule", _latex_row(head), "\\midrule"]
    lines += [*map(_latex_row, rows), "\\bottomrule", "\\end{tabular}", ""]
    return "\n".join(lines)


def _latex_row(cells: Sequence[str]) -> str:
    special = {ord(c): f"\\{c}" for c in "&%$#_{}"} | {
        ord("±"): "$\\pm$", ord("~"): "\\textasciitilde{}", ord("^"): "\\textasciicircum{}",
        ord("\\"): "\\textbackslash{}", ord("×"): "$\\times$", ord("−"): "$-$", ord("ε"): "$\\varepsilon$",
    }  # fmt: skip
    return " & ".join(cell.translate(special) for cell in cells) + " \\\\"
