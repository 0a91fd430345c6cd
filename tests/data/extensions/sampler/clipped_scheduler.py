"""DDIM (Song et al. 2021, equation 12, without noise), whose estimate of the image is clipped to three deviations."""

import torch


class Clipped:
    order = 1
    init_noise_sigma = 1.0

    def __init__(self, num_train_timesteps, beta_start, beta_end, beta_schedule, prediction_type="epsilon"):
        assert beta_schedule == "scaled_linear"
        betas = torch.linspace(beta_start**0.5, beta_end**0.5, num_train_timesteps) ** 2
        self.signal = torch.cat([torch.ones(1), (1 - betas).cumprod(0)])  # signal[i + 1] belongs to timestep i
        self.prediction_type = prediction_type

    def set_timesteps(self, steps, device):
        self.gap = (len(self.signal) - 1) // steps
        self.timesteps = torch.arange(steps - 1, -1, -1, device=device) * self.gap + 1

    def scale_model_input(self, latents, timestep):
        return latents

    def add_noise(self, latents, noise, timestep):
        signal = float(self.signal[int(timestep) + 1])
        return signal**0.5 * latents + (1 - signal) ** 0.5 * noise

    def step(self, prediction, timestep, latents, return_dict):
        now = int(timestep) + 1
        a, b = float(self.signal[now]), float(self.signal[max(now - self.gap, 0)])
        noise = prediction
        if self.prediction_type == "v_prediction":
            noise = a**0.5 * prediction + (1 - a) ** 0.5 * latents
        image = ((latents - (1 - a) ** 0.5 * noise) / a**0.5).clamp(-3, 3)
        return (b**0.5 * image + (1 - b) ** 0.5 * noise,)
