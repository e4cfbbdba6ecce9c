"""What every method should give: the mathematics of its paper and of mergekit, over whole tensors, in float64.

Written from the formulas, not from the code they judge: no tiles, no blocks, no thresholds, everything at once. Two
conventions of StreamMerge are part of what is judged and so are part of the oracles:

    order     magnitudes are compared as the arithmetic sees them (Δ rounded to the work dtype), equal ones by index
    chance    the mask of DARE is a function of seed, tensor, model and index: done again here, in numpy

An election can hang on the last bit: with weights 0.7 and 0.3, deltas of 3 to −7 cancel on paper and in no floating
point. Where that is so an oracle names both outcomes, and either is right.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import xxhash
from numpy.typing import NDArray

Array = NDArray[np.float64]
Value = float | bool | str

BLOCK = 65536


@dataclass(frozen=True)
class Given:
    """One tensor to merge, flat, in float64; `shared` parameters by name, and `each` with one value per model.

    `work` is the dtype of the arithmetic that is judged: np.float32, or np.float64 when a float64 is involved.
    """

    name: str
    base: Array | None
    models: Sequence[Array]
    shared: Mapping[str, Value | None]
    each: Mapping[str, Sequence[Value | None]]
    work: type[np.floating] = np.float32
    seed: int = 0
    shape: tuple[int, ...] = ()
    depth: float = 0.0

    def numbers(self, name: str) -> list[float]:
        return [float(value) for value in self.each[name] if value is not None]

    def number(self, name: str) -> float:
        value = self.shared[name]
        assert value is not None
        return float(value)

    def deltas(self) -> list[Array]:
        assert self.base is not None
        return [model - self.base for model in self.models]

    def vectors(self) -> list[Array]:
        """The deltas where there is a base, else the models."""
        return list(self.models) if self.base is None else self.deltas()

    def on_base(self, merged: Array) -> Array:
        """What was merged of `vectors`, on the base where there is one."""
        return merged if self.base is None else self.base + merged

    def rows(self, values: NDArray[Any]) -> NDArray[Any]:
        """Flat values as rows along the last dimension; a vector is one row."""
        return values.reshape(-1, max(1, self.shape[-1]) if self.shape else 1)


@dataclass(frozen=True)
class Expected:
    """The result, and what an element is instead if its election went the other way, where rounding may decide it."""

    values: Array
    rival: Array


def decided(values: Array) -> Expected:
    """A result that leaves nothing to rounding but its last digits."""
    return Expected(values, values)


def oracle(method: str, given: Given) -> Expected:
    """The expected result of a method. Raises LookupError, with what to do, for one that has no oracle yet."""
    if method not in ORACLES:
        raise LookupError(f"{method} has no oracle: write its mathematics as a function in tests/methods/oracles.py "
                          f"and list it in ORACLES")  # fmt: skip
    # Infinities and NaN in the inputs are cases like any other.
    with np.errstate(all="ignore"):
        return ORACLES[method](given)


# --- the methods -----------------------------------------------------------------------------------------------------


def linear(given: Given) -> Expected:
    """y = Σ w_i x_i, divided by Σ w_i if normalised; weights that sum to zero give NaN."""
    weights = given.numbers("weight")
    merged = sum((weight * x for weight, x in zip(weights, given.models, strict=True)), np.zeros_like(given.models[0]))
    if given.shared["normalize"]:
        weight_sum = math.fsum(weights)
        merged = merged / weight_sum if weight_sum else np.full_like(merged, np.nan)
    return decided(merged)


def passthrough(given: Given) -> Expected:
    """y = scale · x, or x."""
    (scale,) = given.each["scale"]
    return decided(given.models[0] * (1.0 if scale is None else float(scale)))


def slerp(given: Given) -> Expected:
    """y = [sin((1−t)θ) b + sin(tθ) x] / sin θ; linear beyond |cos θ| = 0.9995; vectors up to 1e-8 are not normalised.

    A number that is not finite leaves no angle, and so no finite result.
    """
    assert given.base is not None
    base, model, t = given.base, given.models[0], given.number("t")

    def unit(vector: Array) -> Array:
        norm = math.sqrt(np.dot(vector, vector))
        return vector / norm if norm > 1e-8 else vector

    if not (np.isfinite(base).all() and np.isfinite(model).all()):
        return decided(np.full_like(base, np.nan))
    cosine = float(np.clip(np.dot(unit(base), unit(model)), -1, 1))
    if abs(cosine) > 0.9995:
        return decided((1 - t) * base + t * model)
    angle = math.acos(cosine)
    return decided((math.sin((1 - t) * angle) * base + math.sin(t * angle) * model) / math.sin(angle))


def task_arithmetic(given: Given) -> Expected:
    """y = b + λ Σ w_i Δ_i, divided by Σ w_i if normalised. Nothing is sparsified, whatever the density."""
    return _summed(given, [delta * _lines(given) for delta in given.deltas()])


def ties(given: Given) -> Expected:
    """Trim each delta to its largest entries, elect a sign, merge what agrees."""
    return _elected(given, _rescaled(given, [_largest(given, i) for i in range(len(given.models))]))


def dare_linear(given: Given) -> Expected:
    """Drop entries by chance, rescale, add up."""
    return _summed(given, _rescaled(given, [_drawn(given, i) for i in range(len(given.models))]))


def dare_ties(given: Given) -> Expected:
    """Drop entries by chance, rescale, elect a sign, merge what agrees."""
    return _elected(given, _rescaled(given, [_drawn(given, i) for i in range(len(given.models))]))


def hi_merging(given: Given) -> Expected:
    """Trim each delta to its largest entries, scale it, add up; with a sign consensus, merge what agrees."""
    pruned = _rescaled(given, [_largest(given, i) for i in range(len(given.models))])
    sparse = [scale * delta for scale, delta in zip(given.numbers("scale"), pruned, strict=True)]
    return _elected(given, sparse) if given.shared["sign_consensus"] else _summed(given, sparse)


def metagpt(given: Given) -> Expected:
    """y = b + λ Σ λ_i Δ_i with λ_i = ‖Δ_i‖² / Σ ‖Δ_k‖²; deltas that are all zero have no coefficients."""
    assert given.base is not None
    deltas = [delta.astype(given.work).astype(np.float64) for delta in given.deltas()]
    squares = [float(np.dot(delta, delta)) for delta in deltas]
    everything = sum(squares)
    merged = np.zeros_like(given.base)
    for delta, square in zip(given.deltas(), squares, strict=True):
        merged = merged + (square / everything if everything else 0.0) * delta
    return decided(given.base + given.number("lambda") * merged)


def nuslerp(given: Given) -> Expected:
    """y = [sin((1−t)θ) v_1 + sin(tθ) v_2] / sin θ (+ b), of tensors, rows or columns; linear if parallel."""
    first, second = given.numbers("weight")
    t = 0.5 if abs(first + second) < 1e-6 else second / (first + second)
    rows = not given.shared["nuslerp_flatten"]
    columns = rows and bool(given.shared["nuslerp_row_wise"])
    one, other = (_as_rows(given, v, rows=rows, columns=columns) for v in given.vectors())
    merged = np.empty_like(one)
    for i, (v, w) in enumerate(zip(one, other, strict=True)):
        unit_v, unit_w = (x / max(math.sqrt(np.dot(x, x)), 1e-7) for x in (v, w))
        cosine = float(np.clip(np.dot(unit_v, unit_w), -1, 1))
        if not (np.isfinite(v).all() and np.isfinite(w).all()):
            merged[i] = np.nan
        elif 1 - cosine**2 <= 1e-12:
            merged[i] = (1 - t) * v + t * w
        else:
            angle = math.acos(cosine)
            merged[i] = (math.sin((1 - t) * angle) * v + math.sin(t * angle) * w) / math.sin(angle)
    return decided(given.on_base((merged.T if columns else merged).reshape(-1)))


def multislerp(given: Given) -> Expected:
    """The direction M = Σ w_i u_i, at the length Σ w_i n_i; with a log map, moved by the mean of the ways from there.

    Directions that cancel leave Σ w_i v_i.
    """
    vectors, weights, eps = given.vectors(), given.numbers("weight"), given.number("eps")
    if len(vectors) == 1:
        return decided(given.models[0])
    if given.shared["normalize_weights"]:
        weight_sum = math.fsum(weights)
        weights = [weight / weight_sum if weight_sum else math.nan for weight in weights]
    if not (np.isfinite(vectors).all() and np.isfinite(weights).all()):
        return decided(np.full_like(vectors[0], np.nan))
    lengths = [math.sqrt(np.dot(v, v)) for v in vectors]
    if given.shared["log_map"]:
        units = [v / n if n > eps else np.zeros_like(v) for v, n in zip(vectors, lengths, strict=True)]
    else:
        units = [v / (n + eps) for v, n in zip(vectors, lengths, strict=True)]
    mean = _weighted(weights, units)
    norm = math.sqrt(np.dot(mean, mean))
    if norm < max(eps, 1e-7 * sum(abs(w) * math.sqrt(np.dot(u, u)) for w, u in zip(weights, units, strict=True))):
        return decided(given.on_base(_weighted(weights, vectors)))
    point = mean / norm
    if given.shared["log_map"]:
        way = _weighted(weights, [_way(point, u) if u.any() else u for u in units])
        point = _walked(point, way)
    return decided(given.on_base(point * sum(w * n for w, n in zip(weights, lengths, strict=True))))


def karcher(given: Given) -> Expected:
    """The Riemannian mean on the sphere by fixed-point steps, at the mean length."""
    models, tol = given.models, given.number("tol")
    if not np.isfinite(models).all():
        return decided(np.full_like(models[0], np.nan))
    lengths = [math.sqrt(np.dot(x, x)) for x in models]
    units = [x / n for x, n in zip(models, lengths, strict=True) if n > tol]
    if not units:
        return decided(np.zeros_like(models[0]))
    share = 1 / len(models)
    if len(units) == len(models) and all(np.array_equal(u, units[0]) for u in units):
        # Of one direction: the mean, and free of the rounding that turns over what lies between two bf16.
        return decided(sum(models, np.zeros_like(models[0])) / len(models))
    mean = share * sum(units, np.zeros_like(units[0]))
    norm = math.sqrt(np.dot(mean, mean))
    point = units[0] if norm < tol else mean / norm
    for _ in range(int(given.number("max_iter"))):
        way = share * sum((_way(point, u, tol) for u in units), np.zeros_like(point))
        if math.sqrt(np.dot(way, way)) < tol:
            break
        point = _walked(point, way)
    return decided(point * sum(lengths) * share)


def model_stock(given: Given) -> Expected:
    """y = t mean(x_i) + (1 − t) b, t = K c / (1 + (K − 1) c), c the mean cosine between deltas; by tensor or by row."""
    assert given.base is not None
    rows = bool(given.shared["filter_wise"])
    deltas = [_as_rows(given, delta, rows=rows) for delta in given.deltas()]
    norms = [np.sqrt((delta * delta).sum(1)) for delta in deltas]
    pairs = [(i, j) for i in range(len(deltas)) for j in range(i)]
    cosines = [np.clip((deltas[i] * deltas[j]).sum(1) / np.maximum(norms[i] * norms[j], 1e-6), -1, 1) for i, j in pairs]
    c, count = sum(cosines, np.zeros_like(norms[0])) / len(pairs), len(deltas)
    denominator = 1 + (count - 1) * c
    t = np.where(np.abs(denominator) < 1e-6, 0.0, count * c / denominator)
    mean = sum(deltas, np.zeros_like(deltas[0])) / count
    return decided(given.base + (t[:, None] * mean).reshape(-1))


def nearswap(given: Given) -> Expected:
    """y = w x + (1 − w) b, written from the base; w = t / max(|x − b|, 1e-6), between 0 and 1."""
    assert given.base is not None
    (delta,) = given.deltas()
    if given.number("t") <= 0:
        return decided(given.base)
    share = np.clip(given.number("t") / np.maximum(np.abs(delta), 1e-6), 0, 1)
    return decided(np.where(share == 1, given.models[0], given.base + share * delta))


def ram(given: Given) -> Expected:
    """Changes of one model in full, those of several averaged."""
    changes, count = _changes(given)
    parts = [np.where(changed, delta, 0.0) for changed, delta in zip(changes, given.deltas(), strict=True)]
    return decided(given.on_base(sum(parts, np.zeros(len(count))) / np.maximum(count, 1)))


def ramplus_tl(given: Given) -> Expected:
    """As ram; a model's own changes times 1 + r ρ, ρ its shared changes by its own, at most alpha."""
    changes, count = _changes(given)
    merged = np.zeros(len(count))
    for changed, delta in zip(changes, given.deltas(), strict=True):
        own, shared = changed & (count == 1), changed & (count > 1)
        ratio = min(shared.sum() / max(own.sum(), given.number("epsilon")), given.number("alpha"))
        merged = merged + np.where(own, (1 + given.number("r") * ratio) * delta, 0.0)
        merged = merged + np.where(shared, delta, 0.0) / np.maximum(count, 1)
    return decided(given.on_base(merged))


