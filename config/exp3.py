"""Experiment 3: is capacity the bottleneck?

Question: experiment 2 had enough data and still wrote no sentences. This is the smallest model
that might: width 128 for meaning, head dimension 16 for syntax, 4 layers from token to sentence;
7,342,033 parameters.
    D = 115,716,078 training tokens per epoch, D / N = 15.8; Chinchilla's optimum is N = 5.8 M,
        and this model has 1.3 times as many parameters
    32 x 512 = 16,384 tokens per step, 7,063 steps per epoch
Expected: sentences with basic grammar, validation perplexity 80 to 150.
Recorded: 65.71 at epoch 10, stopped at 11 on a plateau; 34 minutes per epoch.
"""

dataset = "wikitext-103"
max_seq_len = 512
d_model = 128
num_heads = 8
d_ff = 512
num_layers = 4
dropout = 0.1

batch_size = 32
epochs = 20
learning_rate = 6e-4

expected_ppl = (80.0, 150.0)
recorded_ppl = 65.71
