"""GPT-2's weights, in and out, and runs that begin with another's; against transformers' own."""

import contextlib
import http.server
import json
import shutil
import threading
from pathlib import Path

import pytest
import torch
from helpers import (
    CPU,
    RANKS,
    VOCAB,
    assert_near,
    assert_same_curves,
    assert_the_same_run,
    make_dataset,
    metrics,
    near,
    rows_of,
    same,
    weights,
)

import sample
import train
from lab import gpt2
from lab.console import UserError
from lab.data import Batches, Dataset
from lab.evaluate import evaluate
from lab.folder import load, save
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


def assert_a_mistake(words, *says):
    """train.py refuses these words in one line that holds all of `says`."""
    with pytest.raises(UserError) as caught:
        train.main(words)
    assert "\n" not in str(caught.value)
    for phrase in says:
        assert phrase in str(caught.value)


# --- transformers' folder


def test_a_folder_of_transformers_is_read(peer, tmp_path):
    found = gpt2.open_weights(str(tmp_path / "peer"))
    model = LanguageModel.from_checkpoint(found)
    assert_same_logits_and_loss(model, peer)
    assert model.count()["total"] == peer.num_parameters() and not model.count()["head_bias"]
    state = model.state_dict().values()
    assert all(t.is_contiguous() and t.dtype == torch.float32 for t in state)


def test_openai_s_own_file_is_read(peer, tmp_path):
    """It has no prefix, and holds the attention's masks; and a large model lies in two files."""
    from safetensors.torch import load_file, save_file

    path = tmp_path / "peer/model.safetensors"
    tensors = {k.removeprefix("transformer."): v for k, v in load_file(path).items()}
    tensors["h.0.attn.bias"] = torch.ones(1, 1, CONTEXT, CONTEXT).tril()
    names = sorted(tensors)
    save_file({k: tensors[k] for k in names[:9]}, tmp_path / "peer/model-1.safetensors")
    save_file({k: tensors[k] for k in names[9:]}, path)
    found = gpt2.open_weights(str(tmp_path / "peer"))
    assert_same_logits_and_loss(LanguageModel.from_checkpoint(found), peer)


def test_gpt2_has_124_million_parameters():
    published = {"vocab_size": 50257, "n_positions": 1024, "n_embd": 768, "n_layer": 12}
    with torch.device("meta"):
        model = LanguageModel(**gpt2.model_args(published | {"n_head": 12}))
    assert model.count()["total"] == 124_439_808


@pytest.mark.parametrize(
    "change, says",
    [
        ({"model_type": "llama"}, "model_type llama"),
        ({"activation_function": "relu"}, "activation_function relu"),
        ({"tie_word_embeddings": False}, "tie_word_embeddings False"),
        ({"n_layer": LAYERS + 1}, "h.3."),
        ({"n_embd": 2 * WIDTH}, "another model than this program's"),
        (None, "best.pt"),
    ],
)
def test_what_is_no_gpt2_is_one_line(peer, tmp_path, tiny, change, says):
    path = tmp_path / "peer/config.json"
    if change:
        path.write_text(json.dumps(json.loads(path.read_text()) | change))
    else:
        path.unlink()
    assert_a_mistake([tiny, "--init_from", str(tmp_path / "peer")], says)


# --- the hub


class Hub(http.server.BaseHTTPRequestHandler):
    """What a download asks of the Hugging Face hub. files: the URL's path -> a file."""

    protocol_version = "HTTP/1.1"
    files = {}

    def do_GET(self):
        file = self.files.get(self.path)
        body = file.read_bytes() if file else b""
        self.send_response(200 if file else 404)
        self.send_header("Content-Length", str(len(body)))
        self.send_header("ETag", f'"{len(body)}"')
        self.send_header("X-Repo-Commit", gpt2.HUB["gpt2"])
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    do_HEAD = do_GET

    def log_message(self, *args):
        pass


@contextlib.contextmanager
def hub_with(folder):
    """The env of a stand-in hub on loopback, where openai-community/gpt2 is what lies in folder."""
    base = f"/openai-community/gpt2/resolve/{gpt2.HUB['gpt2']}"
    files = {f"{base}/{path.name}": path for path in folder.iterdir()}
    handler = type("H", (Hub,), {"files": files})
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield {
        "HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}",
        "HF_HOME": str(folder.parent / "hf"),
        "HF_HUB_DISABLE_TELEMETRY": "1",
    }
    server.shutdown()
    server.server_close()


