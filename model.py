"""The model: a pre-norm GPT whose head is tied to its embedding, and its checkpoints.

Shapes: B sequences, T tokens, D = d_model, H heads, V = vocab_size; N = B * T rows. Parameters are float32.
"""

import math
import os

import torch
import torch.nn as nn
import torch.nn.functional as F

from config import UserError


class Block(nn.Module):
    """One transformer block, pre-norm: causal attention, then a GELU MLP, each added to the residual stream."""

    def __init__(self, d_model, num_heads, d_ff, dropout):
        super().__init__()
        self.num_heads = num_heads
        self.attention_norm = nn.LayerNorm(d_model)
        self.qkv = nn.Linear(d_model, 3 * d_model)
        self.attention_out = nn.Linear(d_model, d_model)
        self.mlp_norm = nn.LayerNorm(d_model)
        self.mlp_in = nn.Linear(d_model, d_ff)
        self.mlp_out = nn.Linear(d_ff, d_model)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x):
        """x (B, T, D) -> (B, T, D)."""
        B, T, D = x.shape
        qkv = self.qkv(self.attention_norm(x)).view(B, T, 3, self.num_heads, D // self.num_heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # each (B, H, T, D / H)
        # no dropout inside attention: it would take the fused kernels away
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        y = y.transpose(1, 2).reshape(B, T, D)
        x = x + self.dropout(self.attention_out(y))
        y = F.gelu(self.mlp_in(self.mlp_norm(x)), approximate="tanh")
        return x + self.dropout(self.mlp_out(y))


class LanguageModel(nn.Module):
    """A GPT: token embedding + learned positions, dropout, num_layers blocks, LayerNorm, head tied to the embedding.

    The head has a bias over the vocabulary of its own. Initialised as GPT-2 (Radford et al. 2019): normal(0, 0.02),
    projections into the residual stream scaled by 1 / sqrt(2 * num_layers), biases zero.
    """

    def __init__(self, vocab_size, max_seq_len, d_model, num_heads, d_ff, num_layers, dropout=0.0):
        super().__init__()
        self.args = dict(
            vocab_size=vocab_size, max_seq_len=max_seq_len, d_model=d_model, num_heads=num_heads, d_ff=d_ff,
            num_layers=num_layers, dropout=dropout,
        )
        self.token_embedding = nn.Embedding(vocab_size, d_model)
        self.position_embedding = nn.Embedding(max_seq_len, d_model)
        self.dropout = nn.Dropout(dropout)
        self.blocks = nn.ModuleList(Block(d_model, num_heads, d_ff, dropout) for _ in range(num_layers))
        self.final_norm = nn.LayerNorm(d_model)
        self.head_bias = nn.Parameter(torch.zeros(vocab_size))
        for name, module in self.named_modules():
            if isinstance(module, (nn.Linear, nn.Embedding)):
                residual = name.endswith(("attention_out", "mlp_out"))
                nn.init.normal_(module.weight, std=0.02 / math.sqrt(2 * num_layers) if residual else 0.02)
            if isinstance(module, nn.Linear):
                nn.init.zeros_(module.bias)

    def hidden(self, tokens):
        """tokens (B, T) int64, T <= max_seq_len -> the stream that the head reads, (B, T, D)."""
        positions = torch.arange(tokens.shape[1], device=tokens.device)
        x = self.dropout(self.token_embedding(tokens) + self.position_embedding(positions))
        for block in self.blocks:
            x = block(x)
        return self.final_norm(x)

    def head(self, x):
        """x (..., D) -> logits (..., V)."""
        return F.linear(x, self.token_embedding.weight, self.head_bias)

    def forward(self, tokens, targets=None):
        """tokens (B, T) int64 -> logits (B, T, V); with targets (B, T), the mean loss in nats a token, 0-d float32."""
        if targets is not None and not torch.is_grad_enabled():
            return self.token_losses(tokens, targets).mean()
        x = self.hidden(tokens)
        if targets is None:
            return self.head(x)
        return HeadLoss.apply(x.flatten(0, 1), self.token_embedding.weight, self.head_bias, targets.flatten())

    @torch.no_grad()
    def token_losses(self, tokens, targets):
        """The loss of every token by itself, nats: (B, T), (B, T) int64 -> (B, T) float32. No gradients."""
        x = self.hidden(tokens).flatten(0, 1)
        chunks = head_chunks(x, self.token_embedding.weight, self.head_bias, targets.flatten())
        return torch.cat([losses for losses, *_ in chunks]).view(tokens.shape)

    def count(self):
        """Parameters, counted once each: a dict of total, embeddings (token and position), head_bias and blocks."""
        total = sum(p.numel() for p in self.parameters())
        embeddings = self.token_embedding.weight.numel() + self.position_embedding.weight.numel()
        bias = self.head_bias.numel()
        return dict(total=total, embeddings=embeddings, head_bias=bias, blocks=total - embeddings - bias)

    def flops_per_token(self):
        """Floating-point operations a token of training, forward and backward: 6 a weight of every matmul, the head's
        too, and 6 * T * D a layer for attention, of which a causal mask needs half of 12 (PaLM, appendix B)."""
        a = self.args
        weights = a["vocab_size"] * a["d_model"] + a["num_layers"] * (4 * a["d_model"] + 2 * a["d_ff"]) * a["d_model"]
        return 6 * weights + 6 * a["num_layers"] * a["max_seq_len"] * a["d_model"]

    def memory_bytes(self, rows, dtype):
        """Bytes, roughly, that training takes with `rows` sequences a forward pass, matmuls in dtype."""
        a, size = self.args, 4 if dtype == torch.float32 else 2
        block = (10 * a["d_model"] + 3 * a["d_ff"]) * size + 10 * a["d_model"]  # kept for backward, a token
        activations = rows * a["max_seq_len"] * (a["num_layers"] * block + 24 * a["d_model"])
        return 20 * self.count()["total"] + activations + 2 * chunk_bytes(self.head_bias.device.type)


def chunk_bytes(device_type):
    """How many bytes of float32 logits the head forms at a time: near the cache's size on a CPU, many on a GPU."""
    return 64 << 20 if device_type == "cpu" else 512 << 20


def head_chunks(x, weight, bias, targets):
    """Go through the head in chunks of rows, so that the (N, V) logits never exist.

    x (N, D), weight (V, D), bias (V,), targets (N,) int64; matmuls in autocast's dtype where autocast is on, the
    softmax in float32. Yields (losses (n,) in nats, rows: slice, xs (n, D), weight (V, D) as the matmul took them,
    exps (n, V), sums (n, 1)): the softmax is exps / sums. exps is one buffer that the next chunk overwrites, and
    autocast stays off for what the caller does between chunks.
    """
    kind = x.device.type
    dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else weight.dtype
    rows = max(1, chunk_bytes(kind) // (4 * weight.shape[0]))
    with torch.autocast(kind, enabled=False):
        x, weight = x.to(dtype), weight.to(dtype)
        buffer = torch.empty(min(rows, len(x)), weight.shape[0], dtype=torch.float32, device=x.device)
        for start in range(0, len(x), rows):
            part = slice(start, min(start + rows, len(x)))
            exps = buffer[: part.stop - start]
            if dtype == torch.float32:  # not addmm, which would copy the bias into every row first
                torch.mm(x[part], weight.t(), out=exps).add_(bias)
            else:
                torch.add(x[part] @ weight.t(), bias, out=exps)
            picked = exps.gather(1, targets[part, None])
            top = exps.amax(1, keepdim=True)
            sums = exps.sub_(top).exp_().sum(1, keepdim=True)
            yield (sums.log() + top - picked).squeeze(1), part, x[part], weight, exps, sums


class HeadLoss(torch.autograd.Function):
    """Mean cross-entropy of the tied head, its gradients formed chunk by chunk in the forward pass.

    x (N, D), weight (V, D) float32, bias (V,) float32, targets (N,) int64 -> 0-d float32, nats a token. The idea is
    Liger-Kernel's fused linear cross-entropy (Hsu et al. 2024).
    """

    @staticmethod
    def forward(ctx, x, weight, bias, targets):
        total = torch.zeros((), device=x.device)
        grad_x, grad_weight, grad_bias = torch.empty_like(x), torch.zeros_like(weight), torch.zeros_like(bias)
        for losses, rows, xs, w, exps, sums in head_chunks(x, weight, bias, targets):
            total += losses.sum()
            # d loss / d logits, times N: softmax, less one at the target. Divided by N only after the matmuls, since
            # float16 would lose the small ones
            exps.div_(sums).scatter_add_(1, targets[rows, None], torch.full_like(sums, -1))
            grad_bias += exps.sum(0)
            low = exps.to(xs.dtype)  # itself, where the matmuls are float32
            grad_x[rows] = low @ w
            if low is exps:
                grad_weight.addmm_(low.t(), xs)
            else:
                grad_weight += low.t() @ xs
        ctx.save_for_backward(grad_x.div_(len(x)), grad_weight.div_(len(x)), grad_bias.div_(len(x)))
        return total / len(x)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        grad_x, grad_weight, grad_bias = ctx.saved_tensors
        return grad_x * grad, grad_weight * grad, grad_bias * grad, None


def save_checkpoint(checkpoint, path, keep=None):
    """Write a checkpoint under a temporary name, fsync it and rename it: path is whole at every moment.

    keep: a path that what was at path is renamed to.
    """
    part = f"{path}.part"
    with open(part, "wb") as file:
        torch.save(checkpoint, file)
        file.flush()
        os.fsync(file.fileno())
    if keep and os.path.exists(path):
        os.replace(path, keep)
    os.replace(part, path)


def load_checkpoint(path):
    """A checkpoint's dict, its tensors on the CPU. Executes nothing from the file: weights_only. Raises UserError."""
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise UserError(f"there is no checkpoint {path}; `python train.py config/demo.py` makes one") from None
    except (PermissionError, IsADirectoryError) as error:
        raise UserError(f"cannot read checkpoint {path}: {error.strerror}") from None
    except Exception:
        checkpoint = None  # torn, empty, or another program's: torch.load has as many exceptions as ways to be so
    if not isinstance(checkpoint, dict) or not {"model", "model_args", "step"} <= checkpoint.keys():
        raise UserError(f"{path} is not a whole checkpoint of this program; remove it, or name another")
    return checkpoint


def load_model(path):
    """(LanguageModel in eval mode on the CPU, the checkpoint's dict without its weights). Raises UserError."""
    checkpoint = load_checkpoint(path)
    try:
        model = LanguageModel(**checkpoint["model_args"])
        model.load_state_dict(checkpoint.pop("model"))
    except (TypeError, RuntimeError, AttributeError):
        raise UserError(f"{path} holds another model than this program's; name another checkpoint") from None
    return model.eval(), checkpoint