def consensus(given: Given) -> Expected:
    """b + λ τ where enough models have |Δ_i| >= l_i |τ − Δ_i|, τ = Σ w_i Δ_i; a NaN counts as wanted."""
    assert given.base is not None
    deltas, weights = given.deltas(), given.numbers("weight")
    parts = [weight * delta for weight, delta in zip(weights, deltas, strict=True)]
    tau = sum(parts, np.zeros_like(given.base))
    size = sum((np.abs(part) for part in parts), np.zeros_like(given.base))
    exact = _held(given, *parts, *np.cumsum(parts, axis=0))
    count, least, most = (np.zeros(len(tau)) for _ in range(3))
    for factor, delta in zip(given.numbers("mask_lambda"), deltas, strict=True):
        bar = factor * np.abs(tau - delta)
        # What rounding may turn over, unless the work dtype holds all of it.
        slack = 8 * np.finfo(given.work).eps * (abs(factor) * (size + np.abs(delta)) + np.abs(delta))
        slack = np.where(exact & _held(given, delta, tau - delta, bar), 0.0, slack)
        count += ~(np.abs(delta) < bar)
        least += ~(np.abs(delta) < bar + slack)
        most += ~(np.abs(delta) < bar - slack)
    needed = min(given.number("consensus"), len(deltas))
    kept, dropped = given.base + given.number("lambda") * tau, given.base
    right = np.where(count >= needed, kept, dropped)
    contested = (least < needed) & (most >= needed)
    return Expected(right, np.where(contested, np.where(count >= needed, dropped, kept), right))


