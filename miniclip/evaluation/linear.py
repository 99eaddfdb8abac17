"""Linear classifiers on frozen features: the linear probe, and few-shot learning."""

import warnings
from collections.abc import Callable, Sequence
from statistics import fmean, stdev
from typing import Any, NamedTuple

import torch
from torch import Tensor

from miniclip.terminal import progress

Classify = Callable[[Tensor], Tensor]
"""Features (N, F) -> logits (N, C)."""

MOST_STEPS = 1000  # the largest number of L-BFGS steps, as in appendix A.3 of the paper


class Examples(NamedTuple):
    """Features with their classes."""

    features: Tensor  # (N, F)
    classes: Tensor  # (N,) int64

    def of(self, rows: Tensor) -> "Examples":
        """Select rows."""
        return Examples(self.features[rows], self.classes[rows])


Fit = Callable[[Examples, float], Classify]
"""A function that fits a classifier to examples, with the L2 strength lambda."""


def fit_probe(train: Examples, strength: float, count: int) -> Classify:
    """Fit logistic regression with scikit-learn.

    Args:
        train: the examples.
        strength: the L2 strength lambda. scikit-learn's C is 1 / lambda.
        count: the number of classes. A class without examples is never predicted.

    Raises:
        ValueError: scikit-learn is missing, or all examples have one class.
    """
    try:
        from sklearn.exceptions import ConvergenceWarning
        from sklearn.linear_model import LogisticRegression
    except ImportError:
        raise ValueError("a probe needs scikit-learn: pip install 'miniclip[eval]'") from None
    if len(seen := train.classes.unique()) < 2:
        raise ValueError("all examples have the same class; expected two classes or more")
    model = LogisticRegression(C=1 / strength, max_iter=MOST_STEPS)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # the paper also stops at this limit
        model.fit(train.features.numpy(), train.classes.numpy())

    def classify(features: Tensor) -> Tensor:
        logits = torch.full((len(features), count), -torch.inf, dtype=torch.float64)
        # predict_log_proba would print a warning about log(0).
        scores = torch.from_numpy(model.decision_function(features.numpy())).double()
        if scores.ndim == 1:  # with two classes, only the second class has scores
            scores = torch.stack([torch.zeros_like(scores), scores], dim=1)
        logits[:, seen] = scores.log_softmax(dim=1)
        return logits

    return classify


def fit_from_text(train: Examples, strength: float, zeroshot: Classify) -> Classify:
    """Fit logistic regression that starts from a zero-shot classifier.

    The logits are zeroshot(x) + x V^T, and V (C, F) starts at 0. The loss is the cross-entropy plus
    lambda / 2 times the squared length of V. The second term keeps V small.

    Args:
        train: the examples.
        strength: the L2 strength lambda.
        zeroshot: the classifier to start from.
    """
    from scipy.optimize import minimize

    x, start = train.features.double(), zeroshot(train.features).double()  # (N, F), (N, C)
    target = torch.zeros_like(start).scatter_(1, train.classes[:, None], 1)

    def loss(flat: Any) -> tuple[float, Any]:
        change = torch.as_tensor(flat).view(start.shape[1], x.shape[1])  # V
        log_shares = (start + x @ change.T).log_softmax(dim=1)
        value = -(target * log_shares).sum() + strength / 2 * change.pow(2).sum()
        gradient = (log_shares.exp() - target).T @ x + strength * change
        return value.item(), gradient.flatten().numpy()

    begin = torch.zeros(start.shape[1] * x.shape[1], dtype=torch.float64).numpy()
    found = minimize(loss, begin, jac=True, method="L-BFGS-B", options={"maxiter": MOST_STEPS})
    change = torch.from_numpy(found.x).view(start.shape[1], x.shape[1])
    return lambda features: zeroshot(features).double() + features.double() @ change.T


def sweep(accuracy: Callable[[float], float]) -> tuple[float, dict[float, float]]:
    """Return the L2 strength with the highest accuracy, and the accuracies of all tried strengths.

    This is the parametric binary search of the paper's appendix A.3. It starts with 10^-6, 10^-4,
    ..., 10^6, and halves the step of the exponent around the best strength, until the step is 1/8.
    If accuracies are equal, the largest strength is the best.

    >>> best, tried = sweep(lambda strength: -abs(strength - 0.03))
    >>> round(best, 4), len(tried)
    (0.0316, 15)
    """
    found: dict[int, float] = {}  # 8 * log10(strength) -> accuracy
    step, candidates = 16, [*range(-48, 49, 16)]
    with progress(total=15, unit="fit") as bar:
        while step:
            for i in candidates:
                found[i] = accuracy(10 ** (i / 8))
                bar.update()
            best = max(found, key=lambda i: (found[i], i))
            step //= 2
            candidates = [i for i in (best - step, best + step) if -48 <= i <= 48]
    return 10 ** (best / 8), {10 ** (i / 8): found[i] for i in sorted(found)}


