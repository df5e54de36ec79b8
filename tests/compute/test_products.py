import pytest
import torch

from lowmem.compute.operations import products
from tests.tolerances import gamma

SHAPES = [(1, 64, 32), (2, 1, 1), (37, 96, 200), (256, 1536, 576)]


@pytest.fixture(params=[torch.nn.functional.linear, products.onednn, products.product])
def multiply(request):
    if request.param is products.onednn and not torch.backends.mkldnn.is_available():
        pytest.skip("this build of torch has no oneDNN")
    return request.param


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_each_library_is_exact_to_float32_rounding(multiply, shape):
    tokens, in_features, out_features = shape
    generator = torch.Generator().manual_seed(0)
    states = torch.randn(tokens, in_features, generator=generator)
    weight = torch.randn(out_features, in_features, generator=generator)
    exact = states.double() @ weight.double().T
    bound = gamma(in_features + 1) * (states.double().abs() @ weight.double().abs().T)
    assert bool(((multiply(states, weight).double() - exact).abs() <= bound).all())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_part_of_a_buffer_multiplies_like_a_matrix_of_its_own(multiply, dtype):
    if dtype != torch.float32 and multiply is products.onednn:
        return
    buffer = torch.randn(4000, generator=torch.Generator().manual_seed(1)).to(dtype)
    weight, states = buffer[:1600].view(50, 32), buffer[1600 : 1600 + 320].view(10, 32)[2:7]
    assert torch.equal(multiply(states, weight), multiply(states.clone(), weight.clone()))


@pytest.fixture
def forgetful():
    """Nothing is known of this processor, before and after."""
    products._fastest_float32.cache_clear()
    yield
    products._fastest_float32.cache_clear()


@pytest.mark.parametrize("winner", ["torch", "onednn"])
def test_the_library_that_won_the_trial_multiplies(forgetful, monkeypatch, winner):
    if not torch.backends.mkldnn.is_available():
        pytest.skip("this build of torch has no oneDNN")
    monkeypatch.setattr(products.trials, "fastest", lambda question, calls: winner)
    expected = {"torch": torch.nn.functional.linear, "onednn": products.onednn}[winner]
    assert products._fastest_float32(1) is expected


def test_each_library_is_tried_on_its_own_call(forgetful, monkeypatch):
    if not torch.backends.mkldnn.is_available():
        pytest.skip("this build of torch has no oneDNN")
    calls = []
    monkeypatch.setattr(products, "onednn", lambda *pair: calls.append("onednn"))
    monkeypatch.setattr(products.F, "linear", lambda *pair: calls.append("torch"))
    found = {}
    monkeypatch.setattr(
        products.trials, "fastest", lambda question, forms: found.update(forms) or "torch"
    )
    products._fastest_float32(1)
    found["torch"]()
    found["onednn"]()
    assert calls == ["torch", "onednn"]


def test_without_onednn_torch_multiplies_as_it_would(forgetful, monkeypatch):
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    assert products._fastest_float32(1) is torch.nn.functional.linear
