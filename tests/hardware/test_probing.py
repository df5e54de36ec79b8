import logging
import os
from pathlib import Path

import pytest

from lowmem.errors import BackendError
from lowmem.hardware import (
    Gpu,
    Hardware,
    host_memory,
    parse_cpu_features,
    parse_cpu_name,
    parse_gpus,
    probe,
    usable_threads,
)

GIB = 2**30
MEMINFO = "MemTotal:       16777216 kB\nMemFree:         100 kB\nMemAvailable:   12582912 kB\n"
ZEN4 = (
    "processor\t: 0\nmodel name\t: AMD EPYC 9R14\nflags\t\t: fpu sse2 avx2 avx512f avx512_vnni"
    " avx512_bf16\n\nprocessor\t: 1\nmodel name\t: AMD EPYC 9R14\nflags\t\t: fpu sse2 avx2"
    " avx512f avx512_vnni avx512_bf16\n"
)
GRAVITON = (
    "processor\t: 0\nBogoMIPS\t: 2100.00\nFeatures\t: fp asimd asimdhp asimddp i8mm bf16\n"
    "CPU implementer\t: 0x41\nCPU architecture: 8\nCPU part\t: 0xd40\n"
)
TWO_GPUS = (
    "NVIDIA GeForce RTX 3060, 12288, 11900, 8.6, 555.42.02, GPU-aaaa1111\n"
    "NVIDIA GeForce RTX 4090, 24564, 24000, 8.9, 555.42.02, GPU-aabb2222\n"
)
RTX_3060 = Gpu(
    "NVIDIA GeForce RTX 3060", 12 * GIB, 11900 * 2**20, (8, 6), "555.42.02", "GPU-aaaa1111"
)


def tree(root: Path, files: dict[str, str]) -> Path:
    """Lays out files of /proc and /sys under ``root``."""
    for name, text in {"proc/meminfo": MEMINFO, "proc/cpuinfo": ZEN4, **files}.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


def nvidia_smi(monkeypatch: pytest.MonkeyPatch, directory: Path, script: str) -> None:
    """Puts a program named nvidia-smi on PATH, and nothing else."""
    program = directory / "bin" / "nvidia-smi"
    program.parent.mkdir()
    program.write_text(f"#!/bin/sh\n{script}\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(program.parent))
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)


def test_only_features_that_decide_a_plan_are_kept() -> None:
    assert parse_cpu_features(ZEN4) == ("avx2", "avx512_bf16", "avx512_vnni", "avx512f")


def test_a_feature_that_one_core_lacks_is_not_a_feature() -> None:
    cpuinfo = "flags : avx2 avx512f\n\nflags : avx2\n"
    assert parse_cpu_features(cpuinfo) == ("avx2",)


def test_aarch64_is_named_by_its_codes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("platform.machine", lambda: "aarch64")
    assert parse_cpu_name(GRAVITON) == "aarch64 CPU implementer : 0x41 CPU part : 0xd40"
    assert parse_cpu_features(GRAVITON) == ("asimddp", "asimdhp", "bf16", "i8mm")


def test_x86_is_named_by_its_model() -> None:
    assert parse_cpu_name(ZEN4) == "AMD EPYC 9R14"


def test_an_unreadable_cpuinfo_gives_no_features() -> None:
    assert parse_cpu_features("") == ()
    assert parse_cpu_name("") != ""


@pytest.mark.parametrize(
    ("features", "bf16", "fp16", "vnni", "amx"),
    [
        ((), False, False, False, False),
        (("avx2", "avx512f"), False, False, False, False),
        (("avx2", "avx_vnni"), False, False, True, False),
        (("avx512_bf16", "avx512_vnni"), True, False, True, False),
        (("amx_bf16", "amx_int8", "avx512_fp16"), True, True, True, True),
        (("asimddp", "asimdhp", "bf16"), True, True, True, False),
    ],
)
def test_native_arithmetic_follows_from_the_features(
    features: tuple[str, ...], bf16: bool, fp16: bool, vnni: bool, amx: bool
) -> None:
    machine = Hardware("cpu", 1, features, GIB, GIB)
    found = (machine.has_native_bf16, machine.has_native_fp16, machine.has_vnni, machine.has_amx)
    assert found == (bf16, fp16, vnni, amx)


def test_threads_without_a_quota_are_the_affinity(tmp_path: Path) -> None:
    root = tree(tmp_path, {"proc/self/cgroup": "0::/a\n", "sys/fs/cgroup/a/cpu.max": "max 100000"})
    assert usable_threads(16, root) == 16


@pytest.mark.parametrize(
    ("quota", "threads"), [(50000, 1), (100000, 1), (150000, 2), (3200000, 16)]
)
def test_a_cpu_quota_is_rounded_up(tmp_path: Path, quota: int, threads: int) -> None:
    cpu_max = f"{quota} 100000\n"
    root = tree(tmp_path, {"proc/self/cgroup": "0::/a\n", "sys/fs/cgroup/a/cpu.max": cpu_max})
    assert usable_threads(16, root) == threads


