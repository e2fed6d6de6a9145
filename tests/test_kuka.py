"""Stacking with the Kuka arm, on made-up data: windows, masks, losses, resuming, guidance, rewards, episodes."""

import json
import re
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import tensorflow as tf

from diffusion_rl.cli import kuka
from diffusion_rl.core.errors import UserError
from diffusion_rl.core.noise import NoiseSource, initial_weights
from diffusion_rl.data.kuka import StackingDataset, read_trajectories
from diffusion_rl.envs.kuka import MODELS, KukaStacking
from diffusion_rl.interop.diffuser_checkpoint import stacking_weights
from diffusion_rl.interop.torch_checkpoint import write_pt
from diffusion_rl.interop.torch_names import load_state_dict, state_dict
from diffusion_rl.methods.diffuser.kuka import (
    LOOSE,
    STEP,
    MaskedDiffusion,
    StackClassification,
    StackGuide,
    StackingPlanner,
    StackingTrainer,
    known_states,
)
from diffusion_rl.methods.diffuser.kuka_episodes import StackingTraining, run_episode
from diffusion_rl.networks.layers import variables_of
from diffusion_rl.networks.stacking import MaskedTemporalUnet, StackClassifier
from diffusion_rl.tasks.kuka_stacking import PAIRS, STATE_DIM, Count, blocks_of, draw_task, stacked, standing
from diffusion_rl.training.checkpoint import load_checkpoint

