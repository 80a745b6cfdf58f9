"""Experiment 6: what next, after depth?

Question: experiment 5's parameters, data, batch and epochs. How far does the block of the years
since GPT-2, with Muon, lower the perplexity? 19,338,609 parameters of experiment 5's 19,365,713.
    D = 115,716,078 training tokens an epoch, D / N = 6.0; 32 x 512 = 16,384 tokens a step,
        7,063 steps an epoch
Expected: below experiment 5. What was measured, of one epoch of a million tokens at this size, is
in docs/experiments.md; its heads have exp6_small's size of 64, and its dropout is experiment 5's.
Experiment 5's patience and 12 hours are left out: the trapezoid's gain comes in the last 40 % of
the steps.
"""

dataset = "wikitext-103"
max_seq_len = 512
d_model = 256
num_heads = 4
d_ff = 1056
num_layers = 8
dropout = 0.1
block = "modern"
unigram_bias = True

batch_size = 32
epochs = 15
optimizer = "muon"
learning_rate = 6e-3
muon_learning_rate = 0.02
adam_eps = 1e-5
warmup_steps = 200
lr_schedule = "trapezoid"
weight_decay = 0.1
grad_clip = 1.0
