"A sampler as a scheduler of diffusers: a table of numbers, one row for each network call."
# from scheduling_cudlab import CudlabScheduler
# pipe.scheduler = CudlabScheduler.from_pretrained("the folder of this file")
# pipe(num_inference_steps=N)  # N as in scheduler_config.json, no other

import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.schedulers.scheduling_utils import SchedulerMixin, SchedulerOutput


class CudlabScheduler(SchedulerMixin, ConfigMixin):
    "Row k: the time it asks, how its answer becomes a velocity, how all velocities make a state."

    order = 1

    @register_to_config
    def __init__(
        self,
        asked=(),  # what the network is told at each call
        of_state=(),  # factor on the state, in the velocity
        of_answer=(),  # factor on the network's answer, in the velocity
        keep=(),  # factor on the state, in the next one
        weights=(),  # row k: factors on the velocities of calls 0 to k, in the next state
        start=1.0,  # standard deviation of the noise at the start
        clip=0.0,  # range of the predicted data; 0 = not clipped
        times=(),  # linear-path time of each call, for clipping
        scales=(),  # linear-path state over this state, for clipping
    ):
        self.init_noise_sigma = start
        self.num_inference_steps = len(asked)
        self.timesteps = torch.tensor(asked, dtype=torch.float32)
        self.velocities = []

    def set_timesteps(self, num_inference_steps=None, device=None, **unused):
        "Start anew; the number of steps is the table's."
        count = len(self.config.asked)
        if num_inference_steps not in (None, count):
            raise ValueError(f"num_inference_steps = {num_inference_steps}: this table has {count}")
        self.timesteps = torch.tensor(self.config.asked, dtype=torch.float32, device=device)
        self.velocities = []

    def set_begin_index(self, begin_index=0):
        "A table has one beginning."
        if begin_index:
            raise ValueError("this table starts from noise; it cannot begin with a picture")

    def scale_model_input(self, sample, timestep=None):
        "States are kept as the network is fed them."
        return sample

    def step(self, model_output, timestep, sample, return_dict=True, **unused):
        "The next state; calls are counted, so one time may be asked twice."
        c, k = self.config, len(self.velocities)
        x = sample.float()
        answer = model_output[:, : x.shape[1]].float()  # a learned variance follows it
        v = c.of_state[k] * x + c.of_answer[k] * answer
        if c.clip:
            state = c.scales[k] * x
            v = (state - (state - c.times[k] * v).clamp(-c.clip, c.clip)) / c.times[k]
        self.velocities.append(v)
        x = self.weigh(c.keep[k], x)
        for weight, velocity in zip(c.weights[k], self.velocities):
            x = x + self.weigh(weight, velocity)
        x = x.to(sample.dtype)
        return SchedulerOutput(prev_sample=x) if return_dict else (x,)

    def weigh(self, weight, x):
        "A number times x, or one number for each channel."
        weight = torch.as_tensor(weight, dtype=x.dtype, device=x.device)
        return weight.reshape(-1, *[1] * (x.dim() - 2)) * x if weight.dim() else weight * x

    def __len__(self):
        return len(self.config.asked)
