"""Arbitrary shapes and masks."""

import pytest
import torch

# Where it is missing the other tests of the folder still run.
pytest.importorskip("hypothesis")
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from rmu_kernels.backend import INTERPRETED
from tests.kernels.oracle import FORMS, assert_gradient, call, expected, make_inputs

EXAMPLES = settings(
    max_examples=40 if INTERPRETED else 200,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)


@st.composite
def cases(draw):
    sequences, length = draw(st.integers(1, 4)), draw(st.integers(1, 6))
    mask = draw(st.lists(st.booleans(), min_size=sequences * length, max_size=sequences * length))
    return (
        draw(st.sampled_from(FORMS)),
        draw(st.sampled_from(["mean", "sequence_mean", "sum", "none"])),
        (sequences, length),
        draw(st.integers(1, 130)),
        torch.tensor(mask).view(sequences, length),
        draw(st.sampled_from([torch.bool, torch.int64, torch.float32, torch.uint8])),
    )


@EXAMPLES
@given(case=cases())
def test_any_shape_and_mask(case, place):
    form, reduction, tokens, features, mask, mask_dtype = case
    inputs = make_inputs(form, tokens, features, torch.float32, device=place.device)
    inputs.mask = mask.to(place.device, mask_dtype)
    loss = call(form, inputs, reduction, place.backend)
    wanted, gradient = expected(form, inputs, reduction)
    torch.testing.assert_close(loss.double(), wanted, rtol=1e-5, atol=1e-7)
    loss.sum().backward()
    assert_gradient(inputs.hidden.grad, gradient)


@EXAMPLES
@given(case=cases(), data=st.data())
def test_masked_tokens_might_as_well_be_absent(case, data, place):
    """Dropping the masked tokens of one sequence changes neither its mean nor its gradients."""
    form, _, tokens, features, _, _ = case
    if form == "steering_sequences":
        form = "steering"
    inputs = make_inputs(form, (tokens[0] * tokens[1],), features, torch.float32, device=place.device)
    count = data.draw(st.integers(0, tokens[0] * tokens[1]))
    inputs.mask = (torch.arange(tokens[0] * tokens[1]) < count).to(place.device)
    masked = call(form, inputs, "mean", place.backend)
    (gradient,) = torch.autograd.grad(masked, inputs.hidden)
    inputs.hidden = inputs.hidden.detach()[:count].requires_grad_()
    inputs.frozen, inputs.mask = inputs.frozen[:count], None
    if form == "steering_tokens":
        inputs.coefficient = inputs.coefficient[:count]
    absent = call(form, inputs, "mean", place.backend)
    torch.testing.assert_close(masked, absent, rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(
        gradient[:count], torch.autograd.grad(absent, inputs.hidden)[0], rtol=1e-4, atol=1e-7
    )
