"""Flows that see: pre-training and ReinFlow on pictures, with robomimic's configurations and an environment of one's
own."""

import shutil

import numpy as np
import pytest
from tests.small_runs import SMALL, assert_same_checkpoint, rows, run

from diffusion_rl.core.noise import NoiseSource
from diffusion_rl.training.checkpoint import load_checkpoint

TASK = ["obs_dim=4", "action_dim=2", "shape_meta.obs.rgb.shape=[3,16,24]", "+tensorboard=false"]
KINDS = {"reflow": ["time_dim=4"], "shortcut": ["td_emb_dim=4", "cond_mlp_dims=[6,4]"]}
PRE = {kind: f"robomimic/pretrain/can/pre_{kind}_mlp_img" for kind in KINDS}
TUNE = {kind: f"robomimic/finetune/can/ft_ppo_{kind}_mlp_img" for kind in KINDS}
ENV = [
    *("env.name=own_envs:Own-v0", "+env.specific={shows: seen}", "env.n_envs=2", "env.max_episode_steps=8"),
    *("~env.wrappers.robomimic_image", "~env.robomimic_env_cfg_path", "~robomimic_env_cfg_path", "~normalization_path"),
]


def small(node: str, *own: str) -> list[str]:
    sizes = ("backbone.img_h=16", "backbone.img_w=24", "backbone.cfg.embed_dim=8", "backbone.cfg.num_heads=2")
    return [f"{node}.{change}" for change in (*sizes, "spatial_emb=6", "mlp_dims=[8,8,8]", *own)]


for _kind, _own in KINDS.items():
    SMALL[PRE[_kind]] = [
        *(*TASK, *small("model.network", *_own), "train.batch_size=16", "train.n_epochs=2"),
        *("train.save_model_freq=1", "train.lr_scheduler.warmup_steps=1"),
    ]
    SMALL[TUNE[_kind]] = [
        *(*TASK, *ENV, *small("model.policy", *_own), *small("model.critic"), "model.noise_hidden_dims=[6]"),
        *("train.n_steps=4", "train.batch_size=8", "train.grad_accumulate=2", "train.update_epochs=1"),
        *("train.n_train_itr=3", "train.val_freq=2", "train.n_critic_warmup_itr=0", "train.save_model_freq=1"),
        "train.logprob_batch_size=8",
    ]


def make_pictures(path):
    """Three episodes of 20 steps with pictures."""
    draw, n = NoiseSource(1), 60
    arrays = {"states": draw.uniform((n, 4), -1, 1), "actions": draw.uniform((n, 2), -1, 1)}
    arrays |= {"images": draw.integers(0, 256, (n, 3, 16, 24)).astype(np.uint8), "traj_lengths": np.full(3, 20)}
    np.savez(path, rewards=np.ones(n, np.float32), terminals=np.zeros(n, bool), **arrays)
    return path


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_from_pictures_to_a_resumed_fine_tuning(tmp_path, kind):
    base, whole, halves = (tmp_path / name for name in ("base", "whole", "halves"))
    run(PRE[kind], base, f"train_dataset_path={make_pictures(tmp_path / 'train.npz')}")
    run(TUNE[kind], whole, f"base_policy_path={base}")
    evaluated, trained, _ = rows(whole)
    assert evaluated["kind"] == "eval" and trained["kind"] == "train" and abs(trained["ratio"] - 1) < 0.01
    shutil.copytree(whole, halves)
    (halves / "checkpoint" / "state_2.safetensors").unlink()
    run(TUNE[kind], halves, f"base_policy_path={base}", "resume=auto")
    states = [folder / "checkpoint" / "state_2.safetensors" for folder in (whole, halves)]
    assert_same_checkpoint(*states)
    before, after = load_checkpoint(whole / "checkpoint" / "state_0.safetensors"), load_checkpoint(states[0])
    moved = {name for name, value in before.select("model.").items() if np.any(value != after.tensors[f"model.{name}"])}
    seen = "actor_ft.policy.backbone."
    assert any(name.startswith(seen) for name in moved)  # the encoder learns, too
    assert not any(name.startswith("actor_old.") for name in moved)
