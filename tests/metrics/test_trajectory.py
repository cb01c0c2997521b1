"""Components of trajectories that are known, from state dicts and from files."""

import json

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from tiny_runs import gpt2, llama, weights

from hf_lowrank.metrics import trajectory
from hf_lowrank.metrics.landscape import loss_curve
from hf_lowrank.metrics.trajectory import trajectory_pca

SHAPES = {"embed": (17, 6), "bias": (6,), "experts": (3, 4, 5), "scale": (), "empty": (0, 4)}


def walk(T=6, seed=0, dtype=torch.float32):
    """T checkpoints of a random walk with a drift."""
    generator = torch.Generator().manual_seed(seed)
    state = {name: torch.randn(shape, generator=generator) for name, shape in SHAPES.items()}
    drift = {name: 0.1 * torch.randn(shape, generator=generator) for name, shape in SHAPES.items()}
    states = []
    for _ in range(T):
        for name, tensor in state.items():
            tensor += drift[name] + 0.05 * torch.randn(tensor.shape, generator=generator)
        states.append({name: tensor.to(dtype, copy=True) for name, tensor in state.items()})
    return states


def flat(state):
    return torch.cat([tensor.double().flatten() for tensor in state.values()]).numpy()


def svd(states, center=False):
    """Singular triplets of the explicit (T, d) matrix of differences to the last checkpoint."""
    theta = np.stack([flat(state) for state in states])
    D = theta - theta[-1]
    return np.linalg.svd(D - D.mean(0) if center else D, full_matrices=False)


def assert_is_svd(pca, states, center=False):
    U, s, Vh = svd(states, center)
    for i in range(pca.coordinates.shape[1]):
        sign = np.sign(U[np.abs(U[:, i]).argmax(), i])
        np.testing.assert_allclose(pca.coordinates[:, i], sign * U[:, i] * s[i], atol=1e-10 * s[0])
        np.testing.assert_allclose(flat(pca.direction(i)), sign * Vh[i], atol=1e-6)
        assert pca.direction(i).keys() == states[0].keys()
    np.testing.assert_allclose(pca.explained, (s**2 / (s**2).sum())[: len(pca.explained)], rtol=1e-10)


