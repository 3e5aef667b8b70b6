"""Muon, the optimizer of the blocks' matrices: momentum, then the nearest orthogonal matrix.

Jordan et al., https://kellerjordan.github.io/posts/muon; the scale of the update is Moonlight's, arXiv 2502.16982.
torch.optim.Muon does the same in bfloat16, one matrix at a time: fast on a GPU, slow on a CPU, which this is for.
"""

from collections import defaultdict

import torch
from torch import Tensor


def orthogonalize(G: Tensor, steps: int = 5) -> Tensor:
    """Approximately U V^T for a stack of matrices G = U S V^T, (..., m, n): singular values come out near 1.

    The quintic Newton-Schulz iteration X <- a X + b (X X^T) X + c (X X^T)^2 X acts on each singular value alone, so
    X = P G for a polynomial P of the Gram matrix A = G G^T. Iterating P and A, which are square of the shorter side,
    costs about half of iterating X.
    """
    a, b, c = 3.4445, -4.7750, 2.0315
    wide = G.mT if G.size(-2) > G.size(-1) else G
    wide = wide / (torch.linalg.matrix_norm(wide, keepdim=True) + 1e-7)
    A = wide @ wide.mT
    eye = torch.eye(A.size(-1), dtype=A.dtype, device=A.device)
    P = None
    for step in range(steps):
        Q = a * eye + b * A + c * (A @ A)
        P = Q if P is None else Q @ P
        if step < steps - 1:
            A = Q @ A @ Q
    X = P @ wide
    return X.mT if G.size(-2) > G.size(-1) else X


class Muon(torch.optim.Optimizer):
    """Muon with Nesterov momentum for 2-D parameters; matrices of one shape are orthogonalized as one stack.

    lr: learning rate, on the scale of AdamW's: an update has the root mean square 0.2 lr
    weight_decay: decoupled, as in AdamW
    """

    def __init__(self, params, lr: float = 5e-3, momentum: float = 0.95, weight_decay: float = 0.0):
        super().__init__(params, dict(lr=lr, momentum=momentum, weight_decay=weight_decay))

    @torch.no_grad()
    def step(self) -> None:
        for group in self.param_groups:
            same_shape = defaultdict(list)
            for p in group["params"]:
                if p.grad is not None:
                    same_shape[p.shape].append(p)
            for (rows, columns), params in same_shape.items():
                gradients = [p.grad for p in params]
                momenta = [self.state[p].setdefault("momentum", torch.zeros_like(p)) for p in params]
                torch._foreach_lerp_(momenta, gradients, 1 - group["momentum"])
                nesterov = torch._foreach_lerp(gradients, momenta, group["momentum"])
                update = orthogonalize(torch.stack(nesterov)) * (0.2 * max(rows, columns) ** 0.5)
                torch._foreach_mul_(params, 1 - group["lr"] * group["weight_decay"])
                torch._foreach_add_(params, list(update.unbind()), alpha=-group["lr"])
