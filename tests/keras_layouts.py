"""Weight files as Keras wrote them from 2015 on, written out by hand from descriptions of the layouts.

Every function takes layers as [(name, [array, …]), …] in the order of the model, weightless ones with an empty list;
`named` and those below also take [(name, {field: array, …}), …], for layers with more than a kernel and a bias.
"""

import zipfile

import h5py
import numpy as np


def theano(layers, flattened=None):
    """HWIO kernels → (out, in, h, w), taps rotated; `flattened` = (name, (h, w, c)) of the Dense after a Flatten."""
    stored = []
    for name, arrays in layers:
        if isinstance(arrays, dict):
            flipped = theano([(name, list(arrays.values()))], flattened)[0][1]
            stored.append((name, dict(zip(arrays, flipped, strict=True))))
            continue
        arrays = [a[::-1, ::-1].transpose(3, 2, 0, 1) if a.ndim == 4 else a for a in arrays]
        if flattened and name == flattened[0]:
            h, w, c = flattened[1]
            arrays[0] = arrays[0].reshape(h, w, c, -1).transpose(2, 0, 1, 3).reshape(h * w * c, -1)
        stored.append((name, arrays))
    return stored


def sequential_03(path, layers):
    with h5py.File(path, "w") as file:
        file.attrs["nb_layers"] = len(layers)
        for k, (_, arrays) in enumerate(layers):
            group = file.create_group(f"layer_{k}")
            group.attrs["nb_params"] = len(arrays)
            for n, array in enumerate(arrays):
                group[f"param_{n}"] = array
    return path


def graph_03(path, layers):
    arrays = [array for _, arrays in layers for array in arrays]
    with h5py.File(path, "w") as file:
        group = file.create_group("graph")
        group.attrs["nb_params"] = len(arrays)
        for n, array in enumerate(arrays):
            group[f"param_{n}"] = array
    return path


def named(path, layers, weight_name, *, attributes=(), chunked=False, as_str=False, root="", extra=False):
    """Keras 1 and 2: `layer_names`, and `weight_names` in each group; `weight_name(layer, field)` names a tensor."""
    encode = str if as_str else str.encode
    with h5py.File(path, "w") as file:
        group = file.create_group(root) if root else file
        for key, value in dict(attributes).items():
            group.attrs[key] = value
        names = [encode(name) for name, _ in layers]
        if chunked:
            for k in range(0, len(names), 7):
                group.attrs[f"layer_names{k // 7}"] = names[k : k + 7]
        else:
            group.attrs["layer_names"] = names
        for name, arrays in layers:
            own = group.create_group(name)
            if not isinstance(arrays, dict):
                arrays = dict(zip(("kernel", "bias"), arrays, strict=False))
            stored = [weight_name(name, field) for field in arrays]
            own.attrs["weight_names"] = [encode(s) for s in stored] if stored else np.zeros(0)
            for s, array in zip(stored, arrays.values(), strict=True):
                own[s] = array
        if extra:
            group.create_group("top_level_model_weights").attrs["weight_names"] = np.zeros(0)
            file.create_group("optimizer_weights")["iteration:0"] = np.zeros((), np.int64)
    return path


def keras_1(layer, field):
    return f"{layer}_{ {'kernel': 'W', 'bias': 'b'}[field] }"


def keras_1_official(layer, field):
    return f"{keras_1(layer, field)}_1:0"


def keras_2(layer, field):
    return f"{layer}/{field}:0"


KERAS_2 = {"backend": "tensorflow", "keras_version": "2.3.1"}


def nested(path, inner, outer, *, model="vgg16", weight_name=keras_2, attributes=KERAS_2):
    """Keras 1 and 2: a model inside a model is one entry, which holds the weights of all its layers.

    An entry of `outer` is a layer, (name, arrays), or a second model, (name, [(name, arrays), …]).
    """
    entries = [(name, inside if isinstance(inside[0], tuple) else [(name, inside)]) for name, inside in outer]
    with h5py.File(path, "w") as file:
        for key, value in attributes.items():
            file.attrs[key] = value
        file.attrs["layer_names"] = [model.encode(), *(name.encode() for name, _ in outer)]
        for entry, layers in ((model, inner), *entries):
            group = file.create_group(entry)
            stored = {
                weight_name(name, field): array
                for name, arrays in layers
                for field, array in zip(("kernel", "bias"), arrays, strict=False)
            }
            group.attrs["weight_names"] = [name.encode() for name in stored]
            for name, array in stored.items():
                group[name] = array
    return path


def keras_3(path, layers, *, prefix="layers", gaps=False, with_names=False, model=None, outer=(), keys=False):
    """`.weights.h5`, or a `.keras` zip if the path ends so; `gaps` counts by twos, as 2.12 and 2.13 did.

    `model` puts the layers into an inner model of that key, with `outer` beside it. With `keys` the outer model is a
    subclassed one: its layers' keys are their names.
    """
    h5 = path.with_suffix(".part") if path.suffix == ".keras" else path
    with h5py.File(h5, "w") as file:
        inside = f"{model}/{prefix}" if keys else f"{prefix}/{model}/{prefix}"
        _keras_3_layers(file, inside if model else prefix, layers, gaps, with_names)
        if keys:
            for name, arrays in outer:
                for n, array in enumerate(arrays):
                    file[f"{name}/vars/{n}"] = array
        else:
            _keras_3_layers(file, prefix, outer, gaps, with_names)
        file.create_group("optimizer/vars")["0"] = np.zeros((), np.int64)
    if path.suffix == ".keras":
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("config.json", '{"class_name": "os.system"}')
            archive.writestr("metadata.json", "{}")
            archive.write(h5, "model.weights.h5")
    return path


def _keras_3_layers(file, prefix, layers, gaps, with_names):
    counts = {}
    for name, arrays in layers:
        arrays = list(arrays.values()) if isinstance(arrays, dict) else arrays
        kind = _class(arrays) if arrays else "max_pooling2d"
        number = counts[kind] = counts.get(kind, -1) + 1
        number *= 2 if gaps else 1
        group = file.create_group(f"{prefix}/{kind}_{number}/vars" if number else f"{prefix}/{kind}/vars")
        if with_names:
            group.attrs["name"] = name
        for n, array in enumerate(arrays):
            group[str(n)] = array


def _class(arrays):
    if arrays[0].ndim == 4:
        separable = len(arrays) == 2 and arrays[1].ndim == 4
        return "separable_conv2d" if separable else "depthwise_conv2d" if arrays[0].shape[3] == 1 else "conv2d"
    if arrays[-1].ndim == 0:
        return "normalization"
    return "dense" if arrays[0].ndim == 2 else "scale" if len(arrays) == 2 else "batch_normalization"
