"""A finding: what one check saw, how bad it is, and the command that mends it. Pure."""

from dataclasses import dataclass
from enum import StrEnum


class Level(StrEnum):
    """How bad it is. Only a problem makes `ranklog doctor` fail."""

    OK = "ok"
    NOTE = "note"
    WARNING = "warning"
    PROBLEM = "problem"


@dataclass(frozen=True)
class Finding:
    """One line for a person."""

    check: str
    level: Level
    text: str
    fix: str = ""
    """A command, or what to write into a file; empty where there is nothing to do."""


def ok(check: str, text: str) -> Finding:
    """Return that all is well."""
    return Finding(check, Level.OK, text)


def note(check: str, text: str, fix: str = "") -> Finding:
    """Return something worth knowing."""
    return Finding(check, Level.NOTE, text, fix)


def warning(check: str, text: str, fix: str = "") -> Finding:
    """Return something that costs, or soon will."""
    return Finding(check, Level.WARNING, text, fix)


def problem(check: str, text: str, fix: str) -> Finding:
    """Return something that keeps records from where they should be."""
    return Finding(check, Level.PROBLEM, text, fix)
