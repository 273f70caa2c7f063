"""The package's order: sizes, openings of docstrings and names, as scripts/structure.py measures them."""

from __future__ import annotations

import re
from pathlib import Path

import structure


def test_rooms_can_be_read_and_a_name_means_one_thing() -> None:
    found = structure.measure()
    assert found.over["rooms"] == []
    assert found.over["docstrings"] == []
    assert found.over["names defined twice"] == []
    assert found.over["imports of transformers"] == []
    assert found.over["import circles"] == []


def test_measurements_go_through_public_doors() -> None:
    rooms = [structure.PACKAGE / room for room in ("cli", "report", "planner", "probe")]
    files = [path for folder in (*rooms, structure.ROOT / "scripts") for path in folder.rglob("*.py")]
    assert len(files) > 50
    private = re.compile(r"\bengine\._[a-z]|\._loaded\b")
    assert [str(path) for path in files if private.search(path.read_text(encoding="utf-8"))] == []


def test_the_measure_sees_what_it_is_for(tmp_path: Path) -> None:
    long = "\n".join(f"    x{line} = {line}" for line in range(60))
    (tmp_path / "a").mkdir()
    one = f"import transformers\nfrom {tmp_path.name}.a.two import same\n\n\ndef same():\n{long}\n"
    two = f"    import {tmp_path.name}.a.one\n" + "\n" * 300
    (tmp_path / "a" / "one.py").write_text(f'"""What it is."""\n{one}')
    (tmp_path / "a" / "two.py").write_text(f'"""A second."""\n\n\ndef same():\n    """Import late."""\n{two}')
    found = structure.measure(tmp_path)
    assert found.rooms["a"] == sum(path.read_text().count("\n") for path in (tmp_path / "a").iterdir())
    assert found.over == {
        "files": ["a/two.py 306"], "functions": ["a/one.py:6 same 61"], "docstrings": ["a/one.py:1 What"],
        "imports of transformers": ["a/one.py:2"], "names defined twice": ["same: a/one.py, a/two.py"], "rooms": [],
        "import circles": [f"{tmp_path.name}.a.one {tmp_path.name}.a.two"],
    }  # fmt: skip
