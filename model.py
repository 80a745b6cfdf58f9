"""The model: a pre-norm GPT whose head is tied to its embedding, and its checkpoints.

Shapes: B sequences, T tokens, D = d_model, H heads, V = vocab_size; N = B * T rows. Parameters are float32.
"""

from lab.console import ROOT, UserError, command

import functools
import math
import zipfile

import torch
import torch.nn as nn
import torch.nn.functional as F


def causal_attention(q, k, v):
    """Causal attention, no dropout inside: it would take the fused kernels away. All (B, H, T, D / H).

    On a CPU and in low precision, blocks of rows, each over the columns that it may see, as plain batched matmuls: with
    the backward pass twice as fast as the flash kernel there, at the cost of keeping the weights. In float32 it is not.
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
    """Dropout that on a CPU takes sixteen random bits a number, where torch's draws a double: four times as fast. p is
    rounded to a multiple of 2**-16."""

    def forward(self, x):
        if x.device.type != "cpu" or not self.training or self.p == 0:
            return super().forward(x)
        dropped = min(round(self.p * 65536), 65535)
        bits = torch.empty(-(-x.numel() // 4), dtype=torch.int64).random_(-(2**63), None)
        keep = bits.view(torch.int16)[: x.numel()].view(x.shape) >= dropped - 32768
        return x * (keep.to(x.dtype) * (65536 / (65536 - dropped)))


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
        self.dropout = Dropout(dropout)

    def forward(self, x, attend=causal_attention):
        """x (B, T, D) -> (B, T, D). attend: the attention, another where keys and values are cached."""
        B, T, D = x.shape
        qkv = self.qkv(self.attention_norm(x)).view(B, T, 3, self.num_heads, D // self.num_heads)
        y = attend(*qkv.permute(2, 0, 3, 1, 4))  # each (B, H, T, D / H)
        y = y.transpose(1, 2).reshape(B, T, D)
        x = x + self.dropout(self.attention_out(y))
        y = F.gelu(self.mlp_in(self.mlp_norm(x)), approximate="tanh")
        return x + self.dropout(self.mlp_out(y))


def rms_norm(x):
    """x over its root mean square along the last dimension; no gain. Zhang and Sennrich 2019."""
    return F.rms_norm(x, x.shape[-1:], eps=1e-6)


def rotations(length, size):
    """What turns queries and keys of a head of `size` at positions 0 to length - 1: cos and sin, (2, length, size / 2)
    float32."""
    frequencies = 10000.0 ** -(torch.arange(0, size, 2) / size)
    angles = torch.arange(length)[:, None] * frequencies
    return torch.stack((angles.cos(), angles.sin()))


def rotate(x, cos, sin):
    """Rotary positions (Su et al. 2021): x (B, H, T, size), each pair of its halves turned by its position's angles,
    (T, size / 2) or (B, 1, T, size / 2) each."""
    a, b = x.chunk(2, -1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), -1)


class ModernBlock(nn.Module):
    """Experiment 6's block, pre-norm as the other: RMSNorm without a gain, rotary positions, queries and keys
    normalised, a squared ReLU, no biases. What feeds the residual stream begins at zero. What was measured is in
    docs/ablations.md.

    The stream takes the embeddings in again before each block (`mix`), and the values the first block's (`value_mix`;
    Zhou et al. 2024). The parts are those of modded-nanogpt.
    """

    def __init__(self, d_model, num_heads, d_ff, dropout):
        super().__init__()
        self.num_heads = num_heads
        self.mix = nn.Parameter(torch.tensor([1.0, 0.0]))
        self.value_mix = nn.Parameter(torch.tensor([0.5, 0.5]))
        self.qkv = nn.Linear(d_model, 3 * d_model, bias=False)
        self.attention_out = nn.Linear(d_model, d_model, bias=False)
        self.mlp_in = nn.Linear(d_model, d_ff, bias=False)
        self.mlp_out = nn.Linear(d_ff, d_model, bias=False)
        self.dropout = Dropout(dropout)

    def forward(self, x, start, values, rotation, attend=causal_attention):
        """x and start, the embeddings (B, T, D); values, the first block's (B, H, T, D / H), None for that block itself
        -> (x, the first block's values)."""
        B, T, D = x.shape
        x = self.mix[0] * x + self.mix[1] * start
        q, k, v = self.qkv(rms_norm(x)).view(B, T, 3, self.num_heads, D // self.num_heads).permute(2, 0, 3, 1, 4)
        q, k = (rotate(rms_norm(t), *rotation).type_as(v) for t in (q, k))
        values = v if values is None else values
        v = (self.value_mix[0] * v + self.value_mix[1] * values).type_as(v)
        y = attend(q, k, v).transpose(1, 2).reshape(B, T, D)
        x = x + self.dropout(self.attention_out(y))
        y = F.relu(self.mlp_in(rms_norm(x)))
        y = y * y  # which autocast leaves in low precision; CUDA's would take square() to float32
        return x + self.dropout(self.mlp_out(y)), values


class Cache:
    """Keys and values of B rows of tokens, so that one more token costs one position's work.

    Preallocated, of fixed shape: k and v (num_layers, B, H, max_seq_len, D / H). lengths (B,) int64, on the CPU: how
    much of each row is filled.
    """

    def __init__(self, model, B):
        a = model.args
        shape = a["num_layers"], B, a["num_heads"], a["max_seq_len"], a["d_model"] // a["num_heads"]
        self.k, self.v = model.head_bias.new_zeros(shape), model.head_bias.new_zeros(shape)
        self.lengths = torch.zeros(B, dtype=torch.int64)

    def fill(self, layer, rows):
        """A layer's attention over prompts that fill `rows` from the start."""

        def attend(q, k, v):
            T = k.shape[2]
            self.k[layer, rows, :, :T], self.v[layer, rows, :, :T] = k, v
            return causal_attention(q, k, v)

        return attend

    def append(self, at):
        """attend(layer) for one new token a row, at positions `at` (B,) int64 on the CPU: to all that its row holds."""
        longest, device = int(at.max()) + 1, self.k.device
        if int(at.min()) + 1 == longest:  # rows of one length need neither a mask nor indices
            rows, where, mask = slice(None), longest - 1, None
        else:
            rows, where = torch.arange(len(at), device=device), at.to(device)
            mask = (torch.arange(longest, device=device) <= where[:, None])[:, None, None]  # (B, 1, 1, longest)

        def attend(layer, q, k, v):
            self.k[layer, rows, :, where], self.v[layer, rows, :, where] = k[:, :, 0], v[:, :, 0]
            seen = self.k[layer, :, :, :longest], self.v[layer, :, :, :longest]
            return F.scaled_dot_product_attention(q, *seen, attn_mask=mask)

        return lambda layer: functools.partial(attend, layer)


class LanguageModel(nn.Module):
    """A GPT: token embedding, dropout, num_layers blocks, a norm, and a head tied to the embedding with a bias over the
    vocabulary of its own.

    block "gpt2" is the notebook's: learned positions beside the embedding, LayerNorm. Initialised as GPT-2 (Radford et
    al. 2019): normal(0, 0.02), projections into the residual stream scaled by 1 / sqrt(2 * num_layers), biases zero.
    block "modern" is experiment 6's: see ModernBlock. Its embeddings are normalised where they enter the stream.
    """

    def __init__(self, vocab_size, max_seq_len, d_model, num_heads, d_ff, num_layers, dropout=0.0, block="gpt2"):
        super().__init__()
        self.args = dict(
            vocab_size=vocab_size, max_seq_len=max_seq_len, d_model=d_model, num_heads=num_heads, d_ff=d_ff,
            num_layers=num_layers, dropout=dropout, block=block,
        )
        self.modern = block == "modern"
        self.fused = None  # softmax_loss, where compile_blocks() compiled it
        self.token_embedding = nn.Embedding(vocab_size, d_model)
        if self.modern:
            with torch.device("cpu"):  # not "meta", where load_model() builds
                table = rotations(max_seq_len, d_model // num_heads)
            # a table, since compiled kernels would form cosines again for every head and layer
            self.register_buffer("rotations", table, persistent=False)
        else:
            self.position_embedding = nn.Embedding(max_seq_len, d_model)
            self.final_norm = nn.LayerNorm(d_model)
        self.dropout = Dropout(dropout)
        kind = ModernBlock if self.modern else Block
        self.blocks = nn.ModuleList(kind(d_model, num_heads, d_ff, dropout) for _ in range(num_layers))
        self.head_bias = nn.Parameter(torch.zeros(vocab_size))
        for name, module in self.named_modules():
            if isinstance(module, (nn.Linear, nn.Embedding)):
                std = 0.02
                if name.endswith(("attention_out", "mlp_out")):
                    std = 0.0 if self.modern else 0.02 / math.sqrt(2 * num_layers)
                elif self.modern and isinstance(module, nn.Linear):
                    std = (3 * d_model) ** -0.5
                nn.init.normal_(module.weight, std=std)
            if isinstance(module, nn.Linear) and module.bias is not None:
                nn.init.zeros_(module.bias)

    def hidden(self, tokens, positions=None, attend=None):
        """tokens (B, T) int64, T <= max_seq_len -> the stream that the head reads, (B, T, D).

        With a cache, positions (B, T) are the tokens' own, and attend(layer) gives a layer's attention.
        """
        T = tokens.shape[1]
        attentions = [attend(i) if attend else causal_attention for i in range(len(self.blocks))]
        x = self.token_embedding(tokens)
        if self.modern:
            x = start = self.dropout(rms_norm(x))
            rotation = self.rotations[:, :T] if positions is None else self.rotations[:, positions].unsqueeze(2)
            values = None
            for block, attention in zip(self.blocks, attentions, strict=True):
                x, values = block(x, start, values, rotation, attention)
            return rms_norm(x)
        positions = torch.arange(T, device=x.device) if positions is None else positions
        x = self.dropout(x + self.position_embedding(positions))
        for block, attention in zip(self.blocks, attentions, strict=True):
            x = block(x, attention)
        return self.final_norm(x)

    def prefill(self, prompts, cache, rows):
        """Read prompts (R lists of ids, of 1 to max_seq_len each) into `rows` (R indices) of a cache, whatever they
        held. Returns what the head reads to predict each prompt's next token: (R, D)."""
        lengths = torch.tensor([len(prompt) for prompt in prompts])
        # filled up on the right, where nothing before looks
        tokens = nn.utils.rnn.pad_sequence([torch.tensor(prompt) for prompt in prompts], batch_first=True)
        device = self.head_bias.device  # the class's hidden(), since a compiled one would compile anew for each shape
        x = type(self).hidden(self, tokens.to(device), attend=lambda layer: cache.fill(layer, rows))
        cache.lengths[rows] = lengths
        return x[torch.arange(len(prompts)), lengths - 1]

    def decode(self, ids, cache):
        """Add one id to every row of a cache, ids (B,) int64; what the head reads to predict the next: (B, D). Rows
        that are full already give nothing of use, and want a prefill."""
        full = self.args["max_seq_len"]
        at = cache.lengths.clamp_(max=full - 1)
        x = type(self).hidden(self, ids[:, None], at[:, None].to(ids.device), cache.append(at))
        cache.lengths += 1
        return x[:, 0]

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
        tied = self.token_embedding.weight, self.head_bias
        return HeadLoss.apply(x.flatten(0, 1), *tied, targets.flatten(), self.fused)

    @torch.no_grad()
    def token_losses(self, tokens, targets):
        """The loss of every token by itself, nats: (B, T), (B, T) int64 -> (B, T) float32. No gradients."""
        x = self.hidden(tokens).flatten(0, 1)
        losses, *_ = head_loss(x, self.token_embedding.weight, self.head_bias, targets.flatten(), False, self.fused)
        return losses.view(tokens.shape)

    def count(self):
        """Parameters, counted once each: a dict of total, embeddings (token and position), head_bias and blocks."""
        total = sum(p.numel() for p in self.parameters())
        embeddings = sum(m.weight.numel() for m in self.modules() if isinstance(m, nn.Embedding))
        bias = self.head_bias.numel()
        return dict(total=total, embeddings=embeddings, head_bias=bias, blocks=total - embeddings - bias)

    def flops_per_token(self):
        """Floating-point operations a token of training, forward and backward: 6 a weight of every matmul, the head's
        too, and 6 * T * D a layer for attention, of which a causal mask needs half of 12 (PaLM, appendix B)."""
        a = self.args
        weights = a["vocab_size"] * a["d_model"] + a["num_layers"] * (4 * a["d_model"] + 2 * a["d_ff"]) * a["d_model"]
        return 6 * weights + 6 * a["num_layers"] * a["max_seq_len"] * a["d_model"]

    def memory_bytes(self, rows, dtype, device_type):
        """Bytes, roughly, that training takes on a device with `rows` sequences a forward pass, matmuls in dtype."""
        a, size = self.args, 4 if dtype == torch.float32 else 2
        block = (10 * a["d_model"] + 3 * a["d_ff"]) * size + 10 * a["d_model"]  # kept for backward, a token
        tokens, V = rows * a["max_seq_len"], a["vocab_size"]
        logits, softmax = head_rows(device_type, V, tokens)
        activations = tokens * (a["num_layers"] * block + 24 * a["d_model"])
        return 20 * self.count()["total"] + activations + logits * V * size + softmax * V * 4


def head_rows(device_type, vocab_size, N):
    """How many of N rows of logits the head forms at a time, and how many of those its softmax takes at a time: the
    matmuls want many, in equal parts; the softmax, float32, wants to stay in a CPU's cache."""
    most = max(1, {"cpu": 1 << 26, "cuda": 1 << 28}.get(device_type, 1 << 27) // vocab_size)
    rows = math.ceil(N / math.ceil(N / most))
    return rows, min(rows, 32) if device_type == "cpu" else rows


def softmax_in_place(logits, bias, targets, gradients, room):
    """The losses (n,) of rows of logits (n, V) plus bias (V,), nats, and with `gradients` those of their sum: in the
    logits, which they replace, and in the bias, (V,); else None. In `room`, float32, or in the logits if that is None:
    with fresh memory all of this would take a CPU twice as long and more."""
    p = (logits if room is None else room[: len(logits)].copy_(logits)).add_(bias)
    picked, top = p.gather(1, targets[:, None]), p.amax(1, keepdim=True)
    torch.softmax(p, 1, out=p)
    # the likeliest word's probability is at least 1 / V, and so gives log-sum-exp in full precision
    losses = (top - p.amax(1, keepdim=True).log() - picked).squeeze(1)
    if not gradients:
        return losses, None
    p.scatter_add_(1, targets[:, None], p.new_full((len(p), 1), -1))  # the softmax, less one at the target
    if room is not None:
        logits.copy_(p)
    return losses, p.sum(0)


def softmax_loss(logits, bias, targets, gradients):
    """softmax_in_place() as one expression, for torch.compile: on CUDA it reads the logits three times and writes them
    once."""
    p = logits + bias
    picked, top = p.gather(1, targets[:, None]), p.amax(1, keepdim=True)
    p = (p - top).exp()
    total = p.sum(1, keepdim=True)
    losses = (top + total.log() - picked).squeeze(1)
    if not gradients:
        return losses, None
    words = torch.arange(len(bias), device=bias.device)
    p = p / total - (words == targets[:, None]).to(p.dtype)
    logits.copy_(p)
    return losses, p.sum(0)


def head_loss(x, weight, bias, targets, gradients, fused=None):
    """The head and its cross-entropy in chunks of rows, so that the (N, V) logits never exist.

    x (N, D), weight (V, D), bias (V,) float32, targets (N,) int64; the matmuls in autocast's dtype where autocast is
    on, bias, softmax and every sum in float32. Returns the losses (N,) float32, nats, and the gradients of their sum
    in x, weight and bias if `gradients`, else three None. fused: softmax_loss, compiled. The idea of forming gradients
    in the forward pass is Liger-Kernel's fused linear cross-entropy (Hsu et al. 2024).
    """
    kind, (N, D), V = x.device.type, x.shape, len(weight)
    dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else weight.dtype
    full = torch.promote_types(dtype, torch.float32)
    rows, block = head_rows(kind, V, N)
    padded = -(-V // 64) * 64  # matmul kernels want a multiple of 64; the words that are none get a bias of -inf
    words = 16384 if kind == "mps" else padded  # sums over 32,767 and more can be wrong there (pytorch#177116)
    band = 4096 if kind == "cpu" else padded  # in bands, since there a sum of two dtypes makes a copy first
    with torch.autocast(kind, enabled=False):
        low_x, low_weight = x.to(dtype), F.pad(weight.to(dtype), (0, 0, 0, padded - V))
        bias = F.pad(bias, (0, padded - V), value=-math.inf)
        losses = x.new_empty(N, dtype=full)
        logits = x.new_empty(rows, padded, dtype=dtype)
        room = x.new_empty(block, padded, dtype=full) if dtype != full and not fused else None
        softmax = fused or functools.partial(softmax_in_place, room=room)
        if gradients:
            grad_x, low_grad = torch.empty_like(x), torch.empty_like(low_weight)
            grad_weight, grad_bias = bias.new_zeros(padded, D), torch.zeros_like(bias)
        for start in range(0, N, rows):
            xs = low_x[start : start + rows]
            chunk = torch.mm(xs, low_weight.t(), out=logits[: len(xs)])
            blocks = (t.split(block) for t in (chunk, losses[start : start + rows], targets[start : start + rows]))
            for low, loss, target in zip(*blocks, strict=True):
                loss[:], sums = softmax(low, bias, target, gradients)
                if gradients:
                    grad_bias += sums
            if gradients:
                grad_x[start : start + rows] = chunk[:, :words] @ low_weight[:words]
                for i in range(words, padded, words):
                    grad_x[start : start + rows] += chunk[:, i : i + words] @ low_weight[i : i + words]
                torch.mm(chunk.t(), xs, out=low_grad)
                for into, part in zip(grad_weight.split(band), low_grad.split(band), strict=True):
                    into += part
    return (losses, grad_x, grad_weight[:V], grad_bias[:V]) if gradients else (losses, None, None, None)


class HeadLoss(torch.autograd.Function):
    """Mean cross-entropy of the tied head, its gradients formed in the forward pass by head_loss.

    x (N, D), weight (V, D) float32, bias (V,) float32, targets (N,) int64 -> 0-d float32, nats a token.
    """

    @staticmethod
    def forward(ctx, x, weight, bias, targets, fused=None):
        losses, *ctx.gradients = head_loss(x, weight, bias, targets, True, fused)
        ctx.loss = losses.mean()
        return ctx.loss.clone()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        # in place, since a copy of the weight's gradient costs more than the product; divided by N only here, since
        # float16 would have lost the small ones in the matmuls
        gradients, ctx.gradients = ctx.gradients, None
        # a loss that is not finite makes its gradients so, and by them every rank sees it
        scale = grad / len(gradients[0]) + (ctx.loss - ctx.loss)
        return *(g.mul_(scale) for g in gradients), None, None


def load_checkpoint(path, needed=()):
    """A checkpoint's dict, its tensors on the CPU. Executes nothing from the file. Raises UserError if it is not there
    or not whole: torch checks no sums, so that the zip's own are checked before. needed: keys that it must have beside
    those that sampling needs."""
    try:
        with zipfile.ZipFile(path) as archive:
            checkpoint = archive.testzip() is None and torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        mend = command("train.py", ROOT / "config/demo.py")
        raise UserError(f"there is no checkpoint {path}; `{mend}` makes one") from None
    except (PermissionError, IsADirectoryError) as error:
        raise UserError(f"cannot read checkpoint {path}: {error.strerror}") from None
    except Exception:
        checkpoint = None  # torn, empty, or another program's: there are as many exceptions as ways to be so
    if not isinstance(checkpoint, dict) or not {"model", "model_args", "step", *needed} <= checkpoint.keys():
        raise UserError(f"{path} is not a whole checkpoint of this version of the program; name another")
    return checkpoint


def load_model(path):
    """(LanguageModel in eval mode on the CPU, the checkpoint's dict without its weights). Raises UserError."""
    checkpoint = load_checkpoint(path)
    try:
        with torch.device("meta"):  # nothing to initialise
            model = LanguageModel(**checkpoint["model_args"])
        model.load_state_dict(checkpoint.pop("model"), assign=True)
    except (TypeError, RuntimeError, AttributeError):
        raise UserError(f"{path} holds another model than this program's; name another checkpoint") from None
    return model.eval(), checkpoint
