"""GPT-2's weights, and runs that begin with another's; against transformers' own."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from helpers import (
    VOCAB,
    assert_near,
    assert_the_same_run,
    make_dataset,
    metrics,
    near,
    rows_of,
    same,
)
from safetensors.torch import load_file, save_file

import sample
import train
from lab import gpt2
from lab.console import UserError
from lab.data import Batches, Dataset, load_tokenizer
from lab.folder import load_checkpoint
from model import LanguageModel

pytestmark = pytest.mark.arithmetic
transformers = pytest.importorskip("transformers")
LAYERS, WIDTH, HEADS, CONTEXT = 3, 32, 4, 24
# a layer's norms, matmuls and attention sum over 4 * WIDTH at most, eight times; then norm and head
TOLERANCE = near(torch.float32, LAYERS * 8 * 4 * WIDTH + 2 * WIDTH)
assert TOLERANCE < 1e-4


@pytest.fixture
def peer(tmp_path):
    """A random GPT2LMHeadModel, as save_pretrained writes it into tmp_path/peer."""
    ends = dict(bos_token_id=1, eos_token_id=1)
    shape = dict(n_positions=CONTEXT, n_embd=WIDTH, n_layer=LAYERS, n_head=HEADS)
    config = transformers.GPT2Config(vocab_size=VOCAB, **shape, **ends)
    torch.manual_seed(1)
    peer = transformers.GPT2LMHeadModel(config).eval()
    with torch.no_grad():
        for p in peer.parameters():  # gains and biases too
            p.normal_(std=0.2 if p.dim() > 1 else 1.0)
    peer.save_pretrained(tmp_path / "peer")
    return peer


def assert_same_logits_and_loss(model, peer):
    """Ours and transformers' model say the same of random tokens."""
    torch.manual_seed(2)
    tokens = torch.randint(model.args["vocab_size"], (3, model.args["max_seq_len"]))
    with torch.no_grad():
        theirs = peer(tokens, labels=tokens)
        assert theirs.logits.std() > 0.1
        assert_near(model(tokens), theirs.logits, TOLERANCE)
        assert_near(model(tokens[:, :-1], tokens[:, 1:]), theirs.loss, TOLERANCE)


def refused(match, *words):
    """train.py refuses these words in one line that names this."""
    with pytest.raises(UserError, match=match):
        train.main(words)


def read(folder):
    """The model in a folder of transformers."""
    return LanguageModel.from_checkpoint(gpt2.open_weights(str(folder)))


# --- transformers' folder


def test_a_folder_of_transformers_is_read(peer, tmp_path):
    model = read(tmp_path / "peer")
    assert_same_logits_and_loss(model, peer)
    assert model.count()["total"] == peer.num_parameters() and not model.count()["head_bias"]
    state = model.state_dict()
    # OpenAI's own file has no prefix, and holds the attention's masks
    path = tmp_path / "peer/model.safetensors"
    tensors = {k.removeprefix("transformer."): v for k, v in load_file(path).items()}
    save_file(tensors | {"h.0.attn.bias": torch.ones(1, 1, CONTEXT, CONTEXT).tril()}, path)
    assert same(read(path).state_dict(), state)


def test_a_padded_vocabulary_is_gpt2_s(in_tmp, capsys):
    shape = dict(vocab_size=50304, n_positions=8, n_embd=8, n_head=2, n_inner=16, n_layer=1)
    peer = transformers.GPT2LMHeadModel(transformers.GPT2Config(**shape))
    peer.save_pretrained("padded")
    words = peer.transformer.wte.weight[:50257]
    assert torch.equal(read("padded").token_embedding.weight, words)
    sample.main(["--checkpoint", "padded", "--start", "The", "--max_new_tokens", "5"])
    assert capsys.readouterr().out.startswith("The")


def test_what_is_no_gpt2_is_named(peer, tmp_path):
    path = tmp_path / "peer/config.json"
    config = json.loads(path.read_text())
    for change, names in (
        ({"model_type": "llama", "n_embd": None}, "llama"),
        ({"n_layer": LAYERS + 1}, "blocks.3."),
        ({"n_embd": 2 * WIDTH}, r"token_embedding.weight.*\[512, 32\].*\[512, 64\]"),
        ({"n_head": 5}, "n_head 5.*n_embd 32"),
        ({"n_head": 0}, "n_head 0.*n_embd 32"),
    ):
        path.write_text(json.dumps(config | change))
        with pytest.raises(UserError, match=names):
            read(tmp_path / "peer")


