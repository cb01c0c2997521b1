"""Principal components of a training trajectory (Li et al. 2018, arXiv 1712.09913, Section 7).

T: number of checkpoints; theta_t: (d,), all parameters of checkpoint t; D: (T, d), with rows theta_t - theta_T, the
last of which is zero. D is never in memory as a whole. G = D D^T: (T, T) is summed over blocks of columns. Its
eigenvalues lambda_i and eigenvectors u_i give the components v_i = D^T u_i / sqrt(lambda_i): (d,), one at a time.

Files are read and not mapped: every mapped page costs a fault, and stays in memory as long as the file is open.
"""

import json
import math
import os
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path
from typing import NamedTuple, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from torch import Tensor

from hf_lowrank.metrics.perturb import check_names
from hf_lowrank.metrics.threads import single_threads

__all__ = ["Checkpoint", "TrajectoryPCA", "trajectory_pca"]

# name -> tensor; a safetensors file or a folder that holds some; or the files of one checkpoint
Checkpoint = Mapping[str, Tensor] | str | os.PathLike[str] | Sequence[str | os.PathLike[str]]

# numbers in a block, of all checkpoints together: small enough for the cache, large enough to hide the calls' overhead
BLOCK = 2**19
# blocks that one thread takes at a time; a fixed number, so that sums do not depend on the number of threads
TOGETHER = 16
# eigenvalues of G below this share of the largest are rounding
RESOLVED = 1e-13

At = tuple[slice, ...]
R = TypeVar("R")


class _Piece(NamedTuple):
    """Consecutive numbers of a tensor: `at` slices them, `start` is the flat index of the first of `numel`."""

    name: str
    at: At
    start: int
    numel: int


@dataclass(frozen=True)
class TrajectoryPCA:
    """A trajectory in its principal components.

    Attributes:
        coordinates: (T, k) projections of the D_t on the components of length 1, in the unit of the parameters. The
            last checkpoint lies at 0; with `center` the mean is subtracted and lies at 0. The largest coordinate by
            magnitude of each component is positive.
        explained: (k,) shares of the sum of squares, descending.
    """

    coordinates: NDArray[np.float64]
    explained: NDArray[np.float64]
    _checkpoints: Sequence[Checkpoint] = field(repr=False)
    _names: Sequence[str] = field(repr=False)
    _weights: NDArray[np.float64] = field(repr=False)

    @torch.no_grad()
    def direction(self, i: int) -> dict[str, Tensor]:
        """The i-th component, of length 1; it is read from the checkpoints, which must not have changed.

        Args:
            i: from 0, the column of `coordinates`.

        Returns:
            Parameter name -> tensor on the CPU, in float32 or the last checkpoint's higher precision.

        Raises:
            ValueError: there is no such component, or a checkpoint can no longer be read.
        """
        if not 0 <= i < self.coordinates.shape[1]:
            raise ValueError(
                f"direction {i!r}: there are {self.coordinates.shape[1]}, counted from 0; raise k for more"
            )
        weights = torch.from_numpy(self._weights[:, i].copy())
        sources = _opened(self._checkpoints)
        component = {}
        for name in _common_names(sources, self._names):
            spec = sources[-1].specs[name]
            component[name] = torch.zeros(spec.shape, dtype=torch.promote_types(spec.dtype, torch.float32))

        def project(piece: _Piece, D: Tensor) -> None:
            part = component[piece.name][piece.at]
            part.copy_((weights[:-1] @ D).view(part.shape))

        for _ in _each_difference(sources, self._names, project):
            pass
        return component


