"""Every loss and its gradient against fp64: forms, dtypes, shapes, masks, reductions, strides, factors."""

import itertools

import pytest
import torch

from rmu_kernels.backend import INTERPRETED
from tests.kernels.oracle import FORMS, assert_gradient, call, expected, make_inputs, rounding

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
REDUCTIONS = ("mean", "sequence_mean", "sum", "none")
MASKS = ("none", "some", "all masked")
SMALL_FEATURES = (1, 7, 96, 576)
LARGE_FEATURES = (4096, 5120, 16384, 20000)
GRAD_OUTPUTS = (1.0, 2.5, 1024.0)


def check(form, inputs, reduction, place, grad_output=1.0):
    loss = call(form, inputs, reduction, place.backend)
    wanted, gradient = expected(form, inputs, reduction)
    assert loss.dtype == torch.float32 and loss.shape == wanted.shape
    torch.testing.assert_close(loss.double(), wanted, rtol=1e-5, atol=1e-7)
    loss.backward(torch.full_like(loss, grad_output))
    # A factor that is no power of two rounds the stored gradient a second time.
    assert_gradient(inputs.hidden.grad, gradient, grad_output, stores=2 if grad_output == 2.5 else 1)
    if inputs.mask is not None:
        assert not inputs.hidden.grad[inputs.mask == 0].any()


def thinned(cases, keep):
    """Every case on a GPU and for the twin; in the interpreter one of `keep`, the others marked slow."""
    return [
        pytest.param(*case, marks=pytest.mark.slow if INTERPRETED and i % keep else ())
        for i, case in enumerate(cases)
    ]


PRODUCT = list(itertools.product(FORMS, DTYPES, SMALL_FEATURES, MASKS, REDUCTIONS))
PRODUCT = [(*case, GRAD_OUTPUTS[i % 5 % 3]) for i, case in enumerate(PRODUCT)]


@pytest.mark.parametrize("form, dtype, features, mask, reduction, grad_output", thinned(PRODUCT, 11))
def test_product(form, dtype, features, mask, reduction, grad_output, place):
    inputs = make_inputs(form, (2, 3), features, dtype, device=place.device, mask=mask)
    check(form, inputs, reduction, place, grad_output)


LARGE = list(itertools.product(FORMS, DTYPES, LARGE_FEATURES))


@pytest.mark.parametrize("form, dtype, features", thinned(LARGE, 5))
def test_large_features(form, dtype, features, place):
    inputs = make_inputs(form, (2, 2), features, dtype, device=place.device, mask="some")
    check(form, inputs, "mean", place, 1024.0)


ROWS = list(itertools.product(FORMS, (0, 1, 3, 257), ("none", "some"), ("mean", "none")))


@pytest.mark.parametrize("form, rows, mask, reduction", thinned(ROWS, 9))
def test_row_counts(form, rows, mask, reduction, place):
    inputs = make_inputs(form, (rows,), 96, torch.float32, device=place.device, mask=mask)
    check(form, inputs, reduction, place, 2.5)


@pytest.mark.parametrize("tokens", [(0, 4), (3, 0)])
@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("mask", MASKS)
def test_no_tokens(tokens, reduction, mask, place):
    inputs = make_inputs("adaptive", tokens, 96, torch.float32, device=place.device, mask=mask)
    loss = call("adaptive", inputs, reduction, place.backend)
    loss.sum().backward()
    assert loss.sum() == 0.0 and inputs.hidden.grad.shape == (*tokens, 96)


@pytest.mark.parametrize("hidden_dtype, frozen_dtype", list(itertools.permutations(DTYPES, 2)))
def test_mixed_dtypes(hidden_dtype, frozen_dtype, place):
    inputs = make_inputs(
        "adaptive", (2, 3), 96, hidden_dtype, device=place.device, frozen_dtype=frozen_dtype, mask="some"
    )
    check("adaptive", inputs, "mean", place, 1024.0)


def sliced(x):
    return torch.nn.functional.pad(x, (3, 5, 1, 1))[..., 1:-1, 3:-5]


def transposed(x):
    return x.transpose(-1, -2).contiguous().transpose(-1, -2)


def permuted(x):
    return x.permute(2, 0, 1).contiguous().permute(1, 2, 0)


def unaligned(x):
    storage = torch.empty(x.numel() + 1, dtype=x.dtype, device=x.device)
    return storage[1:].view(x.shape).copy_(x)


def every_second(x):
    return x.repeat_interleave(2, -1)[..., ::2]


def expanded(x):
    return x[:1].expand(x.shape)


