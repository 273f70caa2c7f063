"""Print the lower bounds of pyproject.toml as pip constraints: `transformers>=5.17,<6` becomes `transformers==5.17.*`.

What only the tests need stays as constraints.txt pins it: which versions of it work is no promise to users.
Needs Python 3.10 and nothing else.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
# Bounds of offmoe itself; an extra's line has them too, and is not a user's.
LIST = re.compile(r"^dependencies = \[\n(.*?)^\]", re.MULTILINE | re.DOTALL)
BOUND = re.compile(r'"([A-Za-z0-9_.-]+)>=([0-9.]+)')
PIN = re.compile(r"^([A-Za-z0-9_.-]+)==", re.MULTILINE)


def lowest(project: str, pinned: str) -> list[str]:
    """Constraints, one a line."""
    found = LIST.search(project)
    if found is None:
        raise ValueError("pyproject.toml has no list of dependencies")
    bounds = dict(BOUND.findall(found.group(1)))
    lines = [f"{name}=={version}.*" for name, version in bounds.items()]
    # torch names the one triton that it works with.
    tools = (line for line in pinned.splitlines() if PIN.match(line) and not line.startswith("triton=="))
    return lines + [line for line in tools if line.split("==")[0] not in bounds]


def main() -> None:
    texts = [(ROOT / name).read_text(encoding="utf-8") for name in ("pyproject.toml", "constraints.txt")]
    sys.stdout.write("\n".join(lowest(*texts)) + "\n")


if __name__ == "__main__":
    main()
