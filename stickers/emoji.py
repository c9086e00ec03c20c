"""Static emoji in up to six styles, drawn from the SVG of Iconify's npm packages.

    pip install resvg-py
    python stickers/emoji.py --out data/emoji --size 64
    python data.py prepare data/emoji --out data/emoji64 --size 64

Licences: noto, noto-v1, fxemoji Apache-2.0; fluent-flat MIT; twemoji, emojione CC BY 4.0 (name them).

A sticker is held out if its concept is: the same concepts as in fluent.py, whatever the style. Skin tones and
flags of countries (258 in twemoji alone, each a name that never returns) are left out.
"""
import argparse
import re
import sys
import tarfile
from pathlib import Path

from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from data import DataError  # noqa: E402
from stickers.fetch import (  # noqa: E402
    EMOJIBASE, TONES, code_points, concept_of, drop_twin, emojibase, npm_pack, read_json, run, settings,
    split_of, write_metadata, write_whole)

STYLES = {  # style -> (npm package, version, sha256, the style in words)
    "noto": ("@iconify-json/noto", "1.2.9",
             "3e918d88fc945c0bb3d468dbace6f88caef67f01c9f0e7bcae0915a042e8f1ad", "noto style"),
    "noto-v1": ("@iconify-json/noto-v1", "1.2.5",
                "2bf62c26c2c2884aa99e90aec942cdaee17a5921f05690694f4978ad4b017c37", "blob style"),
    "twemoji": ("@iconify-json/twemoji", "1.2.5",
                "19046dff7d8707ce96212ec86468b36ac5f8e60409629dd13f809265c6d0ebb7", "twemoji style"),
    "fluent-flat": ("@iconify-json/fluent-emoji-flat", "1.2.6",
                    "7d064769dee690815f823bc5bcc511d957198caf9f5edd8dd9c1aa48a6aeb175", "flat style"),
    "emojione": ("@iconify-json/emojione", "1.2.3",
                 "26a14f44284407e8bcde91799388dca2bfd91dbcd55a97f425524a1c5b73610e", "emojione style"),
    "fxemoji": ("@iconify-json/fxemoji", "1.2.2",
                "f3e72b3c59d05e1db03b7e308d55c0d05bd7ba3f625a90da1b79313c12858eef", "mozilla style"),
}
FALSE_FRIENDS = {"construction", "down", "pout", "pouting", "wave"}    # of fxemoji: they show other things
FLAGS = re.compile("1f1[ef][0-9a-f]-|1f3f4-e0")         # of countries and their parts


def squeeze(name):
    """"Man’s shoe", "mans_shoe" -> "mansshoe": packages spell names in their own ways."""
    return re.sub("[^a-z0-9]", "", name.lower())


def name_tables(cache):
    """-> list of {squeezed name: set of concepts}, the best first: names of today, names in Unicode (older),
    names that chats use."""
    tarball = npm_pack(*EMOJIBASE, cache)
    with tarfile.open(tarball) as tar:
        chats = sorted(name[8:] for name in tar.getnames() if re.search("/en/shortcodes/.*json$", name))
    today, unicode, *chats = read_json(tarball, ["en/data.json", "meta/unicode-names.json", *chats])
    pairs = [[(entry["label"], entry["hexcode"]) for entry in today],
             [(name, code) for code, name in unicode.items()],
             [(name, code) for chat in chats for code, names in chat.items()
              for name in ([names] if isinstance(names, str) else names)]]
    tables = []
    for level in pairs:
        tables.append({})
        for name, code in level:
            if not any(point in TONES for point in code_points(code)):
                tables[-1].setdefault(squeeze(name), set()).add(concept_of(code))
    return tables


