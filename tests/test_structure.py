"""The package's order: sizes, openings of docstrings and names, as scripts/structure.py measures them."""

from __future__ import annotations

from pathlib import Path

import structure


def test_rooms_can_be_read_and_a_name_means_one_thing() -> None:
    found = structure.measure()
    assert found.over["rooms"] == []
    assert found.over["docstrings"] == []
    assert found.over["names defined twice"] == []
    assert found.over["imports of transformers"] == []


def test_the_measure_sees_what_it_is_for(tmp_path: Path) -> None:
    long = "\n".join(f"    x{line} = {line}" for line in range(60))
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "one.py").write_text(f'"""What it is."""\nimport transformers\n\n\ndef same():\n{long}\n')
    (tmp_path / "a" / "two.py").write_text('"""A second."""\n\n\nclass same:\n    """Fine."""\n' + "\n" * 300)
    found = structure.measure(tmp_path)
    assert found.rooms["a"] == sum(path.read_text().count("\n") for path in (tmp_path / "a").iterdir())
    assert found.over == {
        "files": ["a/two.py 305"], "functions": ["a/one.py:5 same 61"], "docstrings": ["a/one.py:1 What"],
        "imports of transformers": ["a/one.py:2"], "names defined twice": ["same: a/one.py, a/two.py"], "rooms": [],
    }  # fmt: skip
