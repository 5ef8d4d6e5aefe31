"""Every table of the paper as one command: `nestlearn reproduce NAME`."""

from nestlearn.evaluation.reproduce import (
    ablation,
    babilong,
    class_incremental,
    context_use,
    domain_streams,
    formal_languages,
    language_modeling,
    mad,
    needles,
    recall,
    second_reading,
)
from nestlearn.evaluation.reproduce.continual import ContinualTable, reproduce_continual
from nestlearn.evaluation.reproduce.novels import NovelsTable, reproduce_novels
from nestlearn.evaluation.reproduce.runner import reproduce_tasks
from nestlearn.evaluation.reproduce.table import Column, Order, Plan, Scale, Table

AnyTable = Table | NovelsTable | ContinualTable

TABLES: dict[str, AnyTable] = {
    "needles": needles.TABLE,
    "language-modeling": language_modeling.TABLE,
    "mad": mad.TABLE,
    "formal-languages": formal_languages.TABLE,
    "ablation": ablation.TABLE,
    "babilong": babilong.TABLE,
    "context-use": context_use.TABLE,
    "recall": recall.TABLE,
    "class-incremental": class_incremental.TABLE,
    "domain-streams": domain_streams.TABLE,
    "second-reading": second_reading.TABLE,
}
# By what they are called in the paper.
NUMBERS = {
    "table1": "needles",
    "table2": "language-modeling",
    "table4": "mad",
    "table5": "formal-languages",
    "table6": "ablation",
    "figure6": "class-incremental",
    "figure8": "domain-streams",
    "figure9": "babilong",
    "figure10": "context-use",
}


def reproduce(table: AnyTable, order: Order) -> str:
    """Runs what is not done yet of a table and writes `out`.json, `out`.md and `out`.png.

    Returns:
        the page.

    Raises:
        ValueError: for an unknown model or column.
        FileNotFoundError: if data that a task needs are not there.
        JobsFailed: if runs failed; the others are kept.
    """
    if isinstance(table, ContinualTable):
        return reproduce_continual(table, order)
    return reproduce_novels(table, order) if isinstance(table, NovelsTable) else reproduce_tasks(table, order)


__all__ = [
    "NUMBERS",
    "TABLES",
    "Column",
    "ContinualTable",
    "NovelsTable",
    "Order",
    "Plan",
    "Scale",
    "Table",
    "reproduce",
]
