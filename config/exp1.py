"""Experiment 1: does a model near Chinchilla's size for the data overfit less?

Question: the model before this one had 3.4 M parameters, 29 times Chinchilla's optimum for
WikiText-2, and overfitted badly. This one has 869,153 parameters (the original notebook first
wrote 819,153).
    D = 2,347,038 training tokens per epoch, D / N = 2.7; Chinchilla's optimum is N = D / 20 =
        117 K, and this model has 7.4 times as many parameters
    8 x 512 = 4,096 tokens per step, 573 steps per epoch
Expected: better text and less overfitting than before; no figure given.
Recorded: validation perplexity 464.64 at epoch 209.
"""

dataset = "wikitext-2"
max_seq_len = 512
d_model = 16
num_heads = 2
d_ff = 64
num_layers = 2
dropout = 0.3

batch_size = 8
epochs = 300
learning_rate = 3e-4

recorded_ppl = 464.64
