"""Write the table of supported models into docs/models.md: the families that tests run, and what the tests measured.

`python scripts/models_table.py` rewrites the part between the markers from benchmarks/families.json; `--check` only
says whether it is current. `--measure` runs the tests first and writes that file (with `--files` only these, and the
rest of it stays as it is); `--report` takes what a run of all tests noted.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ET
from pathlib import Path
from typing import Any

import benchlib.test_helpers  # noqa: F401

ROOT = Path(__file__).resolve().parent.parent
BEGIN, END = "<!-- models table: begin -->", "<!-- models table: end -->"
MEASURED = ROOT / "benchmarks" / "families.json"
FILES = (
    "tests/families/test_families_exact.py", "tests/families/test_adapters.py",
    "tests/families/test_adapted_ways.py", "tests/families/test_grok1.py",
    "tests/families/test_quantised_models.py", "tests/families/test_gguf_models.py",
)  # fmt: skip
# The ways of test_families_exact: each layout is served in another.
DOOR = ("published, read ahead", "stacked, device", "shards")
QUANTISED = ("int8", "int4", "fp8", "mxfp4", "GGUF")
Found = dict[str, dict[str, float]]
# Model types of adapted families that have another name than the folder.
_ADAPTED_TYPES = {
    "llama4": "llama4_text", "llama4_multimodal": "llama4_text", "llama4_top2": "llama4_text", "nllb_moe": "nllb-moe",
    "step3p7": "step3p5",
}  # fmt: skip


def make_table(found: Found) -> str:
    """The markdown table: one row a family, then those left out, each with its reason. A family without numbers was not
    measured since it came; the tests hold it to the same bound.
    """
    from adapted_families import ADAPTED, ENCODER_DECODERS
    from families import EXCLUDED, FAMILIES, MULTIMODAL, make_config

    read = _quantised()
    ways = {name: _way(make_config(name).get_text_config().model_type) for name in (*FAMILIES, *MULTIMODAL)}
    ways |= {"grok-1": _way("grok-1")} | {name: _way(_ADAPTED_TYPES.get(name, name)) for name in ADAPTED}

    def row(name: str, shown: str, described: str, forms: tuple[str, ...]) -> str:
        exact = f"yes, {max(found[name].values()):.0e}" if name in found else "yes"
        quantised = ", ".join(form for form in QUANTISED if name in read[form]) or "-"
        return f"| {shown} | {described} | {exact} | {'; '.join(forms)} | {quantised} | {ways[name]} |"

    rows = [row(name, name, family.model_class, DOOR) for name, family in sorted(FAMILIES.items())]
    rows += [
        row(name, name.removesuffix("_multimodal"), f"{family.model_class}, text only", ("published",))
        for name, family in sorted(MULTIMODAL.items())
    ]
    for name, family in sorted(ADAPTED.items()):
        if not name.endswith("_top2"):
            described = f"{family.model_class}{', ' + family.notes if family.notes else ''}"
            forms = ("published", "device") if name in ENCODER_DECODERS else ("published", "shards", "device")
            rows.append(row(name, family.name, described, forms))
    numpy = "Grok1ForCausalLM, offmoe's own, against NumPy (`tests/families/test_grok1.py`)"
    rows.append(row("grok-1", "grok-1", numpy, ("published", "device")))
    lines = [
        "| family | class | exact: largest difference | read as, run on | quantised forms | decode on a CPU |",
        "|---|---|---|---|---|---|",
    ]
    lines += [*rows, "", "| left out | why |", "|---|---|"]
    lines += [f"| {name} | {reason} |" for name, reason in sorted(EXCLUDED.items())]
    return "\n".join(lines)


def _way(model_type: str) -> str:
    """The decode path of the family on a CPU."""
    from offmoe.decode.families.common import FAMILIES
    from offmoe.decode.families.left_out import LEFT_OUT

    return "fused" if model_type in FAMILIES else f"modules: {LEFT_OUT[model_type]}"


def _quantised() -> dict[str, set[str]]:
    """Quantised form -> the families that the tests read it of."""
    from gguf_makers import MODELS
    from test_adapted_ways import INT4
    from test_quantised_models import COMPRESSED, FP8, PER_EXPERT, form_of

    read: dict[str, set[str]] = {
        "int8": set(PER_EXPERT), "int4": {*INT4, "grok-1"}, "fp8": set(FP8), "mxfp4": {"gpt_oss"},
        "GGUF": {made.family for made in MODELS.values()},
    }  # fmt: skip
    for name, scheme in COMPRESSED.values():
        read[form_of(scheme)].add(name)
    return read


def current(text: str, found: Found) -> str:
    """`text` with the part between the markers replaced by the table."""
    before, _, rest = text.partition(BEGIN)
    _, _, after = rest.partition(END)
    return f"{before}{BEGIN}\n{make_table(found)}\n{END}{after}"


def measure(files: list[str]) -> Found:
    """Run the tests; what they noted. Raises CalledProcessError if one fails: then no family is called exact."""
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        command = [sys.executable, "-m", "pytest", "-q", *files, f"--junitxml={report}"]
        subprocess.run(command, cwd=ROOT, check=True)
        return noted_in(report)


def noted_in(report: Path) -> Found:
    """The largest difference of logits of each family and form, from pytest's XML. Raises ValueError if one of the
    tests that note them failed.
    """
    largest: Found = {}
    names = {Path(file).stem for file in FILES}
    for case in ET.parse(report).iter("testcase"):
        ours = case.get("classname", "").split(".")[-1] in names
        if ours and any(case.find(kind) is not None for kind in ("failure", "error")):
            raise ValueError(f"{case.get('name')} failed: see {report}")
        for found in case.iter("property"):
            if found.get("name") == "measured":
                family, form, difference = str(found.get("value")).split("|")
                forms = largest.setdefault(family, {})
                forms[form] = max(forms.get(form, 0.0), float(difference))
    return largest


def write(found: Found) -> None:
    """Keep what was measured, and on what."""
    from benchlib.machine import describe_machine, describe_versions

    record: dict[str, Any] = {
        "command": "scripts/test --junitxml=report.xml; python scripts/models_table.py --report report.xml",
        "what": "largest difference of logits from the reference, as a share of the largest logit, float32",
        "machine": describe_machine(), "versions": describe_versions(ROOT),
        "families": {name: dict(sorted(forms.items())) for name, forms in sorted(found.items())},
    }  # fmt: skip
    MEASURED.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="change nothing; exit code 1 when it is out of date")
    parser.add_argument(
        "--measure", action="store_true", help="run the tests (some minutes) and keep what they measure"
    )
    parser.add_argument("--files", nargs="+", default=[], metavar="TEST", help="with --measure: only these test files")
    parser.add_argument(
        "--report", type=Path, metavar="XML", help="instead of running them, what `scripts/test --junitxml=XML` noted"
    )
    options = parser.parse_args()
    found: Found = json.loads(MEASURED.read_text(encoding="utf-8"))["families"] if MEASURED.is_file() else {}
    if options.report is not None:
        found = noted_in(options.report)
        write(found)
    elif options.measure:
        new = measure(options.files or list(FILES))
        found = {name: found.get(name, {}) | new.get(name, {}) for name in found | new} if options.files else new
        write(found)
    page = ROOT / "docs" / "models.md"
    text = page.read_text(encoding="utf-8")
    table = current(text, found)
    if options.check:
        return int(table != text)
    page.write_text(table, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
