"""Options that make commands on the toy quick, and the same for the library."""

from pyattr import diffusion

TRAIN = ["--steps", "3", "--batch-size", "8", "--ema", "0.9", "--threads", "1", "--device", "cpu"]
SCORE = ["--num-timesteps", "2", "--proj-dim", "16", "--batch-size", "8", "--threads", "1", "--device", "cpu"]
SETTINGS = {"num_timesteps": 2, "proj_dim": 16, "batch_size": 8, "query_noises": 1}  # those of SCORE
SCHEDULE = diffusion.Schedule()
