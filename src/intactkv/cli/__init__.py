"""The command line: one file a verb."""

from intactkv.cli.app import main

__all__ = ["main"]