def average(given: Given) -> Expected:
    """Checkpoints of one run, oldest first, by schedule."""
    models, count = given.models, len(given.models)
    schedule = given.shared["schedule"]
    if schedule == "ema":
        running = models[0]
        for x in models[1:]:
            running = given.number("decay") * x + (1 - given.number("decay")) * running
        return decided(running)
    if schedule == "wsd":
        # The same sum by updates: x_1, then what each further checkpoint added, by the decayed rate.
        z = np.arange(1, count) / count
        rates = {"linear": 1 - z, "cosine": (1 + np.cos(np.pi * z)) / 2, "sqrt": 1 - z**0.5}
        steps = [x - before for before, x in pairwise(models)]
        rate = rates[str(given.shared["decay_shape"])].tolist()
        return decided(models[0] + _weighted(rate, steps) if steps else models[0])
    shares = [1.0 if schedule == "sma" else float(i) for i in range(1, count + 1)]
    return decided(_weighted(shares, models) / sum(shares))


def breadcrumbs(given: Given) -> Expected:
    """Drop the outliers and the small entries, add up."""
    return _summed(given, _rescaled(given, [_crumbs(given, i) for i in range(len(given.models))]))


def breadcrumbs_ties(given: Given) -> Expected:
    """Drop the outliers and the small entries, elect a sign, merge what agrees."""
    return _elected(given, _rescaled(given, [_crumbs(given, i) for i in range(len(given.models))]))


