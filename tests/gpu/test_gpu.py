"""What only a GPU shows: large tensors, CUDA graphs, synchronisation, memory errors."""

import shutil
import subprocess
import sys

import pytest
import torch

import rmu_kernels

pytestmark = [pytest.mark.gpu]
CUDA_ONLY = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
DEVICE = "xpu" if torch.xpu.is_available() else "cuda"


def make_tensors(tokens=(4, 64), features=4096, dtype=torch.bfloat16):
    def hidden():
        return torch.randn(*tokens, features, device=DEVICE).to(dtype)

    direction = torch.nn.functional.normalize(torch.rand(features, device=DEVICE), dim=0)
    mask = torch.rand(tokens, device=DEVICE) < 0.7
    return hidden().requires_grad_(), hidden().requires_grad_(), hidden(), hidden(), direction, mask


def step(forget, retain, frozen_forget, frozen_retain, direction, mask, **options):
    return rmu_kernels.rmu_loss(
        forget,
        retain,
        frozen_retain,
        direction,
        frozen_forget=frozen_forget,
        scale=5.0,
        alpha=100.0,
        forget_mask=mask,
        retain_mask=mask,
        **{"metrics": True, "backend": "triton", **options},
    )


def test_more_than_2_31_elements():
    features, rows = 4096, 2**31 // 4096 + 8
    if torch.get_device_module(DEVICE).get_device_properties(0).total_memory < 16 * 2**30:
        pytest.skip("needs 16 GiB of GPU memory")
    frozen = torch.randn(1, features, device=DEVICE).bfloat16().expand(rows, features)
    hidden = torch.empty(rows, features, dtype=torch.bfloat16, device=DEVICE).normal_().requires_grad_()
    assert hidden.numel() > 2**31
    loss = rmu_kernels.retain_mse(hidden, frozen, reduction="none", backend="triton")
    loss.sum().backward()
    for part in (slice(0, 4), slice(-4, None)):
        difference = hidden.detach()[part].double() - frozen[part].double()
        torch.testing.assert_close(loss[part].double(), difference.square().mean(-1), rtol=1e-5, atol=0)
        wanted = (2 * difference / features).bfloat16()
        torch.testing.assert_close(hidden.grad[part], wanted, rtol=2**-7, atol=0)


@CUDA_ONLY
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("noise", [0.0, 0.5])
def test_cuda_graph(dtype, noise):
    tensors = make_tensors(dtype=dtype)
    seed = torch.tensor(1, device=DEVICE) if noise else None

    def forward_and_backward():
        output = step(*tensors, retain_noise=noise, seed=seed, reduction="sequence_mean")
        return output, torch.autograd.grad(output.loss * 1024, tensors[:2])

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        forward_and_backward()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        output, gradients = forward_and_backward()
    for i in range(3):
        for old, new in zip(tensors, make_tensors(dtype=dtype), strict=True):
            old.detach().copy_(new.detach())
        if noise:
            seed.fill_(i + 10)
        graph.replay()
        wanted, wanted_gradients = forward_and_backward()
        assert torch.equal(output.loss, wanted.loss) and output.loss.isfinite()
        assert all(torch.equal(output.metrics[name], value) for name, value in wanted.metrics.items())
        assert all(map(torch.equal, gradients, wanted_gradients))


@CUDA_ONLY
def test_no_synchronisation():
    tensors = make_tensors()
    step(*tensors).loss.backward()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for reduction in ("mean", "sequence_mean", "sum"):
            (step(*tensors, reduction=reduction).loss * 2.5).backward()
        for scope in ("token", "sequence", "batch"):
            for statistic in ("mean", "median"):
                rmu_kernels.adaptive_coefficient(
                    tensors[2], 5.0, mask=tensors[5], scope=scope, statistic=statistic, backend="triton"
                )
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_same_bits_under_load():
    tensors = make_tensors(tokens=(8, 512))
    first = step(*tensors)
    gradients = torch.autograd.grad(first.loss, tensors[:2])
    for i in range(20):
        torch.randn(1000 + 100 * i, 1000, device=DEVICE) @ torch.randn(1000, 1000, device=DEVICE)
        again = step(*tensors)
        assert torch.equal(first.loss, again.loss) and first.metrics == again.metrics
        assert all(map(torch.equal, gradients, torch.autograd.grad(again.loss, tensors[:2])))


@CUDA_ONLY
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_not_the_current_device():
    tensors = [t.detach().to("cuda:1").requires_grad_(t.requires_grad) for t in make_tensors()]
    with torch.cuda.device(0):
        loss = step(*tensors).loss
        loss.backward()
    torch.testing.assert_close(loss, step(*tensors, backend="torch").loss)


PROGRAM = """
import torch, rmu_kernels
for dtype in (torch.bfloat16, torch.float16):
    for shape in ((2, 3, 96), (3, 5, 577), (1, 2, 20000)):
        forget, retain, frozen = (torch.randn(shape, device="cuda").to(dtype) for _ in range(3))
        forget.requires_grad_(), retain.requires_grad_()
        mask = torch.rand(shape[:2], device="cuda") < 0.5
        for m in (None, mask):
            for reduction in ("mean", "sequence_mean", "sum"):
                output = rmu_kernels.rmu_loss(
                    forget, retain, frozen, torch.rand(shape[-1], device="cuda"),
                    frozen_forget=frozen, scale=5.0, relative=True, retain_noise=0.5, seed=1,
                    forget_mask=m, retain_mask=m, metrics=True, reduction=reduction,
                    backend="triton",
                )
                (output.loss * 2.5).backward()
torch.cuda.synchronize()
"""


@CUDA_ONLY
@pytest.mark.skipif(shutil.which("compute-sanitizer") is None, reason="compute-sanitizer is not installed")
@pytest.mark.parametrize("tool", ["memcheck", "initcheck", "racecheck"])
def test_compute_sanitizer(tool):
    command = ["compute-sanitizer", "--tool", tool, "--kernel-name", "kernel_substring=_kernel"]
    command += ["--error-exitcode", "1", sys.executable, "-c", PROGRAM]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout[-10000:] + result.stderr[-2000:]
