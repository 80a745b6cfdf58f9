"""Experiment 4: does width lift experiment 3's ceiling?

Question: experiment 3 stopped improving at perplexity 66. Twice the width, the same 4 layers:
16,206,673 parameters (the original notebook first wrote about 18 M).
    D = 115,716,078 training tokens per epoch, D / N = 7.1; Chinchilla's optimum is N = 5.8 M,
        and this model has 2.8 times as many parameters
    32 x 512 = 16,384 tokens per step, 7,063 steps per epoch
Expected: validation perplexity 45 to 55, several sentences on one topic.
Recorded: 46.33 at epoch 9 after 404 minutes on two RTX 4000 Ada, still falling.
"""

dataset = "wikitext-103"
max_seq_len = 512
d_model = 256
num_heads = 8
d_ff = 1024
num_layers = 4
dropout = 0.1

batch_size = 32
epochs = 15
learning_rate = 4e-4

expected_ppl = (45.0, 55.0)
recorded_ppl = 46.33