def della(given: Given) -> Expected:
    """Drop entries by chance and rank, rescale, elect a sign, merge what agrees."""
    return _elected(given, _rescaled(given, [_drawn_by_rank(given, i) for i in range(len(given.models))]))


def della_linear(given: Given) -> Expected:
    """Drop entries by chance and rank, rescale, add up."""
    return _summed(given, _rescaled(given, [_drawn_by_rank(given, i) for i in range(len(given.models))]))


def localize_and_stitch(given: Given) -> Expected:
    """y = b + λ f Σ w_i m_i Δ_i / Σ w_i m_i, m_i the largest entries, a sum of weights of 0 counting as 1."""
    assert given.base is not None
    masks = np.array([_largest(given, i) for i in range(len(given.models))]).reshape(len(given.models), len(given.base))
    deltas = np.array(given.deltas()).reshape(masks.shape)
    weights = np.array(given.numbers("weight"))[:, None]
    overlap = (weights * masks).sum(0)
    merged = np.where(masks, weights * deltas, 0.0).sum(0) / np.where(overlap == 0, 1.0, overlap)
    return decided(given.base + given.number("lambda") * _lines(given) * merged)


def sce(given: Given) -> Expected:
    """Select where models differ most, weigh them by their mean squares, merge what has the sign of the sum."""
    assert given.base is not None
    deltas, topk = np.array(given.deltas()), given.number("select_topk")
    if topk < 1:
        spread = np.sqrt(np.var(deltas, axis=0)).astype(given.work)
        spread = np.where(np.isnan(spread), np.inf, spread)
        selected = np.zeros(len(given.base), bool)
        selected[np.argsort(-spread, kind="stable")[: max(0, int(topk * np.count_nonzero(spread)))]] = True
        deltas = np.where(selected, deltas, 0.0)
    means = (deltas * deltas).mean(1) if deltas.size else np.zeros(len(deltas))
    equal = means.sum() < given.number("equal_below") or means.sum() == 0
    weights = (np.full(len(means), 1 / len(means)) if equal else means / means.sum())[:, None]
    ballot = deltas.sum(0)

    def merged(positive: NDArray[np.bool_]) -> Array:
        assert given.base is not None
        agrees = np.where(positive, deltas > 0, deltas < 0)
        total, weight_sum = np.where(agrees, weights * deltas, 0.0).sum(0), np.where(agrees, weights, 0.0).sum(0)
        return given.base + _lines(given) * total / np.maximum(weight_sum, 1e-6)

    right = merged(ballot >= 0)
    return Expected(right, np.where(_undecided(given, list(deltas), ballot), merged(ballot < 0), right))


