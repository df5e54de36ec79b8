"""What a session of ONNX Runtime holds, in a process of its own."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from export.graph import write_graphs
from lowmem.artifact.formats import Format, Int8Channel, IntGrouped, Plain
from lowmem.artifact.weights import Checkpoint
from lowmem.compute.plan import Plan
from lowmem.hardware import probe
from lowmem.planner.memory import ONNX_BASE_BYTES, predict, stored_bytes
from tests.bidirectional import NVEMBED, put_own_config, tiny_nvembed
from tests.models import CONTRACT, tiny_checkpoint
from tests.variants import write_variant

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="memory is read from /proc")

_MEASURE = """
import json, os, sys, threading
from pathlib import Path
import numpy as np
import onnxruntime
from lowmem.artifact.contract import Contract
from lowmem.compute.onnx_engine import OnnxEngine
from lowmem.text.batching import EncodedText, pack

def held():
    lines = dict(line.split(":", 1) for line in open("/proc/self/status"))
    return 1024 * sum(int(lines[key].split()[0]) for key in ("RssAnon", "RssShmem"))

directory, contract = Path(sys.argv[1]), Contract(**json.loads(sys.argv[2]))
peak, done = 0, threading.Event()
def watch():
    global peak
    while not done.wait(0.002):
        peak = max(peak, held())
base = held()
watcher = threading.Thread(target=watch)
watcher.start()
model = OnnxEngine(directory, "model.onnx", contract, "cpu", 1)
random = np.random.default_rng(0)
for _ in range(2):
    for size in (8, 5, 3, 8):
        texts = [EncodedText(random.integers(4, 300, size), 0, 0) for _ in range(4)]
        model.embed(pack(texts, 4096))
done.set()
watcher.join()
print(json.dumps({"bytes": peak - base, "torch": "torch" in sys.modules}))
"""

_WIDE = {"hidden_size": 1024, "intermediate_size": 4096, "layers": 3, "tied": True}
_LARGEST_MATRIX_BYTES = 4 * 1024 * 4096
_SMALL_BYTES = 24 * 2**20  # the session itself, and activations of 32 tokens


@pytest.mark.parametrize(
    "form", [Plain("F16"), Plain("BF16"), IntGrouped(4, 64), Int8Channel()], ids=str
)
def test_a_session_holds_its_packed_weights_one_matrix_and_little_else(
    tmp_path: Path, form: Format
) -> None:
    checkpoint = tiny_checkpoint(tmp_path / "source", **_WIDE)  # type: ignore[arg-type]
    variant = write_variant(checkpoint.path, tmp_path / "variant", form)
    write_graphs(variant, CONTRACT)
    command = [sys.executable, "-c", _MEASURE, str(variant), json.dumps(CONTRACT.to_json())]
    shown = subprocess.run(command, capture_output=True, text=True, check=True)
    measured = json.loads(shown.stdout)
    opened = Checkpoint(variant)
    weights = opened.config.linear_weights
    packed = 0 if isinstance(form, Plain) else stored_bytes(opened.config, opened.formats)
    if isinstance(form, IntGrouped):
        packed += 2 * weights // form.group_size  # float16 scales become float32
    allowed = packed + _LARGEST_MATRIX_BYTES + _SMALL_BYTES
    assert allowed < 4 * weights, "a float32 copy of the weights would show"
    assert measured["bytes"] < allowed
    assert not measured["torch"]


@pytest.mark.parametrize("form", [Plain("F16"), IntGrouped(4, 64), Int8Channel()], ids=str)
def test_a_session_with_latent_attention_holds_what_is_predicted(
    tmp_path: Path, form: Format
) -> None:
    source = tiny_nvembed(tmp_path / "source", hidden_size=1024, intermediate_size=4096).path
    put_own_config(source)
    variant = write_variant(source, tmp_path / "variant", form)
    write_graphs(variant, NVEMBED)
    command = [sys.executable, "-c", _MEASURE, str(variant), json.dumps(NVEMBED.to_json())]
    shown = subprocess.run(command, capture_output=True, text=True, check=True)
    opened = Checkpoint(variant)
    plan = Plan("", "onnxruntime", "cpu", "fp32", "resident", batch_tokens=32)
    host, _ = predict(plan, opened.config, opened.formats, probe())
    predicted = host - ONNX_BASE_BYTES
    measured = json.loads(shown.stdout)["bytes"]
    assert 0.7 * predicted < measured < predicted + _SMALL_BYTES


_MEASURE_LAYERS = """
import os
import sys
import time
from pathlib import Path
import numpy as np
from lowmem.artifact.contract import read_contract
from lowmem.compute.onnx_engine import OnnxEngine
from lowmem.hardware.peak import MemoryPeak
from lowmem.text.batching import EncodedText, pack
directory = Path(sys.argv[1])
engine = OnnxEngine(directory, "model.onnx", read_contract(Path(sys.argv[2])), "cpu", 1)
ids = np.full(128, 5)
with MemoryPeak(os.getpid()) as peak:
    time.sleep(0.05)
    before = peak.bytes
    batches = pack([EncodedText(np.append(ids[1:], row + 6), 0, 0) for row in range(32)], 4096)
    engine.embed(batches)
    time.sleep(0.05)
print(peak.bytes - before)
"""


def test_activations_of_a_pass_do_not_grow_with_the_layers(tmp_path: Path) -> None:
    contract = tmp_path / "contract.json"
    contract.write_text(json.dumps(CONTRACT.to_json()))
    grown = []
    for layers in (2, 12):
        source = tiny_checkpoint(tmp_path / f"{layers}", layers=layers, num_key_value_heads=6)
        variant = write_variant(source.path, tmp_path / f"{layers}-int4", IntGrouped(4, 64))
        write_graphs(variant, CONTRACT)
        command = [sys.executable, "-c", _MEASURE_LAYERS, str(variant), str(contract)]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        grown.append(int(done.stdout))
    a_layers_keys_and_values = 2 * 4096 * 4 * 6 * 32
    assert grown[1] - grown[0] < 3 * a_layers_keys_and_values
