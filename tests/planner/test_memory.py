import subprocess
import sys
from dataclasses import replace

import pytest

from lowmem.artifact.formats import Int8Channel
from lowmem.artifact.latent_attention import LatentAttentionConfig
from lowmem.artifact.variants import HIGH, formats_for
from lowmem.compute.plan import Plan
from lowmem.hardware import Hardware
from lowmem.planner import device_memory, memory
from lowmem.text.batching import PREFIX_TOKENS
from tests.mistral import mistral_tokenizer
from tests.shapes import SEVEN_B

GIB = 2**30
PLAIN, WITH_VNNI, WITH_AMX = (
    Hardware("CPU", 2, features, 16 * GIB, 12 * GIB)
    for features in (("avx2",), ("avx512_vnni",), ("amx_bf16",))
)
VOCABULARY = 800 * SEVEN_B.vocab_size

MEASURE_TOKENIZER = """
import re, sys
from tokenizers import Tokenizer
def held():
    return 1024 * int(re.search(r"RssAnon:\\s+(\\d+)", open("/proc/self/status").read())[1])
before = held()
tokenizer = Tokenizer.from_file(sys.argv[1])
print(held() - before)
"""


def predict(variant, device="cpu", compute="fp32", schedule="resident", engine="torch", **changes):
    plan = replace(Plan(variant, engine, device, compute, schedule), **changes)
    return memory.predict(plan, SEVEN_B, formats_for(variant, SEVEN_B, "F16"), PLAIN)


def test_mapped_weights_cost_a_cpu_plan_nothing():
    hosts = {predict(variant)[0] for variant in ("fp16", "int8", "int4", "bnb-nf4")}
    assert len(hosts) == 1
    assert hosts.pop() < 2 * GIB


def test_onnxruntime_packs_codes_and_maps_16_bit_weights():
    packed = predict("int8", engine="onnxruntime")[0] - predict("fp16", engine="onnxruntime")[0]
    assert packed > 0.9 * SEVEN_B.linear_weights


def test_onnxruntime_holds_the_scores_of_attention_to_all_tokens():
    plan = Plan("int4", "onnxruntime", "cpu", "fp32", "resident")
    formats = formats_for("int4", SEVEN_B, "F16")
    bidirectional = replace(SEVEN_B, is_stock=False)
    more = memory.predict(plan, bidirectional, formats, PLAIN)[0]
    less = memory.predict(plan, SEVEN_B, formats, PLAIN)[0]
    scores = 4 * SEVEN_B.num_attention_heads * plan.batch_tokens**2
    assert scores / 2 < more - less < 1.2 * scores


def with_latents(plan, variant):
    latents = LatentAttentionConfig(512, 8, 4096)
    nv_embed = replace(SEVEN_B, is_stock=False, latent_attention=latents)
    formats = formats_for(variant, SEVEN_B, "F16")
    more = memory.predict(plan, nv_embed, formats, PLAIN)
    less = memory.predict(plan, replace(SEVEN_B, is_stock=False), formats, PLAIN)
    return more[0] - less[0], more[1] - less[1]


KEYS_AND_VALUES = 2 * 8 * 512 * 4096 * 4
MLP_WEIGHTS = 3 * 4 * 4096 * 4096


def test_latent_attention_costs_its_folded_matrices_and_on_a_device_its_mlp():
    cpu, cuda = (Plan("fp16", "torch", device, "fp32", "resident") for device in ("cpu", "cuda"))
    assert with_latents(cpu, "fp16") == (KEYS_AND_VALUES, 0)
    assert with_latents(cuda, "fp16") == (0, KEYS_AND_VALUES + 2 * MLP_WEIGHTS)


def test_latent_attention_in_a_graph_is_float32_where_its_weights_are_folded():
    plan = Plan("int4", "onnxruntime", "cpu", "fp32", "resident", batch_tokens=1)
    matrix = MLP_WEIGHTS // 3 * 4
    small = 3 * 4 * (4 * 4096 + 3 * 16384)
    assert with_latents(plan, "int8")[0] == pytest.approx(KEYS_AND_VALUES + matrix, abs=small)
    folded = KEYS_AND_VALUES + 4 * MLP_WEIGHTS + matrix
    assert with_latents(plan, "int4")[0] == pytest.approx(folded, abs=small)


def test_a_cpu_plan_needs_no_device_memory():
    assert predict("int4")[1] == 0


