"""Looking at this machine: Linux's own files, and nvidia-smi.

What is free is what this process may still use: limits of the control groups it runs in, version 1
or 2, count as much as the machine's own size.
"""

from __future__ import annotations

import logging
import os
import platform
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

from lowmem.errors import BackendError
from lowmem.hardware.machine import CPU_FEATURES, Gpu, Hardware

logger = logging.getLogger(__name__)

_GPU_FIELDS = "name,memory.total,memory.free,compute_cap,driver_version,uuid"
_NVIDIA_SMI_TIMEOUT_SECONDS = 30
_WSL_NVIDIA_SMI = "/usr/lib/wsl/lib/nvidia-smi"  # not always on PATH under WSL2

_CGROUP_MEMORY_FILES = (
    ("memory.max", "memory.current"),
    ("memory.limit_in_bytes", "memory.usage_in_bytes"),
)
# The page cache in a group's usage. A mapped file that is read twice becomes active: without that
# part, a bundle that was opened before would count as memory in use.
_CGROUP_CACHE_KEYS = ("inactive_file", "active_file")


def probe(root: Path = Path("/")) -> Hardware:
    """Looks at this machine, afresh at each call.

    Args:
        root: Where ``proc`` and ``sys`` are.

    Raises:
        BackendError: /proc/meminfo does not state the memory, as on anything but Linux.
    """
    cpuinfo = _read(root / "proc/cpuinfo")
    total_bytes, free_bytes = host_memory(root)
    gpus, problem = _probe_gpus()
    return Hardware(
        cpu_name=parse_cpu_name(cpuinfo),
        cpu_threads=usable_threads(len(os.sched_getaffinity(0)), root),
        cpu_features=parse_cpu_features(cpuinfo),
        host_total_bytes=total_bytes,
        host_free_bytes=free_bytes,
        gpus=gpus,
        gpu_problem=problem,
    )


def parse_cpu_name(cpuinfo: str) -> str:
    """Returns the model name in /proc/cpuinfo, or on aarch64 the codes that stand for it."""
    if match := re.search(r"^model name\s*: (.+)$", cpuinfo, re.MULTILINE):
        return match[1].strip()
    codes = re.findall(r"^CPU (?:implementer|part)\s*: \w+$", cpuinfo, re.MULTILINE)
    return " ".join([platform.machine(), *(" ".join(code.split()) for code in codes[:2])])


def parse_cpu_features(cpuinfo: str) -> tuple[str, ...]:
    """Returns those of :data:`CPU_FEATURES` that every processor in /proc/cpuinfo has, sorted."""
    lines = re.findall(r"^(?:flags|Features)\s*:(.*)$", cpuinfo, re.MULTILINE)
    each = (CPU_FEATURES.intersection(line.split()) for line in set(lines))
    return tuple(sorted(frozenset.intersection(*each))) if lines else ()


