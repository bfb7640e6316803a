"""Time token morphing against adjacency matrices: python benchmarks/morphing.py [--rounds 14] [--merged 7].

The slow form keeps a (B, G, N) matrix of 0 and 1 that says which token is in which group, and multiplies it with the
features in every round and at the end. Both forms must give the same groups, loss and gradient.
"""

import argparse
import platform
from collections.abc import Callable
from statistics import median

import torch
import torch.nn.functional as F
from references import in_turns, ratio
from torch import Tensor

from timm_tokens.losses import DTMLoss
from timm_tokens.ops import morph_groups


def adjacency(target: Tensor, rounds: list[int]) -> Tensor:
    """The (B, G, N) membership matrix after all rounds of matching on the groups' mean features."""
    b, n, _ = target.shape
    member = torch.eye(n, device=target.device).expand(b, n, n)
    for r in rounds:
        tokens = F.normalize(member @ target / member.sum(2, keepdim=True), dim=2)
        best, partner = (tokens[:, ::2] @ tokens[:, 1::2].mT).max(2)
        order = best.argsort(1, descending=True)
        chosen, rest = order[:, :r, None], order[:, r:].sort(1).values[:, :, None]
        even, odd = member[:, ::2], member[:, 1::2]
        merged = even.gather(1, chosen.expand(-1, -1, n))
        odd = odd.scatter_add(1, partner.gather(1, chosen[:, :, 0])[:, :, None].expand(-1, -1, n), merged)
        member = torch.cat([even.gather(1, rest.expand(-1, -1, n)), odd], dim=1)
    return member


def slow_loss(student: Tensor, teacher: Tensor, rounds: list[int]) -> Tensor:
    member = adjacency(teacher, rounds)
    share = member.sum(2, keepdim=True)
    u, v = member @ student / share, member @ teacher / share
    return (share * F.smooth_l1_loss(u, v, beta=2.0, reduction="none")).mean(2).sum() / teacher.shape[:2].numel()


def fast_loss(student: Tensor, teacher: Tensor, rounds: list[int]) -> Tensor:
    return DTMLoss()(student, teacher, schedules=[rounds])


def gradient(loss: Callable[..., Tensor], student: Tensor, *args: object) -> Tensor:
    student = student.detach().requires_grad_()
    loss(student, *args).backward()
    return student.grad


def compare(name: str, slow: Callable[[], object], fast: Callable[[], object], pairs: int) -> None:
    """Time the two in turn, so that what disturbs one disturbs the other; print medians and the median ratio."""
    times = in_turns([slow, fast], pairs)
    slow_ms, fast_ms = (1e3 * median(each) for each in times)
    print(f"{name:24s} {slow_ms:8.1f} ms {fast_ms:8.1f} ms   x {ratio(*times):.2f}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=14)
    parser.add_argument("--merged", type=int, nargs="+", default=[2, 7, 13], help="tokens merged in each round")
    parser.add_argument("--pairs", type=int, default=11)
    args = parser.parse_args()
    torch.manual_seed(0)
    b, n, d = 32, 196, 512
    print(f"{platform.processor() or platform.machine()}, torch {torch.__version__}, {torch.get_num_threads()} threads")
    # Tokens of an image resemble each other, and neighbours most.
    teacher = F.avg_pool1d(torch.randn(b, d, n + 4), 5, stride=1).mT.contiguous() + 0.3 * torch.randn(b, 1, d)
    student = torch.randn(b, n, d)
    for merged in args.merged:
        rounds = [merged] * args.rounds
        print(f"\nB = {b}, N = {n}, D = {d}, {args.rounds} rounds of {merged}: adjacency matrices, this package, ratio")
        groups = morph_groups(teacher, rounds)
        assert torch.equal(adjacency(teacher, rounds).argmax(1), groups)
        torch.testing.assert_close(*(gradient(f, student, teacher, rounds) for f in (slow_loss, fast_loss)))
        compare("groups", lambda r=rounds: adjacency(teacher, r), lambda r=rounds: morph_groups(teacher, r), args.pairs)
        compare(
            "loss and gradient",
            lambda r=rounds: gradient(slow_loss, student, teacher, r),
            lambda r=rounds: gradient(fast_loss, student, teacher, r),
            args.pairs,
        )


if __name__ == "__main__":
    main()
