"""The one list of recorded cases that this package does not cover yet, with the reason.

The replayer skips these by name and counts them; a case that is neither covered nor listed here fails.
Keys are patterns (fnmatch) over class paths of the reference, or over case names ("case:" in front).
"""

from __future__ import annotations

from collections.abc import Iterable
from fnmatch import fnmatchcase

NOT_IMPLEMENTED: dict[str, str] = {
    # networks
    # algorithms
    "model.rl.gaussian_awr.*": "AWR",
    "model.rl.gaussian_rwr.*": "RWR",
    "model.rl.gaussian_rlpd.*": "RLPD",
    "model.rl.gaussian_ibrl.*": "IBRL",
    "model.rl.gaussian_calql.*": "Cal-QL",
    "model.diffusion.diffusion_awr.*": "AWR",
    "model.diffusion.diffusion_rwr.*": "RWR",
    "model.diffusion.diffusion_dql.*": "DQL",
    "model.diffusion.diffusion_dipo.*": "DIPO",
    "model.diffusion.diffusion_idql.*": "IDQL",
    "model.diffusion.diffusion_qsm.*": "QSM",
    "model.diffusion.diffusion_ppo_exact.*": "exact likelihood",
    "model.diffusion.exact_likelihood.*": "exact likelihood",
    "model.diffusion.sde_lib.*": "exact likelihood",
    # loops
    "agent.finetune.train_*_gaussian_agent.*": "Gaussian policies' algorithms",
    "agent.finetune.train_ppo_diffusion_img_agent.*": "loops over images",
    "agent.finetune.train_ppo_exact_diffusion_agent.*": "exact likelihood",
    "agent.finetune.train_awr_diffusion_agent.*": "AWR",
    "agent.finetune.train_rwr_diffusion_agent.*": "RWR",
    "agent.finetune.train_dql_diffusion_agent.*": "DQL",
    "agent.finetune.train_dipo_diffusion_agent.*": "DIPO",
    "agent.finetune.train_idql_diffusion_agent.*": "IDQL",
    "agent.finetune.train_qsm_diffusion_agent.*": "QSM",
    "agent.finetune.train_sac_agent.*": "SAC on the fine-tuning loop",
    "agent.finetune.train_rlpd_agent.*": "RLPD",
    "agent.finetune.train_ibrl_agent.*": "IBRL",
    "agent.finetune.train_calql_agent.*": "Cal-QL",
    # files that name no class
    "case:dipo_action_gradient_*": "DIPO",
    "case:err_ppo_exact_*": "exact likelihood",
    "case:err_rwr_gaussian_*": "Gaussian policies' algorithms",
}


def reason_for(case: str, classes: Iterable[str]) -> str | None:
    """Why a case is not covered, naming what is missing; None if it is."""
    for pattern, what in NOT_IMPLEMENTED.items():
        if pattern.startswith("case:"):
            if fnmatchcase(case, pattern[5:]):
                return f"not implemented: {case} ({what})"
            continue
        for path in classes:
            if fnmatchcase(path, pattern):
                return f"not implemented: {path} ({what})"
    return None
