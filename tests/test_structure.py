"""The house as DESIGN says: small functions, few parameters, imports that run one way. Each failure names its place."""

import ast
import functools
import json
import pathlib
import subprocess
import sys
import tomllib

import pytest

import jaxft

ROOT = pathlib.Path(__file__).parents[1]
FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)
LIBRARY = sorted((ROOT / "jaxft").rglob("*.py"))
PROGRAMS = sorted([*LIBRARY, *(ROOT / "experiments").rglob("*.py"), *(ROOT / "benchmarks").rglob("*.py")])

# From the lowest: what a row imports, directly or not, stands in no later row.
ROWS = [
    {"kernels"},
    {"nets"},
    {"masking"},
    {"phase"},
    {"train_state"},
    {"features", "predict", "data"},
    {"feed", "train"},
    {"finetune"},
    {"recipe", "lr_finder"},
    {"verbs"},
]


@functools.cache
def parsed(path):
    return ast.parse(path.read_bytes(), str(path))


def place(path, node):
    return f"{path.relative_to(ROOT)}:{node.lineno}"


def functions():
    return [(path, node) for path in LIBRARY for node in ast.walk(parsed(path)) if isinstance(node, FUNCTIONS)]


def name_of(path):
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {name_of(path): path for path in LIBRARY}


def outside_functions(node):
    """The nodes that run when a module is imported."""
    for child in ast.iter_child_nodes(node):
        if not isinstance(child, (*FUNCTIONS, ast.Lambda)):
            yield child
            yield from outside_functions(child)


