"""Class paths in configurations: the PyTorch reference's and this package's earlier ones, and what they are today."""

import logging
from typing import Any

from diffusion_rl.config.declared import is_declared
from diffusion_rl.config.instantiate import PACKAGE, targets
from diffusion_rl.core.errors import UserError
from diffusion_rl.core.moved import MODULES

log = logging.getLogger(__name__)

_REFERENCE_ROOTS = ("agent.", "model.", "env.", "util.")

_ON_POLICY = "diffusion_rl.methods.on_policy.training.OnPolicyTraining"
_OFF_POLICY = "diffusion_rl.methods.off_policy.training.OffPolicyTraining"

REFERENCE_TARGETS = {
    "agent.pretrain.train_diffusion_agent.TrainDiffusionAgent": "diffusion_rl.methods.pretraining.training.PreTraining",
    "agent.pretrain.train_gaussian_agent.TrainGaussianAgent": "diffusion_rl.methods.pretraining.training.PreTraining",
    "agent.finetune.train_ppo_diffusion_agent.TrainPPODiffusionAgent": _ON_POLICY,
    "agent.finetune.train_ppo_exact_diffusion_agent.TrainPPOExactDiffusionAgent": _ON_POLICY,
    "agent.finetune.train_ppo_gaussian_agent.TrainPPOGaussianAgent": _ON_POLICY,
    "agent.finetune.train_sac_ppo_diffusion_agent.TrainSACPPODiffusionAgent": _ON_POLICY,
    "agent.finetune.train_rwr_diffusion_agent.TrainRWRDiffusionAgent": _OFF_POLICY,
    "agent.finetune.train_awr_diffusion_agent.TrainAWRDiffusionAgent": _OFF_POLICY,
    "agent.finetune.train_dipo_diffusion_agent.TrainDIPODiffusionAgent": _OFF_POLICY,
    "agent.finetune.train_idql_diffusion_agent.TrainIDQLDiffusionAgent": _OFF_POLICY,
    "agent.finetune.train_dql_diffusion_agent.TrainDQLDiffusionAgent": _OFF_POLICY,
    "agent.finetune.train_qsm_diffusion_agent.TrainQSMDiffusionAgent": _OFF_POLICY,
    "agent.finetune.train_dacer_agent.TrainDacerAgent": _OFF_POLICY,
    "agent.finetune.train_dacer_agent_original.TrainOriginalDacerAgent": _OFF_POLICY,
    "agent.finetune.train_sac_agent.TrainSACAgent": _OFF_POLICY,
    "agent.finetune.train_rlpd_agent.TrainRLPDAgent": _OFF_POLICY,
    "agent.finetune.train_calql_agent.TrainCalQLAgent": _OFF_POLICY,
    "agent.finetune.train_ibrl_agent.TrainIBRLAgent": _OFF_POLICY,
    "agent.finetune.train_ppo_diffusion_img_agent.TrainPPOImgDiffusionAgent": _ON_POLICY,
    "agent.finetune.train_ppo_gaussian_img_agent.TrainPPOImgGaussianAgent": _ON_POLICY,
    "agent.eval.eval_diffusion_img_agent.EvalImgDiffusionAgent": "diffusion_rl.training.evaluation.Evaluation",
    "agent.eval.eval_gaussian_img_agent.EvalImgGaussianAgent": "diffusion_rl.training.evaluation.Evaluation",
    "agent.eval.eval_gaussian_agent.EvalGaussianAgent": "diffusion_rl.training.evaluation.Evaluation",
    "agent.eval.eval_diffusion_agent.EvalDiffusionAgent": "diffusion_rl.training.evaluation.Evaluation",
    "agent.dataset.sequence.StitchedSequenceDataset": "diffusion_rl.data.sequences.SequenceDataset",
    "agent.dataset.sequence.StitchedSequenceQLearningDataset": "diffusion_rl.data.sequences.QLearningDataset",
    "model.diffusion.diffusion.DiffusionModel": "diffusion_rl.policies.diffusion.DiffusionPolicy",
    "model.diffusion.diffusion_eval.DiffusionEval": "diffusion_rl.policies.diffusion.FineTunedDiffusionPolicy",
    "model.diffusion.diffusion_eval_ft.DiffusionEval": "diffusion_rl.policies.diffusion.FineTunedDiffusionPolicy",
    "model.diffusion.diffusion_vpg.VPGDiffusion": "diffusion_rl.policies.diffusion.FineTunedDiffusionPolicy",
    "model.diffusion.diffusion_ppo.PPODiffusion": "diffusion_rl.methods.on_policy.dppo.DPPO",
    "model.diffusion.diffusion_ppo_exact.PPOExactDiffusion": "diffusion_rl.methods.on_policy.dppo_exact.ExactDPPO",
    "model.diffusion.diffusion_sac_ppo.SAC_PPODiffusion": "diffusion_rl.methods.on_policy.dpoer.DPOER",
    "model.diffusion.sde_lib.VPSDE": "diffusion_rl.diffusion.exact_likelihood.VPSDE",
    "model.diffusion.diffusion_rwr.RWRDiffusion": "diffusion_rl.methods.off_policy.rwr.RWR",
    "model.diffusion.diffusion_awr.AWRDiffusion": "diffusion_rl.methods.off_policy.awr.AWR",
    "model.diffusion.diffusion_dipo.DIPODiffusion": "diffusion_rl.methods.off_policy.dipo.DIPO",
    "model.diffusion.diffusion_idql.IDQLDiffusion": "diffusion_rl.methods.off_policy.idql.IDQL",
    "model.diffusion.diffusion_dql.DQLDiffusion": "diffusion_rl.methods.off_policy.dql.DQL",
    "model.diffusion.diffusion_qsm.QSMDiffusion": "diffusion_rl.methods.off_policy.qsm.QSM",
    "model.diffusion.diffusion_DACER.DACER_Diffusion": "diffusion_rl.methods.off_policy.dacer.DACER",
    "model.diffusion.diffusion_DACER_ORIGINAL.DACER_Original_Diffusion": "diffusion_rl.methods.off_policy.dacer.DACER",
    "model.rl.gaussian_rwr.RWR_Gaussian": "diffusion_rl.methods.off_policy.rwr.GaussianRWR",
    "model.rl.gaussian_awr.AWR_Gaussian": "diffusion_rl.methods.off_policy.awr.GaussianAWR",
    "model.rl.gaussian_rlpd.RLPD_Gaussian": "diffusion_rl.methods.off_policy.rlpd.RLPD",
    "model.rl.gaussian_ibrl.IBRL_Gaussian": "diffusion_rl.methods.off_policy.ibrl.IBRL",
    "model.rl.gaussian_calql.CalQL_Gaussian": "diffusion_rl.methods.off_policy.calql.CalQL",
    "model.diffusion.mlp_diffusion.DiffusionMLP": "diffusion_rl.networks.mlp.DiffusionMLP",
    "model.common.mlp_gaussian.Gaussian_MLP": "diffusion_rl.networks.gaussian.GaussianMLP",
    "model.common.mlp_gmm.GMM_MLP": "diffusion_rl.networks.gmm.GMMMLP",
    "model.common.transformer.Gaussian_Transformer": "diffusion_rl.networks.transformer.GaussianTransformer",
    "model.common.transformer.GMM_Transformer": "diffusion_rl.networks.transformer.GMMTransformer",
    "model.common.gaussian.GaussianModel": "diffusion_rl.policies.gaussian.GaussianPolicy",
    "model.common.gmm.GMMModel": "diffusion_rl.policies.gmm.GMMPolicy",
    "model.rl.gaussian_vpg.VPG_Gaussian": "diffusion_rl.policies.gaussian.FineTunedGaussianPolicy",
    "model.rl.gaussian_ppo.PPO_Gaussian": "diffusion_rl.methods.on_policy.gaussian_ppo.GaussianPPO",
    "model.rl.gaussian_sac.SAC_Gaussian": "diffusion_rl.methods.off_policy.sac.SAC",
    "model.rl.gmm_vpg.VPG_GMM": "diffusion_rl.policies.gmm.FineTunedGMMPolicy",
    "model.rl.gmm_ppo.PPO_GMM": "diffusion_rl.methods.on_policy.gmm_ppo.GMMPPO",
    "model.diffusion.mlp_diffusion.VisionDiffusionMLP": "diffusion_rl.networks.vision.VisionDiffusionMLP",
    "model.common.mlp_gaussian.Gaussian_VisionMLP": "diffusion_rl.networks.vision.GaussianVisionMLP",
    "model.common.vit.VitEncoder": "diffusion_rl.networks.vit.VitEncoder",
    "model.common.critic.ViTCritic": "diffusion_rl.networks.vision.ViTCritic",
    "model.diffusion.unet.Unet1D": "diffusion_rl.networks.unet1d.Unet1D",
    "model.diffusion.unet.VisionUnet1D": "diffusion_rl.networks.vision_unet1d.VisionUnet1D",
    "model.diffusion.eta.EtaFixed": "diffusion_rl.networks.eta.EtaFixed",
    "model.diffusion.eta.EtaAction": "diffusion_rl.networks.eta.EtaAction",
    "model.diffusion.eta.EtaState": "diffusion_rl.networks.eta.EtaState",
    "model.diffusion.eta.EtaStateAction": "diffusion_rl.networks.eta.EtaStateAction",
    "model.flow.mlp_flow.FlowMLP": "diffusion_rl.networks.flow.FlowMLP",
    "model.flow.mlp_flow.VisionFlowMLP": "diffusion_rl.networks.flow.VisionFlowMLP",
    "model.flow.mlp_flow.NoisyFlowMLP": "diffusion_rl.networks.flow.NoisyFlow",
    "model.flow.mlp_shortcut.ShortCutFlowMLP": "diffusion_rl.networks.flow.ShortcutFlowMLP",
    "model.flow.mlp_shortcut.ShortCutFlowViT": "diffusion_rl.networks.flow.ShortcutFlowViT",
    "model.flow.mlp_shortcut.NoisyShortCutFlowMLP": "diffusion_rl.networks.flow.NoisyFlow",
    "model.flow.reflow.ReFlow": "diffusion_rl.policies.flow.FlowPolicy",
    "model.flow.shortcutflow.ShortCutFlow": "diffusion_rl.policies.flow.ShortcutFlowPolicy",
    "model.flow.ft_ppo.ppoflow.PPOFlow": "diffusion_rl.methods.on_policy.reinflow.ReinFlow",
    "model.flow.ft_ppo.pposhortcut.PPOShortCut": "diffusion_rl.methods.on_policy.reinflow.ShortcutReinFlow",
    "model.common.critic.CriticObs": "diffusion_rl.networks.critics.CriticObs",
    "model.common.critic.CriticObsAct": "diffusion_rl.networks.critics.CriticObsAct",
    "model.common.critic.CriticObsAct_DACER": "diffusion_rl.networks.critics.DistributionalCritic",
}


