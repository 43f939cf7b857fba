"""The optimizer of the released RMU loops."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch

NAME = "adamw_rmu"
EPS = 1e-6


class AdamWRMU(torch.optim.Optimizer):
    """Adam as ``transformers.AdamW`` computed it until transformers 4.49, the optimizer of the released loops.

    With m and v Adam's moments of the gradient g (Kingma and Ba 2014, arXiv 1412.6980), step t is

        p <- p - lr sqrt(1 - beta2^t) / (1 - beta1^t) * m / (sqrt(v) + eps).

    ``torch.optim.AdamW`` adds eps after the division of sqrt(v) by sqrt(1 - beta2^t), so at t = 1 the same eps weighs 32 times less
    there. Here a gradient below eps / sqrt(1 - beta2), 3e-5, takes a first step that is shorter than lr. m and v have the
    parameter's dtype; there is no weight decay.

    Args:
        params: parameters or parameter groups.
        lr: learning rate.
        betas: decay of m and of v.
        eps: added to the root of v, which is not corrected for its bias.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 5e-5,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = EPS,
    ) -> None:
        super().__init__(params, dict(lr=lr, betas=betas, eps=eps))

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One update of every parameter that has a gradient."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            beta1, beta2 = group["betas"]
            for parameter in group["params"]:
                gradient = parameter.grad
                if gradient is None:
                    continue
                state = self.state[parameter]
                if not state:
                    state["step"] = 0
                    state["exp_avg"] = torch.zeros_like(parameter)
                    state["exp_avg_sq"] = torch.zeros_like(parameter)
                state["step"] += 1
                step, m, v = state["step"], state["exp_avg"], state["exp_avg_sq"]
                m.mul_(beta1).add_(gradient, alpha=1 - beta1)
                v.mul_(beta2).addcmul_(gradient, gradient, value=1 - beta2)
                size = group["lr"] * (1 - beta2**step) ** 0.5 / (1 - beta1**step)
                parameter.addcdiv_(m, v.sqrt().add_(group["eps"]), value=-size)
        return loss
