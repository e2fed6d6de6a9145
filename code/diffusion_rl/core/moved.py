"""Names of modules of earlier versions, which go on being importable."""

from __future__ import annotations

import importlib
import importlib.abc
import importlib.machinery
import sys
from collections.abc import Sequence
from types import ModuleType

ROOT = "diffusion_rl."
PACKAGES = ("algorithms", "loops", "planners")  # of which nothing is left but their names
MODULES = {
    "algorithms.awr": "methods.off_policy.awr",
    "algorithms.calql": "methods.off_policy.calql",
    "algorithms.chunked": "methods.on_policy.chunked",
    "algorithms.dacer": "methods.off_policy.dacer",
    "algorithms.dipo": "methods.off_policy.dipo",
    "algorithms.dpoer": "methods.on_policy.dpoer",
    "algorithms.dpoer_trainer": "methods.on_policy.dpoer",
    "algorithms.dppo": "methods.on_policy.dppo",
    "algorithms.dppo_exact": "methods.on_policy.dppo_exact",
    "algorithms.dppo_exact_trainer": "methods.on_policy.dppo_exact",
    "algorithms.dppo_fast": "methods.on_policy.dppo_fast",
    "algorithms.dppo_trainer": "methods.on_policy.dppo",
    "algorithms.dql": "methods.off_policy.dql",
    "algorithms.entropy": "policies.entropy",
    "algorithms.gaussian_ppo": "methods.on_policy.gaussian_ppo",
    "algorithms.gmm_ppo": "methods.on_policy.gmm_ppo",
    "algorithms.ibrl": "methods.off_policy.ibrl",
    "algorithms.idql": "methods.off_policy.idql",
    "algorithms.off_policy": "methods.off_policy.algorithm",
    "algorithms.ppo": "methods.on_policy.ppo",
    "algorithms.ppo_trainer": "methods.on_policy.ppo",
    "algorithms.pretrain": "methods.pretraining.losses",
    "algorithms.qsm": "methods.off_policy.qsm",
    "algorithms.rlpd": "methods.off_policy.rlpd",
    "algorithms.rwr": "methods.off_policy.rwr",
    "algorithms.sac": "methods.off_policy.sac",
    "algorithms.trainers": "methods.on_policy.ppo",
    "algorithms.vae_diffusion_rl": "methods.vae_latent.model",
    "algorithms.vae_diffusion_trainer": "methods.vae_latent.trainer",
    "app": "cli.app",
    "command_line": "config.command_line",
    "config.ranges": "config.keys",
    "config_keys": "config.keys",
    "configs": "config.compose",
    "core.arguments": "config.overrides",
    "core.avoiding": "tasks.avoiding",
    "core.config": "config.instantiate",
    "core.names": "config.schema",
    "core.normalizers": "data.normalizers",
    "core.ranges": "config.schema",
    "core.signals": "training.signals",
    "core.stacking": "tasks.kuka_stacking",
    "core.yaml_files": "config.yaml_files",
    "data.field_normalizers": "data.normalizers",
    "data.flat": "data.plan_windows",
    "demo": "cli.demo",
    "envs.finite": "envs.chunks",
    "envs.plan_video": "envs.video",
    "experiments": "cli.experiments",
    "exploration": "cli.exploration",
    "interop.reference_targets": "config.targets",
    "kuka_app": "cli.kuka",
    "lite_app": "cli.diffuser_lite",
    "lite_options": "methods.diffuser_lite.options",
    "loops.agent_evaluation": "methods.vae_latent.evaluation",
    "loops.agent_history": "methods.vae_latent.history",
    "loops.avoiding_demos": "generate.avoiding",
    "loops.diffuser_training": "methods.diffuser.training",
    "loops.evaluation": "training.evaluation",
    "loops.export": "export.saved",
    "loops.fine_tuning": "training.fine_tuning",
    "loops.home_made_data": "generate.gym",
    "loops.kuka": "methods.diffuser.kuka_episodes",
    "loops.learner": "methods.off_policy.learner",
    "loops.lite_acting": "methods.diffuser_lite.acting",
    "loops.lite_files": "methods.diffuser_lite.files",
    "loops.lite_training": "methods.diffuser_lite.training",
    "loops.locks": "training.locks",
    "loops.maze2d": "methods.diffuser.maze2d",
    "loops.mpe_data": "generate.agents",
    "loops.off_policy": "methods.off_policy.training",
    "loops.offline": "methods.pretraining.training",
    "loops.on_policy": "methods.on_policy.training",
    "loops.planner_files": "methods.diffuser.files",
    "loops.planning": "methods.diffuser.planning",
    "loops.policy_files": "training.policy_files",
    "loops.robomimic_demos": "generate.robomimic",
    "loops.rollout": "training.rollout",
    "loops.run_facts": "training.run_facts",
    "loops.run_folder": "training.run_dir",
    "loops.run_state": "training.checkpoint",
    "loops.toy_agent_data": "generate.agents",
    "loops.vae_training": "methods.vae_latent.training",
    "planner_app": "cli.diffuser",
    "planner_commands": "cli.commands",
    "planner_launchers": "cli.launchers",
    "planner_options": "methods.diffuser.options",
    "planners.action_diffuser": "methods.diffuser.action_only",
    "planners.diffuser": "methods.diffuser.model",
    "planners.diffuser_lite": "methods.diffuser_lite.planner",
    "planners.diffuser_lite_trainer": "methods.diffuser_lite.trainer",
    "planners.diffuser_trainer": "methods.diffuser.trainer",
    "planners.iql": "methods.diffuser_lite.iql",
    "planners.kuka": "methods.diffuser.kuka",
    "planners.lite_program": "methods.diffuser_lite.program",
    "planners.lite_targets": "methods.diffuser_lite.domains",
    "planners.lite_tasks": "methods.diffuser_lite.domains",
    "policies.deployed": "export.deployed",
    "reports.commands": "cli.figures",
    "run_folders": "cli.variants",
    "sweeps": "config.sweeps",
    "vae_app": "cli.vae",
}


class MovedModules(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Finds a module under its earlier name: it is the module of today."""

    def __init__(self) -> None:
        self._specs: dict[str, importlib.machinery.ModuleSpec | None] = {}

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        """Returns how a moved module is loaded; None for any other name."""
        own = name.removeprefix(ROOT)
        if not name.startswith(ROOT) or own not in (*PACKAGES, *MODULES):
            return None
        return importlib.machinery.ModuleSpec(name, self, is_package=own in PACKAGES)

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType | None:
        """Imports the module of today; an empty package for the folders that are gone."""
        moved = MODULES.get(spec.name.removeprefix(ROOT))
        if moved is None:
            return None
        module = importlib.import_module(ROOT + moved)
        self._specs[module.__name__] = module.__spec__
        return module

    def exec_module(self, module: ModuleType) -> None:
        """Leaves the module, which has been executed, as it is under its own name."""
        module.__spec__ = self._specs.get(module.__name__, module.__spec__)


def install() -> None:
    """Let earlier names be found where no module of today has them."""
    sys.meta_path.append(MovedModules())