def arcee_fusion(given: Given) -> Expected:
    """x where |Δ| · KL of the row is at least median + 1.5 (q3 − q1), else b."""
    assert given.base is not None
    (delta,) = given.deltas()
    if not len(delta):
        return decided(given.base)
    divergence = _divergence(given.rows(given.base), given.rows(delta)).astype(np.float32).astype(np.float64)
    shown = given.rows(np.abs(delta).astype(given.work).astype(np.float64))
    importance = (shown * divergence[:, None]).reshape(-1)
    importance = np.where(np.isnan(importance), np.inf, importance)
    upwards, n = np.sort(importance), len(importance)
    low, median, high = (upwards[math.floor(q * (n - 1))] for q in (0.25, 0.5, 0.75))
    threshold = median + 1.5 * (high - low)
    kept, left = given.models[0], given.base
    right = importance >= threshold
    # A divergence may be rounded otherwise. In a single row that is a factor on everything, and in float32 products
    # are exact.
    open_ended = np.abs(importance - threshold) <= 4 * np.finfo(np.float32).eps * threshold
    if len(divergence) == 1:
        open_ended &= (given.work is np.float64) & (np.abs(importance - threshold) <= 1e-15 * threshold)
    open_ended &= (importance > 0) & np.isfinite(importance)
    return Expected(np.where(right, kept, left), np.where(right ^ open_ended, kept, left))


def _divergence(base: Array, delta: Array) -> NDArray[np.longdouble]:
    """Σ p' ln(p'/q') of every row, p' and q' the softmax of base + Δ and of base, each plus 1e-8, in 80 bits.

    Written with what stays exact when Δ is small: p = q e^d with d = Δ − ln Σ q e^Δ, and p'/q' = 1 + t.
    """
    wide, step = base.astype(np.longdouble), delta.astype(np.longdouble)
    q = np.exp(wide - wide.max(1, keepdims=True))
    q /= q.sum(1, keepdims=True)
    d = step - np.log1p((q * np.expm1(step)).sum(1, keepdims=True))
    # A row that is moved as a whole has the same softmax.
    d = np.where(np.abs(d) <= 2.0**-49 * np.abs(step).max(1, keepdims=True), 0.0, d)
    smoothed = q + np.longdouble("1e-8")
    t = q * np.expm1(d) / smoothed
    # (1 + t) ln(1 + t) less t, which sums to nothing as p and q both sum to 1; a series where those cancel.
    excess = np.where(
        np.abs(t) < 1e-3, t**2 / 2 - t**3 / 6 + t**4 / 12 - t**5 / 20 + t**6 / 30, (1 + t) * np.log1p(t) - t
    )
    return (smoothed * excess).sum(1)