def test_resident_on_a_device_holds_all_weights_and_streamed_two_layers():
    resident = predict("fp16", "cuda", "fp16")[1]
    streamed = predict("fp16", "cuda", "fp16", "streamed")[1]
    layers = 2 * SEVEN_B.linear_weights * 30 / 32
    plan = Plan("fp16", "torch", "cuda", "fp16", "resident")
    recorded = device_memory.recorded_bytes(plan, SEVEN_B, formats_for("fp16", SEVEN_B, "F16"))
    assert resident - streamed == pytest.approx(layers + recorded)


def cuda(variant, compute, **changes):
    return predict(variant, "cuda", compute, **changes)[1]


def test_7b_plans_hold_their_ceilings_at_texts_of_4096_tokens():
    assert cuda("int4", "fp16") < 6 * GIB
    for variant in ("fp16", "int8", "int4", "bnb-int8", "bnb-nf4"):
        window = {"schedule": "streamed", "window_tokens": 4 * 4096}
        for compute in ("bf16", "fp16", "fp16-acc16", "int8", "fp8"):
            assert cuda(variant, compute, **window) < 3.5 * GIB


def test_a_device_needs_scratch_only_where_weights_change_their_form():
    matrix = 14336 * 4096
    streamed = {"schedule": "streamed", "batch_tokens": 1, "window_tokens": 1}
    for variant, compute, scratch in (
        ("fp16", "fp16", 0),
        ("fp16", "bf16", 2 * matrix),
        ("fp16", "int8", 3 * matrix),
        ("int8", "int8", 0),
        ("int8", "fp8", 3 * matrix),
        ("int4", "fp16", 2 * matrix),
    ):
        formats = formats_for(variant, SEVEN_B, "F16")
        plan = Plan(variant, "torch", "cuda", compute, **streamed)
        assert device_memory.scratch_bytes(plan, SEVEN_B, formats) == scratch


def test_recorded_passes_hold_short_texts_and_what_a_matrix_is_rounded_into():
    matrix = 14336 * 4096
    for variant, compute, rounded in (
        ("fp16", "fp16", 0),
        ("int8", "int8", 0),
        ("int4", "int8", 1),
    ):
        formats = formats_for(variant, SEVEN_B, "F16")
        plan = Plan(variant, "torch", "cuda", compute, "resident")
        more = device_memory.recorded_bytes(plan, SEVEN_B, formats) - rounded * matrix
        assert 48 * 2**20 < more < 64 * 2**20
        streamed = replace(plan, schedule="streamed")
        assert device_memory.recorded_bytes(streamed, SEVEN_B, formats) == 0


def test_a_device_holds_one_chunk_of_the_mlp_however_large_the_batch():
    small, large = (
        cuda("fp16", "fp16", batch_tokens=tokens, window_tokens=tokens) for tokens in (8192, 16384)
    )
    assert large - small == 8 * 4096 * 8192


def test_linears_that_are_kept_exact_make_rows_twice_as_long():
    formats = formats_for("int8", SEVEN_B, "F16")
    exact = {**formats, "layers.1.mlp.down_proj": Int8Channel(rounds_activations=False)}
    plan = Plan("int8", "torch", "cuda", "int8", "resident")
    less, more = (device_memory.activation_bytes(plan, SEVEN_B, one) for one in (formats, exact))
    assert more - less == 14336 * 4096


def test_attention_in_blocks_holds_scores_of_all_keys_of_a_long_text():
    llama = replace(SEVEN_B, num_key_value_heads=1)  # few keys and values beside the queries
    formats = formats_for("fp16", llama, "F16")
    causal, other = (replace(llama, is_stock=stock) for stock in (True, False))
    for tokens, numbers_of_keys in ((128, 0), (4096, 12), (32768, 24)):
        plan = Plan("fp16", "torch", "cpu", "bf16", "resident", batch_tokens=tokens)
        plan = replace(plan, window_tokens=tokens)
        needs = [memory.predict(plan, one, formats, PLAIN)[0] for one in (causal, other)]
        assert needs[0] - needs[1] >= numbers_of_keys * 2 * 2**20


def test_memory_grows_with_the_token_budget():
    small = predict("int4", batch_tokens=1024, window_tokens=1024)[0]
    assert predict("int4", batch_tokens=8192, window_tokens=8192)[0] > small


