"""The off-policy loop: the replay buffer, updates compiled together, and resuming, for every algorithm."""

import shutil
from pathlib import Path

import numpy as np
import pytest
import tensorflow as tf
from tests.small_runs import assert_same_checkpoint, make_base_policy, make_data, rows, states

from diffusion_rl.cli import app
from diffusion_rl.config.compose import compose
from diffusion_rl.config.instantiate import find_class, instantiate
from diffusion_rl.core.keras import precision
from diffusion_rl.core.noise import NoiseSource, initial_weights
from diffusion_rl.core.precision import backward_in
from diffusion_rl.data.replay import ReplayBuffer, fields
from diffusion_rl.interop.torch_names import state_dict
from diffusion_rl.methods.off_policy import learner as learner_module
from diffusion_rl.methods.off_policy.algorithm import Phase
from diffusion_rl.methods.off_policy.buffers import Buffers, Rows
from diffusion_rl.methods.off_policy.dql import DQL
from diffusion_rl.methods.off_policy.learner import Learner
from diffusion_rl.networks.critics import CriticObsAct
from diffusion_rl.networks.flow import FlowMLP
from diffusion_rl.networks.layers import variables_of
from diffusion_rl.networks.mlp import DiffusionMLP
from diffusion_rl.policies.flow import FlowPolicy
from diffusion_rl.training.checkpoint import load_checkpoint, save_checkpoint
from diffusion_rl.training.policy_files import policy_facts
from diffusion_rl.training.rollout import Rollout, RunningEpisodes

FIELDS = ("obs", "actions", "next_obs", "rewards", "terminated")
CHUNKS = [
    *("env.n_envs=3", "env.max_episode_steps=24", "++env.threads=1", "denoising_steps=3", "+tensorboard=false"),
    *("train.n_steps=12", "train.batch_size=12", "train.val_freq=3", "train.n_train_itr=4"),
    *("train.save_model_freq=1",),
]
SMALL = "mlp_dims=[16,16,16]"
REPLAYED = ["train.replay_ratio=1", "train.n_critic_warmup_itr=2", f"model.actor.{SMALL}", f"model.critic.{SMALL}"]
STEPS = [
    *("env.max_episode_steps=2", "++env.threads=1", "+tensorboard=false", "train.batch_size=8", "train.log_freq=2"),
    *("model.actor.mlp_dims=[16,16]", "model.critic.mlp_dims=[16,16]", "train.n_eval_episode=1"),
    *("train.n_train_itr=14", "train.save_model_freq=1", "train.val_freq=5", "train.buffer_size=1000"),
]
STEERED = [
    *(o for o in STEPS if not o.startswith("model.actor")),
    *(f"model.network.{SMALL}", "model.noise_actor.mlp_dims=[16,16]", "env.n_envs=2", "train.n_explore_steps=3"),
    *("train.num_update=2", "train.noise_critic_num_update=2"),
]
FLOWS = [
    *(o for o in STEPS if not o.startswith("model.actor")),
    *("model.flow.mlp_dims=[16,16]", "model.flow_steps=2", "train.num_update=2"),
]
ONE_STEP = ["model.actor.mlp_dims=[16,16]"]
HOPPER, CHEETAH = "gym/finetune/hopper-v2", "gym/finetune/halfcheetah-v2"
# configuration -> overrides; a buffer of 40 rows overflows
RUNS = {
    f"{HOPPER}/ft_rwr_diffusion_mlp": [*CHUNKS, f"model.network.{SMALL}", "train.update_epochs=2"],
    f"{HOPPER}/ft_awr_diffusion_mlp": [*CHUNKS, *REPLAYED, "train.critic_update_ratio=2", "train.buffer_size=14"],
    f"{HOPPER}/ft_dipo_diffusion_mlp": [*CHUNKS, *REPLAYED, "train.buffer_size=40"],
    f"{HOPPER}/ft_idql_diffusion_mlp": [
        *(o for o in (*CHUNKS, *REPLAYED) if not o.startswith("model.critic.")),
        *(f"model.critic_q.{SMALL}", f"model.critic_v.{SMALL}", "train.buffer_size=14", "train.eval_sample_num=3"),
    ],
    f"{HOPPER}/ft_dql_diffusion_mlp": [*CHUNKS, *REPLAYED, "train.buffer_size=40", "+train.max_grad_norm=1"],
    f"{HOPPER}/ft_qsm_diffusion_mlp": [*CHUNKS, *REPLAYED, "train.buffer_size=14"],
    f"{HOPPER}/ft_dacer_mlp": [
        *(*CHUNKS, *REPLAYED, "train.n_critic_warmup_itr=1", "train.buffer_size=14", "train.batch_size=6"),
        *("train.temperature_interval=12", "train.entropy_states=2", "train.entropy_samples=20"),
    ],
    "gym/scratch/halfcheetah-v2/sac_mlp": [*STEPS, "train.n_explore_steps=9", "train.actor_replay_ratio=4"],
    "gym/scratch/halfcheetah-v2/rlpd_mlp": [
        *(*STEPS, "train.n_explore_steps=2", "model.n_critics=3", "train.critic_num_update=2"),
    ],
    f"{CHEETAH}/ibrl_mlp": [*STEPS, "++model.actor.dropout=0.5", "++model.actor.residual_style=false"],
    "gym/pretrain/halfcheetah-medium-v2/calql_mlp_offline": [*STEPS, "train.n_train_itr=4", "train.num_update=3"],
    f"{CHEETAH}/calql_mlp_online": [*STEPS, "train.n_train_itr=4", "train.val_freq=3"],
    f"{HOPPER}/ft_dsrl_diffusion_mlp": [*STEERED, "denoising_steps=3", "ddim_steps=3"],
    f"{HOPPER}/ft_dsrl_reflow_mlp": [*STEERED, "model.noise_aliased=false", "+model.backup_entropy=false"],
    "gym/pretrain/halfcheetah-medium-v2/fql_mlp_offline": [*FLOWS, *ONE_STEP, "train.n_train_itr=4"],
    f"{CHEETAH}/qc_fql_mlp_online": [*FLOWS, *ONE_STEP, "+model.q_agg=min", "+model.normalize_q_loss=true"],
    f"{CHEETAH}/qc_mlp_online": [*FLOWS, "model.n_candidates=3"],
}


