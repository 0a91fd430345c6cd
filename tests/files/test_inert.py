"""Whatever bytes are called a pickle, there is a header or a clean error, and nothing in the process is changed."""

from __future__ import annotations

import contextlib
import os
import pickle
import random
import resource
import sys
import time
import types
import zipfile
from collections import OrderedDict
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from support.scale import times

from safelight.errors import CorruptFileError, FileError, UnsafeFileError
from safelight.files import header, inert
from safelight.files import pickle as pickles
from safelight.files.pickle import read_header

MUTANTS = 20_000


def bare(path: Path, program: bytes) -> Path:
    """An archive of PyTorch whose pickle is just this."""
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/data.pkl", program)
        archive.writestr("archive/data/0", bytes(64))
    return path


def text(value: str) -> bytes:
    return b"X" + len(value.encode()).to_bytes(4, "little") + value.encode()


def state_of(thing: object) -> Iterator[tuple[str, object]]:
    """What could be changed of a function, a class or a module's value, with its identity."""
    if isinstance(thing, types.FunctionType):
        yield "code", (thing.__code__, thing.__defaults__, repr(thing.__kwdefaults__), repr(vars(thing)))
    elif isinstance(thing, type):
        for name, value in vars(thing).items():
            yield name, id(value)
            if isinstance(value, types.FunctionType):
                yield from state_of(value)
    elif isinstance(thing, dict | frozenset | str | int | tuple):
        yield "value", repr(thing)


def process() -> list[object]:
    """Everything that the reader is made of, and a few things that pickles like to reach."""
    modules = (pickles, inert, header, pickle, os, zipfile)
    seen: list[object] = [
        (module.__name__, name, id(value), list(state_of(value)))
        for module in modules
        for name, value in list(vars(module).items())
        if not name.startswith("__") and name != "environ"
    ]
    return [*seen, sorted(os.environ.items()), list(state_of(OrderedDict)), list(state_of(torch.Tensor))]


def programs(folder: Path) -> list[bytes]:
    """Pickles as they are written: weights, training's leftovers, embeddings of every age; by several protocols."""
    weights = {"a": torch.ones(2, 3), "b": torch.ones(4, 2).t(), "c": torch.tensor(1.0, dtype=torch.float16)}
    state = torch.nn.Linear(2, 2).state_dict()
    things = [
        {"state_dict": weights, "epoch": 3, "callbacks": {"x": {"best": np.float64(2)}}, "lr": [1e-4], "n": None},
        {"state_dict": state, "hyper_parameters": {"size": torch.Size([1, 2]), "dtype": torch.float16}},
        {
            "string_to_param": torch.nn.ParameterDict({"*": torch.nn.Parameter(torch.ones(1, 4))}),
            "string_to_token": {"*": torch.tensor(265)},
            "name": "ä",
        },
    ]
    found: list[bytes] = []
    for thing in things:
        for protocol in (2, 4):
            torch.save(thing, folder / "good.pt", pickle_protocol=protocol)
            with zipfile.ZipFile(folder / "good.pt") as archive:
                found.append(archive.read("good/data.pkl"))
    return found


def mutated(chance: random.Random, good: bytes) -> bytes:
    """Some bytes of a good program changed, put in, left out, doubled, or its instructions shuffled."""
    data = bytearray(good)
    for _ in range(chance.randint(1, 4)):
        at, to = sorted((chance.randrange(len(data)), chance.randrange(len(data))))
        match chance.randrange(6):
            case 0:
                data[at] = chance.randrange(256)
            case 1:
                data[at] = chance.choice(b"bRc\x81\x93Qsu}]()t\x85\x86\x87.0ae\x94q h")
            case 2:
                del data[at : min(to, at + 40)]
            case 3:
                data[at:at] = data[at : min(to, at + 40)]
            case 4:
                data[at:at] = chance.choice(CUTTINGS)
            case _:
                data[at : at + 4] = chance.choice((b"\xff" * 4, b"\0" * 4, b"\xff\xff\xff\x7f"))
        data = data or bytearray(good)
    return bytes(data)


CUTTINGS = (
    b"}" + text("__defaults__") + b"K\x07sb",
    b"(N}" + text("__defaults__") + b"K\x07\x85stb",
    b"]" + text("F64") + b"ab",
    b"ctorch._utils\n_rebuild_parameter\n",
    b"ctorch\nHalfStorage\n",
    b"cos\nsystem\n" + text("false") + b"\x85R",
    b")\x81}" + text("__class__") + b"Nsb",
)


