"""Demo: does everything work here?

Question: what does a small model learn from one pass over Python's own documentation, in about a
minute?
    4 x 128 = 512 tokens per step, about 240 steps
Expected: a loss that falls from 7 (word frequencies alone) to about 4, and text that looks like
documentation from afar.
"""

dataset = "demo"
max_seq_len = 128
d_model = 64
num_heads = 4
d_ff = 256
num_layers = 4
dropout = 0.0
block = "modern"
unigram_bias = True

batch_size = 4
epochs = 1
optimizer = "muon"
learning_rate = 1e-2
adam_eps = 1e-5
lr_schedule = "trapezoid"
warmup_steps = 20
eval_interval = 50
sample_prompts = ("The for statement", "A class definition", "If the object is")