def match(icons, chars, tables):
    """A package's icons.json and chars.json -> {concept: name of its icon}.

    Code points are used where the package has them. Else names and their aliases are: a name that stands for
    several concepts, or for none, is left out, so no picture lands on the wrong side of the split.
    """
    if chars:
        return {concept_of(code): name for code, name in chars.items()
                if not any(point in TONES for point in code_points(code))}
    spellings = {name: [name] for name in icons["icons"] if name not in FALSE_FRIENDS}
    for alias, entry in icons.get("aliases", {}).items():
        spellings.get(entry["parent"], []).append(alias)
    found = {}
    for name, known in spellings.items():
        hits = [set().union(*(table.get(squeeze(one), ()) for one in known)) for table in tables]
        best = next((concepts for concepts in hits if concepts), ())
        if len(best) == 1:
            found.setdefault(*best, name)
    return found


def svg(icons, name):
    """An icon -> SVG text, square, or None for one that is not there. An alias may mirror its parent."""
    alias = icons.get("aliases", {}).get(name, {})
    icon = icons["icons"].get(alias.get("parent", name))
    if icon is None:
        return None
    width, height = (icon.get(side, icons.get(side, 16)) for side in ("width", "height"))
    body = icon["body"]
    if alias.get("hFlip"):
        body = f'<g transform="translate({width} 0) scale(-1 1)">{body}</g>'
    return (f'<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" width="1" '
            f'height="1" viewBox="0 0 {width} {height}">{body}</svg>')


def draw(out, style, pictures, size, seen):
    """{concept: SVG} -> OUT/STYLE/CONCEPT.png, transparent; what is there already stays. -> the concepts
    drawn, less those whose picture is in `seen`."""
    try:
        from resvg_py import svg_to_bytes
    except ImportError as error:
        raise DataError("drawing SVG needs `pip install resvg-py`") from error
    (out / style).mkdir(exist_ok=True)
    drawn = []
    for concept, text in tqdm(pictures.items(), style, unit="emoji"):
        path = out / style / f"{concept}.png"
        try:
            if not path.exists():
                write_whole(path, bytes(svg_to_bytes(svg_string=text, width=size, height=size,
                                                     skip_system_fonts=True)))
            if not drop_twin(path, seen):                              # such as "guard" and "man guard"
                drawn.append(concept)
        except ValueError as error:
            print(f"left out {path}: {error}", file=sys.stderr)
    return drawn


def emoji(out, styles, size, cache="cache"):
    """Fills the folder `out` with the styles' pictures and metadata.jsonl. Resumes."""
    out = Path(out)
    settings(out, size=size, styles=styles)
    known, tables, rows, seen = emojibase(cache), name_tables(cache), [], {}
    for style in styles:
        *package, words = STYLES[style]
        icons, chars = read_json(npm_pack(*package, cache), ["icons.json", "chars.json"])
        pictures = {concept: svg(icons, name) for concept, name in match(icons, chars, tables).items()
                    if concept in known and not FLAGS.match(concept)}
        for concept in draw(out, style, {c: text for c, text in pictures.items() if text}, size, seen):
            text, (head, *tags) = known[concept]
            rows.append({"file_name": f"{style}/{concept}.png", "text": text,
                         "tags": [f"{head}, {words}", *tags], "concept": concept, "style": style,
                         "split": split_of(concept)})
    write_metadata(out, rows)


def main(arguments=None):
    parser = argparse.ArgumentParser(description="Draw static emoji in several styles.")
    parser.add_argument("--out", default="data/emoji", help="folder to fill")
    parser.add_argument("--styles", default=",".join(STYLES), help=f"some of {','.join(STYLES)}")
    parser.add_argument("--size", type=int, default=128, help="side of the pictures in pixels")
    parser.add_argument("--cache", default="cache", help="folder that keeps the npm packages")
    args = parser.parse_args(arguments)

    def work():
        styles = list(dict.fromkeys(args.styles.split(",")))
        if not set(styles) <= set(STYLES):
            raise DataError(f"--styles {args.styles}: give some of {','.join(STYLES)}")
        if not 8 <= args.size <= 1024:
            raise DataError(f"--size {args.size}: must be 8 to 1024 pixels")
        emoji(args.out, styles, args.size, args.cache)
    return run(work)


if __name__ == "__main__":
    sys.exit(main())
