"""Parts of the package's source: the definitions that some names need, in a few files of one folder.

From a few names, a selection follows every name that their code uses through the modules of the package. What it
reaches is copied as it is written, with shorter docstrings. The rest is left out.
"""

from __future__ import annotations

import ast
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from textwrap import wrap
from typing import NamedTuple

PACKAGE = __name__.partition(".")[0]
ROOT = Path(__file__).parents[1]
LINE_LENGTH = 120
FUTURE = "from __future__ import annotations"
COMPOUND = (ast.ClassDef, ast.For, ast.FunctionDef, ast.If, ast.With)  # statements that hold others
NAMED = (ast.ClassDef, ast.FunctionDef)


@dataclass(frozen=True)
class Rules:
    """What is copied in another form than it is written. Modules are named by their place in the package.

    Attributes:
        files: the file of the modules that begin with a name, without its suffix.
        checks: a regular expression for names of functions: statements that do nothing but call one are left out.
        unguarded: functions to copy without their tests of arguments, `if ...: raise ...`, by module.
        without: methods to leave out, as "Class.method", by module.
        instead: source to write instead of definitions, by module and name; "Class.method" for a method.
    """

    files: Mapping[str, str]
    checks: str = r"(?!)"
    unguarded: Mapping[str, Iterable[str]] = field(default_factory=dict)
    without: Mapping[str, Iterable[str]] = field(default_factory=dict)
    instead: Mapping[str, Mapping[str, str]] = field(default_factory=dict)

    def file(self, module: str) -> str:
        """Return the name of a module's file, without its suffix.

        Raises:
            ImportError: If there is none for the module.
        """
        parts = module.split(".")
        names = (".".join(parts[:n]) for n in range(len(parts), 0, -1))
        found = next((self.files[name] for name in names if name in self.files), None)
        if found is None:
            raise ImportError(f"{PACKAGE}.{module} has no file that it is copied to.")
        return found


class Binding(NamedTuple):
    """A name that a module imports.

    Attributes:
        name: its name in the module.
        source: full name of the module that it is from.
        original: its name there; None for that module itself.
        for_types: whether it is imported only where types are checked.
    """

    name: str
    source: str
    original: str | None
    for_types: bool

    @property
    def is_own(self) -> bool:
        """Whether it is from this package."""
        return self.source.partition(".")[0] == PACKAGE


class Module:
    """The source of a module by the rules, and what its top level defines and imports.

    Args:
        place: the module's name, without that of the package; "" for the package itself.
        rules: what to change.

    Attributes:
        lines: the source, by line.
        body: the statements of the top level.
        definitions: the statement that defines each name.
        bindings: what the module imports, by name.

    Raises:
        ImportError: If there is no such module, or no definition that the rules name.
    """

    def __init__(self, place: str, rules: Rules) -> None:
        parts = place.split(".") if place else []
        paths = [ROOT.joinpath(*parts, "__init__.py"), *([ROOT.joinpath(*parts).with_suffix(".py")] if parts else [])]
        path = next((path for path in paths if path.is_file()), None)
        if path is None:
            raise ImportError(f"{PACKAGE} has no module {place}.")
        self.place, self.is_package = place, path.name == "__init__.py"
        text = path.read_text(encoding="utf-8")
        for name, source in rules.instead.get(place, {}).items():
            text = edited(text, {find(ast.parse(text), name): source.strip("\n").split("\n")})
        text = edited(text, {find(ast.parse(text), name): [] for name in rules.without.get(place, ())})
        text = edited(text, {statement: [] for statement in leaves(ast.parse(text), is_call_of(rules.checks))})
        for name in rules.unguarded.get(place, ()):
            text = edited(text, {statement: [] for statement in leaves(find(ast.parse(text), name), is_guard)})
        text = edited(text, {method: [] for method in uncalled(ast.parse(text), rules.checks)})
        text = edited(text, {node: shorter(text, node) for node in docstrings(ast.parse(text))})
        self.lines, self.body = text.split("\n"), ast.parse(text).body
        self.definitions = {name: statement for statement in self.body for name in defined(statement)}
        self.bindings = {binding.name: binding for binding in self._imports(self.body)}

    def _imports(self, statements: Iterable[ast.stmt], for_types: bool = False) -> Iterator[Binding]:
        package = [PACKAGE, *filter(None, self.place.split("."))][: None if self.is_package else -1]
        for statement in statements:
            if isinstance(statement, ast.Import):
                yield from (Binding(x.asname or x.name, x.name, None, for_types) for x in statement.names)
            elif isinstance(statement, ast.ImportFrom):
                base = package[: len(package) - statement.level + 1] if statement.level else []
                source = ".".join([*base, *filter(None, [statement.module])])
                yield from (Binding(x.asname or x.name, source, x.name, for_types) for x in statement.names)
            elif isinstance(statement, ast.If) and ast.unparse(statement.test) == "TYPE_CHECKING":
                yield from self._imports(statement.body, for_types=True)

    @property
    def title(self) -> str:
        """The first line of its docstring."""
        return (ast.get_docstring(ast.Module(self.body, [])) or "").partition("\n")[0]


