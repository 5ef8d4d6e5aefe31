"""Every table of the paper as one command: `nestlearn reproduce NAME`."""

from nestlearn.evaluation.reproduce import babilong, formal_languages, mad, needles, recall
from nestlearn.evaluation.reproduce.runner import Order, reproduce
from nestlearn.evaluation.reproduce.table import Column, Plan, Scale, Table

TABLES: dict[str, Table] = {
    "formal-languages": formal_languages.TABLE,
    "mad": mad.TABLE,
    "recall": recall.TABLE,
    "needles": needles.TABLE,
    "babilong": babilong.TABLE,
}
# By what they are called in the paper.
NUMBERS = {"table1": "needles", "table4": "mad", "table5": "formal-languages", "figure9": "babilong"}

__all__ = ["NUMBERS", "TABLES", "Column", "Order", "Plan", "Scale", "Table", "reproduce"]