@pytest.mark.parametrize("center", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_the_svd_of_the_explicit_differences(dtype, center):
    states = walk(dtype=dtype)
    pca = trajectory_pca(states, k=4, center=center)
    assert_is_svd(pca, states, center)
    assert pca.coordinates.shape == (6, 4)
    assert pca.coordinates.dtype == pca.explained.dtype == np.float64
    # what the coordinates are relative to
    np.testing.assert_allclose(pca.coordinates.mean(0) if center else pca.coordinates[-1], 0, atol=1e-12)
    expected = torch.float64 if dtype == torch.float64 else torch.float32
    assert all(tensor.dtype == expected for tensor in pca.direction(0).values())
    assert {name: tensor.shape for name, tensor in pca.direction(0).items()} == {k: (*v,) for k, v in SHAPES.items()}


def test_a_trajectory_in_a_plane():
    generator = torch.Generator().manual_seed(1)
    basis, _ = torch.linalg.qr(torch.randn(80, 2, generator=generator, dtype=torch.float64))
    end = torch.randn(80, generator=generator, dtype=torch.float64)
    # decreasing steps along the first axis, and a swing without mean along the second
    planted = np.array([[8, 1], [6, -2], [4, 0], [2, 2], [1, -1], [0, 0]], dtype=np.float64)
    states = [{"w": (end + basis @ torch.from_numpy(point)).view(8, 10)} for point in planted]
    pca = trajectory_pca(states, k=2)
    assert pca.explained.sum() == pytest.approx(1)
    found = torch.stack([pca.direction(i)["w"].flatten() for i in range(2)], dim=1)
    # the same plane, and the same points in it
    torch.testing.assert_close(found @ (found.T @ basis), basis)
    np.testing.assert_allclose(pca.coordinates @ (found.T @ basis).numpy(), planted, atol=1e-12)
    with pytest.raises(ValueError, match="these 6 checkpoints span 2 components; take k=2"):
        trajectory_pca(states, k=3)


def saved(states, folder):
    """The same checkpoints as files, as folders, as folders of shards, as lists of files."""
    files, folders, sharded, lists = [], [], [], []
    for t, state in enumerate(states):
        whole, parts = folder / f"whole-{t}", folder / f"parts-{t}"
        whole.mkdir()
        parts.mkdir()
        save_file(state, whole / "model.safetensors")
        names = list(state)
        shards = {"b.safetensors": names[:2], "a.safetensors": names[2:]}
        for file, own in shards.items():
            save_file({name: state[name] for name in own}, parts / file)
        index = {"weight_map": {name: file for file, own in shards.items() for name in own}}
        (parts / "model.safetensors.index.json").write_text(json.dumps(index))
        files.append(str(whole / "model.safetensors"))
        folders.append(whole)
        sharded.append(parts)
        lists.append([parts / file for file in shards])
    return {"files": files, "folders": folders, "sharded": sharded, "lists": lists, "states": states}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_state_dicts_and_files_give_the_same(tmp_path, dtype):
    forms = saved(walk(dtype=dtype), tmp_path)
    forms["mixed"] = [form[t] for t, form in enumerate([*forms.values(), forms["files"]])]
    names = list(SHAPES)
    expected = trajectory_pca(forms["states"], k=3, names=names)
    for form, checkpoints in forms.items():
        pca = trajectory_pca(checkpoints, k=3, names=names)
        # the names' order is that of the last checkpoint, and sums depend on it in the last digits
        np.testing.assert_allclose(pca.coordinates, expected.coordinates, rtol=1e-12, atol=1e-12, err_msg=form)
        np.testing.assert_allclose(pca.explained, expected.explained, rtol=1e-12, err_msg=form)
        for name, tensor in expected.direction(1).items():
            torch.testing.assert_close(pca.direction(1)[name], tensor, rtol=1e-6, atol=1e-7)


def test_blocks_are_small_and_cover_every_number_once():
    for shape in [(), (0, 4), (7,), (10, 3), (3, 4, 5), (2, 3, 50)]:
        for limit in (1, 4, 16, 1000):
            counts = torch.zeros(shape)
            for at in trajectory._blocks(shape, limit):
                counts[at] += 1
                assert counts[at].numel() <= limit
            assert (counts == 1).all(), (shape, limit)


def test_files_are_read_in_blocks_each_number_once(tmp_path, monkeypatch):
    states = walk()
    forms, read = saved(states, tmp_path), []
    plain_read = trajectory._Files.read_into

    def spied_read(files, piece, raw):
        plain_read(files, piece, raw)
        read.append((files.label, piece.name, *range(piece.start, piece.start + piece.numel)))

    monkeypatch.setattr(trajectory, "BLOCK", 96)
    monkeypatch.setattr(trajectory, "TOGETHER", 2)
    monkeypatch.setattr(trajectory._Files, "read_into", spied_read)
    pca = trajectory_pca(forms["files"], k=3, names=list(SHAPES))
    numbers = [(label, name, i) for label, name, *indices in read for i in indices]
    assert len(set(numbers)) == len(numbers) == 6 * len(flat(states[0]))
    assert max(len(indices) for _, _, *indices in read) <= 96 // 6
    states = [{name: state[name] for name in pca.direction(0)} for state in states]
    assert_is_svd(pca, states)


def test_the_number_of_threads_changes_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(trajectory, "BLOCK", 96)
    monkeypatch.setattr(trajectory, "TOGETHER", 2)
    files, before, found = saved(walk(), tmp_path)["files"], torch.get_num_threads(), []
    for threads in (1, 3):
        torch.set_num_threads(threads)
        found.append(trajectory_pca(files, k=3))
        assert torch.get_num_threads() == threads
    torch.set_num_threads(before)
    np.testing.assert_array_equal(found[0].coordinates, found[1].coordinates)
    for name, tensor in found[0].direction(2).items():
        assert torch.equal(tensor, found[1].direction(2)[name])


def test_names_tied_weights_and_what_has_no_fraction(tmp_path):
    states = walk()
    some = trajectory_pca(states, k=2, names=["bias", "embed"])
    assert list(some.direction(0)) == ["embed", "bias"]
    assert_is_svd(some, [{name: state[name] for name in ("embed", "bias")} for state in states])
    for state in states:
        state["support"] = torch.arange(5)
        state["tied"] = state["embed"]
    assert trajectory_pca(states).direction(0).keys() == SHAPES.keys()
    models = [gpt2(seed) for seed in range(3)]
    direction = trajectory_pca([model.state_dict() for model in models]).direction(0)
    assert direction.keys() == dict(models[0].named_parameters()).keys()
    states[2]["support"] = torch.arange(5).flip(0)
    with pytest.raises(ValueError, match=r"support differs between checkpoint 2 and checkpoint 5 .* dense forms"):
        trajectory_pca(states)
    with pytest.raises(ValueError, match=r"support is torch\.int64 in checkpoint 0: name floating"):
        trajectory_pca([states[0], states[1]], k=1, names=["bias", "support"])
    with pytest.raises(ValueError, match="checkpoint 0 has no head: names are those of its state dict"):
        trajectory_pca(states, names=["head"])
    with pytest.raises(ValueError, match="checkpoint 1 holds no floating tensor to take"):
        trajectory_pca([{"support": torch.arange(5)}] * 2, k=1)


def test_a_component_is_a_direction_of_the_landscape():
    models = [llama(seed) for seed in range(3)]
    pca = trajectory_pca([weights(model) for model in models])
    direction = pca.direction(0)
    assert sum(tensor.double().square().sum().item() for tensor in direction.values()) == pytest.approx(1)
    # all of the way in two steps: the first checkpoint lies at its coordinates from the last one
    moved = weights(models[2])
    for i in range(2):
        for name, tensor in pca.direction(i).items():
            moved[name] += pca.coordinates[0, i] * tensor
    for name, tensor in weights(models[0]).items():
        torch.testing.assert_close(moved[name], tensor, rtol=1e-4, atol=1e-6)
    ids = torch.arange(8)[None]
    curve = loss_curve(models[2], lambda m: m(input_ids=ids, labels=ids).loss.item(), direction, [-1.0, 0.0, 1.0])
    assert np.isfinite(curve.loss).all()


def test_too_few_checkpoints_too_many_components_and_no_way_at_all():
    states = walk()
    for checkpoints in ([], states[:1]):
        with pytest.raises(ValueError, match=f"{len(checkpoints)} checkpoints: a trajectory takes two or more"):
            trajectory_pca(checkpoints)
    for k in (0, 6):
        with pytest.raises(ValueError, match=f"k={k}: 6 checkpoints span at most 5 components"):
            trajectory_pca(states, k=k)
    with pytest.raises(ValueError, match="all 3 checkpoints are the same"):
        trajectory_pca([states[0]] * 3)
    for i in (-1, 2):
        with pytest.raises(ValueError, match=f"direction {i}: there are 2, counted from 0"):
            trajectory_pca(states).direction(i)


def test_checkpoints_that_do_not_fit_are_named(tmp_path):
    states = walk()
    lacking = [dict(state) for state in states]
    del lacking[1]["bias"]
    with pytest.raises(ValueError, match="checkpoint 1 lacks bias"):
        trajectory_pca(lacking)
    with pytest.raises(ValueError, match=r"checkpoint 0 has the unknown bias"):
        trajectory_pca([states[0], lacking[1]], k=1)
    save_file({**states[1], "bias": torch.zeros(7)}, tmp_path / "other.safetensors")
    with pytest.raises(ValueError, match=r"checkpoint 0 \(.*other\.safetensors\) has another shape for bias"):
        trajectory_pca([tmp_path / "other.safetensors", *states])
    for t, value in ((0, torch.nan), (3, torch.inf), (5, torch.nan)):
        broken = [{name: tensor.clone() for name, tensor in state.items()} for state in states]
        broken[t]["experts"][1, 2, 3] = value
        with pytest.raises(ValueError, match=f"experts in checkpoint {t} holds NaN or infinity"):
            trajectory_pca(broken)


def test_files_that_cannot_be_read_are_named(tmp_path):
    states = walk()
    forms = saved(states, tmp_path)
    pca = trajectory_pca(forms["files"])
    path = tmp_path / "whole-2" / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-5])
    for action in (lambda: trajectory_pca(forms["files"]), lambda: pca.direction(0)):
        with pytest.raises(ValueError, match=r"checkpoint 2 .*whole-2.model\.safetensors cannot be read .* cut short"):
            action()
    path.unlink()
    with pytest.raises(ValueError, match=r"checkpoint 2 .*model\.safetensors cannot be read .* missing"):
        trajectory_pca(forms["files"])
    with pytest.raises(ValueError, match=r"checkpoint 2: .*whole-2 holds neither model\.safetensors nor"):
        trajectory_pca(forms["folders"])
    (tmp_path / "parts-4" / "a.safetensors").unlink()
    with pytest.raises(ValueError, match=r"checkpoint 4 .*a\.safetensors cannot be read"):
        trajectory_pca(forms["sharded"])
    with pytest.raises(ValueError, match="holds .* once more"):
        trajectory_pca([states[0], [forms["files"][0]] * 2], k=1)
    with pytest.raises(ValueError, match="checkpoint 1 is an empty list"):
        trajectory_pca([states[0], []], k=1)
