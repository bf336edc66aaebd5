"""What the operations of a compiled program read and write: a count of its text, in which a loop counts each time.

XLA's own `cost_analysis` counts the body of a loop once.
"""

import dataclasses
import re
from collections import Counter
from functools import cached_property

BYTES = {"f64": 8, "s64": 8, "u64": 8, "f32": 4, "s32": 4, "u32": 4, "bf16": 2, "f16": 2, "u8": 1, "s8": 1, "pred": 1}
FREE = ("parameter", "tuple", "get-tuple-element", "bitcast", "constant", "partition-id", "replica-id", "after-all")
PARTS = ("slice", "dynamic-slice", "gather")  # read no more of their first operand than they give


def size(shape: str) -> int:
    """Bytes of a shape as HLO writes it, of all parts of a tuple."""
    total = 0
    for dtype, dims in re.findall(rf"\b({'|'.join(BYTES)})\[([0-9,]*)\]", shape):
        count = 1
        for dim in filter(None, dims.split(",")):
            count *= int(dim)
        total += count * BYTES[dtype]
    return total


@dataclasses.dataclass(frozen=True)
class Operation:
    """A line of a computation: its name, bytes of its output, kind, names of what it takes, and what else it says."""

    name: str
    bytes: int
    kind: str
    operands: tuple[str, ...]
    rest: str

    def computation(self, role: str) -> str:
        """The name of the computation that it runs as its calls, body, …"""
        found = re.search(rf"\b{role}=%?([\w.\-]+)", self.rest)
        return found[1] if found else ""


@dataclasses.dataclass(frozen=True)
class Computation:
    operations: tuple[Operation, ...]

    @cached_property
    def users(self) -> dict[str, list[Operation]]:
        """Who takes what is called so; who takes a bitcast of it takes it."""
        users: dict[str, list[Operation]] = {operation.name: [] for operation in self.operations}
        for operation in reversed(self.operations):
            for operand in set(operation.operands) & users.keys():
                users[operand] += users[operation.name] if operation.kind == "bitcast" else [operation]
        return users

    @cached_property
    def named(self) -> dict[str, Operation]:
        return {operation.name: operation for operation in self.operations}

    def origin(self, name: str) -> Operation:
        """What is called so, before bitcasts."""
        operation = self.named[name]
        return self.origin(operation.operands[0]) if operation.kind == "bitcast" else operation

    def read(self, name: str) -> int:
        """Bytes of its parameter of that name that are read, if the computation is fused: parts of it, or all."""
        total = 0
        for user in self.users[name]:
            first = self.origin(user.operands[0]).name == name and name not in user.operands[1:]
            if first and user.kind in PARTS:
                total += user.bytes
            elif not (first and user.kind == "dynamic-update-slice"):  # which is written in its place
                return self.named[name].bytes
        return min(total, self.named[name].bytes)

    def written(self) -> int:
        """Bytes of its outputs that are written, if the computation is fused: an update writes its part alone."""
        root = self.operations[-1]
        outputs = root.operands if root.kind == "tuple" else (root.name,)
        total = 0
        for output in map(self.origin, outputs):
            update = output.kind == "dynamic-update-slice"
            total += self.named[output.operands[1]].bytes if update else output.bytes
        return total


def computations(program: str) -> tuple[dict[str, Computation], str]:
    """(those of an optimised HLO module by name, the name of its entry)."""
    found: dict[str, list[Operation]] = {}
    lines: list[Operation] = []
    entry = ""
    for line in program.splitlines():
        if head := re.match(r"(ENTRY )?%?([\w.\-]+) \(.*\{$", line):
            lines = found[head[2]] = []
            entry = head[2] if head[1] else entry
        elif parts := re.match(r"\s+(?:ROOT )?%?([\w.\-]+) = (.*?) ([a-z][a-z\-]*)\((.*?)\)(.*)$", line):
            name, shape, kind, operands, rest = parts.groups()
            taken = () if kind in ("parameter", "constant") else tuple(re.findall(r"%([\w.\-]+)", operands))
            lines.append(Operation(name, size(shape), kind, taken, rest))
    return {name: Computation(tuple(operations)) for name, operations in found.items()}, entry


def operations(program: str) -> tuple[Counter[str], Counter[str]]:
    """(how many, bytes read and written) by kind of the operations that an optimised HLO module runs.

    A fusion reads of an operand what it takes parts of, and writes of an output that it updates in its place the part.
    """
    found, entry = computations(program)
    many: Counter[str] = Counter()
    moved: Counter[str] = Counter()

    def run(computation: Computation, times: int) -> None:
        for operation in computation.operations:
            if operation.kind in FREE:
                continue
            if operation.kind == "while":
                trips = re.search(r'known_trip_count":\{"n":"(\d+)"', operation.rest)
                run(found[operation.computation("body")], times * int(trips[1] if trips else 1))
                continue
            if operation.kind == "call":
                run(found[operation.computation("to_apply")], times)
                continue
            target = re.search(r'custom_call_target="([^"]+)"', operation.rest)
            kind = target[1] if target else operation.kind
            many[kind] += times
            moved[kind] += times * traffic(computation, operation)

    def traffic(computation: Computation, operation: Operation) -> int:
        inputs = [computation.named[operand].bytes for operand in operation.operands]
        if operation.kind in PARTS:
            return 2 * operation.bytes
        if operation.kind == "dynamic-update-slice":
            return 2 * inputs[1]
        inside = found.get(operation.computation("calls")) if operation.kind == "fusion" else None
        if inside is None:
            return operation.bytes + sum(inputs)
        parameters = [each for each in inside.operations if each.kind == "parameter"]
        return inside.written() + sum(inside.read(each.name) for each in parameters)

    run(found[entry], 1)
    return many, moved
