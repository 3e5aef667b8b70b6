"""The optimizers and the learning rate: Muon for the matrices of the blocks, AdamW for all other parameters.

Muon steps along the orthogonal matrix that is nearest to the momentum. A gradient has a few strong directions and many
weak ones. Muon makes all equally strong, so that a step learns in each of them. Jordan et al.,
https://kellerjordan.github.io/posts/muon; the scale of the update is Moonlight's, arXiv 2502.16982.
torch.optim.Muon with adjust_lr_fn="match_rms_adamw" does the same a matrix at a time, in five steps of one polynomial,
which is fast on a GPU. This one is fast on CPUs.
"""

import argparse
import math
from collections import defaultdict

import torch
from torch import Tensor, nn

ADAMW_MAX_LR = 3e-3  # AdamW's highest learning rate beside Muon; with a higher one the loss jumps
# a, b and c of each step: of all such polynomials, the one that brings the singular values (at first 0.01 to 1, then
# what the steps before it leave) nearest to 1 (Polar Express, arXiv 2505.16932). Three steps leave 0.73 to 1.27.
COEFFICIENTS = (8.0934, -23.6204, 17.4462), (3.6366, -2.7219, 0.5365), (2.6613, -1.9772, 0.4526)


def orthogonalize(matrices: list[Tensor], dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """About U V^T for each matrix G = U S V^T, a singular value decomposition. All have the same shorter side, n. The
    results have the shapes of the matrices. Products are computed in dtype. bfloat16 turns a result by some 7 degrees,
    which is less than the three steps below are from U V^T.

    The Newton-Schulz iteration is X <- (a I + b A + c A^2) X with A = X X^T. It keeps U and V, and moves each singular
    value x to a x + b x^3 + c x^5. X is always P G, where P is a polynomial of the first A. So it is enough to iterate
    P and A, which are (n, n), and all matrices can do so in one stack.
    """
    matrices = [G.to(dtype) for G in matrices]
    wide = [G.mT if G.size(0) > G.size(1) else G for G in matrices]
    A = torch.stack([G @ G.mT for G in wide]).float()
    bound = torch.linalg.matrix_norm(A, keepdim=True).clamp(min=1e-14)  # no squared singular value of G is above this
    A, P = (A / bound).to(dtype), 1 / bound.sqrt()
    for step, (a, b, c) in enumerate(COEFFICIENTS):
        Q = torch.baddbmm(A, A, A, beta=b, alpha=c)
        Q.diagonal(dim1=1, dim2=2).add_(a)  # Q = a I + b A + c A^2
        P = Q @ P if step else (Q * P).to(dtype)  # because P begins as a number times I
        if step < len(COEFFICIENTS) - 1:
            A = Q @ A @ Q
    results = [G @ p if G.size(0) > G.size(1) else p @ G for G, p in zip(matrices, P, strict=True)]
    return [X.float() for X in results]


class Muon(torch.optim.Optimizer):
    """Muon with Nesterov momentum, for 2-D parameters.

    lr:    learning rate, on the scale of AdamW's, because an update has the root mean square 0.2 lr
    dtype: in which matrices are orthogonalized, bfloat16 where the device has it, since it takes half the time
    """

    def __init__(self, params, lr: float = 5e-3, momentum: float = 0.95, dtype: torch.dtype = torch.float32):
        super().__init__(params, dict(lr=lr, momentum=momentum))
        self.dtype = dtype

    @torch.no_grad()
    def step(self) -> None:
        for group in self.param_groups:
            alike = defaultdict(list)  # by the shorter side, because these are orthogonalized together
            for p in group["params"]:
                if p.grad is not None:
                    alike[min(p.shape)].append(p)
            for params in alike.values():
                gradients = [p.grad for p in params]
                for p in params:
                    if "momentum" not in self.state[p]:
                        self.state[p]["momentum"] = torch.zeros_like(p)
                momenta = [self.state[p]["momentum"] for p in params]
                torch._foreach_lerp_(momenta, gradients, 1 - group["momentum"])
                updates = orthogonalize(torch._foreach_lerp(gradients, momenta, group["momentum"]), self.dtype)
                torch._foreach_mul_(updates, [-0.2 * group["lr"] * max(p.shape) ** 0.5 for p in params])
                torch._foreach_add_(params, updates)


def make_optimizers(model: nn.Module, args: argparse.Namespace) -> list[torch.optim.Optimizer]:
    """AdamW, and before it, with args.optimizer "muon", Muon for the matrices of model.blocks.

    Each group of parameters has a "scale", by which the learning rate is multiplied.
    """
    matrices = [p for p in model.blocks.parameters() if p.ndim == 2] if args.optimizer == "muon" else []
    ids = {id(p) for p in matrices}
    others = [p for p in model.parameters() if id(p) not in ids]
    scale = ADAMW_MAX_LR / max(args.lr, ADAMW_MAX_LR) if matrices else 1.0
    adamw = torch.optim.AdamW(
        [dict(params=others, scale=scale)], lr=args.lr, betas=(0.9, 0.99), weight_decay=0.0, fused=True
    )
    dtype = torch.bfloat16 if args.precision == "bf16" else torch.float32
    return [Muon([dict(params=matrices, scale=1.0)], lr=args.lr, dtype=dtype), adamw] if matrices else [adamw]


def learning_rate(step: int, args: argparse.Namespace) -> float:
    """The learning rate of step 0, 1, ...: a linear rise, then a constant, or half a cosine that falls to 0.

    While the number of steps is not known yet (--minutes), it stays at the highest.
    """
    if step < args.warmup:
        return args.lr * (step + 1) / args.warmup
    if args.lr_schedule == "constant" or args.steps is None:
        return args.lr
    return args.lr * 0.5 * (1 + math.cos(math.pi * (step - args.warmup) / max(1, args.steps - args.warmup)))


def take_step(optimizers: list[torch.optim.Optimizer], lr: float) -> None:
    """Set the learning rate of each group of parameters, and take a step of each optimizer."""
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = group["scale"] * lr
        optimizer.step()


@torch.no_grad()
def update_ema(ema: nn.Module, model: nn.Module, step: int, decay: float) -> None:
    """Move the averaged weights towards the model's. The decay rises to its value, since the first weights are bad."""
    decay = min(decay, (1 + step) / (10 + step))
    torch._foreach_lerp_(list(ema.parameters()), list(model.parameters()), 1 - decay)


def optimizer_states(optimizers: list[torch.optim.Optimizer]) -> dict:
    """The tensors that optimizers keep of each parameter, nested under numbers as strings, see checkpoint.save."""
    states = [optimizer.state_dict()["state"] for optimizer in optimizers]
    return {str(i): {str(n): kept for n, kept in state.items()} for i, state in enumerate(states)}


def states_after_a_step(optimizer: torch.optim.Optimizer) -> dict:
    """What an optimizer keeps of each parameter once it has taken a step, here one of size 0."""
    for group in optimizer.param_groups:
        group["lr"] = 0.0
        for p in group["params"]:
            p.grad = torch.zeros_like(p)
    optimizer.step()
    optimizer.zero_grad()
    return optimizer.state_dict()["state"]


def load_optimizers(optimizers: list[torch.optim.Optimizer], saved: dict) -> None:
    """Restore what `optimizer_states` gave after a step. Call it before the weights are restored.

    Raises some exception where it is not finite, or not what such optimizers keep.
    """
    for i, optimizer in enumerate(optimizers):
        expected = states_after_a_step(optimizer)
        state = {int(n): kept for n, kept in saved.get(str(i), {}).items()}
        if expected and not state:
            raise ValueError("the state of an optimizer is missing")
        for n, kept in state.items():
            ours, theirs = ({name: (v.shape, v.dtype) for name, v in tensors.items()}
                            for tensors in (expected.get(n, {}), kept))
            if ours != theirs or not all(value.isfinite().all() for value in kept.values()):
                raise ValueError("the state of an optimizer is not what it keeps of its parameters, or not finite")
        optimizer.load_state_dict({**optimizer.state_dict(), "state": state})
