"""Experiment 2: was experiment 1 starved of data, or too small?

Question: the same 869,153 parameters on WikiText-103, with 49 times the tokens. If the text is
still poor, the size is to blame.
    D = 115,716,078 training tokens per epoch, D / N = 133; Chinchilla's ratio is 20, and one
        epoch has 6.7 times as many tokens
    32 x 512 = 16,384 tokens per step, 7,063 steps per epoch
Expected: one epoch is enough to pass Chinchilla's ratio; no perplexity given. The recorded run
went on for 10.
Recorded: validation perplexity 364.71 at epoch 10, still falling.
"""

dataset = "wikitext-103"
max_seq_len = 512
d_model = 16
num_heads = 2
d_ff = 64
num_layers = 2
dropout = 0.3

batch_size = 32
epochs = 10
learning_rate = 3e-4

recorded_ppl = 364.71
