"""Tables of the README files from committed records: ``python benchmarks/tables.py [--check]``.

Each table stands between ``<!-- table NAME -->`` and ``<!-- end -->`` and is made from
``benchmarks/results/NAME.json``; ``--check`` fails where a README and the record differ.
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
        f"{texts['count']} texts, {texts['tokens']} tokens ({texts['name']}); cosine to the 16-bit "
        "reference. Memory is what the process itself holds; mapped weights are page cache. "
        f"Floor: {reports[0]['floor']['name']}. {_source(record)}",
    ]
    return "\n".join(lines)


_FEATURES = {
    "avx2": "AVX2",
    "avx512f": "AVX-512",
    "avx_vnni": "VNNI",
    "avx512_vnni": "VNNI",
    "avx512_bf16": "bf16",
    "amx_int8": "AMX",
}
_WORKLOADS = ("short", "mid", "long", "instructed", "mixed")
# In the order in which one builds on the other; a record's keys are sorted.
_STEPS = (
    *("int4, data-free", "int4, gptq", "int4, least squares", "int4, relative errors"),
    *("int4, ridges", "int4, pooled tokens", "int4", "int4, plain sensitivities"),
    *("int4, no first token", "int4, half the texts", "int4, groups of 64", "int4-5.5"),
    *("bnb-nf4, data-free", "bnb-nf4", "int8, data-free", "int8, SmoothQuant", "int8"),
    *("bnb-int8, data-free", "bnb-int8"),
)


def quantizers_table(record: dict[str, Any]) -> str:
    """One row per step of our quantizers, then one per type of llama.cpp's."""
    lines = ["| | bits | mean | p5 | min | top 10 |", "| --- | ---: | ---: | ---: | ---: | ---: |"]
    steps = [record["steps"][name] for name in _STEPS if name in record["steps"]]
    for one in (*steps, *sorted(record["llama_cpp"].values(), key=lambda one: one["bits"])):
        cosine = one["cosine"]
        title = f"`{one['variant']}`: {one['about']}" if "variant" in one else one["about"]
        lines.append(
            f"| {title} | {one['bits']:.2f} | {cosine['mean']:.4f} | {cosine['p5']:.4f} "
            f"| {cosine['min']:.4f} | {one['top10_overlap']:.3f} |"
        )
    texts = record["texts"]
    return "\n".join([*lines, "", f"{texts['count']} texts ({texts['name']}). {_source(record)}"])


def open_sets_table(record: dict[str, Any]) -> str:
    """One row per set: mean, 5th percentile and least cosine of each plan."""
    plans = sorted({plan for one in record["sets"].values() for plan in one["plans"]})
    lines = [
        f"| | texts | tokens | {' | '.join(f'`{plan}` | p5 | min' for plan in plans)} |",
        "| --- | ---: | ---: |" + " ---: |" * (3 * len(plans)),
    ]
    for name, one in sorted(record["sets"].items()):
        cells = [
            f"{one['plans'][plan][key]:.4f}" for plan in plans for key in ("mean", "p5", "min")
        ]
        lines.append(f"| {name} | {one['texts']} | {one['tokens']} | {' | '.join(cells)} |")
    return "\n".join([*lines, "", f"Mean, 5th percentile and least cosine. {_source(record)}"])