def test_twenty_thousand_mutants_give_only_clean_errors_and_change_nothing(tmp_path: Path) -> None:
    chance, path = random.Random(11), tmp_path / "mutant.pt"
    good, before = programs(tmp_path), process()
    read = refused = 0
    for _ in range(MUTANTS):
        program = mutated(chance, chance.choice(good))
        try:
            content = pickles._load(path, inert.Machine(program))
            places = {str(n): (100, 64) for n in range(8)}
            found = pickles._header(path, content, places, 1000)
        except FileError:
            refused += 1
        else:
            read += 1
            assert all(info.offset + info.nbytes <= 164 for info in found.tensors.values())
    assert min(read, refused) > MUTANTS // 50
    assert process() == before


@pytest.mark.parametrize("legacy", [False, True])
def test_mutants_of_whole_files(tmp_path: Path, legacy: bool) -> None:
    chance, path = random.Random(12), tmp_path / "mutant.pt"
    weights = {"a": torch.ones(2, 3), "b": torch.ones(4, 2).t()}
    torch.save({"state_dict": weights}, path, _use_new_zipfile_serialization=not legacy)
    # After the first `torch.save`, which adds an attribute to `torch.Tensor`.
    good, before = path.read_bytes(), process()
    for _ in range(times(400, 1500)):
        path.write_bytes(mutated(chance, good))
        try:
            found = read_header(path)
        except FileError:
            continue
        assert all(info.offset + info.nbytes <= path.stat().st_size for info in found.tensors.values())
    assert process() == before


FUNCTION = b"\x80\x02ctorch._utils\n_rebuild_parameter\n"


@pytest.mark.parametrize(
    "program",
    [
        FUNCTION + b"N}" + text("__defaults__") + b"K\x07\x85s\x86b0}.",
        FUNCTION + b"}" + text("marked") + b"K\x07sb0}.",
        b"\x80\x02ctorch\nHalfStorage\n]" + text("F64") + b"ab0}.",
        b"\x80\x02ccollections\nOrderedDict\n)\x81}" + text("__class__") + b"Nsb0}.",
        b"\x80\x02\x93.",
        b"\x80\x02K\x01\x93.",
        b"\x80\x02c\n\n.",
        b"\x80\x02}c\x1b[2J\nevil\nsR.",
    ],
)
def test_no_instruction_reaches_what_the_process_is_made_of(tmp_path: Path, program: bytes) -> None:
    before, said = process(), ""
    try:
        assert read_header(bare(tmp_path / "x.ckpt", program)).tensors == {}
    except FileError as error:
        said = str(error)
    assert said.isprintable()
    assert process() == before


@pytest.mark.parametrize(
    "program",
    [
        b"N" * 2_000_000,
        b"(" * 2_000_000,
        b"]" * 900_000 + b".",
        b"]\x94" + b"h\0a" * 300_000 + b".",
        # A list of a thousand pairs, made a dictionary of over and over.
        b"](" + b"K\x01K\x01\x86" * 1000 + b"e\x94" + b"ccollections\nOrderedDict\nh\0\x85R0" * 50_000 + b".",
        # Numbers that fall into one place of a dictionary: quadratic time.
        b"}(" + b"".join(b"\x8a\x0d" + (n * (2**61 - 1)).to_bytes(13, "little") + b"N" for n in range(50_000)) + b"u.",
        b"(" + b"2" * 100 + b"t.",
        b"\x8b\xff\xff\xff\x7f.",
        b"\x8c\xff.",
        b"B\xff\xff\xff\xff.",
        b"X\xff\xff\xff\xff.",
        b"T\xff\xff\xff\xff.",
        b"\x8e" + b"\xff" * 8 + b".",
        b"\x96" + b"\xff" * 8 + b".",
        b"]" + b"\x85" * 200_000 + b"Q.",
        b"}]" + b"\x85" * 200_000 + b"K\x01s.",
    ],
)
def test_bombs_take_neither_time_nor_memory(program: bytes) -> None:
    """Memory is asked of the system as a peak, so that the bound is one on all that was tried until now."""
    machine = inert.Machine(b"\x80\x05" + program)
    before, began = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.process_time()
    with contextlib.suppress(inert.Unreadable):
        machine.load()
    assert time.process_time() - began < 10
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 300 << 10