def test_files_that_cannot_be_read_are_named(peer, tmp_path):
    folder, whole = tmp_path / "peer", tmp_path / "peer/model.safetensors"
    whole.write_bytes(whole.read_bytes()[:-9])
    with pytest.raises(UserError, match="peer"):
        read(folder)
    whole.rename(folder / "pytorch_model.bin")
    with pytest.raises(UserError, match="pytorch_model.bin.*save_pretrained"):
        read(folder / "pytorch_model.bin")
    (folder / "config.json").unlink()
    with pytest.raises(UserError, match="config.json.*best.pt"):
        read(folder)
    with pytest.raises(UserError, match="distilgpt2.*hf download openai-community/gpt2"):
        read("distilgpt2")


def test_another_tokenizer_beside_the_weights_is_refused(peer, tmp_path):
    encode = load_tokenizer().encode_single_token
    words = {word: encode(word.replace("Ġ", " ")) for word in gpt2.WORDS}
    swapped = words | {"Ġthe": 661, "Ġpeople": 262}
    for name in "vocab.json", "tokenizer.json":
        path = tmp_path / "peer" / name
        for tried in words, swapped:
            content = {"model": {"vocab": tried}} if name == "tokenizer.json" else tried
            path.write_text(json.dumps(content), encoding="utf-8")
            if tried == words:
                read(tmp_path / "peer")
        with pytest.raises(UserError, match=name):
            read(tmp_path / "peer")
        path.unlink()


# --- a run that begins with another's weights

UNNAMED = "max_seq_len", "d_model", "num_heads", "d_ff", "num_layers", "warmup_steps"
TUNE = ["free.py", "--dropout", "0", "--lr_schedule", "constant", "--eval_interval", "3"]


@pytest.fixture
def run(tiny):
    """A run in out/tiny; beside it a second data set, and a config that names no shape."""
    assert train.main([tiny, "--max_steps", "6"]) == 0
    make_dataset(Path("data"), "other", seed=5)
    lines = Path(tiny).read_text().splitlines()
    Path("free.py").write_text("\n".join(line for line in lines if not line.startswith(UNNAMED)))


def tune(*words):
    """Fine-tune out/tiny/best.pt on the other data set, into out/free."""
    return train.main([*TUNE, "--dataset", "other", "--init_from", "out/tiny/best.pt", *words])


def test_a_run_begins_with_another_s_weights(run, capsys):
    assert tune("--max_steps", "2") == 0
    assert "out/tiny/best.pt" in capsys.readouterr().out
    tokens = rows_of(Batches(Dataset("other").split("train").tokens, 16, 6, 0), 0)
    model = LanguageModel.from_checkpoint(load_checkpoint("out/tiny/best.pt"))
    loss = model(*map(torch.from_numpy, (tokens[:, :-1], tokens[:, 1:]))).item()
    first = metrics("out/free")[0]
    assert first["step"] == 1 and first["train_loss"] == pytest.approx(loss, rel=1e-5)
    assert load_checkpoint("out/free/last.pt")["model_args"] == model.args | {"dropout": 0.0}
    assert "| init_from | out/tiny/best.pt |" in Path("out/free/notebook.md").read_text()
    # evaluated are init_from's weights where out_dir has no run
    assert tune("--eval_only", "--out_dir", "out/none") == 0
    assert "out/tiny/best.pt, step 6" in capsys.readouterr().out


def test_a_resumed_run_needs_the_other_s_weights_no_more(run):
    assert tune("--max_steps", "6", "--out_dir", "out/whole") == 0
    assert tune("--max_steps", "3") == 0
    shutil.rmtree("out/tiny")
    with pytest.raises(UserError, match="out/tiny/best.pt"):
        tune("--max_steps", "3", "--out_dir", "out/new", "--resume")
    resumed = [*TUNE, "--dataset", "other", "--max_steps", "6", "--resume"]
    refused("init_from", *resumed)
    refused("init_from.*out/else.pt", *resumed, "--init_from", "out/else.pt")
    assert tune("--max_steps", "6", "--resume") == 0
    assert_the_same_run("out/whole", "out/free")


def test_only_what_is_named_contradicts_the_weights(run, tiny):
    words = [*TUNE, "--init_from", "out/tiny/best.pt", "--out_dir", "out/new"]
    refused("--d_model 8 --num_layers 2", *words, "--d_model", "20", "--num_layers", "1")
    refused("--head_bias True", *words, "--head_bias", "False")
    assert train.main([*words, "--d_model", "8", "--unigram_bias", "False", "--dry_run"]) == 0
    make_dataset(Path("data"), "words", vocab_size=600)
    refused("tokenizer.* words", *words, "--dataset", "words")