@torch.no_grad()
def trajectory_pca(
    checkpoints: Sequence[Checkpoint], k: int = 2, names: Sequence[str] | None = None, center: bool = False
) -> TrajectoryPCA:
    """The top-k principal components of a run's checkpoints, as differences to the last one.

    They come from the Gram matrix in float64, and are right to about 1e-15 lambda_1 / lambda_i. Memory: two blocks of
    4 MiB for each thread. Time: a few times that of reading the files.

    Args:
        checkpoints: in the order of training. Each is a state dict (kept, not copied), a safetensors file, a folder
            with `model.safetensors` or `model.safetensors.index.json`, or the list of the checkpoint's files.
        k: components, at most T - 1.
        names: the parameters to take; by default all floating tensors of the last checkpoint, tied ones once.
        center: subtract the mean over t of D_t, as PCA usually does; Li et al. do not.

    Raises:
        ValueError: there are fewer than two checkpoints, or they span fewer components; names or shapes differ; a
            tensor holds NaN or infinity; integers (a sparse support) are named or differ; a file is missing or cut
            short.
    """
    T = len(checkpoints)
    if T < 2:
        raise ValueError(f"{T} checkpoints: a trajectory takes two or more")
    if not 1 <= k < T:
        raise ValueError(f"k={k!r}: {T} checkpoints span at most {T - 1} components; take 1 <= k <= {T - 1}")
    sources = _opened(checkpoints)
    taken = _common_names(sources, names)
    G = _gram(sources, taken)
    if not G.any():
        raise ValueError(f"all {T} checkpoints are the same: there is no direction; give checkpoints of other steps")
    if center:
        G = G - G.mean(0) - G.mean(1)[:, None] + G.mean()
    values, vectors = np.linalg.eigh(G)
    values, U = values[::-1], vectors[:, ::-1][:, :k]
    rank = int((values > RESOLVED * values[0]).sum())
    if k > rank:
        raise ValueError(f"k={k!r}: these {T} checkpoints span {rank} components; take k={rank} or other checkpoints")
    U = U * np.sign(U[np.abs(U).argmax(0), np.arange(k)])
    lengths = np.sqrt(values[:k])
    return TrajectoryPCA(U * lengths, values[:k] / values.clip(min=0).sum(), list(checkpoints), taken, U / lengths)


class _State:
    """A state dict that is read block by block.

    Attributes:
        label: the checkpoint's name in messages.
        specs: empty tensors on the meta device, by name, for shapes and dtypes.
        tied: further names of a tensor that already has one.
    """

    def __init__(self, state: Mapping[str, Tensor], t: int) -> None:
        self.label = f"checkpoint {t}"
        self.specs = {name: torch.empty_like(tensor, device="meta") for name, tensor in state.items()}
        self.tied: set[str] = set()
        self._state = state
        places: set[tuple[object, ...]] = set()
        for name, tensor in state.items():
            place = (tensor.device, tensor.data_ptr(), tensor.shape, tensor.stride())
            # empty tensors share no memory
            if place in places and tensor.numel():
                self.tied.add(name)
            places.add(place)

    def read(self, piece: _Piece) -> Tensor:
        """The numbers of a piece, (numel,), on the CPU."""
        return self._state[piece.name][piece.at].flatten().cpu()


class _Files:
    """The safetensors files of one checkpoint, with the interface of `_State`; files hold no tied tensors."""

    def __init__(self, paths: Sequence[Path], t: int) -> None:
        self.label = f"checkpoint {t} ({paths[0] if len(paths) == 1 else paths[0].parent})"
        self.specs: dict[str, Tensor] = {}
        self.tied: set[str] = set()
        # name -> file, and the byte at which its numbers begin
        self._places: dict[str, tuple[Path, int]] = {}
        for path in paths:
            try:
                self._take(path)
            except (SafetensorError, OSError) as error:
                raise self._unreadable(path, error) from None

    def _unreadable(self, path: Path, error: Exception | str) -> ValueError:
        return ValueError(
            f"{self.label}: {path} cannot be read ({error}): it is missing or cut short; save it anew or leave this "
            "checkpoint out"
        )

    def _take(self, path: Path) -> None:
        with safe_open(path, "pt") as file:
            for name in file.keys():  # noqa: SIM118
                if name in self.specs:
                    raise ValueError(f"{self.label}: {path} holds {name} once more; name each of its files once")
                tensor = file.get_slice(name)
                shape = tensor.get_shape()
                # a slice's own dtype is the file format's name for it
                dtype = tensor[(slice(0, 0),) * len(shape)].dtype
                self.specs[name] = torch.empty(shape, dtype=dtype, device="meta")
        # the file's format, checked by safe_open: the header's length in 8 bytes, the header as JSON, the numbers
        with path.open("rb") as stream:
            length = int.from_bytes(stream.read(8), "little")
            header = json.loads(stream.read(length))
        for name, described in header.items():
            if name != "__metadata__":
                self._places[name] = path, 8 + length + described["data_offsets"][0]

    def read_into(self, piece: _Piece, raw: NDArray[np.uint8]) -> None:
        """Read the piece into `raw`, which has its number of bytes."""
        path, begin = self._places[piece.name]
        try:
            # opened for every block, since threads cannot share a file's position
            with open(path, "rb", buffering=0) as stream:
                stream.seek(begin + piece.start * self.specs[piece.name].itemsize)
                got = stream.readinto(raw.data)
        except OSError as error:
            raise self._unreadable(path, error) from None
        if got != raw.nbytes:
            raise self._unreadable(path, f"{got} of {raw.nbytes} bytes of {piece.name}")

    def read(self, piece: _Piece) -> Tensor:
        """The numbers of a piece, (numel,)."""
        dtype = self.specs[piece.name].dtype
        raw = np.empty(piece.numel * dtype.itemsize, dtype=np.uint8)
        self.read_into(piece, raw)
        return torch.from_numpy(raw).view(dtype)