def tensor(shape: tuple[int, ...], strides: tuple[int, ...]) -> bytes:
    """A program of one tensor over a storage of sixteen numbers."""

    def sizes(values: tuple[int, ...]) -> bytes:
        return b"(" + b"".join(b"\x8a\x08" + n.to_bytes(8, "little", signed=True) for n in values) + b"t"

    storage = b"(" + text("storage") + b"ctorch\nFloatStorage\n" + text("0") + text("cpu") + b"K\x10tQ"
    made = b"ctorch._utils\n_rebuild_tensor_v2\n(" + storage + b"K\x00" + sizes(shape) + sizes(strides) + b"\x89}tR"
    return b"\x80\x02}" + text("a") + made + b"s."


@pytest.mark.parametrize(
    ("shape", "strides"),
    [((2**40,), (0,)), ((2**20, 2**20, 2**20), (0, 0, 0)), ((17,), (1,)), ((2, 2), (1,)), ((-1,), (1,)), ((3,), (8,))],
)
def test_tensors_that_no_storage_holds(tmp_path: Path, shape: tuple[int, ...], strides: tuple[int, ...]) -> None:
    with pytest.raises(CorruptFileError):
        read_header(bare(tmp_path / "x.ckpt", tensor(shape, strides)))


def test_small_repetitions_are_weights(tmp_path: Path) -> None:
    found = read_header(bare(tmp_path / "x.ckpt", tensor((100, 16), (0, 1))))
    assert (found.tensors["a"].nbytes, found.tensors["a"].strides) == (64, (0, 1))


def test_everything_that_it_would_run_is_named(tmp_path: Path) -> None:
    program = b"\x80\x02cos\nsystem\n0cbuiltins\neval\n0crandom\nRandom\n."
    with pytest.raises(UnsafeFileError) as caught:
        read_header(bare(tmp_path / "x.ckpt", program))
    assert caught.value.wanted == ("builtins.eval", "os.system", "random.Random")


class ModelCheckpoint:
    """As Lightning names the settings of a callback: by its class."""

    __module__ = "pytorch_lightning.callbacks.model_checkpoint"


@pytest.mark.parametrize("protocol", [2, 4])
@pytest.mark.parametrize("legacy", [False, True])
def test_what_training_leaves_beside_weights_is_passed_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, protocol: int, legacy: bool
) -> None:
    for name in ("pytorch_lightning", "pytorch_lightning.callbacks", ModelCheckpoint.__module__):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    vars(sys.modules[ModelCheckpoint.__module__])["ModelCheckpoint"] = ModelCheckpoint
    state = torch.nn.Linear(2, 3).state_dict()
    beside = {
        "callbacks": {ModelCheckpoint: {"best_model_score": np.float32(0.5), "best": torch.tensor(1.0)}},
        "optimizer_states": [{"state": {0: {"exp_avg": torch.ones(3)}}, "param_groups": [{"betas": (0.9, 0.99)}]}],
        "seen": {1, 2},
        "histogram": np.ones(3),
        "device": torch.device("cpu"),
        "dtype": torch.bfloat16,
    }
    path = tmp_path / "m.ckpt"
    torch.save(
        {"state_dict": state, **beside}, path, pickle_protocol=protocol, _use_new_zipfile_serialization=not legacy
    )
    assert set(read_header(path).tensors) == {"weight", "bias"}


@pytest.mark.parametrize("legacy", [False, True])
def test_parameters_of_embeddings_are_read(tmp_path: Path, legacy: bool) -> None:
    path = tmp_path / "thing.pt"
    held = torch.nn.ParameterDict({"*": torch.nn.Parameter(torch.ones(2, 4))})
    torch.save(
        {"string_to_param": held, "string_to_token": {"*": torch.tensor(265)}},
        path,
        _use_new_zipfile_serialization=not legacy,
    )
    found = read_header(path).tensors
    assert found.keys() == {"string_to_param.*", "string_to_token.*"}
    assert found["string_to_param.*"].shape == (2, 4)


def test_each_pickle_of_a_stream_is_read_alone(tmp_path: Path) -> None:
    torch.save({"a": torch.ones(1)}, tmp_path / "a.pt")
    with zipfile.ZipFile(tmp_path / "a.pt") as archive:
        program = archive.read("a/data.pkl")
    machine = inert.Machine(program + b"cos\nsystem\n.")
    pickles._load(tmp_path, machine)
    assert machine.bytes.at == len(program)
    with pytest.raises(UnsafeFileError):
        pickles._load(tmp_path, machine)
