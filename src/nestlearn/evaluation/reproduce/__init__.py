"""Every table of the paper as one command: `nestlearn reproduce NAME`."""

from nestlearn.evaluation.reproduce import formal_languages
from nestlearn.evaluation.reproduce.runner import Order, reproduce
from nestlearn.evaluation.reproduce.table import Column, Plan, Scale, Table

TABLES: dict[str, Table] = {
    "formal-languages": formal_languages.TABLE,
}
# By their numbers in the paper.
NUMBERS = {"table5": "formal-languages"}

__all__ = ["NUMBERS", "TABLES", "Column", "Order", "Plan", "Scale", "Table", "reproduce"]
