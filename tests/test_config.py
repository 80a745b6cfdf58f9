import dataclasses
from pathlib import Path

import pytest
from helpers import ROOT

from config import Config, load_config
from config.__main__ import page
from lab.console import UserError


def problems(tmp_path, text, *words):
    (tmp_path / "x.py").write_text(text)
    with pytest.raises(UserError) as caught:
        load_config([str(tmp_path / "x.py"), *words])
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_the_command_line_wins_over_the_file_and_takes_both_forms(tmp_path):
    path = tmp_path / "exp9.py"
    path.write_text(
        'dataset = "demo"\n_side = 3\nd_model = 4 * 8\nlearning_rate = 1\ncompile = True'
    )
    words = "--d_model 64 --dropout=0.5 --resume".split()
    words += [str(path), *"--compile False --expected_ppl 35,42 --dry_run=true".split()]
    config = load_config([*words, "--sample_prompts", "The cat"])
    assert (config.dataset, config.d_model, config.dropout) == ("demo", 64, 0.5)
    assert config.resume is True and config.compile is False and config.dry_run is True
    assert config.learning_rate == 1 and config.expected_ppl == (35, 42)
    assert config.out_dir == "out/exp9" and config.sample_prompts == ("The cat",)
    words = [str(path), "--compile", "auto", "--out_dir", "elsewhere"]
    assert load_config(words).out_dir == "elsewhere" and load_config(words).compile is None


def test_everything_wrong_is_listed_at_once_with_the_nearest_name(tmp_path):
    text = (
        'droput = 0.1\nepochs = 1.5\nlr_schedule = "cosin"\nnum_heads = 7\nd_model = 16\n'
        "beta1 = 1.0\nbatch_size = True"
    )
    words = "stray --lr 1 --wandb --seed".split()
    named = "dropout epochs 1.5 cosine beta1 num_heads batch_size stray learning_rate wandb seed"
    message = problems(tmp_path, text, *words)
    assert [name for name in named.split() if name not in message] == []


@pytest.mark.parametrize(
    "text, named",
    [
        ("d_model = ", "SyntaxError"),
        ("d_model = width", "NameError"),
        ("dataset = FIELDS", "NameError"),  # an empty namespace
        ("seed = 1 / 0", "ZeroDivisionError"),
        ("raise ValueError('one\\ntwo')", "ValueError: one"),
        ("pi = 3", "pi"),
        ("learning_rate = float('nan')", "learning_rate"),
        ("expected_ppl = (42, 35)", "expected_ppl"),
        ("expected_ppl = ('a', 'b')", "expected_ppl"),
        ("sample_prompts = (1,)", "sample_prompts"),
        ("device = 'cuda:first'", "device"),
        ("d_model = 0", "d_model"),
        ("epochs = '3'", "epochs"),
        ("block = 'modern'\nd_model = 24\nnum_heads = 8", "num_heads"),
        ("head_bias = False\nunigram_bias = True", "unigram_bias"),
        ("batch_size = 2\nmicro_batch_size = 3", "micro_batch_size"),
        ("learning_rate = 1e-4\nmin_learning_rate = 1e-3", "min_learning_rate"),
        ("split = 'test'", "--eval_only"),
        ("eval_stride = 8", "--eval_only"),
    ],
)
def test_a_wrong_file_is_one_line(tmp_path, text, named):
    assert named in problems(tmp_path, text)


def test_values_are_taken_as_they_are_meant(tmp_path):
    path = tmp_path / "x.py"
    path.write_text(
        "\ufeffimport math\nfrom math import sqrt\nd_model = sqrt(64 * 64)\n"
        "expected_ppl = [35, 42]\ncompile = 1\n"
        "data_dir = '~/data'\nd_ff = int(math.pow(2, 5))\ndef helper(): pass\n",
        encoding="utf-8",
    )
    words = "--max_steps 1e3 --out_dir=~/out --sample_prompts".split()
    config = load_config([str(path), *words, "['a', 'b']"])
    assert (config.d_model, config.d_ff, config.max_steps) == (64, 32, 1000)
    assert isinstance(config.d_model, int) and config.compile is True
    assert config.expected_ppl == (35, 42) and config.sample_prompts == ("a", "b")
    assert (config.data_dir, config.out_dir) == (f"{Path.home()}/data", f"{Path.home()}/out")
    for text, value in (("no", False), ("0", False), ("on", True), ("1", True), ("FALSE", False)):
        assert load_config([str(path), "--resume", text]).resume is value
    assert "max_steps" in problems(tmp_path, "", "--max_steps", "10.5")
    assert "resume" in problems(tmp_path, "resume = 2")


def test_no_config_and_no_such_config(tmp_path):
    with pytest.raises(UserError, match=r"demo\.py"):
        load_config([])
    with pytest.raises(UserError, match=r"exp5\.py") as caught:
        load_config([str(tmp_path / "exp55.py")])
    assert "__" not in str(caught.value)


def test_a_changed_config_is_a_copy():
    config = load_config([str(ROOT / "config/exp6.py")])
    other = config.changed(d_model=8)
    assert (other.d_model, config.d_model) == (8, 256)
    assert (other.name, other.doc, other.named) == (config.name, config.doc, config.named)


def test_help_shows_every_setting_with_its_reason(capsys):
    with pytest.raises(SystemExit) as caught:
        load_config(["--help"])
    shown = capsys.readouterr().out
    assert caught.value.code == 0
    for field in dataclasses.fields(Config):
        assert f"--{field.name} " in shown and field.metadata["help"] in shown


NOTEBOOK = {  # dataset, batch, epochs, learning rate, dropout, recorded
    "exp1": ("wikitext-2", 8, 300, 3e-4, 0.3, 464.64),
    "exp2": ("wikitext-103", 32, 10, 3e-4, 0.3, 364.71),
    "exp3": ("wikitext-103", 32, 20, 6e-4, 0.1, 65.71),
    "exp4": ("wikitext-103", 32, 15, 4e-4, 0.1, 46.33),
    "exp5": ("wikitext-103", 32, 15, 4e-4, 0.1, 0.0),
}


@pytest.mark.parametrize("name", NOTEBOOK)
def test_the_experiments_state_what_the_notebook_states(name):
    c = load_config([str(ROOT / f"config/{name}.py")])
    stated = (c.dataset, c.batch_size, c.epochs, c.learning_rate, c.dropout, c.recorded_ppl)
    assert stated == NOTEBOOK[name]
    assert (c.max_seq_len, c.weight_decay, c.grad_clip) == (512, 0.1, 1.0)
    assert (c.patience, c.max_hours) == ((5, 12.0) if name == "exp5" else (0, 0.0))


def test_the_page_of_settings_is_the_dataclass():
    shown = (ROOT / "docs/settings.md").read_text(encoding="utf-8")
    assert shown == page(), "run: python -m config > docs/settings.md"