def share_right(classify: Classify, examples: Examples) -> float:
    """Return the accuracy of a classifier on examples."""
    right = classify(examples.features).argmax(dim=1) == examples.classes
    return right.double().mean().item()


def fit_best(fit: Fit, train: Examples, val: Examples) -> tuple[float, dict[float, float]]:
    """Use `sweep` to find the L2 strength with the best accuracy on `val`."""
    return sweep(lambda strength: share_right(fit(train, strength), val))


def probe(
    fit: Fit, train: Examples, val: Examples | None = None
) -> tuple[Classify, float, dict[float, float]]:
    """Choose the L2 strength on a validation split, then learn from both splits.

    Args:
        fit: a function that fits a classifier, for example `fit_probe` with a fixed `count`.
        train: the examples to learn from.
        val: the validation split; by default a fifth of each class of `train`.

    Returns:
        The classifier, its L2 strength, and the validation accuracy of each tried strength.

    Raises:
        ValueError: `val` is None, and no class has two examples to split.
    """
    if val is None:
        order = [rows for rows in shuffled_by_class(train.classes, seed=0) if len(rows) > 1]
        if not order:
            raise ValueError("every class has one example; choosing lambda needs a class with two")
        held_out = torch.cat([rows[: max(1, len(rows) // 5)] for rows in order])
        kept = torch.ones(len(train.classes), dtype=torch.bool)
        kept[held_out] = False
        val, train = train.of(held_out), train.of(kept.nonzero().squeeze(1))
    strength, accuracies = fit_best(fit, train, val)
    everything = Examples(*(torch.cat(parts) for parts in zip(train, val, strict=True)))
    return fit(everything, strength), strength, accuracies


def shuffled_by_class(classes: Tensor, seed: int) -> list[Tensor]:
    """Return the indices of each class's examples, shuffled with the seed."""
    order = torch.randperm(len(classes), generator=torch.Generator().manual_seed(seed))
    return [order[classes[order] == i] for i in classes.unique()]


class Method(NamedTuple):
    """Examples to train and to test a classifier, and the function that fits it."""

    fit: Fit
    train: Examples
    test: Examples


def few_shot(
    methods: dict[str, Method], shots: Sequence[int], seeds: int = 3
) -> list[dict[str, int | float | str]]:
    """Measure the accuracy after learning from few examples of each class (the paper's figure 6).

    Each seed draws the same examples for all methods. It also draws up to four other examples of
    each class, to choose the L2 strength, as in CoOp (Zhou et al. 2022, arXiv 2109.01134).

    Args:
        methods: the methods by name.
        shots: numbers of training examples in each class, such as [1, 2, 4].
        seeds: the number of draws, at least two.

    Returns:
        A dict with `shots`, `method`, `mean` and `std` for each number of shots and each method.
        `mean` and `std` are the mean and the sample standard deviation of the accuracy.

    Raises:
        ValueError: `seeds` or `shots` is too small, or no examples are left to choose the strength.
    """
    if seeds < 2 or min(shots) < 1:
        raise ValueError(f"{seeds} seeds, shots {shots}; expected at least 2 seeds and 1 shot")
    found: dict[tuple[int, str], list[float]] = {}
    plan = [(k, name, seed) for k in shots for name in methods for seed in range(seeds)]
    for k, name, seed in progress(plan, "draw"):
        fit, train, test = methods[name]
        order = shuffled_by_class(train.classes, seed)
        examples = train.of(torch.cat([rows[:k] for rows in order]))
        val = train.of(torch.cat([rows[k : k + min(k, 4)] for rows in order]))
        if not len(val.classes):
            raise ValueError(f"no class has more than {k} examples; choosing lambda needs more")
        strength, _ = fit_best(fit, examples, val)
        found.setdefault((k, name), []).append(share_right(fit(examples, strength), test))
    return [
        {"shots": k, "method": name, "mean": fmean(accuracies), "std": stdev(accuracies)}
        for (k, name), accuracies in found.items()
    ]
