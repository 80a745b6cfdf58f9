"""Experiment 6: what next, after depth?

Question: how far does the modern block, with Muon, lower the perplexity, at experiment 5's data,
batch and epochs? 19,338,609 parameters; experiment 5 has 19,365,713.
    D = 115,716,078 training tokens per epoch, D / N = 6.0
    32 x 512 = 16,384 tokens per step, 7,063 steps per epoch
Expected: below experiment 5. Over one epoch of 1.05e8 tokens of Wikipedia articles the loss was
0.356 nats per token lower, each at the best of its rates; after five epochs the perplexity was 31.6
and still no sign of overfitting (docs/experiments.md). The weight decay and Muon's rate are
exp6_small's best. Experiment 5's patience and 12 hours are left out: the trapezoid's gain comes in
the last 40 % of the steps.
"""

dataset = "wikitext-103"
max_seq_len = 512
d_model = 256
num_heads = 4
d_ff = 1056
num_layers = 8
dropout = 0.0
block = "modern"
unigram_bias = True

batch_size = 32
epochs = 15
optimizer = "muon"
learning_rate = 6e-3
adam_eps = 1e-5
lr_schedule = "trapezoid"
weight_decay = 0.03