def imported(path, lazy):
    """Full names of what a module imports: of a module where it is one, else of the module that holds the name."""
    package = name_of(path) if path.name == "__init__.py" else name_of(path).rpartition(".")[0]
    found = {}
    for node in ast.walk(parsed(path)) if lazy else outside_functions(parsed(path)):
        if isinstance(node, ast.Import):
            found |= {alias.name: node for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            above = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            module = ".".join([*above, *filter(None, [node.module])])
            names = [f"{module}.{alias.name}" for alias in node.names]
            found |= {name if name in MODULES else module: node for name in names}
    return found


@functools.cache
def graph():
    return {name: {other for other in imported(path, False) if other in MODULES} for name, path in MODULES.items()}


def reached(name):
    seen, waiting = set(), [name]
    while waiting:
        for other in graph()[waiting.pop()] - seen:
            seen.add(other)
            waiting.append(other)
    return seen


def test_no_function_has_more_than_ten_parameters():
    """Bug: arguments that travel together and are no value of their own."""
    found = []
    for path, node in functions():
        a = node.args
        names = [
            argument.arg for argument in (*a.posonlyargs, *a.args, *a.kwonlyargs, *filter(None, (a.vararg, a.kwarg)))
        ]
        count = len(names) - (names[:1] in (["self"], ["cls"]))
        if count > 10:
            found.append(f"{place(path, node)} {node.name} has {count} parameters")
    assert not found, "\n".join(found)


def test_no_function_has_more_than_80_lines():
    """Bug: a function that does several jobs."""
    lengths = [(node.end_lineno - node.lineno + 1, path, node) for path, node in functions()]
    found = [f"{place(path, node)} {node.name} has {count} lines" for count, path, node in lengths if count > 80]
    assert not found, "\n".join(found)


def test_an_experiment_is_one_screen():
    """Bug: an experiment that assembles by hand what the library should put together."""
    found = []
    for path in sorted((ROOT / "experiments").glob("*.py")):
        lines = len(path.read_text(encoding="utf-8").splitlines())
        has_main = any(isinstance(node, FUNCTIONS) and node.name == "main" for node in parsed(path).body)
        if has_main and lines > 90:
            found.append(f"{path.relative_to(ROOT)} has {lines} lines")
    assert not found, "\n".join(found)


def test_no_circles():
    """Bug: two modules that need each other, so that neither can be read, tested or imported first."""
    found = sorted(name for name in MODULES if name in reached(name))
    assert not found, "\n".join(f"{name} imports itself by {sorted(graph()[name] & set(found))}" for name in found)


def test_imports_run_one_way():
    """Bug: a lower part of the house asks a higher one: a net that knows of training, or a feed that knows of runs."""
    found = []
    for height, row in enumerate(ROWS):
        higher = set().union(*ROWS[height + 1 :])
        for name in MODULES:
            if name.partition("jaxft.")[2].split(".")[0] in row:
                up = sorted(other for other in reached(name) if other.partition("jaxft.")[2].split(".")[0] in higher)
                found += [f"{name} imports {other}, if not directly" for other in up]
    assert not found, "\n".join(found)


@pytest.mark.parametrize(
    ("part", "allowed"),
    [
        ("kernels", {"flax", "jax", "numpy", "jaxft.kernels"}),
        ("nets", {"flax", "jax", "numpy", "jaxft.checks", "jaxft.kernels", "jaxft.nets"}),
        (
            "port_weights",
            {"numpy", "h5py", "jax", "tyro", "orbax"}
            | {f"jaxft.{part}" for part in ("nets", "keras_files", "keras_match", "fetch", "files")},
        ),
    ],
)
def test_what_the_lowest_parts_import(part, allowed):
    """Bug: a net cannot be used, or a file read, without what only training needs."""
    found = []
    for name, path in MODULES.items():
        if name == f"jaxft.{part}" or name.startswith(f"jaxft.{part}."):
            for other, node in imported(path, True).items():
                named = ".".join(other.split(".")[:2]) if other.startswith("jaxft") else other.split(".")[0]
                if named not in allowed | set(sys.stdlib_module_names):
                    found.append(f"{place(path, node)} imports {other}")
    assert not found, "\n".join(found)


def test_the_library_knows_nothing_of_its_users():
    """Bug: the library imports an experiment, or a test a benchmark: a wheel without them fails."""
    forbidden = [(path, {"experiments", "benchmarks", "tests"}) for path in LIBRARY]
    forbidden += [(path, {"benchmarks"}) for path in sorted((ROOT / "tests").rglob("*.py"))]
    found = [
        f"{place(path, node)} imports {other}"
        for path, roots in forbidden
        for other, node in imported(path, True).items()
        if other.split(".")[0] in roots
    ]
    assert not found, "\n".join(found)


HEAVY = set(
    "matplotlib sklearn tensorflow_datasets orbax tensorflow keras torch onnx onnxruntime safetensors tensorboardX "
    "wandb mlflow starlette uvicorn jinja2 pyarrow".split()
)


@pytest.mark.parametrize(
    ("module", "unwanted"),
    [
        ("jaxft", HEAVY),
        ("jaxft.nets", HEAVY),
        ("jaxft.data", HEAVY),
        ("jaxft.task", HEAVY),
        ("jaxft.predict", HEAVY),
        ("jaxft.devices", HEAVY),
        ("jaxft.port_weights", HEAVY),
        ("jaxft.features", HEAVY - {"orbax"}),
        ("jaxft.verbs", HEAVY - {"orbax"}),
        ("jaxft.checkpoint", HEAVY - {"orbax"}),
    ],
)
def test_what_an_import_brings_along(module, unwanted):
    """Bug: a train step, a net or a prediction waits for, or fails without, what draws pictures or reads other data."""
    program = (
        "import json, sys, time, jax\n"
        "before = time.perf_counter()\n"
        f"import {module}\n"
        "seconds = time.perf_counter() - before\n"
        "print(json.dumps([seconds, sorted({name.split('.')[0] for name in sys.modules})]))\n"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, encoding="utf-8")
    assert done.returncode == 0, done.stderr
    seconds, names = json.loads(done.stdout)
    assert not unwanted & set(names), f"import {module} brings {sorted(unwanted & set(names))}"
    if module == "jaxft":
        assert seconds < 1, f"import {module} takes {seconds:.2f} s beyond jax"


def is_text_without_encoding(call):
    """Whether a call opens a text file, or the output of a process, in whatever encoding the locale names."""
    name = call.func.attr if isinstance(call.func, ast.Attribute) else getattr(call.func, "id", "")
    keywords = {keyword.arg: keyword.value for keyword in call.keywords}
    if "encoding" in keywords or None in keywords:
        return False
    if name in ("read_text", "write_text"):
        return len(call.args) <= (name == "write_text")
    if name in ("run", "Popen", "check_output"):
        return any(isinstance(keywords.get(key), ast.Constant) for key in ("text", "universal_newlines"))
    if name not in ("open", "fdopen", "NamedTemporaryFile", "TemporaryFile"):
        return False
    builtin = isinstance(call.func, ast.Name) or name == "fdopen"
    position = 1 if builtin else 0
    mode = keywords.get("mode", call.args[position] if len(call.args) > position else None)
    if mode is None:  # a path's `open()`; a temporary file is binary unless it is told otherwise
        return builtin or (name == "open" and not call.args)
    # Another kind of first argument is that of Image.open, an archive's open and the like.
    return isinstance(mode, ast.Constant) and set(str(mode.value)) <= set("rwxat+")


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("open(path)", True),
        ("open(path, 'w', newline='')", True),
        ("open(path, 'rb')", False),
        ("open(path, encoding='utf-8')", False),
        ("path.open()", True),
        ("path.open('w')", True),
        ("path.open('wb')", False),
        ("path.open(mode='a')", True),
        ("Image.open(path)", False),
        ("archive.open('member.txt')", False),
        ("path.read_text()", True),
        ("path.read_text('utf-8')", False),
        ("path.write_text(text)", True),
        ("path.write_text(text, encoding='utf-8')", False),
        ("subprocess.run(command, text=True)", True),
        ("subprocess.run(command, capture_output=True)", False),
        ("os.fdopen(file, 'w')", True),
        ("tempfile.NamedTemporaryFile()", False),
        ("tempfile.NamedTemporaryFile('w')", True),
    ],
)
def test_the_next_test_sees_text(line, expected):
    """Bug: a way to open text goes unseen, or a binary file is taken for text."""
    assert is_text_without_encoding(ast.parse(line, mode="eval").body) == expected


def test_every_text_file_names_its_encoding():
    """Bug: a class name with an umlaut fails after training, where the locale is not UTF-8."""
    found = [
        f"{place(path, node)} {ast.unparse(node)[:80]}"
        for path in PROGRAMS
        for node in ast.walk(parsed(path))
        if isinstance(node, ast.Call) and is_text_without_encoding(node)
    ]
    assert not found, "\n".join(found)


def test_version():
    """Bug: the package calls itself by another version than the one that is installed."""
    with (ROOT / "pyproject.toml").open("rb") as file:
        assert jaxft.__version__ == tomllib.load(file)["project"]["version"]
