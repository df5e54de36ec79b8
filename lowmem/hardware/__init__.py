"""The machine as one value, probed or described.

Whatever plans for a machine takes a :class:`Hardware` and asks nothing else, so that a plan can be
made for a card that is not here.
"""

from __future__ import annotations

from lowmem.hardware.machine import CPU_FEATURES, Gpu, Hardware, fingerprint
from lowmem.hardware.probing import (
    host_memory,
    parse_cpu_features,
    parse_cpu_name,
    parse_gpus,
    probe,
    usable_threads,
)

__all__ = [
    "CPU_FEATURES",
    "Gpu",
    "Hardware",
    "fingerprint",
    "host_memory",
    "parse_cpu_features",
    "parse_cpu_name",
    "parse_gpus",
    "probe",
    "usable_threads",
]
