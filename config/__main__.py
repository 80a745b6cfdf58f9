"""docs/settings.md, made from Config: `python -m config > docs/settings.md`."""

from config import Config
from lab.settings import fields_of, names_of, types_of

HEAD = """\
# Settings

`python -m config > docs/settings.md` writes this page from the `Config` class in
`config/__init__.py`, and a test compares the two. `python train.py --help` prints the same list.

A config is a Python file of plain assignments, `config/exp5.py` for instance. It runs in an empty
namespace. Names that begin with `_`, imports, functions and classes are the file's own. The command
line wins over the file:

    python train.py config/demo.py --dropout 0.2 --max_steps=100 --out_dir out/try --dry_run

`--name value` and `--name=value` both work. A setting of type bool may stand bare: `--resume` is
`--resume True`, and `yes`, `no`, `on`, `off`, `1` and `0` work too. A tuple is written
`--expected_ppl 35,42`. Everything wrong with the file and the command line is listed at once, in
one line, with the nearest known name.

The column "resumed" says whether a run that goes on with `--resume` may have another value. Where
it says no, another value makes another experiment, and the program refuses it.

| setting | default | values | resumed | meaning |
| --- | --- | --- | --- | --- |
"""


def values_of(field):
    """What a setting takes, as a phrase."""
    about = field.metadata
    if about["choices"]:
        return ", ".join(about["choices"])
    low = f", at least {about['low']}" if about["low"] is not None else ""
    below = f", below {about['below']}" if about["below"] is not None else ""
    return names_of(types_of(field)) + low + below


def page():
    """docs/settings.md as text."""
    text = HEAD
    for name, field in fields_of(Config).items():
        resumed = "yes" if field.metadata["free"] else "no"
        meaning = field.metadata["help"].replace("<", "&lt;").replace("|", "\\|")
        text += f"| `{name}` | `{field.default!r}` | {values_of(field)} | {resumed} | {meaning} |\n"
    return text


if __name__ == "__main__":
    print(page(), end="")