def test_a_cpu_quota_of_an_ancestor_binds(tmp_path: Path) -> None:
    files = {"proc/self/cgroup": "0::/a/b\n", "sys/fs/cgroup/a/cpu.max": "200000 100000\n"}
    assert usable_threads(16, tree(tmp_path, files)) == 2


def test_a_cpu_quota_of_version_1_binds(tmp_path: Path) -> None:
    files = {
        "proc/self/cgroup": "4:cpu,cpuacct:/docker/x\n1:name=systemd:/\n",
        "sys/fs/cgroup/cpu/cpu.cfs_quota_us": "400000\n",
        "sys/fs/cgroup/cpu/cpu.cfs_period_us": "100000\n",
    }
    assert usable_threads(16, tree(tmp_path, files)) == 4


def test_no_cpu_quota_of_version_1_is_minus_one(tmp_path: Path) -> None:
    files = {
        "proc/self/cgroup": "4:cpu:/\n",
        "sys/fs/cgroup/cpu/cpu.cfs_quota_us": "-1\n",
        "sys/fs/cgroup/cpu/cpu.cfs_period_us": "100000\n",
    }
    assert usable_threads(16, tree(tmp_path, files)) == 16


def test_memory_without_control_groups_is_the_machines(tmp_path: Path) -> None:
    assert host_memory(tree(tmp_path, {})) == (16 * GIB, 12 * GIB)


def test_memory_is_limited_by_the_tightest_group_of_the_hierarchy(tmp_path: Path) -> None:
    files = {
        "proc/self/cgroup": "0::/a/b\n",
        "sys/fs/cgroup/a/b/memory.max": "max\n",
        "sys/fs/cgroup/a/b/memory.current": "1\n",
        "sys/fs/cgroup/a/memory.max": f"{8 * GIB}\n",
        "sys/fs/cgroup/a/memory.current": f"{5 * GIB}\n",
    }
    assert host_memory(tree(tmp_path, files)) == (8 * GIB, 3 * GIB)


def test_page_cache_of_a_group_counts_as_free(tmp_path: Path) -> None:
    files = {
        "proc/self/cgroup": "0::/a\n",
        "sys/fs/cgroup/a/memory.max": f"{8 * GIB}\n",
        "sys/fs/cgroup/a/memory.current": f"{7 * GIB}\n",
        "sys/fs/cgroup/a/memory.stat": (
            f"anon {2 * GIB}\ninactive_file {4 * GIB}\nactive_file {GIB}\n"
        ),
    }
    assert host_memory(tree(tmp_path, files)) == (8 * GIB, 6 * GIB)


def test_memory_of_a_container_of_version_1_is_found_at_the_mount(tmp_path: Path) -> None:
    files = {
        "proc/self/cgroup": "4:memory:/docker/0123\n0::/\n",
        "sys/fs/cgroup/memory/memory.limit_in_bytes": f"{4 * GIB}\n",
        "sys/fs/cgroup/memory/memory.usage_in_bytes": f"{3 * GIB}\n",
        "sys/fs/cgroup/memory/memory.stat": f"inactive_file 7\ntotal_inactive_file {GIB}\n",
    }
    assert host_memory(tree(tmp_path, files)) == (4 * GIB, 2 * GIB)


def test_no_limit_of_version_1_is_a_huge_number(tmp_path: Path) -> None:
    files = {
        "proc/self/cgroup": "4:memory:/\n",
        "sys/fs/cgroup/memory/memory.limit_in_bytes": "9223372036854771712\n",
        "sys/fs/cgroup/memory/memory.usage_in_bytes": "100\n",
    }
    assert host_memory(tree(tmp_path, files)) == (16 * GIB, 12 * GIB)


def test_a_group_outside_of_the_namespace_is_read_at_the_mount(tmp_path: Path) -> None:
    files = {
        "proc/self/cgroup": "0::/../../x\n",
        "sys/fs/cgroup/memory.max": f"{4 * GIB}\n",
        "sys/fs/cgroup/memory.current": f"{GIB}\n",
    }
    assert host_memory(tree(tmp_path, files)) == (4 * GIB, 3 * GIB)


def test_a_group_over_its_limit_has_nothing_free(tmp_path: Path) -> None:
    files = {
        "proc/self/cgroup": "0::/a\n",
        "sys/fs/cgroup/a/memory.max": f"{GIB}\n",
        "sys/fs/cgroup/a/memory.current": f"{2 * GIB}\n",
    }
    assert host_memory(tree(tmp_path, files)) == (GIB, 0)


def test_a_machine_without_meminfo_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(BackendError, match=r"proc/meminfo must state MemTotal and MemAvailable"):
        host_memory(tmp_path)


