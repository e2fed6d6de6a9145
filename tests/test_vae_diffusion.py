"""VAE + Diffusion RL: networks, losses and what they may move, windows of the data, whole runs, resuming, evaluation.

Shapes: N agents, O observation, A action, H planned actions, Z latent.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import tensorflow as tf
from tests.small_runs import eagerly

from diffusion_rl.cli import vae
from diffusion_rl.core.errors import UserError
from diffusion_rl.core.keras import precision
from diffusion_rl.core.noise import NoiseSource, initial_weights
from diffusion_rl.data.agent_windows import AgentEpisodes, AgentNormalizer, VAESequenceDataset
from diffusion_rl.data.episodes import Episodes
from diffusion_rl.data.sources import agents
from diffusion_rl.envs.toy_agents import ToyAgentsVectorEnv, controller
from diffusion_rl.generate import agents as mpe
from diffusion_rl.generate.agents import toy_data
from diffusion_rl.methods.vae_latent.history import AgentHistoryEnv
from diffusion_rl.methods.vae_latent.model import Batch, Draws, LatentDiffusionRL, Sizes
from diffusion_rl.methods.vae_latent.training import METRICS, keep_returns
from diffusion_rl.networks.latent import ActionVAE, TrajectoryEncoder, kl_to_standard_normal
from diffusion_rl.networks.layers import variables_of
from diffusion_rl.training.checkpoint import save_checkpoint

SMALL = {
    "vae_latent_dim": 6,
    "vae_hidden_dim": 16,
    "trajectory_latent_dim": 8,
    "trajectory_hidden_dim": 16,
    "trajectory_layers": 1,
    "trajectory_heads": 2,
    "backbone_layers": 1,
    "backbone_hidden_dim": 16,
    "time_embed_dim": 16,
    "value_hidden_dim": 16,
    "n_diffusion_steps": 4,
    "n_ddim_steps": 2,
    "horizon": 2,
    "history_horizon": 2,
    "vae_pretrain_steps": 3,
    "n_train_steps": 12,
    "batch_size": 8,
    "gradient_accumulate_every": 1,
    "step_start_ema": 4,
    "update_ema_every": 2,
    "rl_warmup_steps": 4,
    "rl_collect_freq": 4,
    "rl_collect_steps": 6,
    "rl_num_envs": 3,
    "rl_update_freq": 2,
    "rl_batch_size": 5,
    "log_freq": 4,
    "save_freq": 4,
    "eval_freq": 12,
    "num_eval": 3,
    "num_envs": 2,
}
RNG = NoiseSource(7)


def settings(tmp_path="logs", **changes):
    return vae.settings({**SMALL, "logbase": str(tmp_path), **changes})


def algorithm(sizes, **changes):
    with initial_weights(NoiseSource(0)):
        return LatentDiffusionRL(settings(**changes), sizes)


def batch(sizes, rows=5, z=6, steps=2, **more):
    """A batch of noise and its draws."""
    n, h = sizes.n_agents, sizes.horizon
    actions = RNG.normal((rows, h, n * sizes.action_dim))
    found = Batch(RNG.normal((rows, sizes.steps, sizes.row)), actions, np.ones((rows, h, 1), np.float32), **more)
    shape = (rows, h, n * z)
    t, chain = RNG.integers(0, 4, (rows,)).astype(np.int32), (steps + 1, *shape)
    return found, Draws(t, RNG.normal(shape), RNG.normal(shape), None, RNG.normal(chain), RNG.normal(chain))


SIZES = Sizes(n_agents=3, obs_dim=5, action_dim=4, horizon=2, steps=3)


# ---------- networks ----------


def test_shapes_of_the_published_set_up():
    """24 steps of 3 agents in batches of 8, 4 actions, latents of 64; a past of 4 rows of 14."""
    vae, rows = ActionVAE(4, 64, 16), 8 * 24 * 3
    mean, log_variance = vae.encode(RNG.normal((rows, 4)))
    assert mean.shape == log_variance.shape == (rows, 64) and vae.decode(mean).shape == (rows, 4)
    past = RNG.normal((8, 4, 3, 14))
    for kind in ("transformer", "lstm", "gru"):
        encoder = TrajectoryEncoder(14, 4, latent_dim=12, hidden_dim=16, kind=kind)
        assert all(encoder(past[:, :, agent]).shape == (8, 12) for agent in range(3))


def test_kl_matches_the_closed_form_and_does_not_depend_on_the_batch():
    with precision("float64"):
        mean, log_variance = RNG.normal((4, 3), np.float64), RNG.normal((4, 3), np.float64)
    by_hand = [
        sum(0.5 * (m * m + np.exp(v) - 1 - v) for m, v in zip(*row, strict=True))
        for row in zip(mean, log_variance, strict=True)
    ]
    np.testing.assert_allclose(kl_to_standard_normal(mean, log_variance), by_hand, rtol=1e-12)
    a = algorithm(SIZES)
    found, draws = batch(SIZES)
    twice = Batch(*(None if x is None else np.concatenate([x, x]) for x in found))
    once, doubled = a.vae_losses(found, draws.vae_noise), a.vae_losses(twice, np.concatenate([draws.vae_noise] * 2))
    np.testing.assert_allclose(once, doubled, rtol=1e-5)


def test_the_recurrent_encoders_are_torchs():
    torch = pytest.importorskip("torch")
    x = RNG.normal((2, 5, 3), np.float64)
    for kind, theirs in (("lstm", torch.nn.LSTM), ("gru", torch.nn.GRU)):
        with precision("float64"):
            ours = TrajectoryEncoder(3, 5, latent_dim=2, hidden_dim=4, kind=kind, layers=2, heads=1)
        reference = theirs(3, 4, num_layers=2, bidirectional=True, batch_first=True).double()
        for number, layer in enumerate(ours.blocks):
            for direction, suffix in enumerate(("", "_reverse")):
                for part, linear in (("ih", layer.driven[direction]), ("hh", layer.hidden[direction])):
                    name = f"l{number}{suffix}"
                    getattr(reference, f"weight_{part}_{name}").data = torch.tensor(linear.kernel.numpy().T.copy())
                    getattr(reference, f"bias_{part}_{name}").data = torch.tensor(linear.bias.numpy())
        hidden = tf.constant(x)
        for layer in ours.blocks:
            hidden = layer(hidden)
        np.testing.assert_allclose(hidden, reference(torch.tensor(x))[0].detach().numpy(), atol=1e-12)


@pytest.mark.parametrize("centralised", [False, True])
def test_agents_are_interchangeable_and_see_each_other_only_when_centralised(centralised):
    a = algorithm(SIZES, decentralized_execution=not centralised)
    noise = RNG.normal((5, 1, 2, 3, 6))  # K+1, B, H, N, Z
    state = RNG.normal((1, 3, 3, 9))  # B, To, N, A+O

    def act(state, noise):
        drawn = noise.reshape(5, 1, 2, 18)
        latents = a.acting().sample({"state": tf.constant(state.reshape(1, 3, 27))}, drawn, deterministic=True)
        return a.decode(latents.trajectories).numpy().reshape(2, 3, 4)

    actions, order = act(state, noise), [2, 0, 1]
    np.testing.assert_allclose(act(state[:, :, order], noise[..., order, :]), actions[:, order], atol=1e-5)
    changed = state.copy()
    changed[:, :, 1] += 1
    differs = np.abs(act(changed, noise) - actions).max(axis=(0, 2)) > 1e-6
    assert differs.tolist() == ([True] * 3 if centralised else [False, True, False])


# ---------- losses ----------


@pytest.mark.parametrize("detached", [True, False])
def test_the_diffusion_loss_reaches_the_encoder_only_if_asked_to(detached):
    a = algorithm(SIZES, detach_latents=detached)
    found, draws = batch(SIZES)
    with tf.GradientTape() as tape:
        loss = a.diffusion_loss(found, draws)
    grads = tape.gradient(loss, variables_of(a.vae))
    assert all(g is None for g in grads) if detached else any(g is not None and np.abs(g).max() > 0 for g in grads)


def test_the_actor_climbs_q_through_the_sampler_and_q_stays():
    a = algorithm(SIZES, offline_rl=True)
    found, draws = batch(SIZES)
    with tf.GradientTape(persistent=True) as tape:
        latents = a.sampled(found.state, draws.sample_noise, a.policy.actor_ft)
        loss = a.q_policy_loss(found.state, latents)
    assert max(np.abs(g).max() for g in tape.gradient(loss, variables_of(a.policy.actor_ft)) if g is not None) > 0
    assert all(g is None or not np.any(g) for g in tape.gradient(loss, variables_of(a.q)))


def test_q_learning_looks_ahead_by_the_executed_actions():
    """With Q' = 0 everywhere the target is the reward: zero loss where Q says just that."""
    a = algorithm(SIZES, offline_rl=True)
    for variable in variables_of(a.q_target) + variables_of(a.q):
        variable.assign(tf.zeros_like(variable))
    one = np.ones((5, 1), np.float32)
    found, draws = batch(SIZES, rewards=3 * one, alive=one, next_state=RNG.normal((5, 3, 27)))
    np.testing.assert_allclose(a.q_loss(found, draws), 2 * 3.0**2, rtol=1e-6)