def overrides(name: str, folder: Path) -> list[str]:
    """Those of `RUNS`, with the files that the run starts from."""
    given = [*RUNS[name]]
    if "dsrl_reflow" in name:
        given.append(f"base_policy_path={make_flow(folder / 'base.safetensors')}")
    elif name.startswith(HOPPER):
        base = folder / "base.safetensors"
        given.append(f"base_policy_path={make_base_policy(base, 'denoising_steps=3', f'model.network.{SMALL}')}")
    elif not name.endswith("sac_mlp"):
        given.append(f"offline_dataset_path={make_data(folder / 'demonstrations.npz', 17, 6)}")
    if name.endswith(("ibrl_mlp", "_online")):
        cfg = prepared(name, folder, *given, "base_policy_path=none")
        with initial_weights(NoiseSource(5)):
            policy = instantiate({**cfg.model, "network_path": None})
        weights = {f"model.{k}": v for k, v in state_dict(policy).items()}
        path = folder / "base.safetensors"
        save_checkpoint(path, weights, {"kind": policy.KIND, **policy_facts(policy)})
        given.append(f"base_policy_path={path}")
    return given


def make_flow(path: Path) -> Path:
    """Writes a flow of random weights, for Hopper."""
    network = FlowMLP(horizon_steps=4, action_dim=3, cond_dim=11, mlp_dims=[16, 16, 16], residual_style=True)
    policy = FlowPolicy(network, 4, 11, 3)
    weights = {f"model.{name}": value for name, value in state_dict(policy).items()}
    save_checkpoint(path, weights, {"kind": policy.KIND, **policy_facts(policy)})
    return path