def test_a_chunk_is_never_larger_than_what_it_is_cut_from():
    less = predict("int4", batch_tokens=1, window_tokens=1)[0]
    less -= memory.TORCH_BASE_BYTES + VOCABULARY
    matrix = 4 * 4096 * 14336
    token = 4 * 4096 + 4 * (4096 + 14336) + 2 * 4 * 14336
    prefixes = 2 * PREFIX_TOKENS * 32 * 1024 * 4
    assert less == matrix + prefixes + token


def test_16_bit_weights_in_their_own_dtype_need_no_scratch():
    assert predict("fp16", compute="fp16")[0] < predict("int8", compute="fp16")[0]


def test_amx_reorders_16_bit_matrices_and_holds_no_second_large_one():
    plan = Plan("int4", "torch", "cpu", "bf16", "resident")
    formats = formats_for("int4", SEVEN_B, "F16")
    plain, tiled = (
        memory.predict(plan, SEVEN_B, formats, machine)[0] for machine in (PLAIN, WITH_AMX)
    )
    assert plain < tiled < plain + 2 * 14336 * 4096


def test_float32_products_are_the_same_with_amx():
    plan = Plan("int4", "torch", "cpu", "fp32", "resident")
    formats = formats_for("int4", SEVEN_B, "F16")
    with_amx = memory.predict(plan, SEVEN_B, formats, WITH_AMX)
    assert with_amx == memory.predict(plan, SEVEN_B, formats, PLAIN)


def with_vnni(variant, formats):
    plan = Plan(variant, "torch", "cpu", "int8", "resident")
    return memory.predict(plan, SEVEN_B, formats, WITH_VNNI)[0]


def test_8_bit_products_hold_nothing_as_wide_as_the_mlp_for_every_token():
    formats = formats_for("int8", SEVEN_B, "F16")
    exact = {"layers.3.mlp.up_proj": Int8Channel(rounds_activations=False)}
    plain = predict("int8", compute="int8")[0]
    assert with_vnni("int8", formats) < plain
    assert with_vnni("int8", formats | exact) == plain
    assert with_vnni("int4", formats_for("int4", SEVEN_B, "F16")) == plain


def test_two_buffers_hold_the_largest_layer_of_a_mixture():
    formats = formats_for("int4", SEVEN_B, "F16")
    mixed = formats | {name: HIGH for name in formats if name.startswith("layers.3.")}
    plan = Plan("int4", "torch", "cpu", "fp32", "streamed")
    needs = [memory.predict(plan, SEVEN_B, one, PLAIN)[0] for one in (formats, mixed)]
    codes = SEVEN_B.linear_weights // SEVEN_B.num_hidden_layers
    assert needs[1] - needs[0] == 2 * codes * (8.25 - 4.5) / 8


def test_onnxruntime_holds_a_copy_of_one_matrix_of_8_bit_codes_while_it_opens():
    formats = formats_for("int8", SEVEN_B, "F16")
    plan = Plan("int8", "onnxruntime", "cpu", "int8", "resident", batch_tokens=64)
    needed, _ = memory.predict(plan, SEVEN_B, formats, PLAIN)
    packed = memory.packed_bytes(plan, SEVEN_B, formats)
    assert packed > SEVEN_B.linear_weights
    assert needed == memory.ONNX_BASE_BYTES + VOCABULARY + packed + 4096 * 14336


@pytest.mark.skipif(sys.platform != "linux", reason="memory is read from /proc")
def test_a_vocabulary_counts_about_as_much_as_mistrals_tokenizer_holds(tmp_path):
    path = tmp_path / "tokenizer.json"
    path.write_bytes(mistral_tokenizer(legacy=False)["tokenizer.json"])
    command = [sys.executable, "-c", MEASURE_TOKENIZER, str(path)]
    held = int(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    assert 0.5 * held < VOCABULARY < 1.5 * held


def test_onnxruntime_looks_tokens_up_in_a_table_on_the_card():
    table = 2 * SEVEN_B.vocab_size * SEVEN_B.hidden_size
    wider = replace(SEVEN_B, vocab_size=2 * SEVEN_B.vocab_size)
    plan = Plan("fp16", "onnxruntime", "cuda", "fp16", "resident")
    few, many = (
        memory.predict(plan, config, formats_for("fp16", config, "F16"), PLAIN)[1]
        for config in (SEVEN_B, wider)
    )
    assert many - few == table
