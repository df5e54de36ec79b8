"""What each token does to pooled vectors, beside derivatives through transformers' own model."""

from collections import defaultdict
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import AutoModel

from export import hidden_states, sensitivities
from export.hidden_states import STAGES, Texts
from export.sensitivities import scratch_bytes, token_sensitivities
from export.sources import open_source
from lowmem import data
from lowmem.artifact.weights import Checkpoint
from lowmem.hardware import Hardware
from lowmem.text.batching import EncodedText
from lowmem.text.tokenizer import Tokenizer
from tests.models import CONTRACT, tiny_checkpoint

ROWS = data.load("quick")[:10]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_checkpoint(tmp_path_factory.mktemp("source") / "tiny").path


@pytest.fixture
def small_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hidden_states, "_BATCH_TOKENS", 128)


def encoded(checkpoint: Path) -> list[EncodedText]:
    vocab_size = Checkpoint(checkpoint).config.vocab_size
    return Tokenizer(checkpoint / "tokenizer.json", CONTRACT, vocab_size).encode_rows(ROWS)


def measured(checkpoint: Path, directory: Path, pooling: str = "lasttoken") -> tuple[Texts, Tensor]:
    source = open_source(checkpoint)
    contract = replace(CONTRACT, pooling=pooling)
    texts = Texts(encoded(checkpoint), source.config, contract, directory, "cpu")
    return texts, token_sensitivities(source, texts, "F16")


def by_transformers(checkpoint: Path, ids: Tensor, mask: Tensor, direction: Tensor) -> Tensor:
    """Squared lengths of one text's derivatives, ``[layers, stages, tokens]``, in float64."""
    model = AutoModel.from_pretrained(checkpoint, attn_implementation="eager").double()
    outputs: dict[tuple[int, str], Tensor] = {}

    def keep(place: tuple[int, str]) -> object:
        def hook(module: object, inputs: object, output: Tensor) -> None:
            output.retain_grad()
            outputs[place] = output

        return hook

    for index, layer in enumerate(model.layers):
        for name in (linear for stage in STAGES for linear in stage):
            layer.get_submodule(name).register_forward_hook(keep((index, name)))
    last = model(input_ids=ids[None]).last_hidden_state[0]
    vector = torch.nn.functional.normalize(last[mask].mean(dim=0), dim=-1)
    (vector @ direction).backward()
    squares: dict[tuple[int, int], Tensor] = defaultdict(lambda: torch.zeros(len(ids)).double())
    for (index, name), output in outputs.items():
        number = next(i for i, stage in enumerate(STAGES) if name in stage)
        if output.grad is not None:
            squares[index, number] = squares[index, number] + output.grad[0].square().sum(dim=-1)
    return torch.stack(
        [
            torch.stack([squares[index, number] for number in range(len(STAGES))])
            for index in range(len(model.layers))
        ]
    )


@pytest.fixture
def full_factors(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sensitivities, "_factors", lambda device: torch.float32)


@pytest.mark.usefixtures("small_batches", "full_factors")
@pytest.mark.parametrize("pooling", ["lasttoken", "mean"])
def test_they_are_derivatives_of_the_unit_vectors(
    pooling: str, checkpoint: Path, tmp_path: Path
) -> None:
    texts, found = measured(checkpoint, tmp_path, pooling)
    signs = np.random.RandomState(0)
    assert len(texts.batches) > 1
    seen = 0
    for batch, ids in zip(texts.batches, texts._ids, strict=True):
        drawn = 2.0 * signs.randint(0, 2, size=(len(batch.lengths), texts.config.hidden_size)) - 1
        for own_ids, mask, direction in zip(
            torch.from_numpy(np.asarray(ids)).split(batch.lengths),
            batch.pooling_mask.split(batch.lengths),
            torch.from_numpy(drawn),
            strict=True,
        ):
            expected = by_transformers(checkpoint, own_ids, mask, direction)
            own = found[:, :, seen : seen + len(own_ids)]
            assert torch.allclose(own.double(), expected, rtol=1e-3, atol=1e-9 * expected.max())
            seen += len(own_ids)
    assert seen == texts.tokens


@pytest.mark.usefixtures("small_batches")
def test_only_what_is_pooled_matters_behind_the_last_attention(
    checkpoint: Path, tmp_path: Path
) -> None:
    texts, found = measured(checkpoint, tmp_path)
    pooled = torch.cat([batch.pooling_mask for batch in texts.batches])
    assert bool((found[-1, 1:, ~pooled] == 0).all())
    assert bool((found[-1, :, pooled] > 0).all())
    assert bool((found[0] > 0).all())


@pytest.mark.usefixtures("small_batches")
def test_texts_that_find_no_room_together_go_one_part_after_the_other(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    texts, expected = measured(checkpoint, tmp_path)
    assert scratch_bytes(texts.config, texts.tokens) > 300_000
    monkeypatch.setattr(sensitivities, "_PART_BYTES", 300_000)
    parts = list(sensitivities._parts(texts))
    assert len(parts) > 1
    assert [batch for part in parts for batch in part.batches] == texts.batches
    again, found = measured(checkpoint, tmp_path)
    assert torch.equal(found, expected)
    assert scratch_bytes(again.config, again.tokens) == 300_000


@pytest.mark.usefixtures("small_batches")
def test_products_in_bfloat16_tell_nearly_as_much(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = {}
    for factors in (torch.float32, torch.bfloat16):
        monkeypatch.setattr(sensitivities, "_factors", lambda device, factors=factors: factors)
        found[factors] = measured(checkpoint, tmp_path)[1].sqrt()
    exact, rough = found.values()
    assert not torch.equal(rough, exact)
    assert bool(((rough == 0) == (exact == 0)).all())
    off = rough[exact > 0] / exact[exact > 0] - 1
    assert float(off.abs().max()) < 0.3
    assert float(off.abs().median()) < 0.03
    assert abs(float(off.mean())) < 0.01


@pytest.mark.parametrize("features", [("avx2",), ("avx2", "avx512_bf16"), ("avx2", "amx_bf16")])
def test_a_cpu_without_bfloat16_multiplies_float32(
    features: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    machine = Hardware("some CPU", 2, features, 2**34, 2**34)
    monkeypatch.setattr(sensitivities, "probe", lambda: machine)
    native = torch.bfloat16 if len(features) > 1 else torch.float32
    assert sensitivities._factors("cpu") is native
    assert sensitivities._factors("cuda") is torch.float32


def test_they_do_not_mind_the_mode_that_export_is_called_in(
    checkpoint: Path, tmp_path: Path
) -> None:
    _, expected = measured(checkpoint, tmp_path)
    with torch.inference_mode():
        _, found = measured(checkpoint, tmp_path)
    assert torch.equal(found, expected)