def test_dropout_of_returns_has_its_rate():
    kept = keep_returns(NoiseSource(0), 20_000, 0.1)
    assert kept.shape == (20_000, 1) and abs(kept.mean() - 0.9) < 0.01


def test_guidance_extrapolates_from_the_unconditional_noise():
    a = algorithm(SIZES, returns_condition=True, condition_guidance_w=2.0, test_ret=0.5)
    x, t, state = RNG.normal((4, 2, 18)), tf.constant([0, 1, 2, 3]), tf.constant(RNG.normal((4, 3, 27)))
    network, one = a.policy.actor_ft, tf.ones([4, 1])

    def told(keep):
        return network(x, t, {"state": state, "returns": 0.5 * one, "keep": keep * one})

    np.testing.assert_allclose(network(x, t, {"state": state}), told(0.0) + 2 * (told(1.0) - told(0.0)), atol=1e-5)
    assert np.abs(told(0.0) - told(1.0)).max() > 1e-4


# ---------- data ----------


def small_data(discrete=False):
    """Two episodes of 3 and 4 steps, 2 agents with 1 observation and 2 actions; all values tell where they are from."""
    t = np.arange(7, dtype=np.float32)
    states = np.stack([t, 100 + t], axis=1)
    if discrete:
        actions = np.tile([1.0, 0.0, 0.0, 1.0], (7, 1))
    else:
        actions = np.stack([10 + t, 20 + t, 110 + t, 120 + t], axis=1)
    episodes = Episodes(states, actions.astype(np.float32), np.array([3, 4]), t, np.array([0, 0, 1, 0, 0, 0, 0], bool))
    return AgentEpisodes(episodes, 2, discrete)


