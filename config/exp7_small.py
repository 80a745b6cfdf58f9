"""Experiment 7 at experiment 3's size: does a small vocabulary pay where rows are most of it?

Question: 88 % of experiment 6 small's parameters are rows of GPT-2's vocabulary. With 8,192 tokens
learned from this text they become 29 %, and 128 x 4 becomes 256 x 6. 7,315,480 parameters;
experiment 6 small has 7,335,137.
    D = about 135 M training tokens per epoch (not counted); D / N = about 18
    32 x 512 = 16,384 tokens per step = 66 kB of text, where experiment 6 small reads 76 kB; about
        8,200 steps per epoch
`python prepare.py wikitext-103 --vocab_size 8192` writes the data set.
Expected: bits per byte below experiment 6 small's 1.248 after one epoch of the articles that it was
measured on; at or above that, the answer is no. Not run: it takes a GPU. Only bits per byte and
perplexities per word compare with experiment 6's.
"""

dataset = "wikitext-103-8192"
max_seq_len = 512
d_model = 256
num_heads = 4
d_ff = 1184
num_layers = 6
dropout = 0.0
block = "modern"
unigram_bias = True

batch_size = 32
epochs = 20
optimizer = "muon"
learning_rate = 4e-3
adam_eps = 1e-5
warmup_steps = 20
lr_schedule = "trapezoid"
weight_decay = 0.03
