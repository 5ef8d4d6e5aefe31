"""The command `nestlearn`."""

from nestlearn.cli.app import app, main

__all__ = ["app", "main"]