class Selection:
    """Definitions of the package that some names need.

    Args:
        rules: what is copied in another form than it is written.
    """

    def __init__(self, rules: Rules) -> None:
        self.rules = rules
        self._modules: dict[str, Module] = {}
        self._chosen: dict[str, set[str]] = {}  # by module, those first that others need

    def add(self, source: str, name: str) -> tuple[str, str]:
        """Add a name and all that it needs.

        Args:
            source: full name of a module of the package, which defines the name or imports it from another.
            name: the name.

        Returns:
            The file that defines it, without its suffix, and its name there.

        Raises:
            ImportError: If there is no such module, or no such name.
        """
        module, name = self._resolve(source, name)
        chosen = self._chosen.setdefault(module.place, set())
        if name not in chosen:
            chosen.add(name)
            for used in names_in(module.definitions[name]):
                if used in module.definitions:
                    self.add(f"{PACKAGE}.{module.place}", used)
                elif used in module.bindings and module.bindings[used].is_own:
                    self.add(module.bindings[used].source, module.bindings[used].original or "")
        return self.rules.file(module.place), name

    def _resolve(self, source: str, name: str) -> tuple[Module, str]:
        module = self._module(source)
        while name not in module.definitions:
            binding = module.bindings.get(name)
            if binding is None or not binding.is_own or binding.original is None:
                raise ImportError(f"{PACKAGE}.{module.place} does not define {name or 'one name'}.")
            module, name = self._module(binding.source), binding.original
        return module, name

    def _module(self, source: str) -> Module:
        if source not in self._modules:
            self._modules[source] = Module(source.partition(".")[2], self.rules)
        return self._modules[source]

    def files(self) -> dict[str, str]:
        """Return the files: their text by name.

        Raises:
            ImportError: If two modules in one file define or import one name differently.
        """
        modules: dict[str, list[Module]] = {}
        for place in self._in_order():
            modules.setdefault(self.rules.file(place), []).append(self._module(f"{PACKAGE}.{place}"))
        return {f"{file}.py": self._text(file, group) for file, group in modules.items()}

    def _in_order(self) -> list[str]:
        """Return the modules, each behind those that it imports."""
        order: dict[str, None] = {}

        def visit(place: str) -> None:
            if place not in order:
                module = self._module(f"{PACKAGE}.{place}")
                for binding in self._used(module):
                    if binding.is_own and not binding.for_types:
                        visit(self._resolve(binding.source, binding.original or "")[0].place)
                order[place] = None

        for place in self._chosen:
            visit(place)
        return list(order)

    def _kept(self, module: Module) -> list[ast.stmt]:
        wanted = {id(module.definitions[name]) for name in self._chosen[module.place]}
        return [statement for statement in module.body if id(statement) in wanted]

    def _used(self, module: Module) -> list[Binding]:
        used = {name.partition(".")[0] for statement in self._kept(module) for name in names_in(statement)}
        return [binding for name, binding in module.bindings.items() if name.partition(".")[0] in used]

    def _text(self, file: str, modules: Iterable[Module]) -> str:
        imported: dict[str, Binding] = {}
        meaning: dict[str, tuple[str, str | None]] = {}  # where a name in the file is from
        blocks = []
        for module in modules:
            for name in self._chosen[module.place]:
                _agree(meaning, name, (module.place, name))
            for binding in self._used(module):
                source, original = binding.source, binding.original
                if binding.is_own:
                    target, original = self._resolve(source, original or "")
                    source = f".{self.rules.file(target.place)}"
                    _agree(meaning, binding.name, (target.place, original))
                else:
                    _agree(meaning, binding.name, (source, original))
                if source != f".{file}":
                    is_for_types = binding.for_types and imported.get(binding.name, binding).for_types
                    imported[binding.name] = Binding(binding.name, source, original, is_for_types)
            title = wrap(f"{module.place.replace('.', '/')}.py: {module.title}", LINE_LENGTH - 2)
            heading = "\n".join(f"# {line}" for line in title)
            blocks.append("\n\n".join([heading, *_statements(module, self._kept(module))]))
        return "\n\n".join([FUTURE, *import_blocks(imported.values())]) + "\n\n\n" + "\n\n\n".join(blocks) + "\n"


