"""Files that others made: mutated, hostile and odd ones that did harm once, and a moment of fuzzing."""

import pathlib
import random
import time

import pytest
import readers

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:PIL")  # of what it passes over

SEEDS = sorted(path for path in pathlib.Path(__file__).parent.glob("seeds/*/*") if path.is_file())


def test_there_are_seeds_for_every_reader():
    """Bug: the test below runs over nothing."""
    assert {path.parent.name for path in SEEDS} == set(readers.READERS)


@pytest.mark.parametrize("file", SEEDS, ids=[f"{path.parent.name}-{path.name}" for path in SEEDS])
def test_a_file_harms_nobody(file, tmp_path):
    """Bug: it hangs, takes all memory, or ends in something else than a ValueError of a line that names it."""
    began = time.perf_counter()
    readers.attack(file.parent.name, file.read_bytes(), tmp_path)
    assert time.perf_counter() - began < 30


def mutated(content, chance):
    """A file with some bytes changed, cut out, doubled or cut off."""
    found = bytearray(content)
    for _ in range(chance.randint(1, 6)):
        place = chance.randrange(len(found) or 1)
        length = min(chance.choice((1, 2, 4, 8, 64)), len(found) - place)
        kind = chance.randrange(5)
        if kind == 0:
            found[place : place + length] = chance.randbytes(length)
        elif kind == 1:
            found[place : place + length] = chance.choice((b"\0", b"\xff", b"\x7f")) * length
        elif kind == 2:
            del found[place : place + length]
        elif kind == 3:
            found[place:place] = found[place : place + length] * chance.choice((1, 2, 30))
        else:
            del found[place:]
        if not found:
            break
    return bytes(found)


@pytest.mark.parametrize("reader", readers.READERS)
def test_mutated_files_harm_nobody(reader, tmp_path):
    """Bug: as above; 60 files of each kind, the same in every run. `fuzz.py` tries millions."""
    chance = random.Random(18)
    seeds = [path.read_bytes() for path in SEEDS if path.parent.name == reader]
    said = [readers.attack(reader, mutated(chance.choice(seeds), chance), tmp_path) for _ in range(60)]
    assert any(said)
