"""A hash of the code that makes a run's number, and of no other code.

From a method's class and the loop, names are followed from definition to definition through this
package and files of one's own: what is reached counts, its siblings do not. Comments, docstrings,
layout, printed names and sources count for nothing.
"""

from __future__ import annotations

import ast
import functools
import hashlib
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple, TypeGuard

from fpl.experiments.settings import OWN, Experiment, own_name

PACKAGE = Path(__file__).parents[1]
# Where every run begins, and what is followed no further: a record is found by all settings, and by
# the hash of the features, in which model, weights and images count.
LOOP = ("fpl.experiments.assemble", "rounds_of")
LOOPS = ("fpl.experiments.assemble", "fpl.rounds")
ELSEWHERE = ("fpl.experiments.settings", "fpl.experiments.values", "fpl.data.encoders")
FILES = ("fpl.data.files", "fpl.data.manifest", "fpl.data.world", "fpl.data.datasets")
# Statements of a module that may change a value without storing one.
OTHER = ast.Expr | ast.Delete | ast.For | ast.While | ast.If | ast.With | ast.Try
# Statements of a class that make no number.
PRINTED = ("title", "source")


class Place(NamedTuple):
    """A name in a module; without a name, all of the module."""

    module: str
    name: str | None = None


def code_fingerprint(experiment: Experiment) -> str:
    """Return the hash of the code that an experiment runs through."""
    idle = set()  # what the loop uses in other runs
    if experiment.partition.form == "ours" and experiment.partition.loader == "right":
        idle.add("fpl.released.splits")
    if not experiment.run.epsilon and experiment.run.mechanism != "clipping":
        idle.add("fpl.privacy")
    kind = type(experiment.method)
    reached: dict[Place, str] = {}
    of_module = functools.cache(definitions)  # one look at each file
    # what a class inherits counts, however its file names it
    waiting = [Place(*LOOP), *(Place(base.__module__, base.__name__) for base in kind.__mro__)]
    while waiting:
        place = waiting.pop()
        if place in reached or place.module in ELSEWHERE + FILES:
            continue
        reached[place] = ""
        module = of_module(place.module)
        for name in [place.name] if place.name else list(module):
            if name in module:
                code, used = module[name]
                reached[place] += code
                of_loop = place.module in LOOPS
                waiting += [part for part in used if not (of_loop and part.module in idle)]
    named = sorted((portable(module), name or "", code) for (module, name), code in reached.items())
    return hashlib.sha256(repr(named).encode()).hexdigest()


def portable(module: str) -> str:
    """Return a module's name; of one's own without the hash of its path, which may change."""
    return module.rpartition("_")[0] if module.startswith(OWN) else module


def definitions(module: str) -> dict[str, tuple[str, list[Place]]]:
    """Return the code of each top-level name of a module, and the places that it uses.

    Only modules of this package and files of one's own are read; others have no names here.
    Raises ValueError for a file of one's own that is another one than the method came from.
    """
    path = file_of(module)
    if path and module.startswith(OWN) and own_name(path) != module:
        raise ValueError(f"{path} has changed since its method was loaded: name the method again")
    return read(module, path, path.stat().st_mtime_ns) if path else {}


def file_of(module: str) -> Path | None:
    """Return the file of a module of this package or of one's own, None where there is none."""
    if module.startswith(OWN):
        return Path(str(sys.modules[module].__file__))
    package, *inner = module.split(".")
    if package != "fpl":
        return None
    folder = PACKAGE.joinpath(*inner)
    for path in (folder.with_suffix(".py"), folder / "__init__.py"):
        if path.is_file():
            return path
    return None


@functools.lru_cache(maxsize=256)
def read(module: str, path: Path, changed: int) -> dict[str, tuple[str, list[Place]]]:
    """Return what `definitions` does; `changed` is the time at which the file was."""
    tree = ast.parse(path.read_text())
    strip(tree)
    statements: dict[str, list[ast.stmt]] = {}
    known: dict[str, Place] = {}
    for statement in tree.body:
        for inner in outer(statement):
            known |= imported(inner)
        for name in named(statement):
            statements.setdefault(name, []).append(statement)
            known[name] = Place(module, name)
    for statement in tree.body:  # what else may change a value, as table.update(more) does
        if isinstance(statement, OTHER):
            for name in sorted({*loaded(statement)} & {*statements}):
                if statement not in statements[name]:
                    statements[name].append(statement)
    found = {}
    for name, all_of_it in statements.items():
        code = "".join(ast.dump(statement) for statement in all_of_it)
        used = [place for statement in all_of_it for place in used_by(statement, known)]
        found[name] = (code, used)
    return found


