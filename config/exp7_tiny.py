"""Experiment 7 at experiment 1's size: a laptop's turn.

Question: 98 % of experiment 6 tiny's parameters are rows of GPT-2's vocabulary, its blocks are 16
wide. With 2,048 tokens learned from this text they are 96 wide and six deep, at equal parameters:
862,232, where experiment 1 has 869,153.
    D = about 3.5 M training tokens per epoch (not counted), as many bytes as experiment 1's
        2,347,038; D / N = about 4
    8 x 512 = 4,096 tokens per step = 13 kB of text, where experiment 6 tiny reads 19 kB
`python prepare.py wikitext-2 --vocab_size 2048` writes the data set.
Expected: bits per byte below experiment 6 tiny's, at equal seconds on two cores. Only bits per byte
and perplexities per word compare with experiments 1 and 6.
"""

dataset = "wikitext-2-2048"
max_seq_len = 512
d_model = 96
num_heads = 3
d_ff = 384
num_layers = 6
dropout = 0.0
block = "modern"
unigram_bias = True

batch_size = 8
epochs = 300
optimizer = "muon"
learning_rate = 8e-3
adam_eps = 1e-5
warmup_steps = 20
lr_schedule = "trapezoid"
