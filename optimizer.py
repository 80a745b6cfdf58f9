"""What updates the weights: the learning rate of a step, the groups of parameters, AdamW and Muon."""

import math

import torch


def warmup_of(config, total_steps):
    """Steps of warm-up of a run of so many: as configured, else 200 or a tenth of the run if that is less."""
    return min(200, total_steps // 10) if config.warmup_steps is None else config.warmup_steps


def lr_at(step, config, total_steps):
    """The learning rate of a step, counted from 0: linear warm-up, then constant, or a cosine to min_learning_rate over
    the whole run, or a trapezoid: constant, and a straight line there over the last 40 % of the steps."""
    top, low, warmup = config.learning_rate, config.min_learning_rate, warmup_of(config, total_steps)
    if step < warmup:
        return top * (step + 1) / warmup
    if config.lr_schedule == "constant":
        return top
    if config.lr_schedule == "trapezoid":
        return low + (top - low) * min(1, (total_steps - step) / (0.4 * total_steps))
    done = (step - warmup) / max(1, total_steps - warmup)
    return low + 0.5 * (1 + math.cos(math.pi * min(1, done))) * (top - low)


def orthogonalise(x):
    """About the nearest matrices with orthonormal rows or columns to x (k, m, n) float32: five Newton-Schulz steps,
    whose coefficients leave singular values between 0.7 and 1.2; on CUDA in bfloat16 (Jordan et al. 2024)."""
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
    """Muon (Jordan et al. 2024), for matrices: Nesterov's momentum of the gradient, made orthogonal.

    All matrices of one shape at once, where torch.optim.Muon takes one at a time. Where found_inf (set by whoever
    calls, 0-d float32 on the device, as for torch's fused optimizers) is not 0, nothing changes.
    """

    def __init__(self, params, lr, momentum=0.95, weight_decay=0.0):
        super().__init__(params, dict(lr=lr, momentum=momentum, weight_decay=weight_decay))
        self.found_inf = None

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            lr, momentum = group["lr"], group["momentum"]
            for shape in {p.shape: None for p in group["params"]}:  # in order
                params = [p for p in group["params"] if p.shape == shape]
                for p in params:
                    if not self.state[p]:
                        self.state[p]["momentum"] = torch.zeros_like(p)
                grads, old = torch.stack([p.grad for p in params]), [self.state[p]["momentum"] for p in params]
                momenta = torch.stack(old)
                new = momenta.lerp(grads, 1 - momentum)
                update = orthogonalise(grads.lerp(new, momentum)) * max(1, shape[0] / shape[1]) ** 0.5
                before = torch.stack(params)
                weights = before * (1 - lr * group["weight_decay"]) - lr * update
                if self.found_inf is not None:
                    weights = torch.where(self.found_inf > 0, before, weights)
                    new = torch.where(self.found_inf > 0, momenta, new)
                torch._foreach_copy_(params, weights.unbind())
                torch._foreach_copy_(old, new.unbind())


def make_optimizers(config, model):
    """[AdamW], or [AdamW, Muon] where Muon takes the blocks' matrices. Biases and gains do not decay. A group's
    learning rate is its `scale` times the step's."""
    muon = {id(p) for p in model.blocks.parameters() if p.dim() == 2 and config.optimizer == "muon"}
    rest = [p for p in model.parameters() if id(p) not in muon]
    groups = [dict(params=[p for p in rest if p.dim() >= 2], weight_decay=config.weight_decay, scale=1.0),
              dict(params=[p for p in rest if p.dim() < 2], weight_decay=0.0, scale=1.0)]
    adamw = torch.optim.AdamW(groups, lr=config.learning_rate, betas=(config.beta1, config.beta2),
                              eps=config.adam_eps, fused=True)
    if not muon:
        return [adamw]
    matrices = dict(params=[p for p in model.parameters() if id(p) in muon],
                    scale=config.muon_learning_rate / config.learning_rate)
    return [adamw, Muon([matrices], lr=config.muon_learning_rate, weight_decay=config.weight_decay)]
