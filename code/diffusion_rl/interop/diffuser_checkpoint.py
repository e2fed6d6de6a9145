"""Names in the checkpoints of the PyTorch Diffuser (jannerm/diffuser)."""

from __future__ import annotations

# Its schedule tables, which are part of its state_dict, and ours.
SCHEDULE_BUFFERS = {
    "betas": "betas",
    "alphas_cumprod": "alphas_cumprod",
    "alphas_cumprod_prev": "alphas_cumprod_prev",
    "sqrt_alphas_cumprod": "sqrt_alphas_cumprod",
    "sqrt_one_minus_alphas_cumprod": "sqrt_one_minus_alphas_cumprod",
    "sqrt_recip_alphas_cumprod": "sqrt_recip_alphas_cumprod",
    "sqrt_recipm1_alphas_cumprod": "sqrt_recipm1_alphas_cumprod",
    "posterior_variance": "ddpm_var",
    "posterior_log_variance_clipped": "ddpm_logvar_clipped",
    "posterior_mean_coef1": "ddpm_mu_coef1",
    "posterior_mean_coef2": "ddpm_mu_coef2",
}