def prepared(name: str, logdir: Path, *given: str):
    composed = compose(name, [*given, f"logdir={logdir}"])
    del composed.hydra
    return app.prepare(composed)


def run(name: str, logdir: Path, *given: str):
    """The loop, built and run to its end."""
    cfg = prepared(name, logdir, *given)
    built = find_class(cfg._target_)(cfg)
    built.run()
    return built


QUICK = ("ft_awr_diffusion_mlp",)  # tests/test_engine.py goes through RLPD


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, id=short, marks=() if short in QUICK else pytest.mark.slow)
        for name, short in ((name, name.rsplit("/", 1)[1]) for name in RUNS)
    ],
)
def test_resumed_equals_never_stopped(tmp_path, name):
    given = overrides(name, tmp_path)
    whole, halves = tmp_path / "whole", tmp_path / "halves"
    loop = run(name, whole, *given)
    last = loop.itr - 1
    between = last - 2
    shutil.copytree(whole, halves)
    for path in (halves / "checkpoint").iterdir():
        if int(path.stem.removeprefix("state_")) > between:
            path.unlink()
    run(name, halves, *given, "resume=auto")
    assert rows(halves) == rows(whole)
    assert states(halves) == states(whole)
    one, two = (folder / "checkpoint" / f"state_{last}.safetensors" for folder in (whole, halves))
    assert_same_checkpoint(one, two)
    tensors = load_checkpoint(one).tensors
    for part in loop.trainer.parts:  # everything was trained
        assert tensors[f"optimizer.{part}.step"] > 0, part
    kinds = {row["kind"] for row in rows(whole)}
    assert kinds == {"train", "eval"}, kinds


def test_training_returns_of_steps_are_of_the_episodes_that_ended_since_the_last_row(tmp_path):
    """Iterations of one step, two environments; an evaluation cuts off what is under way, whose end does not count."""
    name, seen = "gym/scratch/halfcheetah-v2/sac_mlp", []
    given = [*RUNS[name], "env.max_episode_steps=3", "env.n_envs=2", "train.n_train_itr=24", "train.log_freq=7"]
    cfg = prepared(name, tmp_path, *given, "+train.fast=false", "train.val_freq=10")
    find_class(cfg._target_)(cfg, observer=seen.append).run()
    running, ended, expected = None, [], {}
    for step in seen:
        if step["eval_mode"]:
            running = None
            continue
        if step["firsts_trajs"][0].all():
            running = np.zeros(2)
        if running is not None:
            running = running + step["reward_trajs"][0]
            ended += list(running) if step["firsts_trajs"][1].all() else []
        if step["itr"] % 7 == 0:
            expected[step["itr"]], ended = ended, []
    told = {row["itr"]: row for row in rows(tmp_path) if row["kind"] == "train"}
    assert told.keys() == expected.keys() and [len(returns) for returns in expected.values()] == [0, 4, 4, 4]
    for itr, returns in expected.items():
        assert told[itr]["episodes"] == len(returns)
        assert told[itr]["episode_return"] == (pytest.approx(np.mean(returns)) if returns else None)


def test_running_episodes_by_hand():
    """Two environments; the first ends after 1 + 2 + 3, the second was not seen from its beginning, then 4 + 5 ends."""
    episodes = RunningEpisodes(2)

    def step(rewards, before, after):
        one = Rollout({}, {}, np.array([rewards]), np.zeros((1, 2)), np.array([before, after]))
        episodes.add(one)

    step([1.0, 7.0], [1, 0], [0, 1])
    step([2.0, 4.0], [0, 1], [0, 0])
    assert episodes.statistics(1, 0).n_episodes == 0
    again = RunningEpisodes(2)
    again.restore(episodes.state())
    step([3.0, 5.0], [0, 0], [1, 1])
    found = episodes.statistics(2, 1.6)
    assert found.returns.tolist() == [6, 9] and found.mean_return == 7.5
    assert found.mean_best_reward == (1.5 + 2.5) / 2 and found.success_rate == 0.5
    episodes.clear()
    step([8.0, 8.0], [1, 1], [1, 0])  # an episode of a single chunk
    episodes.interrupt()
    step([1.0, 1.0], [0, 0], [1, 1])  # not seen from their beginnings
    assert episodes.statistics(1, 0).n_episodes == 0
    assert again.state()["running"].tolist() == [[3, 2, 2], [4, 4, 1]]


