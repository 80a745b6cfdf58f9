"""Demo: does everything work here?

Question: what does a small model learn from one pass over Python's own documentation, in about a
minute?
    4 x 128 = 512 tokens a step, about 240 steps
Expected: a loss that falls from ln(50,257) = 10.8 to below 6, and text that looks like
documentation from afar.
"""

dataset = "demo"
max_seq_len = 128
d_model = 64
num_heads = 4
d_ff = 256
num_layers = 4
dropout = 0.1

batch_size = 4
epochs = 1
learning_rate = 2e-3
warmup_steps = 20
eval_interval = 50
