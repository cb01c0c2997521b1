"""Two models' hidden units and attention heads in one order (Git Re-Basin, arXiv 2209.04836, Section 3.2).

An MLP computes the same for every order of its hidden units, and an attention for every order of its heads. B takes
the order whose weights have the largest inner product with A's, which is the order nearest to A. The residual stream
keeps its order, so that every block is a linear assignment problem of its own. It is solved exactly, where the paper's
sweeps find a local optimum.

U: a block's units, hidden units of an MLP or query heads of an attention, in groups that stay together: one group in
an MLP, one for each key/value head in an attention.
"""

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.optimize import linear_sum_assignment
from torch import Tensor, nn

from hf_lowrank.metrics.perturb import check_names, is_conv1d

__all__ = ["Alignment", "align"]

# layers of a block by name; the last one reads the units and the others write them
MLPS = (("gate_proj", "up_proj", "down_proj"), ("c_fc", "c_proj"), ("fc1", "fc2"))
ATTENTIONS = (
    ("q_proj", "k_proj", "v_proj", "o_proj"),
    ("q_proj", "k_proj", "v_proj", "out_proj"),
    ("c_attn", "c_proj"),
)


@dataclass(frozen=True)
class Alignment:
    """B's weights in the order that is nearest to A's.

    Attributes:
        state: weights that compute B's function, with B's names, shapes and dtypes. Tensors whose order does not
            change are B's own.
        permutations: the module that holds a block's layers -> (U,) int64 on the CPU: unit i of `state` is unit
            `permutation[i]` of B. Key/value heads go where their query heads go.
    """

    state: dict[str, Tensor]
    permutations: dict[str, Tensor]

    @property
    def moved(self) -> float:
        """Share of all blocks' units (hidden units and query heads) whose position differs from that in B."""
        moved = [order != torch.arange(len(order)) for order in self.permutations.values()]
        return torch.cat(moved).double().mean().item()


@dataclass(frozen=True)
class _Part:
    """Where a tensor's axis runs over the units of a block, or over its groups."""

    name: str
    axis: int
    start: int
    length: int
    by_group: bool = False


@dataclass(frozen=True)
class _Block:
    """Tensors that share one order of units; `fixed` are tensors of the same layers that do not depend on it."""

    name: str
    units: int
    groups: int
    width: int
    parts: tuple[_Part, ...]
    fixed: tuple[str, ...]


@torch.no_grad()
def align(model: nn.Module, state_a: Mapping[str, Tensor], state_b: Mapping[str, Tensor]) -> Alignment:
    """Permute B's hidden units and attention heads to match A's.

    The assignment maximises the inner product of A's and B's weights and biases, in float64, block by block. Heads
    move as a whole, which rotary embeddings allow. With grouped queries, groups move as a whole, and query heads move
    inside their group. Memory beyond the states: the permuted tensors and, in float64, a pair of tensors and (U, U)
    numbers.

    Args:
        model: transformers causal LM of the states' architecture, for its structure; its weights do not matter.
        state_a, state_b: state dicts of this model.

    Raises:
        ValueError: a state dict is not this model's or holds NaN or infinity; or a layer of the model holds anything
            but Llama's, GPT-2's or OPT's attention and MLP and norms around them: experts, other norms inside of a
            block, reparameterised or quantised layers.
    """
    own = model.state_dict(keep_vars=True)
    for what, state in (("state_a", state_a), ("state_b", state_b)):
        check_names(state, own, what)
        for name, tensor in state.items():
            if not torch.isfinite(tensor).all():
                raise ValueError(f"{what} holds NaN or infinity in {name}: align checkpoints from before it diverged")
    state, permutations = dict(state_b), {}
    for block in _blocks(model):
        order = _order(block, state_a, state_b)
        for part in block.parts:
            state[part.name] = _reordered(state[part.name], part, order, block)
        permutations[block.name] = torch.from_numpy(order)
    return Alignment(state, permutations)


def _order(block: _Block, state_a: Mapping[str, Tensor], state_b: Mapping[str, Tensor]) -> NDArray[np.int64]:
    """The order of B's units, (U,), in which they match A's."""
    by_unit, by_group = np.zeros((block.units,) * 2), np.zeros((block.groups,) * 2)
    for part in block.parts:
        similarity = by_group if part.by_group else by_unit
        a, b = (_rows(state[part.name], part, len(similarity)) for state in (state_a, state_b))
        similarity += (a @ b.to(a.device).T).cpu().numpy()
    size = block.units // block.groups
    inside = np.empty((block.groups, block.groups, size), dtype=np.int64)
    for a_group, b_group in np.ndindex(block.groups, block.groups):
        pair = by_unit[a_group * size : (a_group + 1) * size, b_group * size : (b_group + 1) * size]
        rows, columns = linear_sum_assignment(pair, maximize=True)
        inside[a_group, b_group] = columns
        by_group[a_group, b_group] += pair[rows, columns].sum()
    a_groups, b_groups = linear_sum_assignment(by_group, maximize=True)
    return (b_groups[:, None] * size + inside[a_groups, b_groups]).reshape(-1).astype(np.int64)


def _rows(tensor: Tensor, part: _Part, count: int) -> Tensor:
    rows = tensor.detach().narrow(part.axis, part.start, part.length).movedim(part.axis, 0).reshape(count, -1)
    return (rows.cpu() if rows.device.type == "mps" else rows).double()


def _reordered(tensor: Tensor, part: _Part, order: NDArray[np.int64], block: _Block) -> Tensor:
    if part.by_group:
        size = block.units // block.groups
        order = order[::size] // size
    if np.array_equal(order, np.arange(len(order))):
        return tensor
    index = np.arange(tensor.shape[part.axis])
    stretch = index[part.start : part.start + part.length].reshape(len(order), -1)
    index[part.start : part.start + part.length] = stretch[order].reshape(-1)
    return tensor.detach().index_select(part.axis, torch.from_numpy(index).to(tensor.device))


