"""fairseq's label-smoothed cross entropy as a weighted sum, beside a distillation loss."""


def cross_entropy_weights(
    alpha: float, label_smoothing: float, vocabulary: int
) -> tuple[float, float]:
    """What ``-log q[y]`` and ``sum_v log q[v]`` of a token weigh in ``(1 - alpha) CE``.

    Label-smoothed with ``s`` over ``V`` symbols, ``CE = -(1 - s - e) log q[y] - e sum_v log q[v]``,
    ``e = s / (V - 1)``, as in fairseq's ``label_smoothed_cross_entropy``.
    """
    epsilon = label_smoothing / (vocabulary - 1)
    return (1.0 - alpha) * (1.0 - label_smoothing - epsilon), -(1.0 - alpha) * epsilon