ORACLES: dict[str, Callable[[Given], Expected]] = {
    "linear": linear,
    "passthrough": passthrough,
    "slerp": slerp,
    "task_arithmetic": task_arithmetic,
    "ties": ties,
    "dare_linear": dare_linear,
    "dare_ties": dare_ties,
    "hi_merging": hi_merging,
    "metagpt": metagpt,
    "nuslerp": nuslerp,
    "multislerp": multislerp,
    "karcher": karcher,
    "model_stock": model_stock,
    "nearswap": nearswap,
    "ram": ram,
    "ramplus_tl": ramplus_tl,
    "consensus": consensus,
    "average": average,
    "sce": sce,
    "arcee_fusion": arcee_fusion,
    "breadcrumbs": breadcrumbs,
    "breadcrumbs_ties": breadcrumbs_ties,
    "della": della,
    "della_linear": della_linear,
    "localize_and_stitch": localize_and_stitch,
}

# --- vectors and directions ------------------------------------------------------------------------------------------


def _as_rows(given: Given, values: Array, *, rows: bool, columns: bool = False) -> Array:
    """A matrix whose rows are the vectors: the tensor, its rows, or its columns. A vector is one."""
    if not rows or len(given.shape) < 2:
        return values.reshape(1, -1)
    matrix = values.reshape(-1, given.shape[-1])
    return np.ascontiguousarray(matrix.T) if columns else matrix


def _weighted(weights: Sequence[float], vectors: Sequence[Array]) -> Array:
    return sum((w * v for w, v in zip(weights, vectors, strict=True)), np.zeros_like(vectors[0]))


def _way(point: Array, unit: Array, nearest: float = 0.0) -> Array:
    """The log map: from `point` along the sphere to `unit`; none to what is near, or opposite."""
    cosine = float(np.clip(np.dot(point, unit), -1, 1))
    angle = math.acos(cosine)
    if angle < nearest or angle == 0 or math.pi - angle < 1e-6:
        return np.zeros_like(point)
    return angle / math.sin(angle) * (unit - cosine * point)


def _walked(point: Array, way: Array) -> Array:
    """The exponential map."""
    angle = math.sqrt(np.dot(way, way))
    if angle == 0:
        return point
    moved = math.cos(angle) * point + math.sin(angle) / angle * way
    return moved / math.sqrt(np.dot(moved, moved))


def _held(given: Given, *values: Array) -> NDArray[np.bool_]:
    """Where the work dtype holds all values exactly."""
    return np.all([value.astype(given.work) == value for value in values], axis=0)


def _changes(given: Given) -> tuple[list[NDArray[np.bool_]], NDArray[np.int64]]:
    """Which entries each model changed by more than epsilon, as the arithmetic sees them, and how many models did."""
    epsilon = given.work(given.number("epsilon"))
    changes = [~(np.abs(delta).astype(given.work) <= epsilon) for delta in given.deltas()]
    return changes, np.sum(changes, axis=0)


# --- the parts of the task-vector family -----------------------------------------------------------------------------


def _largest(given: Given, i: int) -> NDArray[np.bool_]:
    """The max(1, int(density · n)) largest |Δ|, the lower index first among equals; NaN counts as infinite."""
    delta, density = given.deltas()[i], given.numbers("density")[i]
    return top(np.abs(delta).astype(given.work), density)


def top(magnitudes: NDArray[np.floating], density: float) -> NDArray[np.bool_]:
    """Which of `magnitudes` a density keeps."""
    n = len(magnitudes)
    if density >= 1 or density <= 0:
        return np.full(n, density >= 1)
    sizes = np.where(np.isnan(magnitudes), np.inf, magnitudes)
    kept = np.zeros(n, bool)
    kept[np.argsort(-sizes, kind="stable")[: max(1, int(density * n))]] = True
    return kept


def _drawn(given: Given, i: int) -> NDArray[np.bool_]:
    density = given.numbers("density")[i]
    if density >= 1:
        return np.ones(len(given.models[i]), bool)
    return drawn_mask(given.seed, given.name, i, len(given.models[i]), density)


