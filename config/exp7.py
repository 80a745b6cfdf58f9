"""Experiment 7: what are two thirds of the parameters worth elsewhere?

Question: two thirds of experiment 6's 19,338,609 parameters are rows of GPT-2's vocabulary, which
was made for the whole web. With 8,192 tokens learned from this text, and the freed parameters spent
on width and depth (256 x 8 becomes 384 x 9), how far does the perplexity per word fall at equal
parameters and text? 19,300,388 parameters, of which the vocabulary takes 16 %.
    D = about 135 M training tokens per epoch (not counted), as many bytes as experiment 6's
        115,716,078; D / N = about 7.0
    32 x 512 = 16,384 tokens per step = 66 kB of text, where experiment 6 reads 76 kB; about 8,200
        steps per epoch, where experiment 6 takes 7,063
`python prepare.py wikitext-103 --vocab_size 8192` writes the data set.
Expected: after one epoch of the articles that experiment 6 was measured on, perplexity per word 54
to 58. It was 62.7, where experiment 6 has 60.7 (docs/experiments.md), so the answer is no for one
epoch: GPT-2's rows, which begin as a table of word frequencies, are worth more than the blocks.
Only bits per byte and perplexities per word compare with experiment 6's. The learning rate is the
better of 3e-3 and 6e-3 over 1,000 steps.
"""

dataset = "wikitext-103-8192"
max_seq_len = 512
d_model = 384
num_heads = 6
d_ff = 1568
num_layers = 9
dropout = 0.0
block = "modern"
unigram_bias = True

batch_size = 32
epochs = 15
optimizer = "muon"
learning_rate = 6e-3
adam_eps = 1e-5
lr_schedule = "trapezoid"
weight_decay = 0.03
