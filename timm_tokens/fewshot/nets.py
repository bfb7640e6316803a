"""Many small reconstruction networks trained side by side: batched matmuls, a written-out gradient and fused Adam.

The networks are tiny (at D = 64 a matmul takes five microseconds), so that autograd, one kernel per parameter and one
Python step per network would cost more than the arithmetic. Here one call serves all the networks. A network's random
numbers depend on no other network, because each has its own stream.
"""

from functools import cache

import torch
from torch import Tensor
from torch.nn.functional import one_hot, pad
from torch.optim.adam import adam

DEPTH = 4
BETA1, BETA2, EPS = 0.9, 0.999, 1e-7
_TINY = 1e-6  # the smallest length that a vector is divided by
# Features are padded with zeros, which stay zero, to whole vector registers: the leftover numbers of a vectorised loop
# are rounded in another way, and which ones are left over would depend on what else is in the batch.
_LANES = 16
relu_backward = torch.ops.aten.threshold_backward.grad_input  # in one pass over the numbers


def unit(x: Tensor) -> Tensor:
    """Scales every row to unit length, and leaves an all-zero row as it is: (..., D) -> (..., D)."""
    return x / torch.linalg.vector_norm(x, dim=-1, keepdim=True).clamp_min(_TINY)


def reconstruction_gradient(
    output: Tensor, target: Tensor, out: Tensor | None = None, work: Tensor | None = None
) -> Tensor:
    """Gradient (N, M, D) of `-mean_m cos(target_m, output_m - mean(output))` with respect to the output (N, M, D).

    The targets' rows have unit (or zero) length; `out` and `work` are buffers for the result and what comes between.
    """
    direction = torch.sub(output, output.mean(1, keepdim=True), out=out)
    scale = torch.linalg.vector_norm(direction, dim=-1, keepdim=True).clamp_min_(_TINY).reciprocal_()  # (N, M, 1)
    cosine = torch.mul(direction.mul_(scale), target, out=work).sum(-1, keepdim=True)
    gradient = direction.mul_(cosine).sub_(target).mul_(scale / output.shape[1])
    return gradient.sub_(gradient.mean(1, keepdim=True))


def close_gaps(x: Tensor, holes: Tensor, movers: Tensor, n: int) -> Tensor:
    """The first n rows of x after the rows `movers` (all of them n or beyond) were written over the rows `holes`.

    Only what moves is copied: dropping a few networks of many costs as much as those few.
    """
    x[holes] = x[movers]
    return x[:n]