H, D, T = 8, STATE_DIM, 5
DRAW = NoiseSource(5)
SIZE = ["--horizon", str(H), "--n_diffusion_steps", str(T), "--seed", "0"]
WIDTHS = ["--dim", "8", "--dim_mults", "(1,)"]
TRAIN = [*SIZE, "--batch_size", "4", "--n_train_steps", "6", "--save_freq", "3", "--n_saves", "2"]
CLASSIFIER = [*TRAIN, "--hidden_dims", "(8,)", "--time_dim", "8"]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Trajectories of 31, 700 and 12 frames: 16, 300 and 6 of them are used."""
    folder = tmp_path_factory.mktemp("kuka_dataset")
    for name, length in (("b", 700), ("a", 31), ("c", 12)):
        states = DRAW.uniform((length, D), -2, 3, np.float64)
        states[:, 20] = 0.5  # the same everywhere
        np.save(folder / f"{name}.npy", states)
    return folder


@pytest.fixture(scope="module")
def dataset(data):
    return StackingDataset(read_trajectories(data), H)


# ---------- data ----------


def test_windows_are_whole_and_inside_their_trajectories(data, dataset):
    assert dataset.path_lengths.tolist() == [16, 300, 6]
    assert len(dataset) == 9 + 293
    states = np.load(data / "b.npy")[::2]
    window = dataset.trajectories(np.array([9 + 292]))[0]
    found = dataset.normalizers["observations"].unnormalize(window.astype(np.float64))
    np.testing.assert_allclose(found, states[292:300], atol=2e-5)


def test_the_range_is_that_of_the_data_padded_with_zeros(data, dataset):
    rows = np.concatenate(read_trajectories(data))
    low, high = np.minimum(rows.min(axis=0), 0), np.maximum(rows.max(axis=0), 0)
    first = dataset.trajectories(np.array([0]))[0]
    np.testing.assert_allclose(first, 2 * (rows[:H] - low) / (high - low + 1e-5) - 1, atol=1e-6)
    full = StackingDataset([rows[16:316]], H)  # no padding, so this column is constant
    assert full.normalizers["observations"].arrays["mins"][20] == 0.5
    np.testing.assert_array_equal(full.transitions[:-1, 20], -1)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (np.zeros((5, 7)), "trajectory is"),
        (np.zeros((0, D)), "trajectory is"),
        (np.array([{"a": 1}]), "no npy file of numbers"),
        (np.full((4, D), np.nan), "no numbers"),
        (b"", "no npy file of numbers"),
        (b"not numpy at all", "no npy file of numbers"),
    ],
)
def test_files_that_are_refused(tmp_path, content, message):
    if isinstance(content, bytes):
        (tmp_path / "a.npy").write_bytes(content)
    else:
        np.save(tmp_path / "a.npy", content, allow_pickle=True)
    with pytest.raises(UserError, match=message):
        read_trajectories(tmp_path)


def test_what_else_the_data_must_have(tmp_path, data):
    with pytest.raises(UserError, match="--data_dir"):
        read_trajectories(tmp_path)
    with pytest.raises(UserError, match="smaller --horizon"):
        StackingDataset(read_trajectories(data), 512)


# ---------- networks and losses ----------


def test_parameters():
    """As many as in the PyTorch code at its sizes."""
    zeros = SimpleNamespace(uniform=lambda shape, *_, dtype: np.zeros(shape, dtype))  # quicker than drawing them
    with initial_weights(zeros):
        networks = {68_096_807: MaskedTemporalUnet(128, D), 225_971: StackClassifier(D)}
    for count, network in networks.items():
        assert sum(v.shape.num_elements() for v in variables_of(network)) == count


def small_unet():
    return MaskedTemporalUnet(H, D, dim=8, dim_mults=(1,))


def diffusion(network, **options):
    return MaskedDiffusion(network, H, D, 0, T, **{"clip_denoised": True} | options)


def test_the_mask_matters_and_one_row_serves_all():
    network, x, t = small_unet(), tf.constant(DRAW.normal((2, H, D))), tf.constant([3])
    masks = tf.constant(known_states(H))
    assert masks.numpy()[:, [0, 1, -2, -1]].tolist() == [[1, 0, 0, 0], [0, 0, 0, 1], [1, 0, 0, 1]]
    one, other = (network(x, t, masks[i : i + 1]).numpy() for i in (0, 1))
    assert np.abs(one - other).max() > 1e-3
    every = network(x, tf.constant([3, 3]), tf.repeat(masks[:1], 2, axis=0))
    np.testing.assert_allclose(one, every, atol=1e-5)


def test_known_states_are_clean_and_have_no_noise():
    """The network below says 1 for every entry, so the error is 1 where the state is known, |1 - noise| elsewhere."""
    seen = []

    def network(x, t, mask):
        seen.append((x, mask))
        return tf.ones_like(x)

    model = diffusion(network)
    x, noise = (tf.constant(DRAW.normal((3, H, D))) for _ in range(2))
    mask, t = tf.constant(known_states(H)), tf.constant([0, 2, 4])
    loss, infos = model.loss(x, mask, t, noise)
    known = mask.numpy().astype(bool)
    error = np.where(known[..., None], 1, np.abs(1 - noise.numpy()))
    np.testing.assert_allclose(loss, error.mean(), rtol=1e-5)
    np.testing.assert_allclose(infos["unknown_error"], error[~known].mean(), rtol=1e-5)
    noisy = np.concatenate([each.numpy() for each, _ in seen])
    np.testing.assert_array_equal(noisy[known], x.numpy()[known])
    np.testing.assert_allclose(noisy[~known], model.q_sample(x, t, noise).numpy()[~known], rtol=1e-6)


def test_masks_are_drawn_and_belong_to_their_windows(dataset):
    trainer = StackingTrainer(diffusion(small_unet()), dataset, 1e-3, 0.9)
    given = []
    trainer.model.loss = lambda x, mask, t, noise: given.append((x.numpy(), mask.numpy()))
    trainer.loss(tf.constant([7 * 3 + 1, 10 * 3 + 2]), None, None)
    np.testing.assert_array_equal(given[0][0], dataset.trajectories(np.array([7, 10])))
    np.testing.assert_array_equal(given[0][1], known_states(H)[[1, 2]])


def test_the_classifier_learns_which_pairs_stand(dataset):
    """Zero logits cost log 2 each and find nothing; labels are those of the states before normalisation."""
    classifier = StackClassification(lambda x, t: tf.zeros([*x.shape[:2], 12]), H, D, 0, T)
    labels = tf.constant(dataset.labels[16 : 16 + 2 * H].reshape(2, H, 12), tf.float32)
    x = tf.zeros([2, H, D])
    loss, infos = classifier.loss(x, labels, tf.constant([0, 4]), tf.zeros_like(x))
    np.testing.assert_allclose(loss, np.log(2), rtol=1e-6)
    np.testing.assert_allclose(infos["accuracy"], 1 - labels.numpy().mean(), rtol=1e-6)
    assert infos["found"] == 0


# ---------- rewards ----------


def state(*blocks):
    """The first blocks at (x, y, z, attached); the others far from each other."""
    found = np.zeros(D)
    rest = [(5.0 * i, 0, 0, 0) for i in range(len(blocks), 4)]
    for i, (*position, attached) in enumerate((*blocks, *rest)):
        found[7 + 8 * i : 10 + 8 * i], found[14 + 8 * i] = position, attached
    return found


def test_what_counts_as_standing():
    assert standing(state((0, 0, 0.06, 0), (0.1, 0.1, 0, 0))) == [(0, 1)]
    assert standing(state((0, 0, 0.05, 0), (0, 0, 0, 0))) == []  # not higher by more than 5 cm
    assert standing(state((0, 0.2, 0.06, 0), (0, 0, 0, 0))) == []  # 20 cm apart
    assert standing(state((0, 0, 0.06, 1), (0, 0, 0, 0))) == []  # the upper one hangs
    assert standing(state((0, 0, 0.06, 0), (0, 0, 0, 1))) == []  # the lower one: the reference misses this
    labels = stacked(np.stack([state((0, 0, 0.01, 1), (0.09, 0, 0, 0)), state((0, 0, 0.01, 0), (0.1, 0, 0, 0))]))
    assert [PAIRS[i] for i in np.flatnonzero(labels[0])] == [(0, 1)] and not labels[1].any()


def test_a_tower_counts_the_blocks_below_its_top():
    two = state((0, 0, 0.06, 0), (0, 0, 0, 0))
    count = Count().after(two)
    assert count.total == 1 and count.next is None
    assert count.after(two) == count.after(state()) == count  # each pair once, and for good
    elsewhere = count.after(state((0, 0, 0, 0), (1, 0, 0, 0), (1, 0, 0.06, 0)))  # another pair is no higher tower
    assert elsewhere.total == 1
    four = state(*[(0, 0, 0.06 * i, 0) for i in range(4)])
    assert Count().after(four).total == 3


def test_wanted_pairs_count_in_their_order():
    count = Count(((2, 1), (0, 2), (3, 0)))
    assert count.next == (2, 1) and count.after(state((0, 0, 0.12, 0), (1, 0, 0, 0), (0, 0, 0, 0))).total == 0
    count = count.after(state((0, 0, 0.12, 1), (0, 0, 0, 0), (0, 0, 0.06, 0)))
    assert (count.total, count.next) == (1, (0, 2))
    tower = state((0, 0, 0.12, 0), (0, 0, 0, 0), (0, 0, 0.06, 0), (0, 0, 0.18, 0))
    count = count.after(tower)  # (0, 2) and then (3, 0), which is looked at later
    assert (count.total, count.next) == (3, (3, 0)) and count.after(tower) == count


def test_drawn_goals():
    noise = NoiseSource(1)
    for _ in range(20):
        tower = draw_task("conditional", noise).wanted
        assert len(tower) == 3 and all(a[0] == b[1] for a, b in zip(tower, tower[1:], strict=False))
        pairs = draw_task("rearrangement", noise).wanted
        tops, bottoms = zip(*pairs, strict=True)
        assert 2 <= len(pairs) <= 3 and len(set(tops)) == len(tops) and len(set(bottoms)) == len(bottoms)
        assert all(top not in bottoms[: i + 1] for i, top in enumerate(tops))
        assert Count(pairs, frozenset(pairs)).total == 3
    assert draw_task("unconditional", noise) == Count()


# ---------- guidance ----------


def classifier(x, t):
    """Logit of pair k: k + 1 times the sum of the state."""
    return tf.reduce_sum(x, axis=-1, keepdims=True) * tf.range(1.0, 13.0)


def test_the_gradient_of_the_guide():
    """Block 3 upon block 1 is pair 10, whose logit has the gradient 11 in every entry of the second half."""
    x = tf.constant(DRAW.normal((2, H, D)))
    gradient = StackGuide(classifier, 3, 1).gradient(x, tf.constant([2])).numpy()
    half, moved = H // 2, np.zeros((2, H, 8))
    moved[:, half:] = 11
    apart = blocks_of(x.numpy())[:, half:, 3, :2] - blocks_of(x.numpy())[:, half:, 1, :2]
    moved[:, half:, :2] -= 0.1 * np.sign(apart) / (2 * half)
    blocks = blocks_of(gradient)
    np.testing.assert_allclose(blocks[:, :, 3], moved, rtol=1e-5)
    np.testing.assert_array_equal(blocks[:, :, :3, :7], 0)
    np.testing.assert_allclose(blocks[:, :, :3, 7], LOOSE)
    np.testing.assert_array_equal(gradient[:, :half, :7], 0)
    np.testing.assert_allclose(gradient[:, half:, :7], 11)


def test_pairs_have_the_numbers_of_the_labels():
    x = tf.ones([1, H, D])
    for k, pair in enumerate(PAIRS):
        np.testing.assert_allclose(StackGuide(classifier, *pair).score(x, None), [(k + 1) * D * H // 2])


def test_a_guided_step():
    model, x, t = diffusion(small_unet()), tf.constant(DRAW.normal((2, H, D))), tf.constant([3])
    guide, mask = StackGuide(classifier, 0, 2), tf.constant(known_states(H)[:1])
    plain, _, log_variance = model.p_mean_variance(x, t, mask)
    moved = model.guided_by(guide).p_mean_variance(x, t, mask)[0]
    expected = STEP * np.sqrt(model.schedule.ddpm_var[3]) * guide.gradient(x, t).numpy()
    np.testing.assert_allclose(moved - plain, expected, rtol=1e-3, atol=1e-5)
    assert model.guide is None and log_variance.shape == (1, 1, 1)


def test_plans_begin_where_the_arm_is(dataset):
    planner = StackingPlanner(diffusion(small_unet()), dataset.normalizers["observations"], classifier)
    now = np.array(read_states(dataset)[3])
    one, other = (planner.plan(now, pair, NoiseSource(2)) for pair in ((0, 1), (2, 3)))
    for plan in (one, other):
        assert plan.shape == (H, D)
        np.testing.assert_allclose(plan[0], now, atol=1e-4)
    assert np.abs(one - other).max() > 1e-3


def read_states(dataset):
    return dataset.normalizers["observations"].unnormalize(dataset.transitions.astype(np.float64))


# ---------- commands ----------


class Kept(StackingTraining):
    """Training that can be gone on with after its command has ended, without another compilation."""

    last = None

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        Kept.last = self


@pytest.fixture(scope="module")
def trained(data, tmp_path_factory):
    """Both models after six steps."""
    logs = tmp_path_factory.mktemp("logs")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kuka, "StackingTraining", Kept)
        kuka.train([*TRAIN, *WIDTHS, "--data_dir", str(data), "--logbase", str(logs)])
    kuka.train_classifier([*CLASSIFIER, "--data_dir", str(data), "--logbase", str(logs)])
    return logs


def again(folder, train):
    """Train the last two of six steps again; the checkpoint at the end is the same."""
    last = folder / "state_6.safetensors"
    before, start = load_checkpoint(last), load_checkpoint(folder / "state_3.safetensors")
    last.unlink()
    train(start)
    after = load_checkpoint(last)
    assert (start.metadata["step"], after.metadata["step"]) == (4, 6)
    assert before.metadata["train"] == after.metadata["train"] != start.metadata["train"]
    for name, value in before.tensors.items():
        np.testing.assert_array_equal(value, after.tensors[name], name)
    assert any(not np.array_equal(value, start.tensors[name]) for name, value in after.tensors.items())


@pytest.mark.slow
def test_a_restored_training_ends_alike(trained):
    def train(start):
        Kept.last.run_dir.settings["resume"] = "3"
        Kept.last.run()

    again(trained / "kuka" / "diffusion" / f"H{H}_T{T}", train)


def test_a_resumed_command_ends_alike(data, trained, capsys):
    arguments = [*CLASSIFIER, "--data_dir", str(data), "--logbase", str(trained)]
    with pytest.raises(UserError, match="--resume True"):
        kuka.train_classifier(arguments)
    folder = trained / "kuka" / "classifier" / f"H{H}_T{T}"
    again(folder, lambda start: kuka.train_classifier([*arguments, "--resume", "True"]))
    assert "resuming" in capsys.readouterr().out


class Follows:
    """An environment in which everything is at once where it is commanded to be."""

    def __init__(self, urdf_dir):
        self.closed = False

    def reset(self, noise):
        return np.zeros(D)

    def step(self, command):
        return command

    def release(self):
        return state(*[(0, 0, 0.06 * i, 0) for i in range(4)])

    def close(self):
        self.closed = True


@pytest.mark.parametrize("task", ["unconditional", "rearrangement"])
def test_episodes(trained, monkeypatch, task):
    monkeypatch.setattr(kuka, "KukaStacking", Follows)
    options = ["--task", task, "--n_episodes", "2", "--n_plans", "2", "--logbase", str(trained)]
    kuka.plan([*SIZE, *options])
    folder = trained / "kuka" / "plans" / f"{task}_H{H}_T{T}"
    second = json.loads((folder / "0-1" / "rollout.json").read_text())
    assert second["score"] == second["return"] / 3 and second["epoch_diffusion"] == 6
    assert ("epoch_classifier" in second) == (task == "rearrangement")
    assert np.load(folder / "0" / "states.npy").shape == (1 + 2 * H, D) and second["step"] == 2 * H
    if task == "unconditional":
        assert second["score"] == 1  # by the tower of `release`


def test_what_the_command_refuses(trained):
    with pytest.raises(UserError, match="choose one of unconditional"):
        kuka.plan(["--task", "anything"])


def test_weights_of_the_pytorch_code(tmp_path):
    """Names and shapes of its file: attention of two-dimensional convolutions, and one place less in every level."""
    network, other = (MaskedTemporalUnet(H, D, dim=8, dim_mults=(1, 2)) for _ in range(2))
    theirs = {"betas": np.zeros(T, np.float32)}
    for name, value in state_dict(network).items():
        value = value[..., None] if ".attn.fn." in name and value.ndim == 3 else value
        theirs["denoise_fn." + re.sub(r"^((?:downs|ups)\.\d+\.)3\.conv", r"\g<1>2.conv", name)] = value
    write_pt(tmp_path / "model-650.pt", {"step": 650_000, "model": theirs, "ema": theirs})
    model = diffusion(other)
    load_state_dict(model, stacking_weights(tmp_path / "model-650.pt", T))
    for one, two in zip(variables_of(network), variables_of(other), strict=True):
        np.testing.assert_array_equal(one, two)
    with pytest.raises(UserError, match="--n_diffusion_steps 5"):
        stacking_weights(tmp_path / "model-650.pt", 1000)


# ---------- PyBullet ----------


def test_what_the_simulator_needs(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pybullet", None)
    with pytest.raises(UserError, match=r"pip install -e '.\[kuka\]'"):
        KukaStacking(tmp_path)
    monkeypatch.setitem(sys.modules, "pybullet", object())
    with pytest.raises(UserError, match="--urdf_dir names"):
        KukaStacking(None)
    with pytest.raises(UserError, match="no model .*point --urdf_dir"):
        KukaStacking(tmp_path)


def box(name, size, mass):
    parts = "".join(f'<{part}><geometry><box size="{size}"/></geometry></{part}>' for part in ("visual", "collision"))
    inertia = '<inertia ixx="1e-3" ixy="0" ixz="0" iyy="1e-3" iyz="0" izz="1e-3"/>'
    return f'<link name="{name}"><inertial><mass value="{mass}"/>{inertia}</inertial>{parts}</link>'


@pytest.fixture
def models(tmp_path):
    """An arm of seven joints one above the other, with links before and behind, a block and a floor below z = 0."""
    kinds = ["fixed", *["revolute"] * 7, "fixed"]
    joints = "".join(
        f'<joint name="j{i}" type="{kind}"><parent link="l{i}"/><child link="l{i + 1}"/><origin xyz="0 0 0.1"/>'
        '<axis xyz="0 0 1"/><limit lower="-3" upper="3" effort="300" velocity="10"/></joint>'
        for i, kind in enumerate(kinds)
    )
    links = "".join(box(f"l{i}", "0.02 0.02 0.02", 1) for i in range(len(kinds) + 1))
    contents = {
        "arm": f'<robot name="arm">{links}{joints}</robot>',
        "block": f'<robot name="block">{box("base", "0.2 0.2 0.06", 0.068)}</robot>',
        "floor": f'<robot name="floor">{box("base", "2 2 0.1", 1)}</robot>',
    }
    for part, text in contents.items():
        (tmp_path / MODELS[part]).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / MODELS[part]).write_text(text)
    return tmp_path


def test_the_simulator(models):
    pytest.importorskip("pybullet")
    env = KukaStacking(models)
    start = env.reset(NoiseSource(0))
    blocks = blocks_of(start)
    np.testing.assert_allclose(np.linalg.norm(blocks[:, :2], axis=1), 0.6)
    np.testing.assert_allclose(blocks[:, 2], 0.08, atol=5e-3)  # the floor's middle is in z = 0
    assert not blocks[:, 7].any() and not start[:7].any()
    command = start.copy()
    command[:7], command[14] = -0.1, 1  # seven joints turn by -0.1 rad, and block 0 hangs on the arm
    for _ in range(40):
        now = env.step(command)
    np.testing.assert_allclose(now[:7], -0.1, atol=2e-2)
    angle = [np.arctan2(*each[0, 1::-1]) for each in (blocks_of(start), blocks_of(now))]
    np.testing.assert_allclose((angle[1] - angle[0] + np.pi) % (2 * np.pi) - np.pi, -0.7, atol=0.1)
    np.testing.assert_allclose(blocks_of(now)[1:], blocks[1:], atol=5e-3)
    assert now[14] == 1 and env.release()[14] == 0 and env.held
    again = env.reset(NoiseSource(0))
    np.testing.assert_allclose(again, start, atol=1e-6)
    assert not env.held
    env.close()


def test_an_episode_in_the_simulator(models):
    """Every plan turns the arm by 0.02 rad a state: it comes after, and the next plan begins where it is."""
    pytest.importorskip("pybullet")
    seen = []

    def plan(now, pair, noise):
        seen.append(now)
        return now + 0.02 * np.arange(H)[:, None] * (np.arange(D) < 7)

    episode = run_episode(SimpleNamespace(plan=plan), KukaStacking(models), Count(), NoiseSource(0), 2)
    assert episode.states.shape == (1 + 2 * H, D) and episode.count == Count()
    np.testing.assert_array_equal(seen, episode.states[[0, H]])
    assert (np.diff(episode.states[:, :7].mean(axis=1))[[1, 3, 5, 10, 12]] > 0.005).all()
