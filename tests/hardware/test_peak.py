import subprocess
import sys

from lowmem.hardware.peak import MemoryPeak


def test_the_peak_counts_what_children_hold():
    code = (
        "import subprocess, sys; "
        "subprocess.run([sys.executable, '-c', "
        "'import time; block = bytearray(200 * 2**20); time.sleep(0.5)'])"
    )
    with subprocess.Popen([sys.executable, "-c", code]) as process, MemoryPeak(process.pid) as peak:
        process.wait()
    assert peak.bytes > 200 * 2**20


def test_a_mapped_file_is_no_memory_of_the_process(tmp_path):
    file = tmp_path / "weights"
    file.write_bytes(bytes(200 * 2**20))
    code = (
        "import mmap, sys, time; file = open(sys.argv[1], 'rb'); "
        "data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ); "
        "total = sum(data[::4096]); time.sleep(0.5)"
    )
    command = [sys.executable, "-c", code, str(file)]
    with subprocess.Popen(command) as process, MemoryPeak(process.pid) as peak:
        process.wait()
    assert peak.bytes < 50 * 2**20