def test_running_episodes_that_say_whether_they_succeeded():
    """The first of two environments says so in its first episode's second chunk; the rewards tell nothing."""
    episodes = RunningEpisodes(2)

    def step(said, before, after):
        one = Rollout({}, {}, np.zeros((1, 2)), np.zeros((1, 2)), np.array([before, after]))
        one.successes = None if said is None else np.array([said])
        episodes.add(one)

    assert set(episodes.state()) == {"running", "whole", "ended"}
    step(None, [1, 1], [0, 0])  # not every chunk need say anything
    step([True, False], [0, 0], [0, 0])
    again = RunningEpisodes(2)
    again.restore(episodes.state())
    for one in (episodes, again):
        episodes = one
        step([False, False], [0, 0], [1, 1])
        assert episodes.statistics(1, None).success_rate == 0.5 and episodes.statistics(1, 0).success_rate == 1
        episodes.clear()
        step(None, [1, 1], [0, 0])
        step([False, True], [0, 0], [1, 1])
        assert episodes.successes.tolist() == [False, True]


def small_dql(seed: int, width: int = 8) -> DQL:
    with initial_weights(NoiseSource(seed)):
        dims = [width] * 3
        actor = DiffusionMLP(2, 2, 3, time_dim=4, mlp_dims=dims, activation_type="ReLU", residual_style=True)
        critic = CriticObsAct(3, [8, 8], 2, 2)
    return DQL(actor, critic, horizon_steps=2, obs_dim=3, action_dim=2, denoising_steps=3, randn_clip_value=3)


def learned(fast: bool, n: int, batch_size: int = 5) -> tuple[dict, dict]:
    """Weights and losses of n DQL updates on drawn data."""
    schedule = {"first_cycle_steps": 10, "warmup_steps": 0, "min_lr": 1e-3}
    train = {"fast": fast, "gamma": 0.9, "eta": 1.0, "target_ema_rate": 0.1, "max_grad_norm": 0.1}
    train |= {"batch_size": batch_size}
    for part in ("actor", "critic"):
        train |= {f"{part}_lr": 1e-3, f"{part}_weight_decay": 0.01, f"{part}_lr_scheduler": schedule}
    with precision("float64"):
        model, noise = small_dql(1), NoiseSource(2)
        buffer = ReplayBuffer(9, fields(FIELDS, (1, 3), (2, 2)))
        shapes = {"obs": (9, 1, 3), "next_obs": (9, 1, 3), "actions": (9, 2, 2), "rewards": (9,), "terminated": (9,)}
        buffer.add(**{name: noise.normal(shape, np.float64) for name, shape in shapes.items()})
        buffer.flush()
        buffers = Buffers(buffer)
        learner = Learner(model, train, buffers)
        losses = learner.run(Phase(n), noise, Rows(buffers, noise, 1), lambda count, found: None)
        weights = state_dict(model)
        learner.run(Phase(n), noise, Rows(buffers, noise, 1), lambda count, found: None)
        (program,) = learner._programs.values()
        assert program.experimental_get_tracing_count() == 1
        return weights, losses


def test_updates_compiled_together_equal_plain_ones_one_by_one(monkeypatch):
    together = learned(fast=True, n=3)
    monkeypatch.setattr("diffusion_rl.methods.off_policy.learner.UPDATES_PER_CALL", 1)
    single = learned(fast=False, n=3)
    for ours, theirs in zip(together, single, strict=True):
        assert ours.keys() == theirs.keys()
        for name, value in ours.items():
            np.testing.assert_allclose(value, theirs[name], rtol=1e-9, atol=1e-11, err_msg=name)


