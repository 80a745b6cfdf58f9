"""What updates the weights: the learning rate of a step, AdamW and Muon, and who gets which."""

import math

import torch


def warmup_of(config, total_steps):
    """Steps of warm-up: as configured, but at most a tenth of the run's. A run of 2 to 19 steps has
    at most one."""
    most = max(total_steps // 10, min(total_steps - 1, 1))
    return min(config.warmup_steps, most)


def lr_at(step, config, total_steps):
    """AdamW's learning rate at a step, counted from 0. After a linear warm-up it stays (constant),
    falls by a cosine over the whole run (cosine), or stays and falls in a straight line over the
    last 40 % of the steps (trapezoid)."""
    top, low = config.learning_rate, config.min_learning_rate
    warmup = warmup_of(config, total_steps)
    if step < warmup:
        return top * (step + 1) / warmup
    if config.lr_schedule == "constant":
        return top
    if config.lr_schedule == "trapezoid":
        return low + (top - low) * min(1, (total_steps - step) / (0.4 * total_steps))
    done = (step - warmup) / max(1, total_steps - warmup)
    return low + 0.5 * (1 + math.cos(math.pi * min(1, done))) * (top - low)


def orthogonalise(x):
    """About the nearest matrices with orthonormal rows or columns to x (k, m, n) float32.

    Five Newton-Schulz steps, whose coefficients leave singular values between 0.7 and 1.2 (Jordan
    et al. 2024); on CUDA in bfloat16.
    """
    tall, dtype = x.shape[-2] > x.shape[-1], x.dtype
    x = x.mT if tall else x
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    x = x.bfloat16() if x.is_cuda else x
    for _ in range(5):
        gram = x @ x.mT
        polynomial = torch.baddbmm(gram, gram, gram, beta=-4.7750, alpha=2.0315)
        x = torch.baddbmm(x, polynomial, x, beta=3.4445)
    return (x.mT if tall else x).to(dtype)


class Muon(torch.optim.Optimizer):
    """Muon (Jordan et al. 2024), for matrices: Nesterov's momentum of the gradient, made
    orthogonal. All matrices of one shape are done at once; torch.optim.Muon takes one at a time.

    found_inf, a 0-d float32 tensor on the device that the caller sets, is as for torch's fused
    optimizers: where it is not 0, nothing changes.
    """

    def __init__(self, params, lr, momentum=0.95, weight_decay=0.0):
        super().__init__(params, dict(lr=lr, momentum=momentum, weight_decay=weight_decay))
        self.found_inf = None

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            shapes = {p.shape: None for p in group["params"]}  # in order
            for shape in shapes:
                same = [p for p in group["params"] if p.shape == shape]
                self.update(same, group)

    def update(self, params, group):
        """Update the matrices of one shape."""
        lr, momentum = group["lr"], group["momentum"]
        for p in params:
            if not self.state[p]:
                self.state[p]["momentum"] = torch.zeros_like(p)
        old = [self.state[p]["momentum"] for p in params]
        grads, momenta = torch.stack([p.grad for p in params]), torch.stack(old)
        new = momenta.lerp(grads, 1 - momentum)
        rows, columns = params[0].shape
        update = orthogonalise(grads.lerp(new, momentum)) * max(1, rows / columns) ** 0.5
        before = torch.stack(params)
        weights = before * (1 - lr * group["weight_decay"]) - lr * update
        if self.found_inf is not None:
            weights = torch.where(self.found_inf > 0, before, weights)
            new = torch.where(self.found_inf > 0, momenta, new)
        torch._foreach_copy_(params, weights.unbind())
        torch._foreach_copy_(old, new.unbind())


def make_optimizers(config, model):
    """[AdamW], or [AdamW, Muon] where Muon takes the blocks' matrices. Biases and norm weights do
    not decay, nor do embeddings beside Muon, where the loss is lower without (docs/ablations.md).
    A group's learning rate is its `scale` times the step's."""
    matrices = [p for p in model.blocks.parameters() if p.dim() == 2]
    muon = {id(p) for p in matrices} if config.optimizer == "muon" else set()
    rest = [p for p in model.parameters() if id(p) not in muon]
    wide = [p for p in rest if p.dim() >= 2]
    narrow = [p for p in rest if p.dim() < 2]
    decay = 0.0 if muon else config.weight_decay
    adamw = torch.optim.AdamW(
        [
            dict(params=wide, weight_decay=decay, scale=1.0),
            dict(params=narrow, weight_decay=0.0, scale=1.0),
        ],
        lr=config.learning_rate,
        betas=(config.beta1, config.beta2),
        eps=config.adam_eps,
        fused=True,
    )
    if not muon:
        return [adamw]
    scale = config.muon_learning_rate / config.learning_rate
    group = dict(params=matrices, scale=scale)
    return [adamw, Muon([group], config.muon_learning_rate, weight_decay=config.weight_decay)]
