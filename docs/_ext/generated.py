"""The parts of the site that are written by the code they describe.

``.. public-names:: MODULE ...`` documents the names in ``__all__`` of the modules, each under the first that has it;
``.. commands::`` every command with its flags; ``.. commands-table::`` one line for each. In docstrings, characters of
formulas that reStructuredText would take for markup are escaped; formulas become MathML; links in Markdown to files of
the repository outside the site become their paths.
"""

from __future__ import annotations

import ast
import dataclasses
import importlib
import inspect
import re
import textwrap
import types
import typing
from pathlib import Path
from typing import Any

import latex2mathml.converter
from docutils import nodes
from docutils.statemachine import StringList
from sphinx.application import Sphinx
from sphinx.util.docutils import SphinxDirective

from subspace3d import cli

ROOT = Path(__file__).parents[2]


def commands() -> dict[str, type]:
    """Every command with the dataclass of its settings: the one place that knows where the command line keeps them."""
    return {name: cli.load(name)[0] for name in cli.COMMANDS}


@dataclasses.dataclass(frozen=True)
class Flag:
    name: str
    type: str
    default: str
    help: str


def flags(settings: type, prefix: str = "") -> list[Flag]:
    """The flags of a settings dataclass; those of a dataclass inside it carry its name: ``--train.lr``."""
    hints = typing.get_type_hints(settings, include_extras=True)
    helps = field_docs(settings)
    found: list[Flag] = []
    # a command's own settings before those it shares with others
    for field in sorted(dataclasses.fields(settings), key=lambda field: field.name not in settings.__annotations__):
        hint = hints[field.name]
        if dataclasses.is_dataclass(hint):
            found += flags(hint, f"{prefix}{field.name}.")
            continue
        name = f"--{prefix}{field.name.rstrip('_')}".replace("_", "-")
        if hint is bool:
            head, _, last = name[2:].rpartition(".")
            name += f", --{head + '.' if head else ''}no-{last}"
        found.append(Flag(name, type_words(hint), default_words(field), helps.get(field.name, "")))
    return found


def field_docs(settings: type) -> dict[str, str]:
    """The string under each field of a dataclass, and of those it inherits from."""
    found: dict[str, str] = {}
    for owner in reversed(settings.__mro__):
        if not dataclasses.is_dataclass(owner):
            continue
        (definition,) = ast.parse(textwrap.dedent(inspect.getsource(owner))).body
        assert isinstance(definition, ast.ClassDef)
        for statement, following in zip(definition.body, definition.body[1:]):
            if isinstance(statement, ast.AnnAssign) and isinstance(following, ast.Expr):
                text = getattr(following.value, "value", None)
                if isinstance(text, str) and isinstance(statement.target, ast.Name):
                    found[statement.target.id] = " ".join(text.split())
    return found


