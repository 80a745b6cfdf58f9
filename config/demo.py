"""Demo: does everything work here?

Question: what does a small model learn in four passes over Python's own documentation, in about a
minute? Its vocabulary is 2,048 tokens learned from that text; with GPT-2's 50,257, most of the time
and of the parameters would go into words that never occur.
    D = 117,228 training tokens (Python 3.11's), N = 854,028 parameters
    4 x 128 = 512 tokens per step, about 915 steps
Expected: less than 1.15 bits per byte on the test split, and text that looks like documentation.
The validation split is of other topics and harder, about 2.1.
"""

dataset = "demo"
max_seq_len = 128
d_model = 128
num_heads = 2
d_ff = 512
num_layers = 3
dropout = 0.0
block = "modern"
unigram_bias = True

batch_size = 4
epochs = 4
optimizer = "muon"
learning_rate = 1e-2
adam_eps = 1e-5
lr_schedule = "trapezoid"
warmup_steps = 20
sample_prompts = ("The for statement", "A class definition", "If the object is")