def _blocks(model: nn.Module) -> list[_Block]:
    blocks = [block for name, layer in _layers(model) for block in _blocks_of(name, layer)]
    if not blocks:
        raise _refusal(type(model).__name__, "has no layers in an nn.ModuleList for alignment")
    own = model.state_dict(keep_vars=True)
    places = Counter(map(id, own.values()))
    for block in blocks:
        for part in block.parts:
            if places[id(own[part.name])] > 1:
                raise _refusal(part.name, "is tied to another parameter, which alignment does not take")
    return blocks


def _layers(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    outer: list[str] = []
    for name, module in model.named_modules():
        if isinstance(module, nn.ModuleList) and not name.startswith(tuple(outer)):
            outer.append(f"{name}.")
            yield from ((f"{name}.{key}", layer) for key, layer in module.named_children())


def _blocks_of(layer_name: str, layer: nn.Module) -> list[_Block]:
    blocks = []
    for name, module in layer.named_modules(prefix=layer_name):
        children = dict(module.named_children())
        for layouts, describe in ((MLPS, _mlp), (ATTENTIONS, _attention)):
            blocks += [describe(name, module, names) for names in layouts if children.keys() >= set(names)]
    known = {name for block in blocks for name in (*block.fixed, *(part.name for part in block.parts))}
    holders, widths = {block.name for block in blocks}, {(block.width,) for block in blocks}
    unknown = {}
    for name, tensor in layer.state_dict(prefix=f"{layer_name}.").items():
        holder = name.rpartition(".")[0]
        beside = holder.rpartition(".")[0] == layer_name and holder not in holders
        if name not in known and not (beside and tensor.shape in widths):
            unknown[name] = tuple(tensor.shape)
    if unknown:
        # name the tensor with the most dimensions, a matrix, which says most about an unknown block
        name = max(unknown, key=lambda name: len(unknown[name]))
        raise _refusal(name, f"of shape {unknown[name]} is nothing that alignment knows")
    return blocks


def _refusal(name: str, problem: str) -> ValueError:
    attentions, mlps = ("; ".join(", ".join(names) for names in layouts) for layouts in (ATTENTIONS, MLPS))
    return ValueError(
        f"{name} {problem}: it takes layers of an attention ({attentions}), an MLP ({mlps}), both of Linear or "
        "Conv1D, and norms around them; turn a reparameterised model into its dense form (hf_lowrank.to_dense), and "
        "compare others, as mixtures of experts, unaligned"
    )


def _size(name: str, layer: Any) -> tuple[int, int]:
    """Inputs and outputs of a linear layer."""
    plain = (isinstance(layer, nn.Linear) or is_conv1d(layer)) and layer.state_dict().keys() <= {"weight", "bias"}
    if not plain or not layer.weight.is_floating_point():
        raise _refusal(name, f"is a {type(layer).__name__}, which alignment does not take")
    inputs, outputs = reversed(layer.weight.shape) if isinstance(layer, nn.Linear) else layer.weight.shape
    return inputs, outputs


def _written(name: str, layer: Any, start: int, length: int, by_group: bool = False) -> Iterator[_Part]:
    yield _Part(f"{name}.weight", int(is_conv1d(layer)), start, length, by_group)
    if layer.bias is not None:
        yield _Part(f"{name}.bias", 0, start, length, by_group)


def _read(name: str, layer: Any, length: int) -> _Part:
    return _Part(f"{name}.weight", int(isinstance(layer, nn.Linear)), 0, length)


def _mlp(name: str, module: nn.Module, names: Iterable[str]) -> _Block:
    *writers, reader = ((f"{name}.{child}", module.get_submodule(child)) for child in names)
    units, width = _size(*reader)
    if any(_size(*writer) != (width, units) for writer in writers):
        raise _refusal(name, f"has layers that do not write the {units} units that {reader[0]} reads")
    parts = [part for writer in writers for part in _written(*writer, 0, units)]
    return _Block(name, units, 1, width, (*parts, _read(*reader, units)), (f"{reader[0]}.bias",))


def _attention(name: str, module: nn.Module, names: Iterable[str]) -> _Block:
    *writers, reader = ((f"{name}.{child}", module.get_submodule(child)) for child in names)
    length, width = _size(*reader)
    head = getattr(module, "head_dim", None) or 0
    sizes = [_size(*writer)[1] for writer in writers]
    # keys and values are as many as queries where one layer writes all three
    shared = length if len(writers) == 1 else sizes[1]
    expected = [3 * length] if len(writers) == 1 else [length, shared, shared]
    if head == 0 or length % head or shared % head or length % shared or sizes != expected:
        raise _refusal(name, f"with head_dim {head} has layers of {sizes} outputs and {length} inputs that do not fit")
    if len(writers) == 1:
        parts = [part for i in range(3) for part in _written(*writers[0], i * length, length, i > 0)]
    else:
        parts = [part for i, writer in enumerate(writers) for part in _written(*writer, 0, sizes[i], i > 0)]
    fixed = [f"{reader[0]}.bias"]
    for norm, size in (("q_norm", length), ("k_norm", shared)):
        weight = getattr(getattr(module, norm, None), "weight", None)
        if weight is not None and weight.shape == (head,):
            fixed.append(f"{name}.{norm}.weight")
        elif weight is not None and weight.shape == (size,):
            parts.append(_Part(f"{name}.{norm}.weight", 0, 0, size, norm == "k_norm"))
    return _Block(name, length // head, shared // head, width, (*parts, _read(*reader, length)), tuple(fixed))
