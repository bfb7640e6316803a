"""The training loop for tasks: schedules, mixed precision, accumulation, averaging, processes, and exact resuming."""

from timm_tokens.peers import PeerLost
from timm_tokens.stopping import Stopped
from timm_tokens.training.evaluation import Accuracy, Fidelity
from timm_tokens.training.loop import Result, train
from timm_tokens.training.settings import Settings

__all__ = ["Accuracy", "Fidelity", "PeerLost", "Result", "Settings", "Stopped", "train"]
