import pytest
import torch

from lowmem.compute.operations import products
from tests.tolerances import SILU, UNIT_ROUNDOFF, gamma

SHAPES = [(1, 64, 32), (2, 1, 1), (37, 96, 200), (256, 1536, 576)]


def noise(rows, columns, seed):
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))


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
    for known in (products._fastest_float32, products._fused_is_faster):
        known.cache_clear()
    yield
    for known in (products._fastest_float32, products._fused_is_faster):
        known.cache_clear()


@pytest.mark.parametrize("winner", ["torch", "onednn"])
def test_the_library_that_won_the_trial_multiplies(forgetful, monkeypatch, winner):
    if not torch.backends.mkldnn.is_available():
        pytest.skip("this build of torch has no oneDNN")
    monkeypatch.setattr(products.trials, "fastest", lambda question, calls: winner)
    expected = {"torch": torch.nn.functional.linear, "onednn": products.onednn}[winner]
    assert products._fastest_float32(1, False) is expected


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
    products._fastest_float32(1, False)
    found["torch"]()
    found["onednn"]()
    assert calls == ["torch", "torch", "onednn", "onednn"]  # up and down


def test_without_onednn_torch_multiplies_as_it_would(forgetful, monkeypatch):
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    assert products._fastest_float32(1, False) is torch.nn.functional.linear


def test_few_numbers_of_rows_are_computed():
    numbers = range(1, 4097)
    computed = [products.rows_computed(rows) for rows in numbers]
    assert len(set(computed)) == 48
    for rows, more in zip(numbers, computed, strict=True):
        assert rows <= more <= rows + max(15, rows // 8)
        assert products.rows_computed(more) == more


@pytest.mark.parametrize("tokens", [1, 16, 37, 300])
def test_rows_of_zeros_behind_the_states_change_no_product(monkeypatch, tokens):
    monkeypatch.setattr(products, "_fastest_float32", lambda threads, is_large: products.onednn)
    states, weight = noise(tokens, 48, 0), noise(20, 48, 1)
    got = products.product(states, weight)
    exact = states.double() @ weight.double().T
    bound = gamma(49) * (states.double().abs() @ weight.double().abs().T)
    assert got.shape == (tokens, 20)
    assert bool(((got.double() - exact).abs() <= bound).all())


needs_fused_products = pytest.mark.skipif(
    not products.has_onednn() or not torch.ops.mkldnn._is_mkldnn_bf16_supported(),
    reason="this processor or build of torch has no products in bfloat16",
)


@needs_fused_products
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_fused_products_are_within_the_roundings_of_their_parts(shape):
    tokens, in_features, out_features = shape
    states, gate, up = (
        noise(rows, in_features, seed).bfloat16()
        for seed, rows in enumerate((tokens, out_features, out_features))
    )
    gated = products.silu_product(states, gate)
    got = products.product_times(states, up, gated)
    rounding = UNIT_ROUNDOFF["bf16"]
    exact = states.double() @ gate.double().T
    activated = exact * torch.sigmoid(exact)
    # Twice the rounding of the result: of a sum near zero float32's own error may round otherwise.
    sums = states.double().abs() @ gate.double().abs().T
    bound = 2 * rounding * activated.abs() + gamma(in_features + 1) * 2 * sums + SILU
    assert bool(((gated.double() - activated).abs() <= bound).all())
    raised = states.double() @ up.double().T
    sums = states.double().abs() @ up.double().abs().T
    bound = gated.double().abs() * (rounding * raised.abs() + gamma(in_features + 1) * 2 * sums)
    assert bool(((got.double() - gated.double() * raised).abs() <= bound + SILU).all())


@needs_fused_products
@pytest.mark.parametrize("winner", ["apart", "fused"])
def test_the_form_of_a_gated_product_that_won_the_trial_is_used(forgetful, monkeypatch, winner):
    found = {}
    monkeypatch.setattr(
        products.trials, "fastest", lambda question, forms: found.update(forms) or winner
    )
    assert products.fuses(torch.ones(1, 8, dtype=torch.bfloat16)) == (winner == "fused")
    assert torch.equal(found["apart"](), found["fused"]())  # of ones: sums are whole numbers


def test_float32_is_never_multiplied_by_an_approximate_silu(forgetful):
    assert not products.fuses(torch.ones(1, 8))
