"""Print the size and order of the package: rooms, files and functions that are too large, names that mean two things.

    python scripts/structure.py            # the table
    python scripts/structure.py --list     # and each thing that is over a goal

A room is a folder with its own files, without the rooms in it. `tests/project/test_structure.py` holds the goals.
"""

from __future__ import annotations

import argparse
import ast
import subprocess
import sys
from collections import Counter, defaultdict
from collections.abc import Collection
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "offmoe"
MOST_ROOM, MOST_FILE, MOST_FUNCTION = 2500, 300, 50
OPENINGS = ("What", "As", "Where", "Of", "How", "Who")
KNOW_TRANSFORMERS = ("hf", "kv", "attention", "loader")


@dataclass
class Structure:
    """Lines of each room, and by kind everything that is over a goal, as `path:line name`."""

    rooms: Counter[str] = field(default_factory=Counter)
    over: dict[str, list[str]] = field(default_factory=lambda: defaultdict(list))


def measure(package: Path = PACKAGE) -> Structure:
    """Read every file of the package; nothing is imported."""
    found = Structure()
    homes: dict[str, list[str]] = defaultdict(list)
    for path in sorted(package.rglob("*.py")):
        text = path.read_text(encoding="utf-8")
        name, num_lines = str(path.relative_to(package)), text.count("\n")
        found.rooms[str(path.parent.relative_to(package))] += num_lines
        if num_lines > MOST_FILE:
            found.over["files"].append(f"{name} {num_lines}")
        tree = ast.parse(text)
        for node in ast.walk(tree):
            _look_at(node, name, found)
        for public in _public_names(tree):
            homes[public].append(name)
    found.over["names defined twice"] = [
        f"{public}: {', '.join(places)}" for public, places in sorted(homes.items()) if len(set(places)) > 1
    ]
    found.over["import circles"] = [" ".join(circle) for circle in import_circles(package)]
    found.over["rooms"] = [f"{room} {lines}" for room, lines in found.rooms.most_common() if lines > MOST_ROOM]
    return found


def _look_at(node: ast.AST, name: str, found: Structure) -> None:
    if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
        num_lines = (node.end_lineno or node.lineno) - node.lineno + 1
        if num_lines > MOST_FUNCTION:
            found.over["functions"].append(f"{name}:{node.lineno} {node.name} {num_lines}")
    if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef | ast.Module):
        opening = (ast.get_docstring(node) or "").split(maxsplit=1)[:1]
        if opening and opening[0].strip(",.:") in OPENINGS:
            found.over["docstrings"].append(f"{name}:{getattr(node, 'lineno', 1)} {opening[0]}")
    imported = [node.module or ""] if isinstance(node, ast.ImportFrom) else []
    if isinstance(node, ast.Import):
        imported = [alias.name for alias in node.names]
    for module in imported:
        is_known = any(name.startswith(f"{room}/") for room in KNOW_TRANSFORMERS)
        if f"{module}.".startswith("transformers.") and not is_known:
            found.over["imports of transformers"].append(f"{name}:{getattr(node, 'lineno', 1)}")


def _public_names(tree: ast.Module) -> set[str]:
    """Classes, functions and aliases of types that a module defines for others."""
    names = set()
    for node in tree.body:
        if isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            names.add(node.name)
        elif isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
            alias = node.targets[0].id
            if alias[0].isupper() and not alias.isupper() and isinstance(node.value, ast.Subscript | ast.BinOp):
                names.add(alias)
    return {name for name in names if not name.startswith("_")}


def import_circles(package: Path) -> list[list[str]]:
    """Modules that import each other by some way round, those imported late or for types alone among them."""
    homes = {}
    for path in package.rglob("*.py"):
        parts = path.relative_to(package.parent).with_suffix("").parts
        homes[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    known = {name: _imported_modules(path, homes) - {name} for name, path in homes.items()}
    while ends := [name for name, below in known.items() if not below & known.keys()]:
        for name in ends:  # what imports nothing that is left is in no circle
            del known[name]
    reached = {name: below & known.keys() for name, below in known.items()}
    for through in known:  # Warshall's transitive closure
        for below in reached.values():
            if through in below:
                below |= reached[through]
    circles = {frozenset(other for other in reached[name] if name in reached[other]) for name in known}
    return sorted(sorted(circle) for circle in circles if circle)


def _imported_modules(path: Path, homes: Collection[str]) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module:
            whole = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= {name if name in homes else node.module for name in whole}
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
    return found & set(homes)


def upward_imports() -> int:
    """Broken contracts of import-linter, 0 if it is content."""
    program = [str(Path(sys.executable).parent / "lint-imports"), "--no-logo"]
    done = subprocess.run(program, cwd=ROOT, capture_output=True, text=True, check=False)
    return 0 if done.returncode == 0 else done.stdout.count("BROKEN")


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--list", action="store_true", help="each thing that is over a goal, too")
    options = parser.parse_args()
    found = measure()
    room, lines = found.rooms.most_common(1)[0]
    print(f"{'lines of the package':40} {sum(found.rooms.values()):,} in {len(found.rooms)} rooms")
    print(f"{'largest room':40} {room}, {lines:,} (goal {MOST_ROOM:,})")
    for kind, what in (
        ("files", f"files over {MOST_FILE} lines"),
        ("functions", f"functions over {MOST_FUNCTION} lines"),
        ("docstrings", f"docstrings that open with {' / '.join(OPENINGS)}"),
        ("names defined twice", "public names defined twice"),
        ("import circles", "circles of modules that import each other"),
        ("imports of transformers", f"imports of transformers outside {', '.join(KNOW_TRANSFORMERS)}"),
    ):  # fmt: skip
        print(f"{what:64} {len(found.over[kind])}")
        if options.list:
            print("".join(f"    {item}\n" for item in found.over[kind]), end="")
    print(f"{'imports upward':64} {upward_imports()}")


if __name__ == "__main__":
    main()