class _CheckpointClasses(frozenset[str]):
    """The classes that are listed, and every network of this package."""

    def __contains__(self, name: object) -> bool:
        is_network = isinstance(name, str) and name.startswith(f"{PACKAGE}networks.") and is_declared(name)
        return super().__contains__(name) or is_network


#: What a checkpoint may name: networks and policies.
CHECKPOINT_CLASSES = _CheckpointClasses(
    name
    for name in REFERENCE_TARGETS.values()
    if name.split(".")[1] in ("methods", "diffusion", "networks", "policies") and not name.endswith("Training")
)
#: What the reference's configurations build beside policies and data, and nothing here needs.
WITHOUT_EFFECT = ("env.plot_traj.TrajPlotter",)


def modernize(config: Any) -> None:
    """Puts the paths of today in the place of this package's earlier ones, everywhere in a plain configuration."""
    for _, mapping in targets(config):
        module, _, name = str(mapping["_target_"]).removeprefix(PACKAGE).rpartition(".")
        if module in MODULES and str(mapping["_target_"]).startswith(PACKAGE):
            mapping["_target_"] = f"{PACKAGE}{MODULES[module]}.{name}"  # type: ignore[index]


def translate(config: dict[str, Any]) -> None:
    """Puts today's classes in the place of the reference's and of earlier ones, everywhere in a plain configuration.

    A configuration of the reference says where to log to Weights & Biases; here that stays off until it is asked for.
    Raises UserError naming every `_target_` that is neither the reference's nor the path of a class.
    """
    modernize(config)
    unknown, changed = [], False
    for where, mapping in list(targets(config)):
        name = mapping["_target_"]
        if name in WITHOUT_EFFECT:
            log.info("%s (%s) is left out: it has no effect here", where, name)
            _remove(config, where)
            continue
        if name in REFERENCE_TARGETS:
            mapping["_target_"], changed = REFERENCE_TARGETS[name], True  # type: ignore[index]
        elif not isinstance(name, str) or "." not in name or name.startswith(_REFERENCE_ROOTS):
            unknown.append(f"{where}._target_={name}".lstrip("."))
    if unknown:
        raise UserError(
            f"{', '.join(unknown)}: not the path of a class (package.module.Class), or one of the reference's "
            "without a counterpart here"
        )
    if changed:
        _move(config)
    if changed and config.get("wandb") and "mode" not in config["wandb"]:
        log.info("logging to Weights & Biases stays off; wandb.mode=online turns it on")
        config["wandb"] = None


def _move(config: dict[str, Any]) -> None:
    """Moves what the reference reads at the top level and this package below `env`."""
    env = config.get("env")
    if isinstance(env, dict) and "robomimic_env_cfg_path" in config:
        env.setdefault("robomimic_env_cfg_path", config["robomimic_env_cfg_path"])


def _remove(config: dict[str, Any], where: str) -> None:
    *parents, last = where.split(".")
    for key in parents:
        config = config[key]
    del config[last]