@pytest.mark.slow
def test_gpt2_from_the_hub(peer, tmp_path, tiny, script):
    """Its figures are transformers' loss; once fetched, it needs no hub."""
    words = "train.py", tiny, "--init_from", "gpt2", "--eval_only"
    with hub_with(tmp_path / "peer") as env:
        first = script(*words, env=env)
    assert first.stdout == script(*words, env=env | {"HF_HUB_OFFLINE": "1"}).stdout
    split = Dataset("tiny").split("val").tokens
    nats, length = 0.0, len(split) - 1
    for start in range(0, length, CONTEXT):
        tokens = torch.from_numpy(split[start : start + CONTEXT + 1].astype("int64"))[None]
        with torch.no_grad():
            logits = peer(tokens[:, :-1]).logits[0]
        nats += torch.nn.functional.cross_entropy(logits, tokens[0, 1:], reduction="sum").item()
    loss = float(first.stdout.split(" loss ")[1].split()[0])
    assert loss == pytest.approx(nats / length, abs=1e-4) and f"context {CONTEXT}" in first.stdout


def test_no_hub_is_one_line_with_the_way_by_hand(tmp_path, tiny, script):
    env = {
        "HF_ENDPOINT": "http://127.0.0.1:9",
        "HF_HOME": str(tmp_path / "hf"),
        "HF_HUB_OFFLINE": "1",
    }
    done = script("train.py", tiny, "--init_from", "gpt2", env=env, code=2)
    page = f"https://huggingface.co/openai-community/gpt2/tree/{gpt2.HUB['gpt2']}"
    assert page in done.stderr and "127.0.0.1:9" in done.stderr


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
    assert "begin as those of out/tiny/best.pt" in capsys.readouterr().out
    tokens = rows_of(Batches(Dataset("other").split("train").tokens, 16, 6, 0), 0)
    model = LanguageModel.from_checkpoint(load("out/tiny/best.pt"))
    loss = model(*map(torch.from_numpy, (tokens[:, :-1], tokens[:, 1:]))).item()
    first = metrics("out/free")[0]
    assert first["step"] == 1 and first["train_loss"] == pytest.approx(loss, rel=1e-5)
    found = load("out/free/last.pt")
    assert found["model_args"] == model.args | {"dropout": 0.0}
    assert {int(s["step"]) for s in found["optimizers"][0]["state"].values()} == {2}
    assert "| init_from | out/tiny/best.pt |" in Path("out/free/notebook.md").read_text()


def test_a_resumed_run_needs_the_other_s_weights_no_more(block):
    assert tune("--max_steps", "6", "--out_dir", "out/whole") == 0
    assert tune("--max_steps", "3") == 0
    shutil.rmtree("out/tiny")
    with pytest.raises(UserError, match="there is no checkpoint out/tiny/best.pt"):
        tune("--max_steps", "3", "--out_dir", "out/new", "--resume")
    again = [*TUNE, "--dataset", "other", "--max_steps", "6", "--resume"]
    assert_a_mistake(again, "init_from was 'out/tiny/best.pt', now ''")
    assert_a_mistake([*again, "--init_from", "out/else.pt"], "now 'out/else.pt'")
    with pytest.raises(UserError, match="another experiment: d_ff was 16, now 32"):
        tune("--max_steps", "6", "--resume", "--d_ff", "32")
    assert tune("--max_steps", "6", "--resume") == 0
    assert_the_same_run("out/whole", "out/free")


def test_only_what_is_named_contradicts_the_weights(block, tiny):
    words = "--init_from", "out/tiny/best.pt", "--out_dir", "out/new"
    said = "d_model 8, not 20, num_layers 2, not 1; leave that out, or use --d_model 8 --num_layers"
    assert_a_mistake([*TUNE, *words, "--d_model", "20", "--num_layers", "1"], said)
    assert_a_mistake([*TUNE, *words, "--head_bias", "False"], "--head_bias True")
    assert_a_mistake([*TUNE, *words, "--unigram_bias"], "use --unigram_bias False")
    assert (
        train.main([*TUNE, *words, "--d_model", "8", "--unigram_bias", "False", "--dry_run"]) == 0
    )
    make_dataset(Path("data"), "words", vocab_size=600)
    assert_a_mistake([*TUNE, *words, "--dataset", "words"], "another tokenizer than words's")


def test_another_context_where_the_positions_allow_it(block):
    assert tune("--max_steps", "1", "--max_seq_len", "10") == 0
    model = LanguageModel.from_checkpoint(load("out/free/best.pt"))
    assert model.args["max_seq_len"] == 10
    longer = "--max_steps", "1", "--max_seq_len", "20", "--out_dir", "out/longer"
    if block == "modern":
        assert tune(*longer) == 0
    else:
        with pytest.raises(UserError, match="max_seq_len 16, not 20; .*--max_seq_len 16"):
            tune(*longer)