def _agree(meaning: dict[str, tuple[str, str | None]], name: str, source: tuple[str, str | None]) -> None:
    if meaning.setdefault(name, source) != source:
        raise ImportError(f"{name} is of {meaning[name][0]} and of {source[0]}, which are copied to one file.")


def _statements(module: Module, kept: Iterable[ast.stmt]) -> list[str]:
    texts: list[str] = []
    was_plain = False
    for statement in kept:
        start, end = extent(module.lines, statement)
        text, is_plain = "\n".join(module.lines[start:end]), not isinstance(statement, NAMED)
        if was_plain and is_plain:
            texts[-1] += f"\n{text}"
        else:
            texts.append(f"\n{text}" if texts else text)
        was_plain = is_plain
    return texts


def import_blocks(bindings: Iterable[Binding]) -> list[str]:
    """Return import statements in blocks: the standard library, others, this folder, and those for types."""
    blocks: dict[str, list[Binding]] = {"standard": [], "others": [], "": [], "types": []}
    for binding in bindings:
        package = binding.source.partition(".")[0]
        kind = package and ("standard" if package in sys.stdlib_module_names else "others")
        blocks["types" if binding.for_types else kind].append(binding)
    for_types = import_lines(blocks.pop("types"), indent="    ")
    if for_types:
        blocks["standard"].append(Binding("TYPE_CHECKING", "typing", "TYPE_CHECKING", False))
    texts = ["\n".join(import_lines(block)) for block in blocks.values() if block]
    return [*texts, "\n".join(["if TYPE_CHECKING:", *for_types])] if for_types else texts


def import_lines(bindings: Iterable[Binding], indent: str = "") -> list[str]:
    """Return import statements, sorted, one for each module."""
    lines: list[str] = []
    names: dict[str, list[str]] = {}
    for name, source, original, _ in sorted(bindings, key=lambda binding: (binding.source, binding.name)):
        if original is None:
            lines.append(f"{indent}import {source}" + (f" as {name}" if name != source else ""))
        else:
            names.setdefault(source, []).append(original if name == original else f"{original} as {name}")
    for source, of_source in names.items():
        line = f"{indent}from {source} import {', '.join(of_source)}"
        if len(line) <= LINE_LENGTH:
            lines.append(line)
        else:
            lines += [f"{indent}from {source} import (", *(f"{indent}    {name}," for name in of_source), f"{indent})"]
    return lines


def names_in(node: ast.AST) -> list[str]:
    """Return the names that code uses, those with dots as they are imported: `importlib` and `importlib.util`."""
    return [child.id for child in ast.walk(node) if isinstance(child, ast.Name)]


def defined(statement: ast.stmt) -> list[str]:
    """Return the names that a statement defines, if it is a definition."""
    if isinstance(statement, NAMED):
        return [statement.name]
    if isinstance(statement, ast.Assign):
        return [name for target in statement.targets for name in names_in(target)]
    return names_in(statement.target) if isinstance(statement, ast.AnnAssign) else []