def usable_threads(affinity: int, root: Path = Path("/")) -> int:
    """Returns how many threads can run at once, at least 1.

    Args:
        affinity: Number of processors this process may be scheduled on.
        root: Where ``proc`` and ``sys`` are, for the CPU quota, which is rounded up.
    """
    threads = affinity
    for group in _cgroups(root, "cpu"):
        v1 = f"{_read(group / 'cpu.cfs_quota_us')} {_read(group / 'cpu.cfs_period_us')}"
        for quota_and_period in (_read(group / "cpu.max"), v1):
            if match := re.fullmatch(r"(\d+)\s+([1-9]\d*)\s*", quota_and_period):
                quota, period = map(int, match.groups())
                threads = min(threads, -(-quota // period))
    return max(1, threads)


def host_memory(root: Path = Path("/")) -> tuple[int, int]:
    """Returns (total, free) bytes of main memory within the limits on this process.

    Page cache counts as free, as it does in MemAvailable.

    Args:
        root: Where ``proc`` and ``sys`` are.

    Raises:
        BackendError: /proc/meminfo does not state MemTotal and MemAvailable.
    """
    path = root / "proc/meminfo"
    sizes = dict(re.findall(r"^(\w+):\s*(\d+) kB$", _read(path), re.MULTILINE))
    if not {"MemTotal", "MemAvailable"} <= sizes.keys():
        raise BackendError(f"{path} must state MemTotal and MemAvailable: lowmem runs on Linux")
    total, free = 1024 * int(sizes["MemTotal"]), 1024 * int(sizes["MemAvailable"])
    for group in _cgroups(root, "memory"):
        counts = re.findall(r"^(\w+) (\d+)$", _read(group / "memory.stat"), re.MULTILINE)
        stat: dict[str, str] = dict(counts)
        # Version 1 counts the groups inside this one only under the names with "total_".
        cached = sum(int(stat.get(f"total_{k}", stat.get(k, 0))) for k in _CGROUP_CACHE_KEYS)
        for limit_file, usage_file in _CGROUP_MEMORY_FILES:
            limit = _read(group / limit_file).strip()
            if not limit.isdecimal():
                continue
            used = max(0, int(_read(group / usage_file).strip() or 0) - cached)
            total = min(total, int(limit))
            free = min(free, max(0, int(limit) - used))
    return total, free


def parse_gpus(listing: str, visible: str | None) -> tuple[tuple[Gpu, ...], str | None]:
    """Reads what nvidia-smi prints, and keeps what CUDA_VISIBLE_DEVICES leaves.

    Args:
        listing: One GPU a line, the fields of the query separated by commas, sizes in MiB.
        visible: The value of CUDA_VISIBLE_DEVICES, or None where it is not set.

    Returns:
        The GPUs, and why there is none or one is missing, else None.
    """
    rows = [line.rsplit(", ", 5) for line in listing.splitlines() if line.strip()]
    if not rows:
        return (), "nvidia-smi lists no GPU"
    if visible is not None:
        rows = [rows[index] for index in _visible([row[-1] for row in rows], visible)]
        if not rows:
            return (), f"CUDA_VISIBLE_DEVICES={visible!r} names no GPU of this machine"
    gpus, problem = [], None
    for row in rows:
        match row:
            case [name, total, free, capability, driver, uuid] if (
                total.isdecimal() and free.isdecimal() and re.fullmatch(r"\d+\.\d+", capability)
            ):
                major, minor = map(int, capability.split("."))
                gpus.append(
                    Gpu(name, int(total) << 20, int(free) << 20, (major, minor), driver, uuid)
                )
            case _:
                problem = f"nvidia-smi must state {_GPU_FIELDS} of each GPU, got {', '.join(row)!r}"
    return tuple(gpus), problem


def _visible(uuids: list[str], visible: str) -> list[int]:
    """Applies CUDA's rules: the first entry that names no GPU ends the list, a repeat voids it."""
    chosen: list[int] = []
    for entry in map(str.strip, visible.split(",")):
        if entry.isdecimal():
            named = [index for index in range(len(uuids)) if index == int(entry)]
        else:
            starts = entry.startswith("GPU-")
            named = [index for index, uuid in enumerate(uuids) if starts and uuid.startswith(entry)]
        if len(named) != 1:
            break
        chosen += named
    return chosen if len(set(chosen)) == len(chosen) else []


def _probe_gpus() -> tuple[tuple[Gpu, ...], str | None]:
    """Asks nvidia-smi; a driver that fails is a warning, since the CPU can still be used."""
    program = shutil.which("nvidia-smi") or shutil.which(_WSL_NVIDIA_SMI)
    if program is None:
        return (), "nvidia-smi is not installed, so there is no NVIDIA driver"
    command = [program, f"--query-gpu={_GPU_FIELDS}", "--format=csv,noheader,nounits"]
    try:
        done = subprocess.run(
            command,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            check=False,
            encoding="utf-8",
            errors="replace",
            timeout=_NVIDIA_SMI_TIMEOUT_SECONDS,
        )
    except subprocess.TimeoutExpired:
        gpus, problem = (), f"nvidia-smi gave no answer in {_NVIDIA_SMI_TIMEOUT_SECONDS} seconds"
    except OSError as error:
        gpus, problem = (), f"nvidia-smi cannot be run: {error.strerror}"
    else:
        if done.returncode == 0:
            # CUDA's own order puts the fastest first: device 0 would be another than listed here.
            os.environ.setdefault("CUDA_DEVICE_ORDER", "PCI_BUS_ID")
            return parse_gpus(done.stdout, os.environ.get("CUDA_VISIBLE_DEVICES"))
        said = " ".join((done.stderr or done.stdout).split())
        gpus, problem = (), f"nvidia-smi failed with status {done.returncode}: {said}"
    logger.warning("No GPU will be used: %s", problem)
    return gpus, problem


def _cgroups(root: Path, controller: str) -> Iterator[Path]:
    """Yields the directories whose limits bind this process, the innermost first.

    In a container the path in /proc may be the host's: what does not exist here is passed over by
    the readers, and the mount itself is the container's own group.
    """
    for line in _read(root / "proc/self/cgroup").splitlines():
        _, controllers, inner = line.split(":", 2)
        if controllers and controller not in controllers.split(","):
            continue
        mount = root / "sys/fs/cgroup" / (controller if controllers else "")
        parts = Path(inner).parts[1:]
        if ".." not in parts:  # a group outside of this cgroup namespace, which cannot be seen
            for depth in range(len(parts), 0, -1):
                yield mount.joinpath(*parts[:depth])
        yield mount


def _read(path: Path) -> str:
    """Returns the text of a file of /proc or /sys, empty where there is none."""
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""