def type_words(hint: Any) -> str:
    """A type as the command line takes it: choices, PATH, and how many values."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin is typing.Annotated:
        return type_words(arguments[0])
    if origin is typing.Literal:
        return ", ".join(f"`{choice}`" for choice in arguments)
    if origin in (typing.Union, types.UnionType):
        return " or ".join(type_words(argument) for argument in arguments)
    if origin is tuple:
        inner = [type_words(argument) for argument in arguments if argument is not ...]
        return f"any number of {inner[0]}" if ... in arguments else " ".join(inner)
    words = {bool: "switch", Path: "path", str: "text", int: "integer", float: "number", type(None): "none"}
    return words.get(hint, getattr(hint, "__name__", str(hint)))


def default_words(field: dataclasses.Field) -> str:
    if field.default_factory is not dataclasses.MISSING:
        value = field.default_factory()
    elif field.default is dataclasses.MISSING:
        return "required"
    else:
        value = field.default
    if value is None or value in ((), "", Path()):
        return "none"
    if isinstance(value, bool):
        return "on" if value else "off"
    if isinstance(value, tuple):
        return " ".join(f"`{item}`" for item in value)
    return f"`{value}`"


def summary(settings: type) -> str:
    return " ".join(inspect.cleandoc(settings.__doc__ or "").split("\n\n")[0].split())


class Markdown(SphinxDirective):
    """A directive that writes Markdown for the page it stands on."""

    has_content = False

    def lines(self) -> list[str]:
        raise NotImplementedError

    def run(self) -> list[nodes.Node]:
        self.env.note_dependency(cli.__file__)
        holder = nodes.section()
        holder.document = self.state.document
        self.state.nested_parse(StringList(self.lines(), source="generated"), 0, holder)
        return holder.children


class CommandsTable(Markdown):
    def lines(self) -> list[str]:
        rows = [f"| [`{name}`](#{name}) | {escape(summary(settings))} |" for name, settings in commands().items()]
        return ["| command | |", "|---|---|", *rows]


class Commands(Markdown):
    def lines(self) -> list[str]:
        lines: list[str] = []
        for name, settings in commands().items():
            lines += [f"## {name}", "", f"`subspace3d {name}`. {escape(summary(settings))}", ""]
            rows = flags(settings)
            if not rows:
                continue
            lines += ["| flag | takes | default | |", "|---|---|---|---|"]
            for flag in rows:
                names = ", ".join(f"`{part}`" for part in flag.name.split(", "))
                lines.append(f"| {names} | {flag.type} | {flag.default} | {escape(flag.help)} |")
            lines.append("")
        return lines


def escape(text: str) -> str:
    """Plain text for a cell of a Markdown table."""
    return re.sub(r"([|<*_$\[\]])", r"\\\1", text)


class PublicNames(SphinxDirective):
    required_arguments = 1
    final_argument_whitespace = True

    def run(self) -> list[nodes.Node]:
        seen: set[int] = set()
        lines: list[str] = []
        for module_name in self.arguments[0].split():
            module = importlib.import_module(module_name)
            for name in getattr(module, "__all__", ()):
                value = getattr(module, name)
                if name.startswith("__") or id(value) in seen:
                    continue
                seen.add(id(value))
                kind = "class" if inspect.isclass(value) else "function"
                if inspect.isclass(value) and issubclass(value, BaseException):
                    kind = "exception"
                lines += [f".. auto{kind}:: {module_name}.{name}", "   :members:" if kind == "class" else "", ""]
        holder = nodes.section()
        holder.document = self.state.document
        self.state.nested_parse(StringList(lines, source="generated"), 0, holder)
        return holder.children


def escape_formulas(app: Sphinx, what: str, name: str, obj: Any, options: Any, lines: list[str]) -> None:
    """In docstrings ``|``, ``*`` and a final ``_`` belong to formulas; `name` and fields are left alone."""
    for index, line in enumerate(lines):
        if line.lstrip().startswith((":", "..")):
            head, mark, tail = line.partition(": ")
            lines[index] = head + mark + _escape_line(tail)
        else:
            lines[index] = _escape_line(line)


def _escape_line(line: str) -> str:
    parts = re.split(r"(``.*?``|`.*?`|\*\*\w+\*\*)", line)
    for index in range(0, len(parts), 2):
        parts[index] = re.sub(r"(?<!\\)([|*])", r"\\\1", parts[index])
        parts[index] = re.sub(r"(?<=\w)_(?!\w)", r"\\_", parts[index])
    return "".join(parts)


def name_files_outside(app: Sphinx, document: str, source: list[str]) -> None:
    """[text](../path) -> text (`path`), when the file exists; a path that does not exist stays and fails the build."""

    def replaced(match: re.Match[str]) -> str:
        text, path = match[1], match[2]
        if not (ROOT / path).exists():
            return match[0]
        return f"`{path}`" if text == path else f"{text} (`{path}`)"

    source[0] = re.sub(r"\[([^\]]+)\]\(\.\./([^)#]+)\)", replaced, source[0])


def formula(writer: Any, node: nodes.Element) -> None:
    display = "inline" if isinstance(node, nodes.math) else "block"
    writer.body.append(latex2mathml.converter.convert(node.astext(), display=display))
    raise nodes.SkipNode


def setup(app: Sphinx) -> dict[str, Any]:
    app.add_directive("commands", Commands)
    app.add_directive("commands-table", CommandsTable)
    app.add_directive("public-names", PublicNames)
    app.add_html_math_renderer("mathml", (formula, None), (formula, None))
    # after napoleon, which turns sections into fields
    app.connect("autodoc-process-docstring", escape_formulas, priority=900)
    app.connect("source-read", name_files_outside)
    return {"parallel_read_safe": True}
