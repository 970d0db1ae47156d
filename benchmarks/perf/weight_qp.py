"""The quadratic and the linear problem of per-sample weights against general solvers.

Rows F and U have normal entries and a correlation of -.29; the target is half, and nine tenths, of
what the box [-1, 1] holds without a predicted loss of utility.

- qp: `linalg.solve_weight_qp` against cvxpy with Clarabel (tolerances 1e-8) and OSQP (eps 1e-8), if
  cvxpy is installed (it is no dependency of ours); otherwise against scipy's trust-constr with
  sparse rows, on a tenth of the smallest size, where it takes half a minute. `rival` names who was
  compared; `distance` is the relative distance between both solutions, and a rival that hit
  `--limit` seconds or gave up counts with the seconds until then. The modelling layer's own
  seconds are not counted against cvxpy: the solver's are, as it reports them.
- attainable: `linalg.max_linear_under_box` against HiGHS through `scipy.optimize.linprog`, without
  its presolve, which takes a hundred times longer than the solution here.

Seconds are wall time on `--threads` threads, ours the best of five. Targets: qp at least 10 times
faster, less than 1 s at n = 1,000,000 on two cores; attainable less than 1 s there.

    python benchmarks/perf/weight_qp.py [--json] [--quick] [--sizes 100000 1000000] [--threads 1]
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import time
from collections.abc import Callable

import numpy as np
import torch
from scipy.optimize import Bounds, LinearConstraint, linprog, minimize
from scipy.sparse import csr_matrix, identity
from torch import Tensor

from unsc_plugin.linalg import max_linear_under_box, solve_weight_qp

SHARES = (0.5, 0.9)


def problem(n: int) -> tuple[Tensor, float]:
    """Return rows (2, n) of about unit length and the largest F·e in the box with U·e >= 0."""
    rows = torch.from_numpy(np.random.default_rng(0).standard_normal((2, n))) / n**0.5
    rows[1] -= 0.3 * rows[0]
    return rows, max_linear_under_box(rows[0], rows[1], 0.0, -1.0, 1.0)[0]


def seconds(run: Callable[[], object], repeats: int = 5) -> float:
    """Return the best of `repeats`: the machine may be shared."""
    best = float("inf")
    for _ in range(repeats):
        began = time.perf_counter()
        run()
        best = min(best, time.perf_counter() - began)
    return best


def by_cvxpy(solver: str, limit: float) -> Callable[[np.ndarray, np.ndarray], tuple]:
    import cvxpy

    settings = {
        "CLARABEL": {"tol_gap_abs": 1e-8, "tol_gap_rel": 1e-8, "tol_feas": 1e-8},
        "OSQP": {"eps_abs": 1e-8, "eps_rel": 1e-8, "max_iter": 1_000_000},
    }[solver]

    def solve(rows: np.ndarray, r: np.ndarray) -> tuple:
        e = cvxpy.Variable(rows.shape[1])
        task = cvxpy.Problem(
            cvxpy.Minimize(cvxpy.sum_squares(e) / 2), [rows @ e >= r, e >= -1, e <= 1]
        )
        task.solve(solver=solver, time_limit=limit, **settings)
        stats = task.solver_stats
        return stats.solve_time + (stats.setup_time or 0.0), e.value

    return solve


def by_trust_constr(rows: np.ndarray, r: np.ndarray) -> tuple:
    n = rows.shape[1]
    eye = identity(n, format="csc")
    began = time.perf_counter()
    found = minimize(
        lambda e: (e @ e / 2, e),
        np.zeros(n),
        jac=True,
        hess=lambda e: eye,
        method="trust-constr",
        constraints=[LinearConstraint(csr_matrix(rows), r, np.inf)],
        bounds=Bounds(-1, 1),
        options={"gtol": 1e-8, "xtol": 1e-10, "barrier_tol": 1e-8, "maxiter": 500},
    )
    return time.perf_counter() - began, found.x


def quadratic(n: int, rivals: dict[str, Callable], rival_n: int) -> dict[str, object]:
    result: dict[str, object] = {}
    for share in SHARES:
        rows, best = problem(n)
        r = torch.tensor([share * best, 0.0], dtype=torch.float64)
        found = solve_weight_qp(rows, r, -1.0, 1.0)
        key = f"at {share:g} of attainable"
        result[f"ours_s {key}"] = seconds(lambda a=rows, b=r: solve_weight_qp(a, b, -1.0, 1.0))
        result[f"iterations {key}"] = found.iterations
    rows, best = problem(rival_n)
    r = torch.tensor([SHARES[0] * best, 0.0], dtype=torch.float64)
    ours = solve_weight_qp(rows, r, -1.0, 1.0).e.numpy()
    own = seconds(lambda: solve_weight_qp(rows, r, -1.0, 1.0))
    for name, solve in rivals.items():
        spent, e = solve(rows.numpy(), r.numpy())
        result[f"{name}"] = {
            "rival": name,
            "n": rival_n,
            "ours_s": own,
            "rival_s": spent,
            "rival_over_ours": spent / own,
            "distance": None
            if e is None
            else float(np.linalg.norm(e - ours) / np.linalg.norm(ours)),
        }
    return result


def attainable(n: int, limit: float) -> dict[str, object]:
    rows, best = problem(n)
    f, u = rows.numpy()
    began = time.perf_counter()
    found = linprog(
        -f,
        A_ub=-u[None],
        b_ub=[0.0],
        bounds=(-1, 1),
        method="highs",
        options={"presolve": False, "time_limit": limit},
    )
    spent = time.perf_counter() - began
    own = seconds(lambda: max_linear_under_box(rows[0], rows[1], 0.0, -1.0, 1.0))
    return {
        "ours_s": own,
        "highs_s": spent,
        "highs_over_ours": spent / own,
        "relative_difference": None if found.fun is None else abs(best + found.fun) / best,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--quick", action="store_true", help="sizes for a test; says nothing")
    parser.add_argument("--sizes", type=int, nargs="+", default=[100_000, 1_000_000])
    parser.add_argument("--limit", type=float, default=300.0, help="seconds for a rival")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads of torch")
    options = parser.parse_args()
    sizes = [2_000] if options.quick else options.sizes
    torch.set_num_threads(options.threads)
    general = importlib.util.find_spec("cvxpy") is not None
    if general:
        rivals = {name: by_cvxpy(name, options.limit) for name in ("CLARABEL", "OSQP")}
    else:
        rivals = {"trust-constr": by_trust_constr}
    result: dict[str, dict[str, object]] = {}
    for n in sizes:
        rival_n = n if general else min(sizes) // 10
        compared = rivals if general or n == min(sizes) else {}
        result[f"qp {n}"] = quadratic(n, compared, rival_n)
        result[f"attainable {n}"] = attainable(n, options.limit)
    if options.json:
        print(json.dumps(result))
        return
    for name, numbers in result.items():
        print(f"{name}:")
        for key, value in numbers.items():
            print(f"  {key}: {value:.4g}" if isinstance(value, float) else f"  {key}: {value}")


if __name__ == "__main__":
    main()