def windows(data, **options):
    options = {"horizon": 2, "history_horizon": 2, "max_path_length": 4, **options}
    return VAESequenceDataset(data, AgentNormalizer.fit(data, "DebugNormalizer"), **options)


def test_windows_hold_the_past_the_plan_and_the_returns():
    data = windows(small_data(), discount=0.5, returns_scale=2.0)
    assert len(data) == 2 + 3  # starts 0 … L-2
    found = data.batch(np.array([1]))  # step 1 of the first episode
    rows = found["state"][0].reshape(3, 2, 3)  # To, N, A+O
    np.testing.assert_array_equal(rows[0], 0)  # before the first step
    np.testing.assert_array_equal(rows[1], [[10, 20, 0], [110, 120, 100]])
    np.testing.assert_array_equal(rows[2], [[0, 0, 1], [0, 0, 101]])  # the present action is not known
    np.testing.assert_array_equal(found["actions"][0], [[11, 21, 111, 121], [12, 22, 112, 122]])
    np.testing.assert_allclose(found["returns"], (1 + 0.5 * 2) / 2)
    last = data.batch(np.array([4]))  # step 2 of the second episode, whose last row is 6
    np.testing.assert_array_equal(last["mask"][0, :, 0], [1, 1])
    over = windows(small_data(), horizon=4).batch(np.array([1]))
    np.testing.assert_array_equal(over["mask"][0, :, 0], [1, 1, 0, 0])
    np.testing.assert_array_equal(over["actions"][0, 2:], 0)
    kept = windows(small_data(), horizon=4, use_zero_padding=False).batch(np.array([1]))
    np.testing.assert_array_equal(kept["actions"][0, 2:], [[12, 22, 112, 122]] * 2)
    np.testing.assert_array_equal(kept["state"][0, 0], [0, 0, 0, 0, 0, 100])  # the first observation stands before
    assert len(windows(small_data(), use_padding=False)) == 1 + 2  # starts 0 … L-H-1
    with pytest.raises(UserError, match="max_path_length"):
        windows(small_data(), max_path_length=3)