@pytest.mark.parametrize("layout", [sliced, transposed, permuted, unaligned, every_second, expanded])
@pytest.mark.parametrize("form", ["steering_tokens", "steering_sequences", "adaptive", "retain"])
def test_strides(layout, form, place):
    inputs = make_inputs(form, (3, 4), 96, torch.bfloat16, device=place.device, mask="some")
    inputs.hidden = layout(inputs.hidden.detach()).requires_grad_()
    inputs.frozen = layout(inputs.frozen)
    inputs.direction = inputs.direction.repeat_interleave(2, -1)[..., ::2]
    inputs.mask = inputs.mask.t().contiguous().t()
    if form == "steering_tokens":
        inputs.coefficient = inputs.coefficient.t().contiguous().t()
    assert layout is unaligned or not inputs.hidden.is_contiguous()
    check(form, inputs, "mean", place)


@pytest.mark.parametrize("form", ["adaptive", "retain"])
def test_offsets_beyond_32_bits(form, place):
    """Rows 2^30 elements apart, the last beyond 2^31; on the CPU the memory in between is never touched."""
    inputs = make_inputs(form, (4,), 96, torch.bfloat16, device=place.device)
    for name in ("hidden", "frozen"):
        rows = torch.empty(3 * 2**30 + 96, dtype=torch.bfloat16, device=place.device).as_strided(
            (4, 96), (2**30, 1)
        )
        setattr(inputs, name, rows.copy_(getattr(inputs, name).detach()))
    inputs.hidden.requires_grad_()
    check(form, inputs, "mean", place)


def test_more_leading_dimensions(place):
    inputs = make_inputs("steering_tokens", (2, 3, 2), 96, torch.float32, device=place.device, mask="some")
    inputs.hidden = inputs.hidden.detach().transpose(0, 1).contiguous().transpose(0, 1).requires_grad_()
    for reduction in ("mean", "none"):
        inputs.hidden.grad = None
        check("steering_tokens", inputs, reduction, place)


@pytest.mark.parametrize("shape", ["number", "0-d", "[B]", "[B, T]"])
def test_coefficient_shapes(shape, place):
    inputs = make_inputs("steering", (2, 3), 96, torch.float32, device=place.device)
    tokens = {"0-d": (), "[B]": (2,), "[B, T]": (2, 3)}
    inputs.coefficient = 4 if shape == "number" else torch.rand(tokens[shape], device=place.device) * 9
    check("steering", inputs, "mean", place)


def test_grad_output_per_token(place):
    """Any strides, among them the stride 0 of an expanded sum's gradient."""
    for make in (lambda: torch.rand(3, 2, device=place.device).t(), lambda: torch.tensor(2.5).expand(2, 3)):
        inputs = make_inputs("adaptive", (2, 3), 96, torch.float32, device=place.device, mask="some")
        loss = call("adaptive", inputs, "none", place.backend)
        grad_output = make().to(place.device)
        loss.backward(grad_output)
        _, gradient = expected("adaptive", inputs, "none")
        assert_gradient(inputs.hidden.grad, gradient, grad_output[..., None].double())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("form", ["steering", "adaptive", "retain"])
def test_not_worse_than_eager(form, dtype, place):
    """Three ways: the error against fp64 stays below that of eager PyTorch in the same dtype."""
    inputs = make_inputs(form, (2, 3), 576, dtype, device=place.device)
    loss = call(form, inputs, "sum", place.backend)
    loss.backward()
    exact, gradient = expected(form, inputs, "sum")
    eager, eager_gradient = expected(form, inputs, "sum", dtype)
    assert (loss - exact).abs() <= (eager.double() - exact).abs() + 1e-5 * exact

    def error(g):
        return (g.double() - gradient).square().mean().sqrt()

    one_store = rounding(dtype, place.device) * gradient.square().mean().sqrt()
    assert error(inputs.hidden.grad) <= error(eager_gradient) + one_store
    if place.device != "cpu" or place.backend == "torch":
        assert error(inputs.hidden.grad) <= error(eager_gradient)


def test_equals_mse_loss(place):
    inputs = make_inputs("steering", (2, 3), 96, torch.float32, device=place.device)
    mse = torch.nn.functional.mse_loss
    target = (6.5 * inputs.direction).expand_as(inputs.hidden)
    loss = call("steering", inputs, "mean", place.backend)
    torch.testing.assert_close(loss, mse(inputs.hidden, target))
    torch.testing.assert_close(
        call("retain", inputs, "mean", place.backend), mse(inputs.hidden, inputs.frozen)
    )
