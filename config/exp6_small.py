"""Experiment 6 at experiment 3's size: does the recipe hold at width 128?

Question: experiment 6's parts were chosen at experiment 1's size, where the embedding is 93 % of
the parameters. Do they also lower the loss at experiment 3's parameters and tokens? 7,335,137
parameters; experiment 3 has 7,342,033. Two heads of 64 instead of eight of 16: with normalised
queries and keys no score passes the square root of the head dimension, so that a head of 16 cannot
attend to one token alone.
    D = 115,716,078 training tokens per epoch, D / N = 15.8
    32 x 512 = 16,384 tokens per step, 7,063 steps per epoch
Expected: at least 0.30 nats per token below experiment 3. Over one epoch of 1.05e8 tokens of
Wikipedia articles it was 0.35 below (docs/experiments.md). docs/ablations.md has the gain of each
part.
"""

dataset = "wikitext-103"
max_seq_len = 512
d_model = 128
num_heads = 2
d_ff = 576
num_layers = 4
dropout = 0.0
block = "modern"
unigram_bias = True

batch_size = 32
epochs = 20
optimizer = "muon"
learning_rate = 8e-3
adam_eps = 1e-5
warmup_steps = 20
lr_schedule = "trapezoid"
weight_decay = 0.03
