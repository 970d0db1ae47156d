"""A biased synthetic table and its logistic regression, all in float64 numpy, by explicit formulas.

Tests use it as the independent reference for influences and weights: dense Hessian, dense
gradients, no code of the package.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

SIZES = (1500, 800, 4000)
RIDGE = 2.0


@dataclass(frozen=True)
class Part:
    """Rows x (n, 20), labels y and groups s in {0, 1} (n,)."""

    x: np.ndarray
    y: np.ndarray
    s: np.ndarray


def sigmoid(z):
    return 1 / (1 + np.exp(-z))


def draw(k: int = 0, sizes: tuple[int, ...] = SIZES) -> tuple[Part, ...]:
    """Return train, validation and test; features standardised with the train part (ddof 0)."""
    raw = [raw_part(np.random.default_rng(10 * k + i + 1), n) for i, n in enumerate(sizes)]
    mean, deviation = raw[0].x.mean(0), raw[0].x.std(0)
    return tuple(Part((part.x - mean) / deviation, part.y, part.s) for part in raw)


def raw_part(rng: np.random.Generator, n: int) -> Part:
    """Return n rows before they are standardised; the last column is ±1 for the group."""
    s = rng.random(n) < 0.67
    x = rng.standard_normal((n, 19))
    x[:, :4] += 0.6 * (s[:, None] - 0.5)
    x = np.c_[x, 2.0 * s - 1]
    w = np.r_[0.5 * np.linspace(1.2, -0.8, 19), 0.5]
    y = rng.random(n) < sigmoid(x @ w + 0.6 * (s - 0.5))
    return Part(x, y.astype(np.int64), s.astype(np.int64))


def fit(x, y, mu: float = RIDGE, weight=None):
    """Return argmin Σ a_j·log-loss + (μ/2)|θ|² (20,), without intercept, by Newton from 0."""
    weight = np.ones(len(y)) if weight is None else weight
    theta = np.zeros(x.shape[1])
    for _ in range(50):
        step = np.linalg.solve(hessian(x, theta, mu, weight), gradient(x, y, theta, mu, weight))
        theta = theta - step
        if np.abs(step).max() < 1e-14:
            return theta
    raise AssertionError("Newton did not converge")


def gradient(x, y, theta, mu, weight):
    return x.T @ (weight * (sigmoid(x @ theta) - y)) + mu * theta


def hessian(x, theta, mu, weight):
    p = sigmoid(x @ theta)
    return (x * (weight * p * (1 - p))[:, None]).T @ x + mu * np.eye(x.shape[1])


def log_loss(x, y, theta):
    """Return the loss of every row (n,)."""
    z = x @ theta
    return np.logaddexp(0, z) - y * z


def parity(part: Part, theta, s=None) -> float:
    """Return the signed gap of mean probabilities, group 1 minus group 0."""
    s, p = part.s if s is None else s, sigmoid(part.x @ theta)
    return p[s == 1].mean() - p[s == 0].mean()


def loss_gap(part: Part, theta) -> float:
    """Return mean loss of (s=0, y=1) minus mean loss of (s=1, y=1)."""
    loss = log_loss(part.x, part.y, theta)
    own = part.y == 1
    return loss[own & (part.s == 0)].mean() - loss[own & (part.s == 1)].mean()


def parity_gradient(part: Part, theta):
    p = sigmoid(part.x @ theta)
    slope = (p * (1 - p))[:, None] * part.x
    return slope[part.s == 1].mean(0) - slope[part.s == 0].mean(0)


def influences(train: Part, val: Part, theta, mu: float = RIDGE, weight=None):
    """Return F (n,) of the parity gap on `val` and U (n,) of the summed loss there.

    F_j = ∇f·H⁻¹g_j is the change of f predicted for the removal of row j.
    """
    weight = np.ones(len(train.y)) if weight is None else weight
    g = (sigmoid(train.x @ theta) - train.y)[:, None] * train.x
    loss_gradient = val.x.T @ (sigmoid(val.x @ theta) - val.y)
    criteria = np.c_[parity_gradient(val, theta), loss_gradient]
    directions = np.linalg.solve(hessian(train.x, theta, mu, weight), criteria)
    return tuple((g @ directions).T)