class Nets:
    """N networks of four D -> D layers with a ReLU after each, the last one too (arXiv 2106.11486).

    Each carries a linear classifier of its output into K classes, zero at the start and unused when K = 0.
    The buffers of an update are kept from one to the next: fresh memory would cost as much as the arithmetic on it.

    Args:
        weights: The layers' initial weights, DEPTH tensors (N, D, D) laid out as in nn.Linear, trained in place.
        num_points: M, the points that each network is trained on.
        ways: K.
        lr: Adam's learning rate.
    """

    def __init__(self, weights: list[Tensor], num_points: int, ways: int = 0, lr: float = 1e-3):
        n, dim, _ = weights[0].shape
        self.lr = lr
        self.updates = 0
        self.weights = [*weights, weights[0].new_zeros(n, ways, dim)]
        self.biases = [w.new_zeros(n, 1, w.shape[1]) for w in self.weights]
        pairs = list(zip(self.weights, self.biases, strict=True))
        self.means = [[torch.zeros_like(p) for p in pair] for pair in pairs]
        self.squares = [[torch.zeros_like(p) for p in pair] for pair in pairs]
        self.outputs = [weights[0].new_empty(n, num_points, dim) for _ in range(DEPTH + 2)]  # and two to work with
        self.gradients = [torch.empty_like(w) for w in (self.weights[0], self.weights[DEPTH])]

    def forward(self, x: Tensor, stop: int = DEPTH, nets: Tensor | slice = slice(None)) -> Tensor:
        """The first layers, of all the networks or of those numbered `nets`: (N, M, D) -> (N, M, D)."""
        for weight, bias in zip(self.weights[:stop], self.biases[:stop], strict=True):
            x = torch.baddbmm(bias[nets], x, weight[nets].mT).relu_()
        return x

    def update(self, inputs: Tensor, target: Tensor, labels: Tensor, label_weight: float) -> None:
        """One Adam step on the reconstruction loss, plus label_weight times the cross-entropy of the classifier.

        Inputs are the points after dropout, targets rows of unit (or zero) length, both (N, M, D); labels (N, S) are
        the classes of the first S points, or none at all for S = 0.
        """
        self.updates += 1
        outputs, (gradient, work) = [inputs, *self.outputs[:DEPTH]], self.outputs[DEPTH:]
        for layer in range(DEPTH):
            weight, bias = self.weights[layer], self.biases[layer]
            torch.baddbmm(bias, outputs[layer], weight.mT, out=outputs[layer + 1]).relu_()
        reconstruction_gradient(outputs[DEPTH], target, gradient, work)
        # The bias of an output that fires on every point shifts all that the loss centres: its gradient is 0, or that
        # of the classifier alone. A sum would give rounding errors, which Adam blows up to steps.
        always, shift = outputs[DEPTH].amin(1, keepdim=True) > 0, gradient.new_zeros(())
        if labels.shape[1]:
            below = self._classify(outputs[DEPTH][:, : labels.shape[1]], labels, label_weight)
            gradient[:, : labels.shape[1]] += below
            shift = below.sum(1, keepdim=True)
        for layer in reversed(range(DEPTH)):
            relu_backward(gradient, outputs[layer + 1], 0, grad_input=gradient)
            total = gradient.sum(1, keepdim=True)
            total = torch.where(always, shift, total) if layer == DEPTH - 1 else total
            below = torch.bmm(gradient, self.weights[layer], out=outputs[layer + 1]) if layer else gradient
            self._step(layer, outputs[layer], gradient, total)
            gradient = below

    def drop(self, holes: Tensor, movers: Tensor, n: int) -> None:
        """Keeps n networks: those numbered `movers` take the places `holes` of dropped ones (see `close_gaps`)."""
        self.weights, self.biases = (
            [close_gaps(p, holes, movers, n) for p in group] for group in (self.weights, self.biases)
        )
        self.means, self.squares = (
            [[close_gaps(p, holes, movers, n) for p in pair] for pair in group] for group in (self.means, self.squares)
        )
        self.outputs, self.gradients = ([p[:n] for p in group] for group in (self.outputs, self.gradients))

    def _classify(self, points: Tensor, labels: Tensor, label_weight: float) -> Tensor:
        """Trains the classifier on labelled points (N, S, D); returns the gradient with respect to the points."""
        weight = self.weights[DEPTH]
        logits = torch.baddbmm(self.biases[DEPTH], points, weight.mT)  # (N, S, K)
        error = (logits.softmax(-1) - one_hot(labels, logits.shape[-1])) * (label_weight / labels.shape[1])
        below = error @ weight
        self._step(DEPTH, points, error, error.sum(1, keepdim=True))
        return below

    def _step(self, layer: int, inputs: Tensor, error: Tensor, total: Tensor) -> None:
        """Adam on one linear layer, given the gradient of its output and that of its bias (N, 1, D)."""
        gradient = torch.bmm(error.mT, inputs, out=self.gradients[layer == DEPTH])
        adam(
            [self.weights[layer], self.biases[layer]], [gradient, total], self.means[layer], self.squares[layer], [],
            [torch.full((), 1e9, device=error.device) for _ in range(2)], lr=self.lr * _bias_correction(self.updates),
            beta1=BETA1, beta2=BETA2, eps=EPS, weight_decay=0.0, amsgrad=False, maximize=False, fused=True,
        )  # fmt: skip


@cache
def _bias_correction(updates: int) -> float:
    """The factor of Adam's learning rate in the published rule, which adds epsilon before the correction, not after.

    torch's own correction is switched off by a huge step number. Float32, in which 1 - 0.999^t has lost six bits, is
    part of the published rule as well: a ReLU at the edge of firing remembers the difference.
    """
    t = torch.tensor(float(updates))
    return ((1 - BETA2**t).sqrt() / (1 - BETA1**t)).item()


