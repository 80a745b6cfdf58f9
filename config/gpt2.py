"""GPT-2, fine-tuned: what does WikiText add to a model that has read the web?

Question: OpenAI's GPT-2 was trained on pages that people linked to, with Wikipedia left out. How
far does one pass over WikiText take it, and what does it lose elsewhere?
    N = 124,439,808 parameters, no bias at the head, so that transformers can have it back
    D = 115,716,078 training tokens an epoch, D / N = 0.93 on top of what it has read
    32 x 1024 = 32,768 tokens a step, 3,532 steps an epoch
The rate is a tenth of experiment 5's: what the model knows is to be bent, not drawn anew.
Expected: a validation loss below that of the released weights, which `--eval_only` prints while
out/gpt2 holds no run. No figure is promised. docs/finetuning.md says what to compare it with.
Recorded: nothing yet.
"""

dataset = "wikitext-103"
init_from = "gpt2"
max_seq_len = 1024
dropout = 0.1

batch_size = 32
epochs = 1
learning_rate = 4e-5
weight_decay = 0.1
grad_clip = 1.0
eval_interval = 500
