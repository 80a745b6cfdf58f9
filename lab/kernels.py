"""What a step spends its time on: attention, dropout, and the head with its loss.

Shapes: B sequences, T tokens, D = d_model, H heads, V = vocab_size; N = B * T rows.
"""

import functools
import math

import torch
import torch.nn as nn
import torch.nn.functional as F


def causal_attention(q, k, v):
    """Causal attention. q, k, v and the result: (B, H, T, D / H). No dropout inside, since that
    would rule out the fused kernels.

    On a CPU in low precision it works in blocks of rows, each over the columns that it may see, as
    plain batched matmuls. Forward and backward together that is twice as fast as torch's kernel
    there, and keeps the weights in memory. In float32 torch's kernel is the faster one.
    """
    if q.device.type != "cpu" or q.dtype == torch.float32:
        return F.scaled_dot_product_attention(q, k, v, is_causal=True)
    shape, rows = q.shape, 128
    q, k, v = (t.flatten(0, 1) for t in (q * shape[-1] ** -0.5, k, v))
    mask = q.new_full((rows, rows), -math.inf).triu(1)
    blocks = []
    for start in range(0, shape[2], rows):
        end = min(start + rows, shape[2])
        scores = q[:, start:end] @ k[:, :end].mT
        scores[:, :, start:] += mask[: end - start, : end - start]
        blocks.append(scores.softmax(-1, dtype=q.dtype) @ v[:, :end])
    return torch.cat(blocks, 1).view(shape)


