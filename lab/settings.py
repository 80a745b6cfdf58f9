"""The command line, made from a dataclass: every command's options, their checks and --help."""

import ast
import dataclasses
import difflib
import os
import sys

from lab.console import UserError

WORDS = {"true": True, "yes": True, "false": False, "no": False, "none": None, "auto": None}


def setting(default, help, low=None, below=None, choices=None, path=False, free=False, group=""):
    """A dataclass field with its reason and unit, and the values that it allows.

    low, below: low <= value < below. path: a leading ~ stands for the user's home. free: a resumed
    run may have another value. group: the heading that --help prints before this field.
    """
    rules = dict(help=help, low=low, below=below, choices=choices, path=path, free=free)
    return dataclasses.field(default=default, metadata=rules | {"group": group})


def fields_of(cls):
    """{name: field} of a dataclass of settings, or of an instance of it."""
    return {field.name: field for field in dataclasses.fields(cls)}


def types_of(field):
    """The types that a field takes, as a tuple."""
    return getattr(field.type, "__args__", (field.type,))


def values_of(field):
    """What a field takes, as a phrase."""
    rules = field.metadata
    if rules["choices"]:
        return ", ".join(rules["choices"])
    phrase = " or ".join("None" if t is type(None) else t.__name__ for t in types_of(field))
    phrase += f", at least {rules['low']}" if rules["low"] is not None else ""
    return phrase + (f", below {rules['below']}" if rules["below"] is not None else "")


def from_text(text):
    """The value that a text on the command line stands for; one that stands for none stays text."""
    if text.lower() in WORDS:
        return WORDS[text.lower()]
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError, TypeError):
        return text


def as_held(field, value):
    """A value as its field holds it: what a text stands for, 1e3 for an int, a list or one text for
    a tuple, the user's home for ~. Raises ValueError if the field may not have it."""
    types, rules = types_of(field), field.metadata
    if isinstance(value, str) and str not in types:
        value = from_text(value)
    if isinstance(value, float) and float not in types and value.is_integer():
        value = int(value)
    if isinstance(value, str) and rules["path"]:
        value = os.path.expanduser(value)
    if isinstance(value, (str, list)) and tuple in types:
        value = (value,) if isinstance(value, str) else tuple(value)
    fits = isinstance(value, types) or (float in types and isinstance(value, int))
    if isinstance(value, bool):  # an int, too
        fits = bool in types
    if fits and rules["choices"]:
        fits = value in rules["choices"]
    if fits and rules["low"] is not None and value is not None:
        fits = rules["low"] <= value < (rules["below"] or float("inf"))  # False for nan
    if not fits:
        raise ValueError
    return value


def did_you_mean(word, known):
    """A hint at the known word that has these initials or is nearest, in brackets; "" if none."""
    near = [name for name in known if "".join(part[:1] for part in name.split("_")) == word]
    near += difflib.get_close_matches(str(word), known, n=1)
    return f" (did you mean {near[0]}?)" if near else ""


def check(cls, values):
    """(an instance of cls from the values that are right, what is wrong as phrases). values: {name:
    value}. Where each value is right by itself, an instance may say more in problems()."""
    problems, right, fields = [], {}, fields_of(cls)
    for name, value in values.items():
        if name not in fields:
            problems.append(f"unknown setting {name}{did_you_mean(name, fields)}")
            continue
        try:
            right[name] = as_held(fields[name], value)
        except ValueError:
            problems.append(f"{name} takes {values_of(fields[name])}, not {value!r}")
    options = cls(**right)
    if not problems and hasattr(options, "problems"):
        problems = options.problems()
    return options, problems


def split_words(cls, argv):
    """(words that stand by themselves, {name: text}) of a command line for cls, the process's own
    if argv is None. Both `--name value` and `--name=value`; a bare --name of type bool, or --help,
    is True. Raises UserError."""
    fields, alone, texts = fields_of(cls), [], {}
    words = list(sys.argv[1:] if argv is None else argv)
    while words:
        word = words.pop(0)
        if word == "-h":
            word = "--help"
        if not word.startswith("--"):
            alone.append(word)
            continue
        name, equals, text = word[2:].partition("=")
        if not equals:
            # the next word is the value, but that of a bool only if it is a bool's
            bare = name == "help" or (name in fields and bool in types_of(fields[name]))
            follows = words and not words[0].startswith("--")
            if follows and (not bare or WORDS.keys() >= set(words[0].lower().split(","))):
                text = words.pop(0)
            elif bare:
                text = "True"
            elif name in fields:
                raise UserError(f"--{name} needs a value")
        texts[name] = text
    return alone, texts


def show_help(defaults, usage):
    """Print a command's usage and every setting with its reason and its value in defaults, an
    instance of a dataclass; exit 0."""
    print(f"usage: {usage}\n\nSettings, with their defaults; a bare --setting is True:")
    own = type(defaults).__annotations__  # a command's own come before those of a run
    for name, field in sorted(fields_of(defaults).items(), key=lambda item: item[0] not in own):
        if field.metadata["group"]:
            print(f"\n{field.metadata['group']}")
        choices = field.metadata["choices"]
        chosen = f" [{' | '.join(choices)}]" if choices else ""
        print(f"  --{name} {getattr(defaults, name)!r}\n        {field.metadata['help']}{chosen}")
    sys.exit(0)


def command_line(cls, argv, usage, words=0):
    """(an instance of cls, the words that stand by themselves) of a script's command line. words:
    how many there may be, None for any number. argv: as split_words() takes it. Raises UserError
    with all problems in one line; --help prints and exits 0."""
    alone, texts = split_words(cls, argv)
    if "help" in texts:
        show_help(cls(), usage)
    options, problems = check(cls, texts)
    extra = [] if words is None else alone[words:]
    problems += [f"{word} is neither a setting nor its value" for word in extra]
    if problems:
        raise UserError(f"{'; '.join(problems)}; --help lists the settings")
    return options, alone
