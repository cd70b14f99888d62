"""The lab's velocity network as a diffusers model."""

from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config

# diffusers brings along only the files that are imported here
from .bundle import copy_code
from .condition import Condition  # noqa: F401
from .config import lookup  # noqa: F401
from .net import make_network
from .path import append_dims  # noqa: F401


class VelocityModel(ModelMixin, ConfigMixin):
    "v(x, t): t = 1 is noise, t = 0 data."

    @register_to_config
    def __init__(self, preset, shape, classes=0, heads=1, times=1, phi0=0.5, head=1):
        super().__init__()
        self.classes, self.times = classes, times
        self.net = make_network(
            preset, tuple(shape), classes=classes, heads=heads, times=times, phi0=phi0
        )

    def forward(
        self,
        sample,  # state x, (B, *S)
        timestep,  # time, (B,), in [0, 1]
        class_labels=None,  # (B,) or None
        end=None,  # where the jump of a flow map ends, (B,) or None
    ):
        "The velocity, (B, *S), in float32; times too, the network alone computes in its own dtype."
        sample = sample.to(self.dtype)
        if self.config.head == 1:
            return self.net(sample, timestep, class_labels, end)
        return self.net.heads(sample, timestep, class_labels, end)[self.config.head - 1]

    def save_pretrained(self, save_directory, *args, **kwargs):
        "Weights and configuration, and the code that they need."
        super().save_pretrained(save_directory, *args, **kwargs)
        copy_code(__file__, save_directory)