class Dropout(nn.Dropout):
    """Dropout. On a CPU it draws sixteen random bits per number, where torch draws a double, and is
    four times as fast; p is rounded to a multiple of 2**-16 there."""

    def forward(self, x):
        if x.device.type != "cpu" or not self.training or self.p == 0:
            return super().forward(x)
        dropped = min(round(self.p * 65536), 65535)
        bits = torch.empty(-(-x.numel() // 4), dtype=torch.int64).random_(-(2**63), None)
        keep = bits.view(torch.int16)[: x.numel()].view(x.shape) >= dropped - 32768
        return x * (keep.to(x.dtype) * (65536 / (65536 - dropped)))


def rms_norm(x):
    """x over its root mean square along the last dimension, without weights (Zhang and
    Sennrich 2019)."""
    return F.rms_norm(x, x.shape[-1:], eps=1e-6)


def rotations(length, size):
    """The cosines and sines that rotate() needs for heads of `size` at positions 0 to length - 1:
    (2, length, size / 2) float32."""
    frequencies = 10000.0 ** -(torch.arange(0, size, 2) / size)
    angles = torch.arange(length)[:, None] * frequencies
    return torch.stack((angles.cos(), angles.sin()))


def rotate(x, cos, sin):
    """Rotary positions (Su et al. 2021): turn each pair of x's halves by its position's angle.

    x (B, T, H, size); cos and sin (T, 1, size / 2), or (B, T, 1, size / 2). Returns x's shape.
    """
    a, b = x.chunk(2, -1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), -1)


# --- the head and its loss


def head_rows(device_type, vocab_size, N):
    """(how many of N rows of logits the head forms at a time, how many of those its softmax takes
    at a time). Matmuls want many rows, in equal parts; the softmax, in float32, wants to stay in a
    CPU's cache, and elsewhere to take less memory than the logits."""
    most = max(1, {"cpu": 1 << 26, "cuda": 1 << 29}.get(device_type, 1 << 27) // vocab_size)
    rows = math.ceil(N / math.ceil(N / most))
    return rows, min(rows, 32 if device_type == "cpu" else 512)


def head_loss(x, weight, bias, targets, gradients, compiled_softmax=None):
    """The head and its cross-entropy, in chunks of rows, so that the (N, V) logits never exist.

    x (N, D); weight (V, D) and bias (V,) float32; targets (N,) int64. Matmuls are in autocast's
    dtype where autocast is on; bias, softmax and sums over chunks are in float32. compiled_softmax:
    softmax_expression, compiled. Returns the losses (N,) float32, nats, and the gradients of their
    sum in x, weight and bias, None without `gradients`. The idea of forming gradients in the
    forward pass is Liger-Kernel's fused linear cross-entropy (Hsu et al. 2024).
    """
    kind, (N, D), V = x.device.type, x.shape, len(weight)
    is_low = torch.is_autocast_enabled(kind)
    dtype = torch.get_autocast_dtype(kind) if is_low else weight.dtype
    rows, block = head_rows(kind, V, N)
    # matmul kernels want a multiple of 64; the columns that are no words get a bias of -inf
    extra = -V % 64
    with torch.autocast(kind, enabled=False):
        low_x, low_weight = x.to(dtype), F.pad(weight.to(dtype), (0, 0, 0, extra))
        bias = F.pad(bias, (0, extra), value=-math.inf)
        losses = x.new_empty(N, dtype=bias.dtype)
        logits = x.new_empty(rows, V + extra, dtype=dtype)
        if compiled_softmax:  # it needs no memory of its own
            softmax, block = compiled_softmax, rows
        else:
            scratch = None if dtype == bias.dtype else bias.new_empty(block, V + extra)
            softmax = functools.partial(softmax_in_place, scratch=scratch)
        if gradients:
            grad_x, product = torch.empty_like(x), None
            grad_weight, grad_bias = bias.new_zeros(V + extra, D), torch.zeros_like(bias)
            # a column of ones gives the bias's gradient in the weight's matmul, where a sum over
            # rows would be one more pass over the logits; kernels want a multiple of 8
            xs_and_ones = F.pad(low_x, (0, 8), value=1)
        for start in range(0, N, rows):
            part = slice(start, start + rows)
            xs = low_x[part]
            chunk = torch.mm(xs, low_weight.t(), out=logits[: len(xs)])
            blocks = (t.split(block) for t in (chunk, losses[part], targets[part]))
            for low, loss, target in zip(*blocks, strict=True):
                picked = low.gather(1, target[:, None]).squeeze(1) + bias[target]
                loss[:] = softmax(low, bias, target, gradients) - picked
            if gradients:  # the chunk holds the logits' gradients now
                grad_x[part] = product_over_words(chunk, low_weight)
                product = torch.mm(chunk.t(), xs_and_ones[part], out=product)
                # on a CPU a sum of two dtypes makes a copy first, so that it is done in bands
                band = 4096 if kind == "cpu" else len(grad_weight)
                parts = zip(grad_weight.split(band), product[:, :D].split(band), strict=True)
                for total, low in parts:
                    total += low
                grad_bias += product[:, D]
    if not gradients:
        return losses, None, None, None
    return losses, grad_x, grad_weight[:V], grad_bias[:V]


def product_over_words(chunk, weight):
    """chunk (n, V) @ weight (V, D)."""
    if chunk.device.type != "mps":
        return chunk @ weight
    # sums over 32,767 and more can be wrong there (pytorch#177116)
    parts = zip(chunk.split(16384, 1), weight.split(16384), strict=True)
    return sum((left @ right).float() for left, right in parts)


def softmax_in_place(logits, bias, targets, gradients, scratch):
    """The log-sum-exp of rows of logits, and the gradients of their losses.

    logits (n, V), bias (V,), targets (n,). Returns (n,), nats: less the target's logit they are the
    losses. With `gradients` those of the losses' sum take the logits' place. scratch: float32
    memory (at least n, V) to work in, None to work in the logits themselves. With fresh memory all
    of this would take a CPU more than twice as long.
    """
    p = (logits if scratch is None else scratch[: len(logits)].copy_(logits)).add_(bias)
    top = p.amax(1)
    torch.softmax(p, 1, out=p)
    # the likeliest word's probability is at least 1 / V, so that its log is exact: log-sum-exp is
    # the largest logit less that log
    log_sums = top - p.amax(1).log()
    if gradients:
        # a logit's gradient is its probability, less one at the target
        p.scatter_add_(1, targets[:, None], p.new_full((len(p), 1), -1))
        if scratch is not None:
            logits.copy_(p)
    return log_sums


def softmax_expression(logits, bias, targets, gradients):
    """softmax_in_place() as one expression, for torch.compile. On CUDA that is one kernel: a sum
    over rows, or the target's logit, would make it two."""
    p = logits + bias
    top = p.amax(1, keepdim=True)
    p = (p - top).exp()
    total = p.sum(1, keepdim=True)
    if gradients:
        words = torch.arange(len(bias), device=bias.device)
        logits.copy_(p / total - (words == targets[:, None]).to(p.dtype))
    return (top + total.log()).squeeze(1)


class HeadLoss(torch.autograd.Function):
    """Mean cross-entropy of the tied head. head_loss() forms its gradients in the forward pass.

    x (N, D), weight (V, D) float32, bias (V,) float32, targets (N,) int64 -> 0-d float32, nats
    per token.
    """

    @staticmethod
    def forward(ctx, x, weight, bias, targets, compiled_softmax=None):
        losses, *ctx.gradients = head_loss(x, weight, bias, targets, True, compiled_softmax)
        ctx.loss = losses.mean()
        return ctx.loss.clone()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        # in place, since a copy of the weight's gradient costs more than the product; divided by N
        # only here, since float16 would have lost the small ones in the matmuls
        gradients, ctx.gradients = ctx.gradients, None
        # a loss that is not finite makes its gradients so, and by them every rank sees it
        scale = grad / len(gradients[0]) + (ctx.loss - ctx.loss)
        return *(g.mul_(scale) for g in gradients), None, None
