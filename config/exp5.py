"""Experiment 5: does depth keep the topic?

Question: experiment 4 reached 46 by width, yet the topic drifted after 15 to 20 words. Twice the
layers at the same width: 19,365,713 parameters (the original notebook first wrote about
28 M).
    D = 115,716,078 training tokens per epoch, D / N = 6.0; Chinchilla's optimum is N = 5.8 M,
        and this model has 3.3 times as many parameters
    32 x 512 = 16,384 tokens per step, 7,063 steps per epoch
Expected: validation perplexity 35 to 42, less topic drift. Meant as "a 12 hours kinda run",
patience 5.
Recorded: nothing yet.
"""

dataset = "wikitext-103"
max_seq_len = 512
d_model = 256
num_heads = 8
d_ff = 1024
num_layers = 8
dropout = 0.1

batch_size = 32
epochs = 15
max_hours = 12.0
patience = 5
learning_rate = 4e-4

expected_ppl = (35.0, 42.0)
