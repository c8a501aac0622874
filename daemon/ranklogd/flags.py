"""The command line's face of `ranklogd.config`: a flag for every field, with its documentation as help.

--seal-age 10s   and   --seal-age-s 10      the same flag: the unit in the name may be left out
"""

import argparse
import ast
import functools
import inspect
from dataclasses import fields
from pathlib import Path
from typing import Any

from ranklogd.config import Config
from ranklogd.units import format_value


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Give the parser a flag for every field; `flag_values` of what it parsed goes to `load_config`."""
    docs = field_docs()
    for field in fields(Config):
        default = format_value(field.name, field.default)
        text = docs[field.name] + (f" [{default}]" if default else "")
        extra: dict[str, Any] = {"nargs": "?", "const": "true"} if field.type is bool else {}
        plain = field.name.removesuffix("_bytes").removesuffix("_s")
        parser.add_argument(
            *(f"--{name.replace('_', '-')}" for name in dict.fromkeys((plain, field.name))),
            dest=field.name,
            metavar=plain.rpartition("_")[2].upper(),
            default=argparse.SUPPRESS,
            help=text.replace("%", "%%"),
            **extra,
        )


def flag_values(arguments: argparse.Namespace) -> dict[str, str]:
    """Return the fields that were given on the command line, as `load_config` takes them."""
    known = {field.name for field in fields(Config)}
    return {name: value for name, value in vars(arguments).items() if name in known}


@functools.cache
def field_docs() -> dict[str, str]:
    """Return the text that stands under each field of Config."""
    body = ast.parse(inspect.getsource(Config)).body[0]
    assert isinstance(body, ast.ClassDef)
    docs = {}
    for line, below in zip(body.body, body.body[1:], strict=False):
        if isinstance(line, ast.AnnAssign) and isinstance(below, ast.Expr):
            docs[ast.unparse(line.target)] = str(ast.literal_eval(below.value))
    return docs


def sample_file() -> str:
    """Return the text of a config file that says every default, each with its documentation."""
    lines = [
        "# Every option of ranklogd at its default. None needs to be set: the daemon starts without this file.",
        "# Its place is ~/.config/ranklog/ranklogd.toml or /etc/ranklog/ranklogd.toml; RANKLOG_CONFIG names another.",
        "# Flags and RANKLOG_<OPTION> variables win over it. Sizes and times take units; empty text means the default.",
    ]
    for field in fields(Config):
        value = field.default
        bare = isinstance(value, bool) or (isinstance(value, int) and not field.name.endswith(("_bytes", "_mode")))
        text = format_value(field.name, "" if value == Path() else value)
        lines += ["", f"# {field_docs()[field.name]}", f"{field.name} = {text if bare else chr(34) + text + chr(34)}"]
    return "\n".join(lines) + "\n"
