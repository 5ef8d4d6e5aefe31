"""Every table of the paper as one command: `nestlearn reproduce NAME`."""

from nestlearn.evaluation.reproduce import (
    ablation,
    babilong,
    context_use,
    formal_languages,
    language_modeling,
    mad,
    needles,
    recall,
)
from nestlearn.evaluation.reproduce.novels import NovelsTable, reproduce_novels
from nestlearn.evaluation.reproduce.runner import reproduce_tasks
from nestlearn.evaluation.reproduce.table import Column, Order, Plan, Scale, Table

TABLES: dict[str, Table | NovelsTable] = {
    "needles": needles.TABLE,
    "language-modeling": language_modeling.TABLE,
    "mad": mad.TABLE,
    "formal-languages": formal_languages.TABLE,
    "ablation": ablation.TABLE,
    "babilong": babilong.TABLE,
    "context-use": context_use.TABLE,
    "recall": recall.TABLE,
}
# By what they are called in the paper.
NUMBERS = {
    "table1": "needles",
    "table2": "language-modeling",
    "table4": "mad",
    "table5": "formal-languages",
    "table6": "ablation",
    "figure9": "babilong",
    "figure10": "context-use",
}


def reproduce(table: Table | NovelsTable, order: Order) -> str:
    """Runs what is not done yet of a table and writes `out`.json, `out`.md and `out`.png.

    Returns:
        the page.

    Raises:
        ValueError: for an unknown model or column.
        FileNotFoundError: if data that a task needs are not there.
        JobsFailed: if runs failed; the others are kept.
    """
    return reproduce_novels(table, order) if isinstance(table, NovelsTable) else reproduce_tasks(table, order)


__all__ = ["NUMBERS", "TABLES", "Column", "NovelsTable", "Order", "Plan", "Scale", "Table", "reproduce"]