def test_rows_dealt_to_cores_give_the_same_numbers_and_the_same_bits_again(monkeypatch):
    monkeypatch.setattr("diffusion_rl.core.batching.cores", lambda: 3)
    plain = learned(fast=False, n=2, batch_size=300)
    dealt, again = (learned(fast=True, n=2, batch_size=300) for _ in range(2))
    for ours, theirs, once_more in zip(dealt, plain, again, strict=True):
        for name, value in ours.items():
            np.testing.assert_allclose(value, theirs[name], rtol=1e-9, atol=1e-11, err_msg=name)
            np.testing.assert_array_equal(value, once_more[name], err_msg=name)


def test_in_half_precision_losses_and_gradients_are_near_and_single(monkeypatch):
    monkeypatch.setattr("diffusion_rl.core.precision.has_half_products", lambda: True)
    draws = NoiseSource(3)
    shapes = {"noise": (4, 20, 2, 2), "obs": (20, 1, 3), "denoising": (20, 2, 2)}
    given = {name: tf.constant(draws.normal(shape)) for name, shape in shapes.items()}
    t = tf.constant(draws.integers(0, 3, (20,)), tf.int32)

    def gradient(how):
        model = small_dql(1, width=128)
        model.fast = model.dealt = True
        variables = variables_of(model.actor)

        @tf.function
        def differentiated():
            with backward_in(how, forward=True), tf.GradientTape() as tape:
                loss = model.loss_actor(given["obs"], 1.0, 2, given["noise"], t, given["denoising"], tf.constant(0.7))
            return loss, tape.gradient(loss, variables)

        loss, grads = differentiated()
        assert loss.dtype == tf.float32 and all(grad.dtype == tf.float32 for grad in grads)
        return float(loss), np.concatenate([grad.numpy().ravel() for grad in grads])

    (loss, plain), (near, halved) = gradient("float32"), gradient("bfloat16")
    assert near == pytest.approx(loss, rel=1e-2) and not np.array_equal(plain, halved)
    assert plain @ halved / np.linalg.norm(plain) / np.linalg.norm(halved) > 0.999


def test_where_xla_multiplies_half_precision_changes_nothing_and_a_line_says_so(caplog):
    with caplog.at_level("WARNING"):
        assert learner_module._precision("bfloat16", xla=True) is None
    assert "changes nothing for this algorithm" in caplog.text
    assert learner_module._precision("bfloat16", xla=False) == "bfloat16"


def test_the_replay_buffer_overwrites_the_oldest():
    buffer = ReplayBuffer(4, fields(FIELDS, (1, 2), (1, 1)))
    for i in range(3):
        each = np.full(2, float(i))
        buffer.add(
            obs=each[:, None, None] * np.ones((1, 1, 2)),
            actions=each[:, None, None],
            next_obs=np.zeros((2, 1, 2)),
            rewards=each,
            terminated=each > 1,
        )
    assert buffer.read("rewards").tolist() == [1, 1, 2, 2] and buffer.size == 4
    found = buffer.at(tf.constant(buffer.places(np.array([3, 0]))))
    assert found.rewards.numpy().tolist() == [2, 1] and found.terminated.numpy().tolist() == [1, 0]
    assert found.obs.shape == (2, 1, 2) and found.returns is None
    again = ReplayBuffer(4, fields(FIELDS, (1, 2), (1, 1)))
    again.restore(buffer.tensors())
    buffer.write("rewards", np.array([7.0]))
    assert buffer.read("rewards").tolist() == [1, 1, 2, 7] and again.read("rewards").tolist() == [1, 1, 2, 2]


def test_draws_without_replacement_and_by_weight():
    noise = NoiseSource(0)
    assert sorted(noise.distinct(6, 6)) == list(range(6))
    chosen = np.stack([noise.choose(np.array([[0.0, 1.0, 3.0], [0.0, 0.0, 0.5]])) for _ in range(2000)])
    assert (chosen[:, 1] == 2).all() and not (chosen[:, 0] == 0).any()
    assert abs((chosen[:, 0] == 2).mean() - 0.75) < 0.04
