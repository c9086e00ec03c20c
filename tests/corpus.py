"""Over 100 malformed or odd sticker files, made by code: build(folder) -> {file name: what reading gives}.

A number: so many frames; "bad": DataError; None: either (it depends on where the damage fell).
"""
import io
import os
import struct
import time
import zlib

import numpy as np
from PIL import Image

LONG = "x" * 240


def clip(t=4, h=48, w=40, seed=0):
    """Straight RGBA uint8 (t, h, w, 4): a moving soft disc on noise, transparent around it."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[:h, :w]
    frames = rng.integers(0, 256, (t, h, w, 4), dtype=np.uint8)
    for i in range(t):
        distance = np.hypot(x - w / 2 - (w / 6) * np.cos(i), y - h / 2 - (h / 6) * np.sin(i))
        frames[i, ..., 3] = np.clip(255 * (min(h, w) / 3 - distance) / 4, 0, 255)
    return frames


def encoded(frames, kind, **options):
    """Frames as Pillow writes them, bytes."""
    images = [Image.fromarray(x) for x in frames]
    if kind == "JPEG":
        images = [image.convert("RGB") for image in images]
    if len(images) > 1:
        options = {"save_all": True, "append_images": images[1:], "duration": 50, "loop": 0, **options}
    if kind == "GIF":
        options = {"disposal": 2, **options}
    out = io.BytesIO()
    images[0].save(out, kind, **options)
    return out.getvalue()


def act(order):
    """What a decoding process does that crashes, hangs or works. Here, where importing it is quick."""
    if order == "die":
        os._exit(9)
    if order == "hang":
        time.sleep(60)
    return "ok", order


def chunk(kind, data):
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(w, h, depth, colour, rows, extra=b""):
    """A PNG by hand: rows are raw scan lines with their filter byte."""
    header = struct.pack(">IIBBBBB", w, h, depth, colour, 0, 0, 0)
    body = chunk(b"IHDR", header) + extra + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + body


def gif(w, h, frames, palette=True, trailer=b";"):
    """A GIF by hand. frames: (x, y, w, h, disposal, delay in 1/100 s, transparent colour or -1, pixels in
    0..3 as bytes)."""
    out = b"GIF89a" + struct.pack("<HHBBB", w, h, 0x91 if palette else 0, 0, 0)
    out += bytes([0, 0, 0, 255, 0, 0, 0, 255, 0, 0, 0, 255]) if palette else b""
    for x, y, fw, fh, disposal, delay, clear, pixels in frames:
        out += b"!\xf9\x04" + struct.pack("<BHBB", disposal << 2 | (clear >= 0), delay, max(clear, 0), 0)
        out += b"," + struct.pack("<HHHHB", x, y, fw, fh, 0) + b"\x02"
        bits, n, codes = 0, 0, []
        for pixel in pixels:               # LZW that only ever clears and says single colours: 3-bit codes
            codes += [4, pixel]
        codes.append(5)
        data = bytearray()
        for code in codes:
            bits |= code << n
            n += 3
            while n >= 8:
                data.append(bits & 255)
                bits >>= 8
                n -= 8
        data.append(bits & 255)
        for i in range(0, len(data), 255):
            block = data[i:i + 255]
            out += bytes([len(block)]) + block
        out += b"\0"
    return out + trailer


def build(folder):
    expected = {}

    def add(name, data, gives):
        (folder / name).write_bytes(data)
        expected[name] = gives
    frames = clip()
    whole = {"gif": encoded(frames, "GIF"), "webp": encoded(frames, "WEBP", lossless=True),
             "apng": encoded(frames, "PNG"), "png": encoded(frames[:1], "PNG"),
             "jpg": encoded(frames[:1], "JPEG"), "still.webp": encoded(frames[:1], "WEBP")}
    for kind, data in whole.items():
        add(f"whole.{kind}", data, 4 if kind in ("gif", "webp", "apng") else 1)
        for percent in (1, 10, 30, 50, 70, 90, 99):
            sure = percent <= 10 or (percent <= 70 and kind not in ("gif", "jpg"))
            add(f"cut-{percent}.{kind}", data[:len(data) * percent // 100], "bad" if sure else None)
        middle = len(data) // 2
        add(f"zeroed.{kind}", data[:middle] + bytes(200) + data[middle + 200:], None)
        gives = None if "webp" in kind else expected[f"whole.{kind}"]
        add(f"noisy-tail.{kind}", data + b"trailing rubbish" * 9, gives)
    # Wrong names, empty files, other formats
    add("empty.gif", b"", "bad")
    add("one-byte.webp", b"R", "bad")
    add("gif-inside.png", whole["gif"], 4)
    add("webp-inside.gif", whole["webp"], 4)
    add("text.gif", b"this is not a picture\n" * 50, "bad")
    add("page.webp", b"<!doctype html><html><body>404</body></html>", "bad")
    add("script.png", b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\nshowpage\n", "bad")
    add("vector.png", b"<svg xmlns='http://www.w3.org/2000/svg' width='9' height='9'/>", "bad")
    add("zeros.png", bytes(5000), "bad")
    add("noise.webp", np.random.default_rng(1).bytes(5000), "bad")
    add("noise.mp4", np.random.default_rng(2).bytes(5000), "bad")
    add("ftyp.gif", b"\0\0\0\x20ftypisom" + np.random.default_rng(3).bytes(3000), "bad")
    add("ebml.webm", b"\x1aE\xdf\xa3" + np.random.default_rng(4).bytes(3000), "bad")
    for kind in ("BMP", "TIFF", "PPM"):
        out = io.BytesIO()
        Image.fromarray(frames[0]).convert("RGB").save(out, kind)
        add(f"really-{kind.lower()}.png", out.getvalue(), "bad")
    # Sizes
    for kind, name in (("GIF", "gif"), ("WEBP", "webp"), ("PNG", "png")):
        add(f"one-frame.{name}", encoded(frames[:1], kind), 1)
        add(f"1x1.{name}", encoded(np.full((1, 1, 1, 4), 255, np.uint8), kind), 1)
    add("wide.png", png(10000, 20, 8, 0, (b"\0" + bytes(range(250)) * 40) * 20), 1)
    add("tall.png", png(20, 10000, 8, 0, (b"\0" + bytes(range(20))) * 10000), 1)
    add("bomb.png", png(60000, 60000, 8, 6, bytes(100_000)), "bad")
    add("bomb-inside.png", png(5000, 5000, 1, 0, bytes(626 * 5000)), "bad")
    add("negative.png", png(0x80000000, 1, 8, 0, b"\0\0"), "bad")
    add("0x0.png", png(0, 0, 8, 0, b""), "bad")
    add("bomb.gif", gif(65535, 65535, [(0, 0, 1, 1, 0, 5, -1, b"\1")]), "bad")
    add("bomb-frame.gif", gif(8, 8, [(0, 0, 8, 8, 0, 5, -1, bytes(64)),
                                     (0, 0, 65000, 65000, 0, 5, -1, b"\1" * 64)]), "bad")
    add("bomb.webp", b"RIFF\x1e\0\0\0WEBPVP8X\x0a\0\0\0\x10\0\0\0\xff\x3f\0\xff\x3f\0VP8 \0\0\0\0", "bad")
    many = [(0, 0, 2, 2, 0, 5, -1, bytes([i % 4] * 4)) for i in range(1500)]
    add("many-frames.gif", gif(2, 2, many), "bad")
    with open(folder / "huge.gif", "wb") as file:
        file.write(whole["gif"])
        file.truncate(80 << 20)            # sparse
    expected["huge.gif"] = "bad"
    text = chunk(b"zTXt", b"k\0\0" + zlib.compress(bytes(8 << 20)))
    add("text-bomb.png", png(1, 1, 8, 0, b"\0\0", text), None)
    # Palettes, transparency, disposal, times
    a, b = bytes([1]) * 256, bytes([2] * 8 + [3] * 8) * 16
    for disposal in range(8):
        three = [(0, 0, 16, 16, disposal, 7, 3, a), (4, 4, 8, 8, disposal, 7, 3, b[:64]),
                 (0, 0, 16, 16, disposal, 7, 3, b)]
        add(f"disposal-{disposal}.gif", gif(16, 16, three), 3)
    three = [(0, 0, 16, 16, 1, 7, -1, a), (8, 8, 8, 8, 1, 7, 3, b[:64]), (3, 1, 2, 9, 1, 7, 3, b[:18])]
    add("offsets.gif", gif(16, 16, three), 3)
    add("beyond-canvas.gif", gif(16, 16, [(0, 0, 16, 16, 1, 7, -1, a), (10, 10, 16, 16, 1, 7, -1, b)]), 2)
    add("small-first.gif", gif(16, 16, [(0, 0, 2, 2, 1, 7, -1, a[:4]), (0, 0, 16, 16, 1, 7, -1, b)]), 2)
    add("no-palette.gif", gif(16, 16, [(0, 0, 16, 16, 1, 7, -1, a)], palette=False), None)
    two = [(0, 0, 16, 16, 1, 7, -1, a), (0, 0, 16, 16, 1, 7, -1, b)]
    add("no-trailer.gif", gif(16, 16, two, trailer=b""), 2)
    add("no-frames.gif", gif(16, 16, []), "bad")
    add("short-pixels.gif", gif(16, 16, [(0, 0, 16, 16, 1, 7, -1, a[:9])]), None)
    add("zero-times.gif", gif(16, 16, [(0, 0, 16, 16, 1, 0, -1, a), (0, 0, 16, 16, 1, 0, -1, b)]), 2)
    add("long-times.gif", gif(16, 16, [(0, 0, 16, 16, 1, 65535, -1, a), (0, 0, 16, 16, 1, 65535, -1, b)]), 2)
    add("zero-times.apng", encoded(frames, "PNG", duration=0), 4)
    parts = whole["apng"].split(b"fcTL")
    for i in range(1, len(parts)):         # the frame control chunk: 26 bytes, delay at 20, then its checksum
        body = parts[i][:20] + struct.pack(">HH", 50, 0) + parts[i][24:26]
        parts[i] = body + struct.pack(">I", zlib.crc32(b"fcTL" + body)) + parts[i][30:]
    add("zero-denominator.apng", b"fcTL".join(parts), 4)
    add("fallback.apng", encoded(frames, "PNG", default_image=True), 3)
    for blend in (0, 1):
        for disposal in (0, 1, 2):
            name = f"blend-{blend}-dispose-{disposal}.apng"
            add(name, encoded(frames, "PNG", blend=blend, disposal=disposal), 4)
    # Colour
    grey = Image.fromarray(frames[0, ..., 0])
    for mode in ("1", "L", "LA", "P", "PA", "RGB"):
        out = io.BytesIO()
        (grey.convert(mode) if mode != "PA" else Image.fromarray(frames[0]).quantize(16)).save(out, "PNG")
        add(f"mode-{mode}.png", out.getvalue(), 1)
    add("16-bit.png", png(4, 2, 16, 0, (b"\0" + struct.pack(">4H", 0, 21845, 43690, 65535)) * 2), 1)
    add("16-bit-rgba.png", png(2, 2, 16, 6, (b"\0" + struct.pack(">8H", *[32768] * 8)) * 2), 1)
    add("2-bit.png", png(4, 2, 2, 0, b"\0\x1b" * 2), 1)
    for mode in ("L", "CMYK"):
        out = io.BytesIO()
        Image.fromarray(frames[0]).convert("RGB").convert(mode).save(out, "JPEG")
        add(f"mode-{mode}.jpg", out.getvalue(), 1)
    exif = Image.Exif()
    exif[0x0112] = 6
    add("turned.jpg", encoded(frames[:1], "JPEG", exif=exif), 1)
    add("progressive.jpg", encoded(frames[:1], "JPEG", progressive=True), 1)
    add("profile.png", encoded(frames[:1], "PNG", icc_profile=b"not a profile" * 20), 1)
    add("profile.webp", encoded(frames, "WEBP", icc_profile=b"not a profile" * 20), 4)
    add("profile.jpg", encoded(frames[:1], "JPEG", icc_profile=b"not a profile" * 20), 1)
    bad_sum = bytearray(whole["png"])
    bad_sum[20] ^= 1
    add("bad-checksum.png", bytes(bad_sum), "bad")
    # Names, links, things that are no files
    add("имя ステッカー 🙂 é.gif", whole["gif"], 4)
    add(LONG + ".webp", whole["webp"], 4)
    add(" spaces  and\ttabs.png", whole["png"], 1)
    (folder / "loop.gif").symlink_to("loop.gif")
    (folder / "here").symlink_to(folder, target_is_directory=True)
    (folder / "dangling.png").symlink_to("nowhere.png")
    (folder / "memory.png").symlink_to("/proc/self/mem")  # stands for any file that opens and can't be read
    expected.update({"loop.gif": "bad", "dangling.png": "bad", "memory.png": "bad"})
    os.mkfifo(folder / "pipe.webp")
    expected["pipe.webp"] = "bad"
    (folder / "folder.gif").mkdir()                            # skipped: it is no file by any name
    raw = os.fsencode(folder) + b"/latin-\xe9.gif"             # a name that is not UTF-8
    with open(raw, "wb") as file:
        file.write(whole["gif"])
    expected[os.fsdecode(b"latin-\xe9.gif")] = 4
    return expected
