"""Experiment 6 at experiment 1's size: what has the field learned since GPT-2?

Question: at equal parameters and equal tokens, how much lower than experiment 1 does the loss
come with rotary positions, RMSNorm, normalised queries and keys, a squared ReLU, Muon, and a head
bias that begins at word frequencies? The positions' parameters are free now, and go into the
MLPs: 868,713 parameters of experiment 1's 869,153.
    D = 2,347,038 training tokens an epoch, D / N = 2.7; 8 x 512 = 4,096 tokens a step, 573
        steps an epoch
Expected: at least 0.20 nats a token below experiment 1. What was measured is in
docs/ablations.md.
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
muon_learning_rate = 0.02
adam_eps = 1e-5
warmup_steps = 20
lr_schedule = "trapezoid"
weight_decay = 0.1
grad_clip = 1.0