_Reader = _State | _Files


def _opened(checkpoints: Sequence[Checkpoint]) -> list[_Reader]:
    sources: list[_Reader] = []
    for t, given in enumerate(checkpoints):
        if isinstance(given, Mapping):
            sources.append(_State(given, t))
        elif isinstance(given, str | os.PathLike):
            sources.append(_Files(_files_of(Path(given), t), t))
        elif given:
            sources.append(_Files([Path(path) for path in given], t))
        else:
            raise ValueError(f"checkpoint {t} is an empty list: name its safetensors files")
    return sources


def _files_of(path: Path, t: int) -> list[Path]:
    if not path.is_dir():
        return [path]
    # like transformers, prefer the single file: saving a model again leaves an old index behind
    if (path / "model.safetensors").is_file():
        return [path / "model.safetensors"]
    index = path / "model.safetensors.index.json"
    try:
        return [path / name for name in sorted(set(json.loads(index.read_text())["weight_map"].values()))]
    except (OSError, ValueError, KeyError) as error:
        raise ValueError(
            f"checkpoint {t}: {path} holds neither model.safetensors nor a readable {index.name} ({error!r}): name "
            "its safetensors files"
        ) from None


def _common_names(sources: Sequence[_Reader], names: Sequence[str] | None) -> list[str]:
    """Names of the tensors to take; raises `ValueError` unless all checkpoints have the same."""
    if names is not None:
        for source in sources:
            if unknown := set(names) - source.specs.keys():
                raise ValueError(f"{source.label} has no {min(unknown)}: names are those of its state dict")
    chosen = [
        {name: source.specs[name] for name in (source.specs.keys() - source.tied if names is None else names)}
        for source in sources
    ]
    for source, own in zip(sources, chosen, strict=True):
        check_names(own, chosen[-1], source.label)
    whole = [name for name, spec in sources[-1].specs.items() if not spec.is_floating_point()]
    for source in sources[:-1]:
        for name in whole:
            if name in source.specs and not _equal(source, sources[-1], name):
                raise ValueError(
                    f"{name} differs between {source.label} and {sources[-1].label} and is no number with a fraction: "
                    "take dense forms (hf_lowrank.to_dense) of all"
                )
    taken = [name for name in sources[-1].specs if name in chosen[-1] and (names is not None or name not in whole)]
    for source in sources:
        for name in taken:
            dtype = source.specs[name].dtype
            # fp8 without its scales is codes
            if not dtype.is_floating_point or dtype.itemsize == 1:
                raise ValueError(f"{name} is {dtype} in {source.label}: name floating tensors of 16 bits or more only")
    if not taken:
        raise ValueError(f"{sources[-1].label} holds no floating tensor to take: give a model's weights")
    return taken