def find(tree: ast.Module, name: str) -> ast.stmt:
    """Return the statement that defines a name, or "Class.method".

    Raises:
        ImportError: If nothing defines the name.
    """
    owner, _, method = name.rpartition(".")
    within = find(tree, owner) if owner else tree
    for statement in getattr(within, "body", []):
        if method in defined(statement):
            return statement
    raise ImportError(f"There is no {name}.")


def leaves(node: ast.AST, is_wanted: Callable[[ast.stmt], bool]) -> list[ast.stmt]:
    """Return the statements in a node of a kind, and those that hold nothing else."""
    found: list[ast.stmt] = []
    for statement in getattr(node, "body", []):
        if is_wanted(statement):
            found.append(statement)
        elif isinstance(statement, COMPOUND):
            inner = leaves(statement, is_wanted)
            left = [x for x in statement.body if x not in inner and not is_text(x)]
            if inner and not left and not getattr(statement, "orelse", []):
                found.append(statement)
            elif left:
                found += inner
    return found


def is_call_of(pattern: str) -> Callable[[ast.stmt], bool]:
    """Return a function that tells statements that do nothing but call a function of some name."""

    def is_call(statement: ast.stmt) -> bool:
        if not isinstance(statement, ast.Expr) or not isinstance(statement.value, ast.Call):
            return False
        function = statement.value.func
        name = function.id if isinstance(function, ast.Name) else getattr(function, "attr", "")
        return re.fullmatch(pattern, name) is not None

    return is_call


def is_guard(statement: ast.stmt) -> bool:
    """Return whether a statement does nothing but raise an error under some condition."""
    if not isinstance(statement, ast.If) or statement.orelse:
        return False
    return all(isinstance(inner, ast.Raise) for inner in statement.body)


def uncalled(tree: ast.Module, pattern: str) -> list[ast.stmt]:
    """Return the methods of some name that nothing in the module calls."""
    called = {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
    classes = (node for node in tree.body if isinstance(node, ast.ClassDef))
    methods = (method for node in classes for method in node.body if isinstance(method, ast.FunctionDef))
    return [method for method in methods if re.fullmatch(pattern, method.name) and method.name not in called]


def is_text(statement: ast.stmt) -> bool:
    """Return whether a statement is a string, such as a docstring."""
    return isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Constant)


def docstrings(tree: ast.Module) -> Iterator[ast.stmt]:
    """Yield the docstrings of classes and functions."""
    for node in ast.walk(tree):
        if isinstance(node, NAMED) and is_text(node.body[0]):
            yield node.body[0]


def shorter(text: str, docstring: ast.stmt) -> list[str]:
    """Return the lines of a docstring's first paragraph."""
    lines = text.split("\n")[docstring.lineno - 1 : docstring.end_lineno]
    if "" not in lines:
        return lines
    kept = lines[: lines.index("")]
    return [*kept, " " * docstring.col_offset + '"""'] if len(kept) > 1 else [f'{kept[0]}"""']


def extent(lines: list[str], statement: ast.stmt) -> tuple[int, int]:
    """Return the first line of a statement, its decorators and comments above included, and the line after its last."""
    decorators = statement.decorator_list if isinstance(statement, NAMED) else []
    start = min([statement.lineno, *(decorator.lineno for decorator in decorators)]) - 1
    while start and lines[start - 1].lstrip().startswith("#"):
        start -= 1
    return start, statement.end_lineno or start


def edited(text: str, edits: Mapping[ast.stmt, list[str]]) -> str:
    """Return source with other lines instead of some statements; with none, comments and empty lines above go too."""
    lines = text.split("\n")
    for statement in sorted(edits, key=lambda statement: statement.lineno, reverse=True):
        start, end = extent(lines, statement)
        if edits[statement]:
            while lines[start].lstrip().startswith("#"):
                start += 1
        while not edits[statement] and not lines[start - 1]:
            start -= 1
        lines[start:end] = edits[statement]
    return "\n".join(lines)
