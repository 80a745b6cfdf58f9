import os

import pytest
import torch

import sample
from checkpoint import save_checkpoint
from config import UserError
from model import LanguageModel
from sample import choose, find_checkpoint, generate


@pytest.fixture
def checkpoint(tmp_path, monkeypatch):
    """A random model's best.pt in out/run, with tmp_path as the working directory."""
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    model = LanguageModel(50257, 8, 8, 2, 16, 1)
    (tmp_path / "out/run").mkdir(parents=True)
    save_checkpoint(
        dict(model=model.state_dict(), model_args=model.args, step=7, metrics={"val_ppl": 12.5}), "out/run/best.pt"
    )
    return "out/run/best.pt"


def say(capsys, *words):
    sample.main([*words, "--max_new_tokens", "12", "--device", "cpu"])
    return capsys.readouterr()


def test_text_begins_with_its_start_and_follows_from_the_seed(checkpoint, capsys):
    first = say(capsys, "--start", "The cat sat on the")
    assert first.out.startswith("The cat sat on the") and len(first.out) > len("The cat sat on the") + 12
    assert "out/run/best.pt: step 7, validation perplexity 12.50" in first.err
    assert say(capsys, "--start", "The cat sat on the").out == first.out
    assert say(capsys, "--start", "The cat sat on the", "--seed", "1").out != first.out
    assert len(say(capsys, "--start", "x", "--num_samples", "3").out.split("\n---\n")) == 3


def test_start_from_a_file_and_an_empty_start(checkpoint, capsys, tmp_path):
    (tmp_path / "prompt.txt").write_text("naïve text", encoding="utf-8")
    assert say(capsys, "--start", "FILE:prompt.txt").out.startswith("naïve text")
    assert say(capsys, "--start", "").out
    with pytest.raises(UserError, match="cannot read --start FILE:none.txt"):
        sample.main(["--start", "FILE:none.txt"])


def test_the_run_trained_last_is_found(checkpoint, tmp_path):
    (tmp_path / "out/older").mkdir()
    for name, when in (("older/best.pt", 100), ("run/best.pt", 200)):
        (tmp_path / "out" / name).write_bytes((tmp_path / checkpoint).read_bytes())
        os.utime(tmp_path / "out" / name, (when, when))
    assert str(find_checkpoint()) == checkpoint
    (tmp_path / "out/older/last.pt").write_bytes(b"")  # its training goes on: now it is the newer, and best.pt its best
    assert str(find_checkpoint()) == "out/older/best.pt"
    assert str(find_checkpoint("out/run")) == checkpoint
    os.remove("out/run/best.pt")
    with pytest.raises(UserError, match="python train.py"):
        find_checkpoint("out/run")


def test_text_goes_past_the_context_as_a_sliding_window_would():
    torch.manual_seed(0)
    model = LanguageModel(60, 8, 8, 2, 16, 2).eval()
    for p in model.parameters():  # large weights, so that what it saw decides what it says
        torch.nn.init.normal_(p, std=0.5)
    tokens = torch.randint(60, (2, 5))
    out = generate(model, tokens, 20, 1.0, top_k=0, generator=torch.Generator().manual_seed(3))
    generator = torch.Generator().manual_seed(3)
    for t in range(5, 25):
        logits = model(out[:, max(0, t - 8) : t])[:, -1]
        assert torch.equal(out[:, t, None], torch.multinomial(logits.softmax(-1), 1, generator=generator)), t
    assert torch.equal(out[:, :5], tokens) and len(set(out[0, 13:].tolist())) > 3


def test_choices_keep_to_what_is_allowed():
    logits = torch.tensor([[0.1, 0.4, 0.2, 0.25, 0.05]]).log()
    torch.manual_seed(0)

    def drawn(**kwargs):
        arguments = dict(temperature=1.0, top_k=0, top_p=1.0, generator=None) | kwargs
        return choose(logits.expand(4000, 5), **arguments).flatten()

    counts = drawn().bincount(minlength=5) / 4000
    torch.testing.assert_close(counts, logits.exp()[0], atol=0.03, rtol=0)
    assert set(drawn(temperature=0).tolist()) == {1}
    assert set(drawn(top_k=2).tolist()) == {1, 3}
    assert set(drawn(top_k=99).tolist()) == {0, 1, 2, 3, 4}
    assert set(drawn(top_p=0.39).tolist()) == {1}
    assert set(drawn(top_p=0.41).tolist()) == {1, 3}
    assert set(drawn(top_p=0.86).tolist()) == {0, 1, 2, 3}
    assert (drawn(temperature=0.5).bincount(minlength=5) / 4000)[1] > 0.5


def test_mistakes_are_one_line(script, checkpoint):
    assert "--temperature must be 0 or more" in script("sample.py", "--temperature", "-1", code=2).stderr
    for words in (["--top_p", "0"], ["--top_k", "-1"], ["--num_samples", "0"], ["--device", "tpu"],
                  ["--checkpoint", "none.pt"], ["--out_dir", "none"]):
        with pytest.raises(UserError):
            sample.main(words)