def _equal(one: _Reader, other: _Reader, name: str) -> bool:
    spec, expected = one.specs[name], other.specs[name]
    if spec.dtype != expected.dtype or spec.shape != expected.shape:
        return False
    return all(torch.equal(one.read(piece), other.read(piece)) for piece in _pieces(name, spec.shape, BLOCK))


def _blocks(shape: Sequence[int], limit: int) -> Iterator[At]:
    """Slices that cut a tensor into runs of at most `limit` numbers, whole rows where they fit."""
    if not shape:
        yield ()
        return
    row = math.prod(shape[1:])
    if row > limit:
        for i in range(shape[0]):
            yield from ((slice(i, i + 1), *rest) for rest in _blocks(shape[1:], limit))
        return
    step = limit // max(row, 1)
    yield from ((slice(i, i + step),) for i in range(0, shape[0], step))


def _pieces(name: str, shape: Sequence[int], limit: int) -> Iterator[_Piece]:
    start = 0
    for at in _blocks(shape, limit):
        numel = math.prod(len(range(*cut.indices(size))) for cut, size in zip(at, shape, strict=False))
        numel *= math.prod(shape[len(at) :])
        yield _Piece(name, at, start, numel)
        start += numel


class _Differences:
    """Blocks of columns of D without its last row, which is zero; each thread has an object of its own."""

    def __init__(self, sources: Sequence[_Reader], limit: int) -> None:
        self._sources = sources
        self._D = torch.empty(len(sources), limit, dtype=torch.float64)
        # bytes as read, in the files' own dtypes
        self._raw = np.empty((len(sources), limit * 8), dtype=np.uint8)

    def of(self, piece: _Piece) -> Tensor:
        """Columns of D: (T - 1, numel), float64, valid until the next call."""
        rows = self._D[:, : piece.numel]
        start = 0
        # one call converts as many rows as possible, since threads wait for each other between calls
        for dtype, group in groupby(self._sources, lambda source: source.specs[piece.name].dtype):
            for _, alike in groupby(group, type):
                together = list(alike)
                end = start + len(together)
                raw = self._raw[start:end, : piece.numel * dtype.itemsize]
                for row, source, bytes_ in zip(rows[start:end], together, raw, strict=True):
                    if isinstance(source, _Files):
                        source.read_into(piece, bytes_)
                    else:
                        row.copy_(source.read(piece))
                if isinstance(together[0], _Files):
                    rows[start:end].copy_(torch.from_numpy(raw).view(dtype))
                start = end
        return rows[:-1].sub_(rows[-1])


def _each_difference(
    sources: Sequence[_Reader], names: Sequence[str], measure: Callable[[_Piece, Tensor], R]
) -> Iterator[list[R]]:
    """Call `measure` on every piece with its columns of D, (T - 1, numel), and yield the results.

    `measure` is called from several threads at once. Its results come as lists, in the order of the pieces.
    """
    limit = max(BLOCK // len(sources), 1)
    pieces = [piece for name in names for piece in _pieces(name, sources[-1].specs[name].shape, limit) if piece.numel]
    own = threading.local()

    @torch.no_grad()
    def some(first: int) -> list[R]:
        if not hasattr(own, "differences"):
            own.differences = _Differences(sources, limit)
        return [measure(piece, own.differences.of(piece)) for piece in pieces[first : first + TOGETHER]]

    with single_threads(torch.get_num_threads()) as pool:
        yield from pool.map(some, range(0, len(pieces), TOGETHER))


def _gram(sources: Sequence[_Reader], names: Sequence[str]) -> NDArray[np.float64]:
    def product(piece: _Piece, D: Tensor) -> NDArray[np.float64]:
        part: NDArray[np.float64] = (D @ D.T).numpy()
        if not np.isfinite(part).all():
            for source in sources:
                if not torch.isfinite(source.read(piece).double()).all():
                    raise ValueError(
                        f"{piece.name} in {source.label} holds NaN or infinity: leave this checkpoint out"
                    )
        return part

    # the last row of D is zero
    G = np.zeros((len(sources), len(sources)))
    for parts in _each_difference(sources, names, product):
        G[:-1, :-1] += sum(parts)
    return G
