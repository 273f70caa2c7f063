"""Write the table of supported models into README.md, from the families that the tests run.

`python scripts/models_table.py` rewrites the part between the markers; `--check` only says whether it is current.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tests"))
BEGIN, END = "<!-- models table: begin -->", "<!-- models table: end -->"


def make_table() -> str:
    """The markdown table: one row a family, then those left out, each with its reason."""
    from adapted_families import ADAPTED, ENCODER_DECODERS
    from families import EXCLUDED, FAMILIES, LAYOUTS, MULTIMODAL

    def forms(name: str) -> str:
        return "published" if name in ENCODER_DECODERS else "published, shards"

    lines = ["| family | class | exact as |", "|---|---|---|"]
    for name, family in sorted(FAMILIES.items()):
        lines.append(f"| {name} | {family.model_class} | {', '.join(LAYOUTS)} |")
    lines += [
        f"| {name.removesuffix('_multimodal')} | {family.model_class}, text only | published |"
        for name, family in sorted(MULTIMODAL.items())
    ]
    lines += [
        f"| {family.name} | {family.model_class}{', ' + family.notes if family.notes else ''} | {forms(name)} |"
        for name, family in sorted(ADAPTED.items())
        if not name.endswith("_top2")
    ]
    lines.append("| grok-1 | Grok1ForCausalLM, offmoe's own, against NumPy (`tests/test_grok1.py`) | published |")
    lines += ["", "| left out | why |", "|---|---|"]
    lines += [f"| {name} | {reason} |" for name, reason in sorted(EXCLUDED.items())]
    return "\n".join(lines)


def current(text: str) -> str:
    """`text` with the part between the markers replaced by the table."""
    before, _, rest = text.partition(BEGIN)
    _, _, after = rest.partition(END)
    return f"{before}{BEGIN}\n{make_table()}\n{END}{after}"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="change nothing; exit code 1 when it is out of date")
    check = parser.parse_args().check
    readme = ROOT / "README.md"
    text = readme.read_text(encoding="utf-8")
    new = current(text)
    if check:
        return int(new != text)
    readme.write_text(new, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
