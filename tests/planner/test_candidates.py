import json
from dataclasses import replace

import pytest

from lowmem.artifact.config_file import config_json
from lowmem.artifact.variants import VARIANTS, formats_for
from lowmem.errors import BackendError, InputError
from lowmem.hardware import Gpu, Hardware
from lowmem.planner.candidates import HOST_MARGIN_BYTES, Subject, Wishes, candidates
from tests.shapes import SEVEN_B

GIB = 2**30
SUBJECT = Subject(
    SEVEN_B,
    4096,
    "F16",
    {name: formats_for(name, SEVEN_B, "F16") for name in VARIANTS},
    {
        "fp16": {"model.onnx": "fp32", "model_fp16.onnx": "fp16"},
        "int8": {"model.onnx": "int8"},
        "int4": {"model.onnx": "fp32", "model_int8.onnx": "int8"},
    },
)
MODERN = Hardware("CPU", 8, ("avx512_bf16", "avx512_vnni"), 64 * GIB, 60 * GIB)
OLD = Hardware("CPU", 4, ("avx2",), 16 * GIB, 12 * GIB)
TINY = Hardware("CPU", 4, ("avx2", "avx512_vnni"), 8 * GIB, 6 * GIB)
RTX_3060 = Gpu("RTX 3060", 12 * GIB, int(11.5 * GIB), (8, 6))


def checkpoint(tmp_path, **changes):
    value = config_json(replace(SEVEN_B, **changes), "bfloat16")
    (tmp_path / "config.json").write_text(json.dumps(value))
    return Subject.of_checkpoint(tmp_path)


def test_a_checkpoint_offers_the_graphs_that_its_export_would_write(tmp_path):
    subject = checkpoint(tmp_path)
    assert subject.graphs == {
        "fp16": {"model.onnx": "fp32"},  # bfloat16 weights have no graph of float16
        "int8": {"model.onnx": "int8"},
        "int4": {"model.onnx": "fp32", "model_int8.onnx": "int8"},
        "bnb-int8": {},
        "bnb-nf4": {},
    }
    assert not any(checkpoint(tmp_path, head_dim=120).graphs.values())


def plans(machine, **wishes):
    return {plan.id: plan for plan in candidates(SUBJECT, machine, Wishes(**wishes))}


def test_half_precision_is_dropped_on_a_cpu_without_it():
    found = plans(OLD)
    assert "bf16 natively" in found["fp16-torch-cpu-bf16-resident"].dropped
    assert "fp16 natively" in found["int4-torch-cpu-fp16-resident"].dropped
    assert plans(MODERN)["fp16-torch-cpu-bf16-resident"].dropped is None


@pytest.mark.parametrize("engine", ["torch", "onnxruntime"])
def test_8_bit_products_are_there_with_and_without_vnni(engine):
    large = replace(OLD, host_total_bytes=64 * GIB, host_free_bytes=60 * GIB)
    for machine in (large, MODERN):
        assert plans(machine)[f"int8-{engine}-cpu-int8-resident"].dropped is None


def test_packed_codes_do_not_fit_a_small_host_in_onnxruntime():
    assert "memory" in plans(TINY)["int8-onnxruntime-cpu-int8-resident"].dropped


def test_streaming_is_needless_where_resident_fits_and_is_kept_when_asked_for():
    assert "resident fits" in plans(MODERN)["int4-torch-cpu-fp32-streamed"].dropped
    asked = plans(MODERN, schedule="streamed")
    assert asked["int4-torch-cpu-fp32-streamed"].dropped is None


def test_a_12_gib_card_streams_fp16_and_holds_int4():
    found = plans(replace(MODERN, gpus=(RTX_3060,)))
    assert "on the GPU" in found["fp16-torch-cuda-fp16-resident"].dropped
    assert found["fp16-torch-cuda-fp16-streamed"].dropped is None
    assert found["int4-torch-cuda-fp16-resident"].dropped is None


def test_a_cpu_plan_whose_mapped_weights_do_not_stay_in_memory_is_streamed():
    found = plans(TINY)
    assert "each pass would read them from disk" in found["fp16-torch-cpu-fp32-resident"].dropped
    assert found["fp16-torch-cpu-fp32-streamed"].dropped is None
    assert found["int4-torch-cpu-fp32-resident"].dropped is None
    asked = plans(TINY, schedule="resident")
    assert asked["fp16-torch-cpu-fp32-resident"].dropped is None


@pytest.mark.parametrize(("missing", "fits"), [(0, True), (1, False)])
def test_a_plan_leaves_the_host_what_its_prediction_may_be_surpassed_by(missing, fits):
    wishes = {"variant": "int4", "engine": "torch", "compute": "fp32", "schedule": "resident"}
    ((plan_id, plan),) = plans(TINY, **wishes).items()
    free = plan.host_bytes + HOST_MARGIN_BYTES - missing
    found = plans(replace(TINY, host_free_bytes=free), **wishes)[plan_id]
    assert (found.dropped is None) == fits
    assert fits or found.dropped.startswith("needs ")


