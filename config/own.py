"""Own text: what does a small model learn from it?

Question: how well does a small model, with experiment 6's recipe, learn this text, and when does
it begin to learn it by heart?
    8 x 256 = 2,048 tokens per step; as many epochs as show it a million tokens, 20 at most
Expected: a validation loss that falls, and with little text rises again. Three evaluations without
a new best end the run; best.pt holds the best of them.
"""

dataset = "mine"
max_seq_len = 256
d_model = 128
num_heads = 2
d_ff = 576
num_layers = 4
dropout = 0.1
block = "modern"
unigram_bias = True

batch_size = 8
epochs = 0
patience = 3
optimizer = "muon"
learning_rate = 8e-3
adam_eps = 1e-5
warmup_steps = 20
lr_schedule = "trapezoid"
weight_decay = 0.03
eval_interval = 200  # for a text of more than ten million tokens, more
sample_prompts = None