def _crumbs(given: Given, i: int) -> NDArray[np.bool_]:
    """Sorted upwards: n_bot entries go, int(density · n) stay, the rest go; n_bot = n − keep − int(gamma · n) or 0."""
    delta, density, gamma = given.deltas()[i], given.numbers("density")[i], given.numbers("gamma")[i]
    n = len(delta)
    if density >= 1:
        return np.ones(n, bool)
    sizes = np.abs(delta).astype(given.work)
    upwards = np.argsort(-np.where(np.isnan(sizes), np.inf, sizes), kind="stable")[::-1]
    keep = int(density * n)
    bottom = max(0, n - keep - int(gamma * n))
    kept = np.zeros(n, bool)
    kept[upwards[bottom : bottom + keep]] = True
    return kept


def _drawn_by_rank(given: Given, i: int) -> NDArray[np.bool_]:
    """The entry with r smaller ones of the m of a row draws u, and stays if r ≥ (u − density + ε) (m − 1) / 2ε.

    Of equal ones all have the least r among them, or all the largest, by the lowest random bit of each.
    """
    delta, density, epsilon = given.deltas()[i], given.numbers("density")[i], given.numbers("epsilon")[i]
    if density >= 1 or density <= 0:
        return np.full(len(delta), density >= 1)
    sizes = given.rows(np.abs(delta).astype(given.work))
    sizes = np.where(np.isnan(sizes), np.inf, sizes) * (1 if epsilon >= 0 else -1)
    m = sizes.shape[1]
    # The bits belong to a place in a unit: as many rows as 65,536 elements hold, and at least one.
    bits = random_bits(given.seed, given.name, i, len(delta), max(1, BLOCK // m) * m)
    u = (bits >> np.uint32(1)).astype(np.float32) * np.float32(2.0**-31)
    if epsilon == 0 or m == 1:
        return u <= np.float32(density)
    least = np.concatenate([np.searchsorted(np.sort(row), row, "left") for row in sizes])
    largest = np.concatenate([np.searchsorted(np.sort(row), row, "right") - 1 for row in sizes])
    r = np.where(bits & np.uint32(1), largest, least)
    return r >= (u - np.float32(density - abs(epsilon))) * np.float32((m - 1) / (2 * abs(epsilon)))


def _lines(given: Given) -> float:
    """LiNeS: α + β · depth."""
    return given.number("lines_alpha") + given.number("lines_beta") * given.depth


def _rescaled(given: Given, masks: list[NDArray[np.bool_]]) -> list[Array]:
    """The deltas under their masks, scaled back to their sums of magnitudes, unless dense or all but empty.

    Or by 1/density where asked; and, whatever else, by the factor of LiNeS.
    """
    sparse = []
    for delta, mask, density in zip(given.deltas(), masks, given.numbers("density"), strict=True):
        kept = np.where(mask, delta, 0.0)
        before, after = np.abs(delta).sum(), np.abs(kept).sum()
        if given.shared["rescale"] and density < 1:
            if given.shared.get("rescale_by") == "density":
                kept = kept / density if density > 0 else kept
            elif not (before < 1e-7 or after < 1e-7):
                kept = kept * (before / after)
        sparse.append(kept * _lines(given))
    return sparse


def _summed(given: Given, sparse: list[Array]) -> Expected:
    assert given.base is not None
    weights = given.numbers("weight")
    merged = sum((weight * delta for weight, delta in zip(weights, sparse, strict=True)), np.zeros_like(given.base))
    if given.shared["normalize"] and abs(sum(weights)) >= 1e-8:
        merged = merged / sum(weights)
    return decided(given.base + given.number("lambda") * merged)


def _elected(given: Given, sparse: list[Array]) -> Expected:
    """The majority sign of an element is that of Σ D_i, zero counting as positive; only its D_i are merged."""
    assert given.base is not None
    weights = given.numbers("weight")
    parts = [weight * delta for weight, delta in zip(weights, sparse, strict=True)]
    ballot = sum(parts, np.zeros_like(given.base))
    positive = ballot >= 0

    def merged(positive: NDArray[np.bool_]) -> Array:
        assert given.base is not None
        total, weight_sum = np.zeros_like(given.base), np.zeros_like(given.base)
        for weight, part in zip(weights, parts, strict=True):
            agrees = np.where(positive, part > 0, part < 0)
            total += np.where(agrees, part, 0.0)
            weight_sum += np.where(agrees, weight, 0.0)
        if given.shared["normalize"]:
            total = total / np.where(weight_sum == 0, 1.0, weight_sum)
        return given.base + given.number("lambda") * total

    right = merged(positive)
    return Expected(right, np.where(_undecided(given, parts, ballot), merged(~positive), right))


def _undecided(given: Given, parts: list[Array], ballot: Array) -> NDArray[np.bool_]:
    """Where the sum of the votes is so near to zero that rounding them may turn it over."""
    cast = sum((np.abs(part) for part in parts), np.zeros_like(ballot))
    near = np.abs(ballot) <= 8 * np.finfo(given.work).eps * cast
    # Votes that the work dtype holds exactly, and adds exactly, leave nothing open: a sum of zero is positive.
    weights = [float(weight) for weight in given.each.get("weight", ()) if weight is not None]
    exact = np.full(len(ballot), all(float(given.work(weight)) == weight for weight in weights))
    running = np.zeros_like(ballot)
    for part in parts:
        running = running + part
        exact &= (part.astype(given.work) == part) & (running.astype(given.work) == running)
    return near & ~exact & (cast > 0)


# --- chance ----------------------------------------------------------------------------------------------------------


def drawn_mask(seed: int, name: str, position: int, elements: int, density: float) -> NDArray[np.bool_]:
    """Which elements DARE keeps: those whose 31 random bits fall under density · 2³¹."""
    bits = random_bits(seed, name, position, elements)
    return (bits >> np.uint32(1)).astype(np.int64) < round(density * 2**31)


def random_bits(seed: int, name: str, position: int, elements: int, unit: int = BLOCK) -> NDArray[np.uint32]:
    """32 bits per element. stream key: xxh3 of seed, position and name; block key: splitmix64; bits: murmur3, twice.

    `unit` is how many elements a block has.
    """
    stream = np.uint64(xxhash.xxh3_64_intdigest(f"{seed}\0{position}\0{name}".encode()))
    blocks = -(-elements // unit)
    # splitmix64: the state advances by the golden gamma with every block, and is finalised.
    state = stream + (np.arange(blocks, dtype=np.uint64) + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15)
    state = (state ^ (state >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    state = (state ^ (state >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    key = state ^ (state >> np.uint64(31))
    low, high = (key & np.uint64(0xFFFFFFFF)).astype(np.uint32), (key >> np.uint64(32)).astype(np.uint32)
    index = np.arange(unit, dtype=np.uint32)
    bits = _murmur3(_murmur3(index[None, :] ^ low[:, None]) ^ high[:, None])
    return bits.reshape(-1)[:elements]


def _murmur3(bits: NDArray[np.uint32]) -> NDArray[np.uint32]:
    """The 32-bit finaliser of murmur3."""
    bits = (bits ^ (bits >> np.uint32(16))) * np.uint32(0x85EBCA6B)
    bits = (bits ^ (bits >> np.uint32(13))) * np.uint32(0xC2B2AE35)
    return bits ^ (bits >> np.uint32(16))


# --- rounding --------------------------------------------------------------------------------------------------------

# Bits of the fraction, the exponent of the smallest normal number, and the largest number.
_FORMATS = {
    "F64": (52, -1022, float(np.finfo(np.float64).max)),
    "F32": (23, -126, float(np.finfo(np.float32).max)),
    "BF16": (7, -126, 3.3895313892515355e38),
    "F16": (10, -14, 65504.0),
}


def rounded(values: Array, dtype: str) -> Array:
    """`values` rounded once, to nearest and ties to even, to a dtype by its name in a file."""
    if dtype == "F64":
        return values
    fraction, smallest_exponent, largest = _FORMATS[dtype]
    with np.errstate(all="ignore"):
        _, exponent = np.frexp(values)
        # A power of two: dividing and multiplying by it is exact.
        step = np.ldexp(1.0, np.maximum(exponent - 1, smallest_exponent) - fraction)
        result = np.where(np.isfinite(values), np.rint(values / step) * step, values)
        return np.where(np.abs(result) > largest, np.copysign(np.inf, result), result)
