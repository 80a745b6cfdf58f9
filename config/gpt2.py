"""GPT-2, fine-tuned: what does WikiText add to a model that has read the web?

Question: OpenAI trained GPT-2 on web pages, without Wikipedia. How far does one epoch of WikiText
take it, and what does it lose elsewhere?
    N = 124,439,808 parameters, without a head bias
    D = 115,716,078 training tokens per epoch, D / N = 0.93, beside what it was trained on
    32 x 1024 = 32,768 tokens per step, 3,532 steps per epoch
The learning rate is a tenth of experiment 5's, so that the model keeps most of what it knows.
Expected: a validation loss below that of the released weights, which `--eval_only` prints while
out/gpt2 holds no run; no figure given. docs/finetuning.md says what to compare it with.
Recorded: nothing yet.
"""

dataset = "wikitext-103"
init_from = "gpt2"  # a folder; docs/finetuning.md has the command that fetches it
max_seq_len = 1024
dropout = 0.1

batch_size = 32
epochs = 1
learning_rate = 4e-5
eval_interval = 500