def test_the_weights_are_evaluated_as_they_are(block, capsys):
    """init_from's where out_dir has no run, else the run's own best."""
    assert train.main(["tiny.py", "--eval_only"]) == 0
    own = capsys.readouterr().out
    assert "out/tiny/best.pt, step 6" in own
    words = "--out_dir", "out/none", "--init_from", "out/tiny/best.pt"
    assert train.main(["tiny.py", "--eval_only", *words]) == 0
    assert capsys.readouterr().out == own


@pytest.mark.slow
def test_two_ranks_fine_tune_as_one_does(tiny, script):
    """The model has no head bias: DDP finds a buffer there."""
    assert train.main([tiny, "--head_bias", "False", "--max_steps", "6"]) == 0
    words = tiny, "--init_from", "out/tiny/best.pt", "--head_bias", "False", "--dropout", "0"
    for folder, launch in (("out/one", ()), ("out/two", RANKS)):
        words = *words, "--max_steps", "8", "--out_dir", folder
        script("train.py", *words, launch=launch)
    assert_same_curves("out/one", "out/two", 8)
    assert not weights("out/two/best.pt")["head_bias"].any()


# --- without the head's bias, and out to transformers


def run_of(tiny, *words):
    """A run's best.pt, with dataset tiny, and its model."""
    assert train.main([tiny, "--max_steps", "6", *words]) == 0
    return LanguageModel.from_checkpoint(load("out/tiny/best.pt"))


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
    state = gpt2.open_weights("out/hf")["model"]
    assert same(state, model.state_dict())
    with pytest.raises(UserError, match="not empty"):
        sample.main(["--export", "out/hf"])


def test_an_old_run_has_a_head_bias(tiny):
    """One from before that was a setting: its checkpoint loads, and is another experiment."""
    run_of(tiny)
    for name in ("best", "last"):
        found = load(f"out/tiny/{name}.pt")
        del found["model_args"]["head_bias"], found["config"]["head_bias"]
        save(found, f"out/tiny/{name}.pt")
    assert LanguageModel.from_checkpoint(found).head_bias.any()
    assert_a_mistake([tiny, "--resume", "--head_bias", "False"], "head_bias was True, now False")
    assert train.main([tiny, "--resume", "--max_steps", "7"]) == 0
    assert_a_mistake([tiny, "--unigram_bias", "--head_bias", "False"], "use --unigram_bias False")


def test_a_head_bias_is_left_out_at_a_price(tiny, capsys):
    model = run_of(tiny, "--learning_rate", "0.1")
    with pytest.raises(UserError, match="--drop_head_bias"):
        sample.main(["--export", "out/hf"])
    assert not Path("out/hf").exists()
    sample.main(["--export", "out/hf", "--drop_head_bias", "--device", "cpu"])
    said = capsys.readouterr().err.splitlines()[-1].split()
    before, after = (float(said[said.index(word) - 1]) for word in ("with", "without,"))
    split = Dataset("tiny").split("val")
    assert before == pytest.approx(evaluate(model, split, CPU, 4)["loss"], abs=1e-4)
    model.head_bias.data.zero_()
    assert after == pytest.approx(evaluate(model, split, CPU, 4)["loss"], abs=1e-4)
    assert after > before + 1e-3
    peer = transformers.GPT2LMHeadModel.from_pretrained("out/hf").eval()
    assert_same_logits_and_loss(model, peer)
    shutil.rmtree("data")
    sample.main(["--export", "out/hf2", "--drop_head_bias", "--device", "cpu"])
    assert "unknown: its data set is not prepared here" in capsys.readouterr().err


def test_the_modern_block_is_not_exported(tiny):
    run_of(tiny, "--block", "modern")
    with pytest.raises(UserError, match="--block gpt2"):
        sample.main(["--export", "out/hf", "--drop_head_bias"])


def test_gpt2_s_vocabulary_has_its_end_of_text_and_speaks(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    model = LanguageModel(50257, 8, 8, 2, 16, 1, head_bias=False)
    gpt2.write_folder(model, "hf")
    peer = transformers.GPT2LMHeadModel.from_pretrained("hf")
    assert peer.generation_config.eos_token_id == peer.config.eos_token_id == 50256
    sample.main(["--checkpoint", "hf", "--start", "The", "--max_new_tokens", "5"])
    assert capsys.readouterr().out.startswith("The")
