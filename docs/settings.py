"""docs/settings.md, made from Config: `python -m docs.settings > docs/settings.md`."""

from config import Config
from lab.settings import fields_of, values_of

HEAD = """\
# Settings

`python -m docs.settings > docs/settings.md` writes this page, and `python train.py --help` prints
the same list. A config is a Python file of plain assignments, `config/exp5.py` for instance. Its
imports, functions, classes and names that begin with `_` are no settings. The command line wins
over it:

    python train.py config/demo.py --dropout 0.2 --max_steps=100 --expected_ppl 35,42 --dry_run

A setting of type bool may stand bare; it also takes yes and no. The column "resumed" says whether a
run that goes on with `--resume` may have another value. Where it says no, another value makes
another experiment, and the program refuses it.

| setting | default | values | resumed | meaning |
| --- | --- | --- | --- | --- |
"""


def page():
    """docs/settings.md as text."""
    text = HEAD
    for name, field in fields_of(Config).items():
        resumed = "yes" if field.metadata["free"] else "no"
        meaning = field.metadata["help"].replace("<", "&lt;")
        text += f"| `{name}` | `{field.default!r}` | {values_of(field)} | {resumed} | {meaning} |\n"
    return text


if __name__ == "__main__":
    print(page(), end="")
