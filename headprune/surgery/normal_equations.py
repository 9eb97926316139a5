"""The sums over tokens from which a linear layer's least-squares change follows, and ways to solve them."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from headprune.errors import InvalidInput, unknown_name

log = logging.getLogger("headprune")

RIDGES = (10.0, 1.0, 1e-1, 1e-2, 1e-3, 1e-4)  # tried in this order while the held-out error falls
LARGEST_FACTOR = 10.0  # of a head, by mask tuning
JITTERS = (0.0, 1e-10, 1e-8, 1e-6, 1e-4, 1e-2)  # of the mean diagonal, tried in turn where a Gram matrix is singular
INFINITE = "calibration activations are NaN or infinite; look for overflow in low precision, or run in fp32."


@dataclass
class NormalEquations:
    """Weighted sums over tokens of what least squares needs, in fp64: X^T X, X^T R, sum of R^2, with a last column of ones in X."""

    gram: Tensor  # [inputs + 1, inputs + 1]
    cross: Tensor  # [inputs + 1, outputs]
    squares: Tensor  # [outputs]
    tokens: int = 0  # how many were added

    @classmethod
    def empty(cls, inputs: int, outputs: int) -> NormalEquations:
        gram, cross = (
            torch.zeros(inputs + 1, inputs + 1, dtype=torch.float64),
            torch.zeros(inputs + 1, outputs, dtype=torch.float64),
        )
        return cls(gram, cross, torch.zeros(outputs, dtype=torch.float64))

    def add(self, inputs: Tensor, residual: Tensor, weights: Tensor | None = None) -> None:
        """inputs [tokens, inputs], residual [tokens, outputs]: what the present weights leave to be explained; weights [tokens]:
        how much each token counts, by default 1."""
        if not len(inputs):
            return
        padded = torch.cat([inputs, inputs.new_ones(len(inputs), 1)], dim=1).float()
        residual = residual.float()
        weighted = padded if weights is None else padded * weights[:, None].to(padded)
        self.gram += (weighted.T @ padded).cpu()
        self.cross += (weighted.T @ residual).cpu()
        squares = residual.square() if weights is None else residual.square() * weights[:, None].to(padded)
        self.squares += squares.sum(dim=0).cpu()
        self.tokens += len(inputs)

    def refuse_infinite(self) -> None:
        """InvalidInput where a sum is not finite."""
        if not all(bool(torch.isfinite(sums).all()) for sums in (self.gram, self.cross, self.squares)):
            raise InvalidInput(INFINITE)

    def about(self, columns: Tensor, weight: Tensor) -> NormalEquations:
        """The equations of these inputs alone, for the residual that `weight` [outputs, columns] leaves of this one."""
        used = torch.cat([columns.cpu(), torch.tensor([len(self.gram) - 1])])
        gram, cross = self.gram[used][:, used], self.cross[used]
        old = torch.cat([weight.T.double().cpu(), torch.zeros(1, len(weight), dtype=torch.float64)])
        pulled = gram @ old
        squares = self.squares - 2 * (old * cross).sum(dim=0) + (old * pulled).sum(dim=0)
        return NormalEquations(gram, cross - pulled, squares.clamp(min=0), self.tokens)

    def error(self, change: Tensor) -> float:
        """Squared residual that is left after adding `change` [inputs + 1, outputs] to the weights."""
        return float((self.squares.sum() - 2 * (change * self.cross).sum() + (change * (self.gram @ change)).sum()).clamp(min=0))

    def solve(self, ridge: float, bias: bool) -> Tensor:
        """The change of weights and bias [inputs + 1, outputs] (its last row 0 where there is no bias); `ridge` is relative
        to the Gram's mean diagonal and leaves the bias free. Raises InvalidInput as `factored` does."""
        inputs = self.gram.shape[0] - 1
        used = inputs + int(bias)
        mean = self.gram.diagonal()[:inputs].mean().clamp(min=torch.finfo(torch.float64).tiny)
        damping = torch.full((used,), float(ridge * mean), dtype=torch.float64)
        damping[inputs:] = 1e-9 * float(self.gram[-1, -1])
        change = torch.zeros_like(self.cross)
        factor, _ = factored(self.gram[:used, :used] + torch.diag(damping))
        change[:used] = torch.cholesky_solve(self.cross[:used], factor)
        return change

    def __add__(self, other: NormalEquations) -> NormalEquations:
        sums = (getattr(self, name) + getattr(other, name) for name in ("gram", "cross", "squares", "tokens"))
        return NormalEquations(*sums)


