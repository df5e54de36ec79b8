"""Tables of the README from committed records: ``python benchmarks/tables.py [--check]``.

Each table stands between ``<!-- table NAME -->`` and ``<!-- end -->`` and is made from
``benchmarks/results/NAME.json``; ``--check`` fails where the README and the record differ.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results"


def plans_table(record: dict[str, Any]) -> str:
    """One row per plan: size, memory, speed and fidelity of the same artifact in the same run."""
    lines = [
        "| plan | bits/weight | on disk | peak memory | tokens/s | mean | p5 | min | floor |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: | --- |",
    ]
    reports = sorted(
        record["reports"], key=lambda one: (one["verdict"] == "fail", -one["tokens_per_second"])
    )
    for one in reports:
        cosine = one["cosine"]
        lines.append(
            f"| `{one['plan']}` | {one['bits_per_weight']['linears']:.2f} "
            f"| {one['bytes'] / 2**20:.0f} MiB | {one['peak_host_bytes'] / 2**20:.0f} MiB "
            f"| {one['tokens_per_second']:.0f} | {cosine['mean']:.4f} | {cosine['p5']:.4f} "
            f"| {cosine['min']:.4f} | {one['verdict']} |"
        )
    texts = reports[0]["texts"]
    lines += [
        "",
        f"{record['model']} on {record['machine']['cpu_name']}, {record['machine']['cpu_threads']} "
        f"threads; {texts['count']} texts, {texts['tokens']} tokens ({texts['name']}); cosine to "
        "the 16-bit reference. Memory is what the process itself holds; mapped weights are page "
        f"cache. Floor: {reports[0]['floor']['name']}. Record: "
        f"`benchmarks/results/{record['name']}.json`, commit {record['commit'][:10]}.",
    ]
    return "\n".join(lines)


TABLES = {"demo": plans_table}


def fill(text: str) -> str:
    """Replaces every table of a document."""
    for name, table in TABLES.items():
        record = json.loads((RESULTS / f"{name}.json").read_text())
        begin, end = f"<!-- table {name} -->\n", "<!-- end -->"
        before, found, rest = text.partition(begin)
        if found:
            text = before + begin + table(record) + "\n" + end + rest.partition(end)[2]
    return text


def main() -> int:
    """Fills the README's tables, or checks them."""
    readme = ROOT / "README.md"
    text = readme.read_text()
    filled = fill(text)
    if "--check" in sys.argv[1:]:
        return int(filled != text)
    readme.write_text(filled)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