def test_transitions_of_q_learning():
    data = windows(small_data(), discount=0.5, act_steps=2, termination_penalty=-7.0)
    found = data.batch(np.array([0, 1, 2]), transitions=True)
    np.testing.assert_allclose(found["rewards"][:, 0], [0 + 0.5 * 1, 1 + 0.5 * (2 - 7), 3 + 0.5 * 4])
    np.testing.assert_allclose(found["alive"][:, 0], [0.25, 0, 0.25])
    np.testing.assert_array_equal(found["next_state"][0, -1], [0, 0, 2, 0, 0, 102])


@pytest.mark.parametrize("discrete", [False, True])
def test_items_have_the_shapes_of_the_table(discrete):
    data = windows(small_data(discrete))
    item, a = data[1], 1 if discrete else 2
    shapes = {"x": a + 1, "actions": a, "observations": 1, "next_observations": 1, "rewards": 1, "dones": 1}
    for key, width in {**shapes, "loss_masks": 1, "attention_masks": 1, "legal_actions": 2}.items():
        assert item[key].shape == (4, 2, width), key
    assert item["history_trajectory"].shape == (2, 2, 3) and item["returns"].shape == (1, 2)
    assert item["cond"]["x"].shape == (4, 2, 1) and item["cond"]["masks"][:, 0, 0].tolist() == [1, 1, 1, 0]
    assert item["env_ts"].tolist() == [4, 0, 1, 2]  # outside of the episode: max_path_length
    assert item["loss_masks"][:, 0, 0].tolist() == [0, 0, 1, 1]
    assert item["next_observations"][1:3, 0, 0].tolist() == [1, 2]
    if discrete:
        assert item["actions"][2, :, 0].tolist() == [0, 1]