def test_a_streamed_plan_keeps_the_layers_that_fit():
    streamed = "fp16-torch-cuda-fp16-streamed"
    cards = [replace(RTX_3060, free_bytes=free * GIB) for free in (4, 6, 8, 11)]
    found = [plans(replace(MODERN, gpus=(card,)))[streamed] for card in cards]
    kept = [plan.kept_layers for plan in found]
    assert kept == sorted(set(kept))
    assert 0 < kept[-1] < 32
    for plan, card in zip(found, cards, strict=True):
        assert plan.dropped is None
        assert plan.device_bytes <= card.free_bytes


def test_layers_leave_the_page_cache_only_where_they_would_not_all_stay_in_it():
    streamed = "fp16-torch-cpu-fp32-streamed"
    assert plans(TINY)[streamed].drops_cache
    assert not plans(MODERN, schedule="streamed")[streamed].drops_cache
    on_gpu = "fp16-torch-cuda-fp16-streamed"
    small_card = replace(RTX_3060, free_bytes=6 * GIB)
    assert plans(replace(TINY, gpus=(small_card,)))[on_gpu].drops_cache
    assert not plans(replace(MODERN, gpus=(small_card,)))[on_gpu].drops_cache


@pytest.mark.parametrize(("free", "batches"), [(5.0, 4), (3.2, 2), (2.8, 1)])
def test_a_streamed_plan_takes_a_smaller_window_before_it_is_dropped(free, batches):
    long = replace(SUBJECT, max_seq_length=32768)
    machine = replace(MODERN, gpus=(replace(RTX_3060, free_bytes=int(free * GIB)),))
    (plan,) = candidates(long, machine, Wishes("int4", "torch", "cuda", "fp16", "streamed"))
    assert plan.dropped is None
    assert plan.window_tokens == batches * 32768


def test_causal_graphs_run_in_16_bits_alone_on_a_card():
    found = plans(replace(MODERN, gpus=(replace(RTX_3060, free_bytes=40 * GIB),)))
    on_card = {id: p for id, p in found.items() if "onnxruntime-cuda" in id}
    running = [id for id, p in on_card.items() if p.dropped is None or "not installed" in p.dropped]
    assert running == ["fp16-onnxruntime-cuda-fp16-resident"]


def test_a_turing_card_has_no_bf16():
    turing = Gpu("RTX 2080 Ti", 11 * GIB, 10 * GIB, (7, 5))
    found = plans(replace(MODERN, gpus=(turing,)))
    assert "no bf16" in found["int4-torch-cuda-bf16-resident"].dropped


def cards(capability):
    card = replace(RTX_3060, compute_capability=capability)
    return plans(replace(MODERN, gpus=(card,)))


def test_computes_of_a_card_follow_its_capability():
    assert "no fp8" in cards((8, 6))["fp16-torch-cuda-fp8-streamed"].dropped
    assert cards((8, 9))["fp16-torch-cuda-fp8-streamed"].dropped is None
    for capability in ((7, 5), (8, 6), (12, 0)):
        assert cards(capability)["int8-torch-cuda-int8-resident"].dropped is None
        assert cards(capability)["int4-torch-cuda-fp16-acc16-resident"].dropped is None
    assert "capability 7.5" in cards((7, 0))["int8-torch-cuda-int8-resident"].dropped


def test_what_only_cards_compute_is_no_plan_of_a_cpu():
    found = cards((8, 9))
    assert not {id for id in found if "-cpu-fp8" in id or "-cpu-fp16-acc16" in id}
    with pytest.raises(InputError, match="fp16-acc16 and fp8 on a GPU alone"):
        plans(MODERN, device="cpu", compute="fp8")


def test_a_plan_never_has_more_threads_than_the_machine():
    assert {plan.threads for plan in plans(OLD).values()} == {4}


@pytest.mark.parametrize("name", ["variant", "engine", "device", "compute", "schedule"])
def test_an_unknown_name_is_refused_with_the_known_ones(name):
    with pytest.raises(InputError, match=rf"{name} must be auto or one of .*, got 'nonsense'"):
        plans(MODERN, **{name: "nonsense"})


def test_a_device_that_is_not_there_is_refused_with_the_reason():
    machine = replace(MODERN, gpu_problem="the driver does not answer")
    with pytest.raises(BackendError, match="no CUDA device: the driver does not answer"):
        plans(machine, device="cuda")


def test_a_combination_that_does_not_exist_is_refused():
    with pytest.raises(InputError, match="no plan has variant bnb-nf4, engine onnxruntime"):
        plans(MODERN, variant="bnb-nf4", engine="onnxruntime")