class Run:
    """The networks of a chunk that have not stopped yet, and what goes with each: all of them indexed alike.

    Args:
        features: Prepared episodes, (T, M, D).
        labels: (T, S) labels of the support; S = 0 without.
        seeds: T * num_nets, one for every net of the first episode, then of the second, and so on.
        weights: Initial weights, 4 tensors (num_nets, D, D), the same for all the episodes; None: drawn.
        lr: Adam's learning rate.
    """

    def __init__(self, features: Tensor, labels: Tensor, seeds: list[int], weights: list[Tensor] | None, lr: float):
        copies, dim = len(seeds) // max(len(features), 1), features.shape[-1]
        padding = -dim % _LANES
        features = pad(features, (0, padding))
        self.points, self.labels = (t.repeat_interleave(copies, 0) for t in (features, labels))  # (N, M, D), (N, S)
        self.inputs, self.target = torch.empty_like(self.points), unit(self.points)
        self.index = torch.arange(len(seeds), device=features.device)
        self.streams = [torch.Generator(features.device).manual_seed(seed) for seed in seeds]
        if weights is None:
            weights = glorot_uniform(self.points, dim, self.streams)
        else:
            weights = [w.to(features).repeat(len(features), 1, 1) for w in weights]
        if padding:
            weights = [pad(w, (0, padding, 0, padding)) for w in weights]
        ways = int(labels.max()) + 1 if labels.numel() else 0
        self.nets = Nets(weights, features.shape[1], ways, lr)
        self.dimension = self.points.new_zeros(len(seeds))

    def drop(self, stopped: Tensor) -> None:
        """Takes the networks with these indices out of the batch."""
        going = torch.ones_like(self.index, dtype=torch.bool).index_fill_(0, stopped, False).nonzero().squeeze(1)
        n = len(going)
        holes, movers = stopped[stopped < n], going[going >= n]
        self.nets.drop(holes, movers, n)
        for name in ("points", "target", "labels", "index", "dimension"):
            setattr(self, name, close_gaps(getattr(self, name), holes, movers, n))
        self.inputs = self.inputs[:n]  # written anew by each update
        for hole, mover in zip(holes.tolist(), movers.tolist(), strict=True):
            self.streams[hole] = self.streams[mover]
        del self.streams[n:]


def glorot_uniform(like: Tensor, dim: int, streams: list[torch.Generator]) -> list[Tensor]:
    """Initial weights of N networks of D dimensions, a stream each: DEPTH tensors (N, D, D), of the kind of `like`.

    A weight takes 32 random bits: on the CPU half the time of torch's uniform numbers.
    """
    limit = (3 / dim) ** 0.5  # sqrt(6 / (fan in + fan out))
    bits = _random_bits(like, DEPTH * dim * dim, torch.int32, streams)
    return [part.view(-1, dim, dim).to(like.dtype).mul_(limit / 2**31) for part in bits.chunk(DEPTH, dim=1)]


def drop_out(points: Tensor, share: float, streams: list[torch.Generator], out: Tensor) -> Tensor:
    """Inverted dropout of points (N, M, D), a stream each, written to `out` unless the share is 0.

    The mask takes 8 random bits an entry where they are enough, as for a half, or else 16, to which the share is
    rounded: on the CPU less than a tenth of the time of torch's Bernoulli numbers.
    """
    if not share:
        return points
    dtype = torch.int8 if (share * 2**8).is_integer() else torch.int16
    first = round(share * 2 ** (8 * dtype.itemsize)) + torch.iinfo(dtype).min
    bits = _random_bits(points, points[0].numel(), dtype, streams)
    return torch.ge(bits.view_as(points), first, out=out).mul_(points).mul_(1 / (1 - share))


def _random_bits(like: Tensor, count: int, dtype: torch.dtype, streams: list[torch.Generator]) -> Tensor:
    """Random integers of all values of their type, a stream for each row: (streams, count)."""
    words = -(-count * dtype.itemsize // 8)
    bits = torch.empty(len(streams), words, dtype=torch.long, device=like.device)
    for row, stream in zip(bits, streams, strict=True):
        row.random_(-(2**63), None, generator=stream)
    return bits.view(dtype)[:, :count]