def factored(gram: Tensor) -> tuple[Tensor, float]:
    """The lower Cholesky factor of `gram` (fp64), and the jitter that it took, as a share of the mean diagonal.

    Raises InvalidInput where the matrix is not finite, or not even the largest jitter makes it positive definite.
    """
    if not bool(torch.isfinite(gram).all()):
        raise InvalidInput(INFINITE)
    diagonal = gram.diagonal()
    mean = float(diagonal.mean().clamp(min=torch.finfo(gram.dtype).tiny))
    for jitter in JITTERS:
        factor, failed = torch.linalg.cholesky_ex(gram + torch.diag(torch.full_like(diagonal, jitter * mean)))
        if not failed:
            if jitter:
                log.warning(
                    "a singular Gram matrix of %d inputs: solved with a jitter of %g of its mean diagonal", len(gram), jitter
                )
            return factor, jitter
    raise InvalidInput(
        f"the Gram matrix of {len(gram)} inputs is not positive definite, even with a jitter of {JITTERS[-1]:g} of its mean "
        "diagonal; give other calibration data."
    )


@dataclass(frozen=True)
class Layer:
    """What a solver knows of the output projection: weight [outputs, inputs] of the heads that stay, the number of the head that
    each input is of, and whether there is a bias to be changed."""

    weight: Tensor
    owner: Tensor
    bias: bool

    @property
    def heads(self) -> int:
        return int(self.owner.max()) + 1 if len(self.owner) else 0


Solve = Callable[[NormalEquations, Layer, Sequence[float]], Iterator[tuple[float, Tensor]]]


@dataclass(frozen=True)
class Solver:
    """A way to compensate. solve: yields (setting, change [inputs + 1, outputs]) for each of `settings`; the last one before the
    held-out error rises is taken, if that is less than without any. unknowns: how many numbers it finds for one output, at most."""

    solve: Solve
    unknowns: Callable[[Layer], int]
    settings: Sequence[float]


_solvers: dict[str, Solver] = {}


def solver(name: str, unknowns: Callable[[Layer], int], settings: Sequence[float]) -> Callable[[Solve], Solve]:
    """Registers a `Solver`."""

    def register(function: Solve) -> Solve:
        _solvers[name] = Solver(function, unknowns, settings)
        return function

    return register


def get_solver(name: str) -> Solver:
    if name not in _solvers:
        raise unknown_name("compensation", name, _solvers)
    return _solvers[name]


@solver("least_squares", unknowns=lambda layer: layer.weight.shape[1] + int(layer.bias), settings=RIDGES)
def least_squares(equations: NormalEquations, layer: Layer, settings: Sequence[float]) -> Iterator[tuple[float, Tensor]]:
    """Any change of weights and bias, ridge towards the old weights."""
    for ridge in settings:
        yield ridge, equations.solve(ridge, layer.bias)


@solver("mask_tuning", unknowns=lambda layer: layer.heads, settings=(1.0,))
def mask_tuning(equations: NormalEquations, layer: Layer, settings: Sequence[float]) -> Iterator[tuple[float, Tensor]]:
    """One factor for each head, merged into its weights (Kwon et al. 2022, 4.3): damping 1, none taken outside [-10, 10]."""
    if not layer.heads:
        return
    weight = layer.weight.double().cpu().T  # [inputs, outputs]
    inputs = len(weight)
    pick = torch.nn.functional.one_hot(layer.owner, layer.heads).double()  # [inputs, heads]
    gram = pick.T @ (equations.gram[:inputs, :inputs] * (weight @ weight.T)) @ pick
    pull = pick.T @ (equations.cross[:inputs] * weight).sum(dim=1)
    more = torch.linalg.solve(gram + torch.eye(layer.heads, dtype=torch.float64), pull)  # factor - 1
    if float((1 + more).abs().max()) <= LARGEST_FACTOR:
        change = torch.zeros_like(equations.cross)
        change[:inputs] = (pick @ more)[:, None] * weight
        yield 1.0, change


@solver("bias", unknowns=lambda layer: int(layer.bias), settings=(0.0,))
def bias_alone(equations: NormalEquations, layer: Layer, settings: Sequence[float]) -> Iterator[tuple[float, Tensor]]:
    """The mean of what is missing goes into the bias (An et al. 2024, FLAP, eq. 7); nothing where there is none."""
    if layer.bias:
        change = torch.zeros_like(equations.cross)
        change[-1] = equations.cross[-1] / equations.gram[-1, -1]
        yield 0.0, change