def test_gpus_are_read_from_nvidia_smi() -> None:
    gpus, problem = parse_gpus(TWO_GPUS, None)
    assert gpus[0] == RTX_3060
    assert [gpu.compute_capability for gpu in gpus] == [(8, 6), (8, 9)]
    assert problem is None


@pytest.mark.parametrize(
    ("visible", "uuids"),
    [
        ("0", ["GPU-aaaa1111"]),
        ("1, 0", ["GPU-aabb2222", "GPU-aaaa1111"]),
        ("GPU-aabb2222", ["GPU-aabb2222"]),
        ("GPU-aab", ["GPU-aabb2222"]),
        ("1,-1,0", ["GPU-aabb2222"]),
        ("0,7,1", ["GPU-aaaa1111"]),
    ],
)
def test_cuda_visible_devices_selects_and_orders(visible: str, uuids: list[str]) -> None:
    gpus, problem = parse_gpus(TWO_GPUS, visible)
    assert [gpu.uuid for gpu in gpus] == uuids
    assert problem is None


@pytest.mark.parametrize("visible", ["", "-1", "2", "GPU-aa", "0,0", "MIG-aaaa", "none"])
def test_cuda_visible_devices_that_names_no_gpu_is_the_reason(visible: str) -> None:
    expected = f"CUDA_VISIBLE_DEVICES={visible!r} names no GPU of this machine"
    assert parse_gpus(TWO_GPUS, visible) == ((), expected)


def test_an_empty_listing_is_the_reason() -> None:
    assert parse_gpus("\n", None) == ((), "nvidia-smi lists no GPU")


def test_a_gpu_whose_memory_is_not_stated_is_left_out_with_the_reason() -> None:
    listing = TWO_GPUS + "NVIDIA GB10, [N/A], [N/A], 12.1, 580.95, GPU-cccc3333\n"
    gpus, problem = parse_gpus(listing, None)
    assert len(gpus) == 2
    assert problem is not None
    assert "NVIDIA GB10, [N/A]" in problem


def test_probe_reads_a_machine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    nvidia_smi(monkeypatch, tmp_path, f"printf '{TWO_GPUS}'")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {0, 1, 2})
    features = ("avx2", "avx512_bf16", "avx512_vnni", "avx512f")
    monkeypatch.setenv("CUDA_DEVICE_ORDER", "")
    monkeypatch.delenv("CUDA_DEVICE_ORDER")
    expected = Hardware("AMD EPYC 9R14", 3, features, 16 * GIB, 12 * GIB, (RTX_3060,))
    assert probe(tree(tmp_path, {})) == expected
    assert os.environ["CUDA_DEVICE_ORDER"] == "PCI_BUS_ID"  # as nvidia-smi lists them


def test_probe_asks_for_the_fields_it_reads(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    nvidia_smi(monkeypatch, tmp_path, 'echo "$@" >&2; exit 1')
    problem = probe(tree(tmp_path, {})).gpu_problem
    assert problem is not None
    assert problem.endswith(
        "--query-gpu=name,memory.total,memory.free,compute_cap,driver_version,uuid"
        " --format=csv,noheader,nounits"
    )


def test_without_nvidia_smi_there_is_no_gpu_and_no_warning(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("shutil.which", lambda program: None)
    machine = probe(tree(tmp_path, {}))
    assert machine.gpus == ()
    assert machine.gpu_problem == "nvidia-smi is not installed, so there is no NVIDIA driver"
    assert caplog.records == []


def test_a_driver_that_fails_is_a_warning_and_the_reason(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    nvidia_smi(monkeypatch, tmp_path, "echo 'Failed to initialize NVML'; exit 18")
    machine = probe(tree(tmp_path, {}))
    assert machine.gpus == ()
    assert machine.gpu_problem == "nvidia-smi failed with status 18: Failed to initialize NVML"
    assert [record.levelno for record in caplog.records] == [logging.WARNING]


def test_a_driver_that_hangs_is_the_reason(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    nvidia_smi(monkeypatch, tmp_path, "exec /bin/sleep 60")
    monkeypatch.setattr("lowmem.hardware.probing._NVIDIA_SMI_TIMEOUT_SECONDS", 0.1)
    assert probe(tree(tmp_path, {})).gpu_problem == "nvidia-smi gave no answer in 0.1 seconds"


def test_a_program_that_cannot_be_run_is_the_reason(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    nvidia_smi(monkeypatch, tmp_path, "")
    (tmp_path / "bin" / "nvidia-smi").write_text("\x00")
    problem = probe(tree(tmp_path, {})).gpu_problem
    assert problem == "nvidia-smi cannot be run: Exec format error"


def test_probe_works_here() -> None:
    machine = probe()
    assert machine.cpu_threads >= 1
    assert 0 < machine.host_free_bytes <= machine.host_total_bytes
