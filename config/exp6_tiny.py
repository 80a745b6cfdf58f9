"""Experiment 6 at experiment 1's size: what has the field learned since GPT-2?

Question: at equal parameters and tokens, how far below experiment 1's is the loss with rotary
positions, RMSNorm, normalised queries and keys, a squared ReLU, Muon, and a head bias that begins
at the log token frequencies? The MLPs get the parameters of the learned positions: 868,713
parameters; experiment 1 has 869,153.
    D = 2,347,038 training tokens per epoch, D / N = 2.7
    8 x 512 = 4,096 tokens per step, 573 steps per epoch
Expected: at least 0.20 nats per token below experiment 1. docs/ablations.md has the measurements.
"""

dataset = "wikitext-2"
max_seq_len = 512
d_model = 16
num_heads = 2
d_ff = 192
num_layers = 2
dropout = 0.0
block = "modern"
unigram_bias = True

batch_size = 8
epochs = 300
optimizer = "muon"
learning_rate = 1.5e-2
adam_eps = 1e-5
warmup_steps = 20
lr_schedule = "trapezoid"
