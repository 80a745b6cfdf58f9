"""The model: a pre-norm GPT whose head is tied to its embedding.

Shapes: B sequences, T tokens, D = d_model, H heads, V = vocab_size. Parameters are float32.
"""

import functools
import math

import torch
import torch.nn as nn
import torch.nn.functional as F

from lab.console import UserError
from lab.folder import is_out_of_memory
from lab.kernels import (
    Dropout,
    HeadLoss,
    causal_attention,
    head_loss,
    head_rows,
    rms_norm,
    rotate,
    rotations,
    softmax_expression,
)


class Block(nn.Module):
    """The notebook's block, pre-norm: LayerNorm and causal attention, LayerNorm and a GELU MLP,
    each added to the residual stream."""

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

    def forward(self, x, embedded=None, values=None, rotation=None, attend=causal_attention):
        """x (B, T, D) -> (x, None). attend is the attention, another one where keys and values are
        cached. The other arguments are for ModernBlock."""
        B, T, D = x.shape
        qkv = self.qkv(self.attention_norm(x)).view(B, T, 3, self.num_heads, D // self.num_heads)
        y = attend(*qkv.permute(2, 0, 3, 1, 4))  # each (B, H, T, D / H)
        y = y.transpose(1, 2).reshape(B, T, D)
        x = x + self.dropout(self.attention_out(y))
        y = F.gelu(self.mlp_in(self.mlp_norm(x)), approximate="tanh")
        return x + self.dropout(self.mlp_out(y)), None


class ModernBlock(nn.Module):
    """Experiment 6's block, pre-norm as the other one. It has RMSNorm without weights, rotary
    positions, normalised queries and keys, a squared ReLU and no biases. What feeds the residual
    stream begins at zero. What each part gives is in docs/ablations.md.

    Before each block the embeddings are mixed into the stream again (`mix`), and the first block's
    values into the block's own (`value_mix`; Zhou et al. 2024). The parts are modded-nanogpt's.
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

    def forward(self, x, embedded, values, rotation, attend=causal_attention):
        """x and the embeddings (B, T, D); the first block's values (B, T, H, D / H), None for that
        block itself; rotation: see rotate() -> (x, the first block's values)."""
        B, T, D = x.shape
        x = self.mix[0] * x + self.mix[1] * embedded
        qkv = self.qkv(rms_norm(x)).view(B, T, 3, self.num_heads, D // self.num_heads)
        q, k, v = qkv.unbind(2)  # each (B, T, H, D / H)
        q, k = (rotate(rms_norm(t), *rotation).type_as(v) for t in (q, k))
        values = v if values is None else values
        v = (self.value_mix[0] * v + self.value_mix[1] * values).type_as(v)
        y = attend(*(t.transpose(1, 2) for t in (q, k, v)))
        y = y.transpose(1, 2).reshape(B, T, D)
        x = x + self.dropout(self.attention_out(y))
        y = F.relu(self.mlp_in(rms_norm(x)))
        y = y * y  # autocast leaves a product in low precision, and takes square() to float32
        return x + self.dropout(self.mlp_out(y)), values


class LanguageModel(nn.Module):
    """A GPT: token embedding, dropout, num_layers blocks, a norm, and a head that is tied to the
    embedding and, unless head_bias is False, has a bias over the vocabulary.

    block "gpt2" is the notebook's: learned positions beside the embedding, LayerNorm. It is
    initialised as GPT-2 (Radford et al. 2019): normal(0, 0.02), projections into the residual
    stream scaled by 1 / sqrt(2 * num_layers), biases zero. block "modern" is experiment 6's (see
    ModernBlock); its embeddings are normalised where they enter the stream.
    """

    def __init__(
        self,
        vocab_size,
        max_seq_len,
        d_model,
        num_heads,
        d_ff,
        num_layers,
        dropout=0.0,
        block="gpt2",
        head_bias=True,
    ):
        super().__init__()
        self.args = dict(
            vocab_size=vocab_size,
            max_seq_len=max_seq_len,
            d_model=d_model,
            num_heads=num_heads,
            d_ff=d_ff,
            num_layers=num_layers,
            dropout=dropout,
            block=block,
            head_bias=head_bias,
        )
        self.modern = block == "modern"
        self.compiled_hidden = self.compiled_softmax = None  # see compile_parts()
        self.token_embedding = nn.Embedding(vocab_size, d_model)
        if self.modern:
            # A table, since compiled kernels would form cosines again for every head and layer. It
            # is real also where the rest is built on "meta" and filled from a checkpoint.
            with torch.device("cpu"):
                table = rotations(max_seq_len, d_model // num_heads)
            self.register_buffer("rotations", table, persistent=False)
        else:
            self.position_embedding = nn.Embedding(max_seq_len, d_model)
            self.final_norm = nn.LayerNorm(d_model)
        self.dropout = Dropout(dropout)
        cls = ModernBlock if self.modern else Block
        blocks = [cls(d_model, num_heads, d_ff, dropout) for _ in range(num_layers)]
        self.blocks = nn.ModuleList(blocks)
        if head_bias:
            self.head_bias = nn.Parameter(torch.zeros(vocab_size))
        else:  # zeros that stay, so that all who add the bias need not ask
            self.register_buffer("head_bias", torch.zeros(vocab_size))
        for name, module in self.named_modules():
            self.initialise(name, module)

    def initialise(self, name, module):
        """Draw a module's own weights, if it has matrices."""
        if not isinstance(module, (nn.Linear, nn.Embedding)):
            return
        std = 0.02
        if name.endswith(("attention_out", "mlp_out")):
            std = 0.0 if self.modern else 0.02 / math.sqrt(2 * self.args["num_layers"])
        elif self.modern and isinstance(module, nn.Linear):
            std = (3 * self.args["d_model"]) ** -0.5
        nn.init.normal_(module.weight, std=std)
        if getattr(module, "bias", None) is not None:
            nn.init.zeros_(module.bias)

    @classmethod
    def from_checkpoint(cls, checkpoint):
        """The model of a checkpoint's dict, on the CPU, in eval mode. Raises UserError if it is not
        one of this program."""
        try:
            with torch.device("meta"):  # nothing to initialise
                model = cls(**checkpoint["model_args"])
            model.load_state_dict(checkpoint["model"], assign=True)
        except (TypeError, RuntimeError, AttributeError) as error:
            if is_out_of_memory(error):
                raise
            why = " ".join(str(error).split())[:300]
            raise UserError(f"the checkpoint's weights are not this model's ({why})") from None
        return model.eval()

    def compile_parts(self):
        """torch.compile what a training step spends its time on. Evaluation and generation do
        without, since a compilation takes longer than it would save them."""
        self.compiled_hidden = torch.compile(self.hidden)
        if self.head_bias.is_cuda:  # on a CPU rows that stay in the cache are faster
            self.compiled_softmax = torch.compile(softmax_expression)

    def hidden(self, tokens, positions=None, attend=None):
        """tokens (B, T) int64, T <= max_seq_len -> what the head reads, (B, T, D).

        positions (B, T): the tokens' positions, where they do not begin at 0. attend(layer): a
        layer's attention, where keys and values are cached.
        """
        T = tokens.shape[1]
        x = self.token_embedding(tokens)
        if self.modern:
            table = self.rotations
            rotation = (table[:, :T] if positions is None else table[:, positions]).unsqueeze(-2)
            x = rms_norm(x)
            if torch.is_autocast_enabled(x.device.type):  # half the traffic for the same loss
                x = x.to(torch.get_autocast_dtype(x.device.type))
        else:
            rotation = None
            positions = torch.arange(T, device=x.device) if positions is None else positions
            x = x + self.position_embedding(positions)
        x = embedded = self.dropout(x)
        values = None
        for layer, block in enumerate(self.blocks):
            attention = attend(layer) if attend else causal_attention
            x, values = block(x, embedded, values, rotation, attention)
        return rms_norm(x) if self.modern else self.final_norm(x)

    def head(self, x):
        """x (..., D) -> logits (..., V)."""
        return F.linear(x, self.token_embedding.weight, self.head_bias)

    def forward(self, tokens, targets=None):
        """tokens (B, T) int64 -> logits (B, T, V). With targets (B, T) int64 -> the mean loss in
        nats per token, 0-d float32."""
        if targets is not None and not torch.is_grad_enabled():
            return self.token_losses(tokens, targets).mean()
        x = (self.compiled_hidden or self.hidden)(tokens)
        if targets is None:
            return self.head(x)
        tied = self.token_embedding.weight, self.head_bias
        return HeadLoss.apply(x.flatten(0, 1), *tied, targets.flatten(), self.compiled_softmax)

    @torch.no_grad()
    def token_losses(self, tokens, targets):
        """The loss of every token by itself: (B, T), (B, T) int64 -> (B, T) float32, nats. No
        gradients."""
        x = self.hidden(tokens).flatten(0, 1)
        tied = self.token_embedding.weight, self.head_bias
        losses, *_ = head_loss(x, *tied, targets.flatten(), False)
        return losses.view(tokens.shape)

    # --- generation

    def cache(self, B, fixed=False):
        """An empty Cache for B rows of tokens. fixed: see Cache."""
        return Cache(self, B, fixed)

    def prefill(self, prompts, cache, rows):
        """Read prompts (R lists of ids, of 0 to max_seq_len each) into `rows` (R indices) of a
        cache, whatever they held."""
        device = self.head_bias.device
        # Short prompts are padded on the right. Causal attention keeps that from what is before it.
        texts = [torch.tensor(prompt, dtype=torch.int64) for prompt in prompts]
        tokens = nn.utils.rnn.pad_sequence(texts, batch_first=True).to(device)
        if tokens.shape[1]:
            self.hidden(tokens, attend=lambda layer: cache.fill(layer, rows))
        cache.lengths[rows] = torch.tensor([len(prompt) for prompt in prompts], device=device)

    def decode(self, ids, cache):
        """Add one id to every row of a cache, ids (B,) int64. Returns what the head reads to
        predict the next: (B, D). A row that was full gives nothing of use, and wants a prefill."""
        at = cache.lengths.clamp(max=self.args["max_seq_len"] - 1)
        x = self.hidden(ids[:, None], at[:, None], cache.append(at))
        cache.lengths += 1
        return x[:, 0]

    # --- what it costs

    def count(self):
        """Parameters, each counted once: a dict of total, embeddings (token and position),
        head_bias and blocks."""
        total = sum(p.numel() for p in self.parameters())
        embeddings = sum(m.weight.numel() for m in self.modules() if isinstance(m, nn.Embedding))
        bias = self.head_bias.numel() if self.args["head_bias"] else 0
        blocks = total - embeddings - bias
        return dict(total=total, embeddings=embeddings, head_bias=bias, blocks=blocks)

    def flops_per_token(self):
        """FLOPs per token of training, forward and backward: 6 per weight of every matmul, the
        head's too. Attention takes 12 * T * D per layer, of which a causal mask needs half (PaLM,
        appendix B)."""
        a = self.args
        layers, D = a["num_layers"], a["d_model"]
        weights = a["vocab_size"] * D + layers * (4 * D + 2 * a["d_ff"]) * D
        return 6 * weights + 6 * layers * a["max_seq_len"] * D

    def memory_bytes(self, rows, dtype, device_type):
        """Bytes, roughly, that training takes on a device with `rows` sequences a forward pass and
        matmuls in dtype."""
        a = self.args
        size, tokens = 4 if dtype == torch.float32 else 2, rows * a["max_seq_len"]
        # what a block keeps for the backward pass, per token
        block = (10 * a["d_model"] + 3 * a["d_ff"]) * size + 10 * a["d_model"]
        activations = tokens * (a["num_layers"] * block + 24 * a["d_model"])
        logits, softmax = head_rows(device_type, a["vocab_size"], tokens)
        head = (logits * size + softmax * 4) * a["vocab_size"]
        libraries = 1 << 26 if device_type == "cuda" else 0  # what cuBLAS takes for itself
        # weights, gradients, AdamW's two averages and one copy: 20 bytes per parameter
        return 20 * self.count()["total"] + activations + head + libraries


class Cache:
    """Keys and values of B rows of tokens, so that one more token costs one position's work.

    Allocated once, of fixed shape: k and v (num_layers, B, H, max_seq_len, D / H). lengths (B,)
    int64: how much of each row is filled. With `fixed` a token's work has the same shapes whatever
    the lengths, as a CUDA graph wants it: it reads all of the cache, and masks what is not filled.
    """

    def __init__(self, model, B, fixed=False):
        a = model.args
        size = a["d_model"] // a["num_heads"]
        shape = a["num_layers"], B, a["num_heads"], a["max_seq_len"], size
        self.k, self.v = model.head_bias.new_zeros(shape), model.head_bias.new_zeros(shape)
        self.lengths = torch.zeros(B, dtype=torch.int64, device=self.k.device)
        self.fixed = fixed

    def fill(self, layer, rows):
        """A layer's attention over prompts that fill `rows` from the start."""

        def attend(q, k, v):
            T = k.shape[2]
            self.k[layer, rows, :, :T], self.v[layer, rows, :, :T] = k, v
            return causal_attention(q, k, v)

        return attend

    def append(self, at):
        """attend(layer) for one new token a row, at positions `at` (B,) int64: to all that its row
        holds."""
        longest = self.k.shape[3] if self.fixed else int(at.max()) + 1
        columns = torch.arange(longest, device=at.device)
        mask = torch.where(columns <= at[:, None], 0.0, -math.inf)[:, None, None]
        rows, where = torch.arange(len(at), device=at.device), at
        if not self.fixed and int(at.min()) + 1 == longest:
            rows, where = slice(None), longest - 1  # rows of one length need no indices

        def attend(layer, q, k, v):
            self.k[layer, rows, :, where] = k[:, :, 0]
            self.v[layer, rows, :, where] = v[:, :, 0]
            keys, values = self.k[layer, :, :, :longest], self.v[layer, :, :, :longest]
            # plain matmuls: for one query torch's fused kernels are slower, on a GPU four times
            scores = torch.add(mask, q @ keys.mT, alpha=q.shape[-1] ** -0.5)
            return scores.softmax(-1) @ values

        return lambda layer: functools.partial(attend, layer)