def peers_table(record: dict[str, Any]) -> str:
    """One row per workload: tokens/s of each engine, and how many times the peer's that is."""
    workloads = {name: record["workloads"][name] for name in _WORKLOADS}
    peer = "sentence-transformers"
    others = set(workloads["short"]["ratio"]) - {peer, "fp32", "auto"}
    ours = ["fp32", "auto", *sorted(others)]
    titles = [f"`{_short(record['fp32'])}`", "the planner's choice", *sorted(others)]
    lines = [
        f"| texts | tokens | {peer} | {' | '.join(titles)} |",
        "| --- | ---: | ---: |" + " ---: |" * len(ours),
    ]
    for name, one in workloads.items():
        speeds = one["tokens_per_second"]
        cells = [f"{speeds[other]:.0f} (× {one['ratio'][other]:.1f})" for other in ours]
        lines.append(
            f"| {name} ({one['texts']}) | {one['tokens']} | {speeds[peer]:.0f} "
            f"| {' | '.join(cells)} |"
        )
    chosen: dict[str, list[str]] = {}
    for name, one in workloads.items():
        chosen.setdefault(_short(one["auto"]["plan"]), []).append(name)
    choices = "; ".join(f"`{plan}` for {', '.join(names)}" for plan, names in chosen.items())
    return "\n".join([*lines, "", f"Tokens per second. Chosen: {choices}. {_source(record)}"])


def _short(plan: str) -> str:
    return plan.removesuffix("-resident")


_TITLES = {
    "export": "export of all variants and graphs",
    "export-int4": "export of `int4`",
    "export-int8": "export of `int8`",
    "reference": "16-bit reference, streamed",
}


def seven_billion_table(record: dict[str, Any]) -> str:
    """One row per step that has a ceiling: time, speed and peak, beside what was predicted."""
    lines = [
        "| | seconds | tokens/s | peak memory | predicted | ceiling |",
        "| --- | ---: | ---: | ---: | ---: | ---: |",
    ]
    steps = {name: one for name, one in record["steps"].items() if "ceiling_peak_host_bytes" in one}
    for name in (*_TITLES, *sorted(steps.keys() - _TITLES.keys())):
        one = steps[name]
        peak, predicted, ceiling = (
            f"{one[key] / 2**30:.2f} GiB" if key in one else ""
            for key in ("peak_host_bytes", "predicted_peak_host_bytes", "ceiling_peak_host_bytes")
        )
        title = _TITLES.get(name, f"`{name}`")
        speed = f"{one['tokens_per_second']:.1f}" if "tokens_per_second" in one else ""
        lines.append(
            f"| {title} | {one['seconds']:.0f} | {speed} | {peak} | {predicted} | {ceiling} |"
        )
    texts = f"{steps['reference']['texts']} texts, {steps['reference']['tokens']} tokens"
    model = f"Random weights of the shape of Mistral 7B, {texts},"
    return "\n".join([*lines, "", _source(record | {"model": model})])


def _source(record: dict[str, Any]) -> str:
    machine = record["machine"]
    known = machine["cpu_features"]
    features = dict.fromkeys(title for key, title in _FEATURES.items() if key in known)
    return (
        f"{record['model']} on {machine['cpu_name']} ({', '.join(features)}), "
        f"{machine['cpu_threads']} threads. Record: "
        f"`benchmarks/results/{record['name']}.json`, commit {record['commit'][:10]}."
    )


TABLES = {
    "demo": plans_table,
    "quantizers": quantizers_table,
    "open-sets": open_sets_table,
    "peers-cpu": peers_table,
    "peers-cpu-vnni": peers_table,
    "seven-billion": seven_billion_table,
}
DOCUMENTS = (ROOT / "README.md", ROOT / "benchmarks" / "README.md")


def fill(text: str) -> str:
    """Replaces every table of a document."""
    for name, table in TABLES.items():
        begin, end = f"<!-- table {name} -->\n", "<!-- end -->"
        before, found, rest = text.partition(begin)
        if found:
            record = json.loads((RESULTS / f"{name}.json").read_text())
            text = before + begin + table(record) + "\n" + end + rest.partition(end)[2]
    return text


def main() -> int:
    """Fills the tables of all documents, or checks them."""
    texts = {path: path.read_text() for path in DOCUMENTS}
    filled = {path: fill(text) for path, text in texts.items()}
    if "--check" in sys.argv[1:]:
        return int(filled != texts)
    for path, text in filled.items():
        path.write_text(text)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
