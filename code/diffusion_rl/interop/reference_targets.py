"""The class paths in the PyTorch reference's configurations, and the classes that do the same here."""

REFERENCE_TARGETS = {
    "agent.pretrain.train_diffusion_agent.TrainDiffusionAgent": "diffusion_rl.loops.offline.PreTraining",
    "agent.finetune.train_ppo_diffusion_agent.TrainPPODiffusionAgent": "diffusion_rl.loops.on_policy.OnPolicyTraining",
    "agent.eval.eval_diffusion_agent.EvalDiffusionAgent": "diffusion_rl.loops.evaluation.Evaluation",
    "agent.dataset.sequence.StitchedSequenceDataset": "diffusion_rl.data.sequences.SequenceDataset",
    "model.diffusion.diffusion.DiffusionModel": "diffusion_rl.policies.diffusion.DiffusionPolicy",
    "model.diffusion.diffusion_eval.DiffusionEval": "diffusion_rl.policies.diffusion.FineTunedDiffusionPolicy",
    "model.diffusion.diffusion_eval_ft.DiffusionEval": "diffusion_rl.policies.diffusion.FineTunedDiffusionPolicy",
    "model.diffusion.diffusion_vpg.VPGDiffusion": "diffusion_rl.policies.diffusion.FineTunedDiffusionPolicy",
    "model.diffusion.diffusion_ppo.PPODiffusion": "diffusion_rl.algorithms.dppo.DPPO",
    "model.diffusion.mlp_diffusion.DiffusionMLP": "diffusion_rl.networks.mlp.DiffusionMLP",
    "model.diffusion.mlp_diffusion.VisionDiffusionMLP": "diffusion_rl.networks.vision.VisionDiffusionMLP",
    "model.common.mlp_gaussian.Gaussian_VisionMLP": "diffusion_rl.networks.vision.GaussianVisionMLP",
    "model.common.vit.VitEncoder": "diffusion_rl.networks.vit.VitEncoder",
    "model.common.critic.ViTCritic": "diffusion_rl.networks.vision.ViTCritic",
    "model.diffusion.eta.EtaFixed": "diffusion_rl.networks.eta.EtaFixed",
    "model.diffusion.eta.EtaAction": "diffusion_rl.networks.eta.EtaAction",
    "model.diffusion.eta.EtaState": "diffusion_rl.networks.eta.EtaState",
    "model.diffusion.eta.EtaStateAction": "diffusion_rl.networks.eta.EtaStateAction",
    "model.common.critic.CriticObs": "diffusion_rl.networks.critics.CriticObs",
    "model.common.critic.CriticObsAct": "diffusion_rl.networks.critics.CriticObsAct",
}