@pytest.mark.parametrize("discrete", [False, True])
def test_acting_sees_what_the_windows_of_its_own_episode_hold(discrete):
    """An episode is recorded while it is acted; its windows are what the policy saw."""
    data = toy_data(2, discrete)
    normalizer = AgentNormalizer.fit(data, "CDFNormalizer")
    env = AgentHistoryEnv(ToyAgentsVectorEnv(3, 2, discrete=discrete, act_steps=2), normalizer, 2, 3, discrete)
    width, seen, chosen = 2 * data.action_dim, [env.reset()["state"]], []
    for _ in range(3):
        actions = RNG.uniform((3, 2, width), -1, 1)
        chosen.append(env.choose(actions))
        seen.append(env.step(actions).observations["state"])
    # What the environment saw, step by step, from a second one that is given the same actions.
    raw = ToyAgentsVectorEnv(3, 2, discrete=discrete)
    states, acted = [raw.reset()["state"][:, -1]], []
    for t in range(6):
        acted.append(chosen[t // 2][:, t % 2])
        given = acted[-1] if discrete else normalizer.unnormalize_actions(acted[-1])
        acted[-1] = given
        states.append(raw.step(given[:, None]).observations["state"][:, -1])
    for e in range(3):
        states_e, acted_e = np.array([s[e] for s in states]), np.array([a[e] for a in acted] + [acted[0][e]])
        episode = AgentEpisodes(Episodes(states_e, acted_e, np.array([7]), np.ones(7)), 2, discrete)
        dataset = VAESequenceDataset(episode, normalizer, 1, 3)
        rows, begin = np.array([0, 2, 4, 6]), np.zeros(4, np.int64)
        np.testing.assert_allclose(np.array([s[e] for s in seen]), dataset.past(rows, begin), atol=2e-5)


def test_illegal_actions_are_never_chosen():
    env = AgentHistoryEnv.__new__(AgentHistoryEnv)
    env.discrete, env.n_agents, env.legal = True, 2, np.array([[1, 0, 1, 0, 0, 1]])
    chosen = env.choose(np.array([[[0.0, 9, 1, 9, 9, 0]]]))
    assert chosen.reshape(2, 3).argmax(-1).tolist() == [2, 2]


def test_the_toy_task_rewards_going_straight():
    def mean_return(speed, turn):
        env, total = ToyAgentsVectorEnv(50, 2), 0.0
        state = env.reset()["state"][:, -1]
        for _ in range(25):
            actions = controller(state.reshape(50, 2, -1), np.zeros((50, 2, 2)), speed, turn, False)
            result = env.step(actions.reshape(50, 1, -1))
            total, state = total + result.rewards.mean(), result.observations["state"][:, -1]
        assert result.truncated.all() and not result.terminated.any()
        return total

    assert mean_return(1.0, 0.0) > mean_return(0.4, 0.6) + 5 > mean_return(0.0, 0.0) + 5


# ---------- published layouts ----------


def save(folder, **arrays):
    folder.mkdir(parents=True, exist_ok=True)
    for name, array in arrays.items():
        np.save(folder / f"{name}.npy", array)


def test_smac_files_are_read_and_checked(tmp_path):
    folder = tmp_path / "smac" / "3m" / "Good"
    actions = np.array([[0, 2], [1, 1], [2, 0]])
    arrays = {"obs": RNG.normal((3, 2, 5)), "legals": np.ones((3, 2, 4)), "actions": actions}
    save(folder, rewards=np.array([[1.0, 3.0]] * 3), path_lengths=np.array([1, 2]), **arrays)
    data = agents.load("smac", "3m-Good", str(tmp_path), 2)
    assert (data.n_agents, data.obs_dim, data.action_dim, data.discrete) == (2, 5, 4, True)
    assert data.episodes.actions.reshape(3, 2, 4).argmax(-1).tolist() == actions.tolist()
    assert data.episodes.rewards.tolist() == [2, 2, 2] and data.episodes.terminals.tolist() == [True, False, False]
    save(folder, path_lengths=np.array([1, 1]))
    with pytest.raises(UserError, match=r"path_lengths add up to 2; obs \[3, 2, 5\]"):
        agents.load("smac", "3m-Good", str(tmp_path), 2)
    save(folder, legals=np.array([{}], dtype=object))
    with pytest.raises(UserError, match="legals.npy is no npy file of numbers"):
        agents.load("smac", "3m-Good", str(tmp_path), 2)
    with pytest.raises(UserError, match="3m/Poor is no folder"):
        agents.load("smac", "3m-Poor", str(tmp_path), 2)


def test_mpe_files_are_read(tmp_path):
    for seed in (0, 1):
        fields = {"obs": np.full((4, 3), seed), "acs": np.ones((4, 2)), "rews": np.ones(4), "dones": np.zeros(4)}
        arrays = {
            f"{key}_{agent}": array + agent for key, array in fields.items() if key != "dones" for agent in (0, 1)
        }
        save(tmp_path / "mpe/simple_spread/expert" / f"seed_{seed}_data", dones_0=fields["dones"], **arrays)
        save(tmp_path / "mpe/simple_spread/expert" / f"seed_{seed}_data", dones_1=fields["dones"])
    data = agents.load("mpe", "simple_spread-expert", str(tmp_path), 2)
    assert data.episodes.traj_lengths.tolist() == [2] * 4 and (data.n_agents, data.obs_dim, data.action_dim) == (
        2,
        3,
        2,
    )
    assert data.episodes.states[4].tolist() == [1, 1, 1, 2, 2, 2] and data.episodes.rewards[0] == 1.5


def test_simple_spread_is_made_and_learned_from(tmp_path, capsys):
    pytest.importorskip("mpe2")
    for quality in ("medium", "expert"):
        mpe.main(["--quality", quality, "--episodes", "4", "--data_dir", str(tmp_path)])
    medium, expert = (float(line.split("mean return ")[1].split()[0]) for line in capsys.readouterr().out.splitlines())
    assert expert > medium
    data = agents.load("mpe", "simple_spread-expert", str(tmp_path), 25)
    assert data.episodes.states.shape == (100, 54) and data.episodes.actions.shape == (100, 15)
    sizes, normalizer = Sizes(3, 18, 5, 2, 3), AgentNormalizer.fit(data, "CDFNormalizer")
    cfg = settings(env_type="mpe", dataset="simple_spread-expert", act_steps=2)
    env = vae.environment(cfg, sizes, normalizer, 2, 0)
    seen = [env.reset()] + [env.step(RNG.uniform((2, 2, 15), -1, 1)) for _ in range(13)]
    assert seen[-1].truncated.all() and seen[-1].infos["executed_steps"].tolist() == [1, 1]
    assert seen[-1].infos["agent_rewards"].shape == (2, 3)


# ---------- settings ----------


def test_schedules_that_do_not_fit_are_refused():
    with pytest.raises(UserError, match="eval_freq: 6, save_freq: 4: eval_freq must be a multiple of save_freq"):
        settings(eval_freq=6)
    with pytest.raises(UserError, match="rl_warmup_steps"):
        settings(online_training=True, rl_warmup_steps=5)
    with pytest.raises(UserError, match="replay_buffer_size"):
        settings(online_training=True, replay_buffer_size=10)
    settings(eval_freq=0)


def test_settings_come_from_names_and_keys_that_are_known():
    cfg = settings(trainer="utils.OnlineRLTrainer", job_name="{dataset}/h_{horizon}", seed=3)
    assert cfg["online_training"] and cfg["logdir"] == "logs/vae_diffusion_rl/toy/h_2/3"
    with pytest.raises(UserError, match="did you mean batch_size"):
        vae.settings({"batchsize": 3})
    for key, value in (
        ("batch_size", "many"),
        ("batch_size", 1.5),
        ("freeze_vae", 1),
        ("horizon", True),
        ("seed", None),
    ):
        with pytest.raises(UserError, match=f"{key}: {value!r} is no"):
            vae.settings({key: value})
    found = vae.settings({"returns_scale": 20, "latent_clip": None, "n_train_steps": 1e6})
    assert found["n_train_steps"] == 1_000_000 and isinstance(found["n_train_steps"], int)
    with pytest.raises(UserError, match="diffusion 'os.system' is unknown"):
        settings(diffusion="os.system")
    with pytest.raises(UserError, match="job_name: {nothing}"):
        settings(job_name="{nothing}")


def test_online_training_needs_an_environment():
    sizes = Sizes(1, 2, 2, 2, 3)
    with pytest.raises(UserError, match="simulator is not supported"):
        vae.environment(settings(env_type="smac", dataset="3m-Good"), sizes, None, 2, 0)


# ---------- whole runs ----------


def run(tmp_path, **changes):
    training = vae.training_of(settings(tmp_path, **changes))
    return training.run(), training


def test_a_run_from_vae_to_online_is_evaluated_again(tmp_path):
    options = {"online_training": True, "seed": 1, "backbone": "mlp", "fast": False, "rl_update_freq": 1}
    rows, whole = run(tmp_path / "whole", **options)
    trained = [row for row in rows if row["kind"] == "train"]
    assert set(METRICS) <= set(trained[-1]) and trained[-1]["policy_loss"] is not None
    assert trained[0]["policy_loss"] is None and trained[-1]["env_steps"] == 2 * 6 * 3
    folder = Path(whole.cfg["logdir"])
    result = folder / "results" / "step_12-ep_3.json"
    facts = json.loads(result.read_text())
    assert len(facts["average_ep_reward"]) == len(facts["std_ep_reward"]) == 2 and facts["episodes"] == 3
    result.unlink()
    vae.evaluate_checkpoint(folder / "checkpoint" / "state_12.safetensors", {}, overwrite=False)
    assert json.loads(result.read_text()) == facts


def test_a_checkpoint_imports_nothing_and_is_as_large_as_it_says(tmp_path, monkeypatch):
    sizes = Sizes(n_agents=2, obs_dim=4, action_dim=2, horizon=2, steps=3)
    cfg = settings(tmp_path)
    facts = {"kind": LatentDiffusionRL.KIND, "itr": 4, "online": False, "sizes": sizes._asdict()}
    path = tmp_path / "run" / "checkpoint" / "state_4.safetensors"
    (tmp_path / "evil_module.py").write_text("raise SystemError('imported')")
    monkeypatch.syspath_prepend(tmp_path)
    for change, size, said in (
        ({"env_type": "d4rl", "dataset": "evil_module:X-v0"}, {}, "only if you name it: add dataset: evil_module:X-v0"),
        ({"num_envs": 10**9}, {}, "num_envs: 1000000000: a whole number from 1 to 10000"),
        ({"vae_hidden_dim": 60_000}, {}, "vae_hidden_dim: 60000: a whole number from 1 to 64"),
        ({"backbone_layers": 900}, {}, "backbone_layers: 900"),
        ({"save_freq": "x"}, {}, "save_freq: 'x' is no whole number"),
        ({"model": "os.system"}, {}, "its facts are damaged|is unknown"),
        ({}, {"obs_dim": 10**9}, "obs_dim: 1000000000"),
        ({}, {"obs_dim": "x"}, "obs_dim: x"),
        ({}, {"nothing": 1}, "sizes have facts"),
    ):
        config = {**cfg, **change}
        tensors = {"model.vae.x": np.zeros((64, 2), np.float32)}
        save_checkpoint(path, tensors, {**facts, "config": config, "sizes": {**sizes._asdict(), **size}})
        with pytest.raises(UserError, match=said):
            vae.evaluate_checkpoint(path, {}, overwrite=False)


@pytest.mark.slow
def test_a_run_with_everything_that_is_optional(tmp_path):
    with eagerly():
        rows, training = run(
            tmp_path,
            dataset="toy-discrete",
            offline_rl=True,
            use_behavior_cloning=True,
            returns_condition=True,
            decentralized_execution=False,
            use_ddim_sample=True,
            online_training=True,
            use_value_function=False,
            offline_rl_weight=0.0,
            reward_scale_running=True,
            ft_denoising_steps=3,
            target_kl=0.0,
            trajectory_encoder="gru",
            backbone="mlp",
            act_steps=2,
            n_train_steps=8,
            eval_freq=8,
        )
    offline, online = (row for row in rows if row["kind"] == "train")
    assert all(np.isfinite(offline[key]) for key in (*METRICS[:-1], "q_loss", "bc_loss"))
    assert all(np.isfinite(online[key]) for key in ("loss", "policy_loss", "value_loss", "entropy"))
    assert (Path(training.cfg["logdir"]) / "results" / "step_8-ep_3-ddim-cg_1.2.json").is_file()
