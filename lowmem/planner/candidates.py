"""Every plan that a model has on a machine, with the reason where one cannot or need not run."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

from lowmem.artifact import strict_json
from lowmem.artifact.config import ModelConfig
from lowmem.artifact.config_file import parse_config
from lowmem.artifact.formats import Format
from lowmem.artifact.manifest import Bundle
from lowmem.artifact.variants import VARIANTS, formats_for, graphs_for
from lowmem.artifact.weights import Checkpoint
from lowmem.compute.plan import (
    COMPUTES,
    COMPUTES_OF_DEVICE,
    DEVICES,
    ENGINES,
    INT8_CAPABILITY,
    SCHEDULES,
    Plan,
)
from lowmem.errors import BackendError, InputError
from lowmem.hardware import Hardware
from lowmem.planner import memory

AUTO = "auto"
BATCH_TOKENS = 4096
_WINDOW_BATCHES = 4
NEEDLESS = "resident fits, and reads the weights once"
# What must be free beside the predicted peak on the host. Texts of very different lengths leave
# gaps in the heap that differ from run to run: peaks were up to 39 MiB above their prediction.
HOST_MARGIN_BYTES = 40 * 2**20
# Of what a streamed plan leaves free, this much may hold layers that stay.
_KEPT_SHARE = 0.8


@dataclass(frozen=True)
class Subject:
    """What is planned for: a model's shape and its variants, exported or not.

    Attributes:
        config: The model's shape.
        max_seq_length: Most tokens of one text.
        dtype: F16 or BF16: dtype of the unquantized weights.
        formats: Variant to module to format.
        graphs: Variant to ONNX file to compute.
    """

    config: ModelConfig
    max_seq_length: int
    dtype: str
    formats: Mapping[str, Mapping[str, Format]]
    graphs: Mapping[str, Mapping[str, str]]

    @classmethod
    def of_bundle(cls, bundle: Bundle) -> Subject:
        """What an exported bundle offers.

        Raises:
            BundleError: A variant's config or tensors do not hold together.
            InputError: The bundle holds no variant.
        """
        checkpoints = {
            name: Checkpoint(bundle.directory(name)) for name in bundle.manifest.variants
        }
        if not checkpoints:
            raise InputError(f"the bundle holds no variant ({bundle.path})")
        first = next(iter(checkpoints.values()))
        return cls(
            first.config,
            bundle.contract.max_seq_length,
            first.dtype,
            {name: checkpoint.formats for name, checkpoint in checkpoints.items()},
            {name: bundle.variant(name).graphs for name in checkpoints},
        )

    @classmethod
    def of_checkpoint(cls, directory: Path) -> Subject:
        """What a checkpoint would offer once exported; only its ``config.json`` is read.

        Raises:
            BundleError: The config is missing or not supported.
        """
        path = directory / "config.json"
        value = strict_json.read_object(path)
        config = parse_config(value, str(path))
        named = value.get("dtype", value.get("torch_dtype"))
        dtype = "BF16" if named == "bfloat16" else "F16"
        formats = {name: formats_for(name, config, dtype) for name in VARIANTS}
        return cls(
            config,
            min(config.longest_sequence, BATCH_TOKENS),
            dtype,
            formats,
            {
                name: graphs_for(forms, config.head_dim, is_causal=config.is_stock)
                for name, forms in formats.items()
            },
        )


@dataclass(frozen=True)
class Wishes:
    """What the caller fixed by name; ``auto`` leaves it open."""

    variant: str = AUTO
    engine: str = AUTO
    device: str = AUTO
    compute: str = AUTO
    schedule: str = AUTO

    def match(self, plan: Plan) -> bool:
        """Whether a plan is among what is left open."""
        return all(wish in (AUTO, getattr(plan, name)) for name, wish in vars(self).items())

    def check(self, subject: Subject, hardware: Hardware) -> None:
        """Refuses names that do not exist here.

        Raises:
            InputError: A variant, engine, device, compute or schedule by that name is unknown.
            BackendError: A device was asked for that the machine has not.
        """
        known = {
            "variant": tuple(subject.formats),
            "engine": ENGINES,
            "device": DEVICES,
            "compute": COMPUTES,
            "schedule": SCHEDULES,
        }
        for name, values in known.items():
            wish = getattr(self, name)
            if wish != AUTO and wish not in values:
                others = "; lowmem export makes others" if name == "variant" else ""
                raise InputError(
                    f"{name} must be auto or one of {', '.join(sorted(values))}, got {wish!r}"
                    f"{others}"
                )
        if self.device == "cuda" and not hardware.gpus:
            raise BackendError(hardware.why_no_gpu)


def candidates(subject: Subject, hardware: Hardware, wishes: Wishes) -> list[Plan]:
    """All plans within the wishes, each with its predicted memory.

    Raises:
        InputError: Nothing matches the wishes.
        BackendError: A device was asked for that the machine has not.
    """
    wishes.check(subject, hardware)
    plans = []
    for plan in _combinations(subject, hardware):
        if not wishes.match(plan):
            continue
        plan = _within_memory(plan, subject, hardware)
        reason = _cannot_run(plan, subject, hardware)
        plans.append(plan.with_(dropped=reason or plan.dropped))
    if not plans:
        wanted = ", ".join(f"{k} {v}" for k, v in vars(wishes).items() if v != AUTO)
        raise InputError(
            f"no plan has {wanted}: onnxruntime runs fp16, int8 and int4 as their graphs are "
            "computed, always resident; torch runs everything, fp16-acc16 and fp8 on a GPU alone"
        )
    plans = _without_thrashing(plans, subject, hardware, wishes)
    return _without_needless_streaming(plans, wishes)


def _combinations(subject: Subject, hardware: Hardware) -> Iterator[Plan]:
    devices = ["cuda", "cpu"] if hardware.gpus else ["cpu"]
    for variant in subject.formats:
        for device in devices:
            for compute in COMPUTES_OF_DEVICE[device]:
                for schedule in SCHEDULES:
                    yield _plan(subject, hardware, variant, "torch", device, compute, schedule)
            for compute in dict.fromkeys(subject.graphs.get(variant, {}).values()):
                yield _plan(subject, hardware, variant, "onnxruntime", device, compute, "resident")


def _plan(
    subject: Subject,
    hardware: Hardware,
    variant: str,
    engine: str,
    device: str,
    compute: str,
    schedule: str,
) -> Plan:
    batch_tokens = max(BATCH_TOKENS, subject.max_seq_length)
    batches = _WINDOW_BATCHES if schedule == "streamed" else 1
    return Plan(
        variant,
        engine,
        device,
        compute,
        schedule,
        threads=hardware.cpu_threads,
        batch_tokens=batch_tokens,
        window_tokens=batch_tokens * batches,
    )


def _within_memory(plan: Plan, subject: Subject, hardware: Hardware) -> Plan:
    """Predicts a plan's memory, and says so if it is more than there is.

    A streamed plan gets the largest window of whole batches that fits, up to the usual one.
    """
    for window in range(plan.window_tokens, 0, -plan.batch_tokens):
        fitted = _predicted(plan.with_(window_tokens=window), subject, hardware)
        if fitted.dropped is None:
            break
    return _keeping_layers(fitted, subject, hardware) if plan.schedule == "streamed" else fitted


def with_memory(plan: Plan, subject: Subject, hardware: Hardware) -> Plan:
    """A plan with the memory that is predicted for it on a machine."""
    formats = subject.formats[plan.variant]
    host, device = memory.predict(plan, subject.config, formats, hardware)
    return plan.with_(host_bytes=host, device_bytes=device)


def _predicted(plan: Plan, subject: Subject, hardware: Hardware) -> Plan:
    """A plan with its memory, dropped if that is more than there is."""
    plan = with_memory(plan, subject, hardware)
    host, device = plan.host_bytes, plan.device_bytes
    needed = host + HOST_MARGIN_BYTES
    if needed > hardware.host_free_bytes:
        return plan.with_(
            dropped=f"needs {_gib(needed)} of memory, {_gib(hardware.host_free_bytes)} are free"
        )
    if plan.device == "cuda" and device > hardware.gpus[0].free_bytes:
        free = _gib(hardware.gpus[0].free_bytes)
        return plan.with_(dropped=f"needs {_gib(device)} on the GPU, {free} are free")
    return plan


def _keeping_layers(plan: Plan, subject: Subject, hardware: Hardware) -> Plan:
    """The same streamed plan with as many layers kept as the free memory holds.

    On a CPU they are mapped, and stay in the page cache because the others leave it.
    """
    if plan.dropped is not None:
        return plan
    config, formats = subject.config, subject.formats[plan.variant]
    on_gpu = plan.device == "cuda"
    free = hardware.gpus[0].free_bytes if on_gpu else hardware.host_free_bytes
    free -= plan.device_bytes if on_gpu else plan.host_bytes
    layer = memory.largest_layer_bytes(config, formats)
    kept = min(int(_KEPT_SHARE * free) // layer, config.num_hidden_layers - 1)
    kept = max(0, kept)
    plan = with_memory(plan.with_(kept_layers=kept), subject, hardware)
    # Of layers that would not all stay in the page cache until their next turn, none would.
    cache = hardware.host_free_bytes - plan.host_bytes - (0 if on_gpu else kept * layer)
    drops_cache = (config.num_hidden_layers - kept) * layer > cache
    return plan.with_(drops_cache=drops_cache)


def _cannot_run(plan: Plan, subject: Subject, hardware: Hardware) -> str | None:
    if (
        find_spec(plan.engine) is None
    ):  # engines are named after their packages, extras after devices
        return f"{plan.engine} is not installed: pip install 'lowmem[{plan.device}]'"
    if plan.device == "cuda":
        gpu = hardware.gpus[0]
        if not gpu.multiplies(plan.compute):
            return f"this GPU has no {plan.compute} arithmetic"
        if plan.compute == "int8" and gpu.compute_capability < INT8_CAPABILITY:
            return "8-bit products need tensor cores, compute capability 7.5 or above"
        if plan.engine == "onnxruntime" and plan.compute != "fp16" and subject.config.is_stock:
            return "ONNX Runtime's causal attention on CUDA is for 16 bits alone"
        return None
    if plan.engine == "onnxruntime":
        if plan.compute == "fp16":
            return "the fp16 graph is for CUDA"
        return None
    if plan.compute == "bf16" and not hardware.has_native_bf16:
        return "this CPU does not multiply bf16 natively"
    if plan.compute == "fp16" and not hardware.has_native_fp16:
        return "this CPU does not multiply fp16 natively"
    return None


def _without_thrashing(
    plans: list[Plan], subject: Subject, hardware: Hardware, wishes: Wishes
) -> list[Plan]:
    """Drops CPU plans whose mapped weights do not stay in memory, where they could be streamed."""
    if wishes.schedule != AUTO:
        return plans
    streamed = {p.report_id for p in plans if p.schedule == "streamed" and p.dropped is None}
    kept = []
    for plan in plans:
        mapped = memory.mapped_bytes(plan, subject.config, subject.formats[plan.variant])
        free = hardware.host_free_bytes - plan.host_bytes
        if plan.dropped is None and plan.report_id in streamed and mapped > free:
            plan = plan.with_(
                dropped=f"maps {_gib(mapped)} of weights, and {_gib(free)} are free for them: each "
                "pass would read them from disk again"
            )
        kept.append(plan)
    return kept


def _without_needless_streaming(plans: list[Plan], wishes: Wishes) -> list[Plan]:
    """Drops streamed plans whose resident twin fits, unless streaming was asked for."""
    if wishes.schedule == "streamed":
        return plans
    resident = {p.report_id for p in plans if p.schedule == "resident" and p.dropped is None}
    return [
        plan.with_(dropped=NEEDLESS)
        if plan.schedule == "streamed" and plan.dropped is None and plan.report_id in resident
        else plan
        for plan in plans
    ]


def with_streamed_twins(plans: Sequence[Plan]) -> list[Plan]:
    """The plans; those that were needless beside a resident one are not, where that has failed."""
    resident = {p.report_id for p in plans if p.schedule == "resident" and p.dropped is None}
    return [
        plan.with_(dropped=None)
        if plan.dropped == NEEDLESS and plan.report_id not in resident
        else plan
        for plan in plans
    ]


def _gib(count: int) -> str:
    return f"{count / 2**30:.1f} GiB"