def strip(tree: ast.AST) -> None:
    """Take docstrings, printed names and sources out of a tree."""
    for node in ast.walk(tree):
        if not isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef):
            continue
        if ast.get_docstring(node, clean=False) is not None:
            del node.body[0]
        if isinstance(node, ast.ClassDef):
            node.body = [line for line in node.body if not is_printed(line)]


def is_printed(statement: ast.stmt) -> bool:
    """Return whether a statement sets nothing but printed names."""
    return {*named(statement)} <= {*PRINTED} and isinstance(statement, ast.Assign | ast.AnnAssign)


def outer(statement: ast.stmt) -> Iterator[ast.AST]:
    """Yield what is in a statement, but of functions and classes, which have names of their own."""
    return (
        iter(()) if isinstance(statement, ast.ClassDef | ast.FunctionDef) else ast.walk(statement)
    )


def loaded(statement: ast.stmt) -> Iterator[str]:
    """Yield the names that a statement reads."""
    return (node.id for node in ast.walk(statement) if isinstance(node, ast.Name))


def named(statement: ast.stmt) -> list[str]:
    """Return the names that a statement defines, or whose value it changes."""
    if isinstance(statement, ast.ClassDef | ast.FunctionDef):
        return [statement.name]
    found = []
    for node in ast.walk(statement):
        if isinstance(node, ast.ClassDef | ast.FunctionDef):  # within an `if`, say
            found.append(node.name)
        elif isinstance(getattr(node, "ctx", None), ast.Store):
            found += [inner.id for inner in ast.walk(node) if isinstance(inner, ast.Name)]
    return list(dict.fromkeys(found))


def imported(statement: ast.AST) -> dict[str, Place]:
    """Return the names that a statement imports from this package, and what they stand for."""
    found: dict[str, Place] = {}
    if isinstance(statement, ast.Import):
        for alias in statement.names:
            if alias.name.split(".")[0] == "fpl":  # which is the name itself without `as`
                found[alias.asname or "fpl"] = Place(alias.name if alias.asname else "fpl")
        return found
    if not isinstance(statement, ast.ImportFrom) or not (statement.module or "").startswith("fpl"):
        return {}
    for alias in statement.names:
        inner = f"{statement.module}.{alias.name}"
        place = Place(str(statement.module), alias.name)
        found[alias.asname or alias.name] = Place(inner) if file_of(inner) else place
        if alias.name == "*":
            found |= {name: Place(place.module, name) for name in definitions(place.module)}
    return found


def used_by(node: ast.AST, known: dict[str, Place]) -> list[Place]:
    """Return the places that a definition uses, by the names known in its module."""
    known = dict(known)
    for inner in ast.walk(node):
        known |= imported(inner)
    return list(dict.fromkeys(walk(node, known)))


def is_stored(node: ast.AST) -> TypeGuard[ast.Name]:
    return isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)


def dotted(node: ast.AST) -> list[str]:
    """Return the names of fpl.gate.pool, say; of anything else one that nothing has."""
    names: list[str] = []
    while isinstance(node, ast.Attribute):
        names.insert(0, node.attr)
        node = node.value
    return [node.id, *names] if isinstance(node, ast.Name) else [""]


def walk(node: ast.AST, known: dict[str, Place]) -> Iterator[Place]:
    """Yield what is used below a node: of a module, the attribute that follows it."""
    first, *names = dotted(node)
    place = known.get(first)
    if names and place and place.name is None:
        module = place.module
        while names and file_of(f"{module}.{names[0]}"):
            module = f"{module}.{names.pop(0)}"
        yield Place(module, *names[:1])
        return
    if isinstance(node, ast.Name) and node.id in known and not is_stored(node):
        yield known[node.id]
    for child in ast.iter_child_nodes(node):
        yield from walk(child, known)
